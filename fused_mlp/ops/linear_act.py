"""``linear_act``: ``dropout(activation(input @ weight.T + bias))`` in one op.

Backward takes the derivative from the output where the output tells it, and computes the dropout
mask again from its seed. GELU and SiLU keep what they saw. ReLU, whose output tells the mask as
well, runs as :mod:`linear_relu`.
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
    differentiate_formula,
    grad_needed,
    register_fake,
    spread,
    use_formula,
)
from .linear_relu import check, fake_gradients, fake_output, recognise, remember
from .linear_relu import run as run_linear_relu
from .schemas import public_library

_forward = bound(torch.ops.fused_mlp_kernels.linear_act.default)
_backward = bound(torch.ops.fused_mlp_kernels.linear_act_backward.default)


class LinearActFunction(torch.autograd.Function):
    """The autograd node of linear_act.

    ``call`` holds activation, negative_slope, dropout_p and seed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[int, float, float, Tensor | None],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        activation, negative_slope, dropout_p, seed = call
        needed = activations.kept(activation, negative_slope, dropout_p)
        outputs = _forward(
            input, weight, bias, activation, negative_slope, dropout_p, seed,
            needed == activations.INPUT,
        )  # fmt: skip
        kept = None if needed == activations.NOTHING else outputs[-1]
        ctx.save_for_backward(input, weight, bias, kept, seed)
        ctx.options = activation, negative_slope, dropout_p
        output: Tensor = outputs[0]
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, kept, seed = ctx.saved_tensors
        activation, negative_slope, dropout_p = ctx.options
        mask = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            gradients = differentiate_formula(
                lambda x, w, b: reference.linear_act_formula(
                    x, w, b, activation, negative_slope, dropout_p, seed
                ),
                (input, weight, bias),
                mask,
                grad_output,
            )
        else:
            found = _backward(
                grad_output, input, weight, kept, activation, negative_slope, dropout_p, seed, mask
            )
            gradients = spread(found, mask)
        return None, *gradients


# See research_net.py.
apply_checked = super(torch.autograd.Function, LinearActFunction).apply


def linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    *,
    negative_slope: float = 0.01,
    approximate: str = "none",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return dropout(activation(linear(input))); see :func:`fused_mlp.functional.linear_act`.

    Args:
        seed: int64 tensor of shape (2,) that decides the dropout mask; drawn from torch's
            generator when it is None and ``dropout_p`` is not 0.
    """
    number = activations.number("linear_act", activation, approximate)
    if type(negative_slope) is not float:
        check_number("linear_act", "negative_slope", negative_slope)
    known = recognise(input, weight, bias, dropout_p, seed)
    if not known:
        check(input, weight, bias, dropout_p, seed, "linear_act")
    if number == activations.RELU:
        return run_linear_relu(known, input, weight, bias, dropout_p, seed)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(input.device)
    return run(known, input, weight, bias, number, negative_slope, dropout_p, seed)


def run(
    known: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """Return the output for arguments that were recognised, or else checked.

    Args:
        seed: None without dropout.
    """
    call = (activation, negative_slope, dropout_p, seed)
    if not known:
        if use_formula(input, weight, bias):
            return reference.linear_act_formula(input, weight, bias, *call)
        remember(input, weight, bias)
    if grad_needed(input, weight, bias):
        apply = apply_checked if known else LinearActFunction.apply
        output: Tensor = apply(call, input, weight, bias)
        return output
    output = _forward(input, weight, bias, *call, False)[0]
    return output


def _fake(input: Tensor, weight: Tensor, *options: Any) -> list[Tensor]:
    keep_input = options[-1]
    return [fake_output(input, weight) for _ in range(2 if keep_input else 1)]


register_fake("linear_act", _fake)
register_fake("linear_act_backward", fake_gradients)
public_library.impl("linear_act", linear_act, "CompositeImplicitAutograd")
