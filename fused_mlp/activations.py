"""The activations of ``linear_act`` and ``batch_norm_act``: one table for the whole package.

The raw kernels know them by number; csrc/common/activation.h and the Triton kernels count alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NONE, RELU, LEAKY_RELU, GELU, GELU_TANH, SILU, TANH = range(7)

# What the derivative is computed from.
NOTHING, OUTPUT, INPUT = range(3)


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        value: ``value(x, negative_slope)``.
        gradient: ``gradient(grad, kept, negative_slope)``, the gradient of the input from that of
            the output. RELU's and LEAKY_RELU's take the input as well as the output.
        kept: what ``gradient`` takes: NOTHING, OUTPUT or INPUT.
    """

    value: Callable[[Tensor, float], Tensor]
    gradient: Callable[[Tensor, Tensor, float], Tensor]
    kept: int


TABLE = {
    NONE: Activation(lambda x, slope: x, lambda grad, kept, slope: grad, NOTHING),
    RELU: Activation(
        lambda x, slope: F.relu(x),
        lambda grad, y, slope: grad.masked_fill(y <= 0, 0),
        OUTPUT,
    ),
    LEAKY_RELU: Activation(
        F.leaky_relu,
        lambda grad, y, slope: torch.where(y > 0, grad, grad * slope),
        OUTPUT,
    ),
    GELU: Activation(
        lambda x, slope: F.gelu(x),
        lambda grad, x, slope: torch.ops.aten.gelu_backward(grad, x),
        INPUT,
    ),
    GELU_TANH: Activation(
        lambda x, slope: F.gelu(x, approximate="tanh"),
        lambda grad, x, slope: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
        INPUT,
    ),
    SILU: Activation(
        lambda x, slope: F.silu(x),
        lambda grad, x, slope: torch.ops.aten.silu_backward(grad, x),
        INPUT,
    ),
    TANH: Activation(
        lambda x, slope: torch.tanh(x),
        lambda grad, y, slope: torch.ops.aten.tanh_backward(grad, y),
        OUTPUT,
    ),
}

_NUMBERS = {
    ("none", "none"): NONE,
    ("relu", "none"): RELU,
    ("leaky_relu", "none"): LEAKY_RELU,
    ("gelu", "none"): GELU,
    ("gelu", "tanh"): GELU_TANH,
    ("silu", "none"): SILU,
    ("tanh", "none"): TANH,
}
_NAMES = {number: names for names, number in _NUMBERS.items()}
NAMES = tuple(dict.fromkeys(name for name, _ in _NUMBERS))
BATCH_NORM_NAMES = ("none", "relu", "leaky_relu")


def number(
    op: str, activation: str, approximate: str = "none", known: tuple[str, ...] = NAMES
) -> int:
    """Return the number of an activation.

    Args:
        op: names the caller in messages.
        activation: one of ``known``.
        approximate: "none" or "tanh", as ``torch.nn.functional.gelu`` takes it.
        known: the activations that ``op`` has.

    Raises:
        ValueError: for another name.
    """
    if activation not in known:
        raise ValueError(
            f"{op}(): activation must be one of {', '.join(known)}, but got {activation!r}"
        )
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}(): approximate must be 'none' or 'tanh', but got {approximate!r}")
    return _NUMBERS[activation, approximate if activation == "gelu" else "none"]


def name(activation: int) -> tuple[str, str]:
    """Return what :func:`number` takes: the activation and GELU's ``approximate``."""
    return _NAMES[activation]


def kept(activation: int, negative_slope: float, dropout_p: float) -> int:
    """Return what backward needs: NOTHING, OUTPUT or INPUT."""
    if activation == LEAKY_RELU and negative_slope < 0:
        return INPUT  # both sides of zero have the same sign
    if activation == TANH and dropout_p > 0:
        # Scaled by dropout the output is rounded again, and of 1 - tanh² near 1 that leaves noise:
        # five times the error of torch in bfloat16, with a wrong sign here and there.
        return INPUT
    return TABLE[activation].kept


def check_number(op: str, activation: int, last: int = TANH) -> None:
    """Raise ValueError unless ``activation`` is a number from 0 to ``last``."""
    if not 0 <= activation <= last:
        raise ValueError(f"{op}(): there is no activation of number {activation}")
