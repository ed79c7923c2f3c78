"""Installing: wheel, isolated or not, editable, without a compiler; each from a copy of the tree.

The environments see torch through a .pth file, as installing it into each would take minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_mlp import _build

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a checkout"),
]
needs_compiler = pytest.mark.skipif(_build.find_cxx().path is None, reason="no C++ compiler")
LEFT_OUT = (".*", "build", "dist", "*.egg-info", "__pycache__", "_C_*", "results")
PROBE = """
import fused_mlp, fused_mlp.kernels, torch
from fused_mlp import _build, functional
assert functional.normalize(torch.arange(6.0)).shape == (6,)
print(fused_mlp.__file__, fused_mlp.kernels.__file__, _build.source_root(), sep="\\n")
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the sources; tests share it, and so what has been compiled in it."""
    folder = tmp_path_factory.mktemp("tree") / "fused mlp"  # a path with a space
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    yield folder
    shutil.rmtree(folder)


class Environment:
    """A virtual environment that sees this one's packages, and pip in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.packages = folder / "lib" / version / "site-packages"
        paths = sysconfig.get_paths()
        (self.packages / "torch_from.pth").write_text(f"{paths['purelib']}\n")

    def run(self, *words: str, cwd: Path, **environment: str) -> str:
        # A strict build of the caller (FUSED_MLP_CPU=1) would fail where a test has no compiler.
        fresh = {
            "FUSED_MLP_CACHE": str(self.folder / "cache"),
            "FUSED_MLP_BACKEND": "auto",
            "FUSED_MLP_CPU": "auto",
            "FUSED_MLP_CUDA": "0",
        }
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        result = subprocess.run(
            [str(self.python), *words],
            cwd=cwd,
            env={**inherited, **fresh, **environment},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def pip(self, *words: str, cwd: Path, **environment: str) -> str:
        return self.run("-m", "pip", *words, cwd=cwd, **environment)

    def doctor(self, cwd: Path, **environment: str) -> dict[str, Any]:
        output = self.run("-m", "fused_mlp", "doctor", "--json", cwd=cwd, **environment)
        return dict(json.loads(output))


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


def native(report: dict[str, Any]) -> dict[str, Any]:
    states = report["backends"]
    return next(dict(s) for s in states if s["name"] == "native" and s["device"] == "cpu")


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel from an isolated build, in which torch cannot be imported."""
    folder = tmp_path_factory.mktemp("wheel")
    builder = Environment(folder / "builder")
    builder.pip("wheel", ".", "--no-deps", "-w", str(folder), cwd=tree, FUSED_MLP_CPU="1")
    (built,) = folder.glob("*.whl")
    return built


@needs_compiler
def test_wheel_fits_every_python_and_holds_every_room(wheel: Path) -> None:
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("fused_mlp", "py3", "none")
    assert platform not in ("any", "")
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        f"fused_mlp/{path.relative_to(ROOT).as_posix()}"
        for room in ("csrc", "kernels")
        for path in (ROOT / room).rglob("*")
        if path.suffix in {".h", ".cpp", ".cu", ".cuh", ".py"}
    }
    assert sources <= held
    assert {"fused_mlp/_C_cpu.so", "fused_mlp/_C_cpu.json", "fused_mlp/py.typed"} <= held
    assert f"fused_mlp-{version}.dist-info/licenses/LICENSE" in held
    assert not [path for path in held if path.startswith(("tests", "csrc", "kernels", "bench"))]


@needs_compiler
def test_wheel_runs_without_a_compiler(
    wheel: Path, environment: Environment, tmp_path: Path
) -> None:
    environment.pip("install", "--no-deps", "--ignore-installed", str(wheel), cwd=tmp_path)
    package = environment.packages / "fused_mlp"
    report = environment.doctor(tmp_path, CXX="/nonexistent")
    assert report["problems"] == []
    assert native(report)["active"]
    assert native(report)["detail"] == str(package / "_C_cpu.so")
    printed = environment.run("-c", PROBE, cwd=tmp_path).split("\n")
    rooms = ["__init__.py", "kernels/__init__.py", "csrc"]
    assert printed[:3] == [str(package / room) for room in rooms]


@needs_compiler
def test_install_without_isolation(tree: Path, environment: Environment, tmp_path: Path) -> None:
    words = ("install", "--no-build-isolation", "--no-deps", "--ignore-installed", ".")
    environment.pip(*words, cwd=tree, FUSED_MLP_CPU="1")
    state = native(environment.doctor(tmp_path))
    assert state["detail"] == str(environment.packages / "fused_mlp/_C_cpu.so")


@needs_compiler
def test_editable_install(tree: Path, environment: Environment, tmp_path: Path) -> None:
    """kernels/ imports from anywhere, the repository root included; a changed source is rebuilt."""
    environment.pip("install", "--no-deps", "--ignore-installed", "-e", ".", cwd=tree)
    library = tree / "fused_mlp/_C_cpu.so"
    rooms = [str(tree / room) for room in ("fused_mlp/__init__.py", "kernels/__init__.py", "csrc")]
    for folder in (tmp_path, tree):
        assert environment.run("-c", PROBE, cwd=folder).split("\n")[:3] == rooms
        assert native(environment.doctor(folder))["detail"] == str(library)

    made = library.stat().st_mtime_ns
    source = min(tree.glob("csrc/cpu/*.cpp"), key=lambda path: path.stat().st_size)
    source.write_text(source.read_text() + "\n// changed\n")
    assert native(environment.doctor(tmp_path))["available"]
    assert library.stat().st_mtime_ns > made


def test_install_without_a_compiler(environment: Environment, tmp_path: Path) -> None:
    """It succeeds, everything runs on the reference, and the doctor says what is missing."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
    none = {"CXX": "/nonexistent"}
    environment.pip("install", "--no-deps", "--ignore-installed", ".", cwd=tree, **none)
    environment.run("-W", "ignore", "-c", PROBE, cwd=tmp_path, **none)
    report = environment.doctor(tmp_path, **none)
    assert report["problems"] == []
    state = native(report)
    assert not state["available"]
    assert "no C++ compiler" in state["detail"]
    assert state["remedy"]


def test_install_without_nvcc(environment: Environment, tmp_path: Path) -> None:
    """It succeeds, and the doctor says what serves GPUs and where nvcc comes from."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
    toolchain = tree / "fused_mlp" / "_build" / "toolchain.py"  # looks in fixed places too
    text = toolchain.read_text()
    for place in ("/usr/local/cuda", "cu*/bin/nvcc"):
        assert place in text
        text = text.replace(place, "nowhere")
    toolchain.write_text(text)
    none = {"PATH": "/nonexistent", "CUDA_HOME": "", "CUDA_PATH": "", "FUSED_MLP_CPU": "0"}
    words = ("install", "--no-deps", "--ignore-installed", ".")
    environment.pip(*words, cwd=tree, FUSED_MLP_CUDA="auto", **none)
    printed = environment.run("-m", "fused_mlp", "doctor", cwd=tmp_path, **none)
    assert "NVIDIA GPUs do without the CUDA C++ kernels" in printed
    assert "pip install 'fused_mlp[cuda-build]'" in printed


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
@pytest.mark.skipif(_build.find_nvcc().path is None, reason="no nvcc")
def test_install_beside_a_torch_without_cuda_leaves_its_library_out(
    tree: Path, environment: Environment, tmp_path: Path
) -> None:
    """Seven architectures would compile for minutes, for a library that nothing could load."""
    words = ("install", "--no-deps", "--ignore-installed", ".")
    environment.pip(*words, cwd=tree, FUSED_MLP_CPU="0", FUSED_MLP_CUDA="auto")
    report = environment.doctor(tmp_path, FUSED_MLP_JIT="0")
    assert report["tools"]["nvcc"]["path"]
    assert not list(environment.packages.glob("fused_mlp/_C_*"))


def test_import_from_a_checkout_that_is_not_installed(
    environment: Environment, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
    printed = environment.run("-W", "ignore", "-c", PROBE, cwd=tree, CXX="/nonexistent")
    assert printed.split("\n")[1] == str(tree / "kernels/__init__.py")
