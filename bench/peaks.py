"""What bounds every op on this machine, measured: products, multiply-adds and copies."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fused_mlp import _build, backends

from .environment import synchronize

_SOURCE = Path(__file__).with_name("fma_peak.cpp")
# What the kernels of each instruction set are compiled with, as far as multiply-adds go.
_AVX512 = ("-mavx512f", "-mavx2", "-mfma")
_FLAGS = {
    "amx_bf16": _AVX512,
    "avx512_bf16": _AVX512,
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma"),
    "baseline": (),
}


def measure(
    device: torch.device, dtype: torch.dtype = torch.float32, smoke: bool = False
) -> dict[str, float]:
    """Measure the ceilings of a device.

    Returns:
        ``gflops``: FLOP/s of a product of 2048 squared in ``dtype``, by the better of MKL and
        oneDNN on the CPU; ``gb_per_s``: a copy of 256 MiB, its bytes counted twice, read and
        written; ``fma_gflops``: float32 multiply-adds from registers on the threads PyTorch uses
        and with the instruction set of our kernels, on the CPU and where there is a compiler.
        The best of several tries each: a ceiling, not a typical value.
    """
    size, mib = (64, 1) if smoke else (2048, 256)
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    out = torch.empty_like(a)
    source = torch.randn(mib * 2**18, device=device)
    target = torch.empty_like(source)
    products = [_best_seconds(lambda: torch.mm(a, b, out=out), device)]
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and dtype.itemsize < 8:
        # oneDNN knows AVX-512 where MKL takes AVX2 on AMD: the higher one is the ceiling.
        run = torch.ops.mkldnn._linear_pointwise
        products.append(_best_seconds(lambda: run(a, b, None, "none", [], ""), device))
    copied = _best_seconds(lambda: target.copy_(source), device)
    found = {
        "gflops": 2 * size**3 / min(products) / 1e9,
        "gb_per_s": 2 * source.numel() * 4 / copied / 1e9,
    }
    fma = fma_gflops(torch.get_num_threads()) if device.type == "cpu" else None
    if fma is not None and dtype == torch.float32:
        found["fma_gflops"] = fma
    return found


def fma_gflops(threads: int) -> float | None:
    """Return the float32 multiply-adds of so many threads in GFLOP/s; None without a compiler."""
    compiler, flags = _build.find_cxx(), _FLAGS.get(backends.isa() or "")
    if compiler.path is None or flags is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "fma_peak"
        command = [*compiler.command, "-O3", "-std=c++17", *flags, "-pthread", str(_SOURCE)]
        try:
            subprocess.run([*command, "-o", str(program)], capture_output=True, check=True)
            done = subprocess.run(
                [str(program), str(threads)], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
    return float(done.stdout)


def ceiling(peaks: dict[str, float]) -> float:
    """Return the FLOP/s, in billions, that no kernel can pass: multiply-adds where measured."""
    return max(peaks.get("fma_gflops", 0.0), peaks["gflops"])


def _best_seconds(run: Callable[[], object], device: torch.device, tries: int = 7) -> float:
    run()
    times = []
    for _ in range(tries):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
