"""A network made ready for its next call notices whatever changed since the last one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from prepared_fixtures import ready, runs  # noqa: F401
from support.networks import assert_same_step
from torch import nn
from torch.nn.utils import parametrize, prune

from fused_mlp import FusedResearchNet, backends
from fused_mlp.modules import snapshot

pytestmark = pytest.mark.skipif(
    backends.active_backend("cpu") != "native", reason="only the CPU library prepares networks"
)


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class _Squared(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).square()


def _replace_child(layers: nn.Sequential) -> None:
    layers[0] = copy.deepcopy(layers[0])
    with torch.no_grad():
        layers[0].weight.neg_()


def _swap_places(layers: nn.Sequential) -> None:
    """The same children under the same keys, in another order: a LeakyReLU before the norm."""
    children = list(layers._modules.items())
    children[4], children[5] = children[5], children[4]
    layers._modules.clear()
    layers._modules.update(children)


def _train_child(index: int) -> Callable[[nn.Sequential], None]:
    return lambda layers: layers[index].train(not layers[index].training) and None


def _set(index: int, name: str, value: object) -> Callable[[nn.Sequential], None]:
    return lambda layers: setattr(layers[index], name, value)


def _hook(kind: str, hook: Callable[..., object]) -> Callable[[nn.Sequential], None]:
    return lambda layers: getattr(layers[3], kind)(hook) and None


def _assign_hooks(layers: nn.Sequential) -> None:
    hooks = type(layers[1]._forward_hooks)()
    hooks[0] = lambda module, args, output: output * 0.5
    layers[1]._forward_hooks = hooks


def _override_forward(layers: nn.Sequential) -> None:
    layers[5].forward = lambda input: input


def _new_parameter(layers: nn.Sequential) -> None:
    layers[3].weight = nn.Parameter(torch.linspace(-1, 1, 128).reshape(8, 16))


def _new_buffer(layers: nn.Sequential) -> None:
    layers[4].running_mean = torch.full((8,), 0.25)


def _new_dictionaries(layers: nn.Sequential) -> None:
    """What ``torch.func.functional_call`` and copies of modules do, without a setattr."""
    layers[0].__dict__["_parameters"] = {
        name: nn.Parameter(-value.detach()) for name, value in layers[0]._parameters.items()
    }


def _new_class(layers: nn.Sequential) -> None:
    layers[0].__class__ = _Squared


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "child replaced": _replace_child,
    "children in another order": _swap_places,
    "batch norm's mode": _train_child(4),
    "eps": _set(4, "eps", 0.5),
    "momentum": _set(4, "momentum", 0.9),
    "no momentum": _set(4, "momentum", None),
    "statistics not tracked": _set(4, "track_running_stats", False),
    "slope": _set(5, "negative_slope", 0.5),
    "forward hook": _hook("register_forward_hook", lambda module, args, output: output * 2),
    "forward pre-hook": _hook("register_forward_pre_hook", lambda module, args: args[0] * 2),
    "backward hook": _hook(
        "register_full_backward_hook", lambda module, before, after: (before[0] * 2,)
    ),
    "hooks assigned": _assign_hooks,
    "forward overridden": _override_forward,
    "class": _new_class,
    "parametrization": lambda layers: parametrize.register_parametrization(
        layers[0], "weight", _Doubled()
    ),
    "pruning": lambda layers: prune.l1_unstructured(layers[0], "weight", 0.5),
    "parameter assigned": _new_parameter,
    "buffer assigned": _new_buffer,
    "parameters of another dictionary": _new_dictionaries,
    "frozen": lambda layers: layers[0].requires_grad_(False),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_to_the_modules_takes_effect_at_the_next_call(runs, change, training):
    eager, fused = ready(training, runs)
    for net in (eager, fused):
        change(net.research_layers)
    for _ in range(3):
        assert_same_step(eager, fused, torch.randn(6, 10, requires_grad=True))


def _in_place(write: Callable[[torch.Tensor], object]) -> Callable[[nn.Module], None]:
    def change(net: nn.Module) -> None:
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                with torch.no_grad():
                    write(tensor)

    return change


def _numpy(tensor: torch.Tensor) -> None:
    tensor.detach().numpy()[...] *= 1.5


def _storage(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.clone() * 1.5


def _optimize(net: nn.Module) -> None:
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    net.train()(torch.linspace(-1, 1, 60).reshape(6, 10)).square().mean().backward()
    optimizer.step()


def _load(net: nn.Module, assign: bool) -> None:
    state = {
        name: value * 1.5 if value.is_floating_point() else value.clone()
        for name, value in net.state_dict().items()
    }
    net.load_state_dict(state, assign=assign)


# Writes through .data, NumPy or another process leave no trace in a version counter.
VALUES: dict[str, Callable[[nn.Module], object]] = {
    "in place": _in_place(lambda tensor: tensor.mul_(1.5)),
    "in place through .data": _in_place(lambda tensor: tensor.data.mul_(1.5)),
    "in place through NumPy": _in_place(_numpy),
    "another storage": _in_place(_storage),
    "shared memory": lambda net: net.share_memory(),
    "optimizer": _optimize,
    "loaded": lambda net: _load(net, assign=False),
    "loaded by assignment": lambda net: _load(net, assign=True),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", VALUES.values(), ids=VALUES)
def test_new_values_of_parameters_and_buffers_are_used(runs, change, training):
    eager, fused = ready(training, runs)
    for net in (eager, fused):
        change(net)
        net.train(training)
    for _ in range(3):
        assert_same_step(eager, fused, torch.randn(6, 10))
    assert runs[-1]


@pytest.mark.parametrize("place", ["network", "layers"])
@pytest.mark.parametrize("change", ["hook", "forward", "compile"])
def test_changes_to_the_containers_take_effect(runs, place, change):
    _, fused = ready(False, runs)
    x = torch.randn(6, 10)
    expected = fused(x)
    container = fused if place == "network" else fused.research_layers
    if change == "hook":
        container.register_forward_hook(lambda module, args, output: output * 2)
    elif change == "forward":
        forward = container.forward
        container.forward = lambda input: 2 * forward(input)
    else:

        def doubling(graph, inputs):
            return lambda *args: tuple(2 * output for output in graph(*args))

        torch.compiler.reset()
        container.compile(backend=doubling)
    torch.testing.assert_close(fused(x), 2 * expected)


def test_subclass_with_a_forward_of_its_own_runs_it(runs):
    class Doubled(FusedResearchNet):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    plain = FusedResearchNet(10, [16, 8], 5).eval()
    net = Doubled(10, [16, 8], 5).eval()
    net.load_state_dict(plain.state_dict())
    x = torch.randn(6, 10)
    for _ in range(3):
        torch.testing.assert_close(net(x), 2 * plain(x))


@pytest.mark.parametrize("native", [True, False])
def test_snapshot_tells_every_kind_of_change(native):
    children = {"0": nn.Linear(2, 2), "1": nn.ReLU()}
    linear = children["0"]
    read = snapshot.take(children.values(), [(linear.__dict__, ("training",))])
    unchanged = (backends.native_watch() if native else snapshot.watch)(read)
    assert unchanged(children)
    assert not unchanged({**children, "2": nn.ReLU()})
    assert not unchanged({"0": linear})
    assert not unchanged({"1": children["1"], "0": linear})
    assert unchanged({"a": linear, "b": children["1"]}), "names do not matter"
    linear.training = False
    assert not unchanged(children)
    linear.training = True
    linear.forward = len
    assert not unchanged(children)
    del linear.forward
    handle = linear.register_forward_hook(print)
    assert not unchanged(children)
    handle.remove()
    linear.__class__ = _Squared
    assert not unchanged(children)
    linear.__class__ = nn.Linear
    assert unchanged(children)
    del linear.__dict__["training"]
    assert not unchanged(children)
    linear.training = True
    linear._forward_hooks = None
    assert not unchanged(children)
    linear._forward_hooks = {}
    container = nn.Sequential()
    assert unchanged(children, container.__dict__, linear.__dict__)
    container.register_full_backward_hook(print)
    assert unchanged(children)
    assert not unchanged(children, linear.__dict__, container.__dict__)
    assert not unchanged(children, {})
