"""Several runs of modules in one op, made ready for their next call where that pays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from .. import backends, on_chip
from ..activations import LEAKY_RELU, RELU
from ..ops.fit import Fit
from ..ops.mlp import Layers
from ..ops.mlp import check as check_mlp
from ..ops.research_net import check as check_research_net
from . import attempt, behind, snapshot
from .hooks import runs_as_written
from .layers import BatchNormLeakyReLU, LinearReLU
from .norm import norm_state
from .patterns import LINEAR_BATCH_NORM_ACT, Run, linear_runs
from .prepared import Prepared, PreparedNet, can_prepare, prepare_mlp, prepare_research_net

# A dictionary and the keys that are read from it.
Entry = tuple[dict[str, Any], tuple[str, ...]]


class WholeGroup(ABC):
    """Runs that one op computes; where it cannot, they run one after the other.

    Args:
        run: what the op computes.
        parts: what computes the shorter runs it consists of.
        linears: the runs of them that begin with a Linear.

    Attributes:
        switch: a dictionary whose ``training`` tells the mode.
        ready: by mode, the network ready for its next call.
    """

    __slots__ = (
        "_behind", "_changed", "_dicts", "_linears", "_modules", "_options", "_parts", "_seen",
        "ready", "switch",
    )  # fmt: skip

    def __init__(self, run: Run, parts: Iterable[Any], linears: Sequence[Run]) -> None:
        self._modules = dict(enumerate(run.modules))
        self._dicts = tuple(module.__dict__ for module in run.modules)
        self._parts = tuple(parts)
        self._linears = tuple(part.modules[0].__dict__ for part in linears)
        behind = [_behind(part) for part in linears]
        self._behind = tuple(read for read, _ in behind)
        self._options = tuple(option for _, options in behind for option in options)
        self.switch: dict[str, Any] = {"training": None}
        self.ready: dict[Any, PreparedNet] = {}
        # Whether something ready had to be given up, and what the last call in each mode read.
        self._changed = False
        self._seen: dict[Any, tuple[Any, ...]] = {}

    def run(self, input: Any) -> Any:
        ready = self.ready.get(self.switch["training"])
        output = None if ready is None else ready.run(input, self._modules)
        return self.run_unprepared(input) if output is None else output

    def run_unprepared(self, input: Any) -> Any:
        """Return the output, reading everything anew, and make ready for the next call."""
        if self.may_take(input) and runs_as_written(self._dicts):
            try:
                arguments = self.read()
            except KeyError:  # a parameter is computed by a parametrization, prune, weight_norm
                return self._part_by_part(input)
            output = self.try_op(input, arguments)
            if output is not None:
                if self.may_be_ready() and can_prepare(input, arguments[0]):
                    self._prepare(input, arguments)
                return output
        return self._part_by_part(input)

    def _part_by_part(self, input: Any) -> Any:
        for part in self._parts:
            input = part(input)
        return input

    def _prepare(self, input: Tensor, arguments: Any) -> None:
        """Make ready for more calls like the one that ran, if there is reason to expect some.

        It takes 50 us. Where an option changes at every step, as a schedule of dropout
        probabilities does, it is not worth it: after a change two calls must read the same.
        """
        mode = self.switch["training"]
        before = self.ready.get(mode)
        if before is not None and before.holds(self._modules) and before.accept(input):
            return
        if before is not None:
            self._changed = True
            self.ready.clear()  # what is ready for the other mode may be as old
        if self._changed:
            seen, self._seen[mode] = self._seen.get(mode), self.identity(arguments)
            if seen != self._seen[mode]:
                return
        read = snapshot.take(self._modules.values(), self.entries())
        fresh = PreparedNet(read, self.hand_over(self.read()), input)
        if fresh.holds(self._modules):  # another thread may have changed something meanwhile
            self.ready[mode] = fresh

    @abstractmethod
    def read(self) -> Any:
        """Return what a call uses, weights first, as the modules hold it now.

        Raises:
            KeyError: where a parameter is not a plain one.
        """

    def read_linears(self) -> tuple[list[Any], list[Any], Any, Any, Any]:
        """Return weights, biases, and what stands behind the Linear layers."""
        parameters = [linear["_parameters"] for linear in self._linears]
        numbers, slopes, p = zip(*[read() for read in self._behind], strict=True)
        weights, biases = [q["weight"] for q in parameters], [q["bias"] for q in parameters]
        return weights, biases, numbers, slopes, p

    def entries(self) -> Iterator[Entry]:
        """Yield dictionaries and the keys of all that a call reads from them."""
        for linear in self._linears:
            yield linear, ("_parameters",)
            yield linear["_parameters"], ("weight", "bias")
        yield from self._options
        yield vars(backends), ("_chosen",)

    @abstractmethod
    def identity(self, arguments: Any) -> tuple[Any, ...]:
        """Return the identities of the tensors and the values of the options."""

    def may_take(self, input: Any) -> bool:
        """Return whether it is worth a look at the modules."""
        return True

    @abstractmethod
    def try_op(self, input: Any, arguments: Any) -> Tensor | None:
        """Return the output, or None where no kernel can take the tensors."""

    @abstractmethod
    def hand_over(self, arguments: Any) -> Prepared:
        """Return the network as the CPU library takes it."""

    @abstractmethod
    def tensors(self, arguments: Any) -> tuple[Tensor | None, ...]:
        """Return parameters and buffers."""

    @abstractmethod
    def check(self, input: Tensor, arguments: Any) -> None:
        """Raise unless the tensors fit together."""

    @abstractmethod
    def fits(self, input: Tensor, arguments: Any) -> bool:
        """Return whether the backend runs layers of these widths in one op."""

    @abstractmethod
    def norms(self) -> list[dict[str, Any]]:
        """Return the ``__dict__`` of every batch norm."""

    def may_be_ready(self) -> bool:
        """Return whether the next call may do without looking at the options again."""
        return not self.is_cumulative() and not self.may_share()

    def is_cumulative(self) -> bool:
        """Return whether a momentum depends on the batches counted so far."""
        return any(norm["training"] and norm["momentum"] is None for norm in self.norms())

    def momentum(self, arguments: Any) -> float:
        """Return the momentum that a training step is told anew, where it may change by itself."""
        return 0.0

    def may_share(self) -> bool:
        """Return whether processes share statistics, if there are any at the call."""
        return any(
            norm["training"] and ("forward" in norm or "process_group" in norm)
            for norm in self.norms()
        )


class ResearchNetGroup(WholeGroup):
    """The whole network that ``research_net`` computes.

    Attributes:
        norm: the ``__dict__`` of the batch norm.
    """

    __slots__ = ("_fits", "_slope", "norm")

    def __init__(self, run: Run, parts: Iterable[Any] = ()) -> None:
        *linears, norm, last = run.parts
        super().__init__(run, parts, (*linears, last))
        self.norm = self.switch = norm.modules[0].__dict__
        self._slope = norm.modules[-1].__dict__
        self._fits = attempt.two_fits()

    def read(self) -> attempt.NetState:
        weights, biases, _, _, p = self.read_linears()
        return weights, biases, norm_state(self.norm), p[:-2], self._slope["negative_slope"]

    def try_op(self, input: Any, arguments: attempt.NetState) -> Tensor | None:
        return attempt.research_net(self._fits, input, *arguments)

    def hand_over(self, arguments: attempt.NetState) -> Prepared:
        return prepare_research_net(*arguments)

    def tensors(self, arguments: attempt.NetState) -> tuple[Tensor | None, ...]:
        weights, biases, state, _, _ = arguments
        return (*weights, *biases, *state[:5])

    def check(self, input: Tensor, arguments: attempt.NetState) -> None:
        weights, biases, state, p, _ = arguments
        weight, bias, running_mean, running_var, tracked, training, _, eps, _ = state
        check_research_net(
            input, weights, biases, weight, bias, running_mean, running_var, training, p, None,
            eps, tracked,
        )  # fmt: skip

    def fits(self, input: Tensor, arguments: attempt.NetState) -> bool:
        return on_chip.fits(input, arguments[0])

    def norms(self) -> list[dict[str, Any]]:
        return [self.norm]

    def momentum(self, arguments: attempt.NetState) -> float:
        return arguments[2][6]

    def identity(self, arguments: attempt.NetState) -> tuple[Any, ...]:
        _, _, state, p, slope = arguments
        return (*map(id, self.tensors(arguments)), *state[5:], *p, slope)

    def entries(self) -> Iterator[Entry]:
        yield from super().entries()
        yield from _norm_entries(self.norm)
        yield self._slope, ("negative_slope",)


class MLPGroup(WholeGroup):
    """Linear layers, each with a batch norm, an activation and dropout behind it or without."""

    __slots__ = ("_fit", "_norms")

    def __init__(self, run: Run, parts: Iterable[Any]) -> None:
        linears = [*linear_runs(run)]
        super().__init__(run, parts, linears)
        self._norms = {
            layer: linear.modules[1].__dict__
            for layer, linear in enumerate(linears)
            if linear.op == LINEAR_BATCH_NORM_ACT
        }
        switches = [entry for entry, keys in self._options if "training" in keys]
        if self._norms or switches:
            self.switch = [*self._norms.values(), *switches][0]
        self._fit = Fit(feature_dim=-1)

    def may_take(self, input: Any) -> bool:
        return isinstance(input, Tensor) and on_chip.may_fit_mlp(input)

    def read(self) -> Layers:
        norms = {}
        for layer, norm in self._norms.items():
            state = norm_state(norm)
            if state[-1] is not None:
                raise KeyError("the statistics are those of several processes")
            norms[layer] = state[:-1]
        return Layers(*self.read_linears(), norms)

    def try_op(self, input: Any, arguments: Layers) -> Tensor | None:
        return attempt.mlp(self._fit, input, arguments)

    def hand_over(self, arguments: Layers) -> Prepared:
        return prepare_mlp(arguments)

    def tensors(self, arguments: Layers) -> tuple[Tensor | None, ...]:
        return arguments.tensors()

    def check(self, input: Tensor, arguments: Layers) -> None:
        check_mlp(input, arguments)

    def fits(self, input: Tensor, arguments: Layers) -> bool:
        return on_chip.fits_mlp(input, arguments.weights)

    def norms(self) -> list[dict[str, Any]]:
        return list(self._norms.values())

    def identity(self, arguments: Layers) -> tuple[Any, ...]:
        _, _, numbers, slopes, p, norms = arguments
        options = [option for norm in norms.values() for option in norm[5:]]
        return (*map(id, self.tensors(arguments)), *numbers, *slopes, *p, *options)

    def entries(self) -> Iterator[Entry]:
        yield from super().entries()
        for norm in self._norms.values():
            yield from _norm_entries(norm)


def _norm_entries(norm: dict[str, Any]) -> Iterator[Entry]:
    yield norm, ("training", "momentum", "eps", "track_running_stats", "_parameters", "_buffers")
    if "forward" in norm:  # synchronized, which changes nothing in evaluation
        yield norm, ("forward",)
    yield norm["_parameters"], ("weight", "bias")
    yield norm["_buffers"], ("running_mean", "running_var", "num_batches_tracked")


def _behind(part: Run) -> tuple[Callable[[], behind.Options], tuple[Entry, ...]]:
    """Return what reads the options behind a Linear, and where they stand."""
    first, *others = part.modules
    if part.op == LINEAR_BATCH_NORM_ACT:
        norm, *others = others
        if type(norm) is BatchNormLeakyReLU:
            state = norm.__dict__
            return lambda: (LEAKY_RELU, state["negative_slope"], 0.0), (
                (state, ("negative_slope",)),
            )
    if type(first) is LinearReLU:
        own = first.__dict__
        return (
            lambda: (RELU, 0.0, own["dropout"] if own["training"] else 0.0),
            ((own, ("dropout", "training")),),
        )
    return behind.reader(others), tuple(behind.entries(others))
