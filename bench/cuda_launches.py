"""Sees the launches of the CUDA library without a GPU: csrc/cuda/launch.h, for ctypes.

The library hands every launch to a hook if one is set, and can register its ops for another
dispatch key, so that the code that plans and launches in production runs on tensors of the CPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

import fused_mlp
from fused_mlp import _build
from fused_mlp._build import plan, runner


@functools.cache
def load_library(folder: Path) -> ctypes.CDLL:
    """Load the CUDA library: the package's own, else one built for its host code alone.

    Whoever hooks launches needs no device code, so that is compiled for one architecture and not
    optimised, which takes a fraction of the time.

    Args:
        folder: where to build; kept, what is up to date is not compiled again.

    Raises:
        BuildUnavailable, BuildFailed: without nvcc; when it fails.
    """
    csrc = _build.source_root()
    path = Path(fused_mlp.__file__).parent / "_C_cuda.so"
    if _build.describe(path).get("fingerprint") != plan.fingerprint("cuda", csrc):
        folder.mkdir(parents=True, exist_ok=True)
        with mock.patch.dict(os.environ, FUSED_MLP_CUDA_ARCHS="75"):
            made = plan.make_plan("cuda", csrc, folder)
        quick = ("-Xcicc", "-O0", "-Xptxas", "-O0")
        units = [dataclasses.replace(u, command=(*u.command, *quick)) for u in made.units]
        runner.run(dataclasses.replace(made, units=units))
        path = made.output
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


READ, WRITE, READ_WRITE = range(3)


class Extent(ctypes.Structure):
    """A piece of memory that a launch may touch, and how."""

    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_int64), ("use", ctypes.c_int64)]


class Launch(ctypes.Structure):
    """One launch: kernel, shape, its one parameter and the memory it may touch."""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("parameter_bytes", ctypes.c_uint32),
        ("parameters", ctypes.c_void_p),
        ("extents", ctypes.POINTER(Extent)),
        ("extent_count", ctypes.c_int64),
    ]


class Device(ctypes.Structure):
    """What launch plans depend on."""

    _fields_ = [
        ("multiprocessors", ctypes.c_int32),
        ("shared_bytes_per_block", ctypes.c_int32),
        ("shared_bytes_per_multiprocessor", ctypes.c_int32),
        ("capability", ctypes.c_int32),
    ]


_Hook = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Launch))


@contextmanager
def hooked(
    library: ctypes.CDLL, device: Device, see: Callable[[Launch], None], key: str = "CPU"
) -> Iterator[None]:
    """Within, the raw ops on tensors of ``key`` plan for ``device`` and call ``see`` to launch.

    What ``see`` raises comes out of the ``with`` block in place of the op's own error, and also
    where that error went elsewhere: to a test whose fixture is in the block, say.
    """
    errors: list[BaseException] = []

    def hook(launch: ctypes._Pointer[Launch]) -> int:
        try:
            see(launch.contents)
        except BaseException as error:  # must not cross the C++ frames
            errors.append(error)
            return 1
        return 0

    callback = _Hook(hook)
    library.fused_mlp_cuda_register.restype = ctypes.c_void_p
    library.fused_mlp_cuda_unregister.argtypes = [ctypes.c_void_p]
    library.fused_mlp_cuda_set_launch_hook(callback, ctypes.byref(device))
    handle = library.fused_mlp_cuda_register(key.encode())
    try:
        yield
    except RuntimeError:
        if errors:
            raise errors[0] from None
        raise
    else:
        if errors:
            raise errors[0]
    finally:
        library.fused_mlp_cuda_unregister(handle)
        library.fused_mlp_cuda_set_launch_hook(None, None)


@dataclass(frozen=True)
class Shape:
    """How a kernel was launched."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int

    @property
    def threads(self) -> int:
        x, y, z = self.block
        return x * y * z


@contextmanager
def recorded(library: ctypes.CDLL, device: Device) -> Iterator[list[Shape]]:
    """Within, launches compute nothing and are listed."""
    shapes: list[Shape] = []

    def see(launch: Launch) -> None:
        shapes.append(
            Shape(
                launch.kernel.decode(), tuple(launch.grid), tuple(launch.block), launch.shared_bytes
            )
        )

    with hooked(library, device, see):
        yield shapes
