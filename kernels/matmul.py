"""Matrix products that keep to the registers they have.

Tensor cores take operands of any depth. Products without them (float32 at "highest" precision,
float64 on chips that lack the instruction) hold every operand of tl.dot in registers, and a depth
of 64 spills hundreds of them; so those are summed over slices of the depth.
"""

import triton
import triton.language as tl

from . import launch

SLICE = tl.constexpr(16)
# The interpreter multiplies bfloat16 by its bits; float32 holds the same products exactly.
WIDEN_BFLOAT16 = tl.constexpr(launch.INTERPRETED)


@triton.jit
def _column_halves(a):
    """[M, K] -> two [M, K / 2]"""
    halves = tl.reshape(a, [a.shape[0], 2, a.shape[1] // 2])
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def _row_halves(b):
    """[K, N] -> two [K / 2, N]"""
    halves = tl.reshape(b, [2, b.shape[0] // 2, b.shape[1]])
    return tl.split(tl.permute(halves, (1, 2, 0)))


@triton.jit
def take_columns(a, at, COLUMNS: tl.constexpr):
    """a[:, at : at + COLUMNS], where ``at`` may count a loop; all of ``a`` if it has no more.

    A loop over such slices, which go through shared memory, takes far fewer registers than tiles
    split by halves: there the compiler starts every slice's loads before the first product.
    """
    if a.shape[1] <= COLUMNS:
        return a
    else:
        index = tl.zeros([a.shape[0], COLUMNS], tl.int32) + (at + tl.arange(0, COLUMNS))[None, :]
        return tl.gather(a, index, 1)


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b for a [M, K], b [K, N] of one dtype; PRECISION as input_precision of tl.dot."""
    if WIDEN_BFLOAT16 and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, out_dtype=acc.dtype)
    elif PRECISION == "ieee" and a.dtype.primitive_bitwidth >= 32 and a.shape[1] > SLICE:
        a0, a1 = _column_halves(a)
        b0, b1 = _row_halves(b)
        return multiply(a1, b1, multiply(a0, b0, acc, PRECISION), PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
