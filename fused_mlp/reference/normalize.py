"""(x - mean) / (std + eps) and its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .statistics import accumulate_dtype, centre, element_count, reduced_dims


def normalize(
    input: Tensor, dim: Sequence[int] | None, correction: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = input.to(accumulate_dtype(input.dtype))
    dims = reduced_dims(input, dim)
    keepdim = dim is not None
    mean, centred = centre(x, dims, keepdim)
    # torch.var with the dims and a correction above the count gives inf; clamp as torch.std does.
    freedom = max(element_count(input, dim) - correction, 0.0)
    if dims and freedom:
        # By Welford's formula: over outer dimensions a sum of squares adds up one rounding a term.
        std = centred.std(dims, correction=correction, keepdim=keepdim)
    else:
        squares = centred.square().sum(dims, keepdim=keepdim) if dims else centred.square()
        std = (squares / torch.full_like(squares, freedom)).sqrt()
    return (centred / (std + eps)).to(input.dtype), mean, std


def normalize_formula(
    input: Tensor, dim: Sequence[int] | None, correction: float, eps: float
) -> Tensor:
    dims = reduced_dims(input, dim)
    x = input.to(accumulate_dtype(input.dtype))
    keepdim = dim is not None
    mean = x.mean(dims, keepdim=keepdim) if dims else x
    std = x.std(dims, correction=correction, keepdim=keepdim)
    return ((x - mean) / (std + eps)).to(input.dtype)


def normalize_backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    dim: Sequence[int] | None,
    correction: float,
    eps: float,
) -> Tensor:
    dims = reduced_dims(input, dim)
    grad = grad_output.to(mean.dtype)
    centred = input.to(mean.dtype) - mean
    rstd = 1 / (std + eps)
    freedom = max(element_count(input, dim) - correction, 0.0)
    slope = (grad * centred).sum(dims, keepdim=True) if dims else grad * centred
    slope = (slope * rstd.square() / (freedom * std)).masked_fill(std == 0, 0)
    centre = grad.mean(dims, keepdim=True) if dims else grad
    return (rstd * (grad - centre) - centred * slope).to(input.dtype)
