"""Copies, conversions, threads and other backends between two calls of a fused network."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from support.networks import kernels_run, networks

import fused_mlp
from fused_mlp.ops import fit as fit_module

pytestmark = pytest.mark.usefixtures("target")


def test_copies_and_files_hold_no_plan_and_run_alike(device):
    _, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    expected = fused.eval()(x)
    assert "_cache" in fused.research_layers.__dict__
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for again in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(file, weights_only=False),
    ):
        assert "_cache" not in again.research_layers.__dict__
        assert torch.equal(again(x), expected)
        with torch.no_grad():
            again.research_layers[6].bias.add_(1)
        torch.testing.assert_close(again(x), expected + 1)
        assert torch.equal(fused(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_converted_network_runs_in_its_new_dtype(device, dtype):
    eager, fused = networks(device)
    fused(torch.randn(6, 10, device=device))
    eager.eval().to(dtype)
    fused.eval().to(dtype)
    x = torch.randn(6, 10, device=device, dtype=dtype)
    output = fused(x)
    assert output.dtype == dtype
    torch.testing.assert_close(output, eager(x), rtol=0.05, atol=0.05)
    assert kernels_run(fused, x) == ["research_net"]
    fused.research_layers[3].float()  # one layer alone: eager's error
    eager.research_layers[3].float()
    with pytest.raises(RuntimeError) as expected:
        eager(x)
    with pytest.raises(RuntimeError) as raised:
        fused(x)
    assert str(raised.value) == str(expected.value)


def test_parameters_resized_behind_the_modules_back_raise_as_eager_does(device):
    eager, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    fused(x)
    for net in (eager, fused):
        layer = net.research_layers[3]
        layer.weight.data = layer.weight.data[:, :50]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        eager(x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fused(x)


def test_network_moves_through_the_meta_device(device):
    _, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    fused(x)
    state = copy.deepcopy(fused.state_dict())
    expected = fused.eval()(x)
    fused.to("meta")
    assert fused(x.to("meta")).is_meta
    fused.to_empty(device=device).load_state_dict(state)
    torch.testing.assert_close(fused(x), expected)


def test_threads_share_one_module(device):
    _, fused = networks(device)
    fused.eval()
    inputs = [torch.randn(4 + i, 10, device=device) for i in range(8)]
    expected = [copy.deepcopy(fused)(x) for x in inputs]
    results = [None] * 8

    def work(i):
        for _ in range(20):
            results[i] = fused(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value)


def test_backend_switched_between_calls_takes_effect(device):
    _, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    output = fused.eval()(x)
    with fused_mlp.use_backend("reference"):
        torch.testing.assert_close(fused(x), output, rtol=1e-4, atol=1e-5)


def test_without_torchs_guards_the_checks_run_in_python(device, monkeypatch):
    monkeypatch.setattr(fit_module, "_TensorGuards", None)
    eager, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    for _ in range(2):
        torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)
    with torch.autocast(device.type, torch.bfloat16):
        torch.testing.assert_close(fused(x), eager(x))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fused(x[:, :9])
    fused.double()
    with pytest.raises(RuntimeError, match="same dtype"):
        fused(x)


def test_jit_trace_records_torchs_own_ops(device):
    eager, fused = networks(device)
    x = torch.randn(6, 10, device=device)
    fused.eval()(x)
    eager.eval()
    traced = torch.jit.trace(fused, x)
    torch.testing.assert_close(traced(x), eager(x))
    assert "fused_mlp_kernels" not in str(traced.inlined_graph)
