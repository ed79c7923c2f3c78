"""What the Triton kernels compile to for GPUs that are not here.

No register spills, shared memory within the chip's, matrix instructions in the products, 128-bit
accesses in the streaming kernels. ``python -m bench gpu-report`` prints the same figures.
"""

from __future__ import annotations

import pytest
import torch
from support import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRETED:
    pytest.skip("Triton was imported to interpret, not to compile", allow_module_level=True)

from bench import compiled, gpu_report

CASES = gpu_report.cases()
MATRIX = {
    "sm_80": {"mma.sync"},
    "sm_90": {"wgmma", "mma.sync"},
    "sm_100": {"tcgen05", "mma.sync"},
    "sm_120": {"mma.sync"},
    "gfx942": {"mfma"},
}


def _quick(case: gpu_report.Case) -> bool:
    return case.streaming and case.dtype == torch.float32


@pytest.mark.parametrize("chip", compiled.CHIPS)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            c,
            id=f"{c.op}-{c.shape}-{c.dtype_name}".replace(" ", ""),
            marks=[] if _quick(c) else pytest.mark.slow,
        )
        for c in CASES
    ],
)
def test_report(case: gpu_report.Case, chip: str, request: pytest.FixtureRequest) -> None:
    if chip not in ("sm_90", "gfx942") and _quick(case):
        request.applymarker(pytest.mark.slow)
    for _, kernel in gpu_report.report([chip], [case]):
        assert kernel.fits, f"{kernel.name}: {kernel.shared} bytes of shared memory"
        assert kernel.spilled == 0, f"{kernel.name}: {kernel.spilled} bytes spilled"
        product = kernel.name.startswith(("linear_relu", "research_net"))
        if case.matrix and product:
            found = set(kernel.matrix.split("+"))
            assert found & MATRIX[chip], f"{kernel.name}: no matrix instruction"
        if case.streaming:
            assert kernel.wide_loads > 0, f"{kernel.name}: no 128-bit load"
            writes = "sums" not in kernel.name and "moments" not in kernel.name
            if writes and not ("eval" in case.shape and "grad" in kernel.name):
                assert kernel.wide_stores > 0, f"{kernel.name}: no 128-bit store"


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, "highest"),
        (torch.float32, "high"),
        (torch.bfloat16, "highest"),
        (torch.float64, "highest"),
    ],
)
@pytest.mark.parametrize("widths", [(1000, 100, 100, 1000), (1024, 128, 1024)])
def test_networks_at_the_limit_keep_to_their_registers(
    widths: tuple[int, ...], dtype: torch.dtype, precision: str, chip: str
) -> None:
    """Widths that no 128-bit access divides, and one hidden layer; float64 too."""
    case = gpu_report.network(widths, dtype, precision, matrix=False)
    for _, kernel in gpu_report.report([chip], [case]):
        assert kernel.fits, f"{kernel.name}: {kernel.shared} bytes of shared memory"
        assert kernel.spilled == 0, f"{kernel.name}: {kernel.spilled} bytes spilled"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "dtype", "precision", "chip"),
    [
        ((33, 50, 41, 60), torch.float64, "highest", "sm_90"),
        ((64, 64, 64, 64), torch.float32, "high", "gfx942"),
        ((64, 64, 64, 64), torch.bfloat16, "highest", "gfx942"),
        ((128, 128, 128, 128), torch.bfloat16, "highest", "sm_100"),
        ((20, 100, 100, 40), torch.float32, "high", "sm_100"),
    ],
)
def test_networks_whose_weights_fill_the_chip_keep_to_their_registers(
    widths: tuple[int, ...], dtype: torch.dtype, precision: str, chip: str
) -> None:
    """Those closest to a spill or to the end of shared memory where weights stay on chip."""
    case = gpu_report.network(widths, dtype, precision, matrix=False)
    for _, kernel in gpu_report.report([chip], [case]):
        assert kernel.fits, f"{kernel.name}: {kernel.shared} bytes of shared memory"
        assert kernel.spilled == 0, f"{kernel.name}: {kernel.spilled} bytes spilled"


def test_table_has_a_line_for_every_kernel() -> None:
    rows = gpu_report.report(["sm_90"], [CASES[2]])
    lines = gpu_report.lines(rows)
    assert len(lines) == len(rows)
    for line in lines:
        assert line.problem.startswith("normalize") and line.chip == "sm_90"
        assert 0 < line.occupancy <= 1
