"""The pictures of a run: speed-up, roofline, time split, peak memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cases import NETWORK
from .results import Results, Row
from .rivals import AGAIN, EAGER, FUSED
from .tables import by_case, times

# Okabe & Ito: told apart by colour-blind readers.
COLOURS = {
    EAGER: "#D55E00", FUSED: "#0072B2", "onednn": "#E69F00", "compile": "#009E73",
    "compile-max": "#56B4E9", "onnxruntime": "#CC79A7", "openvino": "#999999", "jax": "#000000",
}  # fmt: skip
STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "path",
    "svg.hashsalt": "fused_mlp",
}  # fmt: skip
DPI = 110


def save_all(results: Results, folder: Path) -> list[Path]:
    """Write every plot that has data, each as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Path] = []
    plots: dict[str, Callable[[Results], Figure | None]] = {
        "speed_up": speed_up, "roofline": roofline, "time_split": time_split, "memory": memory,
    }  # fmt: skip
    with matplotlib.rc_context(STYLE):
        for name, draw in plots.items():
            figure = draw(results)
            if figure is None:
                continue
            for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
                path = folder / f"{name}.{suffix}"
                figure.savefig(path, dpi=DPI, metadata=metadata)
                found.append(path)
    return found


def _figure(columns: int, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    figure = Figure((max(5.5, 3.6 * columns), height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, sharey=True)
    return figure, list(axes[0])


def _network_shapes(results: Results) -> list[str]:
    return list(dict.fromkeys(r.shape for r in results.of(FUSED) if r.op == NETWORK))


def speed_up(results: Results) -> Figure | None:
    """Draw the gain over eager against the batch size, a panel a network."""
    shapes = _network_shapes(results)
    if not shapes:
        return None
    figure = Figure((max(5.5, 3.4 * len(shapes)), 6.4), layout="constrained")
    panels = figure.subplots(2, len(shapes), squeeze=False, sharey="row")
    names = [n for n in dict.fromkeys(r.contestant for r in results.rows)
             if n not in (EAGER, AGAIN)]  # fmt: skip
    for line, mode in zip(panels, ("eval", "train"), strict=True):
        for axes, shape in zip(line, shapes, strict=True):
            for name in names:
                rows = [r for r in results.of(name) if (r.op, r.shape, r.mode) == (
                    NETWORK, shape, mode)]  # fmt: skip
                _curve(axes, name, sorted(rows, key=lambda r: r.batch))
            axes.axhline(1, color=COLOURS[EAGER], linewidth=1.2, label="eager")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(lambda v, _: f"{v:.2g}×")
            batches = {r.batch for r in results.of(FUSED) if (r.op, r.shape) == (NETWORK, shape)}
            axes.set_xticks(sorted(batches), [_short(b) for b in sorted(batches)], minor=False)
            axes.minorticks_off()
            axes.set_title(f"({shape}) {mode}", fontsize=10)
            axes.grid(alpha=0.25)
    for axes in panels[-1]:
        axes.set_xlabel("batch size")
    for line in panels:
        line[0].set_ylabel("speed-up over eager")
    handles, labels = panels[0][0].get_legend_handles_labels()
    more = panels[1][0].get_legend_handles_labels()
    unique = dict(zip([*labels, *more[1]], [*handles, *more[0]], strict=True))
    panels[0][0].legend(unique.values(), unique.keys(), frameon=False, fontsize=8)
    figure.suptitle("Faster than eager PyTorch (median, quartiles shaded)", fontweight="bold")
    return figure


def _short(batch: int) -> str:
    return f"{batch // 1024}k" if batch >= 1024 and batch % 1024 == 0 else str(batch)


def _curve(axes: Axes, name: str, rows: Sequence[Row]) -> None:
    if not rows:
        return
    x, y = [r.batch for r in rows], [r.speed_up or 0 for r in rows]
    colour = COLOURS.get(name)
    strong = name == FUSED
    axes.plot(x, y, "o-" if strong else ".--", color=colour, label=name,
              linewidth=2.2 if strong else 1.1)  # fmt: skip
    low, high = [r.speed_up_low or 0 for r in rows], [r.speed_up_high or 0 for r in rows]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if strong:
        for batch, value in zip(x, y, strict=True):
            axes.annotate(times(value).rstrip("×"), (batch, value), xytext=(0, 5),
                          textcoords="offset points", ha="center", fontsize=8)  # fmt: skip


def roofline(results: Results) -> Figure | None:
    """Draw FLOP/s against FLOPs a byte under the machine's two measured ceilings.

    Eager's bytes are counted from its op list, fused's are those of inputs, outputs and weights.
    """
    if not results.peaks or not results.of(FUSED):
        return None
    figure, (axes, *_) = _figure(1, 5.0)
    figure.set_size_inches(8, 5)
    seen: list[float] = []
    for (_, group), marker in zip(_groups(results).items(), "osD^vPX*<>" * 4, strict=False):
        for name in (EAGER, FUSED):
            points = [(r.flops / r.bytes, r.gflops) for r in group[name] if r.flops and r.bytes]
            seen += [x for x, _ in points]
            axes.plot(*zip(*points, strict=True), marker, color=COLOURS[name], alpha=0.75,
                      markersize=5, linestyle="none",
                      label=_legend(group[name][0]) if name == FUSED else None)  # fmt: skip
    compute, copy = results.peaks["gflops"], results.peaks["gb_per_s"]
    low, high = min([*seen, 0.1]) / 2, max([*seen, compute / copy]) * 2
    corner = compute / copy
    axes.plot([low, corner, high], [low * copy, compute, compute], color="black", linewidth=1.2)
    axes.text(high, compute * 1.06, f"{compute:.0f} GFLOP/s measured product", ha="right",
              fontsize=8)  # fmt: skip
    axes.text(low * 1.1, low * copy * 1.4, f"{copy:.0f} GB/s measured copy", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte moved", ylabel="GFLOP/s")
    axes.set_title("Roofline: fused in blue, eager in orange", fontweight="bold")
    axes.text(0, -0.16, "Points above the slanted roof worked from cache.", fontsize=8,
              transform=axes.transAxes)  # fmt: skip
    axes.grid(alpha=0.25, which="major")
    axes.legend(frameon=False, fontsize=7, loc="lower right")
    return figure


def _groups(results: Results) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """Return eager's and fused's timed rows by (op or network, mode)."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for rows in by_case(results.rows).values():
        if all(n in rows and rows[n].median_s for n in (EAGER, FUSED)):
            row = rows[FUSED]
            key = (row.shape if row.op == NETWORK else row.op, row.mode)
            for name in (EAGER, FUSED):
                found.setdefault(key, {EAGER: [], FUSED: []})[name].append(rows[name])
    return found


def _legend(row: Row) -> str:
    return f"({row.shape}) {row.mode}" if row.op == NETWORK else f"{row.op} {row.mode}"


def time_split(results: Results) -> Figure | None:
    """Draw where a small training step spends its time."""
    split = results.overhead
    if not split:
        return None
    figure, (axes, *_) = _figure(1, 3.0)
    figure.set_size_inches(10, 3.0)
    shades = matplotlib.colormaps["tab20c"].colors
    for place, name in enumerate((FUSED, EAGER)):
        left = 0.0
        for i, (share, value) in enumerate(split[name].items()):
            width = max(value, 0.0)
            colour = shades[(i + 8 * (name == EAGER)) % len(shades)]
            axes.barh(place, width, left=left, color=colour, edgecolor="white")
            if width > 0.035 * split["eager step"]:
                axes.text(left + width / 2, place, f"{share}\n{value:.0f}", ha="center",
                          va="center", fontsize=7)  # fmt: skip
            left += width
        axes.text(left, place, f"  {split[f'{name} step']:.0f} µs", va="center", fontsize=9)
    axes.set_yticks([0, 1], ["fused", "eager"])
    axes.set_xlabel("µs")
    axes.margins(x=0.1)
    network = ",".join(map(str, split["widths"]))
    axes.set_title(f"One training step of ({network}) at batch {split['batch']}",
                   fontweight="bold")  # fmt: skip
    return figure


def memory(results: Results) -> Figure | None:
    """Draw the peak memory of a training step against the batch size."""
    shapes = _network_shapes(results)
    found = {
        shape: {
            name: sorted(
                (r.batch, r.peak_bytes / 2**20)
                for r in results.of(name)
                if (r.op, r.shape, r.mode) == (NETWORK, shape, "train") and r.peak_bytes
            )
            for name in (EAGER, FUSED)
        }
        for shape in shapes
    }
    shapes = [s for s in shapes if found[s][EAGER] and found[s][FUSED]]
    if not shapes:
        return None
    figure, panels = _figure(len(shapes), 3.8)
    for axes, shape in zip(panels, shapes, strict=True):
        for name in (EAGER, FUSED):
            axes.plot(*zip(*found[shape][name], strict=True), "o-", color=COLOURS[name],
                      label=name)  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="batch size")
        axes.set_title(f"({shape})", fontsize=10)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("MiB above the start of the step")
    panels[0].legend(frameon=False)
    figure.suptitle("Peak memory of a training step", fontweight="bold")
    return figure
