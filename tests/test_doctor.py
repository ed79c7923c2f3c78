"""``python -m fused_mlp doctor``: with a compiler, without one, and when the package is broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_mlp import _build, doctor, on_chip

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = {"fused_mlp", "python", "platform", "torch", "cpu", "gpus", "triton", "tools"}
SECTIONS |= {"backends", "cache", "environment", "self_test", "problems"}


def run(
    *arguments: str, folder: Path, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "fused_mlp", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "FUSED_MLP_BACKEND": "auto", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The folder above a package installed without any library, its cache empty."""
    ignore = shutil.ignore_patterns("_C_*", "__pycache__")
    shutil.copytree(ROOT / "fused_mlp", tmp_path / "fused_mlp", ignore=ignore)
    for room in ("csrc", "kernels"):
        shutil.copytree(_room(room), tmp_path / "fused_mlp" / room, ignore=ignore)
    return tmp_path


def _room(name: str) -> Path:
    return _build.source_root().parent / name


def native_on_cpu(report: dict[str, Any]) -> dict[str, Any]:
    (state,) = (
        state
        for state in report["backends"]
        if (state["device"], state["name"]) == ("cpu", "native")
    )
    return dict(state)


@pytest.mark.smoke
@pytest.mark.skipif(_build.find_cxx().path is None, reason="no C++ compiler")
def test_with_the_compiled_kernels() -> None:
    report = json.loads(run("doctor", "--json", folder=ROOT).stdout)
    assert set(report) == SECTIONS
    assert report["problems"] == []
    assert report["torch"]["version"] == torch.__version__
    assert report["cpu"]["isa"] in ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")
    assert report["cpu"]["blas"] is on_chip.runs_blas()
    for blas, words in (("0", False), ("1", True)):
        text = run("doctor", folder=ROOT, FUSED_MLP_CPU_BLAS=blas).stdout
        assert ("and torch for large products" in text) is words
    state = native_on_cpu(report)
    assert state["available"]
    assert state["active"]
    assert Path(state["detail"]).is_file()  # where the library lies
    assert report["cpu"]["isa"] in state["library"]["isas"]


def test_without_a_compiler(bare: Path) -> None:
    """Everything runs on the reference; the report says what is missing and what to install."""
    clean = {"CXX": "", "PATH": str(bare), "FUSED_MLP_CACHE": str(bare / "cache")}
    report = json.loads(run("doctor", "--json", folder=bare, **clean).stdout)
    assert report["fused_mlp"]["location"] == str(bare / "fused_mlp")
    assert report["problems"] == []
    assert report["cpu"]["isa"] is None
    assert report["cpu"]["blas"] is False
    state = native_on_cpu(report)
    assert not state["available"]
    assert "no C++ compiler" in state["detail"]
    assert state["remedy"]
    active = [s["name"] for s in report["backends"] if s["device"] == "cpu" and s["active"]]
    assert active == ["reference"]

    text = run("doctor", folder=bare, **clean).stdout
    assert "no C++ compiler" in text
    assert "reference backend" in text
    assert state["remedy"] in text


def test_with_a_compiler_that_may_not_be_used(bare: Path) -> None:
    environment = {"FUSED_MLP_JIT": "0", "FUSED_MLP_CACHE": str(bare / "cache")}
    report = json.loads(run("doctor", "--json", folder=bare, **environment).stdout)
    state = native_on_cpu(report)
    assert not state["available"]
    assert not (bare / "cache").exists()
    assert report["environment"]["FUSED_MLP_JIT"] == "0"


def test_text_names_every_part() -> None:
    text = doctor.render(doctor.collect())
    for word in ("fused_mlp", "Python", "torch", "CPU", "kernels use", "GPU", "Triton"):
        assert word in text
    for word in ("c++ compiler", "nvcc", "ninja", "cache", "Backends", "native", "reference"):
        assert word in text
    assert "Self test" in text


@pytest.mark.parametrize("triton", ["3.9.0", ""])
def test_without_nvcc(monkeypatch: pytest.MonkeyPatch, triton: str) -> None:
    """It says which kernels NVIDIA GPUs get, and how nvcc comes from PyPI."""
    missing = _build.Tool(None, "no nvcc", "run: pip install 'fused_mlp[cuda-build]'")
    monkeypatch.setattr(doctor._build, "find_nvcc", lambda: missing)
    monkeypatch.setattr(doctor._build, "installed_library", lambda kind: None)
    monkeypatch.setattr(
        doctor, "_triton", lambda: {"version": triton, "reason": "not installed", "remedy": ""}
    )
    text = doctor.render(doctor.collect())
    serves = "the Triton kernels serve" if triton else "plain PyTorch serves"
    assert f"NVIDIA GPUs do without the CUDA C++ kernels: {serves}" in text
    assert "pip install 'fused_mlp[cuda-build]'" in text
    monkeypatch.undo()
    if _build.find_nvcc().path:
        assert "NVIDIA GPUs do without" not in doctor.render(doctor.collect())


def test_a_wheel_with_cuda_kernels_on_a_machine_without_gpu(bare: Path) -> None:
    """GPUs would run the library that is there: nothing is missing because no nvcc is."""
    (bare / "fused_mlp" / "_C_cuda.so").touch()
    facts = {"architectures": ["sm_80", "sm_90"], "compiler": "nvcc"}
    (bare / "fused_mlp" / "_C_cuda.json").write_text(json.dumps(facts))
    clean = {"PATH": str(bare), "CUDA_HOME": str(bare), "CUDA_VISIBLE_DEVICES": ""}
    text = run("doctor", folder=bare, FUSED_MLP_JIT="0", **clean).stdout
    assert "NVIDIA GPUs do without" not in text
    assert "for sm_80, sm_90; built with nvcc" in text


def test_wrong_numbers_are_a_broken_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"relu": (lambda x: x + 1, lambda x: x), "raises": (lambda x: x[99], lambda x: x)}
    monkeypatch.setattr(doctor, "_cases", lambda device: wrong)
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "BROKEN" in printed
    assert "relu on cpu: AssertionError" in printed
    assert "raises on cpu: IndexError" in printed


def test_a_part_that_raises_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> list[Any]:
        raise RuntimeError("library in pieces")

    monkeypatch.setattr(doctor.backends, "status", broken)
    assert doctor.main(["--json"]) == 1
    assert "library in pieces" in json.loads(capsys.readouterr().out)["problems"][0]


def test_usage() -> None:
    assert "doctor" in run("--help", folder=ROOT).stdout
    assert "unknown command" in run("surgeon", folder=ROOT, code=2).stderr
