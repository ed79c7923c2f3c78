"""Checkpoints go both ways between the eager network and the fused one, strictly."""

from __future__ import annotations

import io

import pytest
import torch
from support.networks import network_layers
from torch import nn

import fused_mlp
from fused_mlp import FusedResearchNet, FusedSequential
from fused_mlp.eager import IntelligentResearchNetwork

pytestmark = pytest.mark.usefixtures("target")


def trained(network: nn.Module, device: torch.device) -> nn.Module:
    network.to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.randn(16, 10, device=device)).square().mean().backward()
        optimizer.step()
    return network.eval()


@pytest.mark.parametrize("hidden", [[32], [64, 32], [16, 24, 8]])
def test_keys_shapes_and_order_are_eagers(hidden):
    eager = IntelligentResearchNetwork(10, hidden, 5).state_dict()
    fused = FusedResearchNet(10, hidden, 5).state_dict()
    assert list(fused) == list(eager)
    for name, value in eager.items():
        assert (fused[name].shape, fused[name].dtype) == (value.shape, value.dtype)
    assert fused._metadata.keys() == eager._metadata.keys()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("direction", ["eager to fused", "fused to eager"])
def test_trained_state_loads_strictly_and_gives_the_same_output(device, direction, assign):
    networks = [IntelligentResearchNetwork(10, [64, 32], 5), FusedResearchNet(10, [64, 32], 5)]
    if direction == "fused to eager":
        networks.reverse()
    source, target = networks
    trained(source, device)
    target.to(device).eval()
    x = torch.randn(16, 10, device=device)
    target(x)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=assign)
    torch.testing.assert_close(target(x), source(x), rtol=1e-4, atol=1e-5)


def test_state_loads_into_a_network_that_goes_on_training(device):
    fused = trained(FusedResearchNet(10, [64, 32], 5, dropout=0.0), device)
    eager = IntelligentResearchNetwork(10, [64, 32], 5, dropout=0.0).to(device)
    eager.load_state_dict(fused.state_dict())
    torch.manual_seed(5)
    trained(eager, device)
    torch.manual_seed(5)
    trained(fused, device)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_missing_and_unexpected_keys_are_named():
    fused = FusedResearchNet(10, [64, 32], 5)
    state = fused.state_dict()
    state["extra"] = state.pop("research_layers.4.running_mean")
    with pytest.raises(RuntimeError, match=r"research_layers\.4\.running_mean(.|\n)*extra"):
        fused.load_state_dict(state)


def test_checkpoint_without_batch_counter_loads_as_in_eager():
    state = FusedResearchNet(10, [64, 32], 5).state_dict()
    del state["research_layers.4.num_batches_tracked"]
    state._metadata["research_layers.4"]["version"] = 1
    FusedResearchNet(10, [64, 32], 5).load_state_dict(state, strict=True)


def test_fuse_and_unfuse_keep_keys_and_values():
    model = nn.ModuleDict({"body": nn.Sequential(*network_layers()), "head": nn.Linear(5, 2)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for change in (fused_mlp.fuse, fused_mlp.unfuse):
        change(model)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_sequential_state_loads_into_fused_sequential(device):
    eager = trained(nn.Sequential(*network_layers()), device)
    fused = FusedSequential(*network_layers()).to(device).eval()
    fused.load_state_dict(eager.state_dict(), strict=True)
    x = torch.randn(8, 10, device=device)
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)
