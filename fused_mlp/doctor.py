"""``python -m fused_mlp doctor``: what runs here, what does not, and what would make it run.

A missing compiler, GPU or Triton is no fault: the reference backend runs everywhere. The exit
status is 1 only where the package itself is broken: an op raises, or gives wrong numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _build, _version, backends, functional, on_chip

Report = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_mlp doctor",
        description="What of fused_mlp runs on this machine, and what to install for the rest.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is in the report
        report = collect()
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 1 if report["problems"] else 0


def collect() -> Report:
    """Everything the doctor knows, as JSON-ready values. Nothing in here raises."""
    problems: list[str] = []

    def attempt(part: str, look: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return look()
        except Exception as error:  # the doctor reports what is broken; it must not break too
            problems.append(f"{part}: {type(error).__name__}: {error}")
            return otherwise

    report: Report = {
        "fused_mlp": {
            "version": _version.__version__,
            "location": str(Path(__file__).resolve().parent),
        },
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "torch": {
            "version": torch.__version__,
            "location": str(Path(torch.__file__).parent),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "threads": torch.get_num_threads(),
        },
        "backends": attempt("backends", _backends, []),
        "cpu": attempt("cpu", _cpu, {}),
        "gpus": attempt("gpus", _gpus, []),
        "triton": _triton(),
        "tools": {
            "c++ compiler": _tool(_build.find_cxx()),
            "nvcc": _tool(_build.find_nvcc()),
            "ninja": _tool(_build.find_ninja()),
        },
        "cache": str(_build.cache_root()),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("FUSED_MLP_")
            or name in {"CXX", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS", "TRITON_INTERPRET"}
        },
    }
    report["self_test"] = attempt("self test", _self_test, {})
    problems += [f"self test: {name}: {said}" for name, said in report["self_test"].items() if said]
    report["problems"] = problems
    return report


def _backends() -> list[dict[str, Any]]:
    states = [dataclasses.asdict(state) for state in backends.status()]
    for state in states:
        if state["name"] == "native":
            # A wheel may hold kernels for GPUs that this machine has not.
            installed = _build.installed_library(state["device"])
            if library := Path(state["detail"]) if state["available"] else installed:
                state["library"] = _build.describe(library)
    return states


def _cpu() -> dict[str, Any]:
    name, flags = platform.processor() or platform.machine(), set()
    listing = Path("/proc/cpuinfo")
    for line in listing.read_text().splitlines() if listing.is_file() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in {"flags", "Features"}:
            flags = set(value.split())
    x86 = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16")
    known = (*x86, "asimd", "sve")
    return {
        "name": name,
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "features": [flag for flag in known if flag in flags],
        "isa": backends.isa(),
        "blas": bool(backends.isa()) and on_chip.runs_blas(),
    }


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "architecture": getattr(properties, "gcnArchName", None)
                if torch.version.hip
                else f"sm_{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def _triton() -> dict[str, str]:
    try:
        return {"version": metadata.version("triton"), "reason": "", "remedy": ""}
    except metadata.PackageNotFoundError:
        remedy = "pip install triton" if sys.platform == "linux" else ""
        return {"version": "", "reason": "not installed", "remedy": remedy}


def _tool(tool: _build.Tool) -> dict[str, str]:
    return {
        "path": str(tool.path) if tool.path else "",
        "version": _build.version_line(tool),
        "reason": tool.reason,
        "remedy": tool.remedy,
    }


# ------------------------------------------------------------------------------- self test


def _self_test() -> dict[str, str]:
    """Each op forward and backward on each device against plain torch: '' or what is wrong."""
    results = {}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for name, (ours, plain) in _cases(device).items():
            results[f"{name} on {device}"] = _compare(ours, plain, device)
    return results


Case = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def _cases(device: str) -> dict[str, Case]:
    """What to run for each op on a (32, 16) tensor: ours, and the same in plain torch."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(*shape, generator=generator) for shape in ((8, 16), (6, 8), (3, 6))]
    weights = [weight.to(device) for weight in weights]
    biases = [torch.randn(len(weight), generator=generator).to(device) for weight in weights]

    def network(x: Tensor) -> Tensor:
        hidden = F.linear(F.relu(F.linear(x, weights[0], biases[0])), weights[1], biases[1])
        hidden = F.leaky_relu(F.batch_norm(hidden, None, None, training=True))
        return F.linear(hidden, weights[2], biases[2])

    return {
        "normalize": (functional.normalize, lambda x: (x - x.mean()) / x.std()),
        "linear_relu": (
            lambda x: functional.linear_relu(x, weights[0], biases[0]),
            lambda x: F.relu(F.linear(x, weights[0], biases[0])),
        ),
        "linear_act": (
            lambda x: functional.linear_act(x, weights[0], biases[0], "gelu"),
            lambda x: F.gelu(F.linear(x, weights[0], biases[0])),
        ),
        "batch_norm_leaky_relu": (
            lambda x: functional.batch_norm_leaky_relu(x, None, None, training=True),
            lambda x: F.leaky_relu(F.batch_norm(x, None, None, training=True)),
        ),
        "batch_norm_act": (
            lambda x: functional.batch_norm_act(x, None, None, training=True, activation="relu"),
            lambda x: F.relu(F.batch_norm(x, None, None, training=True)),
        ),
        "research_net": (
            lambda x: functional.research_net(
                x, weights, biases, None, None, None, None, training=True, dropout_p=(0.0,)
            ),
            network,
        ),
    }


def _compare(
    ours: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], device: str
) -> str:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(32, 16, generator=generator).to(device)
    try:
        pairs = []
        for run in (ours, plain):
            leaf = data.clone().requires_grad_()
            output = run(leaf)
            (gradient,) = torch.autograd.grad(output.square().sum(), leaf)
            pairs.append((output.detach(), gradient))
        for ours_value, plain_value in zip(*pairs, strict=True):
            torch.testing.assert_close(ours_value, plain_value, rtol=1e-3, atol=1e-4)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


# --------------------------------------------------------------------------------- as text


def render(report: Report) -> str:
    """The report as text for a terminal of 80 columns or more."""
    cpu, torch_ = report["cpu"], report["torch"]
    lines = [
        _row("fused_mlp", f"{report['fused_mlp']['version']} in {report['fused_mlp']['location']}"),
        _row("Python", f"{report['python']['version']} ({report['python']['executable']})"),
        _row("torch", f"{torch_['version']}, {torch_['threads']} threads, {_accelerator(torch_)}"),
        _row("system", report["platform"]),
        _row("CPU", f"{cpu.get('name')}, {cpu.get('processors')} processors"),
        _row("  features", " ".join(cpu.get("features", [])) or "none of interest"),
        _row("  kernels use", _kernels(cpu)),
    ]
    lines += [
        _row("GPU", f"{gpu['name']}, {gpu['architecture']}, {gpu['memory_gib']} GiB")
        for gpu in report["gpus"]
    ] or [_row("GPU", "none that torch sees")]
    triton = report["triton"]
    lines.append(_row("Triton", triton["version"] or _missing(triton)))
    for name, tool in report["tools"].items():
        found = f"{tool['path']} ({tool['version']})"
        lines.append(_row(name, found if tool["path"] else _missing(tool)))
    lines += [_row("cache", report["cache"])]
    lines += [_row(f"  {name}", value) for name, value in report["environment"].items()]

    lines += ["", "Backends (* is the one in use)"]
    for state in report["backends"]:
        mark = "*" if state["active"] else " "
        word = "available" if state["available"] else "not available"
        lines.append(
            f" {mark} {state['device']:<5} {state['name']:<10} {word:<14} {state['detail']}"
        )
        made = state.get("library") or {}
        if parts := made.get("isas") or made.get("architectures"):
            lines.append(f"{'':35}for {', '.join(parts)}; built with {made['compiler']}")
        if state["available"] and state["plain"]:
            lines.append(f"{'':35}but {', '.join(state['plain'])} on plain PyTorch")
        if state["remedy"] and not state["available"]:
            lines.append(f"{'':35}-> {state['remedy']}")

    lines.append("")
    if report["problems"]:
        lines += ["BROKEN:", *(f"  {problem}" for problem in report["problems"])]
    else:
        count = len(report["self_test"])
        lines.append(f"Self test: {count} ops, forward and backward, agree with plain torch.")
        if advice := _advice(report):
            lines.append(advice)
    return "\n".join(lines)


def _row(name: str, value: object) -> str:
    return f"{name:<14} {value}"


def _kernels(cpu: dict[str, Any]) -> str:
    if not cpu.get("isa"):
        return "nothing: no compiled CPU kernels"
    helped = ", and torch for large products of wide layers" if cpu["blas"] else ""
    return f"{cpu['isa']}{helped}"


def _accelerator(torch_: dict[str, Any]) -> str:
    if torch_["cuda"]:
        return f"built for CUDA {torch_['cuda']}"
    return f"built for ROCm {torch_['hip']}" if torch_["hip"] else "built for the CPU alone"


def _missing(found: dict[str, str]) -> str:
    reason = found["reason"] or "not found"
    return f"{reason} -> {found['remedy']}" if found["remedy"] else reason


def _advice(report: Report) -> str:
    """What runs slower than it could here, why, and what to do about it."""
    lines = []
    for state in report["backends"]:
        if (state["device"], state["name"]) == ("cpu", "native") and not state["available"]:
            lines += [
                "The CPU runs on the reference backend: right, but no faster than plain torch.",
                _why(state["detail"], state["remedy"]),
            ]
    nvcc = report["tools"]["nvcc"]
    compiled = any(s["device"] == "cuda" and s.get("library") for s in report["backends"])
    if not nvcc["path"] and not compiled and not report["torch"]["hip"]:
        serve = (
            "the Triton kernels serve" if report["triton"]["version"] else "plain PyTorch serves"
        )
        lines += [
            f"NVIDIA GPUs do without the CUDA C++ kernels: {serve} in their place.",
            _why(nvcc["reason"], nvcc["remedy"]),
        ]
    return "\n".join(lines)


def _why(reason: str, remedy: str) -> str:
    return f"Why: {reason}." + (f" To change it, {remedy}." if remedy else "")
