"""Where one small training step spends its time: Python, dispatch, engine, memory, kernels.

Each share is the difference of two timings taken in turns, so nothing instruments what it measures
and the shares add up to the step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_mlp import backends

from . import counting, options, workload
from .cases import NETWORK, REFERENCE, Case
from .kernels import raw_calls, without_grad
from .timing import Budget, interleave, spread

_BLOCKS = 16
SHARES = {
    "python": "module and backend checks, reading parameters",
    "record": "recording the autograd node",
    "engine": "autograd engine, accumulation into every parameter, the node's Python",
    "dispatch": "torch's dispatcher, argument conversion and the dropout's seed, both directions",
    "allocation": "outputs, saved and gradient tensors",
    "kernel forward": "arithmetic",
    "kernel backward": "arithmetic",
}


class _Empty(torch.autograd.Function):
    """A node with as many inputs that computes nothing, to see what the engine costs by itself."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*tensors)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        ctx.saved_tensors  # noqa: B018 - unpacking is part of any node
        return None, None, *ctx.gradients


def split(
    batch: int = 32, widths: tuple[int, ...] = REFERENCE, budget: Budget | None = None
) -> dict[str, Any]:
    """Measure a training step of a network on the CPU.

    Returns:
        ``batch``, ``widths``; ``fused`` and ``eager``: µs by share; and the whole steps.
    """
    work = workload.build(Case(NETWORK, widths, batch, "train"))
    steps = _steps(work)
    allocations = counting.count_allocations(work.step(work.fused, list(work.fused.parameters())))
    sizes = [torch.empty(max(n // 4, 1)) for n in allocations] or [torch.empty(1)]
    count = max(len(allocations), 1)
    mean = sum(t.numel() for t in sizes) // len(sizes)
    blocks = list(torch.zeros(_BLOCKS, mean).unbind())
    steps["into new"] = lambda: torch._foreach_neg(blocks)
    steps["in place"] = lambda: torch._foreach_neg_(blocks)
    samples = interleave(steps, budget or Budget(seconds=6.0, rounds=(11, 301)))
    us = {name: spread(taken.seconds).median * 1e6 for name, taken in samples.items()}
    # The same work from C++ with and without new tensors.
    allocation = count * max(us["into new"] - us["in place"], 0.0) / _BLOCKS
    small_calls = us["forward, two rows"] + us["backward, two rows"]
    fused = {
        "python": us["fused, no grad"] - us["forward op"],
        "record": us["fused forward"] - us["fused, no grad"],
        "engine": us["fused step"] - us["fused forward"] - us["backward op"],
        "dispatch": small_calls - allocation,
        "allocation": allocation,
        "kernel forward": us["forward op"] - us["forward, two rows"],
        "kernel backward": us["backward op"] - us["backward, two rows"],
    }
    eager = {
        "forward": us["eager, no grad"],
        "record": us["eager forward"] - us["eager, no grad"],
        "backward": us["eager step"] - us["eager forward"],
    }
    return {
        "batch": batch,
        "widths": list(widths),
        "backend": backends.active_backend("cpu"),
        "threads": torch.get_num_threads(),
        "fused": {name: round(value, 3) for name, value in fused.items()},
        "eager": {name: round(value, 3) for name, value in eager.items()},
        "fused step": round(us["fused step"], 3),
        "eager step": round(us["eager step"], 3),
        "empty node": round(us["empty node"], 3),
        "allocations": len(allocations),
        "spread": round(spread(samples["fused step"].seconds).relative, 4),
    }


def _steps(work: workload.Workload) -> dict[str, Callable[[], object]]:
    x, grad = work.inputs[0]
    steps: dict[str, Callable[[], object]] = {}
    for name in ("eager", "fused"):
        model = getattr(work, name)
        steps[f"{name} step"] = work.step(model, list(model.parameters()))
        steps[f"{name} forward"] = _bind(model, x)
        steps[f"{name}, no grad"] = without_grad(_bind(model, x))
    forward, backward = raw_calls(work, x, grad)
    few, few_backward = raw_calls(work, x[:2], grad[:2])  # a batch norm wants two
    steps |= {
        "forward op": without_grad(forward),
        "backward op": without_grad(backward),
        "forward, two rows": without_grad(few),
        "backward, two rows": without_grad(few_backward),
        "empty node": _empty_node(work.fused.parameters(), grad),
    }
    return steps


def _bind(function: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    return lambda: function(x)


def _empty_node(parameters: Any, grad: Tensor) -> Callable[[], object]:
    leaves = list(parameters)
    gradients = [torch.zeros_like(leaf) for leaf in leaves]
    output = torch.zeros_like(grad)

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        _Empty.apply(output, gradients, *leaves).backward(grad)

    return step


def text(found: dict[str, Any]) -> str:
    """Return the split as a Markdown table."""
    total = found["fused step"]
    lines = [
        f"One training step (forward and backward) of ({','.join(map(str, found['widths']))}) at "
        f"batch {found['batch']}, {found['threads']} threads, {found['backend']} kernels, in µs:",
        "",
        "| fused | µs | share | what |",
        "|---|--:|--:|---|",
    ]
    for name, value in found["fused"].items():
        lines.append(f"| {name} | {value:.1f} | {100 * value / total:.0f} % | {SHARES[name]} |")
    lines.append(f"| **whole step** | {total:.1f} | | ± {100 * found['spread']:.0f} % |")
    eager = ", ".join(f"{name} {value:.1f}" for name, value in found["eager"].items())
    lines += [
        "",
        f"Eager: {found['eager step']:.1f} µs ({eager}). A node of as many inputs that computes "
        f"nothing: {found['empty node']:.1f} µs, the floor of any step through autograd. "
        f"{found['allocations']} allocations a fused step.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """``python -m bench overhead``: print the split."""
    parser = argparse.ArgumentParser(
        prog="python -m bench overhead",
        description="Split one small training step into Python, dispatch, autograd engine, "
        "allocation and kernel, in µs.",
    )
    parser.add_argument(
        "--net", type=options.net, default=REFERENCE, metavar="N,N[,N…]",
        help="widths of the network (default: 10,64,32,5)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=options.whole, default=32, metavar="N", help="rows (default: 32)"
    )
    parser.add_argument(
        "--threads", type=options.whole, metavar="N", help="of PyTorch (default: as torch has it)"
    )
    parser.add_argument(
        "--backend", choices=backends.NAMES, default="auto", help="whose kernels run"
    )
    chosen = parser.parse_args(argv)
    if chosen.batch < 2:
        parser.error("--batch: batch norm cannot train at batch 1")
    with options.settings(chosen):
        sys.stdout.write(text(split(chosen.batch, chosen.net)) + "\n")
    return 0
