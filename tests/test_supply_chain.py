"""What the package takes from outside: no network, no code out of data, nothing from others.

Also that CI's lock files pin every package by its hash, and that installing needs torch alone.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import results
from bench.errors import BenchError
from fused_mlp import _build

ROOT = Path(__file__).resolve().parent.parent
LOCKS = sorted((ROOT / ".ci" / "locks").glob("*.txt"))
in_checkout = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a checkout")
CODE = ("fused_mlp", "kernels", "bench")
# Modules that turn bytes into code, or reach beyond this machine.
REFUSED_MODULES = {
    *("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "runpy", "code"),
    *("socket", "ssl", "urllib", "http", "ftplib", "smtplib", "requests", "httpx", "aiohttp"),
}
NOT_IN_CI = {"dev", "fuzz"}
REFUSED_CALLS = {"eval", "exec", "compile", "__import__"}

# Ends the process where anything below is about to be done, by our code or for it.
GUARD = """
import sys
FORBIDDEN = (
    "socket.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.",
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class",
)
seen = []
def hook(event, arguments):
    if event.startswith(FORBIDDEN):
        seen.append((event, arguments))
        raise SystemExit(f"forbidden: {event} {arguments!r}")
"""
USE = """
import torch
import torch.utils.data
sys.addaudithook(hook)
import fused_mlp
from fused_mlp import FusedResearchNet, TrainStep, backends, functional, fuse, unfuse
net = FusedResearchNet(10, [64, 32], 5)
data = functional.normalize(torch.rand(40, 10))
net(data).sum().backward()
net.eval()(data)
functional.linear_relu(data, torch.rand(3, 10), torch.rand(3), 0.5, True)
functional.batch_norm_leaky_relu(data, torch.zeros(10), torch.ones(10), training=True)
fuse(torch.nn.Sequential(torch.nn.Linear(10, 4), torch.nn.ReLU()))
unfuse(net)
small = FusedResearchNet(10, [8], 5)
step = TrainStep(small, torch.nn.MSELoss(), torch.optim.Adam(small.parameters()))
step(data, torch.rand(40, 5))
assert backends.active_backend("cpu") in ("native", "reference")
assert not seen, seen
print("used")
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "FUSED_MLP_BACKEND": "auto", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_import_and_use_open_no_connection_and_start_no_program() -> None:
    done = run(GUARD + USE, FUSED_MLP_JIT="0")
    assert (done.returncode, done.stdout) == (0, "used\n"), done.stderr


@pytest.mark.parametrize(
    "action",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import subprocess; subprocess.run(['true'])",
        "import pickle; pickle.loads(pickle.dumps(GeneratorExit))",
    ],
)
def test_the_guard_sees_what_it_looks_for(action: str) -> None:
    done = run(f"{GUARD}sys.addaudithook(hook)\n{action}")
    assert done.returncode == 1
    assert "forbidden: " in done.stderr


def sources() -> Iterator[Path]:
    for folder in CODE:
        yield from sorted((ROOT / folder).rglob("*.py"))


@in_checkout
def test_no_module_reads_code_from_data_or_reaches_the_network() -> None:
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if not node.level else []
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = [node.func.id] if node.func.id in REFUSED_CALLS else []
                found += [f"{path}:{node.lineno}: {name}()" for name in names]
                continue
            elif isinstance(node, ast.Attribute) and node.attr == "load":
                loads = isinstance(node.value, ast.Name) and node.value.id in {"torch", "np"}
                found += [f"{path}:{node.lineno}: {ast.unparse(node)}"] if loads else []
                continue
            else:
                continue
            found += [
                f"{path}:{node.lineno}: import {name}"
                for name in names
                if name.split(".")[0] in REFUSED_MODULES
            ]
    assert found == []


HOSTILE = {
    "not json": "__import__('os').abort()",
    "another type": "[1, 2]",
    "deep": "[" * 100_000,
    "a number": "1e999",
    "wrong values": '{"fingerprint": 5, "isas": {"a": []}, "compiler": null}',
    "binary": "\x00\ufffd",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_library_described_by_nonsense_is_a_library_without_description(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "_C_cpu.json").write_text(HOSTILE[name])
    facts = _build.describe(tmp_path / "_C_cpu.so")
    assert isinstance(facts, dict)
    assert facts.get("fingerprint") != _build.plan.fingerprint("cpu", _build.source_root())


@pytest.mark.parametrize("name", HOSTILE)
def test_benchmark_results_of_nonsense_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(HOSTILE[name])
    with pytest.raises(BenchError, match="results\\.json"):
        results.load(tmp_path)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_lock_files_pin_every_package_by_version_and_hash(lock: Path) -> None:
    text = re.sub(r"^#.*\n", "", lock.read_text(), flags=re.MULTILINE)
    blocks = re.findall(r"^\S.*\n(?: .*\n)*", text, re.MULTILINE)
    assert "".join(blocks) == text
    assert blocks
    for block in blocks:
        requirement, *hashes = re.split(r" \\\n\s+--hash=", block.rstrip("\n"))
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; .*)?", requirement), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", word) for word in hashes), requirement
        assert not re.match(r"torch=|nvidia-cudnn", requirement), "as the machine needs it"


@in_checkout
def test_lock_file_has_what_the_extras_ask_for() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    words = [word for name in extras if name not in NOT_IN_CI for word in extras[name]]
    lock = "\n".join(path.read_text() for path in LOCKS)
    pinned = dict(re.findall(r"^([a-z0-9-]+)==([\w.]+)", lock, re.MULTILINE))
    for word in words:
        wanted = packaging.Requirement(word)
        if wanted.name == "fused_mlp":
            continue
        name = wanted.name.replace("_", "-")
        assert name in pinned, f"{word}: run make lock"
        assert pinned[name] in wanted.specifier, f"{word}: run make lock"


@in_checkout
def test_torch_is_the_only_requirement() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^dependencies = \["torch>=2\.13"\]$', project, re.MULTILINE)
