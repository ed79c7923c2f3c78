"""Who runs a case: the fused module, eager PyTorch, and what else claims to be fast."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from . import rivals_external as external
from .errors import BenchError, Unsupported
from .workload import Workload, without_dropout

EAGER, AGAIN, FUSED, KERNEL = "eager", "eager again", "fused", "kernel"
# Measured beside the rivals, and none: eager a second time, and our own kernels by themselves.
NO_RIVALS = (FUSED, AGAIN, KERNEL)


@dataclass
class Contestant:
    """A rival made ready for one case.

    Attributes:
        step: what is timed.
        results: output and gradients without dropout, as ``Workload.results``; None where the
            rival cannot give them.
    """

    step: Callable[[], object]
    results: Callable[[], list[Tensor]] | None


Prepare = Callable[[Workload], Contestant]


@dataclass(frozen=True)
class Rival:
    """A way to run a case.

    Attributes:
        needs: packages it cannot do without.
        prepare: makes it ready; raises Unsupported.
        own_threads: whether it computes on threads that are not PyTorch's, and that spin for a
            while after a call.
    """

    name: str
    says: str
    needs: tuple[str, ...]
    prepare: Prepare
    own_threads: bool = False


def _module(workload: Workload, model: nn.Module) -> Contestant:
    parameters = list(model.parameters())
    return Contestant(workload.step(model, parameters), lambda: workload.results(model))


def _eager(workload: Workload) -> Contestant:
    return _module(workload, copy.deepcopy(workload.eager))


def _fused(workload: Workload) -> Contestant:
    return _module(workload, workload.fused)


def _kernel(workload: Workload) -> Contestant:
    return Contestant(kernels.step(workload), None)  # fused is checked: it is the same op


def _float32(workload: Workload) -> Contestant:
    case = workload.case
    if case.dtype.itemsize >= 4:
        raise Unsupported("float32: beside half precision alone")
    model = copy.deepcopy(workload.fused).float()
    inputs = [
        (x.detach().float().requires_grad_(x.requires_grad), grad.float())
        for x, grad in workload.inputs
    ]
    case = dataclasses.replace(case, dtype=torch.float32)
    return _fused(Workload(case, workload.eager, model, inputs))


def _compiled(mode: str | None) -> Prepare:
    def compile_(model: nn.Module) -> Any:
        return torch.compile(model, mode=mode, dynamic=False)

    def prepare(workload: Workload) -> Contestant:
        torch._dynamo.reset()
        model = copy.deepcopy(workload.eager)
        compiled = compile_(model)
        contestant = Contestant(workload.step(compiled, list(model.parameters())), None)
        if workload.case.mode == "eval":
            contestant.results = lambda: [_inference(compiled, workload.inputs[0][0])]
        else:  # without dropout it is another graph: the same network compiled once more
            contestant.results = lambda: _gradients(workload, compile_)
        return contestant

    return prepare


def _inference(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x).clone()


def _gradients(workload: Workload, compile_: Callable[[nn.Module], Any]) -> list[Tensor]:
    model = without_dropout(workload.eager)
    x, grad_output = workload.inputs[0]
    leaves = list(model.parameters()) + ([x] if x.requires_grad else [])
    output = compile_(model)(x)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


# --------------------------------------------------------------- eager, but through oneDNN


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _grad_weight_product(grad_output: Tensor, x: Tensor) -> Tensor:
    # oneDNN wants its left operand dense, so the gradient is transposed first.
    return _onednn_product(grad_output.t(), x.t(), None)


class _OneDnnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, choices: _Choices) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.choices = choices
        return (_onednn_product if choices.output else F.linear)(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            through = ctx.choices.grad_x
            grad_x = (
                _onednn_product(grad_output, weight.t(), None) if through else grad_output @ weight
            )
        grad_weight = (
            _grad_weight_product(grad_output, x) if ctx.choices.grad_weight else grad_output.t() @ x
        )
        return grad_x, grad_weight, grad_output.sum(0), None


@dataclass(frozen=True)
class _Choices:
    """Which products of a layer are faster through oneDNN than through torch's own call."""

    output: bool
    grad_x: bool
    grad_weight: bool

    @classmethod
    def measured(cls, x: Tensor, weight: Tensor, bias: Tensor) -> _Choices:
        x, weight, bias = x.detach(), weight.detach(), bias.detach()
        grad = torch.randn(len(x), len(weight), dtype=x.dtype)
        pairs = (
            (lambda: _onednn_product(x, weight, bias), lambda: F.linear(x, weight, bias)),
            (lambda: _onednn_product(grad, weight.t(), None), lambda: grad @ weight),
            (lambda: _grad_weight_product(grad, x), lambda: grad.t() @ x),
        )
        with torch.no_grad():
            return cls(*(_seconds(one) < _seconds(other) for one, other in pairs))


class OneDnnLinear(nn.Linear):
    """``nn.Linear`` whose products run through oneDNN wherever that is faster than torch's call.

    Each product is timed both ways at the layer's first call.
    """

    choices: _Choices | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.choices is None:
            self.choices = _Choices.measured(input, self.weight, self.bias)
        if not torch.is_grad_enabled():
            product = _onednn_product if self.choices.output else F.linear
            return product(input, self.weight, self.bias)
        if self.choices == _Choices(False, False, False):
            return F.linear(input, self.weight, self.bias)
        return _OneDnnFunction.apply(input, self.weight, self.bias, self.choices)


def _seconds(step: Callable[[], object]) -> float:
    step()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def _onednn(workload: Workload) -> Contestant:
    if workload.case.device != "cpu" or not torch.backends.mkldnn.is_available():
        raise Unsupported("oneDNN: on the CPU only, in a torch built with it")
    if workload.case.dtype not in (torch.float32, torch.bfloat16):
        raise Unsupported(f"oneDNN: not for {workload.case.dtype_name}")
    model = copy.deepcopy(workload.eager)
    found = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.Linear):
            module.__class__ = OneDnnLinear
            found = True
    if not found:
        raise Unsupported("oneDNN: the case has no Linear")
    return _module(workload, model)


# ---------------------------------------------------------------------------- who is there

RIVALS = {
    rival.name: rival
    for rival in (
        Rival(EAGER, "plain PyTorch", (), _eager),
        Rival(FUSED, "this package", (), _fused),
        Rival(KERNEL, "our kernels by themselves, without module and autograd", (), _kernel),
        Rival("onednn", "eager with dropout 0, its products through oneDNN where faster", (),
              _onednn),
        Rival("float32", "this package in float32, beside half precision", (), _float32),
        Rival("compile", "torch.compile, default mode", (), _compiled(None)),
        Rival("compile-max", "torch.compile, max-autotune", (), _compiled("max-autotune")),
        Rival("onnxruntime", "ONNX Runtime, batch norm folded by us (eval)",
              ("onnx", "onnxruntime"), external.onnxruntime, own_threads=True),
        Rival("openvino", "OpenVINO, float32 (eval)", ("openvino",), external.openvino,
              own_threads=True),
        Rival("jax", "jax.jit, forward and vjp in one call", ("jax",), external.jax,
              own_threads=True),
        Rival("attorch", "attorch's Triton layers (on CUDA)", ("attorch",), external.attorch),
    )
}  # fmt: skip
AGAINST = tuple(name for name in RIVALS if name not in NO_RIVALS)
QUICK = (EAGER, "onednn")


def choose(names: Sequence[str]) -> tuple[list[Rival], dict[str, str]]:
    """Return the rivals that can run here, and why the others cannot.

    Eager, fused and its kernel are always among them.

    Raises:
        BenchError: for a name that is none.
    """
    unknown = [name for name in names if name not in AGAINST]
    if unknown:
        raise BenchError(f"--against {unknown[0]}: choose from {', '.join(AGAINST)}")
    chosen, skipped = [], {}
    for name in dict.fromkeys((EAGER, FUSED, KERNEL, *names)):
        missing = [p for p in RIVALS[name].needs if importlib.util.find_spec(p) is None]
        if missing:
            skipped[name] = f"not installed: {', '.join(missing)}"
        else:
            chosen.append(RIVALS[name])
    return chosen, skipped
