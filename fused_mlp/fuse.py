"""``fuse`` and ``unfuse``: turn the containers of any model into fused ones and back, in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from .modules import BatchNormLeakyReLU, FusedSequential, LinearReLU
from .modules.hooks import runs_as_written
from .modules.patterns import (
    AFTER_BATCH_NORM,
    AFTER_LINEAR,
    LINEAR_BATCH_NORM_ACT,
    MLP,
    PLAIN,
    Run,
    find_runs,
)

_ROOT = "(model)"
_OWN = (LinearReLU, BatchNormLeakyReLU)


@dataclass(frozen=True)
class FuseEntry:
    """One run of layers: where it stands, what it is, and the op or why there is none.

    Attributes:
        path: dotted name of the module; ``first-last`` at its end for a run of children.
        pattern: the classes of the layers.
        reason: the op that computes a fused run; why a run was left.
    """

    path: str
    pattern: str
    reason: str


@dataclass(frozen=True)
class FuseReport:
    """What :func:`fuse` fused and what it left; ``print(report)`` shows it as a table."""

    fused: list[FuseEntry] = field(default_factory=list)
    left: list[FuseEntry] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("", "path", "layers", "op, or why not")]
        rows += [("fused", e.path, e.pattern, e.reason) for e in self.fused]
        rows += [("left", e.path, e.pattern, e.reason) for e in self.left]
        if len(rows) == 1:
            return "nothing to fuse: the model has no Linear or BatchNorm1d layer"
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        return "\n".join(lines)


def fuse(model: nn.Module) -> FuseReport:
    """Fuse every run of layers in ``model`` that an op computes, in place.

    Each ``nn.Sequential`` that holds such a run becomes a :class:`FusedSequential`: the same
    object with another class. So parents, hooks, training flags, ``state_dict`` keys and the
    parameters an optimizer holds stay as they are. Fusing twice changes nothing.

    Args:
        model: any module; it may be an ``nn.Sequential`` itself.

    Returns:
        A report of the runs that are fused (now or before) and of the ``Linear`` and
        ``BatchNorm1d`` layers that are not, with the reason.

    Raises:
        TypeError: when ``model`` is not a module.
    """
    report = FuseReport()
    for path, module in _walk(model):
        if _is_plain(module) and any(len(run.modules) > 1 for run in find_runs(_children(module))):
            module.__class__ = FusedSequential
        _report(report, path, module)
    return report


def unfuse(model: nn.Module) -> nn.Module:
    """Give every :class:`FusedSequential` in ``model`` its plain class back, in place.

    Args:
        model: any module; parameters, hooks and ``state_dict`` keys stay as they are.
            :class:`LinearReLU` and :class:`BatchNormLeakyReLU` modules stay, having no plain class.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: when ``model`` is not a module.
    """
    for _, module in _walk(model):
        if type(module) is FusedSequential:
            module.__dict__.pop("_cache", None)
            module.__class__ = nn.Sequential  # type: ignore[assignment]
    return model


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    return iter(list(model.named_modules()))


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and "forward" not in module.__dict__


def _children(module: nn.Module) -> list[nn.Module]:
    # Not module.children(), which names a module that stands twice only once.
    return [child for child in module._modules.values() if child is not None]


def _report(report: FuseReport, path: str, module: nn.Module) -> None:
    """Enter the runs among the children of one module."""
    if isinstance(module, FusedSequential) and type(module).forward is FusedSequential.forward:
        _report_runs(report, path, module)
        return
    layers = [child for child in _children(module) if _is_layer(child)]
    if isinstance(module, _OWN):
        op = "linear_relu" if isinstance(module, LinearReLU) else "batch_norm_leaky_relu"
        report.fused.append(FuseEntry(path or _ROOT, _name(module), op))
    if not layers:
        return
    if _is_plain(module):
        _report_runs(report, path, module)
        return
    if type(module) is nn.Sequential:
        reason = "its forward was replaced"
    elif isinstance(module, nn.Sequential):
        reason = f"{_name(module)} is a subclass of Sequential; a plain Sequential would be fused"
    elif isinstance(module, nn.ModuleList | nn.ModuleDict):
        reason = f"a {_name(module)} has no forward; put the layers in a Sequential"
    else:
        reason = f"called from {_name(module)}.forward; put the layers in a Sequential"
    report.left.append(FuseEntry(path or _ROOT, _pattern(layers), reason))


def _report_runs(report: FuseReport, path: str, container: nn.Module) -> None:
    names = list(container._modules)
    children = _children(container)
    start = 0
    for run in find_runs(children):
        _report_run(report, path, run, names[start:], children[start:])
        start += len(run.modules)


def _report_run(
    report: FuseReport, path: str, run: Run, names: list[str], children: list[nn.Module]
) -> None:
    """Enter a run that begins with the first of these children."""
    length = len(run.modules)
    if run.op == PLAIN:
        if _is_layer(run.modules[0]):
            reason = _why_alone(run.modules[0], children[1:2])
            report.left.append(FuseEntry(_join(path, names[0]), _name(run.modules[0]), reason))
        return
    if length == 1:  # a layer of our own, which reports itself
        return
    reason = _why_as_written(names[:length], run.modules)
    if reason and run.op == MLP:  # its parts may still run fused
        start = 0
        for part in run.parts:
            _report_run(report, path, part, names[start:], children[start:])
            start += len(part.modules)
        return
    where = _join(path, f"{names[0]}-{names[length - 1]}")
    entry = FuseEntry(where, _run_pattern(run), reason or _ops(run))
    (report.left if reason else report.fused).append(entry)


def _ops(run: Run) -> str:
    if run.op == LINEAR_BATCH_NORM_ACT:
        return f"{run.parts[1].op}; {run.op} in evaluation"
    if run.op == MLP:
        return "mlp on the CPU, an op a layer elsewhere"
    return run.op


def _why_alone(layer: nn.Module, following: list[nn.Module]) -> str:
    """Return why a layer does not begin a run."""
    if is_parametrized(layer):
        return f"parametrized: {', '.join(layer.parametrizations)}"  # type: ignore[arg-type]
    if isinstance(layer, LazyModuleMixin):
        return "lazy: its class is settled by its first input"
    if type(layer) not in (nn.Linear, nn.BatchNorm1d, nn.SyncBatchNorm):
        return f"only Linear and BatchNorm1d themselves are fused, not {_name(layer)}"
    if not following:
        return "nothing after it to fuse with"
    linear = type(layer) is nn.Linear
    kinds = (*AFTER_LINEAR, nn.BatchNorm1d) if linear else AFTER_BATCH_NORM
    wanted = ", ".join(kind.__name__ for kind in kinds)
    return f"followed by {_name(following[0])}, not {wanted} or Dropout"


def _why_as_written(names: list[str], modules: tuple[nn.Module, ...]) -> str:
    """Return why a run of the right classes does not run fused now; "" when it does."""
    if not runs_as_written([]):
        return "a global module hook is registered"
    for name, module in zip(names, modules, strict=True):
        if not runs_as_written([module.__dict__]):
            return f"{name} has a hook or a forward of its own; fused when that is gone"
        if isinstance(module, nn.Linear) and "weight" not in module._parameters:
            return f"the weight of {name} is computed by a hook"
    return ""


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | _BatchNorm) and not isinstance(
        module, nn.BatchNorm2d | nn.BatchNorm3d
    )


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _pattern(modules: Any) -> str:
    return "+".join(_name(module) for module in modules)


def _run_pattern(run: Run) -> str:
    if not run.parts or run.op == LINEAR_BATCH_NORM_ACT:
        return _pattern(run.modules)
    if run.op == MLP:
        return ", ".join(map(_run_pattern, run.parts))
    *hidden, before_norm, norm, last = [part.modules for part in run.parts]
    return ", ".join(map(_pattern, (*hidden, before_norm + norm, last)))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
