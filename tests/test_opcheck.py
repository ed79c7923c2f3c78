"""``torch.library.opcheck`` over every op, and what compiled code relies on without asking."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import EXAMPLES, example
from support.memory import assert_equal_bytes
from support.op_calls import RAW, buffers, network, public_calls, raw_calls

from fused_mlp.activations import LEAKY_RELU, SILU, TANH
from fused_mlp.backends import active_backend
from fused_mlp.ops.schemas import COMPILED_SCHEMAS, KERNEL_SCHEMAS, PUBLIC_SCHEMAS


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

    def prepare():
        op, arguments = raw_calls(device)[name]
        return lambda: op(*arguments)

    assert_equal_bytes(prepare)


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
