"""The ordinary training loop and batches to run it on, for tests of ``TrainStep``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fused_mlp import FusedResearchNet, TrainStep

Batch = tuple[Tensor, Tensor]
# The gradient of a bias before a batch norm is zero but for rounding, which Adam divides by its own
# size and 1e-8; the running mean follows the bias.
ROUNDING_ALONE = ("research_layers.3.bias", "research_layers.4.running_mean")


def net(dtype: torch.dtype = torch.float64, dropout: float = 0.0, **options: Any) -> nn.Module:
    """Return the network under test, the same one every time."""
    torch.manual_seed(0)
    return FusedResearchNet(6, [16, 8], 4, dropout=dropout, dtype=dtype, **options)


def batches(
    count: int, loss: Any = None, rows: int = 8, dtype: torch.dtype = torch.float64
) -> list[Batch]:
    """Return random batches with targets that suit the loss: values for MSE, else classes."""
    source = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)

    values = isinstance(loss, nn.MSELoss)
    return [
        (
            normal(rows, 6),
            normal(rows, 4) if values else torch.randint(0, 4, (rows,), generator=source),
        )
        for _ in range(count)
    ]


def loop_step(
    net: nn.Module, loss: Any, optimizer: Optimizer, batch: Batch, max_norm: float | None = None
) -> Tensor:
    """Take a step as users write it; the gradients stay in ``.grad``."""
    optimizer.zero_grad()
    value = loss(net(batch[0]), batch[1])
    value.backward()
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
    optimizer.step()
    return value.detach()


def both(
    make_optimizer: Callable[[Any], Optimizer],
    loss: Any,
    module: nn.Module | None = None,
    **options: Any,
) -> tuple[TrainStep, tuple[nn.Module, Optimizer]]:
    """Return a TrainStep, and a copy of its network with an optimizer for the ordinary loop."""
    module = net() if module is None else module
    twin = copy.deepcopy(module)
    step = TrainStep(module, loss, make_optimizer(module.parameters()), **options)
    return step, (twin, make_optimizer(twin.parameters()))


def assert_same_training(
    step: TrainStep,
    twin: tuple[nn.Module, Optimizer],
    batches: Sequence[Batch],
    *,
    fused: bool | None = None,
    **tolerance: Any,
) -> None:
    """Train both on the same batches and assert the same losses and everything that is left.

    Args:
        fused: whether the last step must have been the fused one; None for either.
    """
    for i, batch in enumerate(batches):
        state = torch.get_rng_state()
        value = step(*batch)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        expected = loop_step(twin[0], step.loss, twin[1], batch, step.max_norm)
        assert torch.equal(after, torch.get_rng_state())
        assert not value.requires_grad
        torch.testing.assert_close(
            value, expected, **tolerance, msg=lambda m, i=i: f"loss of step {i}: {m}"
        )
    if fused is not None:
        assert (step.ordinary_because == "") is fused, step.ordinary_because
    assert_same_state(step.net, step.optimizer, *twin, **tolerance)


def assert_same_state(
    net: nn.Module,
    optimizer: Optimizer,
    twin: nn.Module,
    twin_optimizer: Optimizer,
    **tolerance: Any,
) -> None:
    """Assert that parameters, buffers and optimizer state agree."""
    tolerance = tolerance or {"rtol": 1e-7, "atol": 1e-9}
    loose = {**tolerance, "atol": max(tolerance["atol"], 1e-6)}
    expected = twin.state_dict()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(
            value,
            expected[name],
            **(loose if name in ROUNDING_ALONE else tolerance),
            msg=lambda m, n=name: f"{n}: {m}",
        )
    found, wanted = optimizer.state_dict(), twin_optimizer.state_dict()
    assert found["param_groups"] == wanted["param_groups"]
    assert found["state"].keys() == wanted["state"].keys()
    for index, entries in wanted["state"].items():
        assert list(found["state"][index]) == list(entries)
        for key, value in entries.items():
            torch.testing.assert_close(
                found["state"][index][key], value, **tolerance,
                msg=lambda m, n=f"{key} of parameter {index}": f"{n}: {m}",
            )  # fmt: skip
