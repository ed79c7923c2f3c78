"""Autocast and GradScaler: dtypes, saved tensors and trajectories are the eager network's."""

from __future__ import annotations

import pytest
import torch
from support.drop_in import KINDS, drop_in, rows
from support.networks import kernels_run

pytestmark = [pytest.mark.usefixtures("target"), pytest.mark.parametrize("kind", KINDS)]
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture
def pair(kind, device):
    """Both networks, each called once outside autocast, so that fused plans exist."""
    pair = drop_in(kind, device=device)
    for net in pair:
        net(rows(device=device))
    return pair


@dtypes
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dtypes_of_everything_are_eagers(pair, device, dtype, mode):
    """Of the output, what autograd keeps, every gradient and every buffer; values too."""
    results = []
    for net in pair:
        saved = []
        net.train(mode == "train")
        x = rows(device=device).requires_grad_()
        with (
            torch.autocast(device.type, dtype),
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append((t.dtype, t.shape)) or t, lambda t: t
            ),
        ):
            output = net(x)
        output.float().square().sum().backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        results.append((output, x.grad, gradients, dict(net.named_buffers()), saved))
    *expected, expected_saved = results[0]
    *result, saved = results[1]
    assert result[0].dtype == dtype
    assert saved == expected_saved
    torch.testing.assert_close(result, expected)  # dtypes as well


@dtypes
def test_grad_scaler_trains_as_eager_does(pair, device, dtype):
    results = []
    for net in pair:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**20, growth_interval=2)
        scales = []
        for seed in range(6):
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype):
                loss = net(rows(device=device, seed=seed)).float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        results.append((net.state_dict(), scales))
    torch.testing.assert_close(results[1], results[0])
    if dtype == torch.float16:  # a step was skipped, so the scaler saw the overflow
        assert min(results[1][1]) < 2.0**20


def test_scaled_loss_of_a_fused_step_overflows_as_eagers(pair, device):
    """Without autocast the fused op itself computes; an infinity in its gradient is found."""
    for net in pair:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**100)
        before = {name: p.clone() for name, p in net.named_parameters()}
        scaler.scale(net(rows(device=device)).square().sum() * 1e12).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**99
        torch.testing.assert_close(dict(net.named_parameters()), before)


def test_region_without_autocast_is_fused(pair, kind, device):
    _, fused = pair
    x = rows(device=device)
    expected = fused.eval()(x)
    with torch.autocast(device.type, torch.bfloat16):
        assert kernels_run(fused, x) == []
        with torch.autocast(device.type, enabled=False):
            assert kernels_run(fused, x) == KINDS[kind]
            torch.testing.assert_close(fused(x), expected)


@dtypes
def test_half_precision_module_under_autocast(pair, device, dtype):
    results = []
    for net in pair:
        net.to(dtype).eval()
        with torch.autocast(device.type, dtype):
            results.append(net(rows(device=device, dtype=dtype)))
    torch.testing.assert_close(results[1], results[0])


@dtypes
def test_weights_cached_by_autocast_are_shared_between_calls(pair, device, dtype):
    """Two calls in one region: the cast weight gets the gradient of both."""
    results = []
    for net in pair:
        net.eval().zero_grad()
        with torch.autocast(device.type, dtype):
            loss = net(rows(device=device)).float().sum() + net(rows(device=device, seed=2)).sum()
        loss.backward()
        results.append({name: p.grad for name, p in net.named_parameters()})
    torch.testing.assert_close(results[1], results[0])
