"""scripts/: what they decide without compiling or installing anything."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
pytestmark = pytest.mark.skipif(not SCRIPTS.is_dir(), reason="not a checkout")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_activations_are_those_the_script_writes() -> None:
    pytest.importorskip("mpmath")
    tables = load("activation_tables")
    assert tables.text() == tables.HEADER.read_text()


@pytest.fixture
def barriers() -> ModuleType:
    return load("barriers")


def test_every_barrier_of_the_kernels_is_found(barriers: ModuleType) -> None:
    found = barriers.find_barriers()
    calls = sum(
        line.split("//")[0].count("__sync")
        for path in [*barriers.CUDA.glob("*.cu"), *barriers.CUDA.glob("*.cuh")]
        for line in path.read_text().splitlines()
    )
    assert len(found) == len({barrier.name for barrier in found}) == calls > 30
    assert set(barriers.EXPLAINED) <= {barrier.name for barrier in found}
    for barrier in found:
        assert barriers.units_of(barrier.file), f"no test runs {barrier.file.name}"
    assert set(barriers.TESTS) == set(load_simulator().KERNEL_FILES)


def load_simulator() -> ModuleType:
    import cuda_simulator

    return cuda_simulator


@pytest.mark.parametrize(
    "statement",
    [
        "__syncthreads();",
        "const int any = __syncthreads_or(mine);",
        "__syncwarp();",
        "__syncwarp(mask);",
        "__threadfence_block();",
        "cp_async_wait<1>();",
        'asm volatile("cp.async.wait_group 0;" ::: "memory");',
        'asm volatile("bar.sync 1, 64;");',
    ],
)
def test_barriers_of_every_kind_are_known(barriers: ModuleType, statement: str) -> None:
    assert barriers.BARRIER.search(f"  {statement}")


def test_a_barrier_is_taken_out_wherever_it_was_inlined(
    barriers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = [barriers.Barrier(Path("a.cuh"), line, f"a.cuh:f:{line}") for line in (7, 9)]
    monkeypatch.setattr(barriers, "find_barriers", lambda: here)
    ptx = "\n".join(
        [
            "\t.loc\t2 7 5, function_name $L__info_string0, inlined_at 1 20 3",
            "\tbar.sync \t0;",
            "\tadd.s32 \t%r1, %r2, %r3;",
            "\t.loc\t2 9 5",
            "\tbar.sync \t0;",
            "\t.loc\t2 7 5, function_name $L__info_string0, inlined_at 1 30 3",
            "\tmov.u32 \t%r1, 0;",
            "\tbar.sync \t0;",
            '\t.file\t2 "/somewhere/csrc/cuda/a.cuh"',
        ]
    )
    words = [line.split()[0] for line in barriers.without(ptx, "a.cuh", 7, True).split("\n")]
    assert words == ["add.s32", "bar.sync", "mov.u32"]
    assert barriers.without(ptx, "", 0, True).count("bar.sync") == 3
    with pytest.raises(LookupError, match=r"no barrier of a\.cuh:8"):
        barriers.without(ptx, "a.cuh", 8, True)
    with pytest.raises(LookupError, match=r"a\.cuh:11, where the sources have none"):
        barriers.without(ptx.replace("2 9 5", "2 11 5"), "a.cuh", 7, True)


def test_tools_of_the_install_matrix_are_hidden(tmp_path: Path) -> None:
    matrix = load("install_matrix")
    folder = tmp_path / "bin"
    folder.mkdir()
    names = ("g++", "x86_64-linux-gnu-g++-12", "clang++-15", "ninja", "ninja-build", "nvcc", "ld")
    for name in (*names, "python3.11"):
        (folder / name).touch()
    environment = matrix.Environment.__new__(matrix.Environment)
    shown = {}
    for tools in ({"g++", "ninja"}, {"nvcc"}):
        environment.folder, environment.tools = tmp_path / "-".join(sorted(tools)), tools
        environment.folder.mkdir()
        shown["-".join(sorted(tools))] = {
            path.name for path in environment.show_programs(str(folder)).iterdir()
        }
    assert shown["g++-ninja"] == {*names, "python3.11"} - {"nvcc"}
    assert shown["nvcc"] == {"nvcc", "ld", "python3.11"}


def test_mutants_are_drawn_from_files_that_are_there() -> None:
    mutants = load("mutants")
    for name, group in mutants.GROUPS.items():
        assert mutants.all_mutants(name), name
        for file in group.files:
            assert (mutants.ROOT / file).is_file()
    everywhere = mutants.choose(list(mutants.GROUPS), 104, 0, ["*"])
    assert len(everywhere) == len(set(everywhere)) == 104
    assert mutants.choose(list(mutants.GROUPS), 104, 0, ["*"]) == everywhere
    chosen = mutants.choose(["autograd", "triton"], 20, 0, ["*/ops/over_group.py"])
    assert {mutant.file for mutant in chosen} == {"fused_mlp/ops/over_group.py"}
    for mutant in [*everywhere, *chosen]:
        assert mutant.before != mutant.after
        for file in mutants.tests_for(mutant):
            assert (mutants.ROOT / file).is_file()


def test_the_list_of_components_says_which_version_it_is_of() -> None:
    listing = json.dumps({"metadata": {"component": {"name": "fused_mlp"}}, "components": []})
    named = json.loads(load("sbom").with_version(listing, "1.2.3"))
    assert named["metadata"]["component"] == {"name": "fused_mlp", "version": "1.2.3"}
    assert named["components"] == []


def test_a_mutant_is_killed_by_a_test_without_end_not_by_slow_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutants = load("mutants")
    monkeypatch.setattr(mutants, "COPY", tmp_path)
    monkeypatch.setattr(mutants, "SECONDS", 1)
    (mutant,) = mutants.choose(["triton"], 1, 0, ["*"])
    for name, code, outcome in (
        ("slow", "def test_a(): time.sleep(0.7)\ndef test_b(): time.sleep(0.7)\n", "survived"),
        ("endless", "def test_a():\n    while True: time.sleep(0.1)\n", "killed"),
    ):
        (tmp_path / f"test_{name}.py").write_text(f"import time\n{code}")
        monkeypatch.setattr(mutants, "tests_for", lambda _, name=name: [f"test_{name}.py"])
        by = {"survived": "", "killed": "no end"}[outcome]
        assert mutants.run_tests(mutant) == (outcome, by)


def test_mutants_spare_what_says_how_work_is_cut() -> None:
    mutants = load("mutants")
    scopes = {m.scope for m in mutants.all_mutants("triton") if m.file == "kernels/research_net.py"}
    assert "research_net" in scopes
    assert not scopes & {"shape", "_pad"}


def test_the_thread_sanitizers_tests_are_there() -> None:
    sanitize = load("sanitize")
    found = sanitize.tests_of(sanitize.ROOT, "thread")
    assert {path.stem.removeprefix("test_") for path in found} == set(sanitize.THREADED)
