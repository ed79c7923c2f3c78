"""What lives as long as a prepared network and what does not; threads that share one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from prepared_fixtures import assert_threads_see_a_whole_state, networks, ready, runs  # noqa: F401
from torch import nn

from fused_mlp import backends

pytestmark = pytest.mark.skipif(
    backends.active_backend("cpu") != "native", reason="only the CPU library prepares networks"
)


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
    assert_threads_see_a_whole_state(fused, fused.research_layers[5])
