"""The dtypes, dimensions and means that normalize and the batch norms share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype sums and statistics of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduced_dims(input: Tensor, dim: Sequence[int] | None) -> list[int]:
    return list(range(input.dim())) if dim is None else list(dim)


def element_count(input: Tensor, dim: Sequence[int] | None) -> int:
    count = 1
    for d in reduced_dims(input, dim):
        count *= input.shape[d]
    return count


def centre(x: Tensor, dims: list[int], keepdim: bool) -> tuple[Tensor, Tensor]:
    """Return the mean over ``dims`` and x less it.

    One value of each group is taken off first: a large offset then costs no accuracy, and equal
    values have a deviation of exactly 0.
    """
    if not dims:
        return x.clone(), x - x
    first = x.new_zeros(())
    if x.numel():
        first = x
        for d in dims:
            first = first.narrow(d, 0, 1)
    shifted = x - first
    mean = shifted.mean(dims, keepdim=True)
    centred = shifted - mean
    # What the first sum lost, where torch adds up outer dimensions one rounding a term.
    lost = centred.mean(dims, keepdim=True)
    centred = centred - lost
    mean = first + (mean + lost)
    return mean if keepdim else mean.squeeze(dims), centred


def per_channel(vector: Tensor, input: Tensor) -> Tensor:
    return vector.reshape(-1, 1) if input.dim() == 3 else vector


def channel_dims(input: Tensor) -> list[int]:
    return [0, 2] if input.dim() == 3 else [0]


def channel_parameter(
    vector: Tensor | None, default: float, input: Tensor, dtype: torch.dtype
) -> Tensor | float:
    return default if vector is None else per_channel(vector.to(dtype), input)


def affine(normalized: Tensor, weight: Tensor | None, bias: Tensor | None, input: Tensor) -> Tensor:
    """Return what a batch norm makes of its normalized input."""
    scaled = normalized * channel_parameter(weight, 1.0, input, normalized.dtype)
    return scaled + channel_parameter(bias, 0.0, input, normalized.dtype)
