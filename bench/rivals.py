"""Who runs a case: the fused module, eager PyTorch, and what else claims to be fast."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import rivals_external as external
from .errors import BenchError, Unsupported
from .workload import Workload

EAGER, AGAIN, FUSED = "eager", "eager again", "fused"


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
    """

    name: str
    says: str
    needs: tuple[str, ...]
    prepare: Prepare


def _module(workload: Workload, model: nn.Module) -> Contestant:
    parameters = list(model.parameters())
    return Contestant(workload.step(model, parameters), lambda: workload.results(model))


def _eager(workload: Workload) -> Contestant:
    return _module(workload, copy.deepcopy(workload.eager))


def _fused(workload: Workload) -> Contestant:
    return _module(workload, workload.fused)


def _compiled(mode: str | None) -> Prepare:
    def prepare(workload: Workload) -> Contestant:
        torch._dynamo.reset()
        model = copy.deepcopy(workload.eager)
        compiled = torch.compile(model, mode=mode, dynamic=False)
        contestant = Contestant(workload.step(compiled, list(model.parameters())), None)
        # Without dropout it would be another graph: its training step is checked where the case
        # has no dropout, its evaluation always.
        drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        if workload.case.mode == "train" and not drops:
            contestant.results = _compiled_results(workload, model, compiled)
        elif workload.case.mode == "eval":
            contestant.results = lambda: [_inference(compiled, workload.inputs[0][0])]
        return contestant

    return prepare


def _inference(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x).clone()


def _compiled_results(
    workload: Workload, model: nn.Module, compiled: Callable[[Tensor], Tensor]
) -> Callable[[], list[Tensor]]:
    def results() -> list[Tensor]:
        x, grad_output = workload.inputs[0]
        leaves = list(model.parameters()) + ([x] if x.requires_grad else [])
        output = compiled(x)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]

    return results


# --------------------------------------------------------------- eager, but through oneDNN


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, library_for_weight: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.library_for_weight = library_for_weight
        return _onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _onednn_product(grad_output, weight.t(), None)
        grad_weight = _weight_gradient(grad_output, x, ctx.library_for_weight)
        return grad_x, grad_weight, grad_output.sum(0), None


def _weight_gradient(grad_output: Tensor, x: Tensor, through_onednn: bool) -> Tensor:
    # oneDNN wants its left operand dense, so the gradient is transposed first.
    return _onednn_product(grad_output.t(), x.t(), None) if through_onednn else grad_output.t() @ x


class OneDnnLinear(nn.Linear):
    """``nn.Linear`` whose products run through oneDNN, where torch would call MKL.

    The weight's gradient takes whichever of the two is faster at the layer's first backward.
    """

    through_onednn: bool | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return _onednn_product(input, self.weight, self.bias)
        if self.through_onednn is None:
            grad = torch.randn(len(input), self.out_features, dtype=input.dtype)
            data = input.detach()
            through = _seconds(lambda: _weight_gradient(grad, data, True))
            self.through_onednn = through < _seconds(lambda: _weight_gradient(grad, data, False))
        return _OneDnnFunction.apply(input, self.weight, self.bias, self.through_onednn)


def _seconds(step: Callable[[], object]) -> float:
    step()
    times = []
    for _ in range(5):
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
        Rival("onednn", "eager with dropout 0, its Linears through oneDNN", (), _onednn),
        Rival("compile", "torch.compile, default mode", (), _compiled(None)),
        Rival("compile-max", "torch.compile, max-autotune", (), _compiled("max-autotune")),
        Rival("onnxruntime", "ONNX Runtime, batch norm folded by us (eval)",
              ("onnx", "onnxruntime"), external.onnxruntime),
        Rival("openvino", "OpenVINO, float32 (eval)", ("openvino",), external.openvino),
        Rival("jax", "jax.jit, forward and vjp in one call", ("jax",), external.jax),
    )
}  # fmt: skip
AGAINST = tuple(name for name in RIVALS if name not in (FUSED,))
QUICK = (EAGER, "onednn")


def choose(names: Sequence[str]) -> tuple[list[Rival], dict[str, str]]:
    """Return the rivals that can run here, and why the others cannot.

    Eager and fused are always among them.

    Raises:
        BenchError: for a name that is none.
    """
    unknown = [name for name in names if name not in AGAINST]
    if unknown:
        raise BenchError(f"--against {unknown[0]}: choose from {', '.join(AGAINST)}")
    chosen, skipped = [], {}
    for name in dict.fromkeys((EAGER, FUSED, *names)):
        missing = [p for p in RIVALS[name].needs if importlib.util.find_spec(p) is None]
        if missing:
            skipped[name] = f"not installed: {', '.join(missing)}"
        else:
            chosen.append(RIVALS[name])
    return chosen, skipped
