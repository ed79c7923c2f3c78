"""The pictures of a run: speed-up against batch size and by op; the others in plots_limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cases import NETWORK, OPS
from .results import Results, Row
from .rivals import EAGER, FUSED, NO_RIVALS
from .tables import times

# Okabe & Ito: told apart by colour-blind readers.
COLOURS = {
    EAGER: "#D55E00", FUSED: "#0072B2", "onednn": "#E69F00", "compile": "#009E73",
    "compile-max": "#56B4E9", "onnxruntime": "#CC79A7", "openvino": "#7F7F7F", "jax": "#000000",
    "attorch": "#A6761D",
}  # fmt: skip
_MARKERS = {"onednn": "s", "compile": "^", "compile-max": "v", "onnxruntime": "D",
            "openvino": "P", "jax": "X", "attorch": "*"}  # fmt: skip
STYLE = {
    "font.size": 10, "axes.titlesize": 10, "axes.titleweight": "bold", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.axisbelow": True, "svg.fonttype": "path", "svg.hashsalt": "fused_mlp",
}  # fmt: skip
DPI = 130


def save_all(
    results: Results, folder: Path, suffixes: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Write every plot that has data, in each of the formats."""
    from . import plots_limits as limits

    folder.mkdir(parents=True, exist_ok=True)
    found: list[Path] = []
    plots: dict[str, Callable[[Results], Figure | None]] = {
        "speed_up": speed_up, "ops": ops, "roofline": limits.roofline,
        "time_split": limits.time_split, "memory": limits.memory,
    }  # fmt: skip
    with matplotlib.rc_context(STYLE):
        for name, draw in plots.items():
            figure = draw(results)
            if figure is None:
                continue
            for suffix in suffixes:
                path = folder / f"{name}.{suffix}"
                same = {"Date": None} if suffix == "svg" else {}  # the same file every time
                figure.savefig(path, dpi=DPI, metadata=same)
                found.append(path)
    return found


def network_shapes(results: Results) -> list[str]:
    """Return the widths of the networks that were timed, as text, in order."""
    return list(dict.fromkeys(r.shape for r in results.of(FUSED) if r.op == NETWORK))


def batch_axis(axes: Axes, batches: Sequence[int]) -> None:
    """Make a logarithmic axis with a tick at each batch size."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [_short(b) for b in batches])
    axes.minorticks_off()
    axes.set_xlim(min(batches) / 1.6, max(batches) * 1.6)


def _short(batch: int) -> str:
    return f"{batch // 1024}k" if batch >= 1024 and batch % 1024 == 0 else str(batch)


def where(results: Results) -> str:
    """Return the machine in two lines for below a picture."""
    found = results.environment
    versions = found.get("versions", {})
    return (
        f"{found.get('cpu')}, {found.get('threads')} threads, {found.get('isa')} kernels\ntorch "
        f"{versions.get('torch')}, {str(found.get('time', ''))[:10]}, "
        f"revision {found.get('git_revision')}"
    )


def speed_up(results: Results) -> Figure | None:
    """Draw the gain over eager against the batch size: a column a network, a row a mode."""
    shapes = network_shapes(results)
    if not shapes:
        return None
    rows = [r for r in results.rows if r.op == NETWORK and r.speed_up is not None]
    modes = [m for m in ("eval", "train") if any(r.mode == m for r in rows)]
    figure = Figure((max(5.5, 3.1 * len(shapes)), 0.9 + 2.7 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), len(shapes), squeeze=False, sharey="row")
    names = [n for n in dict.fromkeys(r.contestant for r in rows)
             if n not in (EAGER, *NO_RIVALS)]  # fmt: skip
    for line, mode in zip(panels, modes, strict=True):
        for axes, shape in zip(line, shapes, strict=True):
            here = [r for r in rows if (r.shape, r.mode) == (shape, mode)]
            axes.axhline(1, color=COLOURS[EAGER], linewidth=1.4, label="eager PyTorch")
            for name in (*names, FUSED):
                curve = sorted((r for r in here if r.contestant == name), key=lambda r: r.batch)
                _curve(axes, name, curve)
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}×")
            if here:
                batch_axis(axes, sorted({r.batch for r in here}))
            axes.margins(y=0.12)
            axes.set_title(f"({shape})  {'inference' if mode == 'eval' else 'training'}")
    for axes in panels[-1]:
        axes.set_xlabel("batch size")
    for line in panels:
        line[0].set_ylabel("speed-up over eager")
    found = {
        label: handle
        for axes in panels.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    order = [FUSED, "eager PyTorch", *names]
    labels = [label for label in order if label in found]
    figure.legend(
        [found[label] for label in labels], labels, loc="outside upper center",
        ncols=min(len(labels), max(4, 2 * len(shapes))), fontsize=9,
    )  # fmt: skip
    figure.supxlabel(where(results), fontsize=8, color="#555555")
    return figure


def _curve(axes: Axes, name: str, rows: Sequence[Row]) -> None:
    if not rows:
        return
    x, y = [r.batch for r in rows], [r.speed_up or 0 for r in rows]
    colour = COLOURS.get(name)
    if name != FUSED:
        axes.plot(x, y, color=colour, label=name, linewidth=1, linestyle="--", alpha=0.9,
                  marker=_MARKERS.get(name, "."), markersize=4)  # fmt: skip
        return
    axes.plot(x, y, "o-", color=colour, label=name, linewidth=2.4, markersize=6)
    low, high = [r.speed_up_low or 0 for r in rows], [r.speed_up_high or 0 for r in rows]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    for batch, value in zip(x, y, strict=True):
        axes.annotate(times(value), (batch, value), xytext=(0, 7), textcoords="offset points",
                      ha="center", fontsize=8, color=colour, fontweight="bold")  # fmt: skip


def _sizes(shape: str) -> str:
    return " × ".join(f"{int(n):,}".replace(",", "\u2009") for n in shape.split("×"))


_OPS_ACROSS = 4


def ops(results: Results) -> Figure | None:
    """Draw the gain over eager of each op on its own, a bar a size and mode."""
    found = {op: [r for r in results.of(FUSED) if r.op == op] for op in OPS}
    found = {op: rows for op, rows in found.items() if rows}
    if not found:
        return None
    most = max(len({r.shape for r in rows}) for rows in found.values())
    across = min(len(found), _OPS_ACROSS)
    down = math.ceil(len(found) / across)
    figure = Figure((4.2 * across, down * (1.4 + 0.42 * most)), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for unused in panels[len(found) :]:
        unused.set_axis_off()
    for axes, (op, rows) in zip(panels, found.items(), strict=False):
        shapes = list(dict.fromkeys(r.shape for r in rows))
        for mode, shift, shade in (("eval", -0.19, 0.55), ("train", 0.19, 1.0)):
            for row in (r for r in rows if r.mode == mode):
                place, value = shapes.index(row.shape) + shift, row.speed_up or 0
                label = "forward" if mode == "eval" else "forward and backward"
                axes.barh(place, value, 0.36, color=COLOURS[FUSED], alpha=shade, label=label)
                axes.text(value, place, f" {times(value)}", va="center", fontsize=8)
        axes.axvline(1, color=COLOURS[EAGER], linewidth=1.4, label="eager PyTorch")
        axes.set_yticks(range(len(shapes)), [_sizes(s) for s in shapes])
        axes.set_ylim(len(shapes) - 0.4, -0.6)
        axes.margins(x=0.14)
        axes.grid(visible=False, axis="y")
        axes.set(title=op, xlabel="speed-up over eager")
    handles, labels = panels[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        list(unique.values()), list(unique), loc="outside upper center", ncols=len(unique)
    )
    return figure
