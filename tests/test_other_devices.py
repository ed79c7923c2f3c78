"""Devices without kernels run the reference, with one notice; modules may move between devices."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import EXAMPLES, example
from support.drop_in import KINDS, drop_in, rows
from support.networks import assert_same_step

import fused_mlp.functional as FF
from fused_mlp import backends, notice


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    notice.reference_runs.cache_clear()
    yield
    notice.reference_runs.cache_clear()


def test_meta_tensors_give_one_notice():
    x = torch.randn(4, 10, device="meta")
    with pytest.warns(UserWarning, match="fused_mlp: meta tensors hold no values"):
        assert FF.normalize(x).is_meta
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FF.linear_relu(x, torch.randn(3, 10, device="meta")).shape == (4, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_meta_network_trains_in_shapes(kind):
    eager, fused = drop_in(kind, device="meta")
    with pytest.warns(UserWarning, match="meta tensors"):
        fused(rows(device="meta")).sum().backward()
    eager(rows(device="meta")).sum().backward()
    for name, parameter in eager.named_parameters():
        grad = fused.get_parameter(name).grad
        assert (grad.shape, grad.dtype, grad.device) == (
            parameter.grad.shape, parameter.grad.dtype, parameter.grad.device,
        )  # fmt: skip


def test_tracing_gives_no_notice():
    _, fused = drop_in("FusedResearchNet")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fused_mlp: .*")
        torch.export.export(fused, (rows(),))


@pytest.fixture
def unserved(monkeypatch):
    """A CPU that no backend knows, as mps and xpu are: its ops fall to the common kernels."""
    monkeypatch.setattr(backends, "_KEYS", {})
    library = torch.library.Library(backends.KERNELS, "IMPL")
    backends._register(library, "CPU", backends._elsewhere)
    yield
    library._destroy()


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("name", EXAMPLES)
def test_unserved_device_runs_the_reference_with_one_notice(unserved, name):
    case = example(name, dtype=torch.float64, device=torch.device("cpu"))
    tensors = [t.requires_grad_() for t in case.tensors.values()]
    with pytest.warns(UserWarning, match=r"fused_mlp: there are no kernels for cpu"):
        output = case.fused(*tensors)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fused_mlp: .*")
        gradients = torch.autograd.grad(output.square().sum(), tensors)
    expected = case.exact(*tensors)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected.square().sum(), tensors), rtol=1e-6, atol=1e-8
    )


@pytest.mark.filterwarnings("ignore:fused_mlp. there are no kernels")
@pytest.mark.parametrize("kind", KINDS)
def test_network_on_an_unserved_device_agrees_with_eager(unserved, kind):
    eager, fused = drop_in(kind)
    assert backends.active_backend("cpu") == "reference"
    assert_same_step(eager, fused, rows(), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_module_moves_between_devices(kind):
    eager, fused = drop_in(kind)
    for place in ("cpu", "cuda", "cpu", "cuda"):
        for net in (eager, fused):
            net.to(place).zero_grad()
        assert_same_step(eager, fused, rows(device=place), rtol=1e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore:fused_mlp. meta tensors")
@pytest.mark.parametrize("kind", KINDS)
def test_module_moves_to_meta_and_back(kind):
    eager, fused = drop_in(kind)
    state = {name: value.clone() for name, value in fused.state_dict().items()}
    for _ in range(2):
        fused.to("meta")(rows(device="meta"))
        fused.to_empty(device="cpu").load_state_dict(state)
        eager.load_state_dict(state)
        assert_same_step(eager, fused, rows(), rtol=1e-3, atol=1e-4)
        for net in (eager, fused):
            net.zero_grad()
