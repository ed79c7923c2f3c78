"""The one network or chain of Linear layers that is all a module computes, if it is."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from torch import nn

from ..modules import FusedResearchNet, FusedSequential, snapshot
from ..modules.groups import make_whole
from ..modules.hooks import runs_as_written
from ..modules.patterns import find_runs
from ..modules.snapshot import Snapshot
from .errors import Ordinary

_CONTAINERS = (FusedResearchNet, FusedSequential, nn.Sequential)


class Network:
    """Layers that run in one op, reached through modules that only call them.

    Args:
        module: a :class:`FusedResearchNet`, a :class:`FusedSequential` that is one ``research_net``
            or one ``mlp``, or a module around one of these that does nothing else: an
            ``nn.Sequential`` of one child, or a ``forward`` of ``return self.layers(data)``.

    Attributes:
        children: the layers by name, as their container holds them.
        group: what reads them.

    Raises:
        Ordinary: for every other module.
    """

    __slots__ = ("_forwards", "_links", "_owners", "children", "group")

    def __init__(self, module: nn.Module) -> None:
        self._owners = [module]
        self._links: list[tuple[dict[str, Any], tuple[str]]] = []
        while type(module) is not FusedSequential or len(module._modules) == 1:
            name = _only_child(module)
            child = module._modules[name]
            if child is None:
                raise Ordinary(f"{type(module).__name__} has no {name}")
            self._links.append((module._modules, (name,)))
            module = child
            self._owners.append(module)
        # Patched on its class, a forward of the user's may do anything.
        kinds: list[Any] = [type(owner) for owner in self._owners]
        self._forwards = [(k, k.forward) for k in kinds if k not in _CONTAINERS]
        self.children: dict[str, Any] = module._modules
        layers = [*self.children.values()]
        runs = [] if None in layers else find_runs(layers)
        group = make_whole(runs[0]) if len(runs) == 1 else None
        if group is None:
            raise Ordinary("the layers are not those of one research_net or mlp")
        self.group = group
        if group.may_share():
            raise Ordinary("a batch norm may share its statistics with other processes")
        if not runs_as_written(m.__dict__ for m in (*self._owners, *layers)):
            raise Ordinary("a hook is registered on a module, or its forward was replaced")

    def snapshot(self) -> Snapshot:
        """Return everything that a call depends on, as the modules hold it now."""
        layers = snapshot.take(self.children.values(), self.group.entries())
        return snapshot.joined(layers, snapshot.take(self._owners, self._links))

    def holds(self) -> bool:
        """Return whether what a snapshot does not see is as it was."""
        return all(kind.forward is forward for kind, forward in self._forwards)


def _only_child(module: nn.Module) -> str:
    """Return the name of the child whose output is the module's, and that it only calls."""
    kind = type(module)
    if kind is FusedResearchNet:
        return "research_layers"
    if kind in (nn.Sequential, FusedSequential) and len(module._modules) == 1:
        return next(iter(module._modules))
    name = _passes_on(kind)
    if (
        name in module._modules
        and name not in module.__dict__
        and not hasattr(kind, name)
        and kind.__call__ is nn.Module.__call__
        and kind.__getattr__ is nn.Module.__getattr__
    ):
        return name
    raise Ordinary(f"{kind.__name__} is not one research_net or mlp and nothing else")


def _passes_on(kind: Any) -> str:
    """Return the name of the child when ``forward`` is ``return self.child(data)``; else ""."""
    code = kind.forward.__code__ if type(kind.forward) is FunctionType else None
    for pattern in (_returned.__code__, _named.__code__):
        if (
            code is not None
            and code.co_code == pattern.co_code
            and code.co_argcount == 2
            and code.co_flags & ~_DOCSTRING == pattern.co_flags & ~_DOCSTRING
        ):
            return str(code.co_names[0])
    return ""


# A forward that computes the same has the same bytecode: names stand in it as numbers.
def _returned(self, data):  # type: ignore[no-untyped-def]
    return self.layers(data)


def _named(self, data):  # type: ignore[no-untyped-def]
    output = self.layers(data)
    return output


_DOCSTRING = 0x4000000  # inspect's CO_HAS_DOCSTRING, from Python 3.13 on
