"""``normalize``: ``(input - mean) / (std + eps)`` over the whole tensor or some dimensions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ._common import (
    bound,
    check_floating,
    check_number,
    check_tensor,
    differentiate_formula,
    grad_needed,
    register_fake,
    use_formula,
)
from .fit import Fit
from .nested import shape_of
from .schemas import public_library

_forward = bound(torch.ops.fused_mlp_kernels.normalize.default)
_evaluate = bound(torch.ops.fused_mlp_kernels.normalize_evaluate.default)
_backward = bound(torch.ops.fused_mlp_kernels.normalize_backward.default)


class NormalizeFunction(torch.autograd.Function):
    """The autograd node of normalize: keeps the input and two statistics, never the output.

    ``options`` are dim, correction and eps.
    """

    @staticmethod
    def forward(ctx: Any, options: tuple[list[int] | None, float, float], input: Tensor) -> Tensor:
        output, mean, std = _forward(input, *options)
        ctx.save_for_backward(input, mean, std)
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, std = ctx.saved_tensors
        if torch.is_grad_enabled():
            (grad,) = differentiate_formula(
                lambda x: reference.normalize_formula(x, *ctx.options),
                (input,),
                (True,),
                grad_output,
            )
        else:
            grad = _backward(grad_output, input, mean, std, *ctx.options)
        return None, grad


# See research_net.py.
apply_checked = super(torch.autograd.Function, NormalizeFunction).apply

# The kinds of inputs seen before: to recognise one takes a tenth of its checks.
_fit = Fit(feature_dim=None)
_NUMBERS = (int, float)


def normalize(
    input: Tensor, dim: Sequence[int] | None = None, *, correction: float = 1.0, eps: float = 0.0
) -> Tensor:
    """Return (input - mean) / (std + eps); see :func:`fused_mlp.functional.normalize`."""
    if dim is None and type(correction) in _NUMBERS and type(eps) is float and eps >= 0.0:
        variant = _fit.recognise(input)
        if variant is not None and input.numel() > correction:
            if torch.is_grad_enabled() and input.requires_grad:
                return apply_checked((None, correction, eps), input)
            chosen, has_kernel = variant.fits
            if chosen != backends._chosen:
                has_kernel = input.is_cpu and backends.active_backend("cpu") == "native"
                variant.fits = (backends._chosen, has_kernel)
            if has_kernel:
                return _evaluate(input, None, correction, eps)
            return _forward(input, None, correction, eps)[0]
    dims = check(input, dim, correction, eps)
    if use_formula(input):
        return reference.normalize_formula(input, dims, correction, eps)
    _fit.remember(input)
    if grad_needed(input):
        return NormalizeFunction.apply((dims, correction, eps), input)
    return _forward(input, dims, correction, eps)[0]


def check(
    input: Tensor, dim: Sequence[int] | None, correction: float, eps: float
) -> list[int] | None:
    """Raise for arguments that do not fit together; return ``dim`` sorted and not negative."""
    dims, count = check_arguments(input, dim, correction, eps)
    if count - correction <= 0:
        warnings.warn(
            f"normalize(): degrees of freedom is <= 0: {count} values a group, correction "
            f"{correction}; the standard deviation is not a number. Lower correction or give more "
            "values.",
            stacklevel=4,
        )
    return dims


def check_arguments(
    input: Tensor, dim: Sequence[int] | None, correction: float, eps: float
) -> tuple[list[int] | None, int]:
    """Raise as :func:`check`; return ``dim`` sorted, and how many values one deviation is of."""
    op = "normalize"
    check_tensor(op, "input", input)
    check_floating(op, "input", input)
    if type(correction) is not float:
        check_number(op, "correction", correction)
    if type(eps) is not float:
        check_number(op, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{op}(): eps must not be negative, but got {eps}")
    shape = shape_of(op, "input", input)
    rank = len(shape)
    dims: list[int] = []
    if dim is None or len(dim) == 0:  # torch.std takes an empty tuple for every dimension
        count = input.numel()
    else:
        count = 1
        for d in dim:
            if not isinstance(d, (int, torch.SymInt)):
                raise TypeError(f"{op}(): argument 'dim' must hold int, not {type(d).__name__}")
            if not -max(rank, 1) <= d < max(rank, 1):
                raise IndexError(
                    f"{op}(): dimension out of range (expected to be in range of "
                    f"[{-max(rank, 1)}, {max(rank, 1) - 1}], but got {d})"
                )
            if rank and d % rank in dims:
                raise RuntimeError(f"{op}(): dim {d} appears multiple times in the list of dims")
            if rank:
                dims.append(d % rank)
                count *= shape[d]
    return sorted(dims) or None, count


def _fake(
    input: Tensor, dim: list[int] | None, correction: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = [] if dim is None else [1 if d in dim else s for d, s in enumerate(input.shape)]
    dtype = reference.accumulate_dtype(input.dtype)
    return (
        input.new_empty(input.shape),
        input.new_empty(shape, dtype=dtype),
        input.new_empty(shape, dtype=dtype),
    )


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    dim: list[int] | None,
    correction: float,
    eps: float,
) -> Tensor:
    return input.new_empty(input.shape)


register_fake("normalize", _fake)
register_fake("normalize_evaluate", lambda input, *options: input.new_empty(input.shape))
register_fake("normalize_backward", _fake_backward)
public_library.impl("normalize", normalize, "CompositeImplicitAutograd")
