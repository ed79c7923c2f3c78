"""Builds one wheel and runs the smoke tests on it under several versions of torch and Python.

    make abi-check
    python scripts/abi_check.py --torch 2.13.0 2.15.0 --python python3.13 --keep

Each combination gets a virtual environment of its own under build/abi, removed afterwards. A torch
for CUDA takes several GB there and in the download.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "abi"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="+", default=["2.13.0", "2.14.1"], metavar="VERSION")
    parser.add_argument(
        "--python",
        nargs="*",
        metavar="PROGRAM",
        help="other Pythons to try with the first torch (default: the newest other one found)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    options = parser.parse_args()

    others = options.python if options.python is not None else other_pythons()[:1]
    pairs = [(sys.executable, version) for version in options.torch]
    pairs += [(program, options.torch[0]) for program in others]
    wheel = build_wheel()
    rows = [(*pair, check(*pair, wheel, options.keep)) for pair in pairs]
    print(f"\n{wheel.name}\n\n| Python | torch | smoke tests |\n|---|---|---|")
    for program, version, result in rows:
        print(f"| {python_version(program)} | {version} | {result} |")
    return 0 if all(result.startswith("passed") for _, _, result in rows) else 1


def other_pythons() -> list[str]:
    """Programs of other minor versions than this one that run, the newest first."""
    minors = [minor for minor in range(14, 9, -1) if minor != sys.version_info.minor]
    return [f"python3.{minor}" for minor in minors if python_version(f"python3.{minor}")]


def python_version(program: str) -> str:
    try:
        result = subprocess.run(
            [program, "-c", "import platform; print(platform.python_version())"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def build_wheel() -> Path:
    """The wheel, from an isolated build. FUSED_MLP_CUDA=1 in the environment includes CUDA."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    environment = {"FUSED_MLP_CUDA": "0", **os.environ, "FUSED_MLP_CPU": "1"}
    call(
        [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-q", "-w", str(WORK)],
        environment,
    )
    (wheel,) = WORK.glob("*.whl")
    return wheel


def check(program: str, version: str, wheel: Path, keep: bool) -> str:
    """Runs the smoke tests in a new environment; returns the line that says how it went."""
    started = time.monotonic()
    folder = WORK / f"python{python_version(program)}-torch{version}"
    print(f"== Python {python_version(program)}, torch {version}", flush=True)
    try:
        call([program, "-m", "venv", str(folder / "venv")])
        python = str(folder / "venv/bin/python")
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        call([*pip, f"torch=={version}"])
        call([*pip, f"{wheel}[test]"])
        # no package lies beside the tests and the benchmarks they read, so what they import is the
        # wheel's
        for name in ("tests", "bench"):
            shutil.copytree(ROOT / name, folder / name)
        shutil.copy(ROOT / "pyproject.toml", folder)
        # neither a compiler nor the right to build: it is the wheel's own library that must load
        environment = {**os.environ, "FUSED_MLP_JIT": "0"}
        call([python, "-m", "pytest", "-q", "-m", "smoke", "tests"], environment, folder)
    except subprocess.CalledProcessError as error:
        return f"failed: {' '.join(error.cmd[1:4])}"
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return f"passed ({time.monotonic() - started:.0f} s)"


def call(
    command: list[str], environment: dict[str, str] | None = None, folder: Path | None = None
) -> None:
    subprocess.run(command, env=environment, cwd=folder, check=True)


if __name__ == "__main__":
    sys.exit(main())
