"""Sample arguments: each op beside its plain counterpart, ready to call with the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fused_mlp  # noqa: F401  (registers torch.ops.fused_mlp)

from . import plain
from .environment import INTERPRETED
from .philox import keep_mask

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The activations of linear_act, with the options that change what a kernel does.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "relu": {},
    "leaky_relu": {"negative_slope": 0.2},
    "leaky_relu, slope 0": {"negative_slope": 0.0},
    "leaky_relu, slope below 0": {"negative_slope": -0.5},
    "gelu": {},
    "gelu, tanh": {"approximate": "tanh"},
    "silu": {},
    "tanh": {},
}
_SIZES = (0, 1, 2, 3, 7, 17, 33, 63, 64, 65, 100, 255, 256, 257, 300)
_SIZES_INTERPRETED = (0, 1, 2, 3, 17, 33, 65, 130)


def odd_sizes() -> tuple[int, ...]:
    """Return sizes about the edges of tiles and vectors; fewer under Triton's interpreter."""
    return _SIZES_INTERPRETED if INTERPRETED else _SIZES


def odd_triples() -> list[tuple[int, int, int]]:
    """Return triples of sizes: each stands once in every place, beside different others."""
    sizes = odd_sizes()
    count = len(sizes)  # 7 and 11 share no factor with it, so their multiples are permutations
    return [
        (s, sizes[(7 * i + 7) % count], sizes[(11 * i + 3) % count]) for i, s in enumerate(sizes)
    ]


@dataclass
class Case:
    """One op with arguments.

    Attributes:
        tensors: the differentiable inputs by name.
        fused, plain, exact: the op, its counterpart in torch's operations, and the same for
            float64. They take the values of ``tensors`` in order (any of them may be replaced by
            another of its shape) and have no side effect.
        scales: for a gradient that is zero by nature, the input whose gradient has its scale.
        sure: where the output's gradient is to be compared: no unit behind it is so near the kink
            of its ReLU that rounding chooses the side, and no gradient is more right than another.
        roundings: how often eager code rounds to the dtype on the way.
        terms: what has gradients of the size of the terms that cancel in those of ``exact``.
    """

    name: str
    tensors: dict[str, Tensor]
    fused: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    scales: dict[str, str] = field(default_factory=dict)
    sure: Callable[..., Tensor] | None = None
    roundings: int = 1
    terms: Callable[..., Tensor] | None = None


class Source:
    """Random tensors that are the same on every device and in every dtype, up to rounding."""

    def __init__(self, dtype: torch.dtype, device: torch.device, draw: int) -> None:
        self._generator = torch.Generator().manual_seed(draw)
        self._options = {"dtype": dtype, "device": device}

    def normal(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return (values * scale + offset).to(**self._options)

    def positive(self, *shape: int) -> Tensor:
        values = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        return (values + 0.5).to(**self._options)


def normalize_case(
    shape: Sequence[int],
    dim: Sequence[int] | None = None,
    correction: float = 1.0,
    eps: float = 0.0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device,
    scale: float = 1.0,
    offset: float = 0.0,
    draw: int = 0,
) -> Case:
    x = Source(dtype, device, draw).normal(*shape, scale=scale, offset=offset)
    return Case(
        f"normalize({list(shape)}, dim={dim}, correction={correction}, eps={eps})",
        {"input": x},
        lambda x: torch.ops.fused_mlp.normalize(x, dim, correction=correction, eps=eps),
        lambda x: plain.normalize(x, dim, correction, eps),
        lambda x: plain.normalize_exact(x, dim, correction, eps),
    )


def linear_case(
    shape: Sequence[int],
    out_features: int,
    bias: bool = True,
    p: float = 0.0,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    approximate: str = "none",
    dtype: torch.dtype = torch.float32,
    device: torch.device,
    seed: Sequence[int] = (0x1234567890ABCDEF, -77),
    draw: int = 0,
) -> Case:
    """With an ``activation`` a case of linear_act, else of linear_relu."""
    source = Source(dtype, device, draw)
    in_features = shape[-1]
    bound = max(in_features, 1) ** -0.5
    tensors = {
        "input": source.normal(*shape),
        "weight": source.normal(out_features, in_features, scale=bound),
    }
    if bias:
        tensors["bias"] = source.normal(out_features, scale=0.5)
    rows = torch.Size(shape[:-1]).numel()
    seed_tensor = torch.tensor(seed, device=device) if p else None
    keep = keep_mask(seed_tensor, rows, out_features, p) if seed_tensor is not None else None

    def reference(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        if activation is None:
            return plain.linear_relu(x, w, b, p, keep)
        hidden = torch.nn.functional.linear(x, w, b)
        return plain.dropout(
            plain.activation(hidden, activation, negative_slope, approximate), p, keep
        )

    def fused(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        if activation is None:
            return torch.ops.fused_mlp.linear_relu(x, w, b, p, seed_tensor)
        return torch.ops.fused_mlp.linear_act(
            x, w, b, activation, negative_slope=negative_slope, approximate=approximate,
            dropout_p=p, seed=seed_tensor,
        )  # fmt: skip

    def terms(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        assert activation is not None
        hidden = torch.nn.functional.linear(x, w, b)
        return plain.dropout(plain.activation_terms(hidden, activation), p, keep)

    smooth = activation not in (None, "none", "relu", "leaky_relu")
    # The sums of float16 and bfloat16 are float32's.
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps

    def sure(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        linear = torch.nn.functional.linear
        terms = linear(x.abs(), w.abs(), b if b is None else b.abs())
        return ~(linear(x, w, b).abs() <= 8 * unit * terms)

    return Case(
        f"linear_{activation or 'relu'}({list(shape)} -> {out_features}, bias={bias}, p={p})",
        tensors,
        fused,
        reference,
        reference,
        sure=None if smooth else sure,
        # The sum of a few columns may cancel to nothing.
        scales={"bias": "weight"} if bias and 0 < out_features < 8 and in_features else {},
        roundings=1 + bool(p) + smooth,
        terms=terms if activation in ("gelu", "silu") else None,
    )


def act_case(kind: str, *arguments: Any, **options: Any) -> Case:
    """Return a case of linear_act with one of ACTIVATIONS; the rest as ``linear_case`` takes it."""
    return linear_case(*arguments, activation=kind.split(",")[0], **ACTIVATIONS[kind], **options)


def batch_norm_case(
    shape: Sequence[int],
    training: bool,
    affine: str = "both",
    negative_slope: float = 0.01,
    *,
    activation: str | None = None,
    p: float = 0.0,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    device: torch.device,
    scale: float = 1.0,
    offset: float = 0.0,
    eps: float = 1e-5,
    draw: int = 0,
) -> Case:
    """``affine`` is one of "both", "weight", "bias" and "none".

    With an ``activation`` a case of batch_norm_act, else of batch_norm_leaky_relu.
    """
    x = Source(dtype, device, 2 * draw).normal(*shape, scale=scale, offset=offset)
    source = Source(parameter_dtype or dtype, device, 2 * draw + 1)
    channels = shape[1]
    tensors = {"input": x}
    if affine in ("both", "weight"):
        tensors["weight"] = source.normal(channels, offset=0.3)
    if affine in ("both", "bias"):
        tensors["bias"] = source.normal(channels, scale=0.5)
    mean = source.normal(channels, scale=0.5, offset=offset)
    var = source.positive(channels) * scale**2

    def options(t: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        given = dict(zip(list(tensors)[1:], t, strict=True))
        statistics = (None, None) if training else (mean.clone(), var.clone())
        return *statistics, given.get("weight"), given.get("bias")

    columns = shape[-1]
    seed = torch.tensor((0x1234567890ABCDEF, -77), device=device) if p else None
    keep = keep_mask(seed, x.numel() // max(columns, 1), columns, p) if seed is not None else None
    name = activation or "leaky_relu"

    def finish(u: Tensor) -> Tensor:
        return plain.dropout(plain.activation(u, name, negative_slope), p, keep)

    def fused(x: Tensor, *t: Tensor) -> Tensor:
        arguments = (x, *options(t), training, 0.1, eps)
        if activation is None:
            return torch.ops.fused_mlp.batch_norm_leaky_relu(*arguments, negative_slope)
        return torch.ops.fused_mlp.batch_norm_act(
            *arguments, activation, negative_slope=negative_slope, dropout_p=p, seed=seed
        )

    return Case(
        f"batch_norm_{name}({list(shape)}, training={training}, affine={affine}, "
        f"negative_slope={negative_slope}, p={p})",
        tensors,
        fused,
        lambda x, *t: finish(torch.nn.functional.batch_norm(x, *options(t), training, 0.1, eps)),
        lambda x, *t: finish(plain.batch_norm_exact(x, *options(t), training, eps)),
        roundings=2 if p else 1,
    )


def research_case(
    rows: int,
    widths: Sequence[int],
    training: bool,
    p: float = 0.0,
    affine: bool = True,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device,
    eps: float = 1e-5,
    seed: Sequence[int] = (0x1234567890ABCDEF, 2**32 - 1),
    draw: int = 0,
) -> Case:
    """``widths`` are those of the input, every hidden layer and the output."""
    source = Source(dtype, device, draw)
    layers, channels = len(widths) - 1, widths[-2]
    tensors = {"input": source.normal(rows, widths[0])}
    for layer in range(layers):
        bound = max(widths[layer], 1) ** -0.5
        tensors[f"weights[{layer}]"] = source.normal(widths[layer + 1], widths[layer], scale=bound)
    for layer in range(layers):
        tensors[f"biases[{layer}]"] = source.normal(widths[layer + 1], scale=0.5)
    if affine:
        tensors["bn_weight"] = source.normal(channels, offset=0.3)
        tensors["bn_bias"] = source.normal(channels, scale=0.5)
    mean, var = source.normal(channels, scale=0.5), source.positive(channels)
    dropout_p = [p if training else 0.0] * (layers - 2)
    seed_tensor = torch.tensor(seed, device=device) if any(dropout_p) else None
    keeps = [
        keep_mask(seed_tensor, rows, widths[i + 1], p, i) if seed_tensor is not None else None
        for i in range(layers - 2)
    ]

    def split(t: tuple[Tensor, ...]) -> tuple:
        weights, biases = list(t[:layers]), list(t[layers : 2 * layers])
        bn = t[2 * layers :] if affine else (None, None)
        return weights, biases, *bn, mean.clone(), var.clone(), training, dropout_p

    def exact(x: Tensor, *t: Tensor, kinks: list[Tensor] | None = None) -> Tensor:
        options = (*split(t), keeps, 0.1, eps, 0.01)
        return plain.research_net(x, *options, exact=True, kinks=kinks)

    def sure(*t: Tensor) -> Tensor:
        seen: list[Tensor] = []
        exact(*t, kinks=seen)
        return torch.cat(seen, 1).abs().amin(1, keepdim=True) > 2**-6

    return Case(
        f"research_net({rows} rows, {list(widths)}, training={training}, p={p}, affine={affine})",
        tensors,
        lambda x, *t: torch.ops.fused_mlp.research_net(x, *split(t), seed_tensor, 0.1, eps, 0.01),
        # Torch's batch norm takes no empty channels.
        lambda x, *t: plain.research_net(x, *split(t), keeps, 0.1, eps, 0.01, exact=channels == 0),
        exact,
        # Batch norm takes away whatever bias stands before it.
        {f"biases[{layers - 2}]": f"weights[{layers - 2}]"} if training else {},
        sure if dtype.itemsize == 2 and rows and channels else None,
        roundings=2,
    )


# Small calls of every op in every mode, for what must hold of all of them.
_EXAMPLES: dict[str, Callable[..., Case]] = {
    "normalize": lambda **o: normalize_case((7, 5), **o),
    "normalize-dim": lambda **o: normalize_case((7, 5), (0,), 0.0, 1e-2, **o),
    "normalize-dims": lambda **o: normalize_case((4, 3, 5), (0, 2), **o),
    "linear_relu": lambda **o: linear_case((7, 5), 9, **o),
    "linear_relu-no_bias": lambda **o: linear_case((2, 3, 5), 4, bias=False, **o),
    "linear_relu-dropout": lambda **o: linear_case((7, 5), 9, p=0.3, **o),
    "linear_act-none": lambda **o: linear_case((7, 5), 9, p=0.3, activation="none", **o),
    "linear_act-leaky_relu": lambda **o: linear_case(
        (2, 3, 5), 4, bias=False, activation="leaky_relu", negative_slope=0.2, **o
    ),
    "linear_act-gelu": lambda **o: linear_case((7, 5), 9, activation="gelu", **o),
    "linear_act-silu": lambda **o: linear_case((7, 5), 9, p=0.3, activation="silu", **o),
    "linear_act-tanh": lambda **o: linear_case((7, 5), 9, activation="tanh", **o),
    "linear_act-tanh-dropout": lambda **o: linear_case((7, 5), 9, p=0.3, activation="tanh", **o),
    "batch_norm_act-relu": lambda **o: batch_norm_case((7, 5), True, activation="relu", **o),
    "batch_norm_act-dropout": lambda **o: batch_norm_case(
        (4, 3, 5), True, activation="none", p=0.3, **o
    ),
    "batch_norm_act-eval": lambda **o: batch_norm_case(
        (7, 5), False, activation="leaky_relu", p=0.3, **o
    ),
    "batch_norm_act-frozen": lambda **o: batch_norm_case((7, 5), False, activation="relu", **o),
    "batch_norm-train": lambda **o: batch_norm_case((7, 5), True, **o),
    "batch_norm-train-3d": lambda **o: batch_norm_case((4, 3, 5), True, **o),
    "batch_norm-train-plain": lambda **o: batch_norm_case((7, 5), True, affine="none", **o),
    "batch_norm-eval": lambda **o: batch_norm_case((7, 5), False, **o),
    "batch_norm-eval-3d": lambda **o: batch_norm_case((4, 3, 5), False, affine="weight", **o),
    "research_net-train": lambda **o: research_case(7, (4, 6, 5, 3), True, **o),
    "research_net-train-dropout": lambda **o: research_case(9, (3, 8, 7, 5, 2), True, 0.3, **o),
    "research_net-train-plain": lambda **o: research_case(7, (4, 5, 3), True, affine=False, **o),
    "research_net-eval": lambda **o: research_case(7, (4, 6, 5, 3), False, **o),
}
EXAMPLES = tuple(_EXAMPLES)


def example(name: str, *, dtype: torch.dtype, device: torch.device) -> Case:
    """Return the small example of this name (one of ``EXAMPLES``)."""
    return _EXAMPLES[name](dtype=dtype, device=device)
