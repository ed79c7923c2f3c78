"""batch_norm_act in CUDA C++, executed in ptxsim."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cuda_fixtures import CPU, cuda_library, each_gpu, gpu, simulate  # noqa: F401
from cuda_simulator import Simulator
from support import DTYPES, assert_same_nonfinite, batch_norm_case, check_case, lay_out
from support.traffic import assert_standardization_traffic

from fused_mlp import activations

KERNELS = torch.ops.fused_mlp_kernels
SLOW = pytest.mark.slow
NAMES = ("none", "relu", "leaky_relu")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, *(pytest.param(d, marks=SLOW) for d in DTYPES[1::2])]
)
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients(
    gpu: Simulator, dtype: torch.dtype, activation: str, training: bool
) -> None:
    """Both layouts, whole packs and single elements, groups of the mask cut anywhere."""
    for shape in ((50, 24), (37, 5), (6, 5, 9), (3, 4, 40)):
        for p in (0.0, 0.4):
            options = {"activation": activation, "p": p, "dtype": dtype, "device": CPU}
            check_case(batch_norm_case(shape, training, **options))


def test_special_cases_keep_their_kernels(gpu: Simulator) -> None:
    """LeakyReLU and no activation without dropout are those of batch_norm_leaky_relu."""
    x = torch.randn(20, 8)
    for activation, p, kernel in (
        (activations.LEAKY_RELU, 0.0, "fused_mlp_columns_forward_f32"),
        (activations.NONE, 0.0, "fused_mlp_columns_forward_f32"),
        (activations.RELU, 0.0, "fused_mlp_columns_act_forward_f32"),
        (activations.NONE, 0.1, "fused_mlp_columns_act_forward_f32"),
    ):
        options = (activation, 0.1, p, torch.tensor([5, 6]))
        KERNELS.batch_norm_act(x, None, None, None, None, None, True, 0.1, 1e-5, *options)
        assert gpu.records.pop().kernel == kernel


@pytest.mark.parametrize("shape", [(2511, 12), (2511, 13), (60, 3, 301)])
def test_large_is_cut_into_chunks(
    simulate: Callable[..., Simulator], shape: tuple[int, ...]
) -> None:
    simulator = simulate(multiprocessors=5)
    with simulator.running():
        check_case(batch_norm_case(shape, True, activation="relu", p=0.3, device=CPU))
    assert len(simulator.records) == 4
    assert max(record.grid[0] for record in simulator.records) > 1


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_parameters(gpu: Simulator, affine: str, training: bool) -> None:
    """Any of them missing; all of them float32 beside bfloat16."""
    options = {"activation": "relu", "p": 0.3, "device": CPU}
    check_case(batch_norm_case((40, 6), training, affine, **options))
    options |= {"dtype": torch.bfloat16, "parameter_dtype": torch.float32}
    check_case(batch_norm_case((50, 24), training, affine, **options))


@pytest.mark.parametrize("layout", ["transposed", "columns", "gap", "steps", "offset", "expanded"])
@pytest.mark.parametrize("shape", [(29, 20), (5, 4, 21)])
def test_layouts(gpu: Simulator, shape: tuple[int, ...], layout: str) -> None:
    """The mask belongs to the logical element, whatever the strides."""
    case = batch_norm_case(shape, True, activation="relu", p=0.3, device=CPU)
    x, *parameters = case.tensors.values()
    if layout != "expanded":  # equal rows have no deviation
        check_case(case, [lay_out(x, layout), *parameters])
    check_case(case, None, lay_out(torch.randn(shape), layout))


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("shape", [(6, 4, 9), (16, 8, 24)])
def test_dimensions_in_any_order(
    gpu: Simulator, shape: tuple[int, ...], order: tuple[int, ...]
) -> None:
    case = batch_norm_case(shape, True, activation="leaky_relu", p=0.3, device=CPU)
    x, *parameters = case.tensors.values()
    inverse = [order.index(d) for d in range(3)]
    permuted = x.permute(order).contiguous().permute(inverse)
    assert permuted.stride() != x.stride()
    check_case(case, [permuted, *parameters])


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("activation", NAMES)
def test_infinite_coefficients(gpu: Simulator, activation: str, p: float) -> None:
    """ReLU of minus infinity is 0, LeakyReLU's slope times it is not."""
    case = batch_norm_case((9, 4), True, negative_slope=0.0, activation=activation, p=p, device=CPU)
    case.tensors["bias"][1] = float("inf")
    case.tensors["bias"][2] = float("-inf")
    case.tensors["input"][3, 3] = float("nan")
    tensors = [*case.tensors.values()]
    assert_same_nonfinite(case.fused(*tensors), case.plain(*tensors))


def test_nan_gradient_stops_at_the_relu(gpu: Simulator) -> None:
    case = batch_norm_case((9, 4), False, activation="relu", device=CPU)
    tensors = [t.requires_grad_() for t in case.tensors.values()]
    output = case.fused(*tensors)
    grad = torch.where(output <= 0, float("nan"), 1.0).to(output)
    for result in torch.autograd.grad(output, tensors, grad):
        assert result.isfinite().all()


def test_all_or_nothing(gpu: Simulator) -> None:
    """Probabilities that drop everything, and so little that nothing is dropped but all scaled."""
    for p in (1.0, 1e-6):
        check_case(batch_norm_case((20, 8), True, activation="none", p=p, device=CPU))


def test_empty(gpu: Simulator) -> None:
    x, vector, seed = torch.empty(0, 3), torch.ones(3), torch.tensor([5, 6])
    options = (activations.RELU, 0.0, 0.3, seed)
    output, mean, rstd = KERNELS.batch_norm_act(
        x, None, None, None, vector, vector, True, 0.1, 1e-5, *options
    )
    gradients = KERNELS.batch_norm_act_backward(
        output, x, vector, vector, mean, rstd, True, *options, [True] * 3
    )
    assert [g.shape for g in gradients] == [(0, 3), (3,), (3,)] and not gradients[1].any()
    assert not gpu.records


def test_same_bits_in_any_block_order(simulate: Callable[..., Simulator]) -> None:
    x, g, options = (
        torch.randn(2500, 12),
        torch.randn(2500, 12),
        (1, 0.0, 0.3, torch.tensor([5, 6])),
    )
    results = []
    for shuffle in (None, 1, 2):
        with simulate(multiprocessors=3, shuffle=shuffle).running():
            y, mean, rstd = KERNELS.batch_norm_act(
                x, None, None, None, None, None, True, 0.1, 1e-5, *options
            )
            (dx,) = KERNELS.batch_norm_act_backward(
                g, x, None, None, mean, rstd, True, *options, [True, False, False]
            )
        results.append((y, mean, rstd, dx))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "launches"), [((4096, 16), 2), ((512, 64), 1)])
def test_traffic(
    simulate: Callable[..., Simulator], shape: tuple[int, int], launches: int, dtype: torch.dtype
) -> None:
    """What batch_norm_leaky_relu's kernels move: no mask is stored or read."""
    x, g, w = (torch.randn(s).to(dtype) for s in (shape, shape, shape[1:]))
    options = (activations.RELU, 0.0, 0.3, torch.tensor([5, 6]))
    simulator = simulate(multiprocessors=4, stats=True)
    with simulator.running():
        _, mean, rstd = KERNELS.batch_norm_act(x, None, None, None, w, w, True, 0.1, 1e-5, *options)
        KERNELS.batch_norm_act_backward(g, x, w, w, mean, rstd, True, *options, [True] * 3)
    size, statistics = x.numel() * x.element_size(), 2 * mean.numel() * 4
    stats = [record.stats for record in simulator.records]
    assert_standardization_traffic(stats, launches, size, statistics)


def test_refuses_an_unknown_activation(gpu: Simulator) -> None:
    with pytest.raises(RuntimeError, match="activation"):
        KERNELS.batch_norm_act(
            torch.randn(4, 3), None, None, None, None, None, True, 0.1, 1e-5,
            activations.GELU, 0.0, 0.0, None,
        )  # fmt: skip
