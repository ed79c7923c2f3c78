"""What the tests of torch.compile share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """A graph compiled over one backend, from torch's caches too, does not fit the other."""
    torch.compiler.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


class Compiled(nn.Module):
    """A network that runs compiled under its own parameter names."""

    def __init__(self, net: Any, **options: Any) -> None:
        super().__init__()
        self.call = torch.compile(net, fullgraph=True, **options)
        self.named_parameters = net.named_parameters
        self.named_buffers = net.named_buffers

    def forward(self, input: Tensor) -> Any:
        return self.call(input)


def kernels_of(net: Any, input: Tensor) -> list[str]:
    """Return the raw kernels that a call runs, compiled or not."""
    with torch.profiler.profile() as profile:
        net(input)
    return [
        event.name.removeprefix("fused_mlp_kernels::")
        for event in profile.events()
        if event.name.startswith("fused_mlp_kernels::")
    ]


def save_nothing(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def save_matrix_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_product = op == torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.MUST_RECOMPUTE


# By name: a config of AOTAutograd's partitioner that computes again in backward to save memory.
SAVING_MEMORY: list[dict[str, Any]] = [
    {"activation_memory_budget": 0.0},
    {"activation_memory_budget": 0.3},
    {"aggressive_recomputation": True},
    {"ban_recompute_not_in_allowlist": False},
]
