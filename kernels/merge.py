"""Sums of partial results, added in order: the same bits whichever program finished first."""

import triton
import triton.language as tl

from .launch import cast, on_device, options

BLOCK = 256
OUTPUTS = 8  # what one launch can write
PADDING = tl.constexpr(
    16
)  # numbers; rows that start at multiples of it are read 128 bits at a time


@triton.jit
def padded(columns):
    """How far apart the rows of a matrix of partial sums lie."""
    return (columns + PADDING - 1) // PADDING * PADDING


def section_sizes(shapes):
    """Return how many numbers of a row of partial sums each (rows, columns) matrix takes."""
    padding = PADDING.value
    return [rows * (triton.cdiv(columns, padding) * padding) for rows, columns in shapes]


@triton.jit
def _store_section(ptr, start, end, columns, at, value):
    if ptr is not None:
        row = (at - start) // padded(columns)
        column = (at - start) % padded(columns)
        inside = (at >= start) & (at < end) & (column < columns)
        tl.store(ptr + row * columns + column, cast(value, ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def merge_kernel(
    part_ptr, out0, out1, out2, out3, out4, out5, out6, out7,
    end0, end1, end2, end3, end4, end5, end6, end7,
    columns0, columns1, columns2, columns3, columns4, columns5, columns6, columns7,
    total, parts, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum rows of part [parts, total] into matrices that own successive sections of a row."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    value = tl.load(part_ptr + at, mask=inside, other=0.0)
    for part in range(1, parts):
        value += tl.load(part_ptr + tl.cast(part, tl.int64) * total + at, mask=inside, other=0.0)
    _store_section(out0, 0, end0, columns0, at, value)
    _store_section(out1, end0, end1, columns1, at, value)
    _store_section(out2, end1, end2, columns2, at, value)
    _store_section(out3, end2, end3, columns3, at, value)
    _store_section(out4, end3, end4, columns4, at, value)
    _store_section(out5, end4, end5, columns5, at, value)
    _store_section(out6, end5, end6, columns6, at, value)
    _store_section(out7, end6, end7, columns7, at, value)


def merge(part, outputs, shapes):
    """Sum the rows of ``part`` (parts, total) into ``outputs``.

    Args:
        part: float32 or float64, contiguous.
        outputs: contiguous tensors, or None for sections nobody wants; at most 8.
        shapes: (rows, columns) of each section; section_sizes of them add up to the row's length.
    """
    ends, end = [], 0
    for size in section_sizes(shapes):
        end += size
        ends.append(end)
    missing = OUTPUTS - len(shapes)
    parts, total = part.shape
    with on_device(part):
        # One program for each block of a row.
        merge_kernel[(triton.cdiv(total, BLOCK),)](
            part, *outputs, *[None] * missing, *ends, *[end] * missing,
            *(columns for _, columns in shapes), *[1] * missing, total, parts,
            BLOCK=BLOCK, **options(4),
        )  # fmt: skip
