"""What the CUDA C++ kernels compile to on every chip: registers, spills, memory, occupancy.

Needs nvcc and no GPU. One half of what ``python -m bench gpu-report`` prints.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fused_mlp import _build

from .cuda_launches import Device, Shape, recorded

KERNEL_FILES = ("standardize.cu", "gemm.cu", "network.cu")
_FLAGS = ("-O3", "-std=c++20", "-Werror", "all-warnings", "-Xptxas", "-v")


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


_K = 1024
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


@dataclass(frozen=True)
class Compiled:
    """What ptxas and the disassembler say of one kernel."""

    kernel: str
    arch: int
    registers: int
    spilled: int  # bytes stored and loaded
    static_shared: int
    tensor_core: int  # instructions, -1 without a disassembler
    wide_loads: int  # 128-bit loads from global memory
    wide_stores: int


@dataclass(frozen=True)
class Row:
    """A kernel on a chip as production launches it for a representative problem."""

    compiled: Compiled
    shape: Shape | None  # None: not launched on this chip
    occupancy: float | None  # warps resident over the most there can be


def occupancy(chip: Chip, registers: int, threads: int, shared: int) -> float:
    """Theoretical occupancy of blocks of ``threads`` threads and ``shared`` bytes."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out 256 at a time
    by_registers = chip.registers // per_warp // warps if registers else chip.blocks
    by_shared = chip.shared // (shared + _K) if shared else chip.blocks
    blocks = min(chip.blocks, chip.threads // (warps * 32), by_registers, by_shared)
    return blocks * warps * 32 / chip.threads


def compile_file(name: str, arch: int, cache: Path) -> list[Compiled]:
    """Compile one file of csrc/cuda for a chip and return its kernels.

    Raises RuntimeError with the compiler's messages; a warning is an error.
    """
    csrc = _build.source_root()
    folder = csrc / "cuda"
    digest = hashlib.sha256(repr((name, arch, _FLAGS)).encode())
    headers = [*folder.glob("*.h"), *folder.glob("*.cuh"), csrc / "common" / "philox.h"]
    for path in [*sorted(headers), folder / name]:
        digest.update(path.read_bytes())
    log = cache / f"{name}-{arch}-{digest.hexdigest()[:16]}.txt"
    if not log.exists():
        nvcc = _build.find_nvcc()
        if nvcc.path is None:
            raise RuntimeError(nvcc.reason)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            cubin = Path(scratch) / "out.cubin"
            command = [str(nvcc.path), *_FLAGS, f"-I{csrc}", "-cubin", f"-arch=sm_{arch}"]
            done = subprocess.run(
                [*command, str(folder / name), "-o", str(cubin)], capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            log.write_text(done.stderr + done.stdout + "\nSASS\n" + _disassemble(nvcc.path, cubin))
    return _parse(log.read_text(), arch)


def _disassemble(nvcc: Path, cubin: Path) -> str:
    tool = shutil.which("cuobjdump") or str(nvcc.resolve().parent / "cuobjdump")
    if not Path(tool).exists():
        return ""
    done = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True)
    wanted = re.compile(r"Function :|[HI]MMA|LDG\.E.*\.128|STG\.E.*\.128")
    return "\n".join(line for line in done.stdout.splitlines() if wanted.search(line))


def _parse(log: str, arch: int) -> list[Compiled]:
    listing, _, sass = log.partition("\nSASS\n")
    counts: dict[str, list[int]] = {}
    for line in sass.splitlines():
        if "Function :" in line:
            current = counts.setdefault(line.split(":")[1].strip(), [0, 0, 0])
        else:
            current["LDG" in line or 2 * ("STG" in line)] += 1
    found = []
    for part in listing.split("Compiling entry function '")[1:]:
        kernel = part.split("'")[0]
        numbers = [
            int(match[1]) if (match := re.search(pattern, part)) else 0
            for pattern in (
                r"Used (\d+) registers",
                r"(\d+) bytes spill stores",
                r"(\d+) bytes spill loads",
                r"(\d+) bytes smem",
            )
        ]
        registers, stores, loads, shared = numbers
        sassed = counts.get(kernel, [0, 0, 0] if counts else [-1, -1, -1])
        found.append(Compiled(kernel, arch, registers, stores + loads, shared, *sassed))
    return found


def launches(library: ctypes.CDLL, chip: Chip) -> dict[str, Shape]:
    """Return how each kernel is launched on ``chip`` for representative problems.

    The reference network (10, [64, 32], 5) and 65536 rows of 32 or 64 columns, in every dtype.
    """
    device = Device(chip.multiprocessors, chip.shared_per_block, chip.shared, chip.arch)
    kernels, shapes = torch.ops.fused_mlp_kernels, []
    rows, widths = 65536, (10, 64, 32, 5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            library.fused_mlp_cuda_allow_tf32(int(tf32))
            accumulator = torch.float64 if dtype == torch.float64 else torch.float32
            seed, x = torch.zeros(2, dtype=torch.int64), torch.empty(rows, 64, dtype=dtype)
            pairs = list(zip(widths, widths[1:], strict=False))
            weights = [torch.empty(o, i, dtype=dtype) for i, o in pairs]
            biases = [torch.empty(o, dtype=dtype) for _, o in pairs]
            net, out = torch.empty(rows, 10, dtype=dtype), torch.empty(rows, 5, dtype=dtype)
            vector, saved = torch.empty(32, dtype=dtype), torch.empty(64, dtype=accumulator)
            with recorded(library, device) as seen:
                shapes.append(seen)
                _, mean, std = kernels.normalize(x, None, 1.0, 0.0)
                kernels.normalize_backward(x, x, mean, std, None, 1.0, 0.0)
                _, mean, rstd = kernels.batch_norm_leaky_relu(
                    x, None, None, None, None, None, True, 0.1, 1e-5, 0.01
                )
                kernels.batch_norm_leaky_relu_backward(
                    x, x, None, None, mean, rstd, True, 0.01, [True, False, False]
                )
                small, square = x[:1024], torch.empty(64, 64, dtype=dtype)
                y = kernels.linear_relu(small, square, None, 0.3, seed)
                kernels.linear_relu_backward(y, small, square, y, 0.3, [True] * 3)
                y = kernels.linear_relu(x, square, None, 0.3, seed)
                options = (weights, biases, vector, vector)
                # float64 at these widths is more than a T4's shared memory: it runs op by op.
                sizes = (ctypes.c_int64 * len(widths))(*widths)
                if not library.fused_mlp_research_net_fits(sizes, len(widths), dtype.itemsize):
                    continue
                kernels.research_net(
                    net, *options, None, None, None, True, [0.3], seed, 0.1, 1e-5, 0.01
                )
                kernels.research_net_backward(
                    out, net, *options, saved, True, [0.3], seed, 0.01, [True] * 9
                )
    library.fused_mlp_cuda_allow_tf32(0)
    return {shape.kernel: shape for seen in shapes for shape in seen}


def report(
    library: ctypes.CDLL | None, cache: Path, archs: Sequence[int] = tuple(CHIPS)
) -> list[Row]:
    """Compile every kernel for every chip; with the library, say how it launches them too."""
    rows = []
    for arch in archs:
        shapes = launches(library, CHIPS[arch]) if library else {}
        for name in KERNEL_FILES:
            for compiled in compile_file(name, arch, cache):
                shape = shapes.get(compiled.kernel)
                resident = None
                if shape:
                    shared = compiled.static_shared + shape.shared_bytes
                    resident = occupancy(CHIPS[arch], compiled.registers, shape.threads, shared)
                rows.append(Row(compiled, shape, resident))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the report as a Markdown table: one line a kernel and chip that launches it."""
    header = ("kernel", "chip", "threads", "registers", "spilled", "shared KiB", "occupancy",
              "tensor-core instructions", "128-bit loads", "128-bit stores")  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        c, shape = row.compiled, row.shape
        if shape is None or row.occupancy is None:
            continue
        shared = (c.static_shared + shape.shared_bytes) / _K
        cells = (c.kernel.removeprefix("fused_mlp_"), f"sm_{c.arch}", shape.threads, c.registers,
                 c.spilled, f"{shared:.1f}", f"{row.occupancy:.0%}", c.tensor_core, c.wide_loads,
                 c.wide_stores)  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
