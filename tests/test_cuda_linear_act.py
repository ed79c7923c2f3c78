"""linear_act and linear_batch_norm_act in CUDA C++, executed in ptxsim."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

import pytest
import torch
from cuda_fixtures import CPU, cuda_library, each_gpu, gpu, simulate, tf32  # noqa: F401
from cuda_simulator import Simulator
from support import (
    ACTIVATIONS,
    DTYPES,
    act_case,
    assert_as_accurate,
    check_case,
    check_special_values,
    keep_mask,
    lay_out,
    linear_case,
)
from support.traffic import assert_traffic

from fused_mlp import activations

KERNELS = torch.ops.fused_mlp_kernels
# Two dtypes and three activations go through all code that a kernel has; the others take minutes.
_FAST = (torch.float32, torch.bfloat16, "none", "gelu", "tanh")


def slow_unless_fast(values: Iterable[object]) -> list:
    return [pytest.param(v, marks=() if v in _FAST else pytest.mark.slow) for v in values]


# Without those that only another number tells apart.
DISTINCT = ("none", "leaky_relu", "leaky_relu, slope below 0", "gelu", "gelu, tanh", "silu", "tanh")


@pytest.mark.parametrize("dtype", slow_unless_fast(DTYPES))
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_values_and_gradients(gpu: Simulator, dtype: torch.dtype, kind: str) -> None:
    """Whole packs and single elements, with and without dropout and bias."""
    options = {"dtype": dtype, "device": CPU}
    check_case(act_case(kind, (70, 24), 72, p=0.3, **options))
    check_case(act_case(kind, (33, 19), 21, bias=False, **options))
    if kind != "relu":  # which linear_relu's kernels serve
        assert {r.kernel.rsplit("_", 1)[0] for r in gpu.records[:3]} == {"fused_mlp_gemm_act"}


@pytest.mark.parametrize("dtype", slow_unless_fast(DTYPES))
@pytest.mark.parametrize("kind", slow_unless_fast(DISTINCT))
def test_large_goes_to_the_library(gpu: Simulator, dtype: torch.dtype, kind: str) -> None:
    """Our kernels do only what is element-wise: a launch forward, one for the gate."""
    check_case(act_case(kind, (70, 4096), 130, p=0.3, dtype=dtype, device=CPU))
    assert [r.kernel.rsplit("_", 1)[0] for r in gpu.records] == ["fused_mlp_act_elements"] * 2
    gpu.records.clear()
    check_case(act_case(kind, (70, 2048), 136, bias=False, dtype=dtype, device=CPU))
    launches = 1 if kind == "none" else 2  # nothing stands behind the library's product
    assert len(gpu.records) == launches


@pytest.mark.parametrize("kind", ["none", "gelu", "tanh"])
@pytest.mark.parametrize("layout", ["transposed", "columns", "gap", "steps", "offset", "expanded"])
def test_layouts(gpu: Simulator, layout: str, kind: str) -> None:
    case = act_case(kind, (23, 20), 12, p=0.2, device=CPU)
    x, weight, bias = case.tensors.values()
    check_case(case, [lay_out(x, layout), weight, bias])
    check_case(case, [x, lay_out(weight, layout), lay_out(bias, layout)])
    check_case(case, None, lay_out(torch.randn(23, 12), layout))


@pytest.mark.parametrize("kind", ["none", "leaky_relu", "silu", "tanh"])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_batch_shapes(gpu: Simulator, kind: str, p: float) -> None:
    for shape in ((6,), (2, 1, 3, 6), (0, 3, 6), (3, 0, 6), (4, 0), (0,)):
        check_case(act_case(kind, shape, 5, p=p, device=CPU))
    check_case(act_case(kind, (5, 4), 0, p=p, device=CPU))


@pytest.mark.parametrize("dtype", slow_unless_fast(DTYPES))
@pytest.mark.parametrize("kind", slow_unless_fast(DISTINCT))
def test_special_values(gpu: Simulator, dtype: torch.dtype, kind: str) -> None:
    check_special_values(kind, dtype, CPU)


@pytest.mark.parametrize("kind", ["gelu", "gelu, tanh", "silu", "tanh"])
def test_the_whole_range(gpu: Simulator, kind: str) -> None:
    """A value alone, from tiny to where the activation is flat, errs no more than torch's."""
    x = torch.cat([torch.linspace(-12, 12, 201), torch.logspace(-30, 1, 30)])
    x = torch.cat([x, -x])[:, None]
    case = act_case(kind, (1, 1), 1, bias=False, device=CPU)
    results = []
    for function, dtype in (
        (case.fused, torch.float32), (case.plain, torch.float32), (case.exact, torch.float64)
    ):  # fmt: skip
        leaf = x.to(dtype).requires_grad_()
        output = function(leaf, torch.ones(1, 1, dtype=dtype))
        results.append((output, *torch.autograd.grad(output, leaf, torch.ones_like(output))))
    parts = {"all": x.abs() >= 0, "tiny": x.abs() < 1e-3, "flat": x < -6}
    for part, where in parts.items():
        for what, ours, torchs, exact in zip(("output", "gradient"), *results, strict=True):
            selected = (t.detach()[where] for t in (ours, torchs, exact))
            assert_as_accurate(*selected, f"{kind}, {part}: {what}")


def test_tf32(each_gpu: Simulator) -> None:
    case = act_case("silu", (100, 72), 40, p=0.3, device=CPU)
    tensors = [*case.tensors.values()]
    exact = case.exact(*(t.double() for t in tensors))
    with tf32():
        result = case.fused(*tensors)
    assert each_gpu.records[0].kernel == "fused_mlp_gemm_act_tf32"
    error = (result - exact).norm() / exact.norm()
    assert 1e-6 < error < 1e-3  # rounded to 11 bits, and indeed rounded


@pytest.mark.parametrize("kind", ["none", "relu", "leaky_relu", "gelu", "tanh"])
@pytest.mark.parametrize(("rows", "in_features"), [(37, 128), (70, 4096)])
def test_keeps_what_the_activation_saw(
    gpu: Simulator, rows: int, in_features: int, kind: str
) -> None:
    """On request of any activation, by our product and around the library's."""
    x, weight, bias = (
        torch.randn(rows, in_features),
        torch.randn(128, in_features),
        torch.randn(128),
    )
    number = activations.number("linear_act", kind)
    seed = torch.tensor([5, 6])
    output, seen = KERNELS.linear_act(x, weight, bias, number, 0.2, 0.3, seed, True)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
    keep = keep_mask(seed, rows, 128, 0.3) / 0.7
    expected = activations.TABLE[number].value(expected, 0.2) * keep
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert ("elements" in gpu.records[0].kernel) == (in_features > 1000)


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("dtype", slow_unless_fast(DTYPES))
@pytest.mark.parametrize(
    ("rows", "in_features", "channels"), [(37, 19, 21), (70, 24, 72), (70, 4096, 130)]
)
def test_evaluated_batch_norm(
    gpu: Simulator, rows: int, in_features: int, channels: int, dtype: torch.dtype, activation: str
) -> None:
    """By our product and around the library's, in the dtype and with float32 statistics."""
    case = linear_case((rows, in_features), channels, dtype=dtype, device=CPU)
    x, weight, bias = case.tensors.values()
    for parameter_dtype in {dtype, dtype if dtype == torch.float64 else torch.float32}:
        norm = [
            torch.randn(channels) * 0.5,
            torch.rand(channels) + 0.5,
            torch.randn(channels),
            torch.randn(channels),
        ]
        norm = [t.to(parameter_dtype) for t in norm]
        for p, given in ((0.0, (bias, *norm)), (0.3, (None, *norm[:2], None, None))):
            seed = torch.tensor([5, 6]) if p else None
            keep = keep_mask(torch.tensor([5, 6]), rows, channels, p).double() / (1 - p)

            def plain(as_type: torch.dtype, given=given, keep=keep) -> torch.Tensor:
                b, mean, var, gamma, beta = (t if t is None else t.to(as_type) for t in given)
                z = torch.nn.functional.linear(x.to(as_type), weight.to(as_type), b)
                u = torch.nn.functional.batch_norm(z, mean, var, gamma, beta, False, 0.0, 1e-5)
                number = activations.number("linear_act", activation)
                return activations.TABLE[number].value(u, 0.2) * keep.to(as_type)

            result = torch.ops.fused_mlp.linear_batch_norm_act(
                x, weight, *given, 1e-5, activation, negative_slope=0.2, dropout_p=p, seed=seed
            )
            assert_as_accurate(result, plain(dtype), plain(torch.float64), roundings=3)
    assert {r.kernel.rsplit("_", 1)[0] for r in gpu.records} == {
        "fused_mlp_act_elements" if in_features > 1000 else "fused_mlp_gemm_act"
    }


@pytest.mark.parametrize("math", ["float32", "bfloat16", "tf32"])
@pytest.mark.parametrize("kind", ["gelu", "tanh"])
def test_traffic(simulate: Callable[..., Simulator], math: str, kind: str) -> None:
    """What linear_relu's kernels move, and what GELU saw."""
    dtype = torch.bfloat16 if math == "bfloat16" else torch.float32
    x, w = torch.randn(1024, 64).to(dtype), torch.randn(64, 64).to(dtype)
    b, seed, g = torch.randn(64).to(dtype), torch.tensor([5, 6]), torch.randn(1024, 64).to(dtype)
    number, keeps = activations.number("linear_act", kind), kind == "gelu"
    simulator = simulate(multiprocessors=4, stats=True, check=False)
    with simulator.running(), tf32(math == "tf32"):
        outputs = KERNELS.linear_act(x, w, b, number, 0.0, 0.3, seed, keeps)
        KERNELS.linear_act_backward(g, x, w, outputs[-1], number, 0.0, 0.3, seed, [True] * 3)
    layer, input_gradient, weight_gradient, _ = (r.stats for r in simulator.records)
    size, weights = x.numel() * x.element_size(), w.numel() * x.element_size()
    assert_traffic(layer, size + weights + 64 * x.element_size() + 16, (1 + keeps) * size)
    assert_traffic(input_gradient, 2 * size + weights + 16, size)
    assert_traffic(weight_gradient, 3 * size + 16, 4 * (w.numel() + b.numel()) * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_traffic_around_the_library(
    simulate: Callable[..., Simulator], dtype: torch.dtype, bias: bool
) -> None:
    """The product is read once and written once; what GELU saw is the product itself."""
    x, w = torch.randn(1100, 256).to(dtype), torch.randn(128, 256).to(dtype)
    b, g, seed = torch.randn(128).to(dtype), torch.randn(1100, 128).to(dtype), torch.tensor([5, 6])
    gelu = activations.GELU
    simulator = simulate(multiprocessors=4, stats=True, check=False)
    with simulator.running():
        _, seen = KERNELS.linear_act(x, w, b if bias else None, gelu, 0.0, 0.3, seed, True)
        KERNELS.linear_act_backward(g, x, w, seen, gelu, 0.0, 0.3, seed, [True] * 3)
    forward, gate = (record.stats for record in simulator.records)
    size = seen.numel() * seen.element_size()
    assert_traffic(forward, size + 16, size)
    assert_traffic(gate, 2 * size + 16, size)


def test_same_bits_in_any_block_order(simulate: Callable[..., Simulator]) -> None:
    x, w, g = torch.randn(700, 30), torch.randn(20, 30), torch.randn(700, 20)
    results = []
    for shuffle in (None, 1):
        with simulate(multiprocessors=4, shuffle=shuffle).running():
            options = (activations.SILU, 0.0, 0.3, torch.tensor([5, 6]))
            y, seen = KERNELS.linear_act(x, w, None, *options, True)
            gradients = KERNELS.linear_act_backward(g, x, w, seen, *options, [True] * 3)
        results.append((y, seen, *gradients))
    assert all(map(torch.equal, *results))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chips_without_tensor_cores_for_it(cuda_library: ctypes.CDLL, dtype: torch.dtype) -> None:
    simulator = Simulator(cuda_library, 75)
    with simulator.running():
        check_case(act_case("gelu", (100, 72), 40, p=0.3, dtype=dtype, device=CPU))
    suffix = "bf16_fma" if dtype == torch.bfloat16 else "f16_fma"
    assert simulator.records[0].kernel == f"fused_mlp_gemm_act_{suffix}"


@pytest.mark.parametrize("number", [-1, 7, 2**40])
def test_refuses_an_unknown_activation(gpu: Simulator, number: int) -> None:
    x, w = torch.randn(4, 3), torch.randn(5, 3)
    with pytest.raises(RuntimeError, match="activation"):
        KERNELS.linear_act(x, w, None, number, 0.0, 0.0, None, False)
    with pytest.raises(RuntimeError, match="activation"):
        KERNELS.linear_act_backward(x @ w.T, x, w, None, number, 0.0, 0.0, None, [True] * 3)
    with pytest.raises(RuntimeError, match="needs what forward kept"):
        KERNELS.linear_act_backward(
            x @ w.T, x, w, None, activations.SILU, 0.0, 0.0, None, [True] * 3
        )
