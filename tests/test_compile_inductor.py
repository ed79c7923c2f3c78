"""The code that Inductor writes around the raw kernels."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from mlp_fixtures import make_chain, norm_layers
from support.drop_in import rows
from torch import Tensor, nn
from torch._inductor import lowering
from torch._inductor.utils import run_and_get_code

from bench.compile_cost import as_any_op, lowered_anew
from fused_mlp import FusedResearchNet
from fused_mlp.ops import inductor

pytestmark = pytest.mark.usefixtures("target", "nothing_compiled")


class Mixed(nn.Module):
    """Ops of single layers between torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 6)

    def forward(self, input: Tensor) -> Tensor:
        hidden = torch.ops.fused_mlp.normalize(input.t().contiguous().t() * 2)
        hidden = torch.ops.fused_mlp.linear_relu(hidden, self.linear.weight, self.linear.bias)
        return hidden.sin()


NETS: dict[str, Callable[[], nn.Module]] = {
    "network": lambda: FusedResearchNet(10, [16, 12], 5, dropout=0.4),
    "chain": lambda: make_chain(norm_layers, "cpu", dropout=0.4),
    "single ops": Mixed,
}
RESULT = re.compile(r"assert_size_stride\(buf.*fused_mlp_kernels")
CALL = re.compile(r"= torch\.ops\.fused_mlp_kernels\.\w+\.default(\._op)?\(")


def compiled_step(net: nn.Module, training: bool, **options: Any) -> tuple[list[Any], str]:
    """Return what a compiled step finds, and the code of its graphs."""
    net = copy.deepcopy(net)
    device = next(net.parameters()).device
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, options=options)

    def step() -> list[Any]:
        torch.manual_seed(3)
        x = rows(device=device).requires_grad_(training)
        output = compiled(x)
        if training:
            output.square().sum().backward()
        return [output, x.grad, *(p.grad for p in net.parameters()), *net.buffers()]

    with torch.set_grad_enabled(training):
        found, codes = run_and_get_code(step)
    return found, "\n".join(codes)


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return NETS[request.param]().to(device)


@pytest.mark.parametrize("training", [True, False])
def test_kernels_are_called_shortly_and_their_results_are_not_looked_at(net, training):
    net.train(training)
    found, code = compiled_step(net, training)
    calls = [match.group(1) for match in CALL.finditer(code)]
    assert calls, code
    assert set(calls) == {"._op"}
    assert not RESULT.search(code)
    assert "'input')" in code, "what a graph is given is looked at"
    with as_any_op():
        usual, code = compiled_step(net, training)
    assert RESULT.search(code), "the usual code has what is left out above"
    torch.testing.assert_close(found, usual, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        mock.patch.object(lowering, "make_fallback", side_effect=TypeError),
        mock.patch.object(inductor, "_shorten", side_effect=AttributeError),
    ],
)
def test_an_unknown_inductor_compiles_as_usual(net, change):
    found, _ = compiled_step(net, True)
    with lowered_anew(), change:
        usual, code = compiled_step(net, True)
    assert RESULT.search(code)
    torch.testing.assert_close(found, usual, rtol=0, atol=0)


@pytest.mark.slow
def test_code_in_cpp_finds_the_kernels(net, native):
    found, _ = compiled_step(net, True)
    in_cpp, _ = compiled_step(net, True, cpp_wrapper=True)
    torch.testing.assert_close(found, in_cpp, rtol=0, atol=0)
