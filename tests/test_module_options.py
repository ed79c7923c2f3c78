"""Options of a fused network's children take effect, and what cannot be fused runs unfused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.networks import assert_same_step, kernels_run, network_layers, networks, pair
from torch import nn
from torch.nn.utils import prune

from fused_mlp import (
    BatchNormLeakyReLU,
    FusedSequential,
    LinearReLU,
)

pytestmark = pytest.mark.usefixtures("target")


def _set(index, name, value):
    def change(net):
        setattr(net[index], name, value)

    change.__name__ = f"{name}={value}"
    return change


def _freeze(net):
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)


def _freeze_norm(net):
    net[4].requires_grad_(False)


def _norm_in_eval(net):
    net[4].eval()


def _no_statistics(net):
    net[4] = nn.BatchNorm1d(32, track_running_stats=False)


def _no_affine(net):
    net[4] = nn.BatchNorm1d(32, affine=False)


def _no_norm_bias(net):
    net[4] = nn.BatchNorm1d(32, bias=False)


def _no_linear_bias(net):
    net[3] = nn.Linear(64, 32, bias=False)


def _inplace(net):
    net[1].inplace = net[5].inplace = True


def _wider(net):
    net[3] = nn.Linear(64, 16)
    net[4] = nn.BatchNorm1d(16)
    net[6] = nn.Linear(16, 3)


CHANGES = [
    _set(4, "momentum", None),
    _set(4, "momentum", 0.7),
    _set(4, "eps", 0.1),
    _set(4, "track_running_stats", False),
    _set(5, "negative_slope", 0.3),
    _freeze,
    _freeze_norm,
    _norm_in_eval,
    _no_statistics,
    _no_affine,
    _no_norm_bias,
    _no_linear_bias,
    _inplace,
    _wider,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_option_of_a_child_takes_effect_at_the_next_call(device, change):
    eager, fused = pair(network_layers(device=device))
    x = torch.randn(16, 10, device=device)
    assert_same_step(eager, fused, x)
    for net in (eager, fused):
        net.zero_grad()
        torch.manual_seed(1)
        change(net)
        net.to(device)
    for _ in range(3):
        assert_same_step(eager, fused, x)
    torch.testing.assert_close(fused.eval()(x), eager.eval()(x), rtol=1e-4, atol=1e-5)
    assert kernels_run(fused, x)


def test_changed_dropout_probability_takes_effect_at_the_next_call(device):
    layers = [nn.Linear(10, 64), nn.ReLU(), nn.Dropout(0.0), nn.Linear(64, 5)]
    eager, fused = pair([layer.to(device) for layer in layers])
    x = torch.randn(16, 10, device=device)
    assert_same_step(eager, fused, x)
    fused[2].p = eager[2].p = 1.0
    assert_same_step(eager, fused, x)
    fused[2].p = 1.5
    with pytest.raises(ValueError, match=r"dropout probability has to be between 0 and 1"):
        fused(x)


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_half_of_the_statistics_raises_as_eager_does(device, missing):
    eager, fused = pair(network_layers(device=device))
    for net in (eager, fused):
        setattr(net.eval()[4], missing, None)
    x = torch.randn(4, 10, device=device)
    with pytest.raises(Exception) as expected:
        eager(x)
    with pytest.raises(expected.type) as raised:
        fused(x)
    assert str(raised.value) == str(expected.value)


def test_children_can_be_replaced_appended_inserted_and_removed(device):
    eager, fused = pair(network_layers(device=device))
    x = torch.randn(16, 10, device=device)
    fused(x)
    eager(x)

    def edit(step):
        for net in (eager, fused):
            torch.manual_seed(2)
            step(net)
            net.to(device)
            net.zero_grad()
        assert_same_step(eager, fused, x)

    edit(lambda net: net.append(nn.Linear(5, 7)))
    edit(lambda net: net.insert(3, nn.Identity()))
    edit(lambda net: net.extend([nn.ReLU(), nn.Linear(7, 2)]))
    edit(lambda net: net.pop(3))
    edit(lambda net: net.__delitem__(slice(-2, None)))
    edit(lambda net: setattr(net, "6", nn.Linear(32, 5, bias=False)))
    edit(lambda net: net.__setitem__(0, nn.Linear(10, 64, bias=False)))
    assert type(fused[0:3]) is FusedSequential


def test_forward_hooks_on_a_child_run_and_come_off_again(device):
    _, fused = pair(network_layers(device=device))
    x = torch.randn(16, 10, device=device)
    assert kernels_run(fused, x) == ["research_net"]
    seen = []
    handles = [
        fused[1].register_forward_hook(lambda module, args, output: seen.append(output)),
        fused[1].register_forward_pre_hook(lambda module, args: seen.append(args[0])),
    ]
    assert kernels_run(fused, x) == ["batch_norm_leaky_relu"]
    assert torch.equal(seen[0].relu(), seen[1])
    for handle in handles:
        handle.remove()
    assert kernels_run(fused, x) == ["research_net"]
    fused[1]._forward_hooks = type(fused[1]._forward_hooks)()
    fused[1].register_forward_hook(lambda module, args, output: output * 0)
    assert "research_net" not in kernels_run(fused, x)


def test_backward_hooks_on_a_child_run(device):
    _, fused = pair(network_layers(device=device))
    seen = []
    fused(torch.randn(16, 10, device=device))
    fused[4].register_full_backward_hook(lambda module, gi, go: seen.append("backward"))
    fused[4].register_full_backward_pre_hook(lambda module, go: seen.append("before"))
    fused(torch.randn(16, 10, device=device)).sum().backward()
    assert seen == ["before", "backward"]


def test_global_module_hooks_see_every_child(device):
    _, fused = pair(network_layers(device=device))
    seen = []
    fused(torch.randn(16, 10, device=device))
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(type(module))
    )
    try:
        fused(torch.randn(16, 10, device=device))
    finally:
        handle.remove()
    assert seen == [*map(type, fused), FusedSequential]


def test_hooks_on_the_containers_of_the_network_run(device):
    _, fused = networks(device)
    seen = []
    fused(torch.randn(16, 10, device=device))
    fused.register_forward_hook(lambda module, args, output: seen.append("net"))
    fused.research_layers.register_forward_hook(lambda module, args, output: seen.append("layers"))
    fused(torch.randn(16, 10, device=device))
    assert seen == ["layers", "net"]


def test_replaced_forward_of_a_child_runs(device):
    _, fused = pair(network_layers(device=device))
    fused(torch.randn(16, 10, device=device))
    fused[6].forward = lambda input: input * 0
    assert fused(torch.randn(16, 10, device=device)).shape == (16, 32)


@pytest.mark.parametrize("index", [0, 3, 6])
@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        lambda m: prune.random_unstructured(m, "weight", amount=0.5),
        lambda m: prune.identity(m, "bias"),
    ],
    ids=["weight_norm", "orthogonal", "prune", "prune-bias"],
)
def test_parametrized_and_pruned_layers_agree_with_eager(device, wrap, index):
    eager, fused = pair(network_layers(device=device))
    x = torch.randn(16, 10, device=device)
    assert_same_step(eager, fused, x)
    for net in (eager, fused):
        net.zero_grad()
        torch.manual_seed(3)
        wrap(net[index])
    assert_same_step(eager, fused, x)
    with torch.no_grad():  # the parameter behind the weight changes
        for net in (eager, fused):
            for parameter in net[index].parameters():
                parameter.mul_(1.5)
    assert_same_step(eager, fused, x, rtol=1e-4, atol=1e-4)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [Doubled(6, 8), nn.ReLU()],
        lambda: [nn.Linear(6, 8), nn.ReLU6(), nn.Linear(8, 2)],
        lambda: [nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.0)],
        lambda: [nn.Identity(), nn.Linear(6, 8), nn.ReLU(), nn.Identity(), nn.Dropout(0.0)],
        lambda: [nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.LeakyReLU(0.2)],
        lambda: [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)],
        lambda: [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.0)],
        lambda: [*network_layers((6, 8, 7, 4)), nn.ReLU(), *network_layers((4, 3, 2))],
        lambda: [
            LinearReLU(6, 8, dropout=0.0),
            nn.Linear(8, 7),
            BatchNormLeakyReLU(7, negative_slope=0.2),
            nn.Linear(7, 3),
        ],
        lambda: [nn.Sequential(nn.Linear(6, 4), nn.ReLU()), nn.Softmax(-1)],
        list,
    ],
    ids=lambda layers: "+".join(type(m).__name__ for m in layers())[:60] or "empty",
)
def test_any_mixture_of_layers_agrees_with_eager(device, layers):
    eager, fused = pair([module.to(device) for module in layers()])
    for training in (True, False):
        for net in (eager, fused):
            net.train(training).zero_grad()
        assert_same_step(eager, fused, torch.randn(9, 6, device=device, requires_grad=True))


def test_own_layers_make_one_network(device):
    fused = FusedSequential(
        LinearReLU(6, 8, dropout=0.5), nn.Linear(8, 7), BatchNormLeakyReLU(7), nn.Linear(7, 3)
    ).to(device)
    assert kernels_run(fused, torch.randn(9, 6, device=device)) == ["research_net"]


def test_lazy_layer_is_fused_once_it_is_a_linear(device):
    fused = FusedSequential(nn.LazyLinear(8), nn.ReLU()).to(device)
    x = torch.randn(4, 6, device=device)
    assert fused(x).shape == (4, 8)
    assert kernels_run(fused, x) == ["linear_relu"]


def test_sync_batch_norm_stays_itself(device):
    fused = FusedSequential(nn.BatchNorm1d(4), nn.LeakyReLU())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert type(converted[0]) is nn.SyncBatchNorm
    x = torch.randn(8, 4)
    converted.eval()
    torch.testing.assert_close(converted(x), F.leaky_relu(x / (1 + 1e-5) ** 0.5))
