"""Eager and fused networks with the same weights, and what they did."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_mlp import FusedResearchNet, FusedSequential
from fused_mlp.eager import IntelligentResearchNetwork


def network_layers(
    widths: tuple[int, ...] = (10, 64, 32, 5), dropout: float = 0.0, **place: Any
) -> list[nn.Module]:
    """Return the layers of the reference network as a user writes them."""
    layers: list[nn.Module] = []
    for before, width in itertools.pairwise(widths[:-2]):
        layers += [nn.Linear(before, width, **place), nn.ReLU(), nn.Dropout(dropout)]
    return [
        *layers,
        nn.Linear(widths[-3], widths[-2], **place),
        nn.BatchNorm1d(widths[-2], **place),
        nn.LeakyReLU(),
        nn.Linear(widths[-2], widths[-1], **place),
    ]


def pair(layers: list[nn.Module]) -> tuple[nn.Sequential, FusedSequential]:
    """Return the same layers twice: in an nn.Sequential and, copied, in a FusedSequential."""
    return nn.Sequential(*layers), FusedSequential(*copy.deepcopy(layers))


class KernelsRun(TorchDispatchMode):
    """Inside its ``with`` block, notes the names of the raw kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fused_mlp_kernels":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def kernels_run(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """Return the names of the raw kernels a call runs, in order."""
    with KernelsRun() as run:
        function(*arguments)
    return run.names


def assert_same_step(eager: nn.Module, fused: nn.Module, input: Tensor, **tolerance: Any) -> None:
    """Assert that both modules put out the same, with the same gradients and buffers after it.

    A gradient may err by 2e-5 of the largest one in the network: that of a bias before a batch
    norm is rounding alone.
    """
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-5}
    results = []
    for module in (eager, fused):
        x = input.detach().clone().requires_grad_(input.requires_grad)
        output = module(x)
        if output.requires_grad:
            weight = torch.linspace(-1, 1, output.numel(), device=output.device)
            (output * weight.reshape(output.shape).to(output.dtype)).sum().backward()
        results.append((output, x.grad))
    (expected, expected_grad), (output, grad) = results
    torch.testing.assert_close(output, expected, **tolerance)
    torch.testing.assert_close(grad, expected_grad, **tolerance)
    gradients = {name: p.grad for name, p in eager.named_parameters() if p.grad is not None}
    largest = max((g.abs().max().item() for g in gradients.values() if g.numel()), default=0.0)
    loose = {**tolerance, "atol": max(tolerance["atol"], 2e-5 * largest)}
    for name, parameter in fused.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients.get(name), **loose, msg=lambda m, n=name: f"grad of {n}: {m}"
        )
    buffers = dict(fused.named_buffers())
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, **tolerance)


def networks(
    device: torch.device,
    hidden: Sequence[int] = (64, 32),
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[IntelligentResearchNetwork, FusedResearchNet]:
    """Return the reference network twice with the same weights: eager and fused."""
    options = {"dropout": dropout, "device": device, "dtype": dtype}
    torch.manual_seed(0)
    eager = IntelligentResearchNetwork(10, list(hidden), 5, **options)
    torch.manual_seed(0)
    return eager, FusedResearchNet(10, list(hidden), 5, **options)
