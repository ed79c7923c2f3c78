"""Numbers as a text: how an op of a compiled graph is told them (csrc/cpu/text.h)."""

from __future__ import annotations

import math
from collections.abc import Iterable


def text_of(numbers: Iterable[float]) -> str | None:
    """Return the numbers, separated by blanks; None where one is not finite."""
    values = [number if type(number) is int else float(number) for number in numbers]
    return " ".join(map(repr, values)) if all(map(math.isfinite, values)) else None


def numbers_of(text: str) -> list[float]:
    """Return the numbers of such a text; raise ValueError for any other."""
    numbers = [*map(float, text.split())]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"expected finite numbers separated by blanks, but got {text!r}")
    return numbers
