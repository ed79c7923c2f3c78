"""The pictures of what bounds a run: roofline, the time of a small step, peak memory."""

from __future__ import annotations

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cases import NETWORK, OPS
from .overhead import SHARES
from .peaks import ceiling
from .plots import COLOURS, batch_axis, network_shapes
from .results import Results, Row
from .rivals import EAGER, FUSED
from .tables import by_case, size

Pair = tuple[Row, Row]  # eager's and fused's row of a case


def roofline(results: Results) -> Figure | None:
    """Draw FLOP/s against FLOPs a byte under the measured ceilings: networks left, ops right.

    Eager's bytes are counted from its op list, fused's are those of inputs, outputs and weights.
    An arrow leads from eager to fused at the largest size of each group; the others are faint.
    """
    groups = _groups(results)
    if not results.peaks or not groups:
        return None
    halves = [
        {key: pairs for key, pairs in groups.items() if (key[0] in OPS) == ops}
        for ops in (False, True)
    ]
    halves = [half for half in halves if half]
    figure = Figure((6.6 * len(halves), 5.2), layout="constrained")
    panels = figure.subplots(1, len(halves), squeeze=False, sharey=True)[0]
    for axes, half in zip(panels, halves, strict=True):
        seen = []
        for (key, pairs), marker in zip(half.items(), "os^vD*PXhpd<>H" * 3, strict=False):
            seen += _points(axes, key, pairs, marker)
        _roofs(axes, results.peaks, seen)
        axes.set(xlabel="FLOPs per byte moved", xscale="log", yscale="log")
        axes.legend(
            fontsize=8, loc="lower right", title="blue: fused, orange: eager", title_fontsize=8
        )
    panels[0].set_ylabel("GFLOP/s")
    figure.supxlabel(
        "Large: the largest size of each group. Above the slanted roof the data stayed in a cache.",
        fontsize=8, color="#555555",
    )  # fmt: skip
    return figure


def _groups(results: Results) -> dict[tuple[str, str], list[Pair]]:
    """Return eager's and fused's timed rows by (op or network, mode), the smallest first."""
    found: dict[tuple[str, str], list[Pair]] = {}
    for rows in by_case(results.rows).values():
        if all(n in rows and rows[n].gflops and rows[n].bytes for n in (EAGER, FUSED)):
            row = rows[FUSED]
            key = (f"({row.shape})" if row.op == NETWORK else row.op, row.mode)
            found.setdefault(key, []).append((rows[EAGER], row))
    return {key: sorted(pairs, key=lambda p: p[1].flops or 0) for key, pairs in found.items()}


def _points(
    axes: Axes, key: tuple[str, str], pairs: list[Pair], marker: str
) -> list[tuple[float, float]]:
    seen = []
    for last, pair in ((pair is pairs[-1], pair) for pair in pairs):
        spots = [((r.flops or 0) / (r.bytes or 1), r.gflops or 0) for r in pair]
        seen += spots
        for name, spot in zip((EAGER, FUSED), spots, strict=True):
            axes.plot(
                *spot, marker, color=COLOURS[name], linestyle="none",
                markersize=8 if last else 4, alpha=0.95 if last else 0.3,
                markeredgecolor="white", markeredgewidth=0.6 if last else 0,
                label=" ".join(key) if last and name == FUSED else None,
            )  # fmt: skip
        if last:
            axes.annotate("", spots[1], spots[0], arrowprops={
                "arrowstyle": "->", "color": "#888888", "linewidth": 0.9, "shrinkA": 5,
                "shrinkB": 5})  # fmt: skip
    return seen


def _roofs(axes: Axes, peaks: dict[str, float], seen: list[tuple[float, float]]) -> None:
    top, copy = ceiling(peaks), peaks["gb_per_s"]
    low = min(x for x, _ in seen) / 2
    high = max(*(x for x, _ in seen), top / copy) * 3
    axes.plot([low, top / copy, high], [low * copy, top, top], color="black", linewidth=1.4)
    axes.annotate(f"copy, {copy:.0f} GB/s", (low, low * copy), xytext=(16, 1),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    labels = [(peaks["gflops"], "matrix product")]
    if "fma_gflops" in peaks:
        labels.append((peaks["fma_gflops"], "multiply-adds"))
    for value, what in labels:
        if value < top:
            axes.plot([value / copy, high], [value, value], color="black", linewidth=0.9,
                      linestyle=":")  # fmt: skip
        above = value == top
        axes.annotate(f"{what}, {value:.0f} GFLOP/s", (high, value), ha="right", fontsize=8,
                      xytext=(0, 3 if above else -10), textcoords="offset points")  # fmt: skip


def time_split(results: Results) -> Figure | None:
    """Draw a small training step: eager and fused to one scale, and below the parts of fused."""
    split = results.overhead
    if not split:
        return None
    figure = Figure((9, 4.6), layout="constrained")
    whole, parts = figure.subplots(2, 1, height_ratios=(1, 2.2))
    for place, name in enumerate((EAGER, FUSED)):
        total = split[f"{name} step"]
        whole.barh(place, total, 0.7, color=COLOURS[name])
        whole.text(total, place, f"  {total:.0f} µs", va="center", fontweight="bold")
    whole.set_yticks([0, 1], ["eager", "fused"])
    whole.invert_yaxis()
    whole.margins(x=0.12)
    network = ",".join(map(str, split["widths"]))
    whole.set_title(
        f"One training step of ({network}) at batch {split['batch']}: forward and backward"
    )
    shades = matplotlib.colormaps["Blues"]
    values = list(split[FUSED].items())
    for place, (_, value) in enumerate(values):
        parts.barh(place, value, 0.75, color=shades(0.85 - 0.06 * place))
        share = 100 * value / split["fused step"]
        text = f"  {value:.1f} µs, {share:.0f} %"
        parts.text(max(value, 0), place, text, va="center", fontsize=8)
    parts.set_yticks(range(len(values)), [name for name, _ in values], fontsize=9)
    for place, (name, _) in enumerate(values):
        parts.annotate(SHARES.get(name, ""), (1, place), xycoords=("axes fraction", "data"),
                       ha="right", va="center", fontsize=8, color="#555555")  # fmt: skip
    parts.invert_yaxis()
    parts.set_xlim(min(0, *(v for _, v in values)), 3.2 * max(v for _, v in values))
    parts.set_xlabel("µs")
    parts.set_title("Where the fused step spends them")
    for axes in (whole, parts):
        axes.grid(visible=False, axis="y")
    return figure


def memory(results: Results) -> Figure | None:
    """Draw the peak memory of a training step against the batch size, a panel a network."""
    found: dict[str, list[Pair]] = {}
    for rows in by_case(results.rows).values():
        pair = rows.get(EAGER), rows.get(FUSED)
        if all(r is not None and r.peak_bytes for r in pair):
            eager, fused = pair
            if fused is not None and eager is not None and fused.mode == "train":
                if fused.op == NETWORK:
                    found.setdefault(fused.shape, []).append((eager, fused))
    shapes = [s for s in network_shapes(results) if s in found]
    if not shapes:
        return None
    figure = Figure((max(5.0, 3.1 * len(shapes)), 3.6), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0]
    for axes, shape in zip(panels, shapes, strict=True):
        pairs = sorted(found[shape], key=lambda p: p[1].batch)
        batches = [fused.batch for _, fused in pairs]
        for i, name in enumerate((EAGER, FUSED)):
            axes.plot(batches, [p[i].peak_bytes or 0 for p in pairs], "o-", color=COLOURS[name],
                      label=name)  # fmt: skip
        for eager, fused in pairs:
            ratio = (eager.peak_bytes or 0) / (fused.peak_bytes or 1)
            axes.annotate(f"{ratio:.1f}× less" if ratio >= 1 else f"{1 / ratio:.1f}× more",
                          (fused.batch, fused.peak_bytes or 1), xytext=(0, -13), fontsize=8,
                          textcoords="offset points", ha="center", color=COLOURS[FUSED],
                          )  # fmt: skip
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda v, _: size(v))
        batch_axis(axes, batches)
        axes.margins(y=0.15)
        axes.set(title=f"({shape})", xlabel="batch size")
    panels[0].set_ylabel("held above the start")
    panels[0].legend(loc="upper left")
    figure.suptitle("Peak memory of a training step", fontweight="bold", fontsize=11)
    return figure
