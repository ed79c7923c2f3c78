"""The raw ops of a network, past modules and autograd: what the kernels take by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_mlp import backends, on_chip
from fused_mlp.dropout import draw_seed

from .cases import NETWORK
from .errors import Unsupported
from .workload import Workload

KERNELS = torch.ops.fused_mlp_kernels


def raw_calls(
    work: Workload, x: Tensor, grad: Tensor
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the calls of the forward and of the backward kernel, to be made without gradients.

    Raises:
        Unsupported: where the network does not run in one op.
    """
    layers: Any = getattr(work.fused, "research_layers", ())
    linears = [m for m in layers if isinstance(m, nn.Linear)]
    if not linears or not on_chip.fits(x, [m.weight for m in linears]):
        raise Unsupported("kernel: the case does not run in one op")
    norm: Any = next(m for m in layers if isinstance(m, nn.BatchNorm1d))
    weights, biases = [m.weight for m in linears], [m.bias for m in linears]
    training = work.case.mode == "train"
    drop = [work.case.dropout * training] * (len(linears) - 2)
    buffers = [b.clone() for b in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]
    tensors = (weights, biases, norm.weight, norm.bias)
    mask = [False, *([True] * (2 * len(linears) + 2))]
    if x.device.type == "cpu" and backends.active_backend("cpu") == "native":
        # As a module calls them from its second call on.
        prepared = KERNELS.research_net_prepare.default(
            *tensors, *buffers, training, drop, 0.1, 1e-5, 0.01
        )
        if not training:
            evaluate = KERNELS.research_net_evaluate.default
            return lambda: evaluate(x, prepared), lambda: None
        run, back = (
            KERNELS.research_net_prepared.default, KERNELS.research_net_prepared_backward.default,
        )  # fmt: skip
        with torch.no_grad():
            kept = run(x, prepared)[1]
        return lambda: run(x, prepared), lambda: back(grad, x, kept, prepared, None)
    ends = (training, drop, draw_seed(x.device) if any(drop) else None)
    run, back = KERNELS.research_net.default, KERNELS.research_net_backward.default

    def forward() -> Any:
        return run(x, *tensors, *buffers, *ends, 0.1, 1e-5, 0.01)

    with torch.no_grad():
        saved = forward()[1]

    def backward() -> Any:
        return back(grad, x, *tensors, saved, *ends, 0.01, mask)

    return forward, backward


def step(work: Workload) -> Callable[[], object]:
    """Return a call of the kernels alone: forward, and in training backward."""
    if work.case.op != NETWORK:
        raise Unsupported("kernel: networks only")
    forward, backward = raw_calls(work, *work.inputs[0])
    if work.case.mode == "eval":
        return forward

    def both() -> None:
        forward()
        backward()

    return without_grad(both)


def without_grad(call: Callable[[], object]) -> Callable[[], object]:
    """Return the call under no_grad, entered the cheapest way."""

    def run() -> None:
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            call()
        finally:
            torch._C._set_grad_enabled(before)

    return run
