"""Time contestants against each other in one process, in turns, and say how sure the result is."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Step = Callable[[], object]


@dataclass(frozen=True)
class Budget:
    """How long to measure one case.

    Attributes:
        seconds: what all contestants of a case may take together, once warmed up.
        sample: the least length of one sample in seconds; shorter steps are repeated inside it.
        rounds: least and most samples a contestant.
        pause: seconds of rest before a sample where runtimes with threads of their own race:
            those spin for a while after a call, on the cores that the next contestant wants.
            Without it, a step of 17 µs took 4 ms beside ONNX Runtime, OpenVINO and JAX on two
            cores; with it, A/A is ±1 %. But PyTorch's own threads fall asleep in it, which makes
            eager's small calls up to 1.5 times slower: so it is not for everybody.
    """

    seconds: float = 1.5
    sample: float = 1e-3
    rounds: tuple[int, int] = (7, 51)
    warm_up: float = 0.05
    pause: float = 3e-3


SMOKE = Budget(seconds=0.0, sample=0.0, rounds=(2, 2), warm_up=0.0, pause=0.0)


@dataclass
class Samples:
    """Seconds a call of one contestant, one entry a round."""

    seconds: list[float] = field(default_factory=list)


def interleave(
    steps: Mapping[str, Step],
    budget: Budget,
    synchronize: Callable[[], None] = lambda: None,
    pause: float = 0.0,
) -> dict[str, Samples]:
    """Time every step once a round, in a new order each round.

    A machine that slows down slows all of them alike, so ratios within a round stay right. On a
    GPU a sample is the host's wall time between two synchronizations.

    Args:
        steps: what to call, by contestant.
        budget: how long.
        synchronize: waits for the device.
        pause: seconds of rest before each sample.
    """
    result = {name: Samples() for name in steps}
    repeats = {name: _warm_up(step, budget, synchronize) for name, step in steps.items()}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    least, most = budget.rounds
    start = time.perf_counter()
    for round_ in range(most):
        if round_ >= least and time.perf_counter() - start > budget.seconds:
            break
        shuffle(order)
        for name in order:
            if pause:
                time.sleep(pause)
            _sample(steps[name], 1 + repeats[name] // 8, synchronize)  # caches and clocks again
            result[name].seconds.append(_sample(steps[name], repeats[name], synchronize))
    return result


def _sample(step: Step, repeats: int, synchronize: Callable[[], None]) -> float:
    turns = range(repeats)
    clock = time.perf_counter
    start = clock()
    for _ in turns:
        step()
    synchronize()
    return (clock() - start) / repeats


def _warm_up(step: Step, budget: Budget, synchronize: Callable[[], None]) -> int:
    """Run the step until caches, clocks and allocators have settled; return repeats a sample."""
    end = time.perf_counter() + budget.warm_up
    shortest = _sample(step, 1, synchronize)
    while time.perf_counter() < end:
        shortest = min(shortest, _sample(step, 1, synchronize))
    return max(1, min(100_000, round(budget.sample / max(shortest, 1e-7))))


# ------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles beside it."""

    median: float
    low: float
    high: float
    count: int

    @property
    def relative(self) -> float:
        """Half the distance of the quartiles over the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0

    def under(self, value: float) -> Spread:
        """Return the spread of ``value`` divided by what this is a spread of."""
        return Spread(value / self.median, value / self.high, value / self.low, self.count)


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles of at least one value."""
    if not values:
        raise ValueError("spread() of no values")
    ordered = sorted(values)
    low, median, high = (quantile(ordered, q) for q in (0.25, 0.5, 0.75))
    return Spread(median, low, high, len(ordered))


def quantile(ordered: Sequence[float], q: float) -> float:
    """Return the q-quantile of ascending values, between two of them by straight line."""
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def ratios(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """Return how many times longer ``slow`` takes, from the ratios within each round."""
    return spread([s / f for s, f in zip(slow, fast, strict=True)])
