"""Runs the CUDA backend without a GPU: its host code on CPU tensors, its kernels' PTX in ptxsim.

The library hands every launch to a hook (csrc/cuda/launch.h), so what runs here has the grid,
block, shared memory and arguments of production. A launch names the memory it may touch; reads
and writes outside of it, shared-memory races and reads of unwritten memory raise.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ptxsim
from ptxsim import nvcc

from bench.cuda_launches import WRITE, Device, Launch, hooked

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
# What the library's kernels lie in; the other files hold host code.
KERNEL_FILES = ("standardize.cu", "gemm.cu", "network.cu")
FLAGS = ("-O3", "-std=c++20", f"-I{ROOT / 'csrc'}")


@dataclass
class Record:
    """One launch that ran: its shape and, if asked for, what it did."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    extent_bytes: tuple[tuple[int, int], ...]  # (use, bytes) of each extent
    stats: Any = None


def ptx_cache() -> Path:
    return Path(
        os.environ.get("FUSED_MLP_TEST_CACHE", Path(tempfile.gettempdir()) / "fused_mlp_ptx")
    )


def compile_ptx(name: str, arch: int) -> str:
    """The PTX of one file of csrc/cuda, kept between runs by the contents of all of csrc."""
    digest = hashlib.sha256(repr((name, arch, FLAGS)).encode())
    headers = [*SOURCES.glob("*.cuh"), *SOURCES.glob("*.h"), *(ROOT / "csrc/common").glob("*.h")]
    for path in [*sorted(headers), SOURCES / name]:
        digest.update(path.read_bytes())
    kept = ptx_cache() / f"{name}-{arch}-{digest.hexdigest()[:16]}.ptx"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        command = [nvcc.find(), "-ptx", f"-arch=sm_{arch}", *FLAGS, str(SOURCES / name)]
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}{done.stdout}")
        partial.replace(kept)
    return kept.read_text()


def single_kernel(text: str, kernel: str) -> str:
    """The PTX of a module cut down to one kernel (and what is not a kernel), to parse faster."""
    head, *parts = text.split("\n\t// .globl\t")
    lines = [line for part in parts for line in part.split("\n")]
    declared = {line: None for line in lines if line.startswith((".extern", ".shared"))}
    (part,) = (part for part in parts if part.split("\n", 1)[0].strip() == kernel)
    body = "\n".join(line for line in part.split("\n") if line not in declared)
    # What several kernels inline has its shared memory declared once, before the first of them.
    used = [line for line in declared if line.split("[")[0].split()[-1] in body]
    return "\n".join([head, *used, "\t// .globl\t" + body])


_modules: dict[Any, Any] = {}  # parsed once a process


@dataclass
class Simulator:
    """A simulated GPU that the loaded library launches on. Use :meth:`running`."""

    library: ctypes.CDLL
    arch: int = 80
    multiprocessors: int = 4
    shared_bytes_per_block: int = 99 * 1024
    check: bool = True
    stats: bool = False
    shuffle: int | None = None
    records: list[Record] = field(default_factory=list)

    def module(self, kernel: str) -> Any:
        key = (kernel, self.arch, self.check, self.shuffle)
        if key not in _modules:
            for name in KERNEL_FILES:
                if not (SOURCES / name).exists():
                    continue
                text = compile_ptx(name, self.arch)
                if f".entry {kernel}(" in text:
                    break
            else:
                raise LookupError(f"no kernel {kernel}")
            _modules[key] = ptxsim.Module(
                single_kernel(text, kernel),
                check_races=self.check,
                check_uninit=self.check,
                shuffle=self.shuffle,
                keep_alignment=True,
            )
        return _modules[key]

    def run(self, launch: Launch) -> None:
        kernel = launch.kernel.decode()
        raw = ctypes.string_at(launch.parameters, launch.parameter_bytes)
        arrays, uses = [], []
        for k in range(launch.extent_count):
            extent = launch.extents[k]
            uses.append((extent.use, extent.bytes))
            if not extent.data or not extent.bytes:
                continue
            memory = (ctypes.c_uint8 * extent.bytes).from_address(extent.data)
            array = np.frombuffer(memory, np.uint8)
            array.flags.writeable = True
            arrays.append(ptxsim.Undef(array) if extent.use == WRITE else array)
        grid, block = tuple(launch.grid), tuple(launch.block)
        stats = self.module(kernel).launch(
            kernel,
            grid,
            block,
            [ptxsim.Struct(raw, arrays)],
            shared_bytes=launch.shared_bytes,
            stats=self.stats,
        )
        self.records.append(Record(kernel, grid, block, launch.shared_bytes, tuple(uses), stats))

    @contextmanager
    def running(self, key: str = "CPU") -> Iterator[Simulator]:
        """Within, the raw ops on tensors of `key` run on this simulator."""

        device = Device(
            self.multiprocessors,
            self.shared_bytes_per_block,
            self.shared_bytes_per_block + 1024,
            self.arch,
        )
        with hooked(self.library, device, self.run, key):
            yield self
