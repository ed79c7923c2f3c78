"""Runs the smoke part of the GPU tests under compute-sanitizer: memcheck, then racecheck.

    make gpu-check

Needs an NVIDIA GPU and compute-sanitizer, which comes with the CUDA toolkit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FOUND = 9  # what the sanitizer exits with where it has something to report


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, under CUDA_HOME or in /usr/local/cuda."""
    if path := shutil.which("compute-sanitizer"):
        return path
    for prefix in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        candidate = Path(prefix or "/nonexistent") / "bin" / "compute-sanitizer"
        if candidate.is_file():
            return str(candidate)
    return None


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 1
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("gpu-check needs compute-sanitizer: install the CUDA toolkit", file=sys.stderr)
        return 1
    # Every tensor its own allocation, or an access behind one would hit another and go unseen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and smoke", "tests"]
    failed = []
    for tool in ("memcheck", "racecheck"):
        print(f"==== {tool}", flush=True)
        options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all"]
        if subprocess.run([sanitizer, *options, *tests], cwd=ROOT, env=environment).returncode:
            failed.append(tool)
    print(f"failed: {', '.join(failed)}" if failed else "memcheck and racecheck found nothing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
