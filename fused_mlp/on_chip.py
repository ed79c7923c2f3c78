"""Which networks a backend runs in one op, and what they keep for backward."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .reference import accumulate_dtype

# Up to this width a block of rows and its activations stay in a core's cache: 256 columns keep 64
# rows of three layers under 200 kB. With a wider layer the CPU kernels run layer by layer.
CPU_CACHE_WIDTH = 256
CPU_MAX_LAYERS = 32  # csrc/cpu/kernels/kernels.h: kMaxLayers
_CHAIN_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Elements of a bfloat16 weight beyond which every layer is on its own, and may be torch's:
# modules/attempt.py, csrc/cpu/kernels/bfloat16/tuning.h.
MOST_BFLOAT16 = 1 << 20
_WIDE_DTYPES = (torch.float32, torch.float64)  # and bfloat16 where it has products of its own
# Below this many input columns the first layer is computed again in backward: its mask is stored,
# one bit an element, in place of its output.
CPU_RECOMPUTE_WIDTH = 32


def fits(input: Tensor, weights: Sequence[Tensor]) -> bool:
    """Return whether the active backend runs a network of these widths in one op."""
    backend = backends.active_backend(input.device.type)
    widths = [weights[0].shape[1], *(w.shape[0] for w in weights)]
    if backend == "native" and input.device.type == "cpu":
        if len(weights) > CPU_MAX_LAYERS:
            return False
        if max(widths) <= CPU_CACHE_WIDTH:
            return min(widths) > 0
        # Half precision is left to the library where products weigh most: see linear_act.cpp.
        wide = input.dtype in _WIDE_DTYPES and runs_wide()
        return min(widths) > 0 and (wide or _has_pairs(input))
    if backend == "triton":
        return bool(backends.triton_module("research_net").fits(widths, input.dtype))
    if backend == "native":
        return bool(_cuda_fits(widths, input))
    return True


def may_fit_mlp(input: Tensor) -> bool:
    """Return whether a chain of Linear layers may run in one op."""
    return input.dtype in _CHAIN_DTYPES and input.is_cpu


def fits_mlp(input: Tensor, weights: Sequence[Tensor]) -> bool:
    """Return whether the active backend runs a chain of Linear layers in one op.

    Args:
        input: what the first takes.
        weights: of the layers.
    """
    if not may_fit_mlp(input) or backends.active_backend("cpu") != "native":
        return False
    if input.dtype == torch.bfloat16 and (
        not _has_pairs(input) or max(weight.numel() for weight in weights) > MOST_BFLOAT16
    ):
        return False
    return fits(input, weights)


@functools.cache
def _cpu_has(question: str) -> bool:
    """Return what the CPU library answers to one of its questions (csrc/cpu/isa.cpp)."""
    function = getattr(ctypes.CDLL(backends.native_library("cpu").path), question)
    function.restype = ctypes.c_bool
    return bool(function())


def runs_wide() -> bool:
    return _cpu_has("fused_mlp_runs_wide")


def runs_blas() -> bool:
    """Return whether large products of wide layers are those of torch's BLAS."""
    return _cpu_has("fused_mlp_runs_blas")


def _has_pairs(input: Tensor) -> bool:
    """Return whether products of the input run on bfloat16's own instructions."""
    return input.dtype == torch.bfloat16 and _cpu_has("fused_mlp_runs_bfloat16")


def _cuda_fits(widths: Sequence[int], input: Tensor) -> bool:
    library = ctypes.CDLL(backends.native_library("cuda").path)
    array = (ctypes.c_int64 * len(widths))(*widths)
    return bool(library.fused_mlp_research_net_fits(array, len(widths), int(input.element_size())))


def saved_numel(
    input: Tensor,
    weights: Sequence[Tensor],
    training: bool,
    dropout_p: Sequence[float],
    seeded: bool,
) -> int:
    """Return how many elements research_net's ``saved`` has on the active backend.

    It begins with the mean and rstd of the batch norm. In training the CPU kernels add what the
    batch norm saw and what each hidden layer put out (csrc/cpu/kernels/network.h).
    """
    channels = weights[-2].shape[0]
    native = input.device.type == "cpu" and backends.active_backend("cpu") == "native"
    if not (training and native):
        return 2 * channels
    rows = input.shape[0]
    if _has_pairs(input):  # csrc/cpu/kernels/bfloat16/network.h: two elements in one
        kept = (channels, *(w.shape[0] for w in weights[:-2]))
        return 2 * channels + sum((rows * width + 1) // 2 for width in kept)
    itemsize = accumulate_dtype(input.dtype).itemsize
    widest = max(weights[0].shape[1], *(w.shape[0] for w in weights))
    wide = widest > CPU_CACHE_WIDTH and input.dtype in _WIDE_DTYPES
    numel = 2 * channels + rows * channels
    for layer, p in enumerate(dropout_p):
        width = weights[layer].shape[0]
        if layer > 0 or wide or weights[0].shape[1] > CPU_RECOMPUTE_WIDTH:
            numel += rows * width
        elif p > 0 and seeded:
            numel += -(-rows * -(-width // 8) // itemsize)
    return numel
