"""What the CPU kernels are meant to gain over eager, and which measured cells fall short of it."""

from __future__ import annotations

from collections.abc import Iterator

from . import tables
from .cases import NETWORK, NETWORKS
from .results import Results, Row
from .rivals import EAGER, FUSED, KERNEL
from .tables import markdown, times

_A, _B, _C, _D = (",".join(map(str, widths)) for widths in NETWORKS)
# Over eager, for float32 on AVX-512 through the public modules, by batch.
SPEED_UP: dict[tuple[str, str], dict[int, float]] = {
    (_A, "eval"): {1: 8, 32: 8, 256: 6, 4096: 4.5, 65536: 4.5},
    (_A, "train"): {32: 4, 256: 6, 4096: 11, 65536: 13},
    (_B, "eval"): {1: 4, 32: 4.5, 256: 2.8, 4096: 2.6, 65536: 5.5},
    (_B, "train"): {32: 3, 256: 4, 4096: 4.5, 65536: 4.5},
    (_C, "eval"): {64: 2.5, 512: 2.3, 4096: 2.3},
    (_C, "train"): {64: 2.7, 512: 3, 4096: 2.9},
    (_D, "eval"): {32: 3, 256: 2.3, 1024: 2.3},
    (_D, "train"): {32: 2.3, 256: 2.2, 1024: 2.3},
}
NORMALIZE, NORMALIZE_FROM = 3.0, 1000  # times eager, from so many elements
NORMALIZE_COPY, NORMALIZE_COPY_FROM = 0.8, 10_000_000  # of the measured copy's bytes/s
FMA, FMA_FROM = 0.85, 256  # of the measured multiply-adds; rows of a batch
FMA_NETWORKS = (_B, _C, _D)


def missed(results: Results) -> Iterator[str]:
    """Yield a table of the networks' cells below their aim, and a list of the other aims missed."""
    lines = []
    for (shape, mode), aims in SPEED_UP.items():
        found = {
            r.batch: r.speed_up for r in results.of(FUSED) if (r.shape, r.mode) == (shape, mode)
        }
        short = [
            f"{batch}: {times(found[batch])} ({aim:g}×)"
            for batch, aim in aims.items()
            if round(found.get(batch) or aim, 2) < aim
        ]
        if short:
            lines.append([shape, mode, ", ".join(short)])
    if lines:
        yield markdown(["network", "mode", "batch: measured (aim)"], lines)
    others = [
        *(f"- {line}" for line in _kernels(results)),
        *(f"- {line}" for line in _normalize(results)),
        *(f"- {line}" for line in _memory(results)),
    ]
    if others:
        yield "\n".join(others)


def _kernels(results: Results) -> Iterator[str]:
    short = []
    for row in results.of(KERNEL):
        share = tables.roof_share(row, results.peaks)
        bound = row.op == NETWORK and row.shape in FMA_NETWORKS and row.batch >= FMA_FROM
        if bound and share and share[1] == "FMA" and share[0] < FMA:
            short.append(f"{row.shape} {row.mode} {row.batch}: {100 * share[0]:.0f} %")
    if short:
        yield (
            f"Kernels below {100 * FMA:.0f} % of the measured multiply-adds, from {FMA_FROM} rows: "
            + ", ".join(short)
        )


def _normalize(results: Results) -> Iterator[str]:
    def elements(row: Row) -> int:
        rows, columns = map(int, row.shape.split("×"))
        return rows * columns

    rows = [r for r in results.of(FUSED) if r.op == "normalize"]
    slow = [
        f"{row.shape} {row.mode} {times(row.speed_up)}"
        for row in rows
        if elements(row) >= NORMALIZE_FROM and (row.speed_up or NORMALIZE) < NORMALIZE
    ]
    if slow:
        yield f"`normalize` below {NORMALIZE:g}×: " + ", ".join(slow)
    shares = [
        (row, (row.gb_per_s or 0.0) / results.peaks["gb_per_s"])
        for row in rows
        if results.peaks and elements(row) >= NORMALIZE_COPY_FROM
    ]
    thin = [
        f"{row.shape} {row.mode} {100 * share:.0f} %"
        for row, share in shares
        if share < NORMALIZE_COPY
    ]
    if thin:
        yield f"`normalize` below {100 * NORMALIZE_COPY:.0f} % of a copy's bytes/s: " + ", ".join(
            thin
        )


def _memory(results: Results) -> Iterator[str]:
    """A training step that holds more than eager's."""
    eager = {r.case: r.peak_bytes for r in results.of(EAGER)}
    more = [
        f"{row.shape} {row.batch} {times(eager[row.case] / row.peak_bytes)}"
        for row in results.of(FUSED)
        if row.op == NETWORK
        and row.peak_bytes
        and (eager.get(row.case) or 0) < row.peak_bytes
        and row.case in eager
    ]
    if more:
        yield "Peak memory of a training step above eager's: " + ", ".join(more)
