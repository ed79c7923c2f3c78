"""Where the numbers come from: the machine, its peaks, the versions, the settings, the load."""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fused_mlp
from fused_mlp import backends

from .errors import BenchError

BUSY = 0.5  # load average at the start above which numbers are not to be believed
PACKAGES = ("torch", "triton", "numpy", "onnxruntime", "openvino", "jax")
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_BLOCKTIME", "GOMP_SPINCOUNT",
              "OMP_WAIT_POLICY", "FUSED_MLP_BACKEND", "FUSED_MLP_CPU_ISA", "LD_PRELOAD",
              "MALLOC_CONF")  # fmt: skip


def collect(device: torch.device) -> dict[str, Any]:
    """Return everything a reader needs to judge or repeat a run, as JSON-ready values."""
    where: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.platform(terse=True),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "caches": _caches(),
        "memory_gib": _memory_gib(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_average": load_average(),
        "nice": os.nice(0) if hasattr(os, "nice") else None,
        "python": platform.python_version(),
        "versions": _versions(),
        "fused_mlp": fused_mlp.__version__,
        "git_revision": git_revision(),
        "backend": backends.active_backend(device.type),
        "isa": backends.isa(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": _output(
                "nvidia-smi",
                "--query-gpu=driver_version,clocks.sm,clocks.max.sm",
                "--format=csv,noheader",
            ),
            "cuda": torch.version.cuda,
        }
    return where


def load_average() -> float | None:
    """Return the load of the last minute, or None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def choose_device(name: str) -> torch.device:
    """Return a device that works here.

    Raises:
        BenchError: when it does not.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BenchError(f"--device {name} cannot be used here: {reason}") from error
    return device


def measure_peaks(device: torch.device, size: int = 2048, copy_mib: int = 256) -> dict[str, float]:
    """Measure what bounds every op: FLOP/s of a large float32 product, bytes/s of a copy.

    Args:
        size: rows and columns of the product's square operands.
        copy_mib: size of the buffer that is copied; its bytes count twice, read and written.

    Returns:
        ``gflops`` and ``gb_per_s``, the best of several tries: a ceiling, not a typical value.
    """
    a, b = torch.randn(2, size, size, device=device).unbind()
    out = torch.empty_like(a)
    source = torch.randn(copy_mib * 2**18, device=device)
    target = torch.empty_like(source)
    product = _best_seconds(lambda: torch.mm(a, b, out=out), device)
    products = [product]
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        # oneDNN knows AVX-512 where MKL takes AVX2 on AMD: the higher one is the ceiling.
        run = torch.ops.mkldnn._linear_pointwise
        products.append(_best_seconds(lambda: run(a, b, None, "none", [], ""), device))
    copied = _best_seconds(lambda: target.copy_(source), device)
    return {
        "gflops": 2 * size**3 / min(products) / 1e9,
        "gb_per_s": 2 * source.numel() * 4 / copied / 1e9,
    }


def last_level_cache() -> int:
    """Return its bytes; 32 MiB where the system does not say."""
    sizes = [_bytes(text) for text in _caches().values()]
    return max(sizes, default=32 * 2**20)


def cpu_name() -> str:
    """Return the processor's name with its family and model, which tell the generation."""
    text = _read("/proc/cpuinfo") or ""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.M))
    if not fields:
        return platform.processor() or platform.machine()
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def git_revision() -> str | None:
    """Return the commit of the checkout, marked where files differ from it."""
    root = Path(__file__).resolve().parent.parent
    revision = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if not revision:
        return None
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return revision + ("+changes" if changed else "")


def _best_seconds(run: Any, device: torch.device, tries: int = 7) -> float:
    run()
    times = []
    for _ in range(tries):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timer_overhead() -> float:
    """Return the seconds a pair of clock reads takes."""
    pairs = [-time.perf_counter() + time.perf_counter() for _ in range(1000)]
    return statistics.median(pairs)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level = _read(index / "type"), _read(index / "level")
        size = _read(index / "size")
        if kind and level and size and kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if match is None:
        return 0
    return int(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[match[2]]


def _memory_gib() -> float | None:
    match = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo") or "")
    return round(int(match[1]) / 2**20, 1) if match else None


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
