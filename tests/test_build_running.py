"""Builds that run: with and without ninja, how many at once, only what changed."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
from build_fixtures import (  # noqa: F401
    OF_BFLOAT16,
    checkout,
    counting_compiler,
    csrc,
    executable,
    needs_compiler,
)

from fused_mlp import _build
from fused_mlp._build import plan, runner, toolchain


@needs_compiler
@pytest.mark.parametrize("ninja", ["0", "1"])
def test_builds_with_and_without_ninja_and_only_what_changed(
    ninja: str, csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ninja == "1" and _build.find_ninja().path is None:
        pytest.skip("no ninja")
    monkeypatch.setenv("FUSED_MLP_NINJA", ninja)
    compiled = counting_compiler(tmp_path, monkeypatch)
    output = tmp_path / "out" / "_C_cpu.so"

    def build() -> int:
        before = compiled()
        _build.build_library("cpu", csrc, tmp_path / "objects", output)
        return compiled() - before

    # The instruction sets that compile every kernel.
    isas = 1 + len(plan.ISA_FLAGS.get(toolchain.machine(), {}).keys() - OF_BFLOAT16)
    assert build() == 1 + isas
    assert output.is_file()
    assert build() == 0
    os.utime(csrc / "cpu/entry.cpp")
    assert build() == 1
    os.utime(csrc / "common/answer.h")  # only the kernels include it
    assert build() == isas
    assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []


def test_max_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, jobs in {"1": 1, "7": 7}.items():
        monkeypatch.setenv("MAX_JOBS", text)
        assert _build.max_jobs() == jobs
    for text in ("", "0", "many"):
        monkeypatch.setenv("MAX_JOBS", text)
        assert _build.max_jobs() >= 1


@needs_compiler
def test_ninja_is_told_max_jobs(
    csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = executable(tmp_path / "ninja", f'echo "$@" > {tmp_path}/words\n')
    monkeypatch.setattr(runner, "find_ninja", lambda: toolchain.Tool(program))
    monkeypatch.setenv("MAX_JOBS", "3")
    monkeypatch.setenv("FUSED_MLP_NINJA", "1")
    runner.run(plan.make_plan("cpu", csrc, tmp_path / "objects"))
    assert (tmp_path / "words").read_text().split()[-2:] == ["-j", "3"]


@needs_compiler
@pytest.mark.parametrize("jobs", [1, 2])
def test_thread_pool_keeps_to_max_jobs(
    jobs: int, csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each compiler leaves a file while it runs; no more than MAX_JOBS are ever seen."""
    running = tmp_path / "running"
    running.mkdir()
    script = executable(
        tmp_path / "g++",
        f'case "$*" in *" -c "*) touch {running}/$$; ls {running} | wc -l >> {tmp_path}/seen;\n'
        f'sleep 0.1; rm {running}/$$; esac\nexec {" ".join(_build.find_cxx().command)} "$@"\n',
    )
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("MAX_JOBS", str(jobs))
    monkeypatch.setenv("FUSED_MLP_NINJA", "0")
    for number in range(3):
        (csrc / f"cpu/unit{number}.cpp").write_text(f"int unit{number};\n")
    _build.build_library("cpu", csrc, tmp_path / "objects", tmp_path / "_C_cpu.so")
    seen = [int(line) for line in (tmp_path / "seen").read_text().split()]
    assert max(seen) == jobs


def test_ninja_file_escapes_paths(tmp_path: Path) -> None:
    folder = tmp_path / "with space $and:colon"
    unit = plan.Unit(folder / "a.cpp", folder / "a.o", ("g++", str(folder)))
    text = runner.ninja_file(plan.Plan([unit], ("g++", "-shared"), folder / "x.so"))
    assert "with$ space$ $$and$:colon/a.o: compile" in text
    assert "words = g++ '" in text


@needs_compiler
def test_checkout_rebuilds_what_is_out_of_date(checkout: ModuleType, tmp_path: Path) -> None:
    library = checkout.library_path("cpu")
    assert library == tmp_path / "fused_mlp/_C_cpu.so"
    made = library.stat().st_mtime_ns
    assert checkout.library_path("cpu").stat().st_mtime_ns == made
    (tmp_path / "csrc/common/answer.h").write_text("inline int answer() { return 43; }\n")
    assert checkout.library_path("cpu").stat().st_mtime_ns > made


@needs_compiler
def test_checkout_says_what_is_out_of_date_where_it_must_not_build(
    checkout: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = checkout.library_path("cpu")
    (tmp_path / "csrc/common/answer.h").write_text("inline int answer() { return 43; }\n")
    monkeypatch.setenv("FUSED_MLP_JIT", "0")
    with pytest.warns(RuntimeWarning, match="other sources"):
        assert checkout.library_path("cpu") == library


def test_kind_without_sources(checkout: ModuleType) -> None:
    with pytest.raises(checkout.BuildUnavailable, match="no cuda sources"):
        checkout.library_path("cuda")
    with pytest.raises(ValueError, match="kind must be"):
        checkout.library_path("metal")
