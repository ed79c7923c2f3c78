"""``batch_norm_act``: BatchNorm1d, ReLU or LeakyReLU or neither, and dropout in one op.

As :mod:`batch_norm_leaky_relu`, which serves LeakyReLU, and no activation as one of slope 1, where
there is no dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import activations, reference
from ..dropout import draw_seed
from ._common import (
    bound,
    check_number,
    check_probability,
    check_seed,
    differentiate_formula,
    grad_needed,
    mark_written,
    register_fake,
    spread,
    use_formula,
)
from .batch_norm_leaky_relu import (
    batch_norm_formula,
    check,
    fake_batch_norm,
    fake_batch_norm_backward,
    recognise,
    remember,
)
from .batch_norm_leaky_relu import run as run_batch_norm_leaky_relu
from .schemas import public_library

_forward = bound(torch.ops.fused_mlp_kernels.batch_norm_act.default)
_backward = bound(torch.ops.fused_mlp_kernels.batch_norm_act_backward.default)


class BatchNormActFunction(torch.autograd.Function):
    """The autograd node of batch_norm_act.

    ``call`` holds what needs no gradient: running mean, running variance, batch counter; training,
    momentum, eps; activation, negative_slope, dropout_p, seed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[Any, ...],
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        buffers, (training, momentum, eps), options = call[:3], call[3:6], call[6:]
        output, mean, rstd = _forward(
            input, *buffers, weight, bias, training, momentum, eps, *options
        )
        ctx.save_for_backward(input, weight, bias, mean, rstd, options[-1])
        ctx.options = training, eps, *options[:-1]
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, rstd, seed = ctx.saved_tensors
        training, eps, activation, negative_slope, dropout_p = ctx.options
        mask = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            gradients = differentiate_formula(
                # In eval the formula needs the statistics back as mean and variance.
                lambda x, w, b: reference.batch_norm_act_formula(
                    x,
                    mean,
                    rstd.pow(-2) - eps,
                    w,
                    b,
                    training,
                    eps,
                    activation,
                    negative_slope,
                    dropout_p,
                    seed,
                ),
                (input, weight, bias),
                mask,
                grad_output,
            )
        else:
            found = _backward(
                grad_output, input, weight, bias, mean, rstd, training, activation, negative_slope,
                dropout_p, seed, mask,
            )  # fmt: skip
            gradients = spread(found, mask)
        return None, *gradients


# See research_net.py.
apply_checked = super(torch.autograd.Function, BatchNormActFunction).apply


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
    *,
    negative_slope: float = 0.01,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Return dropout(activation(batch_norm(input))).

    See :func:`fused_mlp.functional.batch_norm_act`.

    Args:
        dropout_p: applied whatever ``training`` says.
        seed: as :func:`fused_mlp.ops.linear_act` takes it.
        num_batches_tracked: int64 scalar tensor that a training call counts up by one.
    """
    op = "batch_norm_act"
    number = activations.number(op, activation, known=activations.BATCH_NORM_NAMES)
    known = (
        type(dropout_p) is float
        and 0.0 <= dropout_p <= 1.0
        and seed is None
        and recognise(
            input, running_mean, running_var, weight, bias, training, momentum, eps, negative_slope,
            num_batches_tracked,
        )
    )  # fmt: skip
    if not known:
        check(
            input, running_mean, running_var, weight, bias, training, eps, num_batches_tracked, op
        )
        for name, value in (("momentum", momentum), ("negative_slope", negative_slope)):
            if type(value) is not float:
                check_number(op, name, value)
        check_probability(op, "dropout_p", dropout_p)
        check_seed(op, seed, input)
    if dropout_p == 0:
        seed = None
        if number != activations.RELU:
            return run_batch_norm_leaky_relu(
                known, input, running_mean, running_var, num_batches_tracked, weight, bias,
                training, momentum, eps, 1.0 if number == activations.NONE else negative_slope,
            )  # fmt: skip
    elif seed is None:
        seed = draw_seed(input.device)
    return run(
        known, input, running_mean, running_var, num_batches_tracked, weight, bias, training,
        momentum, eps, number, negative_slope, dropout_p, seed,
    )  # fmt: skip


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
    activation: int,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """Return the output for arguments that were recognised, or else checked.

    Args:
        seed: None without dropout.
    """
    buffers = running_mean, running_var, num_batches_tracked
    options = activation, negative_slope, dropout_p, seed
    if not known:
        if use_formula(input, weight, bias):
            output = batch_norm_formula(input, *buffers, weight, bias, training, momentum, eps)
            return reference.activate_and_drop(output, *options)
        remember(input, running_mean, running_var, weight, bias)
    if grad_needed(input, weight, bias):
        apply = apply_checked if known else BatchNormActFunction.apply
        output = apply((*buffers, training, momentum, eps, *options), input, weight, bias)
    else:
        output = _forward(input, *buffers, weight, bias, training, momentum, eps, *options)[0]
    if training:
        mark_written(*buffers)
    return output


register_fake("batch_norm_act", fake_batch_norm)
register_fake("batch_norm_act_backward", fake_batch_norm_backward)
public_library.impl("batch_norm_act", batch_norm_act, "CompositeImplicitAutograd")
