"""What the ops that graphs hold for the CPU library alone say where another backend runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor


def refuse(op: str) -> NoReturn:
    """Raise: a graph holds what one backend keeps for backward."""
    raise RuntimeError(
        f"{op}(): this graph was compiled for the native CPU backend, which does not run now; "
        "compile again after torch.compiler.reset()"
    )


def mlp_compiled(
    input: Tensor,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
    layout: Sequence[int],
    options: Sequence[float],
) -> tuple[Tensor, Tensor]:
    refuse("mlp")


def mlp_compiled_backward(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    output: Tensor | None,
    saved: Tensor,
    output_mask: int,
) -> list[Tensor]:
    refuse("mlp")


def mlp_compiled_evaluate(
    input: Tensor,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
    layout: Sequence[int],
    options: Sequence[float],
) -> Tensor:
    refuse("mlp")
