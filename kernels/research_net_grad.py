"""Gradients of the whole network on chip: what the launcher in research_net.py runs backward.

A program sums its rows' share of the weight gradients: in registers where they can be HELD, else
in its own row of the partial sums, tile by tile, as they would not fit the registers. Nobody
else touches that row, so it stays in the cache and needs no atomics. See research_net_kernels.py
for the dimensions.
"""

import triton
import triton.language as tl

from .activations import LEAKY_RELU, RELU, activate, activation_gradient
from .batch_norm_leaky_relu import load_vector
from .launch import cast, scalar
from .matmul import multiply, take_columns
from .merge import padded
from .moments import merge_rows
from .research_net_kernels import (
    WHOLE,
    before_norm,
    load_rows,
    load_weight,
    weight_slices,
)


@triton.jit
def add_weight(ptr, value, row0, rows, column0, columns, fresh):
    """Add a tile to a (rows, columns) matrix of padded rows; ``fresh``: write it."""
    r = row0 + tl.arange(0, value.shape[0])
    c = column0 + tl.arange(0, value.shape[1])
    stride = padded(columns)
    mask = (r < rows)[:, None] & (c < stride)[None, :]
    at = ptr + r[:, None] * stride + c[None, :]
    tl.store(at, value + tl.load(at, mask=mask & (not fresh), other=0.0), mask=mask)


@triton.jit
def add_vector(ptr, value, first, size, fresh):
    """Add a piece to a vector; ``fresh``: write it."""
    i = first + tl.arange(0, value.shape[0])
    mask = i < padded(size)
    value += tl.load(ptr + i, mask=mask & (not fresh), other=0.0)
    tl.store(ptr + i, value, mask=mask)


@triton.jit
def middle_grad(
    dz, a, w2_ptr, dw2_ptr, H, F, da, fresh, RESIDENT: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dz.T @ a added to dW2, DEPTH columns of ``dz`` at a time; unless RESIDENT, da + dz @ W2."""
    for k in range(0, H, DEPTH):
        piece = take_columns(dz, k, DEPTH)
        dw = tl.zeros([piece.shape[1], a.shape[1]], da.dtype)
        dw = multiply(tl.trans(piece), a, dw, PRECISION)
        add_weight(dw2_ptr, dw, k, H, 0, F, fresh)
        if not RESIDENT:
            w = load_weight(w2_ptr, k, H, 0, F, piece.shape[1], a.shape[1])
            da = multiply(piece, w, da, PRECISION)
    return da


@triton.jit
def row_slices_product(dz, slices, acc, PRECISION: tl.constexpr):
    """acc + dz @ W for slices of a weight's rows."""
    DEPTH: tl.constexpr = slices[0].shape[0]
    for i in tl.static_range(len(slices)):
        acc = multiply(take_columns(dz, i * DEPTH, DEPTH), slices[i], acc, PRECISION)
    return acc


@triton.jit
def weight_product_rows(dz, w_ptr, rows, column0, columns, acc, DEPTH: tl.constexpr,
                        PRECISION: tl.constexpr):  # fmt: skip
    """acc + dz @ W[:, column0:], DEPTH columns of ``dz`` and rows of the weight at a time."""
    for k in range(0, rows, DEPTH):
        piece = take_columns(dz, k, DEPTH)
        w = load_weight(w_ptr, k, rows, column0, columns, piece.shape[1], acc.shape[1])
        acc = multiply(piece, w, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["threshold", "parts", "rows_per_part"])
def research_net_grad_kernel(
    g_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, gamma_ptr, beta_ptr, saved_ptr,
    seed_ptr, part_ptr, dx_ptr, M, IN, F, H, OUT, stride_gm, stride_gn, stride_xm, stride_xk,
    threshold, scale: tl.float64, slope: tl.float64, rows_per_part, parts, row_length,
    at_w2, at_w3, at_b1, at_b2, at_b3, at_gamma, at_beta,
    LAST: tl.constexpr, REST: tl.constexpr, TRAINING: tl.constexpr, PARTS: tl.constexpr,
    TWO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_OUT: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr,
    WIDE_IN: tl.constexpr, WIDE_OUT: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Gradients over a part of the rows, into row p of part [parts, row_length]. Grid: (parts,).

    LAST: of W3, b3, gamma and beta. REST: of W1, b1, W2, b2 and the input, which in training need
    the merged sums of LAST. RESIDENT: REST holds weights a second time, as the slices that it
    multiplies by are rows there and columns here; WIDE_IN, WIDE_OUT: the edges whole.
    """
    part = tl.program_id(0)
    row_ptr = part_ptr + part.to(tl.int64) * row_length
    h = tl.arange(0, BLOCK_H).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    in_h = h < H
    slope = scalar(slope, ACC)
    scale = scalar(scale, ACC)
    if TRAINING and REST:
        # Means over all rows: what batch norm takes from every row's gradient.
        rows = scalar(1.0, ACC) * M
        mean_gamma = merge_rows(part_ptr + at_gamma, row_length, parts, h, in_h, PARTS, ACC) / rows
        mean_beta = merge_rows(part_ptr + at_beta, row_length, parts, h, in_h, PARTS, ACC) / rows
    w1 = 0
    w2 = 0
    if RESIDENT:
        w1 = weight_slices(w1_ptr, F, IN, BLOCK_F, WIDE_IN, BLOCK_F, DEPTH)
        w3 = weight_slices(w3_ptr, OUT, H, WIDE_OUT, BLOCK_H, DEPTH, BLOCK_H)
        w1_rows = w1
        if TWO:
            w2 = weight_slices(w2_ptr, H, F, BLOCK_H, BLOCK_F, BLOCK_H, DEPTH)
            w2_rows = w2
        if REST and not HELD:
            w1_rows = weight_slices(w1_ptr, F, IN, BLOCK_F, WIDE_IN, DEPTH, WIDE_IN)
            if TWO:
                w2_rows = weight_slices(w2_ptr, H, F, BLOCK_H, BLOCK_F, DEPTH, BLOCK_F)
    if HELD:
        dw1 = tl.zeros([BLOCK_F, BLOCK_IN], ACC)
        dw3 = tl.zeros([BLOCK_OUT, BLOCK_H], ACC)
        db3 = tl.zeros([BLOCK_OUT], ACC)
        dgamma = tl.zeros([BLOCK_H], ACC)
        dbeta = tl.zeros([BLOCK_H], ACC)
        db1 = tl.zeros([BLOCK_F], ACC)
        if TWO:
            dw2 = tl.zeros([BLOCK_H, BLOCK_F], ACC)
            db2 = tl.zeros([BLOCK_H], ACC)
    first = part.to(tl.int64) * rows_per_part
    last = tl.minimum(first + rows_per_part, M)
    for start in tl.range(first, last, BLOCK_M, disable_licm=DEPTH < WHOLE):
        fresh = start == first
        m = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
        in_m = m < last
        # A vector of 128 can take 32 registers of every thread, so each block loads them again; a
        # mask that depends on the block keeps the compiler from doing so once.
        here = tl.cast(start, tl.int64)
        b1 = load_vector(b1_ptr, f, (f < F) & (here + 0 * f < last), 0.0, ACC)
        b2 = load_vector(b2_ptr, h, in_h & (here + 0 * h < last), 0.0, ACC) if TWO else b1
        z, a1 = before_norm(
            x_ptr, m, in_m, w1_ptr, w1, b1, w2_ptr, w2, b2, seed_ptr, threshold, scale,
            stride_xm, stride_xk, IN, F, H, TWO, BLOCK_M, BLOCK_IN, BLOCK_F, BLOCK_H, DEPTH,
            RESIDENT, PRECISION, ACC,
        )  # fmt: skip
        mean = tl.load(saved_ptr + h, mask=in_h & (here + 0 * h < last), other=0.0)
        rstd = tl.load(saved_ptr + H + h, mask=in_h & (here + 0 * h < last), other=0.0)
        gamma = load_vector(gamma_ptr, h, in_h & (here + 0 * h < last), 1.0, ACC)
        beta = load_vector(beta_ptr, h, in_h & (here + 0 * h < last), 0.0, ACC)
        normalized = (z - mean[None, :]) * rstd[None, :]
        u = normalized * gamma[None, :] + beta[None, :]
        a = cast(activate(u, slope, LEAKY_RELU), w3_ptr.dtype.element_ty)
        da = tl.zeros([BLOCK_M, BLOCK_H], ACC)
        if RESIDENT and not HELD:
            g = load_rows(g_ptr, m, in_m, 0, OUT, stride_gm, stride_gn, WIDE_OUT)
            da = row_slices_product(g, w3, da, PRECISION)
        else:
            for at in range(0, OUT, BLOCK_OUT):
                g_chunk = load_rows(g_ptr, m, in_m, at, OUT, stride_gm, stride_gn, BLOCK_OUT)
                if RESIDENT:
                    da = multiply(g_chunk, w3[0], da, PRECISION)
                else:
                    w = load_weight(w3_ptr, at, OUT, 0, H, BLOCK_OUT, BLOCK_H)
                    da = multiply(g_chunk, w, da, PRECISION)
                if LAST and HELD:
                    dw3 = multiply(tl.trans(g_chunk), a, dw3, PRECISION)
                    db3 += tl.sum(g_chunk.to(ACC), 0)
        if LAST and not HELD:
            # A loop of its own: operands of both products at once take too many registers.
            for at in range(0, OUT, BLOCK_OUT):
                g_chunk = load_rows(g_ptr, m, in_m, at, OUT, stride_gm, stride_gn, BLOCK_OUT)
                dw = multiply(tl.trans(g_chunk), a, tl.zeros([BLOCK_OUT, BLOCK_H], ACC), PRECISION)
                add_weight(row_ptr + at_w3, dw, at, OUT, 0, H, fresh)
                add_vector(row_ptr + at_b3, tl.sum(g_chunk.to(ACC), 0), at, OUT, fresh)
        du = activation_gradient(da, u, slope, LEAKY_RELU)
        if LAST:
            sum_beta = tl.sum(du, 0)
            # Beyond the last row du is 0, but the rows computed there may hold infinities.
            sum_gamma = tl.sum(tl.where(in_m[:, None], du * normalized, 0.0), 0)
            if HELD:
                dbeta += sum_beta
                dgamma += sum_gamma
            else:
                add_vector(row_ptr + at_beta, sum_beta, 0, H, fresh)
                add_vector(row_ptr + at_gamma, sum_gamma, 0, H, fresh)
        if REST:
            if TRAINING:
                from_beta = tl.where(here + 0 * h < last, mean_beta, 0.0)
                from_gamma = tl.where(here + 0 * h < last, mean_gamma, 0.0)
                du = du - from_beta[None, :] - normalized * from_gamma[None, :]
            dz = tl.where(in_m[:, None], du * (rstd * gamma)[None, :], 0.0)
            operand = cast(dz, x_ptr.dtype.element_ty)
            if TWO:
                sum_b2 = tl.sum(dz, 0)
                dz = tl.zeros([BLOCK_M, BLOCK_F], ACC)
                if HELD:
                    db2 += sum_b2
                    dw2 = multiply(tl.trans(operand), a1, dw2, PRECISION)
                else:
                    add_vector(row_ptr + at_b2, sum_b2, 0, H, fresh)
                    dz = middle_grad(
                        operand, a1, w2_ptr, row_ptr + at_w2, H, F, dz, fresh, RESIDENT, DEPTH,
                        PRECISION,
                    )  # fmt: skip
                if RESIDENT:
                    dz = row_slices_product(operand, w2_rows, dz, PRECISION)
                dz = activation_gradient(dz * scale, a1, 0.0, RELU)
                operand = cast(dz, x_ptr.dtype.element_ty)
            if HELD:
                db1 += tl.sum(dz, 0)
            else:
                add_vector(row_ptr + at_b1, tl.sum(dz, 0), 0, F, fresh)
            for at in range(0, IN, BLOCK_IN):
                x = load_rows(x_ptr, m, in_m, at, IN, stride_xm, stride_xk, BLOCK_IN)
                if HELD:
                    dw1 = multiply(tl.trans(operand), x, dw1, PRECISION)
                else:
                    dw = tl.zeros([BLOCK_F, BLOCK_IN], ACC)
                    dw = multiply(tl.trans(operand), x, dw, PRECISION)
                    add_weight(row_ptr, dw, 0, F, at, IN, fresh)
            if dx_ptr is not None:
                # Resident, the whole width is one piece.
                PIECE: tl.constexpr = WIDE_IN if RESIDENT else BLOCK_IN
                for at in range(0, IN, PIECE):
                    dx = tl.zeros([BLOCK_M, PIECE], ACC)
                    if RESIDENT:
                        dx = row_slices_product(operand, w1_rows, dx, PRECISION)
                    else:
                        dx = weight_product_rows(operand, w1_ptr, F, at, IN, dx, DEPTH, PRECISION)
                    c = at + tl.arange(0, PIECE)
                    dx_at = dx_ptr + m[:, None] * IN + c[None, :]
                    mask = in_m[:, None] & (c < IN)[None, :]
                    tl.store(dx_at, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
        if not HELD:
            tl.debug_barrier()  # a thread may read next what another one wrote
    if HELD and LAST:
        add_weight(row_ptr + at_w3, dw3, 0, OUT, 0, H, True)
        add_vector(row_ptr + at_b3, db3, 0, OUT, True)
        add_vector(row_ptr + at_gamma, dgamma, 0, H, True)
        add_vector(row_ptr + at_beta, dbeta, 0, H, True)
    if HELD and REST:
        add_weight(row_ptr, dw1, 0, F, 0, IN, True)
        add_vector(row_ptr + at_b1, db1, 0, F, True)
        if TWO:
            add_weight(row_ptr + at_w2, dw2, 0, H, 0, F, True)
            add_vector(row_ptr + at_b2, db2, 0, H, True)
