"""Wrong arguments of every public function, and what plain PyTorch says to the same ones.

tests/test_bad_input.py makes every mistake; scripts/reliability.py prints what it was told.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_mlp import functional

Arguments = dict[str, Any]


def _quantized(t: Tensor) -> Tensor:
    with warnings.catch_warnings():  # deprecated in torch, and still to be had
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(t, 0.1, 0, torch.quint8)


def _nested(t: Tensor, layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([t, t], layout=layout)


# In place of a tensor: what it is, and how it is made of the right one.
INSTEAD: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda t: None,
    "a list": lambda t: t.tolist(),
    "a NumPy array": lambda t: t.numpy(),
    "a number": lambda t: 1.0,
    "int64": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "complex64": lambda t: t.to(torch.complex64),
    "float8_e4m3fn": lambda t: t.to(torch.float8_e4m3fn),
    "float64 beside float32": lambda t: t.double(),
    "float16 beside float32": lambda t: t.half(),
    "sparse COO": lambda t: t.to_sparse(),
    "sparse CSR": lambda t: torch.atleast_2d(t).to_sparse_csr(),
    "quantized": _quantized,
    "nested": lambda t: _nested(t, torch.strided),
    "jagged": lambda t: _nested(t, torch.jagged),
    "MKL-DNN": lambda t: t.to_mkldnn(),
    "on another device": lambda t: t.to("meta"),
    "a dimension more": lambda t: t[None].expand(2, *t.shape),
    "a dimension less": lambda t: t[0],
    "an element more": lambda t: torch.cat([t, t[-1:]]),
    "a column less": lambda t: t[..., :-1],
    "no elements": lambda t: t[:0],
}
NOT_NUMBERS = {"a string": "0.5", "None": None, "a list": [0.5], "complex": 0.5j}


@dataclass(frozen=True)
class Function:
    """A public function with right arguments, and the same in torch's own functions."""

    name: str
    make: Callable[[], Arguments]
    ours: Callable[..., Tensor]
    op: Any
    torchs: Callable[..., Tensor]
    options: dict[str, tuple[Any, ...]]  # values out of range, by argument

    def mistakes(self) -> Iterator[tuple[str, str, Arguments]]:
        """Yield argument, what is given for it, and all arguments."""
        right = self.make()
        for argument, value in right.items():
            if isinstance(value, Tensor):
                for given, change in INSTEAD.items():
                    try:
                        yield argument, given, {**self.make(), argument: change(value)}
                    except (RuntimeError, NotImplementedError):  # torch has no such tensor
                        continue
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                for given, change in INSTEAD.items():
                    try:
                        changed = [value[0], change(value[1]), *value[2:]]
                    except (RuntimeError, NotImplementedError):
                        continue
                    yield f"{argument}[1]", given, {**self.make(), argument: changed}
                yield argument, "one less", {**self.make(), argument: value[:-1]}
                yield argument, "none", {**self.make(), argument: []}
                yield argument, "a tensor", {**self.make(), argument: value[0]}
            elif isinstance(value, float):
                for given, instead in NOT_NUMBERS.items():
                    yield argument, given, {**self.make(), argument: instead}
        for argument, values in self.options.items():
            for value in values:
                yield argument, repr(value), {**self.make(), argument: value}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _normalize_torch(input: Any, dim: Any, correction: Any, eps: Any) -> Tensor:
    if dim is None:
        return (input - input.mean()) / (input.std(correction=correction) + eps)
    mean = input.mean(dim, keepdim=True)
    return (input - mean) / (input.std(dim, correction=correction, keepdim=True) + eps)


def _linear_relu_torch(input: Any, weight: Any, bias: Any, dropout_p: Any, training: Any) -> Tensor:
    return F.dropout(F.relu(F.linear(input, weight, bias)), dropout_p, training)


def _batch_norm_torch(
    input: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: Any,
    momentum: Any, eps: Any, negative_slope: Any,
) -> Tensor:  # fmt: skip
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.leaky_relu(output, negative_slope)


def _network_torch(
    input: Any, weights: Any, biases: Any, bn_weight: Any, bn_bias: Any, running_mean: Any,
    running_var: Any, training: Any, dropout_p: Any, momentum: Any, eps: Any, negative_slope: Any,
) -> Tensor:  # fmt: skip
    hidden = F.dropout(F.relu(F.linear(input, weights[0], biases[0])), dropout_p[0], training)
    hidden = _batch_norm_torch(
        F.linear(hidden, weights[1], biases[1]), running_mean, running_var, bn_weight, bn_bias,
        training, momentum, eps, negative_slope,
    )  # fmt: skip
    return F.linear(hidden, weights[2], biases[2])


def _linear_act_torch(
    input: Any, weight: Any, bias: Any, activation: str, dropout_p: Any, training: Any,
    negative_slope: Any,
) -> Tensor:  # fmt: skip
    hidden = F.linear(input, weight, bias)
    return F.dropout(_activate(hidden, activation, negative_slope), dropout_p, training)


def _activate(x: Tensor, activation: Any, negative_slope: Any) -> Tensor:
    known = {"none": lambda x: x, "relu": F.relu, "tanh": torch.tanh}
    known["leaky_relu"] = lambda x: F.leaky_relu(x, negative_slope)
    if activation not in known:
        raise ValueError(activation)
    return known[activation](x)


def _batch_norm_act_torch(
    input: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: Any,
    momentum: Any, eps: Any, activation: Any, dropout_p: Any, negative_slope: Any,
) -> Tensor:  # fmt: skip
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.dropout(_activate(output, activation, negative_slope), dropout_p, training)


_NAN, _INF = float("nan"), float("inf")
FUNCTIONS = (
    Function(
        "normalize",
        lambda: {"input": _random(6, 4), "dim": None, "correction": 1.0, "eps": 0.0},
        lambda input, dim, correction, eps: functional.normalize(
            input, dim, correction=correction, eps=eps
        ),
        lambda input, dim, correction, eps: torch.ops.fused_mlp.normalize(
            input, dim, correction=correction, eps=eps
        ),
        _normalize_torch,
        {"dim": (2, -3, (0, 0), (0, 5), "0", 0.5, (0.5,)), "eps": (-1.0, _NAN)},
    ),
    Function(
        "linear_relu",
        lambda: {
            "input": _random(6, 4), "weight": _random(3, 4), "bias": _random(3), "dropout_p": 0.5,
            "training": True,
        },
        functional.linear_relu,
        lambda input, weight, bias, dropout_p, training: torch.ops.fused_mlp.linear_relu(
            input, weight, bias, dropout_p
        ),
        _linear_relu_torch,
        {"dropout_p": (-0.1, 1.1, _NAN, _INF)},
    ),
    Function(
        "batch_norm_leaky_relu",
        lambda: {
            "input": _random(6, 4), "running_mean": torch.zeros(4), "running_var": torch.ones(4),
            "weight": _random(4), "bias": _random(4), "training": True, "momentum": 0.1,
            "eps": 1e-5, "negative_slope": 0.01,
        },
        functional.batch_norm_leaky_relu,
        torch.ops.fused_mlp.batch_norm_leaky_relu,
        _batch_norm_torch,
        {"eps": (-1.0, _NAN)},
    ),
    Function(
        "linear_act",
        lambda: {
            "input": _random(6, 4), "weight": _random(3, 4), "bias": _random(3),
            "activation": "leaky_relu", "dropout_p": 0.5, "training": True, "negative_slope": 0.01,
        },
        functional.linear_act,
        lambda training, **named: torch.ops.fused_mlp.linear_act(**named),
        _linear_act_torch,
        {"dropout_p": (-0.1, 1.1, _NAN, _INF), "activation": ("sigmoid", "ReLU", "")},
    ),
    Function(
        "batch_norm_act",
        lambda: {
            "input": _random(6, 4), "running_mean": torch.zeros(4), "running_var": torch.ones(4),
            "weight": _random(4), "bias": _random(4), "training": True, "momentum": 0.1,
            "eps": 1e-5, "activation": "leaky_relu", "dropout_p": 0.5, "negative_slope": 0.01,
        },
        functional.batch_norm_act,
        lambda **named: torch.ops.fused_mlp.batch_norm_act(**named),
        _batch_norm_act_torch,
        {"dropout_p": (-0.1, 1.1, _NAN), "activation": ("gelu", ""), "eps": (-1.0, _NAN)},
    ),
    Function(
        "research_net",
        lambda: {
            "input": _random(6, 4), "weights": [_random(5, 4), _random(4, 5), _random(2, 4)],
            "biases": [_random(5), _random(4), _random(2)], "bn_weight": _random(4),
            "bn_bias": _random(4), "running_mean": torch.zeros(4), "running_var": torch.ones(4),
            "training": True, "dropout_p": [0.5], "momentum": 0.1, "eps": 1e-5,
            "negative_slope": 0.01,
        },
        functional.research_net,
        lambda momentum, eps, negative_slope, **named: torch.ops.fused_mlp.research_net(
            *named.values(), None, momentum, eps, negative_slope
        ),
        _network_torch,
        {"dropout_p": ([-0.1], [1.1], [_NAN], [0.5, 0.5]), "eps": (-1.0, _NAN)},
    ),
)  # fmt: skip


def outcome(call: Callable[..., Any], arguments: Arguments) -> BaseException | Any:
    """Return what the call returns or raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call(**arguments)
        except Exception as error:
            return error


def bytes_of(arguments: Arguments) -> list[bytes]:
    """Return the bytes of every dense CPU tensor among the arguments."""
    found = []
    for value in arguments.values():
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                if tensor.layout == torch.strided and not tensor.is_nested:
                    if not tensor.is_quantized and tensor.dtype != torch.float8_e4m3fn:
                        found.append(np.ascontiguousarray(tensor.numpy()).tobytes())
    return found
