"""Measures the tables of docs/reliability.md and writes them there.

    make reliability                      # hard numbers, wrong arguments and, where there, mutants
    python scripts/reliability.py --mutants results.json    # what `make mutants` kept with --output

Every table stands between two comments, `<!-- NAME: begin -->` and `<!-- NAME: end -->`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
sys.path.insert(0, str(ROOT / "tests"))

from support.hard import HARD, Errors, applies, measure  # noqa: E402
from support.mistakes import FUNCTIONS, outcome  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}" if value < 1e5 else f"{value:.1e}"


def _pair(errors: Errors) -> str:
    if not math.isfinite(errors.largest):
        return "not finite"
    return f"{_number(errors.largest)} / {_number(errors.mean)}"


def hard_numbers() -> str:
    """Return largest and mean error of eager and fused, a row an input and result."""
    lines = [
        "| input | | eager: largest / mean | fused: largest / mean |",
        "|---|---|---:|---:|",
    ]
    for dtype in DTYPES:
        for name in HARD:
            if not applies(name, dtype):
                continue
            short = {torch.float32: "", torch.bfloat16: ", bfloat16", torch.float16: ", float16"}
            errors = measure(name, dtype=dtype, device=torch.device("cpu"))
            for what, (eager, fused) in errors.items():
                if eager.largest == fused.largest == 0:  # nothing is left to compare
                    continue
                lines.append(f"| {name}{short[dtype]} | {what} | {_pair(eager)} | {_pair(fused)} |")
    return "\n".join(lines)


def _shortened(message: str) -> str:
    line = message.splitlines()[0].replace("|", "\\|").replace("torch.", "")
    return line if len(line) < 150 else line[:147] + "…"


def wrong_arguments() -> str:
    """Return what every function says to wrong arguments; alike answers in one row."""
    lines = ["| function | argument | given | error |", "|---|---|---|---|"]
    for function in FUNCTIONS:
        rows: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
        for argument, given, arguments in function.mistakes():
            error = outcome(function.ours, arguments)
            if not isinstance(error, Exception):
                continue
            message = str(error).splitlines()[0].removeprefix(f"{function.name}(): ")
            # What came stands in the messages: that apart, mistakes of a kind have the same.
            kind = re.sub(r"but got (?!a nested).*|not \w+$|is on .*|\(.*", "", message)
            rows.setdefault((argument, type(error).__name__, kind), []).append((given, message))
        for (argument, error_type, _), answers in rows.items():
            given = ", ".join(answer[0] for answer in answers)
            lines.append(
                f"| `{function.name}` | `{argument}` | {given} | "
                f"{error_type}: {_shortened(answers[0][1])} |"
            )
    return "\n".join(lines)


def mutants(results: list[dict]) -> str:
    """Return how many mutants of each operator and part were killed."""
    parts = {
        "reference": "the formulas, `fused_mlp/reference`, `dropout.py` and `activations.py`",
        "autograd": "the autograd functions, `fused_mlp/ops`",
        "cpu": "the CPU kernels, `csrc/cpu/kernels`",
        "triton": "the Triton kernels, `kernels`, in its interpreter",
    }
    tried = [r for r in results if r["outcome"] != "invalid"]
    killed = [r for r in tried if r["outcome"] == "killed"]
    lines = ["| mutants of | tried | killed |", "|---|---:|---:|"]
    for part, text in parts.items():
        counts = Counter(r["outcome"] for r in tried if r["group"] == part)
        if counts:
            lines.append(f"| {text} | {sum(counts.values())} | {counts['killed']} |")
    lines.append(f"| all | {len(tried)} | {len(killed)} ({len(killed) / len(tried):.0%}) |")
    return "\n".join(lines)


def write(name: str, text: str) -> None:
    page = PAGE.read_text()
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.split(begin)
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=Path, nargs="+", help="what make mutants wrote")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    write("hard numbers", hard_numbers())
    write("wrong arguments", wrong_arguments())
    if options.mutants:
        results = [r for path in options.mutants for r in json.loads(path.read_text())["mutants"]]
        write("mutants", mutants(results))


if __name__ == "__main__":
    main()
