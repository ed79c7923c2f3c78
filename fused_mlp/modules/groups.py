"""Run one group of modules through its op, or module by module where that is not the same.

A group holds the ``__dict__`` of each of its modules and reads parameters, buffers, options and
hooks from there at every call, so whatever a user does to a module takes effect at once. The
modules stay the single source of truth; nothing of them is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.nn.modules import module as nn_module

from .. import backends
from ..ops.fit import Fit
from . import attempt, snapshot
from .behind import reader
from .norm import SynchronizedForward, norm_state
from .patterns import (
    BATCH_NORM_ACT,
    BATCH_NORM_LEAKY_RELU,
    LINEAR_ACT,
    LINEAR_BATCH_NORM_ACT,
    LINEAR_RELU,
    RESEARCH_NET,
    Run,
)
from .prepared import PreparedNet, can_prepare

Step = Callable[[Any], Any]

_global_forward_hooks = nn_module._global_forward_hooks
_global_forward_pre_hooks = nn_module._global_forward_pre_hooks
_global_backward_hooks = nn_module._global_backward_hooks
_global_backward_pre_hooks = nn_module._global_backward_pre_hooks


def make_step(run: Run) -> Step:
    """Return what computes a run: a group, or the module itself."""
    if run.op in (LINEAR_RELU, LINEAR_ACT) and len(run.modules) > 1:
        return LinearActGroup(run).run
    if run.op == BATCH_NORM_ACT or (run.op == BATCH_NORM_LEAKY_RELU and len(run.modules) > 1):
        return BatchNormActGroup(run).run
    if run.op == LINEAR_BATCH_NORM_ACT:
        return LinearBatchNormActGroup(run).run
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
            or ("forward" in module and type(module["forward"]) is not SynchronizedForward)
            or "_compiled_call_impl" in module
        ):
            return False
    return True


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
        self._parts = tuple(make_step(part) for part in run.parts)
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


class ResearchNetGroup:
    """The whole network; where it cannot run at once, its parts run one after the other.

    Attributes:
        norm: the ``__dict__`` of the batch norm.
        ready: by the batch norm's ``training``, the network ready for its next call.
    """

    __slots__ = (
        "_changed", "_dicts", "_dropouts", "_fits", "_linears", "_modules", "_parts", "_seen",
        "_slope", "norm", "ready",
    )  # fmt: skip

    def __init__(self, run: Run) -> None:
        self._modules = dict(enumerate(run.modules))
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
        self.norm = norm.modules[0].__dict__
        self._slope = norm.modules[-1].__dict__
        self._fits = attempt.two_fits()
        self.ready: dict[bool, PreparedNet] = {}
        # Whether something ready had to be given up, and what the last call in each mode read.
        self._changed = False
        self._seen: dict[bool, tuple[Any, ...]] = {}

    def run(self, input: Any) -> Any:
        ready = self.ready.get(self.norm["training"])
        output = None if ready is None else ready.run(input, self._modules)
        return self.run_unprepared(input) if output is None else output

    def run_unprepared(self, input: Any) -> Any:
        """Return the output, reading everything anew, and make ready for the next call."""
        if runs_as_written(self._dicts):
            try:
                arguments = self.read()
            except KeyError:  # a parameter is computed by a parametrization, prune, weight_norm
                return _one_by_one(self._parts, input)
            output = attempt.research_net(self._fits, input, *arguments)
            if output is not None:
                if can_prepare(input, arguments[0]):
                    self._prepare(input, arguments)
                return output
        return _one_by_one(self._parts, input)

    def read(self) -> attempt.NetState:
        """Return what a call uses, as the modules hold it now.

        Raises:
            KeyError: where a parameter is not a plain one.
        """
        weights, biases = [], []
        for linear in self._linears:
            parameters = linear["_parameters"]
            weights.append(parameters["weight"])
            biases.append(parameters["bias"])
        dropout_p = [
            dropout[name] if dropout is not None and dropout["training"] else 0.0
            for dropout, name in self._dropouts
        ]
        state = norm_state(self.norm)
        return weights, biases, state, dropout_p, self._slope["negative_slope"]

    def _prepare(self, input: Tensor, arguments: attempt.NetState) -> None:
        """Make ready for more calls like the one that ran, if there is reason to expect some.

        It takes 50 us. Where an option changes at every step, as a schedule of dropout
        probabilities does, it is not worth it: after a change two calls must read the same.
        """
        mode = self.norm["training"]
        if self.is_cumulative() or self.may_share():
            return
        before = self.ready.get(mode)
        if before is not None and before.holds(self._modules) and before.accept(input):
            return
        if before is not None:
            self._changed = True
            self.ready.clear()  # what is ready for the other mode may be as old
        if self._changed:
            seen, self._seen[mode] = self._seen.get(mode), _what_was_read(arguments)
            if seen != self._seen[mode]:
                return
        read = snapshot.take(self._modules.values(), self.entries())
        weights, biases, state, dropout_p, slope = self.read()
        weight, bias, running_mean, running_var, tracked, training, momentum, eps, _ = state
        fresh = PreparedNet(
            read,
            (weights, biases, weight, bias, running_mean, running_var, tracked, training,
             dropout_p, momentum, eps, slope),
            input,
        )  # fmt: skip
        if fresh.holds(self._modules):  # another thread may have changed something meanwhile
            self.ready[mode] = fresh

    def is_cumulative(self) -> bool:
        """Return whether the momentum depends on the batches counted so far."""
        return self.norm["training"] and self.norm["momentum"] is None

    def may_share(self) -> bool:
        """Return whether processes share the statistics, if there are any at the call."""
        norm = self.norm
        return norm["training"] and ("forward" in norm or "process_group" in norm)

    def entries(self) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
        """Yield dictionaries and the keys of all that a call reads from them."""
        for linear in self._linears:
            yield linear, ("_parameters",)
            yield linear["_parameters"], ("weight", "bias")
        for dropout, name in self._dropouts:
            if dropout is not None:
                yield dropout, (name, "training")
        norm = self.norm
        yield norm, ("training", "momentum", "eps", "track_running_stats", "_parameters",
                     "_buffers")  # fmt: skip
        if "forward" in norm:  # synchronized, which changes nothing in evaluation
            yield norm, ("forward",)
        yield norm["_parameters"], ("weight", "bias")
        yield norm["_buffers"], ("running_mean", "running_var", "num_batches_tracked")
        yield self._slope, ("negative_slope",)
        yield vars(backends), ("_chosen",)


def _linear_and_dropout(run: Run) -> tuple[dict[str, Any], dict[str, Any] | None, str]:
    """Return the ``__dict__`` with the parameters, and where the dropout probability stands."""
    first = run.modules[0].__dict__
    if len(run.modules) == 1:  # LinearReLU
        return first, first, "dropout"
    if len(run.modules) == 2:
        return first, None, ""
    return first, run.modules[2].__dict__, "p"


def _what_was_read(arguments: attempt.NetState) -> tuple[Any, ...]:
    """Return the identities of the tensors and the values of the options."""
    weights, biases, state, dropout_p, slope = arguments
    return (*map(id, (*weights, *biases, *state[:5])), *state[5:], *dropout_p, slope)


def _one_by_one(steps: Iterable[Step], input: Any) -> Any:
    for step in steps:
        input = step(input)
    return input
