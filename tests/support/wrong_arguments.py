"""Calls every op with arguments that mostly do not fit: errors are fine, a crash is not.

    python -m support.wrong_arguments --cases 20000 --seed 1      # in tests/

Prints the number of each call before it is made, so that whoever sees the process die knows which
call it was; ``--only NUMBER`` makes that call again and shows its arguments.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_mlp.ops import schemas

FLOATS = (0.0, 0.3, 1.0, -1.0, 2.0, 1e-5, 1e300, float("nan"), float("inf"), float("-inf"))
INTS = (-3, -1, 0, 1, 2, 5, 2**62, -(2**63))
WORDS = ("none", "none", "relu", "leaky_relu", "gelu", "silu", "tanh", "tanh", "elu", "")
SIZES = (0, 1, 2, 3, 5, 8, 16, 17, 33)
FITTING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (
    *(torch.float32,) * 6, *FITTING[1:], torch.int64, torch.int32, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
# What torch's own operations raise; an AssertionError, say, would be a missing check of ours.
EXPECTED = (RuntimeError, TypeError, ValueError, IndexError)

# Tensors that are no plain blocks of memory; each makes one from a plain tensor.
UNUSUAL: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t.to_sparse_csr(),
    lambda t: t.to_mkldnn(),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: torch.nested.nested_tensor([t, t[:1]]),
    lambda t: t.transpose(0, -1),
    lambda t: t[..., ::2],
    lambda t: t.expand(3, *t.shape),
    lambda t: torch._neg_view(t),
    lambda t: t.detach().clone().requires_grad_(),
)


OPS = [
    *((schemas.KERNELS, op) for op in schemas.KERNEL_SCHEMAS),
    *((schemas.PUBLIC, op) for op in schemas.PUBLIC_SCHEMAS),
    *((schemas.KERNELS, op) for op in schemas.PREPARED_SCHEMAS),
    *((schemas.KERNELS, op) for op in schemas.COMPILED_SCHEMAS),
    *((schemas.KERNELS, op) for op in schemas.EVALUATION_SCHEMAS),
    *((schemas.KERNELS, op) for op in schemas.TRAINING_SCHEMAS),
]
# Arguments that are numbers in a text, and what else than FLOATS stands there: numbers of layers.
TEXTS = ("numbers", "layers")
LAYERS = (0, 1, 5, 8, 13, 26, 40, 104, 232, 250)
# Arguments that are handles, and the op that makes them.
HANDLES = {
    "prepared": "research_net_prepare",
    "mlp": "mlp_prepare",
    "network": "mlp_prepare",
    "plan": "train_step_plan",
}


class Source(Protocol):
    """Where decisions come from: ``random.Random``, or the bytes of a fuzzer."""

    def random(self) -> float: ...
    def choice(self, options: Sequence[Any]) -> Any: ...


class Arguments:
    """Arguments of one call; the same for the same decisions and number."""

    def __init__(self, source: Source, number: int) -> None:
        self._random = source
        self._generator = torch.Generator().manual_seed(number)
        rows, columns, others = (self._random.choice(SIZES) for _ in range(3))
        dtype = self._random.choice(FITTING)
        shapes = (
            (rows, columns),
            (others, columns),
            (columns,),
            (others,),
            (rows, others),
            (rows,),
        )
        # Tensors that fit each other, for calls that are right but in one place.
        self._pool = [torch.randn(shape, generator=self._generator).to(dtype) for shape in shapes]
        self._right = self._random.choice((0.0, 0.5, 0.8, 0.95))

    def call(self) -> tuple[str, list[Any], dict[str, Any]]:
        """Return the op's name, its arguments in order, and those passed by name."""
        return self._call_of("::".join(self._random.choice(OPS)))

    def _call_of(self, name: str) -> tuple[str, list[Any], dict[str, Any]]:
        arguments: list[Any] = []
        named: dict[str, Any] = {}
        for argument in torch._C._get_schema(name, "").arguments:
            value = self._value(str(argument.type), argument.name)
            if argument.kwarg_only:
                named[argument.name] = value
            else:
                arguments.append(value)
        return name, arguments, named

    def _value(self, kind: str, name: str) -> Any:
        choose = self._random.choice
        if kind.startswith("Optional"):
            return choose((None, self._value(kind[len("Optional[") : -1], name)))
        if kind == "Tensor":
            if name in HANDLES:
                return self._handle(HANDLES[name])
            if name == "seed" and self._random.random() < 0.8:
                return choose((torch.tensor([1, 2]), torch.tensor([1]), torch.tensor([1.0, 2.0])))
            if name == "num_batches_tracked":
                return choose((torch.tensor(1), torch.tensor([1]), torch.tensor(1.0)))
            return self._tensor()
        if kind.startswith("List"):
            inner = kind[len("List[") : -1]
            lengths = (0, 1, 3, 3, 7, 9, 11) if inner == "bool" else (0, 1, 1, 2, 2, 3, 9)
            return [self._value(inner, name) for _ in range(choose(lengths))]
        if name in TEXTS and self._random.random() < 0.9:
            numbers = [
                choose(choose((LAYERS, LAYERS, FLOATS))) for _ in range(choose((2, 3, 5, 9)))
            ]
            return " ".join(map(str, numbers))
        return choose({"bool": (True, False), "float": FLOATS, "int": INTS, "str": WORDS}[kind])

    def _handle(self, op: str) -> Tensor:
        """A handle, a copy of its bytes, which is none, or any tensor."""
        try:
            _, arguments, _ = self._call_of(f"{schemas.KERNELS}::{op}")
            handle = getattr(torch.ops.fused_mlp_kernels, op).default(*arguments)
        except EXPECTED:
            return self._tensor()
        return self._random.choice((handle, handle, handle.clone(), handle[1:], handle[:-1]))

    def _tensor(self) -> Tensor:
        if self._random.random() < self._right:
            return self._random.choice(self._pool)
        shape = [self._random.choice(SIZES) for _ in range(self._random.choice((0, 1, 2, 2, 3, 4)))]
        plain = torch.randn(shape, generator=self._generator)
        try:
            tensor = plain.to(self._random.choice(DTYPES))
            return self._random.choice(UNUSUAL)(tensor) if self._random.random() < 0.3 else tensor
        except (RuntimeError, IndexError):  # torch has no such tensor of this shape or dtype
            return plain


def describe(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(describe, value))}]"
    if isinstance(value, Tensor):
        shape = "nested" if value.is_nested else tuple(value.shape)
        return f"{value.dtype} {value.layout} {value.device} {shape}"
    return repr(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="make this call alone, and show its arguments")
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    returned = 0
    for number in range(options.cases) if options.only is None else (options.only,):
        source = random.Random((options.seed << 32) + number)
        name, arguments, named = Arguments(source, number).call()
        print(number, name, flush=True)
        if options.only is not None:
            print("\n".join([*map(describe, arguments), repr(named)]), flush=True)
        namespace, op = name.split("::")
        try:
            getattr(getattr(torch.ops, namespace), op).default(*arguments, **named)
            returned += 1
        except EXPECTED as error:
            if options.only is not None:
                print(f"{type(error).__name__}: {error}")
    print(f"{returned} calls returned, the others raised")


if __name__ == "__main__":
    main()
