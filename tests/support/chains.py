"""Sample arguments of ``mlp``, a chain of Linear layers in one node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_mlp import activations
from fused_mlp.dropout import draw_seed
from fused_mlp.ops import mlp

from . import plain
from .cases import ACTIVATIONS, Case, Source
from .philox import keep_mask


def mlp_case(
    shape: Sequence[int],
    widths: Sequence[int],
    kinds: Sequence[str],
    p: float = 0.0,
    biases: bool = True,
    *,
    norms: Sequence[int] = (),
    training: bool = True,
    affine: bool = True,
    dtype: torch.dtype = torch.float32,
    draw: int = 0,
) -> Case:
    """A chain of Linear layers in one node, which the CPU library alone runs.

    Args:
        shape: of the input, whose last size is the first layer's in_features.
        widths: out_features of every layer.
        kinds: of ACTIVATIONS, one a layer.
        p: of the dropout behind every layer but the last.
        biases: whether every layer has one, or every second.
        norms: the layers with a batch norm, in ``training`` or not, with weight and bias or not.
    """
    source = Source(dtype, torch.device("cpu"), draw)
    layers, features = len(widths), shape[-1]
    tensors = {"input": source.normal(*shape)}
    for layer, width in enumerate(widths):
        bound = max(features, 1) ** -0.5
        tensors[f"weights[{layer}]"] = source.normal(width, features, scale=bound)
        features = width
    with_bias = [layer for layer in range(layers) if biases or layer % 2]
    for layer in with_bias:
        tensors[f"biases[{layer}]"] = source.normal(widths[layer], scale=0.5)
    names, options = [kind.split(",")[0] for kind in kinds], [ACTIVATIONS[kind] for kind in kinds]
    slopes = [option.get("negative_slope", 0.0) for option in options]
    approximate = [option.get("approximate", "none") for option in options]
    dropout_p = [p] * (layers - 1) + [0.0]
    torch.manual_seed(draw)
    seed = draw_seed("cpu")
    rows = torch.Size(shape[:-1]).numel()
    keeps = [
        keep_mask(seed, rows, width, q, layer) if q else None
        for layer, (width, q) in enumerate(zip(widths, dropout_p, strict=True))
    ]

    statistics = {
        n: (source.normal(widths[n], scale=0.5), source.positive(widths[n])) for n in norms
    }
    for layer in norms if affine else ():
        tensors[f"bn_weights[{layer}]"] = source.normal(widths[layer], offset=0.3)
        tensors[f"bn_biases[{layer}]"] = source.normal(widths[layer], scale=0.5)

    def split(t: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Any], dict[int, tuple[Any, ...]]]:
        given = dict(zip(with_bias, t[layers:], strict=False))
        found = iter(t[layers + len(with_bias) :])
        state = {n: (next(found, None), next(found, None), *statistics[n]) for n in norms}
        return list(t[:layers]), [given.get(layer) for layer in range(layers)], state

    def reference(
        x: Tensor, *t: Tensor, exact: bool = False, kinks: list[Tensor] | None = None
    ) -> Tensor:
        weights, bias, state = split(t)
        for layer in range(layers):
            x = torch.nn.functional.linear(x, weights[layer], bias[layer])
            if layer in state:
                weight, shift, mean, var = state[layer]
                options = (mean.to(x), var.to(x), weight, shift, training)
                if exact:
                    x = plain.batch_norm_exact(x, *options, 1e-5)
                else:
                    x = torch.nn.functional.batch_norm(x, *map(_copied, options), 0.1, 1e-5)
            if kinks is not None and names[layer] in ("relu", "leaky_relu"):
                kinks.append(x)
            x = plain.activation(x, names[layer], slopes[layer], approximate[layer])
            x = plain.dropout(x, dropout_p[layer], keeps[layer])
        return x

    def fused(x: Tensor, *t: Tensor) -> Tensor:
        numbers = [activations.number("mlp", *n) for n in zip(names, approximate, strict=True)]
        weights, bias, state = split(t)
        norms = {
            n: (w, b, mean.clone(), var.clone(), None, training, 0.1, 1e-5)
            for n, (w, b, mean, var) in state.items()
        }
        torch.manual_seed(draw)  # the node draws the seed itself
        return mlp.run(x, mlp.Layers(weights, bias, numbers, slopes, dropout_p, norms))

    def sure(*t: Tensor) -> Tensor:
        seen = [torch.ones((*shape[:-1], 1), dtype=torch.float64)]
        reference(*t, exact=True, kinks=seen)
        return torch.cat(seen, -1).abs().amin(-1, keepdim=True) > 2**-6

    return Case(
        f"mlp({list(shape)} -> {list(widths)}, {list(kinds)}, p={p}, biases={biases}, "
        f"norms={list(norms)}, training={training}, affine={affine})",
        tensors,
        fused,
        reference,
        lambda *t: reference(*t, exact=True),
        # The sum of a few columns may cancel to nothing, and a batch norm takes biases away.
        scales={f"biases[{layer}]": f"weights[{layer}]" for layer in with_bias}
        | {f"bn_biases[{layer}]": f"bn_weights[{layer}]" for layer in norms if affine},
        sure=sure if dtype.itemsize == 2 else None,
        # Of half precision all count: products, norms and activations, in a row.
        roundings=2 * layers + len(norms) if dtype.itemsize == 2 else 2,
    )


def _copied(value: Any) -> Any:
    """Return running statistics that batch norm may write; all else as it is."""
    return value.clone() if isinstance(value, Tensor) and not value.requires_grad else value
