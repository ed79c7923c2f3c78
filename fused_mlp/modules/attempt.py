"""Try a fused op on a module's tensors; None says that the plain modules must run.

Nothing here has a side effect before it is sure of the fused op: no seed is drawn, no running
statistic touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import backends
from ..dropout import draw_seed
from ..ops._common import grad_needed, mark_written
from ..ops.batch_norm_leaky_relu import BatchNormLeakyReLUFunction
from ..ops.batch_norm_leaky_relu import check as check_batch_norm
from ..ops.linear_relu import LinearReLUFunction
from ..ops.linear_relu import check as check_linear_relu
from ..ops.over_group import batch_norm_leaky_relu as batch_norm_over_group
from ..ops.research_net import check as check_research_net
from ..ops.research_net import research_net as research_net_op
from ..ops.research_net import run as run_research_net
from .fit import Fit
from .norm import NormState

_research_net = torch.ops.fused_mlp_kernels.research_net.default
_linear_relu = torch.ops.fused_mlp_kernels.linear_relu.default
_batch_norm_leaky_relu = torch.ops.fused_mlp_kernels.batch_norm_leaky_relu.default


# One for calls without num_batches_tracked, as in evaluation, and one for calls with it.
Fits = tuple[Fit, Fit]


def two_fits() -> Fits:
    """Return what an op with a batch norm remembers; the input is (N, C) or (N, C, L)."""
    return Fit(feature_dim=1), Fit(feature_dim=1)


# What one call of a whole network uses: weights, biases, the batch norm's state, dropout
# probabilities, slope of the LeakyReLU.
NetState = tuple[Sequence[Tensor], Sequence[Tensor], NormState, Sequence[float], float]


def linear_relu(
    fit: Fit, input: Any, weight: Tensor | None, bias: Tensor | None, p: float
) -> Tensor | None:
    """Return dropout(relu(linear(input))), or None where the kernel cannot take the tensors."""
    if forward_ad._current_level >= 0:
        return None
    if fit.find(input, weight, bias) is None:
        tensors = (input, weight, bias)
        if fit.admit(tensors, check_linear_relu, input, weight, bias, 0.0, None) is None:
            return None
    seed = None
    if p:
        if not 0.0 <= p <= 1.0:
            return None
        seed = draw_seed(input.device)
    if grad_needed(input, weight, bias):
        return LinearReLUFunction.apply(input, weight, bias, p, seed)
    return _linear_relu(input, weight, bias, p, seed)


def batch_norm_leaky_relu(
    fits: Fits, input: Any, state: NormState, negative_slope: float
) -> Tensor | None:
    """Return leaky_relu(batch_norm(input)), or None where the kernel cannot take the tensors."""
    if forward_ad._current_level >= 0:
        return None
    weight, bias, running_mean, running_var, tracked, training, momentum, eps, group = state
    if group is not None:
        return _batch_norm_over_group(input, state, negative_slope)
    tensors: tuple[Any, ...] = (input, weight, bias, running_mean, running_var)
    if tracked is not None:
        tensors += (tracked,)
    fit = fits[tracked is not None]
    if fit.find(*tensors) is None and not fit.admit(
        tensors, check_batch_norm, input, running_mean, running_var, weight, bias, training, eps,
        tracked,
    ):  # fmt: skip
        return None
    if training and (input.numel() <= input.shape[1] or not eps > 0):
        return None
    if grad_needed(input, weight, bias):
        output = BatchNormLeakyReLUFunction.apply(
            input, weight, bias, running_mean, running_var, tracked, training, momentum, eps,
            negative_slope,
        )  # fmt: skip
    else:
        output = _batch_norm_leaky_relu(
            input, running_mean, running_var, tracked, weight, bias, training, momentum, eps,
            negative_slope,
        )[0]  # fmt: skip
    if training:
        mark_written(running_mean, running_var, tracked)
    return output


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
    backend, on_chip = variant.fits
    if backend != backends._chosen:
        on_chip = backends.fits(input, weights)
        variant.fits = (backends._chosen, on_chip)
    if not on_chip:
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
