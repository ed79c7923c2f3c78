"""A network made ready for its next call notices whatever changed since the last one."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from support.networks import assert_same_step, kernels_run, network_layers
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

import fused_mlp
from fused_mlp import FusedResearchNet, FusedSequential, backends
from fused_mlp.dropout import draw_seed, keep_mask
from fused_mlp.eager import IntelligentResearchNetwork
from fused_mlp.modules import snapshot
from fused_mlp.modules.prepared import PreparedNet

pytestmark = pytest.mark.skipif(
    backends.active_backend("cpu") != "native", reason="only the CPU library prepares networks"
)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call so far ran as prepared."""
    taken: list[bool] = []
    run = PreparedNet.run

    def noted(self, *arguments):
        output = run(self, *arguments)
        taken.append(output is not None)
        return output

    monkeypatch.setattr(PreparedNet, "run", noted)
    return taken


def networks(dropout: float = 0.0) -> tuple[nn.Module, FusedResearchNet]:
    eager = IntelligentResearchNetwork(10, [16, 8], 5, dropout=dropout)
    fused = FusedResearchNet(10, [16, 8], 5, dropout=dropout)
    fused.load_state_dict(eager.state_dict())
    return eager, fused


def ready(training: bool, runs: list[bool]) -> tuple[nn.Module, FusedResearchNet]:
    """Return both networks after calls that left the fused one prepared in both modes."""
    eager, fused = networks()
    for mode in (not training, training):
        for net in (eager, fused):
            net.train(mode)
        for _ in range(2):
            assert_same_step(eager, fused, torch.randn(6, 10))
    assert runs == [True, True], "the second call in a mode runs as prepared"
    runs.clear()
    return eager, fused


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
    x = torch.randn(6, 10)
    assert kernels_run(fused, x) == ["research_net"]
    assert not any(runs)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), eager(x))
        assert fused(x).dtype == torch.bfloat16
    mapped = torch.vmap(fused)(x[None])
    torch.testing.assert_close(mapped[0], eager(x), rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(fused, (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(eager, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)
    assert not any(runs)
    fused(x)
    assert runs[-1]


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
    x = torch.randn(6, 10)
    expected = fused(x)
    with fused_mlp.use_backend("reference"):
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
        assert not runs[-1]
    fused(x)
    fused(x)
    assert runs[-1]


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


def test_old_parameters_and_the_network_are_freed(runs):
    _, fused = ready(False, runs)
    x = torch.randn(6, 10)
    old = weakref.ref(fused.research_layers[0].weight)
    fused.research_layers[0].weight = nn.Parameter(torch.zeros(16, 10))
    for _ in range(2):
        fused(x)
    gc.collect()
    assert old() is None
    rest = weakref.ref(fused.research_layers[3].weight)
    del fused
    assert rest() is None, "nothing refers to the network in a circle"


def test_graph_outlives_its_network(runs):
    eager, fused = ready(True, runs)
    x = torch.randn(6, 10, requires_grad=True)
    expected = torch.autograd.grad(eager(x).square().sum(), x)[0]
    fused(x)
    output = fused(x)
    assert runs[-1]
    fused = None
    gc.collect()
    found = torch.autograd.grad(output.square().sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_handle_is_not_taken_from_a_copy():
    ops = torch.ops.fused_mlp_kernels
    _, fused = networks()
    layers = fused.research_layers
    handle = ops.research_net_prepare(
        [layers[i].weight for i in (0, 3, 6)], [layers[i].bias for i in (0, 3, 6)],
        layers[4].weight, layers[4].bias, layers[4].running_mean, layers[4].running_var, None,
        False, [0.0], 0.1, 1e-5, 0.01,
    )  # fmt: skip
    x = torch.randn(6, 10)
    torch.testing.assert_close(
        ops.research_net_evaluate(x, handle), fused.eval()(x), rtol=1e-4, atol=1e-5
    )
    for wrong in (handle.clone(), torch.zeros_like(handle), handle[:-1], x):
        with pytest.raises(RuntimeError, match="research_net_prepare"):
            ops.research_net_evaluate(x, wrong)


def test_threads_that_call_and_change_one_network_see_a_whole_state():
    _, fused = networks()
    fused.eval()
    x = torch.randn(6, 10)
    layers = fused.research_layers
    outputs = []
    for slope in (0.1, 0.9):
        layers[5].negative_slope = slope
        outputs.append(fused(x).detach())
    wrong = []
    stop = threading.Event()

    def call():
        while not stop.is_set():
            output = fused(x).detach()
            if not any(torch.allclose(output, known, atol=1e-5) for known in outputs):
                wrong.append(output)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(300):
        layers[5].negative_slope = (0.1, 0.9)[i % 2]
        fused(x)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


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
