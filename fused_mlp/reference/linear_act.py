"""Linear, an activation and dropout; linear_relu is a special case."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations
from ..dropout import keep_mask
from .statistics import accumulate_dtype


def dropout(input: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor:
    if p == 0 or seed is None:
        return input
    if not 0 <= p <= 1:
        raise ValueError(f"a dropout probability has to be between 0 and 1, but got {p}")
    columns = input.shape[-1]
    rows = input.numel() // columns if columns else 0
    keep = keep_mask(seed, rows, columns, p, stream).reshape(input.shape)
    # A product, as torch's dropout: a NaN or an infinity that is dropped becomes NaN.
    return input * (keep.to(input.dtype) * dropout_scale(p))


def dropout_scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def activate_and_drop(
    input: Tensor, activation: int, negative_slope: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Return what stands behind the Linear or the batch norm in linear_act and batch_norm_act."""
    output = activations.TABLE[activation].value(input, negative_slope)
    return dropout(output, dropout_p, seed, 0)


def linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
    keep_input: bool,
) -> list[Tensor]:
    activations.check_number("linear_act", activation)
    hidden = F.linear(input, weight, bias)
    output = activate_and_drop(hidden, activation, negative_slope, dropout_p, seed)
    if not keep_input:
        return [output]
    return [output, hidden.clone() if output is hidden else hidden]


def linear_act_formula(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    return linear_act(
        input, weight, bias, activation, negative_slope, dropout_p, seed, False
    )[0]  # fmt: skip


def linear_act_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    kept: Tensor | None,
    activation: int,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    activations.check_number("linear_act_backward", activation)
    grad = dropout(grad_output, dropout_p, seed, 0)
    known = activations.TABLE[activation]
    if known.kept != activations.NOTHING:
        if kept is None:
            raise RuntimeError("linear_act_backward(): this activation needs what forward kept")
        if activation == activations.TANH and seed is not None and dropout_p > 0:
            kept = torch.tanh(kept)
        grad = known.gradient(grad, kept, negative_slope)
    return _linear_gradients(grad, input, weight, output_mask)


def _linear_gradients(
    grad: Tensor, input: Tensor, weight: Tensor, output_mask: Sequence[bool]
) -> list[Tensor]:
    """Return the gradients of input, weight and bias that are wanted, from the product's."""
    rows = math.prod(input.shape[:-1])  # a size of -1 is ambiguous beside one of 0
    flat = grad.reshape(rows, weight.shape[0])
    gradients = []
    if output_mask[0]:
        gradients.append(grad @ weight)
    if output_mask[1]:
        gradients.append(flat.t() @ input.reshape(rows, weight.shape[1]))
    if output_mask[2]:
        gradients.append(flat.sum(0, dtype=accumulate_dtype(flat.dtype)).to(flat.dtype))
    return gradients


def linear_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None, dropout_p: float, seed: Tensor | None
) -> Tensor:
    return linear_act_formula(input, weight, bias, activations.RELU, 0.0, dropout_p, seed)


linear_relu_formula = linear_relu


def linear_relu_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    dropout_p: float,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    # Zero exactly where ReLU or the mask stopped the value: here the output is all that is needed.
    grad = (grad_output * dropout_scale(dropout_p)).masked_fill(output <= 0, 0)
    return _linear_gradients(grad, input, weight, output_mask)
