"""What torch.compile adds to a fused step, and how much of that is the fused graph's own.

A compiled call checks guards and goes through the runtimes of AOTAutograd and Inductor whatever its
graph holds. That share is measured by compiling the same network, then putting what the module
itself calls, its prepared network, in the place of the graphs' code, and comparing with a plain
call of that prepared network. Inductor's code further asserts the sizes of every input and result,
and its ops take all tensors at every call. In return, compiling spares the checks by which the
module itself knows that nothing has changed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from fused_mlp import FusedResearchNet
from fused_mlp.ops.research_net import apply_checked

from . import tables
from .cases import REFERENCE
from .timing import SMOKE, Budget, interleave, spread

_BATCH = 32
_KERNELS = torch.ops.fused_mlp_kernels
_NO_ASSERTS: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False}


def measure(device: torch.device, smoke: bool = False) -> list[dict[str, Any]]:
    """Return a row for training and one for evaluation: µs a step on one thread of the CPU.

    No rows for another device, where launches hide the host's time.
    """
    if device.type != "cpu":
        return []
    budget = SMOKE if smoke else Budget(seconds=3.0, rounds=(11, 301))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_measure(_BATCH, training, budget) for training in (True, False)]
    finally:
        torch.set_num_threads(threads)


def _measure(batch: int, training: bool, budget: Budget) -> dict[str, Any]:
    first, *hidden, last = REFERENCE
    x, grad = torch.randn(batch, first), torch.randn(batch, last)
    fused = FusedResearchNet(first, hidden, last).train(training)
    uncompiled: list[float] = []

    def added(**options: Any) -> tuple[float, float]:
        """Return what compiling with the options adds to a step, and what the module's checks."""
        net = copy.deepcopy(fused)
        if options.get("backend") is _prepared_inside:
            options["backend"] = functools.partial(_prepared_inside, _prepare(net))
        torch.compiler.reset()  # a call looks through all that was compiled for its code
        steps = {
            "fused": _step(fused, fused, x, grad, training),
            "compiled": _step(
                torch.compile(net, fullgraph=True, **options), net, x, grad, training
            ),
            "plain": _step(_plain(net), net, x, grad, training),
        }
        with _compiled_and_settled(steps.values()):
            samples = interleave(steps, budget)
        us = {name: spread(taken.seconds).median * 1e6 for name, taken in samples.items()}
        uncompiled.append(us["fused"])
        return us["compiled"] - us["fused"], us["fused"] - us["plain"]

    (compiled, checks), (unchecked, _) = added(), added(options=_NO_ASSERTS)
    bare, _ = added(backend=_prepared_inside)
    return {
        "mode": "train" if training else "eval",
        "fused µs": round(uncompiled[0], 1),
        "compiled µs": round(uncompiled[0] + compiled, 1),
        "compiling adds µs": round(compiled, 1),
        "guards and runtimes µs": round(bare + checks, 1),
        "size assertions µs": round(compiled - unchecked, 1),
        "tensors handed over µs": round(unchecked - bare, 1),
        "module's checks spared µs": round(checks, 1),
    }


@contextmanager
def _compiled_and_settled(steps: Any) -> Iterator[None]:
    """Compile, then keep the collector from the many objects that compiling leaves.

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


def _prepared_inside(prepared: Tensor, graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Compile as Inductor does, but to code that calls the prepared network."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        code = _code(graph, prepared)
        compiled: Any = compile_fx_inner(graph, inputs, **options)
        compiled.current_callable = code
        return compiled

    with (
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        return compile_fx(graph, inputs, inner, dict(_NO_ASSERTS))


def _code(graph: fx.GraphModule, prepared: Tensor) -> Callable[[list[Any]], list[Any]]:
    """Return what takes and gives what a graph with one of our ops does."""
    *nodes, output = graph.graph.nodes
    inputs = [node for node in nodes if node.op == "placeholder"]
    name, ours, given = next(filter(None, map(_ours, nodes)))
    call: Callable[..., Any]
    wanted, behind = ("input",), (prepared,)
    if name == "research_net_compiled_backward":
        call = _KERNELS.research_net_prepared_backward.default
        wanted, behind = ("grad_output", "input", "saved"), (prepared, None)
    elif name == "research_net_compiled":
        call = _KERNELS.research_net_prepared.default
    else:
        call = _evaluate
    taken = [inputs.index(given[argument]) for argument in wanted]

    def place(node: Any) -> int:
        """Where a value of the graph stands among the inputs, the results and None."""
        if node is None:
            return -1
        if node.op == "placeholder":
            return inputs.index(node)
        return len(inputs) + (0 if node is ours else int(node.args[1]))

    places = [place(node) for node in output.args[0]]

    def run(arguments: list[Any]) -> list[Any]:
        found = call(*[arguments[i] for i in taken], *behind)
        everything = [*arguments, *found, None]
        arguments.clear()
        return [everything[i] for i in places]

    return run


def _ours(node: fx.Node) -> tuple[str, fx.Node, dict[str, Any]] | None:
    """Return the name, the node and the arguments where it calls one of our ops."""
    op: Any = node.target
    if node.op == "call_function" and node.args and isinstance(node.args[0], torch._ops.OpOverload):
        op = node.args[0]  # inside the node that says what the op writes
        return op._opname, node, dict(node.kwargs)
    if getattr(op, "namespace", None) != _KERNELS.name:
        return None
    names = [argument.name for argument in op._schema.arguments]
    return op._opname, node, dict(zip(names, node.args, strict=False))


def _evaluate(input: Tensor, prepared: Tensor) -> tuple[Tensor]:
    return (_KERNELS.research_net_evaluate.default(input, prepared),)


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
