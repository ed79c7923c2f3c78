"""What the tests of torch.compile share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .drop_in import rows

Found = list[Any]  # tensors, and None for a gradient that nobody wants


class Compiled(nn.Module):
    """A network that runs compiled under its own parameter names."""

    def __init__(self, net: Any, **options: Any) -> None:
        super().__init__()
        self.call = torch.compile(net, fullgraph=True, **options)
        self.named_parameters = net.named_parameters
        self.named_buffers = net.named_buffers

    def forward(self, input: Tensor) -> Any:
        return self.call(input)


def kernels_of(net: Any, input: Tensor) -> list[str]:
    """Return the raw kernels that a call runs, compiled or not."""
    with torch.profiler.profile() as profile:
        net(input)
    return [
        event.name.removeprefix("fused_mlp_kernels::")
        for event in profile.events()
        if event.name.startswith("fused_mlp_kernels::")
    ]


def save_nothing(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def save_matrix_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_product = op == torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.MUST_RECOMPUTE


# By name: a config of AOTAutograd's partitioner that computes again in backward to save memory.
SAVING_MEMORY: list[dict[str, Any]] = [
    {"activation_memory_budget": 0.0},
    {"activation_memory_budget": 0.3},
    {"aggressive_recomputation": True},
    {"ban_recompute_not_in_allowlist": False},
]


def steps_of_module_and_graph(fused: Any, backend: str, device: torch.device) -> list[Found]:
    """Return what two training steps and an evaluation find: uncompiled, then compiled.

    Outputs and gradients of the input, gradients of the parameters, buffers, evaluation.
    """
    dtype = next(fused.parameters()).dtype
    compiled = copy.deepcopy(fused)
    results = []
    for net, step in ((fused, fused), (compiled, Compiled(compiled, backend=backend))):
        torch.manual_seed(11)
        found: Found = []
        for _ in range(2):
            x = rows(device=device).to(dtype).requires_grad_()
            output = step(x)
            output.square().sum().backward()
            found += [output, x.grad]
        results.append([*found, *(p.grad for p in net.parameters()), *net.buffers()])
    for net, found in zip((fused, compiled), results, strict=True):
        evaluate = net.eval()
        if net is compiled:
            evaluate = torch.compile(net, fullgraph=True, backend=backend)
        with torch.no_grad():
            found.append(evaluate(rows(device=device).to(dtype)))
    return results


def gradients_kept_and_checkpointed(
    fused: Any, policy: Callable[..., CheckpointPolicy] | None, backend: str, device: torch.device
) -> list[Found]:
    """Return the gradients of a compiled step that keeps all, and of one under checkpointing."""
    options: dict[str, Any] = {"use_reentrant": False}
    if policy is not None:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)

    def step(x: Tensor, keep: bool) -> Tensor:
        run = functools.partial(checkpoint, fused, **options)
        loss: Tensor = (fused if keep else run)(x.sin()).square().sum()
        return loss

    results = []
    for keep in (True, False):
        torch.manual_seed(11)
        x = rows(device=device).requires_grad_()
        fused.zero_grad()
        torch.compile(step, fullgraph=True, backend=backend)(x, keep).backward()
        results.append([x.grad, *(p.grad for p in fused.parameters())])
    return results


def gradients_of_module_and_graph(
    fused: Any, option: dict[str, Any], device: torch.device
) -> list[Found]:
    """Return the gradients of the module and of a graph under an option of AOTAutograd."""
    results = []
    for net in (copy.deepcopy(fused), Compiled(copy.deepcopy(fused), backend="aot_eager")):
        torch.manual_seed(11)
        with torch._functorch.config.patch(option):
            net(rows(device=device)).square().sum().backward()
        results.append([p.grad for _, p in net.named_parameters()])
    return results


def gradients_with_vectors_written(net: Any) -> list[Found]:
    """Return the gradients of a compiled step, and where biases and norms change amid one."""
    compiled = Compiled(net, backend="aot_eager")
    results: list[Found] = []
    for changed in (False, True):
        torch.manual_seed(3)
        loss = compiled(rows()).square().sum()
        if changed:
            with torch.no_grad():
                for parameter in net.parameters():
                    if parameter.dim() == 1:
                        parameter.mul_(2)
        results.append([*torch.autograd.grad(loss, list(net.parameters()))])
    return results


def penalty_gradients(net: Any, device: torch.device) -> Found:
    """Return the gradients of a gradient penalty, in float64, through a graph that runs eagerly."""
    compiled = torch.compile(net.double(), fullgraph=True, backend="eager")
    x = rows(device=device).double().requires_grad_()
    (slope,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    return [x.grad, *(p.grad for p in net.parameters())]
