"""What modules held at a call, and whether they still hold it at the next.

Modules are plain Python objects that anything may change at any time: children are replaced, hooks
added, options set. A snapshot keeps what was read from them, by identity, so that a later call need
only ask whether all of it is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as nn_module

_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What `module.forward = …` and `module.compile()` leave in a module's dictionary.
_OVERRIDES = ("forward", "_compiled_call_impl")

# The modules in order; then flat tuples of (object, its class), (dict, key, value),
# (dict, absent key), (empty dict) and (dict, key of an empty dict); then the keys that must be
# absent from a container, and those of empty dictionaries in it.
Snapshot = tuple[tuple[Any, ...], ...]
_LISTS = 6  # the entries before the keys
Unchanged = Callable[..., bool]


def take(
    modules: Iterable[nn.Module], read: Iterable[tuple[dict[str, Any], Iterable[str]]]
) -> Snapshot:
    """Return what the modules hold.

    Args:
        modules: all children of a container, in order.
        read: dictionaries and the keys whose values matter. A ``forward`` set on a module must be
            among them; where it is not, none may be set.
    """
    modules, read = tuple(modules), tuple(read)
    dicts = [module.__dict__ for module in modules]
    return (
        modules,
        tuple(x for module in modules for x in (module, type(module))),
        tuple(x for entry, keys in read for key in keys for x in (entry, key, entry[key])),
        tuple(
            x
            for entry in dicts
            for key in _OVERRIDES
            if not any(entry is seen and key in keys for seen, keys in read)
            for x in (entry, key)
        ),
        _GLOBAL_HOOKS,
        tuple(x for entry in dicts for key in _HOOKS for x in (entry, key)),
        _OVERRIDES,
        _HOOKS,
    )


def joined(first: Snapshot, *others: Snapshot) -> Snapshot:
    """Return what all of the snapshots hold; the container is the first one's."""
    children, *parts = first[:_LISTS]
    for other in others:
        parts = [part + more for part, more in zip(parts, other[1:_LISTS], strict=True)]
    return (children, *parts, *first[_LISTS:])


def watch(snapshot: Snapshot) -> Unchanged:
    """Return the function that tells whether everything is still as it was.

    It takes the container's ``_modules`` and the ``__dict__`` of every container whose own hooks
    must not be passed over. The CPU library has the same function, ten times as fast; its result
    borrows the snapshot, which must be kept beside it.
    """
    children, classes, values, absent, empty, empty_values, overrides, hooks = snapshot

    def unchanged(modules: Mapping[Any, Any], *containers: Mapping[str, Any]) -> bool:
        return (
            len(modules) == len(children)
            and all(a is b for a, b in zip(modules.values(), children, strict=True))
            and all(type(a) is b for a, b in _groups(classes, 2))
            and all(d.get(key, d) is value for d, key, value in _groups(values, 3))
            and all(key not in d for d, key in _groups(absent, 2))
            and not any(empty)
            and all(d.get(key) == {} for d, key in _groups(empty_values, 2))
            and all(key not in d for d in containers for key in overrides)
            and all(d.get(key) == {} for d in containers for key in hooks)
        )

    return unchanged


def _groups(flat: tuple[Any, ...], size: int) -> Any:
    iterator = iter(flat)
    return zip(*[iterator] * size, strict=True)
