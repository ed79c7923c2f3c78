"""What torch.compile adds to a fused step, and how much of that is torch.compile's own.

A compiled call checks guards and goes through the runtimes of AOTAutograd and Inductor whatever its
graph holds. That share is what a step takes that Inductor compiled as it compiles any op, beyond
the op by itself in an autograd node like the graph's, called in the shortest way. The op costs more
than the uncompiled module, which calls its network by a handle and checks that nothing has changed;
what Inductor is spared around the op makes up for that (fused_mlp/ops/inductor.py).
"""

from __future__ import annotations

import argparse
import copy
import gc
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fused_mlp.ops import inductor

from . import tables
from .cases import REFERENCE
from .compile_subjects import SUBJECTS, Subject
from .timing import SMOKE, Budget, interleave, spread

_BATCH = 32
_COPIES = 4  # of each step: where memory happens to lie makes some of them 5 µs slower
_NO_ASSERTS: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False}


def measure(device: torch.device, smoke: bool = False) -> list[dict[str, Any]]:
    """Return rows for training and for evaluation of each network: µs a step on one thread.

    No rows for another device than the CPU, where launches hide the host's time.
    """
    if device.type != "cpu":
        return []
    budget = SMOKE if smoke else Budget(seconds=8.0, sample=10e-3, rounds=(11, 1001))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        copies = 1 if smoke else _COPIES
        return [
            _measure(subject, _BATCH, training, budget, copies)
            for subject in SUBJECTS
            for training in (True, False)
        ]
    finally:
        torch.set_num_threads(threads)


def _measure(
    subject: Subject, batch: int, training: bool, budget: Budget, copies: int
) -> dict[str, Any]:
    x, grad = torch.randn(batch, REFERENCE[0]), torch.randn(batch, REFERENCE[-1])
    fused = subject.make().train(training)
    kind: Any = type(fused)

    def compiled(net: nn.Module, **options: Any) -> Any:
        with mock.patch.object(kind, "__call__", _copy(kind.__call__)):
            return torch.compile(net, fullgraph=True, **options)

    makers: dict[str, Callable[[Any], Any]] = {
        "fused": lambda net: net,
        "op": subject.op,
        "usual": compiled,
        "compiled": compiled,
        "unasserted": lambda net: compiled(net, options=_NO_ASSERTS),
    }
    steps: dict[str, Callable[[], object]] = {}
    for copied in range(copies):
        for name, make in makers.items():
            net = copy.deepcopy(fused)
            step = steps[f"{name} {copied}"] = _step(make(net), net, x, grad, training)
            with as_any_op() if name == "usual" else nullcontext(), _uncached():
                step()  # compiles
    with _settled():
        samples = interleave(steps, budget)
    us: dict[str, float] = defaultdict(float)
    for name, taken in samples.items():
        us[name.split()[0]] += spread(taken.seconds).median * 1e6 / copies
    return {
        "network": subject.name,
        "mode": "train" if training else "eval",
        "fused µs": round(us["fused"], 1),
        "op alone µs": round(us["op"], 1),
        "compiled µs": round(us["compiled"], 1),
        "compiling adds µs": round(us["compiled"] - us["fused"], 1),
        "its own µs": round(us["usual"] - us["op"], 1),
        "size assertions µs": round(us["compiled"] - us["unasserted"], 1),
    }


def _copy(function: Any) -> Any:
    """Return the function with code of its own: a call looks through all compiled for its code."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, closure=function.__closure__)


@contextmanager
def _uncached() -> Iterator[None]:
    """Take nothing that was compiled before, perhaps otherwise."""
    from torch._functorch import config as aot_config
    from torch._inductor import config as inductor_config

    with inductor_config.patch(fx_graph_cache=False), aot_config.patch(enable_autograd_cache=False):
        yield


@contextmanager
def lowered_anew() -> Iterator[None]:
    """Forget, until the block ends, how ops of ours are lowered."""
    from torch._inductor.lowering import lowerings

    others = {op: lower for op, lower in lowerings.items() if "fused_mlp" not in str(op)}
    with mock.patch.dict(lowerings, others, clear=True):
        yield


@contextmanager
def as_any_op() -> Iterator[None]:
    """Have Inductor compile the ops of our graphs as it compiles any op."""
    with lowered_anew(), mock.patch.object(inductor, "shortened", lambda lower: lower):
        yield


@contextmanager
def _settled() -> Iterator[None]:
    """Keep the collector from the many objects that compiling leaves.

    It would walk them every few hundred steps: 7 µs a step, whatever was compiled.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _step(
    call: Callable[[Tensor], Tensor], net: nn.Module, x: Tensor, grad: Tensor, training: bool
) -> Callable[[], object]:
    parameters = list(net.parameters())

    def train() -> None:
        for parameter in parameters:
            parameter.grad = None
        call(x).backward(grad)

    def evaluate() -> None:
        with torch.no_grad():
            call(x)

    return train if training else evaluate


def main(arguments: Sequence[str]) -> int:
    """Print the rows as a Markdown table."""
    parser = argparse.ArgumentParser("python -m bench compile", description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="run it all, measure nothing")
    options = parser.parse_args(arguments)
    rows = measure(torch.device("cpu"), options.smoke)
    widths = ",".join(map(str, REFERENCE))
    print(f"({widths}) at batch {_BATCH}, one thread; a step is forward and backward:\n")
    print(tables.plain(rows))
    return 0
