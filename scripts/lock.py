"""Writes the lock files of CI: every package by its version and the hashes of its files.

    make lock

    .ci/locks/test.txt      what lint, tests, benchmarks and examples need, and the build backend
    .ci/locks/triton.txt    Triton, beside a build of torch that brings none
    .ci/locks/cuda.txt      nvcc, for a machine without it
    .ci/locks/release.txt   what builds and describes a release

One file serves every Python from 3.10 and every system, and names no index. torch is missing on
purpose, with what its CUDA builds bring: one version of it has several builds of other hashes and
other dependencies (for the CPU, for each CUDA), and which one fits is the machine's affair. CI
names its version. Needs uv and Python 3.11.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / ".ci" / "locks"
TEST = ("bench", "test", "triton", "lint", "examples")
OF_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
HEADER = """\
# Written by `make lock` (scripts/lock.py).
# Install with: pip install --require-hashes --no-deps -r {name}
"""


def main() -> int:
    torch = sys.argv[1] if len(sys.argv) > 1 else "torch==2.13.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    backend = project["build-system"]["requires"]
    wanted = [word for extra in TEST for word in extras[extra] if "fused_mlp" not in word]
    test = locked([*wanted, *extras["demo"], *backend, torch], [])
    # The others are installed beside these and beside torch: a package in both has one version.
    fixed = [block.split(" \\")[0] for block in test if not block.startswith("triton==")]
    LOCKS.mkdir(parents=True, exist_ok=True)
    write("test.txt", [block for block in test if not OF_TORCH.fullmatch(block.split("==")[0])])
    write("triton.txt", locked(extras["triton"], fixed))
    # all of nvcc in the minor version of the runtime that torch's own build brings
    minor = next(b for b in fixed if b.startswith("nvidia-cuda-runtime==")).split("==")[1][:4]
    names = [block.split("==")[0] for block in locked(extras["cuda-build"], fixed)]
    write("cuda.txt", locked([f"{name}=={minor}.*" for name in names], fixed))
    write("release.txt", locked(extras["release"], fixed))
    return 0


def locked(wanted: Sequence[str], fixed: Sequence[str]) -> list[str]:
    """A block of lines for each package that ``wanted`` brings, at the versions in ``fixed``."""
    options = ["--universal", "--python-version", "3.10", "--generate-hashes", "--no-header"]
    options += ["--no-emit-index-url", "--no-emit-find-links", "--no-annotate", "--quiet"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(fixed))
        constraints.flush()
        done = subprocess.run(
            [sys.executable, "-m", "uv", "pip", "compile", *options, "-c", constraints.name, "-"],
            input="\n".join(wanted),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return re.findall(r"^\S.*\n(?:[ ].*\n)*", done.stdout, re.MULTILINE)


def write(name: str, blocks: Sequence[str]) -> None:
    (LOCKS / name).write_text(HEADER.format(name=f".ci/locks/{name}") + "".join(blocks))
    print(f"{len(blocks):4d} packages  .ci/locks/{name}")


if __name__ == "__main__":
    sys.exit(main())
