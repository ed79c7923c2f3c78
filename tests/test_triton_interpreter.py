"""The common tests once more, over the Triton kernels in Triton's interpreter.

Triton decides when it is imported whether it compiles or interprets, so they run in a process of
their own. ``FUSED_MLP_BACKEND=triton TRITON_INTERPRET=1 pytest tests/test_normalize.py`` is one
of them by hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import INTERPRETED

TESTS = Path(__file__).parent
# A few of everything: each op, its layouts, empty input, gradcheck and the dropout mask.
CHOSEN = " or ".join(
    ("test_layouts", "test_empty", "test_gradcheck", "test_mask", "test_any_backend",
     "test_running_statistics")
)  # fmt: skip
FILES = (
    "test_research_net.py",
    "test_dropout.py",
    *(
        pytest.param(file, marks=pytest.mark.slow)  # 45 to 100 s each
        for file in (
            "test_normalize.py",
            "test_linear_relu.py",
            "test_batch_norm_leaky_relu.py",
            "test_linear_act.py",
            "test_batch_norm_act.py",
            "test_autograd.py",
        )
    ),
)


def run(file: str, *arguments: str) -> None:
    environment = dict(os.environ, FUSED_MLP_BACKEND="triton", TRITON_INTERPRET="1")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-W", "ignore::RuntimeWarning", *arguments, str(TESTS / file)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=TESTS.parent, check=False
    )
    if done.returncode == 5:
        pytest.skip("no test of this file was chosen")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture(autouse=True)
def _needs_triton() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if INTERPRETED:
        pytest.skip("already in Triton's interpreter")


@pytest.mark.parametrize("file", FILES)
def test_common_tests(file: str) -> None:
    run(file, "-m", "not slow", "-k", CHOSEN)


# What users have around their networks, each 30 to 60 s.
TOOLS = ("test_autocast.py", "test_functional_transforms.py", "test_autograd_tools.py",
         "test_module_life.py")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("file", TOOLS)
def test_tools_around_a_network(file: str) -> None:
    run(file, "-m", "not slow")


@pytest.mark.slow
def test_graphs_of_torch_compile() -> None:
    run("test_compile.py", "-m", "not slow", "-k", "no_graph_break or dropout or step_is_the")
