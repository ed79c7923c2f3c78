"""A small tree of sources that stands in for csrc/, and copies of the package that build it."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import stat
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fused_mlp import _build

ROOT = Path(__file__).resolve().parent.parent

# Instruction sets that compile the kernels of csrc/cpu/kernels/bfloat16 alone.
OF_BFLOAT16 = {"avx512_bf16", "amx_bf16"}

_names = itertools.count()

needs_compiler = pytest.mark.skipif(_build.find_cxx().path is None, reason="no C++ compiler")

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    """A tree like csrc/ with one unit of either sort and a header."""
    return write_sources(tmp_path / "csrc")


def write_sources(root: Path) -> Path:
    files = {
        "common/answer.h": "#pragma once\ninline int answer() { return 42; }\n",
        "cpu/entry.cpp": """
            #include <torch/csrc/stable/library.h>
            int kernel_baseline();
            extern "C" __attribute__((visibility("default"))) int fused_mlp_answer() {
              return kernel_baseline();
            }
        """,
        "cpu/kernels/kernel.cpp": """
            #include "common/answer.h"
            #define JOIN_(a, b) a##b
            #define JOIN(a, b) JOIN_(a, b)
            int JOIN(kernel_, FUSED_MLP_ISA)() { return answer(); }
        """,
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return root


def loads_by_path(folder: Path) -> str:
    """Python that loads the package ``_build`` in ``folder`` alone, as ``module``."""
    return textwrap.dedent(
        f"""
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location(
            "b", {str(folder / "__init__.py")!r}, submodule_search_locations=[{str(folder)!r}])
        module = importlib.util.module_from_spec(spec)
        sys.modules["b"] = module
        spec.loader.exec_module(module)
        """
    )


def load_copy(package: Path) -> ModuleType:
    """fused_mlp._build as a package lying at ``package`` sees itself."""
    name = f"_build_copy_{next(_names)}"
    spec = importlib.util.spec_from_file_location(
        name, package / "_build/__init__.py", submodule_search_locations=[str(package / "_build")]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """_build of a package installed without a library, with an empty cache."""
    package = tmp_path / "site" / "fused_mlp"
    shutil.copytree(ROOT / "fused_mlp/_build", package / "_build")
    write_sources(package / "csrc")
    monkeypatch.setenv("FUSED_MLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSED_MLP_JIT", raising=False)
    return load_copy(package)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """_build of a package that runs from a checkout."""
    shutil.copytree(ROOT / "fused_mlp/_build", tmp_path / "fused_mlp" / "_build")
    write_sources(tmp_path / "csrc")
    (tmp_path / "setup.py").touch()
    monkeypatch.delenv("FUSED_MLP_JIT", raising=False)
    return load_copy(tmp_path / "fused_mlp")


def counting_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Sets CXX to a compiler that counts the units it compiles; returns the counter."""
    log = folder / "compiled.log"
    log.touch()
    real = _build.find_cxx().command
    script = executable(
        folder / "counting-g++",
        f'case "$*" in *" -c "*) echo x >> "{log}";; esac\nexec {" ".join(real)} "$@"\n',
    )
    monkeypatch.setenv("CXX", str(script))
    return lambda: len(log.read_text().splitlines())


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
