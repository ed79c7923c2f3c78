"""FusedSequential, FusedResearchNet and the single layers compute what plain modules compute."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from support.networks import assert_same_step, kernels_run, network_layers, pair
from torch import nn
from torch.nn.utils import prune

import fused_mlp
from fused_mlp import (
    BatchNormLeakyReLU,
    FusedResearchNet,
    FusedSequential,
    LinearReLU,
    Normalize,
)
from fused_mlp.dropout import draw_seed, keep_mask
from fused_mlp.eager import IntelligentResearchNetwork
from fused_mlp.modules import fit as fit_module

pytestmark = pytest.mark.usefixtures("target")


def networks(device, hidden=(64, 32), dropout=0.0, dtype=None):
    arguments = (10, list(hidden), 5)
    torch.manual_seed(0)
    eager = IntelligentResearchNetwork(*arguments, dropout=dropout, device=device, dtype=dtype)
    torch.manual_seed(0)
    fused = FusedResearchNet(*arguments, dropout=dropout, device=device, dtype=dtype)
    return eager, fused


# ------------------------------------------------------------------------- the whole network


@pytest.mark.parametrize("hidden", [(32,), (64, 32), (16, 24, 8), (8, 8, 8, 8)])
@pytest.mark.parametrize("training", [True, False])
def test_network_of_any_depth_agrees_with_eager(device, hidden, training):
    eager, fused = networks(device, hidden)
    eager.train(training)
    fused.train(training)
    for _ in range(2):
        assert_same_step(eager, fused, torch.randn(16, 10, device=device, requires_grad=True))
    x = torch.randn(16, 10, device=device)
    weights = [m.weight for m in fused.research_layers if isinstance(m, nn.Linear)]
    if fused_mlp.backends.fits(x, weights):
        assert kernels_run(fused, x) == ["research_net"]
    else:  # op by op
        expected = ["linear_relu"] * (len(hidden) - 1) + ["batch_norm_leaky_relu"]
        assert kernels_run(fused, x) == expected


def test_same_seed_gives_same_initial_weights(device):
    eager, fused = networks(device, (16, 24, 8), dropout=0.3)
    for name, value in eager.state_dict().items():
        assert torch.equal(fused.state_dict()[name], value), name


def test_network_names_what_is_wrong_with_its_arguments():
    with pytest.raises(ValueError, match="hidden_layers"):
        FusedResearchNet(10, [], 5)
    with pytest.raises(ValueError, match="dropout probability"):
        FusedResearchNet(10, [64, 32], 5, dropout=1.5)


def test_dropout_masks_follow_from_manual_seed(device):
    eager, fused = networks(device, (16, 24, 8), dropout=0.4)
    x = torch.randn(32, 10, device=device)
    torch.manual_seed(7)
    output = fused(x)
    torch.manual_seed(7)
    seed = draw_seed(device)
    layers = list(eager.research_layers)
    hidden = x
    for stream in range(2):
        linear = layers[3 * stream]
        keep = keep_mask(seed, 32, linear.out_features, 0.4, stream)
        hidden = F.relu(linear(hidden)) * keep / 0.6
    for layer in layers[6:]:
        hidden = layer(hidden)
    torch.testing.assert_close(output, hidden, rtol=1e-4, atol=1e-5)


def test_no_seed_is_drawn_where_nothing_is_dropped(device):
    _, fused = networks(device, dropout=0.3)
    x = torch.randn(8, 10, device=device)
    state = torch.get_rng_state()
    fused.eval()(x)
    fused.train().research_layers[2].eval()
    fused(x)
    assert torch.equal(torch.get_rng_state(), state)
    fused.train()(x)
    if device.type == "cpu":
        assert not torch.equal(torch.get_rng_state(), state)


def test_dropout_layer_keeps_its_rate(device):
    fused = FusedSequential(nn.Linear(4, 256), nn.ReLU(), nn.Dropout(0.25)).to(device)
    with torch.no_grad():
        fused[0].weight.zero_()
        fused[0].bias.fill_(1.0)
        output = fused(torch.randn(256, 4, device=device))
    assert abs((output != 0).float().mean().item() - 0.75) < 0.01
    torch.testing.assert_close(output.max().item(), 1 / 0.75)


# --------------------------------------------------------------------- options of the children


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


# -------------------------------------------------------------------------- what runs unfused


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


# --------------------------------------------------------------------------- errors and shapes


BAD_INPUTS = {
    "width": lambda device: torch.randn(4, 9, device=device),
    "dtype": lambda device: torch.randn(4, 10, device=device).double(),
    "integers": lambda device: torch.ones(4, 10, device=device, dtype=torch.int64),
    "unbatched": lambda device: torch.randn(10, device=device),
    "scalar": lambda device: torch.tensor(1.0, device=device),
    "four dimensions": lambda device: torch.randn(2, 3, 4, 10, device=device),
    "list": lambda device: [1.0] * 10,
    "none": lambda device: None,
    "other device": lambda device: torch.randn(4, 10, device="meta"),
    "sparse": lambda device: torch.randn(4, 9, device=device).to_sparse(),
    "one row": lambda device: torch.randn(1, 10, device=device),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
def test_unusual_input_raises_or_computes_what_eager_does(device, kind, warm):
    eager, fused = pair(network_layers(device=device))
    if warm:
        for net in (eager, fused):
            net(torch.ones(4, 10, device=device))
    x = BAD_INPUTS[kind](device)
    results = []
    for net in (eager, fused):
        try:
            results.append(net(x))
        except Exception as error:
            results.append((type(error), str(error)))
    expected, output = results
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(output, expected)
    else:
        assert output == expected
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6)])
def test_linear_relu_takes_any_leading_dimensions(device, shape):
    eager, fused = pair([nn.Linear(6, 8, device=device), nn.ReLU()])
    x = torch.randn(shape, device=device, requires_grad=True)
    assert_same_step(eager, fused, x)
    assert kernels_run(fused, x) == ["linear_relu"]


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3), (1, 6, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_takes_rows_and_sequences(device, shape, training):
    eager, fused = pair([nn.BatchNorm1d(6, device=device), nn.LeakyReLU()])
    x = torch.randn(shape, device=device, requires_grad=True)
    assert_same_step(eager.train(training), fused.train(training), x)
    assert kernels_run(fused, x) == ["batch_norm_leaky_relu"]


def test_empty_batch_in_evaluation(device):
    eager, fused = networks(device)
    x = torch.randn(0, 10, device=device)
    assert fused.eval()(x).shape == eager.eval()(x).shape == (0, 5)


def test_batch_size_may_change_from_call_to_call(device):
    eager, fused = networks(device)
    for rows in (2, 33, 7, 128):
        x = torch.randn(rows, 10, device=device)
        torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)


def test_wide_network_agrees_with_eager(device):
    eager, fused = pair(network_layers((20, 700, 300, 5), device=device))
    assert_same_step(eager, fused, torch.randn(8, 20, device=device, requires_grad=True))


# --------------------------------------------------------------------------- PyTorch's own tools


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_eagers_dtypes_and_values(device, dtype):
    eager, fused = networks(device)
    x = torch.randn(16, 10, device=device)
    fused(x)
    eager(x)
    with torch.autocast(device.type, dtype):
        output, expected = fused(x), eager(x)
    assert output.dtype == expected.dtype == dtype
    torch.testing.assert_close(output, expected)


def test_functorch_transforms_agree_with_eager(device):
    eager, fused = networks(device)
    eager.eval()
    fused.eval()
    x = torch.randn(6, 10, device=device)
    fused(x)
    parameters = dict(eager.named_parameters())

    def loss(module, parameters, x):
        return torch.func.functional_call(module, parameters, (x[None],)).square().sum()

    for transform in (
        lambda module: torch.func.vmap(lambda row: module(row[None]))(x),
        lambda module: torch.func.jacrev(module)(x),
        lambda module: torch.func.jvp(module, (x,), (torch.ones_like(x),))[1],
        lambda module: torch.func.vmap(
            torch.func.grad(lambda p, row: loss(module, p, row)), (None, 0)
        )(parameters, x)["research_layers.0.weight"],
    ):
        torch.testing.assert_close(transform(fused), transform(eager), rtol=1e-4, atol=1e-5)


def test_forward_mode_ad_agrees_with_eager(device):
    eager, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    tangents = []
    fused(x)
    eager(x)
    for net in (eager, fused):
        with torch.autograd.forward_ad.dual_level():
            output = net(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            tangents.append(torch.autograd.forward_ad.unpack_dual(output).tangent)
    torch.testing.assert_close(tangents[1], tangents[0], rtol=1e-4, atol=1e-5)


def test_functional_call_with_other_parameters(device):
    eager, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    other = {name: p.detach() * 1.5 for name, p in eager.named_parameters()}
    expected = torch.func.functional_call(eager, other, (x,))
    torch.testing.assert_close(
        torch.func.functional_call(fused, other, (x,)), expected, rtol=1e-4, atol=1e-4
    )


class Tagged(torch.Tensor):
    pass


def test_tensor_subclass_comes_out_as_eager_gives_it(device):
    eager, fused = networks(device)
    x = torch.randn(6, 10, device=device).as_subclass(Tagged)
    output = fused(x)
    assert type(output) is Tagged
    torch.testing.assert_close(output, eager(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_may_alternate(device, mode):
    eager, fused = networks(device)
    for net in (eager, fused):
        net.eval()
    x = torch.randn(6, 10, device=device)
    for _ in range(2):
        with mode():
            made_inside = x * 2
            for value in (x, made_inside):
                output = fused(value)
                assert output.requires_grad == eager(value).requires_grad
                torch.testing.assert_close(output, eager(value), rtol=1e-4, atol=1e-5)
        assert fused(x).requires_grad
        assert kernels_run(fused, x) == ["research_net"]


@pytest.mark.parametrize(
    ("training", "shape"), [(True, (16, 10)), (False, (16, 10)), (False, (1, 10))]
)
def test_fullgraph_compile_agrees_with_uncompiled(device, training, shape):
    _, fused = networks(device)
    plain = copy.deepcopy(fused)
    fused.train(training)
    plain.train(training)
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        _compare_compiled(plain, fused, compiled, shape, device)


def _compare_compiled(plain, fused, compiled, shape, device):
    x = torch.randn(shape, device=device)
    plain.zero_grad()
    fused.zero_grad()
    expected, output = plain(x), compiled(x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    output.square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            fused.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-4
        )
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer)


def test_compiled_graph_holds_the_whole_network_as_one_op(device):
    _, fused = networks(device, dropout=0.3)
    targets = []

    def backend(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compiler.reset()
    torch.compile(fused, fullgraph=True, backend=backend)(torch.randn(8, 10, device=device))
    assert targets.count(torch.ops.fused_mlp.research_net) == 1
    assert len(targets) < 4, targets


def test_compiled_mixture_follows_changed_options(device):
    eager, fused = pair(
        [nn.Linear(6, 8), nn.ReLU(), nn.GELU(), nn.BatchNorm1d(8), nn.LeakyReLU(), nn.Linear(8, 2)]
    )
    eager.to(device)
    fused.to(device)
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 6, device=device)
    torch.testing.assert_close(compiled(x), eager(x))
    for net in (eager, fused):
        net[4].negative_slope = 0.5
        net[3].eval()
    torch.testing.assert_close(compiled(x), eager(x))
    fused[1].register_forward_hook(lambda module, args, output: output * 0)
    torch.compiler.reset()  # torch.compile looks for hooks when it compiles, and never again
    torch.testing.assert_close(compiled(x), fused(x))


# ------------------------------------------------------------------------------ life of a module


def test_copies_and_files_hold_no_plan_and_run_alike(device):
    _, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    expected = fused.eval()(x)
    assert "_cache" in fused.research_layers.__dict__
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for again in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(file, weights_only=False),
    ):
        assert "_cache" not in again.research_layers.__dict__
        assert torch.equal(again(x), expected)
        with torch.no_grad():
            again.research_layers[6].bias.add_(1)
        torch.testing.assert_close(again(x), expected + 1)
        assert torch.equal(fused(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_converted_network_runs_in_its_new_dtype(device, dtype):
    eager, fused = networks(device)
    fused(torch.randn(6, 10, device=device))
    eager.eval().to(dtype)
    fused.eval().to(dtype)
    x = torch.randn(6, 10, device=device, dtype=dtype)
    output = fused(x)
    assert output.dtype == dtype
    torch.testing.assert_close(output, eager(x), rtol=0.05, atol=0.05)
    assert kernels_run(fused, x) == ["research_net"]
    fused.research_layers[3].float()  # one layer alone: eager's error
    eager.research_layers[3].float()
    with pytest.raises(RuntimeError) as expected:
        eager(x)
    with pytest.raises(RuntimeError) as raised:
        fused(x)
    assert str(raised.value) == str(expected.value)


def test_parameters_resized_behind_the_modules_back_raise_as_eager_does(device):
    eager, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    fused(x)
    for net in (eager, fused):
        layer = net.research_layers[3]
        layer.weight.data = layer.weight.data[:, :50]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        eager(x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fused(x)


def test_network_moves_through_the_meta_device(device):
    _, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    fused(x)
    state = copy.deepcopy(fused.state_dict())
    expected = fused.eval()(x)
    fused.to("meta")
    assert fused(x.to("meta")).is_meta
    fused.to_empty(device=device).load_state_dict(state)
    torch.testing.assert_close(fused(x), expected)


def test_threads_share_one_module(device):
    _, fused = networks(device)
    fused.eval()
    inputs = [torch.randn(4 + i, 10, device=device) for i in range(8)]
    expected = [copy.deepcopy(fused)(x) for x in inputs]
    results = [None] * 8

    def work(i):
        for _ in range(20):
            results[i] = fused(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value)


def test_backend_switched_between_calls_takes_effect(device):
    _, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    output = fused.eval()(x)
    with fused_mlp.use_backend("reference"):
        torch.testing.assert_close(fused(x), output, rtol=1e-4, atol=1e-5)


def test_without_torchs_guards_the_checks_run_in_python(device, monkeypatch):
    monkeypatch.setattr(fit_module, "_TensorGuards", None)
    eager, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    for _ in range(2):
        torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)
    with torch.autocast(device.type, torch.bfloat16):
        torch.testing.assert_close(fused(x), eager(x))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fused(x[:, :9])
    fused.double()
    with pytest.raises(RuntimeError, match="same dtype"):
        fused(x)


def test_jit_trace_records_torchs_own_ops(device):
    eager, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    fused.eval()(x)
    eager.eval()
    traced = torch.jit.trace(fused, x)
    torch.testing.assert_close(traced(x), eager(x))
    assert "fused_mlp_kernels" not in str(traced.inlined_graph)


# -------------------------------------------------------------------------------- single layers


@pytest.mark.parametrize("bias", [True, False])
def test_linear_relu_layer_agrees_with_eager(device, bias):
    torch.manual_seed(0)
    linear = nn.Linear(6, 8, bias, device=device)
    torch.manual_seed(0)
    layer = LinearReLU(6, 8, bias, device=device)
    assert layer.state_dict().keys() == linear.state_dict().keys()
    x = torch.randn(5, 6, device=device)
    torch.testing.assert_close(layer(x), linear(x).relu())
    assert kernels_run(layer, x) == ["linear_relu"]
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


def test_linear_relu_layer_drops_in_training_alone(device):
    layer = LinearReLU(6, 64, dropout=0.5, device=device)
    x = torch.randn(5, 6, device=device)
    dense = layer.eval()(x)
    torch.manual_seed(3)
    output = layer.train()(x)
    torch.manual_seed(3)
    keep = keep_mask(draw_seed(device), 5, 64, 0.5)
    torch.testing.assert_close(output, dense * keep * 2)
    nn.utils.parametrizations.weight_norm(layer)
    torch.testing.assert_close(layer.eval()(x), dense)
    with pytest.raises(ValueError, match="dropout probability"):
        LinearReLU(6, 8, dropout=-0.1)


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
@pytest.mark.parametrize("shape", [(7, 6), (7, 6, 3)])
def test_batch_norm_leaky_relu_layer_agrees_with_eager(device, options, shape):
    norm = nn.BatchNorm1d(6, **options, device=device)
    layer = BatchNormLeakyReLU(6, **options, negative_slope=0.2, device=device)
    layer.load_state_dict(norm.state_dict(), strict=True)
    norm.load_state_dict(layer.state_dict(), strict=True)
    for _ in range(3):
        x = torch.randn(shape, device=device)
        torch.testing.assert_close(layer(x), F.leaky_relu(norm(x), 0.2), rtol=1e-4, atol=1e-5)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), buffer)
    layer.eval()
    norm.eval()
    torch.testing.assert_close(layer(x), F.leaky_relu(norm(x), 0.2), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        layer(x[0, 0])
    layer.train().eps = 0.0
    with pytest.raises(ValueError, match=r"^batch_norm eps must be positive during training"):
        layer(x)


@pytest.mark.parametrize("dim", [None, 0, 1, (0, 1)])
def test_normalize_layer_standardises(device, dim):
    x = torch.randn(9, 4, device=device) * 3 + 1
    dims = tuple(range(2)) if dim is None else dim
    expected = (x - x.mean(dims, keepdim=True)) / (x.std(dims, keepdim=True) + 0.1)
    torch.testing.assert_close(Normalize(dim, eps=0.1)(x), expected)


@pytest.mark.parametrize("layer", [LinearReLU(6, 8), BatchNormLeakyReLU(6), Normalize()])
def test_single_layers_compile_copy_and_show_their_options(device, layer):
    layer = layer.to(device)
    x = torch.randn(5, 6, device=device)
    expected = layer.eval()(x)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), expected)
    assert any(word in repr(layer) for word in ("dropout=0.0", "negative_slope=0.01", "dim=None"))
