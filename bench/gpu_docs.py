"""The table of docs/triton.md: a row for each kernel and problem, a column for each chip.

``python -m bench gpu-report --only triton --docs`` writes it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import BenchError
from .gpu_table import Line
from .tables import markdown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "triton.md"
BEGIN, END = "<!-- compiled: begin -->", "<!-- compiled: end -->"


def text(lines: Iterable[Line]) -> str:
    """Return the lines as one Markdown table, and a sentence on spills before it."""
    lines = list(lines)
    chips = list(dict.fromkeys(line.chip for line in lines))
    cells: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for key, line in _told_apart(lines):
        cells[key][line.chip] = _cell(line)
    rows = [[*key, *(found.get(chip, "–") for chip in chips)] for key, found in cells.items()]
    spilling = sum(line.spilled > 0 for line in lines)
    summary = f"{len(lines)} kernels were compiled, of which {spilling} spill registers."
    return f"{summary}\n\n{markdown(['problem', 'dtype', 'kernel', *chips], rows)}"


def write(lines: Iterable[Line], page: Path = PAGE) -> None:
    """Put the table between the page's two marks.

    Raises:
        BenchError: when the page lacks them.
    """
    head, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"{page} has no {BEGIN} … {END}")
    page.write_text(f"{head}{begin}\n\n{text(lines)}\n\n{end}{tail}", encoding="utf-8")


def _cell(line: Line) -> str:
    return (
        f"{line.registers} / {line.spilled} / {line.shared / 1024:.0f} / {line.products or '–'} / "
        f"{line.wide_loads}"
    )


def _told_apart(lines: Iterable[Line]) -> Iterator[tuple[tuple[str, ...], Line]]:
    """Yield each line with its row; a kernel that a problem launches again gets a number."""
    seen: dict[tuple[str, ...], int] = defaultdict(int)
    for line in lines:
        key = (line.problem, line.dtype, line.kernel)
        seen[(line.chip, *key)] += 1
        count = seen[(line.chip, *key)]
        yield (*key[:2], line.kernel if count == 1 else f"{line.kernel} ({count})"), line
