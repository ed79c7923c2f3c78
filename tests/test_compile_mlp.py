"""Chains of Linear layers under torch.compile: one op of the graph, and what it must not change."""

from __future__ import annotations

import copy

import pytest
import torch
from mlp_fixtures import (
    CHAINS,
    chains,
    layers,
    make_chain,
    norm_layers,
    steep,
    tanh_last,
    with_network,
)
from support import MULTIPLIES_BFLOAT16
from support.compiling import (
    SAVING_MEMORY,
    Compiled,
    gradients_kept_and_checkpointed,
    gradients_of_module_and_graph,
    gradients_with_vectors_written,
    penalty_gradients,
    save_matrix_products,
    save_nothing,
    steps_of_module_and_graph,
)
from support.drop_in import rows
from support.networks import assert_same_step, pair
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fused_mlp import FusedSequential
from fused_mlp.backends import active_backend

pytestmark = pytest.mark.usefixtures("target", "nothing_compiled")
modes = pytest.mark.parametrize("mode", ["train", "eval"])


def runs_native(device) -> bool:
    return (device.type, active_backend("cpu")) == ("cpu", "native")


@chains
@modes
def test_no_graph_break_and_one_op(make, mode, device):
    fused = make_chain(make, device).train(mode == "train")
    explained = torch._dynamo.explain(fused)(rows(device=device))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    calls = [str(n.target) for graph in explained.graphs for n in graph.graph.nodes]
    assert ([c for c in calls if c.startswith("fused_mlp")] == ["fused_mlp.mlp"]) == runs_native(
        device
    )


@pytest.mark.parametrize(
    ("make", "dynamic"),
    [(norm_layers, None), *((make, True) for make in CHAINS),
     *(pytest.param(make, None, marks=pytest.mark.slow) for make in CHAINS if make != norm_layers)],
)  # fmt: skip
@modes
def test_steps_are_those_of_the_eager_network(make, mode, dynamic, device):
    """Outputs, gradients and running statistics, at any batch size after one more compilation."""
    torch.manual_seed(0)
    eager, fused = (net.to(device).train(mode == "train") for net in pair(make()))
    counter = CompileCounterWithBackend("inductor" if dynamic is None else "aot_eager")
    compiled = Compiled(fused, backend=counter, dynamic=dynamic)
    frames = []
    for count in (16, 2, 33, 5, 128):
        for net in (eager, fused):
            net.zero_grad()
        x = rows(count, device).requires_grad_()
        assert_same_step(eager, compiled, x, rtol=1e-3, atol=1e-4)
        frames.append(counter.frame_count)
    assert len(set(frames if dynamic else frames[1:])) == 1, frames
    if mode == "eval":
        assert_same_step(eager, compiled, rows(1, device).requires_grad_(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(10,), (2, 3, 10), (0, 10), (300, 10)])
def test_inputs_of_other_dimensions(shape, device):
    eager, fused = pair(layers())
    x = torch.randn(shape, requires_grad=True)
    assert_same_step(eager, Compiled(fused, backend="aot_eager"), x, rtol=1e-3, atol=1e-4)


def change(net, what):
    """Return the network with something of its parameters, norms or dtype changed."""
    norms = [module for module in net if isinstance(module, nn.BatchNorm1d)]
    if what == "norms in evaluation":
        for norm in norms:
            norm.eval()
    elif what == "a norm in evaluation":
        norms[0].eval()
    elif what == "no statistics":
        norms[0].track_running_stats = False
        norms[0].running_mean = norms[0].running_var = norms[0].num_batches_tracked = None
    elif what == "norm bias alone":
        norms[0].weight = None
    elif what == "frozen":
        for place, parameter in enumerate(net.parameters()):
            parameter.requires_grad_(place % 3 == 1)
    elif what == "all frozen":
        net.requires_grad_(False)
    elif what != "nothing":
        net.to(getattr(torch, what))
    return net


CHANGES = ["norms in evaluation", "a norm in evaluation", "no statistics", "norm bias alone",
           "frozen", "all frozen", "float64", "bfloat16", "float16"]  # fmt: skip
WHOLE = {"nothing", "norms in evaluation", "a norm in evaluation", "frozen", "all frozen",
         "float64", *(["bfloat16"] if MULTIPLIES_BFLOAT16 else [])}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "what", "backend"),
    [
        (norm_layers, "nothing", "inductor"),
        (tanh_last, "nothing", "inductor"),
        *((make, "nothing", "aot_eager") for make in (layers, with_network, steep)),
        *((norm_layers, what, "aot_eager") for what in CHANGES),
        *((tanh_last, what, "aot_eager") for what in CHANGES[4:]),
    ],
)
def test_compiled_step_is_the_modules_step(make, what, backend, device):
    """Bit by bit where one op runs in both: outputs, gradients, buffers, masks."""
    fused = change(make_chain(make, device, dropout=0.4), what)
    module, graph = steps_of_module_and_graph(fused, backend, device)
    if runs_native(device) and what in WHOLE:
        torch.testing.assert_close(graph, module, rtol=0, atol=0)
    elif module[-1].dtype == torch.float32:  # op by op, in half precision with other roundings
        torch.testing.assert_close(graph[-1], module[-1])


@chains
def test_the_seed_of_op_by_op_is_that_of_one_op(make, device):
    """Where a graph may repeat a call in backward, its layers have ops of their own."""
    results = []
    for option in ({}, {"activation_memory_budget": 0.5}):
        fused = make_chain(make, device, dropout=0.5)
        torch.manual_seed(11)
        with torch._functorch.config.patch(option):
            step = Compiled(fused, backend="aot_eager")
            step(rows(device=device)).square().sum().backward()
        results.append([p.grad for p in fused.parameters()])
        torch.compiler.reset()
    if runs_native(device):
        torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "count", "dtype"), [(layers, 1, torch.float16), (tanh_last, 40, torch.bfloat16)]
)
def test_a_chain_that_no_op_takes_whole_draws_a_seed_a_layer(make, count, dtype, device):
    """Half precision, and more layers than the library has room for: as the module does."""
    torch.manual_seed(0)
    hidden = [nn.Linear(10, 10) for _ in range(count - 1)]
    fused = FusedSequential(*hidden, *make(0.5)).to(device, dtype)
    outputs = []
    for net in (fused, torch.compile(fused, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(11)
        outputs.append(net(rows(device=device).to(dtype)))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.05, atol=0.05)


@chains
@pytest.mark.parametrize("policy", [None, save_nothing, save_matrix_products])
def test_checkpoint_inside_a_graph_repeats_the_dropout_mask(make, policy, device):
    fused = make_chain(make, device, dropout=0.5)
    kept, repeated = gradients_kept_and_checkpointed(fused, policy, "aot_eager", device)
    if runs_native(device):  # elsewhere every layer draws its own seed
        torch.testing.assert_close(repeated, kept, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("option", SAVING_MEMORY, ids=str)
def test_a_partitioner_that_saves_memory_keeps_the_dropout_mask(option, device, native):
    fused = make_chain(norm_layers, device, dropout=0.5)
    module, graph = gradients_of_module_and_graph(fused, option, device)
    torch.testing.assert_close(graph, module, rtol=1e-3, atol=1e-4)


def masking(p: float, norm: bool) -> FusedSequential:
    """Return a chain of which every element of the output is a mask's, scaled, times the input's.

    A batch norm in it leaves what it sees as it is.
    """
    net = [nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False), nn.Dropout(p)]
    for linear in net[:2]:
        linear.weight.data = torch.eye(40)
    if norm:
        net.insert(2, nn.BatchNorm1d(40, eps=1e-30).eval())
    return FusedSequential(*net)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("p", [0.2, 0.5, 1.0])
def test_masks_have_their_probability_and_backward_has_forwards(p, norm, device):
    compiled = torch.compile(masking(p, norm).to(device), fullgraph=True, backend="aot_eager")
    x = torch.ones(400, 40, device=device, requires_grad=True)
    output = compiled(x)
    output.sum().backward()
    torch.testing.assert_close(x.grad, output.detach())
    dropped = (output == 0).float().mean().item()
    assert dropped == pytest.approx(p, abs=0.02)
    if p < 1:
        torch.testing.assert_close(output.max(), torch.tensor(1 / (1 - p), device=device))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_equal_calls_of_one_graph_draw_masks_of_their_own(grad, backend, device):
    """Without a batch norm nothing else tells two calls apart."""
    net = masking(0.5, norm=False).to(device)

    def twice(x):
        return net(x), net(x)

    x = torch.ones(50, 40, device=device, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        first, second = torch.compile(twice, fullgraph=True, backend=backend)(x)
    assert not torch.equal(first, second)
    if grad:
        (first * 3 + second).sum().backward()
        torch.testing.assert_close(x.grad, (3 * first + second).detach())


@chains
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_moves_the_running_statistics(make, grad_mode, device):
    torch.manual_seed(0)
    eager, fused = (net.to(device) for net in pair(make()))
    compiled = Compiled(fused, backend="aot_eager")
    with grad_mode():
        for count in (16, 5):
            assert_same_step(eager, compiled, rows(count, device), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(eager.named_buffers()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_calls_before_backward(backend, device):
    torch.manual_seed(0)
    eager, fused = (net.to(device) for net in pair(norm_layers()))
    compiled = Compiled(fused, backend=backend)
    outputs = []
    for net in (eager, compiled):
        first, second = (net(rows(count, device, seed=count)) for count in (16, 16))
        (first.square().sum() + second.sum()).backward()
        outputs.append([first, second])
    torch.testing.assert_close(*outputs)
    for ours, theirs in zip(fused.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(eager.named_buffers()))


@chains
def test_vectors_may_be_written_between_forward_and_backward(make, native):
    """No gradient depends on a bias, and forward copies what it needs of a batch norm."""
    found = gradients_with_vectors_written(make_chain(make, "cpu", dropout=0.4))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_weight_written_between_forward_and_backward_is_an_error(device):
    net = make_chain(layers, device)
    loss = torch.compile(net, fullgraph=True, backend="aot_eager")(rows(device=device)).sum()
    with torch.no_grad():
        net[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_that_runs_eagerly_is_differentiated_twice(device):
    torch.manual_seed(0)
    eager, fused = (net.to(device) for net in pair(norm_layers()))
    torch.testing.assert_close(penalty_gradients(fused, device), penalty_gradients(eager, device))


def test_modules_that_stand_twice_in_a_chain(device):
    """The second call of a batch norm sees the statistics that the first one left."""
    torch.manual_seed(0)
    linear, norm = nn.Linear(10, 10), nn.BatchNorm1d(10)
    eager = nn.Sequential(linear, norm, nn.ReLU(), linear, norm, linear, nn.Tanh()).to(device)
    compiled = Compiled(FusedSequential(*copy.deepcopy(eager)), backend="aot_eager")
    for _ in range(2):
        assert_same_step(eager, compiled, rows(device=device).requires_grad_())


@pytest.mark.parametrize("dynamic", [None, True])
def test_parameters_given_to_a_functional_call(dynamic, device):
    eager, fused = (net.to(device) for net in pair(norm_layers()))
    given = {name: p.detach() * 1.5 for name, p in eager.named_parameters()}

    def call(net, given, x):
        return torch.func.functional_call(net, given, (x,))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for net, function in ((eager, call), (fused, compiled)):
        leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
        output = function(net, leaves, rows(device=device))
        output.square().sum().backward()
        results.append([output, *(t.grad for t in leaves.values())])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
