"""Whether a set of tensors may go to a kernel, remembered so that the next call asks in 1 µs.

A kernel wants plain dense tensors of matching shape, dtype and device; everything else belongs
to the plain modules, or to the op's own checks, which compute or raise what eager PyTorch does.
Parameters are read anew at every call, since ``.data``, ``.to()``, ``resize_`` and
``load_state_dict(assign=True)`` change them under the same module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import _common
from ._common import use_formula

_TensorGuards: Any = None
try:
    # The check behind torch.compile's guards: one C++ call compares the type, dtype, device,
    # sizes, requires_grad and dispatch keys of all tensors. The keys take in the thread's state,
    # so autocast, torch.func transforms and torch.jit.trace fail the check by themselves.
    from torch._C._dynamo import guards as _guards

    _TensorGuards = _guards.TensorGuards
except (ImportError, AttributeError):  # a private name; without it the checks run in Python
    pass

Check = Callable[..., bool]
_MAX_VARIANTS = 8
_PLAIN = (Tensor, Parameter)


class Variant:
    """One admitted combination of tensors: the check that recognises it, and what goes with it."""

    __slots__ = ("check", "fits")

    def __init__(self, check: Check) -> None:
        self.check = check
        # The backend asked last whether it has a kernel for this, and its answer.
        self.fits: tuple[str, bool] = ("", False)


class Fit:
    """Remembers which combinations of tensors an op has admitted.

    Args:
        feature_dim: the dimension of the input whose size the parameters fix; the others may
            change from call to call. Where it is None, all sizes of all tensors may.
    """

    __slots__ = ("_feature_dim", "_variants")

    def __init__(self, feature_dim: int | None) -> None:
        self._feature_dim = feature_dim
        self._variants: tuple[Variant, ...] = ()

    def find(self, *tensors: Any) -> Variant | None:
        """Return the variant the tensors belong to, or None where they were not seen before.

        Args:
            tensors: the input first, then parameters and buffers; None where there is none.
                Always as many of them for one ``Fit``.
        """
        if is_nested(tensors[0]):
            return None
        for variant in self._variants:
            if variant.check(*tensors):
                return variant
        return None

    def recognise(self, *tensors: Any) -> Variant | None:
        """Return as :meth:`find`, for a functional call; None where the formula is to run."""
        if forward_ad._current_level >= 0 or _common._formula_alone:
            return None
        for tensor in tensors[1:]:
            if is_nested(tensor):
                return None
        return self.find(*tensors)

    def remember(self, *tensors: Tensor | None) -> None:
        """Admit tensors that an op has checked, as long as there is room.

        Forgetting one kind for another could go on at every call, at 50 us each.
        """
        if len(self._variants) < _MAX_VARIANTS:
            self.admit(tensors, lambda: None)

    def admit(
        self, tensors: Sequence[Any], validate: Callable[..., None], *arguments: Any
    ) -> Variant | None:
        """Return a new variant for the tensors, or None where a kernel cannot take them.

        Args:
            tensors: as :meth:`find` takes them.
            validate: the op's own check, which raises for arguments that do not fit together.
            arguments: what ``validate`` takes.
        """
        if tensors[0] is None or not all(t is None or type(t) in _PLAIN for t in tensors):
            return None
        try:
            if use_formula(tensors[0]) or torch._C._get_tracing_state():
                return None
            validate(*arguments)
        except (TypeError, ValueError, RuntimeError):
            return None
        variant = Variant(make_check(tensors, self._feature_dim))
        # Assigned whole: another thread sees the old tuple or the new one.
        self._variants = (variant, *self._variants[: _MAX_VARIANTS - 1])
        return variant


def is_nested(tensor: Any) -> bool:
    """Return whether this is a nested tensor, at which torch's own check ends the process."""
    return type(tensor) in _PLAIN and tensor.is_nested


def make_check(tensors: Sequence[Tensor | None], feature_dim: int | None) -> Check:
    """Return what recognises these tensors, or such that differ in the input's free sizes alone.

    Args:
        tensors: the input first. What is checked later must not be nested.
        feature_dim: the dimension of the input whose size is fixed, if any is.
    """
    sizes: list[Any] = [list(t.shape) for t in tensors if t is not None]
    if feature_dim is None:
        sizes = [[None] * len(s) for s in sizes]
    else:
        feature_dim %= len(sizes[0])
        free_sizes = [None] * len(sizes[0])
        free_sizes[feature_dim] = sizes[0][feature_dim]
        sizes[0] = free_sizes
    present = [t is not None for t in tensors]
    given = [t for t in tensors if t is not None]
    if _TensorGuards is None:
        check = _python_check(given, sizes)
    else:
        strides = [[None] * len(s) for s in sizes]
        guards = _TensorGuards(*given, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        check = guards.check
    if all(present):
        return check

    def check_with_gaps(*tensors: Tensor | None) -> bool:
        if [t is not None for t in tensors] != present:
            return False
        return bool(check(*(t for t in tensors if t is not None)))

    return check_with_gaps


def _python_check(tensors: Sequence[Tensor], sizes: Sequence[Sequence[int | None]]) -> Check:
    """Return the check where torch does not offer its own; several times slower."""
    expected = [
        (type(t), t.dtype, t.device, t.layout, list(s)) for t, s in zip(tensors, sizes, strict=True)
    ]

    def check(*tensors: Any) -> bool:
        if len(tensors) != len(expected):
            return False
        for tensor, (kind, dtype, device, layout, size) in zip(tensors, expected, strict=True):
            if type(tensor) is not kind:
                return False
            if (tensor.dtype, tensor.device, tensor.layout) != (dtype, device, layout):
                return False
            if tensor.dim() != len(size):
                return False
            if any(s is not None and s != n for s, n in zip(size, tensor.shape, strict=True)):
                return False
        return not use_formula(tensors[0]) and not torch._C._get_tracing_state()

    return check
