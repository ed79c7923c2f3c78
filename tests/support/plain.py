"""The ops in plain ``torch.nn.functional``, from the user's side: what eager code would write.

They run in any dtype: in the op's own they are the competitor, in float64 the truth. Nothing here
may import the package under test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize(x: Tensor, dim: Sequence[int] | None, correction: float, eps: float) -> Tensor:
    if not dim:  # torch.std takes (), but divides by zero in its backward
        return (x - x.mean()) / (x.std(correction=correction) + eps)
    dim = tuple(dim)
    mean = x.mean(dim, keepdim=True)
    return (x - mean) / (x.std(dim, correction=correction, keepdim=True) + eps)


def normalize_exact(x: Tensor, dim: Sequence[int] | None, correction: float, eps: float) -> Tensor:
    """The same after taking one value of each group off it, which spares large offsets rounding."""
    if x.numel():
        first = x.detach()
        for d in dim or range(x.dim()):
            first = first.narrow(d, 0, 1) if x.dim() else first
        x = x - first.nan_to_num(0, 0, 0)
    return normalize(x, dim, correction, eps)


def dropout(x: Tensor, p: float, keep: Tensor | None) -> Tensor:
    if keep is None:
        return x
    scale = 1 / (1 - p) if p < 1 else 0.0
    return x * (keep.reshape(x.shape).to(x.dtype) * scale)


def linear_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, p: float, keep: Tensor | None
) -> Tensor:
    return dropout(F.relu(F.linear(x, weight, bias)), p, keep)


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def activation(x: Tensor, name: str, negative_slope: float, approximate: str = "none") -> Tensor:
    if name == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    return F.gelu(x, approximate=approximate) if name == "gelu" else ACTIVATIONS[name](x)


def activation_terms(x: Tensor, name: str) -> Tensor:
    """Return what has the terms of GELU's or SiLU's derivative, but none that cancel, as its own.

    Φ(x) + xφ(x) and σ(x) + xσ(x)(1 - σ(x)) have a zero each, where x is negative: what is left of
    them there is the rounding of x.
    """
    if name == "gelu":
        normal = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        return F.gelu(x) + torch.where(x < 0, 2 * normal, 0)
    return F.silu(x) + torch.where(x < 0, 2 * (F.softplus(x) - F.silu(x)), 0)


def batch_norm_exact(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> Tensor:
    """Batch norm with exact statistics of large offsets, also of no values and no channels."""
    dims = [0, 2] if x.dim() == 3 else [0]
    shape = (1, x.shape[1], 1) if x.dim() == 3 else (1, x.shape[1])
    if x.numel() and training:
        first = x.transpose(0, 1).flatten(1)[:, 0].nan_to_num(0, 0, 0).detach()
        x = x - first.reshape(shape)
        centred = x - x.mean(dims, keepdim=True)
        var = centred.square().mean(dims, keepdim=True)
    elif training:
        centred, var = x, torch.ones(shape, dtype=x.dtype, device=x.device)
    else:
        assert running_mean is not None
        assert running_var is not None
        centred = x - running_mean.to(x.dtype).reshape(shape)
        var = running_var.to(x.dtype).reshape(shape)
    u = centred / (var + eps).sqrt()
    u = u if weight is None else u * weight.reshape(shape)
    return u if bias is None else u + bias.reshape(shape)


def research_net(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    dropout_p: Sequence[float],
    keeps: Sequence[Tensor | None],
    momentum: float,
    eps: float,
    negative_slope: float,
    exact: bool = False,
    kinks: list[Tensor] | None = None,
) -> Tensor:
    """The network; ``kinks`` takes what each ReLU and LeakyReLU saw."""
    kinks = [] if kinks is None else kinks
    for weight, bias, p, keep in zip(weights, biases, dropout_p, keeps, strict=False):
        kinks.append(F.linear(x, weight, bias))
        x = dropout(F.relu(kinks[-1]), p, keep)
    x = F.linear(x, weights[-2], biases[-2])
    statistics = (running_mean, running_var, bn_weight, bn_bias, training)
    if exact:
        kinks.append(batch_norm_exact(x, *statistics, eps))
    else:
        kinks.append(F.batch_norm(x, *statistics, momentum, eps))
    return F.linear(F.leaky_relu(kinks[-1], negative_slope), weights[-1], biases[-1])
