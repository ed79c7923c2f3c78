"""``python -m bench compare A.json B.json``: what changed beyond noise."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import Results, Row, load
from .rivals import AGAIN, FUSED
from .tables import Case, markdown, seconds, times

LEAST = 0.03  # a smaller change than this is never called one
_COMPARED = ("cpu", "gpu", "machine", "cores", "versions", "backend", "isa", "threads", "variables")


@dataclass(frozen=True)
class Change:
    """A case in both runs.

    Attributes:
        factor: the new time over the old one.
        noise: by how much the factor may stray without meaning anything.
    """

    before: Row
    after: Row
    factor: float
    noise: float

    @property
    def verdict(self) -> str:
        if abs(self.factor - 1) <= self.noise:
            return "same"
        return "slower" if self.factor > 1 else "faster"


def changes(before: Results, after: Results, contestant: str = FUSED) -> list[Change]:
    """Return every case that both runs timed.

    The times are corrected by eager's, which ran in turns with them: a machine that was slower as
    a whole changes nothing. Noise is what the quartiles of both runs and eager against itself
    allow, and at least 3 %.
    """
    old = {row.case: row for row in before.of(contestant)}
    noise = _noise(before), _noise(after)
    found = []
    for row in after.of(contestant):
        was = old.get(row.case)
        if was is None or was.speed_up is None or row.speed_up is None:
            continue
        factor = was.speed_up / row.speed_up if contestant != "eager" else _times(was, row)
        allowed = sum(_relative(r) for r in (was, row))
        allowed = max(LEAST, allowed, *(n.get(row.case, 0.0) for n in noise))
        found.append(Change(was, row, factor, allowed))
    return found


def _times(before: Row, after: Row) -> float:
    return (after.median_s or 0.0) / (before.median_s or 1.0)


def _relative(row: Row) -> float:
    """Return half the distance between the quartiles of a row's speed-up, over its median."""
    if not row.speed_up or row.speed_up_low is None or row.speed_up_high is None:
        return 0.0
    if row.contestant == "eager":
        return ((row.high_s or 0.0) - (row.low_s or 0.0)) / 2 / (row.median_s or 1.0)
    return (row.speed_up_high - row.speed_up_low) / 2 / row.speed_up


def _noise(results: Results) -> dict[Case, float]:
    return {row.case: abs((row.speed_up or 1.0) - 1) for row in results.of(AGAIN)}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what of the environments differs and could explain a change."""
    return [
        f"{name}: {before.get(name)} → {after.get(name)}"
        for name in _COMPARED
        if before.get(name) != after.get(name)
    ]


def text(before: Results, after: Results, contestant: str = FUSED) -> str:
    """Return the comparison as Markdown."""
    found = changes(before, after, contestant)
    lines = [f"- {line}" for line in differences(before.environment, after.environment)]
    parts = ["The environments differ:\n\n" + "\n".join(lines)] if lines else []
    if not found:
        return "\n\n".join([*parts, f"The two runs have no case of {contestant} in common."])
    moved = [c for c in found if c.verdict != "same"]
    if moved:
        header = ("case", "batch", "mode", "before", "after", "time", "noise", "verdict")
        parts.append(markdown(header, [_line(c) for c in moved]))
    parts.append(
        f"{contestant}: {len(found)} cases in both, "
        f"{sum(c.verdict == 'faster' for c in moved)} faster, "
        f"{sum(c.verdict == 'slower' for c in moved)} slower, {len(found) - len(moved)} the same "
        "within noise."
    )
    gone = len(before.of(contestant)) - len(found)
    new = len(after.of(contestant)) - len(found)
    if gone or new:
        parts.append(f"Only in the first: {gone}; only in the second: {new}.")
    return "\n\n".join(parts)


def _line(change: Change) -> list[str]:
    row = change.after
    return [
        f"{row.op} {row.shape}", str(row.batch), f"{row.mode} {row.dtype}",
        seconds(change.before.median_s), seconds(row.median_s), times(change.factor),
        f"±{100 * change.noise:.0f} %", change.verdict,
    ]  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Print the comparison; returns 1 when something became slower and that was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m bench compare",
        description="Show what changed between two results of `python -m bench` beyond noise.",
    )
    parser.add_argument("before", type=Path, help="results.json, or the folder it is in")
    parser.add_argument("after", type=Path, help="the same of the other run")
    parser.add_argument("--contestant", default=FUSED, help="whose times (default: fused)")
    parser.add_argument(
        "--fail", action="store_true", help="exit with 1 when some case became slower"
    )
    options = parser.parse_args(argv)
    before, after = load(options.before), load(options.after)
    sys.stdout.write(text(before, after, options.contestant) + "\n")
    slower = any(c.verdict == "slower" for c in changes(before, after, options.contestant))
    return int(options.fail and slower)
