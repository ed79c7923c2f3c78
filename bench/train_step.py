"""Whole training steps: zero_grad, forward, loss, backward and the optimizer, all counted."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import fused_mlp
from fused_mlp import backends

from . import environment, options, workload
from .cases import NETWORK, NETWORKS, REFERENCE, Case, Widths
from .tables import plain, seconds, times
from .timing import SMOKE, Budget, interleave, ratios, spread
from .training import ordinary_step

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD, momentum": lambda parameters, **how: torch.optim.SGD(
        parameters, 1e-3, momentum=0.9, **how
    ),
    "Adam": lambda parameters, **how: torch.optim.Adam(parameters, 1e-3, **how),
    "AdamW": lambda parameters, **how: torch.optim.AdamW(parameters, 1e-3, **how),
}

_POLICY: Widths = (4, 64, 64, 2)  # of a small reinforcement-learning agent
_NAMES = {NETWORK: "", "mlp": "Tanh ", "mlp_batch_norm": "batch norm "}


def measure(device: torch.device, smoke: bool = False) -> list[dict[str, Any]]:
    """Return the time of a step by network, batch and optimizer, and its gain over eager.

    Eager and fused run with torch's optimizer as it comes and with ``fused=True``.
    """
    budget = SMOKE if smoke else Budget(seconds=2.0)
    cases = [(NETWORK, REFERENCE, 32, name) for name in _OPTIMIZERS]
    cases += [("mlp", _POLICY, 32, "Adam")]
    if not smoke:
        others = [(REFERENCE, 256), (REFERENCE, 4096), (NETWORKS[1], 32), (NETWORKS[1], 256)]
        cases += [(NETWORK, *case, name) for case in others for name in _OPTIMIZERS]
        cases += [("mlp", _POLICY, batch, "Adam") for batch in (256, 4096)]
        cases += [("mlp_batch_norm", REFERENCE, batch, "Adam") for batch in (32, 256, 4096)]
    return [_race(*case, device, budget) for case in cases]


def _race(
    op: str, widths: Widths, batch: int, optimizer: str, device: torch.device, budget: Budget
) -> dict[str, Any]:
    sizes = widths if op == NETWORK else (batch, *widths)
    model = workload.build(Case(op, sizes, batch, "train", device=str(device))).eager
    x = torch.randn(batch, widths[0], device=device)
    y = torch.randint(widths[-1], (batch,), device=device)
    steps = {
        label: _bind(step, x, y) for label, step in _steps(model, _OPTIMIZERS[optimizer]).items()
    }
    samples = interleave(steps, budget, lambda: environment.synchronize(device))
    row: dict[str, Any] = {
        "network": _NAMES[op] + ",".join(map(str, widths)), "batch": batch, "optimizer": optimizer,
        "eager": seconds(spread(samples["eager"].seconds).median),
    }  # fmt: skip
    for label, taken in samples.items():
        if label != "eager":
            gain = ratios(samples["eager"].seconds, taken.seconds).median
            row[label] = f"{seconds(spread(taken.seconds).median)} ({times(gain)})"
    return row


def _steps(
    model: nn.Module, make: Callable[..., torch.optim.Optimizer]
) -> dict[str, Callable[[Any, Any], object]]:
    found: dict[str, Callable[[Any, Any], object]] = {}
    for fuse in (False, True):
        for how in ({}, {"fused": True}):
            label = "fused" if fuse else "eager"
            net = copy.deepcopy(model).train()
            if fuse:
                fused_mlp.fuse(net)
            optimizer = make(net.parameters(), **how)
            found[label + ", fused=True" * bool(how)] = ordinary_step(net, optimizer)
    net = copy.deepcopy(model).train()
    fused_mlp.fuse(net)
    found["TrainStep"] = fused_mlp.TrainStep(net, nn.CrossEntropyLoss(), make(net.parameters()))
    return found


def _bind(step: Callable[[Any, Any], object], x: Any, y: Any) -> Callable[[], object]:
    return lambda: step(x, y)


def main(argv: Sequence[str]) -> int:
    """``python -m bench train-step``: print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench train-step",
        description="Time whole training steps in turns: eager and the fused network in the "
        "ordinary loop, and fused_mlp.TrainStep.",
    )
    parser.add_argument("--smoke", action="store_true", help="one tiny case, to try it out")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument(
        "--threads", type=options.whole, metavar="N", help="of PyTorch (default: as torch has it)"
    )
    parser.add_argument(
        "--backend", choices=backends.NAMES, default="auto", help="whose kernels run"
    )
    chosen = parser.parse_args(argv)
    with options.settings(chosen):
        sys.stdout.write(plain(measure(torch.device(chosen.device), chosen.smoke)) + "\n")
    return 0
