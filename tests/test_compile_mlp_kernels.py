"""Which kernels the graph of a chain of Linear layers runs, and what it keeps for backward."""

from __future__ import annotations

import pytest
import torch
from mlp_fixtures import chains, layers, make_chain, norm_layers
from support.compiling import Compiled, kernels_of
from support.drop_in import rows
from support.networks import assert_same_step, pair
from torch import nn

from fused_mlp import FusedResearchNet, FusedSequential, use_backend
from fused_mlp.ops.compiled_mlp import MLPCompiledFunction

pytestmark = pytest.mark.usefixtures("target", "nothing_compiled")
modes = pytest.mark.parametrize("mode", ["train", "eval"])


@modes
@chains
def test_graph_holds_the_librarys_own_op(mode, make, native):
    fused = make_chain(make, "cpu", dropout=0.5).train(mode == "train")
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode == "train"):
        compiled(rows())
        op = "mlp_compiled" + ("" if mode == "train" else "_evaluate")
        assert kernels_of(compiled, rows()) == [op]
        with use_backend("reference"):
            x = rows()
            if mode == "eval":
                torch.testing.assert_close(compiled(x), fused(x))  # compiled again
            assert not [k for k in kernels_of(compiled, x) if k.startswith("mlp")]


@pytest.mark.parametrize(
    ("make", "training", "kernels"),
    [
        (lambda: [nn.Linear(10, 6), nn.Tanh()], True, ["linear_act"]),
        (lambda: [nn.Linear(10, 6), nn.ReLU()], True, ["linear_relu"]),
        (lambda: [nn.Linear(10, 6), nn.BatchNorm1d(6), nn.ReLU()], True, ["mlp_compiled"]),
        (
            lambda: [nn.Linear(10, 6), nn.BatchNorm1d(6), nn.ReLU()],
            False,
            ["linear_batch_norm_act"],
        ),
    ],
)
def test_single_layers_have_the_op_that_is_the_fastest(make, training, kernels, native):
    net = FusedSequential(*make()).train(training)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        compiled(rows())
        assert kernels_of(compiled, rows()) == kernels


def test_a_hook_on_a_child_runs(native):
    net = make_chain(layers, "cpu")
    seen = []
    net[1].register_forward_hook(lambda module, given, output: seen.append(output.shape))
    compiled = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(compiled(rows()), net(rows()))
    assert len(seen) == 2
    assert "mlp_compiled" not in kernels_of(compiled, rows())


def test_autocast_and_export_have_what_they_had(native):
    net = make_chain(norm_layers, "cpu").eval()
    exported = torch.export.export(net, (rows(),)).graph_module.graph.nodes
    ops = [str(n.target) for n in exported if str(n.target).startswith("fused_mlp")]
    assert ops == [
        "fused_mlp.linear_batch_norm_act.default", "fused_mlp.linear_act.default",
        "fused_mlp.linear_batch_norm_act.default",
    ]  # fmt: skip
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        output, expected = compiled(rows()), nn.Sequential(*net)(rows())
        assert output.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
        assert kernels_of(compiled, rows()) == []


def test_backward_takes_neither_biases_nor_vectors_of_batch_norms(native):
    """A graph that keeps a tensor for backward pays a microsecond a step for it."""
    kept = []
    save = MLPCompiledFunction.forward

    def forward(ctx, *arguments):
        output = save(ctx, *arguments)
        kept.append([t for t in ctx.to_save if t is not None])
        return output

    net = make_chain(norm_layers, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MLPCompiledFunction, "forward", staticmethod(forward))
        Compiled(net, backend="aot_eager")(rows())
    assert [t.dim() for t in kept[-1]] == [2] * 5 + [1]  # input, weights, saved


def test_gradients_of_more_layers_than_a_number_has_bits_for(native):
    for count, kernels in ((30, ["mlp_compiled"]), (31, ["linear_act"] * 31)):
        eager, fused = pair([m for _ in range(count) for m in (nn.Linear(10, 10), nn.SiLU())])
        compiled = Compiled(fused, backend="aot_eager")
        assert_same_step(eager, compiled, rows())
        assert kernels_of(compiled, rows()) == kernels


@pytest.mark.parametrize("slope", [float("inf"), float("nan")])
def test_options_that_no_text_can_hold_run_layer_by_layer(slope, native):
    chain = [nn.Linear(10, 6), nn.LeakyReLU(slope), nn.Linear(6, 3)]
    network = FusedResearchNet(10, [8, 6], 3, negative_slope=slope)
    for fused in (FusedSequential(*chain).eval(), network.eval()):
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(rows()), fused(rows()), equal_nan=True)
            assert not [k for k in kernels_of(compiled, rows()) if "compiled" in k]
