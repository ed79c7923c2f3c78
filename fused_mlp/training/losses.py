"""The losses a fused step computes itself, read from the callable a user gives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import snapshot
from ..modules.hooks import runs_as_written
from ..modules.snapshot import Snapshot
from .errors import Ordinary


class Loss(NamedTuple):
    """What the kernels are told."""

    cross_entropy: bool
    reduction: str
    ignore_index: int
    label_smoothing: float
    weight: Tensor | None


_CROSS_ENTROPY = Loss(True, "mean", -100, 0.0, None)
_SQUARED_ERROR = Loss(False, "mean", -100, 0.0, None)


def is_known(loss: Any) -> bool:
    """Return whether the callable is one of torch's losses that kernels compute, without hooks."""
    if type(loss) in (nn.CrossEntropyLoss, nn.MSELoss):
        return runs_as_written((loss.__dict__,))
    return loss is F.cross_entropy or loss is F.mse_loss


def read(loss: Any) -> Loss:
    """Return the loss with its options now.

    Raises:
        Ordinary: where the kernels would not compute the same.
    """
    kind = type(loss)
    if kind is nn.CrossEntropyLoss or kind is nn.MSELoss:
        own = loss.__dict__
        if not runs_as_written((own,)):
            raise Ordinary("the loss has a hook or a forward of its own")
        if kind is nn.MSELoss:
            found = _SQUARED_ERROR._replace(reduction=own["reduction"])
        else:
            found = Loss(
                True,
                own["reduction"],
                own["ignore_index"],
                own["label_smoothing"],
                own["_buffers"]["weight"],
            )
    elif loss is F.cross_entropy:
        found = _CROSS_ENTROPY
    elif loss is F.mse_loss:
        found = _SQUARED_ERROR
    else:
        name = getattr(loss, "__name__", kind.__name__)
        raise Ordinary(f"{name} is not nn.CrossEntropyLoss or nn.MSELoss")
    if found.reduction not in ("mean", "sum"):
        raise Ordinary(f"the loss has reduction={found.reduction!r}")
    if not 0.0 <= found.label_smoothing <= 1.0:
        raise Ordinary("label_smoothing is outside [0, 1]")
    if found.weight is not None and found.weight.requires_grad:
        raise Ordinary("the weight of the loss requires grad")
    return found


def snapshot_of(loss: Any) -> Snapshot:
    """Return what :func:`read` read."""
    if not isinstance(loss, nn.Module):
        return snapshot.take([], [])
    own = loss.__dict__
    entries: list[tuple[dict[str, Any], tuple[str, ...]]] = [(own, ("reduction",))]
    if type(loss) is nn.CrossEntropyLoss:
        entries.append((own, ("ignore_index", "label_smoothing", "_buffers")))
        entries.append((own["_buffers"], ("weight",)))
    return snapshot.take([loss], entries)
