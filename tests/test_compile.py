"""torch.compile: whole graphs, any batch size, every mode, and training like the eager network."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from support.compiling import (
    SAVING_MEMORY,
    Compiled,
    gradients_kept_and_checkpointed,
    gradients_of_module_and_graph,
    gradients_with_vectors_written,
    kernels_of,
    penalty_gradients,
    save_matrix_products,
    save_nothing,
    steps_of_module_and_graph,
)
from support.drop_in import KINDS, drop_in, rows
from support.networks import assert_same_step
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fused_mlp import FusedResearchNet, use_backend
from fused_mlp.backends import active_backend

pytestmark = pytest.mark.usefixtures("target", "nothing_compiled")
kinds = pytest.mark.parametrize("kind", KINDS)
modes = pytest.mark.parametrize("mode", ["train", "eval"])


def pair_in(kind, mode, device, dropout=0.0):
    eager, fused = drop_in(kind, dropout, device=device)
    return eager.train(mode == "train"), fused.train(mode == "train")


@kinds
@modes
def test_no_graph_break(kind, mode, device):
    _, fused = pair_in(kind, mode, device)
    explained = torch._dynamo.explain(fused)(rows(device=device))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    calls = [str(op) for graph in explained.graphs for op in (n.target for n in graph.graph.nodes)]
    assert [c.split(".")[-1] for c in calls if c.startswith("fused_mlp")] == KINDS[kind]


@kinds
@modes
@pytest.mark.parametrize("dynamic", [None, True])
def test_batch_size_may_change_without_recompiling(kind, mode, device, dynamic):
    eager, fused = pair_in(kind, mode, device)
    counter = CompileCounterWithBackend("inductor" if dynamic is None else "aot_eager")
    compiled = Compiled(fused, backend=counter, dynamic=dynamic)
    frames = []
    for count in (16, 2, 33, 5, 128, 64):
        for net in (eager, fused):
            net.zero_grad()
        assert_same_step(eager, compiled, rows(count, device), rtol=1e-3, atol=1e-4)
        frames.append(counter.frame_count)
    assert len(set(frames if dynamic else frames[1:])) == 1, frames  # a second size settles it
    if mode == "eval":
        one = rows(1, device)
        torch.testing.assert_close(compiled(one), eager(one), rtol=1e-4, atol=1e-5)


def slow_for_a_lone_linear(kind):
    """With a lone Linear in it, max-autotune generates and times C++ for seconds."""
    return pytest.param(kind, marks=[pytest.mark.slow] if kind != "FusedResearchNet" else [])


@kinds
@modes
def test_reduce_overhead(kind, mode, device):
    check_mode(kind, mode, "reduce-overhead", device)


@pytest.mark.parametrize("kind", [*map(slow_for_a_lone_linear, KINDS)])
@modes
def test_max_autotune(kind, mode, device):
    check_mode(kind, mode, "max-autotune", device)


def check_mode(kind, mode, how, device):
    eager, fused = pair_in(kind, mode, device)
    compiled = Compiled(fused, mode=how)
    for _ in range(3):
        for net in (eager, fused):
            net.zero_grad()
        assert_same_step(eager, compiled, rows(device=device), rtol=1e-3, atol=1e-4)


@kinds
def test_compiled_training_follows_eager_training(kind, device):
    eager, fused = pair_in(kind, "train", device)
    for net in (eager, fused):
        net.double()
        step = torch.compile(net, fullgraph=True, backend="aot_eager") if net is fused else net
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for seed in range(5):
            optimizer.zero_grad()
            step(rows(device=device, seed=seed).double()).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(fused.state_dict(), eager.state_dict(), rtol=1e-7, atol=1e-9)


@kinds
def test_compiled_dropout_draws_the_masks_of_the_module(kind, device):
    _, fused = pair_in(kind, "train", device, dropout=0.5)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True)
    outputs = []
    for net in (fused, compiled):
        torch.manual_seed(11)
        outputs.append([net(rows(device=device)) for _ in range(3)])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(outputs[1][0], outputs[1][1])


@pytest.mark.parametrize("in_evaluation", [False, True])
def test_compiled_dropout_follows_the_module_through_a_whole_step(device, in_evaluation):
    """Also where the batch norm evaluates while dropout trains, as in fine-tuning."""
    _, fused = pair_in("FusedResearchNet", "train", device, dropout=0.5)
    fused.research_layers[-3].train(not in_evaluation)
    results = []
    for net in (copy.deepcopy(fused), torch.compile(copy.deepcopy(fused), fullgraph=True)):
        torch.manual_seed(11)
        x = rows(device=device).requires_grad_()
        net(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize(
    ("policy", "backend"),
    [(None, "aot_eager"), (save_nothing, "aot_eager"), (save_matrix_products, "aot_eager"),
     pytest.param(None, "inductor", marks=pytest.mark.slow)],
)  # fmt: skip
def test_checkpoint_inside_a_graph_repeats_the_dropout_mask(kind, policy, backend, device):
    _, fused = pair_in(kind, "train", device, dropout=0.5)
    kept, repeated = gradients_kept_and_checkpointed(fused, policy, backend, device)
    torch.testing.assert_close(repeated, kept)


@kinds
@pytest.mark.parametrize("option", SAVING_MEMORY, ids=str)
def test_a_partitioner_that_saves_memory_keeps_the_dropout_mask(kind, option, device):
    _, fused = pair_in(kind, "train", device, dropout=0.5)
    module, graph = gradients_of_module_and_graph(fused, option, device)
    torch.testing.assert_close(graph, module, rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_under_autocast_gives_eagers_dtypes(kind, dtype, device):
    eager, fused = pair_in(kind, "eval", device)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, dtype):
        output, expected = compiled(rows(device=device)), eager(rows(device=device))
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)


@kinds
def test_module_compiled_in_place_runs_the_fused_ops(kind, device):
    """``module.compile()`` replaces the call, not the object."""
    eager, fused = pair_in(kind, "train", device)
    fused.compile(fullgraph=True, backend="aot_eager")
    assert_same_step(eager, fused, rows(device=device), rtol=1e-3, atol=1e-4)
    kernels = kernels_of(fused, rows(device=device))
    assert [name.removesuffix("_compiled") for name in kernels] == KINDS[kind]


@kinds
def test_compiled_gradient_penalty_in_an_eager_backward_is_refused_as_for_eager(kind, device):
    """Double backward through a compiled graph is torch's own limit."""
    for net in pair_in(kind, "train", device):
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        x = rows(device=device).requires_grad_()
        (slope,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            slope.square().sum().backward()


@kinds
def test_a_graph_that_runs_eagerly_is_differentiated_twice(kind, device):
    eager, fused = pair_in(kind, "train", device)
    torch.testing.assert_close(penalty_gradients(fused, device), penalty_gradients(eager, device))


def test_other_children_compile_again(device):
    """What a run is depends on the classes of the children, which a graph guards on."""
    eager, fused = pair_in("FusedSequential", "train", device)
    compiled = Compiled(fused, backend="aot_eager")
    for make in (nn.ReLU, nn.Tanh, nn.Identity, lambda: nn.Dropout(0.0), nn.ReLU):
        for net in (eager, fused):
            net[1] = make()
            net.zero_grad()
        assert_same_step(eager, compiled, rows(device=device), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------- the CPU library's ops for graphs


def change(net, what):
    """Return the network with something of its batch norm, parameters or dtype changed."""
    *_, linear, norm, _, last = net.research_layers
    if what == "no affine":
        norm.weight = norm.bias = None
    elif what == "norm bias alone":
        norm.weight = None
    elif what == "no statistics":
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    elif what == "norm in evaluation":
        norm.eval()
    elif what == "frozen":
        linear.weight.requires_grad_(False)
        last.bias.requires_grad_(False)
        norm.weight.requires_grad_(False)
    elif what == "all frozen":
        net.requires_grad_(False)
    elif what != "nothing":
        net.to(getattr(torch, what))
    return net


CHANGES = ["nothing", "no affine", "norm bias alone", "no statistics", "norm in evaluation",
           "frozen", "all frozen", "float64", "bfloat16", "float16"]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "hidden", "backend"),
    [
        ("nothing", [16, 12], "inductor"),
        ("nothing", [12], "aot_eager"),
        ("nothing", [9, 40, 300, 12], "aot_eager"),
        *((what, [16, 12], "aot_eager") for what in CHANGES[1:]),
    ],
    ids=str,
)
def test_compiled_step_is_the_modules_step(what, hidden, backend, device):
    """Bit by bit where both run the kernels of one library: outputs, gradients, buffers, masks."""
    torch.manual_seed(0)
    fused = change(FusedResearchNet(10, hidden, 5, dropout=0.4, device=device), what)
    module, graph = steps_of_module_and_graph(fused, backend, device)
    exact = {"rtol": 0, "atol": 0} if active_backend(device.type) == "native" else {}
    torch.testing.assert_close(graph, module, **exact)


@pytest.mark.parametrize("hidden", [[16, 12], [12]])
def test_backward_of_a_graph_knows_the_vectors_of_its_forward(hidden, native):
    """Forward copies them, so that a change in between makes no difference."""
    found = gradients_with_vectors_written(FusedResearchNet(10, hidden, 5, dropout=0.4))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@modes
def test_graph_holds_the_librarys_own_op(mode, device, native):
    _, fused = pair_in("FusedResearchNet", mode, device, dropout=0.5)
    compiled = torch.compile(fused, fullgraph=True)
    with torch.set_grad_enabled(mode == "train"):
        compiled(rows())
        op = "research_net_compiled" + ("" if mode == "train" else "_evaluate")
        assert kernels_of(compiled, rows()) == [op]
        with use_backend("reference"):
            outputs = []
            for net in (compiled, fused):
                torch.manual_seed(0)
                outputs.append(net(rows()))
            torch.testing.assert_close(*outputs)  # compiled again


STEP = """
import torch
from torch import nn
from fused_mlp import FusedResearchNet, FusedSequential
torch.manual_seed(0)
net = {net}
step = torch.compile(net, fullgraph=True)
step(torch.randn(32, 10)).sum().backward()
print(next(net.parameters()).grad.sum().item())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "net",
    ["FusedResearchNet(10, [16, 8], 3, dropout=0.0)",
     "FusedSequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))"],
)  # fmt: skip
def test_caches_on_disk_know_what_a_graph_was_made_for(net, tmp_path, device):
    """What forward keeps for backward differs from backend to backend."""
    if (device.type, active_backend("cpu")) != ("cpu", "native"):
        pytest.skip("runs each backend of the CPU in processes of its own")
    found = []
    for backend in ("native", "reference", "native"):
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "FUSED_MLP_BACKEND": backend}
        done = subprocess.run(
            [sys.executable, "-c", STEP.format(net=net)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.append(float(done.stdout))
    assert found == pytest.approx(found[:1] * 3, rel=1e-4)
