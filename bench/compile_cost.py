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
import re
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor.codecache import PyCodeCache

from fused_mlp import FusedResearchNet
from fused_mlp.ops import compiled
from fused_mlp.ops.research_net import apply_checked

from . import tables
from .cases import REFERENCE
from .timing import SMOKE, Budget, interleave, spread

_BATCH = 32
_COPIES = 4  # of each step: where memory happens to lie makes some of them 5 µs slower
_KERNELS = torch.ops.fused_mlp_kernels
_NO_ASSERTS: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False}


def measure(device: torch.device, smoke: bool = False) -> list[dict[str, Any]]:
    """Return a row for training and one for evaluation: µs a step on one thread of the CPU.

    No rows for another device, where launches hide the host's time.
    """
    if device.type != "cpu":
        return []
    budget = SMOKE if smoke else Budget(seconds=8.0, sample=10e-3, rounds=(11, 1001))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        copies = 1 if smoke else _COPIES
        return [_measure(_BATCH, training, budget, copies) for training in (True, False)]
    finally:
        torch.set_num_threads(threads)


def _measure(batch: int, training: bool, budget: Budget, copies: int) -> dict[str, Any]:
    first, *hidden, last = REFERENCE
    x, grad = torch.randn(batch, first), torch.randn(batch, last)
    fused = FusedResearchNet(first, hidden, last).train(training)

    def compiled_step(prepared: bool = False, keep_all: bool = False, **options: Any) -> Any:
        net = copy.deepcopy(fused)
        with mock.patch.object(FusedResearchNet, "__call__", _copy(FusedResearchNet.__call__)):
            call = torch.compile(net, fullgraph=True, **options)
        step = _step(call, net, x, grad, training)
        with ExitStack() as stack:
            stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
            stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
            if prepared:
                stack.enter_context(_calls_prepared(_prepare(net), numel, keep_all))
            step()
        return step

    net = copy.deepcopy(fused)
    numel = _KERNELS.research_net_prepared(x, _prepare(net))[1].numel() if training else 0
    steps: dict[str, Callable[[], object]] = {}
    for copied in range(copies):
        net = copy.deepcopy(fused)
        steps |= {
            f"fused {copied}": _step(net, net, x, grad, training),
            f"plain {copied}": _step(_plain(net), net, x, grad, training),
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


def _plain(net: FusedResearchNet) -> Callable[[Tensor], Tensor]:
    """Return what runs the prepared network as its module does, without looking at the module."""
    prepared = _prepare(net)
    if not net.training:
        evaluate = _KERNELS.research_net_evaluate.default._op
        return lambda x: evaluate(x, prepared)
    linear, norm = _layers_of(net)
    weights, biases = [layer.weight for layer in linear], [layer.bias for layer in linear]
    parameters = (*weights, *biases, norm.weight, norm.bias)
    call = (prepared, (False, False, *[True] * len(parameters)), None, None, (True, (), 0, 0, 0))
    return lambda x: apply_checked(call, x, *parameters)


def _layers_of(net: FusedResearchNet) -> tuple[list[nn.Linear], nn.BatchNorm1d]:
    layers = list(net.research_layers)
    norm = next(layer for layer in layers if isinstance(layer, nn.BatchNorm1d))
    return [layer for layer in layers if isinstance(layer, nn.Linear)], norm


def _prepare(net: FusedResearchNet) -> Tensor:
    """Return the network's tensors and options as its module hands them to the CPU library."""
    layers: list[Any] = list(net.research_layers)
    linear, norm = _layers_of(net)
    slope = next(layer.negative_slope for layer in layers if isinstance(layer, nn.LeakyReLU))
    dropout_p = [layer.p * layer.training for layer in layers if isinstance(layer, nn.Dropout)]
    prepared: Tensor = _KERNELS.research_net_prepare(
        [layer.weight for layer in linear], [layer.bias for layer in linear], norm.weight,
        norm.bias, norm.running_mean, norm.running_var,
        norm.num_batches_tracked if net.training else None, net.training, dropout_p, norm.momentum,
        norm.eps, slope,
    )  # fmt: skip
    return prepared


_library = torch.library.Library("fused_mlp_bench", "DEF")
_library.define("backward(Tensor grad, Tensor input, Tensor[] given, Tensor saved) -> Tensor[]")
torch.library.register_fake(
    "fused_mlp_bench::backward",
    lambda grad, input, given, saved: [t.new_empty(t.shape) for t in given],
    lib=_library,
)


class _KeepsAll(torch.autograd.Function):
    """The node of a graph that keeps for backward what the uncompiled module keeps."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        _, buffers, options = call
        output, saved = _KERNELS.research_net_compiled(tensors[0], tensors[1:], buffers, options)
        ctx.save_for_backward(*tensors, saved)
        result: Tensor = output
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, *given, saved = ctx.saved_tensors
        return None, None, *torch.ops.fused_mlp_bench.backward(grad, input, given, saved)


_prepared: list[Tensor] = []  # what the code that Inductor wrote calls, in the order of compiling


@contextmanager
def _calls_prepared(prepared: Tensor, numel: int, keep_all: bool) -> Iterator[None]:
    """Inside, Inductor's code calls the prepared network in the place of a graph's own op.

    Args:
        numel: how many elements the prepared network saves for backward.
    """
    handle = f"{__name__}._prepared[{len(_prepared)}]"
    _prepared.append(prepared)
    write = PyCodeCache.write

    def rewritten(source: str, *rest: Any) -> Any:
        return write(_rewrite(source, handle, numel), *rest)

    node = _KeepsAll if keep_all else compiled.ResearchNetCompiledFunction
    with (
        mock.patch.object(compiled, "ResearchNetCompiledFunction", node),
        mock.patch.object(PyCodeCache, "write", rewritten),
    ):
        yield


def _rewrite(source: str, prepared: str, numel: int) -> str:
    """Return Inductor's code with the one call replaced, and the size of what forward saves."""
    called = re.search(r"torch\.ops\.fused_mlp_\w+\.(\w+)\.default\((.*)\)\n", source)
    assert called is not None, source
    op, given = called.groups()
    own = "torch.ops.fused_mlp_kernels.research_net"
    if op.endswith("backward"):
        grad, input, saved = re.findall(r"\b[a-z]\w*", re.sub(r"\[.*?\]", "", given))
        call = f"{own}_prepared_backward.default({grad}, {input}, {saved}, prepared, None)\n"
    else:
        saved = r"buf\d+"
        name = "evaluate" if op.endswith("evaluate") else "prepared"
        call = f"{own}_{name}.default({given.partition(',')[0]}, prepared)\n"
    source = source.replace(called[0], call)
    source = re.sub(rf"(assert_size_stride\({saved}), \(\d+, \)", rf"\1, ({numel}, )", source)
    return f"import {__name__}\nprepared = {prepared}\n{source}"


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
