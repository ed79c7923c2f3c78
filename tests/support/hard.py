"""Inputs on which a careless kernel loses its digits, and the error in units in the last place.

tests/test_hard_numbers.py asserts of every row what scripts/reliability.py measures and prints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .cases import Case, batch_norm_case, linear_case, normalize_case, research_case

_HUGE, _TINY = 1e30, 1e-40
_NETWORK = (10, 64, 32, 5)
_BROAD_NETWORK = (200, 128, 250, 200)
# Random tensors that a row is measured over: of some 33 results the largest error is luck.
DRAWS = 24


def _filled(case: Case, name: str, value: float, columns: slice = slice(None)) -> Case:
    """The case with ``columns`` of one tensor set to ``value``."""
    case.tensors[name][..., columns] = value
    return case


def _scaled(case: Case, **scales: float) -> Case:
    for name, scale in scales.items():
        case.tensors[name].mul_(scale)
    return case


def _far(case: Case) -> Case:
    """Linear in 1e4 ± 1e-2 with weights whose sum is 0, so that the large parts cancel."""
    case.tensors["input"].mul_(1e-2).add_(1e4)
    weight = case.tensors["weight"]
    weight -= weight.mean(1, keepdim=True)
    return case


def _constant_columns(case: Case) -> Case:
    return _filled(case, "input", 1e4, slice(0, 3))


# What the input is: how to make the case.
HARD: dict[str, Callable[..., Case]] = {
    "normalize, 1e4 ± 1e-2": lambda **o: normalize_case((513, 33), scale=1e-2, offset=1e4, **o),
    "normalize columns, 1e4 ± 1e-2": lambda **o: normalize_case(
        (513, 33), (0,), scale=1e-2, offset=1e4, **o
    ),
    "normalize rows, 1e4 ± 1e-2": lambda **o: normalize_case(
        (513, 33), (1,), scale=1e-2, offset=1e4, **o
    ),
    "normalize, ± 1e15": lambda **o: normalize_case((513, 33), scale=1e15, **o),
    "normalize, ± 1e-30": lambda **o: normalize_case((513, 33), scale=1e-30, **o),
    "normalize columns, ± 1e-30": lambda **o: normalize_case((513, 33), (0,), scale=1e-30, **o),
    "normalize, ± 1e30": lambda **o: normalize_case((513, 33), scale=_HUGE, **o),
    "normalize columns, ± 1e30": lambda **o: normalize_case((513, 33), (0,), scale=_HUGE, **o),
    "normalize, denormal": lambda **o: normalize_case((513, 33), scale=_TINY, eps=1.0, **o),
    "normalize columns, three constant": lambda **o: _constant_columns(
        normalize_case((513, 33), (0,), eps=1e-3, **o)
    ),
    "normalize columns, two rows": lambda **o: normalize_case((2, 33), (0,), eps=1.0, **o),
    "linear_relu, 1e4 ± 1e-2": lambda **o: _far(linear_case((257, 40), 33, **o)),
    "linear_relu, ± 1e30": lambda **o: _scaled(linear_case((257, 40), 33, **o), input=_HUGE),
    "linear_relu, denormal": lambda **o: _scaled(
        linear_case((257, 40), 33, bias=False, **o), input=_TINY
    ),
    "linear_relu, one row": lambda **o: linear_case((1, 40), 33, **o),
    "linear_relu, dropout": lambda **o: linear_case((257, 40), 33, p=0.3, **o),
    "linear_act, GELU of 1e4 ± 1e-2": lambda **o: _far(
        linear_case((257, 40), 33, activation="gelu", **o)
    ),
    "linear_act, tanh of ± 1e30": lambda **o: _scaled(
        linear_case((257, 40), 33, activation="tanh", **o), input=_HUGE
    ),
    "linear_act, SiLU of denormal": lambda **o: _scaled(
        linear_case((257, 40), 33, bias=False, activation="silu", **o), input=_TINY
    ),
    "linear_act, GELU of one row": lambda **o: linear_case((1, 40), 33, activation="gelu", **o),
    "linear_act, SiLU and dropout": lambda **o: linear_case(
        (257, 40), 33, p=0.3, activation="silu", **o
    ),
    "batch norm, ReLU and dropout": lambda **o: batch_norm_case(
        (513, 33), True, activation="relu", p=0.3, **o
    ),
    "batch norm, 1e4 ± 1e-2": lambda **o: batch_norm_case(
        (513, 33), True, scale=1e-2, offset=1e4, eps=1e-12, **o
    ),
    "batch norm, ± 1e30": lambda **o: batch_norm_case((513, 33), True, scale=_HUGE, **o),
    "batch norm, denormal": lambda **o: batch_norm_case((513, 33), True, scale=_TINY, **o),
    "batch norm, three constant columns": lambda **o: _constant_columns(
        batch_norm_case((513, 33), True, **o)
    ),
    "batch norm, two rows": lambda **o: batch_norm_case((2, 33), True, eps=1.0, **o),
    "batch norm in evaluation, 1e4 ± 1e-2": lambda **o: batch_norm_case(
        (513, 33), False, scale=1e-2, offset=1e4, eps=1e-12, **o
    ),
    "batch norm in evaluation, one row": lambda **o: batch_norm_case((1, 33), False, **o),
    "batch norm in evaluation, zero variance": lambda **o: batch_norm_case(
        (513, 33), False, scale=0.0, offset=0.5, **o
    ),
    "network, 1e4 ± 1e-2": lambda **o: _far_network(research_case(257, _NETWORK, True, **o)),
    "network, two rows": lambda **o: research_case(2, _BROAD_NETWORK, True, eps=1.0, **o),
    "network in evaluation, one row": lambda **o: research_case(1, _BROAD_NETWORK, False, **o),
    "network in evaluation, ± 1e30": lambda **o: _scaled(
        research_case(257, _NETWORK, False, **o), input=_HUGE
    ),
    "network in evaluation, denormal": lambda **o: _scaled(
        research_case(7, _BROAD_NETWORK, False, **o), input=_TINY
    ),
}

# Beyond the range of float16, and below what the rounding of half precision leaves of a gate.
_FLOAT32_ALONE = ("1e15", "1e30", "1e-30", "denormal", "1e4 ± 1e-2")


def applies(name: str, dtype: torch.dtype) -> bool:
    """Return whether a row has something to say in this dtype."""
    return dtype == torch.float32 or not any(word in name for word in _FLOAT32_ALONE)


def _far_network(case: Case) -> Case:
    case.tensors["input"].mul_(1e-2).add_(1e4)
    weight = case.tensors["weights[0]"]
    weight -= weight.mean(1, keepdim=True)
    return case


@dataclass(frozen=True)
class Errors:
    """Largest and mean error of one result, in units in the last place."""

    largest: float
    mean: float


def units(result: Tensor, exact: Tensor) -> Errors:
    """Errors of ``result``, infinite where it is no number and should be one.

    The unit is that of the exact value, or of the root mean square of all of them where that is
    larger: next to zero nothing but cancellation is left to measure.
    """
    information = torch.finfo(result.dtype)
    finite = exact.abs() <= information.max
    if not finite.any():
        return Errors(0.0, 0.0)
    exact, result = exact[finite], result[finite].double()
    scale = exact.abs().clamp(
        min=(exact / exact.abs().max().clamp(min=1e-300)).square().mean().sqrt().item()
        * exact.abs().max().item()
    )
    unit = (scale * information.eps).clamp(min=information.smallest_normal * information.eps)
    error = (result - exact).abs() / unit
    error = torch.where(error.isnan(), float("inf"), error)
    return Errors(error.max().item(), error.mean().item())


def _measure_once(case: Case) -> dict[str, tuple[Errors, Errors]]:
    results = {}
    for kind, function in (("eager", case.plain), ("exact", case.exact), ("fused", case.fused)):
        leaves = [t.double() if kind == "exact" else t.clone() for t in case.tensors.values()]
        leaves = [t.detach().requires_grad_() for t in leaves]
        output = function(*leaves)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(output.shape, generator=generator).to(next(iter(case.tensors.values())))
        if case.sure is not None:
            grad = grad * case.sure(*(t.double() for t in case.tensors.values())).to(grad)
        results[kind] = (
            output.detach(),
            torch.autograd.grad(output, leaves[0], grad.to(output.dtype))[0],
        )
    return {
        what: (
            units(results["eager"][i], results["exact"][i]),
            units(results["fused"][i], results["exact"][i]),
        )
        for i, what in enumerate(("output", "gradient"))
    }


def measure(name: str, **options: Any) -> dict[str, tuple[Errors, Errors]]:
    """Return eager's and the fused errors of the output and of the gradient of the input.

    Over DRAWS random cases of a row of HARD, made with ``options``: the largest of all, and the
    mean of all.
    """
    draws = [_measure_once(HARD[name](draw=draw, **options)) for draw in range(DRAWS)]

    def joined(what: str, whose: int) -> Errors:
        errors = [draw[what][whose] for draw in draws]
        return Errors(max(e.largest for e in errors), fmean(e.mean for e in errors))

    return {what: (joined(what, 0), joined(what, 1)) for what in draws[0]}
