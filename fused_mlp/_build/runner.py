"""Runs a plan: with ninja where there is one, else with a pool of threads.

Both compile at most ``max_jobs()`` units at once and only what changed: ninja by the headers that
the compiler lists, the pool by the same lists (it has to read them itself).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import BuildFailed
from .plan import Plan, Unit
from .toolchain import find_ninja


def max_jobs() -> int:
    """How many compilers may run at once: MAX_JOBS, else the processors this process may use."""
    wanted = os.environ.get("MAX_JOBS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def run(plan: Plan) -> None:
    """Makes ``plan.output``. Raises BuildFailed with the first error a compiler printed."""
    for unit in plan.units:
        unit.output.parent.mkdir(parents=True, exist_ok=True)
    ninja = find_ninja()
    if ninja.path is not None and os.environ.get("FUSED_MLP_NINJA", "1") != "0":
        _run_ninja(plan, ninja.path)
    else:
        _run_pool(plan)


def _run_ninja(plan: Plan, ninja: Path) -> None:
    folder = plan.output.parent
    text = ninja_file(plan)
    listing = folder / "build.ninja"
    if not listing.is_file() or listing.read_text() != text:
        listing.write_text(text)
    _call([str(ninja), "-C", str(folder), "-j", str(max_jobs())])


def ninja_file(plan: Plan) -> str:
    """The text of build.ninja for ``plan``."""
    lines = ["ninja_required_version = 1.5", "rule run", "  command = $words"]
    lines += ["  description = $out", "rule compile", "  command = $words", "  deps = gcc"]
    lines += ["  depfile = $depfile_path", "  description = $in"]
    for unit in plan.units:
        lines.append(f"build {_escape(unit.output)}: compile {_escape(unit.source)}")
        lines.append(f"  words = {_words(unit.command)}")
        lines.append(f"  depfile_path = {_escape(unit.depfile)}")
    objects = " ".join(_escape(unit.output) for unit in plan.units)
    lines.append(f"build {_escape(plan.output)}: run {objects}")
    lines.append(f"  words = {_words(plan.link)}")
    return "\n".join(lines) + "\n"


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _words(command: tuple[str, ...]) -> str:
    return shlex.join(command).replace("$", "$$")


def _run_pool(plan: Plan) -> None:
    stale = [unit for unit in plan.units if not _is_fresh(unit)]
    with ThreadPoolExecutor(max_jobs()) as pool:
        list(pool.map(_compile, stale))  # list() raises the first failure
    if stale or not plan.output.is_file():
        _call(list(plan.link))


def _compile(unit: Unit) -> None:
    record = unit.output.with_suffix(".json")
    record.unlink(missing_ok=True)
    _call(list(unit.command))
    record.write_text(json.dumps(unit.command))


def _is_fresh(unit: Unit) -> bool:
    """Whether the object was made by this very command after the last change of what it reads."""
    record = unit.output.with_suffix(".json")
    try:
        if json.loads(record.read_text()) != list(unit.command):
            return False
        made = unit.output.stat().st_mtime_ns
        words = shlex.split(unit.depfile.read_text().replace("\\\n", " "))
        return all(os.stat(word).st_mtime_ns < made for word in words[1:])
    except (OSError, ValueError):
        return False


def _call(command: list[str]) -> None:
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise BuildFailed(f"{command[0]} does not run: {error}") from error
    if result.returncode == 0:
        return
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    # As compilers write it: a command ninja repeats may hold -Werror.
    errors = [line for line in lines if "error:" in line.lower() and "FAILED" not in line]
    first = (errors or lines[-1:] or ["no message"])[0].strip()
    raise BuildFailed(
        f"compiling failed: {first}",
        "python -m fused_mlp doctor names the compiler; another one can be set with CXX",
        output=f"{shlex.join(command)}\n{result.stdout}",
    )
