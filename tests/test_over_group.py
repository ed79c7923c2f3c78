"""normalize and batch_norm_leaky_relu over a process group: shards give what the whole gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_as_accurate
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from fused_mlp import functional, use_backend

# How many rows each of the two processes has.
SHARDS = {"even": (8, 8), "uneven": (5, 11), "one-row": (1, 15), "empty": (16, 0)}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Collectives(TorchDispatchMode):
    """Inside its ``with`` block, notes the names of the collectives that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def shard(rank: int, rows: tuple[int, ...], whole: Tensor) -> Tensor:
    """Return a process's own rows of a tensor of all rows."""
    return whole.split(rows)[rank].clone()


# ------------------------------------------------------------------- batch_norm_leaky_relu


def batch_norm_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return input, parameters, running statistics and gradient of all processes together."""
    torch.manual_seed(1)
    channels = shape[1]
    tensors = {
        "input": torch.randn(shape) * 3 + 2,
        "weight": torch.randn(channels),
        "bias": torch.randn(channels),
        "running_mean": torch.randn(channels),
        "running_var": torch.rand(channels),
        "grad": torch.randn(shape),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def joined_batch_norm(tensors: dict[str, Tensor]) -> list[Tensor]:
    """Return what plain PyTorch gives for the whole batch."""
    input, weight, bias = (tensors[n].clone().requires_grad_() for n in ("input", "weight", "bias"))
    running_mean, running_var = tensors["running_mean"].clone(), tensors["running_var"].clone()
    output = F.leaky_relu(F.batch_norm(input, running_mean, running_var, weight, bias, True), 0.01)
    output.backward(tensors["grad"])
    return [output.detach(), input.grad, weight.grad, bias.grad, running_mean, running_var]


def batch_norm_shard(rank, backend, device, rows, tensors):
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    input = shard(rank, rows, tensors["input"]).requires_grad_()
    weight, bias = (tensors[n].requires_grad_() for n in ("weight", "bias"))
    running_mean, running_var = tensors["running_mean"], tensors["running_var"]
    with use_backend(backend):
        output = functional.batch_norm_leaky_relu(
            input, running_mean, running_var, weight, bias, training=True,
            process_group=distributed.group.WORLD,
        )  # fmt: skip
        output.backward(shard(rank, rows, tensors["grad"]))
    results = (output.detach(), input.grad, weight.grad, bias.grad, running_mean, running_var)
    return [t.cpu() for t in results]


@pytest.mark.parametrize("rows", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rest", [(6,), (6, 5)], ids=["2d", "3d"])
def test_batch_norm_of_shards_is_that_of_the_whole_batch(two_processes, target, rows, dtype, rest):
    device, backend = target
    tensors = batch_norm_inputs((sum(rows), *rest), dtype)
    first, second = two_processes.run(batch_norm_shard, backend, device, rows, tensors)
    eager = joined_batch_norm(tensors)
    exact = joined_batch_norm({name: t.double() for name, t in tensors.items()})
    ours = [torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])]
    # Gradients of parameters are each process's own share; DistributedDataParallel adds them up.
    ours += [(first[i].double() + second[i].double()).to(dtype) for i in (2, 3)]
    ours += first[4:]
    names = ("output", "grad of input", "grad of weight", "grad of bias", "mean", "variance")
    for name, a, b, c in zip(names, ours, eager, exact, strict=True):
        assert_as_accurate(a, b, c, name, roundings=2 if name.startswith("grad") else 1)
    for mine, other in zip(first[4:], second[4:], strict=True):
        assert torch.equal(mine, other), "running statistics differ between processes"


def penalty_of_shard(rank, rows, tensors):
    input = shard(rank, rows, tensors["input"]).requires_grad_()
    weight, bias = (tensors[n].requires_grad_() for n in ("weight", "bias"))
    output = functional.batch_norm_leaky_relu(
        input, None, None, weight, bias, training=True, eps=0.5,
        process_group=distributed.group.WORLD,
    )  # fmt: skip
    grad = shard(rank, rows, tensors["grad"])
    (gradient,) = torch.autograd.grad(output, input, grad, create_graph=True)
    gradient.square().sum().backward()
    return input.grad, weight.grad


def test_gradient_penalty_of_shards_is_that_of_the_whole_batch(two_processes):
    tensors = batch_norm_inputs((9, 4), torch.float64)
    (first, first_weight), (second, second_weight) = two_processes.run(
        penalty_of_shard, (3, 6), tensors
    )
    input, weight = (tensors[n].clone().requires_grad_() for n in ("input", "weight"))
    output = F.batch_norm(input, None, None, weight, tensors["bias"], True, eps=0.5)
    output = F.leaky_relu(output, 0.01)
    (gradient,) = torch.autograd.grad(output, input, tensors["grad"], create_graph=True)
    gradient.square().sum().backward()
    torch.testing.assert_close(torch.cat([first, second]), input.grad)
    torch.testing.assert_close(first_weight + second_weight, weight.grad)


def collectives_of_shard(rank):
    names = []
    for requires_grad in (True, False):
        input = torch.randn(4 + rank, 3, requires_grad=requires_grad)
        weight = torch.ones(3, requires_grad=True)
        with Collectives() as forward:
            output = functional.batch_norm_leaky_relu(
                input, None, None, weight, training=True, process_group=distributed.group.WORLD
            )
        with Collectives() as backward:
            output.sum().backward()
        names += [forward.names, backward.names]
    input = torch.randn(4 + rank, 3, requires_grad=True)
    with Collectives() as forward:
        output = functional.normalize(input, 0, process_group=distributed.group.WORLD)
    with Collectives() as backward:
        output.sum().backward()
    return [*names, forward.names, backward.names]


def test_one_all_reduce_a_direction(two_processes):
    one = ["allreduce_"]
    for names in two_processes.run(collectives_of_shard):
        # The second pair: data itself asks for no gradient, so backward has nothing to share.
        assert names == [one, one, one, [], one, one]


# ------------------------------------------------------------------------------- normalize


def normalize_shard(rank, rows, whole, grad, options):
    input = shard(rank, rows, whole).requires_grad_()
    output = functional.normalize(input, **options, process_group=distributed.group.WORLD)
    (gradient,) = torch.autograd.grad(output, input, shard(rank, rows, grad))
    return output.detach(), gradient


def plain_normalize(input: Tensor, dim=None, correction=1, eps=0.0) -> Tensor:
    keepdim = dim is not None
    mean, std = input.mean(dim, keepdim), input.std(dim, correction=correction, keepdim=keepdim)
    return (input - mean) / (std + eps)


@pytest.mark.parametrize("rows", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "options",
    [{}, {"dim": 0}, {"dim": (0, 2), "correction": 0, "eps": 0.5}],
    ids=["whole", "columns", "outer"],
)
def test_normalize_of_shards_is_that_of_the_whole_tensor(two_processes, rows, dtype, options):
    whole = (torch.randn(sum(rows), 4, 3) * 5 + 40).to(dtype)
    grad = torch.randn(whole.shape).to(dtype)
    first, second = two_processes.run(normalize_shard, rows, whole, grad, options)
    results = []
    for tensor in (whole, whole.double()):
        input = tensor.clone().requires_grad_()
        output = plain_normalize(input, **options)
        (gradient,) = torch.autograd.grad(output, input, grad.to(tensor.dtype))
        results.append((output.detach(), gradient))
    for name, a, b, eager, exact in zip(
        ("output", "gradient"), first, second, *results, strict=True
    ):
        assert_as_accurate(torch.cat([a, b]), eager, exact, name)


def test_normalize_of_shards_twice_differentiated(two_processes):
    whole, grad = torch.randn(2, 9, 4, dtype=torch.float64)
    first, second = two_processes.run(penalty_of_normalized_shard, (2, 7), whole, grad)
    input = whole.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        plain_normalize(input, eps=0.5), input, grad, create_graph=True
    )
    gradient.square().sum().backward()
    torch.testing.assert_close(torch.cat([first, second]), input.grad)


def penalty_of_normalized_shard(rank, rows, whole, grad):
    input = shard(rank, rows, whole).requires_grad_()
    output = functional.normalize(input, eps=0.5, process_group=distributed.group.WORLD)
    (gradient,) = torch.autograd.grad(output, input, shard(rank, rows, grad), create_graph=True)
    gradient.square().sum().backward()
    return input.grad


# -------------------------------------------------------------------------------- messages


def messages_of_shard(rank):
    alone = distributed.new_group([0])
    every = distributed.group.WORLD
    messages = []
    for call in (
        lambda: functional.normalize(torch.ones(2, 2), process_group="gloo"),
        lambda: functional.batch_norm_leaky_relu(
            torch.ones(2, 2), None, None, training=True, process_group=distributed.new_group([0])
        ),
        lambda: torch.func.grad(lambda x: functional.normalize(x, process_group=every).sum())(
            torch.ones(2)
        ),
        lambda: functional.batch_norm_leaky_relu(
            torch.ones(1, 2), None, None, training=True, process_group=alone
        ),
    ):
        try:
            messages.append(f"returned {call()}")
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_what_cannot_run_says_why(two_processes):
    first, second = two_processes.run(messages_of_shard)
    assert first[0].startswith("TypeError: normalize(): process_group must be")
    assert second[1].startswith("TypeError: batch_norm_leaky_relu(): process_group must be")
    assert "torch.func transforms and forward-mode AD do not reach" in first[2]
    assert "more than 1 value per channel when training" in first[3]


def no_channels_alone(rank):
    alone = distributed.new_group([0])
    if rank:
        return None
    return functional.batch_norm_leaky_relu(
        torch.ones(3, 0), None, None, training=True, process_group=alone
    )


def test_no_channels_need_no_second_value(two_processes):
    """As in a batch norm without a group, and in a group of one, which asks as that does."""
    output, _ = two_processes.run(no_channels_alone)
    assert output.shape == (3, 0)


def no_rows_anywhere(rank):
    running = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])
    output = functional.batch_norm_leaky_relu(
        torch.ones(0, 3), *running, training=True, process_group=distributed.group.WORLD
    )
    return output, *running


def test_no_rows_anywhere_leave_the_running_statistics(two_processes):
    """As torch's batch norm does with no rows of its own."""
    running = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])
    expected = F.batch_norm(torch.ones(0, 3), *running, training=True), *running
    for found in two_processes.run(no_rows_anywhere):
        for ours, torchs in zip(found, expected, strict=True):
            assert torch.equal(ours, torchs)
