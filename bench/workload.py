"""The eager and the fused module of a case with the same parameters, and random data for them."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fused_mlp
from fused_mlp.eager import IntelligentResearchNetwork

from . import environment
from .cases import MLP, NETWORK, Case
from .errors import Wrong

_ROTATED_FROM = 2**20  # bytes of input above which a claim is about memory
_MOST_INPUTS = 64


class PlainNormalize(nn.Module):
    """The expression that ``normalize`` replaces."""

    def forward(self, input: Tensor) -> Tensor:
        return (input - input.mean()) / input.std()


@dataclass
class Workload:
    """What contestants run.

    Attributes:
        eager, fused: modules with equal parameters, in the case's mode.
        inputs: (input, gradient of the output) pairs to be used in turn.
    """

    case: Case
    eager: nn.Module
    fused: nn.Module
    inputs: list[tuple[Tensor, Tensor]]

    def step(
        self, model: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]
    ) -> Callable[[], object]:
        """Return what is timed: a call, and in training its backward into fresh gradients."""
        following = itertools.cycle(self.inputs).__next__
        if self.case.mode == "eval":
            return lambda: model(following()[0])
        inputs = [x for x, _ in self.inputs if x.requires_grad]

        def train() -> None:
            for leaf in parameters:
                leaf.grad = None
            x, grad_output = following()
            if inputs:
                x.grad = None
            model(x).backward(grad_output)

        return train

    def results(self, model: nn.Module, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return output and, in training, every gradient, without dropout, of the first input."""
        model = without_dropout(model)
        x, grad_output = self.inputs[0]
        x = x.detach()
        if dtype is not None:
            model, x, grad_output = model.to(dtype), x.to(dtype), grad_output.to(dtype)
        if self.case.mode == "eval":
            with torch.inference_mode():
                return [model(x).clone()]
        leaves: list[Tensor] = list(model.parameters())
        if self.inputs[0][0].requires_grad:
            leaves.append(x.requires_grad_())
        output = model(x)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def without_dropout(model: nn.Module) -> nn.Module:
    """Return a copy that drops nothing; running statistics of the original stay as they are."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def build(case: Case) -> Workload:
    """Make modules and data of a case, the same every time."""
    torch.manual_seed(0)
    place: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
    eager: nn.Module
    fused: nn.Module
    if case.op == NETWORK:
        before, *hidden, outputs = case.sizes
        eager = IntelligentResearchNetwork(before, hidden, outputs, dropout=case.dropout, **place)
        fused = fused_mlp.FusedResearchNet(before, hidden, outputs, dropout=case.dropout, **place)
    elif case.op in ("linear_relu", "linear_act"):
        _, before, outputs = case.sizes
        activation = nn.ReLU() if case.op == "linear_relu" else nn.GELU()
        eager = nn.Sequential(
            nn.Linear(before, outputs, **place), activation, nn.Dropout(case.dropout)
        )
        fused = fused_mlp.FusedSequential(*copy.deepcopy(eager))
    elif case.op in MLP:
        before, outputs = case.widths[0], case.widths[-1]
        eager = nn.Sequential(*_mlp_layers(case, place))
        fused = fused_mlp.FusedSequential(*copy.deepcopy(eager))
    elif case.op in ("batch_norm_leaky_relu", "batch_norm_act"):
        before = outputs = case.sizes[1]
        behind = [nn.LeakyReLU()]
        if case.op == "batch_norm_act":
            behind = [nn.ReLU(), nn.Dropout(case.dropout)]
        eager = nn.Sequential(nn.BatchNorm1d(before, **place), *behind)
        fused = fused_mlp.FusedSequential(*copy.deepcopy(eager))
    else:
        before = outputs = case.sizes[1]
        eager, fused = PlainNormalize(), fused_mlp.Normalize()
    _shake(eager)
    fused.load_state_dict(eager.state_dict())
    eager.train(case.mode == "train")
    fused.train(case.mode == "train")
    inputs = _inputs(case, before, outputs)
    if case.op == "linear_relu" and case.mode == "train":
        inputs[0] = (inputs[0][0], _where_sure(eager, *inputs[0]))
    return Workload(case, eager, fused, inputs)


def _mlp_layers(case: Case, place: dict[str, Any]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, width in itertools.pairwise(case.widths[:-1]):
        layers.append(nn.Linear(before, width, **place))
        if case.op == "mlp":
            layers.append(nn.Tanh())
        else:
            layers += [nn.BatchNorm1d(width, **place), nn.ReLU(), nn.Dropout(case.dropout)]
    return [*layers, nn.Linear(*case.widths[-2:], **place)]


def _where_sure(model: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of Linear and ReLU but for units that are 0 up to rounding.

    They may fall to either side of ReLU and take their gradient along: of 2048 squared one does.
    """
    weight, bias = (parameter.detach().double() for parameter in model.parameters())
    x = x.detach().double()
    unit = torch.finfo(torch.float64 if grad.dtype == torch.float64 else torch.float32).eps
    terms = nn.functional.linear(x.abs(), weight.abs(), bias.abs())
    return grad * (nn.functional.linear(x, weight, bias).abs() > 8 * unit * terms).to(grad)


def _shake(model: nn.Module) -> None:
    """Give batch norms statistics and scales that a wrong formula would get wrong."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.get_buffer("running_mean"), -0.5, 0.5)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)


def _inputs(case: Case, before: int, outputs: int) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of random data; so many that none is in a cache at its next turn, if large."""
    one = case.batch * (before + outputs * (case.mode == "train")) * case.dtype.itemsize
    count = 4
    if one >= _ROTATED_FROM and case.op != NETWORK:
        cached = environment.last_level_cache() if case.device == "cpu" else 2**27
        count = min(_MOST_INPUTS, max(2, math.ceil(2 * cached / one)))
    place: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
    pairs = []
    for _ in range(count):
        x = torch.randn(case.batch, before, **place) * 2 + 0.5
        grad = torch.randn(case.batch, outputs, **place) if case.mode == "train" else x.new_empty(0)
        # A layer inside a network passes a gradient on; the network's own input is data.
        wants_grad = case.mode == "train" and case.op != NETWORK and case.op not in MLP
        pairs.append((x.requires_grad_(wants_grad), grad))
    return pairs


# ------------------------------------------------------------------------------ correctness


def error(results: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest relative error, in the 2-norm, of any result against float64."""
    worst = 0.0
    scale = max(float(e.norm() / max(e.numel(), 1) ** 0.5) for e in exact)
    for ours, right in zip(results, exact, strict=True):
        if ours.shape != right.shape:
            raise Wrong(f"a result of shape {tuple(ours.shape)}, expected {tuple(right.shape)}")
        # A gradient that is zero by nature (a bias before a batch norm) is measured by the others.
        size = max(float(right.norm()), 1e-3 * scale * right.numel() ** 0.5) or 1.0
        distance = float((ours.to(right) - right).norm()) / size
        worst = max(worst, distance if math.isfinite(distance) else math.inf)
    return worst


def check(found: float, eager: float, dtype: torch.dtype) -> None:
    """Raise Wrong where an error is far above eager's own and above the dtype's rounding."""
    allowed = 4 * eager + 32 * torch.finfo(dtype).eps
    if found > allowed:
        raise Wrong(f"relative error {found:.2g} against float64; eager's is {eager:.2g}")
