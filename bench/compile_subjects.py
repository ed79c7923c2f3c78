"""The networks whose compiling is measured, and the ops that their graphs call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_mlp import FusedResearchNet, FusedSequential
from fused_mlp.modules.groups import make_whole
from fused_mlp.modules.patterns import find_runs
from fused_mlp.ops import compiled_mlp
from fused_mlp.ops._common import bound
from fused_mlp.text import text_of

from .cases import REFERENCE

_KERNELS = torch.ops.fused_mlp_kernels

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """A network that is measured.

    Attributes:
        name: of the network in the table.
        make: the network.
        op: what calls the op that its graph holds, in an autograd node as the graph has one.
    """

    name: str
    make: Callable[[], nn.Module]
    op: Callable[[Any], Call]


def _read(layers: Sequence[nn.Module]) -> Any:
    """Return what one op runs the layers with."""
    (run,) = find_runs(layers)
    whole: Any = make_whole(run)
    return whole.read()


class _Node(torch.autograd.Function):
    """An op and its backward, with nothing to work out but what a graph works out as well."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        run, ctx.differentiate, options, keeps = call
        output, saved = run(tensors[0], tensors[1:], *options)
        ctx.save_for_backward(*tensors[:keeps], saved)
        result: Tensor = output
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, *weights, saved = ctx.saved_tensors
        return None, None, *ctx.differentiate(grad_output, input, weights, saved)


# As the ops' own nodes are called: without autograd.Function's look for what functorch left, 2 us.
_apply = super(torch.autograd.Function, _Node).apply


def _network_op(net: FusedResearchNet) -> Call:
    weights, biases, norm, dropout_p, slope = _read(list(net.research_layers))
    weight, bias, mean, variance, counter, training, momentum, eps, _ = norm
    parameters = [*weights, *biases, weight, bias]
    if not training:
        evaluate = bound(_KERNELS.research_net_compiled_evaluate.default)
        tensors, text = [*parameters, mean, variance], text_of((eps, slope))
        return lambda x: evaluate(x, tensors, text)
    backward = bound(_KERNELS.research_net_compiled_backward.default)
    mask = _all_but_input(len(parameters))
    call = (
        bound(_KERNELS.research_net_compiled.default),
        lambda *given: backward(*given, mask),
        ([mean, variance, counter], text_of((momentum, eps, slope, *dropout_p))),
        1 + len(weights),
    )
    return lambda x: _apply(call, x, *parameters)


def _chain_op(net: FusedSequential) -> Call:
    layers = _read(list(net))
    described = compiled_mlp.describe(torch.empty(1, REFERENCE[0]), layers)
    assert described is not None and not layers.keeps_output()
    parameters, buffers, text, bits = described
    if not net.training:
        evaluate = bound(_KERNELS.mlp_compiled_evaluate.default)
        return lambda x: evaluate(x, [*parameters, *buffers], text)
    backward = bound(_KERNELS.mlp_compiled_backward.default)
    assert bits == list(range(1 + len(parameters)))
    mask = _all_but_input(len(parameters))
    call = (
        bound(_KERNELS.mlp_compiled.default),
        lambda grad, input, weights, saved: backward(grad, input, weights, None, saved, mask),
        (buffers, text),
        1 + len(layers.weights),
    )
    return lambda x: _apply(call, x, *parameters)


def _all_but_input(parameters: int) -> int:
    """Return the flags of the gradients that are wanted."""
    return (1 << 1 + parameters) - 2


def _make_chain() -> FusedSequential:
    first, *widths = REFERENCE
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(first, width), nn.Tanh()]
        first = width
    return FusedSequential(*layers[:-1])


SUBJECTS = (
    Subject(
        "research_net",
        lambda: FusedResearchNet(REFERENCE[0], REFERENCE[1:-1], REFERENCE[-1]),
        _network_op,
    ),
    Subject("MLP, Tanh", _make_chain, _chain_op),
)
