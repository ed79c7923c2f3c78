"""A chain of Linear layers notices whatever changed in its modules since the last call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mlp_fixtures import norm_layers, ready
from prepared_fixtures import runs  # noqa: F401
from support.networks import assert_same_step
from torch import nn
from torch.nn.utils import parametrize, prune

from fused_mlp import backends

pytestmark = pytest.mark.skipif(
    backends.active_backend("cpu") != "native", reason="only the CPU library has this op"
)


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def _set(index: int, name: str, value: object) -> Callable[[nn.Sequential], None]:
    return lambda net: setattr(net[index], name, value)


def _swap_places(net: nn.Sequential) -> None:
    """The same children under the same keys, in another order."""
    children = list(net._modules.items())
    children[4], children[7] = children[7], children[4]
    net._modules.clear()
    net._modules.update(children)


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "child replaced": lambda net: net.__setitem__(0, nn.Linear(10, 16, bias=False)),
    "activation replaced": lambda net: net.__setitem__(1, nn.SiLU()),
    "activation replaced by none": lambda net: net.__setitem__(1, nn.Identity()),
    "children in another order": _swap_places,
    "slope": _set(4, "negative_slope", 0.7),
    "slope below 0": _set(4, "negative_slope", -0.7),
    "approximation": _set(7, "approximate", "tanh"),
    "bias removed": _set(0, "bias", None),
    "forward hook": lambda net: net[3].register_forward_hook(lambda m, a, output: output * 2),
    "backward hook": lambda net: net[3].register_full_backward_hook(
        lambda m, before, after: (before[0] * 2,)
    ),
    "forward overridden": _set(1, "forward", lambda input: input),
    "parametrization": lambda net: parametrize.register_parametrization(
        net[0], "weight", _Doubled()
    ),
    "pruning": lambda net: prune.l1_unstructured(net[0], "weight", 0.5),
    "parameter assigned": lambda net: setattr(
        net[3], "weight", nn.Parameter(torch.linspace(-1, 1, 192).reshape(12, 16))
    ),
    "values": lambda net: net[0].weight.data.mul_(1.5),
    "frozen": lambda net: net[0].requires_grad_(False),
    "all frozen": lambda net: net.requires_grad_(False),
    "shorter": lambda net: net.__delitem__(8),
    "single precision everywhere": lambda net: net.float(),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_to_the_modules_takes_effect_at_the_next_call(runs, change, training):
    eager, fused = ready(training, runs)
    for net in (eager, fused):
        torch.manual_seed(0)
        change(net)
    for _ in range(3):
        assert_same_step(eager, fused, torch.randn(6, 10, requires_grad=True))


NORM_CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "mode of one batch norm": lambda net: net[1].train(not net[1].training),
    "mode of the other": lambda net: net[7].train(not net[7].training),
    "eps": _set(1, "eps", 0.5),
    "momentum": _set(1, "momentum", 0.9),
    "no momentum": _set(7, "momentum", None),
    "statistics not tracked": _set(7, "track_running_stats", False),
    "no statistics": lambda net: net.__setitem__(7, nn.BatchNorm1d(9, track_running_stats=False)),
    "buffer assigned": _set(1, "running_mean", torch.full((16,), 0.25)),
    "values of a buffer": lambda net: net[1].running_var.mul_(3),
    "weight and bias": lambda net: net[1].weight.data.mul_(-2) + net[1].bias.data.add_(1),
    "frozen": lambda net: net[1].requires_grad_(False),
    "activation replaced": lambda net: net.__setitem__(2, nn.LeakyReLU(0.3)),
    "activation that is not fused": lambda net: net.__setitem__(2, nn.GELU()),
    "hook": lambda net: net[1].register_forward_hook(lambda m, a, output: output * 2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", NORM_CHANGES.values(), ids=NORM_CHANGES)
def test_change_to_batch_norms_takes_effect_at_the_next_call(runs, change, training):
    eager, fused = ready(training, runs, make=norm_layers)
    for net in (eager, fused):
        change(net)
    for _ in range(3):
        assert_same_step(eager, fused, torch.randn(6, 10, requires_grad=True))
    with torch.no_grad():
        for _ in range(3):
            assert_same_step(eager, fused, torch.randn(6, 10))
