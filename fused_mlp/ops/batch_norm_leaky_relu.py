"""``batch_norm_leaky_relu``: BatchNorm1d and LeakyReLU in one op.

Only the input and one mean and reciprocal deviation a channel are kept for backward; the value
LeakyReLU saw is computed again from them.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ._common import (
    bound,
    check_floating,
    check_like,
    check_number,
    check_tensor,
    differentiate_formula,
    grad_needed,
    mark_written,
    register_fake,
    spread,
    use_formula,
)
from .fit import Fit
from .nested import shape_of
from .schemas import public_library

_forward = bound(torch.ops.fused_mlp_kernels.batch_norm_leaky_relu.default)
_backward = bound(torch.ops.fused_mlp_kernels.batch_norm_leaky_relu_backward.default)


class BatchNormLeakyReLUFunction(torch.autograd.Function):
    """The autograd node of batch_norm_leaky_relu.

    ``call`` holds what needs no gradient, in one argument, since each takes 0.2 us: running mean,
    running variance, batch counter; training, momentum, eps, negative_slope.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[Any, ...],
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        running_mean, running_var, num_batches_tracked, training, momentum, eps, slope = call
        output, mean, rstd = _forward(
            input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum,
            eps, slope,
        )  # fmt: skip
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        ctx.options = (training, eps, slope)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, rstd = ctx.saved_tensors
        training, eps, slope = ctx.options
        mask = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            gradients = differentiate_formula(
                # In eval the formula needs the statistics back as mean and variance.
                lambda x, w, b: reference.batch_norm_leaky_relu_formula(
                    x, mean, rstd.pow(-2) - eps, w, b, training, eps, slope
                ),
                (input, weight, bias),
                mask,
                grad_output,
            )
        else:
            found = _backward(grad_output, input, weight, bias, mean, rstd, training, slope, mask)
            gradients = spread(found, mask)
        return None, *gradients


# See research_net.py.
apply_checked = super(torch.autograd.Function, BatchNormLeakyReLUFunction).apply

# The kinds of tensors seen before, of any sizes: to recognise them spares 3 us of checks.
_fit = Fit(feature_dim=None)
remember = _fit.remember  # takes input, running_mean, running_var, weight and bias


def batch_norm_leaky_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
    *,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Return leaky_relu(batch_norm(input)).

    See :func:`fused_mlp.functional.batch_norm_leaky_relu`.

    Args:
        num_batches_tracked: int64 scalar tensor that a training call counts up by one.
    """
    known = recognise(
        input, running_mean, running_var, weight, bias, training, momentum, eps, negative_slope,
        num_batches_tracked,
    )  # fmt: skip
    if not known:
        check(input, running_mean, running_var, weight, bias, training, eps, num_batches_tracked)
        if type(momentum) is not float:
            check_number("batch_norm_leaky_relu", "momentum", momentum)
        if type(negative_slope) is not float:
            check_number("batch_norm_leaky_relu", "negative_slope", negative_slope)
    return run(
        known, input, running_mean, running_var, num_batches_tracked, weight, bias, training,
        momentum, eps, negative_slope,
    )  # fmt: skip


def recognise(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    negative_slope: float,
    num_batches_tracked: Tensor | None,
) -> bool:
    """Return whether there is nothing to check: tensors of a kind seen before, that fit."""
    if not (
        num_batches_tracked is None
        and type(momentum) is type(eps) is type(negative_slope) is float
        and eps > 0.0
        and _fit.recognise(input, running_mean, running_var, weight, bias) is not None
    ):
        return False
    channels = input.shape[1]
    for vector in (running_mean, running_var, weight, bias):
        if vector is not None and vector.shape[0] != channels:
            return False
    return input.numel() > channels if training else running_mean is not None


def run(
    known: bool,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    negative_slope: float,
) -> Tensor:
    """Return the output for arguments that were recognised, or else checked."""
    if not known:
        if use_formula(input, weight, bias):
            output = batch_norm_formula(
                input, running_mean, running_var, num_batches_tracked, weight, bias, training,
                momentum, eps,
            )  # fmt: skip
            return F.leaky_relu(output, negative_slope)
        remember(input, running_mean, running_var, weight, bias)
    buffers = running_mean, running_var, num_batches_tracked
    options = training, momentum, eps, negative_slope
    if grad_needed(input, weight, bias):
        apply = apply_checked if known else BatchNormLeakyReLUFunction.apply
        output = apply((*buffers, *options), input, weight, bias)
    else:
        output = _forward(input, *buffers, weight, bias, *options)[0]
    if training:
        mark_written(*buffers)
    return output


def batch_norm_formula(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Return torch's own batch norm of checked arguments, the batch counted."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    num_batches_tracked: Tensor | None,
    op: str = "batch_norm_leaky_relu",
) -> None:
    """Raise for arguments that do not fit together, before anything runs."""
    check_tensors(
        input, running_mean, running_var, weight, bias, training, eps, num_batches_tracked, op
    )
    if training and input.numel() == input.shape[1] > 0:
        raise_one_value(input, op)


def raise_one_value(input: Tensor, op: str = "batch_norm_leaky_relu") -> NoReturn:
    """Raise torch's error for a batch whose variance says nothing."""
    raise ValueError(
        f"{op}(): expected more than 1 value per channel when training, got input size "
        f"{input.shape}"
    )


def check_tensors(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    num_batches_tracked: Tensor | None,
    op: str = "batch_norm_leaky_relu",
) -> None:
    """Raise as :func:`check`, but take any number of rows."""
    check_tensor(op, "input", input)
    check_floating(op, "input", input)
    shape = shape_of(op, "input", input)
    if len(shape) not in (2, 3):
        raise ValueError(
            f"{op}(): expected 2D or 3D input, (N, C) or (N, C, L), but got {len(shape)}D input "
            f"of shape {shape}"
        )
    check_norm(
        op, input, shape[1], running_mean, running_var, weight, bias, training, eps,
        num_batches_tracked,
    )  # fmt: skip


def check_norm(
    op: str,
    input: Tensor,
    channels: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    num_batches_tracked: Tensor | None,
    prefix: str = "",
) -> None:
    """Raise unless the per-channel tensors and options fit an input of ``channels`` channels.

    Args:
        prefix: what stands before weight and bias in the names of ``op``'s arguments.
    """
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}(): give both running_mean and running_var, or neither")
    vectors = {
        "running_mean": running_mean,
        "running_var": running_var,
        f"{prefix}weight": weight,
        f"{prefix}bias": bias,
    }
    for name, vector in vectors.items():
        if vector is not None:
            check_like(op, name, vector, input, (channels,), mixed=True)
        elif not training and name.startswith("running"):
            raise RuntimeError(
                f"{op}(): {name} must be defined in evaluation mode; give it, or use training=True"
            )
    if type(eps) is not float:
        check_number(op, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{op}(): eps must not be negative, but got {eps}")
    if training and eps == 0:  # as torch: equal values have no variance to divide by
        raise ValueError(f"{op}(): eps must be positive during training, but got {eps}")
    if num_batches_tracked is not None:
        check_tensor(op, "num_batches_tracked", num_batches_tracked)
        if num_batches_tracked.dtype != torch.int64 or num_batches_tracked.numel() != 1:
            raise RuntimeError(
                f"{op}(): num_batches_tracked must be one int64 number, but got "
                f"{num_batches_tracked.dtype} of shape {tuple(num_batches_tracked.shape)}"
            )


def fake_batch_norm(input: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return what forward gives for tensors without values: output, mean and rstd."""
    dtype = reference.accumulate_dtype(input.dtype)
    channels = input.shape[1]
    return (
        input.new_empty(input.shape),
        input.new_empty(channels, dtype=dtype),
        input.new_empty(channels, dtype=dtype),
    )


def fake_batch_norm_backward(
    _: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any
) -> list[Tensor]:
    """Return what backward gives for tensors without values; the mask of outputs comes last."""
    channels = input.shape[1]
    weight_dtype = weight.dtype if weight is not None else input.dtype
    bias_dtype = bias.dtype if bias is not None else input.dtype
    candidates = (
        (input.shape, input.dtype),
        ((channels,), weight_dtype),
        ((channels,), bias_dtype),
    )
    return [
        input.new_empty(shape, dtype=dtype)
        for (shape, dtype), wanted in zip(candidates, options[-1], strict=True)
        if wanted
    ]


register_fake("batch_norm_leaky_relu", fake_batch_norm)
register_fake("batch_norm_leaky_relu_backward", fake_batch_norm_backward)
public_library.impl("batch_norm_leaky_relu", batch_norm_leaky_relu, "CompositeImplicitAutograd")
