"""The dropout mask: Philox4x32-10 by element, the same as in fused_mlp/dropout.py.

One counter (row, column // 8, stream) gives four 32-bit words, that is eight 16-bit numbers for
eight neighbouring columns. The mask therefore does not depend on the tile that asks for it.
"""

import triton
import triton.language as tl


@triton.jit
def numbers(seed_ptr, row, column0, stream, COLUMNS: tl.constexpr):
    """The 16-bit numbers of a tile, as uint32.

    Args:
        seed_ptr: two int64: the key, and an offset to which ``stream`` is added.
        row: int64 [ROWS], flattened leading index of each row of the tile.
        column0: first column of the tile, a multiple of 8.
        stream: which of several masks under one seed.
        COLUMNS: width of the tile, a power of two from 8.
    """
    key = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    offset = tl.load(seed_ptr + 1) + stream
    ROWS: tl.constexpr = row.shape[0]
    GROUPS: tl.constexpr = COLUMNS // 8
    group = (column0 // 8 + tl.arange(0, GROUPS)).to(tl.uint32)
    zero = tl.zeros([ROWS, GROUPS], tl.uint32)
    c0 = zero + (row & 0xFFFFFFFF).to(tl.uint32)[:, None]
    c1 = zero + (row >> 32).to(tl.uint32)[:, None]
    c2 = zero + group[None, :]
    c3 = zero + (offset & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, c3)
    # Trailing axes: high bit and low bit of the word's index, then the half of the word.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [ROWS, COLUMNS])


@triton.jit
def numbers_at(seed_ptr, row, column, stream):
    """The 16-bit numbers of single elements, as uint32; eight times the work of a tile's.

    Args:
        seed_ptr, stream: as for ``numbers``.
        row, column: int64, of one shape.
    """
    key = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    offset = tl.load(seed_ptr + 1) + stream
    c3 = tl.zeros(row.shape, tl.uint32) + (offset & 0xFFFFFFFF).to(tl.uint32)
    c2 = (column // 8).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        key, (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32), c2, c3
    )
    word = column % 8 // 2
    low = tl.where(word == 0, w0, w1)
    high = tl.where(word == 2, w2, w3)
    chosen = tl.where(word < 2, low, high)
    return tl.where(column % 2 == 0, chosen & 0xFFFF, chosen >> 16)


@triton.jit
def dropout(x, seed_ptr, row, column0, stream, threshold, scale, COLUMNS: tl.constexpr):
    """x times ``scale`` where an element survives, times 0 where not (so NaN stays NaN)."""
    return keep(x, numbers(seed_ptr, row, column0, stream, COLUMNS), threshold, scale)


@triton.jit
def keep(x, number, threshold, scale):
    """x times ``scale`` where its number is not below the threshold, else times 0."""
    return x * tl.where(number >= threshold.to(tl.uint32), scale, 0.0)


def drop_threshold(p):
    """Return the 16-bit number below which an element is dropped."""
    return round(p * 65536)


def keep_scale(p):
    """Return what survivors are multiplied by: 1 / (1 - p), and 0 where nothing survives."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0
