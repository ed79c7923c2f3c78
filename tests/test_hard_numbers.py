"""Inputs at the ends of the range: the fused error stays under twice eager's, row by row.

The rows stand in support/hard.py; scripts/reliability.py measures them for docs/reliability.md.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import DTYPES, EXAMPLES, INTERPRETED, assert_same_nonfinite, check_case, example
from support.environment import needs_memory
from support.hard import HARD, applies, measure

from fused_mlp.functional import batch_norm_leaky_relu, linear_relu, normalize

ROWS = [
    (name, dtype)
    for name in HARD
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if applies(name, dtype)
]
ROUNDING = 0.5  # units in the last place that rounding a result costs, which eager may be spared
# Units in the last place that are let through where eager's result is no number.
UNITS = 4


@pytest.fixture
def on_cpu(device: torch.device, backend: str) -> torch.device:
    """The CPU's kernels, which take the whole range; on GPUs squares end with float32's."""
    if backend == "triton" or device.type == "cuda":
        pytest.skip("sums of squares are float32's there, as in torch's own kernels")
    if backend == "reference":
        pytest.skip("plain PyTorch")
    return device


@pytest.mark.parametrize(("name", "dtype"), ROWS)
def test_row(on_cpu: torch.device, name: str, dtype: torch.dtype) -> None:
    """Largest and mean error of output and gradient, in units in the last place."""
    for what, (eager, fused) in measure(name, dtype=dtype, device=on_cpu).items():
        finite = math.isfinite(eager.largest)
        assert fused.largest <= (2 * eager.largest + ROUNDING if finite else UNITS), (
            what,
            fused,
            eager,
        )
        assert fused.mean <= (2 * eager.mean if finite else UNITS / 4), (what, fused, eager)


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", EXAMPLES)
def test_one_value_that_is_no_number(
    device: torch.device, backend: str, name: str, value: float, place: int
) -> None:
    """In any tensor of any op, at its first and its last place: it spreads as in eager code."""
    names = example(name, dtype=torch.float32, device=device).tensors
    for tensor in names:
        if name.startswith("batch_norm") and tensor == "weight":
            continue  # torch folds it into the mean: see test_batch_norm_leaky_relu.py
        case = example(name, dtype=torch.float32, device=device)
        case.tensors[tensor].view(-1)[place] = value
        tensors = list(case.tensors.values())
        with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's GELU of infinity is NaN
            found = case.fused(*tensors)
            if "research_net" in name and tensor == "bn_weight":
                expected = case.exact(*(t.double() for t in tensors)).float()
            else:
                expected = case.plain(*tensors)
        assert_same_nonfinite(found, expected, f"{name}, {tensor}")


@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_zero_variance_in_evaluation(device: torch.device, eps: float) -> None:
    """A running variance of 0: large values with eps; infinities and NaN, as the formula, without.

    Torch folds mean and deviation into one factor and one summand on the CPU: NaN everywhere then.
    """
    x = torch.tensor([[0.5, 1.0, 1.5, 1.0]], device=device)
    mean, var = torch.ones(4, device=device), torch.zeros(4, device=device)
    ours = batch_norm_leaky_relu(x, mean, var, eps=eps)
    formula = F.leaky_relu((x - mean) / (var + eps).sqrt())
    torch.testing.assert_close(ours, formula, equal_nan=True)


def test_overflow_of_float16_in_dropout(device: torch.device) -> None:
    """What dropout's factor lifts over 65504 is infinite, as in torch; its gradient passes."""
    x = torch.full((64, 1), 60000.0, dtype=torch.float16, device=device, requires_grad=True)
    weight = torch.ones(8, 1, dtype=torch.float16, device=device)
    y = linear_relu(x, weight, None, 0.5, True)
    assert set(y.unique().tolist()) == {0.0, float("inf")}
    kept = (y > 0).sum(1, keepdim=True)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(grad, 2.0 * kept.half())


def test_underflow_at_the_gate(device: torch.device) -> None:
    """A positive value that rounds to 0 in float16 passes no gradient: eager rounds it as well."""
    x = torch.tensor([[1e-4], [1.0]], dtype=torch.float16, device=device)
    weight = torch.full((1, 1), 1e-4, dtype=torch.float16, device=device)
    results = []
    for function in (linear_relu, lambda x, w: F.relu(F.linear(x, w))):
        leaf = x.clone().requires_grad_()
        y = function(leaf, weight)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        results.append((y.detach(), grad))
    assert results[0][0][0] == 0
    assert results[0][1][0] == 0
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_and_two_rows(device: torch.device, dtype: torch.dtype) -> None:
    from support import linear_case, research_case

    for rows in (1, 2):
        check_case(linear_case((rows, 33), 17, dtype=dtype, device=device))
        check_case(research_case(rows, (10, 64, 32, 5), False, dtype=dtype, device=device))


@pytest.mark.slow
@pytest.mark.huge
@pytest.mark.usefixtures("all_threads")
def test_ten_million_rows(device: torch.device, backend: str) -> None:
    """Statistics of 10^7 rows far from zero keep their digits: no sum grows without end."""
    if backend == "reference":
        pytest.skip("plain PyTorch")
    needs_memory(device, 3)
    rows = 10_000_000
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(rows, 3, generator=generator) * 1e-2 + 1e4).to(device)
    exact = x.double()
    mean, std = exact.mean(0), exact.std(0)
    del exact
    running_mean, running_var = torch.zeros(3, device=device), torch.ones(3, device=device)
    y = batch_norm_leaky_relu(
        x, running_mean, running_var, training=True, momentum=1.0, eps=1e-12, negative_slope=1.0
    )
    torch.testing.assert_close(running_mean, mean.float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(running_var.sqrt(), std.float(), rtol=1e-6, atol=0)
    eager = F.batch_norm(x, None, None, training=True, eps=1e-12)
    z = normalize(x, 0)
    for start in (0, rows // 2, rows - 1000):
        part = slice(start, start + 1000)
        want = (x[part].double() - mean) / std
        allowed = 2 * (eager[part].double() - want).abs().max() + 1e-6
        assert (y[part].double() - want).abs().max() < allowed
        assert (z[part].double() - want).abs().max() < allowed


@pytest.mark.slow
@pytest.mark.huge
@pytest.mark.usefixtures("all_threads")
def test_elements_beyond_2_31(device: torch.device, backend: str) -> None:
    """2^31 + 7 elements in one dimension, a number that no block divides.

    The ops' own files go beyond 2^31 in rows and columns.
    """
    if backend == "reference":
        pytest.skip("plain PyTorch makes float32 copies of everything")
    if INTERPRETED:
        pytest.skip("Triton's interpreter would take hours")
    needs_memory(device, 10)
    count = 2**31 + 7
    x = torch.zeros(count, dtype=torch.float16, device=device)
    x[1::2] = 1.0
    x[-7:] = 1.0
    y = normalize(x)
    ends = [torch.cat([y[:1000], y[-1007:]]), torch.cat([x[:1000], x[-1007:]])]
    torch.testing.assert_close(ends[0], 2 * ends[1] - 1, atol=1e-3, rtol=0)
    del x, ends
    for start in range(0, count, 2**28):  # every value is one of the two
        part = y[start : start + 2**28]
        assert (part.abs() - 1).abs().max() < 1e-3
