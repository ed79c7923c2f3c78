"""Mean and squared deviations of groups of values, the same bits on every run.

A program sums deviations from the mean of its first tile, which keeps every bit of data far from
zero (1e4 +- 1e-2), then turns them into its part's own (shift, mean - shift, squared deviations,
count). Whoever needs the group's moments merges the parts, in order, with Chan's formula. Means
stay split in two numbers until the end, as their sum would round away what the variance needs.

For the conditioning: with T tiles in a part, the first tile's mean is one of T summands, so the
squared shift exceeds the variance of what is summed at most T-fold.
"""

import triton
import triton.language as tl

from .launch import cast

MERGED = tl.constexpr(1024)  # numbers of each kind that a merge takes at a time


@triton.constexpr_function
def _slice(numbers, width):
    """How many parts of ``width`` numbers a merge takes at a time."""
    return max(numbers // width, 1)


@triton.jit
def tile_rows(tile, tiles_l, O, L, BLOCK_O: tl.constexpr, BLOCK_L: tl.constexpr):
    """The outer and inner index (int64) of a tile's reduced values, and which of them exist."""
    r = tl.arange(0, BLOCK_O * BLOCK_L)
    tile = tl.cast(tile, tl.int64)
    if BLOCK_L == 1:
        o = tile * BLOCK_O + r
        inner = tl.zeros_like(o)
    else:
        o = (tile // tiles_l) * BLOCK_O + r // BLOCK_L
        inner = (tile % tiles_l) * BLOCK_L + r % BLOCK_L
    return o, inner, (o < O) & (inner < L)


@triton.jit
def load_tile(ptr, o, inner, valid, k, in_k, stride_k, stride_o, stride_l, ACC: tl.constexpr):
    """A [reduced, kept] tile in the accumulation dtype; zeros where there is nothing."""
    at = (o * stride_o + inner * stride_l)[:, None] + (k * stride_k)[None, :]
    return tl.load(ptr + at, mask=valid[:, None] & in_k[None, :], other=0.0).to(ACC)


@triton.jit
def store_tile(ptr, value, o, inner, valid, k, in_k, stride_k, stride_o, stride_l):
    at = (o * stride_o + inner * stride_l)[:, None] + (k * stride_k)[None, :]
    value = cast(value, ptr.dtype.element_ty)
    tl.store(ptr + at, value, mask=valid[:, None] & in_k[None, :])


@triton.jit
def part_moments(
    x_ptr, k, in_k, K, O, L, stride_k, stride_o, stride_l, tiles_l, first, last,
    BLOCK_O: tl.constexpr, BLOCK_L: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Moments of tiles first .. last-1: shift, mean - shift, squared deviations [kept]; count."""
    o, inner, valid = tile_rows(first, tiles_l, O, L, BLOCK_O, BLOCK_L)
    x = load_tile(x_ptr, o, inner, valid, k, in_k, stride_k, stride_o, stride_l, ACC)
    count = tl.sum(valid.to(ACC), 0)
    shift = tl.sum(x, 0) / count
    # An infinity or NaN in the first tile must not hide in the shift: it belongs into the sums.
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    d = tl.where(valid[:, None], x - shift[None, :], 0.0)
    sums = d
    squares = d * d
    for tile in range(first + 1, last):
        o, inner, valid = tile_rows(tile, tiles_l, O, L, BLOCK_O, BLOCK_L)
        x = load_tile(x_ptr, o, inner, valid, k, in_k, stride_k, stride_o, stride_l, ACC)
        d = tl.where(valid[:, None], x - shift[None, :], 0.0)
        sums += d
        squares += d * d
        count += tl.sum(valid.to(ACC), 0)
    mean = tl.sum(sums, 0) / count
    deviations = tl.sum(squares, 0) - count * mean * mean
    return shift, mean, tl.where(deviations < 0, 0.0, deviations), count


@triton.jit
def store_part(part_ptr, shift, mean, deviations, count, part, parts, k, in_k, K, first_block):
    """Write a part's moments: three [parts, K] planes, and the counts after them."""
    row = part.to(tl.int64) * K + k
    plane = parts.to(tl.int64) * K
    tl.store(part_ptr + row, shift, mask=in_k)
    tl.store(part_ptr + plane + row, mean, mask=in_k)
    tl.store(part_ptr + 2 * plane + row, deviations, mask=in_k)
    tl.store(part_ptr + 3 * plane + part, count, mask=first_block)


@triton.jit
def merge_parts(part_ptr, parts, k, in_k, K, PARTS: tl.constexpr, ACC: tl.constexpr):
    """A group's moments from its parts: the mean in two pieces, squared deviations; count.

    PARTS: ``parts`` padded to a power of two. They are taken a slice at a time.
    """
    SLICE: tl.constexpr = PARTS if PARTS * k.shape[0] <= MERGED else _slice(MERGED, k.shape[0])
    plane = parts.to(tl.int64) * K
    origin = tl.load(part_ptr + k, mask=in_k, other=0.0).to(ACC)
    count = tl.full((), 0.0, ACC)
    centre = tl.zeros([k.shape[0]], ACC)
    total = tl.zeros([k.shape[0]], ACC)
    for start in range(0, parts, SLICE):
        p = start + tl.arange(0, SLICE)
        present = p < parts
        at = part_ptr + p.to(tl.int64)[:, None] * K + k[None, :]
        mask = present[:, None] & in_k[None, :]
        shift = tl.load(at, mask=mask, other=0.0).to(ACC)
        mean = tl.load(at + plane, mask=mask, other=0.0).to(ACC)
        deviations = tl.load(at + 2 * plane, mask=mask, other=0.0).to(ACC)
        counts = tl.load(part_ptr + 3 * plane + p, mask=present, other=0.0).to(ACC)
        slice_count = tl.sum(counts, 0)
        offset = tl.where(present[:, None], (shift - origin[None, :]) + mean, 0.0)
        slice_centre = tl.sum(offset * counts[:, None], 0) / slice_count
        between = offset - slice_centre[None, :]
        total += tl.sum(deviations + between * between * counts[:, None], 0)
        moved = slice_centre - centre
        share = slice_count / (count + slice_count)
        total += moved * moved * count * share
        centre += moved * share
        count += slice_count
    return origin, centre, total, count


@triton.jit(do_not_specialize=["parts"])
def moments_kernel(
    x_ptr, part_ptr, K, O, L, stride_k, stride_o, stride_l, tiles_l, tiles, per_part, parts,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_L: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Moments of every part. Grid: (blocks of groups, parts)."""
    block = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    first = part * per_part
    last = tl.minimum(first + per_part, tiles)
    shift, mean, deviations, count = part_moments(
        x_ptr, k, in_k, K, O, L, stride_k, stride_o, stride_l, tiles_l, first, last,
        BLOCK_O, BLOCK_L, ACC,
    )  # fmt: skip
    store_part(part_ptr, shift, mean, deviations, count, part, parts, k, in_k, K, block == 0)


@triton.jit
def merge_rows(ptr, stride, parts, k, in_k, PARTS: tl.constexpr, ACC: tl.constexpr):
    """The sum over parts of vectors that lie ``stride`` elements apart, a slice at a time."""
    SLICE: tl.constexpr = PARTS if PARTS * k.shape[0] <= MERGED else _slice(MERGED, k.shape[0])
    total = tl.zeros([SLICE, k.shape[0]], ACC)
    for start in range(0, parts, SLICE):
        p = start + tl.arange(0, SLICE)
        mask = (p < parts)[:, None] & in_k[None, :]
        at = p.to(tl.int64)[:, None] * stride + k[None, :]
        total += tl.load(ptr + at, mask=mask, other=0.0).to(ACC)
    return tl.sum(total, 0)


@triton.jit
def merge_sums(part_ptr, plane_index, parts, k, in_k, K, PARTS: tl.constexpr, ACC: tl.constexpr):
    """The sum over parts of one [parts, K] plane of partial sums."""
    plane_ptr = part_ptr + (plane_index * parts).to(tl.int64) * K
    return merge_rows(plane_ptr, K, parts, k, in_k, PARTS, ACC)


@triton.jit
def store_sum(part_ptr, value, plane_index, part, parts, k, in_k, K):
    """Write a part's sum into one [parts, K] plane of partial sums."""
    tl.store(part_ptr + (plane_index * parts + part).to(tl.int64) * K + k, value, mask=in_k)
