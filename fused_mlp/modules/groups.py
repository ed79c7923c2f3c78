"""Run one group of modules through its op, or module by module where that is not the same.

A group holds the ``__dict__`` of each of its modules and reads parameters, buffers, options and
hooks from there at every call, so whatever a user does to a module takes effect at once. The
modules stay the single source of truth; nothing of them is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..ops.fit import Fit
from . import attempt
from .behind import reader
from .hooks import runs_as_written
from .norm import norm_state
from .patterns import (
    BATCH_NORM_ACT,
    BATCH_NORM_LEAKY_RELU,
    LINEAR_ACT,
    LINEAR_BATCH_NORM_ACT,
    LINEAR_RELU,
    MLP,
    RESEARCH_NET,
    Run,
)
from .whole import MLPGroup, ResearchNetGroup, WholeGroup

Step = Callable[[Any], Any]


def make_step(run: Run) -> Step:
    """Return what computes a run: a group, or the module itself."""
    whole = make_whole(run)
    return _make_part(run) if whole is None else whole.run


def make_whole(run: Run) -> WholeGroup | None:
    """Return what computes a run in one op and can be made ready for its next call, if any can."""
    if run.op == RESEARCH_NET:
        return ResearchNetGroup(run, map(make_step, run.parts))
    if run.op == MLP:
        return MLPGroup(run, map(_make_part, run.parts))
    if run.op == LINEAR_BATCH_NORM_ACT or _is_linear_act(run):
        return MLPGroup(Run(MLP, run.modules, (run,)), (_make_part(run),))
    return None


def _make_part(run: Run) -> Step:
    """Return what computes a run of those that one op computes together."""
    if run.op == RESEARCH_NET:
        return make_step(run)
    if _is_linear_act(run):
        return LinearActGroup(run).run
    if run.op == BATCH_NORM_ACT or (run.op == BATCH_NORM_LEAKY_RELU and len(run.modules) > 1):
        return BatchNormActGroup(run).run
    if run.op == LINEAR_BATCH_NORM_ACT:
        return LinearBatchNormActGroup(run).run
    return run.modules[0]


def _is_linear_act(run: Run) -> bool:
    return run.op in (LINEAR_RELU, LINEAR_ACT) and len(run.modules) > 1


class LinearActGroup:
    """Linear, with an activation or Dropout behind it or both."""

    __slots__ = ("_behind", "_dicts", "_fit", "_modules")

    def __init__(self, run: Run) -> None:
        self._modules = run.modules
        self._dicts = tuple(module.__dict__ for module in run.modules)
        self._behind = reader(run.modules[1:])
        self._fit = Fit(feature_dim=-1)

    def run(self, input: Any) -> Any:
        if runs_as_written(self._dicts):
            parameters = self._dicts[0]["_parameters"]
            try:
                weight, bias = parameters["weight"], parameters["bias"]
                activation, slope, p = self._behind()
            except KeyError:  # a parameter is computed by a parametrization, prune, weight_norm
                return _one_by_one(self._modules, input)
            output = attempt.linear_act(self._fit, input, weight, bias, activation, slope, p)
            if output is not None:
                return output
        return _one_by_one(self._modules, input)


class BatchNormActGroup:
    """BatchNorm1d, with ReLU or LeakyReLU or Dropout behind it."""

    __slots__ = ("_behind", "_dicts", "_fits", "_modules")

    def __init__(self, run: Run) -> None:
        self._modules = run.modules
        self._dicts = tuple(module.__dict__ for module in run.modules)
        self._behind = reader(run.modules[1:])
        self._fits = attempt.two_fits()

    def run(self, input: Any) -> Any:
        if runs_as_written(self._dicts):
            try:
                state = norm_state(self._dicts[0])
            except KeyError:
                return _one_by_one(self._modules, input)
            output = attempt.batch_norm_act(self._fits, input, state, *self._behind())
            if output is not None:
                return output
        return _one_by_one(self._modules, input)


class LinearBatchNormActGroup:
    """Linear and BatchNorm1d with what stands behind: one op in evaluation, two in training."""

    __slots__ = ("_behind", "_dicts", "_fit", "_parts")

    def __init__(self, run: Run) -> None:
        self._parts = tuple(map(_make_part, run.parts))
        self._dicts = tuple(module.__dict__ for module in run.modules)
        self._behind = reader(run.modules[2:])
        self._fit = Fit(feature_dim=-1)

    def run(self, input: Any) -> Any:
        linear, norm = self._dicts[:2]
        if not norm["training"] and runs_as_written(self._dicts):
            try:
                weight, bias = linear["_parameters"]["weight"], linear["_parameters"]["bias"]
                state = norm_state(norm)
            except KeyError:
                return _one_by_one(self._parts, input)
            output = attempt.linear_batch_norm_act(
                self._fit, input, weight, bias, state, *self._behind()
            )
            if output is not None:
                return output
        return _one_by_one(self._parts, input)


def _one_by_one(steps: Iterable[Step], input: Any) -> Any:
    for step in steps:
        input = step(input)
    return input
