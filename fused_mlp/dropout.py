"""The dropout mask: a pure function of (seed, row, column), the same on every backend.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is keyed by
``seed[0]`` and counts ``(row, column // 8, seed[1] + stream)``. Its four 32-bit words decide eight
neighbouring columns with 16 bits each, so the keep probability is a multiple of 2**-16 (at most
7.6e-6 from the one asked for); 32 bits an element would double the cost of the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .recompute import replay_draw

DECISION_BITS = 16
COLUMNS_PER_COUNTER = 8

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW32 = 0xFFFFFFFF


def draw_seed(device: torch.device | str) -> Tensor:
    """Return a fresh seed, int64 of shape (2,), from the default generator of ``device``."""
    seed = torch.empty(2, dtype=torch.int64, device=device).random_()
    replay_draw()
    return seed


def threshold(p: float) -> int:
    """Return the 16-bit number below which an element is dropped."""
    return round(p * (1 << DECISION_BITS))


def keep_mask(seed: Tensor, rows: int, columns: int, p: float, stream: int = 0) -> Tensor:
    """Return the bool mask of shape (rows, columns): True where an element survives dropout."""
    groups = -(-columns // COLUMNS_PER_COUNTER)
    device = seed.device
    row = torch.arange(rows, dtype=torch.int64, device=device)[:, None]
    group = torch.arange(groups, dtype=torch.int64, device=device)[None, :]
    counter = torch.broadcast_tensors(
        row & _LOW32, row >> 32, group, ((seed[1] + stream) & _LOW32).reshape(1, 1)
    )
    words = _philox(counter, (seed[0] & _LOW32, (seed[0] >> 32) & _LOW32))
    numbers = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (numbers >= threshold(p)).reshape(rows, groups * COLUMNS_PER_COUNTER)[:, :columns]


def _philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Run the ten Philox rounds on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW32, (k1 + _WEYL[1]) & _LOW32
    return c0, c1, c2, c3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a * b; the halves of b keep int64 from overflowing."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16)
    total = (low >> 16) + high
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)
