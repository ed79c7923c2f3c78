"""``python -m bench gpu-report``: what the GPU kernels compile to. Needs no GPU."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fused_mlp import _build

from .cuda_launches import load_library
from .errors import BenchError
from .gpu_table import CHIPS, Line, table


def main(argv: Sequence[str]) -> int:
    """Print one Markdown table of the Triton and the CUDA C++ kernels."""
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu-report",
        description="Compile every Triton and CUDA C++ kernel for every chip and list registers, "
        "spills, shared memory, occupancy and instructions. Minutes of compiling.",
    )
    parser.add_argument("--only", choices=("triton", "cuda"), help="one half of it")
    parser.add_argument(
        "--chip", action="append", metavar="NAME",
        help="as sm_90 or gfx942; may be given more than once (default: all)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    lines: list[Line] = []
    for name, half in {"triton": _triton, "cuda": _cuda}.items():
        if options.only in (None, name):
            try:
                lines += half(options.chip)
            except BenchError as missing:
                if options.only:
                    raise
                sys.stderr.write(f"{name}: {missing}\n")
    sys.stdout.write(table(lines) + "\n")
    return 0


def _triton(chosen: Sequence[str] | None) -> list[Line]:
    if importlib.util.find_spec("triton") is None:
        raise BenchError('triton is not installed: pip install "fused_mlp[triton]"')
    from . import gpu_report

    chips = [c for c in gpu_report.CHIPS if chosen is None or c in chosen]
    if not chips:
        raise BenchError(f"--chip: for Triton choose from {', '.join(gpu_report.CHIPS)}")
    return gpu_report.lines(gpu_report.report(chips))


def _cuda(chosen: Sequence[str] | None) -> list[Line]:
    from . import cuda_report

    archs = [a for a in CHIPS if chosen is None or f"sm_{a}" in chosen]
    if not archs:
        raise BenchError(f"--chip: for CUDA choose from {', '.join(f'sm_{a}' for a in CHIPS)}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = load_library(Path(folder) / "library")
            return cuda_report.lines(cuda_report.report(library, Path(folder), archs))
        except _build.BuildUnavailable as error:
            raise BenchError(f"{error.reason}: {error.remedy}") from error
