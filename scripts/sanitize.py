"""Builds the CPU library with a sanitizer and runs the tests of the native backend over it.

    make asan          # out-of-bounds and freed memory
    make ubsan         # undefined behaviour: overflow, bad shifts, misaligned and null pointers
    make tsan          # data races
    python scripts/sanitize.py address -k dropout

The library goes to a copy of the tree under build/sanitize, so the checkout keeps its own. A
report ends the run: no test can pass over one. Needs g++ and its sanitizers' runtimes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("fused_mlp", "kernels", "csrc", "tests", "bench")
# What a sanitized process needs beside the flag: its runtime comes first, before libtorch's.
OPTIONS = {
    # Python and torch keep memory to the end on purpose: leaks are the long-run tests' matter.
    "address": {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1"},
    "undefined": {"UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"},
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1:suppressions={supp}"},
}
RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
# Modules that were not compiled for the sanitizer: what it says of their insides alone means
# nothing, as it does not see how they synchronize. Races with our own code are still reported.
SUPPRESSIONS = """\
# torch's allocator, dispatcher and OpenMP's barriers are not instrumented
called_from_lib:libtorch_cpu.so
called_from_lib:libtorch_python.so
called_from_lib:libc10.so
called_from_lib:libgomp
"""
# The tests that reach the C++ kernels of the CPU; the rest runs no line of csrc/cpu.
FILES = (
    "normalize", "linear_relu", "batch_norm_leaky_relu", "research_net", "dropout", "threads",
    "autograd", "modules", "bad_input",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sanitizer", choices=sorted(OPTIONS))
    options, pytest_options = parser.parse_known_args()
    tree = copy_tree(options.sanitizer)
    build(tree, options.sanitizer)
    return run_tests(tree, options.sanitizer, pytest_options)


def copy_tree(sanitizer: str) -> Path:
    """A copy of what the tests need; what was compiled in it the last time stays."""
    tree = ROOT / "build" / "sanitize" / sanitizer
    ignore = shutil.ignore_patterns("_C_*", "__pycache__")
    for room in ROOMS:
        shutil.rmtree(tree / room, ignore_errors=True)
        shutil.copytree(ROOT / room, tree / room, ignore=ignore)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    return tree


def build(tree: Path, sanitizer: str) -> None:
    flags = f"-g -fno-omit-frame-pointer -fsanitize={sanitizer}"
    if sanitizer == "undefined":
        flags += " -fno-sanitize-recover=undefined"
    code = (
        "import pathlib; from fused_mlp import _build; root = pathlib.Path.cwd();"
        "_build.build_library('cpu', root / 'csrc', root / 'objects',"
        " root / 'fused_mlp' / '_C_cpu.so')"
    )
    # importing fused_mlp must not build a library of its own first
    environment = {**environment_of(tree), "FUSED_MLP_JIT": "0", "CXX": f"{compiler()} {flags}"}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tree, env=environment, check=True
    )


def run_tests(tree: Path, sanitizer: str, pytest_options: list[str]) -> int:
    suppressions = tree / "suppressions.txt"
    suppressions.write_text(SUPPRESSIONS)
    settings = {key: text.format(supp=suppressions) for key, text in OPTIONS[sanitizer].items()}
    environment = {
        **environment_of(tree),
        **settings,
        "FUSED_MLP_JIT": "0",
        # libstdc++ at once, for its __cxa_throw is looked up when the runtime starts
        "LD_PRELOAD": f"{runtime(RUNTIMES[sanitizer])} {runtime('libstdc++.so')}",
    }
    files = [
        f"tests/test_{name}.py" for name in FILES if (tree / f"tests/test_{name}.py").is_file()
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    chosen = ["-m", "not slow", "-k", "not reference and not compile", *pytest_options]
    print(shlex.join([*command, *chosen, *files]), flush=True)
    return subprocess.run([*command, *chosen, *files], cwd=tree, env=environment).returncode


def environment_of(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree), "FUSED_MLP_BACKEND": "auto"}


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def runtime(name: str) -> str:
    found = subprocess.run(
        [*shlex.split(compiler()), f"-print-file-name={name}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"{compiler()} has no {name}: install its sanitizers (libsanitizer)")
    return found


if __name__ == "__main__":
    sys.exit(main())
