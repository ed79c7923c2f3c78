"""``python -m bench``: race fused_mlp against eager PyTorch and other rivals on this machine."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import rich.progress
import torch
from rich.console import Console

from . import (
    cases,
    compile_cost,
    environment,
    overhead,
    peaks,
    results,
    rivals,
    serving,
    smoke,
    tables,
    train_step,
    training,
)
from .cases import Case
from .errors import BenchError
from .measure import measure
from .options import DTYPES, parser, settings
from .results import Results
from .rivals import Rival
from .timing import SMOKE, Budget

BUDGETS = {
    "quick": Budget(seconds=1.0),
    "docs": Budget(seconds=1.0),
    "full": Budget(seconds=3.0, rounds=(9, 101)),
    "smoke": SMOKE,
}

_END_TO_END = {
    "training to an accuracy": training.measure,
    "training step": train_step.measure,
    "compiling a fused step": compile_cost.measure,
    "serving": serving.measure,
}


def main(argv: Sequence[str]) -> int:
    """Run the sweep the options name, show it and write its files.

    Returns:
        0; 130 when it was interrupted, in which case what was measured is written all the same.
    """
    options = parser().parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 220)
    # Compiled in this process: a pool of workers would run beside what is timed.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if options.smoke and not options.threads:
        options.threads = 1  # quick on a busy machine too
    with settings(options), _fresh_compiler_cache():
        found = Results(environment.collect(environment.choose_device(options.device)))
        interrupted = _measure(options, console, found)
        tables.show_all(found, console)
        if options.smoke and not options.output:
            with tempfile.TemporaryDirectory() as folder:
                smoke.write_and_read(found, Path(folder))
            console.print("smoke: every path ran once; the numbers above mean nothing")
        else:
            folder = options.output or _new_folder()
            written = ", ".join(path.name for path in _write(found, folder))
            console.print(f"\nWritten to {folder}: {written}", markup=False)
    return 130 if interrupted else 0


@contextlib.contextmanager
def _fresh_compiler_cache() -> Iterator[None]:
    """Let torch.compile find nothing of an earlier run, so that first calls mean the same."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            undo.callback(os.environ.pop, "TORCHINDUCTOR_CACHE_DIR")
        yield


def _write(found: Results, folder: Path) -> list[Path]:
    from . import plots, report

    return [*results.save(found, folder), *plots.save_all(found, folder), report.write(folder)]


def _measure(options: argparse.Namespace, console: Console, found: Results) -> bool:
    """Fill the results with what the options ask for; return whether that was interrupted."""
    device = torch.device(options.device)
    sweep = "smoke" if options.smoke else options.sweep or "quick"
    whole = not _narrowed(options)
    chosen, found.skipped = rivals.choose(_against(options, sweep))
    todo: list[tuple[str, Callable[[], object]]] = []
    budget = BUDGETS[sweep]
    if options.seconds is not None:
        budget = dataclasses.replace(budget, seconds=options.seconds)
    for case in _cases(options, sweep):
        who = smoke.rivals_at(case, chosen) if options.smoke else chosen
        todo.append((str(case), _rows(found, case, who, budget)))
    if device.type == "cpu" and (whole or options.end_to_end):
        short = SMOKE if options.smoke else None
        todo.append(("overhead", lambda: found.overhead.update(overhead.split(budget=short))))
    if options.end_to_end or (whole and sweep in ("full", "smoke")):
        for name, run in _END_TO_END.items():
            todo.append((name, _into(found.extra, name, run, device, options.smoke)))
    _introduce(found, console, len(todo))
    interrupted = False
    try:
        found.peaks = peaks.measure(device, DTYPES[options.dtype], options.smoke)
        with _progress(console, len(todo), options.smoke) as advance:
            for name, run in todo:
                advance(name)
                run()
    except KeyboardInterrupt:
        interrupted = True
        console.print("interrupted: what follows is what was measured until now", style="bold")
    found.environment["load_average_end"] = environment.load_average()
    return interrupted


def _rows(found: Results, case: Case, who: Sequence[Rival], budget: Budget) -> Callable[[], object]:
    return lambda: found.rows.extend(measure(case, who, budget))


def _into(
    table: dict[str, Any], name: str, run: Callable[..., Any], *arguments: Any
) -> Callable[[], object]:
    return lambda: table.update({name: run(*arguments)})


def _introduce(found: Results, console: Console, count: int) -> None:
    where = found.environment
    console.print(
        f"{where['cpu']}, {where['threads']} threads; torch {torch.__version__}, fused_mlp "
        f"{where['fused_mlp']} ({where['git_revision']}), {where['backend']} kernels, isa "
        f"{where['isa']}; {where['device']}; {count} to do",
        markup=False,
    )
    if warning := environment.busyness(where):
        console.print(warning, style="bold yellow", markup=False)
    if where["backend"] == "reference":
        console.print(
            "The fused kernels are not there, so there is no speed-up to be seen; "
            "`python -m fused_mlp doctor` says what is missing.",
            style="yellow",
            markup=False,
        )


@contextlib.contextmanager
def _progress(console: Console, total: int, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Draw a bar between cases alone: a thread that draws would disturb what is timed."""
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=quiet,
    )
    task = bar.add_task("warming up", total=total + 1)

    def advance(text: str) -> None:
        bar.update(task, advance=1, description=text, refresh=True)

    with bar:
        yield advance


def _against(options: argparse.Namespace, sweep: str) -> Sequence[str]:
    if options.against is not None:
        return tuple(options.against)
    whole_smoke = sweep == "smoke" and not _narrowed(options)
    return rivals.AGAINST if sweep == "full" or whole_smoke else rivals.QUICK


def _narrowed(options: argparse.Namespace) -> bool:
    """Return whether the options name what to measure, and no sweep with it."""
    named = options.net or options.batch or options.ops
    return bool(named or (options.end_to_end and options.sweep is None))


def _cases(options: argparse.Namespace, sweep: str) -> list[Case]:
    dtype = DTYPES[options.dtype]
    modes = [options.mode] if options.mode else cases.MODES
    if not _narrowed(options):
        return [c for c in cases.sweep(sweep, dtype, options.device) if c.mode in modes]
    found: list[Case] = []
    if options.net or options.batch:
        nets = options.net or [cases.REFERENCE]
        batches = (1, 8) if options.smoke and not options.batch else options.batch
        found += cases.networks(nets, batches, dtype, options.device, modes)
    if options.ops:
        found += cases.ops(sweep, dtype, options.device, modes)
    if not found and not options.end_to_end:
        raise BenchError("nothing to measure: batch norm cannot train at batch 1")
    return found


def _new_folder() -> Path:
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("results") / now
