"""The fused ops on modules for torch.compile and torch.export: plain code a tracer can follow.

Tracers guard on what they see read, so nothing is cached here: options and hooks are read by
their ordinary names, and the ops are the public ones, which choose the kernel. As in ``attempt``,
None says that the plain modules must run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .. import activations, backends, on_chip
from .._version import __version__
from ..ops._common import FLOATING
from .norm import SynchronizedForward

# The name of an activation, its options, the probability of dropout.
Behind = tuple[str, dict[str, Any], float]


def read_behind(modules: Sequence[Any]) -> Behind:
    """Return what an activation and a dropout layer compute now; either of them may lack."""
    name, p = "none", 0.0
    options: dict[str, Any] = {}
    for module in modules:
        if type(module) is nn.Dropout:
            p = float(module.p) if module.training else 0.0
        elif type(module) is nn.LeakyReLU:
            name, options = "leaky_relu", {"negative_slope": module.negative_slope}
        elif type(module) is nn.GELU:
            name, options = "gelu", {"approximate": module.approximate}
        else:
            name = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh"}[type(module)]
    return name, options, p


def ops_allowed(input: Any) -> bool:
    """Return whether a graph traced with this input may hold the fused ops."""
    return (
        isinstance(input, Tensor)
        and input.dtype in FLOATING
        and not torch.is_autocast_enabled(input.device.type)
        and not torch._C._are_functorch_transforms_active()
        # ONNX knows torch's own ops.
        and not torch.onnx.is_in_onnx_export()
    )


def hooked(modules: Iterable[Any]) -> bool:
    """Return whether hooks would run around one of the modules."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return True
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


@torch.compiler.assume_constant_result  # asked once a graph, not traced
def _has_kernel(op: str, device: str) -> bool:
    return backends.has_kernel(op, device)


def linear_act(linear: Any, behind: Behind, input: Tensor) -> Tensor | None:
    """Return dropout(activation(linear(input)))."""
    weight, bias = linear.weight, linear.bias
    if input.dim() == 0 or not _chained(input, weight, bias, input.shape[-1]):
        return None
    name, options, p = behind
    if name == "relu":
        return torch.ops.fused_mlp.linear_relu(input, weight, bias, p)
    if not _has_kernel("linear_act", input.device.type):
        return None
    return torch.ops.fused_mlp.linear_act(input, weight, bias, name, dropout_p=p, **options)


def batch_norm_act(norm: Any, behind: Behind, input: Tensor) -> Tensor | None:
    """Return dropout(activation(norm(input)))."""
    state = _norm_state(norm)
    if state is None or input.dim() not in (2, 3) or input.shape[1] != norm.num_features:
        return None
    running_mean, running_var, tracked, training = state
    if training and input.numel() <= input.shape[1]:
        return None
    arguments = (
        input, running_mean, running_var, norm.weight, norm.bias, training, norm.momentum or 0.0,
        norm.eps,
    )  # fmt: skip
    name, options, p = behind
    if name == "leaky_relu" and p == 0:
        return torch.ops.fused_mlp.batch_norm_leaky_relu(
            *arguments, options["negative_slope"], num_batches_tracked=tracked
        )
    if (name != "none" or p) and not _has_kernel("batch_norm_act", input.device.type):
        return None
    return torch.ops.fused_mlp.batch_norm_act(
        *arguments, name, dropout_p=p, num_batches_tracked=tracked, **options
    )


def linear_batch_norm_act(linear: Any, norm: Any, behind: Behind, input: Tensor) -> Tensor | None:
    """Return dropout(activation(norm(linear(input)))) in evaluation."""
    weight, bias = linear.weight, linear.bias
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return None
    if input.dim() != 2 or not _chained(input, weight, bias, input.shape[1]):
        return None
    if weight.shape[0] != norm.num_features:
        return None
    if not _has_kernel("linear_batch_norm_act", input.device.type):
        return None
    name, options, p = behind
    return torch.ops.fused_mlp.linear_batch_norm_act(
        input, weight, bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps,
        name, dropout_p=p, **options,
    )  # fmt: skip


def research_net(
    linears: Sequence[Any],
    dropout_p: Sequence[float],
    norm: Any,
    negative_slope: float,
    input: Tensor,
) -> Tensor | None:
    """Return the output of the whole network."""
    state = _norm_state(norm)
    if state is None or input.dim() != 2:
        return None
    features = input.shape[1]
    for linear in linears:
        if linear.bias is None or not _chained(input, linear.weight, linear.bias, features):
            return None
        features = linear.weight.shape[0]
    running_mean, running_var, tracked, training = state
    if linears[-2].weight.shape[0] != norm.num_features or (training and input.shape[0] < 2):
        return None
    return torch.ops.fused_mlp.research_net(
        input, [linear.weight for linear in linears], [linear.bias for linear in linears],
        norm.weight, norm.bias, running_mean, running_var, training, list(dropout_p), None,
        norm.momentum or 0.0, norm.eps, negative_slope, num_batches_tracked=tracked,
        compiled_for=None if torch.compiler.is_exporting() else _compiled_for(input.device.type),
    )  # fmt: skip


def mlp(layers: Sequence[tuple[Any, Any, Behind]], input: Tensor) -> Tensor | None:
    """Return the output of Linear layers in a row, where one op of a graph may run them.

    Args:
        layers: of each the Linear, the batch norm behind it or None, and what stands behind both.
    """
    if torch.compiler.is_exporting() or not on_chip.may_fit_mlp(input) or input.dim() == 0:
        return None
    if _backend(input.device.type, backends._chosen) != "native":
        return None
    features = input.shape[-1]
    norms: list[tuple[int, Any, Any]] = []
    for layer, (linear, norm, _) in enumerate(layers):
        if not _chained(input, linear.weight, linear.bias, features):
            return None
        features = linear.weight.shape[0]
        if norm is not None:
            state = _norm_state(norm)
            if state is None or input.dim() != 2 or features != norm.num_features:
                return None
            if state[3] and input.shape[0] < 2:
                return None
            norms.append((layer, norm, state))
    return torch.ops.fused_mlp.mlp(
        input,
        [linear.weight for linear, _, _ in layers],
        [linear.bias for linear, _, _ in layers],
        [_number(name, options.get("approximate", "none")) for _, _, (name, options, _) in layers],
        [options.get("negative_slope", 0.0) for _, _, (_, options, _) in layers],
        [p for _, _, (_, _, p) in layers],
        [layer for layer, _, _ in norms],
        [parameter for _, norm, _ in norms for parameter in (norm.weight, norm.bias)],
        [buffer for _, _, state in norms for buffer in state[:3]],
        [state[3] for _, _, state in norms],
        [norm.momentum or 0.0 for _, norm, _ in norms],
        [norm.eps for _, norm, _ in norms],
        compiled_for=_compiled_for(input.device.type),
    )


@torch.compiler.assume_constant_result
def _backend(device: str, chosen: str) -> str:
    return backends.active_backend(device)


@torch.compiler.assume_constant_result
def _number(activation: str, approximate: str) -> int:
    return activations.number("mlp", activation, approximate)


def _compiled_for(device: str) -> str:
    """Name what a graph is made for, which decides what its forward keeps for its backward.

    The name stands in the graph, so that torch's caches on disk do not hand it to a process that
    runs something else. Another choice in this process is guarded on, because it is read here.
    """
    return _describe(device, backends._chosen)


@torch.compiler.assume_constant_result
def _describe(device: str, chosen: str) -> str:
    cpu = f" {backends.isa()} {backends.fingerprint()}" if device == "cpu" else ""
    return f"{__version__} {backends.active_backend(device)}{cpu}"


def _chained(input: Tensor, weight: Tensor, bias: Tensor | None, features: int) -> bool:
    """Return whether a linear layer can take ``features`` columns of input's dtype and device."""
    if weight.shape[1] != features or (bias is not None and bias.dtype != input.dtype):
        return False
    return weight.dtype == input.dtype and weight.device == input.device


def _norm_state(norm: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool] | None:
    """Return running statistics, batch counter and whether the batch's own statistics count.

    None where the momentum depends on the batch counter, which a traced graph cannot read, or where
    the statistics are shared with other processes, which the module sees to itself.
    """
    running_mean, running_var = norm.running_mean, norm.running_var
    if not norm.training:
        return running_mean, running_var, None, running_mean is None and running_var is None
    if type(norm) is nn.SyncBatchNorm or type(norm.forward) is SynchronizedForward:
        return None
    if not norm.track_running_stats:
        return None, None, None, True
    if norm.momentum is None:
        return None
    return running_mean, running_var, norm.num_batches_tracked, True
