"""``research_net``: the whole network in one op, against the same network in plain torch."""

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
    Case,
    assert_as_accurate,
    assert_same_differentiable_gradients,
    assert_same_nonfinite,
    check_case,
    keep_mask,
    lay_out,
    needs_memory,
    odd_sizes,
    research_case,
)
from torch import nn

from fused_mlp import on_chip
from fused_mlp.functional import research_net

OP = torch.ops.fused_mlp.research_net
REFERENCE_NETWORK = (10, 64, 32, 5)
NETWORKS = [
    REFERENCE_NETWORK,
    (3, 7, 2),
    (2, 1, 1),
    (1, 3, 3, 1),
    (17, 33, 9, 1),
    (7, 33, 17, 65, 3),
    (64, 64, 64, 64),
    (65, 8, 63, 7),
    (2, 3, 4, 5, 6, 7),
    (33, 100, 2),
]
WIDE = [(40, 130, 100, 10), (128, 256, 256, 10), (13, 257, 300, 3), (300, 257, 2)]


@pytest.mark.parametrize("widths", NETWORKS, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_networks(device: torch.device, training: bool, widths: tuple[int, ...]) -> None:
    check_case(research_case(23, widths, training, 0.3, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", odd_sizes())
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_rows(device: torch.device, dtype: torch.dtype, rows: int, training: bool) -> None:
    if rows == 0 or (rows <= 2 and training):
        pytest.skip("see test_empty_batch, test_bad_arguments and test_vanishing_gradients")
    widths = (10, 17, 12, 5) if INTERPRETED else REFERENCE_NETWORK
    check_case(research_case(rows, widths, training, 0.3, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("rows", "widths"), [(2, REFERENCE_NETWORK), (23, (1, 1, 1)), (23, (1, 1, 1, 1))], ids=str
)
def test_vanishing_gradients(device: torch.device, rows: int, widths: tuple[int, ...]) -> None:
    """Batch norm of two rows, or of one input, leaves a gradient of rounding noise and eps."""
    case = research_case(rows, widths, True, 0.3, dtype=torch.float64, device=device)
    tensors = [t.requires_grad_() for t in case.tensors.values()]
    results = []
    for function in (case.fused, case.exact):
        output = function(*tensors)
        results.append((output, *torch.autograd.grad(output.square().sum(), tensors)))
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-7)
    check_case(research_case(rows, widths, False, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", NETWORKS[4:8], ids=str)
def test_dtypes(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    check_case(research_case(33, widths, True, 0.5, dtype=dtype, device=device))
    check_case(research_case(33, widths, False, affine=False, dtype=dtype, device=device))


@pytest.mark.parametrize("widths", WIDE, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_wide(device: torch.device, training: bool, widths: tuple[int, ...]) -> None:
    """Beyond the cache, or a backend's widths, it runs layer by layer: the same function."""
    check_case(research_case(9 if INTERPRETED else 70, widths, training, 0.3, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_wide_many_rows(device: torch.device, training: bool, dtype: torch.dtype) -> None:
    rows = 9 if INTERPRETED else 301  # three blocks of rows
    widths = (270, 300, 280, 33)
    check_case(research_case(rows, widths, training, 0.3, dtype=dtype, device=device))
    check_case(research_case(rows, (12, 300, 7), training, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("rows", "training"), [(1, False), (4, False), (4, True), (9, False)], ids=str
)
@pytest.mark.usefixtures("all_threads")
def test_few_rows_of_wide_layers(device: torch.device, rows: int, training: bool) -> None:
    """Threads share a layer's features where there are too few rows to share."""
    widths = (60, 90, 52, 9) if INTERPRETED else (600, 900, 520, 9)
    check_case(research_case(rows, widths, training, 0.3, device=device))


@pytest.mark.usefixtures("all_threads")
def test_larger(device: torch.device) -> None:
    rows = 300 if INTERPRETED else 5003
    for training in (True, False):
        check_case(research_case(rows, REFERENCE_NETWORK, training, 0.3, device=device))


@pytest.mark.parametrize("widths", [(10, 24, 12, 5), (10, 24, 16, 12, 5)])
def test_on_chip_and_op_by_op_agree(
    device: torch.device, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same masks and, up to rounding, the same values whichever way a network runs."""
    case = research_case(33, widths, True, 0.4, dtype=torch.float64, device=device)
    tensors = [t.requires_grad_() for t in case.tensors.values()]
    results, fits = [], on_chip.fits
    for chosen in (fits, lambda *_: False):
        monkeypatch.setattr(on_chip, "fits", chosen)
        output = case.fused(*tensors)
        results.append((output, *torch.autograd.grad(output.square().sum(), tensors)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("p", [1e-6, 0.5, 0.9, 1.0])
def test_dropout(device: torch.device, p: float) -> None:
    check_case(research_case(65, (10, 20, 17, 12, 5), True, p, device=device))


def test_one_probability_a_layer(device: torch.device) -> None:
    """Layers have their own probabilities and masks; a layer without dropout has none."""
    case = research_case(33, (5, 24, 24, 24, 12, 3), True, dtype=torch.float64, device=device)
    x, *rest = case.tensors.values()
    weights, biases, norm = rest[:5], rest[5:10], rest[10:]
    seed, p = torch.tensor([7, 11], device=device), [0.5, 0.0, 0.5]
    ours = OP(x, weights, biases, *norm, None, None, True, p, seed)
    keeps = [keep_mask(seed, 33, 24, q, layer) if q else None for layer, q in enumerate(p)]
    assert not torch.equal(keeps[0], keeps[2])
    hidden = x
    for layer, keep in enumerate(keeps):
        hidden = F.relu(F.linear(hidden, weights[layer], biases[layer]))
        hidden = hidden if keep is None else hidden * keep * 2
    hidden = F.batch_norm(F.linear(hidden, weights[3], biases[3]), None, None, *norm, True)
    torch.testing.assert_close(ours, F.linear(F.leaky_relu(hidden), weights[4], biases[4]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    case = research_case(23, (10, 24, 12, 5), True, 0.3, dtype=dtype, device=device)
    tensors = list(case.tensors.values())
    grad = torch.randn(23, 5).to(tensors[0])
    if layout == "expanded":  # equal rows have no variance; the weights may still be views
        check_case(case, [tensors[0][:, :1].expand(23, 10), *tensors[1:]], lay_out(grad, layout))
        return
    check_case(case, [lay_out(t, layout) for t in tensors], lay_out(grad, layout))
    check_case(
        research_case(23, (10, 24, 5), False, dtype=dtype, device=device),
        None,
        lay_out(grad, layout),
    )


def test_bias_before_a_batch_norm_of_equal_weights(device: torch.device) -> None:
    """Its gradient is 0 by nature: what is left is rounding, of the float64 oracle as well."""
    widths = (37, 4, 4, 20, 4, 46)
    case = research_case(17, widths, True, dtype=torch.float64, device=device)
    for name in ("biases[2]", "bn_weight"):
        case.tensors[name] = lay_out(case.tensors[name], "expanded")
    check_case(case)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_differentiable_gradients_know_eps(device: torch.device, training: bool) -> None:
    """A gradient that is itself differentiable comes from a formula: eps stands there as well."""
    options = {"p": 0.3, "dtype": torch.float64, "eps": 0.5}
    case = research_case(17, (4, 6, 5, 3), training, device=device, **options)
    assert_same_differentiable_gradients(case)


def test_large_offset(device: torch.device) -> None:
    """The statistics survive hidden values far from zero."""
    case = research_case(65, (4, 16, 8, 3), True, device=device, eps=1e-12)
    case.tensors["biases[1]"] += 1000.0
    check_case(case)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("place", ["input", "weights[0]", "biases[1]", "weights[2]"])
def test_nonfinite(device: torch.device, training: bool, place: str, value: float) -> None:
    case = research_case(9, (4, 6, 5, 3), training, 0.3, device=device)
    case.tensors[place].view(-1)[1] = value
    tensors = list(case.tensors.values())
    ours, torchs = case.fused(*tensors), case.plain(*tensors)
    assert_same_nonfinite(ours, torchs)
    assert_as_accurate(ours, torchs, case.exact(*(t.double() for t in tensors)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_empty_batch(device: torch.device, training: bool, dtype: torch.dtype) -> None:
    case = research_case(0, REFERENCE_NETWORK, training, 0.3, dtype=dtype, device=device)
    tensors = [t.requires_grad_() for t in case.tensors.values()]
    output = case.fused(*tensors)
    assert output.shape == (0, 5)
    assert output.dtype == dtype
    for tensor, grad in zip(tensors, torch.autograd.grad(output.sum(), tensors), strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()
    mean, var = torch.full((2, 32), 0.5, device=device, dtype=dtype)
    x, *rest = (t.detach() for t in tensors)
    OP(x, rest[:3], rest[3:6], *rest[6:], mean, var, training, [0.0])
    assert (mean == 0.5).all()
    assert (var == 0.5).all()


def test_no_rows_in_evaluation_keep_the_running_statistics(device: torch.device) -> None:
    """What is saved of none is what is saved of any number, eps and all."""
    for rows in (0, 3):
        case = research_case(rows, (4, 8, 6, 2), False, dtype=torch.float64, device=device)
        x, *rest = case.tensors.values()
        mean, var = torch.arange(2.0, 14, device=device, dtype=torch.float64).view(2, 6)
        _, saved = torch.ops.fused_mlp_kernels.research_net(
            x, rest[:3], rest[3:6], *rest[6:], mean, var, None, False, [0.0], None, 0.1, 0.5, 0.01
        )
        torch.testing.assert_close(saved[:12], torch.cat([mean, (var + 0.5).rsqrt()]))


@pytest.mark.parametrize("widths", [REFERENCE_NETWORK, (10, 300, 12, 5)], ids=["narrow", "wide"])
def test_no_rows_have_gradients_of_zero(device: torch.device, widths: tuple[int, ...]) -> None:
    """In the kernels themselves, which autograd's formula keeps an empty batch from."""
    kernels = torch.ops.fused_mlp_kernels
    case = research_case(0, widths, True, dtype=torch.float64, device=device)
    x, *rest = case.tensors.values()
    parameters = (rest[:3], rest[3:6], *rest[6:])
    output, saved = kernels.research_net(
        x, *parameters, None, None, None, True, [0.0], None, 0.1, 1e-5, 0.01
    )
    gradients = kernels.research_net_backward(
        output, x, *parameters, saved, True, [0.0], None, 0.01, [True] * 9
    )
    assert [g.shape for g in gradients] == [t.shape for t in case.tensors.values()]
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("widths", [(0, 4, 3), (4, 0, 3), (4, 3, 0), (4, 0, 3, 2), (0, 0, 0, 0)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_layers(device: torch.device, training: bool, widths: tuple[int, ...]) -> None:
    # Without inputs every row of a training batch is the same, and its gradients below the batch
    # norm are rounding noise: float64 says whether they vanish.
    dtype = torch.float64 if training else torch.float32
    case = research_case(5, widths, training, 0.5, dtype=dtype, device=device)
    if training and widths[0] == 0:
        tensors = [t.requires_grad_() for t in case.tensors.values()]
        for function in (case.fused, case.exact):
            output = function(*tensors)
            assert output.shape == (5, widths[-1])
            assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), tensors))
    else:
        check_case(case)


# ------------------------------------------------------------------------ running statistics


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_running_statistics(device: torch.device, dtype: torch.dtype, momentum: float) -> None:
    """Over many batches the buffers follow ``nn.BatchNorm1d``, in any dtype torch allows."""
    case = research_case(33, (4, 12, 6, 3), True, dtype=dtype, device=device)
    x, *rest = case.tensors.values()
    statistics_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    eager = nn.BatchNorm1d(6, momentum=momentum, device=device, dtype=statistics_dtype)
    exact = nn.BatchNorm1d(6, momentum=momentum, device=device, dtype=torch.float64)
    mean, var = eager.running_mean.clone(), eager.running_var.clone()
    batches = eager.num_batches_tracked.clone()
    for step in range(4 if INTERPRETED else 20):
        moved = x * (1 + step / 10)
        OP(
            moved, rest[:3], rest[3:6], None, None, mean, var, True, [0.0], None, momentum,
            num_batches_tracked=batches,
        )  # fmt: skip
        for norm, to in ((eager, dtype), (exact, torch.float64)):
            hidden = F.relu(F.linear(moved.to(to), rest[0].to(to), rest[3].to(to)))
            norm(F.linear(hidden, rest[1].to(to), rest[4].to(to)))
    assert batches == eager.num_batches_tracked
    assert_as_accurate(mean, eager.running_mean, exact.running_mean, "running_mean")
    assert_as_accurate(var, eager.running_var, exact.running_var, "running_var")


def test_evaluation_leaves_the_buffers(device: torch.device) -> None:
    case = research_case(5, (4, 6, 5, 3), False, device=device)
    x, *rest = case.tensors.values()
    mean, var = torch.full((2, 5), 0.5, device=device)
    batches = torch.tensor(7, device=device)
    OP(x, rest[:3], rest[3:6], *rest[6:], mean, var, False, [0.0], num_batches_tracked=batches)
    assert (mean == 0.5).all()
    assert (var == 0.5).all()
    assert batches == 7


@given(
    rows=st.integers(5, 40),
    widths=st.lists(st.integers(1, 40), min_size=3, max_size=6),
    training=st.booleans(),
    p=st.sampled_from([0.0, 0.3]),
    affine=st.booleans(),
)
def test_properties(device: torch.device, rows, widths, training, p, affine) -> None:
    """Any depth and widths, in float64, where a value at a kink does not change its side."""
    check_case(research_case(rows, widths, training, p, affine, dtype=torch.float64, device=device))


# --------------------------------------------------------------------------------- mistakes


def call(case: Case, **changes) -> torch.Tensor:
    """Call research_net with the arguments of ``case``, some of them changed."""
    x, *rest = case.tensors.values()
    layers = (len(rest) - 2) // 2
    arguments = {
        "input": x,
        "weights": rest[:layers],
        "biases": rest[layers : 2 * layers],
        "bn_weight": rest[-2],
        "bn_bias": rest[-1],
        "running_mean": torch.full_like(rest[-1], 0.5),
        "running_var": torch.full_like(rest[-1], 0.5),
        "training": True,
        "dropout_p": [0.3] * (layers - 2),
    }
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    statistics = [arguments["running_mean"], arguments["running_var"]]
    try:
        return research_net(**arguments)
    finally:
        for value in statistics:
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                assert (value == 0.5).all(), "a buffer changed although the call failed"


BAD = [
    ({"input": None}, TypeError, "input.*NoneType"),
    ({"input": lambda x: x.long()}, RuntimeError, "input must be float32.*int64"),
    ({"input": lambda x: x[0]}, ValueError, "expected 2D input.*1D"),
    ({"input": lambda x: x[None]}, ValueError, "expected 2D input.*3D"),
    ({"input": lambda x: x[:, 1:]}, RuntimeError, r"weights\[0\].*3\)"),
    ({"input": lambda x: x[:1]}, ValueError, "more than 1 value per channel"),
    ({"input": lambda x: x.double()}, RuntimeError, r"weights\[0\] must have the dtype of input"),
    ({"weights": lambda w: w[:1]}, ValueError, "1 weights, 3 biases"),
    ({"weights": lambda w: [w[0], w[0], w[2]]}, RuntimeError, r"weights\[1\].*6\)"),
    ({"weights": lambda w: [w[0], w[1], 1.0]}, TypeError, r"weights\[2\].*float"),
    ({"weights": lambda w: [w[0][0], *w[1:]]}, RuntimeError, r"weights\[0\]"),
    ({"biases": lambda b: b[:2]}, ValueError, "3 weights, 2 biases"),
    ({"biases": lambda b: [b[0], b[0], b[2]]}, RuntimeError, r"biases\[1\] must have shape"),
    ({"biases": lambda b: [b[0], None, b[2]]}, TypeError, r"biases\[1\].*NoneType"),
    ({"biases": lambda b: [b[0], b[1], b[2].to("meta")]}, RuntimeError, r"biases\[2\] is on meta"),
    ({"bn_weight": lambda w: w[1:]}, RuntimeError, "weight must have shape"),
    ({"bn_bias": lambda w: w.double()}, RuntimeError, "bias must have the dtype"),
    ({"running_mean": None}, ValueError, "both running_mean and running_var"),
    ({"running_var": lambda v: v[1:]}, RuntimeError, "running_var must have shape"),
    ({"running_mean": None, "training": False}, ValueError, "both running_mean and running_var"),
    ({"dropout_p": [0.1, 0.2]}, ValueError, "2 probabilities"),
    ({"dropout_p": [1.5]}, ValueError, r"dropout_p\[0\].*between 0 and 1.*1.5"),
    ({"dropout_p": [-0.5]}, ValueError, r"dropout_p\[0\].*between 0 and 1.*-0.5"),
    ({"dropout_p": [float("nan")]}, ValueError, r"dropout_p\[0\].*nan"),
    ({"dropout_p": ["0.1"]}, TypeError, r"dropout_p\[0\].*str"),
    ({"eps": -1.0}, ValueError, "eps must not be negative"),
    ({"eps": 0.0}, ValueError, "eps must be positive during training"),
    ({"momentum": "a"}, TypeError, "momentum"),
    ({"negative_slope": "a"}, TypeError, "negative_slope"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_arguments(device: torch.device, changes, error, message: str) -> None:
    case = research_case(7, (4, 6, 5, 3), True, device=device)
    with pytest.raises(error, match=message):
        call(case, **changes)


@pytest.mark.slow
@pytest.mark.huge
@pytest.mark.usefixtures("all_threads")
def test_more_than_2_31_elements(device: torch.device, backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain PyTorch keeps every activation")
    needs_memory(device, 9)
    rows = 2**25 + 4
    case = research_case(2, (64, 8, 4, 1), True, dtype=torch.float16, device=device)
    piece, *rest = case.tensors.values()
    x = piece.repeat(rows // 2, 1)
    weights, biases, norm = rest[:3], rest[3:6], rest[6:]
    weights[0].requires_grad_()
    output = OP(x, weights, biases, *norm, None, None, True, [0.0])
    expected = OP(piece, weights, biases, *norm, None, None, True, [0.0])
    for start in (0, rows // 2, rows - 2):
        torch.testing.assert_close(output[start : start + 2], expected, atol=2e-3, rtol=2e-3)
    grad_output = torch.zeros_like(output)
    grad_output[-2] = 1.0
    (grad,) = torch.autograd.grad(output, weights[0], grad_output)
    assert grad.isfinite().all()
    assert grad.abs().max() > 0
