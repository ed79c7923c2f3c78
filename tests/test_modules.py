"""FusedResearchNet and FusedSequential compute what plain modules compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.networks import assert_same_step, kernels_run, network_layers, networks, pair
from torch import nn

import fused_mlp
from fused_mlp import (
    FusedResearchNet,
    FusedSequential,
)
from fused_mlp.dropout import draw_seed, keep_mask

pytestmark = pytest.mark.usefixtures("target")


@pytest.mark.parametrize("hidden", [(32,), (64, 32), (16, 24, 8), (8, 8, 8, 8)])
@pytest.mark.parametrize("training", [True, False])
def test_network_of_any_depth_agrees_with_eager(device, hidden, training):
    eager, fused = networks(device, hidden)
    eager.train(training)
    fused.train(training)
    for _ in range(2):
        assert_same_step(eager, fused, torch.randn(16, 10, device=device, requires_grad=True))
    x = torch.randn(16, 10, device=device)
    weights = [m.weight for m in fused.research_layers if isinstance(m, nn.Linear)]
    if fused_mlp.on_chip.fits(x, weights):
        assert kernels_run(fused, x) == ["research_net"]
    else:  # op by op
        expected = ["linear_relu"] * (len(hidden) - 1) + ["batch_norm_leaky_relu"]
        assert kernels_run(fused, x) == expected


def test_same_seed_gives_same_initial_weights(device):
    eager, fused = networks(device, (16, 24, 8), dropout=0.3)
    for name, value in eager.state_dict().items():
        assert torch.equal(fused.state_dict()[name], value), name


def test_network_names_what_is_wrong_with_its_arguments():
    with pytest.raises(ValueError, match="hidden_layers"):
        FusedResearchNet(10, [], 5)
    with pytest.raises(ValueError, match="dropout probability"):
        FusedResearchNet(10, [64, 32], 5, dropout=1.5)


def test_dropout_masks_follow_from_manual_seed(device):
    eager, fused = networks(device, (16, 24, 8), dropout=0.4)
    x = torch.randn(32, 10, device=device)
    torch.manual_seed(7)
    output = fused(x)
    torch.manual_seed(7)
    seed = draw_seed(device)
    layers = list(eager.research_layers)
    hidden = x
    for stream in range(2):
        linear = layers[3 * stream]
        keep = keep_mask(seed, 32, linear.out_features, 0.4, stream)
        hidden = F.relu(linear(hidden)) * keep / 0.6
    for layer in layers[6:]:
        hidden = layer(hidden)
    torch.testing.assert_close(output, hidden, rtol=1e-4, atol=1e-5)


def test_no_seed_is_drawn_where_nothing_is_dropped(device):
    _, fused = networks(device, dropout=0.3)
    x = torch.randn(8, 10, device=device)
    state = torch.get_rng_state()
    fused.eval()(x)
    fused.train().research_layers[2].eval()
    fused(x)
    assert torch.equal(torch.get_rng_state(), state)
    fused.train()(x)
    if device.type == "cpu":
        assert not torch.equal(torch.get_rng_state(), state)


def test_dropout_layer_keeps_its_rate(device):
    fused = FusedSequential(nn.Linear(4, 256), nn.ReLU(), nn.Dropout(0.25)).to(device)
    with torch.no_grad():
        fused[0].weight.zero_()
        fused[0].bias.fill_(1.0)
        output = fused(torch.randn(256, 4, device=device))
    assert abs((output != 0).float().mean().item() - 0.75) < 0.01
    torch.testing.assert_close(output.max().item(), 1 / 0.75)


BAD_INPUTS = {
    "width": lambda device: torch.randn(4, 9, device=device),
    "dtype": lambda device: torch.randn(4, 10, device=device).double(),
    "integers": lambda device: torch.ones(4, 10, device=device, dtype=torch.int64),
    "unbatched": lambda device: torch.randn(10, device=device),
    "scalar": lambda device: torch.tensor(1.0, device=device),
    "four dimensions": lambda device: torch.randn(2, 3, 4, 10, device=device),
    "list": lambda device: [1.0] * 10,
    "none": lambda device: None,
    "other device": lambda device: torch.randn(4, 10, device="meta"),
    "sparse": lambda device: torch.randn(4, 9, device=device).to_sparse(),
    "one row": lambda device: torch.randn(1, 10, device=device),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
def test_unusual_input_raises_or_computes_what_eager_does(device, kind, warm):
    eager, fused = pair(network_layers(device=device))
    if warm:
        for net in (eager, fused):
            net(torch.ones(4, 10, device=device))
    x = BAD_INPUTS[kind](device)
    results = []
    for net in (eager, fused):
        try:
            results.append(net(x))
        except Exception as error:
            results.append((type(error), str(error)))
    expected, output = results
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(output, expected)
    else:
        assert output == expected
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6)])
def test_linear_relu_takes_any_leading_dimensions(device, shape):
    eager, fused = pair([nn.Linear(6, 8, device=device), nn.ReLU()])
    x = torch.randn(shape, device=device, requires_grad=True)
    assert_same_step(eager, fused, x)
    assert kernels_run(fused, x) == ["linear_relu"]


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3), (1, 6, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_takes_rows_and_sequences(device, shape, training):
    eager, fused = pair([nn.BatchNorm1d(6, device=device), nn.LeakyReLU()])
    x = torch.randn(shape, device=device, requires_grad=True)
    assert_same_step(eager.train(training), fused.train(training), x)
    assert kernels_run(fused, x) == ["batch_norm_leaky_relu"]


def test_empty_batch_in_evaluation(device):
    eager, fused = networks(device)
    x = torch.randn(0, 10, device=device)
    assert fused.eval()(x).shape == eager.eval()(x).shape == (0, 5)


def test_batch_size_may_change_from_call_to_call(device):
    eager, fused = networks(device)
    for rows in (2, 33, 7, 128):
        x = torch.randn(rows, 10, device=device)
        torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)


def test_wide_network_agrees_with_eager(device):
    eager, fused = pair(network_layers((20, 700, 300, 5), device=device))
    assert_same_step(eager, fused, torch.randn(8, 20, device=device, requires_grad=True))
