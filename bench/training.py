"""End to end: seconds until a network reaches a fixed accuracy, by every way of training it."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_mlp
from fused_mlp.eager import IntelligentResearchNetwork

from . import environment

Table = tuple[Tensor, Tensor, Tensor, Tensor]  # training rows and classes, held-out ones
_MOST_EPOCHS = 60


def measure(device: torch.device, smoke: bool = False) -> list[dict[str, Any]]:
    """Train to a fixed accuracy on digits and on a synthetic table of a million rows.

    Every contestant starts from the same weights and sees the same batches; steps and evaluations
    both count. Each is trained three times in turns and the median stands. Compiling is in the
    first run, which is shown by itself.
    """
    found = []
    sets: list[tuple[str, Callable[[], Table], int, float]] = []
    if importlib.util.find_spec("sklearn") is not None:
        sets.append(("digits", _digits, 32, 0.975))
    rows = 2_000 if smoke else 1_000_000
    sets.append((f"synthetic {rows:,} × 10", lambda: _synthetic(rows), 4096, 0.90))
    for name, load, batch, goal in sets:
        data: Any = tuple(t.to(device) for t in load())
        if smoke:
            data, goal = tuple(t[:64] for t in data), 0.0
        found += _race(name, data, batch, goal, tries=1 if smoke else 3)
    return found


def _race(name: str, data: Table, batch: int, goal: float, tries: int) -> list[dict[str, Any]]:
    before, classes = data[0].shape[1], int(data[1].max()) + 1
    torch.manual_seed(0)
    place: dict[str, Any] = {"device": data[0].device}
    eager = IntelligentResearchNetwork(before, [64, 32], classes, dropout=0.1, **place)
    start = eager.state_dict()
    trainees = {label: make(copy.deepcopy(eager)) for label, make in _makers().items()}
    runs: dict[str, list[tuple[float, int, float]]] = {label: [] for label in trainees}
    for attempt in range(tries):
        turns = list(trainees.items())
        for label, trainee in turns if attempt % 2 == 0 else reversed(turns):
            trainee.model.load_state_dict(start)
            try:
                runs[label].append(_train(trainee, data, batch, goal, attempt))
            except Exception:
                if label != "compile":  # it wants a compiler of its own, which may be missing
                    raise
                del runs[label], trainees[label]
    base = statistics.median(seconds for seconds, _, _ in runs["eager"])
    result = []
    for label, taken in runs.items():
        middle = statistics.median(seconds for seconds, _, _ in taken)
        result.append({
            "data": name, "batch": batch, "goal": f"{goal:.1%}", "contestant": label,
            "seconds": round(middle, 3), "speed-up": f"{base / middle:.2f}×",
            "first run": round(taken[0][0], 3),
            "epochs": statistics.median(e for _, e, _ in taken),
            "accuracy": f"{statistics.median(a for _, _, a in taken):.1%}",
            "all runs": " ".join(f"{seconds:.2f}" for seconds, _, _ in taken),
        })  # fmt: skip
    return result


@dataclass
class _Trainee:
    """A network and how it is run.

    Attributes:
        model: holds the parameters.
        predict: the same network as it is called.
        stepper: takes an optimizer, returns what trains on one batch.
    """

    model: nn.Module
    predict: Callable[[Tensor], Tensor]
    stepper: Callable[[torch.optim.Optimizer], Callable[[Tensor, Tensor], object]]


def _makers() -> dict[str, Callable[[nn.Module], _Trainee]]:
    def plain(model: nn.Module, predict: Callable[[Tensor], Tensor]) -> _Trainee:
        return _Trainee(model, predict, lambda optimizer: ordinary_step(predict, optimizer))

    def fused(model: nn.Module) -> _Trainee:
        fused_mlp.fuse(model)
        return plain(model, model)

    def train_step(model: nn.Module) -> _Trainee:
        fused_mlp.fuse(model)
        make: Any = fused_mlp
        return _Trainee(model, model, lambda o: make.TrainStep(model, nn.CrossEntropyLoss(), o))

    makers: dict[str, Callable[[nn.Module], _Trainee]] = {
        "eager": lambda model: plain(model, model),
        "compile": lambda model: plain(model, torch.compile(model)),
        "fused": fused,
    }
    if hasattr(fused_mlp, "TrainStep"):
        makers["fused, TrainStep"] = train_step
    return makers


def ordinary_step(
    model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer
) -> Callable[[Tensor, Tensor], object]:
    """Return the training step everybody writes."""

    def step(features: Tensor, target: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(features), target).backward()
        optimizer.step()

    return step


def _train(
    trainee: _Trainee, data: Table, batch: int, goal: float, seed: int
) -> tuple[float, int, float]:
    """Return seconds, epochs and the accuracy reached."""
    x, y, test_x, test_y = data
    optimizer = torch.optim.Adam(trainee.model.parameters(), 2e-3, fused=True)
    step = trainee.stepper(optimizer)
    torch.manual_seed(seed)
    shuffle = torch.Generator().manual_seed(seed)
    accuracy, spent = 0.0, 0.0
    for epoch in itertools.count(1):
        order = torch.randperm(len(x), generator=shuffle).to(x.device)
        batches = list(zip(x[order].split(batch), y[order].split(batch), strict=True))
        environment.synchronize(x.device)
        start = time.perf_counter()
        trainee.model.train()
        for features, target in batches:
            if len(target) > 1:  # batch norm needs two rows to train
                step(features, target)
        trainee.model.eval()
        with torch.inference_mode():
            accuracy = float((trainee.predict(test_x).argmax(1) == test_y).double().mean())
        spent += time.perf_counter() - start
        if accuracy >= goal or epoch == _MOST_EPOCHS:
            return spent, epoch, accuracy
    raise AssertionError("not reached")


def _digits() -> Table:
    from sklearn.datasets import load_digits

    features, target = load_digits(return_X_y=True)
    x, y = torch.from_numpy(features).float(), torch.from_numpy(target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = fused_mlp.functional.normalize(x[order]), y[order]
    return x[360:], y[360:], x[:360], y[:360]


def _synthetic(rows: int) -> Table:
    """Return classes that a random network of the same kind tells apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 10, generator=generator)
    hidden = torch.tanh(x @ torch.randn(10, 16, generator=generator))
    y = (hidden @ torch.randn(16, 5, generator=generator)).argmax(1)
    held_out = rows // 20
    return x[held_out:], y[held_out:], x[:held_out], y[:held_out]
