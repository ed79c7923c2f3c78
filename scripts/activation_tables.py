"""Writes csrc/cpu/kernels/lookup_tables.h: the polynomials of lookup.h.

    python scripts/activation_tables.py

Each table is of a function of a value that is not negative, constant from somewhere on. Of its 32
intervals four share an octave; the first reaches down to 0. In each stands a near-minimax
polynomial of degree 6 in the distance from the interval's middle, in the first one from 0, found in
40 digits by mpmath's chebyfit and rounded to float32. Needs mpmath, which comes with torch.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpmath import chebyfit, diff, erfc, exp, mp, mpf, pi, sech, sqrt, tanh

HEADER = Path(__file__).resolve().parent.parent / "csrc" / "cpu" / "kernels" / "lookup_tables.h"
DEGREE = 6
OCTAVES, PARTS = 8, 4
BIAS = 127  # of float32's exponent, whose last three bits and the two after them are the index

TOP = """// Written by scripts/activation_tables.py, which says what stands here. Do not edit.
#pragma once

#include "cpu/kernels/lookup.h"

// clang-format off
namespace fused_mlp {
"""


@dataclass(frozen=True)
class Table:
    """A function, the exponent of its first octave, and what it is where it is constant."""

    name: str
    meaning: str
    function: Callable[[mpf], mpf]
    lowest: int
    flat: float  # from here on, where an interval begins
    limit: int


def share(x: mpf) -> mpf:
    return erfc(x / sqrt(2)) / 2


def slope(x: mpf) -> mpf:
    return share(x) - x * exp(-x * x / 2) / sqrt(2 * pi)


def inner(x: mpf) -> mpf:
    return sqrt(2 / pi) * (x + mpf("0.044715") * x**3)


def tanh_share(x: mpf) -> mpf:
    return (1 - tanh(inner(x))) / 2


def tanh_slope(x: mpf) -> mpf:
    inner_slope = sqrt(2 / pi) * (1 + 3 * mpf("0.044715") * x**2)
    return tanh_share(x) - x * sech(inner(x)) ** 2 * inner_slope / 2


# GELU's at -x: there they are small far out, and keep their digits; at x they are 1 less that.
TABLES = [
    Table("kTanhTable", "tanh(x)", tanh, -4, 10, 1),
    Table("kGeluTable", "GELU(-x) / -x", share, -5, 7, 0),
    Table("kGeluSlopeTable", "GELU'(-x)", slope, -5, 7, 0),
    Table("kGeluTanhTable", "GELU(-x) / -x, approximated by tanh", tanh_share, -5, 7, 0),
    Table("kGeluTanhSlopeTable", "GELU'(-x), approximated by tanh", tanh_slope, -5, 7, 0),
]


def interval(table: Table, octave: int, part: int) -> list[mpf]:
    """The middle of one interval and the terms of its polynomial, from degree 0 on."""
    low = mpf(2) ** octave * (1 + mpf(part) / PARTS)
    high = mpf(2) ** octave * (1 + mpf(part + 1) / PARTS)
    middle, half, function = (low + high) / 2, (high - low) / 2, table.function
    if low >= table.flat:
        return [middle, mpf(table.limit), *[mpf(0)] * DEGREE]
    if (octave, part) != (table.lowest, 0):
        return [middle, *terms(lambda r: function(middle + r), -half, half, DEGREE)]
    if function(0):
        return [mpf(0), *terms(function, 0, high, DEGREE)]
    # without a constant term, so that small values keep all their digits
    ratio = terms(lambda r: function(r) / r if r else diff(function, 0), 0, high, DEGREE - 1)
    return [mpf(0), mpf(0), *ratio]


def terms(function: Callable[[mpf], mpf], low: mpf, high: mpf, degree: int) -> list[mpf]:
    return list(reversed(chebyfit(function, [low, high], degree + 1)))


def rows(table: Table) -> list[tuple[mpf, ...]]:
    """Eight rows of 32: an interval's column is where its index points."""
    columns: dict[int, list[mpf]] = {}
    for octave in range(table.lowest, table.lowest + OCTAVES):
        for part in range(PARTS):
            columns[(octave + BIAS) % OCTAVES * PARTS + part] = interval(table, octave, part)
    return list(zip(*(columns[index] for index in range(OCTAVES * PARTS)), strict=True))


def literal(value: mpf | float) -> str:
    """The nearest float32 in hexadecimal."""
    (rounded,) = struct.unpack("f", struct.pack("f", float(value)))
    digits, exponent = float(rounded).hex().split("p")
    return f"{digits.rstrip('0').rstrip('.')}p{exponent}f"


def text() -> str:
    mp.dps = 40
    parts = [TOP]
    for table in TABLES:
        parts.append(f"\n// {table.meaning}\ninline constexpr LookupTable {table.name} = {{\n")
        parts.append(f"  {literal(mpf(2) ** table.lowest)}, {literal(table.flat)},\n  {{\n")
        for row in rows(table):
            words = [literal(value) for value in row]
            lines = [", ".join(words[i : i + PARTS]) for i in range(0, len(words), PARTS)]
            parts.append("    {" + ",\n     ".join(lines) + "},\n")
        parts.append("  },\n};\n")
    parts.append("\n}  // namespace fused_mlp\n// clang-format on\n")
    return "".join(parts)


def main() -> int:
    HEADER.write_text(text())
    print(f"wrote {HEADER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
