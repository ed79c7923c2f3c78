"""The networks whose compiling is measured, and how their graphs are made to call what they call.

Uncompiled, each calls its prepared network, by one handle. The code that Inductor wrote for its
graph is made to do the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor.codecache import PyCodeCache

from fused_mlp import FusedResearchNet, FusedSequential
from fused_mlp.modules.groups import make_whole
from fused_mlp.modules.patterns import find_runs
from fused_mlp.modules.prepared import Prepared
from fused_mlp.ops import compiled_mlp, compiled_research_net

from .cases import REFERENCE

_KERNELS = torch.ops.fused_mlp_kernels


@dataclass(frozen=True)
class Subject:
    """A network that is measured.

    Attributes:
        name: of the network in the table.
        make: the network.
        layers: of it, the modules that one op runs.
        op: what the names of the op's kernels begin with.
        node: module and name of the autograd node that its graph has.
        keeps_all: the node of a graph that keeps for backward what the uncompiled module keeps.
        backward: what the prepared network's backward takes before the handle.
    """

    name: str
    make: Callable[[], nn.Module]
    layers: Callable[[Any], list[nn.Module]]
    op: str
    node: tuple[Any, str]
    keeps_all: Any
    backward: str

    def hand_over(self, net: nn.Module) -> Prepared:
        """Return tensors and options as the module hands them to the CPU library."""
        (run,) = find_runs(self.layers(net))
        whole: Any = make_whole(run)
        handed: Prepared = whole.hand_over(whole.read())
        return handed

    def plain(self, net: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return what runs the prepared network as its module does, without looking at it."""
        network = self.hand_over(net)
        apply, evaluate, handle = network.apply, network.evaluate, network.call[0]
        if not net.training:
            return lambda x: evaluate(x, handle)
        call, parameters = network.call, network.parameters
        return lambda x: apply(call, x, *parameters)

    @contextmanager
    def calls_prepared(self, net: nn.Module, x: Tensor, keep_all: bool) -> Iterator[None]:
        """Inside, Inductor's code calls the prepared network in the place of a graph's own op."""
        handle = self.hand_over(net).call[0]
        numel = getattr(_KERNELS, f"{self.op}_prepared")(x, handle)[1].numel()
        name = f"{__name__}._handles[{len(_handles)}]"
        _handles.append(handle)
        write = PyCodeCache.write

        def rewritten(source: str, *rest: Any) -> Any:
            return write(self._rewrite(source, name, numel), *rest)

        node = self.keeps_all if keep_all else getattr(*self.node)
        with (
            mock.patch.object(*self.node, node),
            mock.patch.object(PyCodeCache, "write", rewritten),
        ):
            yield

    def _rewrite(self, source: str, handle: str, numel: int) -> str:
        """Return Inductor's code with the one call replaced, and the size of what forward saves."""
        called = re.search(r"torch\.ops\.fused_mlp_\w+\.(\w+)\.default\((.*)\)\n", source)
        assert called is not None, source
        op, given = called.groups()
        own = f"torch.ops.fused_mlp_kernels.{self.op}"
        if op.endswith("backward"):
            grad, input, saved = re.findall(r"\b[a-z]\w*", re.sub(r"\[.*?\]", "", given))
            before = self.backward.format(grad=grad, input=input, saved=saved)
            call = f"{own}_prepared_backward.default({before}, prepared, None)\n"
        else:
            saved = r"buf\d+"
            name = "evaluate" if op.endswith("evaluate") else "prepared"
            call = f"{own}_{name}.default({given.partition(',')[0]}, prepared)\n"
        source = source.replace(called[0], call)
        source = re.sub(rf"(assert_size_stride\({saved}), \(\d+, \)", rf"\1, ({numel}, )", source)
        return f"import {__name__}\nprepared = {handle}\n{source}"


_handles: list[Tensor] = []  # what the code that Inductor wrote calls, in the order of compiling

_library = torch.library.Library("fused_mlp_bench", "DEF")
_library.define("backward(Tensor grad, Tensor input, Tensor[] given, Tensor saved) -> Tensor[]")
torch.library.register_fake(
    "fused_mlp_bench::backward",
    lambda grad, input, given, saved: [t.new_empty(t.shape) for t in given],
    lib=_library,
)
_backward = torch.ops.fused_mlp_bench.backward


class _NetworkKeepsAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        _, buffers, options = call
        output, saved = _KERNELS.research_net_compiled(tensors[0], tensors[1:], buffers, options)
        ctx.save_for_backward(*tensors, saved)
        result: Tensor = output
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, *given, saved = ctx.saved_tensors
        return None, None, *_backward(grad, input, given, saved)


def _chain() -> FusedSequential:
    first, *widths = REFERENCE
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(first, width), nn.Tanh()]
        first = width
    return FusedSequential(*layers[:-1])


SUBJECTS = (
    Subject(
        "research_net",
        lambda: FusedResearchNet(REFERENCE[0], REFERENCE[1:-1], REFERENCE[-1]),
        lambda net: list(net.research_layers),
        "research_net",
        (compiled_research_net, "ResearchNetCompiledFunction"),
        _NetworkKeepsAll,
        "{grad}, {input}, {saved}",
    ),
    # Uncompiled it keeps no biases for backward, and there is no batch norm: all that its graph
    # keeps as well.
    Subject(
        "MLP, Tanh",
        _chain,
        list,
        "mlp",
        (compiled_mlp, "MLPCompiledFunction"),
        compiled_mlp.MLPCompiledFunction,
        "{grad}, {input}, None, {saved}",
    ),
)
