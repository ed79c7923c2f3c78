"""What ``python -m bench --smoke`` does beside measuring: every other path once, on its results."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

from . import compare, docs, gpu_command, plots, report, results
from .cases import NETWORK, Case
from .errors import BenchError
from .results import Results
from .rivals import NO_RIVALS, QUICK, Rival


def rivals_at(case: Case, rivals: Sequence[Rival]) -> Sequence[Rival]:
    """Return who runs a case: all at one network, the quick ones elsewhere: compiling is slow."""
    if case.op == NETWORK and case.batch > 1:
        return rivals
    return [rival for rival in rivals if rival.name in (*QUICK, *NO_RIVALS)]


def write_and_read(found: Results, folder: Path) -> None:
    """Write every file there is and read it again, compare, render, simulate.

    Raises:
        BenchError: when a file is missing or says something else.
    """
    results.save(found, folder)
    pictures = plots.save_all(found, folder)
    page = report.write(folder)
    again = results.load(folder)
    if len(again.rows) != len(found.rows) or not pictures or not page.stat().st_size:
        raise BenchError(f"the files in {folder} are not what was measured")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        compare.main([str(folder), str(folder)])
        documentation = folder / "page.md"
        documentation.write_text(f"{docs.BEGIN}\n{docs.END}\n", encoding="utf-8")
        docs.write({"smoke": again}, documentation, folder)
        if importlib.util.find_spec("triton") is not None:
            gpu_command.main(["--only", "steps", "--chip", "sm_90", "--op", "normalize"])
