"""normalize and batch_norm_leaky_relu in CUDA C++, executed in ptxsim."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from cuda_fixtures import CPU, cuda_library, each_gpu, gpu, simulate  # noqa: F401
from cuda_simulator import Simulator
from support import DTYPES, batch_norm_case, check_case, lay_out, normalize_case
from support.traffic import assert_standardization_traffic

from bench.cuda_launches import Device, recorded

KERNELS = torch.ops.fused_mlp_kernels


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((37, 13), None),
        ((1000,), None),
        ((5, 7, 11), [0, 2]),
        ((5, 7, 11), [1]),
        ((5, 7, 12), [0]),
        ((9, 33), [1]),
        ((301, 4), [1]),
        ((45, 32), [1]),
        ((3, 700), [1]),
        ((37, 3, 5), [0, 2]),
        ((3, 1), [0]),
        ((2, 300, 64), [1]),
    ],
)
def test_normalize_shapes(gpu: Simulator, shape: tuple[int, ...], dim: list[int] | None) -> None:
    check_case(normalize_case(shape, dim, device=CPU))


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalize_dtypes(each_gpu: Simulator, dtype: torch.dtype) -> None:
    check_case(normalize_case((70, 20), None, dtype=dtype, device=CPU))
    check_case(normalize_case((70, 20), [0], dtype=dtype, device=CPU))


@pytest.mark.parametrize("layout", ["transposed", "columns", "gap", "steps", "offset", "expanded"])
@pytest.mark.parametrize("dim", [None, [0], [1]])
def test_normalize_layouts(gpu: Simulator, layout: str, dim: list[int] | None) -> None:
    case = normalize_case((29, 18), dim, device=CPU)
    x = case.tensors["input"]
    if layout != "expanded" or dim != [0]:  # equal rows have no deviation
        check_case(case, [lay_out(x, layout)])
    check_case(case, None, lay_out(torch.randn(29, 18), layout))


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("dim", [None, [0], [0, 2]])
def test_results_are_contiguous_as_tracers_are_told(gpu: Simulator, order, dim) -> None:
    """Compiled code does not ask: other strides would be wrong numbers."""
    inverse = [order.index(d) for d in range(3)]
    x, grad = (torch.randn(6, 5, 4).permute(order).contiguous().permute(inverse) for _ in range(2))
    assert not x.is_contiguous()
    output, mean, std = KERNELS.normalize(x, dim, 1.0, 0.0)
    results = [output, mean, std, KERNELS.normalize_backward(grad, x, mean, std, dim, 1.0, 0.0)]
    output, mean, rstd = KERNELS.batch_norm_leaky_relu(
        x, None, None, None, None, None, True, 0.1, 1e-5, 0.01
    )
    results += [output, mean, rstd]
    results += KERNELS.batch_norm_leaky_relu_backward(
        grad, x, None, None, mean, rstd, True, 0.01, [True, False, False]
    )
    assert all(result.is_contiguous() for result in results)


def test_normalize_keeps_small_deviations(gpu: Simulator) -> None:
    check_case(normalize_case((64, 100), None, device=CPU, scale=1e-2, offset=1e4))


def test_large_is_cut_into_chunks(simulate: Callable[..., Simulator]) -> None:
    simulator = simulate(multiprocessors=5)
    with simulator.running():
        check_case(normalize_case((20011,), None, device=CPU))
        check_case(batch_norm_case((2511, 12), True, device=CPU))
        check_case(batch_norm_case((2511, 13), True, device=CPU))
        check_case(batch_norm_case((60, 3, 301), True, device=CPU))
    assert len(simulator.records) == 4 * (2 + 2)
    assert max(record.grid[0] for record in simulator.records) > 1


@pytest.mark.parametrize("shape", [(37, 5), (64, 32), (7, 130), (2, 1), (6, 5, 9), (3, 4, 300)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_shapes(gpu: Simulator, shape: tuple[int, ...], training: bool) -> None:
    check_case(batch_norm_case(shape, training, device=CPU))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_dtypes(each_gpu: Simulator, dtype: torch.dtype, training: bool) -> None:
    check_case(batch_norm_case((50, 24), training, dtype=dtype, device=CPU))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_float32_parameters(gpu: Simulator, training: bool) -> None:
    options = {"dtype": torch.bfloat16, "parameter_dtype": torch.float32, "device": CPU}
    check_case(batch_norm_case((50, 24), training, **options))


@pytest.mark.parametrize("affine", ["weight", "bias", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_without_parameters(gpu: Simulator, affine: str, training: bool) -> None:
    check_case(batch_norm_case((40, 6), training, affine, device=CPU))


@pytest.mark.parametrize("layout", ["transposed", "columns", "gap", "steps", "offset"])
def test_batch_norm_layouts(gpu: Simulator, layout: str) -> None:
    case = batch_norm_case((29, 20), True, device=CPU)
    x, *parameters = case.tensors.values()
    check_case(case, [lay_out(x, layout), *parameters])
    check_case(case, [x, *(lay_out(p, layout) for p in parameters)] if layout == "offset" else None,
               lay_out(torch.randn(29, 20), layout))  # fmt: skip
    case = batch_norm_case((5, 4, 21), True, device=CPU)
    x, *parameters = case.tensors.values()
    check_case(case, [lay_out(x, layout), *parameters], lay_out(torch.randn(5, 4, 21), layout))


def test_running_statistics(gpu: Simulator) -> None:
    plain = torch.nn.BatchNorm1d(12)
    mean, var, count = torch.zeros(12), torch.ones(12), torch.tensor(0)
    for step in range(3):
        x = torch.randn(20 + step, 12) + step
        plain(x)
        KERNELS.batch_norm_leaky_relu(
            x, mean, var, count, plain.weight, plain.bias, True, 0.1, 1e-5, 0.01
        )
    torch.testing.assert_close(mean, plain.running_mean)
    torch.testing.assert_close(var, plain.running_var)
    assert count == 3


def test_empty(gpu: Simulator) -> None:
    output, mean, std = KERNELS.normalize(torch.empty(0, 3), [0], 1.0, 0.0)
    assert output.shape == (0, 3) and mean.shape == (1, 3) and mean.isnan().all()
    assert KERNELS.normalize_backward(output, output, mean, std, [0], 1.0, 0.0).shape == (0, 3)
    x, vector = torch.empty(0, 3), torch.ones(3)
    output, mean, rstd = KERNELS.batch_norm_leaky_relu(
        x, None, None, None, vector, vector, True, 0.1, 1e-5, 0.01
    )
    gradients = KERNELS.batch_norm_leaky_relu_backward(
        output, x, vector, vector, mean, rstd, True, 0.01, [True] * 3
    )
    assert [g.shape for g in gradients] == [(0, 3), (3,), (3,)] and not gradients[1].any()
    assert not gpu.records


def test_same_bits_in_any_block_order(simulate: Callable[..., Simulator]) -> None:
    x, g = torch.randn(2500, 12), torch.randn(2500, 12)
    results = []
    for shuffle in (None, 1, 2):
        with simulate(multiprocessors=3, shuffle=shuffle).running():
            y, mean, rstd = KERNELS.batch_norm_leaky_relu(
                x, None, None, None, None, None, True, 0.1, 1e-5, 0.01
            )
            (dx,) = KERNELS.batch_norm_leaky_relu_backward(
                g, x, None, None, mean, rstd, True, 0.01, [True, False, False]
            )
            z, *_ = KERNELS.normalize(x.view(-1), None, 1.0, 0.0)
        results.append((y, mean, rstd, dx, z))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("op", "shape", "launches", "coalesced"),
    [
        ("normalize", (1024, 64), 2, 0.99),
        ("normalize columns", (4096, 16), 2, 0.99),
        ("batch norm", (4096, 16), 2, 0.99),
        ("batch norm", (512, 64), 1, 0.99),
        # of each short row: its first number by itself, and two statistics
        ("normalize rows", (1000, 32), 1, 0.85),
    ],
)
def test_traffic(
    simulate: Callable[..., Simulator],
    op: str,
    shape: tuple[int, int],
    launches: int,
    coalesced: float,
    dtype: torch.dtype,
) -> None:
    """A launch reads x, and backward g, once; the result is written once."""
    x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    simulator = simulate(multiprocessors=4, stats=True)
    with simulator.running():
        if op == "batch norm":
            w = torch.ones(shape[1]).to(dtype)
            _, mean, std = KERNELS.batch_norm_leaky_relu(
                x, None, None, None, w, w, True, 0.1, 1e-5, 0.01
            )
            KERNELS.batch_norm_leaky_relu_backward(
                g, x, w, w, mean, std, True, 0.01, [True, True, True]
            )
        else:
            dim = {"normalize": None, "normalize columns": [0], "normalize rows": [1]}[op]
            _, mean, std = KERNELS.normalize(x, dim, 1.0, 0.0)
            KERNELS.normalize_backward(g, x, mean, std, dim, 1.0, 0.0)
    size, statistics = x.numel() * x.element_size(), 2 * mean.numel() * 4
    stats = [record.stats for record in simulator.records]
    assert_standardization_traffic(stats, launches, size, statistics)
    for s in stats:
        assert s.load_efficiency >= coalesced
        assert s.store_efficiency >= coalesced or s.store_bytes < size / 10  # a few partial sums


def test_small_takes_one_launch(gpu: Simulator) -> None:
    x = torch.randn(256, 32)
    KERNELS.batch_norm_leaky_relu(x, None, None, None, None, None, True, 0.1, 1e-5, 0.01)
    KERNELS.normalize(x, None, 1.0, 0.0)
    assert len(gpu.records) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 4096), (10**6, 32)])
def test_tall_and_wide_fill_the_gpu(
    cuda_library: ctypes.CDLL, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """All but 5 % of an H100's multiprocessors have a block, whatever side is long."""
    x = torch.empty(shape, dtype=dtype)
    with recorded(cuda_library, Device(132, 227 * 1024, 228 * 1024, 90)) as launches:
        KERNELS.normalize(x, [0], 1.0, 0.0)
        KERNELS.batch_norm_leaky_relu(x, None, None, None, None, None, True, 0.1, 1e-5, 0.01)
        KERNELS.normalize(x, None, 1.0, 0.0)
        if shape[0] > 64:  # else a block takes a row of 4096, in one launch
            KERNELS.normalize(x, [1], 1.0, 0.0)
    assert len(launches) == (4 if shape[0] == 64 else 7)
    assert all(launch.grid[0] >= 0.95 * 132 and launch.threads == 256 for launch in launches)
