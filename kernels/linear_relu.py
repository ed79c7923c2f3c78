"""dropout(relu(input @ weight.T + bias)) and its gradients; the kernels of linear_act as well.

Forward: one product with bias, activation and dropout in its epilogue. Backward of ReLU needs
nothing but the output to know what ReLU and dropout let through: dz = dy * scale where output > 0;
other activations draw the dropout mask again and take their derivative from what forward kept. Both
products of the backward apply that gate to the tiles they load, and the bias gradient falls out of
the one over rows, which is split into parts that are merged in order.
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .activations import RELU, TANH, activate, activation_gradient
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
def gate(dy, kept, seed_ptr, m, column0, threshold, scale, slope, ACTIVATION: tl.constexpr):
    """The gradient in front of activation and dropout, of rows m and columns from column0."""
    g = dy.to(scale.dtype)
    if ACTIVATION == RELU:
        # The output of both tells what they let through; a NaN passes the gradient on.
        return tl.where(kept <= 0, 0.0, g * scale)
    else:
        if kept is not None:
            kept = kept.to(scale.dtype)
        if seed_ptr is not None:
            column0 = tl.cast(column0, tl.int32)
            g = dropout(g, seed_ptr, m, column0, 0, threshold, scale, dy.shape[1])
            if ACTIVATION == TANH:
                kept = activate(kept, slope, ACTIVATION)
        return activation_gradient(g, kept, slope, ACTIVATION)


@triton.jit(do_not_specialize=["threshold", "bucket"])
def linear_relu_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, kept_ptr, seed_ptr, M, N, K, stride_xm, stride_xk, stride_wn,
    stride_wk, threshold, scale: tl.float64, slope: tl.float64, bucket, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
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
    y_at = m[:, None] * N + n[None, :]
    if kept_ptr is not None:
        tl.store(kept_ptr + y_at, cast(acc, kept_ptr.dtype.element_ty), mask=in_m & in_n)
    y = activate(acc, scalar(slope, ACC), ACTIVATION)
    if seed_ptr is not None:
        column0 = (tile_n * BLOCK_COLUMNS).to(tl.int32)
        y = dropout(y, seed_ptr, m, column0, 0, threshold, scalar(scale, ACC), BLOCK_COLUMNS)
    tl.store(y_ptr + y_at, cast(y, y_ptr.dtype.element_ty), mask=in_m & in_n)


@triton.jit(do_not_specialize=["threshold", "bucket"])
def linear_relu_grad_input_kernel(
    dy_ptr, kept_ptr, w_ptr, dx_ptr, seed_ptr, M, N, K, stride_gm, stride_gn, stride_ym, stride_yn,
    stride_wn, stride_wk, threshold, scale: tl.float64, slope: tl.float64, bucket,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
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
    slope = scalar(slope, ACC)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], ACC)
    for start in range(0, N, BLOCK_DEPTH):
        n = start + tl.arange(0, BLOCK_DEPTH).to(tl.int64)
        mask = in_m & (n < N)[None, :]
        g = tl.load(dy_ptr + m[:, None] * stride_gm + n[None, :] * stride_gn, mask=mask, other=0.0)
        kept = None
        if kept_ptr is not None:
            kept_at = kept_ptr + m[:, None] * stride_ym + n[None, :] * stride_yn
            kept = tl.load(kept_at, mask=mask, other=0.0)
        w_at = w_ptr + n[:, None] * stride_wn + k[None, :] * stride_wk
        w = tl.load(w_at, mask=(n < N)[:, None] & in_k, other=0.0)
        dz = gate(g, kept, seed_ptr, m, start, threshold, scale, slope, ACTIVATION)
        acc = multiply(cast(dz, w.dtype), w, acc, PRECISION)
    dx_at = dx_ptr + m[:, None] * K + k[None, :]
    tl.store(dx_at, cast(acc, dx_ptr.dtype.element_ty), mask=in_m & in_k)


@triton.jit(do_not_specialize=["threshold", "bucket"])
def linear_relu_grad_weight_kernel(
    dy_ptr, kept_ptr, x_ptr, dw_ptr, db_ptr, seed_ptr, M, N, K, stride_gm, stride_gn, stride_ym,
    stride_yn, stride_xm, stride_xk, part_stride, rows_per_part, threshold, scale: tl.float64,
    slope: tl.float64, bucket, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_ROWS: tl.constexpr,
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
    slope = scalar(slope, ACC)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], ACC)
    bias = tl.zeros([BLOCK_ROWS], ACC)
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, M)
    for start in range(first, last, BLOCK_DEPTH):
        m = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_DEPTH)
        in_m = m < last
        mask = in_m[:, None] & in_n[None, :]
        g = tl.load(dy_ptr + m[:, None] * stride_gm + n[None, :] * stride_gn, mask=mask, other=0.0)
        kept = None
        if kept_ptr is not None:
            kept_at = kept_ptr + m[:, None] * stride_ym + n[None, :] * stride_yn
            kept = tl.load(kept_at, mask=mask, other=0.0)
        x_at = x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk
        x = tl.load(x_at, mask=in_m[:, None] & in_k[None, :], other=0.0)
        column0 = tile_n * BLOCK_ROWS
        dz = gate(g, kept, seed_ptr, m, column0, threshold, scale, slope, ACTIVATION)
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


def _constants(tensor, activation):
    dtype = tensor.dtype
    constants = {"PRECISION": dot_precision(dtype), "ACC": triton_accumulator(dtype)}
    constants |= {"ACTIVATION": activation, "GROUP": GROUP}
    return constants | register_limit(architecture(tensor)[0])


def linear_relu(input, weight, bias, dropout_p, seed):
    """Return dropout(relu(input @ weight.T + bias)), contiguous."""
    return forward(input, weight, bias, RELU.value, 0.0, dropout_p, seed, False)[0]


def forward(input, weight, bias, activation, negative_slope, dropout_p, seed, keep_input):
    """Return [output], contiguous, and what the activation saw with ``keep_input``."""
    out_features, in_features = weight.shape
    outputs = [
        input.new_empty((*input.shape[:-1], out_features)) for _ in range(2 if keep_input else 1)
    ]
    output = outputs[0]
    if output.numel() == 0:
        return outputs
    x = (
        input.reshape(-1, in_features)
        if in_features
        else input.new_empty((output.numel() // out_features, 0))
    )
    rows = x.shape[0]
    arguments = (
        x, weight, None if bias is None else bias.contiguous(), output,
        outputs[1] if keep_input else None, _seed(seed, dropout_p), rows, out_features, in_features,
        *x.stride(), *weight.stride(), drop_threshold(dropout_p), keep_scale(dropout_p),
        negative_slope, triton.next_power_of_2(rows),
    )  # fmt: skip
    with on_device(input):
        # One program for each tile of the output.
        tuning.launch(
            linear_relu_kernel, _grid(rows, out_features), arguments,
            _constants(input, activation), _tiles(rows, out_features, in_features, input), NAMES,
        )  # fmt: skip
    return outputs


def linear_relu_backward(grad_output, input, weight, output, dropout_p, output_mask):
    """Return the gradients of input, weight and bias that ``output_mask`` asks for."""
    return backward(
        grad_output, input, weight, output, RELU.value, 0.0, dropout_p, None, output_mask
    )


def backward(
    grad_output, input, weight, kept, activation, negative_slope, dropout_p, seed, output_mask
):
    """The gradients for any activation; ``kept`` as activations.py says."""
    want_x, want_w, want_b = output_mask
    out_features, in_features = weight.shape
    gradients = []
    if grad_output.numel() == 0 or in_features == 0:
        if want_x:
            gradients.append(input.new_zeros(input.shape))
        if want_w:
            gradients.append(weight.new_zeros(weight.shape))
        if grad_output.numel() == 0 or not want_b:
            return gradients + ([weight.new_zeros(out_features)] if want_b else [])
    dy = grad_output.reshape(-1, out_features)
    kept = None if kept is None else kept.reshape(-1, out_features)
    behind = _Behind(dy, kept, activation, negative_slope, dropout_p, seed)
    if want_x and in_features:
        gradients.append(_grad_input(behind, weight).reshape(input.shape))
    if (want_w and in_features) or want_b:
        x = input.reshape(dy.shape[0], in_features)
        gradients += _grad_weight(behind, x, weight, want_w and in_features > 0, want_b)
    return gradients


def _seed(seed, dropout_p):
    return None if seed is None or dropout_p == 0 else seed.contiguous()


class _Behind:
    """What both products of backward take of activation and dropout."""

    def __init__(self, dy, kept, activation, negative_slope, dropout_p, seed):
        self.dy, self.kept = dy, kept
        self.activation = activation
        self.seed = _seed(seed, dropout_p)
        self.strides = (*dy.stride(), *((0, 0) if kept is None else kept.stride()))
        scale = keep_scale(dropout_p)
        self.options = (drop_threshold(dropout_p), scale, negative_slope)


def _grad_input(behind, weight):
    rows, (out_features, in_features) = behind.dy.shape[0], weight.shape
    dx = weight.new_empty(rows, in_features)
    arguments = (
        behind.dy, behind.kept, weight, dx, behind.seed, rows, out_features, in_features,
        *behind.strides, *weight.stride(), *behind.options, triton.next_power_of_2(rows),
    )  # fmt: skip
    with on_device(dx):
        # One program for each tile of dX.
        tuning.launch(
            linear_relu_grad_input_kernel, _grid(rows, in_features), arguments,
            _constants(weight, behind.activation),
            _tiles(rows, in_features, out_features, weight), NAMES,
        )  # fmt: skip
    return dx


def _grad_weight(behind, x, weight, want_w, want_b):
    rows, (out_features, in_features) = behind.dy.shape[0], weight.shape
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
        part = weight.new_empty(parts, sum(sizes), dtype=accumulator(weight.dtype))
        dw_part = part if want_w else None
        db_part = part.view(-1)[sizes[0] :] if want_b else None
    arguments = (
        behind.dy, behind.kept, x, dw_part, db_part, behind.seed, rows, out_features, in_features,
        *behind.strides, *x.stride(), sum(sizes), rows_per_part, *behind.options,
        triton.next_power_of_2(rows),
    )  # fmt: skip
    with on_device(weight):
        # One program for each tile of dW and part of the rows.
        tuning.launch(
            linear_relu_grad_weight_kernel, _grid(out_features, max(in_features, 1), parts),
            arguments, _constants(weight, behind.activation), tiles, NAMES,
        )  # fmt: skip
    if part is not None:
        merge(part, [dw, db], shapes)
    return [t for t in (dw, db) if t is not None]
