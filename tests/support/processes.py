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

_TIMEOUT = 120  # seconds; on a busy machine the two may start far apart


class Processes:
    """A process group of gloo processes.

    Args:
        count: how many.
        folder: an empty directory, where the processes find each other: no port is needed.
    """

    def __init__(self, count: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(
                target=_work, args=(there, rank, count, str(folder / "store")), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what ``function(rank, *arguments)`` returns in each process."""
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_TIMEOUT):
                self.stop()
                raise TimeoutError(f"process {rank} did not answer in {_TIMEOUT} s")
            good, result = pickle.loads(pipe.recv_bytes())
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
        timeout=timedelta(seconds=_TIMEOUT),
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
