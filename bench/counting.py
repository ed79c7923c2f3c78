"""What a step asks of the machine: ops and bytes from the op list, peak memory, launches."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They make another tensor over the same memory, or one that nobody has written: no work.
_VIEWS = ("view", "t", "transpose", "expand", "detach", "alias", "_unsafe_view", "unsqueeze",
          "squeeze", "permute", "slice", "select", "as_strided", "empty",
          "empty_like", "new_empty", "empty_strided")  # fmt: skip
_PRODUCTS = {"mm": 0, "linear": 0, "addmm": 1}  # which argument's last dimension is summed over


@dataclass(frozen=True)
class Op:
    """One op of a step: its name, the bytes it reads and writes, and its operations."""

    name: str
    bytes: int
    flops: int


class OpCounter(TorchDispatchMode):
    """Lists the ops that move data, with the bytes of what they read and write.

    A product counts two operations for each pair it multiplies, other ops one for each element
    of their largest tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _VIEWS:
            moved = 0
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            for tensor in (*inputs, *outputs):
                held = tensor.untyped_storage().nbytes()  # less, where a tensor is expanded
                moved += min(held, tensor.numel() * tensor.element_size())
            flops = max((t.numel() for t in (*inputs, *outputs)), default=0)
            if name in _PRODUCTS:
                flops = 2 * outputs[0].numel() * inputs[_PRODUCTS[name]].shape[-1]
            self.ops.append(Op(name, moved, flops))
        return out


def list_ops(step: Callable[[], object]) -> list[Op]:
    """Return the ops of a plain PyTorch step. Fused modules would step aside for this."""
    with OpCounter() as counter:
        step()
    return counter.ops


def count_ops(step: Callable[[], object]) -> tuple[int, int]:
    """Return how many ops a plain PyTorch step takes, and the bytes they move."""
    ops = list_ops(step)
    return len(ops), sum(op.bytes for op in ops)


def peak_memory(step: Callable[[], object], device: torch.device) -> int | None:
    """Return the most bytes a step holds above what was allocated before it.

    On a GPU by ``torch.cuda.max_memory_allocated``, on the CPU by the allocator's own events. What
    a library takes past PyTorch's allocator is not seen; None where there are no events.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    events = _memory_events(step)
    held = peak = 0
    for size in events:
        held += size
        peak = max(peak, held)
    return peak if events else None


def count_allocations(step: Callable[[], object]) -> list[int]:
    """Return the bytes of each block that a step takes from PyTorch's CPU allocator."""
    step()
    return [size for size in _memory_events(step) if size > 0]


def _memory_events(step: Callable[[], object]) -> list[int]:
    """Return the bytes taken (positive) and given back (negative), in order."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    with silent(), profile(activities=activities, profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return [event.nbytes() for event in events]


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep what torch's C++ side says about itself off the terminal."""
    saved = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def launches(step: Callable[[], object]) -> int:
    """Return how many kernels a step launches on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with silent(), profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def gpu_times(step: Callable[[], object]) -> dict[str, float]:
    """Return device time by CUDA events, by graph replay, and the host's time for a call, in s."""
    import time

    from triton import testing

    found = {"event_s": testing.do_bench(step, return_mode="median") / 1e3}
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph = testing.do_bench_cudagraph(step, return_mode="median")
        found["graph_s"] = graph / 1e3
    except (RuntimeError, AssertionError):  # a step that waits for the GPU cannot be captured
        torch.cuda.synchronize()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):  # few enough not to fill the queue
        step()
    found["host_s"] = (time.perf_counter() - start) / 20
    torch.cuda.synchronize()
    return found
