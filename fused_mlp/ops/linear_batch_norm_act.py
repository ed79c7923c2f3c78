"""``linear_batch_norm_act``: Linear, batch norm in evaluation, an activation, dropout in one op.

Running statistics make of the batch norm a scale and a shift a channel, which the kernel applies to
the product before it leaves the cache. Where a gradient is needed, Linear and
``batch_norm_act`` run in its place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations
from ..dropout import draw_seed
from ._common import check_number, grad_needed, register_fake, use_formula
from .batch_norm_act import batch_norm_act
from .batch_norm_leaky_relu import check_norm
from .linear_relu import check as check_linear
from .linear_relu import fake_output
from .schemas import public_library

_forward = torch.ops.fused_mlp_kernels.linear_batch_norm_act.default


def linear_batch_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    *,
    negative_slope: float = 0.01,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return dropout(activation(batch_norm(linear(input)))) with the running statistics.

    Args:
        input: tensor of shape (N, in_features).
        activation: "none", "relu" or "leaky_relu".
        seed: as :func:`fused_mlp.ops.linear_act` takes it.
    """
    op = "linear_batch_norm_act"
    number = activations.number(op, activation, known=activations.BATCH_NORM_NAMES)
    check(input, weight, bias, running_mean, running_var, bn_weight, bn_bias, eps, dropout_p, seed)
    if type(negative_slope) is not float:
        check_number(op, "negative_slope", negative_slope)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(input.device)
    differentiated = (input, weight, bias, bn_weight, bn_bias)
    if grad_needed(*differentiated) or use_formula(*differentiated):
        return batch_norm_act(
            F.linear(input, weight, bias), running_mean, running_var, bn_weight, bn_bias, False,
            0.0, eps, activation, negative_slope=negative_slope, dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
    return _forward(
        input, weight, bias, running_mean, running_var, bn_weight, bn_bias, eps, number,
        negative_slope, dropout_p, seed,
    )  # fmt: skip


def check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Raise for arguments that do not fit together, before anything runs."""
    op = "linear_batch_norm_act"
    check_linear(input, weight, bias, dropout_p, seed, op)
    if input.dim() != 2:
        # Of three dimensions the batch norm's channels would be the second, the Linear's the last.
        raise ValueError(f"{op}(): input must have shape (N, in_features), not {input.dim()}D")
    check_norm(
        op, input, weight.shape[0], running_mean, running_var, bn_weight, bn_bias, False, eps, None,
        prefix="bn_",
    )  # fmt: skip


register_fake("linear_batch_norm_act", fake_output)
public_library.impl("linear_batch_norm_act", linear_batch_norm_act, "CompositeImplicitAutograd")
