"""Runs Triton's compiled kernels in ptxsim, for the tests of them. Import what is needed by name.

Shared-memory races and reads of shared memory nobody wrote raise; torch fills fresh tensors with
NaN here, so a read of an output nobody wrote shows in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from support import INTERPRETED
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRETED:
    pytest.skip("Triton was imported to interpret, not to compile", allow_module_level=True)

from ptxsim import LaunchStats, triton_driver

SEED = (123456789012345678, -987654321987)
BOTH = pytest.mark.parametrize(
    "cc", [pytest.param(80, marks=pytest.mark.slow, id="sm_80"), pytest.param(90, id="sm_90")]
)
Op = Callable[[], list[Tensor]]


@pytest.fixture(autouse=True)
def simulator() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)
    triton_driver.uninstall()
    torch.set_float32_matmul_precision("highest")


def simulate(cc: int, op: Op, **options: object) -> tuple[list[Tensor], list[LaunchStats]]:
    """Run ``op`` on the simulator and return its results and one record a launch."""
    triton_driver.reset()
    triton_driver.install(cc=cc, stats=True, **options)
    try:
        return op(), triton_driver.records()
    finally:
        triton_driver.uninstall()


def check(cc: int, op: Op, expected: list[Tensor], tolerance: float) -> list[LaunchStats]:
    """Compare with float64 results, and bit for bit with another order of blocks and threads."""
    results, records = simulate(cc, op, check_races=True, check_uninit=True)
    assert len(results) == len(expected)
    for result, exact in zip(results, expected, strict=True):
        scale = max(exact.abs().max().item(), 1.0)
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=tolerance * scale)
    shuffled, _ = simulate(cc, op, shuffle=7)
    for result, other in zip(results, shuffled, strict=True):
        assert torch.equal(result, other), "another order of blocks gives other bits"
    return records


def double(value: object) -> object:
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [double(v) for v in value]
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value  # type: ignore[union-attr]


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 2e-6, torch.float64: 1e-13}.get(dtype, 2e-2)


def names(records: list[LaunchStats]) -> list[str]:
    return [r.kernel.removesuffix("_kernel") for r in records]


def moved(records: list[LaunchStats]) -> int:
    """Bytes that warps move to and from global memory: 32 for each sector of each request.

    Lanes of a request that ask for the same bytes, as every row of a tile does for the channel's
    mean, get them from one transfer.
    """
    return sum(32 * (r.load_sectors + r.store_sectors) for r in records)


def assert_lean(records: list[LaunchStats], need: int) -> None:
    """At most 1.1 times the bytes needed, and at least 90 % of every sector used."""
    assert moved(records) <= 1.1 * need, f"{moved(records) / need:.3f} times the need"
    total = LaunchStats.total(records)
    assert total.load_efficiency >= 0.9
    assert total.store_efficiency >= 0.9
