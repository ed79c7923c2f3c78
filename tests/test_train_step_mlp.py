"""TrainStep of ordinary MLPs: chains of Linear layers train as in the loop, in one call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.training import assert_same_training, batches, both, loop_step
from torch import nn
from torch.optim import SGD, Adam, AdamW

from fused_mlp import FusedSequential, TrainStep, backends

NATIVE = backends.active_backend("cpu") == "native"
CROSS_ENTROPY, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
OPTIMIZERS = {
    "momentum": lambda p: SGD(p, 0.02, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: Adam(p, 1e-2),
    "adamw": lambda p: AdamW(p, 1e-2, amsgrad=True),
}


def smooth(dropout: float = 0.0) -> list[nn.Module]:
    return [
        nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 9, bias=False), nn.GELU(),
        nn.Linear(9, 4),
    ]  # fmt: skip


def kinked(dropout: float = 0.0) -> list[nn.Module]:
    return [
        nn.Linear(6, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 4), nn.LeakyReLU(0.2),
    ]  # fmt: skip


def normed(dropout: float = 0.0) -> list[nn.Module]:
    """Without biases before the batch norms: their gradients are rounding alone."""
    return [
        nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(16, 9, bias=False), nn.BatchNorm1d(9, affine=False), nn.LeakyReLU(0.2),
        nn.Linear(9, 4),
    ]  # fmt: skip


NETS = {"smooth": smooth, "kinked": kinked, "normed": normed}


def net(make: Callable[[float], list[nn.Module]], dropout: float = 0.0) -> FusedSequential:
    torch.manual_seed(0)
    return FusedSequential(*make(dropout)).double()


@pytest.mark.parametrize("max_norm", [None, 0.3], ids=["", "clipped"])
@pytest.mark.parametrize("loss", [CROSS_ENTROPY, MSE], ids=["cross-entropy", "mse"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_trajectory_over_100_steps_is_the_loops(make, optimizer, loss, max_norm):
    step, twin = both(optimizer, loss, net(make), max_norm=max_norm)
    assert_same_training(step, twin, batches(100, loss), fused=NATIVE)


@pytest.mark.parametrize("rows", [8, 2, 70])
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_dropout_draws_the_masks_of_the_loop(make, rows):
    step, twin = both(OPTIMIZERS["adam"], MSE, net(make, dropout=0.4))
    assert_same_training(step, twin, batches(20, MSE, rows), fused=NATIVE)  # and the generator


def test_batches_of_changing_size_and_strides_and_a_single_row():
    step, twin = both(OPTIMIZERS["adam"], MSE, net(smooth))
    varied = []
    for rows in (8, 1, 33, 300, 2):
        x, y = batches(1, MSE, rows)[0]
        varied += [(x, y), (x.t().contiguous().t(), y.t().contiguous().t()), (x.flip(0), y)]
    assert_same_training(step, twin, varied, fused=NATIVE)


@pytest.mark.parametrize("widths", [(6, 300, 20, 4), (6, *[8] * 31, 4), (6, 4)])
def test_widths_beyond_the_cache_many_layers_and_a_single_one(widths):
    layers: list[nn.Module] = []
    for before, width in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(before, width), nn.SiLU()]
    step, twin = both(OPTIMIZERS["momentum"], MSE, FusedSequential(*layers).double())
    assert_same_training(step, twin, batches(5, MSE), fused=NATIVE)


SMOOTH_CHANGES: list[Callable[[nn.Sequential], object]] = [
    lambda n: n.eval(),
    lambda n: setattr(n[2], "p", 0.0),
    lambda n: n[0].requires_grad_(False),
    lambda n: n[5].requires_grad_(False),
    lambda n: n[3].requires_grad_(False),
    lambda n: n.__setitem__(1, nn.SiLU()),
    lambda n: setattr(n[4], "approximate", "tanh"),
    lambda n: setattr(n[0].weight, "data", n[0].weight.data.clone() * 1.5),
]
NORMED_CHANGES: list[Callable[[nn.Sequential], object]] = [
    lambda n: n.eval(),
    lambda n: n[1].eval(),
    lambda n: n[5].eval(),
    lambda n: setattr(n[1], "momentum", 0.7),
    lambda n: setattr(n[5], "track_running_stats", False),
    lambda n: setattr(n[1], "eps", 0.1),
    lambda n: setattr(n[6], "negative_slope", 0.5),
    lambda n: n[1].requires_grad_(False),
    lambda n: (n[0].requires_grad_(False), n[1].requires_grad_(False)),
]


@pytest.mark.parametrize(
    ("make", "change"),
    [*((smooth, c) for c in SMOOTH_CHANGES), *((normed, c) for c in NORMED_CHANGES)],
)
def test_options_of_the_layers_count_at_the_next_step(make, change):
    step, twin = both(OPTIMIZERS["adam"], CROSS_ENTROPY, net(make, dropout=0.2))
    assert_same_training(step, twin, batches(3), fused=NATIVE)
    for network in (step.net, twin[0]):
        change(network)
    assert_same_training(step, twin, batches(5), fused=NATIVE)
    for network in (step.net, twin[0]):
        network.train().requires_grad_(True)
    assert_same_training(step, twin, batches(3), fused=NATIVE)


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_set_to_none_false_keeps_the_gradients_in_the_same_tensors(make):
    step, twin = both(OPTIMIZERS["adam"], CROSS_ENTROPY, net(make), set_to_none=False)
    first = batches(1)
    assert_same_training(step, twin, first)
    kept = [p.grad for p in step.net.parameters()]
    assert_same_training(step, twin, batches(4), fused=NATIVE)
    for parameter, grad, other in zip(
        step.net.parameters(), kept, twin[0].parameters(), strict=True
    ):
        assert parameter.grad is grad
        torch.testing.assert_close(grad, other.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda n: setattr(n[1], "momentum", None), "momentum changes"),
        (lambda n: n[0].register_forward_hook(lambda *_: None), "hook"),
        (lambda n: n.insert(2, nn.ELU()), "not those of one"),
        (lambda n: nn.utils.parametrizations.weight_norm(n[0]), "not those of one"),
        (lambda n: setattr(n[3], "p", 1.5), "does not fit"),
    ],
)
def test_what_the_kernels_cannot_take_runs_the_loop(change, reason):
    step, twin = both(lambda p: SGD(p, 0.1), CROSS_ENTROPY, net(normed))
    for network in (step.net, twin[0]):
        change(network)
    if reason == "does not fit":
        with pytest.raises(ValueError, match="between 0 and 1"):
            step(*batches(1)[0])
    else:
        step.optimizer = SGD(step.net.parameters(), 0.1)
        twin = (twin[0], SGD(twin[0].parameters(), 0.1))
        assert_same_training(step, twin, batches(3), fused=False)
    assert reason in step.ordinary_because or not NATIVE


def test_one_row_through_a_batch_norm_raises_what_the_loop_raises():
    step, twin = both(OPTIMIZERS["adam"], CROSS_ENTROPY, net(normed))
    assert_same_training(step, twin, batches(2), fused=NATIVE)
    single = batches(1, rows=1)[0]
    for train in (lambda: step(*single), lambda: loop_step(twin[0], step.loss, twin[1], single)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            train()
    assert_same_training(step, twin, batches(2), fused=NATIVE)


def test_large_batch_gives_the_same_bits_on_any_number_of_threads(all_threads):
    for make in (smooth, normed):
        results = []
        for threads in (1, torch.get_num_threads()):
            torch.set_num_threads(threads)
            module = net(make, dropout=0.5).float()
            step = TrainStep(module, CROSS_ENTROPY, Adam(module.parameters()), max_norm=0.1)
            torch.manual_seed(1)
            losses = [step(*batch) for batch in batches(4, rows=3000, dtype=torch.float32)]
            results.append([*losses, *module.state_dict().values()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not NATIVE, reason="only the CPU library has these ops")
def test_handle_of_another_op_is_refused():
    weight = torch.randn(4, 6)
    none: list[int] = []
    handle = torch.ops.fused_mlp_kernels.mlp_prepare(
        [weight], [None], [0], [0.0], [0.0], *[none] * 5
    )
    plan = torch.ops.fused_mlp_kernels.train_step_plan
    options = (True, True, None, -100, 0.0, False, torch.zeros(1, 7).double(), *[none] * 5)
    made = plan(handle, *options)
    for wrong in (handle.clone(), made, weight):
        with pytest.raises(RuntimeError, match="research_net_prepare or mlp_prepare"):
            plan(wrong, *options)
