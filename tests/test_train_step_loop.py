"""What TrainStep's kernels cannot take runs the ordinary loop, with its results and its errors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.networks import kernels_run, network_layers
from support.training import assert_same_state, assert_same_training, batches, both, loop_step, net
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fused_mlp
from fused_mlp import FusedSequential, TrainStep, backends, on_chip

NATIVE = backends.active_backend("cpu") == "native"
CROSS_ENTROPY = nn.CrossEntropyLoss()


def adam(parameters):
    return Adam(parameters, 1e-2)


class Traced(Adam):
    """A subclass, which may do anything."""


# ------------------------------------------------------------------------------- the loop runs


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda p: RMSprop(p, 1e-3), "RMSprop"),
        (lambda p: Traced(p, 1e-3), "Traced"),
        (lambda p: Adam(p, torch.tensor(1e-3)), "tensor"),
        (lambda p: SGD(p, torch.tensor(0.1), momentum=0.9), "tensor"),
        (lambda p: Adam(p, 1e-3, capturable=True, foreach=False), "capturable"),
        (lambda p: SGD(p, 0.1, differentiable=True), "differentiable"),
    ],
)
def test_other_optimizers_and_options(optimizer, reason):
    step, twin = both(optimizer, CROSS_ENTROPY)
    if reason in ("capturable", "differentiable"):  # torch itself refuses these here
        with pytest.raises((AssertionError, RuntimeError), match=r"capturable|leaf Variable"):
            step(*batches(1)[0])
    else:
        assert_same_training(step, twin, batches(4), fused=False)
    assert reason in step.ordinary_because or not NATIVE


def test_parameter_outside_the_optimizer_gathers_its_gradient_as_in_the_loop():
    step, twin = both(lambda p: SGD(list(p)[1:], 0.1), CROSS_ENTROPY)
    for batch in batches(3):
        step(*batch)
        twin[1].zero_grad()
        CROSS_ENTROPY(twin[0](batch[0]), batch[1]).backward()
        twin[1].step()
    assert_same_state(step.net, step.optimizer, *twin)
    torch.testing.assert_close(next(step.net.parameters()).grad, next(twin[0].parameters()).grad)
    assert "not in the optimizer" in step.ordinary_because or not NATIVE


@pytest.mark.parametrize("optimizer", [Adam, AdamW, SGD])
def test_foreach_and_fused_make_no_difference(optimizer):
    for flag in ({"foreach": True}, {"fused": True}):
        step, twin = both(lambda p, flag=flag: optimizer(p, 1e-2, **flag), CROSS_ENTROPY)
        assert_same_training(step, twin, batches(5), fused=NATIVE)


def _prior(output, target):
    return F.cross_entropy(output, target) + output.square().mean()


@pytest.mark.parametrize(
    "loss",
    [
        _prior,
        nn.NLLLoss(),
        nn.MultiMarginLoss(),
        lambda o, t: F.cross_entropy(o, t, reduction="sum"),
    ],
)
def test_any_callable_is_a_loss(loss):
    step, twin = both(adam, loss, max_norm=0.5)
    assert_same_training(step, twin, batches(4), fused=False)


def test_probabilities_as_targets():
    step, twin = both(adam, CROSS_ENTROPY)
    soft = [(x, F.one_hot(y, 4).double()) for x, y in batches(4)]
    assert_same_training(step, twin, soft, fused=False)
    assert_same_training(step, twin, batches(2), fused=NATIVE)


def test_broadcast_target_warns_as_torch_does():
    step, twin = both(adam, nn.MSELoss())
    x, y = batches(1, nn.MSELoss())[0]
    with pytest.warns(UserWarning, match="different to the input size"):
        assert_same_training(step, twin, [(x, y[:1])], fused=False)


@pytest.mark.parametrize(
    "hook",
    [
        lambda s: s.net.register_forward_hook(lambda m, i, o: o * 2),
        lambda s: s.net.research_layers.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
        lambda s: s.net.research_layers[3].register_forward_hook(lambda m, i, o: o + 1),
        lambda s: s.net.research_layers[0].register_full_backward_hook(lambda m, i, o: None),
        lambda s: s.net.research_layers[0].weight.register_hook(lambda g: g * 2),
        lambda s: s.net.research_layers[3].bias.register_post_accumulate_grad_hook(
            lambda p: (p.grad.mul_(3), None)[1]
        ),
        lambda s: s.optimizer.register_step_pre_hook(
            lambda o, a, k: [p.grad.mul_(2) for g in o.param_groups for p in g["params"]] and None
        ),
        lambda s: s.optimizer.register_step_post_hook(
            lambda o, a, k: [p.data.mul_(0.9) for g in o.param_groups for p in g["params"]] and None
        ),
        lambda s: register_optimizer_step_pre_hook(lambda o, a, k: None),
        lambda s: s.loss.register_forward_hook(lambda m, i, o: o * 2),
    ],
)
def test_hooks_are_honoured_from_the_next_step_until_removed(hook):
    step, twin = both(lambda p: SGD(p, 0.1, momentum=0.9), nn.CrossEntropyLoss())
    assert_same_training(step, twin, batches(3), fused=NATIVE)
    other = TrainStep(twin[0], step.loss, twin[1])
    handles = [hook(step)]
    if not step.loss._forward_hooks:  # both share the loss
        handles.append(hook(other))
    assert_same_training(step, twin, batches(3), fused=False)
    for handle in handles:
        handle.remove()
    assert_same_training(step, twin, batches(3), fused=NATIVE)


def test_replaced_methods_are_called():
    step, _ = both(adam, CROSS_ENTROPY)
    step(*batches(1)[0])
    step(*batches(1)[0])
    calls = []
    for name in ("step", "zero_grad"):
        method = getattr(step.optimizer, name)
        setattr(
            step.optimizer,
            name,
            lambda *a, method=method, name=name: (calls.append(name), method(*a))[1],
        )
    step(*batches(1)[0])
    assert calls == ["zero_grad", "step", "zero_grad"]


def test_parametrized_layer_and_shared_parameter():
    module = net()
    parametrizations.weight_norm(module.research_layers[3])
    step, twin = both(adam, CROSS_ENTROPY, module)
    assert_same_training(step, twin, batches(3), fused=False)

    layers = network_layers((6, 6, 6, 6), dtype=torch.float64)
    layers[3].weight = layers[0].weight
    step, twin = both(lambda p: SGD(p, 0.1), nn.MSELoss(), FusedSequential(*layers))
    inputs = [(torch.randn(8, 6).double(), torch.randn(8, 6).double()) for _ in range(3)]
    assert_same_training(step, twin, inputs, fused=False)


def test_dtypes_widths_and_inputs_without_a_fused_step():
    half, twin = both(adam, CROSS_ENTROPY, net(torch.bfloat16))
    assert_same_training(half, twin, batches(3, dtype=torch.bfloat16), fused=False, rtol=0, atol=0)
    wide = FusedSequential(*network_layers((6, 300, 8, 4), dtype=torch.float64))
    fits = on_chip.fits(batches(1)[0][0], [m.weight for m in wide if isinstance(m, nn.Linear)])
    step, twin = both(lambda p: SGD(p, 0.1), CROSS_ENTROPY, wide)
    assert_same_training(step, twin, batches(3), fused=fits and NATIVE)

    step, twin = both(adam, CROSS_ENTROPY)
    assert_same_training(step, twin, batches(3), fused=NATIVE)
    x, y = batches(1)[0]
    x.requires_grad_()
    step(x, y)
    assert x.grad is not None and step.ordinary_because
    with torch.autocast("cpu", torch.bfloat16):
        step(*batches(1)[0])
    assert step.ordinary_because
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        step(*batches(1)[0])
    assert step.ordinary_because
    assert kernels_run(step, *batches(1)[0]) == ["research_net", "research_net_backward"]


def test_batch_norm_that_may_share_its_statistics():
    step, twin = both(adam, CROSS_ENTROPY)
    assert_same_training(step, twin, batches(3), fused=NATIVE)
    fused_mlp.synchronize_batch_norm(step.net)
    assert_same_training(step, twin, batches(3), fused=False)


def test_backend_chosen_between_steps():
    step, twin = both(adam, CROSS_ENTROPY)
    assert_same_training(step, twin, batches(3), fused=NATIVE)
    with fused_mlp.use_backend("reference"):
        assert_same_training(step, twin, batches(3), fused=False)
    assert_same_training(step, twin, batches(3), fused=NATIVE)


# ------------------------------------------------------------------------------- whole modules


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*network_layers((6, 16, 8, 4), dtype=torch.float64))

    def forward(self, data):
        """Return what the layers return."""
        return self.layers(data)


class Named(Plain):
    def forward(self, data):
        output = self.layers(data)
        return output


class Doubled(Plain):
    def forward(self, data):
        return self.layers(data) * 2


class Other(Plain):
    def forward(self, data):
        return self.layers(self.shift)

    shift = torch.ones(8, 6, dtype=torch.float64)


class Called(Plain):
    def __call__(self, data):
        return super().__call__(data + 1)


@pytest.mark.parametrize(
    ("make", "whole"),
    [
        (Plain, True),
        (Named, True),
        (lambda: nn.Sequential(Plain()), True),
        (lambda: FusedSequential(nn.Sequential(net())), True),
        (Doubled, False),
        (Other, False),
        (Called, False),
        (lambda: nn.Sequential(net(), nn.Identity()), False),
        (lambda: nn.Sequential(*network_layers((6, 16, 8, 4)), nn.Tanh()).double(), False),
    ],
)
def test_modules_that_are_one_network_and_nothing_else(make, whole):
    torch.manual_seed(0)
    module = make()
    fused_mlp.fuse(module)
    step, twin = both(adam, CROSS_ENTROPY, module)
    assert_same_training(step, twin, batches(4), fused=whole and NATIVE)


def test_replaced_and_unfused_layers_count_at_the_next_step():
    module = Plain()
    fused_mlp.fuse(module)
    step, twin = both(adam, CROSS_ENTROPY, module)
    assert_same_training(step, twin, batches(3), fused=NATIVE)
    for owner in (module, twin[0]):
        owner.layers[5] = nn.Tanh()
    assert_same_training(step, twin, batches(3), fused=False)
    for owner in (module, twin[0]):
        owner.layers[5] = nn.LeakyReLU(0.2)
    assert_same_training(step, twin, batches(3), fused=NATIVE)
    fused_mlp.unfuse(module)
    assert_same_training(step, twin, batches(3), fused=False)


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (CROSS_ENTROPY, torch.tensor([0, 1, 2, 3, 4, 0, 0, 0])),
        (CROSS_ENTROPY, torch.tensor([0, 1, 2, 3, -1, 0, 0, 0])),
        (CROSS_ENTROPY, torch.zeros(7, dtype=torch.int64)),
        (CROSS_ENTROPY, torch.zeros(8, dtype=torch.int32)),
        (CROSS_ENTROPY, torch.zeros(8, 4, dtype=torch.int64)),
        (CROSS_ENTROPY, torch.zeros(8, 5, dtype=torch.float64)),
        (CROSS_ENTROPY, None),
        (nn.CrossEntropyLoss(torch.ones(3).double()), torch.zeros(8, dtype=torch.int64)),
        (nn.CrossEntropyLoss(torch.ones(4)), torch.zeros(8, dtype=torch.int64)),
        (nn.CrossEntropyLoss(label_smoothing=1.5), torch.zeros(8, dtype=torch.int64)),
        (nn.CrossEntropyLoss(reduction="none"), torch.zeros(8, dtype=torch.int64)),
        (nn.MSELoss(), torch.zeros(8, 3, dtype=torch.float64)),
        (nn.MSELoss(reduction="none"), torch.zeros(8, 4, dtype=torch.float64)),
        (nn.MSELoss(), "text"),
    ],
)
@pytest.mark.parametrize("earlier", [0, 3], ids=["first", "later"])
def test_wrong_target_raises_what_torch_raises_before_anything_is_written(loss, target, earlier):
    step, twin = both(adam, loss, net(dropout=0.3))
    step.loss = CROSS_ENTROPY
    assert_same_training(step, twin, batches(earlier))
    step.loss = loss
    eager = copy.deepcopy(twin[0])
    fused_mlp.unfuse(eager)
    x = batches(1)[0][0]
    with pytest.raises(Exception) as expected:
        loop_step(eager, loss, adam(eager.parameters()), (x, target))
    state = torch.get_rng_state()
    with pytest.raises(type(expected.value)) as found:
        step(x, target)
    assert str(found.value).splitlines()[0] == str(expected.value).splitlines()[0]
    assert torch.equal(state, torch.get_rng_state())
    assert_same_state(step.net, step.optimizer, *twin, rtol=1e-7, atol=1e-9)


def test_wrong_input_raises_what_the_loop_raises():
    step, _ = both(adam, CROSS_ENTROPY)
    for batch in batches(3):
        step(*batch)
    _, y = batches(1)[0]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        step(torch.randn(8, 5).double(), y)
    with pytest.raises(RuntimeError, match="dtype"):
        step(torch.randn(8, 6), y)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        step(torch.randn(1, 6).double(), y[:1])
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        step(*batches(1)[0])


def test_failing_loss_leaves_parameters_optimizer_and_gradients():
    def failing(output, target):
        raise OSError("disk full")

    step, twin = both(adam, CROSS_ENTROPY)
    assert_same_training(step, twin, batches(3))
    step.loss = failing
    grad = step.net.research_layers[0].weight.grad = torch.ones(16, 6).double()
    before = copy.deepcopy((dict(step.net.named_parameters()), step.optimizer.state_dict()))
    with pytest.raises(OSError, match="disk full"):
        step(*batches(1)[0])
    assert all(torch.equal(p, before[0][n]) for n, p in step.net.named_parameters())
    assert str(step.optimizer.state_dict()) == str(before[1])
    assert step.net.research_layers[0].weight.grad is grad


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        (("net", CROSS_ENTROPY, None), {}, "net"),
        ((net(), "loss", None), {}, "loss"),
        ((net(), CROSS_ENTROPY, "adam"), {}, "optimizer"),
        ((net(), CROSS_ENTROPY, SGD(net().parameters())), {"max_norm": "1"}, "max_norm"),
    ],
)
def test_constructor_names_the_argument_that_is_wrong(arguments, options, name):
    with pytest.raises(TypeError, match=f"^{name} must be"):
        TrainStep(*arguments, **options)
