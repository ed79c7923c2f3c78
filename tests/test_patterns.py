"""Runs of ordinary MLPs: activations, dropout and batch norms that fuse() finds, against eager."""

from __future__ import annotations

import copy

import pytest
import torch
from support import assert_as_accurate
from support.networks import assert_same_step, kernels_run, pair
from torch import nn

from fused_mlp import FusedSequential, backends, fuse

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "gelu": nn.GELU,
    "gelu, tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "inplace": lambda: nn.LeakyReLU(0.2, inplace=True),
}
BEHIND_NORM = {"none": (), "relu": (nn.ReLU,), "leaky_relu": (lambda: nn.LeakyReLU(0.2),)}


def mlp(make, dropout=None, depth=3, width=12):
    layers: list[nn.Module] = []
    for features in (10, *[width] * (depth - 1)):
        layers += [nn.Linear(features, width), make()]
        layers += [nn.Dropout(dropout)] if dropout is not None else []
    return [*layers, nn.Linear(width, 3)]


def norm_mlp(activation, dropout=None, depth=2):
    layers: list[nn.Module] = []
    for features in (10, *[12] * (depth - 1)):
        behind = [make() for make in BEHIND_NORM[activation]]
        layers += [nn.Linear(features, 12), nn.BatchNorm1d(12), *behind]
        layers += [nn.Dropout(dropout)] if dropout is not None else []
        layers += [nn.Identity()]  # so that it makes no whole network
    layers += [nn.Linear(12, 3)]
    for module in layers:
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return layers


def rows(device, count=16):
    return torch.randn(count, 10, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dropout", [None, 0.0])
def test_every_activation_trains_and_evaluates_as_eager(device, kind, dropout):
    eager, fused = (net.to(device) for net in pair(mlp(ACTIVATIONS[kind], dropout)))
    for _ in range(2):
        assert_same_step(eager, fused, rows(device).requires_grad_())
    with torch.no_grad():
        assert_same_step(eager.eval(), fused.eval(), rows(device))
        assert_same_step(eager, fused, rows(device, 1)[0])
        assert_same_step(eager, fused, rows(device, 12).reshape(2, 6, 10))
        op = "linear_relu" if kind == "relu" else "linear_act"
        assert kernels_run(fused, rows(device)) == [op] * 3


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_dropout_behind_an_activation_follows_its_own_flags(device, kind):
    fused = FusedSequential(nn.Linear(10, 400), ACTIVATIONS[kind](), nn.Dropout(0.5)).to(device)
    x = rows(device)
    dropped = (fused(x) == 0).float().mean() - (fused.eval()(x) == 0).float().mean()
    assert 0.2 < dropped < 0.55
    fused[2].train()
    assert (fused(x) == 0).float().mean() > 0.4
    fused[2].p = 1.0
    assert not fused(x).any()
    fused[2].p = 0.0
    torch.testing.assert_close(fused(x), fused[1](fused[0](x)))


def test_dropout_alone_behind_a_linear(device):
    fused = FusedSequential(nn.Linear(10, 400), nn.Dropout(0.3), nn.Linear(400, 5)).to(device)
    x = rows(device)
    assert kernels_run(fused, x) == ["linear_act"]
    kept = FusedSequential(*fused[:2])(x)
    torch.testing.assert_close(kept[kept != 0], (fused[0](x) / 0.7)[kept != 0])
    assert 0.2 < (kept == 0).float().mean() < 0.4


@pytest.mark.parametrize("activation", BEHIND_NORM)
@pytest.mark.parametrize("dropout", [None, 0.0])
def test_every_batch_norm_trains_and_evaluates_as_eager(device, activation, dropout):
    eager, fused = (net.to(device) for net in pair(norm_mlp(activation, dropout)))
    for _ in range(2):
        assert_same_step(eager, fused, rows(device).requires_grad_())
    for net in (eager, fused):
        net.eval()
        net.zero_grad()
    assert_same_step(eager, fused, rows(device).requires_grad_())
    with torch.no_grad():
        assert_same_step(eager, fused, rows(device))
        assert kernels_run(fused, rows(device)) == ["linear_batch_norm_act"] * 2
    op = "batch_norm_act" if activation == "relu" else "batch_norm_leaky_relu"
    assert kernels_run(fused.train(), rows(device)) == [op] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["plain", "no eps", "tiny variance", "far mean", "wide", "bare"])
def test_folded_batch_norm_is_as_accurate_as_eager(device, dtype, case):
    out = {"wide": 300, "bare": 64}.get(case, 33)
    norm = nn.BatchNorm1d(out, eps=0.0 if case == "no eps" else 1e-5)
    behind = [] if case == "bare" else [nn.LeakyReLU(0.1)]
    eager = nn.Sequential(nn.Linear(20, out), norm, *behind)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    if case == "tiny variance":
        norm.running_var.mul_(1e-4)
    if case == "far mean":
        nn.init.constant_(eager[0].bias, 100.0)
        nn.init.constant_(norm.running_mean, 100.0)
    eager = eager.to(device, dtype).eval().requires_grad_(False)
    fused = copy.deepcopy(eager)
    fuse(fused)
    for count in (1, 7, 200):
        x = torch.randn(count, 20).to(device, dtype)
        assert kernels_run(fused, x) == ["linear_batch_norm_act"]
        exact = copy.deepcopy(eager).double()(x.double())
        assert_as_accurate(fused(x), eager(x), exact, case, roundings=2)


def test_variance_of_zero(device):
    """Without eps nothing finite comes of that channel, and the others are as ever."""
    for eps in (1e-5, 0.0):
        norm = nn.BatchNorm1d(4, eps=eps)
        norm.running_var[1] = 0.0
        eager, fused = pair([nn.Linear(10, 4), norm])
        eager, fused = (net.to(device).eval().requires_grad_(False) for net in (eager, fused))
        expected, output = eager(rows(device)), fused(rows(device))
        assert output[:, 1].isfinite().all() == (eps > 0)
        kept = [0, 1, 2, 3] if eps else [0, 2, 3]
        torch.testing.assert_close(output[:, kept], expected[:, kept])


def test_folding_sees_every_change_of_a_value(device):
    """Nothing folded is kept from one call to the next, so no change goes unnoticed."""
    eager, fused = pair(norm_mlp("relu"))
    eager, fused = (net.to(device).eval().requires_grad_(False) for net in (eager, fused))
    changes = [
        lambda net: net[0].weight.data.mul_(2),
        lambda net: net[0].bias.data.add_(1),
        lambda net: net[1].running_mean.data.add_(1),
        lambda net: net[1].running_var.data.mul_(3),
        lambda net: net[1].weight.data.neg_(),
        lambda net: net[1].bias.data.add_(2),
        lambda net: setattr(net[1], "eps", 0.5),
        lambda net: net.__setitem__(2, nn.LeakyReLU(0.5).to(device)),
    ]
    for change in changes:
        before = fused(rows(device))
        for net in (eager, fused):
            change(net)
        torch.testing.assert_close(fused(rows(device)), eager(rows(device)))
        assert not torch.allclose(fused(rows(device)), before)


def test_batch_norm_without_statistics_uses_the_batch_in_evaluation(device):
    layers = [nn.Linear(10, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU()]
    eager, fused = (net.to(device).eval() for net in pair(layers))
    with torch.no_grad():
        assert_same_step(eager, fused, rows(device))
        assert kernels_run(fused, rows(device)) == ["batch_norm_act"]


def test_three_dimensions_have_other_channels_than_the_linear(device):
    layers = [nn.Linear(10, 6), nn.BatchNorm1d(4), nn.ReLU()]
    eager, fused = (net.to(device).eval() for net in pair(layers))
    with torch.no_grad():
        assert_same_step(eager, fused, torch.randn(3, 4, 10, device=device))
        for net in (eager, fused):
            with pytest.raises(RuntimeError):
                net(rows(device))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_single_flags_of_children_count(device, dropout):
    """A frozen batch norm inside a network in training, a training one in evaluation."""
    eager, fused = (net.to(device) for net in pair(norm_mlp("relu", dropout)))
    for net in (eager, fused):
        net[1].eval()
        if dropout:
            net[3].eval()
            net[8].eval()
    assert_same_step(eager, fused, rows(device).requires_grad_())
    for net in (eager, fused):
        net.eval()
        net[1].train()
    with torch.no_grad():
        assert_same_step(eager, fused, rows(device))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_hooked_child_runs_as_itself(device, place):
    for layers in (mlp(nn.Tanh, 0.0), norm_mlp("relu")):
        fused = FusedSequential(*layers).to(device).eval().requires_grad_(False)
        expected, seen = fused(rows(device)), []
        hook = fused[place].register_forward_hook(lambda *_: seen.append(1))  # noqa: B023
        torch.testing.assert_close(fused(rows(device)), expected)
        assert seen == [1]
        hook.remove()
        fused(rows(device))
        assert seen == [1]


def test_subclasses_and_parametrized_layers_run_as_themselves(device):
    class Doubled(nn.Tanh):
        def forward(self, input):
            return 2 * super().forward(input)

    for layers in (
        [nn.Linear(10, 6), Doubled()],
        [nn.utils.parametrizations.weight_norm(nn.Linear(10, 6)), nn.GELU()],
        [nn.utils.parametrizations.weight_norm(nn.Linear(10, 6)), nn.BatchNorm1d(6), nn.ReLU()],
    ):
        eager = nn.Sequential(*layers).to(device)
        assert_same_step(eager, FusedSequential(*copy.deepcopy(eager)), rows(device))


@pytest.mark.parametrize(
    ("isa", "behind", "width", "dropout", "ran"),
    [
        ("avx512_bf16", [nn.GELU()], 1024, 0, True),
        ("avx512_bf16", [nn.GELU()], 1025, 0, False),
        ("avx512_bf16", [nn.GELU()], 1025, 0.5, True),
        ("avx512_bf16", [nn.ReLU()], 1025, 0, True),
        ("amx_bf16", [nn.GELU()], 1025, 0, True),
        ("avx512", [nn.GELU()], 1025, 0, True),
    ],
)
def test_large_bfloat16_products_are_left_to_torch_where_it_is_faster(
    monkeypatch, isa, behind, width, dropout, ran
):
    monkeypatch.setattr(backends, "isa", lambda: isa)
    _, fused = pair([nn.Linear(width, width), *behind, nn.Dropout(dropout)])
    input = torch.randn(3, width).bfloat16()
    assert bool(kernels_run(lambda: fused.bfloat16()(input))) == ran


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtypes_of_eager(device, dtype):
    for layers in (mlp(nn.GELU), norm_mlp("relu")):
        eager, fused = (net.to(device) for net in pair(layers))
        for mode in (True, False):
            with torch.autocast(device.type, dtype=dtype):
                expected, output = (net.train(mode)(rows(device)) for net in (eager, fused))
            assert output.dtype == expected.dtype
            torch.testing.assert_close(output, expected)


def test_double_backward_and_transforms(device):
    for layers in (mlp(nn.Tanh), mlp(nn.SiLU), norm_mlp("leaky_relu")):
        eager, fused = (net.to(device).double().eval() for net in pair(layers))
        results = []
        for net in (eager, fused):
            x = rows(device).double().requires_grad_()
            (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(grad.square().sum(), x)
            jacobian = torch.func.jacrev(net)(x.detach()[:2])
            _, tangent = torch.func.jvp(net, (x.detach(),), (x.detach().cos(),))
            results.append((grad.detach(), second, jacobian, tangent))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiles_without_a_break(device, mode):
    for layers in (mlp(nn.Tanh, 0.0), norm_mlp("relu", 0.0), mlp(nn.GELU)):
        eager, fused = (net.to(device).train(mode == "train") for net in pair(layers))
        torch._dynamo.reset()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=True)
        for count in (16, 9):
            x = rows(device, count)
            results = []
            for net in (eager, compiled):
                net.zero_grad()
                output = net(x)
                output.sum().backward()
                results.append([output, *(p.grad for p in net.parameters())])
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), eager(x))


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_the_ops_and_decomposes_to_torchs_own(device, strict):
    import fused_mlp

    layers = [*mlp(nn.Tanh, 0.3)[:-1], nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU()]
    eager, fused = (net.to(device).eval() for net in pair(layers))
    rows_of_any_number = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(
        fused, (rows(device),), dynamic_shapes=rows_of_any_number, strict=strict
    )
    ops = [str(node.target) for node in program.graph.nodes if "fused_mlp" in str(node.target)]
    assert ops == [
        *["fused_mlp.linear_act.default"] * 3,
        "fused_mlp.linear_batch_norm_act.default",
    ]
    plain = fused_mlp.decompose(program)
    assert not [node for node in plain.graph.nodes if "fused_mlp" in str(node.target)]
    for exported in (program, plain):
        output = exported.module()(rows(device, 5))
        torch.testing.assert_close(output, eager(rows(device, 5)), rtol=1e-4, atol=1e-5)


def test_a_network_keeps_its_op_with_something_behind_its_last_layer():
    layers = [
        nn.Linear(10, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 6), nn.BatchNorm1d(6),
        nn.LeakyReLU(), nn.Linear(6, 3), nn.Tanh(), nn.Dropout(0.1),
    ]  # fmt: skip
    model = nn.Sequential(*layers)
    assert [(e.path, e.reason) for e in fuse(model).fused] == [("0-6", "research_net")]
    assert kernels_run(model, torch.randn(8, 10))[0].startswith("research_net")


def test_report_names_what_is_fused_and_why_not():
    model = nn.Sequential(
        nn.Linear(10, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Linear(8, 8), nn.ELU(), nn.Linear(8, 8), nn.Dropout(0.1), nn.BatchNorm1d(8),
    )  # fmt: skip
    report = fuse(model)
    assert [(e.path, e.pattern, e.reason) for e in report.fused] == [
        (
            "0-6",
            "Linear+GELU+Dropout, Linear+BatchNorm1d+ReLU, Linear",
            "mlp on the CPU, an op a layer elsewhere",
        ),
        ("8-9", "Linear+Dropout", "linear_act"),
    ]
    assert {e.path: e.reason for e in report.left} == {
        "10": "nothing after it to fuse with",
    }


MANY = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", MANY)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_strides_of_three_dimensions_are_eagers(device, layout, training, norm_first):
    """(N, C, L) through a batch norm, then rows of L columns through the linear layers."""
    layers = [nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.0), nn.Linear(8, 6), nn.ReLU()]
    norm = [nn.BatchNorm1d(4), nn.LeakyReLU()]
    eager, fused = (net.to(device) for net in pair(norm + layers if norm_first else layers + norm))
    x = torch.randn(5, 4, 6, device=device)
    results = []
    for net in (eager, fused):
        input = MANY[layout](x).detach().requires_grad_()
        output = net.train(training)(input)
        output.square().sum().backward()
        results.append([output, input.grad, *(p.grad for p in net.parameters())])
    assert [t.stride() for t in results[1]] == [t.stride() for t in results[0]]
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
