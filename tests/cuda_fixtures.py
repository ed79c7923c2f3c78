"""Fixtures of the tests that run the CUDA backend in ptxsim. Import them by name."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from cuda_simulator import Simulator, ptx_cache
from ptxsim import nvcc

from bench.cuda_launches import load_library

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def cuda_library() -> ctypes.CDLL:
    if reason := nvcc.why_not():
        pytest.skip(reason)
    return load_library(ptx_cache() / f"library-{os.getuid()}")


@contextmanager
def tf32(allowed: bool = True) -> Iterator[None]:
    """Let float32 products round to tf32 within, or leave them exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


_BOTH = [pytest.param(arch, id=f"sm_{arch}") for arch in (80, 90)]
_SECOND_SLOW = [_BOTH[0], pytest.param(90, id="sm_90", marks=pytest.mark.slow)]


@pytest.fixture(params=_SECOND_SLOW)
def simulate(request: pytest.FixtureRequest, cuda_library: ctypes.CDLL) -> Callable[..., Simulator]:
    """Make a simulated GPU: ``simulate(multiprocessors=4, stats=True, shuffle=1)``."""
    return functools.partial(Simulator, cuda_library, request.param)


@pytest.fixture(params=_SECOND_SLOW)
def gpu(request: pytest.FixtureRequest, cuda_library: ctypes.CDLL) -> Iterator[Simulator]:
    """A simulated GPU that serves CPU tensors during the test, with every check on."""
    with Simulator(cuda_library, arch=request.param).running() as simulator:
        yield simulator


@pytest.fixture(params=_BOTH)
def each_gpu(request: pytest.FixtureRequest, cuda_library: ctypes.CDLL) -> Iterator[Simulator]:
    """The same for what is to run on both architectures among the fast tests."""
    with Simulator(cuda_library, arch=request.param).running() as simulator:
        yield simulator
