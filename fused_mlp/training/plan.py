"""What a fused step runs, worked out once, and the check that it may still run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from .. import backends
from ..modules import snapshot
from ..modules.whole import MLPGroup
from ..ops._common import bound
from ..ops.fit import Fit, is_nested
from . import losses
from .errors import Ordinary
from .network import Network
from .optimizers import Watched

_make = torch.ops.fused_mlp_kernels.train_step_plan.default
_run = bound(torch.ops.fused_mlp_kernels.train_step.default)
_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class Plan:
    """A step for one network, loss and optimizer as they are now.

    Args:
        net, loss, optimizer: as :class:`fused_mlp.TrainStep` takes them.
        keep_grads: whether ``.grad`` holds the gradients after a step.
        input: the batch at hand; others may have more or fewer rows.

    Raises:
        Ordinary: where the kernels would not do the same as the ordinary loop.
    """

    __slots__ = (
        "_check", "_cumulative", "_expected_grads", "_handle", "_momentum", "_network",
        "_optimizer", "_snapshot", "_tensors", "_unchanged", "_written",
    )  # fmt: skip

    def __init__(
        self, net: nn.Module, loss: Any, optimizer: Optimizer, keep_grads: bool, input: Any
    ) -> None:
        if not isinstance(input, Tensor) or input.requires_grad:
            raise Ordinary("the input is not a tensor without requires_grad")
        if input.device.type != "cpu" or backends.active_backend("cpu") != "native":
            raise Ordinary("only the native backend of the CPU has a fused step")
        if input.dtype not in (torch.float32, torch.float64):
            raise Ordinary(f"only float32 and float64 have a fused step, not {input.dtype}")
        if not _autograd_is_plain():
            raise Ordinary("gradients are off, or something watches the operations")
        if torch.__future__.get_swap_module_params_on_conversion():
            raise Ordinary("tensors may be swapped, which a plan's references would prevent")
        judge = losses.read(loss)
        self._network = Network(net)
        group = self._network.group
        try:
            arguments = group.read()
        except KeyError:
            raise Ordinary("a parameter of a layer is computed") from None
        self._cumulative = group.is_cumulative()
        if self._cumulative and isinstance(group, MLPGroup):
            raise Ordinary("a batch norm's momentum changes from step to step")
        tensors = self._tensors = group.tensors(arguments)
        variant = Fit(feature_dim=1).admit((input, *tensors), group.check, input, arguments)
        if variant is None or input.dim() != 2:
            raise Ordinary("the input or a parameter does not fit the layers")
        if not group.fits(input, arguments):
            raise Ordinary("a layer is too wide for one op, or there are too many")
        network = group.hand_over(arguments)
        self._momentum = group.momentum(arguments)
        if judge.weight is not None and not (
            judge.weight.dtype == input.dtype
            and judge.weight.device == input.device
            and judge.weight.shape == arguments[0][-1].shape[:1]
            and judge.weight.is_contiguous()
        ):
            raise Ordinary("the weight of the loss does not fit the output")
        self._check = variant.check
        self._optimizer = Watched(optimizer)

        places: list[int] = []
        groups: list[int] = []
        counts: list[int] = []
        states: list[Tensor] = []
        for place, parameter in enumerate(network.parameters):
            if parameter is None or not parameter.requires_grad:
                continue
            number, state = self._optimizer.state_of(parameter)
            places.append(place)
            groups.append(number)
            counts.append(len(state))
            states += state
        trained = [network.parameters[place] for place in places]
        if not trained or len({*map(id, trained)}) < len(trained):
            raise Ordinary("no parameter requires grad, or one stands in two places")
        kept = [_kept_grad(p) for p in trained] if keep_grads else []
        self._expected_grads: list[Tensor | None] | None = None
        if keep_grads:
            grad_of = dict(zip(map(id, trained), kept, strict=True))
            self._expected_grads = [grad_of.get(id(p)) for p in self._optimizer.parameters]
        if any(t is not None and not t.is_contiguous() for t in self._tensors) or any(
            t.is_inference() for t in (*trained, *network.written)
        ):
            raise Ordinary("a parameter or a buffer is not contiguous, or an inference tensor")
        self._written = (*trained, *network.written, *self._optimizer.state_tensors(), *kept)
        self._handle = _make(
            network.call[0], judge.cross_entropy, judge.reduction == "mean", judge.weight,
            judge.ignore_index, judge.label_smoothing, self._optimizer.adam,
            self._optimizer.options, places, groups, counts, states, kept,
        )  # fmt: skip
        self._snapshot = snapshot.joined(
            self._network.snapshot(), losses.snapshot_of(loss), self._optimizer.snapshot()
        )
        self._unchanged = (backends.native_watch() or snapshot.watch)(self._snapshot)

    def run(self, input: Any, target: Any, max_norm: float | None) -> Tensor | None:
        """Take a step and return its loss; None, with nothing done, where that cannot be."""
        network, optimizer, expected = self._network, self._optimizer, self._expected_grads
        if (
            not self._unchanged(network.children)
            or not network.holds()
            or not optimizer.holds()
            or is_nested(input)
            or not self._check(input, *self._tensors)
            or type(target) is not Tensor
            or target.is_nested
            or target.requires_grad
            or not _autograd_is_plain()
        ):
            return None
        parameters = optimizer.parameters
        for parameter in parameters:
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return None
        if expected is not None:
            for parameter, grad in zip(parameters, expected, strict=True):
                if parameter.grad is not grad:
                    return None
        momentum = self._momentum
        if self._cumulative:
            momentum = network.group.momentum(network.group.read())
        loss: Tensor | None = _run(self._handle, input, target, momentum, max_norm)
        if loss is None:
            return None
        increment_version(self._written)
        optimizer.note_step()
        if expected is None:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = None
        return loss


def _autograd_is_plain() -> bool:
    """Return whether gradients are computed now and nobody watches the operations."""
    return (
        torch.is_grad_enabled()
        and not torch.is_anomaly_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and _saved_tensor_hooks(True) is None
    )


def _kept_grad(parameter: Tensor) -> Tensor:
    """Return the gradient tensor that every step overwrites."""
    grad = parameter.grad
    if grad is None:
        raise Ordinary("the first step makes the gradients")
    if (
        type(grad) is not Tensor
        or grad.layout != torch.strided
        or grad.dtype != parameter.dtype
        or not grad.is_contiguous()
        or grad.requires_grad
        or grad.is_inference()
    ):
        raise Ordinary("a gradient is not a plain tensor like its parameter")
    return grad
