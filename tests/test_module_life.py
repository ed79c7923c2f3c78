"""What happens to a module in its life: copied, saved, converted, pruned, averaged, profiled."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from support import INTERPRETED
from support.drop_in import KINDS, drop_in, rows
from support.networks import assert_same_step, kernels_run
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fused_mlp.functional as FF

pytestmark = [pytest.mark.usefixtures("target"), pytest.mark.parametrize("kind", KINDS)]
LOOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture
def pair(kind, device):
    """Both networks, each called once, so that fused plans exist."""
    pair = drop_in(kind, device=device)
    for net in pair:
        net(rows(device=device))
    return pair


def linears(net):
    return [module for module in net.modules() if isinstance(module, nn.Linear)]


# ------------------------------------------------------------------------------ copies and files


def through_pickle(net):
    return pickle.loads(pickle.dumps(net))


def through_file(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_file])
def test_copy_is_independent_and_trains_alike(pair, kind, device, copy_of):
    eager, fused = pair
    again = copy_of(fused)
    assert_same_step(eager, again, rows(device=device), **LOOSE)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert all(parameter.any() for parameter in linears(fused)[0].parameters())
    assert kernels_run(again, rows(device=device)) == KINDS[kind]


@pytest.mark.parametrize("assign", [False, True])
def test_state_goes_both_ways_through_a_file(pair, device, assign):
    eager, fused = pair
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.mul_(1.25)
    for source, target in ((eager, fused), (fused, eager)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        torch.testing.assert_close(target.state_dict(), source.state_dict())
    assert_same_step(eager, fused, rows(device=device), **LOOSE)


def test_optimizer_state_continues_after_a_restart(pair, device):
    results = []
    for net in pair:
        net.double()
        saved = None
        for _ in range(2):
            optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
            if saved is not None:
                optimizer.load_state_dict(saved)
            for seed in range(3):
                optimizer.zero_grad()
                net(rows(device=device, seed=seed).double()).square().mean().backward()
                optimizer.step()
            saved = copy.deepcopy(optimizer.state_dict())
            net = copy.deepcopy(net)
        results.append(net.state_dict())
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------- dtypes and placements


@pytest.mark.parametrize("convert", ["double", "half", "bfloat16", "to"])
def test_converted_module_stays_fused(pair, kind, device, convert):
    eager, fused = pair
    for net in pair:
        net.eval()
        net.to(torch.float64) if convert == "to" else getattr(net, convert)()
    x = rows(device=device).to(linears(fused)[0].weight.dtype)
    output, expected = fused(x), eager(x)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)
    assert kernels_run(fused, x) == KINDS[kind]
    for net in pair:
        net.float()
    torch.testing.assert_close(fused(x.float()), eager(x.float()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("swap", [False, True], ids=["data", "swap_tensors"])
def test_conversion_by_either_of_torchs_ways(pair, device, swap):
    eager, fused = pair
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for net in pair:
            net(rows(device=device))
            net.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same_step(eager, fused, rows(device=device).double(), **LOOSE)


@pytest.mark.filterwarnings("ignore:fused_mlp. meta tensors")
def test_network_made_on_the_meta_device(kind, device, pair):
    eager, fused = drop_in(kind, device="meta")
    assert fused(rows(device="meta")).shape == eager(rows(device="meta")).shape
    state = pair[0].state_dict()
    fused.to_empty(device=device).load_state_dict(state)
    assigned = drop_in(kind, device="meta")[1]
    assigned.load_state_dict(copy.deepcopy(state), assign=True)
    for net in (fused, assigned):
        assert_same_step(copy.deepcopy(pair[0]), net, rows(device=device), **LOOSE)


# -------------------------------------------------------------------- parametrized and averaged


def norms(net):
    for layer in linears(net):
        parametrizations.weight_norm(layer)


def spectral(net):
    for layer in linears(net):
        parametrizations.spectral_norm(layer)


def prunes(net):
    for layer in linears(net):
        prune.l1_unstructured(layer, "weight", amount=0.4)


def prunes_globally(net):
    prune.global_unstructured(
        [(layer, "weight") for layer in linears(net)], prune.L1Unstructured, amount=0.4
    )


def take_off(net):
    for layer in linears(net):
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
        else:
            prune.remove(layer, "weight")


@pytest.mark.parametrize("put_on", [norms, spectral, prunes, prunes_globally])
def test_reparametrized_layers_train_as_eager_and_are_fused_once_more_after(
    pair, kind, device, put_on
):
    eager, fused = pair
    for net in pair:
        torch.manual_seed(3)
        put_on(net)
    for seed in range(2):
        for net in pair:
            net.zero_grad()
        assert_same_step(eager, fused, rows(device=device, seed=seed), **LOOSE)
    for net in pair:
        net.eval()
    assert set(kernels_run(fused, rows(device=device))) <= {"batch_norm_leaky_relu"}
    for net in pair:
        take_off(net)
    assert kernels_run(fused, rows(device=device)) == KINDS[kind]
    torch.testing.assert_close(fused(rows(device=device)), eager(rows(device=device)), **LOOSE)


@pytest.mark.parametrize("average", ["mean", "ema", "ema with buffers"])
def test_averaged_model_and_update_bn(pair, kind, device, average):
    results = []
    for net in pair:
        function = None if average == "mean" else get_ema_multi_avg_fn(0.9)
        averaged = AveragedModel(
            net, multi_avg_fn=function, use_buffers=average.endswith("buffers")
        )
        for seed in range(3):
            net(rows(device=device, seed=seed))
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(parameter.cos(), alpha=0.1)
            averaged.update_parameters(net)
        update_bn([rows(device=device, seed=seed) for seed in range(4)], averaged)
        results.append((averaged.state_dict(), averaged.eval()(rows(device=device))))
        last = averaged
    torch.testing.assert_close(results[1], results[0], **LOOSE)
    assert kernels_run(last, rows(device=device)) == KINDS[kind]


# --------------------------------------------------------------------------- modes and layouts


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_a_graph(pair, device, mode):
    eager, fused = pair
    with mode():
        for training in (True, False):
            output, expected = [net.train(training)(rows(device=device)) for net in (fused, eager)]
            torch.testing.assert_close(output, expected, **LOOSE)
            assert output.requires_grad is expected.requires_grad is False
            assert output.is_inference() == expected.is_inference()
    assert_same_step(eager.train(), fused.train(), rows(device=device), **LOOSE)


LAYOUTS = {
    "rows": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "columns of a wider table": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "expanded": lambda x: x[:1].expand_as(x),
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_strides_of_outputs_and_gradients_are_eagers(pair, device, layout, training):
    results = []
    for net in pair:
        x = LAYOUTS[layout](rows(device=device)).detach().requires_grad_()
        output = net.train(training)(x)
        output.sum().backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        results.append([t.stride() for t in (output, x.grad, *gradients)])
    assert results[1] == results[0]


def test_output_may_be_changed_in_place(pair, device):
    """As eager's: the last Linear keeps nothing of its output."""
    results = []
    for net in pair:
        output = net(rows(device=device))
        output.mul_(2).add_(1)
        output.square().sum().backward()
        results.append([parameter.grad for parameter in linears(net)[-1].parameters()])
    torch.testing.assert_close(results[1], results[0], **LOOSE)


# --------------------------------------------------------------------- subclasses and profiler


class Tagged(torch.Tensor):
    """A subclass that says nothing about ops."""


class Counting(torch.Tensor):
    """A subclass that knows torch's own ops and refuses all others."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        assert "fused_mlp" not in str(func), name
        cls.seen.append(name)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("subclass", [Tagged, Counting])
def test_tensor_subclass_runs_on_torchs_own_ops(pair, device, subclass, training):
    """Forward and backward, as eager does."""
    Counting.seen.clear()
    results = []
    for net in pair:
        x = rows(device=device).requires_grad_()
        output = net.train(training)(x.as_subclass(subclass))
        assert type(output) is subclass
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    torch.testing.assert_close(results[1], results[0])
    assert subclass is Tagged or Counting.seen.count("linear") == 2 * len(linears(pair[0]))


@pytest.mark.parametrize("place", ["input", "weight"])
def test_functions_take_tensor_subclasses_to_the_formula(kind, device, place):
    weight = torch.randn(7, 10, device=device)
    x = rows(device=device)
    expected = FF.linear_relu(x, weight)
    if place == "input":
        x = x.as_subclass(Counting)
    else:
        weight = weight.as_subclass(Counting)
    assert kernels_run(FF.linear_relu, x, weight) == []
    output = FF.linear_relu(x, weight)
    assert type(output) is Counting
    torch.testing.assert_close(output.as_subclass(torch.Tensor), expected)
    if place == "input":
        torch.testing.assert_close(
            FF.normalize(x).as_subclass(torch.Tensor), FF.normalize(rows(device=device))
        )


def test_profiler_shows_the_ops_by_name(pair, kind, device, backend):
    _, fused = pair
    with torch.profiler.profile() as profile:
        fused(rows(device=device)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    for op in KINDS[kind]:
        if op == "linear_relu" and backend == "native" and device.type == "cpu":
            op = "mlp"  # what runs Linear layers, one or several
        node = (
            "MLP"
            if op == "mlp"
            else "".join(part.capitalize() for part in op.split("_")).replace("Relu", "ReLU")
        )
        assert any(name.startswith(f"{node}Function") for name in names), names
        assert any(name.startswith(f"fused_mlp_kernels::{op}") for name in names), names
    assert any("backward" in name for name in names if name.startswith("fused_mlp_kernels::"))


# ---------------------------------------------------------------------------------------- threads

one_thread = pytest.mark.skipif(
    INTERPRETED, reason="Triton's interpreter keeps the grid of a launch in a global"
)


@one_thread
def test_threads_train_copies_and_share_one_in_evaluation(kind, device):
    eager, fused = (net.eval() for net in drop_in(kind, device=device))
    expected = [eager(rows(8, device, seed)) for seed in range(6)]
    failures = []

    def work(seed):
        own = copy.deepcopy(fused).train()
        for _ in range(10):
            try:
                own(rows(8, device, seed)).sum().backward()
                torch.testing.assert_close(fused(rows(8, device, seed)), expected[seed], **LOOSE)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@one_thread
def test_threads_train_one_module(kind, device):
    """Each gets the outputs and gradients of its own rows; the batch norms see all batches."""
    eager, fused = drop_in(kind, device=device)

    def step(net, seed):
        output = net(rows(8, device, seed))
        return output, torch.autograd.grad(output.square().sum(), [*net.parameters()])

    expected = [step(eager, seed) for seed in range(4)]
    failures, calls = [], 10

    def work(seed):
        for _ in range(calls):
            try:
                torch.testing.assert_close(step(fused, seed), expected[seed], rtol=2e-3, atol=1e-3)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for name, buffer in fused.named_buffers():
        assert buffer.isfinite().all(), name
        assert "tracked" not in name or calls < buffer <= 4 * calls
