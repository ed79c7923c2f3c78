"""What torch.compile adds to a fused step, and how much of that it adds to any step.

A compiled call checks guards and goes through AOTAutograd's runtime whatever its graph holds. That
share is measured by compiling the same network with its graphs emptied: the same parameters, no
kernel. Inductor's code then asserts the sizes of every input and result. And a graph calls the op
itself, which packs the weights anew, where the module has them packed and a shorter way to the
kernels. What compiling adds should be no more than these three.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_mlp import FusedResearchNet, functional

from . import tables
from .cases import REFERENCE
from .overhead import _empty_node
from .timing import SMOKE, Budget, interleave, spread

_BATCH = 32
_NO_ASSERTS: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False}


def measure(device: torch.device, smoke: bool = False) -> list[dict[str, Any]]:
    """Return a row for training and one for evaluation: µs a step on one thread of the CPU.

    No rows for another device, where launches hide the host's time.
    """
    if device.type != "cpu":
        return []
    budget = SMOKE if smoke else Budget(seconds=6.0, rounds=(11, 301))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_measure(_BATCH, training, budget) for training in (True, False)]
    finally:
        torch.set_num_threads(threads)


def _measure(batch: int, training: bool, budget: Budget) -> dict[str, Any]:
    from torch._dynamo.backends.common import aot_autograd

    first, *hidden, last = REFERENCE
    x, grad = torch.randn(batch, first), torch.randn(batch, last)
    torch.compiler.reset()
    fused = FusedResearchNet(first, hidden, last).train(training)
    compiled = copy.deepcopy(fused)
    unchecked, empty, plain = (copy.deepcopy(fused) for _ in range(3))
    no_graph = aot_autograd(fw_compiler=_emptied, bw_compiler=_emptied, inference_compiler=_emptied)
    steps = {
        "fused": _step(fused, fused, x, grad, training),
        "op": _step(_op(plain), plain, x, grad, training),
        "compiled": _step(torch.compile(compiled, fullgraph=True), compiled, x, grad, training),
        "unchecked": _step(
            torch.compile(unchecked, fullgraph=True, options=_NO_ASSERTS),
            unchecked,
            x,
            grad,
            training,
        ),
        "emptied": _step(
            torch.compile(empty, fullgraph=True, backend=no_graph), empty, x, grad, training
        ),
    }
    if training:  # the engine's share, which is no cost of compiling
        steps["node"] = _empty_node(fused.parameters(), grad)
    samples = interleave(steps, budget)
    us = {name: spread(taken.seconds).median * 1e6 for name, taken in samples.items()}
    return {
        "mode": "train" if training else "eval",
        "fused µs": round(us["fused"], 1),
        "compiled µs": round(us["compiled"], 1),
        "compiling adds µs": round(us["compiled"] - us["fused"], 1),
        "guards and AOTAutograd µs": round(us["emptied"] - us.get("node", 0.0), 1),
        "size assertions µs": round(us["compiled"] - us["unchecked"], 1),
        "op in place of module µs": round(us["op"] - us["fused"], 1),
    }


def _op(net: FusedResearchNet) -> Callable[[Tensor], Tensor]:
    """Return the network as a call of its op, as a compiled graph makes it."""
    layers: list[Any] = list(net.research_layers)
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    norm = next(layer for layer in layers if isinstance(layer, nn.BatchNorm1d))
    weights, biases = [layer.weight for layer in linear], [layer.bias for layer in linear]
    dropout_p = [layer.p for layer in layers if isinstance(layer, nn.Dropout)]

    def call(x: Tensor) -> Tensor:
        return functional.research_net(
            x, weights, biases, norm.weight, norm.bias, norm.running_mean, norm.running_var,
            net.training, dropout_p,
        )  # fmt: skip

    return call


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


def _emptied(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph to nothing: it hands out the same tensors of the right shapes each time."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    values = [None if node is None else node.meta["val"] for node in output.args[0]]
    shapes = [(tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for v in values]
    made: list[Any] = []

    def run(arguments: list[Any]) -> list[Any]:
        if not made:  # not while torch traces, where they would be fake
            made.extend(
                torch.zeros(s[0], dtype=s[1]) if isinstance(s, tuple) else s for s in shapes
            )
        arguments.clear()
        return list(made)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


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
