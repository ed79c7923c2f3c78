"""``torch.library.opcheck`` over every op, and the ops under torch.compile and torch.func."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from support import EXAMPLES, INTERPRETED, example

import fused_mlp.functional as FF
from fused_mlp.activations import GELU, LEAKY_RELU, RELU, SILU, TANH
from fused_mlp.backends import active_backend
from fused_mlp.ops.schemas import COMPILED_SCHEMAS, KERNEL_SCHEMAS, PUBLIC_SCHEMAS

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


def _names(collect) -> list[str]:
    # Only the names are wanted here; the reference computes on any machine.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(collect(torch.device("cpu")))


PUBLIC_NAMES = _names(public_calls)
RAW_NAMES = _names(raw_calls)


def test_every_op_is_here() -> None:
    for schemas, names in ((PUBLIC_SCHEMAS, PUBLIC_NAMES), (KERNEL_SCHEMAS, RAW_NAMES)):
        assert set(schemas) == {name.split("-")[0] for name in names}


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public(device: torch.device, name: str) -> None:
    op, arguments, options = public_calls(device)[name]
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(op.default, tuple(arguments), options, test_utils=checks)


@pytest.mark.parametrize("name", RAW_NAMES)
def test_raw(device: torch.device, name: str) -> None:
    op, arguments = raw_calls(device)[name]
    checks = ["test_schema", "test_faketensor"]
    if name in (
        "batch_norm_leaky_relu",
        "batch_norm_act",
        "research_net",
        "research_net_backward-9",
    ):
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op.default, tuple(arguments), test_utils=checks)


@pytest.mark.parametrize("name", RAW_NAMES)
def test_equal_calls_give_equal_bytes_whatever_was_in_memory(device, name):
    """A graph, or whoever compares runs, may look at all that an op keeps for its backward."""

    def bytes_of(results: object) -> list[torch.Tensor]:
        tensors = [results] if isinstance(results, torch.Tensor) else results
        return [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]

    op, arguments = raw_calls(device)[name]
    first = bytes_of(op(*arguments))
    for filling in (0xFF, 0x3F) * 8:
        op, arguments = raw_calls(device)[name]
        blocks = [torch.full_like(result, filling) for result in first for _ in range(32)]
        del blocks  # memory to be used again
        assert all(map(torch.equal, bytes_of(op(*arguments)), first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiled(device: torch.device, dtype: torch.dtype, dropout_p: float) -> None:
    """The ops that graphs of torch.compile hold; not drawing, a call twice is the same call."""
    if (device.type, active_backend("cpu")) != ("cpu", "native"):
        pytest.skip("the CPU library has these ops")
    x, weights, biases, *norm = network(device)
    x, *parameters = (t.to(dtype) for t in (x, *weights, *biases, *norm))
    numbers = f"0.1 1e-05 0.01 {dropout_p}"
    output, saved = RAW.research_net_compiled(x, parameters, buffers(device, 3), numbers)
    calls = {
        "research_net_compiled": (x, parameters, list(buffers(device, 3)), numbers),
        "research_net_compiled_backward": (output, x, parameters[:3], saved, 0b1_1111_1111),
        "research_net_compiled_evaluate": (x, [*parameters, *buffers(device, 3)[:2]], "1e-05 0.01"),
    }
    # A batch norm behind the second of three layers, which has dropout; Tanh behind the last.
    norm_buffers = list(buffers(device, 3))
    normed = LEAKY_RELU | 8 | 32 | 128
    layers = f"0 {SILU | 8} {normed | 16 | 64} 0.01 {dropout_p} 0.1 1e-05 {TANH | 8}"
    output, saved = RAW.mlp_compiled(x, parameters, norm_buffers, layers)
    mask = 0b1100_1111_111
    evaluated = f"0 {SILU | 8} {normed} 0.01 0.1 1e-05 {TANH | 8}"
    calls |= {
        "mlp_compiled": (x, parameters, norm_buffers, layers),
        "mlp_compiled_backward": (output, x, parameters[:3], output, saved, mask),
        "mlp_compiled_evaluate": (x, [*parameters, *norm_buffers[:2]], evaluated),
    }
    assert calls.keys() == COMPILED_SCHEMAS.keys()
    for name, arguments in calls.items():
        checks = ["test_schema", "test_faketensor"]
        if name not in ("research_net_compiled", "mlp_compiled") or not dropout_p:
            checks.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(RAW, name).default, arguments, test_utils=checks)


def in_another_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with its last two dimensions exchanged in memory."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [torch.clone, in_another_order])
def test_fake_kernels_agree(device: torch.device, name: str, dtype: torch.dtype, order) -> None:
    """Fake tensors get the shapes, dtypes and strides real ones get, in forward and backward.

    Compiled code trusts them: a wrong stride would be a wrong number.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    def run(values: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in values]
        output = case.fused(*leaves)
        grads = torch.autograd.grad(output, leaves, order(torch.ones_like(output)))
        return output, *grads

    case = example(name, dtype=dtype, device=device)
    tensors = [order(tensor) for tensor in case.tensors.values()]
    real = run(tensors)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = run([mode.from_tensor(tensor) for tensor in tensors])
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


# -------------------------------------------------------------------------------- transforms


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
