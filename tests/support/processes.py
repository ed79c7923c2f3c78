"""Two processes that wait for work, joined by a gloo process group.

Starting a process that imports torch takes seconds, so the tests share a pair: a test hands them a
function, both call it, and what they return comes back, rank by rank.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Seconds that an answer may take while this process runs too. Compiling a network takes two of them
# 70 s beside other work on two cores.
_PATIENCE = 240
_GROUP_TIMEOUT = timedelta(hours=1)  # of the group itself, which also counts while all are stopped


class Processes:
    """A process group of gloo processes; after one of them failed to answer, new ones.

    Args:
        count: how many.
        folder: an empty directory, where the processes find each other: no port is needed.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self._count, self._folder = count, folder
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._starts = 0

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what ``function(rank, *arguments)`` returns in each process."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            answer = _receive(pipe)
            if isinstance(answer, str):
                errors.append(f"process {rank} {answer}")
                self.stop()
                break
            good, result = answer
            (results if good else errors).append(result if good else f"process {rank}: {result}")
        assert not errors, "\n".join(errors)
        return results

    def stop(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:  # they hold nothing that their exit would save
            process.kill()
            process.join()
        self._pipes, self._processes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = str(self._folder / f"store{self._starts}")
        self._starts += 1
        for rank in range(self._count):
            here, there = context.Pipe()
            process = context.Process(
                target=_work, args=(there, rank, self._count, store), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)


def _receive(pipe: Connection) -> tuple[bool, Any] | str:
    """Return a process's answer, or what became of it."""
    # A second at a time: a machine that sleeps, or a container that is frozen, stops both sides,
    # and one long wait would be over when it wakes.
    for _ in range(_PATIENCE):
        if pipe.poll(1):
            try:
                answer: tuple[bool, Any] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return "died"
            return answer
    return f"did not answer in {_PATIENCE} s"


def _work(pipe: Connection, rank: int, count: int, store: str) -> None:
    if sys.platform == "linux":  # whatever the name of this machine resolves to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=_GROUP_TIMEOUT,
    )
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = (True, function(rank, *arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
