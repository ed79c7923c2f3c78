"""Chains of Linear layers in a FusedSequential: when they run in one node, and what they notice."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from prepared_fixtures import runs  # noqa: F401
from support.networks import assert_same_step, kernels_run, pair
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from fused_mlp import (
    BatchNormLeakyReLU,
    FusedResearchNet,
    FusedSequential,
    LinearReLU,
    backends,
    use_backend,
)
from fused_mlp.dropout import draw_seed, keep_mask

pytestmark = pytest.mark.skipif(
    backends.active_backend("cpu") != "native", reason="only the CPU library has this op"
)


def layers(dropout: float = 0.0, last: int = 3) -> list[nn.Module]:
    return [
        nn.Linear(10, 16), nn.Tanh(), nn.Dropout(dropout),
        nn.Linear(16, 12, bias=False), nn.LeakyReLU(0.2),
        LinearReLU(12, 9, dropout=dropout),
        nn.Linear(9, 8), nn.GELU(),
        nn.Linear(8, last),
    ]  # fmt: skip


def norm_layers(dropout: float = 0.0) -> list[nn.Module]:
    return [
        nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(16, 12), nn.Tanh(),
        nn.Linear(12, 9, bias=False), nn.BatchNorm1d(9, affine=False), nn.Dropout(dropout),
        nn.Linear(9, 3),
    ]  # fmt: skip


def ready(training: bool, runs: list[bool], dropout: float = 0.0, make=layers):
    """Return both networks after calls that left the fused one prepared in both modes."""
    eager, fused = pair(make(dropout))
    for mode in (not training, training):
        for net in (eager, fused):
            net.train(mode)
        for _ in range(2):
            x = torch.randn(6, 10)
            fused(x) if dropout else assert_same_step(eager, fused, x)
    assert runs[-1], "the second call in a mode runs as prepared"
    runs.clear()
    return eager, fused


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
    x = torch.randn(6, 10)
    assert kernels_run(fused, x) == ["linear_act"] * 2 + ["linear_relu", "linear_act"]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), eager(x))
        assert fused(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.vmap(fused)(x[None])[0], eager(x), rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(fused, (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(eager, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)
    assert not any(runs)
    fused(x)
    assert runs[-1]


def test_backend_is_followed(runs):
    _, fused = ready(False, runs)
    x = torch.randn(6, 10)
    expected = fused(x)
    with use_backend("reference"):
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
        assert not runs[-1]
    fused(x)
    fused(x)
    assert runs[-1]


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


def test_half_precision_runs_layer_by_layer(runs):
    _, fused = pair(layers())
    for dtype in (torch.bfloat16, torch.float16):
        fused.to(dtype)(torch.randn(6, 10, dtype=dtype))
        fused(torch.randn(6, 10, dtype=dtype))
    assert runs == []


def test_threads_that_call_and_change_one_network_see_a_whole_state():
    _, fused = pair(layers())
    x = torch.randn(6, 10)
    outputs = []
    for slope in (0.1, 0.9):
        fused[4].negative_slope = slope
        outputs.append(fused(x).detach())
    wrong, errors = [], []
    stop = threading.Event()

    def call():
        try:
            while not stop.is_set():
                output = fused(x).detach()
                if not any(torch.allclose(output, known, atol=1e-5) for known in outputs):
                    wrong.append(output)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(300):
        fused[4].negative_slope = (0.1, 0.9)[i % 2]
        fused(x)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert wrong == []
