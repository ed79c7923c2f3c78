"""Try a fused op on a module's tensors; None says that the plain modules must run.

Nothing here has a side effect before it is sure of the fused op: no seed is drawn, no running
statistic touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import activations, backends, on_chip
from ..dropout import draw_seed
from ..ops._common import bound, grad_needed, mark_written
from ..ops.batch_norm_act import apply_checked as apply_batch_norm_act
from ..ops.batch_norm_leaky_relu import apply_checked as apply_batch_norm_leaky_relu
from ..ops.batch_norm_leaky_relu import check as check_batch_norm
from ..ops.fit import Fit, Variant
from ..ops.linear_act import apply_checked as apply_linear_act
from ..ops.linear_batch_norm_act import check as check_linear_batch_norm
from ..ops.linear_relu import apply_checked as apply_linear_relu
from ..ops.linear_relu import check as check_linear_relu
from ..ops.mlp import Layers
from ..ops.mlp import check as check_mlp
from ..ops.mlp import run as run_mlp
from ..ops.over_group import batch_norm_leaky_relu as batch_norm_over_group
from ..ops.research_net import check as check_research_net
from ..ops.research_net import research_net as research_net_op
from ..ops.research_net import run as run_research_net
from .norm import NormState

_research_net = bound(torch.ops.fused_mlp_kernels.research_net.default)
_linear_relu = bound(torch.ops.fused_mlp_kernels.linear_relu.default)
_linear_act = bound(torch.ops.fused_mlp_kernels.linear_act.default)
_linear_batch_norm_act = bound(torch.ops.fused_mlp_kernels.linear_batch_norm_act.default)
_batch_norm_leaky_relu = bound(torch.ops.fused_mlp_kernels.batch_norm_leaky_relu.default)
_batch_norm_act = bound(torch.ops.fused_mlp_kernels.batch_norm_act.default)


# One for calls without num_batches_tracked, as in evaluation, and one for calls with it.
Fits = tuple[Fit, Fit]


def two_fits() -> Fits:
    """Return what an op with a batch norm remembers; the input is (N, C) or (N, C, L)."""
    return Fit(feature_dim=1), Fit(feature_dim=1)


# What one call of a whole network uses: weights, biases, the batch norm's state, dropout
# probabilities, slope of the LeakyReLU.
NetState = tuple[Sequence[Tensor], Sequence[Any], NormState, Sequence[float], float]


def linear_act(
    fit: Fit,
    input: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    negative_slope: float,
    p: float,
) -> Tensor | None:
    """Return dropout(activation(linear(input))), or None where no kernel can take the tensors."""
    if forward_ad._current_level >= 0:
        return None
    variant = fit.find(input, weight, bias)
    if variant is None:
        tensors = (input, weight, bias)
        variant = fit.admit(tensors, check_linear_relu, input, weight, bias, 0.0, None)
        if variant is None:
            return None
    if activation != activations.RELU:
        if not _has_kernel(variant, "linear_act", input):
            return None
        if not p and _torch_is_faster(input, weight):
            return None
    if not 0.0 <= p <= 1.0:
        return None
    seed = draw_seed(input.device) if p else None
    if activation == activations.RELU:
        if grad_needed(input, weight, bias):
            output: Tensor = apply_linear_relu((p, seed), input, weight, bias)
            return output
        return _linear_relu(input, weight, bias, p, seed)
    if grad_needed(input, weight, bias):
        output = apply_linear_act((activation, negative_slope, p, seed), input, weight, bias)
        return output
    return _linear_act(input, weight, bias, activation, negative_slope, p, seed, False)[0]


def linear_batch_norm_act(
    fit: Fit,
    input: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    state: NormState,
    activation: int,
    negative_slope: float,
    p: float,
) -> Tensor | None:
    """Return dropout(activation(batch_norm(linear(input)))) in evaluation without gradients.

    None in training as well, and where a gradient is needed: no kernel computes that at once.
    """
    if forward_ad._current_level >= 0:
        return None
    bn_weight, bn_bias, running_mean, running_var, _, training, _, eps, _ = state
    tensors = (input, weight, bias, running_mean, running_var, bn_weight, bn_bias)
    if training or not isinstance(input, Tensor) or grad_needed(*tensors):
        return None
    variant = fit.find(*tensors) or fit.admit(
        tensors, check_linear_batch_norm, *tensors, eps, 0.0, None
    )
    if variant is None or not _has_kernel(variant, "linear_batch_norm_act", input):
        return None
    if not 0.0 <= p <= 1.0:
        return None
    seed = draw_seed(input.device) if p else None
    return _linear_batch_norm_act(*tensors, eps, activation, negative_slope, p, seed)


def batch_norm_leaky_relu(
    fits: Fits, input: Any, state: NormState, negative_slope: float
) -> Tensor | None:
    """Return leaky_relu(batch_norm(input)), or None where the kernel cannot take the tensors."""
    if forward_ad._current_level >= 0:
        return None
    weight, bias, running_mean, running_var, tracked, training, momentum, eps, group = state
    if group is not None:
        return _batch_norm_over_group(input, state, negative_slope)
    if _admit(fits, input, state) is None:
        return None
    if grad_needed(input, weight, bias):
        call = (running_mean, running_var, tracked, training, momentum, eps, negative_slope)
        output: Tensor = apply_batch_norm_leaky_relu(call, input, weight, bias)
    else:
        output = _batch_norm_leaky_relu(
            input, running_mean, running_var, tracked, weight, bias, training, momentum, eps,
            negative_slope,
        )[0]  # fmt: skip
    if training:
        mark_written(running_mean, running_var, tracked)
    return output


def batch_norm_act(
    fits: Fits,
    input: Any,
    state: NormState,
    activation: int,
    negative_slope: float,
    p: float,
) -> Tensor | None:
    """Return dropout(activation(batch_norm(input))), or None where no kernel can take the tensors.

    One kernel serves LeakyReLU, and as one of slope 1 no activation, where there is no dropout.
    """
    slope = 1.0 if activation == activations.NONE else negative_slope
    if not p and activation != activations.RELU:
        return batch_norm_leaky_relu(fits, input, state, slope)
    if not 0.0 <= p <= 1.0 or forward_ad._current_level >= 0:
        return None
    weight, bias, running_mean, running_var, tracked, training, momentum, eps, group = state
    if group is not None:
        output = _batch_norm_over_group(input, state, 1.0)
        if output is None:
            return None
        return F.dropout(activations.TABLE[activation].value(output, negative_slope), p)
    variant = _admit(fits, input, state)
    if variant is None or not _has_kernel(variant, "batch_norm_act", input):
        return None
    seed = draw_seed(input.device) if p else None
    options = (training, momentum, eps, activation, negative_slope, p, seed)
    if grad_needed(input, weight, bias):
        output = apply_batch_norm_act(
            (running_mean, running_var, tracked, *options), input, weight, bias
        )
    else:
        output = _batch_norm_act(
            input, running_mean, running_var, tracked, weight, bias, *options
        )[0]  # fmt: skip
    if training:
        mark_written(running_mean, running_var, tracked)
    return output


def _admit(fits: Fits, input: Any, state: NormState) -> Variant | None:
    """Return the variant the tensors of a batch norm belong to; None where no kernel takes them."""
    weight, bias, running_mean, running_var, tracked, training, _, eps, _ = state
    tensors: tuple[Any, ...] = (input, weight, bias, running_mean, running_var)
    if tracked is not None:
        tensors += (tracked,)
    fit = fits[tracked is not None]
    variant = fit.find(*tensors) or fit.admit(
        tensors, check_batch_norm, input, running_mean, running_var, weight, bias, training, eps,
        tracked,
    )  # fmt: skip
    if training and variant and (input.numel() <= input.shape[1] or not eps > 0):
        return None
    return variant


def _has_kernel(variant: Variant, op: str, input: Tensor) -> bool:
    """Return whether the chosen backend has a kernel; plain modules beat the reference."""
    backend, known = variant.fits
    if backend != backends._chosen:
        known = backends.has_kernel(op, input.device.type)
        variant.fits = (backends._chosen, known)
    return known


def _torch_is_faster(input: Tensor, weight: Any) -> bool:
    """Return whether torch's product and activation, without dropout, win on this CPU.

    64 and 512 rows of 2048 x 2048 took 1.03 to 1.07 times as long with ours in training, where
    bfloat16 has dot products but no tiles (both held to that on a machine that has them). Up to a
    million weights ours take 0.3 to 1.0 times as long.
    """
    return (
        input.dtype is torch.bfloat16
        and input.device.type == "cpu"
        and weight.numel() > on_chip.MOST_BFLOAT16
        and backends.isa() == "avx512_bf16"
    )


def _batch_norm_over_group(input: Any, state: NormState, negative_slope: float) -> Tensor | None:
    """Return leaky_relu(batch_norm(input)) with the statistics of all processes of the group.

    Whether it runs must not depend on how many rows this process has: the others wait for it. So
    nothing is remembered here, and the op checks its arguments at every call.
    """
    weight, bias, running_mean, running_var, tracked, _, momentum, eps, group = state
    if type(input) not in (Tensor, Parameter) or input.dim() not in (2, 3):
        return None
    return batch_norm_over_group(
        input, running_mean, running_var, weight, bias, momentum, eps, negative_slope, group,
        num_batches_tracked=tracked,
    )  # fmt: skip


def research_net(
    fits: Fits,
    input: Any,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    state: NormState,
    dropout_p: Sequence[float],
    negative_slope: float,
) -> Tensor | None:
    """Return the whole network's output, or None where the kernel cannot take the tensors."""
    if forward_ad._current_level >= 0:
        return None
    weight, bias, running_mean, running_var, tracked, training, momentum, eps, group = state
    if group is not None:  # the batch norm waits for other processes in the middle: op by op
        return None
    tensors: tuple[Any, ...] = (input, *weights, *biases, weight, bias, running_mean, running_var)
    if tracked is not None:
        tensors += (tracked,)
    fit = fits[tracked is not None]
    variant = fit.find(*tensors) or fit.admit(
        tensors, check_research_net, input, weights, biases, weight, bias, running_mean,
        running_var, training, [0.0] * len(dropout_p), None, eps, tracked,
    )  # fmt: skip
    if variant is None or (training and (input.shape[0] < 2 or not eps > 0)):
        return None
    seed = None
    if any(dropout_p):
        for p in dropout_p:
            if not 0.0 <= p <= 1.0:
                return None
        seed = draw_seed(input.device)
    backend, in_one_op = variant.fits
    if backend != backends._chosen:
        in_one_op = on_chip.fits(input, weights)
        variant.fits = (backends._chosen, in_one_op)
    if not in_one_op:
        return research_net_op(
            input, weights, biases, weight, bias, running_mean, running_var, training, dropout_p,
            seed, momentum, eps, negative_slope, num_batches_tracked=tracked,
        )  # fmt: skip
    if not training and not torch.is_grad_enabled():  # the shortest way: a microsecond less
        return _research_net(
            input, weights, biases, weight, bias, running_mean, running_var, tracked, training,
            dropout_p, seed, momentum, eps, negative_slope,
        )[0]  # fmt: skip
    return run_research_net(
        input, weights, biases, weight, bias, running_mean, running_var, tracked, training,
        dropout_p, seed, momentum, eps, negative_slope,
    )  # fmt: skip


def mlp(fit: Fit, input: Any, layers: Layers) -> Tensor | None:
    """Return the output of Linear layers in a row, or None where no one kernel can run them."""
    if forward_ad._current_level >= 0:
        return None
    tensors = (input, *layers.tensors())
    variant = fit.find(*tensors) or fit.admit(tensors, check_mlp, input, layers)
    if variant is None:
        return None
    backend, in_one_op = variant.fits
    if backend != backends._chosen:
        in_one_op = on_chip.fits_mlp(input, layers.weights)
        variant.fits = (backends._chosen, in_one_op)
    # A mode wants to see the ops of each layer.
    if not in_one_op or torch._C._len_torch_dispatch_stack() > 0:
        return None
    for p in layers.dropout_p:
        if not 0.0 <= p <= 1.0:
            return None
    for norm in layers.norms.values():
        training, _, eps = norm[5:8]
        if training and (input.shape[0] < 2 or not eps > 0):
            return None
    return run_mlp(input, layers)
