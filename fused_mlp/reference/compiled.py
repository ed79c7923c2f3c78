"""What the ops that graphs hold for the CPU library alone say where another backend runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor


def _refuse(op: str) -> NoReturn:
    """Raise: a graph holds what one backend keeps for backward."""
    raise RuntimeError(
        f"{op}(): this graph was compiled for the native CPU backend, which does not run now; "
        "compile again after torch.compiler.reset()"
    )


def research_net_compiled(
    input: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], numbers: str
) -> tuple[Tensor, Tensor]:
    _refuse("research_net")


def research_net_compiled_backward(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    saved: Tensor,
    output_mask: int,
) -> list[Tensor]:
    _refuse("research_net")


def mlp_compiled(
    input: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], layers: str
) -> tuple[Tensor, Tensor]:
    _refuse("mlp")


def mlp_compiled_backward(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    output: Tensor | None,
    saved: Tensor,
    output_mask: int,
) -> list[Tensor]:
    _refuse("mlp")


def mlp_compiled_evaluate(input: Tensor, tensors: Sequence[Tensor], layers: str) -> Tensor:
    _refuse("mlp")
