"""The options of ``python -m bench``, and what they set for a run."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fused_mlp import backends

from . import cases, rivals
from .errors import BenchError

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16,
          "float16": torch.float16}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command that measures."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Race fused_mlp against eager PyTorch and others, here, in turns, in one "
        "process. Results are checked against float64 before anything is timed. Writes a table, "
        "JSON, CSV, plots and an HTML page.",
        epilog="more commands: compare A B, report DIR, overhead, train-step, gpu-report "
        "(each has its own --help)",
    )
    sweep = parser.add_mutually_exclusive_group()
    sweep.add_argument(
        "--quick", dest="sweep", action="store_const", const="quick",
        help="the reference network and a few sizes of each op, under two minutes (the default)",
    )  # fmt: skip
    sweep.add_argument(
        "--full", dest="sweep", action="store_const", const="full",
        help="four networks, all sizes, all rivals that are installed, and end to end; most of an "
        "hour",
    )  # fmt: skip
    sweep.add_argument(
        "--docs", dest="sweep", action="store_const", const="docs",
        help="the sizes docs/benchmarks.md shows: four networks, a dozen sizes of each op",
    )  # fmt: skip
    sweep.add_argument(
        "--smoke", action="store_true",
        help="run every code path once on tiny data; without --output, results are discarded",
    )  # fmt: skip
    parser.add_argument(
        "--net", type=net, action="append", metavar="N,N[,N…]",
        help="widths of a network, as 10,64,32,5; may be given more than once",
    )  # fmt: skip
    parser.add_argument("--batch", type=_list(whole), metavar="N[,N…]", help="batch sizes")
    parser.add_argument(
        "--mode", choices=cases.MODES,
        help="eval: forward under inference_mode; train: forward and backward (default: both)",
    )  # fmt: skip
    parser.add_argument("--ops", action="store_true", help="the ops on their own")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of data and parameters")
    parser.add_argument("--threads", type=whole, metavar="N", help="of PyTorch on the CPU")
    parser.add_argument(
        "--backend", choices=backends.NAMES, default="auto", help="whose kernels fused runs on"
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S",
        help="of measuring a case, all contestants together (default: 1; 3 with --full)",
    )  # fmt: skip
    parser.add_argument(
        "--against", type=_list(str.strip), metavar="NAME[,NAME…]",
        help=f"rivals: {', '.join(rivals.AGAINST)} (default: {', '.join(rivals.QUICK)}; all with "
        "--full). Those not installed are named and skipped",
    )  # fmt: skip
    parser.add_argument(
        "--end-to-end", action="store_true",
        help="training to a fixed accuracy, whole training steps, serving, and the split of a "
        "small step; minutes",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: results/DATE-TIME")
    return parser


def whole(text: str) -> int:
    """Parse a whole number from 1 up."""
    value = int(text) if text.strip().isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return value


def _list(parse: Callable[[str], object]) -> Callable[[str], list[object]]:
    return lambda text: [parse(part) for part in text.split(",")]


def net(text: str) -> tuple[int, ...]:
    """Parse the widths of a network."""
    widths = tuple(whole(part) for part in text.split(","))
    if len(widths) < 3:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no network: give inputs, at least one hidden width, and outputs"
        )
    return widths


@contextlib.contextmanager
def settings(options: argparse.Namespace) -> Iterator[None]:
    """Set threads and backend for a run.

    Raises:
        BenchError: for a backend that cannot run here.
    """
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
