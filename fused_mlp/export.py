"""Exported programs for runtimes that lack the fused ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from . import ops
from .ops._common import formula_alone

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# What run_decompositions leaves alone unless it is told; the ops that write buffers it never does.
_LEFT_ALONE: dict[Any, Callable[..., Any]] = {
    torch.ops.fused_mlp.normalize.default: ops.normalize,
    torch.ops.fused_mlp.linear_relu.default: ops.linear_relu,
    torch.ops.fused_mlp.linear_act.default: ops.linear_act,
    torch.ops.fused_mlp.linear_batch_norm_act.default: ops.linear_batch_norm_act,
}


def decompose(
    program: ExportedProgram, decomp_table: dict[Any, Callable[..., Any]] | None = None
) -> ExportedProgram:
    """Return an exported program in which torch's own ops stand in place of the fused ones.

    For a model that is at hand, exporting ``fused_mlp.unfuse(model)`` does the same; this one
    takes a program that was exported, or loaded, with the fused ops in it. Dropout keeps the masks
    of the fused ops.

    Args:
        program: what ``torch.export.export`` or ``torch.export.load`` returned.
        decomp_table: how to decompose everything else, as ``run_decompositions`` takes it; ``{}``
            leaves everything else as it is, None breaks it down to the core ATen ops.
    """
    table = torch.export.default_decompositions() if decomp_table is None else {**decomp_table}
    table.update(_LEFT_ALONE)
    with formula_alone():
        return program.run_decompositions(table)
