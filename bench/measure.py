"""Check the contestants of a case against float64, then time them in turns."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import counting, environment, workload
from .cases import Case
from .errors import BenchError, Unsupported, Wrong
from .results import Row
from .rivals import AGAIN, EAGER, FUSED, RIVALS, Contestant, Rival
from .timing import Budget, Samples, Spread, interleave, ratios, spread

Exact = list[Tensor]


def measure(case: Case, rivals: Sequence[Rival], budget: Budget) -> list[Row]:
    """Return a row for every rival, and one for eager a second time: what ratio noise makes.

    A contestant that cannot run or is wrong gets a row without times that says so.

    Raises:
        BenchError: where fused is wrong.
    """
    gc.collect()
    work = workload.build(case)
    rows: dict[str, Row] = {}
    contestants: dict[str, Contestant] = {}
    exact = work.results(work.eager, torch.float64)
    eager_error = workload.error(work.results(work.eager), exact)
    device = torch.device(case.device)
    for rival in rivals:
        row = rows[rival.name] = _row(case, rival.name)
        try:
            contestant, first_call = _first_call(rival, work, device)
            if contestant.results is not None:
                row.error = workload.error(contestant.results(), exact)
                workload.check(row.error, eager_error, case.dtype)
            contestants[rival.name], row.first_call_s = contestant, first_call
        except Unsupported:
            del rows[rival.name]
        except Wrong as reason:
            if rival.name == FUSED:  # all times are relative to it
                raise BenchError(f"{case}: fused is wrong: {reason}") from None
            row.note = f"wrong, so not timed: {reason}"
        except Exception as failure:  # a rival's failure is its own
            if rival.name in (EAGER, FUSED):
                raise
            row.note = f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"
    del exact
    if EAGER in contestants:
        contestants[AGAIN] = next(r for r in rivals if r.name == EAGER).prepare(work)
        rows[AGAIN] = _row(case, AGAIN)
    with _mode(case):
        _time(rows, contestants, device, budget)
        _count(rows, contestants, device, case)
    return list(rows.values())


def _first_call(
    rival: Rival, work: workload.Workload, device: torch.device
) -> tuple[Contestant, float]:
    """Return the contestant and how long its first result took, compiling and packing included."""
    start = time.perf_counter()
    contestant = rival.prepare(work)
    with _mode(work.case):
        contestant.step()
        environment.synchronize(device)
    return contestant, time.perf_counter() - start


def _row(case: Case, contestant: str) -> Row:
    return Row(
        case.op, case.shape, case.batch, case.mode, case.dtype_name, case.device,
        torch.get_num_threads(), contestant, flops=case.flops, bytes=case.bytes,
    )  # fmt: skip


def _mode(case: Case) -> contextlib.AbstractContextManager[object]:
    # Entered once around all calls: entering it costs as much as a small network.
    return torch.inference_mode() if case.mode == "eval" else contextlib.nullcontext()


def _time(
    rows: dict[str, Row],
    contestants: dict[str, Contestant],
    device: torch.device,
    budget: Budget,
) -> None:
    """Race what runs on PyTorch's threads; then, with rests, what has threads of its own.

    Those are compared by medians. Fused among them met their spinning threads in spite of the
    rests: at (1024,[1024,1024],1024) x 256 it took twice its time.
    """
    strangers = [name for name in contestants if name in RIVALS and RIVALS[name].own_threads]

    def race(names: Iterable[str], pause: float) -> dict[str, Samples]:
        steps = {name: contestants[name].step for name in names}
        return interleave(steps, budget, lambda: environment.synchronize(device), pause)

    samples = race([name for name in contestants if name not in strangers], 0.0)
    for name, taken in samples.items():
        ratio = ratios(samples[EAGER].seconds, taken.seconds)
        over_fused = ratios(taken.seconds, samples[FUSED].seconds)
        _fill(rows[name], taken, ratio, over_fused.median)
    eager, fused = rows[EAGER].median_s, rows[FUSED].median_s
    if strangers and eager and fused:
        for name, taken in race(strangers, budget.pause).items():
            times = spread(taken.seconds)
            _fill(rows[name], taken, times.under(eager), times.median / fused)


def _fill(row: Row, taken: Samples, ratio: Spread, over_fused: float) -> None:
    times = spread(taken.seconds)
    row.median_s, row.low_s, row.high_s = times.median, times.low, times.high
    row.samples = times.count
    row.speed_up, row.speed_up_low, row.speed_up_high = ratio.median, ratio.low, ratio.high
    row.over_fused = over_fused


def _count(
    rows: dict[str, Row], contestants: dict[str, Contestant], device: torch.device, case: Case
) -> None:
    with torch.inference_mode(case.mode == "eval"):
        ops, moved = counting.count_ops(contestants[EAGER].step)
    for name in (EAGER, AGAIN):
        rows[name].ops, rows[name].bytes = ops, float(moved)
    for name in (EAGER, FUSED):
        row = rows[name]
        if row.median_s is None:
            continue
        row.peak_bytes = counting.peak_memory(contestants[name].step, device)
        if device.type == "cuda":
            row.launches = counting.launches(contestants[name].step)
            for key, value in counting.gpu_times(contestants[name].step).items():
                setattr(row, key, value)
