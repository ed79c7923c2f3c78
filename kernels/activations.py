"""The activations of linear_act and batch_norm_act, by the numbers of ``fused_mlp.activations``.

Derivatives come from what forward kept: the output, or what the activation saw.
"""

import triton
import triton.language as tl

from .launch import scalar

NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
GELU = tl.constexpr(3)
GELU_TANH = tl.constexpr(4)
SILU = tl.constexpr(5)
TANH = tl.constexpr(6)

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # of the normal distribution at 0
SLOPE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi), in GELU by tanh
CUBIC = tl.constexpr(0.044715)


def check(op, activation, last=TANH):
    """Raise ValueError unless ``op`` has an activation of this number."""
    if not 0 <= activation <= last.value:
        raise ValueError(f"{op}(): there is no activation of number {activation}")


@triton.jit
def tanh(x):
    """Not libdevice's, which the interpreter lacks."""
    # 1 - t loses the digits of small numbers: there the series, whose next term is below 1 ulp.
    small = scalar(0.02 if x.dtype == tl.float64 else 0.2, x.dtype)
    t = tl.exp(-2 * tl.abs(x))
    # Near 1 what is missing to it, so that the last rounding alone counts: 1 - tanh^2 cancels.
    near_one = t < scalar(0.1, x.dtype)
    q = tl.where(near_one, 2 * t, 1 - t) / (1 + t)
    far = tl.where(near_one, 1 - q, q)
    s = x * x
    tail = scalar(62 / 2835, x.dtype) - s * scalar(1382 / 155925, x.dtype)
    series = 1 + s * (scalar(-1 / 3, x.dtype) + s * (scalar(2 / 15, x.dtype) + s * (
        scalar(-17 / 315, x.dtype) + s * tail)))  # fmt: skip
    return tl.where(tl.abs(x) < small, x * series, tl.where(x < 0, -far, far))


@triton.jit
def _inner(x):
    """What GELU by tanh takes the tanh of."""
    return scalar(SLOPE, x.dtype) * (x + scalar(CUBIC, x.dtype) * x * x * x)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _distribution(x):
    """The normal distribution's share below x."""
    return 0.5 * (1 + tl.erf(x * scalar(SQRT_HALF, x.dtype)))


@triton.jit
def activate(x, slope, ACTIVATION: tl.constexpr):
    """The activation of x [any shape], in the accumulation dtype; NaN stays NaN."""
    if ACTIVATION == RELU:
        return tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(x > 0, x, x * slope)
    elif ACTIVATION == GELU:
        return x * _distribution(x)
    elif ACTIVATION == GELU_TANH:
        return 0.5 * x * (1 + tanh(_inner(x)))
    elif ACTIVATION == SILU:
        return x * _sigmoid(x)
    elif ACTIVATION == TANH:
        return tanh(x)
    else:
        return x


@triton.jit
def activation_gradient(g, kept, slope, ACTIVATION: tl.constexpr):
    """The gradient in front of the activation, from the one behind it and what was kept.

    kept: the output for RELU, LEAKY_RELU and TANH (for the first two the input serves as well), the
    input for GELU, GELU_TANH and SILU; not looked at for NONE.
    """
    if ACTIVATION == RELU:
        return tl.where(kept <= 0, 0.0, g)
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(kept > 0, g, g * slope)
    elif ACTIVATION == GELU:
        density = scalar(DENSITY, kept.dtype) * tl.exp(-0.5 * kept * kept)
        return g * (_distribution(kept) + kept * density)
    elif ACTIVATION == GELU_TANH:
        t = tanh(_inner(kept))
        inner = scalar(SLOPE, kept.dtype) * (1 + 3 * scalar(CUBIC, kept.dtype) * kept * kept)
        return g * (0.5 * (1 + t) + 0.5 * kept * (1 - t * t) * inner)
    elif ACTIVATION == SILU:
        s = _sigmoid(kept)
        return g * (s * (1 + kept * (1 - s)))
    elif ACTIVATION == TANH:
        return g * (1 - kept * kept)
    else:
        return g
