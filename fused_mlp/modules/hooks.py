"""Whether modules may be passed over: what a call of them would run besides their own forward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.nn.modules import module as nn_module

from .norm import SynchronizedForward

_global_forward_hooks = nn_module._global_forward_hooks
_global_forward_pre_hooks = nn_module._global_forward_pre_hooks
_global_backward_hooks = nn_module._global_backward_hooks
_global_backward_pre_hooks = nn_module._global_backward_pre_hooks


def runs_as_written(modules: Iterable[dict[str, Any]]) -> bool:
    """Return whether calling the modules would run their class's forward and nothing else."""
    if (
        _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    ):
        return False
    for module in modules:
        if (
            module["_forward_hooks"]
            or module["_forward_pre_hooks"]
            or module["_backward_hooks"]
            or module["_backward_pre_hooks"]
            or ("forward" in module and type(module["forward"]) is not SynchronizedForward)
            or "_compiled_call_impl" in module
        ):
            return False
    return True
