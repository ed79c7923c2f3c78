"""PyTorch's own tools over fused networks: autocast, transforms, subclasses, compile."""

from __future__ import annotations

import copy

import pytest
import torch
from support.networks import kernels_run, networks, pair
from torch import nn

pytestmark = pytest.mark.usefixtures("target")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_eagers_dtypes_and_values(device, dtype):
    eager, fused = networks(device)
    x = torch.randn(16, 10, device=device)
    fused(x)
    eager(x)
    with torch.autocast(device.type, dtype):
        output, expected = fused(x), eager(x)
    assert output.dtype == expected.dtype == dtype
    torch.testing.assert_close(output, expected)


def test_functorch_transforms_agree_with_eager(device):
    eager, fused = networks(device)
    eager.eval()
    fused.eval()
    x = torch.randn(6, 10, device=device)
    fused(x)
    parameters = dict(eager.named_parameters())

    def loss(module, parameters, x):
        return torch.func.functional_call(module, parameters, (x[None],)).square().sum()

    for transform in (
        lambda module: torch.func.vmap(lambda row: module(row[None]))(x),
        lambda module: torch.func.jacrev(module)(x),
        lambda module: torch.func.jvp(module, (x,), (torch.ones_like(x),))[1],
        lambda module: torch.func.vmap(
            torch.func.grad(lambda p, row: loss(module, p, row)), (None, 0)
        )(parameters, x)["research_layers.0.weight"],
    ):
        torch.testing.assert_close(transform(fused), transform(eager), rtol=1e-4, atol=1e-5)


def test_forward_mode_ad_agrees_with_eager(device):
    eager, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    tangents = []
    fused(x)
    eager(x)
    for net in (eager, fused):
        with torch.autograd.forward_ad.dual_level():
            output = net(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            tangents.append(torch.autograd.forward_ad.unpack_dual(output).tangent)
    torch.testing.assert_close(tangents[1], tangents[0], rtol=1e-4, atol=1e-5)


def test_functional_call_with_other_parameters(device):
    eager, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    other = {name: p.detach() * 1.5 for name, p in eager.named_parameters()}
    expected = torch.func.functional_call(eager, other, (x,))
    torch.testing.assert_close(
        torch.func.functional_call(fused, other, (x,)), expected, rtol=1e-4, atol=1e-4
    )


class Tagged(torch.Tensor):
    pass


def test_tensor_subclass_comes_out_as_eager_gives_it(device):
    eager, fused = networks(device)
    x = torch.randn(6, 10, device=device).as_subclass(Tagged)
    output = fused(x)
    assert type(output) is Tagged
    torch.testing.assert_close(output, eager(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_may_alternate(device, mode):
    eager, fused = networks(device)
    for net in (eager, fused):
        net.eval()
    x = torch.randn(6, 10, device=device)
    for _ in range(2):
        with mode():
            made_inside = x * 2
            for value in (x, made_inside):
                output = fused(value)
                assert output.requires_grad == eager(value).requires_grad
                torch.testing.assert_close(output, eager(value), rtol=1e-4, atol=1e-5)
        assert fused(x).requires_grad
        assert kernels_run(fused, x) == ["research_net"]


@pytest.mark.parametrize(
    ("training", "shape"), [(True, (16, 10)), (False, (16, 10)), (False, (1, 10))]
)
def test_fullgraph_compile_agrees_with_uncompiled(device, training, shape):
    _, fused = networks(device)
    plain = copy.deepcopy(fused)
    fused.train(training)
    plain.train(training)
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        _compare_compiled(plain, fused, compiled, shape, device)


def _compare_compiled(plain, fused, compiled, shape, device):
    x = torch.randn(shape, device=device)
    plain.zero_grad()
    fused.zero_grad()
    expected, output = plain(x), compiled(x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    output.square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            fused.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-4
        )
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer)


def test_compiled_graph_holds_the_whole_network_as_one_op(device):
    _, fused = networks(device, dropout=0.3)
    targets = []

    def backend(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compiler.reset()
    torch.compile(fused, fullgraph=True, backend=backend)(torch.randn(8, 10, device=device))
    assert targets.count(torch.ops.fused_mlp.research_net) == 1
    assert len(targets) < 4, targets


def test_compiled_mixture_follows_changed_options(device):
    eager, fused = pair(
        [nn.Linear(6, 8), nn.ReLU(), nn.GELU(), nn.BatchNorm1d(8), nn.LeakyReLU(), nn.Linear(8, 2)]
    )
    eager.to(device)
    fused.to(device)
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 6, device=device)
    torch.testing.assert_close(compiled(x), eager(x))
    for net in (eager, fused):
        net[4].negative_slope = 0.5
        net[3].eval()
    torch.testing.assert_close(compiled(x), eager(x))
    fused[1].register_forward_hook(lambda module, args, output: output * 0)
    torch.compiler.reset()  # torch.compile looks for hooks when it compiles, and never again
    torch.testing.assert_close(compiled(x), fused(x))
