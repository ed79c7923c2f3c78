"""Training by several processes ends with the parameters of one process on the joined batch."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.networks import kernels_run
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_mlp import (
    BatchNormLeakyReLU,
    FusedResearchNet,
    FusedSequential,
    LinearReLU,
    functional,
    fuse,
    synchronize_batch_norm,
)
from fused_mlp.eager import IntelligentResearchNetwork
from fused_mlp.modules import norm

WIDTHS = (10, [64, 32], 5)
# Rows of each process in each step: the last batches are uneven, and then one process has none.
STEPS = [(8, 8), (8, 8), (5, 8), (1, 7), (6, 0)]
EVEN_STEPS = [(8, 8)] * 4


def batches(steps=STEPS, dtype=torch.float64):
    """Return the joined batch and targets of every step."""
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(sum(rows), 10, generator=generator, dtype=dtype) * 2 + 1,
            torch.randint(5, (sum(rows),), generator=generator),
        )
        for rows in steps
    ]


def make_network(kind, dtype=torch.float64):
    """Return one of several networks of the same parameters."""
    torch.manual_seed(5)
    if kind == "eager":
        net = IntelligentResearchNetwork(*WIDTHS)
    elif kind == "own layers":
        torch.manual_seed(5)
        net = FusedSequential(
            LinearReLU(10, 64), nn.Linear(64, 32), BatchNormLeakyReLU(32), nn.Linear(32, 5)
        )
    elif kind == "sequential":
        net = FusedSequential(*IntelligentResearchNetwork(*WIDTHS).research_layers)
    elif kind.startswith("ordinary"):
        net = nn.Sequential(
            nn.Linear(10, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 32),
            nn.BatchNorm1d(32), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 5),
        )  # fmt: skip
        if kind == "ordinary, fused":
            fuse(net)
    else:
        net = FusedResearchNet(*WIDTHS)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # masks are each process's own
    if kind == "hooked":
        net.research_layers[4].register_forward_hook(lambda module, args, output: None)
    return net.to(dtype)


def adam(net):
    return torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=0.01)


def train(net, optimizer, steps, rank=None):
    """Train on a process's own rows, or on all of them, and return the losses.

    The mean over all rows: DistributedDataParallel and fully_shard average over processes what the
    rows of each add up to.
    """
    for rows, (input, target) in zip(steps, batches(steps), strict=True):
        total, share = sum(rows), 1
        if rank is not None:
            input, target = input.split(rows)[rank], target.split(rows)[rank]
            share = distributed.get_world_size()
        loss = F.cross_entropy(net(input), target, reduction="sum") * share / total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def state(net):
    return {
        name: getattr(tensor, "full_tensor", lambda t=tensor: t)().detach().clone()
        for name, tensor in net.state_dict().items()
    }


def assert_same_state(ours, expected):
    assert list(ours) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, msg=lambda m, n=name: f"{n}: {m}")


def alone(kind="eager", steps=STEPS):
    """Return the state after one process trained on the joined batches."""
    net = make_network(kind)
    train(net, adam(net), steps)
    return state(net)


# ----------------------------------------------------------------- DistributedDataParallel


def data_parallel(rank, kind, synchronized, steps, options):
    net = make_network(kind)
    if synchronized:
        synchronize_batch_norm(net)
    parallel = DistributedDataParallel(net, **options)
    train(parallel, adam(net), steps, rank)
    return state(net)


@pytest.mark.parametrize("kind", ["eager", "fused", "hooked", "own layers", "ordinary, fused"])
def test_synchronized_processes_train_as_one_on_the_joined_batch(two_processes, kind):
    first, second = two_processes.run(data_parallel, kind, True, STEPS, {})
    expected = alone({"own layers": kind, "ordinary, fused": "ordinary"}.get(kind, "eager"))
    assert_same_state(first, expected)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between processes"


@pytest.mark.parametrize(
    "options",
    [{}, {"static_graph": True}, {"gradient_as_bucket_view": True, "broadcast_buffers": False}],
    ids=["plain", "static-graph", "bucket-view"],
)
@pytest.mark.parametrize("kind", ["fused", "sequential", "ordinary, fused"])
def test_data_parallel_trains_as_with_the_eager_network(two_processes, kind, options):
    plain = "ordinary" if kind.startswith("ordinary") else "eager"
    eager = two_processes.run(data_parallel, plain, False, EVEN_STEPS, options)
    fused = two_processes.run(data_parallel, kind, False, EVEN_STEPS, options)
    for ours, expected in zip(fused, eager, strict=True):
        assert_same_state(dict(zip(expected, ours.values(), strict=True)), expected)


# -------------------------------------------------------------------- fully_shard (FSDP2)


def sharded(net):
    """Shard the layers, and the rest."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for module in net.modules():
        if type(module) is FusedSequential and module is not net:
            fully_shard(module, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def fully_sharded(rank, kind):
    net = sharded(synchronize_batch_norm(make_network(kind)))
    train(net, adam(net), STEPS, rank)
    return state(net), kernels_run(net, batches()[0][0])


ORDINARY_KERNELS = [*["normalize", "batch_norm_leaky_relu"] * 2, "linear_act"]


@pytest.mark.parametrize(
    ("kind", "plain", "expected_kernels"),
    [
        ("fused", "eager", ["linear_relu", "normalize", "batch_norm_leaky_relu"]),
        ("own layers", "own layers", ["linear_relu", "normalize", "batch_norm_leaky_relu"]),
        ("ordinary, fused", "ordinary", ORDINARY_KERNELS),
    ],
)
def test_fully_sharded_processes_train_as_one_on_the_joined_batch(
    two_processes, kind, plain, expected_kernels
):
    for ours, kernels in two_processes.run(fully_sharded, kind):
        assert_same_state(ours, alone(plain))
        assert kernels == expected_kernels


def save_sharded(rank, folder):
    net = sharded(synchronize_batch_norm(make_network("fused")))
    optimizer = adam(net)
    train(net, optimizer, STEPS[:2], rank)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    train(net, optimizer, STEPS[2:], rank)
    return state(net)


def resume_sharded(rank, folder):
    net = sharded(synchronize_batch_norm(make_network("fused")))
    optimizer = adam(net)
    load(net, optimizer, folder)
    train(net, optimizer, STEPS[2:], rank)
    return state(net)


def load(net, optimizer, folder):
    model_state, optimizer_state = get_state_dict(net, optimizer)
    states = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(states, checkpoint_id=folder)
    set_state_dict(
        net, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # one process without a group
def test_a_checkpoint_of_two_processes_resumes_in_one_and_back(two_processes, tmp_path):
    expected = two_processes.run(save_sharded, str(tmp_path / "two"))[0]
    net = make_network("fused")
    optimizer = adam(net)
    load(net, optimizer, tmp_path / "two")
    model_state, optimizer_state = get_state_dict(net, optimizer)
    checkpoint.save(
        {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path / "one"
    )
    train(net, optimizer, STEPS[2:])
    assert_same_state(state(net), expected)
    assert_same_state(two_processes.run(resume_sharded, str(tmp_path / "one"))[1], expected)


# --------------------------------------------------------------------- synchronized modules


def kernels_of_networks(rank, groups):
    results = []
    for group in groups:
        if group == "own":
            group = [distributed.new_group([r]) for r in range(2)][rank]
        net = synchronize_batch_norm(make_network("fused"), group)
        input = batches()[0][0]
        results.append((kernels_run(net, input), kernels_run(net.eval(), input)))
    return results


def test_which_kernels_a_synchronized_network_runs(two_processes):
    # The moments are normalize's; batch norm's kernel applies the merged ones.
    synchronized = ["linear_relu", "normalize", "batch_norm_leaky_relu"]
    whole = ["research_net"]  # evaluation is local, and so is training in a group of one
    expected = [(synchronized, whole), (whole, whole)]
    for kernels in two_processes.run(kernels_of_networks, [None, "own"]):
        assert kernels == expected


def converted_step(rank, refused):
    """Run one step of a network with nn.SyncBatchNorm."""
    norm.REFUSED = refused
    try:
        net = make_network("fused")
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        assert not fuse(converted).left
        input, grad = (t.split(STEPS[3])[rank].clone() for t in step_of_eight())
        input.requires_grad_()
        output = converted(input)
        output.backward(grad)
        buffers = [buffer.clone() for buffer in net.buffers()]
        kernels = kernels_run(net, input)
        return output.detach(), input.grad, buffers, kernels
    except ValueError as error:
        return str(error)
    finally:
        norm.REFUSED = ("cpu",)


def step_of_eight():
    input = batches()[3][0]
    return input, torch.linspace(-1, 1, 5, dtype=input.dtype).repeat(len(input), 1) * input[:, :5]


def test_sync_batch_norm_runs_fused_where_torch_runs_it(two_processes):
    first, second = two_processes.run(converted_step, ())  # the CPU stands for a GPU
    net = make_network("eager")
    input, grad = step_of_eight()
    output = net(input.requires_grad_())
    output.backward(grad)
    torch.testing.assert_close(torch.cat([first[0], second[0]]), output)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), input.grad)
    torch.testing.assert_close(first[2], list(net.buffers()))
    assert first[3] == ["linear_relu", "normalize", "batch_norm_leaky_relu"]


def test_sync_batch_norm_on_the_cpu_raises_what_torch_raises(two_processes):
    for message in two_processes.run(converted_step, ("cpu",)):
        assert message.startswith("SyncBatchNorm expected input tensor to be on GPU")


def compiled_step(rank):
    """Return what a synchronized network and normalize over the group give, compiled or not."""
    input = batches()[0][0].float().split((8, 8))[rank]
    results = []
    for wrap in (functools.partial(torch.compile, fullgraph=True), lambda function: function):
        net = synchronize_batch_norm(make_network("fused", torch.float32))
        shard = input.clone().requires_grad_()
        output = wrap(net)(wrap(normalize_shard)(shard))
        output.square().sum().backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        results.append((output.detach(), list(net.buffers()), shard.grad, gradients))
    return results


def normalize_shard(input):
    return functional.normalize(input * 2, 0, process_group=distributed.group.WORLD) + 1


@pytest.mark.slow
def test_what_runs_over_a_group_compiles(two_processes):
    for compiled, eager in two_processes.run(compiled_step):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def norms_of_all_kinds(rank):
    """Return what synchronized norms outside fused runs give."""
    torch.manual_seed(9)
    net = nn.ModuleList(
        [
            nn.BatchNorm2d(3),
            nn.Sequential(nn.BatchNorm1d(3), nn.Tanh()),
            nn.BatchNorm1d(3, affine=False, track_running_stats=False),
            nn.BatchNorm1d(3, momentum=None),
            nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(3), dim=None),
        ]
    )
    if distributed.is_initialized():
        synchronize_batch_norm(net)
    results = []
    for module, shape in zip(net, [(6, 3, 2, 2), (6, 3), (6, 3), (6, 3), (6, 3)], strict=True):
        for _ in range(2):
            input = torch.randn(shape)
            output = module(input if rank is None else input.split((2, 4))[rank])
        results.append((output.detach(), list(module.buffers())))
    return results


def test_batch_norms_outside_fused_runs_are_synchronized_too(two_processes):
    first, second = two_processes.run(norms_of_all_kinds)
    for one, two, (expected, buffers) in zip(first, second, norms_of_all_kinds(None), strict=True):
        torch.testing.assert_close(torch.cat([one[0], two[0]]), expected)
        torch.testing.assert_close(one[1], buffers)


def test_synchronized_norms_stay_what_they_are():
    net = make_network("fused")
    child, keys = net.research_layers[4], list(net.state_dict())
    assert synchronize_batch_norm(net) is net
    assert net.research_layers[4] is child
    assert type(child) is nn.BatchNorm1d
    assert list(net.state_dict()) == keys
    assert [entry.reason for entry in fuse(net).fused] == ["research_net"]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"]
)
def test_a_copy_is_synchronized_by_itself(copied):
    net = synchronize_batch_norm(make_network("fused"))
    twin = copied(net)
    forward = twin.research_layers[4].forward
    assert type(forward) is norm.SynchronizedForward
    assert forward.module is twin.research_layers[4]


def test_without_a_process_group_a_synchronized_network_runs_as_before():
    net, other = synchronize_batch_norm(make_network("fused")), make_network("fused")
    input = batches()[0][0]
    torch.testing.assert_close(net(input), other(input))
    assert kernels_run(net, input) == ["research_net"]


class Doubled(nn.BatchNorm1d):
    def forward(self, input):
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model",), "model must be a torch.nn.Module"),
        ((nn.BatchNorm1d(2), "gloo"), "process_group must be None or"),
        ((nn.Sequential(Doubled(2)),), r"0 \(Doubled\) has a forward of its own"),
    ],
)
def test_what_cannot_be_synchronized_says_why(arguments, message):
    with pytest.raises(TypeError, match=message):
        synchronize_batch_norm(*arguments)


def test_evaluation_of_a_synchronized_network_is_prepared_once():
    net = synchronize_batch_norm(make_network("fused")).eval()
    input = batches()[0][0]
    net(input)
    prepared = net.research_layers._cache.ready[False]
    assert prepared.holds(net.research_layers._modules)
    torch.testing.assert_close(net(input), make_network("eager").eval()(input))
    net.research_layers[4].forward = lambda input: input * 0
    assert not prepared.holds(net.research_layers._modules)
    assert not net(input).equal(make_network("eager").eval()(input))
