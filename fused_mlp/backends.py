"""Which implementation of the raw kernels runs: native, Triton or the plain-PyTorch reference.

Choosing happens in torch's dispatcher, so modules, ``torch.ops`` callers and compiled graphs all
follow it. The reference serves every device; a compiled library or the Triton kernels override it
for the CPU and CUDA keys, and :func:`use_backend` overrides those in turn.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from . import _build, notice, reference
from .ops.schemas import COMPILED_SCHEMAS, KERNEL_SCHEMAS, KERNELS, kernels_library

NAMES = ("auto", "native", "triton", "reference")
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
OPS = tuple(kernel for kernel in KERNEL_SCHEMAS if not kernel.endswith("_backward"))
_INTERPRETED = "TRITON_INTERPRET"


@dataclass(frozen=True)
class BackendStatus:
    """One backend on one device: whether it can run, and where it lies or what it lacks.

    Attributes:
        plain: the ops it has no kernel for; plain PyTorch computes them in its place.
    """

    device: str
    name: str
    available: bool
    active: bool
    detail: str
    remedy: str = ""
    plain: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Library:
    """A compiled library: its path, or the reason there is none and what helps.

    Attributes:
        plain: the ops it has no kernel for.
    """

    path: str | None
    reason: str = ""
    remedy: str = ""
    plain: tuple[str, ...] = ()


# ---------------------------------------------------------------------------- what is there


@functools.cache
def native_library(device: str) -> _Library:
    """Load the compiled kernels for ``device`` once, building them first where that is allowed."""
    if device == "cuda" and not torch.cuda.is_available():
        return _Library(None, "torch sees no CUDA device")
    try:
        path = str(_build.library_path(device))
        _drop_trampoline(device)
        before = _registrations(device)
        torch.ops.load_library(path)
    except _build.BuildUnavailable as error:
        return _Library(None, error.reason, error.remedy)
    except OSError as error:
        return _Library(None, str(error).splitlines()[0], "reinstall fused_mlp")
    after = _registrations(device)
    return _Library(path, plain=tuple(op for op in OPS if after[op] == before[op]))


def _registrations(device: str) -> dict[str, int]:
    """Return how many implementations of each op ``device`` has, overridden ones among them."""
    line = f"\n{_KEYS[device]}"
    return {op: torch._C._dispatch_dump(f"{KERNELS}::{op}").count(line) for op in OPS}


def _triton_missing(device: str) -> tuple[str, str] | None:
    """Return why the Triton kernels cannot run on ``device`` and the remedy, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed", "pip install triton"
    if device == "cuda":
        return None if torch.cuda.is_available() else ("torch sees no GPU", "")
    if os.environ.get(_INTERPRETED, "0") == "1":
        return None
    return (
        "Triton compiles for GPUs; on the CPU it runs in its interpreter only",
        f"set {_INTERPRETED}=1 before starting Python (slow, for tests)",
    )


@functools.cache
def isa() -> str | None:
    """Return the instruction set the CPU kernels chose, or None without them."""
    path = native_library("cpu").path
    if path is None:
        return None
    function = ctypes.CDLL(path).fused_mlp_isa
    function.restype = ctypes.c_char_p
    return str(function().decode())


def fingerprint() -> str | None:
    """Return the fingerprint of the CPU library's sources, or None without the library."""
    path = native_library("cpu").path
    found: str | None = _build.describe(Path(path)).get("fingerprint") if path else None
    return found


@functools.cache
def native_watch() -> Callable[[Any], Callable[..., bool]] | None:
    """Return the CPU library's ``watch`` (modules/snapshot.py), or None without the library."""
    path = native_library("cpu").path
    if path is None:
        return None
    function = ctypes.PyDLL(path).fused_mlp_watch
    function.restype = ctypes.py_object
    watch: Callable[[Any], Callable[..., bool]] = function()
    return watch


def status() -> list[BackendStatus]:
    """Return the state of every backend on the CPU and on CUDA, the preferred ones first."""
    result = []
    for device in _KEYS:
        native, missing = native_library(device), _triton_missing(device)
        active = active_backend(device)
        result += [
            BackendStatus(
                device,
                "native",
                native.path is not None,
                active == "native",
                native.path or native.reason,
                native.remedy,
                native.plain,
            ),
            BackendStatus(
                device,
                "triton",
                missing is None,
                active == "triton",
                missing[0]
                if missing
                else f"triton {importlib.import_module('triton').__version__}",
                missing[1] if missing else "",
                () if missing else tuple(op for op in OPS if not _in_triton(op)),
            ),
            BackendStatus(device, "reference", True, active == "reference", "plain PyTorch"),
        ]
    return result


def active_backend(device: str) -> str:
    """Return the name of the backend that serves ``device`` (a type, as "cpu") now."""
    if device not in _KEYS:
        return "reference"
    if _chosen == "reference":
        return "reference"
    if _chosen == "triton" and _triton_missing(device) is None:
        return "triton"
    if native_library(device).path is not None:
        return "native"
    return "triton" if device == "cuda" and _triton_missing(device) is None else "reference"


def has_kernel(op: str, device: str) -> bool:
    """Return whether the backend that serves ``device`` computes an op by a kernel of its own.

    The reference counts as one: it is what was asked for, or all there is.
    """
    active = active_backend(device)
    if active == "native":
        return op not in native_library(device).plain
    return active == "reference" or _in_triton(op)


# ------------------------------------------------------------------------------- choosing

_chosen = "auto"
_override: Library | None = None
_trampolines: dict[str, Library] = {}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the kernels of one backend inside a ``with`` block, in every thread.

    Args:
        name: "auto" (native where it is built, else Triton on GPUs, else the reference),
            "native" (C++ on the CPU, CUDA C++ on NVIDIA GPUs), "triton" or "reference".

    Raises:
        ValueError: for another name.
        RuntimeError: when the backend cannot run here; the message says what is missing.
    """
    previous = _chosen
    _choose(name)
    try:
        yield
    finally:
        _choose(previous)


def _choose(name: str) -> None:
    global _chosen, _override
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, but got {name!r}")
    _require(name)
    override = None
    if name in ("triton", "reference"):
        override = Library(KERNELS, "IMPL")
        try:
            for device, key in _KEYS.items():
                if name == "reference" or _triton_missing(device) is None:
                    _register(override, key, _implementation(name))
        except BaseException:  # a kernel that does not import leaves the choice as it was
            override._destroy()
            raise
    if _override is not None:
        _override._destroy()
    _override, _chosen = override, name


def _require(name: str) -> None:
    """Raise RuntimeError unless some device can run the backend."""
    if name in ("auto", "reference"):
        return
    states = [s for s in status() if s.name == name]
    if not any(s.available for s in states):
        reasons = "; ".join(
            f"on {s.device}: {s.detail}" + (f" ({s.remedy})" if s.remedy else "") for s in states
        )
        raise RuntimeError(f"backend {name!r} cannot run here: {reasons}")


def _implementation(backend: str) -> Callable[[str], Callable[..., Any]]:
    """Return the function that finds a backend's implementation of a raw kernel by name."""
    if backend == "reference":
        return _plain_kernel
    return _triton_kernel


def _triton_kernel(kernel: str) -> Callable[..., Any]:
    """Return the Triton kernel, or the reference's where Triton has none."""
    if not _in_triton(kernel):
        return _plain_kernel(kernel)
    function: Callable[..., Any] = getattr(triton_module(kernel), kernel)
    return function


def _in_triton(kernel: str) -> bool:
    return importlib.util.find_spec(_triton_module_name(kernel)) is not None


def _plain_kernel(kernel: str) -> Callable[..., Any]:
    """Return the reference's kernel, safe from tensors that torch's own operations crash on.

    It is registered for every device and layout; quantized and oneDNN tensors among plain ones end
    the process inside torch.
    """
    function = getattr(reference, kernel)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        for argument in arguments:
            for tensor in argument if isinstance(argument, list) else (argument,):
                if isinstance(tensor, Tensor) and not _is_dense(tensor):
                    raise RuntimeError(
                        f"{kernel}(): expected dense tensors, but got one of layout "
                        f"{tensor.layout} and dtype {tensor.dtype}; convert it with .to_dense() or "
                        ".dequantize()"
                    )
        return _as_contiguous(function(*arguments))

    return call


def _as_contiguous(results: Any) -> Any:
    """Return a kernel's results as other backends give them, which compiled graphs rely on.

    Torch's own operations keep the order of their input's dimensions in memory.
    """
    if isinstance(results, Tensor):
        return results.contiguous()
    return type(results)(tensor.contiguous() for tensor in results)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested)


def triton_module(kernel: str) -> ModuleType:
    return importlib.import_module(_triton_module_name(kernel))


def _triton_module_name(kernel: str) -> str:
    return f"fused_mlp.kernels.{kernel.removesuffix('_backward')}"


def _register(library: Library, key: str, find: Callable[[str], Callable[..., Any]]) -> None:
    with warnings.catch_warnings():
        # Torch warns of an override, which is the purpose here.
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for kernel in KERNEL_SCHEMAS | COMPILED_SCHEMAS:
            library.impl(kernel, find(kernel), key, allow_override=True)


def _install_trampoline(device: str) -> None:
    """Register kernels that load the device's best backend at the first call, then step aside."""
    library = Library(KERNELS, "IMPL")

    def first_call(kernel: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            _settle(device)
            return getattr(torch.ops.fused_mlp_kernels, kernel).default(*arguments)

        return call

    _register(library, _KEYS[device], first_call)
    _trampolines[device] = library


def _drop_trampoline(device: str) -> None:
    library = _trampolines.pop(device, None)
    if library is not None:
        library._destroy()


def _settle(device: str) -> None:
    """Leave the device's best backend registered in place of the trampoline."""
    native = native_library(device)
    _drop_trampoline(device)
    if native.path is None and active_backend(device) == "triton":
        _register(kernels_library, _KEYS[device], _implementation("triton"))
    elif native.path is None and native.reason and device == "cpu":
        warnings.warn(
            f"fused_mlp runs on plain PyTorch: {native.reason}. "
            "`python -m fused_mlp doctor` says what to install.",
            stacklevel=2,
        )


# ------------------------------------------------------------------------------- at import


def _elsewhere(kernel: str) -> Callable[..., Any]:
    """Return the reference for devices that no backend serves."""
    reference_kernel = _plain_kernel(kernel)

    def run(*arguments: Any) -> Any:
        device = arguments[0].device.type
        if device not in _KEYS:
            notice.reference_runs(device)
        return reference_kernel(*arguments)

    return run


_register(kernels_library, "CompositeExplicitAutograd", _elsewhere)


def start() -> None:
    """Load what is built; leave the rest to the first call."""
    if Path(__file__).with_name("_C_cpu.so").is_file():
        _settle("cpu")
    else:
        _install_trampoline("cpu")
    if torch.cuda.is_available():
        _install_trampoline("cuda")
    _choose(os.environ.get("FUSED_MLP_BACKEND", "auto"))
