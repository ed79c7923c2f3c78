"""Calls of every public and every raw op, small and covering training, None, masks and seeds."""

from __future__ import annotations

import functools

import torch

from fused_mlp.activations import GELU, RELU, SILU, TANH

PUBLIC = torch.ops.fused_mlp
RAW = torch.ops.fused_mlp_kernels


def tensors(device: torch.device, *shapes: tuple[int, ...], dtype=torch.float32, grad=False):
    """Return normal tensors, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(s, generator=generator).to(device, dtype).requires_grad_(grad) for s in shapes
    ]


def buffers(device: torch.device, channels: int) -> tuple[torch.Tensor, ...]:
    return (
        torch.zeros(channels, device=device),
        torch.ones(channels, device=device),
        torch.tensor(3, device=device),
    )


def network(device: torch.device, grad: bool = False):
    x, *weights = tensors(device, (6, 4), (5, 4), (3, 5), (2, 3), grad=grad)
    biases = tensors(device, (5,), (3,), (2,), grad=grad)
    norm = tensors(device, (3,), (3,), grad=grad)
    return x, weights, biases, *norm


def public_calls(device: torch.device) -> dict:
    """Return calls of the public ops that cover training, None and seeds."""
    seed = torch.tensor([1, 2], device=device)
    t = functools.partial(tensors, device, grad=True)
    return {
        "normalize": (PUBLIC.normalize, t((6, 4)), {}),
        "normalize-dim": (PUBLIC.normalize, (*t((6, 4)), [0]), {"correction": 0.0, "eps": 0.1}),
        "linear_relu": (PUBLIC.linear_relu, t((6, 4), (5, 4), (5,)), {}),
        "linear_relu-seed": (PUBLIC.linear_relu, (*t((2, 3, 4), (5, 4)), None, 0.5, seed), {}),
        "linear_act": (PUBLIC.linear_act, t((6, 4), (5, 4), (5,)), {"activation": "gelu"}),
        "linear_act-seed": (
            PUBLIC.linear_act,
            (*t((2, 3, 4), (5, 4)), None, "tanh"),
            {"dropout_p": 0.5, "seed": seed},
        ),
        "linear_batch_norm_act": (
            PUBLIC.linear_batch_norm_act,
            (*t((6, 4), (5, 4), (5,)), *buffers(device, 5)[:2], *t((5,), (5,)), 1e-5, "relu"),
            {"dropout_p": 0.5, "seed": seed},
        ),
        "linear_batch_norm_act-frozen": (
            PUBLIC.linear_batch_norm_act,
            (*tensors(device, (6, 4), (5, 4)), None, *buffers(device, 5)[:2]),
            {},
        ),
        "batch_norm_act": (
            PUBLIC.batch_norm_act,
            (*t((6, 4)), *buffers(device, 4)[:2], *t((4,), (4,)), True, 0.1, 1e-5, "relu"),
            {"num_batches_tracked": buffers(device, 4)[2], "dropout_p": 0.5, "seed": seed},
        ),
        "batch_norm_act-eval": (
            PUBLIC.batch_norm_act,
            (*t((6, 4)), *buffers(device, 4)[:2], *t((4,), (4,)), False, 0.1, 1e-5, "relu"),
            {},
        ),
        "batch_norm_leaky_relu": (
            PUBLIC.batch_norm_leaky_relu,
            (*t((6, 4)), *buffers(device, 4)[:2], *t((4,), (4,)), True),
            {"num_batches_tracked": buffers(device, 4)[2]},
        ),
        "batch_norm_leaky_relu-none": (
            PUBLIC.batch_norm_leaky_relu,
            (*t((2, 4, 3)), None, None, None, None, True),
            {},
        ),
        "batch_norm_leaky_relu-eval": (
            PUBLIC.batch_norm_leaky_relu,
            (*t((6, 4)), *buffers(device, 4)[:2], *t((4,), (4,))),
            {},
        ),
        "research_net": (
            PUBLIC.research_net,
            (*network(device, True), *buffers(device, 3)[:2], True, [0.5], seed),
            {"num_batches_tracked": buffers(device, 3)[2]},
        ),
        "research_net-eval": (
            PUBLIC.research_net,
            (*network(device, True)[:3], None, None, *buffers(device, 3)[:2], False, [0.0]),
            {},
        ),
        **{
            f"mlp{kind}": (PUBLIC.mlp, chain(device, training), {"compiled_for": compiled_for})
            for kind, training, compiled_for in (
                ("", True, None),
                ("-graph", True, "a test"),
                ("-graph-eval", False, "a test"),
            )
        },
    }


def chain(device: torch.device, training: bool) -> tuple:
    """Return what ``mlp`` takes: a batch norm behind the first layer, Tanh behind the second."""
    x, weights, (_, *biases), *_ = network(device, grad=True)
    norm = tensors(device, (5,), (5,), grad=True)
    return (
        x, weights, [None, *biases], [RELU, TANH, 0], [0.0] * 3, [0.0] * 3, [0], norm,
        list(buffers(device, 5)), [training], [0.1], [1e-5],
    )  # fmt: skip


def raw_calls(device: torch.device) -> dict:
    """Return calls of the raw kernels; backward ones take what the forward ones give."""
    seed = torch.tensor([1, 2], device=device)
    x, weight, bias, gamma = tensors(device, (6, 4), (5, 4), (5,), (4,))
    calls = {
        "normalize": (RAW.normalize, (x, None, 1.0, 0.0)),
        "normalize-dim": (RAW.normalize, (x, [0], 1.0, 1e-3)),
        "linear_relu": (RAW.linear_relu, (x, weight, bias, 0.5, seed)),
        "linear_relu-none": (RAW.linear_relu, (x, weight, None, 0.0, None)),
        "linear_act": (RAW.linear_act, (x, weight, bias, SILU, 0.01, 0.5, seed, True)),
        "linear_act-none": (RAW.linear_act, (x, weight, None, TANH, 0.01, 0.0, None, False)),
        "linear_batch_norm_act": (
            RAW.linear_batch_norm_act,
            (x, weight, bias, *buffers(device, 5)[:2], bias, None, 1e-5, RELU, 0.01, 0.5, seed),
        ),
        "batch_norm_act": (
            RAW.batch_norm_act,
            (x, *buffers(device, 4), gamma, gamma, True, 0.1, 1e-5, RELU, 0.01, 0.5, seed),
        ),
        "batch_norm_leaky_relu": (
            RAW.batch_norm_leaky_relu,
            (x, *buffers(device, 4), gamma, gamma, True, 0.1, 1e-5, 0.01),
        ),
        "batch_norm_leaky_relu-none": (
            RAW.batch_norm_leaky_relu,
            (x, None, None, None, None, None, True, 0.1, 1e-5, 0.01),
        ),
        "batch_norm_leaky_relu-eval": (
            RAW.batch_norm_leaky_relu,
            (x.half(), *buffers(device, 4)[:2], None, gamma, None, False, 0.1, 1e-5, 0.01),
        ),
        "research_net": (
            RAW.research_net,
            (*network(device), *buffers(device, 3), True, [0.5], seed, 0.1, 1e-5, 0.01),
        ),
        "research_net-eval": (
            RAW.research_net,
            (
                *network(device)[:3],
                None,
                None,
                *buffers(device, 3),
                False,
                [0.0],
                None,
                0.1,
                1e-5,
                0.01,
            ),
        ),
    }
    _, mean, std = RAW.normalize(x, [0], 1.0, 0.0)
    calls["normalize_backward"] = (RAW.normalize_backward, (x, x, mean, std, [0], 1.0, 0.0))
    output = RAW.linear_relu(x, weight, bias, 0.0, None)
    for mask in ([True, True, True], [False, True, False]):
        calls[f"linear_relu_backward-{sum(mask)}"] = (
            RAW.linear_relu_backward,
            (output, x, weight, output, 0.0, mask),
        )
    output, hidden = RAW.linear_act(x, weight, bias, GELU, 0.01, 0.5, seed, True)
    for mask in ([True, True, True], [False, True, False]):
        calls[f"linear_act_backward-{sum(mask)}"] = (
            RAW.linear_act_backward,
            (output, x, weight, hidden, GELU, 0.01, 0.5, seed, mask),
        )
    _, mean, rstd = RAW.batch_norm_leaky_relu(
        x, None, None, None, gamma, gamma, True, 0.1, 1e-5, 0.01
    )
    for mask in ([True, True, True], [True, False, False]):
        calls[f"batch_norm_leaky_relu_backward-{sum(mask)}"] = (
            RAW.batch_norm_leaky_relu_backward,
            (x, x, gamma, gamma, mean, rstd, True, 0.01, mask),
        )
        calls[f"batch_norm_act_backward-{sum(mask)}"] = (
            RAW.batch_norm_act_backward,
            (x, x, gamma, gamma, mean, rstd, True, RELU, 0.01, 0.5, seed, mask),
        )
    arguments = network(device)
    output, saved = RAW.research_net(
        *arguments, None, None, None, True, [0.5], seed, 0.1, 1e-5, 0.01
    )
    for mask in ([True] * 9, [False, True, False, True, False, False, True, False, True]):
        calls[f"research_net_backward-{sum(mask)}"] = (
            RAW.research_net_backward,
            (output, *arguments, saved, True, [0.5], seed, 0.01, mask),
        )
    return calls
