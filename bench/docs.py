"""``python -m bench docs``: measure everything docs/benchmarks.md shows and write it there.

Every section is a run of its own with a folder of its own, so that it can be repeated, or added
after an interruption, by itself; the page is made of whatever folders are there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import docs_tables, environment
from .cases import NETWORK, NETWORKS
from .errors import BenchError
from .results import Results, load
from .rivals import AGAINST

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"


@dataclass(frozen=True)
class Section:
    """A run: its options, what to set in its environment, and about how long it takes."""

    arguments: list[str]
    seconds: int
    variables: dict[str, str] = field(default_factory=dict)


def _nets(*which: int) -> list[str]:
    return [part for i in which for part in ("--net", ",".join(map(str, NETWORKS[i])))]


_ALL = ["--against", ",".join(AGAINST), "--seconds", "1.5"]
_EAGER = ["--against", "eager", "--seconds", "0.6"]
_BFLOAT16 = ["--dtype", "bfloat16", "--against", "eager,float32", "--seconds", "0.5"]
SECTIONS = {
    "net-10-eval": Section([*_nets(0), "--mode", "eval", *_ALL], 50),
    "net-10-train": Section([*_nets(0), "--mode", "train", *_ALL], 60),
    "net-128-eval": Section([*_nets(1), "--mode", "eval", *_ALL], 60),
    "net-128-train": Section([*_nets(1), "--mode", "train", *_ALL], 120),
    "net-784": Section([*_nets(2), *_ALL], 90),
    "net-1024": Section([*_nets(3), *_ALL], 110),
    "ops": Section(["--docs", "--ops", "--seconds", "0.5"], 170),
    "bfloat16": Section([*_nets(1, 2, 3), "--docs", "--ops", *_BFLOAT16], 150),
    "one-thread": Section([*_nets(0, 1, 2, 3), "--threads", "1", *_EAGER], 90),
    "avx2": Section([*_nets(0, 1, 2, 3), *_EAGER], 80, {"FUSED_MLP_CPU_ISA": "avx2"}),
    "end-to-end": Section(["--end-to-end"], 120),
}
# What the GPU kernels do in ptxsim: no timing, so no results but a text.
GPU, GPU_SECONDS = "gpu", 120
# Sections that are no part of the whole but stand beside it.
BESIDE = ("bfloat16", "one-thread", "avx2")
NETS = [name for name in SECTIONS if name.startswith("net-")]


def main(argv: Sequence[str]) -> int:
    """Measure, unless told to take what is there, and write the page's tables and pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m bench docs",
        description="Run the sweeps behind docs/benchmarks.md and regenerate its tables and "
        "docs/images. Wants an idle machine and refuses a busy one. A quarter of an hour in all; "
        "sections can be measured one at a time, and the page shows those that are there.",
        epilog="sections, and about how many seconds each takes: "
        + ", ".join(f"{name} {section.seconds}" for name, section in SECTIONS.items())
        + f", {GPU} {GPU_SECONDS}",
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "results" / "docs", metavar="DIR",
        help="where the sections' results are kept (default: results/docs)",
    )  # fmt: skip
    parser.add_argument(
        "--only", type=lambda text: text.split(","), metavar="NAME[,NAME…]",
        help="measure these sections again and leave the others as they are",
    )  # fmt: skip
    parser.add_argument(
        "--missing", action="store_true", help="measure only the sections that are not there yet"
    )
    parser.add_argument("--no-run", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--busy", action="store_true", help="measure on a busy machine too")
    parser.add_argument(
        "--tiny", action="store_true", help="the smallest sizes alone, to try the command"
    )
    parser.add_argument(
        "--page", type=Path, default=PAGE, metavar="FILE", help="default: docs/benchmarks.md"
    )
    parser.add_argument(
        "--images", type=Path, default=IMAGES, metavar="DIR", help="default: docs/images"
    )
    options = parser.parse_args(argv)
    failed: list[str] = []
    for name in [] if options.no_run else _chosen(options):
        run = _simulate if name == GPU else _measure
        if not run(name, options):
            failed.append(name)
    found = {
        name: load(options.folder / name)
        for name in SECTIONS
        if (options.folder / name / "results.json").is_file()
    }
    if not found:
        raise BenchError(f"there are no results in {options.folder}")
    write(found, options.page, options.images, _text(options.folder))
    draw(found, options.images)
    sys.stdout.write(f"{options.page}\n")
    if failed:
        raise BenchError(f"not measured: {', '.join(failed)}")
    return 0


def _chosen(options: argparse.Namespace) -> list[str]:
    everything = [*SECTIONS, GPU]
    names = options.only or everything
    if unknown := [name for name in names if name not in everything]:
        raise BenchError(f"--only {unknown[0]}: choose from {', '.join(everything)}")
    if options.missing:
        names = [n for n in names if not (options.folder / n).is_dir()]
    return names


def _measure(name: str, options: argparse.Namespace) -> bool:
    """Run a section into its folder; an old result stays until the new one is whole."""
    busy = environment.busy_cores()
    if busy is not None and busy > environment.BUSY and not options.busy:
        raise BenchError(
            f"something else keeps {busy} cores busy: numbers to be published want an idle machine "
            "(--busy measures all the same)"
        )
    section, output = SECTIONS[name], options.folder / name
    arguments = _tiny(section.arguments) if options.tiny else section.arguments
    fresh = output.with_name(f"{name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    command = [sys.executable, "-m", "bench", *arguments, "--output", str(fresh)]
    print(f"\n==== {name} (about {section.seconds} s)", flush=True)
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **section.variables}, check=False)
    if done.returncode:
        return False
    shutil.rmtree(output, ignore_errors=True)
    fresh.rename(output)
    return True


def _simulate(name: str, options: argparse.Namespace) -> bool:
    """Write the steps of gpu-report into a folder of their own."""
    print(f"\n==== {name} (about {GPU_SECONDS} s)", flush=True)
    command = [sys.executable, "-m", "bench", "gpu-report", "--only", "steps"]
    if options.tiny:
        command += ["--op", "normalize", "--chip", "sm_90"]
    else:
        command += ["--op", NETWORK]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return False
    (options.folder / name).mkdir(parents=True, exist_ok=True)
    (options.folder / name / "steps.md").write_text(done.stdout, encoding="utf-8")
    return True


def _text(folder: Path) -> str:
    """Return what the page says of GPUs: steps beside eager's, and predicted times."""
    path = folder / GPU / "steps.md"
    if not path.is_file():
        return ""
    _, mark, steps = path.read_text(encoding="utf-8").partition("## Steps beside eager's")
    shown = f"{mark}{steps}".strip().replace("## ", "#### ")
    return f"### GPUs: predictions, nothing here was measured on one\n\n{shown}"


def _tiny(arguments: Sequence[str]) -> list[str]:
    kept = [a for a in arguments if a != "--docs"]
    return [*kept, "--smoke", "--against", "eager,onednn", "--seconds", "0"]


def merged(found: dict[str, Results], names: Sequence[str]) -> Results | None:
    """Return the sections that are there as one; of each ceiling the highest that was measured."""
    parts = [found[name] for name in names if name in found]
    if not parts:
        return None
    whole = Results(parts[0].environment)
    for part in parts:
        whole.rows += part.rows
        whole.skipped |= part.skipped
        whole.overhead = whole.overhead or part.overhead
        whole.extra |= part.extra
        for peak, value in part.peaks.items():
            whole.peaks[peak] = max(value, whole.peaks.get(peak, 0.0))
    return whole


def write(found: dict[str, Results], page: Path, images: Path, more: str = "") -> None:
    """Put the numbers, and more, between the page's two marks.

    Raises:
        BenchError: when the page lacks them.
    """
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"{page} has no {BEGIN} … {END}")
    main_part = merged(found, [*NETS, "ops", "end-to-end"]) or next(iter(found.values()))
    links = Path(os.path.relpath(images, page.parent)).as_posix()
    others = {name: part for name, part in found.items() if name in BESIDE}
    numbers = "\n\n".join([*docs_tables.sections(main_part, others, found, links), more]).strip()
    page.write_text(f"{head}{begin}\n\n{numbers}\n\n{end}{tail}", encoding="utf-8")


def draw(found: dict[str, Results], images: Path) -> None:
    """Write the page's pictures."""
    from . import plots

    whole = merged(found, [*NETS, "ops", "end-to-end"])
    if whole is not None:
        images.mkdir(parents=True, exist_ok=True)
        plots.save_all(whole, images, ("png",))
