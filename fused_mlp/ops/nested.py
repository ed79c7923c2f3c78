"""What ops and modules say to nested tensors, which have no sizes to check or to compute by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .schemas import (
    COMPILED_SCHEMAS,
    EVALUATION_SCHEMAS,
    KERNEL_SCHEMAS,
    PREPARED_SCHEMAS,
    TRAINING_SCHEMAS,
    kernels_library,
)

# What torch says where a size of one is asked for.
_NO_SIZES = "NestedTensorImpl doesn't support sizes"


def refuse(op: str, name: str) -> NoReturn:
    """Raise for the argument ``name``, which is nested."""
    raise RuntimeError(
        f"{op}(): {name} must be a dense tensor, but got a nested tensor; convert it with "
        f"{name}.to_padded_tensor(0.0)"
    )


def shape_of(op: str, name: str, value: Tensor) -> tuple[int, ...]:
    """Return the shape of an argument, or raise where it has none.

    Asking every tensor first would take 30 ns each.
    """
    try:
        return tuple(value.shape)
    except RuntimeError:
        if value.is_nested:
            refuse(op, name)
        raise


def explain(op: str, input: Any, error: RuntimeError) -> None:
    """Raise in place of torch's ``error`` where a module of torch's cannot take a nested input."""
    if isinstance(input, Tensor) and input.is_nested and _NO_SIZES in str(error):
        refuse(op, "input")


def _refuse_in(kernel: str) -> Callable[..., NoReturn]:
    """Return what a raw kernel does with nested tensors."""

    def call(*arguments: Any) -> NoReturn:
        schema = getattr(torch.ops.fused_mlp_kernels, kernel).default._schema
        for place, value in enumerate(arguments):
            name = schema.arguments[place].name
            if isinstance(value, Tensor) and value.is_nested:
                refuse(kernel, name)
            for item, tensor in enumerate(value if isinstance(value, list) else ()):
                if isinstance(tensor, Tensor) and tensor.is_nested:
                    refuse(kernel, f"{name}[{item}]")
        raise RuntimeError(f"{kernel}(): expected dense tensors, but got a nested one")

    return call


for _kernel in (
    *KERNEL_SCHEMAS,
    *PREPARED_SCHEMAS,
    *COMPILED_SCHEMAS,
    *EVALUATION_SCHEMAS,
    *TRAINING_SCHEMAS,
):
    kernels_library.impl(_kernel, _refuse_in(_kernel), "CompositeImplicitAutogradNestedTensor")
