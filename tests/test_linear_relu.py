"""``linear_relu``: values and gradients against float64, dropout by an independent mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import (
    DTYPES,
    INTERPRETED,
    LAYOUTS,
    assert_as_accurate,
    assert_same_nonfinite,
    check_case,
    lay_out,
    linear_case,
    needs_memory,
    odd_triples,
)

from fused_mlp.functional import linear_relu

TRIPLES = [*odd_triples(), (1, 10, 64), (32, 10, 64), (7, 64, 32), (5, 1, 1), (1, 1, 300),
           (230, 300, 270)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "in_features", "out_features"), TRIPLES)
def test_odd_shapes(
    device: torch.device, dtype: torch.dtype, rows: int, in_features: int, out_features: int
) -> None:
    options = {"dtype": dtype, "device": device}
    check_case(linear_case((rows, in_features), out_features, **options))
    check_case(linear_case((rows, in_features), out_features, bias=False, p=0.4, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2000, 10, 64),
        (1000, 64, 64),
        (70, 700, 130),
        (513, 129, 1),
        (540, 1100, 70),
        (40, 1024, 330),
    ],
)
@pytest.mark.usefixtures("all_threads")
def test_larger(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, in_features, out_features = shape
    if INTERPRETED:
        rows = rows // 10 + 1
    check_case(linear_case((rows, in_features), out_features, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(("in_features", "out_features"), [(300, 70), (70, 300), (64, 64)])
def test_few_rows_through_many_weights(
    device: torch.device, dtype: torch.dtype, rows: int, in_features: int, out_features: int
) -> None:
    """They read each weight once, several threads at work."""
    for p in (0.0, 0.3):
        shape = (rows, in_features)
        check_case(linear_case(shape, out_features, p=p, dtype=dtype, device=device))


@pytest.mark.parametrize(
    "shape",
    [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6), (2, 3, 1, 2, 6), (0, 3, 6), (3, 0, 6), (4, 0), (0,)],
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_batch_shapes(device: torch.device, shape: tuple[int, ...], p: float) -> None:
    check_case(linear_case(shape, 5, p=p, device=device))


@pytest.mark.parametrize(
    "shape", [(0, 4, 3), (5, 0, 3), (5, 4, 0), (0, 0, 3), (5, 0, 0), (0, 0, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_empty(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, in_features, out_features = shape
    for p in (0.0, 0.5):
        check_case(linear_case((rows, in_features), out_features, p=p, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    case = linear_case((3, 11, 18), 13, p=0.2, dtype=dtype, device=device)
    x, weight, bias = case.tensors.values()
    grad = torch.randn(3, 11, 13, dtype=torch.float32).to(x)
    check_case(case, [lay_out(x, layout), weight, bias])
    check_case(case, [x, lay_out(weight, layout), bias])
    check_case(case, [x, weight, lay_out(bias, layout)])
    check_case(case, None, lay_out(grad, layout))
    check_case(case, [lay_out(t, layout) for t in (x, weight, bias)], lay_out(grad, layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0, 1e-6])
def test_dropout(device: torch.device, dtype: torch.dtype, p: float) -> None:
    """The mask is the one an independent Philox gives, in forward and in backward."""
    check_case(linear_case((65, 20), 33, p=p, dtype=dtype, device=device))


def test_large_offset(device: torch.device) -> None:
    case = linear_case((33, 40), 17, device=device)
    x, weight, bias = case.tensors.values()
    check_case(case, [1e4 + 1e-2 * x, weight - weight.mean(1, keepdim=True), bias])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["input", "weight", "bias"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_nonfinite(device: torch.device, place: str, value: float, p: float) -> None:
    """NaN and infinity reach the values torch's own operations let them reach, and no others."""
    case = linear_case((9, 11), 13, p=p, device=device)
    case.tensors[place].view(-1)[4] = value
    tensors = list(case.tensors.values())
    ours, torchs = case.fused(*tensors), case.plain(*tensors)
    assert_same_nonfinite(ours, torchs)
    assert_as_accurate(ours, torchs, case.exact(*(t.double() for t in tensors)))


def test_nan_gradient_stops_at_the_relu(device: torch.device) -> None:
    """A gradient that is not a number passes where the output is positive, and only there."""
    case = linear_case((9, 11), 13, device=device)
    x, weight, bias = (t.requires_grad_() for t in case.tensors.values())
    output = case.fused(x, weight, bias)
    grad = torch.where(output <= 0, float("nan"), 1.0).to(output)
    for result in torch.autograd.grad(output, (x, weight, bias), grad):
        assert result.isfinite().all()


def test_unit_at_its_kink(device: torch.device) -> None:
    """One unit of these 20800 is 0 up to rounding: no side of its kink is the wrong one."""
    if INTERPRETED:
        pytest.skip("takes minutes in Triton's interpreter")
    check_case(linear_case((13, 16, 100), 100, dtype=torch.float16, device=device))


def test_huge_values_in_half_precision(device: torch.device) -> None:
    """Sums beyond float16 overflow at the end, as torch's, not on the way."""
    x = torch.full((3, 64), 200.0, dtype=torch.float16, device=device)
    weight = torch.full((5, 64), 100.0, dtype=torch.float16, device=device)
    weight[:, 32:] = -100.0
    weight[0] = 100.0
    assert_same_nonfinite(linear_relu(x, weight), F.relu(F.linear(x, weight)))
    assert (linear_relu(x, weight)[:, 1:] == 0).all()


def test_without_training_no_dropout(device: torch.device) -> None:
    case = linear_case((33, 20), 17, device=device)
    tensors = list(case.tensors.values())
    assert torch.equal(linear_relu(*tensors, 0.5), linear_relu(*tensors))
    assert torch.equal(linear_relu(*tensors, 0.0, True), linear_relu(*tensors))
    assert not torch.equal(linear_relu(*tensors, 0.5, True), linear_relu(*tensors))


@given(
    batch=st.lists(st.integers(0, 9), max_size=3),
    in_features=st.integers(0, 40),
    out_features=st.integers(0, 40),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.25, 0.7]),
    dtype=st.sampled_from(DTYPES),
)
def test_properties(device: torch.device, batch, in_features, out_features, bias, p, dtype) -> None:
    check_case(
        linear_case((*batch, in_features), out_features, bias, p, dtype=dtype, device=device)
    )


OP = torch.ops.fused_mlp.linear_relu
SEED = torch.tensor([1, 2])
BAD = [
    (lambda x, w, b: linear_relu(None, w, b), TypeError, "input.*NoneType"),
    (lambda x, w, b: linear_relu(x, 3.0, b), TypeError, "weight.*float"),
    (lambda x, w, b: linear_relu(x, w, 1.0), TypeError, "bias.*float"),
    (lambda x, w, b: linear_relu(x.long(), w, b), RuntimeError, "input must be float32.*int64"),
    (
        lambda x, w, b: linear_relu(x[:, 1:], w, b),
        RuntimeError,
        r"input.*in_features = 3.*\(4, 2\)",
    ),
    (lambda x, w, b: linear_relu(x[0, 0], w, b), RuntimeError, "input must have shape"),
    (lambda x, w, b: linear_relu(x, w[0], b), RuntimeError, r"weight must have shape.*\(3,\)"),
    (lambda x, w, b: linear_relu(x, w[None], b), RuntimeError, "weight must have shape"),
    (
        lambda x, w, b: linear_relu(x, w, b[1:]),
        RuntimeError,
        r"bias must have shape \(5,\).*\(4,\)",
    ),
    (lambda x, w, b: linear_relu(x, w, b[:, None]), RuntimeError, "bias must have shape"),
    (
        lambda x, w, b: linear_relu(x, w.double(), b),
        RuntimeError,
        "weight must have the dtype of input",
    ),
    (
        lambda x, w, b: linear_relu(x, w, b.half()),
        RuntimeError,
        "bias must have the dtype of input",
    ),
    (
        lambda x, w, b: linear_relu(x.half(), w, b),
        RuntimeError,
        "weight must have the dtype of input",
    ),
    (lambda x, w, b: linear_relu(x, w.to("meta"), b), RuntimeError, "weight is on meta"),
    (lambda x, w, b: linear_relu(x, w, b.to("meta")), RuntimeError, "bias is on meta"),
    (
        lambda x, w, b: linear_relu(x, w, b, -0.1, True),
        ValueError,
        "dropout.*between 0 and 1.*-0.1",
    ),
    (lambda x, w, b: linear_relu(x, w, b, 1.5, True), ValueError, "dropout.*between 0 and 1.*1.5"),
    (lambda x, w, b: linear_relu(x, w, b, float("nan"), True), ValueError, "dropout.*nan"),
    (lambda x, w, b: linear_relu(x, w, b, -0.1), ValueError, "dropout.*between 0 and 1.*-0.1"),
    (lambda x, w, b: linear_relu(x, w, b, "0.1", True), TypeError, "dropout_p"),
    (
        lambda x, w, b: OP(x, w, b, 0.1, SEED.int().to(x.device)),
        RuntimeError,
        "seed must be.*int32",
    ),
    (
        lambda x, w, b: OP(x, w, b, 0.1, SEED[:1].to(x.device)),
        RuntimeError,
        r"seed must be.*\(1,\)",
    ),
    (lambda x, w, b: OP(x, w, b, 0.1, SEED.to("meta")), RuntimeError, "seed must be.*meta"),
    (
        lambda x, w, b: linear_relu(x.to_sparse(), w, b),
        RuntimeError,
        "input must be a dense tensor",
    ),
    (lambda x, w, b: linear_relu(x, w.to_sparse(), b), RuntimeError, "[Ss]parse"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(device: torch.device, call, error, message: str) -> None:
    x, weight, bias = (torch.randn(s, device=device) for s in ((4, 3), (5, 3), (5,)))
    with pytest.raises(error, match=message):
        call(x, weight, bias)


@pytest.mark.slow
@pytest.mark.huge
@pytest.mark.usefixtures("all_threads")
def test_more_than_2_31_outputs(device: torch.device, backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain PyTorch makes copies of everything")
    needs_memory(device, 14)
    rows, out_features = 2**25 + 3, 64
    weight = torch.randn(out_features, 2, device=device).half().requires_grad_()
    x = torch.randn(rows, 2, device=device).half().requires_grad_()
    seed = torch.tensor([3, 4], device=device)
    output = OP(x, weight, None, 0.5, seed)
    (grad,) = torch.autograd.grad(output.sum(), x)
    for start in (0, 2**24 + 1, rows - 1000):
        # The whole mask of these rows would need the rows before; without it: zero or doubled.
        part = slice(start, start + 1000)
        plain = 2 * F.relu(F.linear(x.detach()[part].float(), weight.detach().float()))
        ours = output.detach()[part].float()
        torch.testing.assert_close(ours, torch.where(ours == 0, 0.0, plain), atol=1e-2, rtol=2e-3)
        assert 0.45 < (ours[plain > 0.1] > 0).float().mean() < 0.55
        expected = 2 * (ours > 0).float() @ weight.detach().float()
        torch.testing.assert_close(grad[part].float(), expected, atol=5e-2, rtol=5e-3)


@pytest.mark.slow
@pytest.mark.huge
@pytest.mark.usefixtures("all_threads")
def test_more_than_2_31_inputs(device: torch.device, backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain PyTorch makes copies of everything")
    needs_memory(device, 9)
    rows, in_features = 2**25 + 3, 64
    weight = torch.randn(2, in_features, device=device).half().requires_grad_()
    x = torch.randn(1, in_features, device=device).half().repeat(rows, 1)
    x[-1] *= -1
    output = linear_relu(x, weight)
    expected = F.relu(F.linear(x[[0, rows // 2, -1]].float(), weight.float()))
    torch.testing.assert_close(output[[0, rows // 2, -1]].float(), expected, atol=1e-2, rtol=2e-3)
    grad = torch.zeros_like(output)
    grad[-1] = 1.0
    (grad_weight,) = torch.autograd.grad(output, weight, grad)
    torch.testing.assert_close(grad_weight, torch.where(output[-1:].t() > 0, x[-1:], 0.0).half())


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_kinds_of_tensors_seen_before_are_still_checked(device, has_bias, requires_grad) -> None:
    x, weight = torch.randn(6, 3, device=device), torch.randn(4, 3, device=device)
    bias = torch.randn(4, device=device) if has_bias else None
    weight.requires_grad_(requires_grad)

    def eager(x: torch.Tensor) -> torch.Tensor:
        return F.relu(F.linear(x, weight, bias))

    def fused(x: torch.Tensor) -> torch.Tensor:
        return linear_relu(x, weight, bias)

    for _ in range(2):
        torch.testing.assert_close(fused(x), eager(x))
        torch.testing.assert_close(fused(x[:0]), eager(x[:0]))
        torch.testing.assert_close(torch.func.vmap(fused)(x), eager(x))
        torch.testing.assert_close(
            torch.func.jvp(fused, (x,), (x,)), torch.func.jvp(eager, (x,), (x,))
        )
        with pytest.raises(RuntimeError, match="in_features"):
            fused(x[:, :2])
        with pytest.raises(RuntimeError, match="bias must have shape"):
            linear_relu(x, weight, torch.randn(5, device=device))
        with pytest.raises(RuntimeError, match="must have the dtype of input"):
            fused(x.double())
        with pytest.raises(ValueError, match="between 0 and 1"):
            linear_relu(x, weight, bias, 1.5, training=True)
        with pytest.raises(TypeError, match="must be Tensor"):
            linear_relu(x, None, bias)
