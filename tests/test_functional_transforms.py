"""torch.func transforms, forward-mode AD and double backward give what the eager network gives."""

from __future__ import annotations

import copy

import pytest
import torch
from support.drop_in import KINDS, drop_in, rows
from support.networks import kernels_run
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

pytestmark = [pytest.mark.usefixtures("target"), pytest.mark.parametrize("kind", KINDS)]
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture
def pair(kind, device):
    """The eager and the fused network in float64, each called once, so that fused plans exist."""
    pair = drop_in(kind, dtype=torch.float64, device=device)
    for net in pair:
        net(rows(device=device).double())
    return pair


def without_statistics(net):
    """Make every batch norm use its batch: torch.func refuses to write running statistics."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return net


TRANSFORMS = {
    "grad": lambda net, x: grad(lambda v: net(v).square().sum())(x),
    "jacrev": lambda net, x: jacrev(net)(x),
    "jacfwd": lambda net, x: jacfwd(net)(x),
    "jvp": lambda net, x: jvp(net, (x,), (x.cos(),)),
    "vmap": lambda net, x: vmap(net)(torch.stack([x, x.sin()])),
    "hessian": lambda net, x: hessian(lambda v: net(v).square().sum())(x),
    "grad of grad": lambda net, x: grad(lambda u: grad(lambda v: net(v).exp().sum())(u).norm())(x),
    "vmap of grad": lambda net, x: vmap(grad(lambda v: net(v).square().sum()))(
        torch.stack([x, x.sin()])
    ),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform_of_the_input(pair, device, transform, mode):
    x = rows(4, device).double()
    networks = [(without_statistics(n) if mode == "train" else n.eval()) for n in pair]
    expected, result = (TRANSFORMS[transform](net, x) for net in networks)
    torch.testing.assert_close(result, expected, **CLOSE)


def test_transform_that_would_write_statistics_raises_as_eager_does(pair, device):
    x = rows(4, device).double()
    errors = []
    for net in pair:
        with pytest.raises(RuntimeError, match="mutate a captured Tensor") as raised:
            grad(lambda v, net=net: net(v).sum())(x)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_per_sample_gradients_of_every_parameter(pair, device):
    x = rows(4, device).double()

    def loss(net, parameters, row):
        return functional_call(net, parameters, (row[None],)).square().sum()

    results = []
    for net in pair:
        parameters = {name: p.detach() for name, p in net.eval().named_parameters()}
        per_sample = vmap(grad(lambda p, r, net=net: loss(net, p, r)), (None, 0))
        results.append(per_sample(parameters, x))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


def test_functional_call_differentiates_other_parameters(pair, device):
    x = rows(6, device).double()
    results = []
    for net in pair:
        other = {n: (p.detach() * 1.5).requires_grad_() for n, p in net.named_parameters()}
        buffers = {n: b.clone() for n, b in net.named_buffers()}
        output = functional_call(net, {**other, **buffers}, (x,))
        gradients = torch.autograd.grad(output.square().sum(), [*other.values()])
        results.append((output, gradients, buffers))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


def test_ensemble_of_stacked_modules(pair, device):
    x = rows(6, device).double()
    results = []
    for net in pair:
        members = [copy.deepcopy(net).eval() for _ in range(3)]
        with torch.no_grad():
            for scale, member in enumerate(members):
                for parameter in member.parameters():
                    parameter.mul_(1 + scale / 10)
        parameters, buffers = stack_module_state(members)
        base = copy.deepcopy(members[0]).to("meta")
        call = vmap(lambda p, b, base=base: functional_call(base, (p, b), (x,)))
        results.append(call(parameters, buffers))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


def test_vmap_draws_a_mask_for_each_sample(kind, device):
    _, fused = drop_in(kind, 0.5, device=device)
    for module in fused.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    x = rows(6, device).expand(3, -1, -1)
    different = vmap(fused, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    same = vmap(fused, randomness="same")(x)
    torch.testing.assert_close(same[0], same[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(fused)(x)


def test_forward_mode(pair, device):
    x = rows(6, device).double()
    tangents = []
    for net in pair:
        with forward_ad.dual_level():
            output = net(forward_ad.make_dual(x, x.cos()))
            tangents.append(forward_ad.unpack_dual(output).tangent)
    torch.testing.assert_close(tangents[1], tangents[0], **CLOSE)


def test_forward_mode_in_a_parameter(pair, device):
    x = rows(6, device).double()
    tangents = []
    for net in pair:
        name = next(iter(dict(net.named_parameters())))
        weight = net.get_parameter(name).detach()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(weight, weight.cos())
            output = functional_call(net, {name: dual}, (x,))
            tangents.append(forward_ad.unpack_dual(output).tangent)
    torch.testing.assert_close(tangents[1], tangents[0], **CLOSE)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradient_penalty(pair, kind, device, mode):
    """The double backward of WGAN-GP, through the fused op's own node."""
    results = []
    for net in pair:
        net.train(mode == "train").zero_grad()
        x = rows(8, device).double().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        (slope.norm(dim=1) - 1).square().mean().backward()
        results.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    assert kernels_run(pair[1], rows(8, device).double()) == KINDS[kind]


def test_hessian_vector_product_by_double_backward(pair, device):
    x = rows(8, device).double()
    results = []
    for net in pair:
        parameters = list(net.parameters())
        loss = net(x).square().mean()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        directions = [p.detach().cos() for p in parameters]
        dot = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        results.append(torch.autograd.grad(dot, parameters, allow_unused=True))
    torch.testing.assert_close(results[1], results[0], **CLOSE)
