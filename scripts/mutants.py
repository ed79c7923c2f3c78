"""Plants one fault at a time into the numerics and asks the tests whether they notice.

    make mutants                          # 104 mutants, the same ones for the same seed and sources
    make mutants MUTANTS='--seed 2 --count 200 --only cpu'
    make mutants MUTANTS='--only autograd triton --files "*/ops/*" kernels/activations.py'

Works on a copy of the tree under build/mutants: each mutant changes one place there by one rule
(``OPERATORS``), builds what that needs (one file of the CPU library, for one instruction set) and
runs the tests of the op it lies in, until one fails. One that does not compile, or to the same
machine code, does not count. Prints a line a mutant, then those that
survived; ``--output`` keeps all of it as JSON. A run of two hours on two cores.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import tokenize
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "mutants"
LEVEL = "avx2"  # of the instruction sets, the one whose kernels are mutated; it runs every path
KEPT = (".baseline", ".o")  # what the library has besides, built once and never mutated
JOBS = 2
SECONDS = 300  # for one test: a loop without end is noticed as well
MEMORY = 12 << 30

# Name, what it looks for in a line, what it puts there.
OPERATORS: tuple[tuple[str, str, str], ...] = (
    ("sign", r"(?<=[\w)\]] )\+(?= [\w(])", "-"),
    ("sign", r"(?<=[\w)\]] )-(?= [\w(])", "+"),
    ("sign", r"\+=", "-="),
    ("product", r"(?<= )\*(?= [\w(])", "+"),
    ("quotient", r"(?<= )/(?= [\w(])", "*"),
    ("accumulation", r"\+=", "="),
    ("off by one", r"(?<=- )1\b", "2"),
    ("off by one", r"\brange\((\w+), (\w+)\)", r"range(\1 + 1, \2)"),
    ("off by one", r"\b(row|c|f|lane|chunk|part) < (\w[\w.]*);", r"\1 + 1 < \2;"),
    ("off by one", r"\b(int|int64_t) (row|c|i|chunk) = 0;", r"\1 \2 = 1;"),
    ("dropout scale", r"1 / \(1 - (p|dropout_p)\)", "1.0"),
    ("dropout scale", r"\b(op\.|net\.)?dropout\.scale\(\)", "1.0"),
    ("variance", r"\(count - 1\)", "(count)"),
    ("variance", r"count - 1\b", "count"),
    ("variance", r" - (scalar\()?(op\.)?correction\b(, ACC\))?", ""),
    ("epsilon", r" \+ (op\.|norm\.)?eps\b", ""),
    ("epsilon", r"\(var \+ eps\)\.rsqrt\(\)", "(var.rsqrt() + eps)"),
    ("extent", r"\.sum\(dims", ".sum(dims[:1]"),
    ("extent", r"\.(sum|mean)\(0", r".\1(1"),
    ("extent", r"\btl\.sum\((\w+), 0\)", r"(tl.sum(\1, 0) - tl.min(\1, 0))"),
    ("extent", r"/ count\b", "/ (count + 1)"),
    ("strides", r"\{(\w+), (\w+), 1\}", r"{\1, 1, \2}"),
    ("strides", r"\b(\w+)_stride_k\b(?=[,)])", r"\1_stride_o"),
    ("strides", r"\.t\(\)", ""),
    ("strides", r"\brow \* (\w*stride|columns|channels)\b", r"row * (\1 + 1)"),
    ("comparison", r"(?<= )>(?= (0|Vec|threshold))", ">="),
    ("comparison", r"(?<= )<=(?= (0|Vec))", "<"),
    ("comparison", r"(?<= )>=(?= threshold)", ">"),
    ("operand", r" - (\w*mean|load_raw\(\w*\.?mean \+ c\)|centre)\b(?=\)|;)", ""),
    ("operand", r"\brstd\b(?= \*)", "1.0"),
    ("operand", r"\bgamma\b(?=\))", "1.0"),
    ("operand", r" \* grad_weight\b|grad \* normalized", "grad"),
)
# Lines that say how work is cut, what room it takes or what an error says: not numerics. So do
# `assume` and the lines of a signature.
SKIPPED = re.compile(
    r"kThreadWork|kPassCost|chunk_count|grain|Arena|Scratch|bytes|\broom\b|padded|block_rows"
    r"|kLeastRows|raise|Error|warn|\bf\"|#include|template|^ *(def|class|import|from) |constexpr"
    r"|\bparallel_for\(|kSpan|larger\(1|constexpr_function|STD_TORCH_CHECK|std::swap|Temporary<|prefetch"
    r"|\bwork [-+]?="
)
# Functions whose whole business that is.
CUTTING = ("shape", "fits", "padded", "_pad", "_grid", "_tiles", "walks_panels", "runs_as_wide")


@dataclass(frozen=True)
class Group:
    """Files that one environment tests."""

    files: tuple[str, ...]
    share: int  # of 100 mutants
    environment: dict[str, str]


OPS = ("normalize", "linear_relu", "batch_norm_leaky_relu", "research_net")
ACTIVATIONS = ("linear_act", "batch_norm_act")
REFERENCE = ("statistics", "normalize", "linear_act", "batch_norm_act", "research_net")
GROUPS = {
    "reference": Group(
        (
            *(f"fused_mlp/reference/{name}.py" for name in REFERENCE),
            "fused_mlp/dropout.py",
            "fused_mlp/activations.py",
        ),
        26,
        {"FUSED_MLP_BACKEND": "reference"},
    ),
    "autograd": Group(
        tuple(f"fused_mlp/ops/{name}.py" for name in (*OPS, *ACTIVATIONS, "mlp", "over_group")),
        6,
        {"FUSED_MLP_BACKEND": "native"},
    ),
    "cpu": Group(
        (
            "csrc/common/philox.h",
            *(f"csrc/cpu/kernels/{name}" for name in (
                "batch_norm.h", "moments.h", "gemm.h", "weight_grad.h", "dropout.h",
                "activation.h", "elementary.h", "gelu.h", "lookup.h", "few_rows.h",
                "blocked_gemm.h", "rows.h", "panels.h", "panel_walk.h", "blas_walk.h",
                "products.h", "linear_act_wide.cpp", "linear_act_half.cpp", "act_dropout.cpp",
                "normalize.cpp", "linear_act.cpp", "mlp.cpp", "mlp_backward.cpp",
                "batch_norm_act.cpp", "activation.cpp", "dropout.cpp", "gemm.cpp",
                "research_net.cpp", "research_net_backward.cpp", "research_net_evaluate.cpp",
                "research_net_wide.cpp", "research_net_wide_backward.cpp", "loss.cpp",
                "optimizer.cpp",
            )),
        ),
        44,
        {"FUSED_MLP_BACKEND": "native", "FUSED_MLP_CPU_ISA": LEVEL},
    ),
    "triton": Group(
        tuple(
            f"kernels/{name}.py"
            for name in (
                *OPS, "research_net_grad", "research_net_kernels", "moments", "philox",
                "activations", "matmul", "merge",
            )
        ),
        24,
        {"FUSED_MLP_BACKEND": "triton", "TRITON_INTERPRET": "1"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One place and what stands there instead."""

    group: str
    file: str
    line: int
    operator: str
    before: str
    after: str
    scope: str  # the function it lies in

    def __str__(self) -> str:
        return (
            f"{self.file}:{self.line} {self.operator}: {self.before.strip()}  ->  "
            f"{self.after.strip()}"
        )


def code_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield number and text of the lines of code, and the function each lies in."""
    text = path.read_text()
    lines = text.splitlines()
    hidden: set[int] = set()
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.STRING and token.start[0] != token.end[0]:
                hidden.update(range(token.start[0], token.end[0] + 1))
    scope, in_signature = "", False
    opening = re.compile(r"^(?:def|inline|static|void|bool|FUSED_MLP_INLINE)\b.*?\b(\w+)\(")
    for number, line in enumerate(lines, 1):
        if match := opening.match(line):
            scope = match.group(1)
            in_signature = path.suffix == ".py"
        code = line.split("//" if path.suffix != ".py" else "#")[0]
        inside, in_signature = in_signature, in_signature and not code.rstrip().endswith(":")
        if inside or number in hidden or scope in CUTTING:
            continue
        if code.strip().startswith('"') or SKIPPED.search(code):
            continue
        if code.strip():
            yield number, code, scope


def all_mutants(group: str) -> list[Mutant]:
    found: dict[tuple[str, int, str], Mutant] = {}
    for file in GROUPS[group].files:
        for number, line, scope in code_lines(ROOT / file):
            for operator, pattern, replacement in OPERATORS:
                for match in re.finditer(pattern, line):
                    changed = (
                        line[: match.start()] + match.expand(replacement) + line[match.end() :]
                    )
                    mutant = Mutant(group, file, number, operator, line, changed, scope)
                    found.setdefault((file, number, changed), mutant)
    return list(found.values())


def choose(groups: list[str], count: int, seed: int, files: list[str]) -> list[Mutant]:
    """Draw mutants: of every group its share, of its operators and files alike in turn."""
    chosen = []
    total = sum(GROUPS[group].share for group in groups)
    for group in groups:
        left = [m for m in all_mutants(group) if any(fnmatch(m.file, p) for p in files)]
        random.Random(f"{seed} {group}").shuffle(left)
        seen: dict[str, int] = {}
        for _ in range(min(len(left), round(count * GROUPS[group].share / total))):
            rarest = min(left, key=lambda m: seen.get(m.operator, 0) + seen.get(m.file, 0))
            left.remove(rarest)
            for key in (rarest.operator, rarest.file):
                seen[key] = seen.get(key, 0) + 1
            chosen.append(rarest)
    return chosen


def tests_for(mutant: Mutant) -> list[str]:
    """Return the test files that ought to notice, the likeliest first."""
    name = Path(mutant.file).stem + " " + mutant.scope
    order = [op for op in (*OPS, *ACTIVATIONS, "mlp") if op in name]
    if name.startswith("activations"):
        order = [*ACTIVATIONS]
    if "dropout" in name or "philox" in name or "keep_mask" in name or "mask" in mutant.scope:
        order.insert(0, "dropout")
    if "moments" in name:
        order = ["normalize", "batch_norm_leaky_relu", "hard_numbers"]
    if name.startswith("merge"):  # several rows of a matrix, which no single layer has
        order = ["research_net"]
    if "wide" in name:  # what runs beyond a core's cache
        order = ["linear_relu", "research_net"]
    if "loss" in name or "optimizer" in name:
        order = ["train_step", "train_step_loop"]
    elif mutant.group == "autograd" and "over_group" in name:
        order = ["over_group", "distributed"]
    elif mutant.group == "autograd" or mutant.scope.endswith("_formula"):
        order = order or [*OPS, *ACTIVATIONS]
        order += ["autograd_tools", "functional_transforms", "autograd"]
        order += ["patterns", "opcheck", "bad_input"] if mutant.group == "autograd" else []
    else:
        order += ["linear_relu", "batch_norm_leaky_relu", "research_net", "normalize"]
        order += ["prepared"] if mutant.group == "cpu" else []
        order += ["dropout", *ACTIVATIONS]
    return [f"tests/test_{op}.py" for op in dict.fromkeys(order)]


class Library:
    """The copy's CPU library: everything built once, then one mutated unit at a time."""

    def __init__(self) -> None:
        sys.path.insert(0, str(COPY))
        from fused_mlp import _build
        from fused_mlp._build.plan import fingerprint, make_plan

        assert Path(_build.__file__).is_relative_to(COPY)
        self._fingerprint = fingerprint
        plan = make_plan("cpu", COPY / "csrc", COPY / "build" / "mutants")
        # Baseline objects are the fallback that isa.cpp names: built once and never mutated.
        self._units = [u for u in plan.units if u.output.suffixes[0] in (f".{LEVEL}", *KEPT)]
        self._mutated = {u.output for u in self._units if f".{LEVEL}." in u.output.name}
        dropped = {str(u.output) for u in plan.units if u not in self._units}
        self._link = [word for word in plan.link if word not in dropped]
        self._output = plan.output
        self._kept: dict[Path, bytes] = {}
        if not self.build(everything=True):
            raise SystemExit("the unchanged library does not compile")

    def build(self, everything: bool = False) -> bool:
        """Compile what the tree's state asks for; False where it does not compile."""
        stale = [
            unit
            for unit in self._units
            if everything or (unit.output in self._mutated and self._stale(unit))
        ]
        if not everything:
            self._kept = {unit.output: unit.output.read_bytes() for unit in stale}
        with ThreadPoolExecutor(JOBS) as pool:
            if not all(pool.map(self._compile, stale)):
                return False
        subprocess.run(self._link, check=True)
        shutil.copyfile(self._output, COPY / "fused_mlp" / "_C_cpu.so")
        facts = {"fingerprint": self._fingerprint("cpu", COPY / "csrc"), "isas": [LEVEL]}
        (COPY / "fused_mlp" / "_C_cpu.json").write_text(json.dumps(facts))
        return True

    def is_unchanged(self) -> bool:
        """Return whether the last build gave the machine code of before: no mutant at all."""
        return all(output.read_bytes() == content for output, content in self._kept.items())

    def restore(self) -> None:
        """Put the objects back that the last build replaced; call it after the source is back."""
        for output, content in self._kept.items():
            output.write_bytes(content)

    def _compile(self, unit: Any) -> bool:
        unit.output.parent.mkdir(parents=True, exist_ok=True)
        words = ["-O1" if word == "-O3" else word for word in unit.command]
        has = "-DFUSED_MLP_HAS_"
        words = [word for word in words if not word.startswith(has) or word == has + LEVEL.upper()]
        return subprocess.run(words, capture_output=True).returncode == 0

    def _stale(self, unit: Any) -> bool:
        built = unit.output.stat().st_mtime_ns
        words = unit.depfile.read_text().replace("\\\n", " ").split()[1:]
        return any(
            Path(word).stat().st_mtime_ns > built for word in words if word.startswith(str(COPY))
        )


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def run_tests(mutant: Mutant) -> tuple[str, str]:
    """Return "killed", "survived" or "invalid", and by what."""
    environment = {
        **os.environ, **GROUPS[mutant.group].environment, "PYTHONPATH": str(COPY),
        "OMP_NUM_THREADS": "2", "FUSED_MLP_JIT": "0", "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "240",  # pytest cuts what a test failed with
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist"]
    command += ["-p", "no:cacheprovider", "-m", "not slow", "--tb=no", "--no-header"]
    # All tests of a mutant that none notices may take long; that alone does not tell it.
    command += ["--timeout", str(SECONDS), "--timeout-method", "thread"]
    done = subprocess.run(
        [*command, *tests_for(mutant)], cwd=COPY, env=environment, capture_output=True, text=True,
        preexec_fn=limit_memory,
    )  # fmt: skip
    if "+++ Timeout +++" in done.stdout + done.stderr:
        return "killed", "no end"
    if done.returncode:
        failed = [w for w in done.stdout.splitlines() if w.startswith(("FAILED", "ERROR"))]
        if failed and "triton.runtime.errors.InterpreterError" in failed[0]:
            return "invalid", "does not compile"  # what the interpreter finds as it goes
        return "killed", failed[0][:160] if failed else f"ended with {done.returncode}"
    return "survived", ""


def copy_tree() -> None:
    COPY.mkdir(parents=True, exist_ok=True)
    for folder in ("fused_mlp", "kernels", "csrc", "tests"):
        shutil.rmtree(COPY / folder, ignore_errors=True)
        ignore = shutil.ignore_patterns("__pycache__", "_C_*")
        shutil.copytree(ROOT / folder, COPY / folder, ignore=ignore)
    for file in ("pyproject.toml", "setup.py"):
        shutil.copyfile(ROOT / file, COPY / file)


def copy_library() -> None:
    """Lend the copy the CPU library of the checkout: no file of it is to be mutated."""
    sys.path.insert(0, str(ROOT))
    from fused_mlp import backends

    (state,) = (s for s in backends.status() if (s.device, s.name) == ("cpu", "native"))
    if not state.available:
        raise SystemExit(f"no CPU library: {state.detail}")
    for file in (ROOT / "fused_mlp").glob("_C_cpu.*"):
        shutil.copy2(file, COPY / "fused_mlp")


def try_mutant(mutant: Mutant, library: Library | None) -> tuple[str, str]:
    path = COPY / mutant.file
    original = path.read_text()
    lines = original.splitlines(keepends=True)
    rest = lines[mutant.line - 1][len(mutant.before) :]
    lines[mutant.line - 1] = mutant.after + rest
    path.write_text("".join(lines))
    try:
        if mutant.group == "cpu" and not (library and library.build()):
            return "invalid", "does not compile"
        if mutant.group == "cpu" and library and library.is_unchanged():
            return "invalid", "the same machine code"
        return run_tests(mutant)
    finally:
        path.write_text(original)
        if mutant.group == "cpu" and library:
            library.restore()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=104)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(GROUPS), nargs="+", default=list(GROUPS))
    parser.add_argument(
        "--files", nargs="+", default=["*"], metavar="PATTERN", help="of these only"
    )
    parser.add_argument("--output", type=Path, help="where to keep the results, as JSON")
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    options = parser.parse_args()
    mutants = choose(options.only, options.count, options.seed, options.files)
    if options.list:
        print("\n".join(map(str, mutants)))
        return 0
    copy_tree()
    library = Library() if any(mutant.group == "cpu" for mutant in mutants) else None
    if not library:
        copy_library()
    results = []
    for number, mutant in enumerate(mutants, 1):
        start = time.monotonic()
        outcome, by = try_mutant(mutant, library)
        results.append({**asdict(mutant), "outcome": outcome, "by": by})
        print(f"{number}/{len(mutants)} {outcome} {time.monotonic() - start:.0f} s {mutant}  {by}")
        sys.stdout.flush()
        if options.output:
            options.output.write_text(
                json.dumps({"seed": options.seed, "mutants": results}, indent=1)
            )
    tried = [r for r in results if r["outcome"] != "invalid"]
    killed = sum(r["outcome"] == "killed" for r in tried)
    print(f"\n{killed} of {len(tried)} mutants were killed ({killed / max(len(tried), 1):.0%})")
    for result in tried:
        if result["outcome"] == "survived":
            print(f"survived: {result['file']}:{result['line']} {result['after'].strip()}")
    return int(killed < 0.95 * len(tried))


if __name__ == "__main__":
    sys.exit(main())
