"""``python -m bench gpu-report``: what the GPU kernels compile to. Needs no GPU."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fused_mlp import _build, backends

from .errors import BenchError


def main(argv: Sequence[str]) -> int:
    """Print a Markdown table of the Triton kernels and one of the CUDA C++ kernels."""
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
    halves = {"triton": _triton, "cuda": _cuda}
    for name, half in halves.items():
        if options.only in (None, name):
            try:
                text = half(options.chip)
            except BenchError as missing:
                if options.only:
                    raise
                text = f"{name}: {missing}"
            sys.stdout.write(text + "\n\n")
    return 0


def _triton(chosen: Sequence[str] | None) -> str:
    if importlib.util.find_spec("triton") is None:
        raise BenchError('triton is not installed: pip install "fused_mlp[triton]"')
    from . import gpu_report

    chips = [c for c in gpu_report.CHIPS if chosen is None or c in chosen]
    if not chips:
        raise BenchError(f"--chip: for Triton choose from {', '.join(gpu_report.CHIPS)}")
    return gpu_report.table(gpu_report.report(chips))


def _cuda(chosen: Sequence[str] | None) -> str:
    from . import cuda_report

    archs = [a for a in cuda_report.CHIPS if chosen is None or f"sm_{a}" in chosen]
    if not archs:
        names = ", ".join(f"sm_{arch}" for arch in cuda_report.CHIPS)
        raise BenchError(f"--chip: for CUDA choose from {names}")
    path = backends._native("cuda").path
    library = ctypes.CDLL(path) if path else None
    with tempfile.TemporaryDirectory() as cache:
        try:
            return cuda_report.table(cuda_report.report(library, Path(cache), archs))
        except _build.BuildUnavailable as error:
            raise BenchError(f"{error.reason}: {error.remedy}") from error
