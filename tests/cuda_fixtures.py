"""Fixtures of the tests that run the CUDA backend in ptxsim. Import them by name."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cuda_simulator import Simulator, ptx_cache
from ptxsim import nvcc

import fused_mlp
from fused_mlp import _build
from fused_mlp._build import plan, runner

CPU = torch.device("cpu")
_loaded: list[ctypes.CDLL] = []


def load_library() -> ctypes.CDLL:
    """Load the CUDA library: the package's own, else one built for its host code alone.

    The kernels run from PTX that is compiled apart, so the library's device code is compiled for
    one architecture and not optimised, which takes a fraction of the time.
    """
    if _loaded:
        return _loaded[0]
    csrc = _build.source_root()
    output = Path(fused_mlp.__file__).parent / "_C_cuda.so"
    if _build.describe(output).get("fingerprint") != plan.fingerprint("cuda", csrc):
        folder = ptx_cache() / f"library-{os.getuid()}"
        folder.mkdir(parents=True, exist_ok=True)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("FUSED_MLP_CUDA_ARCHS", "75")
            made = plan.make_plan("cuda", csrc, folder)
        quick = ("-Xcicc", "-O0", "-Xptxas", "-O0")
        units = [dataclasses.replace(u, command=(*u.command, *quick)) for u in made.units]
        runner.run(dataclasses.replace(made, units=units))
        output = made.output
    torch.ops.load_library(output)
    _loaded.append(ctypes.CDLL(str(output)))
    return _loaded[0]


@pytest.fixture(scope="session")
def cuda_library() -> ctypes.CDLL:
    if reason := nvcc.why_not():
        pytest.skip(reason)
    return load_library()


@contextmanager
def tf32(library: ctypes.CDLL) -> Iterator[None]:
    library.fused_mlp_cuda_allow_tf32(1)
    try:
        yield
    finally:
        library.fused_mlp_cuda_allow_tf32(0)


@pytest.fixture
def simulate(cuda_library: ctypes.CDLL) -> Callable[..., Simulator]:
    """Make a simulated GPU: ``simulate(arch=80, multiprocessors=4, stats=True, shuffle=1)``."""
    return lambda **options: Simulator(cuda_library, **options)


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def gpu(request: pytest.FixtureRequest, cuda_library: ctypes.CDLL) -> Iterator[Simulator]:
    """A simulated GPU that serves CPU tensors during the test, with every check on."""
    with Simulator(cuda_library, arch=request.param).running() as simulator:
        yield simulator


@pytest.fixture
def gpu80(cuda_library: ctypes.CDLL) -> Iterator[Simulator]:
    with Simulator(cuda_library, arch=80).running() as simulator:
        yield simulator
