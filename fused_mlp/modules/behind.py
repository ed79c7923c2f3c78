"""What stands behind a Linear or a batch norm: its options as the modules hold them now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from ..activations import GELU, GELU_TANH, LEAKY_RELU, NONE, RELU, SILU, TANH

# The number of the activation, the slope of LeakyReLU, the probability of dropout.
Options = tuple[int, float, float]

_NUMBERS = {nn.ReLU: RELU, nn.SiLU: SILU, nn.Tanh: TANH}
_GELU = {"none": GELU, "tanh": GELU_TANH}


def reader(modules: Sequence[nn.Module]) -> Callable[[], Options]:
    """Return what reads the options of an activation and a dropout layer, either of which may lack.

    The reader raises KeyError where the modules would raise an error themselves.
    """
    dropout: Any = None
    activation: Any = None
    for module in modules:
        if type(module) is nn.Dropout:
            dropout = module.__dict__
        else:
            activation = module
    kind, options = type(activation), getattr(activation, "__dict__", {})

    def p() -> float:
        probability: float = dropout["p"] if dropout["training"] else 0.0
        return probability

    if kind is nn.LeakyReLU:
        if dropout is None:
            return lambda: (LEAKY_RELU, options["negative_slope"], 0.0)
        return lambda: (LEAKY_RELU, options["negative_slope"], p())
    if kind is nn.GELU:
        if dropout is None:
            return lambda: (_GELU[options["approximate"]], 0.0, 0.0)
        return lambda: (_GELU[options["approximate"]], 0.0, p())
    number = _NUMBERS.get(kind, NONE)
    if dropout is None:
        fixed = (number, 0.0, 0.0)
        return lambda: fixed
    return lambda: (number, 0.0, p())


def entries(modules: Sequence[nn.Module]) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Yield dictionaries and the keys of all that the reader reads from them."""
    keys = {
        nn.LeakyReLU: ("negative_slope",),
        nn.GELU: ("approximate",),
        nn.Dropout: ("p", "training"),
    }
    for module in modules:
        if type(module) in keys:
            yield module.__dict__, keys[type(module)]
