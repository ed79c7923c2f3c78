"""Finds what a build needs: torch's headers, a C++ compiler, nvcc, ninja.

A ``Tool`` that was not found says why and what to install; finding never raises.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

TORCH_MINIMUM = (2, 13)
CUDA_FOLDER = Path("/usr/local/cuda")


@dataclass(frozen=True)
class Tool:
    """A program or folder that a build needs. ``path`` is None where it was not found."""

    path: Path | None
    reason: str = ""
    remedy: str = ""
    arguments: tuple[str, ...] = ()  # words after the program in CXX, as in "ccache g++"

    @property
    def command(self) -> list[str]:
        if self.path is None:
            raise LookupError(self.reason)
        return [str(self.path), *self.arguments]


def site_folders() -> list[Path]:
    """Every site-packages folder of this interpreter, those hidden from an isolated build included.

    pip runs an isolated build with the target environment's interpreter but takes its
    site-packages off sys.path; sysconfig still names it. uv builds in an environment of its own
    and leaves only VIRTUAL_ENV or CONDA_PREFIX to go by. Folders named in .pth files count too.
    """
    paths = sysconfig.get_paths()
    roots = [Path(entry) for entry in sys.path if entry]
    roots += [Path(paths["purelib"]), Path(paths["platlib"])]
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if prefix := os.environ.get(variable):
            roots += sorted(Path(prefix).glob("lib/python3*/site-packages"))
    roots.append(Path(site.getusersitepackages()))
    if _sees_system_packages():
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        roots.append(Path(sys.base_prefix) / "lib" / version / "site-packages")
    found: dict[Path, None] = {}
    for root in roots:
        if not root.is_dir():
            continue
        found[root] = None
        for listing in sorted(root.glob("*.pth")):
            for line in listing.read_text(errors="replace").splitlines():
                entry = root / line.strip()
                if line.strip() and not line.startswith("import") and entry.is_dir():
                    found[entry] = None
    return list(found)


def _sees_system_packages() -> bool:
    configuration = Path(sys.prefix) / "pyvenv.cfg"
    return configuration.is_file() and bool(
        re.search(r"include-system-site-packages\s*=\s*true", configuration.read_text())
    )


def find_torch() -> Tool:
    """The folder of an installed torch with headers, without importing it."""
    remedy = "pip install 'torch>=2.13'"
    found: Path | None = None
    specification = importlib.util.find_spec("torch")
    if specification and specification.submodule_search_locations:
        found = Path(next(iter(specification.submodule_search_locations)))
    else:
        for folder in site_folders():
            if (folder / "torch" / "version.py").is_file():
                found = folder / "torch"
                break
    if found is None:
        return Tool(None, "torch is not installed", remedy)
    version_file = found / "version.py"
    match = version_file.is_file() and re.search(
        r"__version__\s*=\s*['\"](\d+)\.(\d+)", version_file.read_text()
    )
    if match and (int(match[1]), int(match[2])) < TORCH_MINIMUM:
        return Tool(None, f"torch {match[1]}.{match[2]} is older than 2.13", remedy)
    if not (found / "include/torch/csrc/stable/library.h").is_file():
        return Tool(None, f"torch in {found} has no C++ headers", "install torch from PyPI")
    return Tool(found)


def torch_lacks_cuda(torch: Path) -> bool:
    """Whether the torch in this folder says of itself that it cannot use NVIDIA GPUs."""
    version = torch / "version.py"
    pattern = r"^cuda\b[^=\n]*=\s*None\b"
    return version.is_file() and bool(re.search(pattern, version.read_text(), re.MULTILINE))


def compiler_remedy() -> str:
    """How a C++ compiler is installed on this system."""
    if sys.platform == "darwin":
        return "run: xcode-select --install"
    release = Path("/etc/os-release")
    words = release.read_text().lower() if release.is_file() else ""
    if "debian" in words or "ubuntu" in words:
        return "run: sudo apt install g++"
    if "fedora" in words or "rhel" in words:
        return "run: sudo dnf install gcc-c++"
    if "arch" in words:
        return "run: sudo pacman -S gcc"
    return "install g++ or clang++ (conda: conda install -c conda-forge cxx-compiler)"


def find_cxx() -> Tool:
    """The C++ compiler: what CXX names, else g++, c++ or clang++ on PATH."""
    if named := os.environ.get("CXX"):
        words = shlex.split(named)
        if path := shutil.which(words[0]):
            return Tool(Path(path), arguments=tuple(words[1:]))
        return Tool(None, f"no C++ compiler: CXX={named} was not found", compiler_remedy())
    for name in ("g++", "c++", "clang++"):
        if path := shutil.which(name):
            return Tool(Path(path))
    return Tool(None, "no C++ compiler (looked for g++, c++, clang++ on PATH)", compiler_remedy())


def find_nvcc() -> Tool:
    """nvcc of the toolkit that CUDA_HOME or CUDA_PATH names; without either the one on PATH, in
    /usr/local/cuda, or from PyPI packages."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if prefix := os.environ.get(variable):
            candidate = Path(prefix) / "bin" / "nvcc"
            if candidate.is_file():
                return Tool(candidate)
            return Tool(
                None,
                f"no nvcc: {variable}={prefix} has no bin/nvcc",
                f"point {variable} to a CUDA toolkit, or unset it",
            )
    if path := shutil.which("nvcc"):
        return Tool(Path(path))
    if (candidate := CUDA_FOLDER / "bin" / "nvcc").is_file():
        return Tool(candidate)
    for folder in site_folders():
        for candidate in sorted((folder / "nvidia").glob("cu*/bin/nvcc"), reverse=True):
            return Tool(candidate)
    return Tool(
        None,
        "no nvcc (looked in CUDA_HOME, on PATH, in /usr/local/cuda and in site-packages)",
        "install the CUDA toolkit, or run: pip install 'fused_mlp[cuda-build]'",
    )


def find_ninja() -> Tool:
    """ninja on PATH, or beside the interpreter (a venv that is not activated)."""
    path = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if path:
        return Tool(Path(path))
    return Tool(None, "no ninja", "pip install ninja")


@functools.cache
def accepts(compiler: tuple[str, ...], flags: tuple[str, ...]) -> bool:
    """Whether the C++ compiler takes ``flags``."""
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
    try:
        result = subprocess.run(
            command, input="int main() {}\n", capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0


@functools.cache
def nvcc_architectures(nvcc: Path) -> frozenset[str]:
    """The virtual architectures nvcc knows, as {"75", "80", …}."""
    result = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True)
    return frozenset(re.findall(r"compute_(\d+)", result.stdout))


@functools.cache
def gpu_architectures() -> tuple[str, ...]:
    """Compute capabilities of the GPUs in this machine, as ("80", "90"); empty without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = {line.strip().replace(".", "") for line in result.stdout.splitlines()}
    return tuple(sorted((arch for arch in found if arch.isdigit()), key=int))


def version_line(tool: Tool) -> str:
    """The line in which a compiler names its version, or '' where it does not run."""
    if tool.path is None:
        return ""
    try:
        result = subprocess.run(
            [*tool.command, "--version"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = result.stdout.strip().splitlines()
    release = [line for line in lines if "release" in line]  # nvcc: not the first line
    return (release or lines or [""])[0].strip()


def machine() -> str:
    """The processor's family in one spelling: x86_64, aarch64, …"""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)
