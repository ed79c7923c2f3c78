"""Networks made ready for their next call, and whether they ran so. Import by name."""

from __future__ import annotations

import pytest
import torch
from support.networks import assert_same_step
from torch import nn

from fused_mlp import FusedResearchNet
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
