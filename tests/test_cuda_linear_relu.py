"""linear_relu in CUDA C++, executed in ptxsim."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from cuda_fixtures import CPU, cuda_library, each_gpu, gpu, simulate, tf32  # noqa: F401
from cuda_simulator import Simulator
from support import DTYPES, check_case, lay_out, linear_case
from support.traffic import assert_traffic

KERNELS = torch.ops.fused_mlp_kernels


@pytest.mark.parametrize(
    ("shape", "out_features"),
    [((1, 10), 64), ((7, 64), 32), ((65, 33), 70), ((3, 5, 17), 9), ((5, 1), 1), ((70, 130), 3)],
)
def test_shapes(gpu: Simulator, shape: tuple[int, ...], out_features: int) -> None:
    check_case(linear_case(shape, out_features, p=0.4, device=CPU))
    check_case(linear_case(shape, out_features, bias=False, device=CPU))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(each_gpu: Simulator, dtype: torch.dtype) -> None:
    check_case(linear_case((100, 72), 88, p=0.3, dtype=dtype, device=CPU))
    check_case(linear_case((33, 19), 21, p=0.3, dtype=dtype, device=CPU))


@pytest.mark.parametrize("layout", ["transposed", "columns", "gap", "steps", "offset", "expanded"])
def test_layouts(gpu: Simulator, layout: str) -> None:
    case = linear_case((23, 20), 12, p=0.2, device=CPU)
    x, weight, bias = case.tensors.values()
    check_case(case, [lay_out(x, layout), weight, bias])
    check_case(case, [x, lay_out(weight, layout), lay_out(bias, layout)])
    check_case(case, None, lay_out(torch.randn(23, 12), layout))


@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 0, 3), (5, 4, 0)])
def test_empty(gpu: Simulator, shape: tuple[int, int, int]) -> None:
    rows, in_features, out_features = shape
    check_case(linear_case((rows, in_features), out_features, p=0.5, device=CPU))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_goes_to_the_library(each_gpu: Simulator, dtype: torch.dtype) -> None:
    """Our kernels do only what is element-wise: one launch for dropout, one for the gate."""
    check_case(linear_case((1100, 256), 130, p=0.3, dtype=dtype, device=CPU))
    assert [r.kernel.rsplit("_", 1)[0] for r in each_gpu.records] == ["fused_mlp_relu_elements"] * 2
    each_gpu.records.clear()
    check_case(linear_case((1100, 128), 131, bias=False, dtype=dtype, device=CPU))
    assert [r.kernel.rsplit("_", 1)[0] for r in each_gpu.records] == ["fused_mlp_relu_elements"] * 2


def test_tf32(each_gpu: Simulator) -> None:
    case = linear_case((100, 72), 40, p=0.3, device=CPU)
    x, weight, bias = case.tensors.values()
    exact = case.exact(x.double(), weight.double(), bias.double())
    with tf32():
        result = case.fused(x, weight, bias)
    assert each_gpu.records[0].kernel == "fused_mlp_gemm_tf32"
    error = (result - exact).norm() / exact.norm()
    assert 1e-6 < error < 1e-3  # rounded to 11 bits, and indeed rounded


def test_nan_and_infinity(gpu: Simulator) -> None:
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [float("-inf"), 1.0]])
    weight = torch.ones(3, 2)
    expected = torch.nn.functional.linear(x, weight).relu()
    output = KERNELS.linear_relu(x, weight, None, 0.0, None)
    torch.testing.assert_close(output, expected, equal_nan=True)
    (dx,) = KERNELS.linear_relu_backward(
        torch.ones(3, 3), x, weight, output, 0.0, [True, False, False]
    )
    torch.testing.assert_close(dx, torch.tensor([[3.0, 3.0], [3.0, 3.0], [0.0, 0.0]]))


@pytest.mark.parametrize("math", ["float32", "bfloat16", "tf32"])
def test_traffic(simulate: Callable[..., Simulator], math: str) -> None:
    dtype = torch.bfloat16 if math == "bfloat16" else torch.float32
    x, w = torch.randn(1024, 64).to(dtype), torch.randn(64, 64).to(dtype)
    b, seed, g = torch.randn(64).to(dtype), torch.tensor([5, 6]), torch.randn(1024, 64).to(dtype)
    simulator = simulate(multiprocessors=4, stats=True, check=False)
    with simulator.running(), tf32(math == "tf32"):
        y = KERNELS.linear_relu(x, w, b, 0.3, seed)
        KERNELS.linear_relu_backward(g, x, w, y, 0.3, [True] * 3)
    layer, input_gradient, weight_gradient, merge = (r.stats for r in simulator.records)
    splits = simulator.records[2].grid[0]
    size, weights = x.numel() * x.element_size(), w.numel() * x.element_size()
    parameters = w.numel() + b.numel()
    assert splits == 4
    assert_traffic(layer, size + weights + 64 * x.element_size() + 16, size)
    assert_traffic(input_gradient, 2 * size + weights, size)
    assert_traffic(weight_gradient, 3 * size, splits * parameters * 4)
    assert_traffic(merge, splits * parameters * 4, parameters * x.element_size())
    for s in (layer, input_gradient, weight_gradient):
        assert ("mma" in s.instructions) == (math != "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_around_the_library(simulate: Callable[..., Simulator], dtype: torch.dtype) -> None:
    x, w = torch.randn(1100, 256).to(dtype), torch.randn(128, 256).to(dtype)
    g, seed = torch.randn(1100, 128).to(dtype), torch.tensor([5, 6])
    simulator = simulate(multiprocessors=4, stats=True, check=False)
    with simulator.running():
        y = KERNELS.linear_relu(x, w, None, 0.3, seed)
        KERNELS.linear_relu_backward(g, x, w, y, 0.3, [True] * 3)
    dropout, gate = (record.stats for record in simulator.records)
    size = y.numel() * y.element_size()
    assert_traffic(dropout, size + 16, size)
    assert_traffic(gate, 2 * size, size)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chips_without_tensor_cores_for_it(cuda_library: ctypes.CDLL, dtype: torch.dtype) -> None:
    simulator = Simulator(cuda_library, 75)
    with simulator.running():
        check_case(linear_case((100, 72), 40, p=0.3, dtype=dtype, device=CPU))
    suffix = "bf16_fma" if dtype == torch.bfloat16 else "f16_fma"
    assert simulator.records[0].kernel == f"fused_mlp_gemm_{suffix}"


def test_same_bits_in_any_block_order(simulate: Callable[..., Simulator]) -> None:
    x, w, g = torch.randn(700, 30), torch.randn(20, 30), torch.randn(700, 20)
    results = []
    for shuffle in (None, 1):
        with simulate(multiprocessors=4, shuffle=shuffle).running():
            y = KERNELS.linear_relu(x, w, None, 0.3, torch.tensor([5, 6]))
            gradients = KERNELS.linear_relu_backward(g, x, w, y, 0.3, [True] * 3)
        results.append((y, *gradients))
    assert all(map(torch.equal, *results))
