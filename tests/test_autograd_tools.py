"""What surrounds autograd: checkpointing, hooks, anomaly mode, frozen parameters, kept graphs."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from support.drop_in import KINDS, drop_in, rows
from support.networks import assert_same_step, kernels_run
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

pytestmark = [pytest.mark.usefixtures("target"), pytest.mark.parametrize("kind", KINDS)]


def gradients(net):
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_recomputes_with_the_same_mask(kind, device, reentrant):
    _, plain = drop_in(kind, 0.5, device=device)
    checked = copy.deepcopy(plain)
    results = []
    for net in (plain, checked):
        x = rows(32, device).requires_grad_()
        torch.manual_seed(3)
        output = checkpoint(net, x, use_reentrant=reentrant) if net is checked else net(x)
        torch.rand(5, device=device)  # moves the generator on before backward recomputes
        output.square().sum().backward()
        results.append((output, x.grad, gradients(net)))
    torch.testing.assert_close(results[1], results[0])


def test_checkpoint_updates_statistics_as_eager_does(kind, device):
    """Twice: recomputing is a training pass for any batch norm."""
    eager, fused = drop_in(kind, device=device)
    for net in (eager, fused):
        checkpoint(net, rows(device=device), use_reentrant=False).sum().backward()
    torch.testing.assert_close(dict(fused.named_buffers()), dict(eager.named_buffers()))
    counter = next(b for n, b in fused.named_buffers() if n.endswith("num_batches_tracked"))
    assert counter == 2


def test_checkpointed_segments_of_a_container(kind, device):
    results = []
    for net in drop_in(kind, device=device):
        container = next(m for m in net.modules() if isinstance(m, nn.Sequential))
        output = checkpoint_sequential(container, 2, rows(device=device), use_reentrant=False)
        output.square().sum().backward()
        results.append(gradients(container))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_anomaly_mode_names_the_fused_op_and_its_call(kind, device):
    _, fused = drop_in(kind, device=device)
    with torch.autograd.set_detect_anomaly(True):
        fused(rows(device=device)).sum().backward()
        output = fused(rows(device=device))
        with (
            pytest.warns(UserWarning, match=r"Error detected in (.|\n)*test_autograd_tools"),
            pytest.raises(RuntimeError, match=r"Function '.*' returned nan values"),
        ):
            (output * float("nan")).sum().backward()


def test_kept_graph_gives_the_same_gradients_again(kind, device):
    _, fused = drop_in(kind, 0.5, device=device)
    parameters = list(fused.parameters())
    loss = fused(rows(device=device)).square().sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


def test_gradients_accumulate_over_steps(kind, device):
    eager, fused = drop_in(kind, device=device)
    for net in (eager, fused):
        for seed in range(3):
            net(rows(device=device, seed=seed)).square().sum().backward()
    torch.testing.assert_close(gradients(fused), gradients(eager), rtol=1e-3, atol=1e-3)


def test_hooks_on_parameters_input_and_output(kind, device):
    eager, fused = drop_in(kind, device=device)
    results = []
    for net in (eager, fused):
        seen = {}
        for name, parameter in net.named_parameters():
            parameter.register_hook(lambda g: g * 3)
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name, seen=seen: seen.update({name: p.grad.clone()})
            )
        x = rows(device=device).requires_grad_()
        x.register_hook(lambda g: g * 5)
        output = net(x)
        output.register_hook(lambda g: g * 7)
        output.retain_grad()
        output.square().sum().backward()
        results.append((seen, x.grad, output.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
    assert len(results[0][0]) == len(list(eager.parameters()))


def test_full_backward_hooks_on_the_network(kind, device):
    """They see the gradients of output and input, may change them, and leave the run fused."""
    eager, fused = drop_in(kind, device=device)
    results = []
    for net in (eager, fused):
        seen = []
        net.register_full_backward_pre_hook(lambda module, grad: (grad[0] * 2,))

        def hook(module, grad_input, grad_output, seen=seen):
            seen.extend([grad_input[0], grad_output[0]])
            return (grad_input[0] * 3,)

        net.register_full_backward_hook(hook)
        x = rows(device=device).requires_grad_()
        net(x).square().sum().backward()
        results.append((seen, x.grad, gradients(net)))
    assert len(results[1][0]) == 2
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    assert kernels_run(fused, rows(device=device)) == KINDS[kind]


def test_backward_hook_on_a_child_sees_what_eager_shows(kind, device):
    eager, fused = drop_in(kind, device=device)
    results = []
    for net in (eager, fused):
        seen = []
        for module in net.modules():
            if not list(module.children()):
                module.register_full_backward_hook(
                    lambda m, gi, go, seen=seen: seen.append((m, gi[0], go[0]))
                )
        net(rows(device=device).requires_grad_()).square().sum().backward()
        results.append(seen)
    assert len(results[0]) >= 6
    assert [type(m) for m, *_ in results[1]] == [type(m) for m, *_ in results[0]]
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours[1:], expected[1:], rtol=1e-3, atol=1e-4)


def test_every_subset_of_frozen_parameters(kind, device):
    eager, fused = drop_in(kind, device=device)
    names = [name for name, _ in eager.named_parameters()]
    count = len(names)
    alternating = 0x5555555555 & (2**count - 1)
    subsets = {0, 2**count - 1, alternating, alternating << 1 & (2**count - 1)}
    subsets |= {1 << i for i in range(count)} | {2**count - 1 - (1 << i) for i in range(count)}
    for subset, wants_input in itertools.product(sorted(subsets), (True, False)):
        for net in (eager, fused):
            net.zero_grad()
            for i, name in enumerate(names):
                net.get_parameter(name).requires_grad_(bool(subset >> i & 1))
        x = rows(device=device).requires_grad_(wants_input)
        assert_same_step(eager, fused, x, rtol=1e-3, atol=1e-4)
        for i, name in enumerate(names):
            assert (fused.get_parameter(name).grad is not None) == bool(subset >> i & 1)
    assert kernels_run(fused, rows(device=device)) == KINDS[kind]


def test_module_frozen_as_a_whole_needs_no_graph(kind, device):
    _, fused = drop_in(kind, device=device)
    fused.requires_grad_(False)
    assert not fused(rows(device=device)).requires_grad
    x = rows(device=device).requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None


def test_saved_tensors_go_through_saved_tensor_hooks(kind, device):
    """``save_on_cpu`` and the like see what the fused node keeps, and give it back."""
    _, fused = drop_in(kind, device=device)
    expected = copy.deepcopy(fused)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.double() if tensor.dtype == torch.float32 else tensor

    def unpack(tensor):
        return tensor.float() if tensor.dtype == torch.float64 else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = fused(rows(device=device)).square().sum()
    loss.backward()
    expected(rows(device=device)).square().sum().backward()
    assert packed
    torch.testing.assert_close(gradients(fused), gradients(expected))
