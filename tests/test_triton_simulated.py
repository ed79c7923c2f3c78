"""The ops' Triton kernels, executed in ptxsim: values, block order, memory traffic, launches.

Where a GPU is at hand the common tests run the same kernels on it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_simulator import (
    BOTH,
    SEED,
    Op,
    assert_lean,
    check,
    double,
    names,
    simulate,
    simulator,  # noqa: F401
    tolerance,
)

from fused_mlp import activations, reference

# ------------------------------------------------------------------------------- normalize


def normalize_op(x: Tensor, g: Tensor, dim: list[int] | None) -> tuple[Op, list[Tensor]]:
    from fused_mlp.kernels import normalize as kernels

    def run(module: object, x: Tensor, g: Tensor) -> list[Tensor]:
        y, mean, std = module.normalize(x, dim, 1.0, 1e-3)  # type: ignore[attr-defined]
        dx = module.normalize_backward(g, x, mean, std, dim, 1.0, 1e-3)  # type: ignore[attr-defined]
        return [y, mean, std, dx]

    return lambda: run(kernels, x, g), run(reference, x.double(), g.double())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "dim"), [((700, 37), None), ((600, 32), [0]), ((33, 70), [1]), ((5, 6, 7), [0, 2])]
)
def test_normalize(cc: int, dtype: torch.dtype, shape: tuple[int, ...], dim: list[int]) -> None:
    x, g = torch.randn(2, *shape).to(dtype).unbind()
    op, expected = normalize_op(x, g, dim)
    check(cc, op, expected, tolerance(dtype))


@BOTH
def test_normalize_traffic(cc: int) -> None:
    x, g = torch.randn(2, 4096, 64).unbind()
    size = x.numel() * x.element_size()
    op, _ = normalize_op(x, g, None)
    _, records = simulate(cc, op)
    assert names(records) == ["moments", "normalize", "normalize_grad_sums", "normalize_grad"]
    assert_lean(records[:2], 3 * size)  # x twice, y
    assert_lean(records[2:], 5 * size)  # x and g twice, dx
    op, _ = normalize_op(x, g, [1])
    _, records = simulate(cc, op)
    assert names(records) == ["normalize", "normalize_grad"]
    assert_lean(records, 8 * size)


@BOTH
def test_normalize_far_from_zero(cc: int) -> None:
    """1e4 +- 1e-2 keeps its digits: the standard deviation is as good as torch's."""
    x = torch.randn(3, 5000) * 1e-2 + 1e4
    op, (y, _, std, _) = normalize_op(x, torch.zeros_like(x), None)
    results, _ = simulate(cc, op)
    theirs = (x.std().double() - std).abs() / std
    assert (results[2].double() - std).abs() / std <= theirs + 1e-6
    torch_y = (x - x.mean()) / (x.std() + 1e-3)
    assert (results[0].double() - y).abs().max() <= (torch_y.double() - y).abs().max() + 1e-5


# ---------------------------------------------------------------------------- linear_relu


def linear_op(
    x: Tensor, weight: Tensor, bias: Tensor, p: float, g: Tensor
) -> tuple[Op, list[Tensor]]:
    from fused_mlp.kernels import linear_relu as kernels

    seed = torch.tensor(SEED)

    def op() -> list[Tensor]:
        y = kernels.linear_relu(x, weight, bias, p, seed)
        return [y, *kernels.linear_relu_backward(g, x, weight, y, p, [True] * 3)]

    exact = reference.linear_relu(x.double(), weight.double(), bias.double(), p, seed)
    gradients = reference.linear_relu_backward(
        g.double(), x.double(), weight.double(), exact, p, [True] * 3
    )
    return op, [exact, *gradients]


@BOTH
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, "highest"),
        (torch.float32, "high"),
        (torch.bfloat16, "highest"),
        pytest.param(torch.float16, "highest", marks=pytest.mark.slow),
        pytest.param(torch.float64, "highest", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "sizes", [(70, 10, 21), pytest.param((600, 40, 70), marks=pytest.mark.slow)]
)
def test_linear_relu(
    cc: int, dtype: torch.dtype, precision: str, sizes: tuple[int, int, int]
) -> None:
    torch.set_float32_matmul_precision(precision)
    rows, inputs, outputs = sizes
    x, g = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    op, expected = linear_op(x, weight, bias, 0.3, g)
    if precision == "high" or dtype.itemsize == 2:  # a gate may flip where the value is near 0
        results, _ = simulate(cc, op, check_races=True, check_uninit=True)
        y = results[0].double()
        expected[1:] = reference.linear_relu_backward(
            g.double(), x.double(), weight.double(), y, 0.3, [True] * 3
        )
    loose = 1e-2 if precision == "high" else tolerance(dtype)
    check(cc, op, expected, loose)


@BOTH
def test_linear_relu_traffic(cc: int) -> None:
    """With one tile across, x is read once and y written once; backward reads y, g and x."""
    rows, inputs, outputs = 1024, 32, 64
    torch.set_float32_matmul_precision("high")
    x, g = torch.randn(rows, inputs), torch.randn(rows, outputs)
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    op, _ = linear_op(x, weight, bias, 0.3, g)
    _, records = simulate(cc, op)
    assert names(records) == [
        "linear_relu", "linear_relu_grad_input", "linear_relu_grad_weight", "merge"
    ]  # fmt: skip
    forward, grad_input, grad_weight, _ = records
    sizes = [4 * t.numel() for t in (x, weight, bias, g)]
    dram = [r.dram_read_bytes + r.dram_write_bytes for r in (forward, grad_input, grad_weight)]
    size_x, size_w, size_b, size_y = sizes
    assert dram[0] <= 1.1 * (size_x + size_w + size_b + size_y)
    assert dram[1] <= 1.1 * (2 * size_y + size_w + size_x)
    assert dram[2] <= 1.1 * (2 * size_y + size_x + 4 * (size_w + size_b))  # four parts
    assert forward.load_efficiency >= 0.9
    assert forward.store_efficiency >= 0.9


# ------------------------------------------------------------------ batch_norm_leaky_relu


def batch_norm_op(x: Tensor, g: Tensor, training: bool) -> tuple[Op, list[Tensor]]:
    from fused_mlp.kernels import batch_norm_leaky_relu as kernels

    channels = x.shape[1]
    generator = torch.Generator().manual_seed(1)
    mean, var, weight, bias = (torch.rand(4, channels, generator=generator) + 0.5).to(x).unbind()

    def run(module: object, cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        running = [cast(mean).clone(), cast(var).clone(), torch.tensor(4)]
        arguments = cast(x), cast(weight), cast(bias)
        y, saved_mean, rstd = module.batch_norm_leaky_relu(  # type: ignore[attr-defined]
            arguments[0], *running, *arguments[1:], training, 0.1, 1e-5, 0.01
        )
        gradients = module.batch_norm_leaky_relu_backward(  # type: ignore[attr-defined]
            cast(g), *arguments, saved_mean, rstd, training, 0.01, [True] * 3
        )
        return [y, saved_mean, rstd, *running[:2], running[2].double(), *gradients]

    return lambda: run(kernels, lambda t: t), run(reference, lambda t: t.double())


@BOTH
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 20), (1500, 32), (20, 6, 7)])
def test_batch_norm(cc: int, dtype: torch.dtype, shape: tuple[int, ...], training: bool) -> None:
    x, g = torch.randn(2, *shape).to(dtype).unbind()
    op, expected = batch_norm_op(x, g, training)
    check(cc, op, expected, tolerance(dtype))


@BOTH
@pytest.mark.parametrize("columns", [32, pytest.param(96, marks=pytest.mark.slow)])
def test_batch_norm_traffic(cc: int, columns: int) -> None:
    """Training reads x twice and writes y once; backward reads x and g twice and writes dx."""
    x, g = torch.randn(2, 4096, columns).unbind()
    size = x.numel() * x.element_size()
    op, _ = batch_norm_op(x, g, True)
    _, records = simulate(cc, op)
    op_name = "batch_norm_leaky_relu"
    assert names(records) == ["moments", op_name, f"{op_name}_grad_sums", f"{op_name}_grad"]
    assert min(r.grid[0] * r.grid[1] for r in records) > 1, "rows are not split"
    assert_lean(records[:2], 3 * size)
    assert_lean(records[2:], 5 * size)
    op, _ = batch_norm_op(x, g, False)
    _, records = simulate(cc, op)
    assert names(records) == [op_name, f"{op_name}_grad_sums", f"{op_name}_grad"]
    assert_lean(records[:1], 2 * size)
    assert_lean(records[1:], 3 * size)


# --------------------------------------------------------------- linear_act, batch_norm_act


@BOTH
@pytest.mark.parametrize(
    "activation",
    [
        activations.GELU,
        pytest.param(activations.GELU_TANH, marks=pytest.mark.slow),
        pytest.param(activations.SILU, marks=pytest.mark.slow),
        pytest.param(activations.TANH, marks=pytest.mark.slow),
    ],
)
def test_linear_act(cc: int, activation: int) -> None:
    from fused_mlp.kernels import linear_act as kernels

    torch.set_float32_matmul_precision("highest")
    x, weight, bias, g = (torch.randn(s) for s in ((70, 10), (21, 10), (21,), (70, 21)))
    behind = activation, 0.0, 0.3, torch.tensor(SEED)
    keep = activations.kept(activation, *behind[1:3]) == activations.INPUT

    def run(module: object, cast: Callable[[object], object]) -> list[Tensor]:
        arguments = [cast(t) for t in (x, weight, bias)]
        outputs = module.linear_act(*arguments, *behind, keep)  # type: ignore[attr-defined]
        gradients = module.linear_act_backward(  # type: ignore[attr-defined]
            cast(g), *arguments[:2], outputs[-1], *behind, [True] * 3
        )
        return [*outputs, *gradients]

    check(cc, lambda: run(kernels, lambda t: t), run(reference, double), 2e-6)


def batch_norm_act_op(x: Tensor, g: Tensor) -> tuple[Op, list[Tensor]]:
    from fused_mlp.kernels import batch_norm_act as kernels

    weight, bias = (torch.rand(2, x.shape[1]) + 0.5).unbind()
    behind = activations.RELU, 0.0, 0.3, torch.tensor(SEED)

    def run(module: object, cast: Callable[[object], object]) -> list[Tensor]:
        arguments = [cast(t) for t in (x, weight, bias)]
        y, mean, rstd = module.batch_norm_act(  # type: ignore[attr-defined]
            arguments[0], None, None, None, *arguments[1:], True, 0.1, 1e-5, *behind
        )
        gradients = module.batch_norm_act_backward(  # type: ignore[attr-defined]
            cast(g), *arguments, mean, rstd, True, *behind, [True] * 3
        )
        return [y, mean, rstd, *gradients]

    return lambda: run(kernels, lambda t: t), run(reference, double)


@BOTH
@pytest.mark.parametrize("shape", [(70, 20), (20, 6, 7)])
def test_batch_norm_act(cc: int, shape: tuple[int, ...]) -> None:
    """The mask of a batch norm's dropout by channels, and by positions in a signal."""
    op, expected = batch_norm_act_op(*torch.randn(2, *shape).unbind())
    check(cc, op, expected, 2e-6)


@BOTH
def test_batch_norm_act_traffic(cc: int) -> None:
    """Dropout moves nothing more: its mask is computed again in backward."""
    x, g = torch.randn(2, 4096, 32).unbind()
    size = x.numel() * x.element_size()
    op, _ = batch_norm_act_op(x, g)
    _, records = simulate(cc, op)
    assert_lean(records[:2], 3 * size)
    assert_lean(records[2:], 5 * size)
