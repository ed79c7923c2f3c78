"""Measured tile choice: what FUSED_MLP_AUTOTUNE=1 tries, and what it keeps on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRETED:
    pytest.skip("Triton was imported to interpret, not to compile", allow_module_level=True)

from ptxsim import triton_driver

from fused_mlp.kernels import linear_relu as kernels
from fused_mlp.kernels import tuning


@pytest.fixture(autouse=True)
def _simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tuning._tuner.cache_clear()
    yield
    tuning._tuner.cache_clear()
    triton_driver.uninstall()


def launches(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the output, and how many kernels ran to find it, in a driver that tries every tile."""
    triton_driver.reset()
    triton_driver.install(cc=80, run_all_configs=True)
    try:
        return kernels.linear_relu(x, weight, None, 0.0, None), triton_driver.launches()
    finally:
        triton_driver.uninstall()


def test_without_the_variable_a_shape_compiles_one_kernel(tmp_path: Path) -> None:
    """A first call must not stall: nothing is measured, one tile is compiled."""
    _, count = launches(torch.randn(70, 20), torch.randn(24, 20))
    assert count == 1
    assert len(list(tmp_path.rglob("*.cubin"))) == 1
    assert not list(tmp_path.rglob("*.autotune.json"))


def test_measured_choice_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSED_MLP_AUTOTUNE", "1")
    x, weight = torch.randn(70, 20), torch.randn(24, 20)
    output, count = launches(x, weight)
    assert count > 2, "nothing was compared"
    torch.testing.assert_close(output, torch.relu(x @ weight.T))
    assert len(list(tmp_path.rglob("*.autotune.json"))) == 1
    tuning._tuner.cache_clear()  # as in another process
    again, count = launches(x, weight)
    assert count == 1, "it was measured again"
    assert torch.equal(again, output)
