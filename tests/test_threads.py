"""The same bits for any number of threads and on every run, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import (
    DTYPES,
    INTERPRETED,
    MULTIPLIES_BFLOAT16,
    Case,
    batch_norm_case,
    linear_case,
    normalize_case,
    research_case,
)

from fused_mlp import on_chip

# Large enough that every op has work for four threads, and no multiple of any tile.
ROWS = 67 if INTERPRETED else 6007
CASES: dict[str, Callable[..., Case]] = {
    "normalize": lambda **o: normalize_case((ROWS, 33), **o),
    "normalize-columns": lambda **o: normalize_case((ROWS, 33), (0,), **o),
    "normalize-rows": lambda **o: normalize_case((ROWS, 33), (1,), **o),
    "normalize-few-long": lambda **o: normalize_case((3, ROWS * 5), (1,), **o),
    "linear_relu": lambda **o: linear_case((ROWS, 33), 65, p=0.3, **o),
    "linear_relu-wide": lambda **o: linear_case((ROWS // 4, 256), 256, p=0.3, **o),
    "linear_relu-beyond": lambda **o: linear_case((ROWS // 4, 300), 270, p=0.3, **o),
    "linear_relu-narrow": lambda **o: linear_case((ROWS, 65), 1, **o),
    "linear_act-gelu": lambda **o: linear_case((ROWS, 33), 65, p=0.3, activation="gelu", **o),
    "linear_act-beyond": lambda **o: linear_case((ROWS // 4, 300), 270, activation="tanh", **o),
    "batch_norm_act-train": lambda **o: batch_norm_case(
        (ROWS, 33), True, activation="relu", p=0.3, **o
    ),
    "batch_norm-train": lambda **o: batch_norm_case((ROWS, 33), True, **o),
    "batch_norm-eval": lambda **o: batch_norm_case((ROWS, 33), False, **o),
    "batch_norm-3d": lambda **o: batch_norm_case((ROWS // 30, 33, 29), True, **o),
    "batch_norm-few-rows": lambda **o: batch_norm_case((3, ROWS), True, **o),
    "research_net-train": lambda **o: research_case(ROWS, (10, 64, 32, 5), True, 0.3, **o),
    "research_net-deep": lambda **o: research_case(ROWS, (33, 40, 30, 20, 5), True, 0.3, **o),
    "research_net-wide": lambda **o: research_case(ROWS // 4, (40, 270, 300, 9), True, 0.3, **o),
    "research_net-few-rows": lambda **o: research_case(3, (ROWS // 8, 700, 500, 9), False, **o),
    "research_net-eval": lambda **o: research_case(ROWS, (10, 64, 32, 5), False, **o),
}


# In half precision the library's product where the processor has no instructions for it.
LIBRARYS = (
    "linear_act-beyond", "linear_relu-beyond", "research_net-wide", "research_net-few-rows",
)  # fmt: skip


def results(case: Case) -> tuple[torch.Tensor, ...]:
    """Return output and gradients."""
    tensors = [t.detach().requires_grad_() for t in case.tensors.values()]
    output = case.fused(*tensors)
    grad = torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output)
    return output.detach(), *torch.autograd.grad(output, tensors, grad)


def assert_same_bits(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> None:
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        different = int((a != b).sum())
        assert torch.equal(a, b), f"{different} of {a.numel()} elements differ in result {index}"


@pytest.fixture
def own_kernels(backend: str, device: torch.device) -> str:
    """The backend, unless it is the reference, whose bits are torch's affair."""
    if backend == "reference":
        pytest.skip("torch's own matrix products may change with the number of threads")
    return backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_threads(device: torch.device, own_kernels: str, name: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and name in LIBRARYS and not MULTIPLIES_BFLOAT16:
        pytest.skip("wide products in half precision are torch's where its instructions lack")
    if dtype == torch.float32 and name in LIBRARYS and own_kernels == "native":
        if device.type == "cpu" and on_chip.runs_blas():
            pytest.skip("torch's BLAS serves wide layers here: see test_blas.py")
    case = CASES[name](dtype=dtype, device=device)
    torch.set_num_threads(1)
    one = results(case)
    for threads in (2, 3, 4) if device.type == "cpu" else (2,):
        torch.set_num_threads(threads)
        assert_same_bits(one, results(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("all_threads")
def test_runs(device: torch.device, own_kernels: str, name: str, dtype: torch.dtype) -> None:
    case = CASES[name](dtype=dtype, device=device)
    first = results(case)
    for _ in range(1 if INTERPRETED else 2):
        assert_same_bits(first, results(case))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_running_statistics(device: torch.device, own_kernels: str, threads: int) -> None:
    x = torch.randn(ROWS, 33, generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for count in (threads, 1):
        torch.set_num_threads(count)
        mean, var = torch.zeros(33, device=device), torch.ones(33, device=device)
        torch.ops.fused_mlp.batch_norm_leaky_relu(x, mean, var, training=True)
        found.append((mean, var))
    assert_same_bits(*found)


@pytest.mark.usefixtures("all_threads")
def test_python_threads(device: torch.device, own_kernels: str) -> None:
    """Several Python threads may call the ops at once."""
    from concurrent.futures import ThreadPoolExecutor

    cases = [make(device=device) for make in CASES.values()]
    expected = [results(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(results, cases * 2), expected * 2, strict=True):
            assert_same_bits(got, want)
