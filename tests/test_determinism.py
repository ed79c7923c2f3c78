"""One row gives the same bits alone and in a batch; deterministic algorithms change nothing.

Threads and runs: test_threads.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from support import INTERPRETED, example
from support.cases import DTYPES, EXAMPLES
from torch import Tensor

from fused_mlp import FusedResearchNet, on_chip
from fused_mlp.functional import batch_norm_act, batch_norm_leaky_relu, linear_act, normalize

ROWS = 20 if INTERPRETED else 260
# About the edges of the kernels' blocks, each taken as the size of a batch.
BATCHES = (1, 2, 5, 17) if INTERPRETED else (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64, 113, 128)
NETWORKS = ((10, [64, 32], 5), (20, [30], 3), (33, [40, 30, 20], 1), (128, [256, 256], 10))
WIDE_NETWORKS = ((784, [512, 256], 10), (300, [100, 40, 20], 1))
# In half precision torch's own product serves the wide ones, and in any without FMA
# (needs_own_product): its order of sums is its own.
BY_DTYPE = [(n, d) for n in NETWORKS for d in DTYPES]
BY_DTYPE += [(n, d) for n in WIDE_NETWORKS for d in (torch.float32, torch.float64)]


@pytest.fixture(autouse=True)
def _own_kernels(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the order of sums of torch's own matrix products is torch's affair")


def needs_own_product(
    device: torch.device, backend: str, widest: int, *, layer: bool = False
) -> None:
    """Skip where torch's own product serves a network, or a single layer, as wide as that."""
    if INTERPRETED and widest > 65:
        pytest.skip("takes minutes in Triton's interpreter")
    if widest >= on_chip.CPU_CACHE_WIDTH and device.type == "cpu" and backend == "native":
        if widest > on_chip.CPU_CACHE_WIDTH and not on_chip.runs_wide():
            pytest.skip("without FMA torch's own product serves wide layers")
        if layer and on_chip.runs_blas():
            pytest.skip("torch's BLAS serves this many rows here: see test_blas.py")


def assert_rows_are_independent(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Assert that any split of ``x`` gives the bits of the whole."""
    whole = function(x)
    for size in BATCHES:
        parts = torch.cat([function(part) for part in x.split(size)])
        different = (parts != whole).any(-1).nonzero().flatten().tolist()
        assert not different, f"rows {different[:9]} differ in batches of {size}"


@pytest.mark.parametrize(("widths", "dtype"), BY_DTYPE)
@pytest.mark.parametrize("grad", [False, True])
def test_network(
    device: torch.device, backend: str, widths, dtype: torch.dtype, grad: bool
) -> None:
    needs_own_product(device, backend, max(widths[0], *widths[1]))
    net = FusedResearchNet(*widths, device=device, dtype=dtype).eval()
    norm = next(m for m in net.research_layers if isinstance(m, torch.nn.BatchNorm1d))
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(ROWS, widths[0], device=device, dtype=dtype)
    with torch.set_grad_enabled(grad):
        assert_rows_are_independent(net, x)


LAYERS = [(sizes, d) for sizes in ((10, 64), (65, 33), (256, 256)) for d in DTYPES]
WIDE_LAYERS = ((300, 270), (1100, 40))  # sums in one block of terms, and in two
LAYERS += [(sizes, d) for sizes in WIDE_LAYERS for d in (torch.float32, torch.float64)]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(("sizes", "dtype"), LAYERS)
def test_linear_act(
    device: torch.device, backend: str, sizes: tuple[int, int], dtype: torch.dtype, activation: str
) -> None:
    needs_own_product(device, backend, max(sizes), layer=True)
    features, out = sizes
    weight = torch.randn(out, features, device=device).to(dtype) / features**0.5
    bias = torch.randn(out, device=device).to(dtype)
    x = torch.randn(ROWS, features, device=device).to(dtype)
    assert_rows_are_independent(lambda x: linear_act(x, weight, bias, activation), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm_and_rows_of_normalize(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(ROWS, 33, device=device).to(dtype)
    mean, var = torch.randn(33, device=device).to(dtype), torch.rand(33, device=device).to(dtype)
    assert_rows_are_independent(lambda x: batch_norm_leaky_relu(x, mean, var), x)
    assert_rows_are_independent(lambda x: batch_norm_act(x, mean, var, activation="relu"), x)
    assert_rows_are_independent(lambda x: normalize(x, 1), x)


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.usefixtures("_deterministic")
def test_deterministic_algorithms(device: torch.device, name: str) -> None:
    """Nothing is refused, and memory that torch fills with NaN in this mode shows in no result."""
    case = example(name, dtype=torch.float32, device=device)

    def results() -> tuple[Tensor, ...]:
        tensors = [t.detach().clone().requires_grad_() for t in case.tensors.values()]
        output = case.fused(*tensors)
        return output.detach(), *torch.autograd.grad(output.square().sum(), tensors)

    filled = results()
    torch.use_deterministic_algorithms(False)
    for with_filling, without in zip(filled, results(), strict=True):
        assert with_filling.isfinite().all()
        assert torch.equal(with_filling, without)
