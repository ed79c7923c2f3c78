"""Where one small training step spends its time: Python, dispatch, engine, memory, kernels.

Each share is the difference of two timings taken in turns, so nothing instruments what it measures
and the shares add up to the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_mlp import backends
from fused_mlp.dropout import draw_seed

from . import counting, workload
from .cases import NETWORK, REFERENCE, Case
from .timing import Budget, interleave, spread

KERNELS = torch.ops.fused_mlp_kernels
_BLOCKS = 16
SHARES = {
    "python": "module and backend checks, reading parameters",
    "seed": "drawing the dropout's seed",
    "record": "recording the autograd node",
    "engine": "autograd engine, accumulation into every parameter, the node's Python",
    "dispatch": "torch's dispatcher and argument conversion, both directions",
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
    empty_calls = us["forward, no rows"] + us["backward, no rows"]
    fused = {
        "python": us["fused, no grad"] - us["forward op"] - us["seed"],
        "seed": us["seed"],
        "record": us["fused forward"] - us["fused, no grad"],
        "engine": us["fused step"] - us["fused forward"] - us["backward op"],
        "dispatch": empty_calls - allocation,
        "allocation": allocation,
        "kernel forward": us["forward op"] - us["forward, no rows"],
        "kernel backward": us["backward op"] - us["backward, no rows"],
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
        steps[f"{name}, no grad"] = _without_grad(_bind(model, x))
    forward, backward = _raw_calls(work, x, grad)
    none, none_backward = _raw_calls(work, x[:0], grad[:0])
    steps |= {
        "forward op": _without_grad(forward),
        "backward op": _without_grad(backward),
        "forward, no rows": _without_grad(none),
        "backward, no rows": _without_grad(none_backward),
        "seed": lambda: draw_seed(x.device),
        "empty node": _empty_node(work.fused.parameters(), grad),
    }
    return steps


def _bind(function: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    return lambda: function(x)


def _without_grad(step: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            step()
        finally:
            torch._C._set_grad_enabled(before)

    return run


def _raw_calls(
    work: workload.Workload, x: Tensor, grad: Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return the forward and the backward kernel's call, past modules and autograd."""
    layers: Any = work.fused.research_layers
    linears = [m for m in layers if isinstance(m, torch.nn.Linear)]
    norm: Any = next(m for m in layers if isinstance(m, torch.nn.BatchNorm1d))
    weights, biases = [m.weight for m in linears], [m.bias for m in linears]
    p = [work.case.dropout] * (len(linears) - 2)
    seed = draw_seed(x.device)
    ends = (True, p, seed)
    run, back = KERNELS.research_net.default, KERNELS.research_net_backward.default
    buffers = [b.clone() for b in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]

    def forward() -> Any:
        return run(x, weights, biases, norm.weight, norm.bias, *buffers, *ends, 0.1, 1e-5, 0.01)

    with torch.no_grad():
        saved = forward()[1]
    mask = [False, *([True] * (2 * len(linears) + 2))]

    def backward() -> object:
        return back(grad, x, weights, biases, norm.weight, norm.bias, saved, *ends, 0.01, mask)

    return forward, backward


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
