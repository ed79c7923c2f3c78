"""BatchNorm1d and LeakyReLU in one, and its gradient, for (N, C) and (N, C, L).

The kernels of batch_norm_act as well: another activation, or none, and dropout behind it.

Training forward: moments of row parts, then every program merges the parts of its channels, writes
its share of the output, and the first part's programs update the running statistics. Evaluation is
one pass. Backward sums the gradient in front of the LeakyReLU (its gate recomputed from the input),
then writes the input's gradient; channels that one program can walk alone take a single launch.
"""

import triton
import triton.language as tl

from .activations import LEAKY_RELU, activate, activation_gradient
from .launch import (
    accumulator,
    cast,
    divide,
    on_device,
    options,
    scalar,
    square_root,
    triton_accumulator,
)
from .moments import (
    load_tile,
    merge_parts,
    merge_sums,
    moments_kernel,
    part_moments,
    store_sum,
    store_tile,
    tile_rows,
)
from .philox import drop_threshold, dropout, keep, keep_scale, numbers_at
from .views import as_matrices, plan

# Where a program takes the statistics from. ALONE: it owns its channels and computes them itself;
# any other number: the parts to merge, padded to a power of two.
RUNNING = tl.constexpr(-1)
ALONE = tl.constexpr(0)


@triton.jit
def load_vector(ptr, k, in_k, default: tl.constexpr, ACC: tl.constexpr):
    """A per-channel vector, or ``default`` for every channel where there is none."""
    if ptr is None:
        return tl.full(k.shape, default, ACC)
    else:
        return tl.load(ptr + k, mask=in_k, other=0.0).to(ACC)


@triton.jit
def blend(ptr, stride, k, in_k, value, momentum, ACC: tl.constexpr):
    """Move a running statistic towards ``value`` in place."""
    old = tl.load(ptr + k * stride, mask=in_k, other=0.0).to(ACC)
    new = old + momentum * (value - old)
    tl.store(ptr + k * stride, cast(new, ptr.dtype.element_ty), mask=in_k)


@triton.jit
def update_running(
    running_mean_ptr, running_var_ptr, tracked_ptr, mean_stride, var_stride, k, in_k,
    mean, deviations, count, momentum, first_block, ACC: tl.constexpr,
):  # fmt: skip
    """Update the running statistics of a block of channels, and count the batch once."""
    if running_mean_ptr is not None:
        blend(running_mean_ptr, mean_stride, k, in_k, mean, momentum, ACC)
    if running_var_ptr is not None:
        freedom = tl.where(count > 1, count - 1, count)
        unbiased = divide(deviations, tl.zeros_like(deviations) + freedom)
        blend(running_var_ptr, var_stride, k, in_k, unbiased, momentum, ACC)
    if tracked_ptr is not None:
        if first_block:
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)


@triton.jit
def reciprocal_std(var, eps, ACC: tl.constexpr):
    """1 / sqrt(var + eps)"""
    return divide(tl.full(var.shape, 1.0, ACC), square_root(var + eps))


@triton.jit
def _drop(
    x, seed_ptr, threshold, scale, o, inner, k, K, L, length, FLAT: tl.constexpr
):  # fmt: skip
    """Dropout of a tile [reduced, kept] of (N, K), which is FLAT, or of (N, K, length)."""
    row = o * L + inner
    if seed_ptr is None:
        return x
    elif FLAT and k.shape[0] >= 8:
        column0 = tl.program_id(0) * k.shape[0]
        return dropout(x, seed_ptr, row, column0, 0, threshold, scale, k.shape[0])
    elif FLAT:
        zero = tl.zeros(x.shape, tl.int64)
        number = numbers_at(seed_ptr, zero + row[:, None], zero + k[None, :], 0)
        return keep(x, number, threshold, scale)
    else:
        column = tl.zeros(x.shape, tl.int64) + (row % length)[:, None]
        number = numbers_at(seed_ptr, (row // length)[:, None] * K + k[None, :], column, 0)
        return keep(x, number, threshold, scale)


@triton.jit(do_not_specialize=["parts", "threshold", "length"])
def batch_norm_leaky_relu_kernel(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    running_mean_ptr, running_var_ptr, tracked_ptr, running_mean_stride, running_var_stride,
    part_ptr, K, O, L, x_stride_k, x_stride_o, x_stride_l, y_stride_k, y_stride_o, y_stride_l,
    tiles_l, tiles, per_part, parts, momentum: tl.float64, eps: tl.float64, slope: tl.float64,
    seed_ptr, threshold, scale: tl.float64, length, STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_L: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Output of one part of a block of channels. Grid: (blocks of channels, parts)."""
    block = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    first = part * per_part
    last = tl.minimum(first + per_part, tiles)
    slope = scalar(slope, ACC)
    scale = scalar(scale, ACC)
    if STATISTICS == RUNNING:
        mean = tl.load(running_mean_ptr + k * running_mean_stride, mask=in_k, other=0.0).to(ACC)
        var = tl.load(running_var_ptr + k * running_var_stride, mask=in_k, other=1.0).to(ACC)
    else:
        if STATISTICS == ALONE:
            origin, centre, deviations, count = part_moments(
                x_ptr, k, in_k, K, O, L, x_stride_k, x_stride_o, x_stride_l, tiles_l, first, last,
                BLOCK_O, BLOCK_L, ACC,
            )  # fmt: skip
        else:
            origin, centre, deviations, count = merge_parts(
                part_ptr, parts, k, in_k, K, STATISTICS, ACC
            )
        # Backward recomputes the gate from the stored mean, so the output uses no better one.
        mean = origin + centre
        var = divide(deviations, tl.zeros_like(deviations) + count)
        if part == 0:
            update_running(
                running_mean_ptr, running_var_ptr, tracked_ptr, running_mean_stride,
                running_var_stride, k, in_k, mean, deviations, count, scalar(momentum, ACC),
                block == 0, ACC,
            )  # fmt: skip
    rstd = reciprocal_std(var, scalar(eps, ACC), ACC)
    if part == 0:
        tl.store(mean_ptr + k, mean, mask=in_k)
        tl.store(rstd_ptr + k, rstd, mask=in_k)
    weight = load_vector(weight_ptr, k, in_k, 1.0, ACC)
    bias = load_vector(bias_ptr, k, in_k, 0.0, ACC)
    for tile in range(first, last):
        o, inner, valid = tile_rows(tile, tiles_l, O, L, BLOCK_O, BLOCK_L)
        x = load_tile(x_ptr, o, inner, valid, k, in_k, x_stride_k, x_stride_o, x_stride_l, ACC)
        u = (x - mean[None, :]) * rstd[None, :] * weight[None, :] + bias[None, :]
        y = activate(u, slope, ACTIVATION)
        y = _drop(y, seed_ptr, threshold, scale, o, inner, k, K, L, length, FLAT)
        store_tile(y_ptr, y, o, inner, valid, k, in_k, y_stride_k, y_stride_o, y_stride_l)


@triton.jit
def _gated(g, x, mean, rstd, weight, bias, slope, ACTIVATION: tl.constexpr):
    """The gradient in front of the activation, and the normalized input."""
    normalized = (x - mean[None, :]) * rstd[None, :]
    u = normalized * weight[None, :] + bias[None, :]
    return activation_gradient(g, u, slope, ACTIVATION), normalized


@triton.jit
def _grad_sums(
    g_ptr, x_ptr, dx_ptr, mean, rstd, weight, bias, slope, seed_ptr, threshold, scale, length,
    k, in_k, K, O, L, g_stride_k, g_stride_o, g_stride_l, x_stride_k, x_stride_o, x_stride_l,
    dx_stride_k, dx_stride_o, dx_stride_l, tiles_l, first, last, WRITE: tl.constexpr,
    ACTIVATION: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_L: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over tiles of du and du * normalized, each [kept].

    WRITE: also write the input's gradient, which in evaluation needs no sums.
    """
    sum_b = tl.zeros([BLOCK_O * BLOCK_L, BLOCK_K], ACC)
    sum_w = tl.zeros([BLOCK_O * BLOCK_L, BLOCK_K], ACC)
    for tile in range(first, last):
        o, inner, valid = tile_rows(tile, tiles_l, O, L, BLOCK_O, BLOCK_L)
        g = load_tile(g_ptr, o, inner, valid, k, in_k, g_stride_k, g_stride_o, g_stride_l, ACC)
        x = load_tile(x_ptr, o, inner, valid, k, in_k, x_stride_k, x_stride_o, x_stride_l, ACC)
        g = _drop(g, seed_ptr, threshold, scale, o, inner, k, K, L, length, FLAT)
        du, normalized = _gated(g, x, mean, rstd, weight, bias, slope, ACTIVATION)
        sum_b += du
        # Beyond the last row g is 0, but 0 * normalized need not be: rstd may be infinite.
        sum_w += tl.where(valid[:, None], du * normalized, 0.0)
        if WRITE:
            dx = du * (rstd * weight)[None, :]
            store_tile(dx_ptr, dx, o, inner, valid, k, in_k, dx_stride_k, dx_stride_o, dx_stride_l)
    return tl.sum(sum_b, 0), tl.sum(sum_w, 0)


@triton.jit(do_not_specialize=["parts", "threshold", "length"])
def batch_norm_leaky_relu_grad_sums_kernel(
    g_ptr, x_ptr, dx_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, part_ptr, K, O, L,
    g_stride_k, g_stride_o, g_stride_l, x_stride_k, x_stride_o, x_stride_l,
    dx_stride_k, dx_stride_o, dx_stride_l, tiles_l, tiles, per_part, parts, slope: tl.float64,
    seed_ptr, threshold, scale: tl.float64, length, WRITE: tl.constexpr,
    ACTIVATION: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_L: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums of every part. Grid: (blocks of channels, parts)."""
    part = tl.program_id(1)
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    first = part * per_part
    sum_b, sum_w = _grad_sums(
        g_ptr, x_ptr, dx_ptr, tl.load(mean_ptr + k, mask=in_k, other=0.0),
        tl.load(rstd_ptr + k, mask=in_k, other=0.0), load_vector(weight_ptr, k, in_k, 1.0, ACC),
        load_vector(bias_ptr, k, in_k, 0.0, ACC), scalar(slope, ACC), seed_ptr, threshold,
        scalar(scale, ACC), length, k, in_k, K, O, L,
        g_stride_k, g_stride_o, g_stride_l, x_stride_k, x_stride_o, x_stride_l,
        dx_stride_k, dx_stride_o, dx_stride_l, tiles_l, first,
        tl.minimum(first + per_part, tiles), WRITE, ACTIVATION, FLAT, BLOCK_K, BLOCK_O, BLOCK_L,
        ACC,
    )  # fmt: skip
    store_sum(part_ptr, sum_b, 0, part, parts, k, in_k, K)
    store_sum(part_ptr, sum_w, 1, part, parts, k, in_k, K)


@triton.jit(do_not_specialize=["parts", "threshold", "length"])
def batch_norm_leaky_relu_grad_kernel(
    g_ptr, x_ptr, dx_ptr, dweight_ptr, dbias_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    part_ptr, K, O, L, g_stride_k, g_stride_o, g_stride_l, x_stride_k, x_stride_o, x_stride_l,
    dx_stride_k, dx_stride_o, dx_stride_l, tiles_l, tiles, per_part, parts, count: tl.float64,
    slope: tl.float64, seed_ptr, threshold, scale: tl.float64, length, SUMS: tl.constexpr,
    WRITE: tl.constexpr, TRAINING: tl.constexpr, ACTIVATION: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_L: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of one part of a block of channels. Grid: (blocks of channels, parts).

    SUMS: ALONE (computed here), RUNNING (not wanted), or the padded number of parts to merge.
    WRITE: whether the input's gradient is written (with ALONE in evaluation, while summing).
    """
    part = tl.program_id(1)
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    mean = tl.load(mean_ptr + k, mask=in_k, other=0.0)
    rstd = tl.load(rstd_ptr + k, mask=in_k, other=0.0)
    weight = load_vector(weight_ptr, k, in_k, 1.0, ACC)
    bias = load_vector(bias_ptr, k, in_k, 0.0, ACC)
    slope = scalar(slope, ACC)
    scale = scalar(scale, ACC)
    first = part * per_part
    last = tl.minimum(first + per_part, tiles)
    WRITE_ALONE: tl.constexpr = WRITE and SUMS == ALONE and not TRAINING
    if SUMS == RUNNING:
        sum_b = tl.zeros([BLOCK_K], ACC)
        sum_w = sum_b
    elif SUMS == ALONE:
        sum_b, sum_w = _grad_sums(
            g_ptr, x_ptr, dx_ptr, mean, rstd, weight, bias, slope, seed_ptr, threshold, scale,
            length, k, in_k, K, O, L,
            g_stride_k, g_stride_o, g_stride_l, x_stride_k, x_stride_o, x_stride_l,
            dx_stride_k, dx_stride_o, dx_stride_l, tiles_l, first, last, WRITE_ALONE,
            ACTIVATION, FLAT, BLOCK_K, BLOCK_O, BLOCK_L, ACC,
        )  # fmt: skip
    else:
        sum_b = merge_sums(part_ptr, 0, parts, k, in_k, K, SUMS, ACC)
        sum_w = merge_sums(part_ptr, 1, parts, k, in_k, K, SUMS, ACC)
    if part == 0:
        if dweight_ptr is not None:
            tl.store(dweight_ptr + k, cast(sum_w, dweight_ptr.dtype.element_ty), mask=in_k)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + k, cast(sum_b, dbias_ptr.dtype.element_ty), mask=in_k)
    if WRITE and not WRITE_ALONE:
        n = scalar(count, ACC)
        mean_b = sum_b / n
        mean_w = sum_w / n
        factor = rstd * weight
        for tile in range(first, last):
            o, inner, valid = tile_rows(tile, tiles_l, O, L, BLOCK_O, BLOCK_L)
            g = load_tile(g_ptr, o, inner, valid, k, in_k, g_stride_k, g_stride_o, g_stride_l, ACC)
            x = load_tile(x_ptr, o, inner, valid, k, in_k, x_stride_k, x_stride_o, x_stride_l, ACC)
            g = _drop(g, seed_ptr, threshold, scale, o, inner, k, K, L, length, FLAT)
            du, normalized = _gated(g, x, mean, rstd, weight, bias, slope, ACTIVATION)
            if TRAINING:
                du = du - mean_b[None, :] - normalized * mean_w[None, :]
            dx = du * factor[None, :]
            store_tile(dx_ptr, dx, o, inner, valid, k, in_k, dx_stride_k, dx_stride_o, dx_stride_l)


class _Problem:
    """Tensors of shape (N, C) or (N, C, L) as (channels, N, L) problems."""

    def __init__(self, *tensors):
        reduced = [0] if tensors[0].dim() == 2 else [0, 2]
        found = as_matrices(tensors, reduced)
        assert found is not None  # one kept dimension and at most two reduced always fit
        self.sizes, self.strides = found
        channels, outer, inner = self.sizes
        self.count = outer * inner
        contiguous = self.strides[0][0] == 1
        p = self.plan = plan(channels, outer, inner, tensors[0].element_size(), contiguous)
        self.cut = (p.tiles_l, p.tiles, p.per_part, p.parts)
        self.blocks = {
            "BLOCK_K": p.block_k,
            "BLOCK_O": p.block_o,
            "BLOCK_L": p.block_l,
            "ACC": triton_accumulator(tensors[0].dtype),
            **options(p.num_warps),
        }


def _contiguous(tensor):
    return None if tensor is None else tensor.contiguous()


def _stride(tensor):
    return 0 if tensor is None or tensor.dim() == 0 else tensor.stride(0)


def _without_values(input, running_mean, running_var, tracked, training, eps):
    """The results for an input without elements."""
    channels = input.shape[1]
    acc = accumulator(input.dtype)
    if training:
        mean = input.new_full([channels], float("nan"), dtype=acc)
        rstd = mean.clone()
        if tracked is not None:
            tracked.add_(1)
    else:
        mean = running_mean.to(acc, copy=True).contiguous()
        rstd = (running_var.to(acc) + eps).rsqrt().contiguous()
    return input.new_empty(input.shape), mean, rstd


def batch_norm_leaky_relu(
    input, running_mean, running_var, num_batches_tracked, weight, bias,
    training, momentum, eps, negative_slope,
):  # fmt: skip
    """Return (output, mean, rstd) and, in training, update the running statistics in place."""
    return forward(
        input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum,
        eps, LEAKY_RELU.value, negative_slope, 0.0, None,
    )  # fmt: skip


def forward(
    input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum, eps,
    activation, negative_slope, dropout_p, seed,
):  # fmt: skip
    """As batch_norm_leaky_relu, for any activation and with dropout."""
    if input.numel() == 0:
        return _without_values(input, running_mean, running_var, num_batches_tracked, training, eps)
    output = input.new_empty(input.shape)
    acc = accumulator(input.dtype)
    channels = input.shape[1]
    mean, rstd = input.new_empty(channels, dtype=acc), input.new_empty(channels, dtype=acc)
    problem = _Problem(input, output)
    p = problem.plan
    statistics = RUNNING.value if not training else p.parts_padded if p.parts > 1 else ALONE.value
    part = None
    with on_device(input):
        if statistics > 0:
            part = input.new_empty(3 * p.parts * channels + p.parts, dtype=acc)
            # One program for each block of channels and part of the rows.
            moments_kernel[p.grid](
                input, part, *problem.sizes, *problem.strides[0], *problem.cut, **problem.blocks
            )
        # The same programs again; in evaluation the only launch.
        batch_norm_leaky_relu_kernel[p.grid](
            input, output, mean, rstd, _contiguous(weight), _contiguous(bias),
            running_mean, running_var, num_batches_tracked, _stride(running_mean),
            _stride(running_var), part, *problem.sizes, *problem.strides[0], *problem.strides[1],
            *problem.cut, momentum, eps, negative_slope, *_dropout(input, dropout_p, seed),
            STATISTICS=statistics, **_behind(input, activation), **problem.blocks,
        )  # fmt: skip
    return output, mean, rstd


def _dropout(input, p, seed):
    """Kernel arguments: seed, threshold and scale, and the length of the last of 3 dimensions."""
    seed = None if seed is None or p == 0 else seed.contiguous()
    return seed, drop_threshold(p), keep_scale(p), input.shape[-1]


def _behind(input, activation):
    return {"ACTIVATION": activation, "FLAT": input.dim() == 2}


def batch_norm_leaky_relu_backward(
    grad_output, input, weight, bias, mean, rstd, training, negative_slope, output_mask
):
    """Return the gradients of input, weight and bias that ``output_mask`` asks for."""
    return backward(
        grad_output, input, weight, bias, mean, rstd, training, LEAKY_RELU.value, negative_slope,
        0.0, None, output_mask,
    )  # fmt: skip


def backward(
    grad_output, input, weight, bias, mean, rstd, training, activation, negative_slope, dropout_p,
    seed, output_mask,
):  # fmt: skip
    """As batch_norm_leaky_relu_backward, for any activation and with dropout."""
    want_x, want_w, want_b = output_mask
    channels = input.shape[1]
    dx = input.new_empty(input.shape) if want_x else None
    dw = db = None
    if want_w:
        dw = input.new_empty(channels, dtype=(input if weight is None else weight).dtype)
    if want_b:
        db = input.new_empty(channels, dtype=(input if bias is None else bias).dtype)
    wanted = [t for t in (dx, dw, db) if t is not None]
    if input.numel() == 0:
        return [t.zero_() for t in wanted]
    acc = accumulator(input.dtype)
    # A tensor stands in for the gradient that is not wanted: never written, its strides unused.
    problem = _Problem(input, grad_output, *([] if dx is None else [dx]))
    x_strides, g_strides = problem.strides[:2]
    dx_strides = problem.strides[-1]
    p = problem.plan
    weight, bias, mean, rstd = map(_contiguous, (weight, bias, mean, rstd))
    need_sums = want_w or want_b or (training and want_x)
    if not wanted:
        return []
    sums = RUNNING.value if not need_sums else p.parts_padded if p.parts > 1 else ALONE.value
    grid, write, part, blocks = p.grid, want_x, None, dict(problem.blocks)
    drop, behind = _dropout(input, dropout_p, seed), _behind(input, activation)
    with on_device(input):
        if sums > 0:
            part = input.new_empty(2 * p.parts * channels, dtype=acc)
            in_first = want_x and not training
            # One program for each block of channels and part of the rows.
            batch_norm_leaky_relu_grad_sums_kernel[p.grid](
                grad_output, input, dx, mean, rstd, weight, bias, part, *problem.sizes,
                *g_strides, *x_strides, *dx_strides, *problem.cut, negative_slope, *drop,
                WRITE=in_first, **behind, **problem.blocks,
            )  # fmt: skip
            write = want_x and training
            if not write:
                # What is left is to merge the sums, 1024 at a time: with 64 lanes a warp, no more
                # than 4 warps find 128 bits for each thread.
                grid, blocks["num_warps"] = (p.blocks_k, 1), min(p.num_warps, 4)
        # The same programs again, or one for each block of channels.
        batch_norm_leaky_relu_grad_kernel[grid](
            grad_output, input, dx, dw, db, mean, rstd, weight, bias, part, *problem.sizes,
            *g_strides, *x_strides, *dx_strides, *problem.cut, float(problem.count),
            negative_slope, *drop, SUMS=sums, WRITE=write, TRAINING=training, **behind, **blocks,
        )  # fmt: skip
    return wanted
