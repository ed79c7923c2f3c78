"""The dropout mask once more, in NumPy and from the paper, sharing no line with the package.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> np.ndarray:
    """Return the four words of Philox4x32-10, uint64 of shape (4, *shape of the counters)."""
    x = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [np.uint64(word) for word in key]
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        x = [
            (product1 >> _SHIFT) ^ x[1] ^ k[0],
            product1 & _MASK,
            (product0 >> _SHIFT) ^ x[3] ^ k[1],
            product0 & _MASK,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & _MASK, (k[1] + np.uint64(0xBB67AE85)) & _MASK]
    return np.stack(np.broadcast_arrays(*x))


def keep_mask(seed: Tensor, rows: int, columns: int, p: float, stream: int = 0) -> Tensor:
    """Return which elements survive dropout, bool of shape (rows, columns) beside ``seed``."""
    key, offset = (int(word) % 2**64 for word in seed.tolist())
    row = np.arange(rows, dtype=np.uint64)[:, None]
    column = np.arange(columns, dtype=np.uint64)[None, :]
    words = philox4x32(
        (
            row & _MASK,
            row >> _SHIFT,
            column // np.uint64(8),
            np.uint64((offset + stream) % 2**32),
        ),
        (key % 2**32, key >> 32),
    )
    words = np.broadcast_to(words, (4, rows, columns))
    place = (column % np.uint64(8)).astype(np.int64)
    word = np.take_along_axis(
        words, np.broadcast_to(place // 2, (rows, columns))[None].astype(np.int64), axis=0
    )[0]
    number = (word >> (np.uint64(16) * (place % 2).astype(np.uint64))) & np.uint64(0xFFFF)
    keep = number.astype(np.int64) >= round(p * 65536)
    return torch.from_numpy(keep).to(seed.device)
