"""Which neighbouring modules make a run that one op computes.

Only the class of a module counts here, and exactly: a subclass may compute something else, a
parametrized module has a class of its own, a lazy one becomes plain with its first input. What a
module's options and hooks say is read when the run is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from .layers import BatchNormLeakyReLU, LinearReLU

PLAIN = ""
LINEAR_RELU = "linear_relu"
LINEAR_ACT = "linear_act"
BATCH_NORM_LEAKY_RELU = "batch_norm_leaky_relu"
BATCH_NORM_ACT = "batch_norm_act"
LINEAR_BATCH_NORM_ACT = "linear_batch_norm_act"
RESEARCH_NET = "research_net"
MLP = "mlp"

AFTER_LINEAR = (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh)
AFTER_BATCH_NORM = (nn.ReLU, nn.LeakyReLU)
BATCH_NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm)


@dataclass(frozen=True, eq=False)
class Run:
    """Neighbouring modules and the op that computes them.

    Attributes:
        op: the op's name; PLAIN for one module that runs as itself.
        modules: the modules in order.
        parts: for RESEARCH_NET, MLP and LINEAR_BATCH_NORM_ACT, the shorter runs it consists of.
    """

    op: str
    modules: tuple[nn.Module, ...]
    parts: tuple[Run, ...] = ()


def find_runs(modules: Sequence[nn.Module]) -> list[Run]:
    """Cut a sequence of modules into runs, longest first, in order and without a gap."""
    short = _short_runs(modules)
    runs: list[Run] = []
    linears: list[Run] = []  # the last runs, as long as they begin with a Linear
    start = 0
    while start < len(short):
        run, length = short[start], _network_length(short, start)
        others: list[Run] = []
        if length:
            *parts, last = short[start : start + length]
            linear, *rest = last.modules
            linears.append(_joined(RESEARCH_NET, (*parts, Run(PLAIN, (linear,)))))
            others = [Run(PLAIN, (module,)) for module in rest]
        elif _is_linear(run) and _is_batch_norm(short[start + 1 : start + 2]):
            length = 2
            linears.append(_joined(LINEAR_BATCH_NORM_ACT, tuple(short[start : start + 2])))
        elif _is_linear(run) or run.op in (LINEAR_RELU, LINEAR_ACT):
            length = 1
            linears.append(run)
        else:
            length = 1
            # A batch norm by itself is torch's; behind a Linear it is part of the run.
            alone = run.op == BATCH_NORM_ACT and len(run.modules) == 1
            others = [replace(run, op=PLAIN) if alone else run]
        if others:
            runs += [*_chain(linears), *others]
            linears = []
        start += length
    return runs + _chain(linears)


def _chain(linears: list[Run]) -> list[Run]:
    """Return runs that begin with a Linear as one, if there are several."""
    return [_joined(MLP, tuple(linears))] if len(linears) > 1 else linears


def linear_runs(run: Run) -> Iterator[Run]:
    """Yield the runs of a chain that have one Linear each, of a network within it as well."""
    if run.op == MLP:
        for part in run.parts:
            yield from linear_runs(part)
    elif run.op == RESEARCH_NET:
        *hidden, before_norm, norm, last = run.parts
        yield from (*hidden, _joined(LINEAR_BATCH_NORM_ACT, (before_norm, norm)), last)
    else:
        yield run


def _joined(op: str, parts: tuple[Run, ...]) -> Run:
    return Run(op, tuple([module for part in parts for module in part.modules]), parts)


def _short_runs(modules: Sequence[nn.Module]) -> list[Run]:
    runs: list[Run] = []
    kinds = [type(module) for module in modules]
    start = 0
    while start < len(modules):
        op, length = PLAIN, 1
        kind, following = kinds[start], kinds[start + 1 : start + 3]
        if kind is nn.Linear:
            length = _length(following, AFTER_LINEAR)
            if length > 1:
                op = LINEAR_RELU if following[0] is nn.ReLU else LINEAR_ACT
        elif kind in BATCH_NORMS:
            length = _length(following, AFTER_BATCH_NORM)
            leaky = length == 2 and following[0] is nn.LeakyReLU
            op = BATCH_NORM_LEAKY_RELU if leaky else BATCH_NORM_ACT
        elif kind is LinearReLU:
            op = LINEAR_RELU
        elif kind is BatchNormLeakyReLU:
            op = BATCH_NORM_LEAKY_RELU
        runs.append(Run(op, tuple(modules[start : start + length])))
        start += length
    return runs


def _length(following: Sequence[type], activations: Sequence[type]) -> int:
    """Return how long a run of a layer, an activation and dropout is, the last two if there."""
    length = 1 + (following[:1] != [] and following[0] in activations)
    return length + (following[length - 1 : length] == [nn.Dropout])


def _is_linear(run: Run) -> bool:
    return run.op == PLAIN and type(run.modules[0]) is nn.Linear


def _is_batch_norm(runs: Sequence[Run]) -> bool:
    return bool(runs) and type(runs[0].modules[0]) in BATCH_NORMS


def _network_length(runs: Sequence[Run], start: int) -> int:
    """Return how many runs from ``start`` on make a whole network; 0 when they do not.

    Of the last run, the network takes the Linear alone.
    """
    end = start
    while end < len(runs) and runs[end].op == LINEAR_RELU:
        end += 1
    tail = runs[end : end + 3]
    if (
        [run.op for run in tail[:2]] == [PLAIN, BATCH_NORM_LEAKY_RELU]
        and _is_linear(tail[0])
        and len(tail) == 3
        and tail[2].op in (PLAIN, LINEAR_ACT)
        and type(tail[2].modules[0]) is nn.Linear
    ):
        return end + 3 - start
    return 0
