"""What a run found, and its files: JSON holds everything, CSV the rows."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import BenchError
from .rivals import NO_RIVALS

FORMAT = "fused_mlp-bench"
VERSION = 1


@dataclass
class Row:
    """One contestant in one case. Times are seconds; ratios are eager's time over this one's.

    Attributes:
        speed_up, speed_up_low, speed_up_high: median and quartiles of the ratios in each round.
        over_fused: this one's time over fused's, the median of the ratios in each round.
        first_call_s: until the first result, with compiling, converting and packing.
        error: relative, in the 2-norm, against float64; None where it was not checked.
        peak_bytes: the most a step holds above what was there before.
        launches, event_s, graph_s, host_s: on a GPU alone.
        note: why there are no times.
    """

    op: str
    shape: str
    batch: int
    mode: str
    dtype: str
    device: str
    threads: int
    contestant: str
    median_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    samples: int = 0
    first_call_s: float | None = None
    speed_up: float | None = None
    speed_up_low: float | None = None
    speed_up_high: float | None = None
    over_fused: float | None = None
    error: float | None = None
    flops: float | None = None
    bytes: float | None = None
    ops: int | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    event_s: float | None = None
    graph_s: float | None = None
    host_s: float | None = None
    note: str = ""

    @property
    def case(self) -> tuple[str, str, int, str, str, str, int]:
        """What tells a case from others."""
        return (self.op, self.shape, self.batch, self.mode, self.dtype, self.device, self.threads)

    @property
    def device_s(self) -> float | None:
        """What the device takes: by CUDA events on a GPU, on the CPU the whole call."""
        return self.median_s if self.event_s is None else self.event_s

    @property
    def gflops(self) -> float | None:
        return self.flops / self.device_s / 1e9 if self.flops and self.device_s else None

    @property
    def gb_per_s(self) -> float | None:
        return self.bytes / self.device_s / 1e9 if self.bytes and self.device_s else None


@dataclass
class Results:
    """One run.

    Attributes:
        peaks: ``gflops``, ``gb_per_s`` and, on the CPU, ``fma_gflops``; see ``bench.peaks``.
        skipped: rivals that could not run, and why.
        overhead: the split of a small training step; see ``bench.overhead``.
        extra: tables of other measurements (end to end, serving), by name.
    """

    environment: dict[str, Any]
    peaks: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    overhead: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def of(self, contestant: str) -> list[Row]:
        """Return the timed rows of a contestant."""
        return [r for r in self.rows if r.contestant == contestant and r.median_s is not None]

    def losing(self) -> list[Row]:
        """Return rivals' rows, eager among them, that were faster than fused at the same case."""
        return [
            row
            for row in self.rows
            if row.contestant not in NO_RIVALS and row.over_fused is not None and row.over_fused < 1
        ]


def save(results: Results, folder: Path) -> list[Path]:
    """Write ``results.json`` and ``results.csv`` into a folder, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(results)}
    paths = [folder / "results.json", folder / "results.csv"]
    text = json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False)
    paths[0].write_text(text + "\n", encoding="utf-8")
    paths[1].write_text(_csv(results.rows), encoding="utf-8")
    return paths


def load(path: Path) -> Results:
    """Read what :func:`save` wrote; a folder stands for the ``results.json`` in it.

    Raises:
        BenchError: naming the file, when it is not there or holds something else.
    """
    if path.is_dir():
        path = path / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BenchError(f"{path} is not a result of `python -m bench`")
    if content.get("version") != VERSION:
        raise BenchError(f"{path} has format version {content.get('version')}, expected {VERSION}")
    try:
        return Results(
            environment=dict(content["environment"]),
            peaks=dict(content["peaks"]),
            rows=[Row(**row) for row in content["rows"]],
            skipped=dict(content["skipped"]),
            overhead=dict(content["overhead"]),
            extra=dict(content["extra"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BenchError(f"{path} is damaged: {error}") from error


def _finite(value: Any) -> Any:
    """Return the value with NaN and infinities, which JSON has not, as None."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(rows: Iterable[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return out.getvalue()
