"""Run one group of modules through its op, or module by module where that is not the same.

A group holds the ``__dict__`` of each of its modules and reads parameters, buffers, options and
hooks from there at every call, so whatever a user does to a module takes effect at once. The
modules stay the single source of truth; nothing of them is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.nn.modules import module as nn_module

from . import attempt
from .fit import Fit
from .patterns import BATCH_NORM_LEAKY_RELU, LINEAR_RELU, RESEARCH_NET, Run

Step = Callable[[Any], Any]

_global_forward_hooks = nn_module._global_forward_hooks
_global_forward_pre_hooks = nn_module._global_forward_pre_hooks
_global_backward_hooks = nn_module._global_backward_hooks
_global_backward_pre_hooks = nn_module._global_backward_pre_hooks


def make_step(run: Run) -> Step:
    """Return what computes a run: a group, or the module itself."""
    if run.op == LINEAR_RELU and len(run.modules) > 1:
        return LinearReLUGroup(run).run
    if run.op == BATCH_NORM_LEAKY_RELU and len(run.modules) > 1:
        return BatchNormLeakyReLUGroup(run).run
    if run.op == RESEARCH_NET:
        return ResearchNetGroup(run).run
    return run.modules[0]


def runs_as_written(modules: Iterable[dict[str, Any]]) -> bool:
    """Return whether calling the modules would run their class's forward and nothing else."""
    if (
        _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    ):
        return False
    for module in modules:
        if (
            module["_forward_hooks"]
            or module["_forward_pre_hooks"]
            or module["_backward_hooks"]
            or module["_backward_pre_hooks"]
            or "forward" in module
            or "_compiled_call_impl" in module
        ):
            return False
    return True


class LinearReLUGroup:
    """Linear and ReLU, with or without Dropout."""

    __slots__ = ("_dicts", "_dropout", "_fit", "_linear", "_modules")

    def __init__(self, run: Run) -> None:
        self._modules = run.modules
        self._dicts = tuple(module.__dict__ for module in run.modules)
        self._linear, self._dropout, _ = _linear_and_dropout(run)
        self._fit = Fit(feature_dim=-1)

    def run(self, input: Any) -> Any:
        if runs_as_written(self._dicts):
            parameters, dropout = self._linear["_parameters"], self._dropout
            try:
                weight, bias = parameters["weight"], parameters["bias"]
                p = dropout["p"] if dropout is not None and dropout["training"] else 0.0
            except KeyError:  # a parameter is computed by a parametrization, prune, weight_norm
                return _one_by_one(self._modules, input)
            output = attempt.linear_relu(self._fit, input, weight, bias, p)
            if output is not None:
                return output
        return _one_by_one(self._modules, input)


class BatchNormLeakyReLUGroup:
    """BatchNorm1d and LeakyReLU."""

    __slots__ = ("_dicts", "_fits", "_modules")

    def __init__(self, run: Run) -> None:
        self._modules = run.modules
        self._dicts = tuple(module.__dict__ for module in run.modules)
        self._fits = attempt.two_fits()

    def run(self, input: Any) -> Any:
        if runs_as_written(self._dicts):
            norm, activation = self._dicts
            try:
                state = attempt.norm_state(norm)
            except KeyError:
                return _one_by_one(self._modules, input)
            slope = activation["negative_slope"]
            output = attempt.batch_norm_leaky_relu(self._fits, input, state, slope)
            if output is not None:
                return output
        return _one_by_one(self._modules, input)


class ResearchNetGroup:
    """The whole network; where it cannot run at once, its parts run one after the other."""

    __slots__ = ("_dicts", "_dropouts", "_fits", "_linears", "_norm", "_parts", "_slope")

    def __init__(self, run: Run) -> None:
        self._parts = tuple(make_step(part) for part in run.parts)
        self._dicts = tuple(module.__dict__ for module in run.modules)
        *hidden, before_norm, norm, last = run.parts
        linears = [_linear_and_dropout(part) for part in hidden]
        self._dropouts = tuple((dropout, name) for _, dropout, name in linears)
        self._linears = (
            *(linear for linear, _, _ in linears),
            before_norm.modules[0].__dict__,
            last.modules[0].__dict__,
        )
        self._norm = norm.modules[0].__dict__
        self._slope = norm.modules[-1].__dict__
        self._fits = attempt.two_fits()

    def run(self, input: Any) -> Any:
        if runs_as_written(self._dicts):
            output = self._at_once(input)
            if output is not None:
                return output
        return _one_by_one(self._parts, input)

    def _at_once(self, input: Any) -> Tensor | None:
        weights, biases = [], []
        try:
            for linear in self._linears:
                parameters = linear["_parameters"]
                weights.append(parameters["weight"])
                biases.append(parameters["bias"])
            state = attempt.norm_state(self._norm)
        except KeyError:  # a parameter is computed by a parametrization, prune, weight_norm
            return None
        dropout_p = [
            dropout[name] if dropout is not None and dropout["training"] else 0.0
            for dropout, name in self._dropouts
        ]
        return attempt.research_net(
            self._fits, input, weights, biases, state, dropout_p,
            self._slope["negative_slope"],
        )  # fmt: skip


def _linear_and_dropout(run: Run) -> tuple[dict[str, Any], dict[str, Any] | None, str]:
    """Return the ``__dict__`` with the parameters, and where the dropout probability stands."""
    first = run.modules[0].__dict__
    if len(run.modules) == 1:  # LinearReLU
        return first, first, "dropout"
    if len(run.modules) == 2:
        return first, None, ""
    return first, run.modules[2].__dict__, "p"


def _one_by_one(steps: Iterable[Step], input: Any) -> Any:
    for step in steps:
        input = step(input)
    return input
