"""The plain PyTorch network that ``FusedResearchNet`` replaces.

Tests compare with it, benchmarks race it and the demo trains it beside the fused one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class IntelligentResearchNetwork(nn.Module):
    """Linear+ReLU+Dropout layers, then Linear+BatchNorm1d+LeakyReLU, then Linear.

    Constructor, initial weights under the same ``torch.manual_seed`` and ``state_dict`` keys are
    those of :class:`fused_mlp.FusedResearchNet`.

    Args:
        input_dimensions: number of input features.
        hidden_layers: widths of the hidden layers, at least one. Every one but the last is
            Linear+ReLU+Dropout, the last is Linear+BatchNorm1d+LeakyReLU.
        output_dimensions: number of outputs.
        dropout: probability of dropout.
        negative_slope: slope of the leaky ReLU below zero.
        eps: added to the batch norm's variance.
        momentum: weight of a new batch in the running statistics; None for a plain average.
        device, dtype: of the parameters and buffers.
    """

    def __init__(
        self,
        input_dimensions: int,
        hidden_layers: Sequence[int],
        output_dimensions: int,
        *,
        dropout: float = 0.3,
        negative_slope: float = 0.01,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not hidden_layers:
            raise ValueError("hidden_layers must name at least one width, but is empty")
        layers: list[nn.Module] = []
        width = input_dimensions
        for hidden in hidden_layers[:-1]:
            linear = nn.Linear(width, hidden, device=device, dtype=dtype)
            layers += [linear, nn.ReLU(), nn.Dropout(dropout)]
            width = hidden
        last = hidden_layers[-1]
        layers += [
            nn.Linear(width, last, device=device, dtype=dtype),
            nn.BatchNorm1d(last, eps, momentum, device=device, dtype=dtype),
            nn.LeakyReLU(negative_slope),
            nn.Linear(last, output_dimensions, device=device, dtype=dtype),
        ]
        self.research_layers = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        """Return the output, of shape (N, output_dimensions), for input (N, input_dimensions)."""
        output: Tensor = self.research_layers(input)
        return output
