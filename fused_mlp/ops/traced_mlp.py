"""``mlp`` as tracers call it: Linear layers in a row, in one op of a graph where that exists.

A graph that torch.compile makes for the CPU library gets an op for all (``compiled_mlp.py``);
elsewhere each layer goes to the public op that computes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .. import activations, on_chip
from ..dropout import draw_seed
from ._common import check_number, check_tensor, use_formula
from .batch_norm_act import batch_norm_act
from .batch_norm_leaky_relu import batch_norm_leaky_relu, raise_one_value
from .compiled_mlp import mlp as in_graph
from .linear_act import linear_act
from .linear_batch_norm_act import linear_batch_norm_act
from .linear_relu import linear_relu
from .mlp import Layers, Norm, check, layer_seed
from .schemas import public_library


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    negative_slopes: Sequence[float],
    dropout_p: Sequence[float],
    normed_layers: Sequence[int],
    norm_parameters: Sequence[Tensor | None],
    norm_buffers: Sequence[Tensor | None],
    norm_training: Sequence[bool],
    momentum: Sequence[float],
    eps: Sequence[float],
    *,
    compiled_for: str | None = None,
) -> Tensor:
    """Return the output of Linear layers in a row, each with what stands behind it.

    Args:
        activations: by number, as in activations.py.
        normed_layers: those with a batch norm behind the product, in order. Of each follow weight
            and bias; running mean, running variance and batch counter; whether it takes the
            statistics of its batch; momentum; eps.
        compiled_for: as research_net takes it; without it, every layer goes to an op of its own.
    """
    _check_counts(
        len(weights), (biases, activations, negative_slopes, dropout_p), normed_layers,
        norm_parameters, norm_buffers, (norm_training, momentum, eps),
    )  # fmt: skip
    norms: dict[int, Norm] = {
        layer: (
            *norm_parameters[2 * k : 2 * k + 2], *norm_buffers[3 * k : 3 * k + 3],
            norm_training[k], momentum[k], eps[k],
        )
        for k, layer in enumerate(normed_layers)
    }  # fmt: skip
    layers = Layers(weights, biases, activations, negative_slopes, dropout_p, norms)
    _check(input, layers)
    output = None
    if compiled_for is not None and not use_formula(input, *layers.parameters()):
        output = in_graph(input, layers)
    return _by_layer(input, layers) if output is None else output


def _check_counts(
    layers: int,
    by_layer: Sequence[Sequence[object]],
    normed_layers: Sequence[int],
    norm_parameters: Sequence[Tensor | None],
    norm_buffers: Sequence[Tensor | None],
    by_norm: Sequence[Sequence[object]],
) -> None:
    if layers < 1 or any(len(values) != layers for values in by_layer):
        raise ValueError(
            "mlp(): expected at least 1 weight, and for each a bias or None, an activation, a "
            "slope and a dropout probability"
        )
    norms = len(normed_layers)
    if (
        len(norm_parameters) != 2 * norms
        or len(norm_buffers) != 3 * norms
        or any(len(values) != norms for values in by_norm)
    ):
        raise ValueError(
            "mlp(): expected two parameters, three buffers, a mode, a momentum and an eps for each "
            "of normed_layers"
        )
    if list(normed_layers) != sorted({*normed_layers} & {*range(layers)}):
        raise ValueError(f"mlp(): normed_layers must be ascending layers, but got {normed_layers}")


def _check(input: Tensor, layers: Layers) -> None:
    """Raise for arguments that do not fit together, before anything runs."""
    check_tensor("mlp", "input", input)
    for layer, number in enumerate(layers.activations):
        last = activations.LEAKY_RELU if layer in layers.norms else activations.TANH
        activations.check_number("mlp", number, last)
    for slope in layers.negative_slopes:
        check_number("mlp", "negative_slopes", slope)
    check(input, layers)
    if layers.train() and input.shape[0] == 1:
        raise_one_value(input, "mlp")


def _by_layer(input: Tensor, layers: Layers) -> Tensor:
    """Run an op a layer, with the masks of the uncompiled module.

    Where that runs all layers in one op, one seed decides them, and layer l takes its offset plus
    l; elsewhere each layer draws its own.
    """
    seed = None
    if any(layers.dropout_p) and on_chip.fits_mlp(input, layers.weights):
        seed = draw_seed(input.device)
    hidden = input
    for layer, p in enumerate(layers.dropout_p):
        hidden = _run_layer(hidden, layers, layer, layer_seed(seed, layer) if p else None)
    return hidden


def _run_layer(input: Tensor, layers: Layers, layer: int, seed: Tensor | None) -> Tensor:
    weight, bias = layers.weights[layer], layers.biases[layer]
    number, slope, p = (
        layers.activations[layer], layers.negative_slopes[layer], layers.dropout_p[layer],
    )  # fmt: skip
    if number == activations.RELU and layer not in layers.norms:
        return linear_relu(input, weight, bias, p, seed)
    name, approximate = activations.name(number)
    if layer not in layers.norms:
        if number == activations.NONE and p == 0:
            return F.linear(input, weight, bias)
        return linear_act(
            input, weight, bias, name, negative_slope=slope, approximate=approximate, dropout_p=p,
            seed=seed,
        )  # fmt: skip
    bn_weight, bn_bias, running_mean, running_var, tracked, training, momentum, eps = layers.norms[
        layer
    ]
    if not training:
        return linear_batch_norm_act(
            input, weight, bias, running_mean, running_var, bn_weight, bn_bias, eps, name,
            negative_slope=slope, dropout_p=p, seed=seed,
        )  # fmt: skip
    hidden = F.linear(input, weight, bias)
    arguments = (hidden, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    if number == activations.LEAKY_RELU and p == 0:
        return batch_norm_leaky_relu(*arguments, slope, num_batches_tracked=tracked)
    return batch_norm_act(
        *arguments, name, negative_slope=slope, dropout_p=p, seed=seed, num_batches_tracked=tracked
    )


public_library.impl("mlp", mlp, "CompositeImplicitAutograd")
