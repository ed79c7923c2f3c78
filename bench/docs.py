"""``python -m bench docs``: measure everything docs/benchmarks.md shows and write it there."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import overhead, tables
from .cases import NETWORK, NETWORKS
from .errors import BenchError
from .results import Results, Row, load
from .rivals import AGAINST, EAGER, FUSED

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
_PLOTS = {
    "speed_up": "Speed-up over eager PyTorch against the batch size",
    "roofline": "FLOP/s against FLOPs a byte, under the measured ceilings",
    "time_split": "Where a training step at batch 32 spends its time",
    "memory": "Peak memory of a training step against the batch size",
}


def _nets(*which: int) -> list[str]:
    return [part for i in which for part in ("--net", ",".join(map(str, NETWORKS[i])))]


# Folder of the results: arguments, and what to set in the environment.
RUNS: dict[str, tuple[list[str], dict[str, str]]] = {
    "main": (["--docs", "--end-to-end", "--against", "eager,onednn"], {}),
    "one-thread": (["--threads", "1", *_nets(0, 1), "--batch", "1,32,256,4096"], {}),
    "rivals": ([*_nets(0), "--batch", "32,4096", "--against", ",".join(AGAINST)], {}),
    "avx2": ([*_nets(0, 1), "--batch", "1,32,256,4096"], {"FUSED_MLP_CPU_ISA": "avx2"}),
}


def main(argv: Sequence[str]) -> int:
    """Measure, unless told to take what is there, and write the page's tables and pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m bench docs",
        description="Run the sweeps behind docs/benchmarks.md and regenerate its tables and "
        "docs/images. For an idle machine: it refuses a busy one.",
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "docs", metavar="DIR")
    parser.add_argument("--no-run", action="store_true", help="use the results in the folder")
    parser.add_argument("--busy", action="store_true", help="measure on a busy machine too")
    parser.add_argument(
        "--rivals-everywhere", action="store_true",
        help="race torch.compile and the other runtimes on all four networks at all their batch "
        "sizes; half an hour more",
    )  # fmt: skip
    parser.add_argument("--page", type=Path, default=PAGE, help=argparse.SUPPRESS)
    parser.add_argument("--images", type=Path, default=IMAGES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.no_run:
        _measure(options.folder, options.busy, options.rivals_everywhere)
    found = {
        name: load(options.folder / name)
        for name in RUNS
        if (options.folder / name / "results.json").is_file()
    }
    if "main" not in found:
        raise BenchError(f"there are no results in {options.folder / 'main'}")
    write(found, options.page)
    options.images.mkdir(parents=True, exist_ok=True)
    for name in _PLOTS:
        source = options.folder / "main" / f"{name}.png"
        if source.is_file():
            shutil.copyfile(source, options.images / f"bench_{name}.png")
    sys.stdout.write(f"{options.page}\n")
    return 0


def _measure(folder: Path, busy: bool, everywhere: bool) -> None:
    from .environment import BUSY, load_average

    load_now = load_average()
    if load_now is not None and load_now > BUSY and not busy:
        raise BenchError(
            f"the load average is {load_now}: numbers to be published want an idle machine "
            "(--busy measures all the same)"
        )
    from fused_mlp import backends

    for name, (arguments, variables) in RUNS.items():
        if name == "avx2" and backends.isa() != "avx512":
            continue  # what it would show is what the others show
        if name == "rivals" and everywhere:
            arguments = [*_nets(0, 1, 2, 3), "--against", ",".join(AGAINST)]
        output = folder / name
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-m", "bench", *arguments, "--output", str(output)]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=False)
        if done.returncode:
            raise BenchError(f"{' '.join(command[1:])} ended with {done.returncode}")


def write(found: dict[str, Results], page: Path) -> None:
    """Put the numbers between the page's two marks.

    Raises:
        BenchError: when the page lacks them.
    """
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"{page} has no {BEGIN} … {END}")
    numbers = "\n\n".join(_sections(found))
    page.write_text(f"{head}{begin}\n\n{numbers}\n\n{end}{tail}", encoding="utf-8")


def _sections(found: dict[str, Results]) -> Iterable[str]:
    results = found["main"]
    yield _provenance(results)
    for name, title in _PLOTS.items():
        if name != "time_split" or results.overhead:
            yield f"![{title}](images/bench_{name}.png)"
    yield "### Networks, forward in eval and forward with backward in training"
    networks = _only(results, lambda r: r.op == NETWORK)
    yield tables.markdown(*tables.cells(networks))
    yield "### The ops on their own"
    yield tables.markdown(*tables.cells(_only(results, lambda r: r.op != NETWORK)))
    if "one-thread" in found:
        yield "### Threads"
        yield (
            "Milliseconds on one thread and on "
            f"{results.environment.get('threads')}, fused; the gain over eager in brackets."
        )
        yield _threads(found["one-thread"], results)
    if "rivals" in found:
        yield "### Compilers and other runtimes"
        yield _versions(found["rivals"])
        yield tables.markdown(*_rival_cells(found["rivals"]))
    if "avx2" in found:
        yield "### The same machine held to AVX2"
        yield tables.markdown(*tables.cells(found["avx2"]))
    if results.overhead:
        yield "### One small training step"
        yield overhead.text(results.overhead)
    for name, title in (("training", "Training to a fixed accuracy"), ("serving", "Serving")):
        if results.extra.get(name):
            yield f"### {title}"
            yield tables.plain(results.extra[name])
    yield "### Where others are faster, and what could not run"
    losing = [line for part in found.values() for line in tables.losing_lines(part)]
    failed = [line for part in found.values() for line in tables.failed_lines(part)]
    yield "\n".join(f"- {line}" for line in dict.fromkeys(losing)) or "Nobody was faster."
    if failed:
        yield "Not timed:\n\n" + "\n".join(f"- {line}" for line in dict.fromkeys(failed))


def _only(results: Results, keep: Callable[[Row], bool]) -> Results:
    return Results(results.environment, results.peaks, [r for r in results.rows if keep(r)])


def _provenance(results: Results) -> str:
    where = results.environment
    return (
        f"Measured {str(where.get('time'))[:10]} at revision `{where.get('git_revision')}` on "
        f"{where.get('cpu')}, {where.get('cores')} cores, {where.get('threads')} threads, kernels "
        f"for {where.get('isa')}, torch {where.get('versions', {}).get('torch')}, float32. Load "
        f"average at the start {where.get('load_average')}. Measured ceilings: "
        f"{results.peaks['gflops']:.0f} GFLOP/s (a product of 2048 squared), "
        f"{results.peaks['gb_per_s']:.1f} GB/s (a copy of 256 MiB)."
    )


def _versions(results: Results) -> str:
    versions = results.environment.get("versions", {})
    return "Speed-up over eager. " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "."


def _rival_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return each contestant's speed-up over eager."""
    names = [FUSED, *tables.rivals_of(results.rows)]
    lines = []
    for rows in tables.by_case(results.rows).values():
        first = rows[EAGER]
        line = [f"{first.op} {first.shape}", str(first.batch), first.mode]
        line += [tables.times(rows[n].speed_up) if n in rows else "" for n in names]
        lines.append(line)
    return ["case", "batch", "mode", *names], lines


def _threads(one: Results, several: Results) -> str:
    more = {r.case[:-1]: r for r in several.of(FUSED)}

    def cell(row: Row | None) -> str:
        return f"{tables.seconds(row.median_s)} ({tables.times(row.speed_up)})" if row else ""

    lines = [
        [f"{r.op} {r.shape}", str(r.batch), r.mode, cell(r), cell(more.get(r.case[:-1]))]
        for r in one.of(FUSED)
    ]
    return tables.markdown(["case", "batch", "mode", "1 thread", "all threads"], lines)
