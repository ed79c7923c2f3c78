"""Compile Triton kernels for GPUs that are not here, and read what the compilers made of them.

``collect`` runs launchers on CPU tensors with a driver that names another chip and launches
nothing, so every kernel is compiled with the arguments, tile and options it would run with there.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Shared memory a block may use, in bytes.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376,
                "gfx942": 65536}  # fmt: skip
CHIPS = tuple(SHARED_LIMIT)

_MATRIX = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma.sync": r"\bmma\.sync",
    "mfma": r"\bv_mfma_",
}
_WIDE_LOAD = (
    r"\bld\.global[\w.:]*\.v4\.b32|\bld\.global[\w.:]*\.v2\.b64|\bld\.global[\w.:]*\.v8\.b32"
    r"|\bcp\.async\.c[ag]\.shared\.global[^;]*, (?:16|0x10)\b"
    r"|\b(?:global|buffer)_load_(?:dwordx4|b128)"
)
_WIDE_STORE = (
    r"\bst\.global[\w.:]*\.v4\.b32|\bst\.global[\w.:]*\.v2\.b64"
    r"|\b(?:global|buffer)_store_(?:dwordx4|b128)"
)


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    chip: str
    name: str
    num_warps: int
    registers: int  # of a thread; vector registers on AMD
    spilled: int  # bytes of stack on NVIDIA, registers on AMD
    shared: int  # bytes
    matrix: str  # the matrix instructions it uses, "" for none
    wide_loads: int  # 128-bit loads from global memory
    wide_stores: int

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.chip]


def gpu_target(chip: str) -> Any:
    """Return Triton's target for a chip as "sm_90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if chip.startswith("sm_"):
        return GPUTarget("cuda", int(chip[3:]), 32)
    return GPUTarget("hip", chip, 64)


class _Driver:
    """A Triton driver for a chip that is not there."""

    _devices = iter(range(1 << 20, 1 << 30))  # Triton caches kernels by device: always a new one

    def __init__(self, chip: str) -> None:
        self._target, self._device = gpu_target(chip), next(self._devices)
        self.utils = self

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return self._target.arch // 10, self._target.arch % 10

    @staticmethod
    def is_active() -> bool:
        return True


@contextmanager
def _installed(chip: str, launched: list[Any]) -> Iterator[None]:
    """Make Triton compile for ``chip``; launches only append their compiled kernel."""
    import triton
    from triton.compiler.compiler import CompiledKernel

    def init_handles(self: Any) -> None:
        self.module = self.function = True
        self.n_regs = self.n_spills = 0
        self.n_max_threads = 1024
        self._run = lambda *_: launched.append(self)

    saved = CompiledKernel._init_handles, CompiledKernel.__del__, triton.runtime.driver._active
    CompiledKernel._init_handles = init_handles
    CompiledKernel.__del__ = lambda self: None
    triton.runtime.driver.set_active(_Driver(chip))
    try:
        yield
    finally:
        CompiledKernel._init_handles, CompiledKernel.__del__ = saved[:2]
        triton.runtime.driver._active = saved[2]


def collect(chip: str, run: Callable[[], Any]) -> list[Kernel]:
    """Return what ``run`` would have launched on ``chip``, in order, each kernel once.

    Args:
        chip: one of CHIPS.
        run: calls launchers with CPU tensors, whose contents do not matter.
    """
    launched: list[Any] = []
    with _installed(chip, launched):
        run()
    kernels = []
    for compiled in dict.fromkeys(launched):
        kernels.append(_measure(chip, compiled))
    return kernels


def _measure(chip: str, compiled: Any) -> Kernel:
    if chip.startswith("sm_"):
        text = compiled.asm["ptx"]
        registers, spilled = _cubin_resources(compiled.asm["cubin"])
    else:
        text = compiled.asm["amdgcn"]
        registers = _metadata(text, "vgpr_count")
        spilled = _metadata(text, "vgpr_spill_count")
    found = [name for name, pattern in _MATRIX.items() if re.search(pattern, text)]
    return Kernel(
        chip=chip,
        name=compiled.metadata.name,
        num_warps=compiled.metadata.num_warps,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        matrix="+".join(found),
        wide_loads=len(re.findall(_WIDE_LOAD, text)),
        wide_stores=len(re.findall(_WIDE_STORE, text)),
    )


def _metadata(text: str, key: str) -> int:
    match = re.search(rf"\.{key}:\s*(\d+)", text)
    return int(match.group(1)) if match else 0


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """Return (registers, bytes of stack and local memory) of the one kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        out = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True,
            check=True,
        ).stdout  # fmt: skip
    finally:
        os.unlink(file.name)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", out))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
