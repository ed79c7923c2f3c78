"""The package's libraries, and the plan: what is compiled how."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from build_fixtures import (  # noqa: F401
    OF_BFLOAT16,
    ROOT,
    csrc,
    executable,
    loads_by_path,
    needs_compiler,
    needs_nm,
)

from fused_mlp import _build
from fused_mlp._build import plan, toolchain


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


@needs_compiler
def test_kernels_are_compiled_once_per_instruction_set(csrc: Path, tmp_path: Path) -> None:
    made = plan.make_plan("cpu", csrc, tmp_path)
    known = plan.ISA_FLAGS.get(toolchain.machine(), {})
    isas = [name for name in ("baseline", *known) if name not in OF_BFLOAT16]
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
    units = [unit for unit in made.units if unit.source.name == "pairs.cpp"]
    assert made.units[-len(units) :] == units
    for isa, unit in zip(("avx512_bf16", "amx_bf16"), units, strict=True):
        assert f"-DFUSED_MLP_ISA={isa}" in unit.command
        assert "-mavx512bf16" in unit.command
        assert ("-mamx-bf16" in unit.command) == (isa == "amx_bf16")


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
    for refused, left in (
        ("-mavx512f", ["avx2"]),
        ("-mavx512bf16", ["avx2", "avx512"]),
        ("-mamx-bf16", ["avx2", "avx512", "avx512_bf16"]),
    ):
        monkeypatch.setattr(plan, "accepts", lambda compiler, flags, no=refused: no not in flags)
        made = plan.make_plan("cpu", csrc, tmp_path)
        assert made.facts["isas"] == ["baseline", *left]
        pairs = [unit for unit in made.units if unit.source.name == "pairs.cpp"]
        assert len(pairs) == len(OF_BFLOAT16 & set(left))
        for unit in made.units:
            for isa in plan.ISA_FLAGS["x86_64"]:
                assert (f"-DFUSED_MLP_HAS_{isa.upper()}" in unit.command) == (isa in left)


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


def test_torch_is_found_where_an_isolated_build_hides_it(tmp_path: Path) -> None:
    """pip's isolated build takes site-packages off sys.path."""
    hides = 'import sys\nsys.path[:] = [p for p in sys.path if not p.endswith("-packages")]\n'
    asks = textwrap.dedent(
        """
        assert importlib.util.find_spec("torch") is None
        assert "torch" not in sys.modules
        print(module.find_torch().path)
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", hides + loads_by_path(ROOT / "fused_mlp/_build") + asks],
        capture_output=True,
        text=True,
        cwd=tmp_path,
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


@pytest.mark.parametrize(
    ("line", "lacks"),
    [
        ("cuda: Optional[str] = None", True),  # of torch's own builds
        ("cuda = None", True),
        ("cuda: Optional[str] = '13.0'", False),
        ("cuda = '13.0'", False),
        ("hip: Optional[str] = None", False),  # says nothing of CUDA, so a library is tried
    ],
)
def test_a_torch_without_cuda_is_told_from_others(line: str, lacks: bool, tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\n")
    assert _build.torch_lacks_cuda(tmp_path) == lacks


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
