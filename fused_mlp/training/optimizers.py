"""What a fused step reads of ``torch.optim``'s SGD, Adam and AdamW, and what it checks each time.

The optimizer stays the owner of everything: options are read from its ``param_groups`` at every
step and its ``state`` tensors are updated in place, so schedulers, checkpoints and its own
``step()`` work at any moment. It also makes its state: a parameter without any takes one ordinary
step first.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from ..modules import snapshot
from ..modules.snapshot import Snapshot
from .errors import Ordinary

# The options read at every step, and the columns of `options` in csrc/cpu/train_step.cpp.
_SGD = itemgetter(
    "lr", "weight_decay", "maximize", "momentum", "dampening", "nesterov", "differentiable"
)
_ADAM = itemgetter(
    "lr", "weight_decay", "maximize", "betas", "eps", "decoupled_weight_decay", "amsgrad",
    "capturable", "differentiable",
)  # fmt: skip
_COLUMNS = 7

_GLOBAL_HOOKS = (
    torch_optimizer._global_optimizer_pre_hooks,
    torch_optimizer._global_optimizer_post_hooks,
)
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
# What replaced methods and a GradScaler leave in an optimizer's dictionary.
_OVERRIDES = ("step", "zero_grad", "grad_scale", "found_inf")


class Watched:
    """An optimizer whose update the kernels compute.

    Attributes:
        adam: whether the rule is Adam's or AdamW's, not SGD's.
        parameters: all parameters of all groups, in order.
        options: float64 tensor of a row of options for each group, up to date after ``holds``.

    Raises:
        Ordinary: where the kernels would not do the same.
    """

    __slots__ = (
        "_groups", "_inner", "_memory", "_needs", "_own", "_read", "_state", "_step",
        "_values", "adam", "options", "parameters",
    )  # fmt: skip

    def __init__(self, optimizer: Optimizer) -> None:
        kind = type(optimizer)
        if kind not in (SGD, Adam, AdamW):
            raise Ordinary(f"{kind.__name__} is not SGD, Adam or AdamW")
        self.adam = kind is not SGD
        self._read: Any = _ADAM if self.adam else _SGD
        own: dict[str, Any] = optimizer.__dict__
        self._own = own
        self._step = own.get("step")
        if self._step is not None and not _only_tracks(self._step, kind):
            raise Ordinary("the optimizer's step was replaced")
        if any(key in own for key in _OVERRIDES[1:]):
            raise Ordinary("the optimizer's zero_grad was replaced, or a GradScaler drives it")
        if any(own[key] for key in _HOOKS) or any(_GLOBAL_HOOKS):
            raise Ordinary("a hook is registered on the optimizer's step")
        self._groups: list[dict[str, Any]] = [*own["param_groups"]]
        self.parameters: list[Tensor] = [p for group in self._groups for p in group["params"]]
        self._memory = array("d", bytes(8 * _COLUMNS * len(self._groups)))
        self.options = torch.frombuffer(self._memory, dtype=torch.float64)
        self._values: list[tuple[Any, ...]] = [()] * len(self._groups)
        self._needs = [self._adopt(i, self._read(g)) for i, g in enumerate(self._groups)]
        self._state = own["state"]
        self._inner = [*self._state.values()]

    def snapshot(self) -> Snapshot:
        """Return what has to stay as it is, but for what :meth:`holds` looks at."""
        own = self._own
        entries = [(own, ("param_groups", "state")), *((g, ("params",)) for g in self._groups)]
        entries += [(inner, tuple(inner)) for inner in self._inner]
        absent = [key for key in _OVERRIDES if key not in own]
        replaced = [(own, ("step",))] if self._step is not None else []
        values = snapshot.take([], [*entries, *replaced])[2]
        return (
            (), (), values, tuple(x for key in absent for x in (own, key)), _GLOBAL_HOOKS,
            tuple(x for key in _HOOKS for x in (own, key)),
        )  # fmt: skip

    def holds(self) -> bool:
        """Return whether what a snapshot does not see is as it was; adopt new option values."""
        own = self._own
        parameters: list[Tensor] = []
        for i, group in enumerate(self._groups):
            parameters += group["params"]
            values = self._read(group)
            if values != self._values[i]:
                try:
                    if self._adopt(i, values) != self._needs[i]:
                        return False
                except Ordinary:
                    return False
        return (
            len(own["param_groups"]) == len(self._groups)
            and all(map(is_, own["param_groups"], self._groups))
            and len(parameters) == len(self.parameters)
            and all(map(is_, parameters, self.parameters))
            and len(self._state) == len(self._inner)
            and all(map(is_, self._state.values(), self._inner))
        )

    def state_of(self, parameter: Tensor) -> tuple[int, list[Tensor]]:
        """Return the index of the parameter's group and its state as the kernels take it.

        Raises:
            Ordinary: where there is no state yet or it does not fit.
        """
        group = next(
            (i for i, g in enumerate(self._groups) if any(p is parameter for p in g["params"])), -1
        )
        if group < 0:
            raise Ordinary("a parameter is not in the optimizer")
        inner = self._state.get(parameter, {})
        state = [inner.get(key) for key in self._needs[group]]
        for key, tensor in zip(self._needs[group], state, strict=True):
            if tensor is None:
                raise Ordinary("the optimizer's first step makes its state")
            _check_state(key, tensor, parameter)
        return group, state

    def note_step(self) -> None:
        """Tell a learning rate scheduler that a step was taken."""
        if self._step is not None:
            self._own["_opt_called"] = True

    def state_tensors(self) -> list[Tensor]:
        """Return every tensor of the state."""
        values = [value for inner in self._inner for value in inner.values()]
        return [value for value in values if isinstance(value, Tensor)]

    def _adopt(self, index: int, values: tuple[Any, ...]) -> tuple[str, ...]:
        """Enter a group's options; return the names of the state tensors they need."""
        needs: tuple[str, ...]
        numbers: Sequence[Any]
        if self.adam:
            lr, decay, maximize, betas, eps, decoupled, amsgrad, capturable, differentiable = values
            numbers = (lr, decay, maximize, *betas, eps, decoupled)
            needs = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 4 if amsgrad else 3]
            if capturable:
                raise Ordinary("the optimizer is capturable")
        else:
            *numbers, differentiable = values
            needs = ("momentum_buffer",) if values[3] != 0 else ()
        if differentiable:
            raise Ordinary("the optimizer is differentiable")
        if not all(isinstance(number, int | float) for number in numbers):
            raise Ordinary("an option of the optimizer is a tensor")
        first = index * _COLUMNS
        for i, number in enumerate(numbers):
            self._memory[first + i] = number
        self._values[index] = values
        return needs


def _only_tracks(step: Any, kind: type[Optimizer]) -> bool:
    """Return whether a replaced step is the scheduler's, which notes the call and calls ours."""
    return (
        getattr(step, "_wrapped_by_lr_sched", False)
        and getattr(step, "__wrapped__", None) is kind.step
    )


def _check_state(key: str, tensor: Tensor, parameter: Tensor) -> None:
    if key == "step":
        fits = tensor.numel() == 1 and tensor.dtype in (torch.float32, torch.float64)
    else:
        fits = tensor.shape == parameter.shape and tensor.dtype == parameter.dtype
    if (
        not fits
        or type(tensor) is not Tensor
        or tensor.layout != torch.strided
        or tensor.device != parameter.device
        or not tensor.is_contiguous()
        or tensor.requires_grad
        or tensor.is_inference()
    ):
        raise Ordinary(f"{key} in the optimizer's state is not a plain tensor like its parameter")
