"""The ops under torch.compile, torch.func and autocast."""

from __future__ import annotations

import functools

import pytest
import torch
from support import INTERPRETED, example
from support.op_calls import buffers, network

import fused_mlp.functional as FF


def compiled_step(x, weights, biases, norm, statistics):
    """A step with every op in it."""
    x = FF.normalize(x, 0)
    hidden = FF.linear_relu(x, weights[0], biases[0])
    hidden = FF.linear_act(hidden, weights[1], biases[1], "gelu")
    hidden = FF.batch_norm_leaky_relu(hidden, *statistics, *norm, training=True)
    hidden = FF.batch_norm_act(hidden, *statistics, *norm, training=True, activation="relu")
    whole = FF.research_net(x, weights, biases, *norm, *statistics, True)
    return hidden.sum() + whole.square().sum()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels run eagerly all the same")
def test_compile(device: torch.device) -> None:
    """torch.compile(fullgraph=True) traces every op, forward and backward, buffers included."""
    results = []
    step = torch.compile(compiled_step, fullgraph=True, backend="aot_eager")
    for function in (compiled_step, step):
        x, weights, biases, *norm = network(device, grad=True)
        statistics = buffers(device, 3)[:2]
        loss = function(x, weights, biases, norm, statistics)
        results.append(
            [loss, *torch.autograd.grad(loss, [x, *weights, *biases, *norm]), *statistics]
        )
    torch.testing.assert_close(*results)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels run eagerly all the same")
def test_compile_dropout(device: torch.device) -> None:
    """A compiled call draws a new mask each time, and manual_seed decides it."""
    step = torch.compile(
        lambda x, w: FF.linear_relu(x, w, None, 0.5, True), fullgraph=True, backend="aot_eager"
    )
    x, weight = torch.ones(8, 4, device=device), torch.ones(16, 4, device=device)
    torch.manual_seed(1)
    first, second = step(x, weight), step(x, weight)
    torch.manual_seed(1)
    assert torch.equal(step(x, weight), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "name",
    [
        "normalize-dim",
        "linear_relu",
        "linear_act-gelu",
        "linear_act-tanh-dropout",
        "batch_norm-eval",
        "batch_norm_act-eval",
        "research_net-eval",
    ],
)
def test_forward_mode(device: torch.device, name: str) -> None:
    """Forward-mode AD agrees with the plain formula's."""
    case = example(name, dtype=torch.float64, device=device)
    values = tuple(case.tensors.values())
    tangents = tuple(torch.randn_like(v) for v in values)
    _, ours = torch.func.jvp(case.fused, values, tangents)
    _, expected = torch.func.jvp(case.plain, values, tangents)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "name",
    ["linear_relu", "linear_act-gelu", "batch_norm-eval", "batch_norm_act-frozen",
     "research_net-eval"],
)  # fmt: skip
def test_per_sample_gradients(device: torch.device, name: str) -> None:
    """vmap over grad, the per-sample gradients of torch.func."""
    case = example(name, dtype=torch.float64, device=device)
    x, *rest = case.tensors.values()

    def loss(function, row, *parameters):
        return function(row[None], *parameters).square().sum()

    results = [
        torch.func.vmap(
            torch.func.grad(
                functools.partial(loss, function), argnums=tuple(range(1, 1 + len(rest)))
            ),
            in_dims=(0, *[None] * len(rest)),
        )(x, *rest)
        for function in (case.fused, case.plain)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["linear_relu", "linear_act-gelu", "linear_act-tanh-dropout", "batch_norm-train",
     "batch_norm_act-relu", "research_net-train"],
)  # fmt: skip
def test_autocast(device: torch.device, name: str, dtype: torch.dtype) -> None:
    """Under autocast the ops take and give the dtypes the plain formula takes and gives."""
    case = example(name, dtype=torch.float32, device=device)
    values = list(case.tensors.values())
    with torch.autocast(device.type, dtype=dtype):
        ours, expected = case.fused(*values), case.plain(*values)
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected)
