"""fuse() finds the runs of any model and says what it left; unfuse() puts everything back."""

from __future__ import annotations

import copy

import pytest
import torch
from support.networks import assert_same_step, kernels_run, network_layers
from torch import nn

from fused_mlp import FusedResearchNet, FusedSequential, LinearReLU, fuse, unfuse

WHOLE = "Linear+ReLU+Dropout, Linear+BatchNorm1d+LeakyReLU, Linear"


class Policy(nn.Module):
    """A model with runs in nested containers, loose layers and a ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Sequential(*network_layers()), nn.Identity())
        self.heads = nn.ModuleDict({"value": nn.Sequential(nn.Linear(5, 8), nn.ReLU())})
        self.elu = nn.Sequential(nn.Linear(5, 8), nn.ELU(), nn.Linear(8, 8))
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.ReLU()])
        self.out = nn.Linear(8, 2)

    def forward(self, input):
        hidden = self.body(input)
        hidden = self.heads["value"](hidden) + self.elu(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return self.out(hidden)


def entries(found):
    return {entry.path: (entry.pattern, entry.reason) for entry in found}


def test_report_lists_every_run_and_why_others_were_left():
    report = fuse(Policy())
    assert entries(report.fused) == {
        "body.0.0-6": (WHOLE, "research_net"),
        "heads.value.0-1": ("Linear+ReLU", "linear_relu"),
    }
    left = entries(report.left)
    assert left.keys() == {"(model)", "elu.0", "elu.2", "blocks"}
    assert left["elu.0"][0] == "Linear"
    assert left["elu.0"][1].startswith("followed by ELU, not ReLU, LeakyReLU, GELU, SiLU, Tanh")
    assert left["elu.2"] == ("Linear", "nothing after it to fuse with")
    assert "Policy.forward" in left["(model)"][1]
    assert "ModuleList" in left["blocks"][1]


def test_report_prints_as_an_aligned_table():
    lines = str(fuse(Policy())).splitlines()
    assert len(lines) == 7
    column = lines[0].index("op, or why not")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)
    assert [line.split()[0] for line in lines[1:]] == ["fused"] * 2 + ["left"] * 4
    assert "nothing to fuse" in str(fuse(nn.Identity()))


@pytest.mark.usefixtures("target")
def test_fused_model_trains_as_before(device):
    eager = Policy().to(device)
    fused = copy.deepcopy(eager)
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    reference = torch.optim.SGD(eager.parameters(), lr=0.1)
    fuse(fused)
    for _ in range(3):
        x = torch.randn(16, 10, device=device)
        assert_same_step(eager, fused, x)
        for step in (optimizer, reference):
            step.step()
            step.zero_grad()
    assert kernels_run(fused.eval(), x) == ["research_net", "linear_relu"]
    unfuse(fused)
    assert not kernels_run(fused, x)
    assert_same_step(eager, fused.train(), x)


def test_containers_keep_identity_hooks_flags_and_parameters():
    model = Policy()
    container, parameters = model.body[0], dict(model.named_parameters())
    seen = []
    container.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    container[4].eval()
    container.note = "mine"
    fuse(model)
    assert model.body[0] is container
    assert (type(container), container.note) == (FusedSequential, "mine")
    assert container.training
    assert not container[4].training
    assert all(p is parameters[name] for name, p in model.named_parameters())
    model(torch.randn(4, 10))
    assert seen == [FusedSequential]


def test_fusing_twice_changes_nothing_and_reports_the_same():
    model = Policy()
    first = fuse(model)
    modules = [(name, type(module)) for name, module in model.named_modules()]
    assert fuse(model) == first
    assert [(name, type(module)) for name, module in model.named_modules()] == modules


def test_unfuse_restores_plain_classes_and_drops_the_plan():
    model = Policy()
    before = [(name, type(module)) for name, module in model.named_modules()]
    fuse(model)
    model.body(torch.randn(4, 10))
    assert unfuse(model) is model
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert not any("_cache" in module.__dict__ for module in model.modules())


def test_a_sequential_itself_is_fused_in_place():
    model = nn.Sequential(*network_layers())
    report = fuse(model)
    assert type(model) is FusedSequential
    assert entries(report.fused) == {"0-6": (WHOLE, "research_net")}


def test_fused_network_is_reported_and_can_be_unfused():
    net = FusedResearchNet(10, [32], 5)
    report = fuse(net)
    assert [e.path for e in report.fused] == ["research_layers.0-3"]
    assert not report.left
    x = torch.randn(4, 10)
    expected = net.eval()(x)
    unfuse(net)
    assert type(net.research_layers) is nn.Sequential
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


class Residual(nn.Sequential):
    def forward(self, input):
        return input + super().forward(input)


class Doubled(nn.Linear):
    pass


def _replaced():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.forward = lambda input: input
    return model


def _hooked():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[1].register_forward_hook(lambda module, args, output: None)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Residual(nn.Linear(4, 4), nn.ReLU()), "Residual is a subclass of Sequential"),
        (lambda: nn.Sequential(Doubled(4, 4), nn.ReLU()), "not Doubled"),
        (
            lambda: nn.Sequential(
                nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU()
            ),
            "parametrized: weight",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU()), "lazy"),
        (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()), "followed by Tanh, not ReLU, Leaky"),
        (lambda: nn.Sequential(nn.SyncBatchNorm(4), nn.GELU()), "followed by GELU, not ReLU, Leak"),
        (_replaced, "its forward was replaced"),
        (_hooked, "1 has a hook"),
    ],
)
def test_reason_of_what_was_left(make, reason):
    report = fuse(make())
    assert not report.fused
    assert [entry for entry in report.left if reason in entry.reason], str(report)


def test_modules_that_stand_twice_are_fused_once():
    run = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    report = fuse(nn.Sequential(run, run))
    assert [entry.path for entry in report.fused] == ["0.0-1"]
    shared = nn.ReLU()
    report = fuse(nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared))
    assert [entry.path for entry in report.fused] == ["0-3"]


def test_chain_of_linears_is_one_run_and_its_layers_where_one_of_them_runs_as_itself():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    report = fuse(nn.ModuleDict({"net": model}))
    on_cpu = "mlp on the CPU, an op a layer elsewhere"
    assert entries(report.fused) == {"net.0-4": ("Linear+Tanh, Linear+GELU, Linear", on_cpu)}
    assert not report.left
    model[1].register_forward_hook(lambda module, args, output: None)
    report = fuse(model)
    assert entries(report.fused) == {"2-3": ("Linear+GELU", "linear_act")}
    assert [entry.path for entry in report.left] == ["0-1", "4"]


def test_own_layer_outside_a_run_is_reported_as_fused():
    report = fuse(nn.Sequential(LinearReLU(4, 4), nn.Sigmoid()))
    assert entries(report.fused) == {"0": ("LinearReLU", "linear_relu")}


def test_something_else_than_a_module_is_refused():
    for function in (fuse, unfuse):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            function([nn.Linear(2, 2)])
