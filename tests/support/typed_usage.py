"""Every public name as a user writes it, for mypy to check; it is never run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fused_mlp
from fused_mlp import (
    BatchNormLeakyReLU,
    FusedResearchNet,
    FusedSequential,
    FuseReport,
    LinearReLU,
    Normalize,
    TrainStep,
    backends,
    functional,
    ops,
)


def modules(x: Tensor) -> Tensor:
    net = FusedResearchNet(10, [64, 32], 5, dropout=0.1, momentum=None, dtype=torch.float32)
    container = FusedSequential(LinearReLU(5, 8, dropout=0.2), BatchNormLeakyReLU(8), nn.Tanh())
    layer: FusedSequential = net.research_layers
    whole: Tensor = Normalize((0, 1), eps=1e-3)(layer(x))
    first: nn.Module = container[0]
    result: Tensor = whole + first(x)
    return result


def fusing(model: nn.Module) -> nn.Module:
    report: FuseReport = fused_mlp.fuse(model)
    paths: list[str] = [entry.path + entry.reason for entry in report.fused + report.left]
    print(report, paths, fused_mlp.__version__)
    fused_mlp.synchronize_batch_norm(model, process_group=None)
    return fused_mlp.unfuse(model)


def training(net: FusedResearchNet, x: Tensor, target: Tensor) -> str | None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    step = TrainStep(net, nn.CrossEntropyLoss(), optimizer, max_norm=1.0, set_to_none=False)
    loss: Tensor = step(x, target)
    print(loss)
    return step.ordinary_because


def functions(x: Tensor, weight: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
    y: Tensor = functional.normalize(x, dim=0, correction=0)
    y = functional.linear_relu(y, weight, None, dropout_p=0.3, training=True)
    y = functional.batch_norm_leaky_relu(y, *statistics, training=True)
    y = functional.research_net(y, [weight], [x], None, None, None, None, True)
    return ops.linear_relu(y, weight) + ops.normalize(y, [0])


def tools(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    with fused_mlp.use_backend("reference"):
        names: list[str] = [state.name for state in backends.status() if state.available]
    print(names)
    return fused_mlp.decompose(program)
