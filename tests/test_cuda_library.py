"""The CUDA library itself: it loads beside any torch, registers its ops, and compiles cleanly."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_fixtures import cuda_library, gpu, simulate  # noqa: F401
from cuda_simulator import Simulator, ptx_cache
from ptxsim import nvcc
from support import keep_mask

import fused_mlp
from bench import cuda_report, gpu_command
from bench.errors import BenchError
from bench.gpu_table import CHIPS, Line, occupancy, table
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
    with (  # as in a fixture, which the test's error passes by
        pytest.raises(MemoryError),
        hooked(cuda_library, Device(4, 99 * 1024, 100 * 1024, 80), refuse),
        pytest.raises(RuntimeError, match="refused fused_mlp_rows_forward_f32"),
    ):
        torch.ops.fused_mlp_kernels.normalize(torch.ones(3), None, 1.0, 0.0)


@pytest.mark.parametrize("columns", [64, 7])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_mask(gpu: Simulator, columns: int, p: float) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(CHIPS))
def test_every_chip(cuda_library: ctypes.CDLL, report_cache: Path, arch: int) -> None:
    """No spills, no warnings, shared memory as the chip has it, tensor cores and 128-bit access."""
    if cuda_report.find_disassembler(Path(nvcc.find())) is None:
        pytest.skip("no cuobjdump (it comes with the CUDA toolkit and with Triton)")
    rows = cuda_report.report(cuda_library, report_cache, [arch])
    assert {compiled.kernel for compiled, _ in rows if compiled.spilled} == set()
    lines = cuda_report.lines(rows)
    assert len(lines) >= 50
    for line in lines:
        name = f"{line.kernel} of {line.dtype}"
        assert line.shared <= CHIPS[arch].shared_per_block, name
        assert line.occupancy and line.occupancy > 0, name
        if line.kernel in ("gemm", "gemm_act", "net_forward", "net_backward"):
            on_tensor_cores = arch >= 80 and line.dtype in ("tf32", "bfloat16", "float16")
            assert line.products == ("mma.sync" if on_tensor_cores else ""), name
        if line.kernel.startswith(("rows_", "columns_")):
            assert line.wide_loads > 0 and line.wide_stores > 0, name


def test_table_has_a_line_for_every_kernel() -> None:
    line = Line("cuda", "gemm", "1x2x3", "tf32", "sm_90", 256, 128, 0, 36 * 1024, "mma.sync", 4, 2)
    amd = dataclasses.replace(line, backend="triton", chip="gfx942")
    first, second = table([line, amd]).splitlines()[2:]
    assert "| 36.0 | 25% | mma.sync |" in first
    assert "| 36.0 | – | mma.sync |" in second


def test_report_is_one_table_of_both_backends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = Line("cuda", "gemm", "1x2x3", "tf32", "sm_90", 256, 128, 0, 36 * 1024, "mma.sync", 4, 2)
    monkeypatch.setattr(gpu_command, "_triton", lambda _: [dataclasses.replace(line, backend="x")])
    monkeypatch.setattr(gpu_command, "_cuda", lambda _: [line])
    monkeypatch.setattr(gpu_command, "_steps", lambda _: [])  # see test_bench_gpu_report.py
    assert gpu_command.main([]) == 0
    compiled = capsys.readouterr().out.split("\n## ")[0]
    rows = [row.split("|")[1].strip() for row in compiled.splitlines() if row.startswith("|")]
    assert rows[2:] == ["x", "cuda"]
    monkeypatch.undo()
    monkeypatch.setattr(gpu_command, "_steps", lambda _: [])

    def no_nvcc(folder: Path) -> None:
        raise _build.BuildUnavailable("no nvcc", "get one")

    monkeypatch.setattr(gpu_command, "_triton", lambda _: [line])
    monkeypatch.setattr(gpu_command, "load_library", no_nvcc)
    assert gpu_command.main([]) == 0  # the other half is reported all the same
    assert "cuda: no nvcc: get one" in capsys.readouterr().err
    with pytest.raises(BenchError, match="no nvcc"):
        gpu_command.main(["--only", "cuda"])


def test_occupancy() -> None:
    chip = CHIPS[90]
    assert occupancy(chip, 32, 256, 0) == 1
    assert occupancy(chip, 128, 256, 0) == 0.25
    assert occupancy(chip, 96, 32, 0) == 20 / 64  # five warps in each quarter, not 21 in all
    assert occupancy(chip, 32, 128, 100 * 1024) == 2 * 128 / 2048


def test_headers_need_no_torch() -> None:
    """The kernels' files compile without torch, so that a compile is short."""
    csrc = _build.source_root()
    for name in cuda_report.KERNEL_FILES:
        assert "torch/" not in (csrc / "cuda" / name).read_text()


@pytest.mark.parametrize("content", [b"not a library", b"\x7fELF\x02\x01\x01"])
def test_a_broken_library_does_not_break_the_import(tmp_path: Path, content: bytes) -> None:
    """An installation whose _C_cuda.so does not load, where torch says that there is a GPU."""
    package = tmp_path / "fused_mlp"
    shutil.copytree(
        Path(fused_mlp.__file__).parent,
        package,
        ignore=shutil.ignore_patterns("_C_cuda.*", "__pycache__"),
    )
    for room in ("csrc", "kernels"):
        shutil.copytree(_build.source_root().parent / room, package / room, dirs_exist_ok=True)
    (package / "_C_cuda.so").write_bytes(content)
    code = """
import torch
torch.cuda.is_available = lambda: True
import fused_mlp
from fused_mlp import backends
(native,) = (s for s in backends.status() if (s.device, s.name) == ("cuda", "native"))
assert not native.available and native.remedy == "reinstall fused_mlp", native
assert "_C_cuda.so" in native.detail, native
backends._settle("cuda")  # what the first call on a GPU does
print(fused_mlp.__file__, backends.active_backend("cuda"))
assert fused_mlp.functional.normalize(torch.rand(3, 3)).shape == (3, 3)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "FUSED_MLP_BACKEND": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    served = "triton" if importlib.util.find_spec("triton") else "reference"
    assert done.stdout.split() == [str(package / "__init__.py"), served]
