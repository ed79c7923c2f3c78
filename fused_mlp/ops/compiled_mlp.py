"""``mlp`` in a graph of torch.compile that the CPU library runs.

As for a whole network (``compiled_research_net.py``), the library has ops of their own for it,
which take few arguments and draw the dropout's seed inside. Backward takes no biases, which no
gradient depends on, and finds the batch norms' weights and biases in what forward saved, so that
they may be written in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import activations, on_chip, reference
from ..recompute import call_number, may_run_again
from ..text import numbers_of, text_of
from ._common import grad_needed, register_fake, spread
from .mlp import Layers

_forward = torch.ops.fused_mlp_kernels.mlp_compiled.default
_backward = torch.ops.fused_mlp_kernels.mlp_compiled_backward.default
_evaluate = torch.ops.fused_mlp_kernels.mlp_compiled_evaluate.default

# What the number of a layer says, beside its activation's: csrc/cpu/compiled_mlp.cpp.
_ACTIVATION = 7
_BIAS, _DROPS, _NORM, _TRAINS, _AFFINE = 8, 16, 32, 64, 128
_MOST_BITS = 62  # of one number, the flags of the gradients


class _Call(NamedTuple):
    """What the ops take beside the input, and for backward the bit of each gradient."""

    parameters: list[Tensor]
    buffers: list[Tensor]
    layers: str
    bits: list[int]


class MLPCompiledFunction(torch.autograd.Function):
    """The autograd node of a call in a compiled graph that trains or needs a gradient.

    ``call`` holds the buffers and the text of the layers; the bits of the gradients; the number of
    weights; whether the output tells the last derivative. Input and parameters follow.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        buffers, layers, bits, weights, keeps_output = call
        output: Tensor
        output, saved = _forward(tensors[0], tensors[1:], buffers, layers)
        ctx.save_for_backward(*tensors[: 1 + weights], output if keeps_output else None, saved)
        ctx.bits = bits
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, *weights, output, saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        mask = sum(wanted << bit for bit, wanted in zip(ctx.bits, needed, strict=True))
        found = _backward(grad_output, input, weights, output, saved, mask)
        return None, *spread(found, needed)


def mlp(input: Tensor, layers: Layers) -> Tensor | None:
    """Trace checked arguments into a graph's own op; None where each layer must have its own.

    That is so where a graph may repeat the call in backward, which would draw another mask, and
    where nothing is traced: backend="eager" runs a graph as a module runs, and differentiates it
    twice.
    """
    if type(input) in (Tensor, Parameter) or not on_chip.fits_mlp(input, layers.weights):
        return None
    drops = any(layers.dropout_p)
    call = describe(input, layers, call_number() if drops else 0)
    if call is None:
        return None
    parameters, buffers, text, bits = call
    wants_grad = grad_needed(input, *parameters)
    trains = layers.train()
    if not (wants_grad or drops or trains):
        output: Tensor = _evaluate(input, [*parameters, *buffers], text)
        return output
    if may_run_again() or (trains and input.shape[0] < 2):
        return None
    if not wants_grad:
        output = _forward(input, parameters, buffers, text)[0]
        return output
    given = (buffers, text, bits, len(layers.weights), layers.keeps_output())
    output = MLPCompiledFunction.apply(given, input, *parameters)
    return output


def describe(input: Tensor, layers: Layers, call: int = 0) -> _Call | None:
    """Return what the ops take; None for what they do not.

    Those are a batch norm without statistics or with one parameter alone, more layers than a number
    has bits, and an option that is not finite.

    Args:
        call: a number that no other call in the graph has, where something drops.
    """
    count = len(layers.weights)
    biases = {layer: bias for layer, bias in enumerate(layers.biases) if bias is not None}
    parameters = [*layers.weights, *biases.values()]
    bits = [*range(1 + count), *(1 + count + layer for layer in biases)]
    buffers: list[Tensor] = []
    numbers: list[float] = [call]
    for layer, number in enumerate(layers.activations):
        code, options = number, []
        if layer in biases:
            code |= _BIAS
        if number == activations.LEAKY_RELU:
            options.append(layers.negative_slopes[layer])
        if layers.dropout_p[layer]:
            code |= _DROPS
            options.append(layers.dropout_p[layer])
        if layer in layers.norms:
            weight, bias, *statistics, training, momentum, eps = layers.norms[layer]
            if not training:
                statistics.pop()  # the batch counter
            if (weight is None) != (bias is None) or any(t is None for t in statistics):
                return None
            buffers += statistics
            code |= _NORM | (_TRAINS if training else 0)
            options += [momentum, eps]
            if weight is not None:
                if weight.dtype != input.dtype or bias.dtype != input.dtype:
                    return None
                code |= _AFFINE
                parameters += [weight, bias]
                first = 1 + 2 * (count + layer)
                bits += [first, first + 1]
        numbers += [code, *options]
    text = text_of(numbers)
    if text is None or bits[-1] >= _MOST_BITS:
        return None
    return _Call(parameters, buffers, text, bits)


def _saved_numel(input: Tensor, weights: Sequence[Tensor], text: str) -> int:
    """Return how many elements ``saved`` has: csrc/cpu/chain.cpp, chain_call.cpp, compiled_mlp.cpp.

    What kernels keep, with the seed behind it where something drops, and the copies of what
    backward takes of the rest each begin at a multiple of 8 bytes.
    """
    rows, word = math.prod(input.shape[:-1]), 8 // input.itemsize
    statistic = reference.accumulate_dtype(input.dtype).itemsize // input.itemsize
    _, *given = numbers_of(text)
    numel, words = 0, len(given)
    drops = False
    for layer, weight in enumerate(weights):
        code, width = int(given.pop(0)), weight.shape[0]
        number = code & _ACTIVATION
        activations.check_number("mlp_compiled", number)
        slope = given.pop(0) if number == activations.LEAKY_RELU else 0.0
        p = given.pop(0) if code & _DROPS else 0.0
        drops = drops or p > 0
        if code & _NORM:
            del given[:2]
            numel += 2 * width * statistic
        if code & _NORM or activations.kept(number, slope, p) == activations.INPUT:
            numel += rows * width
        if layer + 1 < len(weights):
            numel += rows * width
        if code & _AFFINE:
            words += 2 * ((width + word - 1) // word)
    numel = (numel + word - 1) // word * word
    return numel + (words + 2 * drops) * word


def _fake(
    input: Tensor, parameters: list[Tensor], buffers: list[Tensor], layers: str
) -> tuple[Tensor, Tensor]:
    weights = [parameter for parameter in parameters if parameter.dim() == 2]
    output = input.new_empty(*input.shape[:-1], weights[-1].shape[0])
    return output, input.new_empty(_saved_numel(input, weights, layers))


def _fake_evaluate(input: Tensor, tensors: list[Tensor], layers: str) -> Tensor:
    *_, last = (tensor for tensor in tensors if tensor.dim() == 2)
    return input.new_empty(*input.shape[:-1], last.shape[0])


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weights: list[Tensor],
    output: Tensor | None,
    saved: Tensor,
    output_mask: int,
) -> list[Tensor]:
    vectors = [weight.shape[:1] for weight in weights]
    shapes = [input.shape, *(weight.shape for weight in weights), *vectors]
    shapes += [vector for vector in vectors for _ in range(2)]
    return [input.new_empty(s) for bit, s in enumerate(shapes) if output_mask >> bit & 1]


register_fake("mlp_compiled", _fake)
register_fake("mlp_compiled_backward", _fake_backward)
register_fake("mlp_compiled_evaluate", _fake_evaluate)
