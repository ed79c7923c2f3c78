"""Batch norm, an activation and dropout; batch_norm_leaky_relu is a special case."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .. import activations
from .linear_act import activate_and_drop, dropout
from .statistics import (
    accumulate_dtype,
    affine,
    centre,
    channel_dims,
    channel_parameter,
    per_channel,
)


def batch_norm_act(
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
) -> tuple[Tensor, Tensor, Tensor]:
    activations.check_number("batch_norm_act", activation, activations.LEAKY_RELU)
    x = input.to(accumulate_dtype(input.dtype))
    dims = channel_dims(input)
    if training:
        mean, centred = centre(x, dims, False)
        var = centred.square().mean(dims)
        _update_running(mean, var, input, running_mean, running_var, num_batches_tracked, momentum)
    elif running_mean is None or running_var is None:
        raise RuntimeError("batch norm: evaluation needs running_mean and running_var")
    else:
        mean, var = running_mean.to(x.dtype, copy=True), running_var.to(x.dtype)
    rstd = (var + eps).rsqrt()
    normalized = (x - per_channel(mean, input)) * per_channel(rstd, input)
    output = affine(normalized, weight, bias, input)
    output = activate_and_drop(output, activation, negative_slope, dropout_p, seed)
    return output.to(input.dtype), mean, rstd


def batch_norm_leaky_relu(
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
) -> tuple[Tensor, Tensor, Tensor]:
    return batch_norm_act(
        input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum,
        eps, activations.LEAKY_RELU, negative_slope, 0.0, None,
    )  # fmt: skip


def _update_running(
    mean: Tensor,
    var: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
) -> None:
    count = input.numel() // max(input.shape[1], 1)
    if count == 0:  # nothing to learn from; the batch is counted all the same, as torch does
        running_mean = running_var = None
    if running_mean is not None:
        running_mean.copy_(running_mean.to(mean.dtype).lerp(mean, momentum))
    if running_var is not None:
        unbiased = var * (count / max(count - 1, 1))
        running_var.copy_(running_var.to(var.dtype).lerp(unbiased, momentum))
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)


def batch_norm_act_formula(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    activation: int,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """Return the output from differentiable steps; running statistics are read, never written."""
    x = input.to(accumulate_dtype(input.dtype))
    if training:
        mean, var = x.mean(channel_dims(input)), x.var(channel_dims(input), correction=0)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.to(x.dtype), running_var.to(x.dtype)
    normalized = (x - per_channel(mean, input)) * per_channel((var + eps).rsqrt(), input)
    output = affine(normalized, weight, bias, input)
    output = activate_and_drop(output, activation, negative_slope, dropout_p, seed)
    return output.to(input.dtype)


def batch_norm_leaky_relu_formula(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    negative_slope: float,
) -> Tensor:
    return batch_norm_act_formula(
        input, running_mean, running_var, weight, bias, training, eps, activations.LEAKY_RELU,
        negative_slope, 0.0, None,
    )  # fmt: skip


def batch_norm_act_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    activation: int,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    activations.check_number("batch_norm_act_backward", activation, activations.LEAKY_RELU)
    dims = channel_dims(input)
    x, grad = input.to(mean.dtype), dropout(grad_output.to(mean.dtype), dropout_p, seed, 0)
    normalized = (x - per_channel(mean, input)) * per_channel(rstd, input)
    before = affine(normalized, weight, bias, input)
    grad = activations.TABLE[activation].gradient(grad, before, negative_slope)
    count = max(input.numel() // max(input.shape[1], 1), 1)
    grad_bias = grad.sum(dims)
    grad_weight = (grad * normalized).sum(dims)
    gradients = []
    if output_mask[0]:
        if training:
            grad = grad - per_channel(grad_bias / count, input)
            grad = grad - normalized * per_channel(grad_weight / count, input)
        gamma = channel_parameter(weight, 1.0, input, grad.dtype)
        gradients.append((grad * per_channel(rstd, input) * gamma).to(input.dtype))
    if output_mask[1]:
        gradients.append(grad_weight.to(weight.dtype if weight is not None else input.dtype))
    if output_mask[2]:
        gradients.append(grad_bias.to(bias.dtype if bias is not None else input.dtype))
    return gradients


def batch_norm_leaky_relu_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    return batch_norm_act_backward(
        grad_output, input, weight, bias, mean, rstd, training, activations.LEAKY_RELU,
        negative_slope, 0.0, None, output_mask,
    )  # fmt: skip


def linear_batch_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    return batch_norm_act(
        F.linear(input, weight, bias), running_mean, running_var, None, bn_weight, bn_bias, False,
        0.0, eps, activation, negative_slope, dropout_p, seed,
    )[0]  # fmt: skip
