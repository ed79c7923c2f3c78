"""What every launcher needs: the device a kernel runs on, accumulation dtypes, compile options."""

import contextlib
import functools
import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_ROUND_BFLOAT16 = tl.constexpr(INTERPRETED)


def on_device(tensor):
    """Return a context in which kernels launch on the tensor's device and its current stream."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()  # the interpreter and simulators run on host memory


def register_limit(backend):
    """Return the option that lets a thread have every register.

    Left alone, ptxas rather spills a few where that lets one more block run beside. Not on AMD.
    """
    return {"maxnreg": 255} if backend == "cuda" else {}


def options(num_warps, num_stages=None):
    """Return the compile options of a launch.

    Products and sums are not fused by the compiler. In a reduction over lanes it would round one
    lane's product and not its neighbour's, so copies of a sum that must be equal would differ; and
    backward could not compute the same bits again that forward put through a gate.
    """
    chosen = {"num_warps": num_warps, "enable_fp_fusion": False}
    if num_stages is not None:
        chosen["num_stages"] = num_stages
    return chosen


def accumulator(dtype):
    """Return the torch dtype that sums and statistics of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_accumulator(dtype):
    """Return the Triton dtype that sums and statistics of ``dtype`` are kept in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype):
    """Return ``input_precision`` of tl.dot: tf32 for float32 unless torch asks for "highest"."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


@functools.cache
def _target(device_index):
    if INTERPRETED:
        return "interpreter", 0
    target = triton.runtime.driver.active.get_current_target()
    arch = target.arch
    return target.backend, arch if isinstance(arch, int) else 0


def architecture(tensor):
    """Return (backend, compute capability) as ("cuda", 90); 0 where there is no such number."""
    if tensor.is_cuda:
        return _target(tensor.device.index)
    return _target.__wrapped__(None)  # a simulator may be installed and changed at run time


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """A host float as a scalar of ``dtype``, without losing bits in the interpreter."""
    return tl.full((), value, dtype)


@triton.jit
def square_root(x):
    """The correctly rounded square root in float32 and float64 (tl.sqrt is approximate)."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def divide(x, y):
    """The correctly rounded quotient in float32 and float64 (``/`` is approximate)."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in another floating dtype, rounded to nearest even."""
    if _ROUND_BFLOAT16 and dtype == tl.bfloat16 and x.dtype == tl.float32:
        # The interpreter cuts the low half off; hardware rounds.
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
