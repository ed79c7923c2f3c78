"""The whole network in Triton, executed in ptxsim: values, block order, traffic, launches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ptxsim import LaunchStats
from torch import Tensor
from triton_simulator import (
    BOTH,
    SEED,
    Op,
    check,
    double,
    names,
    simulate,
    simulator,  # noqa: F401
)

from fused_mlp import reference


def network_op(
    rows: int, widths: tuple[int, ...], dtype: torch.dtype, training: bool
) -> tuple[Op, list[Tensor]]:
    from fused_mlp.kernels import research_net as kernels

    layers, channels = len(widths) - 1, widths[-2]
    assert kernels.fits(widths, dtype)
    x, g = torch.randn(rows, widths[0]).to(dtype), torch.randn(rows, widths[-1]).to(dtype)
    weights = [
        (torch.randn(n, k) / k**0.5).to(dtype) for k, n in zip(widths, widths[1:], strict=False)
    ]
    biases = [(torch.randn(n) / 4).to(dtype) for n in widths[1:]]
    gamma, beta = (torch.rand(2, channels) + 0.5).to(dtype).unbind()
    mean, var = torch.randn(channels).to(dtype) / 4, (torch.rand(channels) + 0.5).to(dtype)
    seed, dropout = torch.tensor(SEED), [0.3] * (layers - 2)

    def run(module: object, cast: Callable[[object], object]) -> list[Tensor]:
        running = [cast(mean).clone(), cast(var).clone(), torch.tensor(4)]  # type: ignore[attr-defined]
        network = [cast(v) for v in (x, weights, biases, gamma, beta)]
        y, saved = module.research_net(  # type: ignore[attr-defined]
            *network, *running, training, dropout, seed, 0.1, 1e-5, 0.01
        )
        gradients = module.research_net_backward(  # type: ignore[attr-defined]
            cast(g), *network, saved, training, dropout, seed, 0.01, [True] * (2 * layers + 3)
        )
        return [y, saved, *running[:2], *gradients]

    return lambda: run(kernels, lambda t: t), run(reference, double)


def check_in_sum(cc: int, op: Op, expected: list[Tensor]) -> list[LaunchStats]:
    """As ``check`` for short mantissas: gates flip, so single elements differ; sums must not."""
    results, records = simulate(cc, op, check_races=True, check_uninit=True)
    for result, exact in zip(results, expected, strict=True):
        error = (result.double() - exact).norm() / (exact.norm() + 1e-2 * exact.numel() ** 0.5)
        assert error < 0.1
    shuffled, _ = simulate(cc, op, shuffle=7)
    assert all(map(torch.equal, results, shuffled))
    return records


@BOTH
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("rows", "widths", "precision"),
    [
        (100, (10, 64, 32, 5), "highest"),
        pytest.param(150, (10, 64, 32, 5), "high", marks=pytest.mark.slow),
        pytest.param(70, (9, 20, 7), "highest", marks=pytest.mark.slow),
        pytest.param(70, (100, 128, 72, 80), "high", marks=pytest.mark.slow),
    ],
)
def test_research_net(
    cc: int, rows: int, widths: tuple[int, ...], precision: str, training: bool
) -> None:
    torch.set_float32_matmul_precision(precision)
    op, expected = network_op(rows, widths, torch.float32, training)
    if precision == "high":
        records = check_in_sum(cc, op, expected)
    else:
        records = check(cc, op, expected, 5e-6)
    kernels = names(records)
    forward = ["research_net_statistics", "research_net"] if training else ["research_net"]
    backward = ["research_net_grad"] * (2 if training else 1) + ["merge"]
    assert kernels == forward + backward


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    ("widths", "dtype", "precision"),
    [
        ((64, 64, 64, 64), torch.float64, "highest"),
        ((33, 50, 41, 60), torch.float32, "high"),
        ((128, 128, 128, 10), torch.bfloat16, "highest"),
    ],
)
def test_research_net_of_weights_that_stay_on_chip(
    cc: int,
    widths: tuple[int, ...],
    dtype: torch.dtype,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In training, where a program walks several blocks of rows."""
    from fused_mlp.kernels import research_net as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    kernels.shape.cache_clear()
    torch.set_float32_matmul_precision(precision)
    op, expected = network_op(100, widths, dtype, True)
    if dtype == torch.float64:
        check(cc, op, expected, 1e-13)
    else:
        check_in_sum(cc, op, expected)
    kernels.shape.cache_clear()


@BOTH
def test_research_net_traffic(cc: int) -> None:
    """Nothing of the batch's size moves but the input (twice) and the output."""
    rows, widths = 4096, (32, 32, 32, 32)
    torch.set_float32_matmul_precision("high")
    op, _ = network_op(rows, widths, torch.float32, True)
    _, records = simulate(cc, op)
    size = 4 * rows * 32
    weights = 4 * 3 * (32 * 32 + 32)
    statistics, forward, last, rest, merge = records

    def dram(record: LaunchStats) -> int:
        return record.dram_read_bytes + record.dram_write_bytes

    # Every program leaves a row of moments, and in backward one of gradients.
    moments = statistics.grid[0] * 4 * (3 * 32 + 1)
    gradients = last.grid[0] * (weights + 4 * 2 * 32)
    assert dram(statistics) <= 1.1 * (size + weights + moments)
    assert dram(forward) <= 1.1 * (2 * size + weights + moments)
    assert dram(last) + dram(rest) <= 1.1 * (5 * size + 2 * weights + gradients)
    assert dram(merge) <= 1.1 * (gradients + weights + 4 * 2 * 32)


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_research_net_loads_weights_once_a_program(
    cc: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the blocks of rows for as many programs load twice the rows and nothing else."""
    from fused_mlp.kernels import research_net as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    torch.set_float32_matmul_precision("high")
    loaded = []
    for rows in (512, 1024):
        kernels.shape.cache_clear()
        op, _ = network_op(rows, (32, 32, 32, 32), torch.float32, training)
        _, records = simulate(cc, op)
        loaded.append(records)
    kernels.shape.cache_clear()
    # How often each launch reads the rows: the input, in backward again for the weight's gradient,
    # and the output's gradient.
    reads = (1, 1, 2, 3, 0) if training else (1, 3, 0)
    more, weights = 4 * 512 * 32, 4 * 3 * 32 * 32
    for few, many, times in zip(*loaded, reads, strict=True):
        assert few.grid == many.grid
        grown = 32 * (many.load_sectors - few.load_sectors) - times * more
        # At least 8 blocks more. Vectors, which registers need not hold, may be read for each.
        assert 0 <= grown < 8 * weights


@BOTH
@pytest.mark.parametrize(
    ("width", "dtype", "precision", "sums", "rest"),
    [
        (64, torch.float32, "highest", (1, 2), False),
        pytest.param(64, torch.float32, "high", (1, 2), True, marks=pytest.mark.slow),
        pytest.param(64, torch.bfloat16, "highest", (2, 4), True, marks=pytest.mark.slow),
        pytest.param(64, torch.float64, "highest", (3, 2), True, marks=pytest.mark.slow),
        pytest.param(128, torch.bfloat16, "highest", (2, 3), True, marks=pytest.mark.slow),
    ],
)
def test_research_net_of_large_weights_loads_them_once_a_program_in_training(
    cc: int,
    width: int,
    dtype: torch.dtype,
    precision: str,
    sums: tuple[int, int],
    rest: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beyond the registers they stay in shared memory; ``rest``: in the launch of that name too.

    It needs weights and transposes, and without matrix units spills if it holds both. ``sums``:
    how often the warps of a block read a weight's gradient, in the launches of backward.
    """
    from fused_mlp.kernels import research_net as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    torch.set_float32_matmul_precision(precision)
    block = 16 if dtype == torch.float64 else 32
    loaded = []
    for rows in (2 * block, 4 * block):
        kernels.shape.cache_clear()
        op, _ = network_op(rows, (width,) * 4, dtype, True)
        _, records = simulate(cc, op)
        loaded.append(records)
    kernels.shape.cache_clear()
    weight, more = width * width * dtype.itemsize, 2 * block * width * dtype.itemsize
    # Backward reads the output's gradient twice, and adds up the weights' gradients in memory: a
    # program that walks two blocks instead of one reads those it has once.
    summed = 2 * width * width * max(dtype.itemsize, 4)
    expected = (more, more, *(3 * more + times * summed for times in sums))
    for few, many, bytes_more, once in zip(
        *loaded, expected, (True, True, True, rest), strict=False
    ):
        assert few.grid == many.grid == (2, 1, 1)
        grown = 32 * (many.load_sectors - few.load_sectors) - bytes_more
        # 2 blocks more. Vectors, which registers need not hold, may be read for each.
        assert grown >= 0
        assert (grown < 2 * weight) is once


@BOTH
def test_research_net_of_large_weights_loads_them_once_a_program_in_evaluation(cc: int) -> None:
    """Weights beyond the registers: a program takes one block of rows, and each weight once."""
    torch.set_float32_matmul_precision("high")
    widths = (64, 128, 128, 64)
    op, _ = network_op(100, widths, torch.float32, False)
    _, (forward, *_) = simulate(cc, op)
    weights = 4 * sum(k * n for k, n in zip(widths, widths[1:], strict=False))
    of_a_program = (forward.load_bytes - 4 * 100 * widths[0]) / forward.grid[0]
    assert weights <= of_a_program < 1.5 * weights  # vectors too, by every warp
