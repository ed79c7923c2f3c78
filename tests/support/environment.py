"""What the machine has: Triton's interpreter, bfloat16 products, memory for the huge tensors.

And Python processes where the CPU library makes other choices than here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_mlp import backends

# One program of the interpreter costs a millisecond or more, so sizes are cut down under it.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Whether the CPU kernels multiply bfloat16 itself, by instructions of the processor's.
MULTIPLIES_BFLOAT16 = backends.isa() in ("avx512_bf16", "amx_bf16")


def native_python(*command: str, **environment: str) -> str:
    """Return what a Python process prints that has the CPU library and these variables set."""
    done = subprocess.run(
        [sys.executable, *command], cwd=Path(__file__).resolve().parents[2], capture_output=True,
        env={**os.environ, "FUSED_MLP_BACKEND": "native", **environment}, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def free_memory(device: torch.device) -> float:
    """Return the free memory of ``device`` in GiB (0 where it cannot be told)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0.0
    return int(available.split()[1]) / 2**20


def needs_memory(device: torch.device, gibibytes: float) -> None:
    """Skip the running test where ``device`` has less free memory than it takes."""
    if INTERPRETED:
        pytest.skip("Triton's interpreter would take hours over 2^31 elements")
    if (free := free_memory(device)) < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of free memory, there are {free:.1f}")
