"""``python -m fused_mlp`` and ``python -m bench`` where whoever reads their output has gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_unread(*command: str) -> subprocess.CompletedProcess[bytes]:
    """Run ``python -m command`` with nobody at the other end of its output, as behind a head."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=writer,
            stderr=subprocess.PIPE, timeout=300,
        )  # fmt: skip
    finally:
        os.close(writer)


@pytest.mark.parametrize("command", ["fused_mlp", "fused_mlp doctor"])
def test_reader_that_has_gone(command: str) -> None:
    result = run_unread(*command.split())
    assert (result.returncode, result.stderr.decode()) == (141, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "extras"),
    [
        ("fused_mlp doctor --help", ()),
        ("fused_mlp demo --epochs 1 --batch-size 512 --output", ("sklearn", "matplotlib", "rich")),
        ("bench --smoke --output", ("matplotlib", "rich")),
    ],
)
def test_reader_that_has_gone_from_help_and_tables(
    tmp_path: Path, command: str, extras: tuple[str, ...]
) -> None:
    """Of these argparse and rich take notice first, and end with 0 and 1."""
    for name in extras:
        pytest.importorskip(name)
    words = command.split()
    result = run_unread(*words, *([str(tmp_path / "run.png")] if words[-1] == "--output" else []))
    assert (result.returncode in (0, 1, 141), result.stderr.decode()) == (True, "")


def test_closed_output() -> None:
    """``>&-``: there is no output at all, and nothing to flush."""
    command = f'"{sys.executable}" -m fused_mlp --help >&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr.decode()) == (0, "")
