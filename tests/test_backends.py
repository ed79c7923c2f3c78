"""Choosing a backend: the context manager, the environment variable, what is reported."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from support import INTERPRETED, linear_case, research_case

import fused_mlp
from fused_mlp import backends, use_backend

KERNELS = torch.ops.fused_mlp_kernels


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter, away from this one's choice of backend."""
    kept = {
        k: v for k, v in os.environ.items() if k not in ("FUSED_MLP_BACKEND", "TRITON_INTERPRET")
    }
    root = str(fused_mlp._Path(fused_mlp.__file__).resolve().parent.parent)
    kept["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [kept.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def reference_is_called(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether a call on the CPU reaches the reference implementation."""
    calls = []
    module = importlib.import_module("fused_mlp.reference.linear_act")
    original = module.keep_mask
    monkeypatch.setattr(module, "keep_mask", lambda *a: calls.append(a) or original(*a))
    seed = torch.tensor([1, 2])
    KERNELS.linear_relu(torch.ones(2, 3), torch.ones(4, 3), None, 0.5, seed)
    monkeypatch.undo()
    return bool(calls)


@pytest.mark.smoke
def test_a_compiler_means_native_kernels() -> None:
    """Where there is a compiler the CPU kernels must be there: their tests must not just skip."""
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    (state,) = (s for s in backends.status() if (s.device, s.name) == ("cpu", "native"))
    assert state.available, state.detail


@pytest.mark.smoke
def test_use_backend(device: torch.device, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.active_backend(device.type) == backend
    if device.type == "cpu":
        assert reference_is_called(monkeypatch) == (backend == "reference")


def test_nesting(device: torch.device, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving a block brings back what was chosen around it, after an exception too."""
    with use_backend("reference"):
        assert backends.active_backend(device.type) == "reference"
        if device.type == "cpu":
            assert reference_is_called(monkeypatch)
        with use_backend("auto"):
            assert backends.active_backend(device.type) in ("native", "triton", "reference")
        assert backends.active_backend(device.type) == "reference"
    assert backends.active_backend(device.type) == backend
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        _ = 1 / 0
    assert backends.active_backend(device.type) == backend
    if device.type == "cpu":
        assert reference_is_called(monkeypatch) == (backend == "reference")


def test_other_threads_follow(device: torch.device) -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.active_backend(device.type)))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_backward_of_an_earlier_forward(device: torch.device) -> None:
    """What one backend saved another can use, where their layouts agree: all but research_net."""
    case = linear_case((33, 10), 17, p=0.3, dtype=torch.float64, device=device)
    tensors = [t.requires_grad_() for t in case.tensors.values()]
    output = case.fused(*tensors)
    expected = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    with use_backend("reference"):
        torch.testing.assert_close(torch.autograd.grad(output.sum(), tensors), expected)


def test_research_net_across_backends(device: torch.device) -> None:
    """Forward on one backend and backward on another: right, or an error that says so."""
    case = research_case(33, (10, 24, 16, 5), True, 0.3, dtype=torch.float64, device=device)
    tensors = [t.requires_grad_() for t in case.tensors.values()]
    expected = torch.autograd.grad(case.plain(*tensors).sum(), tensors)
    output = case.fused(*tensors)
    with use_backend("reference"):
        got = torch.autograd.grad(output.sum(), tensors)
    torch.testing.assert_close(got, expected)
    with use_backend("reference"):
        output = case.fused(*tensors)
    try:
        got = torch.autograd.grad(output.sum(), tensors)
    except RuntimeError as error:
        if "saved" not in str(error):
            raise
    else:
        torch.testing.assert_close(got, expected)


def test_unknown_name() -> None:
    with (
        pytest.raises(ValueError, match=r"auto, native, triton, reference.*'fast'"),
        use_backend("fast"),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="Triton can run here")
def test_missing_backend_names_what_is_missing() -> None:
    before = backends.active_backend("cpu")
    message = r"'triton' cannot run here.*(TRITON_INTERPRET=1|not installed)"
    with pytest.raises(RuntimeError, match=message), use_backend("triton"):
        pass
    assert backends.active_backend("cpu") == before


def test_status() -> None:
    states = backends.status()
    assert {(s.device, s.name) for s in states} == {
        (device, name) for device in ("cpu", "cuda") for name in ("native", "triton", "reference")
    }
    for device in ("cpu", "cuda"):
        active = [s for s in states if s.device == device and s.active]
        assert len(active) == 1
        assert active[0].available
        assert active[0].name == backends.active_backend(device)
    for state in states:
        assert state.detail
    assert backends.active_backend("mps") == "reference"


def test_meta_tensors() -> None:
    """Fake kernels give shapes without any backend."""
    x = torch.empty(7, 5, device="meta")
    weight = torch.empty(3, 5, device="meta")
    assert torch.ops.fused_mlp.linear_relu(x, weight).shape == (7, 3)
    assert torch.ops.fused_mlp.normalize(x, [0]).shape == (7, 5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("reference", "reference"), ("auto", None), ("native", "native"), ("fast", "ValueError")],
)
def test_environment_variable(name: str, expected: str | None) -> None:
    if name == "native" and not backends.native_library("cpu").path:
        pytest.skip("no native backend")
    code = "import fused_mlp; print(fused_mlp.backends.active_backend('cpu'))"
    result = run_python(code, FUSED_MLP_BACKEND=name)
    if expected == "ValueError":
        assert result.returncode != 0
        assert "ValueError: backend must be one of" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    assert expected is None or result.stdout.strip() == expected


def test_importing_and_choosing_is_quiet() -> None:
    """No warning of torch's or ours reaches a user who has a backend."""
    if not backends.native_library("cpu").path:
        pytest.skip("without native kernels a warning says so")
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "import torch, fused_mlp\n"
        "with fused_mlp.use_backend('reference'):\n"
        "    fused_mlp.functional.linear_relu(torch.ones(2, 3), torch.ones(4, 3))\n"
        "fused_mlp.functional.linear_relu(torch.ones(2, 3), torch.ones(4, 3))"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
