"""Installs the package in every way, with and without each tool, and asks the doctor each time.

    make install-matrix
    python scripts/install_matrix.py --torch 2.13.0 --kind wheel editable --tools all none

From the source archive, the wheel or an editable tree; with all of g++, nvcc, ninja and Triton,
without each, and without any; under each torch. An installation passes when the package imports,
computes, and its doctor names exactly the tools that are there and the backend that runs. Each
torch is installed once, below build/install_matrix, and seen by the environments through a .pth
file. Compilers run at -O1, and with ccache on PATH once for all: what they get is installed and
called, not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "install_matrix"
BUILDS = WORK / "builds"  # every tree that is compiled, pip's among them
KINDS = ("sdist", "wheel", "editable")
PROGRAMS = {
    "g++": ("g++", "c++", "clang++"),
    "nvcc": ("nvcc",),
    "ninja": ("ninja", "ninja-build"),
    "triton": (),
}
TOOLS = {
    "all": frozenset(PROGRAMS),
    **{f"without {name}": frozenset(PROGRAMS) - {name} for name in PROGRAMS},
    "none": frozenset[str](),
}
USE = """
import torch, fused_mlp
from fused_mlp import FusedResearchNet, functional
x = torch.arange(60.0).reshape(6, 10)
expected = (x - x.mean()) / x.std()
torch.testing.assert_close(functional.normalize(x), expected)
FusedResearchNet(10, [64, 32], 5)(expected).sum().backward()
print(fused_mlp.__file__)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="+", default=["2.13.0", "2.14.1"], metavar="VERSION")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    options = parser.parse_args()
    BUILDS.mkdir(parents=True, exist_ok=True)
    triton = install_triton()
    failed = 0
    print("| torch | from | tools | CPU ops run on | CUDA library | result |")
    print("|---|---|---|---|---|---|")
    for version in options.torch:
        packages = install_torch(version)
        archive = build_archive(packages)
        for kind in options.kind:
            source = {"sdist": archive, "wheel": None, "editable": unpack(archive)}[kind]
            source = source or build_wheel(packages, archive)
            for tools in options.tools:
                started = time.monotonic()
                environment = Environment(packages, TOOLS[tools], triton)
                try:
                    environment.install(source, editable=kind == "editable")
                    backend, library = environment.check(version, kind)
                    result = f"passed ({time.monotonic() - started:.0f} s)"
                except (subprocess.CalledProcessError, AssertionError) as error:
                    said = getattr(error, "output", None) or str(error)
                    print(said, file=sys.stderr, flush=True)
                    backend, library, result = "", "", f"FAILED: {str(said).splitlines()[-1][:200]}"
                    failed += 1
                row = (version, kind, tools, backend, library, result)
                print(f"| {' | '.join(row)} |", flush=True)
    return 1 if failed else 0


def call(*words: str | Path, environment: dict[str, str] | None = None, folder: Path = WORK) -> str:
    """What the program prints; raises CalledProcessError with all that it said."""
    done = subprocess.run(
        [str(word) for word in words], env=environment, cwd=folder, text=True, capture_output=True
    )
    if done.returncode:
        said = f"{done.stdout}{done.stderr}"
        raise subprocess.CalledProcessError(done.returncode, words, said)
    return done.stdout


def install_torch(version: str) -> Path:
    """The site-packages of an environment that holds this torch and no Triton."""
    folder = WORK / f"torch-{version}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        call(sys.executable, "-m", "venv", folder)
        call(python, "-m", "pip", "install", "-q", f"torch=={version}", "setuptools>=77")
        call(python, "-m", "pip", "uninstall", "-q", "-y", "triton")
        (folder / "complete").touch()
    return Path(
        call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )


def install_triton() -> Path:
    folder = WORK / "packages-triton"  # under its own name it would import from here
    if not (folder / "triton").is_dir():
        call(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "-t", folder, "triton")
    return folder


def build_archive(packages: Path) -> Path:
    folder = WORK / "archive"
    shutil.rmtree(folder, ignore_errors=True)
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    call(python_of(packages), "-c", code, folder, folder=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def build_wheel(packages: Path, archive: Path) -> Path:
    folder = WORK / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    words = ("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, archive)
    environment = {**os.environ, "FUSED_MLP_CPU": "1", "FUSED_MLP_CUDA": "0", **with_compilers()}
    call(python_of(packages), "-m", "pip", *words, environment=environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(archive: Path) -> Path:
    """The tree of an editable install: what the archive holds, so the archive is complete."""
    shutil.unpack_archive(archive, BUILDS)
    tree = BUILDS / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    return (BUILDS / archive.name.removesuffix(".tar.gz")).rename(tree)


def python_of(packages: Path) -> Path:
    return packages.parents[2] / "bin" / "python"


# Called where the sources lie, a compiler sees the same words whoever calls it, and ccache the same
# paths relative to BUILDS.
COMPILER = """#!/bin/sh
for word; do case $word in */csrc/*) cd "${{word%%/csrc/*}}"; esac; done
exec {ccache} {real} "$@" -O1
"""


def with_compilers() -> dict[str, str]:
    """Return variables that put compilers on PATH which take little time."""
    folder = WORK / "compilers"
    folder.mkdir(exist_ok=True)
    for name in ("g++", "nvcc"):
        if real := shutil.which(name):
            text = COMPILER.format(ccache=shutil.which("ccache") or "", real=real)
            program = folder / name
            if not program.exists() or program.read_text() != text:  # ccache notes its time
                program.write_text(text)
                program.chmod(0o755)
    return {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "TMPDIR": str(BUILDS),
        "CCACHE_DIR": str(WORK / "ccache"),
        "CCACHE_BASEDIR": str(BUILDS),
        "CCACHE_NOHASHDIR": "1",
    }


class Environment:
    """A new virtual environment that sees one torch, and of the tools only those named."""

    def __init__(self, torch: Path, tools: frozenset[str], triton: Path) -> None:
        self.folder, self.tools, self.torch = WORK / "environment", tools, torch
        shutil.rmtree(self.folder, ignore_errors=True)
        call(sys.executable, "-m", "venv", "--without-pip", self.folder)
        self.python = self.folder / "bin" / "python"
        self.packages = self.folder / torch.relative_to(torch.parents[2])
        seen = [str(torch), *([str(triton)] if "triton" in tools else [])]
        (self.packages / "seen.pth").write_text("\n".join(seen) + "\n")
        settings = with_compilers()
        self.variables = {
            **{name: text for name, text in os.environ.items() if not name.startswith("FUSED_MLP")},
            **settings,
            "PATH": str(self.show_programs(settings["PATH"])),
            "FUSED_MLP_CACHE": str(self.folder / "cache"),
            # left to itself an install beside torch's build for the CPU leaves CUDA out
            "FUSED_MLP_CUDA": "1" if {"g++", "nvcc"} <= tools else "auto",
            "FUSED_MLP_CUDA_ARCHS": "75",  # one is as good as eight here
            # a folder without nvcc hides the one in /usr/local/cuda
            "CUDA_HOME": "" if "nvcc" in tools else str(self.folder),
            "CUDA_PATH": "",
        }
        for name in ("PYTHONPATH", "CXX"):
            self.variables.pop(name, None)

    def show_programs(self, path: str) -> Path:
        """A folder with links to the programs on PATH, less the tools that are to be missing."""
        shown = self.folder / "programs"
        shown.mkdir()
        hidden = {name for tool in PROGRAMS if tool not in self.tools for name in PROGRAMS[tool]}
        for folder in map(Path, path.split(os.pathsep)):
            for program in folder.iterdir() if folder.is_dir() else ():
                plain = program.name.split("-linux-gnu-")[-1].rstrip("-.0123456789")
                if plain not in hidden and not (shown / program.name).exists():
                    (shown / program.name).symlink_to(program)
        return shown

    def run(self, *words: str | Path) -> str:
        return call(self.python, *words, environment=self.variables)

    def install(self, source: Path, editable: bool) -> None:
        for stale in source.glob("fused_mlp/_C_*") if editable else ():
            stale.unlink()
        words = ("--no-deps", "--no-build-isolation", "--ignore-installed")
        self.run("-m", "pip", "install", "-q", *words, *(["-e"] if editable else []), source)

    def check(self, torch: str, kind: str) -> tuple[str, str]:
        """What runs the CPU's ops, and whether there is a CUDA library.

        Raises AssertionError where the doctor says anything that is not so.
        """
        location = Path(self.run("-c", USE).splitlines()[-1])
        assert location.is_relative_to(BUILDS / "tree" if kind == "editable" else self.folder)
        report: dict[str, Any] = json.loads(self.run("-m", "fused_mlp", "doctor", "--json"))
        assert report["problems"] == [], report["problems"]
        assert report["torch"]["version"].split("+")[0] == torch, report["torch"]
        found = {"g++": "c++ compiler", "nvcc": "nvcc", "ninja": "ninja"}
        for tool, name in found.items():
            state = report["tools"][name]
            assert bool(state["path"]) == (tool in self.tools), f"{tool}: {state}"
            assert state["path"] or (state["reason"] and state["remedy"]), f"{tool}: {state}"
        assert bool(report["triton"]["version"]) == ("triton" in self.tools), report["triton"]
        states = {(s["device"], s["name"]): s for s in report["backends"]}
        native = states["cpu", "native"]
        assert native["available"] == (kind == "wheel" or "g++" in self.tools), native
        if not native["available"]:
            assert "no C++ compiler" in native["detail"] and native["remedy"], native
        active = [s["name"] for (device, _), s in states.items() if device == "cpu" and s["active"]]
        assert active == ["native" if native["available"] else "reference"], active
        library = (location.parent / "_C_cuda.so").is_file()
        assert library == (kind != "wheel" and {"g++", "nvcc"} <= self.tools)
        return active[0], "yes" if library else "no"


if __name__ == "__main__":
    sys.exit(main())
