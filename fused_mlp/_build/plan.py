"""Which source is compiled with which flags.

    csrc/cpu/*.cpp           once, with baseline flags
    csrc/cpu/kernels/*.cpp   once per instruction set, told its name by -DFUSED_MLP_ISA=<name>
    csrc/cpu/kernels/bfloat16/*.cpp   for avx512_bf16 and amx_bf16, avx512 with these beside it
    csrc/cuda/*.cu           once, for every GPU architecture

Every unit learns which instruction sets are there from -DFUSED_MLP_HAS_AVX2 and so on. Nothing
is compiled for the building machine's own processor: a library runs on any machine of its kind.
"""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

from .errors import BuildUnavailable
from .toolchain import (
    accepts,
    find_cxx,
    find_nvcc,
    find_torch,
    gpu_architectures,
    machine,
    nvcc_architectures,
)

KINDS = ("cpu", "cuda")
# The stable ABI of torch 2.13: a library built against any later torch loads on 2.13 as well.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020d000000000000"
LANGUAGE = "-std=c++20"
# No -ffast-math: NaN, infinity and the order of sums are part of what the ops promise.
CPU_FLAGS: tuple[str, ...] = (
    *("-O3", LANGUAGE, "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-psabi", TORCH_TARGET),
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
# gcc and clang prefer 256-bit vectors on AVX-512 machines unless told otherwise
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *_AVX2),
    "-mprefer-vector-width=512",
)
ISA_FLAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512_bf16": (*_AVX512, "-mavx512bf16"),
        "amx_bf16": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    },
}
# Instruction sets that have a folder of kernels of their own and take all else from another.
_FOLDERS = {"bfloat16": ("avx512_bf16", "amx_bf16")}
# -cudart static and symbols of libtorch_cpu alone: the library loads under every torch wheel.
CUDA_FLAGS: tuple[str, ...] = (
    *("-O3", LANGUAGE, "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"),
    TORCH_TARGET,
)
CUDA_ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")


@dataclass(frozen=True)
class Unit:
    """One call of a compiler: ``source`` to ``output``, its headers listed in ``depfile``."""

    source: Path
    output: Path
    command: tuple[str, ...]

    @property
    def depfile(self) -> Path:
        return self.output.with_suffix(".d")


@dataclass(frozen=True)
class Plan:
    """All calls that make one library, and what describes the result to the doctor."""

    units: list[Unit]
    link: tuple[str, ...]
    output: Path
    facts: dict[str, object] = field(default_factory=dict)


def sources(kind: str, csrc: Path) -> list[Path]:
    """The files that are compiled for ``kind``; empty where the tree has none."""
    if kind == "cpu":
        return [
            path
            for pattern in ("cpu/*.cpp", "cpu/kernels/*.cpp", "cpu/kernels/*/*.cpp")
            for path in sorted(csrc.glob(pattern))
        ]
    return sorted(csrc.glob("cuda/**/*.cu"))


def fingerprint(kind: str, csrc: Path) -> str:
    """A name for what a build of ``kind`` would give: sources, headers, flags, platform.

    Computed without a compiler, so that a library can be checked where there is none. GPU
    architectures are left out: a library for fewer of them is not out of date.
    """
    digest = hashlib.sha256()
    flags = CPU_FLAGS if kind == "cpu" else CUDA_FLAGS
    digest.update(repr((kind, machine(), platform.system(), flags, ISA_FLAGS)).encode())
    for folder in ("common", kind):
        for path in sorted((csrc / folder).rglob("*")):
            if path.is_file() and path.suffix in {".h", ".hpp", ".cuh", ".inc", ".cpp", ".cu"}:
                digest.update(path.relative_to(csrc).as_posix().encode() + b"\0")
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def make_plan(kind: str, csrc: Path, folder: Path, native: bool = False) -> Plan:
    """The calls that build ``kind`` from ``csrc`` in ``folder``.

    ``native`` prefers this machine's GPUs to all architectures. Raises BuildUnavailable where
    sources, torch's headers or a compiler are missing.
    """
    if not sources(kind, csrc):
        raise BuildUnavailable(f"this version has no {kind} sources in {csrc}")
    torch = find_torch()
    if torch.path is None:
        raise BuildUnavailable(torch.reason, torch.remedy)
    includes = (f"-I{csrc}", "-isystem", f"{torch.path}/include")
    libraries = (f"-L{torch.path}/lib", "-ltorch_cpu")
    if kind == "cpu":
        return _plan_cpu(csrc, folder, includes, libraries)
    return _plan_cuda(csrc, folder, includes, libraries, native)


def _warnings_are_errors() -> bool:
    return os.environ.get("FUSED_MLP_WERROR", "0") == "1"


def _strict_flags(compiler: tuple[str, ...]) -> tuple[str, ...]:
    # gcc sees uninitialized values where both branches of an inlined function set them
    lenient = ("-Werror", "-Wno-error=maybe-uninitialized")
    return lenient if accepts(compiler, lenient) else lenient[:1]  # clang knows no such warning


def _plan_cpu(
    csrc: Path, folder: Path, includes: tuple[str, ...], libraries: tuple[str, ...]
) -> Plan:
    cxx = find_cxx()
    if cxx.path is None:
        raise BuildUnavailable(cxx.reason, cxx.remedy)
    compiler = tuple(cxx.command)
    if not accepts(compiler, (LANGUAGE,)):
        raise BuildUnavailable(
            f"{cxx.path} does not compile C++20", "install g++ 11 or newer, or set CXX"
        )
    isas: dict[str, tuple[str, ...]] = {"baseline": ()}
    for name, flags in ISA_FLAGS.get(machine(), {}).items():
        if accepts(compiler, (LANGUAGE, *flags)):
            isas[name] = flags
    have = tuple(f"-DFUSED_MLP_HAS_{name.upper()}" for name in isas if name != "baseline")
    strict = _strict_flags(compiler) if _warnings_are_errors() else ()
    common = (*compiler, *CPU_FLAGS, *strict, *have, *includes)
    units: dict[str, list[Unit]] = {"": [], **{name: [] for name in isas}}
    for source in sources("cpu", csrc):
        for name, flags in _isas_of(source, isas).items():
            suffix = f".{name}.o" if name else ".o"
            output = folder / source.relative_to(csrc).with_suffix(suffix)
            isa = (f"-DFUSED_MLP_ISA={name}",) if name else ()
            units[name].append(_unit(source, output, (*common, *flags, *isa)))
    # Of an inline function that several objects hold, the linker keeps the first. Objects for older
    # processors come first, lest one of those runs a copy made for a newer one.
    ordered = [unit for group in units.values() for unit in group]
    output = folder / "_C_cpu.so"
    objects = [str(unit.output) for unit in ordered]
    # Python's functions (cpu/snapshot.cpp) are found in the process, if it is one of Python.
    late = ("-Wl,-undefined,dynamic_lookup",) if platform.system() == "Darwin" else ()
    link = (*compiler, "-shared", "-fPIC", *late, *objects, "-o", str(output), *libraries)
    return Plan(ordered, link, output, {"isas": list(isas), "compiler": " ".join(compiler)})


def _isas_of(source: Path, isas: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The names and flags a file is compiled with; no name for one outside of ``kernels``."""
    folder = source.parent.name
    if folder in _FOLDERS:
        return {name: flags for name, flags in isas.items() if name in _FOLDERS[folder]}
    if folder == "kernels":
        elsewhere = {name for names in _FOLDERS.values() for name in names}
        return {name: flags for name, flags in isas.items() if name not in elsewhere}
    return {"": ()}


def _plan_cuda(
    csrc: Path,
    folder: Path,
    includes: tuple[str, ...],
    libraries: tuple[str, ...],
    native: bool,
) -> Plan:
    nvcc, cxx = find_nvcc(), find_cxx()
    if nvcc.path is None:
        raise BuildUnavailable(nvcc.reason, nvcc.remedy)
    if cxx.path is None:
        raise BuildUnavailable(cxx.reason, cxx.remedy)
    architectures = cuda_architectures(nvcc.path, native)
    host = () if cxx.arguments else ("-ccbin", str(cxx.path))
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    newest = architectures[-1]  # its PTX lets GPUs that come later run the library
    codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    strict = ("-Werror", "all-warnings") if _warnings_are_errors() else ()
    common = (*nvcc.command, *host, *CUDA_FLAGS, *strict, *includes, *codes)
    units = [
        _unit(source, folder / source.relative_to(csrc).with_suffix(".o"), common)
        for source in sources("cuda", csrc)
    ]
    output = folder / "_C_cuda.so"
    objects = [str(unit.output) for unit in units]
    link = (*nvcc.command, *host, "-shared", "-cudart", "static", *objects, "-o", str(output))
    facts: dict[str, object] = {
        "architectures": [f"sm_{arch}" for arch in architectures],
        "compiler": str(nvcc.path),
    }
    return Plan(units, (*link, *libraries), output, facts)


def _unit(source: Path, output: Path, command: tuple[str, ...]) -> Unit:
    depfile = output.with_suffix(".d")
    rest = ("-MD", "-MF", str(depfile), "-c", str(source), "-o", str(output))
    return Unit(source, output, (*command, *rest))


def cuda_architectures(nvcc: Path, native: bool = False) -> list[str]:
    """What FUSED_MLP_CUDA_ARCHS asks for ("80;90", or "native": this machine's GPUs), else all.

    With ``native`` and a GPU in this machine, an unset variable means "native". Raises
    BuildUnavailable for an architecture nvcc does not know, and for "native" without a GPU.
    """
    known = nvcc_architectures(nvcc)
    wanted = os.environ.get("FUSED_MLP_CUDA_ARCHS", "").replace(",", ";").strip()
    if not wanted and native and gpu_architectures():
        wanted = "native"
    if not wanted:
        return [arch for arch in CUDA_ARCHITECTURES if arch in known]
    if wanted == "native":
        found = [arch for arch in gpu_architectures() if arch in known]
        if not found:
            raise BuildUnavailable(
                "no NVIDIA GPU here to build for", "set FUSED_MLP_CUDA_ARCHS, as in '80;90'"
            )
        return found
    names = {part.strip() for part in wanted.split(";") if part.strip()}
    if unknown := sorted(names - known):
        raise BuildUnavailable(
            f"{nvcc} does not know sm_{unknown[0]}",
            f"FUSED_MLP_CUDA_ARCHS takes any of {';'.join(sorted(known, key=int))}",
        )
    return sorted(names, key=int)
