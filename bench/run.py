"""``python -m bench``: race fused_mlp against eager PyTorch and other rivals on this machine."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import rich.progress
import torch
from rich.console import Console

from fused_mlp import backends

from . import cases, environment, overhead, results, rivals, serving, tables, training
from .cases import Case
from .errors import BenchError
from .measure import measure
from .results import Results
from .timing import SMOKE, Budget

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16,
          "float16": torch.float16}  # fmt: skip
BUDGETS = {
    "quick": Budget(seconds=1.0),
    "docs": Budget(seconds=1.0, rounds=(5, 51)),
    "full": Budget(seconds=3.0, rounds=(9, 101)),
    "smoke": SMOKE,
}


def main(argv: Sequence[str]) -> int:
    """Run the sweep the options name, show it and write its files."""
    parser = _parser()
    options = parser.parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 220)
    # Compiled in this process: a pool of workers would run beside what is timed.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if options.smoke and not options.threads:
        options.threads = 1  # quick on a busy machine too
    with _settings(options):
        if options.smoke:
            with tempfile.TemporaryDirectory() as folder:
                _run(options, console, Path(folder))
            console.print("smoke: every path ran once; the numbers above mean nothing")
        else:
            _run(options, console, options.output or _new_folder())
    return 0


def _run(options: argparse.Namespace, console: Console, folder: Path) -> None:
    device = environment.choose_device(options.device)
    found = Results(environment.collect(device))
    sweep = "smoke" if options.smoke else options.sweep
    chosen, found.skipped = rivals.choose(_against(options, sweep))
    todo = _cases(options, sweep)
    _introduce(found, console, len(todo))
    found.peaks = environment.measure_peaks(device, *((64, 1) if options.smoke else (2048, 256)))
    with _progress(console, len(todo), options.smoke) as advance:
        for case in todo:
            advance(str(case))
            found.rows += measure(case, chosen, BUDGETS[sweep])
        if device.type == "cpu" and (options.smoke or not _narrowed(options)):
            advance("overhead")
            found.overhead = overhead.split(budget=SMOKE if options.smoke else None)
        if options.end_to_end or options.smoke:
            advance("end to end")
            found.extra["training"] = training.measure(device, options.smoke)
            found.extra["serving"] = serving.measure(device, options.smoke)
    found.environment["load_average_end"] = environment.load_average()
    tables.show(found, console)
    if found.overhead:
        console.print("\n" + overhead.text(found.overhead), markup=False, soft_wrap=True)
    for name, rows in found.extra.items():
        console.print(f"\n{name}", style="bold")
        console.print(tables.plain(rows), markup=False, soft_wrap=True)
    written = [*results.save(found, folder)]
    from . import plots, report

    written += plots.save_all(found, folder)
    written.append(report.write(folder))
    if options.smoke:
        results.load(written[0])
    else:
        console.print(f"\nWritten to {folder}: {', '.join(p.name for p in written)}", markup=False)


def _introduce(found: Results, console: Console, count: int) -> None:
    where = found.environment
    console.print(
        f"{where['cpu']}, {where['threads']} threads; torch {torch.__version__}, fused_mlp "
        f"{where['fused_mlp']} ({where['git_revision']}), {where['backend']} kernels, isa "
        f"{where['isa']}; {where['device']}; {count} cases",
        markup=False,
    )
    load = where["load_average"]
    if load is not None and load > environment.BUSY:
        console.print(
            f"The load average is {load}: something else runs here. Ratios stay roughly right, "
            "times do not; do not publish them.",
            style="bold yellow",
            markup=False,
        )
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


@contextlib.contextmanager
def _settings(options: argparse.Namespace) -> Iterator[None]:
    """Set threads and backend for a run."""
    before = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        with backends.use_backend(options.backend):
            yield
    except RuntimeError as error:
        if str(error).startswith(f"backend {options.backend!r} cannot run here"):
            raise BenchError(f"--backend: {error}") from error
        raise
    finally:
        torch.set_num_threads(before)


def _against(options: argparse.Namespace, sweep: str) -> Sequence[str]:
    if options.against is not None:
        return tuple(options.against)
    return rivals.AGAINST if sweep == "full" else rivals.QUICK


def _narrowed(options: argparse.Namespace) -> bool:
    return bool(options.net or options.batch or options.ops)


def _cases(options: argparse.Namespace, sweep: str) -> list[Case]:
    dtype = DTYPES[options.dtype]
    if not _narrowed(options):
        return cases.sweep(sweep, dtype, options.device)
    found: list[Case] = []
    if options.net or options.batch:
        nets = options.net or [cases.REFERENCE]
        found += cases.networks(nets, options.batch, dtype, options.device)
    if options.ops:
        found += cases.ops(sweep, dtype, options.device)
    if not found:
        raise BenchError("nothing to measure: batch norm cannot train at batch 1")
    return found


def _new_folder() -> Path:
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("results") / now


# ------------------------------------------------------------------------------ arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Race fused_mlp against eager PyTorch and others, here, in turns, in one "
        "process. Results are checked against float64 before anything is timed. Writes a table, "
        "JSON, CSV, plots and an HTML page.",
        epilog="more commands: compare A B, report DIR, overhead, gpu-report "
        "(each has its own --help)",
    )
    sweep = parser.add_mutually_exclusive_group()
    sweep.add_argument(
        "--quick", dest="sweep", action="store_const", const="quick", default="quick",
        help="the reference network and a few sizes of each op, under two minutes (the default)",
    )  # fmt: skip
    sweep.add_argument(
        "--full", dest="sweep", action="store_const", const="full",
        help="four networks, all sizes, all rivals that are installed; most of an hour",
    )  # fmt: skip
    sweep.add_argument(
        "--docs", dest="sweep", action="store_const", const="docs",
        help="what docs/benchmarks.md shows: four networks, six sizes of each op",
    )  # fmt: skip
    sweep.add_argument(
        "--smoke", action="store_true",
        help="run every code path once on tiny data and discard the results",
    )  # fmt: skip
    parser.add_argument(
        "--net", type=_net, action="append", metavar="N,N[,N…]",
        help="widths of a network, as 10,64,32,5; may be given more than once",
    )  # fmt: skip
    parser.add_argument("--batch", type=_list(_whole), metavar="N[,N…]", help="batch sizes")
    parser.add_argument("--ops", action="store_true", help="the ops on their own")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=_whole, metavar="N", help="of PyTorch on the CPU")
    parser.add_argument("--backend", choices=backends.NAMES, default="auto")
    parser.add_argument(
        "--against", type=_list(str.strip), metavar="NAME[,NAME…]",
        help=f"rivals: {', '.join(rivals.AGAINST)} (default: {', '.join(rivals.QUICK)}; all with "
        "--full). Those not installed are named and skipped",
    )  # fmt: skip
    parser.add_argument(
        "--end-to-end", action="store_true",
        help="also train to a fixed accuracy and measure serving; minutes more",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: results/DATE-TIME")
    return parser


def _whole(text: str) -> int:
    value = int(text) if text.strip().isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return value


def _list(parse: Callable[[str], object]) -> Callable[[str], list[object]]:
    return lambda text: [parse(part) for part in text.split(",")]


def _net(text: str) -> tuple[int, ...]:
    widths = tuple(_whole(part) for part in text.split(","))
    if len(widths) < 3:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no network: give inputs, at least one hidden width, and outputs"
        )
    return widths


def print_overhead(argv: Sequence[str]) -> int:
    """``python -m bench overhead``."""
    parser = argparse.ArgumentParser(
        prog="python -m bench overhead",
        description="Split one small training step into Python, dispatch, autograd engine, "
        "allocation and kernel, in µs.",
    )
    parser.add_argument("--net", type=_net, default=cases.REFERENCE, metavar="N,N[,N…]")
    parser.add_argument("--batch", type=_whole, default=32, metavar="N")
    parser.add_argument("--threads", type=_whole, metavar="N")
    parser.add_argument("--backend", choices=backends.NAMES, default="auto")
    options = parser.parse_args(argv)
    if options.batch < 2:
        parser.error("--batch: batch norm cannot train at batch 1")
    with _settings(options):
        sys.stdout.write(overhead.text(overhead.split(options.batch, options.net)) + "\n")
    return 0
