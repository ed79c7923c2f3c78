"""Serving: latency of single requests, and throughput of threads that serve side by side."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import time
from typing import Any

import torch
from torch import nn

from . import environment, workload
from .cases import NETWORK, REFERENCE, Case
from .timing import quantile


def measure(device: torch.device, smoke: bool = False) -> list[dict[str, Any]]:
    """Return latency percentiles at batch 1 and requests a second of 1, 2, … threads.

    Requests run under ``inference_mode`` with one thread of PyTorch each, as servers set it.
    """
    requests, seconds = (20, 0.01) if smoke else (20_000, 1.0)
    work = workload.build(Case(NETWORK, REFERENCE, 1, "eval", device=str(device)))
    models = {"eager": work.eager, "fused": work.fused}
    data = [x for x, _ in work.inputs]
    compiled = torch.compile(copy.deepcopy(work.eager))
    with contextlib.suppress(Exception), torch.inference_mode():  # it may find no compiler
        compiled(data[0])
        models["compile"] = compiled
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        latencies = _latencies(models, data, requests, device)
        found = []
        for count in sorted({1, 2, min(4, os.cpu_count() or 1)}):
            for name, model in models.items():
                row: dict[str, Any] = {"contestant": name, "threads": count}
                for percent in (50, 95, 99):
                    value = quantile(latencies[name], percent / 100) * 1e6 if count == 1 else None
                    row[f"p{percent} µs"] = "" if value is None else round(value, 1)
                row["requests/s"] = round(_throughput(model, data, count, seconds))
                found.append(row)
    finally:
        torch.set_num_threads(before)
    return found


def _latencies(
    models: dict[str, nn.Module], data: list[torch.Tensor], requests: int, device: torch.device
) -> dict[str, list[float]]:
    """Return ascending seconds a request; the models take turns."""
    found: dict[str, list[float]] = {name: [] for name in models}
    clock = time.perf_counter
    with torch.inference_mode():
        for turn in range(-requests // 20, requests):  # the first ones warm up
            x = data[turn % len(data)]
            for name, model in models.items():
                start = clock()
                model(x)
                environment.synchronize(device)
                if turn >= 0:
                    found[name].append(clock() - start)
    return {name: sorted(times) for name, times in found.items()}


def _throughput(model: nn.Module, data: list[torch.Tensor], count: int, seconds: float) -> float:
    """Return requests a second of ``count`` threads together."""
    served = [0] * count
    gate = threading.Barrier(count + 1)
    over = threading.Event()

    def serve(index: int) -> None:
        done, x = 0, data[index % len(data)]
        with torch.inference_mode():
            for _ in range(10):
                model(x)
            gate.wait()
            while not over.is_set():
                model(x)
                done += 1
        served[index] = done

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    gate.wait()
    start = time.perf_counter()
    time.sleep(seconds)
    over.set()
    spent = time.perf_counter() - start
    for thread in threads:
        thread.join()
    return sum(served) / spent
