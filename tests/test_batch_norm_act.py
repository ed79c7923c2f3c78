"""``batch_norm_act``: activations and dropout behind a batch norm, its statistics, its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import (
    DTYPES,
    LAYOUTS,
    assert_same_differentiable_gradients,
    assert_same_nonfinite,
    batch_norm_case,
    check_case,
    lay_out,
)

from fused_mlp.functional import batch_norm_act, batch_norm_leaky_relu

NAMES = ("none", "relu", "leaky_relu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_shapes(device: torch.device, dtype: torch.dtype, activation: str, training: bool) -> None:
    for shape in ((7, 5), (64, 33), (6, 1), (300, 17), (4, 3, 5), (5, 9, 40), (17, 64), (513, 3)):
        for p in (0.0, 0.4):
            check_case(
                batch_norm_case(
                    shape, training, activation=activation, p=p, dtype=dtype, device=device
                )
            )


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("activation", NAMES)
def test_affine(device: torch.device, affine: str, activation: str) -> None:
    for training in (True, False):
        options = {"activation": activation, "p": 0.3, "device": device}
        check_case(batch_norm_case((9, 6), training, affine, **options))
        check_case(batch_norm_case((3, 4, 7), training, affine, **options))


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_single_precision_parameters(
    device: torch.device, activation: str, dtype: torch.dtype
) -> None:
    check_case(
        batch_norm_case(
            (33, 12), True, activation=activation, p=0.3, dtype=dtype,
            parameter_dtype=torch.float32, device=device,
        )
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1000, 64), (70, 700), (40, 30, 25)])
@pytest.mark.usefixtures("all_threads")
def test_larger(device: torch.device, shape: tuple[int, ...]) -> None:
    for p in (0.0, 0.3):
        check_case(batch_norm_case(shape, True, activation="relu", p=p, device=device))
        check_case(batch_norm_case(shape, False, activation="leaky_relu", p=p, device=device))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_at_the_kink(device: torch.device, training: bool, activation: str) -> None:
    """A weight and a bias of 0, as a last layer often begins, put every value on the kink."""
    x, grad = torch.randn(9, 5, device=device), torch.randn(9, 5, device=device)
    found = []
    for function in (
        lambda *tensors: batch_norm_act(*tensors, training, activation=activation),
        lambda *tensors: getattr(F, activation)(F.batch_norm(*tensors, training)),
    ):
        mean, var = torch.zeros(5, device=device), torch.ones(5, device=device)
        parameters = [torch.zeros(5, device=device, requires_grad=True) for _ in range(2)]
        output = function(x, mean, var, *parameters)
        found.append((output, *torch.autograd.grad(output, parameters, grad)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: torch.device, layout: str) -> None:
    case = batch_norm_case((7, 6, 5), True, activation="relu", p=0.2, device=device)
    laid = [lay_out(t, layout) for t in case.tensors.values()]
    check_case(case, laid, lay_out(torch.randn(7, 6, 5).to(device), layout))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("activation", NAMES)
def test_running_statistics_are_those_of_torch(
    device: torch.device, activation: str, p: float
) -> None:
    x = torch.randn(40, 6, device=device) * 2 + 3
    ours = (torch.zeros(6, device=device), torch.ones(6, device=device))
    torchs = (ours[0].clone(), ours[1].clone())
    tracked = torch.tensor(4, device=device)
    versions = [t._version for t in (*ours, tracked)]
    batch_norm_act(
        x, *ours, training=True, activation=activation, dropout_p=p, num_batches_tracked=tracked
    )
    F.batch_norm(x, *torchs, training=True)
    torch.testing.assert_close(ours, torchs)
    assert tracked == 5
    assert all(t._version > v for t, v in zip((*ours, tracked), versions, strict=True))


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_infinite_coefficients(device: torch.device, activation: str, p: float) -> None:
    """ReLU of minus infinity is 0, LeakyReLU's slope times it is not."""
    for slope in (0.0, 0.1):
        case = batch_norm_case(
            (9, 4), True, negative_slope=slope, activation=activation, p=p, device=device
        )
        case.tensors["bias"][1] = float("inf")
        case.tensors["bias"][2] = float("-inf")
        case.tensors["input"][3, 3] = float("nan")
        tensors = [*case.tensors.values()]
        assert_same_nonfinite(case.fused(*tensors), case.plain(*tensors))


def test_nan_gradient_stops_at_the_relu(device: torch.device) -> None:
    case = batch_norm_case((9, 4), False, activation="relu", device=device)
    tensors = [t.requires_grad_() for t in case.tensors.values()]
    output = case.fused(*tensors)
    grad = torch.where(output <= 0, float("nan"), 1.0).to(output)
    for result in torch.autograd.grad(output, tensors, grad):
        assert result.isfinite().all()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_differentiable_gradients_know_eps(device: torch.device, training: bool) -> None:
    """A gradient that is itself differentiable comes from a formula: eps stands there as well."""
    options = {"activation": "relu", "p": 0.3, "dtype": torch.float64, "eps": 0.5}
    case = batch_norm_case((17, 5), training, device=device, **options)
    assert_same_differentiable_gradients(case)


def test_batch_norm_leaky_relu_is_the_special_case(device: torch.device) -> None:
    x = torch.randn(40, 6, device=device)
    arguments = {"running_mean": None, "running_var": None, "training": True}
    assert torch.equal(
        batch_norm_act(x, activation="leaky_relu", negative_slope=0.2, **arguments),
        batch_norm_leaky_relu(x, negative_slope=0.2, **arguments),
    )


def test_no_dropout_in_evaluation(device: torch.device) -> None:
    x, mean, var = torch.randn(9, 4, device=device), *torch.rand(2, 4, device=device)
    given = (x, mean, var)
    assert torch.equal(batch_norm_act(*given, dropout_p=0.5), batch_norm_act(*given))
    torch.manual_seed(0)
    first = batch_norm_act(x, None, None, training=True, dropout_p=0.5)
    assert 0 < (first == 0).sum() < first.numel()
    torch.manual_seed(0)
    assert torch.equal(first, batch_norm_act(x, None, None, training=True, dropout_p=0.5))


BAD = [
    (lambda x: batch_norm_act(3.0, None, None), TypeError, "batch_norm_act.*input.*float"),
    (
        lambda x: batch_norm_act(x, None, None, training=True, activation="gelu"),
        ValueError,
        "activation must be one of none, relu, leaky_relu, but got 'gelu'",
    ),
    (lambda x: batch_norm_act(x, None, None), RuntimeError, "batch_norm_act.*running_mean"),
    (
        lambda x: batch_norm_act(x[:1], None, None, training=True),
        ValueError,
        "batch_norm_act.*more than 1 value",
    ),
    (
        lambda x: batch_norm_act(x, None, None, training=True, dropout_p=2.0),
        ValueError,
        "batch_norm_act.*between 0 and 1",
    ),
    (
        lambda x: batch_norm_act(x, None, None, training=True, negative_slope="1"),
        TypeError,
        "batch_norm_act.*negative_slope",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(device: torch.device, call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(4, 3, device=device))
