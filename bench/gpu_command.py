"""``python -m bench gpu-report``: what the GPU kernels compile to and do. Needs no GPU."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from fused_mlp import _build

from . import gpu_docs, gpu_steps
from . import gpu_predictions as predictions
from .cases import NETWORK, OPS
from .cuda_launches import load_library
from .errors import BenchError, Unsupported
from .gpu_predictions import Counted
from .gpu_table import CHIPS, Line, table

PARTS = ("triton", "cuda", "steps")


def main(argv: Sequence[str]) -> int:
    """Print what the kernels compile to, what they do in ptxsim, and predicted times."""
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu-report",
        description="Without a GPU: compile every Triton and CUDA C++ kernel for every chip and "
        "list registers, spills, shared memory, occupancy and instructions; execute the steps of "
        "every op in ptxsim and list launches, bytes, coalescing and FLOPs beside eager's; and "
        "predict times on A100, H100, H200 and B200 from these. Markdown. Minutes of compiling "
        "and simulating.",
    )
    parser.add_argument(
        "--only", choices=PARTS,
        help="triton or cuda: what that half compiles to; steps: ptxsim and predictions",
    )  # fmt: skip
    parser.add_argument(
        "--chip", action="append", metavar="NAME",
        help="as sm_90 or gfx942; may be given more than once (default: all; for steps sm_80, "
        "sm_90 and sm_100, those of the GPUs whose times are predicted)",
    )  # fmt: skip
    parser.add_argument(
        "--op", action="append", choices=(*OPS, NETWORK),
        help="steps of this op alone; may be given more than once",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the steps"
    )
    parser.add_argument(
        "--docs", action="store_true",
        help="with --only triton: also put the table, a row a kernel, into docs/triton.md",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if options.docs and options.only != "triton":
        parser.error("--docs goes with --only triton")
    lines: list[Line] = []
    for name, half in {"triton": _triton, "cuda": _cuda}.items():
        if options.only in (None, name):
            try:
                lines += half(options.chip)
            except BenchError as missing:
                if options.only:
                    raise
                sys.stderr.write(f"{name}: {missing}\n")
    if lines:
        sys.stdout.write(f"## Compiled kernels\n\n{table(lines)}\n")
    if options.docs:
        gpu_docs.write(lines)
    if options.only in (None, "steps"):
        text = "\n\n".join(predictions.sections(_steps(options)))
        sys.stdout.write(f"\n{text}\n" if lines else f"{text}\n")
    return 0


def _steps(options: argparse.Namespace) -> list[Counted]:
    """Run every step on every chip by both backends; name on stderr what cannot run."""
    archs = sorted({gpu.arch for gpu in predictions.GPUS})
    archs = [a for a in archs if options.chip is None or f"sm_{a}" in options.chip]
    if not archs:
        raise BenchError("--chip: steps run for sm_80, sm_90 and sm_100")
    found = []
    backends = {"triton": gpu_steps.triton, "cuda": gpu_steps.cuda}
    for case in gpu_steps.cases(getattr(torch, options.dtype), options.op):
        theirs = gpu_steps.eager(case)
        for arch in archs:
            for name, run in list(backends.items()):
                try:
                    ours = run(case, arch)
                except _build.BuildUnavailable as error:
                    del backends[name]
                    sys.stderr.write(f"{name}: {error.reason}: {error.remedy}\n")
                except Unsupported as error:
                    sys.stderr.write(f"{name}, {case}, sm_{arch}: {error}\n")
                else:
                    found.append(Counted(case, name, arch, ours, theirs))
    return found


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
