"""(input - mean) / (std + eps) over the whole tensor or some dimensions, and its gradient.

Forward: moments of parts, then every program merges the parts and writes its own share; a group
that one program can walk alone takes a single launch. Backward likewise, with the sums of the
gradient and of its product with the centred input in place of the moments.
"""

import torch
import triton
import triton.language as tl

from .launch import accumulator, divide, on_device, options, scalar, square_root, triton_accumulator
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
from .views import as_matrices, plan


@triton.jit(do_not_specialize=["parts"])
def normalize_kernel(
    x_ptr, y_ptr, mean_ptr, std_ptr, part_ptr, K, O, L, x_stride_k, x_stride_o, x_stride_l,
    y_stride_k, y_stride_o, y_stride_l, tiles_l, tiles, per_part, parts,
    correction: tl.float64, eps: tl.float64, PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_L: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Output of one part of a block of groups. Grid: (blocks of groups, parts).

    PARTS 0: a program owns its groups and computes their moments itself.
    """
    block = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    first = part * per_part
    last = tl.minimum(first + per_part, tiles)
    if PARTS == 0:
        origin, centre, deviations, count = part_moments(
            x_ptr, k, in_k, K, O, L, x_stride_k, x_stride_o, x_stride_l, tiles_l, first, last,
            BLOCK_O, BLOCK_L, ACC,
        )  # fmt: skip
    else:
        origin, centre, deviations, count = merge_parts(part_ptr, parts, k, in_k, K, PARTS, ACC)
    freedom = count - scalar(correction, ACC)
    freedom = tl.where(freedom > 0, freedom, 0.0)
    std = square_root(divide(deviations, tl.zeros_like(deviations) + freedom))
    factor = divide(tl.full([BLOCK_K], 1.0, ACC), std + scalar(eps, ACC))
    if part == 0:
        tl.store(mean_ptr + k, origin + centre, mask=in_k)
        tl.store(std_ptr + k, std, mask=in_k)
    for tile in range(first, last):
        o, inner, valid = tile_rows(tile, tiles_l, O, L, BLOCK_O, BLOCK_L)
        x = load_tile(x_ptr, o, inner, valid, k, in_k, x_stride_k, x_stride_o, x_stride_l, ACC)
        y = ((x - origin[None, :]) - centre[None, :]) * factor[None, :]
        store_tile(y_ptr, y, o, inner, valid, k, in_k, y_stride_k, y_stride_o, y_stride_l)


@triton.jit
def _grad_sums(
    g_ptr, x_ptr, mean, k, in_k, O, L, g_stride_k, g_stride_o, g_stride_l,
    x_stride_k, x_stride_o, x_stride_l, tiles_l, first, last,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_L: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over tiles of g, g * (x - mean) and x - mean, each [kept]."""
    sum_g = tl.zeros([BLOCK_O * BLOCK_L, BLOCK_K], ACC)
    sum_gx = tl.zeros([BLOCK_O * BLOCK_L, BLOCK_K], ACC)
    sum_x = tl.zeros([BLOCK_O * BLOCK_L, BLOCK_K], ACC)
    for tile in range(first, last):
        o, inner, valid = tile_rows(tile, tiles_l, O, L, BLOCK_O, BLOCK_L)
        g = load_tile(g_ptr, o, inner, valid, k, in_k, g_stride_k, g_stride_o, g_stride_l, ACC)
        x = load_tile(x_ptr, o, inner, valid, k, in_k, x_stride_k, x_stride_o, x_stride_l, ACC)
        x = tl.where(valid[:, None], x - mean[None, :], 0.0)
        sum_g += g
        sum_gx += g * x
        sum_x += x
    return tl.sum(sum_g, 0), tl.sum(sum_gx, 0), tl.sum(sum_x, 0)


@triton.jit(do_not_specialize=["parts"])
def normalize_grad_sums_kernel(
    g_ptr, x_ptr, mean_ptr, part_ptr, K, O, L, g_stride_k, g_stride_o, g_stride_l,
    x_stride_k, x_stride_o, x_stride_l, tiles_l, tiles, per_part, parts,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_L: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The three sums of every part. Grid: (blocks of groups, parts)."""
    part = tl.program_id(1)
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    mean = tl.load(mean_ptr + k, mask=in_k, other=0.0)
    first = part * per_part
    sum_g, sum_gx, sum_x = _grad_sums(
        g_ptr, x_ptr, mean, k, in_k, O, L, g_stride_k, g_stride_o, g_stride_l,
        x_stride_k, x_stride_o, x_stride_l, tiles_l, first, tl.minimum(first + per_part, tiles),
        BLOCK_K, BLOCK_O, BLOCK_L, ACC,
    )  # fmt: skip
    store_sum(part_ptr, sum_g, 0, part, parts, k, in_k, K)
    store_sum(part_ptr, sum_gx, 1, part, parts, k, in_k, K)
    store_sum(part_ptr, sum_x, 2, part, parts, k, in_k, K)


@triton.jit(do_not_specialize=["parts"])
def normalize_grad_kernel(
    g_ptr, x_ptr, mean_ptr, std_ptr, dx_ptr, part_ptr, K, O, L,
    g_stride_k, g_stride_o, g_stride_l, x_stride_k, x_stride_o, x_stride_l,
    dx_stride_k, dx_stride_o, dx_stride_l, tiles_l, tiles, per_part, parts, count: tl.float64,
    correction: tl.float64, eps: tl.float64, PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_L: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of one part of a block of groups. Grid: (blocks of groups, parts).

    PARTS 0: a program owns its groups and computes their sums itself.
    """
    part = tl.program_id(1)
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    mean = tl.load(mean_ptr + k, mask=in_k, other=0.0)
    std = tl.load(std_ptr + k, mask=in_k, other=1.0)
    first = part * per_part
    last = tl.minimum(first + per_part, tiles)
    if PARTS == 0:
        sum_g, sum_gx, sum_x = _grad_sums(
            g_ptr, x_ptr, mean, k, in_k, O, L, g_stride_k, g_stride_o, g_stride_l,
            x_stride_k, x_stride_o, x_stride_l, tiles_l, first, last,
            BLOCK_K, BLOCK_O, BLOCK_L, ACC,
        )  # fmt: skip
    else:
        sum_g = merge_sums(part_ptr, 0, parts, k, in_k, K, PARTS, ACC)
        sum_gx = merge_sums(part_ptr, 1, parts, k, in_k, K, PARTS, ACC)
        sum_x = merge_sums(part_ptr, 2, parts, k, in_k, K, PARTS, ACC)
    n = scalar(count, ACC)
    # The mean was rounded to be stored; what rounding took away is the mean of x - mean.
    rest = sum_x / n
    sum_gx -= rest * sum_g
    factor = divide(tl.full([BLOCK_K], 1.0, ACC), std + scalar(eps, ACC))
    freedom = n - scalar(correction, ACC)
    freedom = tl.where(freedom > 0, freedom, 0.0)
    # As for torch.std: no gradient through a standard deviation of 0.
    slope = tl.where(std == 0, 0.0, sum_gx * factor * factor / (freedom * std))
    mean_g = sum_g / n
    for tile in range(first, last):
        o, inner, valid = tile_rows(tile, tiles_l, O, L, BLOCK_O, BLOCK_L)
        g = load_tile(g_ptr, o, inner, valid, k, in_k, g_stride_k, g_stride_o, g_stride_l, ACC)
        x = load_tile(x_ptr, o, inner, valid, k, in_k, x_stride_k, x_stride_o, x_stride_l, ACC)
        centred = (x - mean[None, :]) - rest[None, :]
        dx = factor[None, :] * (g - mean_g[None, :]) - centred * slope[None, :]
        store_tile(dx_ptr, dx, o, inner, valid, k, in_k, dx_stride_k, dx_stride_o, dx_stride_l)


def _positive(dim, rank):
    return None if dim is None else sorted(d % max(rank, 1) for d in dim if rank)


class _Problem:
    """Tensors of one shape as matrices, copied into (kept, reduced) order where they must be."""

    def __init__(self, tensors, dim):
        shape = tensors[0].shape
        reduced = list(range(len(shape))) if dim is None else dim
        self.shape, self.order = shape, None
        self.tensors = list(tensors)
        self.output = tensors[0].new_empty(shape)
        found = as_matrices([*self.tensors, self.output], reduced)
        if found is None:
            self.order = [d for d in range(len(shape)) if d not in reduced] + sorted(reduced)
            self.tensors = [t.permute(self.order).contiguous() for t in tensors]
            self.output = torch.empty_like(self.tensors[0])
            first = len(shape) - len(reduced)
            found = as_matrices([*self.tensors, self.output], list(range(first, len(shape))))
        assert found is not None
        self.sizes, self.strides = found
        kept, outer, inner = self.sizes
        self.count = outer * inner
        self.plan = plan(kept, outer, inner, self.output.element_size(), self.strides[0][0] == 1)

    def blocks(self, dtype):
        p = self.plan
        return {
            "BLOCK_K": p.block_k,
            "BLOCK_O": p.block_o,
            "BLOCK_L": p.block_l,
            "ACC": triton_accumulator(dtype),
            **options(p.num_warps),
        }

    def result(self):
        """The output, contiguous in the order of the input's dimensions."""
        if self.order is None:
            return self.output
        back = [self.order.index(d) for d in range(len(self.order))]
        return self.output.permute(back).contiguous()


def normalize(input, dim, correction, eps):
    """Return (output, mean, std); output is contiguous, mean and std in the accumulation dtype."""
    acc = accumulator(input.dtype)
    dim = _positive(dim, input.dim())
    shape = [] if dim is None else [1 if d in dim else s for d, s in enumerate(input.shape)]
    if input.numel() == 0:
        nan = input.new_full(shape, float("nan"), dtype=acc)
        return input.new_empty(input.shape), nan, nan.clone()
    mean = input.new_empty(shape, dtype=acc)
    std = torch.empty_like(mean)
    problem = _Problem([input], dim)
    (x,), p, (kept, _, _) = problem.tensors, problem.plan, problem.sizes
    blocks = problem.blocks(input.dtype)
    cut = (p.tiles_l, p.tiles, p.per_part, p.parts)
    part = None
    with on_device(input):
        if p.parts > 1:
            # One program for each block of groups and part of its values.
            part = input.new_empty(3 * p.parts * kept + p.parts, dtype=acc)
            moments_kernel[p.grid](x, part, *problem.sizes, *problem.strides[0], *cut, **blocks)
        # The same programs again, now that every part is known.
        normalize_kernel[p.grid](
            x, problem.output, mean, std, part, *problem.sizes, *problem.strides[0],
            *problem.strides[1], *cut, correction, eps,
            PARTS=p.parts_padded if p.parts > 1 else 0, **blocks,
        )  # fmt: skip
    return problem.result(), mean, std


def normalize_backward(grad_output, input, mean, std, dim, correction, eps):
    """Return the gradient of the input, contiguous."""
    if input.numel() == 0:
        return input.new_empty(input.shape)
    acc = accumulator(input.dtype)
    dim = _positive(dim, input.dim())
    mean, std = mean.contiguous(), std.contiguous()
    problem = _Problem([input, grad_output], dim)
    (x, g), p, (kept, _, _) = problem.tensors, problem.plan, problem.sizes
    x_strides, g_strides, dx_strides = problem.strides
    blocks = problem.blocks(input.dtype)
    cut = (p.tiles_l, p.tiles, p.per_part, p.parts)
    part = None
    with on_device(input):
        if p.parts > 1:
            part = input.new_empty(3 * p.parts * kept, dtype=acc)
            # One program for each block of groups and part of its values.
            normalize_grad_sums_kernel[p.grid](
                g, x, mean, part, *problem.sizes, *g_strides, *x_strides, *cut, **blocks
            )
        # The same programs again, now that every part is known.
        normalize_grad_kernel[p.grid](
            g, x, mean, std, problem.output, part, *problem.sizes, *g_strides, *x_strides,
            *dx_strides, *cut, float(problem.count), correction, eps,
            PARTS=p.parts_padded if p.parts > 1 else 0, **blocks,
        )  # fmt: skip
    return problem.result()
