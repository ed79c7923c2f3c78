"""Chains of Linear layers, eager and fused, made ready for their next call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.networks import assert_same_step, network_layers, pair
from torch import nn

from fused_mlp import BatchNormLeakyReLU, FusedSequential, LinearReLU


def layers(dropout: float = 0.0) -> list[nn.Module]:
    return [
        nn.Linear(10, 16), nn.Tanh(), nn.Dropout(dropout),
        nn.Linear(16, 12, bias=False), nn.LeakyReLU(0.2),
        LinearReLU(12, 9, dropout=dropout),
        nn.Linear(9, 8), nn.GELU(),
        nn.Linear(8, 3),
    ]  # fmt: skip


def norm_layers(dropout: float = 0.0) -> list[nn.Module]:
    return [
        nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(16, 12), nn.Tanh(),
        nn.Linear(12, 9, bias=False), nn.BatchNorm1d(9, affine=False), nn.Dropout(dropout),
        nn.Linear(9, 3),
    ]  # fmt: skip


def with_network(dropout: float = 0.0) -> list[nn.Module]:
    """A chain that holds all of research_net's layers, its norm and LeakyReLU in one module."""
    *before, _, _, last = network_layers((16, 12, 9, 6), dropout)
    return [nn.Linear(10, 16), nn.SiLU(), *before, BatchNormLeakyReLU(9), last, nn.Linear(6, 3)]


def tanh_last(dropout: float = 0.0) -> list[nn.Module]:
    """The derivative of the last layer comes from the output."""
    return [LinearReLU(10, 7, dropout=dropout), nn.Linear(7, 5), nn.Tanh()]


def steep(dropout: float = 0.0) -> list[nn.Module]:
    """LeakyReLU of a negative slope, whose derivative its output does not tell; a norm at the end.

    There is a dropout behind the norm that drops nothing at first.
    """
    return [
        nn.Linear(10, 300), nn.LeakyReLU(-0.3), nn.Dropout(dropout),
        nn.Linear(300, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Dropout(dropout),
    ]  # fmt: skip


CHAINS = [layers, norm_layers, with_network, tanh_last, steep]
chains = pytest.mark.parametrize("make", CHAINS)


def make_chain(
    make: Callable[[float], list[nn.Module]], device: torch.device | str, dropout: float = 0.0
) -> FusedSequential:
    torch.manual_seed(0)
    return FusedSequential(*make(dropout)).to(device)


def ready(
    training: bool,
    runs: list[bool],
    dropout: float = 0.0,
    make: Callable[[float], list[nn.Module]] = layers,
) -> tuple[nn.Sequential, FusedSequential]:
    """Return both networks after calls that left the fused one prepared in both modes."""
    eager, fused = pair(make(dropout))
    for mode in (not training, training):
        for net in (eager, fused):
            net.train(mode)
        for _ in range(2):
            x = torch.randn(6, 10)
            fused(x) if dropout else assert_same_step(eager, fused, x)
    assert runs[-1], "the second call in a mode runs as prepared"
    runs.clear()
    return eager, fused
