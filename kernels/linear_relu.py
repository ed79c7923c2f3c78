"""dropout(relu(input @ weight.T + bias)) and its gradients.

Forward: one product with bias, ReLU and dropout in its epilogue. Backward needs nothing but the
output to know what ReLU and dropout let through: dz = dy * scale where output > 0. Both products of
the backward apply that gate to the tiles they load, and the bias gradient falls out of the one
over rows, which is split into parts that are merged in order.
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .launch import (
    accumulator,
    architecture,
    cast,
    dot_precision,
    on_device,
    register_limit,
    scalar,
    triton_accumulator,
)
from .matmul import multiply
from .merge import merge, section_sizes
from .philox import drop_threshold, dropout, keep_scale
from .tiles import neighbours

GROUP = 8  # rows of tiles that run side by side, so that they share the weight in the L2 cache
NAMES = ("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_DEPTH")
ROWS_PER_PART = 256  # at least; fewer rows are not worth a merge
PARTS_PROGRAMS = 256


@triton.jit
def tile_of_program(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
                    GROUP: tl.constexpr):  # fmt: skip
    """The (row, column) tile of this program, widened to int64."""
    program = tl.program_id(0)
    across = tl.maximum(tl.cdiv(columns, BLOCK_COLUMNS), 1)
    down = tl.cdiv(rows, BLOCK_ROWS)
    group = program // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    inside = program % (GROUP * across)
    return (group * GROUP + inside % height).to(tl.int64), (inside // height).to(tl.int64)


@triton.jit
def gate(dy, output, scale):
    """The gradient behind ReLU and dropout: NaN outputs pass it on."""
    return tl.where(output <= 0, 0.0, dy.to(scale.dtype) * scale)


@triton.jit(do_not_specialize=["threshold", "bucket"])
def linear_relu_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, seed_ptr, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
    threshold, scale: tl.float64, bucket, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of the output [M, N]. Grid: (tiles,)."""
    tile_m, tile_n = tile_of_program(M, N, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    m = tile_m * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tile_n * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_m = (m < M)[:, None]
    in_n = (n < N)[None, :]
    k = tl.arange(0, BLOCK_DEPTH).to(tl.int64)
    x_at = x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk
    w_at = w_ptr + k[:, None] * stride_wk + n[None, :] * stride_wn
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], ACC)
    for start in range(0, K, BLOCK_DEPTH):
        in_k = k < K - start
        x = tl.load(x_at, mask=in_m & in_k[None, :], other=0.0)
        w = tl.load(w_at, mask=in_k[:, None] & in_n, other=0.0)
        acc = multiply(x, w, acc, PRECISION)
        x_at += BLOCK_DEPTH * tl.cast(stride_xk, tl.int64)
        w_at += BLOCK_DEPTH * tl.cast(stride_wk, tl.int64)
    if b_ptr is not None:
        acc += tl.load(b_ptr + n, mask=n < N, other=0.0).to(ACC)[None, :]
    y = tl.where(acc <= 0, 0.0, acc)
    if seed_ptr is not None:
        column0 = (tile_n * BLOCK_COLUMNS).to(tl.int32)
        y = dropout(y, seed_ptr, m, column0, 0, threshold, scalar(scale, ACC), BLOCK_COLUMNS)
    y_at = y_ptr + m[:, None] * N + n[None, :]
    tl.store(y_at, cast(y, y_ptr.dtype.element_ty), mask=in_m & in_n)


@triton.jit(do_not_specialize=["bucket"])
def linear_relu_grad_input_kernel(
    dy_ptr, y_ptr, w_ptr, dx_ptr, M, N, K, stride_gm, stride_gn, stride_ym, stride_yn,
    stride_wn, stride_wk, scale: tl.float64, bucket, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of dX [M, K] = gate(dY) @ W. Grid: (tiles,)."""
    tile_m, tile_k = tile_of_program(M, K, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    m = tile_m * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tile_k * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_m = (m < M)[:, None]
    in_k = (k < K)[None, :]
    scale = scalar(scale, ACC)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], ACC)
    for start in range(0, N, BLOCK_DEPTH):
        n = start + tl.arange(0, BLOCK_DEPTH).to(tl.int64)
        mask = in_m & (n < N)[None, :]
        g = tl.load(dy_ptr + m[:, None] * stride_gm + n[None, :] * stride_gn, mask=mask, other=0.0)
        y = tl.load(y_ptr + m[:, None] * stride_ym + n[None, :] * stride_yn, mask=mask, other=0.0)
        w_at = w_ptr + n[:, None] * stride_wn + k[None, :] * stride_wk
        w = tl.load(w_at, mask=(n < N)[:, None] & in_k, other=0.0)
        acc = multiply(cast(gate(g, y, scale), w.dtype), w, acc, PRECISION)
    dx_at = dx_ptr + m[:, None] * K + k[None, :]
    tl.store(dx_at, cast(acc, dx_ptr.dtype.element_ty), mask=in_m & in_k)


@triton.jit(do_not_specialize=["bucket"])
def linear_relu_grad_weight_kernel(
    dy_ptr, y_ptr, x_ptr, dw_ptr, db_ptr, M, N, K, stride_gm, stride_gn, stride_ym, stride_yn,
    stride_xm, stride_xk, part_stride, rows_per_part, scale: tl.float64, bucket,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of dW [N, K] = gate(dY).T @ X, and of db, over a part of the rows.

    Grid: (tiles, parts). Part p writes at p * part_stride of dw_ptr and db_ptr.
    """
    tile_n, tile_k = tile_of_program(N, K, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    part = tl.program_id(1).to(tl.int64)
    n = tile_n * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tile_k * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_n = n < N
    in_k = k < K
    scale = scalar(scale, ACC)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], ACC)
    bias = tl.zeros([BLOCK_ROWS], ACC)
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, M)
    for start in range(first, last, BLOCK_DEPTH):
        m = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_DEPTH)
        in_m = m < last
        mask = in_m[:, None] & in_n[None, :]
        g = tl.load(dy_ptr + m[:, None] * stride_gm + n[None, :] * stride_gn, mask=mask, other=0.0)
        y = tl.load(y_ptr + m[:, None] * stride_ym + n[None, :] * stride_yn, mask=mask, other=0.0)
        x_at = x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk
        x = tl.load(x_at, mask=in_m[:, None] & in_k[None, :], other=0.0)
        dz = gate(g, y, scale)
        if db_ptr is not None:
            bias += tl.sum(dz, 0)
        acc = multiply(tl.trans(cast(dz, x.dtype)), x, acc, PRECISION)
    if dw_ptr is not None:
        dw_at = dw_ptr + part * part_stride + n[:, None] * K + k[None, :]
        tl.store(dw_at, cast(acc, dw_ptr.dtype.element_ty), mask=in_n[:, None] & in_k[None, :])
    if db_ptr is not None:
        if tile_k == 0:
            db_at = db_ptr + part * part_stride + n
            tl.store(db_at, cast(bias, db_ptr.dtype.element_ty), mask=in_n)


def _grid(rows, columns, parts=1):
    def grid(meta):
        tiles = triton.cdiv(rows, meta["BLOCK_ROWS"]) * triton.cdiv(columns, meta["BLOCK_COLUMNS"])
        return (tiles, parts)

    return grid


def _tiles(rows, columns, depth, tensor):
    precision = dot_precision(tensor.dtype)
    return neighbours(rows, columns, depth, tensor.dtype, precision, *architecture(tensor))


def _constants(tensor):
    dtype = tensor.dtype
    constants = {"PRECISION": dot_precision(dtype), "ACC": triton_accumulator(dtype)}
    return constants | register_limit(architecture(tensor)[0]) | {"GROUP": GROUP}


def linear_relu(input, weight, bias, dropout_p, seed):
    """Return dropout(relu(input @ weight.T + bias)), contiguous."""
    out_features, in_features = weight.shape
    output = input.new_empty((*input.shape[:-1], out_features))
    if output.numel() == 0:
        return output
    x = (
        input.reshape(-1, in_features)
        if in_features
        else input.new_empty((output.numel() // out_features, 0))
    )
    rows = x.shape[0]
    seed = None if seed is None or dropout_p == 0 else seed.contiguous()
    arguments = (
        x, weight, None if bias is None else bias.contiguous(), output, seed,
        rows, out_features, in_features, *x.stride(), *weight.stride(),
        drop_threshold(dropout_p), keep_scale(dropout_p), triton.next_power_of_2(rows),
    )  # fmt: skip
    with on_device(input):
        # One program for each tile of the output.
        tuning.launch(
            linear_relu_kernel, _grid(rows, out_features), arguments, _constants(input),
            _tiles(rows, out_features, in_features, input), NAMES,
        )  # fmt: skip
    return output


def linear_relu_backward(grad_output, input, weight, output, dropout_p, output_mask):
    """Return the gradients of input, weight and bias that ``output_mask`` asks for."""
    want_x, want_w, want_b = output_mask
    out_features, in_features = weight.shape
    gradients = []
    if output.numel() == 0 or in_features == 0:
        if want_x:
            gradients.append(input.new_zeros(input.shape))
        if want_w:
            gradients.append(weight.new_zeros(weight.shape))
        if output.numel() == 0 or not want_b:
            return gradients + ([weight.new_zeros(out_features)] if want_b else [])
    dy, y = grad_output.reshape(-1, out_features), output.reshape(-1, out_features)
    scale = keep_scale(dropout_p)
    if want_x and in_features:
        gradients.append(_grad_input(dy, y, weight, scale).reshape(input.shape))
    if (want_w and in_features) or want_b:
        x = input.reshape(dy.shape[0], in_features)
        wanted = want_w and in_features > 0, want_b
        gradients += _grad_weight(dy, y, x, weight, scale, *wanted)
    return gradients


def _grad_input(dy, y, weight, scale):
    rows, (out_features, in_features) = dy.shape[0], weight.shape
    dx = weight.new_empty(rows, in_features)
    arguments = (
        dy, y, weight, dx, rows, out_features, in_features, *dy.stride(), *y.stride(),
        *weight.stride(), scale, triton.next_power_of_2(rows),
    )  # fmt: skip
    with on_device(dy):
        # One program for each tile of dX.
        tuning.launch(
            linear_relu_grad_input_kernel, _grid(rows, in_features), arguments,
            _constants(weight), _tiles(rows, in_features, out_features, weight), NAMES,
        )  # fmt: skip
    return dx


def _grad_weight(dy, y, x, weight, scale, want_w, want_b):
    rows, (out_features, in_features) = dy.shape[0], weight.shape
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if want_w else None
    db = weight.new_empty(out_features) if want_b else None
    tiles = _tiles(out_features, max(in_features, 1), rows, weight)
    across = tiles[0].programs(out_features, max(in_features, 1))
    parts = max(1, min(triton.cdiv(rows, ROWS_PER_PART), PARTS_PROGRAMS // across))
    # Parts hold whole steps, so that the sums do not depend on the step a tile takes.
    rows_per_part = triton.cdiv(triton.cdiv(rows, parts), 64) * 64
    parts = triton.cdiv(rows, rows_per_part)
    # As vectors: the kernel writes the weight's rows one after the other.
    shapes = [(1, out_features * in_features if want_w else 0), (1, out_features if want_b else 0)]
    sizes = section_sizes(shapes)
    dw_part, db_part, part = dw, db, None
    if parts > 1:
        part = dy.new_empty(parts, sum(sizes), dtype=accumulator(weight.dtype))
        dw_part = part if want_w else None
        db_part = part.view(-1)[sizes[0] :] if want_b else None
    arguments = (
        dy, y, x, dw_part, db_part, rows, out_features, in_features, *dy.stride(), *y.stride(),
        *x.stride(), sum(sizes), rows_per_part, scale, triton.next_power_of_2(rows),
    )  # fmt: skip
    with on_device(dy):
        # One program for each tile of dW and part of the rows.
        tuning.launch(
            linear_relu_grad_weight_kernel, _grid(out_features, max(in_features, 1), parts),
            arguments, _constants(weight), tiles, NAMES,
        )  # fmt: skip
    if part is not None:
        merge(part, [dw, db], shapes)
    return [t for t in (dw, db) if t is not None]
