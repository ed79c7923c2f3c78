"""Whether AOTAutograd may compute a traced op once more in backward, and with which random numbers.

Its partitioner replays the generator's state for random ops that it was told to compute again, as
under checkpointing. One that saves memory on its own takes a random op for any other.
"""

from __future__ import annotations

import itertools

import torch
import torch._functorch.config as partitioner
from torch.fx.traceback import get_current_meta
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import CheckpointPolicy

_MARKS = ("recompute", "ac_graph_id", "memory_budget", "custom")  # of a region, on its nodes


def may_run_again() -> bool:
    """Return whether the graph that is traced now may repeat in backward what is traced next."""
    return (
        # Checkpointing marks what it sees in a mode of its own.
        not all(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())
        or not get_current_meta().keys().isdisjoint(_MARKS)
        or partitioner.activation_memory_budget < 1
        or partitioner.aggressive_recomputation
        or not partitioner.ban_recompute_not_in_allowlist
    )


def call_number() -> int:
    """Return a number that no other call has in the graph that is traced now.

    AOTAutograd takes two calls with equal arguments for one; where they draw, each has a mask of
    its own.
    """
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return 0 if mode is None else len(mode.tracer.graph.nodes)


def replay_draw() -> None:
    """Have the seed that was just traced, if one was, drawn from the same state when repeated."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    if mode is None or not may_run_again():
        return
    for node in itertools.islice(reversed(mode.tracer.graph.nodes), 4):
        if node.target is torch.ops.aten.random.default:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
