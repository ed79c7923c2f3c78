"""A network made ready for its next call computes, draws and raises as one that is not."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from prepared_fixtures import (  # noqa: F401
    assert_backend_is_followed,
    assert_transforms_run_the_plain_modules,
    networks,
    ready,
    runs,
)
from support.networks import kernels_run, network_layers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_mlp import FusedResearchNet, FusedSequential, backends
from fused_mlp.dropout import draw_seed, keep_mask
from fused_mlp.modules.prepared import PreparedNet

pytestmark = pytest.mark.skipif(
    backends.active_backend("cpu") != "native", reason="only the CPU library prepares networks"
)


def test_parameters_made_under_inference_mode_are_read_anew():
    with torch.inference_mode():
        eager, fused = networks()
        for net in (eager.eval(), fused.eval()):
            net(torch.randn(6, 10))
        x = torch.randn(6, 10)
        for _ in range(3):
            for net in (eager, fused):
                net.research_layers[0].weight.mul_(1.5)
                net.research_layers[4].running_mean.add_(0.5)
            torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_network_runs_as_prepared_after_a_conversion(runs, dtype):
    eager, fused = ready(False, runs)
    for net in (eager, fused):
        net.to(dtype)
    x = torch.randn(6, 10, dtype=dtype)
    for _ in range(3):
        torch.testing.assert_close(fused(x), eager(x), rtol=0.05, atol=0.05)
    assert runs[-1]
    with pytest.raises(RuntimeError, match="same dtype"):
        fused(x.float())


@pytest.mark.parametrize("ready_before", [True, False])
def test_tensors_may_be_swapped_by_conversions_and_loading(ready_before):
    _, fused = networks()
    fused.eval().requires_grad_(False)
    x = torch.randn(6, 10)
    state = {name: value.clone() for name, value in fused.state_dict().items()}
    expected = fused(x)
    if ready_before:
        fused(x)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        if not ready_before:
            fused.float()
            fused(x)
            fused(x)
        fused.double()
        torch.testing.assert_close(fused(x.double()), expected.double(), rtol=1e-4, atol=1e-5)
        fused.load_state_dict(state)
        fused.float()
        torch.testing.assert_close(fused(x), expected)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_network_whose_options_change_at_every_call_is_not_made_ready_again(monkeypatch):
    made = []
    make = PreparedNet.__init__

    def noted(self, *arguments):
        made.append(arguments)
        make(self, *arguments)

    monkeypatch.setattr(PreparedNet, "__init__", noted)
    _, fused = networks(dropout=0.1)
    x = torch.randn(6, 10)
    for step in range(6):
        fused.research_layers[2].p = 0.1 + step / 100
        fused(x)
    assert len(made) == 1
    for _ in range(3):
        fused(x)
    assert len(made) == 2, "once the options stay, it is"


def test_option_of_dropout_is_followed_call_by_call():
    _, fused = networks(dropout=0.5)
    x = torch.randn(64, 10)
    reference = copy.deepcopy(fused.research_layers)
    for p in (0.5, 0.5, 0.1, 0.1, 0.0, 0.9, 0.9):
        fused.research_layers[2].p = p
        torch.manual_seed(1)
        output = fused(x)
        torch.manual_seed(1)
        hidden = reference[1](reference[0](x))
        if p:
            hidden = hidden * keep_mask(draw_seed("cpu"), 64, 16, p) / (1 - p)
        for layer in reference[3:]:
            hidden = layer(hidden)
        torch.testing.assert_close(output, hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [2, 3, 7, 64])
def test_prepared_call_draws_the_seed_an_unprepared_one_draws(runs, dtype, rows):
    _, fused = networks(dropout=0.3)
    fused.to(dtype)
    x = torch.randn(rows, 10, dtype=dtype, requires_grad=True)
    fresh = copy.deepcopy(fused)
    fused(x)
    fused(x)
    assert runs == [True]
    fused.load_state_dict(fresh.state_dict())
    results = []
    for net in (fused, fresh):
        torch.manual_seed(3)
        output = net(x)
        grads = torch.autograd.grad(
            output.square().sum(), [x, *net.parameters()], create_graph=True
        )
        second = torch.autograd.grad(grads[1].square().sum(), x)
        results.append((output, *grads, *second, torch.get_rng_state()))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_weight_changed_between_forward_and_backward_raises_as_eager_does(runs):
    for net in ready(True, runs):
        output = net(torch.randn(6, 10))
        with torch.no_grad():
            net.research_layers[3].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_running_statistics_a_graph_needs_are_guarded(runs):
    _, fused = ready(True, runs)
    norm = fused.research_layers[4]
    scale = torch.ones(8, requires_grad=True)
    loss = (scale * norm.running_mean).sum()
    fused(torch.randn(6, 10))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_subset_of_gradients_is_computed_alone(runs):
    eager, fused = ready(True, runs)
    x = torch.randn(6, 10)
    for wanted in ([0], [3], [1, 4], [5, 6, 7]):
        gradients = []
        for net in (eager, fused):
            parameters = list(net.parameters())
            gradients.append(
                torch.autograd.grad(net(x).square().sum(), [parameters[i] for i in wanted])
            )
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_single_row_in_training_raises_and_leaves_what_eager_leaves(runs):
    eager, fused = ready(True, runs)
    for net in (eager, fused):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            net(torch.randn(1, 10))
    found = dict(fused.named_buffers())
    for name, value in eager.named_buffers():
        torch.testing.assert_close(found[name], value)


def test_eps_of_zero_in_training_raises_eagers_error(runs):
    """Also in a network whose calls were fine before its eps was set."""
    eager, fused = ready(True, runs)
    for net in (eager, fused):
        next(m for m in net.modules() if isinstance(m, nn.BatchNorm1d)).eps = 0.0
        with pytest.raises(ValueError, match=r"^batch_norm eps must be positive during training"):
            net(torch.randn(6, 10))
    eager.eval()
    fused.eval()
    x = torch.randn(6, 10)
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "bad", [lambda: torch.randn(6, 9), lambda: torch.randn(10), lambda: "text", lambda: None]
)
def test_input_that_does_not_fit_raises_eagers_error(runs, bad):
    eager, fused = ready(False, runs)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        eager(bad())
    with pytest.raises(type(expected.value)) as raised:
        fused(bad())
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("layout", ["columns", "rows", "expanded", "offset", "empty"])
def test_input_of_any_layout_runs_as_prepared(runs, layout):
    eager, fused = ready(False, runs)
    x = {
        "columns": torch.randn(10, 6).t(),
        "rows": torch.randn(12, 10)[::2],
        "expanded": torch.randn(1, 10).expand(6, 10),
        "offset": torch.randn(7, 11)[1:, 1:],
        "empty": torch.randn(0, 10),
    }[layout]
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)
    assert runs == [True]


def test_modes_of_torch_see_the_full_op(runs):
    eager, fused = ready(False, runs)
    assert kernels_run(fused, torch.randn(6, 10)) == ["research_net"]
    assert not any(runs)
    assert_transforms_run_the_plain_modules(eager, fused, runs)


def test_mode_that_is_on_when_the_network_is_made_ready_stays_out_of_later_calls(runs):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    _, fused = networks()
    with Mode():
        fused.eval()(torch.randn(6, 10))
        fused(torch.randn(6, 10))
    assert runs == []


def test_parameters_of_functional_call_are_used(runs):
    eager, fused = ready(False, runs)
    x = torch.randn(6, 10)
    state = {name: value.detach() * 2 for name, value in eager.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(fused, state, x), torch.func.functional_call(eager, state, x)
    )
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)


def test_backend_is_followed(runs):
    _, fused = ready(False, runs)
    assert_backend_is_followed(fused, runs)


def test_hooks_on_all_modules_run(runs):
    _, fused = ready(False, runs)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(type(module))
    )
    fused(torch.randn(6, 10))
    handle.remove()
    assert seen.count(nn.Linear) == 3
    fused(torch.randn(6, 10))
    assert len(seen) == 9
    assert runs[-1]


def test_arguments_by_name_and_wrong_ones_are_as_for_any_module(runs):
    _, fused = ready(False, runs)
    x = torch.randn(6, 10)
    assert torch.equal(fused(input=x), fused(x))
    for arguments in ((), (x, x)):
        with pytest.raises(TypeError, match="positional argument"):
            fused(*arguments)


def test_symbolic_trace_keeps_the_network_as_a_module(runs):
    eager, fused = ready(False, runs)

    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, FusedResearchNet)

    outer = nn.Sequential(fused, nn.Tanh())
    graph = torch.fx.GraphModule(outer, Leaf().trace(outer))
    x = torch.randn(6, 10)
    torch.testing.assert_close(graph(x), eager(x).tanh(), rtol=1e-4, atol=1e-5)
    assert [node.target for node in graph.graph.nodes][1] == "0"


def test_replica_with_a_copied_dictionary_uses_its_own_children(runs):
    _, fused = ready(False, runs)
    layers = fused.research_layers
    replica = FusedSequential.__new__(FusedSequential)
    replica.__dict__ = layers.__dict__.copy()
    replica._modules = {name: copy.deepcopy(child) for name, child in layers._modules.items()}
    x = torch.randn(6, 10)
    with torch.no_grad():
        replica[6].bias.add_(1)
    torch.testing.assert_close(replica(x), layers(x) + 1)


def test_network_among_other_layers_runs_as_prepared(runs):
    layers = [nn.Tanh(), *network_layers((10, 16, 8, 5)), nn.Tanh()]
    fused = FusedSequential(*copy.deepcopy(layers)).eval()
    eager = nn.Sequential(*layers).eval()
    x = torch.randn(6, 10)
    for _ in range(2):
        torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)
    assert runs == [True]
    for net in (eager, fused):
        net[6].negative_slope = 0.5
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("affine", [True, False])
def test_backward_without_a_mask_gives_the_gradients_of_all_parameters(affine):
    kernels = torch.ops.fused_mlp_kernels
    widths = (10, 16, 8, 5)
    shapes = [(out, before) for before, out in itertools.pairwise(widths)]
    weights, biases = [torch.randn(s) for s in shapes], [torch.randn(s[0]) for s in shapes]
    norm = (torch.randn(8), torch.randn(8)) if affine else (None, None)
    handle = kernels.research_net_prepare(
        weights, biases, *norm, torch.zeros(8), torch.ones(8), None, True, [0.3], 0.1, 1e-5, 0.01
    )
    x, grad = torch.randn(6, 10), torch.randn(6, 5)
    _, saved = kernels.research_net_prepared(x, handle)
    mask = [False, *[True] * 6, affine, affine]
    expected = kernels.research_net_prepared_backward(grad, x, saved, handle, mask)
    found = kernels.research_net_prepared_backward(grad, x, saved, handle, None)
    assert [t.shape for t in found] == [
        t.shape for t in (*weights, *biases, *norm) if t is not None
    ]
    for ours, right in zip(found, expected, strict=True):
        assert torch.equal(ours, right)
