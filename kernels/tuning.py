"""Measured tile choice: FUSED_MLP_AUTOTUNE=1 times a table entry against its neighbours.

Triton keeps what it found in its cache folder, so another process does not measure again. Without
the variable the table decides and a new shape compiles one kernel.
"""

import functools
import os

import triton

from .launch import INTERPRETED, options


def enabled():
    """Return whether tiles are chosen by measuring."""
    return os.environ.get("FUSED_MLP_AUTOTUNE", "0") == "1" and not INTERPRETED


@functools.cache
def _tuner(kernel, tiles, names):
    configs = [
        triton.Config(
            dict(zip(names, (t.rows, t.columns, t.depth), strict=True)),
            num_warps=t.num_warps,
            num_stages=t.num_stages,
        )
        for t in tiles
    ]
    return triton.autotune(configs=configs, key=["bucket"], cache_results=True)(kernel)


def launch(kernel, grid, arguments, constants, tiles, names):
    """Launch ``kernel`` with the first tile, or with the fastest one where tuning is on.

    Args:
        grid: function of the tile's constants to the launch grid.
        arguments: positional arguments, ``bucket`` among them.
        constants: constexpr arguments apart from the tile.
        tiles: Tile objects, the table's choice first.
        names: the kernel's names for rows, columns and depth.
    """
    if enabled():
        _tuner(kernel, tuple(tiles), names)[grid](*arguments, **constants, enable_fp_fusion=False)
        return
    tile = tiles[0]
    meta = dict(zip(names, (tile.rows, tile.columns, tile.depth), strict=True))
    kernel[grid(meta)](*arguments, **constants, **meta, **options(tile.num_warps, tile.num_stages))
