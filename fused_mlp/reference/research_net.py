"""The whole network: the other ops, one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..text import numbers_of
from .batch_norm_act import (
    batch_norm_leaky_relu,
    batch_norm_leaky_relu_backward,
    batch_norm_leaky_relu_formula,
)
from .linear_act import dropout, linear_relu_backward


def _hidden_activations(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dropout_p: Sequence[float],
    seed: Tensor | None,
) -> list[Tensor]:
    """Return the input followed by the output of every Linear+ReLU+Dropout layer."""
    outputs = [input]
    for layer, p in enumerate(dropout_p):
        hidden = F.linear(outputs[-1], weights[layer], biases[layer]).relu()
        outputs.append(dropout(hidden, p, seed, layer))
    return outputs


def research_net(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    dropout_p: Sequence[float],
    seed: Tensor | None,
    momentum: float,
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    hidden = _hidden_activations(input, weights, biases, dropout_p, seed)[-1]
    hidden, mean, rstd = batch_norm_leaky_relu(
        F.linear(hidden, weights[-2], biases[-2]),
        running_mean,
        running_var,
        num_batches_tracked,
        bn_weight,
        bn_bias,
        training,
        momentum,
        eps,
        negative_slope,
    )
    return F.linear(hidden, weights[-1], biases[-1]), torch.cat([mean, rstd])


def research_net_formula(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    dropout_p: Sequence[float],
    seed: Tensor | None,
    eps: float,
    negative_slope: float,
) -> Tensor:
    """Return the output from differentiable steps; running statistics are read, never written."""
    hidden = _hidden_activations(input, weights, biases, dropout_p, seed)[-1]
    hidden = batch_norm_leaky_relu_formula(
        F.linear(hidden, weights[-2], biases[-2]),
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        training,
        eps,
        negative_slope,
    )
    return F.linear(hidden, weights[-1], biases[-1])


def research_net_backward(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    saved: Tensor,
    training: bool,
    dropout_p: Sequence[float],
    seed: Tensor | None,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    channels = weights[-2].shape[0]  # other backends keep more behind these
    mean, rstd = saved[:channels], saved[channels : 2 * channels]
    outputs = _hidden_activations(input, weights, biases, dropout_p, seed)
    before_norm = F.linear(outputs[-1], weights[-2], biases[-2])
    normalized = (before_norm.to(mean.dtype) - mean) * rstd
    affine = normalized * (1.0 if bn_weight is None else bn_weight.to(mean.dtype))
    affine = affine if bn_bias is None else affine + bn_bias.to(mean.dtype)
    hidden = F.leaky_relu(affine, negative_slope).to(input.dtype)

    grad_weights: list[Tensor] = [grad_output.t() @ hidden]
    grad_biases: list[Tensor] = [grad_output.sum(0)]
    grad, grad_bn_weight, grad_bn_bias = batch_norm_leaky_relu_backward(
        grad_output @ weights[-1],
        before_norm,
        bn_weight,
        bn_bias,
        mean,
        rstd,
        training,
        negative_slope,
        (True, True, True),
    )
    grad_weights.insert(0, grad.t() @ outputs[-1])
    grad_biases.insert(0, grad.sum(0))
    grad = grad @ weights[-2]
    for layer in reversed(range(len(dropout_p))):
        p = dropout_p[layer] if seed is not None else 0.0
        grad, grad_weight, grad_bias = linear_relu_backward(
            grad, outputs[layer], weights[layer], outputs[layer + 1], p, (True, True, True)
        )
        grad_weights.insert(0, grad_weight)
        grad_biases.insert(0, grad_bias)
    everything = [grad, *grad_weights, *grad_biases, grad_bn_weight, grad_bn_bias]
    return [g for g, wanted in zip(everything, output_mask, strict=True) if wanted]


def research_net_compiled_evaluate(
    input: Tensor, tensors: Sequence[Tensor], numbers: str
) -> Tensor:
    eps, negative_slope = numbers_of(numbers)
    *parameters, running_mean, running_var = tensors
    layers = sum(parameter.dim() == 2 for parameter in parameters)
    bn_weight, bn_bias = parameters[2 * layers :] or (None, None)
    return research_net(
        input, parameters[:layers], parameters[layers : 2 * layers], bn_weight, bn_bias,
        running_mean, running_var, None, False, [0.0] * (layers - 2), None, 0.0, eps,
        negative_slope,
    )[0]  # fmt: skip
