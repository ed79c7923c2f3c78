"""The command line of the demo."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .data import BUNDLED, Split, load_bundled, split
from .errors import DemoError, require_extras
from .table import load_csv

BATCH_SIZES = (32, 128, 512)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: the arguments after ``demo``; those of the process when None.

    Returns:
        The exit status: 0, or 1 when something stops the demo, which is said on stderr. Wrong
        options exit with 2, as argparse does.
    """
    parser = _parser()
    options = parser.parse_args(argv, argparse.Namespace(csv=None, target=None))
    if (options.csv is None) != (options.target is None):
        parser.error("--csv and --target go together")
    try:
        _run(options)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    modules = ["matplotlib", "rich"] + ([] if options.csv else ["sklearn"])
    require_extras(*modules)
    _check_output(options.output)
    device = _device(options.device)
    data = _load(options, device)
    # These need the extras.
    from . import report
    from .training import Settings, compare

    rows = len(data.train_features)
    sizes = sorted({min(size, rows) for size in options.batch_size})
    report.print_header(data, device)
    comparisons = []
    with report.Progress(len(sizes) * options.epochs) as progress:
        for size in sizes:
            settings = Settings(
                options.epochs, size, options.hidden, options.dropout, options.lr, options.seed,
                options.train_step,
            )  # fmt: skip
            comparisons.append(compare(data, settings, progress.updater(size)))
    report.print_table(data, comparisons)
    report.save_figure(data, comparisons, options.output)
    report.print_saved(options.output)


def _load(options: argparse.Namespace, device: torch.device) -> Split:
    table = load_csv(options.csv, options.target) if options.csv else load_bundled(options.dataset)
    return split(table, options.seed, device)


def _check_output(path: Path) -> None:
    """Raise before training, not after it, when the picture could not be written."""
    if path.suffix.lower() != ".png":
        raise DemoError(f"--output must end in .png, but got {path}")
    if path.is_dir():
        raise DemoError(f"--output is a folder: {path}")
    if not path.absolute().parent.is_dir():
        raise DemoError(f"--output: there is no folder {path.absolute().parent}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise DemoError(f"--output: no permission to write {path}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise DemoError(f"--device {name} cannot be used here: {reason}") from error
    return device


# ------------------------------------------------------------------------------ arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fused_mlp demo",
        description=(
            "Train the same network twice on real data, once with plain PyTorch and once fused, "
            "from the same initial weights and batches. Ends with a table (held-out accuracy or "
            "R², time of an epoch, throughput, speed-up) and a picture."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--dataset", choices=BUNDLED, default="digits", help="a data set scikit-learn ships"
    )
    source.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="your own table: a header row, numeric columns; needs --target",
    )
    parser.add_argument(
        "--target",
        metavar="COLUMN",
        default=argparse.SUPPRESS,
        help="the column of --csv to predict: text and whole numbers of at most 20 different "
        "values are classes, other numbers are regressed",
    )
    parser.add_argument(
        "--epochs", type=_whole(1), default=40, metavar="N", help="passes over the training rows"
    )
    parser.add_argument(
        "--batch-size",
        type=_list(_whole(2)),
        default=",".join(map(str, BATCH_SIZES)),
        metavar="N[,N…]",
        help="one or more; each is trained on its own",
    )
    parser.add_argument(
        "--hidden",
        type=_list(_whole(1)),
        default="64,32",
        metavar="N[,N…]",
        help="widths of the hidden layers",
    )
    parser.add_argument(
        "--dropout", type=_dropout, default=0.3, metavar="P", help="probability of dropout"
    )
    parser.add_argument(
        "--lr", type=_positive, default=1e-3, metavar="RATE", help="learning rate of Adam"
    )
    parser.add_argument(
        "--train-step",
        action="store_true",
        help="train the fused network a second time, each step in one call of TrainStep",
    )
    parser.add_argument("--device", default="cpu", help="where to train, such as cpu or cuda")
    parser.add_argument(
        "--seed",
        type=_whole(0),
        default=0,
        metavar="N",
        help="decides held-out rows, initial weights, batches and dropout",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo.png"), metavar="PNG", help="the picture's file"
    )
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.strip().isdecimal() else -1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
        return value

    return parse


def _list(parse: Callable[[str], int]) -> Callable[[str], tuple[int, ...]]:
    return lambda text: tuple(parse(part) for part in text.split(","))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _dropout(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability from 0 to below 1")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
