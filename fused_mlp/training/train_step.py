"""``TrainStep``: forward, loss, backward and the optimizer's update in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from . import losses
from .errors import Ordinary
from .network import Network
from .plan import Plan


class TrainStep:
    """One training step a call: ``loss = step(input, target)``.

    A call does what this loop does, with the same results up to rounding, the same state of
    optimizer, batch norm and random generator, and the same errors::

        loss = loss_fn(net(input), target)
        optimizer.zero_grad(set_to_none)
        loss.backward()
        clip_grad_norm_(parameters, max_norm)          # where max_norm is given
        optimizer.step()
        if set_to_none:
            optimizer.zero_grad()

    On the CPU it is a single op, without autograd, where the whole of ``net`` is one
    ``research_net`` or one ``mlp`` in float32 or float64 (a :class:`FusedResearchNet`, a
    :class:`FusedSequential` of Linear layers with any batch norm, activation and dropout that it
    fuses, a module whose ``forward`` only calls one of these), ``loss``
    is ``nn.CrossEntropyLoss`` for class indices or ``nn.MSELoss``, or their functions, with a
    mean or a sum, and ``optimizer`` is SGD, Adam or AdamW. Everything else, hooks on modules,
    parameters or the optimizer among it, runs the loop. :attr:`ordinary_because` says why.

    The optimizer keeps its ``state`` and ``param_groups``: schedulers, ``state_dict`` and its own
    ``step()`` go on working between calls. So do parameters frozen, moved or loaded.

    Args:
        net: the module to train; its ``training`` flags count as they are at each call.
        loss: ``loss(output, target)`` returns a tensor of one element.
        optimizer: holds the parameters to train.
        max_norm: the gradient of all the optimizer's parameters together is clipped to this norm,
            as :func:`torch.nn.utils.clip_grad_norm_` does.
        set_to_none: True leaves every ``.grad`` None after a step. False leaves the step's
            gradients, clipped, in ``.grad``, always in the same tensors, as
            ``optimizer.zero_grad(set_to_none=False)`` at the start of a loop does. What ``.grad``
            held before a step does not count in either case.

    Raises:
        TypeError: for arguments of other types.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: Optimizer,
        *,
        max_norm: float | None = None,
        set_to_none: bool = True,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, but got {type(net).__name__}")
        if not callable(loss):
            raise TypeError(f"loss must be callable, but got {type(loss).__name__}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, but got {type(optimizer).__name__}"
            )
        if max_norm is not None and not isinstance(max_norm, int | float):
            raise TypeError(f"max_norm must be a number or None, but got {type(max_norm).__name__}")
        self.net = net
        self.loss = loss
        self.optimizer = optimizer
        self.max_norm = None if max_norm is None else float(max_norm)
        self.set_to_none = set_to_none
        #: Why the last step was not the fused one; empty when it was.
        self.ordinary_because = ""
        self._plan: Plan | None = None
        self._planned_for: tuple[Any, ...] = ()

    def __call__(self, input: Any, target: Any) -> Tensor:
        """Train on one batch.

        Args:
            input: what ``net`` takes; tensor of shape (N, in_features).
            target: what ``loss`` takes beside the output; classes of shape (N,) or values of the
                output's shape.

        Returns:
            The loss before the update, a tensor without a graph.

        Raises:
            Exception: what the net, the loss or the optimizer raises in the ordinary loop. Where
                this class knows the net and the loss, a target that does not fit raises before
                anything is written.
        """
        if not is_compiling():
            wanted = (self.net, self.loss, self.optimizer, self.set_to_none)
            plan = self._plan
            if plan is not None and self._planned_for == wanted:
                value = plan.run(input, target, self.max_norm)
                if value is not None:
                    self.ordinary_because = ""
                    return value
            self._plan = None
            try:
                plan = Plan(self.net, self.loss, self.optimizer, not self.set_to_none, input)
            except Ordinary as reason:
                self.ordinary_because = str(reason)
            else:
                value = plan.run(input, target, self.max_norm)
                self._plan, self._planned_for = plan, wanted
                if value is not None:
                    self.ordinary_because = ""
                    return value
                self.ordinary_because = "this batch or the state of autograd needs the loop"
        self._try_target(input, target)
        return self._loop(input, target)

    def _loop(self, input: Any, target: Any) -> Tensor:
        optimizer = self.optimizer
        loss = self.loss(self.net(input), target)
        optimizer.zero_grad(self.set_to_none)
        loss.backward()
        if self.max_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            clip_grad_norm_(parameters, self.max_norm)
        optimizer.step()
        if self.set_to_none:
            optimizer.zero_grad()
        return loss.detach()

    def _try_target(self, input: Any, target: Any) -> None:
        """Let the loss raise for a target that does not fit, before the forward writes anything."""
        if not losses.is_known(self.loss) or not isinstance(input, Tensor) or input.dim() != 2:
            return
        if input.device.type != "cpu":  # reading the target would wait for the device
            return
        try:
            weights = Network(self.net).group.read()[0]
        except (Ordinary, KeyError):
            return
        output = weights[-1].new_zeros(
            (len(input), len(weights[-1])), requires_grad=torch.is_grad_enabled()
        )
        loss = self.loss(output, target)
        if loss.requires_grad:
            torch.autograd.grad(loss, output)

    def __getstate__(self) -> dict[str, Any]:
        # The plan stands for the tensors of this process.
        return {**self.__dict__, "_plan": None, "_planned_for": ()}
