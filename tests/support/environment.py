"""What the machine has: Triton's interpreter, bfloat16 products, memory for the huge tensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fused_mlp import backends

# One program of the interpreter costs a millisecond or more, so sizes are cut down under it.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Whether the CPU kernels multiply bfloat16 itself, by instructions of the processor's.
MULTIPLIES_BFLOAT16 = backends.isa() in ("avx512_bf16", "amx_bf16")


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
