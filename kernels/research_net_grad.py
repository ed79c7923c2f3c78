"""Gradients of the whole network on chip: what the launcher in research_net.py runs backward.

See research_net_kernels.py for the dimensions and for what is resident.
"""

import triton
import triton.language as tl

from .batch_norm_leaky_relu import leaky_relu, load_vector
from .launch import cast, scalar
from .matmul import multiply
from .moments import merge_rows
from .research_net_kernels import before_norm, load_rows, load_weight


@triton.jit
def store_weight(ptr, value, row0, rows, column0, columns):
    """Write a tile of a contiguous (rows, columns) matrix."""
    r = row0 + tl.arange(0, value.shape[0])
    c = column0 + tl.arange(0, value.shape[1])
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    tl.store(ptr + r[:, None] * columns + c[None, :], value, mask=mask)


@triton.jit
def _walk(
    g_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, gamma_ptr, beta_ptr, saved_ptr,
    seed_ptr, part_ptr, dx_ptr, M, IN, F, H, OUT, stride_gm, stride_gn, stride_xm, stride_xk,
    threshold, scale, slope, rows_per_part, parts, row_length,
    at_w2, at_w3, at_b1, at_b2, at_b3, at_gamma, at_beta, chunk_in, chunk_out,
    LAST: tl.constexpr, MIDDLE: tl.constexpr, FIRST: tl.constexpr, TRAINING: tl.constexpr,
    PARTS: tl.constexpr, TWO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_OUT: tl.constexpr,
    CHUNKS_IN: tl.constexpr, CHUNKS_OUT: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One walk over a part of the rows.

    LAST: a chunk of W3 and b3; gamma and beta with chunk 0. MIDDLE: W2 and b2. FIRST: a chunk of
    W1 and of the input; b1 with chunk 0. In training the last two need the merged sums of LAST.
    """
    part = tl.program_id(0)
    row_ptr = part_ptr + part.to(tl.int64) * row_length
    h = tl.arange(0, BLOCK_H).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    c = tl.arange(0, BLOCK_OUT)
    in_h = h < H
    slope = scalar(slope, ACC)
    scale = scalar(scale, ACC)
    mean = tl.load(saved_ptr + h, mask=in_h, other=0.0)
    rstd = tl.load(saved_ptr + H + h, mask=in_h, other=0.0)
    gamma = load_vector(gamma_ptr, h, in_h, 1.0, ACC)
    beta = load_vector(beta_ptr, h, in_h, 0.0, ACC)
    if TRAINING and not LAST:
        # Means over all rows: what batch norm takes from every row's gradient.
        rows = scalar(1.0, ACC) * M
        mean_gamma = merge_rows(part_ptr + at_gamma, row_length, parts, h, in_h, PARTS, ACC) / rows
        mean_beta = merge_rows(part_ptr + at_beta, row_length, parts, h, in_h, PARTS, ACC) / rows
    in0 = chunk_in * BLOCK_IN
    out0 = chunk_out * BLOCK_OUT
    b1 = load_vector(b1_ptr, f, f < F, 0.0, ACC)
    b2 = load_vector(b2_ptr, h, in_h, 0.0, ACC) if TWO else b1
    w1 = 0
    w2 = 0
    if RESIDENT:
        w1 = load_weight(w1_ptr, 0, F, in0, IN, BLOCK_F, BLOCK_IN)
        if TWO:
            w2 = load_weight(w2_ptr, 0, H, 0, F, BLOCK_H, BLOCK_F)
        if CHUNKS_OUT == 1:
            w3 = load_weight(w3_ptr, 0, OUT, 0, H, BLOCK_OUT, BLOCK_H)
    if LAST:
        dw3 = tl.zeros([BLOCK_OUT, BLOCK_H], ACC)
        db3 = tl.zeros([BLOCK_OUT], ACC)
        dgamma = tl.zeros([BLOCK_H], ACC)
        dbeta = tl.zeros([BLOCK_H], ACC)
    if MIDDLE:
        dw2 = tl.zeros([BLOCK_H, BLOCK_F], ACC)
        db2 = tl.zeros([BLOCK_H], ACC)
    if FIRST:
        dw1 = tl.zeros([BLOCK_F, BLOCK_IN], ACC)
        db1 = tl.zeros([BLOCK_F], ACC)
    first = part.to(tl.int64) * rows_per_part
    last = tl.minimum(first + rows_per_part, M)
    for start in range(first, last, BLOCK_M):
        m = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
        in_m = m < last
        z, a1 = before_norm(
            x_ptr, m, in_m, w1_ptr, w1, b1, w2_ptr, w2, b2, seed_ptr, threshold, scale,
            stride_xm, stride_xk, IN, F, H, TWO, BLOCK_M, BLOCK_IN, BLOCK_F, BLOCK_H, CHUNKS_IN,
            RESIDENT, PRECISION, ACC,
        )  # fmt: skip
        normalized = (z - mean[None, :]) * rstd[None, :]
        u = normalized * gamma[None, :] + beta[None, :]
        da = tl.zeros([BLOCK_M, BLOCK_H], ACC)
        if CHUNKS_OUT == 1:
            g = load_rows(g_ptr, m, in_m, 0, OUT, stride_gm, stride_gn, BLOCK_OUT)
            if not RESIDENT:
                w3 = load_weight(w3_ptr, 0, OUT, 0, H, BLOCK_OUT, BLOCK_H)
            da = multiply(g, w3, da, PRECISION)
        else:
            for chunk in range(CHUNKS_OUT):
                at = chunk * BLOCK_OUT
                g = load_rows(g_ptr, m, in_m, at, OUT, stride_gm, stride_gn, BLOCK_OUT)
                w = load_weight(w3_ptr, at, OUT, 0, H, BLOCK_OUT, BLOCK_H)
                da = multiply(g, w, da, PRECISION)
        du = tl.where(u > 0, da, da * slope)
        if LAST:
            a = cast(leaky_relu(u, slope), w3_ptr.dtype.element_ty)
            if CHUNKS_OUT > 1:
                g = load_rows(g_ptr, m, in_m, out0, OUT, stride_gm, stride_gn, BLOCK_OUT)
            dw3 = multiply(tl.trans(g), a, dw3, PRECISION)
            db3 += tl.sum(g.to(ACC), 0)
            dbeta += tl.sum(du, 0)
            # Beyond the last row du is 0, but the rows computed there may hold infinities.
            dgamma += tl.sum(tl.where(in_m[:, None], du * normalized, 0.0), 0)
        if MIDDLE or FIRST:
            if TRAINING:
                du = du - mean_beta[None, :] - normalized * mean_gamma[None, :]
            dz = tl.where(in_m[:, None], du * (rstd * gamma)[None, :], 0.0)
            dz_operand = cast(dz, x_ptr.dtype.element_ty)
            if MIDDLE:
                db2 += tl.sum(dz, 0)
                dw2 = multiply(tl.trans(dz_operand), a1, dw2, PRECISION)
            if FIRST:
                if TWO:
                    if RESIDENT:
                        middle_w = w2
                    else:
                        middle_w = load_weight(w2_ptr, 0, H, 0, F, BLOCK_H, BLOCK_F)
                    zero = tl.zeros([BLOCK_M, BLOCK_F], ACC)
                    dz = multiply(dz_operand, middle_w, zero, PRECISION)
                    dz = tl.where(a1 <= 0, 0.0, dz * scale)
                    dz_operand = cast(dz, x_ptr.dtype.element_ty)
                db1 += tl.sum(dz, 0)
                x = load_rows(x_ptr, m, in_m, in0, IN, stride_xm, stride_xk, BLOCK_IN)
                dw1 = multiply(tl.trans(dz_operand), x, dw1, PRECISION)
                if dx_ptr is not None:
                    if RESIDENT:
                        first_w = w1
                    else:
                        first_w = load_weight(w1_ptr, 0, F, in0, IN, BLOCK_F, BLOCK_IN)
                    zero = tl.zeros([BLOCK_M, BLOCK_IN], ACC)
                    dx = multiply(dz_operand, first_w, zero, PRECISION)
                    i = in0 + tl.arange(0, BLOCK_IN)
                    dx_at = dx_ptr + m[:, None] * IN + i[None, :]
                    mask = in_m[:, None] & (i < IN)[None, :]
                    tl.store(dx_at, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
    if LAST:
        store_weight(row_ptr + at_w3, dw3, out0, OUT, 0, H)
        tl.store(row_ptr + at_b3 + out0 + c, db3, mask=out0 + c < OUT)
        if chunk_out == 0:
            tl.store(row_ptr + at_gamma + h, dgamma, mask=in_h)
            tl.store(row_ptr + at_beta + h, dbeta, mask=in_h)
    if MIDDLE:
        store_weight(row_ptr + at_w2, dw2, 0, H, 0, F)
        tl.store(row_ptr + at_b2 + h, db2, mask=in_h)
    if FIRST:
        store_weight(row_ptr, dw1, 0, F, in0, IN)
        if chunk_in == 0:
            tl.store(row_ptr + at_b1 + f, db1, mask=f < F)


@triton.jit(do_not_specialize=["threshold", "parts", "rows_per_part"])
def research_net_grad_kernel(
    g_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, gamma_ptr, beta_ptr, saved_ptr,
    seed_ptr, part_ptr, dx_ptr, M, IN, F, H, OUT, stride_gm, stride_gn, stride_xm, stride_xk,
    threshold, scale: tl.float64, slope: tl.float64, rows_per_part, parts, row_length,
    at_w2, at_w3, at_b1, at_b2, at_b3, at_gamma, at_beta,
    LAST: tl.constexpr, REST: tl.constexpr, SPLIT: tl.constexpr, TRAINING: tl.constexpr,
    PARTS: tl.constexpr, TWO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_OUT: tl.constexpr,
    CHUNKS_IN: tl.constexpr, CHUNKS_OUT: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients over a part of the rows, into row p of part [parts, row_length].

    Grid: (parts, jobs). Without SPLIT there is one job. With it, one for the middle layer and one
    for each chunk of the input (if REST), then one for each chunk of the output (if LAST): the
    sums of one job fill the registers, and each computes the activations for itself.
    """
    job = tl.program_id(1)
    MIDDLE_JOBS: tl.constexpr = 1 if REST and TWO else 0
    REST_JOBS: tl.constexpr = MIDDLE_JOBS + (CHUNKS_IN if REST else 0)
    if not SPLIT:
        _walk(
            g_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, gamma_ptr, beta_ptr, saved_ptr,
            seed_ptr, part_ptr, dx_ptr, M, IN, F, H, OUT, stride_gm, stride_gn, stride_xm,
            stride_xk, threshold, scale, slope, rows_per_part, parts, row_length,
            at_w2, at_w3, at_b1, at_b2, at_b3, at_gamma, at_beta, 0, 0,
            LAST, REST and TWO, REST, TRAINING, PARTS, TWO, BLOCK_M, BLOCK_IN, BLOCK_F, BLOCK_H,
            BLOCK_OUT, CHUNKS_IN, CHUNKS_OUT, RESIDENT, PRECISION, ACC,
        )  # fmt: skip
    else:
        if MIDDLE_JOBS > 0:
            if job == 0:
                _walk(
                    g_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, gamma_ptr, beta_ptr,
                    saved_ptr, seed_ptr, part_ptr, dx_ptr, M, IN, F, H, OUT, stride_gm, stride_gn,
                    stride_xm, stride_xk, threshold, scale, slope, rows_per_part, parts,
                    row_length, at_w2, at_w3, at_b1, at_b2, at_b3, at_gamma, at_beta, 0, 0,
                    False, True, False, TRAINING, PARTS, TWO, BLOCK_M, BLOCK_IN, BLOCK_F, BLOCK_H,
                    BLOCK_OUT, CHUNKS_IN, CHUNKS_OUT, RESIDENT, PRECISION, ACC,
                )  # fmt: skip
        if REST:
            if (job >= MIDDLE_JOBS) & (job < REST_JOBS):
                _walk(
                    g_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, gamma_ptr, beta_ptr,
                    saved_ptr, seed_ptr, part_ptr, dx_ptr, M, IN, F, H, OUT, stride_gm, stride_gn,
                    stride_xm, stride_xk, threshold, scale, slope, rows_per_part, parts,
                    row_length, at_w2, at_w3, at_b1, at_b2, at_b3, at_gamma, at_beta,
                    job - MIDDLE_JOBS, 0,
                    False, False, True, TRAINING, PARTS, TWO, BLOCK_M, BLOCK_IN, BLOCK_F, BLOCK_H,
                    BLOCK_OUT, CHUNKS_IN, CHUNKS_OUT, RESIDENT, PRECISION, ACC,
                )  # fmt: skip
        if LAST:
            if job >= REST_JOBS:
                _walk(
                    g_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, gamma_ptr, beta_ptr,
                    saved_ptr, seed_ptr, part_ptr, dx_ptr, M, IN, F, H, OUT, stride_gm, stride_gn,
                    stride_xm, stride_xk, threshold, scale, slope, rows_per_part, parts,
                    row_length, at_w2, at_w3, at_b1, at_b2, at_b3, at_gamma, at_beta,
                    0, job - REST_JOBS,
                    True, False, False, TRAINING, PARTS, TWO, BLOCK_M, BLOCK_IN, BLOCK_F, BLOCK_H,
                    BLOCK_OUT, CHUNKS_IN, CHUNKS_OUT, RESIDENT, PRECISION, ACC,
                )  # fmt: skip
