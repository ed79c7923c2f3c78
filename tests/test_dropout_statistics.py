"""Whether the masks are chance: tests of stated power on what the package promises of them.

Every bound is one a correct mask crosses less than once in a million runs (and the runs are
seeded); each test says what it would notice. tests/test_dropout.py holds the mask to its oracle.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import INTERPRETED
from support.processes import Processes
from torch import Tensor

from fused_mlp import dropout
from fused_mlp.functional import linear_relu, research_net

ROWS, COLUMNS = (64, 128) if INTERPRETED else (4096, 256)
# Standard deviations that a normal variable leaves once in 1.7 million draws.
SIGMAS = 5.0


def mask(device: torch.device, p: float = 0.5, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Return the mask that the next call of the public function draws."""
    weight, bias = torch.zeros(columns, 1, device=device), torch.ones(columns, device=device)
    return linear_relu(torch.zeros(rows, 1, device=device), weight, bias, p, True) != 0


def quantile(freedom: int) -> float:
    """Return what chi-square exceeds once in a million (Wilson & Hilferty 1931)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 4.75 * math.sqrt(part)) ** 3


def correlation(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two masks of the same rate, in its standard deviations."""
    a, b = a.double().flatten(), b.double().flatten()
    a, b = a - a.mean(), b - b.mean()
    return ((a * b).sum() / (a.norm() * b.norm())).item() * math.sqrt(a.numel())


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("along", ["row", "column"])
def test_patterns_of_eight_neighbours(device: torch.device, p: float, along: str) -> None:
    """All 256 patterns of eight neighbours come as often as they should.

    Of 131072 patterns at p = 0.5 this notices neighbours that correlate by 0.02 (chi-square then
    lies eight of its standard deviations above the bound's mean), or a rate that is off by 0.01.
    """
    bits = mask(device, p).to(torch.int64).cpu()
    bits = (bits if along == "row" else bits.t()).reshape(-1, 8)
    patterns = (bits << torch.arange(8)).sum(1)
    seen = torch.bincount(patterns, minlength=256).double()
    kept = torch.tensor([n.bit_count() for n in range(256)], dtype=torch.float64)
    rate = 1 - round(p * 65536) / 65536
    expected = len(bits) * rate**kept * (1 - rate) ** (8 - kept)
    # Patterns rarer than 20 are counted together, as chi-square wants.
    rare = expected < 20
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None].clamp(min=1e-9)])
    chi_square = ((seen - expected).square() / expected.clamp(min=1))[expected > 1].sum().item()
    assert chi_square < quantile(len(expected) - 1)


def test_no_two_calls_share_a_mask(device: torch.device) -> None:
    """Forty calls: every pair differs, and is correlated no more than chance has it."""
    masks = [mask(device, rows=64) for _ in range(40)]
    for a, b in itertools.combinations(masks, 2):
        assert not torch.equal(a, b)
        assert abs(correlation(a, b)) < SIGMAS + 0.6  # of 780 pairs


def test_no_two_layers_share_a_mask(device: torch.device) -> None:
    """Of a million elements: a correlation of 0.01 between layers lies at ten deviations."""
    seed = dropout.draw_seed(device)
    masks = [dropout.keep_mask(seed, ROWS, COLUMNS, 0.5, layer) for layer in range(3)]
    for a, b in itertools.combinations(masks, 2):
        assert abs(correlation(a, b)) < SIGMAS
        # Nor is one the other, a row or a few columns further.
        for shift in (1, 8, 16):
            assert abs(correlation(a[shift:], b[:-shift])) < SIGMAS
            assert abs(correlation(a[:, shift:], b[:, :-shift])) < SIGMAS


def test_layers_of_the_op_are_the_streams(device: torch.device) -> None:
    """The network's second layer has the mask of stream 1, so what holds of streams holds of it."""
    columns, seed = 32, torch.tensor([11, 22], device=device)
    eye, zeros = torch.eye(columns, device=device), torch.zeros(columns, device=device)
    x = torch.zeros(64, columns, device=device)
    output = torch.ops.fused_mlp.research_net(
        x, [eye, eye, eye, eye], [zeros + 1, zeros + 1, zeros, zeros], None, None, zeros, zeros + 1,
        False, [0.5, 0.5], seed, 0.1, 0.0, 0.0,
    )  # fmt: skip
    first, second = (dropout.keep_mask(seed, 64, columns, 0.5, layer) for layer in (0, 1))
    # 1, kept and doubled or not; plus 1; kept and doubled or not.
    expected = (first * 2.0 + 1) * second * 2.0
    torch.testing.assert_close(output, expected.to(output))


@pytest.mark.parametrize("key", [1, -1, 2**16, 2**32, 2**48])
@pytest.mark.parametrize("offset", [0, 3, 2**16])
def test_neighbouring_seeds_are_unrelated(device: torch.device, key: int, offset: int) -> None:
    """Seeds that differ in one bit or number give masks that do not know of each other."""
    one = torch.tensor([123456789, 987654321], device=device)
    other = one + torch.tensor([key, offset], device=device)
    masks = [dropout.keep_mask(seed, ROWS, COLUMNS, 0.5) for seed in (one, other)]
    assert abs(correlation(*masks)) < SIGMAS


def test_steps_average_out(device: torch.device) -> None:
    """No element is kept more often than others over 400 calls: the largest of 8192 deviations."""
    counts = sum(mask(device, 0.3, 64, 128).double() for _ in range(400))
    deviations = (counts - 400 * 0.7) / math.sqrt(400 * 0.7 * 0.3)
    assert deviations.abs().max() < 6.3
    # Their variance is that of the binomial law: 1, up to sqrt(2 / 8192) a standard deviation.
    assert abs(deviations.var().item() - 1) < SIGMAS * math.sqrt(2 / deviations.numel())


def _network_output(rank: int) -> Tensor:
    torch.manual_seed(1000 + rank)
    weights = [torch.eye(64), torch.eye(64), torch.eye(64)]
    zeros = torch.zeros(64)
    x = torch.ones(256, 64)
    return research_net(x, weights, [zeros] * 3, None, None, None, None, True, [0.5])


def test_ranks_seeded_apart_draw_apart(two_processes: Processes) -> None:
    """Processes that seed torch by their rank drop other units; the same seed drops the same."""
    first, second = two_processes.run(_network_output)
    assert not torch.equal(first, second)
    assert torch.equal(_network_output(0), first)
    assert torch.equal(_network_output(1), second)
    assert abs(correlation(first > 0, second > 0)) < SIGMAS


def test_many_ranks(device: torch.device) -> None:
    """Thirty-two seeds in a row, as ranks have them: no pair of masks alike."""
    masks = []
    for rank in range(32):
        torch.manual_seed(rank)
        masks.append(mask(device, rows=64))
    for a, b in itertools.combinations(masks, 2):
        assert abs(correlation(a, b)) < SIGMAS + 0.6
