"""Wrong arguments raise what torch raises, name the argument, and leave every tensor as it was.

The mistakes stand in support/mistakes.py; docs/reliability.md prints the answers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.mistakes import FUNCTIONS, Function, bytes_of, outcome
from support.wrong_arguments import OPS
from torch import Tensor, nn

import fused_mlp
from fused_mlp.functional import batch_norm_leaky_relu, linear_relu
from fused_mlp.ops import schemas

MISTAKES = [
    pytest.param(function, argument, given, id=f"{function.name}-{argument}-{given}")
    for function in FUNCTIONS
    for argument, given, _ in function.mistakes()
]
# Where the type is not torch's: by argument and what is given, with torch's and the reason.
METHOD = "AttributeError, where torch calls a method on whatever it was given"
INDEX = "IndexError, from the list of the code it is compared with"
JAGGED = "ValueError, from the product of nested tensors, which wants a nested input"
DIFFERENT = {
    ("input", "None"): METHOD,
    ("input", "a list"): METHOD,
    ("input", "a number"): METHOD,
    ("correction", "complex"): "RuntimeError, on conversion",
    ("negative_slope", "complex"): "RuntimeError, on conversion",
    ("dropout_p", "nan"): "RuntimeError, from another check than that of other values",
    ("dropout_p", "[nan]"): "RuntimeError, from another check than that of other values",
    ("input", "a dimension more"): "RuntimeError, about the running statistics",
    ("input", "a dimension less"): "RuntimeError, about the running statistics",
    ("weights", "one less"): INDEX,
    ("weights", "none"): INDEX,
    ("weights", "a tensor"): "RuntimeError, about the first product",
    ("biases", "one less"): INDEX,
    ("biases", "none"): INDEX,
    ("weight", "jagged"): JAGGED,
    ("bias", "jagged"): JAGGED,
    ("weights[1]", "jagged"): JAGGED,
    ("biases[1]", "jagged"): JAGGED,
}


def arguments_of(function: Function, argument: str, given: str) -> dict:
    return next(a for name, what, a in function.mistakes() if (name, what) == (argument, given))


@pytest.mark.parametrize(("function", "argument", "given"), MISTAKES)
def test_mistake(function: Function, argument: str, given: str) -> None:
    arguments = arguments_of(function, argument, given)
    function.ours(**function.make())  # functions recognise tensors like those they checked before
    before = bytes_of(arguments)
    ours = outcome(function.ours, arguments)
    torchs = outcome(function.torchs, arguments_of(function, argument, given))
    if isinstance(ours, Tensor):
        assert isinstance(torchs, Tensor), f"torch raises {torchs!r}"
        return
    assert bytes_of(arguments) == before
    assert isinstance(ours, (TypeError, ValueError, RuntimeError, IndexError)), repr(ours)
    assert str(ours).startswith(f"{function.name}(): "), str(ours)
    named = (argument.split("[")[0], "weight", "input", "running_mean", "dense tensors")
    assert any(name in str(ours) for name in named), str(ours)
    if isinstance(torchs, Exception) and (argument, given) not in DIFFERENT:
        # NotImplementedError is a RuntimeError.
        assert isinstance(torchs, type(ours)), f"{ours!r}, but torch raises {torchs!r}"


@pytest.mark.parametrize(("function", "argument", "given"), MISTAKES)
def test_mistake_through_torch_ops(function: Function, argument: str, given: str) -> None:
    """The dispatcher refuses some by itself; what it lets through is refused as above."""
    arguments = arguments_of(function, argument, given)
    before = bytes_of(arguments)
    through_op = outcome(function.op, arguments)
    if isinstance(through_op, Exception):
        assert bytes_of(arguments) == before
    direct = outcome(function.ours, arguments_of(function, argument, given))
    assert isinstance(through_op, Exception) == isinstance(direct, Exception), repr(through_op)


RAW = [op for namespace, op in OPS if namespace == schemas.KERNELS]


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("op", RAW)
def test_nested_tensors_in_raw_kernels(
    device: torch.device, op: str, layout: torch.layout, grad_mode: type
) -> None:
    x = torch.ones(4, 4, device=device)
    nested = torch.nested.nested_tensor([x, x[:2]], layout=layout)
    plain = {"Tensor": x, "List[Tensor]": [x, x]}
    plain |= {"bool": True, "int": 1, "float": 0.5, "str": "0 0"}
    kernel = getattr(torch.ops.fused_mlp_kernels, op).default
    arguments = kernel._schema.arguments
    values = [plain.get(str(a.type), [] if "List" in str(a.type) else None) for a in arguments]
    for place, value in enumerate(values):
        name = arguments[place].name
        if isinstance(value, Tensor):
            wrong: Any = nested
        elif isinstance(value, list) and value:
            wrong, name = [x, nested], rf"{name}\[1\]"
        else:
            continue
        given = [*values[:place], wrong, *values[place + 1 :]]
        with grad_mode(), pytest.raises(RuntimeError, match=rf"^{op}\(\): {name} must .* nested"):
            kernel(*given)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: fused_mlp.FusedResearchNet(4, [8, 8], 2),
        lambda: fused_mlp.FusedSequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()),
        lambda: fused_mlp.BatchNormLeakyReLU(4),
        fused_mlp.Normalize,
    ],
)
def test_nested_tensors_in_modules(device: torch.device, make, training: bool) -> None:
    """Those that take none; LinearReLU does, as nn.Linear, nn.ReLU and nn.Dropout do."""
    module, x = make().to(device).train(training), torch.randn(6, 4, device=device)
    module(x)
    with pytest.raises(RuntimeError, match="input must be a dense tensor, but got a nested"):
        module(torch.nested.nested_tensor([x, x[:2]]))
    module(torch.nested.nested_tensor([x[:2], x[:1]]).to_padded_tensor(0.0).flatten(0, 1))


@pytest.mark.parametrize("momentum", [-1.0, 0.0, 2.0])
def test_any_momentum_is_torchs(device: torch.device, momentum: float) -> None:
    """torch takes any momentum; so does the op, with the same result."""
    x, results = torch.randn(6, 4, device=device), []
    for function in (batch_norm_leaky_relu, F.batch_norm):
        mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
        function(x, mean, var, training=True, momentum=momentum)
        results.append((mean, var))
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("row", [0, 3])
def test_running_statistics_inside_the_input(device: torch.device, row: int) -> None:
    """Buffers that are rows of the input: read, then written, as torch does it."""
    results = []
    for function in (batch_norm_leaky_relu, lambda *a: F.leaky_relu(F.batch_norm(*a))):
        x = torch.randn(6, 4, device=device, generator=torch.Generator(device).manual_seed(1))
        y = function(x, x[row], x[row + 1], None, None, True, 0.1, 1e-5)
        results.append((x, y))
    torch.testing.assert_close(*results)


def test_integers_cannot_require_a_gradient(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="floating point"):
        torch.ones(3, 4, dtype=torch.int64, device=device, requires_grad=True)


def test_parameters_and_buffers_after_an_error(device: torch.device) -> None:
    """A module's tensors keep every byte where its input is refused, in training as well.

    But for the counter of batches, which torch's own BatchNorm1d moves before it looks at one.
    """
    net = fused_mlp.FusedResearchNet(10, [64, 32], 5, device=device)
    net(torch.randn(8, 10, device=device)).sum().backward()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    grads = [p.grad.clone() for p in net.parameters()]
    wrong = [
        torch.randn(8, 9), torch.randn(1, 10), torch.randn(8, 10).long(), torch.randn(2, 8, 10),
        torch.randn(8, 10).double(), torch.randn(10), None, [[1.0]],
    ]  # fmt: skip
    for input in wrong:
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            net(input.to(device) if isinstance(input, Tensor) else input)
        for name, value in net.state_dict().items():
            counter = name.endswith("num_batches_tracked")
            assert counter or torch.equal(value, before[name]), name
        for parameter, grad in zip(net.parameters(), grads, strict=True):
            assert torch.equal(parameter.grad, grad)


MODULES = [
    (lambda: fused_mlp.FusedResearchNet(10, [], 5), ValueError, "hidden_layers"),
    (lambda: fused_mlp.FusedResearchNet(10, [4, 4], 5, dropout=1.5), ValueError, "between 0 and 1"),
    (lambda: fused_mlp.FusedResearchNet(-1, [4], 5), RuntimeError, "negative dimension"),
    (lambda: fused_mlp.FusedResearchNet(10, [4.5], 5), TypeError, "empty"),
    (lambda: fused_mlp.FusedSequential(3), TypeError, "int is not a Module subclass"),
    (lambda: fused_mlp.LinearReLU(3, 4, dropout=-0.1), ValueError, "between 0 and 1"),
    (lambda: fused_mlp.fuse(3), TypeError, "model must be a torch.nn.Module.*int"),
    (lambda: fused_mlp.unfuse([]), TypeError, "model must be a torch.nn.Module.*list"),
    (lambda: fused_mlp.synchronize_batch_norm(None), TypeError, "model must be.*NoneType"),
    (lambda: fused_mlp.use_backend("gpu").__enter__(), ValueError, "backend must be one of.*'gpu'"),
    (lambda: fused_mlp.TrainStep(3, F.mse_loss, None), TypeError, "net must be.*int"),
    (lambda: fused_mlp.TrainStep(nn.Linear(2, 1), 3, None), TypeError, "loss must be callable"),
    (
        lambda: fused_mlp.TrainStep(nn.Linear(2, 1), F.mse_loss, None),
        TypeError,
        "optimizer must be.*NoneType",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), MODULES)
def test_constructors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


EMPTIED = """
import faulthandler, torch
from fused_mlp import FusedResearchNet
from fused_mlp import functional as f
faulthandler.enable()
torch.set_num_threads(1)
x, w, b = torch.randn(6, 4), torch.randn(4, 4), torch.randn(4)
mean, var = torch.zeros(4), torch.ones(4)
calls = {
    "normalize": (lambda x: f.normalize(x), [x]),
    "normalize-columns": (lambda x: f.normalize(x, 0), [x]),
    "linear_relu": (lambda x, w, b: f.linear_relu(x, w, b), [x, w, b]),
    "batch_norm": (lambda *t: f.batch_norm_leaky_relu(*t, training=True), [x, mean, var, b, b]),
    "batch_norm-eval": (lambda *t: f.batch_norm_leaky_relu(*t), [x, mean, var, b, b]),
    "network": (lambda x, w, b, *t: f.research_net(x, [w, w, w], [b, b, b], *t, training=True),
                [x, w, b, b, b, mean, var]),
    "transposed": (lambda x: f.linear_relu(x, torch.ones(3, 6)), [x.t()]),
}
for name, (call, tensors) in calls.items():
    call(*(t.clone() for t in tensors))
    for i in range(len(tensors)):
        copies = [t.clone() for t in tensors]
        copies[i].untyped_storage().resize_(0)
        try:
            call(*copies)
        except RuntimeError as error:
            assert "no memory" in str(error), error
        else:
            raise SystemExit(f"{name}: argument {i} was taken without its memory")
for training in (False, True):
    net = FusedResearchNet(4, [8, 4], 2).train(training)
    for _ in range(3):
        net(x)
    net.research_layers[0].weight.data.untyped_storage().resize_(0)
    try:
        net(x)
    except RuntimeError as error:
        assert "no memory" in str(error), error
    else:
        raise SystemExit("a parameter without its memory was read")
"""


def test_tensors_without_memory() -> None:
    """An emptied storage, as sharding leaves it, is an error; torch's own ops end the process."""
    paths = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": paths, "FUSED_MLP_BACKEND": "native"}
    command = [sys.executable, "-c", EMPTIED]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_misspelt_names() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        linear_relu(torch.ones(2, 3), torch.ones(4, 3), p=0.5)  # type: ignore[call-arg]
