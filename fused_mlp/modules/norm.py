"""What a batch norm would compute now, and with which processes it shares its statistics.

A synchronized ``nn.BatchNorm1d`` keeps its class and gets a :class:`SynchronizedForward`, so that
it is synchronized wherever it runs: in a fused run, under hooks, in a plain ``nn.Sequential``. An
``nn.SyncBatchNorm`` says by its class what it is.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from .. import ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What one call of a batch norm uses: weight, bias, running_mean, running_var,
# num_batches_tracked, whether the batch's own statistics count, momentum, eps, and the group of
# processes whose statistics count. A plain tuple: a NamedTuple takes half a microsecond to make.
NormState = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, float, float,
    Any,
]  # fmt: skip

REFUSED = ("cpu",)  # where nn.SyncBatchNorm raises in training


def norm_state(module: dict[str, Any]) -> NormState:
    """Work out from a batch norm's ``__dict__`` what its class's forward would use.

    Raises:
        KeyError: where a parameter is not a plain one, or the class's forward would raise.
    """
    parameters, buffers = module["_parameters"], module["_buffers"]
    running_mean, running_var = buffers["running_mean"], buffers["running_var"]
    num_batches_tracked = group = None
    training = module["training"]
    if not training:
        # Without running statistics evaluation uses those of the batch.
        training = running_mean is None and running_var is None
    else:
        if "forward" in module or "process_group" in module:
            group = _find_group(module)
        if module["track_running_stats"]:
            num_batches_tracked = buffers["num_batches_tracked"]
        else:
            running_mean = running_var = None
    momentum = module["momentum"]
    if momentum is None:
        momentum = 0.0
        if num_batches_tracked is not None:  # a cumulative average; the op counts this batch
            momentum = 1.0 / (float(num_batches_tracked) + 1.0)
    return (
        parameters["weight"], parameters["bias"], running_mean, running_var, num_batches_tracked,
        training, momentum, module["eps"], group,
    )  # fmt: skip


def _find_group(module: dict[str, Any]) -> ProcessGroup | None:
    """Return the group a batch norm shares its statistics with in training; None when alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    forward = module.get("forward")
    if type(forward) is SynchronizedForward:
        group = forward.process_group
    elif "process_group" not in module:
        return None
    else:  # nn.SyncBatchNorm
        group = module["process_group"]
        tensors = (*module["_parameters"].values(), *module["_buffers"].values())
        if all(tensor is None or tensor.device.type in REFUSED for tensor in tensors):
            raise KeyError("nn.SyncBatchNorm does not run there")
    group = group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


class SynchronizedForward:
    """The ``forward`` of one batch norm that shares its statistics in training.

    Evaluation, and training in a group of one process, is what the module's class does.

    Args:
        module: an ``nn.BatchNorm1d`` (2d, 3d), or a :class:`BatchNormLeakyReLU`.
        process_group: the processes; None for all of them at the time of the call.
    """

    def __init__(self, module: Any, process_group: ProcessGroup | None) -> None:
        self.module = module
        self.process_group = process_group
        self._name = None if process_group is None else process_group.group_name

    def __deepcopy__(self, memo: dict[int, Any]) -> SynchronizedForward:
        # The copy of a module stays in the group of processes, which cannot be copied.
        return SynchronizedForward(copy.deepcopy(self.module, memo), self.process_group)

    def __call__(self, input: Tensor) -> Tensor:
        if self.module.training:
            # A cumulative average reads its counter, which no graph does.
            traced = torch.compiler.is_compiling() and self.module.momentum is not None
            return self._trace(input) if traced else self._train(input)
        return type(self.module).forward(self.module, input)

    @torch.compiler.disable
    def _train(self, input: Tensor) -> Tensor:
        module = self.module
        module._check_input_dim(input)
        # By their names, for a parametrization may compute them.
        parameters = {"weight": module.weight, "bias": module.bias}
        weight, bias, running_mean, running_var, tracked, _, momentum, eps, group = norm_state(
            {**module.__dict__, "_parameters": parameters}
        )
        if group is None:
            return type(module).forward(module, input)
        output = ops.over_group.batch_norm_leaky_relu(
            input.flatten(2) if input.dim() > 3 else input,
            running_mean, running_var, weight, bias, momentum, eps,
            getattr(module, "negative_slope", 1.0),  # 1: the batch norm alone
            group, num_batches_tracked=tracked,
        )  # fmt: skip
        return output.reshape(input.shape)

    def _trace(self, input: Tensor) -> Tensor:
        """Train under torch.compile, which names the group in the graph."""
        module = self.module
        name = _group_name(self._name)
        if not name:
            output: Tensor = type(module).forward(module, input)
            return output
        module._check_input_dim(input)
        tracked = module.track_running_stats
        output = torch.ops.fused_mlp.batch_norm_leaky_relu_over_group(
            input.flatten(2) if input.dim() > 3 else input,
            module.running_mean if tracked else None,
            module.running_var if tracked else None,
            module.weight, module.bias, module.momentum, module.eps,
            getattr(module, "negative_slope", 1.0), name,
            num_batches_tracked=module.num_batches_tracked if tracked else None,
        )  # fmt: skip
        return output.reshape(input.shape)


@torch.compiler.assume_constant_result  # asked once a graph, not traced
def _group_name(name: str | None) -> str:
    """Return the name of a group, None's being that of all processes; "" for one process alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return ""
    group: Any = distributed.group.WORLD
    if name is not None:
        group = ops.over_group.group_of(name)
    return str(group.group_name) if distributed.get_world_size(group) > 1 else ""
