"""What torch.compile adds to a fused step, and how much of that is the fused graph's own.

A compiled call checks guards and goes through the runtimes of AOTAutograd and Inductor whatever its
graph holds. That share is measured on a graph that does just what the module does uncompiled: it
calls what the module itself calls, its prepared network, and keeps the same tensors for backward.
Inductor wrote its code but for these calls. Compared with a plain call of the prepared network, it
shows what compiling costs, without and with the assertions that Inductor writes for the sizes of
every input and result. From there to the graphs that users get are two steps: they keep fewer
tensors for backward, and their ops take all others at every call. In return, compiling spares the
checks by which the module itself knows that nothing has changed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

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

    def compiled_step(prepared: bool = False, keep_all: bool = False, **options: Any) -> Any:
        net = copy.deepcopy(fused)
        with mock.patch.object(kind, "__call__", _copy(kind.__call__)):
            call = torch.compile(net, fullgraph=True, **options)
        step = _step(call, net, x, grad, training)
        with ExitStack() as stack:
            stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
            stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
            if prepared:
                stack.enter_context(subject.calls_prepared(net, x, keep_all))
            step()
        return step

    steps: dict[str, Callable[[], object]] = {}
    for copied in range(copies):
        net = copy.deepcopy(fused)
        steps |= {
            f"fused {copied}": _step(net, net, x, grad, training),
            f"plain {copied}": _step(subject.plain(net), net, x, grad, training),
            f"compiled {copied}": compiled_step(),
            f"calls {copied}": compiled_step(True),
            f"same {copied}": compiled_step(True, keep_all=True),
            f"unchecked {copied}": compiled_step(True, keep_all=True, options=_NO_ASSERTS),
        }
    with _settled(steps.values()):
        samples = interleave(steps, budget)
    us: dict[str, float] = defaultdict(float)
    for name, taken in samples.items():
        us[name.split()[0]] += spread(taken.seconds).median * 1e6 / copies
    own = us["same"] - us["plain"]
    return {
        "network": subject.name,
        "mode": "train" if training else "eval",
        "fused µs": round(us["fused"], 1),
        "compiled µs": round(us["compiled"], 1),
        "compiling adds µs": round(us["compiled"] - us["fused"], 1),
        "its own µs": round(own, 1),
        "of these size assertions µs": round(us["same"] - us["unchecked"], 1),
        "tensors handed over µs": round(us["compiled"] - us["calls"], 1),
        "tensors no longer kept µs": round(us["same"] - us["calls"], 1),
        "checks spared µs": round(us["fused"] - us["plain"], 1),
    }


def _copy(function: Any) -> Any:
    """Return the function with code of its own: a call looks through all compiled for its code."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, closure=function.__closure__)


@contextmanager
def _settled(steps: Any) -> Iterator[None]:
    """Keep the collector from the many objects that compiling leaves.

    It would walk them every few hundred steps: 7 µs a step, whatever was compiled.
    """
    for step in steps:
        step()
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
