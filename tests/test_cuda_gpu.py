"""What only a GPU shows of the CUDA C++ kernels: graphs, streams, devices, compute-sanitizer.

The common test files run on a GPU as well (``pytest -m gpu``); `make gpu-check` runs their smoke
part under compute-sanitizer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import EXAMPLES, example
from torch import Tensor

from fused_mlp import FusedResearchNet, backends

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=["native", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend of CUDA devices, active during the test."""
    (state,) = (s for s in backends.status() if (s.device, s.name) == ("cuda", request.param))
    if not state.available:
        pytest.skip(f"no {request.param} backend on cuda: {state.detail}")
    with backends.use_backend(request.param):
        yield request.param


def capture(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Warm up on a side stream, as torch asks for, then capture one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def run_example(name: str, device: str) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """Return an op's inputs and a step that gives its output and every gradient."""
    case = example(name, dtype=torch.float32, device=torch.device(device))
    inputs = [t.requires_grad_() for t in case.tensors.values()]

    def step() -> list[Tensor]:
        output = case.fused(*inputs)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]

    return inputs, step


@pytest.mark.gpu
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_replayed_graph_computes_anew(backend: str, name: str) -> None:
    inputs, step = run_example(name, "cuda")
    graph, captured = capture(step)
    for scale in (1.0, -0.5):
        with torch.no_grad():
            inputs[0].mul_(scale).add_(0.25)
        expected = [t.clone() for t in step()]
        graph.replay()
        for got, wanted in zip(captured, expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.gpu
def test_a_replayed_graph_draws_a_new_mask(backend: str) -> None:
    """As nn.Dropout in a graph: every replay moves the generator on, and a seed brings it back."""
    net = FusedResearchNet(10, [64, 32], 5, dropout=0.5, device="cuda")
    x = torch.randn(300, 10, device="cuda")
    parameters = list(net.parameters())

    def step() -> list[Tensor]:
        output = net(x)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), parameters)]

    graph, captured = capture(step)

    def replay() -> list[Tensor]:
        graph.replay()
        return [t.clone() for t in captured]

    torch.cuda.manual_seed(5)
    first, second = replay(), replay()
    torch.cuda.manual_seed(5)
    again = replay()
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert all(map(torch.equal, first, again))


@pytest.mark.gpu
@pytest.mark.parametrize("name", EXAMPLES)
def test_kernels_run_on_the_current_stream(backend: str, name: str) -> None:
    """The input is late on a side stream; a kernel on another stream would not wait for it."""
    inputs, step = run_example(name, "cuda")
    late = inputs[0].detach().clone() * 2 + 1
    with torch.no_grad():
        kept = inputs[0].detach().clone()
        inputs[0].copy_(late)
        expected = [t.clone() for t in step()]
        inputs[0].copy_(kept)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # some 10 ms
        with torch.no_grad():
            inputs[0].copy_(late)
        results = step()
    side.synchronize()
    for got, wanted in zip(results, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", EXAMPLES)
def test_another_device_than_the_current_one(backend: str, name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    with torch.cuda.device(0):
        _, here = run_example(name, "cuda:0")
        _, there = run_example(name, "cuda:1")
        for a, b in zip(here(), there(), strict=True):
            assert b.device == torch.device("cuda:1")
            torch.testing.assert_close(a, b.to(a.device))
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("training", "launches"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_launches_of_a_forward_pass(backend: str, training: bool, launches: int) -> None:
    """What the profiler sees agrees with what the simulator's tests count."""
    net = FusedResearchNet(10, [64, 32], 5, dropout=0.0, device="cuda").train(training)
    x = torch.randn(4096, 10, device="cuda")
    with torch.no_grad():
        net(x)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            net(x)
            torch.cuda.synchronize()
    names = [e.name for e in profile.events() if "fused_mlp" in e.name]
    assert len(names) == launches, names


# ------------------------------------------------------------------------ make gpu-check


def gpu_check(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gpu_check.py")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_says_that_there_is_no_gpu() -> None:
    done = gpu_check()
    assert done.returncode == 1
    assert "needs an NVIDIA GPU" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("code", [0, 9])
def test_gpu_check_runs_both_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_check as script

    log, tool = tmp_path / "log", tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> {log}\nexit {code}\n')
    tool.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert script.main() == (1 if code else 0)
    calls = log.read_text().splitlines()
    assert [call.split()[2] for call in calls] == ["memcheck", "racecheck"]
    for call in calls:
        assert call.startswith("1 --tool") and call.endswith("-m pytest -q -m gpu and smoke tests")
