"""The CUDA library itself: it loads beside any torch, registers its ops, and compiles cleanly."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_fixtures import cuda_library, gpu80, simulate  # noqa: F401
from cuda_simulator import Simulator, ptx_cache
from ptxsim import nvcc
from support import keep_mask

from bench import cuda_report
from fused_mlp import _build
from fused_mlp.ops.schemas import KERNEL_SCHEMAS


def test_registers_every_op(cuda_library: ctypes.CDLL) -> None:
    for name in KERNEL_SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_mlp_kernels::{name}", "CUDA")


def test_needs_no_unstable_symbol(cuda_library: ctypes.CDLL) -> None:
    """It loaded beside this torch, a CPU wheel or not; no C++ symbol of torch ties it to one."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", cuda_library._name],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "torch_" in listing
    for prefix in (" at::", " c10::", " torch::", "cudaLaunch", "libtorch_cuda"):
        assert prefix not in listing


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_fails_as_torch_does(cuda_library: ctypes.CDLL) -> None:
    def error(call: Callable[[], object]) -> tuple[type, str]:
        with pytest.raises((RuntimeError, AssertionError)) as caught:
            call()
        return caught.type, str(caught.value)

    ours = error(lambda: torch.ops.fused_mlp.normalize(torch.ones(3, device="cuda")))
    assert ours == error(lambda: torch.relu(torch.ones(3, device="cuda")))


def test_errors_name_the_kernel(cuda_library: ctypes.CDLL) -> None:
    def refuse(launch: object) -> None:
        raise MemoryError("no")

    from bench.cuda_launches import Device, hooked

    with (
        pytest.raises(MemoryError),
        hooked(cuda_library, Device(4, 99 * 1024, 100 * 1024, 80), refuse),
    ):
        torch.ops.fused_mlp_kernels.normalize(torch.ones(3), None, 1.0, 0.0)


@pytest.mark.parametrize("columns", [64, 7])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_mask(gpu80: Simulator, columns: int, p: float) -> None:
    """The mask is that of every backend: Philox by key, offset, row and column."""
    seed = torch.tensor([-7, 2**33 + 1])
    keep = keep_mask(seed, 70, columns, p)
    output = torch.ops.fused_mlp_kernels.linear_relu(
        torch.ones(70, 3), torch.ones(columns, 3), None, p, seed if p else None
    )
    assert torch.equal(output != 0, keep.reshape(70, columns).bool())
    if 0 < p < 1:
        assert abs(output.mean().item() / 3 - 1) < 0.2


@pytest.fixture
def report_cache() -> Path:
    if reason := nvcc.why_not():
        pytest.skip(reason)
    return ptx_cache() / "report"


def check_chip(library: ctypes.CDLL, arch: int, cache: Path) -> None:
    rows = cuda_report.report(library, cache, [arch])
    assert {row.compiled.kernel for row in rows if row.compiled.spilled} == set()
    launched = [row for row in rows if row.shape and row.occupancy is not None]
    assert len(launched) >= 30
    for row in launched:
        chip, shape, compiled = cuda_report.CHIPS[arch], row.shape, row.compiled
        assert shape.shared_bytes + compiled.static_shared <= chip.shared_per_block
        assert row.occupancy > 0, compiled.kernel
        name = compiled.kernel
        if compiled.tensor_core >= 0 and name.endswith(("_tf32", "_bf16", "_f16")):
            on_tensor_cores = ("gemm" in name or "net_forward" in name) and arch >= 80
            assert not on_tensor_cores or compiled.tensor_core > 0, name
        if compiled.tensor_core >= 0 and ("rows_" in name or "columns_" in name):
            assert compiled.wide_loads > 0 and compiled.wide_stores > 0, name
    assert cuda_report.table(rows).count("\n") == len(launched) + 1


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(cuda_report.CHIPS))
def test_every_chip(cuda_library: ctypes.CDLL, report_cache: Path, arch: int) -> None:
    """No spills, no warnings, shared memory within the chip's, tensor cores and wide loads used."""
    check_chip(cuda_library, arch, report_cache)


def test_occupancy() -> None:
    chip = cuda_report.CHIPS[90]
    assert cuda_report.occupancy(chip, 32, 256, 0) == 1
    assert cuda_report.occupancy(chip, 128, 256, 0) == 0.25
    assert cuda_report.occupancy(chip, 32, 128, 100 * 1024) == 2 * 128 / 2048


def test_headers_need_no_torch() -> None:
    """The kernels' files compile without torch, so that a compile is short."""
    csrc = _build.source_root()
    for name in cuda_report.KERNEL_FILES:
        assert "torch/" not in (csrc / "cuda" / name).read_text()


@pytest.mark.slow
def test_a_broken_library_does_not_break_the_import() -> None:
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder) / "_C_cuda.so"
        broken.write_bytes(b"not a library")
        code = f"""
import torch, pathlib
torch.cuda.is_available = lambda: True
from fused_mlp import _build
real = _build.library_path
_build.library_path = lambda kind: pathlib.Path({str(broken)!r}) if kind == "cuda" else real(kind)
import fused_mlp
from fused_mlp import backends
assert not [s for s in backends.status() if s.device == "cuda" and s.name == "native"][0].available
print(fused_mlp.functional.normalize(torch.ones(3, 3)).shape)
"""
        done = subprocess.run(
            [__import__("sys").executable, "-c", code], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
