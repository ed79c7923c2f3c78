"""The fused operations as functions, beside ``torch.nn.functional``.

Every function takes float32, float64, bfloat16 or float16 tensors of any strides on any device,
sums in float32 (float64 for float64) and raises what torch raises: TypeError for arguments that
are not tensors, ValueError or RuntimeError, naming the argument, for ones that do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def normalize(
    input: Tensor,
    dim: int | Sequence[int] | None = None,
    *,
    correction: float = 1,
    eps: float = 0.0,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Standardise: ``(input - input.mean(dim)) / (input.std(dim, correction=correction) + eps)``.

    Args:
        input: tensor of any shape.
        dim: what to standardise over: None for the whole tensor, 0 for the columns of a table,
            or any dimensions as :func:`torch.std` takes them.
        correction: what is taken off the count in the variance; 1 is Bessel's correction. See
            https://docs.pytorch.org/docs/stable/generated/torch.std.html
        eps: added to the standard deviation, so that constant data gives 0 in place of NaN.
        process_group: processes that each hold a shard of one tensor, cut along a dimension that is
            standardised over, ``torch.distributed.group.WORLD`` for all of them: mean and deviation
            are those of the whole. Shards may differ in size there, and one may be empty. All
            processes call forward, and backward, alike.

    Returns:
        A tensor of the shape and dtype of ``input``.
    """
    if isinstance(dim, int):
        dim = (dim,)
    elif dim is not None and not isinstance(dim, Sequence):
        raise TypeError(
            f"normalize(): argument 'dim' must be int, a sequence of int or None, not "
            f"{type(dim).__name__}"
        )
    if process_group is not None:
        if torch.compiler.is_compiling():
            return torch.ops.fused_mlp.normalize_over_group(
                input, dim, correction, eps, process_group.group_name
            )
        return ops.over_group.normalize(input, dim, correction, eps, process_group)
    if torch.compiler.is_compiling():
        return torch.ops.fused_mlp.normalize(input, dim, correction=correction, eps=eps)
    return ops.normalize(input, dim, correction=correction, eps=eps)


def linear_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Linear, ReLU and dropout: ``dropout(relu(input @ weight.T + bias), dropout_p, training)``.

    The mask is drawn from torch's generator of the device, so ``torch.manual_seed`` decides it; its
    values are this package's own, the same on every backend, not those of ``F.dropout``.

    Args:
        input: tensor of shape (*, in_features).
        weight: tensor of shape (out_features, in_features).
        bias: tensor of shape (out_features,), or None.
        dropout_p: probability of an element to be zeroed, in [0, 1], rounded to a multiple of
            2**-16; the others are divided by ``1 - dropout_p``.
        training: whether dropout is applied.

    Returns:
        A tensor of shape (*, out_features).
    """
    if training:
        p = dropout_p
    else:
        ops.check_probability("linear_relu", "dropout_p", dropout_p)
        p = 0.0
    if torch.compiler.is_compiling():
        return torch.ops.fused_mlp.linear_relu(input, weight, bias, p)
    return ops.linear_relu(input, weight, bias, p)


def linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    negative_slope: float = 0.01,
    approximate: str = "none",
) -> Tensor:
    """Linear, an activation and dropout: :func:`linear_relu` with a choice of activations.

    Args:
        input, weight, bias, dropout_p, training: as in :func:`linear_relu`.
        activation: "none", "relu", "leaky_relu", "gelu", "silu" or "tanh", as the functions of
            these names in ``torch.nn.functional``.
        negative_slope: of leaky ReLU, below zero.
        approximate: of GELU (Hendrycks & Gimpel, 2016, https://arxiv.org/abs/1606.08415): "none"
            or "tanh".

    Returns:
        A tensor of shape (*, out_features).

    Raises:
        ValueError: for another activation or approximation.
    """
    if training:
        p = dropout_p
    else:
        ops.check_probability("linear_act", "dropout_p", dropout_p)
        p = 0.0
    op = torch.ops.fused_mlp.linear_act if torch.compiler.is_compiling() else ops.linear_act
    output: Tensor = op(
        input, weight, bias, activation, negative_slope=negative_slope, approximate=approximate,
        dropout_p=p,
    )  # fmt: skip
    return output


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
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Batch normalization and leaky ReLU; arguments in the order of ``F.batch_norm``.

    The batch norm of Ioffe & Szegedy (2015), https://arxiv.org/abs/1502.03167, as
    https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html states it: the biased
    variance normalizes, the unbiased one enters the running statistics.

    Args:
        input: tensor of shape (N, C) or (N, C, L).
        running_mean, running_var: tensors of shape (C,), updated in place in training; needed in
            evaluation.
        weight, bias: tensors of shape (C,), or None for 1 and 0.
        training: whether batch statistics are used.
        momentum: weight of the new batch in the running statistics.
        eps: added to the variance.
        negative_slope: slope of leaky ReLU below zero.
        process_group: processes that share batch statistics in training,
            ``torch.distributed.group.WORLD`` for all of them. One may have another number of rows
            than the others, or none. All processes call forward, and backward, alike.

    Returns:
        A tensor of the shape of ``input``.
    """
    if process_group is not None and training:
        if torch.compiler.is_compiling():
            return torch.ops.fused_mlp.batch_norm_leaky_relu_over_group(
                input, running_mean, running_var, weight, bias, momentum, eps, negative_slope,
                process_group.group_name,
            )  # fmt: skip
        return ops.over_group.batch_norm_leaky_relu(
            input, running_mean, running_var, weight, bias, momentum, eps, negative_slope,
            process_group,
        )  # fmt: skip
    if torch.compiler.is_compiling():
        return torch.ops.fused_mlp.batch_norm_leaky_relu(
            input, running_mean, running_var, weight, bias, training, momentum, eps, negative_slope
        )
    return ops.batch_norm_leaky_relu(
        input, running_mean, running_var, weight, bias, training, momentum, eps, negative_slope
    )


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
    dropout_p: float = 0.0,
    *,
    negative_slope: float = 0.01,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Batch normalization, an activation and dropout.

    Args:
        input, running_mean, running_var, weight, bias, momentum, eps: as in
            :func:`batch_norm_leaky_relu`.
        training: whether batch statistics are used and dropout is applied.
        activation: "none", "relu" or "leaky_relu".
        dropout_p: probability of an element to be zeroed, as in :func:`linear_relu`.
        negative_slope: of leaky ReLU, below zero.
        num_batches_tracked: int64 scalar tensor that a call in training counts up by one.

    Returns:
        A tensor of the shape of ``input``.

    Raises:
        ValueError: for another activation.
    """
    if not training:
        ops.check_probability("batch_norm_act", "dropout_p", dropout_p)
        dropout_p = 0.0
    op = torch.ops.fused_mlp.batch_norm_act if torch.compiler.is_compiling() else ops.batch_norm_act
    output: Tensor = op(
        input, running_mean, running_var, weight, bias, training, momentum, eps, activation,
        negative_slope=negative_slope, dropout_p=dropout_p,
        num_batches_tracked=num_batches_tracked,
    )  # fmt: skip
    return output


def research_net(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = False,
    dropout_p: Sequence[float] = (),
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
) -> Tensor:
    """The whole network: Linear+ReLU+Dropout layers, Linear+BatchNorm1d+LeakyReLU, Linear.

    Args:
        input: tensor of shape (N, in_features).
        weights: one tensor of shape (out_features, in_features) a layer, at least two.
        biases: one tensor of shape (out_features,) a layer.
        bn_weight, bn_bias, running_mean, running_var: of shape (C,), C the width of the last
            hidden layer; as in :func:`batch_norm_leaky_relu`.
        training: whether dropout is applied and batch statistics are used.
        dropout_p: one probability for each layer but the last two; all 0 when empty.
        momentum, eps, negative_slope: as in :func:`batch_norm_leaky_relu`.

    Returns:
        A tensor of shape (N, out_features) of the last layer.
    """
    p = list(dropout_p) if training and len(dropout_p) else [0.0] * max(len(weights) - 2, 0)
    arguments = (
        input, list(weights), list(biases), bn_weight, bn_bias, running_mean, running_var, training,
        p, None, momentum, eps, negative_slope,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return torch.ops.fused_mlp.research_net(*arguments)
    return ops.research_net(*arguments)
