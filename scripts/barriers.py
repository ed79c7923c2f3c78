"""Deletes each barrier of the CUDA kernels in turn and shows which test notices.

    make barriers
    python scripts/barriers.py gemm.cuh network.cuh:hidden_layers

The kernels are compiled to PTX with line numbers. One barrier of the sources at a time is taken out
of that, wherever it was inlined to, and the kernels' tests run in ptxsim, which faults on races in
shared memory and on reads of unwritten memory. A deletion that no test notices fails the run,
unless EXPLAINED says why it changes nothing. Needs nvcc and no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
# Everything that orders one thread's memory accesses before another's.
BARRIER = re.compile(
    r"(__syncthreads\w*|__syncwarp|__threadfence\w*|\w*cp_async\w*wait\w*|__pipeline_wait\w*)(<.*?>)?\(.*?\);"
    r'|\basm volatile\("(bar|barrier|fence|membar|mbarrier|cp\.async\.\w*wait).*?\);'
)
# What they become in PTX. A shuffle or a vote carries its value with it and is none.
INSTRUCTION = re.compile(
    r"\s*(bar\.(warp\.)?sync|barrier\.|membar|fence|cp\.async\.wait|cp\.async\.bulk\.wait|mbarrier\.)"
)
FUNCTION = re.compile(r"^ *(?:static )?FUSED_MLP_DEVICE .*?\b(\w+)\(")
# The tests of each file of kernels.
TESTS = {
    "standardize.cu": "tests/test_cuda_standardize.py",
    "gemm.cu": "tests/test_cuda_linear_relu.py",
    "network.cu": "tests/test_cuda_research_net.py",
}
# Why a deletion changes nothing, by the barrier's name: file:function:number in the function.
EXPLAINED = {
    "network.cuh:finish_statistics:2": "the transform is read behind hidden_layers:1 of each tile",
    "network.cuh:finish_sums:2": "the two mean terms are read behind hidden_layers:1 of each tile",
    "network.cuh:backward:1": (
        "the transform and the weights are read behind hidden_layers:1, or by who wrote them"
    ),
}
# What ptxsim says, in short.
KINDS = {
    "shared-memory race": "race",
    "read of never-written": "read of unwritten memory",
    "SyncError": "barrier in divergent code",
    "MemoryFault": "access out of bounds",
}
# Runs pytest over PTX in which no barrier of one line of one file is left.
RUN_TESTS = """
import sys
import cuda_fixtures, cuda_simulator, pytest
sys.path.insert(0, "scripts")
import barriers

file, line, units, compile_ptx = *sys.argv[1:3], sys.argv[3].split(), cuda_simulator.compile_ptx
cuda_simulator.FLAGS = (*cuda_simulator.FLAGS, "-lineinfo")
cuda_simulator.compile_ptx = lambda name, arch: barriers.without(
    compile_ptx(name, arch), file, int(line), needed=name in units)
others = (name for name in cuda_simulator.KERNEL_FILES if name not in units)
cuda_simulator.KERNEL_FILES = (*units, *others)
sys.exit(pytest.main(sys.argv[4:]))
"""


@dataclass(frozen=True)
class Barrier:
    """One barrier: where it stands, and a name that outlives edits elsewhere in its file."""

    file: Path
    line: int
    name: str


def find_barriers() -> list[Barrier]:
    found = []
    for file in sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cuh")]):
        function, number = "", 0
        for line, text in enumerate(file.read_text().splitlines(), start=1):
            if match := FUNCTION.match(text):
                function, number = match[1], 0
            if BARRIER.search(text.split("//")[0]):
                number += 1
                found.append(Barrier(file, line, f"{file.name}:{function}:{number}"))
    return found


def without(ptx: str, file: str, line: int, needed: bool) -> str:
    """The PTX less the barriers of one line of the sources, and less all line numbers.

    Raises LookupError where it has none though ``needed``, or one of a line that has no barrier.
    """
    files = dict(re.findall(r'^\s*\.file\s+(\d+) "(.*?)"', ptx, re.MULTILINE))
    known = {(b.file.name, b.line) for b in find_barriers()}
    kept, at, deleted = [], ("", 0), 0
    for text in ptx.split("\n"):
        if place := re.match(r"\s*\.loc\s+(\d+) (\d+) ", text):
            at = (Path(files[place[1]]).name, int(place[2]))
            continue
        if re.match(r"\s*\.file\s", text):
            continue
        if INSTRUCTION.match(text):
            if at not in known:
                raise LookupError(f"a barrier at {at[0]}:{at[1]}, where the sources have none")
            if at == (file, line):
                deleted += 1
                continue
        kept.append(text)
    if needed and file and not deleted:
        raise LookupError(f"no barrier of {file}:{line} in the PTX")
    return "\n".join(kept)


def included(file: Path) -> set[str]:
    """The names of the headers of csrc/cuda that ``file`` includes, directly or through others."""
    names: set[str] = set()
    for name in re.findall(r'#include "([^"/]+)"', file.read_text()):
        names |= {name, *included(CUDA / name)}
    return names


def units_of(file: Path) -> list[str]:
    """The files of kernels that a line of ``file`` goes into."""
    return [unit for unit in TESTS if file.name == unit or file.name in included(CUDA / unit)]


def try_without(barrier: Barrier | None, units: list[str]) -> str:
    """The test that fails without the barrier, and how; '' where all pass."""
    file, line = (barrier.file.name, barrier.line) if barrier else ("", 0)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    environment |= {"COLUMNS": "500", "FUSED_MLP_BACKEND": "auto"}
    # sm_90 has the barriers of sm_80; the slow tests and those of traffic run the same kernels
    options = ["-q", "-x", "-rf", "--tb=line", "-p", "no:cacheprovider", "-m", "not slow"]
    options += ["-k", "not sm_90 and not traffic", *(TESTS[unit] for unit in units)]
    done = subprocess.run(
        [sys.executable, "-c", RUN_TESTS, file, str(line), " ".join(units), *options],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 0:
        return ""
    failed = re.search(r"^FAILED \S*?::(\S+) - (.*)$", done.stdout, re.MULTILINE)
    kind = kind_of(done.stdout)
    if done.returncode != 1 or not failed or not kind:
        raise SystemExit(f"the tests did not run:\n{done.stdout}{done.stderr}")
    return f"{failed[1].split('[')[0]}: {kind}"


def kind_of(message: str) -> str:
    """What a test saw: '' for an error of running it, which shows nothing of the barrier."""
    if kind := next((kind for words, kind in KINDS.items() if words in message), ""):
        return kind
    return "wrong values" if "AssertionError" in message else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chosen", nargs="*", help="file, file:function or file:function:number")
    options = parser.parse_args()
    barriers = [
        b
        for b in find_barriers()
        if not options.chosen or any(f"{b.name}:".startswith(f"{c}:") for c in options.chosen)
    ]
    print("| barrier | line | without it |\n|---|---|---|", flush=True)
    caught = explained = 0
    sound: set[str] = set()  # files of kernels whose tests pass with every barrier in place
    for barrier in barriers:
        units = units_of(barrier.file)
        if new := [unit for unit in units if unit not in sound]:
            if failure := try_without(None, new):
                raise SystemExit(f"a test fails with every barrier in place: {failure}")
            sound.update(new)
        found = try_without(barrier, units)
        caught += bool(found)
        reason = EXPLAINED.get(barrier.name, "") if not found else ""
        explained += bool(reason)
        if not found:
            found = f"nothing changes: {reason}" if reason else "NO TEST NOTICES"
        print(f"| {barrier.name} | {barrier.line} | {found} |", flush=True)
    missed = len(barriers) - caught - explained
    print(f"\n{len(barriers)} barriers: {caught} caught, {explained} explained, {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
