"""Where the numbers come from: the machine, the versions, the settings, the load."""

from __future__ import annotations

import datetime
import os
import platform
import re
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

BUSY = 0.25  # cores that others keep busy, above which numbers are not to be believed
MEASURED = ("bench", "csrc", "fused_mlp", "kernels", "pyproject.toml", "setup.py")
PACKAGES = ("torch", "triton", "numpy", "onnxruntime", "openvino", "jax", "attorch")
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_BLOCKTIME", "GOMP_SPINCOUNT",
              "OMP_WAIT_POLICY", "FUSED_MLP_BACKEND", "FUSED_MLP_CPU_ISA",
              "FUSED_MLP_CPU_BLAS", "LD_PRELOAD", "MALLOC_CONF")  # fmt: skip


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
        "busy_cores": busy_cores(),
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


def busy_cores(seconds: float = 0.5) -> float | None:
    """Return how many cores work while this process sleeps, or None where that is not to be had.

    The load average takes in what this process itself did in the last minute; this does not.
    """
    before = _cpu_ticks()
    time.sleep(seconds)
    after = _cpu_ticks()
    if before is None or after is None or after[1] == before[1]:
        return None
    share = (after[0] - before[0]) / (after[1] - before[1])
    return round(share * (os.cpu_count() or 1), 2)


def _cpu_ticks() -> tuple[int, int] | None:
    """Return the ticks in which the cores worked, and all."""
    fields = (_read("/proc/stat") or "").split("\n", 1)[0].split()[1:]
    if len(fields) < 8:
        return None
    ticks = [int(field) for field in fields[:8]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # all but idle and waiting for disks


def busyness(where: dict[str, Any]) -> str:
    """Return a warning where something else ran beside the measurement, else nothing."""
    busy = where.get("busy_cores")
    if busy is None or busy <= BUSY:
        return ""
    return (
        f"Something else kept {busy} cores busy (load average {where.get('load_average')}): ratios "
        "stay roughly right, times do not; do not publish them."
    )


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
    """Return the commit of the checkout, marked where files that are measured differ from it."""
    root = Path(__file__).resolve().parent.parent
    revision = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if not revision:
        return None
    words = ("status", "--porcelain", "--untracked-files=no", "--", *MEASURED)
    changed = _output("git", "-C", str(root), *words)
    return revision + ("+changes" if changed else "")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


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
