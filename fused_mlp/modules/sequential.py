"""``FusedSequential``: an ``nn.Sequential`` that runs neighbouring modules in one op."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.compiler import assume_constant_result, is_compiling

from ..ops import nested
from . import tracing
from .cache import CachingModule
from .groups import Step, make_step, make_whole
from .layers import BatchNormLeakyReLU, LinearReLU
from .patterns import (
    BATCH_NORM_ACT,
    BATCH_NORM_LEAKY_RELU,
    BATCH_NORMS,
    LINEAR_ACT,
    LINEAR_BATCH_NORM_ACT,
    LINEAR_RELU,
    MLP,
    RESEARCH_NET,
    Run,
    find_runs,
    linear_runs,
)
from .prepared import PreparedNet


class _Plan:
    """How a sequence of modules runs: the steps, and the modules they were worked out for."""

    __slots__ = ("kinds", "modules", "ready", "steps", "switch")

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        # A module's class changes when it is parametrized, or a lazy one gets its first input.
        self.kinds = [*map(type, modules)]
        runs = find_runs(modules)
        self.steps: tuple[Step, ...]
        # Of the one network that all modules make, if they do: where its mode stands, and what is
        # ready in which mode of it.
        self.switch: dict[str, Any] = {"training": None}
        self.ready: dict[Any, PreparedNet] = {}
        whole = make_whole(runs[0]) if len(runs) == 1 else None
        if whole is not None:
            self.switch, self.ready = whole.switch, whole.ready
            self.steps = (whole.run_unprepared,)
        else:
            self.steps = tuple(make_step(run) for run in runs)


class FusedSequential(CachingModule, nn.Sequential):
    """An ``nn.Sequential`` that computes runs of its children in fused ops.

    Fused are Linear with ReLU, LeakyReLU, GELU, SiLU, Tanh, Dropout or both behind it; BatchNorm1d
    with ReLU, LeakyReLU, Dropout or both behind it, and where a Linear stands before it, one op of
    all in evaluation; a whole network of any number of Linear+ReLU, with or without Dropout,
    Linear+BatchNorm1d+LeakyReLU and Linear. Every other module runs as itself. The children are
    ordinary modules and the single source of truth: options, hooks, parametrizations and replaced
    children take effect at the next call, and whatever a fused op would not compute the same way
    (a hooked child, autocast, ``torch.func``, forward-mode AD, a tensor subclass, an input that
    does not fit) runs the plain modules.

    Args:
        args: modules, or one ``OrderedDict`` of them, as ``nn.Sequential`` takes them.
    """

    # `torch.utils.swap_tensors`, which these two may be told to use, refuses tensors that someone
    # else refers to.
    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop("_cache", None)
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.pop("_cache", None)
        super()._load_from_state_dict(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # As in FusedResearchNet: 0.7 us of nn.Module's frames.
        if not is_compiling() and len(args) == 1 and not kwargs and type(self) is FusedSequential:
            own = self.__dict__
            output = run_ready(own, args[0], (own,))
            if output is not None:
                return output
        return super().__call__(*args, **kwargs)

    def forward(self, input: Any) -> Any:
        if is_compiling():
            return _run_traced(list(self._modules.values()), input)
        return self._run_planned(input)

    def _run_planned(self, input: Any) -> Any:
        output = run_ready(self.__dict__, input)
        if output is not None:
            return output
        plan = self.__dict__.get("_cache")
        modules = [*self._modules.values()]
        if plan is None or plan.modules != modules or plan.kinds != [*map(type, modules)]:
            plan = _Plan(modules)
            kinds: list[Any] = plan.kinds
            # Stored whole, so another thread sees the old plan or the new one. A module that says
            # for itself what it equals (a dataclass) cannot be told from one put in its place.
            if all(kind.__eq__ is object.__eq__ for kind in kinds):
                self.__dict__["_cache"] = plan
        output = input
        try:
            for step in plan.steps:
                output = step(output)
        except RuntimeError as error:
            nested.explain(type(self).__name__, input, error)
            raise
        return output


def run_ready(
    sequential: dict[str, Any], input: Any, containers: tuple[dict[str, Any], ...] = ()
) -> Tensor | None:
    """Return the output where all is as it was at an earlier call; else None.

    Args:
        sequential: the ``__dict__`` of a :class:`FusedSequential`.
        input: anything.
        containers: as :meth:`PreparedNet.run` takes them.
    """
    plan = sequential.get("_cache")
    if plan is None:
        return None
    ready = plan.ready.get(plan.switch["training"])
    if ready is None:
        return None
    output: Tensor | None = ready.run(input, sequential["_modules"], containers)
    return output


# What ``find_runs`` found, with the modules' positions in their place, and of a chain of Linear
# layers the modules of each.
_Places = tuple[int, ...]
_Positions = tuple[str, _Places, tuple["_Positions", ...], tuple[_Places, ...]]


def _run_traced(modules: list[nn.Module], input: Any) -> Any:
    """Run modules in order under torch.compile or torch.export, fusable runs as public ops."""
    if not tracing.ops_allowed(input):
        for module in modules:
            input = module(input)
        return input
    for run in _find_positions(*[type(module) for module in modules]):
        input = _trace(run, modules, input)
    return input


@assume_constant_result  # torch.compile would guard on all the names that finding runs reads
def _find_positions(*kinds: type[nn.Module]) -> tuple[_Positions, ...]:
    """Return the runs of modules of these classes."""
    stand_ins = [object.__new__(kind) for kind in kinds]
    positions = {id(module): position for position, module in enumerate(stand_ins)}

    def places(run: Run) -> _Places:
        return tuple(positions[id(module)] for module in run.modules)

    def describe(run: Run) -> _Positions:
        linears = tuple(map(places, linear_runs(run))) if run.op == MLP else ()
        return run.op, places(run), tuple(map(describe, run.parts)), linears

    return tuple(map(describe, find_runs(stand_ins)))


def _trace(run: _Positions, children: list[nn.Module], input: Any) -> Any:
    op, places, parts, linears = run
    modules: Any = [children[place] for place in places]
    output = None
    if not tracing.hooked(modules):
        if op == RESEARCH_NET:
            ordered: Any = [[children[place] for place in part[1]] for part in parts]
            *hidden, before_norm, norm, last = ordered
            layers = [part[0] for part in (*hidden, before_norm, last)]
            p = [_probability(part) for part in hidden]
            output = tracing.research_net(layers, p, norm[0], norm[-1].negative_slope, input)
        elif op == MLP:
            chain = [_read_layer([children[place] for place in layer]) for layer in linears]
            output = tracing.mlp(chain, input)
        elif op in (LINEAR_RELU, LINEAR_ACT) and len(modules) > 1:
            output = tracing.linear_act(modules[0], tracing.read_behind(modules[1:]), input)
        elif op == BATCH_NORM_ACT or (op == BATCH_NORM_LEAKY_RELU and len(modules) > 1):
            output = tracing.batch_norm_act(modules[0], tracing.read_behind(modules[1:]), input)
        elif op == LINEAR_BATCH_NORM_ACT:
            # In training the op of a chain takes 0.84 of the step with a product and a batch norm's
            # op; for other single layers it would take 1.02 to 1.1 of it.
            layer = _read_layer(modules)
            if modules[1].training:
                output = tracing.mlp([layer], input)
            else:
                output = tracing.linear_batch_norm_act(*layer, input)
    if output is not None:
        return output
    if parts:
        for part in parts:
            input = _trace(part, children, input)
    else:
        for module in modules:
            input = module(input)
    return input


def _read_layer(modules: list[Any]) -> tuple[Any, Any, tracing.Behind]:
    """Return a Linear, the batch norm behind it or None, and what stands behind both."""
    linear, *rest = modules
    if type(linear) is LinearReLU:
        return linear, None, ("relu", {}, _probability(modules))
    if not rest or type(rest[0]) not in (*BATCH_NORMS, BatchNormLeakyReLU):
        return linear, None, tracing.read_behind(rest)
    norm, *rest = rest
    if type(norm) is BatchNormLeakyReLU:
        return linear, norm, ("leaky_relu", {"negative_slope": norm.negative_slope}, 0.0)
    return linear, norm, tracing.read_behind(rest)


def _probability(modules: Any) -> float:
    """Return the dropout probability of a LINEAR_RELU run now."""
    last = modules[-1]
    if not last.training or len(modules) == 2:
        return 0.0
    return float(last.p if len(modules) == 3 else last.dropout)
