"""``python -m bench report DIR``: one HTML page with everything in it, to be mailed or attached."""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import tables
from .environment import busyness
from .overhead import SHARES
from .results import Results, load

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: 3px 9px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
th { background: #f3f3f3 } img { max-width: 100% } .warn { background: #fff3cd; padding: .6em 1em }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 12px }
"""
_TITLES = {"speed_up": "Speed-up of networks", "ops": "Speed-up of the ops on their own",
           "roofline": "Roofline", "time_split": "Time split", "memory": "Peak memory"}  # fmt: skip


def write(folder: Path) -> Path:
    """Render ``results.json`` of a folder, and the plots beside it, as ``report.html`` in it.

    Raises:
        BenchError: when there is no result.
    """
    page = render(load(folder), folder)
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def render(results: Results, folder: Path) -> str:
    """Return the page; plots are read from ``folder`` where they are there."""
    where = results.environment
    parts = [f"<h1>fused_mlp on {_escape(where.get('cpu'))}</h1>", _summary(results)]
    if warning := busyness(where):
        parts.append(f'<p class="warn">{_escape(warning)}</p>')
    for name, title in _TITLES.items():
        picture = folder / f"{name}.svg"
        if picture.is_file():
            data = base64.b64encode(picture.read_bytes()).decode("ascii")
            parts.append(
                f'<h2>{title}</h2><img alt="{title}" src="data:image/svg+xml;base64,{data}">'
            )
    header, lines = tables.cells(results)
    parts += ["<h2>All cases</h2>", _table(header, lines), f"<p>{_escape(tables.LEGEND)}</p>"]
    losing = tables.losing_lines(results)
    parts += [f"<h2>Faster than fused ({len(losing)})</h2>", _list(losing or ["nobody"])]
    failed = tables.failed_lines(results)
    if failed:
        parts += ["<h2>Not timed</h2>", _list(failed)]
    note = "<p>Until the first result: compiling, converting and packing. In no other time.</p>"
    parts += ["<h2>First calls</h2>", note, _table(*tables.call_cells(results))]
    if results.overhead:
        parts += ["<h2>One small training step</h2>", _overhead(results.overhead)]
    for name, rows in results.extra.items():
        if rows:
            shown = [[str(v) for v in row.values()] for row in rows]
            parts += [f"<h2>{_escape(name.capitalize())}</h2>", _table(list(rows[0]), shown)]
    settings = json.dumps({**where, "peaks": results.peaks}, indent=1, ensure_ascii=False)
    parts += ["<h2>Environment</h2>", f"<pre>{_escape(settings)}</pre>"]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>fused_mlp benchmarks</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _summary(results: Results) -> str:
    where = results.environment
    text = (
        f"{where.get('time')}, {where.get('threads')} threads, {where.get('backend')} kernels "
        f"({where.get('isa')}), torch {where.get('versions', {}).get('torch')}, revision "
        f"{where.get('git_revision')}, on {where.get('device')}."
    )
    if results.peaks:
        text += (
            f" Measured ceilings: {results.peaks['gflops']:.0f} GFLOP/s, "
            f"{results.peaks['gb_per_s']:.1f} GB/s."
        )
    return f"<p>{_escape(text)}</p>"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_escape(name)}</th>" for name in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _overhead(split: dict[str, Any]) -> str:
    lines = [
        [name, f"{value:.1f}", f"{100 * value / split['fused step']:.0f} %", SHARES.get(name, "")]
        for name, value in split["fused"].items()
    ]
    return _table(["fused", "µs", "share", "what"], lines)


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_escape(line)}</li>" for line in lines) + "</ul>"


def _escape(value: Any) -> str:
    return html.escape(str(value))


def main(argv: Sequence[str]) -> int:
    """Write the page; the plots are drawn anew."""
    parser = argparse.ArgumentParser(
        prog="python -m bench report",
        description="Render the results in a folder as one self-contained HTML page.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where results.json is")
    options = parser.parse_args(argv)
    results = load(options.folder)
    from . import plots

    plots.save_all(results, options.folder)
    sys.stdout.write(f"{write(options.folder)}\n")
    return 0
