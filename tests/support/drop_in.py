"""The three ways to swap: every test of a PyTorch tool runs over each, beside the eager network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fused_mlp import FusedResearchNet, FusedSequential, fuse
from fused_mlp.eager import IntelligentResearchNetwork

from .networks import network_layers

# What runs in them: the whole network in one op; its parts, an op each; both, inside a model that
# the user wrote.
KINDS = {
    "FusedResearchNet": ["research_net"],
    "FusedSequential": ["linear_relu", "batch_norm_leaky_relu"],
    "fuse(model)": ["research_net", "linear_relu", "batch_norm_leaky_relu"],
}
COLUMNS = 10


class Model(nn.Module):
    """A model as users write it, with containers of their own."""

    def __init__(self, dropout: float, **place: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(*network_layers((COLUMNS, 16, 12, 6), dropout, **place))
        self.head = nn.Sequential(*parts(6, dropout, **place))

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(input))
        return output


def parts(columns: int, dropout: float, **place: Any) -> list[nn.Module]:
    """Return layers that make runs but no whole network."""
    return [
        nn.Linear(columns, 8, **place),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.BatchNorm1d(8, **place),
        nn.LeakyReLU(0.1),
        nn.Linear(8, 5, **place),
    ]


def drop_in(kind: str, dropout: float = 0.0, **place: Any) -> tuple[nn.Module, nn.Module]:
    """Return an eager network of 10 inputs and 5 outputs and its fused copy.

    Args:
        kind: one of KINDS.
        dropout: probability of every ``nn.Dropout``.
        place: ``device`` and ``dtype`` of the parameters.
    """
    torch.manual_seed(0)
    eager: nn.Module
    fused: nn.Module
    if kind == "FusedResearchNet":
        arguments = (COLUMNS, [16, 12], 5)
        eager = IntelligentResearchNetwork(*arguments, dropout=dropout, **place)
        fused = FusedResearchNet(*arguments, dropout=dropout, **place)
        fused.load_state_dict(eager.state_dict())
    elif kind == "FusedSequential":
        eager = nn.Sequential(*parts(COLUMNS, dropout, **place))
        fused = FusedSequential(*copy.deepcopy(eager))
    else:
        eager = Model(dropout, **place)
        fused = copy.deepcopy(eager)
        assert len(fuse(fused).fused) == 3
    return eager, fused


def rows(
    count: int = 16, device: torch.device | str = "cpu", seed: int = 1, **options: Any
) -> Tensor:
    """Return ``count`` rows of input, the same ones for the same seed."""
    values = torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return values.to(device, **options)
