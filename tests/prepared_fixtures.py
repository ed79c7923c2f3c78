"""Networks made ready for their next call, and whether they ran so. Import by name."""

from __future__ import annotations

import threading

import pytest
import torch
from support.networks import assert_same_step
from torch import nn

from fused_mlp import FusedResearchNet, use_backend
from fused_mlp.eager import IntelligentResearchNetwork
from fused_mlp.modules.prepared import PreparedNet


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call so far ran as prepared."""
    taken: list[bool] = []
    run = PreparedNet.run

    def noted(self, *arguments):
        output = run(self, *arguments)
        taken.append(output is not None)
        return output

    monkeypatch.setattr(PreparedNet, "run", noted)
    return taken


def networks(dropout: float = 0.0) -> tuple[nn.Module, FusedResearchNet]:
    eager = IntelligentResearchNetwork(10, [16, 8], 5, dropout=dropout)
    fused = FusedResearchNet(10, [16, 8], 5, dropout=dropout)
    fused.load_state_dict(eager.state_dict())
    return eager, fused


def ready(training: bool, runs: list[bool]) -> tuple[nn.Module, FusedResearchNet]:
    """Return both networks after calls that left the fused one prepared in both modes."""
    eager, fused = networks()
    for mode in (not training, training):
        for net in (eager, fused):
            net.train(mode)
        for _ in range(2):
            assert_same_step(eager, fused, torch.randn(6, 10))
    assert runs == [True, True], "the second call in a mode runs as prepared"
    runs.clear()
    return eager, fused


def assert_transforms_run_the_plain_modules(
    eager: nn.Module, fused: nn.Module, runs: list[bool]
) -> None:
    """Assert that autocast and torch.func see the layers; a plain call is prepared again."""
    x = torch.randn(6, 10)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), eager(x))
        assert fused(x).dtype == torch.bfloat16
    mapped = torch.vmap(fused)(x[None])
    torch.testing.assert_close(mapped[0], eager(x), rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(fused, (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(eager, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)
    assert not any(runs)
    fused(x)
    assert runs[-1]


def assert_backend_is_followed(fused: nn.Module, runs: list[bool]) -> None:
    """Assert that another backend computes the same, not prepared, and that ours is ready again."""
    x = torch.randn(6, 10)
    expected = fused(x)
    with use_backend("reference"):
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
        assert not runs[-1]
    fused(x)
    fused(x)
    assert runs[-1]


def assert_threads_see_a_whole_state(fused: nn.Module, leaky: nn.LeakyReLU) -> None:
    """Assert that calls beside a thread that changes a slope see the old one or the new one."""
    x = torch.randn(6, 10)
    outputs = []
    for slope in (0.1, 0.9):
        leaky.negative_slope = slope
        outputs.append(fused(x).detach())
    wrong, errors = [], []
    stop = threading.Event()

    def call() -> None:
        try:
            while not stop.is_set():
                output = fused(x).detach()
                if not any(torch.allclose(output, known, atol=1e-5) for known in outputs):
                    wrong.append(output)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(300):
        leaky.negative_slope = (0.1, 0.9)[i % 2]
        fused(x)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert wrong == []
