"""Chains of Linear layers, eager and fused, made ready for their next call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from support.networks import assert_same_step, pair
from torch import nn

from fused_mlp import FusedSequential, LinearReLU


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
