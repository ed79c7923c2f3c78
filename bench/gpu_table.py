"""The table of ``python -m bench gpu-report``: a line for each kernel, Triton's or CUDA's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_K = 1024


@dataclass(frozen=True)
class Chip:
    """A GPU architecture's limits (CUDA C++ Programming Guide, technical specifications)."""

    arch: int
    threads: int  # a multiprocessor
    blocks: int
    shared: int  # bytes a multiprocessor
    shared_per_block: int
    multiprocessors: int  # of its best known product
    registers: int = 65536


CHIPS = {
    chip.arch: chip
    for chip in (
        Chip(75, 1024, 16, 64 * _K, 64 * _K, 40),  # T4
        Chip(80, 2048, 32, 164 * _K, 163 * _K, 108),  # A100
        Chip(86, 1536, 16, 100 * _K, 99 * _K, 84),  # A10, RTX 3090
        Chip(89, 1536, 24, 100 * _K, 99 * _K, 128),  # L4, RTX 4090
        Chip(90, 2048, 32, 228 * _K, 227 * _K, 132),  # H100, H200
        Chip(100, 2048, 32, 228 * _K, 227 * _K, 148),  # B200
        Chip(120, 1536, 24, 100 * _K, 99 * _K, 170),  # RTX 5090
    )
}


def occupancy(chip: Chip, registers: int, threads: int, shared: int) -> float:
    """Theoretical occupancy of blocks of ``threads`` threads and ``shared`` bytes."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out 256 at a time
    # Each quarter of a multiprocessor has a quarter of the registers for its own warps.
    by_registers = chip.registers // 4 // per_warp * 4 // warps if registers else chip.blocks
    by_shared = chip.shared // (shared + _K) if shared else chip.blocks
    blocks = min(chip.blocks, chip.threads // (warps * 32), by_registers, by_shared)
    return blocks * warps * 32 / chip.threads


@dataclass(frozen=True)
class Line:
    """A kernel compiled for a chip, as it is launched there for a representative problem."""

    backend: str  # "triton" or "cuda"
    kernel: str
    problem: str
    dtype: str
    chip: str
    threads: int  # a block
    registers: int  # a thread
    spilled: int
    shared: int  # bytes a block
    products: str  # what computes its matrix products
    wide_loads: int  # 128-bit accesses of global memory
    wide_stores: int

    @property
    def occupancy(self) -> float | None:
        """Resident warps over the most there can be; None for chips whose limits are not known."""
        arch = self.chip.removeprefix("sm_")
        if not arch.isdigit():
            return None
        return occupancy(CHIPS[int(arch)], self.registers, self.threads, self.shared)


_HEADER = ("backend", "kernel", "problem", "dtype", "chip", "threads", "registers", "spilled",
           "shared KiB", "occupancy", "products", "128-bit loads", "128-bit stores")  # fmt: skip


def table(lines: Iterable[Line]) -> str:
    """Return the lines as a Markdown table."""
    text = ["| " + " | ".join(_HEADER) + " |", "|" + "---|" * len(_HEADER)]
    for line in lines:
        share = "–" if line.occupancy is None else f"{line.occupancy:.0%}"
        cells = (line.backend, line.kernel, line.problem, line.dtype, line.chip, line.threads,
                 line.registers, line.spilled, f"{line.shared / _K:.1f}", share,
                 line.products or "–", line.wide_loads, line.wide_stores)  # fmt: skip
        text.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(text)
