"""``normalize``: values and gradients against float64, shapes, strides, special values."""

from __future__ import annotations

import warnings

import pytest
import torch
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
    needs_memory,
    normalize_case,
    odd_sizes,
)

import fused_mlp
from fused_mlp.functional import normalize

pytestmark = pytest.mark.filterwarnings("ignore:.*degrees of freedom")


def eager(x: torch.Tensor, dim=None, correction: float = 1, eps: float = 0.0) -> torch.Tensor:
    dims = tuple(range(x.dim())) if dim is None else dim
    mean = x.mean(dims, keepdim=True)
    return (x - mean) / (x.std(dims, correction=correction, keepdim=True) + eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", odd_sizes())
def test_whole_tensor(device: torch.device, dtype: torch.dtype, size: int) -> None:
    check_case(normalize_case((size, 5), dtype=dtype, device=device))
    # Of two values the gradient is eps/std of the terms that cancel in it, so eps is no trifle.
    check_case(normalize_case((size,), correction=0.0, eps=0.3, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((33, 17), (0,)),
        ((33, 17), (1,)),
        ((33, 17), (-1,)),
        ((33, 17), (0, 1)),
        ((33, 17), ()),
        ((257,), (0,)),
        ((2, 65), (0,)),
        ((65, 2), (0,)),
        ((300, 1), (0,)),
        ((300, 1), (1,)),
        ((5, 6, 7), (0,)),
        ((5, 6, 7), (1,)),
        ((5, 6, 7), (2,)),
        ((5, 6, 7), (0, 2)),
        ((5, 6, 7), (-1, 0)),
        ((5, 6, 7), (1, 2)),
        ((3, 4, 5, 6), (0, 2)),
        ((3, 4, 5, 6), (1, 3)),
        ((3, 4, 5, 6), (0, 1, 3)),
        ((3, 4, 5, 6), None),
    ],
)
def test_dimensions(device: torch.device, shape: tuple[int, ...], dim) -> None:
    check_case(normalize_case(shape, dim, device=device))


def test_all_but_an_inner_dimension(device: torch.device) -> None:
    """Torch adds up so many outer dimensions term by term, and each term rounds the sum."""
    check_case(normalize_case((7, 9, 12, 2, 5), (0, 1, 4, 2), 0.0, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", odd_sizes())
def test_columns(device: torch.device, dtype: torch.dtype, size: int) -> None:
    check_case(normalize_case((19, size), (0,), dtype=dtype, device=device))
    check_case(normalize_case((size, 3), (0,), 0.0, 0.3, dtype=dtype, device=device))


@pytest.mark.parametrize("dim", [None, (0,), (1,)])
@pytest.mark.usefixtures("all_threads")
def test_larger(device: torch.device, dim) -> None:
    shape = (300, 33) if INTERPRETED else (20011, 33)
    check_case(normalize_case(shape, dim, device=device))


def test_scalar(device: torch.device) -> None:
    x = torch.tensor(3.0, device=device)
    assert normalize(x).isnan()
    assert normalize(x).shape == ()
    assert normalize(x, correction=0, eps=1.0) == 0
    assert normalize(x, dim=-1, correction=0, eps=1.0) == 0


@pytest.mark.parametrize("correction", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_scalar_with_eps(device: torch.device, correction: float) -> None:
    """A value alone deviates by 0 from itself; the deviation less a correction is none."""
    x = torch.tensor(3.0, device=device)
    y = normalize(x, correction=correction, eps=0.1)
    assert y.isnan() if correction else y == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [None, (0,), (1,), (0, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: torch.device, dtype: torch.dtype, dim, layout: str) -> None:
    case = normalize_case((6, 11, 5), dim, eps=1e-3, dtype=dtype, device=device)
    (x,) = case.tensors.values()
    x = lay_out(x, layout)
    check_case(case, [x])
    check_case(case, [x], lay_out(x.flip(0) * x, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((0,), None),
        ((0,), 0),
        ((0, 5), 0),
        ((0, 5), 1),
        ((5, 0), 0),
        ((5, 0), None),
        ((2, 0, 3), (0, 2)),
    ],
)
def test_empty(device: torch.device, dtype: torch.dtype, shape, dim) -> None:
    x = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    y = normalize(x, dim)
    assert y.shape == x.shape
    assert y.dtype == dtype
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [None, (0,), (1,)])
def test_large_offset(device: torch.device, dtype: torch.dtype, dim) -> None:
    """Values 1e4 ± 1e-2, whose variance a sum of squares would lose."""
    options = {"dtype": dtype, "device": device, "scale": 1e-2, "offset": 1e4}
    check_case(normalize_case((257, 63), dim, **options))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dim", [None, (0,), (1,)])
def test_nonfinite(device: torch.device, dim, value: float) -> None:
    (x,) = normalize_case((33, 20), device=device).tensors.values()
    x[5, 7] = value
    ours, torchs = normalize(x, dim), eager(x, dim)
    assert_same_nonfinite(ours, torchs)
    assert_as_accurate(ours, torchs, eager(x.double(), dim))


@pytest.mark.parametrize("dim", [None, (0,)])
def test_constant(device: torch.device, dim) -> None:
    """Constant data has deviation 0: NaN as torch, or 0 with eps; never infinity from rounding."""
    for value in (0.0, 3.0, -1e4, 1e4 + 1 / 64):
        x = torch.full((64, 4), value, device=device, requires_grad=True)
        assert normalize(x, dim).isnan().all()
        y = normalize(x, dim, eps=1e-3)
        assert (y == 0).all()
        (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
        assert grad.isfinite().all()


@pytest.mark.parametrize("value", [0.1, 1e4 / 3])
def test_constant_that_rounds(device: torch.device, value: float) -> None:
    x = torch.full((1000, 3), value, device=device)
    ulp = torch.finfo(x.dtype).eps * value
    assert normalize(x, 0, eps=1.0).abs().max() <= 4 * ulp


def test_one_row(device: torch.device) -> None:
    x = torch.randn(1, 6, device=device)
    with pytest.warns(UserWarning, match=r"degrees of freedom is <= 0"):
        assert normalize(x, 0).isnan().all()
    assert (normalize(x, 0, correction=0, eps=1e-3) == 0).all()
    assert_same_nonfinite(normalize(x, 0, correction=3), eager(x, 0, 3))


@pytest.mark.parametrize("correction", [0, 1, 2.5, 4, 5])
def test_correction(device: torch.device, correction: float) -> None:
    case = normalize_case((4, 7), (0,), correction, device=device)
    (x,) = case.tensors.values()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_nonfinite(normalize(x, 0, correction=correction), eager(x, 0, correction))
        if correction < 4:
            check_case(case)


@pytest.mark.parametrize("dim", [None, (0, 1)])
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_no_freedom_over_two_dimensions(device: torch.device, dim: tuple[int, ...] | None) -> None:
    """An infinite deviation of all values, with a column that has none of its own."""
    x = torch.tensor([[0.0, -1.0], [0.0, 1.0]], device=device)
    assert (normalize(x, dim, correction=4) == 0).all()
    assert x.std(dim, correction=4).isinf()


def test_dim_as_int_or_sequence(device: torch.device) -> None:
    x = torch.randn(5, 6, 7, device=device)
    assert torch.equal(normalize(x, -1), normalize(x, (2,)))
    assert torch.equal(normalize(x, [0, -1]), normalize(x, (2, 0)))
    assert torch.equal(normalize(x, ()), normalize(x))


def test_the_line_of_the_reference_network(device: torch.device) -> None:
    data = torch.rand(100, 10, device=device) * 5
    expected = (data - data.mean()) / data.std()
    torch.testing.assert_close(fused_mlp.functional.normalize(data), expected)


@given(data=st.data())
def test_properties(device: torch.device, data: st.DataObject) -> None:
    """Any shape, any dims: mean 0 and deviation 1 over every group, and torch's values."""
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4), label="shape")
    dims = st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True)
    dim = data.draw(st.none() | dims, label="dim")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    x = x.permute(data.draw(st.permutations(range(len(shape))), label="order"))
    y = normalize(x, dim, correction=0, eps=1e-6)
    assert_as_accurate(y, eager(x, dim, 0, 1e-6), eager(x.double(), dim, 0, 1e-6))
    groups = tuple(range(x.dim())) if dim is None else tuple(dim)
    torch.testing.assert_close(y.mean(groups), torch.zeros_like(y.mean(groups)), atol=1e-5, rtol=0)


BAD = [
    (lambda x: normalize([1.0, 2.0]), TypeError, "input.*list"),
    (lambda x: normalize(x.long()), RuntimeError, "input must be float32.*int64"),
    (lambda x: normalize(x.to(torch.complex64)), RuntimeError, "input must be.*complex64"),
    (lambda x: normalize(x.to_sparse()), RuntimeError, "input must be a dense tensor.*to_dense"),
    (lambda x: normalize(x, 2), IndexError, r"out of range.*\[-2, 1\].*2"),
    (lambda x: normalize(x, (0, -3)), IndexError, r"out of range.*-3"),
    (lambda x: normalize(x, (1, -1)), RuntimeError, "dim -?1 appears multiple times"),
    (lambda x: normalize(x, eps=-1.0), ValueError, "eps must not be negative.*-1"),
    (lambda x: normalize(x, eps=float("nan")), ValueError, "eps"),
    (lambda x: normalize(x, 1.5), TypeError, "dim"),
    (lambda x: normalize(x, (0, "a")), TypeError, "dim"),
    (lambda x: normalize(x, correction="a"), TypeError, "correction"),
    (lambda x: normalize(x, eps=None), TypeError, "eps"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(device: torch.device, call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(4, 3, device=device))


@pytest.mark.slow
@pytest.mark.huge
@pytest.mark.parametrize("dim", [None, (0,), (1,)])
@pytest.mark.usefixtures("all_threads")
def test_more_than_2_31_elements(device: torch.device, backend: str, dim) -> None:
    if backend == "reference":
        pytest.skip("plain PyTorch makes float32 copies of everything")
    needs_memory(device, 16)
    rows, columns = 2**25 + 1, 64
    piece = torch.randn(4096 + 1, columns, device=device).half()
    x = torch.empty(rows, columns, dtype=torch.float16, device=device)
    for start in range(0, rows, len(piece)):
        part = x[start : start + len(piece)]
        part.copy_(piece[: len(part)])
    # What the ragged end adds to the mean is far below the resolution of half precision.
    exact = normalize(piece.double(), dim, correction=0)
    x.requires_grad_()
    y = normalize(x, dim, correction=0)
    grad = torch.autograd.grad(y, x, x.detach())[0] if dim != (0,) else None
    for start in (
        0,
        (2**31 // columns // len(piece)) * len(piece),
        rows // 3 // len(piece) * len(piece),
    ):
        part = y.detach()[start : start + len(piece)].double()
        torch.testing.assert_close(part, exact[: len(part)], atol=2e-3, rtol=2e-3)
        if grad is not None:  # the gradient of a standardised value along itself vanishes
            assert grad[start : start + len(piece)].abs().max() < 2e-3


@pytest.mark.parametrize("dim", [None, (0,), (1,)])
def test_transforms_know_eps(device: torch.device, dim) -> None:
    """The formula that torch.func differentiates adds eps to the deviation, as the kernels do."""
    x, direction = torch.randn(2, 9, 5, dtype=torch.float64, device=device)
    ours, eagers = (
        torch.func.jvp(lambda v, f=function: f(v, dim), (x,), (direction,))
        for function in (
            lambda v, dim: normalize(v, dim, eps=0.5),
            lambda v, dim: eager(v, dim, 1, 0.5),
        )
    )
    torch.testing.assert_close(ours, eagers, rtol=1e-12, atol=1e-12)


def _vmapped(x: torch.Tensor) -> torch.Tensor:
    return torch.func.vmap(normalize)(x)


def _pushed_forward(x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x) * x)
        return torch.autograd.forward_ad.unpack_dual(normalize(dual)).tangent


def _left_over(x: torch.Tensor) -> torch.Tensor:
    """Normalize what a transform that ended wrapped."""
    leaked = []
    torch.func.grad(lambda t: leaked.append(t) or t.sum())(x)
    return normalize(leaked[0])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (normalize, eager),
        (_vmapped, lambda x: torch.stack([eager(row) for row in x])),
        (lambda x: torch.func.jacrev(normalize)(x), lambda x: torch.func.jacrev(eager)(x)),
        (_pushed_forward, lambda x: torch.func.jvp(eager, (x,), (x,))[1]),
        (_left_over, eager),
        (lambda x: normalize(x, correction=0), lambda x: eager(x, correction=0)),
        (lambda x: normalize(x, eps=0.5), lambda x: eager(x, eps=0.5)),
        (lambda x: normalize(x.double()), lambda x: eager(x.double())),
        (lambda x: normalize(x.t()), lambda x: eager(x.t())),
        (lambda x: normalize(x, 0), lambda x: eager(x, (0,))),
    ],
    ids=["again", "vmap", "jacrev", "forward", "left over", "correction", "eps", "dtype", "strides",
         "dim"],
)  # fmt: skip
def test_a_kind_of_input_seen_before(device, call, expected, requires_grad: bool) -> None:
    x = torch.randn(3, 4, device=device, requires_grad=requires_grad)
    for _ in range(2):
        normalize(x)
        torch.testing.assert_close(call(x), expected(x))


def test_a_kind_of_input_seen_before_is_still_checked(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device)
    for _ in range(2):
        normalize(x)
    with pytest.warns(UserWarning, match="degrees of freedom"):
        assert normalize(x[:1, :1]).isnan().all()
    with pytest.raises(TypeError, match="correction"):
        normalize(x, correction="1")
    with pytest.raises(ValueError, match="eps"):
        normalize(x, eps=-0.1)
    with fused_mlp.use_backend("reference"):
        torch.testing.assert_close(normalize(x), eager(x))


@pytest.mark.parametrize("dim", [None, [0], [1], [0, 2]])
def test_evaluation_gives_the_bits_of_training(dim) -> None:
    if fused_mlp.backends.active_backend("cpu") != "native":
        pytest.skip("only the CPU library evaluates without statistics")
    kernels = torch.ops.fused_mlp_kernels
    for dtype in DTYPES:
        x = torch.randn(5, 6, 7).to(dtype)
        output = kernels.normalize_evaluate(x, dim, 1.0, 0.1)
        assert torch.equal(output, kernels.normalize(x, dim, 1.0, 0.1)[0])
