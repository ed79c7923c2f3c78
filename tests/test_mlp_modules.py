"""Chains of Linear layers in a FusedSequential: when they run in one node, and as what."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from mlp_fixtures import layers, norm_layers, ready
from prepared_fixtures import (  # noqa: F401
    assert_backend_is_followed,
    assert_threads_see_a_whole_state,
    assert_transforms_run_the_plain_modules,
    runs,
)
from support import MULTIPLIES_BFLOAT16
from support.networks import assert_same_step, kernels_run, pair
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_mlp import (
    BatchNormLeakyReLU,
    FusedResearchNet,
    FusedSequential,
    LinearReLU,
    backends,
)
from fused_mlp.dropout import draw_seed, keep_mask

pytestmark = pytest.mark.skipif(
    backends.active_backend("cpu") != "native", reason="only the CPU library has this op"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 10), (1, 10), (10,), (2, 3, 10), (0, 10), (300, 10)])
def test_steps_are_those_of_the_plain_modules(runs, dtype, shape):
    eager, fused = (net.to(dtype) for net in pair(layers()))
    tolerance = {"rtol": 1e-4, "atol": 1e-4}  # some sums of 300 rows are near zero
    for _ in range(3):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        assert_same_step(eager, fused, x, **tolerance)
    assert runs[-1]
    with torch.no_grad():
        for _ in range(2):
            assert_same_step(eager, fused, torch.randn(shape, dtype=dtype), **tolerance)
    assert runs[-1]


def test_a_wide_network_and_one_of_many_layers_run():
    for widths in ((300, 270, 3), (4, *[8] * 31, 2), (4, *[8] * 40, 2)):
        net: list[nn.Module] = []
        for before, width in zip(widths[:-1], widths[1:], strict=True):
            net += [nn.Linear(before, width), nn.SiLU()]
        eager, fused = pair(net)
        for _ in range(2):
            assert_same_step(eager, fused, torch.randn(6, widths[0]))


def test_a_research_net_of_many_layers_runs():
    """Of more than one call of the CPU library takes: op by op, as networks too wide for a chip."""
    net = FusedResearchNet(10, [8] * 40, 5, dropout=0.1).eval()
    plain = nn.Sequential(*copy.deepcopy(net.research_layers))
    for _ in range(2):
        assert_same_step(plain, net.research_layers, torch.randn(6, 10))


def test_modes_of_torch_see_the_op_of_every_layer(runs):
    eager, fused = ready(False, runs)
    ops = ["linear_act"] * 2 + ["linear_relu", "linear_act"]
    assert kernels_run(fused, torch.randn(6, 10)) == ops
    assert_transforms_run_the_plain_modules(eager, fused, runs)


def test_backend_is_followed(runs):
    _, fused = ready(False, runs)
    assert_backend_is_followed(fused, runs)


def network_layers_behind(dropout: float = 0.0) -> list[nn.Module]:
    """Among whose runs is a whole research_net."""
    return [
        nn.Linear(10, 16), nn.BatchNorm1d(16), nn.LeakyReLU(), nn.Dropout(dropout),
        nn.Linear(16, 12), nn.BatchNorm1d(12), nn.LeakyReLU(0.2), nn.Dropout(dropout),
        LinearReLU(12, 9), nn.Linear(9, 7), BatchNormLeakyReLU(7, negative_slope=0.3),
        nn.Linear(7, 5), nn.Linear(5, 3), nn.Tanh(),
    ]  # fmt: skip


def test_a_research_net_among_other_layers_is_part_of_the_chain(runs):
    eager, fused = ready(True, runs, make=network_layers_behind)
    for _ in range(2):
        assert_same_step(eager, fused, torch.randn(8, 10, requires_grad=True), rtol=1e-3, atol=1e-4)
    assert runs[-1]
    for net in (eager, fused):
        net[10].negative_slope = 0.9
        net.eval()
    assert "research_net" in kernels_run(fused, torch.randn(8, 10))
    for _ in range(2):
        assert_same_step(eager, fused, torch.randn(8, 10), rtol=1e-3, atol=1e-4)


def test_layers_with_batch_norms_train_evaluate_and_refuse_as_the_plain_modules(runs):
    eager, fused = ready(True, runs, make=norm_layers)
    for rows in (6, 2, 300, 6):
        assert_same_step(eager, fused, torch.randn(rows, 10, requires_grad=True))
    assert runs[-1]
    for bad in (torch.randn(1, 10), torch.randn(4, 6, 10), torch.randn(6, 9)):
        with pytest.raises((RuntimeError, ValueError)) as expected:
            eager(bad)
        with pytest.raises(type(expected.value)) as raised:
            fused(bad)
        assert str(raised.value) == str(expected.value)
    for net in (eager, fused):
        net.eval()
    for rows in (1, 6, 0):
        assert_same_step(eager, fused, torch.randn(rows, 10))


def test_running_statistics_a_graph_needs_are_guarded(runs):
    _, fused = ready(True, runs, make=norm_layers)
    scale = torch.ones(16, requires_grad=True)
    loss = (scale * fused[1].running_mean).sum()
    fused(torch.randn(6, 10))
    assert runs[-1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_container_hooks_and_subclasses_are_not_passed_over(runs):
    class Doubled(FusedSequential):
        def forward(self, input):
            return 2 * super().forward(input)

    _, fused = ready(False, runs)
    x = torch.randn(6, 10)
    expected = fused(x)
    doubled = Doubled(*copy.deepcopy(fused))
    for _ in range(3):
        torch.testing.assert_close(doubled(x), 2 * expected)
    handle = fused.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(fused(x), 2 * expected)
    handle.remove()
    torch.testing.assert_close(fused(x), expected)
    with pytest.raises(TypeError, match="positional argument"):
        fused(x, x)


def test_dropout_follows_flags_and_probabilities_call_by_call(runs):
    fused = FusedSequential(nn.Linear(10, 400), nn.Tanh(), nn.Dropout(0.5), nn.Linear(400, 3))
    x = torch.randn(8, 10)
    probabilities = (0.5, 0.5, 0.1, 0.0, 0.9, 0.9, 0.9, 1.0, 0.3, 0.2)
    for step, p in enumerate(probabilities):
        training = step != 4
        fused[2].p = p
        fused[2].train(training)
        torch.manual_seed(1)
        output = fused(x)
        torch.manual_seed(1)
        hidden = fused[0](x).tanh()
        if p and training:
            keep = keep_mask(draw_seed("cpu"), 8, 400, p)
            hidden = hidden * keep / (1 - p) if p < 1 else hidden * 0
        torch.testing.assert_close(output, fused[3](hidden), rtol=1e-4, atol=1e-5)
    fused[2].p = 1.5
    with pytest.raises(ValueError, match="between 0 and 1"):
        fused(x)


@pytest.mark.parametrize("rows", [2, 64])
def test_prepared_call_draws_the_seed_an_unprepared_one_draws(runs, rows):
    _, fused = ready(True, runs, dropout=0.3)
    fresh = copy.deepcopy(fused)
    x = torch.randn(rows, 10, requires_grad=True)
    fused(x)
    runs.clear()
    results = []
    for net in (fused, fresh):
        torch.manual_seed(3)
        output = net(x)
        grads = torch.autograd.grad(
            output.square().sum(), [x, *net.parameters()], create_graph=True
        )
        second = torch.autograd.grad(grads[1].square().sum(), x)
        results.append((output, *grads, *second, torch.get_rng_state()))
    assert runs == [True]
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_masks(reentrant):
    """Also where a changed option made one of the two calls an unprepared one."""
    _, fused = pair(layers(0.4))
    x = torch.randn(6, 10, requires_grad=True)
    for step in range(4):
        fused[2].p = 0.4 if step < 3 else 0.2
        torch.manual_seed(step)
        output = checkpoint(fused, x, use_reentrant=reentrant)
        grads = torch.autograd.grad(output.sum(), x) if not reentrant else None
        if reentrant:
            x.grad = None
            output.sum().backward()
            grads = (x.grad,)
        torch.manual_seed(step)
        expected = fused(x)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), x))


@pytest.mark.parametrize(
    "bad", [lambda: torch.randn(6, 9), lambda: torch.randn(()), lambda: "text"]
)
def test_input_that_does_not_fit_raises_eagers_error(runs, bad):
    eager, fused = ready(False, runs)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        eager[0](bad())
    with pytest.raises(type(expected.value)) as raised:
        fused(bad())
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize(
    "kind", [lambda x: x.to_sparse(), lambda x: x.to_sparse_csr(), lambda x: x.to_mkldnn()]
)
def test_other_layouts_run_the_plain_modules(runs, kind):
    eager, fused = pair([nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 2)])
    x = torch.randn(6, 10)
    fused(x)
    results = []
    for net in (eager, fused):
        try:
            results.append(net(kind(x)))
        except (RuntimeError, NotImplementedError) as error:
            results.append(type(error))
    if isinstance(results[0], type):
        assert results[1] is results[0]
    else:
        torch.testing.assert_close(*[result.to_dense() for result in results])
    assert not any(runs)


def test_sparse_weight_runs_the_plain_modules():
    eager, fused = pair([nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 2)])
    x = torch.randn(6, 10)
    fused(x)
    for net in (eager, fused):
        net[0].weight = nn.Parameter(net[0].weight.detach().to_sparse_csr())
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(x), eager(x))


def test_a_layer_that_stands_twice_gets_the_gradients_of_both_places():
    linear, norm = nn.Linear(10, 10), nn.BatchNorm1d(10)
    shared = [linear, norm, nn.ReLU(), linear, norm, nn.ReLU(inplace=True), linear, nn.Tanh()]
    eager, fused = pair(shared)
    assert fused[0] is fused[3]
    for _ in range(3):
        assert_same_step(eager, fused, torch.randn(6, 10, requires_grad=True), rtol=1e-3, atol=1e-4)


def test_weight_changed_between_forward_and_backward_raises_as_eager_does(runs):
    for net in ready(True, runs):
        output = net(torch.randn(6, 10))
        with torch.no_grad():
            net[3].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_bias_may_change_between_forward_and_backward_as_in_eager(runs):
    gradients = []
    for net in ready(True, runs):
        x = torch.ones(6, 10, requires_grad=True)
        outputs = [net(x).square().sum() for _ in range(2)]
        with torch.no_grad():
            net[0].bias.add_(1)
        gradients.append(torch.autograd.grad(outputs[0], [x, *net.parameters()]))
    for found, expected in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: a bias"):
        torch.autograd.grad(outputs[1], x, create_graph=True)


def test_graph_can_be_used_twice_and_outlives_its_network(runs):
    eager, fused = ready(True, runs)
    x = torch.randn(6, 10, requires_grad=True)
    expected = torch.autograd.grad(eager(x).square().sum(), x)[0]
    fused(x)
    output = fused(x)
    assert runs[-1]
    rest = weakref.ref(fused[3])
    fused = None
    gc.collect()
    assert rest() is None
    loss = output.square().sum()
    for keep in (True, False):
        found = torch.autograd.grad(loss, x, retain_graph=keep)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh])
def test_half_precision_runs_layer_by_layer_but_for_bfloat16_where_it_is_multiplied(
    runs, activation
):
    _, fused = pair([nn.Linear(10, 8), activation(), nn.Dropout(0.3), nn.Linear(8, 3)])
    fused.half()
    for _ in range(2):
        fused(torch.randn(6, 10, dtype=torch.half))
    assert runs == []
    fused.bfloat16()
    for _ in range(2):
        fused(torch.randn(6, 10, dtype=torch.bfloat16))
    assert bool(runs) == MULTIPLIES_BFLOAT16


def test_threads_that_call_and_change_one_network_see_a_whole_state():
    _, fused = pair(layers())
    assert_threads_see_a_whole_state(fused, fused[4])
