"""The whole network in one op: Linear, ReLU, dropout, Linear, BatchNorm, LeakyReLU, Linear.

Evaluation is one launch, a training forward two (statistics, then output), backward three at most
(sums behind the batch norm with the last layer's gradients, everything before it, the merge of the
parts). Nothing of the batch's size is written but the output and the input's gradient.
"""

import functools
from dataclasses import dataclass

import torch
import triton

from .batch_norm_leaky_relu import RUNNING
from .launch import (
    accumulator,
    architecture,
    dot_precision,
    on_device,
    options,
    register_limit,
    triton_accumulator,
)
from .merge import merge, section_sizes
from .philox import drop_threshold, keep_scale
from .research_net_grad import research_net_grad_kernel
from .research_net_kernels import WHOLE, research_net_kernel, research_net_statistics_kernel
from .tiles import has_matrix_units

MAX_HIDDEN = 128
MAX_EDGE = 1024
RESIDENT_REGISTERS = 32  # of a thread, that may hold weights
# KiB of shared memory a block may have, where a chip has more than the 99 of the smallest.
SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
PROGRAMS = 128  # parts of the rows to be merged; each costs every program of the next launch


def fits(widths, dtype):
    """Return whether a network runs on chip.

    Args:
        widths: input, hidden and output widths in order.
        dtype: of input and parameters.
    """
    hidden = widths[1:-1]
    return (
        len(widths) in (3, 4)
        and min(widths) > 0
        and max(hidden) <= MAX_HIDDEN
        and max(widths[0], widths[-1]) <= MAX_EDGE
        and dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    )


@dataclass(frozen=True)
class Shape:
    """Padded widths, the block of rows, and how many programs share the rows."""

    two: bool
    block_m: int
    block_in: int
    block_f: int
    block_h: int
    block_out: int
    depth: int  # slice of a hidden width that a product takes at a time
    rows_per_part: int
    parts: int
    num_warps: int
    resident: bool  # weights stay on chip during the walk
    held: bool  # and in backward their gradients in registers
    wide_in: int  # the edges, whole, where weights are resident
    wide_out: int


def _pad(width, most):
    return max(min(16, most), min(triton.next_power_of_2(width), most))


@functools.lru_cache(maxsize=256)
def shape(rows, widths, dtype, precision, backend, capability, launch):
    """Return how a launch is cut over ``rows`` rows.

    launch: "evaluation" or "forward"; in backward "last" for the last layer, and "rest", which
        comes after it or does the work of both.
    """
    backward = launch in ("last", "rest")
    two = len(widths) == 4
    block_f, block_h = _pad(widths[1], MAX_HIDDEN), _pad(widths[-2], MAX_HIDDEN)
    widest = max(block_f, block_h)
    units = has_matrix_units(dtype, precision, backend, capability)
    doubles = units and dtype == torch.float64 and backend == "cuda"
    units = units and dtype != torch.float64
    # With few registers for each number (no matrix units; 64 lanes a warp) slices are thinner.
    scarce = not units or backend == "hip"
    if units:
        chunk = 32 if backward or dtype.itemsize == 4 else 64
    else:
        chunk = 64 // dtype.itemsize
    depth = 16 if scarce else chunk
    # On AMD a thread of 8 warps may have half the registers of one of 4, and needs more than half.
    warps = 4 if widest <= 64 or backend == "hip" else 8
    # Taller blocks load the weights less often.
    if dtype == torch.float64 or (widest > 64 and backend == "hip"):
        block_m = 16
    else:
        block_m = 64 if units and widest <= 64 and not backward else 32

    block_in, block_out = _pad(widths[0], chunk), _pad(widths[-1], chunk)
    one_chunk = widths[0] <= block_in and widths[-1] <= block_out
    wide_in, wide_out = block_in, block_out
    if not one_chunk:
        wide_in, wide_out = _pad(widths[0], MAX_HIDDEN), _pad(widths[-1], MAX_HIDDEN)
    front = block_f * wide_in + (block_f * block_h if two else 0)
    back = block_h * wide_out
    held = backward and widest <= 32 and one_chunk
    few = one_chunk and (front + back) * dtype.itemsize // (4 * 32 * warps) <= RESIDENT_REGISTERS
    resident = held or (few and (not backward or backend == "hip"))
    if held or (few and not backward):
        depth = WHOLE.value
    elif widths[0] <= wide_in and widths[-1] <= wide_out and backend in ("cuda", "hip"):
        # What the conditions leave out would spill, or not fit.
        cuda, half = backend == "cuda", dtype.itemsize == 2
        if doubles or not cuda:  # in registers for the most part
            keep = max(widest, wide_in, wide_out) <= 64 and launch != "evaluation"
            if not cuda:
                keep &= dtype.itemsize <= 4 and (launch != "rest" or (half and wide_out <= chunk))
        else:
            # In shared memory: whole for matrix units, else a slice of the depth at a time. The
            # transposes that "rest" multiplies by as well are copies, mostly in registers.
            staged = 32 * (block_h + wide_out) * 4  # on the way from one layout to another
            room = 1024 * SHARED.get(capability, 99)
            # Layers that get no wider, and without matrix units none that is narrow.
            even = max(wide_in, block_h, wide_out) <= block_f and (units or block_h >= 32 < block_f)
            full = half and {*widths[1:-1]} == {MAX_HIDDEN} and wide_in >= max(wide_out, 64)
            keep = (front + back) * dtype.itemsize + staged <= room and {
                # Without matrix units, more programs of one block each hide more latency.
                "evaluation": units,
                "forward": units or even,
                "last": (even and (not units or half or wide_out <= 64))
                or (units and wide_out <= chunk),
                "rest": even and units and (widest <= 64 or full),
            }[launch]
        if keep:
            resident, block_m = True, min(block_m, 32)
            warps = 8 if cuda and (units or doubles) else warps
            block_in, block_out = (block_in, block_out) if backward else (wide_in, wide_out)
            if cuda and units and launch == "rest":
                depth = 64 if widest > 64 else depth
            elif cuda and units:
                depth = WHOLE.value
            if launch == "last" and cuda and units and not half and wide_out > chunk:
                block_out = 16
    block_m = min(block_m, _pad(rows, block_m))
    blocks = triton.cdiv(rows, block_m)
    # With neither weights to keep nor parts to merge, a program takes one block and is done.
    alone = launch == "evaluation" and not resident
    rows_per_part = (1 if alone else triton.cdiv(blocks, PROGRAMS)) * block_m
    return Shape(
        two, block_m, block_in, block_f, block_h, block_out, depth,
        rows_per_part, triton.cdiv(rows, rows_per_part), warps, resident, held, wide_in, wide_out,
    )  # fmt: skip


class _Network:
    """Arguments every launch shares."""

    def __init__(self, input, weights, biases, dropout_p, seed):
        self.widths = (weights[0].shape[1], *(w.shape[0] for w in weights))
        self.input = input
        self.weights = [w.contiguous() for w in weights]
        self.biases = [b.contiguous() for b in biases]
        two = len(weights) == 3
        p = dropout_p[0] if two and seed is not None else 0.0
        self.seed = seed.contiguous() if p > 0 else None
        self.dropout = (drop_threshold(p), keep_scale(p))
        w1, b1 = self.weights[0], self.biases[0]
        w2, b2 = (self.weights[1], self.biases[1]) if two else (None, None)
        self.front = (w1, b1, w2, b2)
        # in, first hidden, normalized hidden, out
        self.sizes = (self.widths[0], self.widths[1], self.widths[-2], self.widths[-1])

    def cut(self, launch):
        """Return the Shape of a launch and the constants it is compiled with, but BLOCK_OUT."""
        dtype, precision = self.input.dtype, dot_precision(self.input.dtype)
        where = architecture(self.input)
        s = shape(self.input.shape[0], self.widths, dtype, precision, *where, launch)
        return s, {
            "TWO": s.two,
            "BLOCK_M": s.block_m,
            "BLOCK_IN": s.block_in,
            "BLOCK_F": s.block_f,
            "BLOCK_H": s.block_h,
            "DEPTH": s.depth,
            "RESIDENT": s.resident,
            "PRECISION": precision,
            "ACC": triton_accumulator(dtype),
            **options(s.num_warps, 1),
            **register_limit(where[0]),
        }


def _vector(tensor):
    return None if tensor is None else tensor.contiguous()


def _stride(tensor):
    return 0 if tensor is None or tensor.dim() == 0 else tensor.stride(0)


def research_net(
    input, weights, biases, bn_weight, bn_bias, running_mean, running_var, num_batches_tracked,
    training, dropout_p, seed, momentum, eps, negative_slope,
):  # fmt: skip
    """Return (output, saved): saved holds mean and rstd of the batch norm, one after the other."""
    rows, acc = input.shape[0], accumulator(input.dtype)
    channels = weights[-2].shape[0]
    output = input.new_empty(rows, weights[-1].shape[0])
    saved = input.new_empty(2 * channels, dtype=acc)
    if rows == 0:
        if training:
            saved.fill_(float("nan"))
            if num_batches_tracked is not None:
                num_batches_tracked.add_(1)
        else:
            saved[:channels] = running_mean
            saved[channels:] = (running_var.to(acc) + eps).rsqrt()
        return output, saved
    net = _Network(input, weights, biases, dropout_p, seed)
    s, constants = net.cut("forward" if training else "evaluation")
    part, statistics = None, RUNNING.value
    split = (s.rows_per_part, s.parts)
    with on_device(input):
        if training:
            statistics = triton.next_power_of_2(s.parts)
            part = input.new_empty(3 * s.parts * channels + s.parts, dtype=acc)
            # One program for each part of the rows.
            research_net_statistics_kernel[(s.parts,)](
                input, *net.front, net.seed, part, rows, *net.sizes[:3], *input.stride(),
                *net.dropout, *split, **constants,
            )  # fmt: skip
        # The same programs again; in evaluation the only launch.
        research_net_kernel[(s.parts,)](
            input, *net.front, net.weights[-1], net.biases[-1], _vector(bn_weight),
            _vector(bn_bias), net.seed, running_mean, running_var, num_batches_tracked,
            _stride(running_mean), _stride(running_var), part, output, saved, rows, *net.sizes,
            *input.stride(), *net.dropout, momentum, eps, negative_slope, *split,
            STATISTICS=statistics, BLOCK_OUT=s.block_out, **constants,
        )  # fmt: skip
    return output, saved


def research_net_backward(
    grad_output, input, weights, biases, bn_weight, bn_bias, saved, training, dropout_p, seed,
    negative_slope, output_mask,
):  # fmt: skip
    """Return the gradients of input, weights, biases, bn_weight and bn_bias that are wanted."""
    layers, rows = len(weights), input.shape[0]
    channels = weights[-2].shape[0]
    dtypes = [t.dtype for t in (*weights, *biases)]
    dtypes += [input.dtype if t is None else t.dtype for t in (bn_weight, bn_bias)]
    shapes = [tuple(t.shape) for t in (*weights, *biases)] + [(channels,)] * 2
    dx = input.new_empty(input.shape) if output_mask[0] else None
    gradients = [
        input.new_empty(size, dtype=dtype) if wanted else None
        for size, dtype, wanted in zip(shapes, dtypes, output_mask[1:], strict=True)
    ]
    everything = [t for t in (dx, *gradients) if t is not None]
    if rows == 0 or not everything:
        return [t.zero_() for t in everything]
    net = _Network(input, weights, biases, dropout_p, seed)
    s, _ = net.cut("rest")
    sections = [tuple(w.shape) for w in weights]
    sections += [(1, b.shape[0]) for b in biases] + [(1, channels)] * 2
    sizes = section_sizes(sections)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    at_w2, at_b2 = (starts[1], starts[layers + 1]) if s.two else (0, 0)
    at = at_w2, starts[layers - 1], starts[layers], at_b2, starts[2 * layers - 1], *starts[-2:]
    part = input.new_empty(s.parts, sum(sizes), dtype=accumulator(input.dtype))
    arguments = (
        grad_output, input, *net.front, net.weights[-1], _vector(bn_weight), _vector(bn_bias),
        saved, net.seed, part, dx, rows, *net.sizes, *grad_output.stride(), *input.stride(),
        *net.dropout, negative_slope, s.rows_per_part, s.parts, sum(sizes), *at,
    )  # fmt: skip
    with on_device(input):
        # One program for each part of the rows. In training, what comes before the batch norm waits
        # for the sums over all rows behind it.
        for last, rest in ((True, False), (False, True)) if training else ((True, True),):
            cut, constants = net.cut("rest" if rest else "last")
            research_net_grad_kernel[(s.parts,)](
                *arguments, LAST=last, REST=rest, TRAINING=training, HELD=cut.held,
                PARTS=triton.next_power_of_2(s.parts), BLOCK_OUT=cut.block_out,
                WIDE_IN=cut.wide_in, WIDE_OUT=cut.wide_out, **constants,
            )  # fmt: skip
        if any(output_mask[1:]):
            merge(part, gradients, sections)
    return everything
