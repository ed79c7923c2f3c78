"""``linear_relu``: ``dropout(relu(input @ weight.T + bias))`` in one op.

The output alone says where the gradient passes: it is zero exactly where ReLU or the dropout
mask stopped the value. So nothing the size of the activations is kept but the output itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dropout import draw_seed
from ._common import (
    bound,
    check_floating,
    check_like,
    check_probability,
    check_seed,
    check_tensor,
    grad_needed,
    register_fake,
    spread,
    use_formula,
)
from .fit import Fit
from .nested import shape_of
from .schemas import public_library

_forward = bound(torch.ops.fused_mlp_kernels.linear_relu.default)
_backward = bound(torch.ops.fused_mlp_kernels.linear_relu_backward.default)


class LinearReLUFunction(torch.autograd.Function):
    """The autograd node of linear_relu; ``call`` holds the dropout's probability and seed."""

    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[float, Tensor | None],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        dropout_p, seed = call
        output = _forward(input, weight, bias, dropout_p, seed)
        ctx.save_for_backward(input, weight, output)
        ctx.dropout_p = dropout_p if seed is not None else 0.0
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, output = ctx.saved_tensors
        mask = ctx.needs_input_grad[1:]
        backward = reference.linear_relu_backward if torch.is_grad_enabled() else _backward
        gradients = backward(grad_output, input, weight, output, ctx.dropout_p, mask)
        return None, *spread(gradients, mask)


# See research_net.py.
apply_checked = super(torch.autograd.Function, LinearReLUFunction).apply

# The kinds of tensors seen before, of any sizes: to recognise them spares 2 us of checks.
_fit = Fit(feature_dim=None)
remember = _fit.remember  # takes input, weight and bias


def linear_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return dropout(relu(linear(input))); see :func:`fused_mlp.functional.linear_relu`.

    Args:
        seed: int64 tensor of shape (2,) that decides the dropout mask; drawn from torch's
            generator when it is None and ``dropout_p`` is not 0.
    """
    known = recognise(input, weight, bias, dropout_p, seed)
    if not known:
        check(input, weight, bias, dropout_p, seed)
    return run(known, input, weight, bias, dropout_p, seed)


def recognise(
    input: Tensor, weight: Tensor, bias: Tensor | None, dropout_p: float, seed: Tensor | None
) -> bool:
    """Return whether there is nothing to check: tensors of a kind seen before, that fit."""
    return (
        type(dropout_p) is float
        and 0.0 <= dropout_p <= 1.0
        and seed is None
        and _fit.recognise(input, weight, bias) is not None
        and input.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape[0] == weight.shape[0])
    )


def run(
    known: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """Return the output for arguments that were recognised, or else checked."""
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(input.device)
    if not known:
        if use_formula(input, weight, bias):
            return reference.linear_relu_formula(input, weight, bias, dropout_p, seed)
        remember(input, weight, bias)
    if grad_needed(input, weight, bias):
        apply = apply_checked if known else LinearReLUFunction.apply
        output: Tensor = apply((dropout_p, seed), input, weight, bias)
        return output
    return _forward(input, weight, bias, dropout_p, seed)


def check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    op: str = "linear_relu",
) -> None:
    """Raise for arguments that do not fit together, before anything runs."""
    check_tensor(op, "input", input)
    check_tensor(op, "weight", weight)
    check_floating(op, "input", input)
    given, shape = shape_of(op, "input", input), shape_of(op, "weight", weight)
    if len(shape) != 2:
        raise RuntimeError(
            f"{op}(): weight must have shape (out_features, in_features), but got {shape}"
        )
    if not given or given[-1] != shape[1]:
        raise RuntimeError(
            f"{op}(): input must have shape (*, in_features) with in_features = {shape[1]}"
            f" to go with weight of shape {shape}, but got {given}"
        )
    check_like(op, "weight", weight, input, shape)
    if bias is not None:
        check_like(op, "bias", bias, input, shape[:1])
    check_probability(op, "dropout_p", dropout_p)
    check_seed(op, seed, input)


def fake_output(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """Return what forward gives for tensors without values."""
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def fake_gradients(_: Tensor, input: Tensor, weight: Tensor, *options: Any) -> list[Tensor]:
    """Return what backward gives for tensors without values; the mask of outputs comes last."""
    shapes = (input.shape, weight.shape, weight.shape[:1])
    return [input.new_empty(s) for s, wanted in zip(shapes, options[-1], strict=True) if wanted]


register_fake("linear_relu", fake_output)
register_fake("linear_relu_backward", fake_gradients)
public_library.impl("linear_relu", linear_relu, "CompositeImplicitAutograd")
