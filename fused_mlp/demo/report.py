"""What the demo shows: a progress bar, a table and a picture. Needs the ``demo`` extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import rich.progress
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as RichTable

from .. import backends
from .data import Split
from .training import TRAIN_STEP, Comparison, Run

# Okabe & Ito's vermillion, blue and bluish green: told apart by colour-blind readers and, the first
# two, in grey print.
COLOURS = {"eager": "#D55E00", "fused": "#0072B2", TRAIN_STEP: "#009E73"}
# Thin and dashed over broad and pale: curves are seen where they coincide.
LINES: dict[str, dict[str, Any]] = {
    "eager": {"linewidth": 4.5, "linestyle": "-", "alpha": 0.45},
    "fused": {"linewidth": 1.6, "linestyle": (0, (4, 2))},
    TRAIN_STEP: {"linewidth": 1.6, "linestyle": (0, (1, 2))},
}
FIGURE_INCHES = (12.0, 5.0)
FIGURE_DPI = 120


# ------------------------------------------------------------------------------ the screen


def print_header(data: Split, device: torch.device) -> None:
    """Say what is trained on and what runs it."""
    console = Console(highlight=False)
    console.print(data.describe(), markup=False)
    backend = backends.active_backend(device.type)
    isa = backends.isa() if (device.type, backend) == ("cpu", "native") else None
    kernels = f"{backend} kernels" + (f" ({isa})" if isa else "")
    where = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    console.print(f"torch {torch.__version__}, {where}, {kernels}", markup=False)
    if backend == "reference":
        console.print(
            "The fused kernels are not there, so no speed-up is to be seen; "
            "`python -m fused_mlp doctor` says what is missing.",
            style="yellow",
            markup=False,
        )


class Progress:
    """A bar over the epochs of every batch size.

    It is drawn between epochs alone: a thread that draws would disturb what is timed.
    """

    def __init__(self, epochs: int) -> None:
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            auto_refresh=False,
        )
        self._task = self._bar.add_task("warming up", total=epochs)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def updater(self, batch_size: int) -> Callable[[dict[str, Run]], None]:
        """Return what :func:`training.compare` calls after each epoch."""

        def update(runs: dict[str, Run]) -> None:
            losses = ", ".join(f"{name} {run.losses[-1]:.3f}" for name, run in runs.items())
            text = f"batch {batch_size}: loss {losses}"
            self._bar.update(self._task, advance=1, description=text, refresh=True)

        return update


def print_table(data: Split, comparisons: Sequence[Comparison]) -> None:
    """Print one line a batch size and network."""
    table = RichTable()
    table.add_column("batch", justify="right")
    table.add_column("network")
    for heading in (score_name(data), "s/epoch", "samples/s", "speed-up"):
        table.add_column(heading, justify="right")
    for comparison in comparisons:
        for name, run in comparison.runs.items():
            eager = name == "eager"
            table.add_row(
                str(comparison.batch_size) if eager else "",
                name,
                format_score(data, run.score),
                f"{run.seconds_per_epoch:.4f}",
                f"{run.samples_per_second:,.0f}",
                "" if eager else f"{comparison.speed_up(name):.2f}×",
                end_section=name == [*comparison.runs][-1],
            )
    console = Console(highlight=False)
    console.print(table)
    console.print(_note(data, comparisons), markup=False)


def _note(data: Split, comparisons: Sequence[Comparison]) -> str:
    rows = len(data.test_features)
    note = f"{score_name(data)} on the {rows} held-out rows"
    if data.classes is not None:
        share = sum(run.score for c in comparisons for run in c.runs.values())
        share /= sum(len(c.runs) for c in comparisons)
        error = 100 * (share * (1 - share) / rows) ** 0.5
        note += f" (standard error {error:.1f} points)"
    return f"{note}. Times are medians over epochs, of forward, loss, backward and Adam."


def print_saved(path: Path) -> None:
    """Say where the picture is."""
    Console(highlight=False, soft_wrap=True).print(f"Loss and throughput: {path}", markup=False)


def score_name(data: Split) -> str:
    """Return what the networks are scored by."""
    return "R²" if data.classes is None else "accuracy"


def format_score(data: Split, score: float) -> str:
    """Return the score as text."""
    return f"{score:.3f}" if data.classes is None else f"{100 * score:.1f} %"


# ----------------------------------------------------------------------------- the picture


def save_figure(data: Split, comparisons: Sequence[Comparison], path: Path) -> None:
    """Write a PNG with the loss curves and the throughput of every contestant."""
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(FIGURE_INCHES, dpi=FIGURE_DPI, layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_losses(left, data, comparisons)
        _draw_throughput(right, comparisons)
        figure.suptitle(f"{data.name}: the same network, eager and fused", fontweight="bold")
        figure.savefig(path, format="png")


def _draw_losses(axes: Axes, data: Split, comparisons: Sequence[Comparison]) -> None:
    for comparison in comparisons:
        for name, run in comparison.runs.items():
            epochs = range(1, len(run.losses) + 1)
            axes.plot(
                epochs,
                run.losses,
                color=COLOURS[name],
                **LINES[name],
                marker="o" if len(run.losses) == 1 else None,
                label=name if comparison is comparisons[0] else None,
            )
        _label_curve(axes, comparison, comparisons)
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_title("Training loss" + (" (standardised target)" if data.classes is None else ""))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)


def _label_curve(axes: Axes, comparison: Comparison, comparisons: Sequence[Comparison]) -> None:
    if len(comparisons) == 1:
        return
    losses = comparison.runs["eager"].losses
    axes.annotate(
        f"batch {comparison.batch_size}",
        (len(losses), losses[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
    )


def _draw_throughput(axes: Axes, comparisons: Sequence[Comparison]) -> None:
    names = [*comparisons[0].runs]
    width = 0.76 / len(names)
    for side, name in enumerate(names):
        places = [i + (side - (len(names) - 1) / 2) * width for i in range(len(comparisons))]
        heights = [c.runs[name].samples_per_second / 1e3 for c in comparisons]
        bars = axes.bar(places, heights, width * 0.94, color=COLOURS[name], label=name)
        labels = ["" if name == "eager" else f"{c.speed_up(name):.2f}×" for c in comparisons]
        axes.bar_label(bars, labels, padding=3, fontweight="bold")
    axes.set_xticks(range(len(comparisons)), [str(c.batch_size) for c in comparisons])
    axes.set_xlabel("batch size")
    axes.set_ylabel("thousand samples per second")
    axes.set_title("Training throughput")
    axes.margins(y=0.12)
    axes.set_xlim(-0.6, len(comparisons) - 0.4)
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper left")
