"""Which neighbouring modules make a run that one op computes.

Only the class of a module counts here, and exactly: a subclass may compute something else, a
parametrized module has a class of its own, a lazy one becomes plain with its first input. What a
module's options and hooks say is read when the run is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .layers import BatchNormLeakyReLU, LinearReLU

PLAIN = ""
LINEAR_RELU = "linear_relu"
BATCH_NORM_LEAKY_RELU = "batch_norm_leaky_relu"
RESEARCH_NET = "research_net"


@dataclass(frozen=True, eq=False)
class Run:
    """Neighbouring modules and the op that computes them.

    Attributes:
        op: the op's name; PLAIN for one module that runs as itself.
        modules: the modules in order.
        parts: for RESEARCH_NET, the shorter runs it consists of.
    """

    op: str
    modules: tuple[nn.Module, ...]
    parts: tuple[Run, ...] = ()


def find_runs(modules: Sequence[nn.Module]) -> list[Run]:
    """Cut a sequence of modules into runs, longest first, in order and without a gap."""
    short = _short_runs(modules)
    runs: list[Run] = []
    start = 0
    while start < len(short):
        length = _network_length(short, start)
        if length:
            parts = tuple(short[start : start + length])
            flat = tuple([module for part in parts for module in part.modules])
            runs.append(Run(RESEARCH_NET, flat, parts))
        else:
            runs.append(short[start])
        start += length or 1
    return runs


def _short_runs(modules: Sequence[nn.Module]) -> list[Run]:
    runs: list[Run] = []
    kinds = [type(module) for module in modules]
    start = 0
    while start < len(modules):
        op, length = PLAIN, 1
        following = kinds[start + 1 : start + 3]
        if kinds[start] is nn.Linear and following[:1] == [nn.ReLU]:
            op, length = LINEAR_RELU, 3 if following[1:] == [nn.Dropout] else 2
        elif kinds[start] in (nn.BatchNorm1d, nn.SyncBatchNorm) and following[:1] == [nn.LeakyReLU]:
            op, length = BATCH_NORM_LEAKY_RELU, 2
        elif kinds[start] is LinearReLU:
            op = LINEAR_RELU
        elif kinds[start] is BatchNormLeakyReLU:
            op = BATCH_NORM_LEAKY_RELU
        runs.append(Run(op, tuple(modules[start : start + length])))
        start += length
    return runs


def _network_length(runs: Sequence[Run], start: int) -> int:
    """Return how many runs from ``start`` on make a whole network; 0 when they do not."""
    end = start
    while end < len(runs) and runs[end].op == LINEAR_RELU:
        end += 1
    tail = runs[end : end + 3]
    if (
        [run.op for run in tail] == [PLAIN, BATCH_NORM_LEAKY_RELU, PLAIN]
        and type(tail[0].modules[0]) is nn.Linear
        and type(tail[2].modules[0]) is nn.Linear
    ):
        return end + 3 - start
    return 0
