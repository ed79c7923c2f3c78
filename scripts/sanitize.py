"""Builds the CPU library with a sanitizer and runs the tests of the native backend over it.

    make asan          # out-of-bounds and freed memory
    make ubsan         # undefined behaviour: overflow, bad shifts, misaligned and null pointers
    make tsan          # data races
    python scripts/sanitize.py address -k dropout
    python scripts/sanitize.py thread --plant    # a race in every parallel loop: is it reported?

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
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1:suppressions={tree}/supp"},
}
RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
# Libraries not compiled for the sanitizer: it does not see how they synchronize, so what it says
# of their insides means nothing. What our own code does wrong is still reported.
SUPPRESSIONS = """\
# torch's own threads, allocator and dispatcher
called_from_lib:libtorch_cpu.so
called_from_lib:libtorch_python.so
called_from_lib:libc10.so
# its OpenMP: csrc/cpu/parallel.cpp tells of the order that its barriers make
called_from_lib:torch/lib/libgomp
# What a thread of it kept is freed by the one that gets its stack later, in the C library, which
# orders the two by what the kernel wrote.
race:_dl_deallocate_tls
# At the end of the process torch destroys a mutex of its own, then unlocks it as Python frees a
# capsule of its.
mutex:capsule_dealloc
"""
# Tests that run no line of csrc/cpu, or run it in processes of their own.
LEFT_OUT = (
    "bench", "build", "compile", "cuda", "demo", "distributed", "doctor", "examples", "export",
    "install", "module_processes", "other_devices", "over_group", "supply", "triton", "typing",
)  # fmt: skip
# Of the others, those that run every kernel, on several threads here: a race takes two.
THREADED = (
    "batch_norm_act", "batch_norm_leaky_relu", "bfloat16", "determinism", "dropout", "linear_act",
    "linear_relu", "mlp", "mlp_changes", "mlp_modules", "module_life", "normalize", "prepared",
    "prepared_changes", "prepared_life", "research_net", "threads", "train_step", "train_step_loop",
    "train_step_mlp",
)  # fmt: skip
THREADS = "3"
# Where threads train one module, they write its running statistics in no order, and may: torch's
# own batch norm does the same.
UNORDERED = "test_threads_train_one_module"
# What --plant makes of a task: one that counts in a variable of all threads.
TASK = "body(begin, end, context);"
RACE = f"static int64_t count; count += end - begin; {TASK}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sanitizer", choices=sorted(OPTIONS))
    parser.add_argument("--plant", action="store_true", help="fail unless a planted race is seen")
    options, pytest_options = parser.parse_known_args()
    if options.plant and options.sanitizer != "thread":
        parser.error("only the thread sanitizer has a fault to plant")
    tree = ROOT / "build" / "sanitize" / options.sanitizer
    copy_tree(tree)
    if options.plant:
        file = tree / "csrc" / "cpu" / "parallel.cpp"
        sound = file.read_text()
        assert TASK in sound
        file.write_text(sound.replace(TASK, RACE))
    try:
        build(tree, options.sanitizer)
        failed = run_tests(tree, options.sanitizer, pytest_options)
    finally:
        for compiled in (tree / "objects").rglob("parallel*") if options.plant else ():
            compiled.unlink()
    return int(not any(tree.glob("report.*"))) if options.plant else failed


def copy_tree(tree: Path) -> None:
    """Copy what the tests need; what was compiled there the last time stays."""
    ignore = shutil.ignore_patterns("_C_*", "__pycache__")
    for room in ROOMS:
        shutil.rmtree(tree / room, ignore_errors=True)
        shutil.copytree(ROOT / room, tree / room, ignore=ignore)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)


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
    (tree / "supp").write_text(SUPPRESSIONS)
    for stale in tree.glob("report.*"):
        stale.unlink()
    # to a file: pytest holds what a test's process prints, and loses it when that process ends
    settings = {
        name: f"{text.format(tree=tree)}:log_path={tree}/report"
        for name, text in OPTIONS[sanitizer].items()
    }
    if sanitizer == "thread":
        settings["FUSED_MLP_TEST_THREADS"] = THREADS
    environment = {
        **environment_of(tree),
        **settings,
        "FUSED_MLP_JIT": "0",
        "PYTHONUNBUFFERED": "1",  # a report ends the process, with what it had not yet printed
        # libstdc++ at once, for its __cxa_throw is looked up when the runtime starts
        "LD_PRELOAD": f"{runtime(RUNTIMES[sanitizer])} {runtime('libstdc++.so')}",
    }
    files = [str(path.relative_to(tree)) for path in tests_of(tree, sanitizer)]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    left_out = ["reference", "compile", *([UNORDERED] if sanitizer == "thread" else [])]
    wanted = " and ".join(f"not {words}" for words in left_out)
    chosen = ["-m", "not slow", "-k", wanted, *pytest_options]
    print(shlex.join([*command, *chosen, *files]), flush=True)
    done = subprocess.run([*command, *chosen, *files], cwd=tree, env=environment)
    reports = sorted(tree.glob("report.*"))
    for report in reports:
        print(report.read_text())
    print(
        f"{len(reports)} reports of the {sanitizer} sanitizer; pytest ended with {done.returncode}"
    )
    return done.returncode or len(reports)


def tests_of(tree: Path, sanitizer: str) -> list[Path]:
    every = [
        path
        for path in sorted((tree / "tests").glob("test_*.py"))
        if not path.stem.removeprefix("test_").startswith(LEFT_OUT)
    ]
    if sanitizer == "thread":
        return [path for path in every if path.stem.removeprefix("test_") in THREADED]
    return every


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
