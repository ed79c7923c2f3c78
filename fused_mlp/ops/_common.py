"""What every op needs: the raw kernels' gate to autograd, argument checks, double backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import notice
from . import inductor, nested
from .schemas import KERNELS, kernels_library

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def bound(op: Any) -> Callable[..., Any]:
    """Return what an op's ``__call__`` calls; that Python frame takes 0.2 us."""
    return getattr(op, "_op", op)


def grad_needed(*tensors: Tensor | None) -> bool:
    """Return whether autograd must record an op over these inputs."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 (any() over a generator takes twice as long)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def use_formula(*tensors: Tensor | None) -> bool:
    """Return whether to run the differentiable formula instead of a kernel.

    ``torch.func`` transforms and forward-mode AD trace through the formula, autocast chooses the
    dtypes of the steps it sees, and a tensor subclass knows torch's own ops.

    Args:
        tensors: what the op takes, the input first.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or (torch._C._is_any_autocast_enabled() and _under_autocast(tensors[0]))
        or (torch._C._is_fwd_grad_enabled() and torch.autograd.forward_ad._current_level >= 0)
        or _formula_alone
        or any(map(_is_foreign, tensors))
    )


def _under_autocast(input: Tensor | None) -> bool:
    return input is not None and torch.is_autocast_enabled(input.device.type)


def _is_foreign(tensor: Tensor | None) -> bool:
    """Return whether a tensor is of a class that is neither torch's plain ones nor a tracer's."""
    kind = type(tensor)
    return (
        kind is not Tensor
        and kind is not Parameter
        and tensor is not None
        and not kind.__module__.startswith("torch._subclasses.")  # FakeTensor, FunctionalTensor
    )


_formula_alone = False


@contextlib.contextmanager
def formula_alone() -> Iterator[None]:
    """Inside the ``with`` block the public ops run their formula, in every thread."""
    global _formula_alone
    before, _formula_alone = _formula_alone, True
    try:
        yield
    finally:
        _formula_alone = before


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """Register what a raw kernel gives for tensors without values: tracers' and meta ones."""
    op = getattr(getattr(torch.ops, KERNELS), name).default

    def with_notice(*arguments: Any) -> Any:
        inductor.call_shortly(op)
        if type(arguments[0]) in (Tensor, Parameter) and arguments[0].is_meta:
            notice.reference_runs("meta")
        return fake(*arguments)

    torch.library.register_fake(f"{KERNELS}::{name}", with_notice, lib=kernels_library)


def differentiate_formula(
    formula: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad_output: Tensor,
) -> list[Tensor | None]:
    """Return the gradients of ``formula(*tensors)``, themselves differentiable.

    Args:
        formula: the op from differentiable steps, taking ``tensors`` in order.
        tensors: the inputs as the forward op saw them.
        needed: which of them want a gradient.
        grad_output: the gradient of the formula's output.
    """
    with torch.enable_grad():
        # Aliases, so that an input computed from another input gets its own share alone.
        aliases = [
            t.view_as(t) if t is not None and n else t for t, n in zip(tensors, needed, strict=True)
        ]
        output = formula(*aliases)
        wanted = [t for t, n in zip(aliases, needed, strict=True) if n and t is not None]
        found = iter(
            torch.autograd.grad(output, wanted, grad_output, create_graph=True, allow_unused=True)
        )
    return [
        next(found) if n and t is not None else None for t, n in zip(aliases, needed, strict=True)
    ]


def spread(gradients: Sequence[Tensor], output_mask: Sequence[bool]) -> list[Tensor | None]:
    """Return one entry a flag: the next gradient where it is set, None elsewhere."""
    if len(gradients) == len(output_mask):
        return list(gradients)
    found = iter(gradients)
    return [next(found) if wanted else None for wanted in output_mask]


def mark_written(*tensors: Tensor | None) -> None:
    """Bump the version of buffers a kernel wrote, so that autograd notices stale saved values."""
    written = [t for t in tensors if type(t) is Tensor and not t.is_inference()]
    torch.autograd.graph.increment_version(written)  # all at once, half a microsecond less


def check_tensor(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def check_floating(op: str, name: str, value: Tensor) -> None:
    """Raise unless ``value`` is a dense tensor of a floating dtype the kernels know.

    Of nested tensors those of torch's older layout pass: :func:`nested.shape_of` refuses them.
    """
    if value.dtype not in FLOATING:
        raise RuntimeError(
            f"{op}(): {name} must be float32, float64, bfloat16 or float16, but got "
            f"{value.dtype}; convert it, for example with {name}.float()"
        )
    _check_layout(op, name, value)


def _check_layout(op: str, name: str, value: Tensor) -> None:
    if value.layout != torch.strided:
        if value.is_nested:
            nested.refuse(op, name)
        raise RuntimeError(
            f"{op}(): {name} must be a dense tensor, but got layout {value.layout}; "
            f"convert it with {name}.to_dense()"
        )


def check_like(
    op: str, name: str, value: Any, input: Tensor, shape: tuple[int, ...], mixed: bool = False
) -> None:
    """Raise unless ``value`` is a tensor of ``shape`` that can meet ``input`` in one op.

    Args:
        mixed: allow float32 beside a half-precision input, as batch norm does.
    """
    check_tensor(op, name, value)
    given = nested.shape_of(op, name, value)
    _check_layout(op, name, value)
    if given != shape:
        raise RuntimeError(
            f"{op}(): {name} must have shape {shape} to go with input of shape "
            f"{tuple(input.shape)}, but got {given}"
        )
    if value.dtype != input.dtype and not (
        mixed and value.dtype == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)
    ):
        raise RuntimeError(
            f"{op}(): {name} must have the dtype of input ({input.dtype}), but got {value.dtype}; "
            f"convert one of them with .to(dtype)"
        )
    if value.device != input.device:
        raise RuntimeError(
            f"{op}(): expected all tensors to be on the same device, but input is on "
            f"{input.device} and {name} is on {value.device}; move one of them with .to(device)"
        )


def check_number(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a real number (symbolic ones under torch.compile too)."""
    if type(value) is int:  # an abstract class takes 0.3 us to say so
        return
    if not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}(): argument '{name}' must be float, not {type(value).__name__}")


def check_probability(op: str, name: str, p: float) -> None:
    """Raise ValueError unless 0 <= p <= 1."""
    if type(p) is not float:
        check_number(op, name, p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(
            f"{op}(): dropout probability {name} has to be between 0 and 1, but got {p}"
        )


def check_seed(op: str, seed: Tensor | None, input: Tensor) -> None:
    """Raise unless ``seed`` is None or two int64 numbers beside ``input``."""
    if seed is None:
        return
    check_tensor(op, "seed", seed)
    if seed.dtype != torch.int64 or tuple(seed.shape) != (2,) or seed.device != input.device:
        raise RuntimeError(
            f"{op}(): seed must be an int64 tensor of shape (2,) on {input.device}, but got "
            f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
        )
