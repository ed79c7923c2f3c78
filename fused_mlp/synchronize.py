"""``synchronize_batch_norm``: batch statistics of all processes of a group, in any model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .modules import BatchNormLeakyReLU
from .modules.norm import SynchronizedForward

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def synchronize_batch_norm(
    model: nn.Module, process_group: ProcessGroup | None = None
) -> nn.Module:
    """Make every batch norm in ``model`` share its training statistics over a group, in place.

    Forward normalizes with mean and variance of the rows of all processes, backward sums over all
    of them, and the running statistics are the same everywhere: one all-reduce a direction. The
    modules keep their class, ``nn.BatchNorm1d``, so DistributedDataParallel takes them on the CPU
    as well, where it refuses ``nn.SyncBatchNorm``. Processes may have different numbers of rows,
    or none. Evaluation, and training in a single process, stays as it is.

    All processes must call forward, and backward, equally often. Parameters' gradients are those of
    the process's own rows, as DistributedDataParallel expects.

    Args:
        model: any module, fused or not. Its ``nn.BatchNorm1d`` (2d, 3d) and
            :class:`BatchNormLeakyReLU` modules are synchronized.
        process_group: the processes; None for all of them, looked up when a batch norm runs.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: when ``model`` is not a module, ``process_group`` is not a group that this
            process belongs to, or a batch norm has a ``forward`` of its own.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    if process_group is not None and not isinstance(process_group, distributed.ProcessGroup):
        # torch.distributed.new_group gives a number to processes outside the new group.
        raise TypeError(
            "process_group must be None or a torch.distributed.ProcessGroup that this process "
            f"belongs to, but got {process_group!r}"
        )
    norms = [(path, module) for path, module in model.named_modules() if _is_norm(module)]
    for path, module in norms:
        if not _runs_as_its_class(module):
            raise TypeError(
                f"{path or 'model'} ({type(module).__name__}) has a forward of its own, which "
                "cannot be synchronized"
            )
    for _, module in norms:
        module.forward = SynchronizedForward(module, process_group)
    return model


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm | BatchNormLeakyReLU) and not isinstance(
        module, nn.SyncBatchNorm
    )


def _runs_as_its_class(module: Any) -> bool:
    forward = module.__dict__.get("forward")
    return (forward is None or type(forward) is SynchronizedForward) and type(module).forward in (
        _BatchNorm.forward,
        BatchNormLeakyReLU.forward,
    )
