"""``linear_act``: every activation against float64, values that are not numbers, its errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    DTYPES,
    INTERPRETED,
    LAYOUTS,
    act_case,
    assert_as_accurate,
    assert_same_nonfinite,
    check_case,
    check_special_values,
    lay_out,
    linear_case,
    odd_triples,
)

from fused_mlp import activations
from fused_mlp.functional import linear_act, linear_relu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_odd_shapes(device: torch.device, dtype: torch.dtype, kind: str) -> None:
    for rows, in_features, out_features in odd_triples():
        options = {"dtype": dtype, "device": device}
        check_case(act_case(kind, (rows, in_features), out_features, **options))
        check_case(act_case(kind, (rows, in_features), out_features, bias=False, p=0.4, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.usefixtures("all_threads")
def test_larger(device: torch.device, dtype: torch.dtype, kind: str) -> None:
    """Beyond the cache, on several threads, and with more rows than a block has."""
    for rows, in_features, out_features in (
        (1000, 64, 64),
        (70, 700, 130),
        (3, 300, 130),
        (513, 129, 1),
    ):
        rows = rows // 10 + 1 if INTERPRETED else rows
        for p in (0.0, 0.3):
            options = {"p": p, "dtype": dtype, "device": device}
            check_case(act_case(kind, (rows, in_features), out_features, **options))


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_batch_shapes(device: torch.device, kind: str, p: float) -> None:
    for shape in ((6,), (2, 1, 3, 6), (0, 3, 6), (3, 0, 6), (4, 0), (0,)):
        check_case(act_case(kind, shape, 5, p=p, device=device))
    check_case(act_case(kind, (5, 4), 0, p=p, device=device))


@pytest.mark.parametrize("rows", [1, 5, 30])
@pytest.mark.parametrize("kind", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_features_of_a_wide_input(
    device: torch.device, dtype: torch.dtype, kind: str, rows: int
) -> None:
    """Beyond the cache threads share the features, of which there may be none to divide by."""
    check_case(act_case(kind, (rows, 300), 0, p=0.3, dtype=dtype, device=device))
    check_case(act_case(kind, (rows, 0), 300, p=0.3, dtype=dtype, device=device))


@pytest.mark.parametrize("kind", ["tanh", "silu", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: torch.device, kind: str, layout: str) -> None:
    example = act_case(kind, (3, 11, 18), 13, p=0.2, device=device)
    grad = torch.randn(3, 11, 13).to(device)
    laid = [lay_out(t, layout) for t in example.tensors.values()]
    check_case(example, laid, lay_out(grad, layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_special_values(device: torch.device, dtype: torch.dtype, kind: str) -> None:
    check_special_values(kind, dtype, device)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_nonfinite(device: torch.device, kind: str, value: float) -> None:
    """NaN and infinity reach the values torch's own operations let them reach, and no others."""
    for place in ("input", "weight", "bias"):
        for p in (0.0, 0.5):
            example = act_case(kind, (9, 11), 13, p=p, device=device)
            example.tensors[place].view(-1)[4] = value
            tensors = list(example.tensors.values())
            with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's GELU of infinity is NaN
                assert_same_nonfinite(example.fused(*tensors), example.plain(*tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_whole_range(device: torch.device, dtype: torch.dtype, kind: str) -> None:
    """A value alone, from tiny to where the activation is flat, errs no more than torch's."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 1, 500)]).to(device, dtype)
    x = torch.cat([x, -x])[:, None]
    one = torch.ones(1, 1, dtype=dtype, device=device)
    example = act_case(kind, (1, 1), 1, bias=False, dtype=dtype, device=device)
    parts = {"all": x.abs() >= 0, "tiny": x.abs() < 1e-3}
    if dtype == torch.float32:  # the formula in float64 is no oracle of float64 where it cancels
        parts |= {"middle": (x > -6) & (x < -3), "flat": x < -6}
    for name, part in parts.items():
        results = []
        for function, as_type in (
            (example.fused, dtype), (example.plain, dtype), (example.exact, torch.float64)
        ):  # fmt: skip
            leaf = x[part][:, None].to(as_type).requires_grad_()
            output = function(leaf, one.to(as_type))
            (grad,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
            results.append((output.detach(), grad))
        for what, ours, torchs, exact in zip(("output", "gradient"), *results, strict=True):
            assert_as_accurate(ours, torchs, exact, f"{kind}, {name}: {what}")


@pytest.mark.parametrize("kind", ["leaky_relu", "gelu", "tanh"])
def test_zero_gradient_where_dropped(device: torch.device, kind: str) -> None:
    example = act_case(kind, (33, 20), 17, p=0.5, bias=False, device=device)
    x, weight = example.tensors.values()
    output = example.fused(x.requires_grad_(), weight.requires_grad_())
    grad = torch.where(output == 0, 1e30, 0.0)
    for result in torch.autograd.grad(output, (x, weight), grad):
        assert (result == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tanh_behind_dropout_in_half_precision(device: torch.device, dtype: torch.dtype) -> None:
    """Scaled and rounded, an output near 1 has too few digits left for 1 - tanh²."""
    case = act_case("tanh", (4, 9), 3, bias=False, p=0.3, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(338)
    for tensor in case.tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    check_case(case)


def test_equal_values_at_the_zero_of_gelus_derivative(device: torch.device) -> None:
    """Sixty-five outputs that are one: what torch errs is that one's luck, not their average."""
    generator = torch.Generator().manual_seed(124)
    x = torch.randn(1, generator=generator)
    weight = torch.randn(1, 65, generator=generator) * 65**-0.5
    bias = -0.75179 - x * weight.sum() + 1e-3 * torch.randn(1, generator=generator)
    torch.manual_seed(0)
    tensors = (x.expand(65), weight.expand(65, 65), bias.expand(65))
    check_case(act_case("gelu", (65,), 65, device=device), [t.to(device) for t in tensors])


def test_a_single_row_at_the_zero_of_gelus_derivative(device: torch.device) -> None:
    """33 equal terms, which torch adds up in many parts: the gradient is their rounding."""
    generator = torch.Generator().manual_seed(105)
    x = torch.randn(1, generator=generator)
    weight = (-0.7517915 / (33 * x.double())).float()
    weight = weight * (1 + 1e-5 * torch.randn(1, generator=generator))
    torch.manual_seed(0)
    case = act_case("gelu", (33,), 31, bias=False, device=device)
    check_case(case, [t.to(device) for t in (x.expand(33), weight.expand(31, 33))])


def test_linear_relu_is_the_special_case(device: torch.device) -> None:
    tensors = list(linear_case((33, 20), 17, device=device).tensors.values())
    assert torch.equal(linear_act(*tensors, "relu"), linear_relu(*tensors))
    torch.manual_seed(3)
    first = linear_act(*tensors, "relu", 0.5, True)
    torch.manual_seed(3)
    assert torch.equal(first, linear_relu(*tensors, 0.5, True))
    assert torch.equal(linear_act(*tensors, "relu", 0.5), linear_relu(*tensors))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_only_gelu_and_silu_keep_what_they_saw(device: torch.device, kind: str) -> None:
    """The output, which the next layer keeps anyway, is all that the others keep for backward."""
    example = act_case(kind, (33, 20), 17, device=device)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = example.fused(*(t.requires_grad_() for t in example.tensors.values()))
    of_its_size = [t for t in saved if t is not None and t.shape == output.shape]
    others = [t for t in of_its_size if t.data_ptr() != output.data_ptr()]
    assert len(others) == int(kind.split(",")[0] in ("gelu", "silu") or "below" in kind)


def test_the_numbers_of_the_activations_are_those_of_the_kernels() -> None:
    names = ("NONE", "RELU", "LEAKY_RELU", "GELU", "GELU_TANH", "SILU", "TANH")
    assert [getattr(activations, name) for name in names] == [*range(7)]
    assert [*activations.TABLE] == [*range(7)]


def test_triton_counts_the_activations_alike() -> None:
    pytest.importorskip("triton")
    from fused_mlp.kernels import activations as theirs

    names = ("NONE", "RELU", "LEAKY_RELU", "GELU", "GELU_TANH", "SILU", "TANH")
    assert [getattr(theirs, name).value for name in names] == [*range(7)]


@given(
    batch=st.lists(st.integers(0, 9), max_size=3),
    in_features=st.integers(0, 40),
    out_features=st.integers(0, 40),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.25, 0.7]),
    kind=st.sampled_from([*ACTIVATIONS]),
    dtype=st.sampled_from(DTYPES),
)
def test_properties(
    device: torch.device, batch, in_features, out_features, bias, p, kind, dtype
) -> None:
    check_case(
        act_case(kind, (*batch, in_features), out_features, bias, p, dtype=dtype, device=device)
    )


BAD = [
    (lambda x, w, b: linear_act(None, w, b), TypeError, "linear_act.*input.*NoneType"),
    (lambda x, w, b: linear_act(x, w, b, "elu"), ValueError, "activation must be one of.*'elu'"),
    (lambda x, w, b: linear_act(x, w, b, None), ValueError, "activation must be one of.*None"),
    (
        lambda x, w, b: linear_act(x, w, b, "gelu", approximate="erf"),
        ValueError,
        "approximate must be 'none' or 'tanh', but got 'erf'",
    ),
    (
        lambda x, w, b: linear_act(x, w, b, "leaky_relu", negative_slope="0.1"),
        TypeError,
        "linear_act.*negative_slope.*str",
    ),
    (lambda x, w, b: linear_act(x[:, 1:], w, b, "tanh"), RuntimeError, "linear_act.*in_features"),
    (
        lambda x, w, b: linear_act(x, w.to_sparse(), b, "tanh"),
        RuntimeError,
        r"weight must be a dense tensor, but got layout torch.sparse_coo; .*weight\.to_dense\(\)",
    ),
    (lambda x, w, b: linear_act(x, w, b[1:], "tanh"), RuntimeError, "linear_act.*bias must have"),
    (lambda x, w, b: linear_act(x, w, b, "tanh", 1.5), ValueError, "linear_act.*between 0 and 1"),
    (lambda x, w, b: linear_act(x, w, b, "silu", -0.1, True), ValueError, "between 0 and 1"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(device: torch.device, call, error, message: str) -> None:
    x, weight, bias = (torch.randn(s, device=device) for s in ((4, 3), (5, 3), (5,)))
    with pytest.raises(error, match=message):
        call(x, weight, bias)


@pytest.mark.parametrize("number", [-1, 7, 2**40])
def test_kernels_refuse_an_unknown_activation(device: torch.device, number: int) -> None:
    x, weight = torch.randn(4, 3, device=device), torch.randn(5, 3, device=device)
    with pytest.raises((ValueError, RuntimeError), match="activation"):
        torch.ops.fused_mlp_kernels.linear_act(x, weight, None, number, 0.0, 0.0, None, False)
