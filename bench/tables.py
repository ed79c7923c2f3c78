"""Results as tables: for the terminal with rich, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .peaks import ceiling
from .results import Results, Row
from .rivals import AGAIN, EAGER, FUSED, KERNEL, NO_RIVALS


def seconds(value: float | None) -> str:
    """Return a time with three digits and its unit."""
    if value is None:
        return "–"
    for scale, unit in ((1e-6, "µs"), (1e-3, "ms")):
        if value < scale * 1000:
            scaled = value / scale
            return f"{scaled:.3g} {unit}" if scaled < 100 else f"{scaled:.0f} {unit}"
    return f"{value:.3g} s"


def times(value: float | None) -> str:
    """Return a ratio, as ``4.2×``."""
    if value is None:
        return "–"
    return f"{value:.1f}×" if value >= 9.95 else f"{value:.2f}×"


def size(value: float | None) -> str:
    """Return bytes with their unit."""
    if value is None:
        return "–"
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


Case = tuple[str, str, int, str, str, str, int]


def by_case(rows: Iterable[Row]) -> dict[Case, dict[str, Row]]:
    """Return the rows of each case by contestant, in the order they were measured."""
    found: dict[Case, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.case, {})[row.contestant] = row
    return found


def rivals_of(rows: Iterable[Row]) -> list[str]:
    """Return who else ran, in order."""
    names = dict.fromkeys(row.contestant for row in rows)
    return [name for name in names if name not in (EAGER, *NO_RIVALS)]


LEGEND = (
    "Speed-up: eager's time over fused's, median of the ratios within each round. A rival's "
    "column: its time over fused's. Of peak: of the measured multiply-adds' FLOP/s (on a GPU the "
    "measured product's) or the measured copy's bytes/s, whichever is nearer. Kernel: the same of "
    "the kernels alone. Peak memory: fused / eager."
)
_WIDE = 140  # columns of a terminal that shows every column of the table

HEADER = ("case", "batch", "mode", "eager", "fused", "speed-up", "quartiles", "A/A noise",
          "of peak", "kernel", "peak memory")  # fmt: skip


def cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the header and the lines of the main table.

    A rival's cell is fused's gain over it.
    """
    others = rivals_of(results.rows)
    lines = []
    for rows in by_case(results.rows).values():
        eager, fused = rows.get(EAGER), rows.get(FUSED)
        if eager is None or fused is None:
            continue
        again = rows.get(AGAIN)
        shown = [
            f"{fused.op} {fused.shape}",
            str(fused.batch),
            fused.mode,
            seconds(eager.median_s),
            seconds(fused.median_s),
            times(fused.speed_up) if fused.median_s else fused.note,
            f"{times(fused.speed_up_low)} – {times(fused.speed_up_high)}",
            noise(again),
            of_peak(fused, results.peaks),
            of_peak(rows.get(KERNEL), results.peaks),
            f"{size(fused.peak_bytes)} / {size(eager.peak_bytes)}",
        ]
        lines.append(shown + [_gain_over(rows.get(name)) for name in others])
    return [*HEADER, *(f"vs {name}" for name in others)], lines


def _gain_over(rival: Row | None) -> str:
    if rival is None:
        return ""
    if rival.over_fused is None:
        return "wrong" if rival.note.startswith("wrong") else "failed"
    return times(rival.over_fused)


def noise(again: Row | None) -> str:
    """Return how far eager against itself strays from 1."""
    if again is None or again.speed_up_low is None or again.speed_up_high is None:
        return "–"
    return f"±{50 * (again.speed_up_high - again.speed_up_low):.0f} %"


def of_peak(row: Row | None, peaks: dict[str, float]) -> str:
    """Return the share of the nearer ceiling a row reaches: FLOP/s or bytes/s."""
    share = None if row is None else roof_share(row, peaks)
    return "–" if share is None else f"{100 * share[0]:.0f} % {share[1]}"


def roof_share(row: Row, peaks: dict[str, float]) -> tuple[float, str] | None:
    """Return (share, "FMA", "product" or "copy") of the roof above a row."""
    if not peaks or row.gflops is None or row.gb_per_s is None:
        return None
    roof = "FMA" if "fma_gflops" in peaks else "product"
    return max((row.gflops / ceiling(peaks), roof), (row.gb_per_s / peaks["gb_per_s"], "copy"))


def call_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of what a first call takes, and on a GPU of where calls spend time.

    The first call has compiling, converting and packing in it; it is no part of other times.
    """
    gpu = any(row.event_s is not None for row in results.rows)
    names = [EAGER, FUSED, *rivals_of(results.rows)]
    header = ["case", "batch", "mode", *(f"{name} first" for name in names)]
    if gpu:
        header += [f"{name} {what}" for what in ("events", "graph", "host", "launches")
                   for name in (EAGER, FUSED)]  # fmt: skip
    lines = []
    for rows in by_case(results.rows).values():
        if FUSED not in rows:
            continue
        row = rows[FUSED]
        line = [f"{row.op} {row.shape}", str(row.batch), row.mode]
        line += [seconds(rows[n].first_call_s) if n in rows else "" for n in names]
        for field in ("event_s", "graph_s", "host_s") if gpu else ():
            line += [seconds(getattr(rows[n], field)) for n in (EAGER, FUSED)]
        if gpu:
            line += [str(rows[n].launches or "–") for n in (EAGER, FUSED)]
        lines.append(line)
    return header, lines


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; columns after the first are set to the right."""
    rows = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    rows += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(rows)


def losing_lines(results: Results) -> list[str]:
    """Return a sentence for every rival that was faster than fused."""
    fused = {row.case: row for row in results.of(FUSED)}
    found = []
    for row in results.losing():
        found.append(
            f"{row.op} {row.shape} batch {row.batch} {row.mode} {row.dtype}: {row.contestant} "
            f"{seconds(row.median_s)}, fused {seconds(fused[row.case].median_s)} "
            f"({times(row.over_fused)})"
        )
    return found


def failed_lines(results: Results) -> list[str]:
    """Return a sentence for everything that was not timed, and why."""
    found = [f"{name}: {reason}" for name, reason in results.skipped.items()]
    for row in results.rows:
        if row.note:
            found.append(
                f"{row.contestant} at {row.op} {row.shape} batch {row.batch} {row.mode}: {row.note}"
            )
    return found


def show(results: Results, console: Console) -> None:
    """Print everything in the terminal; a narrow one leaves some columns to the files."""
    header, lines = cells(results)
    room = console.width - 11 * max(len(header) - len(HEADER) - 1, 0)  # rivals' columns
    hidden = set() if room >= _WIDE else {"quartiles", "of peak", "kernel", "peak memory"}
    kept = [i for i, name in enumerate(header) if name not in hidden]
    console.print(_rich([header[i] for i in kept], [[line[i] for i in kept] for line in lines]))
    console.print(LEGEND, style="dim", markup=False)
    if any(row.event_s is not None for row in results.rows):
        console.print("\nOn the GPU", style="bold")
        console.print(_rich(*call_cells(results)))
    losing = losing_lines(results)
    console.print(f"\nFaster than fused: {'nobody' if not losing else len(losing)}", style="bold")
    for sentence in losing:
        console.print(f"  {sentence}", markup=False, soft_wrap=True)
    failed = failed_lines(results)
    if failed:
        console.print("\nNot timed:", style="bold")
        for sentence in failed:
            console.print(f"  {sentence}", markup=False, soft_wrap=True)


def _rich(header: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for i, name in enumerate(header):
        side: Any = "left" if i in (0, 2) else "right"
        table.add_column(name, justify=side, overflow="fold", no_wrap=i > 0)
    for line in lines:
        table.add_row(*line)
    return table


def show_all(results: Results, console: Console) -> None:
    """Print the cases, the split of a small step and every other table."""
    from . import overhead

    if results.rows:
        show(results, console)
    if results.overhead:
        console.print("\n" + overhead.text(results.overhead), markup=False, soft_wrap=True)
    for name, rows in results.extra.items():
        console.print(f"\n{name.capitalize()}", style="bold")
        console.print(plain(rows), markup=False, soft_wrap=True)


def plain(rows: Sequence[dict[str, object]]) -> str:
    """Return rows of the same keys as a Markdown table."""
    if not rows:
        return ""
    return markdown(list(rows[0]), [[str(v) for v in row.values()] for row in rows])
