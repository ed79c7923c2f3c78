"""fused_mlp._build: what is compiled how, incremental builds, the cache, and what cannot be built.

A small tree of sources stands in for csrc/, so that every test takes a second or two; the libraries
that the package really has are looked at with nm.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fused_mlp import _build
from fused_mlp._build import plan, runner, toolchain

ROOT = Path(__file__).resolve().parent.parent
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


# ------------------------------------------------------------------- the package's libraries


def foreign_symbols(library: Path) -> list[str]:
    """Undefined symbols of torch's C++ ABI, which changes with every release."""
    listing = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", str(library)], capture_output=True, text=True
    )
    assert listing.returncode == 0
    assert "aoti_torch" in listing.stdout  # it is a library for torch, and nm read it
    return re.findall(r".*\b(?:at|c10|torch)::.*", listing.stdout)


@pytest.mark.smoke
@needs_nm
@needs_compiler
def test_cpu_library_uses_the_stable_abi_alone() -> None:
    """One undefined at:: or c10:: symbol, and the library fails to load under the next torch."""
    assert foreign_symbols(_build.library_path("cpu")) == []


@pytest.mark.slow
@needs_nm
@needs_compiler
@pytest.mark.skipif(_build.find_nvcc().path is None, reason="no nvcc")
def test_cuda_library_uses_the_stable_abi_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_MLP_CUDA_ARCHS", "90")
    library = tmp_path / "_C_cuda.so"
    _build.build_library("cuda", _build.source_root(), tmp_path / "objects", library)
    assert foreign_symbols(library) == []


@pytest.mark.smoke
@needs_compiler
def test_cpu_library_is_there() -> None:
    library = _build.library_path("cpu")
    facts = _build.describe(library)
    assert facts["fingerprint"] == plan.fingerprint("cpu", _build.source_root())
    assert facts["isas"][0] == "baseline"


# ------------------------------------------------------------------------------------- plan


@needs_compiler
def test_kernels_are_compiled_once_per_instruction_set(csrc: Path, tmp_path: Path) -> None:
    made = plan.make_plan("cpu", csrc, tmp_path)
    known = plan.ISA_FLAGS.get(toolchain.machine(), {})
    isas = [name for name in ("baseline", *known) if name != "avx512_bf16"]
    assert [unit.source.name for unit in made.units] == ["entry.cpp"] + ["kernel.cpp"] * len(isas)
    assert made.facts["isas"] == ["baseline", *known]
    for isa, unit in zip(isas, made.units[1:], strict=True):
        assert f"-DFUSED_MLP_ISA={isa}" in unit.command
        assert ("-mavx512f" in unit.command) == (isa == "avx512")
        assert ("-mavx2" in unit.command) == (isa in ("avx2", "avx512"))
    for unit in made.units:
        for isa in known:
            assert f"-DFUSED_MLP_HAS_{isa.upper()}" in unit.command
        assert not {"-march=native", "-ffast-math"} & set(unit.command)


@needs_compiler
@pytest.mark.skipif(toolchain.machine() != "x86_64", reason="an instruction set of x86-64")
def test_kernels_of_bfloat16_are_compiled_for_its_instructions_alone(
    csrc: Path, tmp_path: Path
) -> None:
    (csrc / "cpu/kernels/bfloat16").mkdir()
    (csrc / "cpu/kernels/bfloat16/pairs.cpp").write_text("int pairs;\n")
    made = plan.make_plan("cpu", csrc, tmp_path)
    (unit,) = (unit for unit in made.units if unit.source.name == "pairs.cpp")
    assert "-DFUSED_MLP_ISA=avx512_bf16" in unit.command
    assert "-mavx512bf16" in unit.command
    assert made.units[-1] is unit


@needs_compiler
def test_objects_for_older_processors_are_linked_first(csrc: Path, tmp_path: Path) -> None:
    """The linker keeps the first copy of an inline function; it must run on every processor."""
    (csrc / "cpu/kernels/another.cpp").write_text("int another;\n")
    link = plan.make_plan("cpu", csrc, tmp_path).link
    order = [Path(word).name.split(".")[-2] for word in link if word.endswith(".o")]
    rank = {"entry": 0, "baseline": 1, "avx2": 2, "avx512": 3}
    assert [rank[name] for name in order] == sorted(rank[name] for name in order)


@needs_compiler
def test_an_instruction_set_the_compiler_refuses_is_left_out(
    csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "machine", lambda: "x86_64")
    (csrc / "cpu/kernels/bfloat16").mkdir()
    (csrc / "cpu/kernels/bfloat16/pairs.cpp").write_text("int pairs;\n")
    for refused, left in (("-mavx512f", ["avx2"]), ("-mavx512bf16", ["avx2", "avx512"])):
        monkeypatch.setattr(plan, "accepts", lambda compiler, flags, no=refused: no not in flags)
        made = plan.make_plan("cpu", csrc, tmp_path)
        assert made.facts["isas"] == ["baseline", *left]
        for unit in made.units:
            assert unit.source.name != "pairs.cpp"
            assert "-DFUSED_MLP_HAS_AVX512_BF16" not in unit.command
            assert ("-DFUSED_MLP_HAS_AVX512" in unit.command) == ("avx512" in left)


@needs_compiler
def test_warnings_are_errors_only_when_asked(
    csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FUSED_MLP_WERROR", raising=False)
    assert "-Werror" not in plan.make_plan("cpu", csrc, tmp_path).units[0].command
    monkeypatch.setenv("FUSED_MLP_WERROR", "1")
    assert "-Werror" in plan.make_plan("cpu", csrc, tmp_path).units[0].command


def test_fingerprint_follows_sources_and_headers(csrc: Path) -> None:
    first = plan.fingerprint("cpu", csrc)
    (csrc / "cuda").mkdir()
    (csrc / "cuda/other.cu").write_text("")
    assert plan.fingerprint("cpu", csrc) == first
    (csrc / "common/answer.h").write_text("inline int answer() { return 43; }\n")
    assert plan.fingerprint("cpu", csrc) != first


@pytest.mark.parametrize(
    ("wanted", "gpus", "native", "expected"),
    [
        ("", (), False, ["75", "80", "90"]),  # nvcc below does not know the others
        ("90;80", (), False, ["80", "90"]),
        ("80,90", (), False, ["80", "90"]),
        ("native", ("90",), False, ["90"]),
        ("", ("90",), True, ["90"]),
        ("", (), True, ["75", "80", "90"]),
        ("80", ("90",), True, ["80"]),
    ],
)
def test_gpu_architectures(
    wanted: str,
    gpus: tuple[str, ...],
    native: bool,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FUSED_MLP_CUDA_ARCHS", wanted)
    monkeypatch.setattr(plan, "nvcc_architectures", lambda nvcc: frozenset({"75", "80", "90"}))
    monkeypatch.setattr(plan, "gpu_architectures", lambda: gpus)
    assert plan.cuda_architectures(Path("nvcc"), native) == expected


@pytest.mark.parametrize("wanted", ["77", "80;abc", "native"])
def test_gpu_architectures_that_cannot_be_had(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_MLP_CUDA_ARCHS", wanted)
    monkeypatch.setattr(plan, "nvcc_architectures", lambda nvcc: frozenset({"80"}))
    monkeypatch.setattr(plan, "gpu_architectures", lambda: ())
    with pytest.raises(_build.BuildUnavailable) as caught:
        plan.cuda_architectures(Path("nvcc"))
    assert caught.value.remedy


@pytest.mark.skipif(_build.find_nvcc().path is None, reason="no nvcc")
@needs_compiler
def test_cuda_plan(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_MLP_CUDA_ARCHS", "80;90")
    (csrc / "cuda").mkdir()
    (csrc / "cuda/some.cu").write_text("")
    made = plan.make_plan("cuda", csrc, tmp_path)
    command = " ".join(made.units[0].command)
    assert "-cudart static" in command
    assert "code=sm_80" in command
    assert "code=compute_90" in command  # PTX, for GPUs that come later
    assert "code=compute_80" not in command
    assert "-ltorch_cuda" not in made.link


# ----------------------------------------------------------------------------------- running


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
    isas = 1 + len([n for n in plan.ISA_FLAGS.get(toolchain.machine(), {}) if n != "avx512_bf16"])
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


# --------------------------------------------------------------- first use: the user's cache


@needs_compiler
def test_first_use_builds_in_the_cache_once(
    installed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = counting_compiler(tmp_path, monkeypatch)
    library = installed.library_path("cpu")
    assert library.is_relative_to(tmp_path / "cache")
    count = compiled()
    assert count > 0
    assert installed.library_path("cpu") == library
    assert compiled() == count
    assert sorted(path.suffix for path in library.parent.iterdir()) == [".json", ".lock", ".so"]


@needs_compiler
def test_prebuilt_library_is_preferred(installed: ModuleType, tmp_path: Path) -> None:
    prebuilt = tmp_path / "site/fused_mlp/_C_cpu.so"
    prebuilt.touch()
    assert installed.library_path("cpu") == prebuilt


def test_no_compiler(installed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(installed.BuildUnavailable, match="no C\\+\\+ compiler") as caught:
        installed.library_path("cpu")
    assert caught.value.remedy


def test_no_compiler_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    tool = _build.find_cxx()
    assert tool.path is None
    assert "no C++ compiler" in tool.reason
    assert tool.remedy


@needs_compiler
def test_first_use_can_be_forbidden(installed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_MLP_JIT", "0")
    with pytest.raises(installed.BuildUnavailable, match="FUSED_MLP_JIT=0"):
        installed.library_path("cpu")


@needs_compiler
def test_a_failed_build_is_remembered(
    installed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that finds a failure on record says so at once and compiles nothing."""
    broken = tmp_path / "site/fused_mlp/csrc/cpu/broken.cpp"
    broken.write_text("#error this cannot be\n")
    compiled = counting_compiler(tmp_path, monkeypatch)
    for attempt in range(2):
        with pytest.raises(installed.BuildFailed, match="this cannot be") as caught:
            installed.library_path("cpu")
        if attempt == 0:
            count = compiled()
    assert compiled() == count
    record = re.search(r"\S+\.failed", caught.value.remedy)
    assert record is not None
    assert "#error this cannot be" in Path(record[0]).read_text()
    broken.unlink()
    assert installed.library_path("cpu").is_file()


@needs_compiler
def test_cache_that_cannot_be_written(
    installed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSED_MLP_CACHE", str(tmp_path / "file"))
    with pytest.raises(installed.BuildUnavailable, match="cannot be written") as caught:
        installed.library_path("cpu")
    assert "FUSED_MLP_CACHE" in caught.value.remedy


on_posix = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


@needs_compiler
@on_posix
def test_cache_that_others_may_write_to_is_refused(
    installed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_MLP_CACHE", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(installed.BuildUnavailable, match="other users may write") as caught:
        installed.library_path("cpu")
    assert "chmod go-w" in caught.value.remedy
    tmp_path.chmod(0o755)
    assert installed.library_path("cpu").is_file()
    tmp_path.chmod(0o777)  # nor is a library taken from there that others may have replaced
    with pytest.raises(installed.BuildUnavailable, match="other users may write"):
        installed.library_path("cpu")


@needs_compiler
@on_posix
def test_cache_is_made_for_its_user_alone(installed: ModuleType) -> None:
    folder = installed.library_path("cpu").parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@on_posix
@pytest.mark.parametrize(
    ("mode", "owner", "group", "taken"),
    [
        (0o755, 0, 0, True),
        (0o775, 0, 0, True),  # the user's own group
        (0o775, 0, 12345, False),
        (0o1777, 0, 0, True),  # as /tmp: others can add files and not replace ours
        (0o777, 0, 0, False),
        (0o755, 12345, 0, False),
    ],
)
def test_folders_above_the_cache_count(
    installed: ModuleType, tmp_path: Path, mode: int, owner: int, group: int, taken: bool
) -> None:
    """Whoever can rename a folder above the cache can put another in its place."""
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    above = tmp_path / "above"
    folder = above / "root" / "fingerprint"
    folder.mkdir(parents=True)
    os.chown(above, owner, group)
    above.chmod(mode)
    check = sys.modules[f"{installed.__name__}.library"]._check_private
    if taken:
        assert check(folder) == folder.resolve()
        return
    with pytest.raises(installed.BuildUnavailable, match="other users may write") as caught:
        check(folder)
    assert str(above) in caught.value.reason
    assert caught.value.remedy


@on_posix
def test_cache_is_looked_for_behind_links(installed: ModuleType, tmp_path: Path) -> None:
    """Who owns a link can turn it elsewhere after the check: what is used has no link in it."""
    folder = tmp_path / "real" / "fingerprint"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    check = sys.modules[f"{installed.__name__}.library"]._check_private
    assert check(tmp_path / "link" / "fingerprint") == folder.resolve()


@needs_compiler
def test_processes_that_start_together_build_once(
    installed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = counting_compiler(tmp_path, monkeypatch)
    script = tmp_path / "use.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import importlib.util, sys
            folder = {str(tmp_path / "site/fused_mlp/_build")!r}
            spec = importlib.util.spec_from_file_location(
                "b", folder + "/__init__.py", submodule_search_locations=[folder])
            module = importlib.util.module_from_spec(spec)
            sys.modules["b"] = module
            spec.loader.exec_module(module)
            print(module.library_path("cpu"))
            """
        )
    )
    running = [
        subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(printed) == 1
    isas = set(_build.describe(Path(printed.pop().strip()))["isas"]) - {"avx512_bf16"}
    assert compiled() == 1 + len(isas)


# ---------------------------------------------------------------------------------- checkout


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


# --------------------------------------------------------------------------------- toolchain


def test_torch_is_found_where_an_isolated_build_hides_it(tmp_path: Path) -> None:
    """pip's isolated build takes site-packages off sys.path."""
    script = textwrap.dedent(
        f"""
        import importlib.util, sys
        sys.path[:] = [entry for entry in sys.path if not entry.endswith("-packages")]
        folder = {str(ROOT / "fused_mlp/_build")!r}
        spec = importlib.util.spec_from_file_location(
            "b", folder + "/__init__.py", submodule_search_locations=[folder])
        module = importlib.util.module_from_spec(spec)
        sys.modules["b"] = module
        spec.loader.exec_module(module)
        assert importlib.util.find_spec("torch") is None
        assert "torch" not in sys.modules
        print(module.find_torch().path)
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    import torch

    assert Path(result.stdout.strip()).samefile(Path(torch.__file__).parent)


@pytest.mark.parametrize(("version", "taken"), [("2.12.1", False), ("2.13.0", True), ("3.0", True)])
def test_torch_older_than_the_target_is_refused(
    version: str, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = tmp_path / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (tmp_path / "torch/version.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain, "site_folders", lambda: [tmp_path])
    tool = _build.find_torch()
    assert (tool.path is not None) == taken
    assert taken or "older than 2.13" in tool.reason


def test_nvcc_from_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia/cu13/bin/nvcc"
    program.parent.mkdir(parents=True)
    program.touch()
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain, "site_folders", lambda: [tmp_path])
    monkeypatch.setattr(toolchain, "CUDA_FOLDER", tmp_path / "no-toolkit")
    assert _build.find_nvcc().path == program
    monkeypatch.setattr(toolchain, "site_folders", list)
    missing = _build.find_nvcc()
    assert missing.path is None
    assert "cuda-build" in missing.remedy


def test_a_toolkit_named_by_hand_is_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with CXX: another nvcc in its place could be of another version."""
    executable(tmp_path / "nvcc", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    missing = _build.find_nvcc()
    assert missing.path is None
    assert f"CUDA_HOME={tmp_path / 'elsewhere'}" in missing.reason
    assert "CUDA_HOME" in missing.remedy
    monkeypatch.setenv("CUDA_HOME", "")
    assert _build.find_nvcc().path == tmp_path / "nvcc"


def test_compiler_with_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = executable(tmp_path / "ccache", 'exec "$@"\n')
    monkeypatch.setenv("CXX", f"{launcher} g++")
    assert _build.find_cxx().command == [str(launcher), "g++"]
