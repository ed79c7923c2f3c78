"""A million small steps: whether memory, open files or the time of a step grow.

    make soak                            # a million of each kind, about ten minutes
    python scripts/soak.py --steps 20000

Trains and evaluates small networks with batches of changing size, step after step, in the kinds
that leave no object of their own behind. Prints a line a kind: what the process took after the
first tenth and at the end, and the median time of a step in the first and in the last tenth. Ends
with status 1 where memory grew by more than 4 MiB, a file stayed open or steps slowed by half.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from fused_mlp import FusedResearchNet, TrainStep
from fused_mlp.functional import batch_norm_leaky_relu, linear_relu, normalize

GROWTH = 4 << 20  # bytes; what the allocator keeps back comes and goes by a megabyte or two
SLOWER = 1.5
CHUNKS = 100


def resident() -> int:
    """Return the bytes of memory the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def evaluate() -> Callable[[int], object]:
    net = FusedResearchNet(10, [16, 8], 5).eval()
    inputs = [torch.randn(rows, 10) for rows in (1, 2, 7)]

    def step(number: int) -> object:
        with torch.no_grad():
            return net(inputs[number % 3])

    return step


def train() -> Callable[[int], object]:
    net = FusedResearchNet(10, [16, 8], 5)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    batches = [(torch.randn(n, 10), torch.randint(5, (n,))) for n in (2, 3, 8)]

    def step(number: int) -> None:
        x, y = batches[number % 3]
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def train_step() -> Callable[[int], object]:
    net = FusedResearchNet(10, [16, 8], 5)
    step = TrainStep(net, F.cross_entropy, torch.optim.AdamW(net.parameters(), lr=1e-6))
    batches = [(torch.randn(n, 10), torch.randint(5, (n,))) for n in (2, 3, 8)]
    return lambda number: step(*batches[number % 3])


def train_step_of_one_row() -> Callable[[int], object]:
    net = FusedResearchNet(10, [16, 8], 5)
    net.eval()  # a batch of one has no variance; dropout and statistics are off
    step = TrainStep(net, F.mse_loss, torch.optim.SGD(net.parameters(), lr=1e-6))
    x, y = torch.randn(1, 10), torch.randn(1, 5)
    return lambda number: step(x, y)


def ops() -> Callable[[int], object]:
    x, weight = torch.randn(6, 4), torch.randn(4, 4, requires_grad=True)
    mean, var = torch.zeros(4), torch.ones(4)

    def step(number: int) -> None:
        hidden = linear_relu(normalize(x, 0), weight, None, 0.3, True)
        batch_norm_leaky_relu(hidden, mean, var, training=True).sum().backward()
        weight.grad = None

    return step


def errors() -> Callable[[int], object]:
    net, wrong = FusedResearchNet(10, [16, 8], 5), torch.randn(3, 9)

    def step(number: int) -> None:
        try:
            net(wrong)
        except RuntimeError:
            return
        raise AssertionError("a wrong input was taken")

    return step


KINDS = {
    "evaluation": evaluate,
    "training loop": train,
    "TrainStep": train_step,
    "TrainStep, one row": train_step_of_one_row,
    "ops, forward and backward": ops,
    "refused inputs": errors,
}


def soak(make: Callable[[], Callable[[int], object]], steps: int) -> tuple[str, bool]:
    """Return what there is to say of one kind, and whether it is well."""
    step = make()
    chunk, times = max(steps // CHUNKS, 1), []
    memory = files = 0
    for i in range(CHUNKS):
        start = time.perf_counter()
        for number in range(chunk):
            step(number)
        times.append((time.perf_counter() - start) / chunk * 1e6)
        if i == CHUNKS // 10 - 1:
            gc.collect()
            memory, files = resident(), open_files()
    gc.collect()
    grown, left = resident() - memory, open_files() - files
    first, last = (
        statistics.median(part) for part in (times[: CHUNKS // 10], times[-CHUNKS // 10 :])
    )
    text = (
        f"{chunk * CHUNKS:,} steps, memory {grown / 2**20:+.1f} MiB of {memory / 2**20:.0f}, "
        f"{left:+d} open files, {first:.1f} us a step at first, {last:.1f} at last"
    )
    return text, grown < GROWTH and left == 0 and last < SLOWER * first


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--only", choices=tuple(KINDS), nargs="+", default=list(KINDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    well = True
    for kind in options.only:
        text, good = soak(KINDS[kind], options.steps)
        print(f"{kind}: {text}{'' if good else '  <- grows'}", flush=True)
        well = well and good
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
