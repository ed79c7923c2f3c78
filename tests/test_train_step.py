"""TrainStep trains as the ordinary loop does: the same trajectory, state and randomness."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from support.training import assert_same_state, assert_same_training, batches, both, loop_step, net
from torch import nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler

import fused_mlp
from fused_mlp import FusedResearchNet, FusedSequential, TrainStep, backends

NATIVE = backends.active_backend("cpu") == "native"

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, 0.05),
    "sgd-decay": lambda p: SGD(p, 0.05, weight_decay=0.1),
    "momentum": lambda p: SGD(p, 0.02, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": lambda p: SGD(p, 0.02, momentum=0.9, nesterov=True),
    "sgd-maximize": lambda p: SGD(p, 1e-5, momentum=0.5, maximize=True),
    "adam": lambda p: Adam(p, 1e-2),
    "adam-decay": lambda p: Adam(p, 1e-2, betas=(0.3, 0.99), eps=1e-3, weight_decay=0.1),
    "amsgrad": lambda p: Adam(p, 1e-2, amsgrad=True),
    "adamw": lambda p: AdamW(p, 1e-2, weight_decay=0.1),
    "adamw-maximize": lambda p: AdamW(p, 1e-3, amsgrad=True, maximize=True),
}
LOSSES = {
    "cross-entropy": nn.CrossEntropyLoss(),
    "cross-entropy-sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted": nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 3.0, 0.5]).double(), ignore_index=2),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2, ignore_index=1),
    "weighted-smoothed": nn.CrossEntropyLoss(
        torch.tensor([0.2, 1.0, 3.0, 0.5]).double(), label_smoothing=0.2
    ),
    "mse": nn.MSELoss(),
    "mse-sum": nn.MSELoss(reduction="sum"),
}
ADAM = OPTIMIZERS["adam"]
CROSS_ENTROPY = LOSSES["cross-entropy"]


# ------------------------------------------------------------------------------ trajectories


@pytest.mark.parametrize("max_norm", [None, 0.3], ids=["", "clipped"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_trajectory_over_100_steps_is_the_loops(optimizer, loss, max_norm):
    step, twin = both(optimizer, loss, max_norm=max_norm)
    assert_same_training(step, twin, batches(100, loss), fused=NATIVE)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("loss", [CROSS_ENTROPY, LOSSES["mse"]], ids=["cross-entropy", "mse"])
def test_trajectory_on_every_device_and_backend(device, backend, loss):
    step, twin = both(ADAM, loss, net(torch.float32).to(device), max_norm=1.0)
    on_device = [(x.float().to(device), y.to(device)) for x, y in batches(5, loss)]
    if loss is LOSSES["mse"]:
        on_device = [(x, y.float()) for x, y in on_device]
    fused = (device.type, backend) == ("cpu", "native")
    # Adam makes steps of lr from a gradient that is rounding alone, that of a bias before a norm.
    assert_same_training(step, twin, on_device, fused=fused, rtol=1e-3, atol=0.06)


@pytest.mark.parametrize("hidden", [[8], [16, 24, 8], [8, 8, 8, 8]])
def test_network_of_any_depth(hidden):
    torch.manual_seed(0)
    step, twin = both(ADAM, CROSS_ENTROPY, FusedResearchNet(6, hidden, 4, dropout=0).double())
    assert_same_training(step, twin, batches(5), fused=NATIVE)


def test_large_batch_gives_the_same_bits_on_any_number_of_threads(all_threads):
    results = []
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        step, _ = both(ADAM, CROSS_ENTROPY, net(torch.float32, dropout=0.5), max_norm=0.1)
        losses = [step(*batch) for batch in batches(4, rows=3000, dtype=torch.float32)]
        results.append([*losses, *step.net.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_batches_of_changing_size_and_strides():
    step, twin = both(ADAM, LOSSES["mse"])
    varied = []
    for rows in (8, 2, 33, 8):
        x, y = batches(1, LOSSES["mse"], rows)[0]
        varied += [(x, y), (x.t().contiguous().t(), y.t().contiguous().t()), (x.flip(0), y)]
        varied += [(torch.cat([x, x], 1)[:, ::2], torch.cat([y, y], 1)[:, :4])]
    assert_same_training(step, twin, varied, fused=NATIVE)
    classes, twin = both(ADAM, CROSS_ENTROPY)
    strided = [(x, torch.stack([y, y], 1)[:, 0]) for x, y in batches(4)]
    assert_same_training(classes, twin, strided, fused=NATIVE)


# -------------------------------------------------------------------------- options and state


@pytest.mark.parametrize("optimizer", [ADAM, OPTIMIZERS["momentum"]], ids=["adam", "momentum"])
def test_dropout_draws_the_masks_of_the_loop(optimizer):
    step, twin = both(optimizer, CROSS_ENTROPY, net(dropout=0.4))
    assert_same_training(step, twin, batches(20), fused=NATIVE)  # compares the generator, too
    again = []
    for _ in range(2):
        torch.manual_seed(3)
        fresh = TrainStep(module := net(dropout=0.4), CROSS_ENTROPY, optimizer(module.parameters()))
        again.append([fresh(*batch) for batch in batches(5)])
    assert torch.equal(torch.stack(again[0]), torch.stack(again[1]))


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.research_layers[4].eval(),
        lambda n: n.eval(),
        lambda n: setattr(n.research_layers[4], "momentum", None),
        lambda n: setattr(n.research_layers[4], "momentum", 0.7),
        lambda n: setattr(n.research_layers[4], "track_running_stats", False),
        lambda n: setattr(n.research_layers[4], "eps", 0.1),
        lambda n: setattr(n.research_layers[5], "negative_slope", 0.5),
        lambda n: setattr(n.research_layers[2], "p", 0.5),
        lambda n: n.research_layers[2].eval(),
        lambda n: n.research_layers[0].requires_grad_(False),
        lambda n: n.research_layers[4].requires_grad_(False),
        lambda n: n.research_layers[6].requires_grad_(False),
    ],
)
def test_options_of_the_layers_count_at_the_next_step(change):
    step, twin = both(ADAM, CROSS_ENTROPY, net(dropout=0.2))
    assert_same_training(step, twin, batches(3), fused=NATIVE)
    change(step.net)
    change(twin[0])
    assert_same_training(step, twin, batches(5), fused=NATIVE)
    step.net.train().requires_grad_(True)
    twin[0].train().requires_grad_(True)
    assert_same_training(step, twin, batches(3), fused=NATIVE)


def test_batch_norm_without_parameters_or_statistics():
    layers = list(net().research_layers)
    layers[4] = nn.BatchNorm1d(8, affine=False, track_running_stats=False, dtype=torch.float64)
    step, twin = both(ADAM, CROSS_ENTROPY, FusedSequential(*layers))
    assert_same_training(step, twin, batches(5), fused=NATIVE)


def test_groups_of_parameters_have_options_of_their_own():
    def make(parameters):
        first, *rest = parameters
        return SGD(
            [
                {"params": [first], "lr": 0.1, "momentum": 0.5},
                {"params": rest[:4], "momentum": 0.9, "nesterov": True},
                {"params": rest[4:], "weight_decay": 0.1, "maximize": True},
            ],
            0.01,
        )

    step, twin = both(make, CROSS_ENTROPY)
    assert_same_training(step, twin, batches(10), fused=NATIVE)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    ],
    ids=["step", "one-cycle"],
)
@pytest.mark.parametrize("optimizer", [ADAM, OPTIMIZERS["nesterov"]], ids=["adam", "nesterov"])
def test_schedulers_change_options_between_steps(optimizer, schedule):
    step, twin = both(optimizer, CROSS_ENTROPY)
    schedulers = schedule(step.optimizer), schedule(twin[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a scheduler's step before the optimizer's
        for batch in batches(10):
            assert_same_training(step, twin, [batch])
            for scheduler in schedulers:
                scheduler.step()
    assert (step.ordinary_because == "") is NATIVE


def test_only_the_loop_marks_a_scheduler_when_no_step_was_taken():
    step, _ = both(SGD, CROSS_ENTROPY)
    lr_scheduler.StepLR(step.optimizer, 2)
    with pytest.raises(IndexError):
        step(batches(1)[0][0], torch.full((8,), 9))
    assert not getattr(step.optimizer, "_opt_called", False)


@pytest.mark.parametrize(
    "optimizer", [ADAM, OPTIMIZERS["amsgrad"], OPTIMIZERS["momentum"]], ids=["adam", "ams", "sgd"]
)
def test_checkpoints_pass_between_step_and_loop_in_training(optimizer):
    all_batches = batches(16)
    expected = net()
    loop_optimizer = optimizer(expected.parameters())
    for batch in all_batches:
        loop_step(expected, CROSS_ENTROPY, loop_optimizer, batch)

    module, state = net(), None
    for part in range(4):  # the loop, the step, the loop, the step; each begins from files
        saved = copy.deepcopy(module.state_dict())
        module = FusedResearchNet(6, [16, 8], 4, dropout=0.0, dtype=torch.float64)
        module.load_state_dict(saved)
        current = optimizer(module.parameters())
        if state is not None:
            current.load_state_dict(state)
        step = TrainStep(module, CROSS_ENTROPY, current)
        for batch in all_batches[4 * part : 4 * part + 4]:
            if part % 2:
                step(*batch)
                assert (step.ordinary_because == "") is NATIVE
            else:
                loop_step(module, CROSS_ENTROPY, current, batch)
        state = copy.deepcopy(current.state_dict())
    assert_same_state(module, current, expected, loop_optimizer)


@pytest.mark.parametrize(
    "disturb",
    [
        lambda n, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
        lambda n, o: o.state.clear(),
        lambda n, o: o.state.pop(n.research_layers[0].weight),
        lambda n, o: o.state[n.research_layers[0].bias].update(
            exp_avg=torch.ones(16, dtype=torch.float64)
        ),
        lambda n, o: n.load_state_dict(
            {k: v.clone() for k, v in net().state_dict().items()}, assign=True
        ),
        lambda n, o: setattr(
            n.research_layers[3].weight, "data", torch.full((8, 16), 0.1).double()
        ),
        lambda n, o: [p.add_(0.01) for p in n.research_layers[0]._parameters.values()],
        lambda n, o: n.double(),
        lambda n, o: o.param_groups[0].update(amsgrad=False, weight_decay=0.5),
    ],
)
def test_what_happens_to_tensors_between_steps_counts(disturb):
    step, twin = both(ADAM, CROSS_ENTROPY)
    assert_same_training(step, twin, batches(3), fused=NATIVE)
    with torch.no_grad():
        disturb(step.net, step.optimizer)
        disturb(*twin)
    for module, optimizer in ((step.net, step.optimizer), twin):
        if optimizer.param_groups[0]["params"][0] is not next(module.parameters()):  # assigned
            optimizer.state.clear()
            optimizer.param_groups[0]["params"] = list(module.parameters())
    assert_same_training(step, twin, batches(5), fused=NATIVE)


# --------------------------------------------------------------------- gradients and autograd


@pytest.mark.parametrize("max_norm", [None, 0.01])
def test_set_to_none_false_keeps_the_gradients_in_the_same_tensors(max_norm):
    step, twin = both(ADAM, CROSS_ENTROPY, set_to_none=False, max_norm=max_norm)
    assert_same_training(step, twin, batches(1))
    before = [p.grad for p in step.net.parameters()]
    step.net.research_layers[0].weight.grad.fill_(100.0)  # does not count
    assert_same_training(step, twin, batches(4), fused=NATIVE)
    for parameter, grad, other in zip(
        step.net.parameters(), before, twin[0].parameters(), strict=True
    ):
        assert parameter.grad is grad
        torch.testing.assert_close(grad, other.grad, rtol=1e-7, atol=1e-12)


def test_set_to_none_leaves_no_gradient_and_counts_none():
    step, twin = both(OPTIMIZERS["momentum"], CROSS_ENTROPY)
    for batch in batches(4):
        step.net.research_layers[0].weight.grad = torch.ones(16, 6, dtype=torch.float64)
        assert_same_training(step, twin, [batch])
        assert all(p.grad is None for p in step.net.parameters())
    assert (step.ordinary_because == "") is NATIVE


def test_versions_of_all_written_tensors_rise():
    step, _ = both(OPTIMIZERS["amsgrad"], CROSS_ENTROPY)
    step(*batches(1)[0])
    state = [t for entries in step.optimizer.state.values() for t in entries.values()]
    written = [*step.net.parameters(), *step.net.buffers(), *state]
    before = [t._version for t in written]
    output = step.net(batches(1)[0][0])
    step(*batches(1)[0])
    assert all(t._version > v for t, v in zip(written, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_copies_and_pickles_train_their_own_network():
    step, twin = both(ADAM, CROSS_ENTROPY)
    assert_same_training(step, twin, batches(3), fused=NATIVE)
    for other in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        theirs = copy.deepcopy(twin)
        assert_same_training(other, theirs, batches(3), fused=NATIVE)
    assert_same_state(step.net, step.optimizer, *twin)


def test_plan_is_freed_with_its_step():
    step, _ = both(ADAM, CROSS_ENTROPY)
    for batch in batches(3):
        step(*batch)
    weight = weakref.ref(step.net.research_layers[0].weight)
    del step
    gc.collect()
    assert weight() is None


@pytest.mark.skipif(not NATIVE, reason="the plan is the native backend's")
def test_copy_of_a_plans_handle_is_refused():
    step, _ = both(SGD, CROSS_ENTROPY)
    step(*batches(1)[0])
    run = torch.ops.fused_mlp_kernels.train_step
    for handle in (step._plan._handle.clone(), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="train_step_plan returned"):
            run(handle, *batches(1)[0], 0.1, None)


# -------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_of_any_logits_is_as_exact_as_torchs(dtype, scale):
    module = net(dtype)
    with torch.no_grad():
        module.research_layers[6].weight.mul_(scale)
    x, y = batches(1, rows=64, dtype=dtype)[0]
    output = copy.deepcopy(module)(x).detach()
    exact = nn.functional.cross_entropy(output.double(), y)
    error = abs(nn.functional.cross_entropy(output, y) - exact)
    step = TrainStep(module, CROSS_ENTROPY, SGD(module.parameters(), 0.0))
    assert abs(step(x, y) - exact) <= 2 * error + 4 * torch.finfo(dtype).eps * exact
    assert (step.ordinary_because == "") is NATIVE


def test_all_targets_ignored_gives_nan_as_in_torch():
    loss = nn.CrossEntropyLoss(ignore_index=-1)
    step, twin = both(SGD, loss)
    batch = (batches(1)[0][0], torch.full((8,), -1))
    assert_same_training(step, twin, [batch], fused=NATIVE, equal_nan=True, rtol=1e-9, atol=1e-12)


def test_infinite_gradient_spoils_all_parameters_when_clipped():
    step, twin = both(SGD, LOSSES["mse"], max_norm=1.0)
    x, y = batches(1, LOSSES["mse"])[0]
    y[0, 0] = float("inf")
    assert_same_training(step, twin, [(x, y)], fused=NATIVE, equal_nan=True, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("place", ["input", "target"])
def test_nested_tensor_after_plain_ones(place, layout):
    network = FusedResearchNet(10, [16, 8], 4)
    step = TrainStep(network, nn.MSELoss(), SGD(network.parameters(), 0.1))
    given = {"input": torch.randn(6, 10), "target": torch.randn(6, 4)}
    for _ in range(2):
        step(*given.values())
    given[place] = torch.nested.nested_tensor(list(given[place].split(3)), layout=layout)
    with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError)):
        step(*given.values())


def test_functions_of_torch_are_known_losses():
    for loss in (nn.functional.cross_entropy, nn.functional.mse_loss):
        step, twin = both(ADAM, loss)
        kind = nn.MSELoss() if loss is nn.functional.mse_loss else None
        assert_same_training(step, twin, batches(4, kind), fused=NATIVE)


def test_train_step_is_public():
    assert "TrainStep" in fused_mlp.__all__
