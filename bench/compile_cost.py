"""What torch.compile adds to a fused step, beside what it adds to a step that computes nothing.

A compiled call checks guards and goes through AOTAutograd's runtime whatever its graph holds. That
share is measured by compiling the eager network with its graphs emptied: the same parameters, no
kernel. What the compiled fused step takes beyond the uncompiled one should be no more than that.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_mlp import FusedResearchNet
from fused_mlp.eager import IntelligentResearchNetwork

from .cases import REFERENCE
from .overhead import _empty_node
from .timing import SMOKE, Budget, interleave, spread


def measure(batch: int = 32, budget: Budget | None = None) -> list[dict[str, Any]]:
    """Return a row for training and one for evaluation: µs a call, fused and not, and the rest."""
    budget = budget or Budget(seconds=6.0, rounds=(11, 301))
    return [_measure(batch, training, budget) for training in (True, False)]


def _measure(batch: int, training: bool, budget: Budget) -> dict[str, Any]:
    from torch._dynamo.backends.common import aot_autograd

    first, *hidden, last = REFERENCE
    x, grad = torch.randn(batch, first), torch.randn(batch, last)
    torch.compiler.reset()
    fused = FusedResearchNet(first, hidden, last).train(training)
    compiled = copy.deepcopy(fused)
    empty = IntelligentResearchNetwork(first, hidden, last).train(training)
    no_graph = aot_autograd(fw_compiler=_emptied, bw_compiler=_emptied, inference_compiler=_emptied)
    steps = {
        "fused": _step(fused, fused, x, grad, training),
        "compiled": _step(torch.compile(compiled, fullgraph=True), compiled, x, grad, training),
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
        "to an empty graph µs": round(us["emptied"] - us.get("node", 0.0), 1),
    }


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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = measure(budget=SMOKE if options.smoke else None)
    finally:
        torch.set_num_threads(threads)
    widths = ",".join(map(str, REFERENCE))
    print(f"({widths}) at batch 32, one thread; a step is forward and backward:\n")
    print("| " + " | ".join(rows[0]) + " |")
    print("|---|" + "--:|" * (len(rows[0]) - 1))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    return 0
