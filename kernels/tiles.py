"""Tile sizes of the matrix products: a small table by shape, dtype and architecture.

The numbers keep every entry free of register spills and within the shared memory of its chips;
``python -m bench gpu-report`` shows both. FUSED_MLP_AUTOTUNE=1 tries the neighbours (tuning.py).
"""

from dataclasses import dataclass

import torch
import triton

PROGRAMS = 128  # about as many as the chips have multiprocessors: fewer leave some idle


@dataclass(frozen=True)
class Tile:
    """A tile of the output, rows x columns, and the slice of the depth a step takes."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def programs(self, rows, columns):
        return triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns)


def _clip(size, low, high):
    return max(low, min(triton.next_power_of_2(size), high))


def has_matrix_units(dtype, precision, backend, capability):
    """Whether tl.dot runs on tensor cores (rather than multiply-adds) for this dtype."""
    if backend == "hip":
        return True
    if dtype == torch.float64:
        return capability in (80, 90, 100, 103)
    return dtype != torch.float32 or precision != "ieee"


def product_tile(rows, columns, depth, dtype, precision, backend, capability):
    """Return the Tile for an output of rows x columns."""
    tile = _candidates(rows, columns, depth, dtype, precision, backend, capability)
    for one in tile:
        if one.programs(rows, columns) >= PROGRAMS:
            return one
    return tile[-1]


def _candidates(rows, columns, depth, dtype, precision, backend, capability):
    """Tiles from large to small."""
    if not has_matrix_units(dtype, precision, backend, capability) or dtype == torch.float64:
        wide = dtype == torch.float64
        sizes = [(32, 32, 16, 4, 2)] if wide else [(64, 64, 16, 4, 2), (32, 32, 16, 4, 2)]
    else:
        half = dtype.itemsize == 2
        step = 64 if half else 32
        # The consumer chips have 100 kB of shared memory for a block: three stages take 112.
        stages = 2 if backend == "hip" or capability in (86, 89) or capability >= 120 else 3
        sizes = [(128, 128, step, 8, stages), (64, 64, step, 4, stages), (32, 64, step, 4, stages)]
    return [
        Tile(_clip(rows, 16, r), _clip(columns, 16, c), _clip(depth, 16, d), warps, stages)
        for r, c, d, warps, stages in sizes
    ]


def neighbours(rows, columns, depth, dtype, precision, backend, capability):
    """Return the tiles that tuning compares, the table's choice first."""
    chosen = product_tile(rows, columns, depth, dtype, precision, backend, capability)
    found = [chosen]
    for tile in _candidates(rows, columns, depth, dtype, precision, backend, capability):
        for warps in (tile.num_warps, max(tile.num_warps // 2, 2)):
            other = Tile(tile.rows, tile.columns, tile.depth, warps, tile.num_stages)
            if other not in found:
                found.append(other)
    return found
