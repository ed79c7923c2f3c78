"""``research_net`` in a graph of torch.compile that the CPU library runs.

The library has ops of its own for it. They take few arguments, since a graph hands over all of
them at every call, and draw the dropout's seed inside: 1.2 us where an op of the graph takes 2.6.
Such a call may run once a step alone. Where a graph may repeat it in backward, as under
checkpointing, the general op takes its place, with an op before it that draws the seed alike again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import backends, on_chip, reference
from ..recompute import may_run_again
from ..text import numbers_of, text_of
from ._common import grad_needed, register_fake, spread

_forward = torch.ops.fused_mlp_kernels.research_net_compiled.default
_backward = torch.ops.fused_mlp_kernels.research_net_compiled_backward.default
_evaluate = torch.ops.fused_mlp_kernels.research_net_compiled_evaluate.default
_MOST_LAYERS = 30  # their gradients' flags and the input's are the bits of one number


class ResearchNetCompiledFunction(torch.autograd.Function):
    """The autograd node of a training call in a compiled graph.

    ``call`` holds the number of weights; running mean, running variance and batch counter; the
    numbers. The tensors that may need a gradient follow: input, weights…, biases…, and the batch
    norm's two if it has them. What backward needs of all but input and weights is in ``saved``.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        weights, buffers, numbers = call
        output, saved = _forward(tensors[0], tensors[1:], buffers, numbers)
        ctx.save_for_backward(*tensors[: 1 + weights], saved)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, *weights, saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        mask = sum(wanted << place for place, wanted in enumerate(needed))
        found = _backward(grad_output, input, weights, saved, mask)
        return None, *spread(found, needed)


def research_net(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    buffers: tuple[Tensor | None, Tensor | None, Tensor | None],
    training: bool,
    dropout_p: Sequence[float],
    momentum: float,
    eps: float,
    negative_slope: float,
) -> Tensor | None:
    """Trace checked arguments into a graph's own op; None where the general op must run.

    It must where nothing is traced either: backend="eager" runs a graph as a module runs, and
    differentiates it twice.

    Args:
        buffers: running mean, running variance and, in training, the batch counter.
    """
    if (
        type(input) in (Tensor, Parameter)
        or input.device.type != "cpu"
        or backends.active_backend("cpu") != "native"
        or len(weights) > _MOST_LAYERS
        or (bn_weight is None) != (bn_bias is None)
        or any(buffer is None for buffer in buffers[: 2 + training])
    ):
        return None
    affine = () if bn_weight is None or bn_bias is None else (bn_weight, bn_bias)
    if any(vector.dtype != input.dtype for vector in affine):
        return None
    tensors = (input, *weights, *biases, *affine)
    options = (momentum, eps, negative_slope, *dropout_p) if training else (eps, negative_slope)
    numbers = text_of(options)
    if numbers is None:
        return None
    if training:
        if may_run_again():
            return None
        if grad_needed(*tensors):
            call = (len(weights), buffers, numbers)
            output: Tensor = ResearchNetCompiledFunction.apply(call, *tensors)
            return output
        return _forward(input, tensors[1:], buffers, numbers)[0]
    if any(dropout_p) or grad_needed(*tensors):
        return None
    return _evaluate(input, (*tensors[1:], *buffers[:2]), numbers)


def _fake(
    input: Tensor, parameters: list[Tensor], buffers: list[Tensor], numbers: str
) -> tuple[Tensor, Tensor]:
    _, _, _, *dropout_p = numbers_of(numbers)
    weights = parameters[: len(dropout_p) + 2]
    dtype = reference.accumulate_dtype(input.dtype)
    numel = on_chip.saved_numel(input, weights, True, dropout_p, seeded=True)
    if any(dropout_p):  # the seed stands behind it: csrc/cpu/network.cpp
        numel = numel + 2 if dtype == torch.float64 else (numel + 1) // 2 * 2 + 4
    # Then what backward needs of the others: csrc/cpu/compiled_research_net.cpp.
    channels = weights[-2].shape[0] if len(parameters) > 2 * len(weights) else 0
    numel = numel + weights[0].shape[0] + 2 * channels + (2 + len(dropout_p)) * 8 // dtype.itemsize
    output = input.new_empty(input.shape[0], weights[-1].shape[0])
    return output, input.new_empty((numel + 1) // 2 * 2, dtype=dtype)


def _fake_backward(
    grad_output: Tensor, input: Tensor, weights: list[Tensor], saved: Tensor, output_mask: int
) -> list[Tensor]:
    biases = [weight.shape[:1] for weight in weights]
    everything = [t.shape for t in (input, *weights)] + biases + [biases[-2]] * 2
    return [input.new_empty(s) for place, s in enumerate(everything) if output_mask >> place & 1]


def _fake_evaluate(input: Tensor, tensors: list[Tensor], numbers: str) -> Tensor:
    *_, last = (t for t in tensors if t.dim() == 2)
    return input.new_empty(input.shape[0], last.shape[0])


register_fake("research_net_compiled", _fake)
register_fake("research_net_compiled_backward", _fake_backward)
register_fake("research_net_compiled_evaluate", _fake_evaluate)
