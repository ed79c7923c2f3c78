"""``batch_norm_leaky_relu``: values, gradients and running statistics as ``nn.BatchNorm1d``."""

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
    assert_same_differentiable_gradients,
    assert_same_nonfinite,
    batch_norm_case,
    check_case,
    lay_out,
    needs_memory,
    odd_sizes,
)
from torch import nn

from fused_mlp.functional import batch_norm_leaky_relu

OP = torch.ops.fused_mlp.batch_norm_leaky_relu
SIZES = odd_sizes()
# (N, C) and (N, C, L); training needs more than one value a channel.
SHAPES = [(n, SIZES[(7 * i + 7) % len(SIZES)]) for i, n in enumerate(SIZES)]
SHAPES += [(2, 1), (300, 1), (3, 300), (2, 3, 1), (1, 3, 2), (7, 5, 17), (3, 33, 65), (65, 2, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s])
def test_odd_shapes(
    device: torch.device, dtype: torch.dtype, training: bool, shape: tuple[int, ...]
) -> None:
    values = shape[0] * (shape[2] if len(shape) == 3 else 1)
    if training and values <= 2:
        pytest.skip("see test_bad_arguments and test_two_values_a_channel")
    check_case(batch_norm_case(shape, training, dtype=dtype, device=device))


@pytest.mark.parametrize("shape", [(2, 1), (2, 33), (2, 3, 1), (1, 3, 2)])
def test_two_values_a_channel(device: torch.device, shape: tuple[int, ...]) -> None:
    """Normalized they are -1 and 1, and a gradient of rounding noise and eps is left."""
    case = batch_norm_case(shape, True, dtype=torch.float64, device=device)
    tensors = [t.requires_grad_() for t in case.tensors.values()]
    results = []
    for function in (case.fused, case.exact):
        output = function(*tensors)
        results.append((output, *torch.autograd.grad(output.square().sum(), tensors)))
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("shape", [(33, 17), (5, 17, 6)])
def test_affine(device: torch.device, training: bool, affine: str, shape) -> None:
    check_case(batch_norm_case(shape, training, affine, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(33, 17), (5, 17, 6)])
def test_float32_parameters_with_half_input(
    device: torch.device, dtype: torch.dtype, training: bool, shape
) -> None:
    case = batch_norm_case(
        shape, training, dtype=dtype, parameter_dtype=torch.float32, device=device
    )
    check_case(case)


@pytest.mark.parametrize("negative_slope", [0.0, 0.2, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_negative_slope(device: torch.device, training: bool, negative_slope: float) -> None:
    check_case(batch_norm_case((33, 17), training, "both", negative_slope, device=device))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.usefixtures("all_threads")
def test_larger(device: torch.device, training: bool) -> None:
    for shape in ((5000, 32), (20, 16, 700)):
        if INTERPRETED:
            shape = (shape[0] // 10, *shape[1:])
        check_case(batch_norm_case(shape, training, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(12, 9), (6, 9, 7)])
def test_layouts(device: torch.device, dtype, training: bool, layout: str, shape) -> None:
    case = batch_norm_case(shape, training, dtype=dtype, device=device)
    x, weight, bias = case.tensors.values()
    grad = torch.randn(shape).to(x)
    if layout != "expanded":  # equal rows: torch's own gradient is noise over sqrt(eps)
        check_case(case, [lay_out(x, layout), weight, bias], lay_out(grad, layout))
    check_case(case, [x, lay_out(weight, layout), lay_out(bias, layout)])
    check_case(case, None, lay_out(grad, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(257, 17), (31, 17, 9)])
def test_large_offset(device: torch.device, dtype: torch.dtype, shape) -> None:
    """Values 1e4 ± 1e-2, whose variance a sum of squares would lose."""
    options = {"dtype": dtype, "device": device, "scale": 1e-2, "offset": 1e4, "eps": 1e-12}
    check_case(batch_norm_case(shape, True, **options))
    check_case(batch_norm_case(shape, False, **options))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["input", "weight", "bias"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nonfinite(device: torch.device, training: bool, place: str, value: float) -> None:
    case = batch_norm_case((33, 17), training, device=device)
    case.tensors[place].view(-1)[4] = value
    tensors = list(case.tensors.values())
    ours, torchs = case.fused(*tensors), case.plain(*tensors)
    exact = case.exact(*(t.double() for t in tensors))
    if place == "weight":  # folded into the mean by torch on the CPU, where inf - inf gives NaN
        torchs = exact.float()
    assert_same_nonfinite(ours, torchs)
    assert_as_accurate(ours, torchs, exact)


@pytest.mark.parametrize("value", [0.0, 3.0, 1e4])
def test_constant(device: torch.device, value: float) -> None:
    """A column without variance gives the bias through LeakyReLU, and a finite gradient."""
    x = torch.full((33, 5), value, device=device, requires_grad=True)
    bias = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], device=device)
    weight = torch.rand(5, device=device)
    y = batch_norm_leaky_relu(x, None, None, weight, bias, True)
    torch.testing.assert_close(y.detach(), F.leaky_relu(bias).expand(33, 5))
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (0, 3, 2)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty(device: torch.device, training: bool, shape: tuple[int, ...]) -> None:
    """No values: zero gradients of the parameters, and running statistics left as they are."""
    norm = nn.BatchNorm1d(3, device=device).train(training)
    expected = norm(torch.empty(shape, device=device))
    mean, var = torch.full((2, 3), 0.5, device=device)
    batches = torch.tensor(0, device=device)
    x = torch.empty(shape, device=device, requires_grad=True)
    weight, bias = (torch.ones(3, device=device, requires_grad=True) for _ in range(2))
    y = OP(x, mean, var, weight, bias, training, num_batches_tracked=batches)
    assert y.shape == expected.shape
    for grad in torch.autograd.grad(y.sum(), (x, weight, bias)):
        assert (grad == 0).all()
    assert (mean == 0.5).all()
    assert (var == 0.5).all()
    assert batches == norm.num_batches_tracked


@pytest.mark.parametrize("shape", [(5, 0), (5, 0, 3)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_channels(device: torch.device, training: bool, shape) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    none = torch.empty(0, device=device)
    y = batch_norm_leaky_relu(x, none, none.clone(), none.clone(), None, training)
    assert y.shape == shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


# ------------------------------------------------------------------------ running statistics


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, 0.37])
@pytest.mark.parametrize(
    ("dtype", "statistics_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
@pytest.mark.parametrize("shape", [(16, 5), (4, 5, 3)])
def test_running_statistics(
    device: torch.device, dtype, statistics_dtype, momentum: float, shape
) -> None:
    """Over many batches the buffers follow ``nn.BatchNorm1d``."""
    options = {"momentum": momentum, "device": device}
    eager = nn.BatchNorm1d(5, dtype=statistics_dtype, **options)
    exact = nn.BatchNorm1d(5, dtype=torch.float64, **options)
    mean, var = eager.running_mean.clone(), eager.running_var.clone()
    batches = eager.num_batches_tracked.clone()
    for step in range(5 if INTERPRETED else 30):
        generator = torch.Generator().manual_seed(step)
        x = (3 * torch.randn(shape, generator=generator) + step / 10).to(device, dtype)
        OP(x, mean, var, None, None, True, momentum, num_batches_tracked=batches)
        with torch.no_grad():
            eager(x)
            exact(x.double())
    assert mean.dtype == var.dtype == statistics_dtype
    assert batches == eager.num_batches_tracked
    assert_as_accurate(mean, eager.running_mean, exact.running_mean, "running_mean")
    assert_as_accurate(var, eager.running_var, exact.running_var, "running_var")


def test_unbiased_variance_of_two_values(device: torch.device) -> None:
    """The unbiased variance is twice the biased one, the most a correction can be."""
    x = torch.tensor([[1.0], [3.0]], device=device)
    mean, var = torch.zeros(1, device=device), torch.ones(1, device=device)
    batch_norm_leaky_relu(x, mean, var, training=True, momentum=1.0)
    assert mean == 2.0
    assert var == 2.0


def test_strided_statistics(device: torch.device) -> None:
    """Buffers that are views are read and written in place, and nothing beside them."""
    (x, weight, bias) = batch_norm_case((33, 5), True, device=device).tensors.values()
    storage = torch.zeros(5, 4, device=device)
    mean, var = storage[:, 1], storage[:, 3]
    var.fill_(1.0)
    expected_mean, expected_var = mean.clone(), var.clone()
    batch_norm_leaky_relu(x, mean, var, weight, bias, True)
    F.batch_norm(x, expected_mean, expected_var, training=True)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(var, expected_var)
    assert (storage[:, [0, 2]] == 0).all()
    ours = batch_norm_leaky_relu(x, mean, var, weight, bias)
    torch.testing.assert_close(ours, F.leaky_relu(F.batch_norm(x, mean, var, weight, bias)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rows", [6, 700])
@pytest.mark.parametrize("shared", ["with input", "with each other"])
def test_statistics_in_shared_memory(
    device: torch.device, shared: str, rows: int, training: bool
) -> None:
    """As torch: they are written when the batch was measured and before it is normalized."""
    if device.type != "cpu":
        pytest.skip("programs on a GPU read and write side by side, torch's as well")
    results = []
    for function in (F.batch_norm, batch_norm_leaky_relu):
        x = torch.rand(rows, 33, generator=torch.Generator().manual_seed(1)) + 0.5
        mean, var = (x[0], x[1]) if shared == "with input" else (x[0].clone(),) * 2
        slope = {} if function is F.batch_norm else {"negative_slope": 1.0}
        output = function(x, mean, var, training=training, **slope)
        results.append((output, x, mean, var))
    for ours, torchs in zip(*results[::-1], strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


def test_evaluation_leaves_the_buffers(device: torch.device) -> None:
    x, mean, var = torch.randn(3, 6, 4, device=device).unbind()
    var, mean = var[0].abs(), mean[0]
    before = mean.clone(), var.clone()
    versions = mean._version, var._version
    batches = torch.tensor(7, device=device)
    OP(x, mean, var, training=False, num_batches_tracked=batches)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert batches == 7
    assert (mean._version, var._version) == versions


def test_evaluation_takes_no_eps(device: torch.device) -> None:
    """Only a batch's own variance may be zero unnoticed; running ones are the caller's."""
    x, mean, var = torch.randn(6, 4), torch.randn(4), torch.rand(4) + 0.5
    x, mean, var = (t.to(device) for t in (x, mean, var))
    ours = batch_norm_leaky_relu(x, mean, var, eps=0.0)
    torch.testing.assert_close(ours, F.leaky_relu(F.batch_norm(x, mean, var, eps=0.0)))


def test_no_gradient_for_the_statistics(device: torch.device) -> None:
    """Statistics that require a gradient do not make evaluation differentiable in them."""
    x = torch.randn(6, 4, device=device, requires_grad=True)
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    with torch.no_grad():
        assert not batch_norm_leaky_relu(x, mean, var, training=True).requires_grad
    assert batch_norm_leaky_relu(x, mean, var, training=True).requires_grad


def test_training_writes_bump_the_version(device: torch.device) -> None:
    """Autograd notices that a training call changed the buffers."""
    for grad in (True, False):
        x = torch.randn(6, 4, device=device, requires_grad=grad)
        mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
        batches = torch.tensor(0, device=device)
        OP(x, mean, var, training=True, num_batches_tracked=batches)
        assert mean._version > 0
        assert var._version > 0
        assert batches._version > 0


@given(
    rows=st.integers(3, 40),
    channels=st.integers(1, 40),
    length=st.none() | st.integers(1, 5),
    training=st.booleans(),
    affine=st.sampled_from(["both", "weight", "bias", "none"]),
    dtype=st.sampled_from(DTYPES),
)
def test_properties(device: torch.device, rows, channels, length, training, affine, dtype) -> None:
    shape = (rows, channels) if length is None else (rows, channels, length)
    check_case(batch_norm_case(shape, training, affine, dtype=dtype, device=device))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_differentiable_gradients_know_eps(device: torch.device, training: bool) -> None:
    """A gradient that is itself differentiable comes from a formula: eps stands there as well."""
    case = batch_norm_case((17, 5), training, dtype=torch.float64, device=device, eps=0.5)
    assert_same_differentiable_gradients(case)


# --------------------------------------------------------------------------------- mistakes

f = batch_norm_leaky_relu
BAD = [
    (lambda x, m, v: f("x", m, v), TypeError, "input.*str"),
    (lambda x, m, v: f(x.int(), m, v), RuntimeError, "input must be float32.*int32"),
    (lambda x, m, v: f(x[0], m, v), ValueError, "expected 2D or 3D input.*1D"),
    (lambda x, m, v: f(x[None, None], m, v), ValueError, "expected 2D or 3D input.*4D"),
    (lambda x, m, v: f(x[:1], m, v, training=True), ValueError, "more than 1 value per channel"),
    (lambda x, m, v: f(x[:1, :, None], m, v, training=True), ValueError, "more than 1 value"),
    (lambda x, m, v: f(x, None, None), RuntimeError, "running_mean must be defined"),
    (lambda x, m, v: f(x, m, None), ValueError, "both running_mean and running_var"),
    (
        lambda x, m, v: f(x, m, None, training=True),
        ValueError,
        "both running_mean and running_var",
    ),
    (
        lambda x, m, v: f(x, m[1:], v, training=True),
        RuntimeError,
        r"running_mean must have.*\(3,\)",
    ),
    (lambda x, m, v: f(x, m, v[None], training=True), RuntimeError, "running_var must have"),
    (lambda x, m, v: f(x, m, v, m[1:], training=True), RuntimeError, "weight must have shape"),
    (lambda x, m, v: f(x, m, v, None, m[1:], True), RuntimeError, "bias must have shape"),
    (
        lambda x, m, v: f(x, m, v, m.double(), training=True),
        RuntimeError,
        "weight must have the dtype",
    ),
    (lambda x, m, v: f(x, m, v, m, m.half(), True), RuntimeError, "bias must have the dtype"),
    (
        lambda x, m, v: f(x, m.half(), v, training=True),
        RuntimeError,
        "running_mean must have the dtype",
    ),
    (lambda x, m, v: f(x, m, v.to("meta"), training=True), RuntimeError, "running_var is on meta"),
    (lambda x, m, v: f(x, m, v, 1.0, training=True), TypeError, "weight.*float"),
    (lambda x, m, v: f(x, m, v, eps=-1.0, training=True), ValueError, "eps must not be negative"),
    (lambda x, m, v: f(x, m, v, eps=float("nan"), training=True), ValueError, "eps"),
    (lambda x, m, v: f(x, m, v, eps=0.0, training=True), ValueError, "eps must be positive"),
    (lambda x, m, v: f(x[:0], m, v, eps=0, training=True), ValueError, "eps must be positive"),
    (lambda x, m, v: OP(x, m, v, training=True, eps=0.0), ValueError, "eps must be positive"),
    (lambda x, m, v: f(x, m, v, momentum="a", training=True), TypeError, "momentum"),
    (lambda x, m, v: f(x, m, v, momentum=None, training=True), TypeError, "momentum"),
    (lambda x, m, v: f(x, m, v, negative_slope="a", training=True), TypeError, "negative_slope"),
    (
        lambda x, m, v: OP(x, m, v, training=True, num_batches_tracked=m),
        RuntimeError,
        "num_batches_tracked must be one int64",
    ),
    (
        lambda x, m, v: OP(x, m, v, training=True, num_batches_tracked=m.long()),
        RuntimeError,
        "num_batches_tracked must be one int64",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(device: torch.device, call, error, message: str) -> None:
    """The error names the argument, and no buffer has changed."""
    x, mean, var = torch.randn(6, 4, device=device), *torch.full((2, 4), 0.5, device=device)
    versions = mean._version, var._version
    with pytest.raises(error, match=message):
        call(x, mean, var)
    assert (mean == 0.5).all()
    assert (var == 0.5).all()
    assert (mean._version, var._version) == versions


@pytest.mark.slow
@pytest.mark.huge
@pytest.mark.usefixtures("all_threads")
def test_more_than_2_31_elements(device: torch.device, backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain PyTorch makes float32 copies of everything")
    needs_memory(device, 18)
    rows, channels = 2**25 + 4, 64
    piece = torch.randn(2, channels, device=device).half()
    x = piece.repeat(rows // 2, 1).requires_grad_()
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    y = batch_norm_leaky_relu(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(mean, piece.float().mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(var, piece.float().var(0, correction=0), atol=1e-5, rtol=1e-5)
    expected = F.leaky_relu(F.batch_norm(piece.float(), None, None, training=True))
    for start in (0, rows // 2, rows - 2):
        torch.testing.assert_close(
            y.detach()[start : start + 2].float(), expected, atol=2e-3, rtol=2e-3
        )
    grad_output = x.detach()[:1].expand(rows, channels)
    (grad,) = torch.autograd.grad(y, x, grad_output)
    for start in (0, rows // 2, rows - 2):  # pieces: isfinite() of it all takes another 8 GiB
        assert grad[start : start + 2].isfinite().all()
        assert grad[start : start + 2].equal(grad[:2])
