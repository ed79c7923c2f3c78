"""Tensors as strided matrices (kept x reduced), and how one is cut into tiles and parts.

Statistics over some dimensions see a tensor as ``kept`` groups of ``outer * inner`` values each.
Element (k, o, l) lies at ``k * stride_k + o * stride_o + l * stride_l``. A tile holds
``block_o * block_l`` reduced values of ``block_k`` groups. ``parts`` programs share a group's
tiles, a number that depends on shapes alone, so that the same bits come out on every run.
"""

import math
from dataclasses import dataclass

import triton

TILE = 4096  # elements: four 16-byte loads in flight for each of 256 threads in float32
SEGMENT = 128  # bytes of neighbouring groups that a tile takes: a full cache line
MAX_PROGRAMS = 512
# A part costs every program of the second launch 16 bytes or so per group; with few groups a tile,
# several lanes ask for the same ones. This many bytes of a group for each squared part keep all
# those reads near 3 % of the traffic.
BYTES_PER_SQUARED_PART = 128
BYTES_PER_SQUARED_PART_NARROW = 512


@dataclass(frozen=True)
class Plan:
    """How a (kept, outer, inner) problem is cut."""

    block_k: int
    block_o: int
    block_l: int
    blocks_k: int  # programs along the kept axis
    tiles_l: int  # tiles along the inner axis
    tiles: int  # tiles of a group
    per_part: int  # tiles a program walks over
    parts: int
    num_warps: int

    @property
    def parts_padded(self):
        return triton.next_power_of_2(self.parts)

    @property
    def grid(self):
        return (self.blocks_k, self.parts)


def plan(kept, outer, inner, itemsize, kept_is_contiguous):
    """Return the Plan for a problem of at least one element."""
    wanted = min(TILE, triton.next_power_of_2(kept * outer * inner))
    if kept_is_contiguous and kept > 1:
        block_k = min(triton.next_power_of_2(kept), SEGMENT // itemsize)
        block_l = min(triton.next_power_of_2(inner), max(wanted // block_k, 1))
        block_o = _fill(outer, wanted, block_k * block_l)
    elif inner > 1:
        block_l = min(triton.next_power_of_2(inner), wanted)
        block_k = min(triton.next_power_of_2(kept), max(SEGMENT // block_l, 1))
        block_o = _fill(outer, wanted, block_k * block_l)
    else:
        block_l = 1
        block_o = min(triton.next_power_of_2(outer), wanted)
        block_k = _fill(kept, wanted, block_o)
    tiles_l = triton.cdiv(inner, block_l)
    tiles = triton.cdiv(outer, block_o) * tiles_l
    blocks_k = triton.cdiv(kept, block_k)
    share = BYTES_PER_SQUARED_PART if block_k >= 16 else BYTES_PER_SQUARED_PART_NARROW
    most = math.isqrt(outer * inner * itemsize // share)
    parts = max(1, min(tiles, most, MAX_PROGRAMS // blocks_k))
    per_part = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, per_part)
    warps = max(1, min(8, block_k * block_l * block_o // 512))
    return Plan(block_k, block_o, block_l, blocks_k, tiles_l, tiles, per_part, parts, warps)


def _fill(size, wanted, have):
    """Return the power of two that brings a tile of ``have`` to ``wanted``, at most ``size``."""
    return max(1, min(triton.next_power_of_2(size), wanted // have))


def collapse(tensors, shape, dims):
    """Return (size, strides of each tensor) groups for ``dims``: neighbours that merge are merged.

    Args:
        tensors: tensors of the same shape.
        shape: that shape.
        dims: dimensions in order, those of size 1 included.
    """
    groups = []
    for dim in dims:
        size = shape[dim]
        if size == 1:
            continue
        strides = tuple(t.stride(dim) for t in tensors)
        if groups:
            last_size, last = groups[-1]
            if all(a == b * size for a, b in zip(last, strides, strict=True)):
                groups[-1] = (last_size * size, strides)
                continue
        groups.append((size, strides))
    return groups


def as_matrices(tensors, reduced):
    """See tensors of one shape as (kept, outer, inner) problems.

    Args:
        tensors: of the same shape, at least one element.
        reduced: the dimensions statistics run over.

    Returns:
        (kept, outer, inner), and (stride_k, stride_o, stride_l) of each tensor; None if a
        tensor's strides do not allow it.
    """
    shape = tensors[0].shape
    kept_dims = [d for d in range(len(shape)) if d not in reduced]
    kept = collapse(tensors, shape, kept_dims)
    over = collapse(tensors, shape, sorted(reduced))
    if len(kept) > 1 or len(over) > 2:
        return None
    none = (1, (0,) * len(tensors))
    k = kept[0] if kept else none
    o, inner = over if len(over) == 2 else (over[0] if over else none, none)
    strides = list(zip(k[1], o[1], inner[1], strict=True))
    return (k[0], o[0], inner[0]), strides
