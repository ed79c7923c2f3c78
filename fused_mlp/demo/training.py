"""Train the eager and the fused network on the same batches and time both fairly."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import FusedResearchNet, TrainStep
from ..eager import IntelligentResearchNetwork
from .data import Split

NETWORKS: dict[str, type[nn.Module]] = {
    "eager": IntelligentResearchNetwork,
    "fused": FusedResearchNet,
}
# The fused network again, trained by TrainStep in place of the loop.
TRAIN_STEP = "TrainStep"
WARM_UP_STEPS = 20

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """How to train."""

    epochs: int = 40
    batch_size: int = 32
    hidden: tuple[int, ...] = (64, 32)
    dropout: float = 0.3
    learning_rate: float = 1e-3
    seed: int = 0
    train_step: bool = False

    @property
    def contestants(self) -> list[str]:
        """What is trained: the networks by name and, if asked for, ``TRAIN_STEP``."""
        return [*NETWORKS, *([TRAIN_STEP] if self.train_step else [])]


@dataclass
class Run:
    """One network's training.

    Attributes:
        losses: the mean training loss of every epoch, and of every step in ``step_losses``.
        seconds: the time of every epoch.
        samples: how many rows an epoch trains on.
        score: accuracy or R² on the held-out rows, after the last epoch.
    """

    losses: list[float] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    samples: int = 0
    score: float = float("nan")

    @property
    def seconds_per_epoch(self) -> float:
        """The median over the epochs."""
        return statistics.median(self.seconds)

    @property
    def samples_per_second(self) -> float:
        """Rows trained on per second, at the median epoch."""
        return self.samples / self.seconds_per_epoch


@dataclass(frozen=True)
class Comparison:
    """All contestants at one batch size, the eager network first."""

    batch_size: int
    runs: dict[str, Run]

    def speed_up(self, name: str = "fused") -> float:
        """Return how many times shorter a contestant's median epoch is than the eager one's."""
        return self.runs["eager"].seconds_per_epoch / self.runs[name].seconds_per_epoch


class Trainee:
    """A network with its optimizer.

    Args:
        network: the class to build, by its name in ``NETWORKS``, or ``TRAIN_STEP``.
        data: what to train on; decides the inputs, the outputs, the loss, device and dtype.
        settings: how to train.
    """

    def __init__(self, network: str, data: Split, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        features = data.train_features
        self.model = NETWORKS["fused" if network == TRAIN_STEP else network](
            features.shape[1],
            list(settings.hidden),
            data.outputs,
            dropout=settings.dropout,
            device=features.device,
            dtype=features.dtype,
        )
        # One call a step for all parameters: a slow optimizer would hide what is compared.
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), settings.learning_rate, fused=_fused_adam(features.device)
        )
        self.loss: Callable[[Tensor, Tensor], Tensor] = (
            F.mse_loss if data.classes is None else F.cross_entropy
        )
        self.step: Callable[[Tensor, Tensor], Tensor] = self._take_step
        if network == TRAIN_STEP:
            self.step = TrainStep(self.model, self.loss, self.optimizer)
        self.run = Run()

    def _take_step(self, features: Tensor, target: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(self.model(features), target)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def train_epoch(self, batches: Sequence[Batch]) -> None:
        """Take one step a batch and note the losses and the time of the steps alone."""
        self.model.train()
        losses = []
        device = batches[0][0].device
        _synchronize(device)
        start = time.perf_counter()
        for features, target in batches:
            losses.append(self.step(features, target))
        _synchronize(device)
        self.run.seconds.append(time.perf_counter() - start)

        rows = torch.tensor([len(target) for _, target in batches], dtype=torch.float64)
        steps = torch.stack(losses).double().cpu()
        self.run.step_losses += steps.tolist()
        self.run.losses.append(float((steps * rows).sum() / rows.sum()))
        self.run.samples = int(rows.sum())

    @torch.no_grad()
    def evaluate(self, data: Split) -> float:
        """Return accuracy or R² on the held-out rows."""
        self.model.eval()
        output, target = self.model(data.test_features), data.test_target
        if data.classes is not None:
            return float((output.argmax(1) == target).double().mean())
        residual = (output - target).square().sum()
        return float(1 - residual / (target - target.mean()).square().sum())


def shuffled_batches(data: Split, batch_size: int, generator: torch.Generator) -> list[Batch]:
    """Return one epoch's batches of the training rows in a new order.

    A last batch of a single row is left out, because batch norm needs two.
    """
    order = torch.randperm(len(data.train_features), generator=generator)
    order = order.to(data.train_features.device)
    features = data.train_features[order].split(batch_size)
    target = data.train_target[order].split(batch_size)
    return [b for b in zip(features, target, strict=True) if len(b[1]) > 1]


def compare(
    data: Split, settings: Settings, progress: Callable[[dict[str, Run]], None] = lambda _: None
) -> Comparison:
    """Train all contestants from the same initial weights on the same batches.

    Their epochs take turns in this process, in one order and then in the other, so
    that a machine that slows down slows both. The first steps of throw-away networks warm caches
    and threads up; they and the making of the batches are not timed.

    Args:
        progress: called after each epoch of all of them with the runs so far.
    """
    shuffle = torch.Generator().manual_seed(settings.seed)
    for name in settings.contestants:
        warm_up = shuffled_batches(data, settings.batch_size, shuffle)
        Trainee(name, data, settings).train_epoch(warm_up[:WARM_UP_STEPS] + warm_up[-1:])

    trainees = {name: Trainee(name, data, settings) for name in settings.contestants}
    initial = trainees["eager"].model.state_dict()
    for trainee in trainees.values():
        trainee.model.load_state_dict(initial)
    runs = {name: trainee.run for name, trainee in trainees.items()}
    for epoch in range(settings.epochs):
        batches = shuffled_batches(data, settings.batch_size, shuffle)
        turns = list(trainees.values())
        for trainee in turns if epoch % 2 == 0 else reversed(turns):
            trainee.train_epoch(batches)
        progress(runs)
    for trainee in trainees.values():
        trainee.run.score = trainee.evaluate(data)
    return Comparison(settings.batch_size, runs)


def _fused_adam(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda", "xpu", "mps")


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
