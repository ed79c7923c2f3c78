"""A whole network made ready for its next call: what was checked once is only compared.

Everything a call depends on is read from the modules once and kept in a snapshot; the parameters go
to the CPU library once, by reference. The next call compares the snapshot, lets torch's guards look
at the input, and runs. Values are read at every call, never kept: ``weight.data``, NumPy arrays
over it and other processes change them without a trace in any version counter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from .. import backends, on_chip
from ..ops import mlp
from ..ops._common import bound, grad_needed
from ..ops.fit import Check, is_nested, make_check
from ..ops.research_net import apply_checked as apply_research_net
from . import snapshot
from .norm import NormState

_prepare_research_net = torch.ops.fused_mlp_kernels.research_net_prepare.default
_research_net = bound(torch.ops.fused_mlp_kernels.research_net_prepared.default)
_evaluate_research_net = bound(torch.ops.fused_mlp_kernels.research_net_evaluate.default)
_is_grad_enabled = torch.is_grad_enabled
_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_MAX_CHECKS = 4
_OURS = "fused_mlp: "  # what the errors of the CPU library begin with


def can_prepare(input: Tensor, weights: Sequence[Tensor]) -> bool:
    """Return whether the CPU library ran a network of these tensors and may keep them."""
    return (
        input.device.type == "cpu"
        and backends.active_backend("cpu") == "native"
        and on_chip.fits(input, weights)
        # A mode wants to see the tensors a kernel takes.
        and torch._C._len_torch_dispatch_stack() == 0
        # `swap_tensors` refuses tensors that someone else refers to.
        and not torch.__future__.get_swap_module_params_on_conversion()
        # Checkpointing wants the call it repeats to save tensors of the same number and shape.
        and _saved_tensor_hooks(True) is None
    )


@dataclass(frozen=True)
class Prepared:
    """A network as it was handed over, and the ops that run it.

    Attributes:
        call: what ``apply`` takes first, the handle at its beginning.
        parameters: tensors that may need a gradient, or None; the first is one.
        written: buffers that a call writes.
        forward: ``forward(input, handle)`` where ``evaluate`` cannot run it; it gives more than
            the output.
        evaluate: ``evaluate(input, handle)``, what calls without gradients run.
        apply: ``apply(call, input, *parameters)``, the autograd node.
        feature_dim: the dimension of the input whose size the parameters fix.
    """

    call: tuple[Any, ...]
    parameters: tuple[Any, ...]
    written: tuple[Tensor, ...]
    forward: Callable[..., Any] | None
    evaluate: Callable[..., Tensor]
    apply: Callable[..., Tensor]
    feature_dim: int


def prepare_research_net(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    state: NormState,
    dropout_p: Sequence[float],
    negative_slope: float,
) -> Prepared:
    bn_weight, bn_bias, *buffers, training, momentum, eps, _ = state
    handle = _prepare_research_net(
        weights, biases, bn_weight, bn_bias, *buffers, training, dropout_p, momentum, eps,
        negative_slope,
    )  # fmt: skip
    parameters = (*weights, *biases, bn_weight, bn_bias)
    usual: tuple[bool, ...] = (False, False, *[True] * len(parameters))
    if bn_weight is None:
        usual = ()
    return Prepared(
        (handle, usual, None, None, (training, dropout_p, momentum, eps, negative_slope)),
        parameters,
        tuple(buffer for buffer in buffers if buffer is not None) if training else (),
        _research_net if training or any(dropout_p) else None,
        _evaluate_research_net,
        apply_research_net,
        feature_dim=1,
    )


def prepare_mlp(layers: mlp.Layers) -> Prepared:
    return Prepared(
        mlp.make_call(layers),
        layers.parameters(),
        layers.written(),
        mlp.prepared if layers.train() else None,
        mlp.evaluate,
        mlp.apply_checked,
        feature_dim=-1,
    )


class PreparedNet:
    """One network as its modules stood at a call.

    Args:
        read: a snapshot of the modules.
        network: what was read from them, handed over.
        input: one of the kind that is to be recognised.
    """

    __slots__ = (
        "_apply", "_call", "_checks", "_evaluate", "_feature_dim", "_forward", "_handle",
        "_parameters", "_snapshot", "_unchanged", "_written",
    )  # fmt: skip

    def __init__(self, read: snapshot.Snapshot, network: Prepared, input: Tensor) -> None:
        self._snapshot = read
        self._unchanged = (backends.native_watch() or snapshot.watch)(read)
        self._call, self._parameters = network.call, network.parameters
        self._handle: Tensor = network.call[0]
        self._forward, self._evaluate = network.forward, network.evaluate
        self._apply, self._written = network.apply, network.written
        self._feature_dim = network.feature_dim
        self._checks: tuple[Check, ...] = (make_check([input], self._feature_dim),)

    def accept(self, input: Tensor) -> bool:
        """Recognise inputs of this kind too; False where too many kinds are known."""
        if len(self._checks) >= _MAX_CHECKS:
            return False
        # Assigned whole: another thread sees the old tuple or the new one.
        self._checks = (*self._checks, make_check([input], self._feature_dim))
        return True

    def holds(self, modules: Mapping[Any, Any]) -> bool:
        """Return whether the modules are what they were."""
        return self._unchanged(modules)

    def run(
        self, input: Any, modules: Mapping[Any, Any], containers: tuple[dict[str, Any], ...] = ()
    ) -> Tensor | None:
        """Return the output, or None where the modules or the input are not what they were.

        Args:
            input: anything.
            modules: the ``_modules`` of the container as they are now.
            containers: the ``__dict__`` of modules around the network whose hooks would not run.
        """
        if forward_ad._current_level >= 0 or not self._unchanged(modules, *containers):
            return None
        if is_nested(input):
            return None
        for check in self._checks:
            if check(input):
                break
        else:
            return None
        try:
            if _is_grad_enabled() and (
                self._parameters[0].requires_grad or grad_needed(input, *self._parameters)
            ):
                if _saved_tensor_hooks(True) is not None:  # checkpointing; see can_prepare
                    return None
                output = self._apply(self._call, input, *self._parameters)
            elif self._forward is None:
                return self._evaluate(input, self._handle)
            else:
                output = self._forward(input, self._handle)[0]
        except RuntimeError as error:
            if _OURS not in str(error):
                raise
            return None  # a tensor has another size, dtype or device; nothing was written yet
        if self._written:
            increment_version(self._written)
        return output
