"""What the CUDA C++ kernels compile to on every chip: registers, spills, memory, occupancy.

Needs nvcc and no GPU. One half of what ``python -m bench gpu-report`` prints.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fused_mlp import _build, activations

from .cuda_launches import Device, Shape, recorded
from .gpu_table import CHIPS, Chip, Line

KERNEL_FILES = ("standardize.cu", "gemm.cu", "network.cu")
_FLAGS = ("-O3", "-std=c++20", "-Werror", "all-warnings", "-Xptxas", "-v")


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
class Launched:
    """How production launches a kernel, and for which of the representative problems."""

    problem: str
    shape: Shape


def compile_file(name: str, arch: int, cache: Path) -> list[Compiled]:
    """Compile one file of csrc/cuda for a chip and return its kernels.

    Raises BuildUnavailable without nvcc, and RuntimeError with the compiler's messages; a warning
    is an error.
    """
    nvcc = _build.find_nvcc()
    if nvcc.path is None:
        raise _build.BuildUnavailable(nvcc.reason, nvcc.remedy)
    csrc = _build.source_root()
    folder = csrc / "cuda"
    digest = hashlib.sha256(repr((name, arch, _FLAGS, find_disassembler(nvcc.path))).encode())
    headers = [*folder.glob("*.h"), *folder.glob("*.cuh"), *(csrc / "common").glob("*.h")]
    for path in [*sorted(headers), folder / name]:
        digest.update(path.read_bytes())
    log = cache / f"{name}-{arch}-{digest.hexdigest()[:16]}.txt"
    if not log.exists():
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


def find_disassembler(nvcc: Path) -> str | None:
    """cuobjdump on PATH, beside nvcc, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    folders = [nvcc.resolve().parent]
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    beside = (shutil.which("cuobjdump", path=str(folder)) for folder in folders)
    return next(filter(None, (shutil.which("cuobjdump"), *beside)), None)


def _disassemble(nvcc: Path, cubin: Path) -> str:
    tool = find_disassembler(nvcc)
    if tool is None:
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


def launches(library: ctypes.CDLL, chip: Chip) -> dict[str, Launched]:
    """Return how each kernel is launched on ``chip`` for representative problems, by its name.

    The reference network (10, [64, 32], 5) and 65536 rows of 64 columns, in every dtype.
    """
    device = Device(chip.multiprocessors, chip.shared_per_block, chip.shared, chip.arch)
    before = torch.get_float32_matmul_precision()
    found: dict[str, Launched] = {}
    try:
        with recorded(library, device) as seen:
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
                    torch.set_float32_matmul_precision(precision)
                    for problem in _launch_all(library, dtype):
                        found |= {shape.kernel: Launched(problem, shape) for shape in seen}
                        seen.clear()
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def _launch_all(library: ctypes.CDLL, dtype: torch.dtype) -> Iterator[str]:
    """Run every op forward and backward; after each problem, yield what it was."""
    kernels, rows = torch.ops.fused_mlp_kernels, 65536
    seed, x = torch.zeros(2, dtype=torch.int64), torch.empty(rows, 64, dtype=dtype)
    _, mean, std = kernels.normalize(x, None, 1.0, 0.0)
    kernels.normalize_backward(x, x, mean, std, None, 1.0, 0.0)
    yield "normalize 65536x64"
    _, mean, rstd = kernels.batch_norm_leaky_relu(
        x, None, None, None, None, None, True, 0.1, 1e-5, 0.01
    )
    kernels.batch_norm_leaky_relu_backward(
        x, x, None, None, mean, rstd, True, 0.01, [True, False, False]
    )
    yield "batch_norm 65536x64"
    behind = (activations.RELU, 0.0, 0.3, seed)
    _, mean, rstd = kernels.batch_norm_act(
        x, None, None, None, None, None, True, 0.1, 1e-5, *behind
    )
    kernels.batch_norm_act_backward(
        x, x, None, None, mean, rstd, True, *behind, [True, False, False]
    )
    rows_first = x.view(64, rows // 64, 64)  # a channel's elements lie in segments
    _, mean, rstd = kernels.batch_norm_act(
        rows_first, None, None, None, None, None, True, 0.1, 1e-5, *behind
    )
    kernels.batch_norm_act_backward(
        rows_first, rows_first, None, None, mean, rstd, True, *behind, [True, False, False]
    )
    yield "batch_norm_act 65536x64"
    weight = torch.empty(64, 64, dtype=dtype)
    for n in (1024, rows):
        y = kernels.linear_relu(x[:n], weight, None, 0.3, seed)
        kernels.linear_relu_backward(y, x[:n], weight, y, 0.3, [True] * 3)
        yield f"linear_relu {n}x64x64"
        gelu = (activations.GELU, 0.0, 0.3, seed)
        y, seen = kernels.linear_act(x[:n], weight, None, *gelu, True)
        kernels.linear_act_backward(y, x[:n], weight, seen, *gelu, [True] * 3)
        yield f"linear_act {n}x64x64"
    widths = (10, 64, 32, 5)
    # float64 at these widths is more than a T4's shared memory: it runs op by op.
    sizes = (ctypes.c_int64 * len(widths))(*widths)
    if not library.fused_mlp_research_net_fits(sizes, len(widths), dtype.itemsize):
        return
    pairs = list(zip(widths, widths[1:], strict=False))
    weights = [torch.empty(o, i, dtype=dtype) for i, o in pairs]
    biases = [torch.empty(o, dtype=dtype) for _, o in pairs]
    net, out = torch.empty(rows, 10, dtype=dtype), torch.empty(rows, 5, dtype=dtype)
    options = (weights, biases, torch.empty(32, dtype=dtype), torch.empty(32, dtype=dtype))
    _, saved = kernels.research_net(
        net, *options, None, None, None, True, [0.3], seed, 0.1, 1e-5, 0.01
    )
    kernels.research_net_backward(out, net, *options, saved, True, [0.3], seed, 0.01, [True] * 9)
    yield "10, [64, 32], 5"


def report(
    library: ctypes.CDLL, cache: Path, archs: Sequence[int] = tuple(CHIPS)
) -> list[tuple[Compiled, Launched | None]]:
    """Compile every kernel for every chip and say how it is launched there, None: not at all."""
    rows = []
    for arch in archs:
        launched = launches(library, CHIPS[arch])
        for name in KERNEL_FILES:
            rows += [(c, launched.get(c.kernel)) for c in compile_file(name, arch, cache)]
    return rows


_DTYPES = {"f32": "float32", "tf32": "tf32", "f64": "float64", "bf16": "bfloat16", "f16": "float16"}


def lines(rows: Sequence[tuple[Compiled, Launched | None]]) -> list[Line]:
    """Return the report's table: a line for every kernel on every chip that launches it."""
    found = []
    for compiled, launched in rows:
        if launched is None:
            continue
        name, _, dtype = (
            compiled.kernel.removeprefix("fused_mlp_").removesuffix("_fma").rpartition("_")
        )
        found.append(
            Line(
                backend="cuda",
                kernel=name,
                problem=launched.problem,
                dtype=_DTYPES[dtype],
                chip=f"sm_{compiled.arch}",
                threads=launched.shape.threads,
                registers=compiled.registers,
                spilled=compiled.spilled,
                shared=compiled.static_shared + launched.shape.shared_bytes,
                products="mma.sync" if compiled.tensor_core > 0 else "",
                wide_loads=compiled.wide_loads,
                wide_stores=compiled.wide_stores,
            )
        )
    return found
