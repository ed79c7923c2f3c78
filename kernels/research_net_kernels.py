"""The whole network on chip: what the launchers in research_net.py run.

A program walks blocks of rows. RESIDENT weights are loaded once, before the walk, as tuples of
slices of the depth (one where it is WHOLE); those too large for the chip come from the cache for
each block, a slice at a time: a product that held its whole operand would spill. Activations live
in registers and shared memory only, and backward computes them again from the input.

Dimensions: IN -> F -> H -> OUT, with BatchNorm on H; without a middle layer F is H.
    first   W1 [F, IN], ReLU and dropout if there is a middle layer
    middle  W2 [H, F], if TWO
    last    W3 [OUT, H]
Each is padded to a power of two from 16: BLOCK_IN and BLOCK_OUT are chunks of IN and OUT, and DEPTH
is the slice of a hidden width that a product takes at a time.
"""

import triton
import triton.language as tl

from .activations import LEAKY_RELU, RELU, activate
from .batch_norm_leaky_relu import RUNNING, load_vector, reciprocal_std, update_running
from .launch import cast, divide, scalar
from .matmul import multiply, take_columns
from .moments import merge_parts, store_part
from .philox import dropout

WHOLE = tl.constexpr(128)  # the DEPTH at which products take whole operands


@triton.jit
def load_weight(ptr, row0, rows, column0, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A [ROWS, COLUMNS] tile of a contiguous (rows, columns) matrix, zeros outside of it."""
    r = row0 + tl.arange(0, ROWS)
    c = column0 + tl.arange(0, COLUMNS)
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    return tl.load(ptr + r[:, None] * columns + c[None, :], mask=mask, other=0.0)


@triton.jit
def weight_slices(ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                  HEIGHT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """A (rows, columns) matrix as a tuple of slices of at most HEIGHT rows or WIDTH columns."""
    R: tl.constexpr = min(HEIGHT, ROWS)
    C: tl.constexpr = min(WIDTH, COLUMNS)
    slices = ()
    for r in tl.static_range(0, ROWS, R):
        for c in tl.static_range(0, COLUMNS, C):
            slices += (load_weight(ptr, r, rows, c, columns, R, C),)
    return slices


@triton.jit
def slices_product(a, slices, acc, PRECISION: tl.constexpr):
    """acc + a @ W.T for slices of a weight's columns."""
    DEPTH: tl.constexpr = slices[0].shape[1]
    for i in tl.static_range(len(slices)):
        piece = take_columns(a, i * DEPTH, DEPTH)
        acc = multiply(piece, tl.trans(slices[i]), acc, PRECISION)
    return acc


@triton.jit
def load_rows(ptr, m, in_m, column0, columns, stride_m, stride_k, COLUMNS: tl.constexpr):
    """A block of rows of a strided matrix, columns column0 .. column0 + COLUMNS."""
    c = column0 + tl.arange(0, COLUMNS)
    mask = in_m[:, None] & (c < columns)[None, :]
    return tl.load(ptr + m[:, None] * stride_m + (c * stride_k)[None, :], mask=mask, other=0.0)


@triton.jit
def first_product(
    x_ptr, m, in_m, w1_ptr, stride_xm, stride_xk, IN, F, BLOCK_M: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x @ W1.T for a block of rows [BLOCK_M, BLOCK_F], a chunk of the input at a time."""
    z = tl.zeros([BLOCK_M, BLOCK_F], ACC)
    for at in range(0, IN, BLOCK_IN):
        x = load_rows(x_ptr, m, in_m, at, IN, stride_xm, stride_xk, BLOCK_IN)
        w = load_weight(w1_ptr, 0, F, at, IN, BLOCK_F, BLOCK_IN)
        z = multiply(x, tl.trans(w), z, PRECISION)
    return z


@triton.jit
def weight_product(a, w_ptr, row0, rows, columns, acc, DEPTH: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """acc + a @ W[row0:].T, DEPTH columns of ``a`` and of the weight at a time."""
    for k in range(0, columns, DEPTH):
        piece = take_columns(a, k, DEPTH)
        w = load_weight(w_ptr, row0, rows, k, columns, acc.shape[1], piece.shape[1])
        acc = multiply(piece, tl.trans(w), acc, PRECISION)
    return acc


@triton.jit
def before_norm(
    x_ptr, m, in_m, w1_ptr, w1, b1, w2_ptr, w2, b2, seed_ptr, threshold, scale,
    stride_xm, stride_xk, IN, F, H, TWO: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_H: tl.constexpr, DEPTH: tl.constexpr,
    RESIDENT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What the batch norm sees of a block of rows [BLOCK_M, H], and the first layer's output."""
    if RESIDENT:
        x = load_rows(x_ptr, m, in_m, 0, IN, stride_xm, stride_xk, w1[0].shape[1] * len(w1))
        z = slices_product(x, w1, tl.zeros([BLOCK_M, BLOCK_F], ACC), PRECISION)
    else:
        z = first_product(
            x_ptr, m, in_m, w1_ptr, stride_xm, stride_xk, IN, F, BLOCK_M, BLOCK_IN, BLOCK_F,
            PRECISION, ACC,
        )  # fmt: skip
    z += b1[None, :]
    if TWO:
        z = activate(z, 0.0, RELU)
        if seed_ptr is not None:
            z = dropout(z, seed_ptr, m, 0, 0, threshold, scale, BLOCK_F)
        a = cast(z, w2_ptr.dtype.element_ty)
        zero = tl.zeros([BLOCK_M, BLOCK_H], ACC)
        if RESIDENT:
            z = slices_product(a, w2, zero, PRECISION)
        else:
            z = weight_product(a, w2_ptr, 0, H, F, zero, DEPTH, PRECISION)
        return z + b2[None, :], a
    else:
        return z, z


@triton.jit(do_not_specialize=["threshold", "parts", "rows_per_part"])
def research_net_statistics_kernel(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, seed_ptr, part_ptr, M, IN, F, H,
    stride_xm, stride_xk, threshold, scale: tl.float64, rows_per_part, parts,
    TWO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Moments of the batch norm's input over a part of the rows. Grid: (parts,)."""
    part = tl.program_id(0)
    h = tl.arange(0, BLOCK_H).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    in_h = h < H
    scale = scalar(scale, ACC)
    w1 = 0
    w2 = 0
    if RESIDENT:
        w1 = weight_slices(w1_ptr, F, IN, BLOCK_F, BLOCK_IN, BLOCK_F, DEPTH)
        if TWO:
            w2 = weight_slices(w2_ptr, H, F, BLOCK_H, BLOCK_F, BLOCK_H, DEPTH)
    b1 = load_vector(b1_ptr, f, f < F, 0.0, ACC)
    b2 = load_vector(b2_ptr, h, in_h, 0.0, ACC) if TWO else b1
    first = part.to(tl.int64) * rows_per_part
    last = tl.minimum(first + rows_per_part, M)
    shift = tl.zeros([BLOCK_H], ACC)
    sums = tl.zeros([BLOCK_H], ACC)
    squares = tl.zeros([BLOCK_H], ACC)
    for start in tl.range(first, last, BLOCK_M, disable_licm=DEPTH < WHOLE):
        m = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
        in_m = m < last
        z, _ = before_norm(
            x_ptr, m, in_m, w1_ptr, w1, b1, w2_ptr, w2, b2, seed_ptr, threshold, scale,
            stride_xm, stride_xk, IN, F, H, TWO, BLOCK_M, BLOCK_IN, BLOCK_F, BLOCK_H, DEPTH,
            RESIDENT, PRECISION, ACC,
        )  # fmt: skip
        if start == first:
            rows = tl.minimum(last - first, BLOCK_M).to(ACC)
            shift = tl.sum(tl.where(in_m[:, None], z, 0.0), 0) / rows
            shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
        d = tl.where(in_m[:, None], z - shift[None, :], 0.0)
        sums += tl.sum(d, 0)
        squares += tl.sum(d * d, 0)
    count = (last - first).to(ACC)
    mean = sums / count
    deviations = squares - count * mean * mean
    deviations = tl.where(deviations < 0, 0.0, deviations)
    store_part(part_ptr, shift, mean, deviations, count, part, parts, h, in_h, H, part >= 0)


@triton.jit(do_not_specialize=["threshold", "parts", "rows_per_part"])
def research_net_kernel(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr, gamma_ptr, beta_ptr, seed_ptr,
    running_mean_ptr, running_var_ptr, tracked_ptr, running_mean_stride, running_var_stride,
    part_ptr, y_ptr, saved_ptr, M, IN, F, H, OUT, stride_xm, stride_xk, threshold,
    scale: tl.float64, momentum: tl.float64, eps: tl.float64, slope: tl.float64,
    rows_per_part, parts, STATISTICS: tl.constexpr, TWO: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_OUT: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The network's output for a part of the rows. Grid: (parts,).

    STATISTICS: RUNNING in evaluation, else the padded number of parts to merge.
    """
    part = tl.program_id(0)
    h = tl.arange(0, BLOCK_H).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    in_h = h < H
    slope = scalar(slope, ACC)
    scale = scalar(scale, ACC)
    if STATISTICS == RUNNING:
        mean = tl.load(running_mean_ptr + h * running_mean_stride, mask=in_h, other=0.0).to(ACC)
        var = tl.load(running_var_ptr + h * running_var_stride, mask=in_h, other=1.0).to(ACC)
    else:
        origin, centre, deviations, count = merge_parts(
            part_ptr, parts, h, in_h, H, STATISTICS, ACC
        )
        mean = origin + centre
        var = divide(deviations, tl.zeros_like(deviations) + count)
        if part == 0:
            update_running(
                running_mean_ptr, running_var_ptr, tracked_ptr, running_mean_stride,
                running_var_stride, h, in_h, mean, deviations, count, scalar(momentum, ACC),
                part == 0, ACC,
            )  # fmt: skip
    rstd = reciprocal_std(var, scalar(eps, ACC), ACC)
    if part == 0:
        tl.store(saved_ptr + h, mean, mask=in_h)
        tl.store(saved_ptr + H + h, rstd, mask=in_h)
    gamma = load_vector(gamma_ptr, h, in_h, 1.0, ACC)
    beta = load_vector(beta_ptr, h, in_h, 0.0, ACC)
    w1 = 0
    w2 = 0
    if RESIDENT:
        w1 = weight_slices(w1_ptr, F, IN, BLOCK_F, BLOCK_IN, BLOCK_F, DEPTH)
        if TWO:
            w2 = weight_slices(w2_ptr, H, F, BLOCK_H, BLOCK_F, BLOCK_H, DEPTH)
    b1 = load_vector(b1_ptr, f, f < F, 0.0, ACC)
    b2 = load_vector(b2_ptr, h, in_h, 0.0, ACC) if TWO else b1
    c = tl.arange(0, BLOCK_OUT)
    if RESIDENT:
        w3 = weight_slices(w3_ptr, OUT, H, BLOCK_OUT, BLOCK_H, BLOCK_OUT, DEPTH)
    first = part.to(tl.int64) * rows_per_part
    last = tl.minimum(first + rows_per_part, M)
    for start in tl.range(first, last, BLOCK_M, disable_licm=DEPTH < WHOLE):
        m = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
        in_m = m < last
        z, _ = before_norm(
            x_ptr, m, in_m, w1_ptr, w1, b1, w2_ptr, w2, b2, seed_ptr, threshold, scale,
            stride_xm, stride_xk, IN, F, H, TWO, BLOCK_M, BLOCK_IN, BLOCK_F, BLOCK_H, DEPTH,
            RESIDENT, PRECISION, ACC,
        )  # fmt: skip
        u = (z - mean[None, :]) * rstd[None, :] * gamma[None, :] + beta[None, :]
        a = cast(activate(u, slope, LEAKY_RELU), w3_ptr.dtype.element_ty)
        for at in range(0, OUT, BLOCK_OUT):
            y = tl.zeros([BLOCK_M, BLOCK_OUT], ACC)
            if RESIDENT:
                y = slices_product(a, w3, y, PRECISION)
            else:
                y = weight_product(a, w3_ptr, at, OUT, H, y, DEPTH, PRECISION)
            y += load_vector(b3_ptr, at + c, at + c < OUT, 0.0, ACC)[None, :]
            y_at = y_ptr + m[:, None] * OUT + (at + c)[None, :]
            mask = in_m[:, None] & (at + c < OUT)[None, :]
            tl.store(y_at, cast(y, y_ptr.dtype.element_ty), mask=mask)
        if RESIDENT and DEPTH < WHOLE:
            # Without it the compiler keeps slices in registers instead of shared memory: spills.
            tl.debug_barrier()
