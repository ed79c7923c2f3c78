"""``research_net``: the whole network in one op.

Every layer but the last two is Linear+ReLU+Dropout; then comes Linear+BatchNorm1d+LeakyReLU and
a last Linear. A backend takes the widths that fit on its chip (``on_chip.fits``); wider networks
run op by op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import on_chip, reference
from ..dropout import draw_seed
from ._common import (
    bound,
    check_floating,
    check_number,
    check_probability,
    check_seed,
    check_tensor,
    differentiate_formula,
    grad_needed,
    mark_written,
    register_fake,
    spread,
    use_formula,
)
from .batch_norm_leaky_relu import batch_norm_leaky_relu, check_norm
from .compiled_research_net import research_net as in_graph
from .linear_relu import linear_relu
from .mlp import check_layers, layer_seed
from .nested import shape_of
from .schemas import public_library

_forward = torch.ops.fused_mlp_kernels.research_net.default
_backward = torch.ops.fused_mlp_kernels.research_net_backward.default
_prepared = bound(torch.ops.fused_mlp_kernels.research_net_prepared.default)
_prepared_backward = bound(torch.ops.fused_mlp_kernels.research_net_prepared_backward.default)


class ResearchNetFunction(torch.autograd.Function):
    """The autograd node of research_net.

    ``call`` holds what ``research_net_prepare`` made of the tensors, and ``needs_input_grad`` where
    all parameters and no input want a gradient, or None and (); running mean, running variance and
    batch counter; the seed; the options. The tensors that may need a gradient follow: input,
    weights…, biases…, bn_weight, bn_bias.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor | None) -> Tensor:
        prepared, _, buffers, seed, options = call
        if prepared is not None:
            output, saved = _prepared(tensors[0], prepared)
        else:
            training, dropout_p, momentum, eps, negative_slope = options
            input, weights, biases, bn_weight, bn_bias = _unpack(tensors)
            output, saved = _forward(
                input, weights, biases, bn_weight, bn_bias, *buffers, training, dropout_p, seed,
                momentum, eps, negative_slope,
            )  # fmt: skip
        ctx.save_for_backward(*tensors, saved, seed)
        ctx.call = call
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, saved, seed = ctx.saved_tensors
        prepared, usual, _, _, (training, dropout_p, _, _, negative_slope) = ctx.call
        needed = ctx.needs_input_grad
        if needed == usual and not torch.is_grad_enabled():  # a mask takes 0.6 us to hand over
            return None, None, *_prepared_backward(grad_output, tensors[0], saved, prepared, None)
        mask = needed[1:]
        if torch.is_grad_enabled():
            return None, *_differentiable(ctx.call, tensors, saved, seed, mask, grad_output)
        if prepared is not None:
            found = _prepared_backward(grad_output, tensors[0], saved, prepared, mask)
        else:
            input, weights, biases, bn_weight, bn_bias = _unpack(tensors)
            found = _backward(
                grad_output, input, weights, biases, bn_weight, bn_bias, saved, training,
                dropout_p, seed, negative_slope, mask,
            )  # fmt: skip
        return None, *spread(found, mask)


# The same as ResearchNetFunction.apply without its look for what is left of a functorch transform
# that ended, 2 us: callers with checked tensors have none.
apply_checked = super(torch.autograd.Function, ResearchNetFunction).apply


def _differentiable(
    call: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
    saved: Tensor,
    seed: Tensor | None,
    mask: Sequence[bool],
    grad_output: Tensor,
) -> list[Tensor | None]:
    """Return the gradients, themselves differentiable."""
    prepared, _, _, _, (training, dropout_p, _, eps, negative_slope) = call
    if prepared is not None and any(dropout_p):  # the call drew the seed and kept it at the end
        seed = saved[-16 // saved.itemsize :].view(torch.int64)

    def formula(*tensors: Tensor | None) -> Tensor:
        input, weights, biases, bn_weight, bn_bias = _unpack(tensors)
        # Every backend's `saved` begins with the mean and rstd of the batch norm.
        channels = weights[-2].shape[0]
        mean, rstd = saved[:channels], saved[channels : 2 * channels]
        return reference.research_net_formula(
            input, weights, biases, bn_weight, bn_bias, mean, rstd.pow(-2) - eps, training,
            dropout_p, seed, eps, negative_slope,
        )  # fmt: skip

    return differentiate_formula(formula, tensors, mask, grad_output)


def _unpack(
    tensors: Sequence[Any],
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    layers = (len(tensors) - 3) // 2
    return (
        tensors[0],
        list(tensors[1 : 1 + layers]),
        list(tensors[1 + layers : 1 + 2 * layers]),
        tensors[-2],
        tensors[-1],
    )


def research_net(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    dropout_p: Sequence[float],
    seed: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
    *,
    num_batches_tracked: Tensor | None = None,
    compiled_for: str | None = None,
) -> Tensor:
    """Return the network's output; see :func:`fused_mlp.functional.research_net`.

    Args:
        dropout_p: one probability for each Linear+ReLU layer; 0 where dropout is off.
        seed: int64 tensor of shape (2,) that decides the dropout masks; drawn from torch's
            generator when it is None and some probability is not 0.
        num_batches_tracked: int64 scalar tensor that a training call counts up by one.
        compiled_for: says that the call is traced for torch.compile, whose graphs run where they
            are made, and by which kernels; see modules/tracing.py.
    """
    check(
        input, weights, biases, bn_weight, bn_bias, running_mean, running_var, training, dropout_p,
        seed, eps, num_batches_tracked,
    )  # fmt: skip
    if type(momentum) is not float:
        check_number("research_net", "momentum", momentum)
    if type(negative_slope) is not float:
        check_number("research_net", "negative_slope", negative_slope)
    op_by_op = use_formula(input, *weights, *biases, bn_weight, bn_bias) or not on_chip.fits(
        input, weights
    )
    if compiled_for is not None and seed is None and not op_by_op:
        output = in_graph(
            input, weights, biases, bn_weight, bn_bias,
            (running_mean, running_var, num_batches_tracked), training, dropout_p, momentum, eps,
            negative_slope,
        )  # fmt: skip
        if output is not None:
            return output
    if not any(dropout_p):
        seed = None
    elif seed is None:
        seed = draw_seed(input.device)
    if op_by_op:
        return _op_by_op(
            input, weights, biases, bn_weight, bn_bias, running_mean, running_var, training,
            dropout_p, seed, momentum, eps, negative_slope, num_batches_tracked,
        )  # fmt: skip
    return run(
        input, weights, biases, bn_weight, bn_bias, running_mean, running_var, num_batches_tracked,
        training, dropout_p, seed, momentum, eps, negative_slope,
    )  # fmt: skip


def run(
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
) -> Tensor:
    """Run checked arguments whose widths fit: the autograd node, or the bare kernel."""
    tensors = (input, *weights, *biases, bn_weight, bn_bias)
    if grad_needed(*tensors):
        buffers = (running_mean, running_var, num_batches_tracked)
        options = (training, dropout_p, momentum, eps, negative_slope)
        output = ResearchNetFunction.apply((None, (), buffers, seed, options), *tensors)
    else:
        output = _forward(
            input, weights, biases, bn_weight, bn_bias, running_mean, running_var,
            num_batches_tracked, training, dropout_p, seed, momentum, eps, negative_slope,
        )[0]  # fmt: skip
    if training:
        mark_written(running_mean, running_var, num_batches_tracked)
    return output


def _op_by_op(
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
    momentum: float,
    eps: float,
    negative_slope: float,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    hidden = input
    for layer, p in enumerate(dropout_p):
        hidden = linear_relu(hidden, weights[layer], biases[layer], p, layer_seed(seed, layer))
    hidden = batch_norm_leaky_relu(
        F.linear(hidden, weights[-2], biases[-2]), running_mean, running_var, bn_weight, bn_bias,
        training, momentum, eps, negative_slope, num_batches_tracked=num_batches_tracked,
    )  # fmt: skip
    return F.linear(hidden, weights[-1], biases[-1])


def check(
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
    num_batches_tracked: Tensor | None,
) -> None:
    """Raise for arguments that do not fit together, before anything runs."""
    op = "research_net"
    check_tensor(op, "input", input)
    check_floating(op, "input", input)
    given = shape_of(op, "input", input)
    layers = len(weights)
    if layers < 2 or len(biases) != layers or len(dropout_p) != layers - 2:
        raise ValueError(
            f"{op}(): expected at least 2 weights, as many biases and 2 fewer dropout "
            f"probabilities, but got {layers} weights, {len(biases)} biases and {len(dropout_p)} "
            "probabilities"
        )
    if len(given) != 2:
        raise ValueError(
            f"{op}(): expected 2D input (N, in_features), but got {len(given)}D input of shape "
            f"{given}"
        )
    check_layers(op, input, weights, biases)
    channels = weights[-2].shape[0]
    check_norm(
        op, input, channels, running_mean, running_var, bn_weight, bn_bias, training, eps,
        num_batches_tracked, "bn_",
    )  # fmt: skip
    if training and given[0] == 1:
        raise ValueError(
            f"{op}(): expected more than 1 value per channel when training, got input size "
            f"{torch.Size([1, channels])}"
        )
    for layer, p in enumerate(dropout_p):
        check_probability(op, f"dropout_p[{layer}]", p)
    check_seed(op, seed, input)


def _fake(
    input: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    dropout_p: list[float],
    seed: Tensor | None,
    momentum: float,
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    return (
        input.new_empty(input.shape[0], weights[-1].shape[0]),
        input.new_empty(
            on_chip.saved_numel(input, weights, training, dropout_p, seed is not None),
            dtype=reference.accumulate_dtype(input.dtype),
        ),
    )


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    saved: Tensor,
    training: bool,
    dropout_p: list[float],
    seed: Tensor | None,
    negative_slope: float,
    output_mask: list[bool],
) -> list[Tensor]:
    channels = weights[-2].shape[:1]
    like = [input, *weights, *biases]
    like += [input.new_empty(channels) if t is None else t for t in (bn_weight, bn_bias)]
    return [t.new_empty(t.shape) for t, wanted in zip(like, output_mask, strict=True) if wanted]


register_fake("research_net", _fake)
register_fake("research_net_backward", _fake_backward)
public_library.impl("research_net", research_net, "CompositeImplicitAutograd")
