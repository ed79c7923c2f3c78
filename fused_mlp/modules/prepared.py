"""A whole network made ready for its next call: what was checked once is only compared.

Everything a call depends on is read from the modules once and kept in a snapshot; the parameters go
to the CPU library once, by reference. The next call compares the snapshot, lets torch's guards look
at the input, and runs. Values are read at every call, never kept: ``weight.data``, NumPy arrays
over it and other processes change them without a trace in any version counter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from .. import backends, on_chip
from ..ops._common import bound, grad_needed
from ..ops.fit import Check, is_nested, make_check
from ..ops.research_net import apply_checked
from . import snapshot

_prepare = torch.ops.fused_mlp_kernels.research_net_prepare.default
_forward = bound(torch.ops.fused_mlp_kernels.research_net_prepared.default)
_evaluate = bound(torch.ops.fused_mlp_kernels.research_net_evaluate.default)
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


class PreparedNet:
    """One network as its modules stood at a call.

    Args:
        read: a snapshot of the modules.
        arguments: what ``research_net_prepare`` takes, read from the modules and checked.
        input: one of the kind that is to be recognised.
    """

    __slots__ = (
        "_buffers", "_call", "_checks", "_drops", "_handle", "_parameters", "_snapshot",
        "_training", "_unchanged",
    )  # fmt: skip

    def __init__(self, read: snapshot.Snapshot, arguments: Sequence[Any], input: Tensor) -> None:
        weights, biases, bn_weight, bn_bias, *buffers, training, dropout_p = arguments[:9]
        self._snapshot = read
        self._unchanged = (backends.native_watch() or snapshot.watch)(read)
        self._handle: Tensor = _prepare(*arguments)
        self._parameters = (*weights, *biases, bn_weight, bn_bias)
        self._buffers = tuple(buffer for buffer in buffers if buffer is not None)
        self._training = training
        self._drops = any(dropout_p)
        usual: tuple[bool, ...] = (False, False, *[True] * len(self._parameters))
        if bn_weight is None:
            usual = ()
        self._call = (self._handle, usual, None, None, (training, dropout_p, *arguments[9:]))
        self._checks: tuple[Check, ...] = (make_check([input], 1),)

    def accept(self, input: Tensor) -> bool:
        """Recognise inputs of this kind too; False where too many kinds are known."""
        if len(self._checks) >= _MAX_CHECKS:
            return False
        # Assigned whole: another thread sees the old tuple or the new one.
        self._checks = (*self._checks, make_check([input], 1))
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
                output = apply_checked(self._call, input, *self._parameters)
            elif self._training or self._drops:
                output = _forward(input, self._handle)[0]
            else:
                return _evaluate(input, self._handle)
        except RuntimeError as error:
            if _OURS not in str(error):
                raise
            return None  # a tensor has another size, dtype or device; nothing was written yet
        if self._training:
            increment_version(self._buffers)
        return output
