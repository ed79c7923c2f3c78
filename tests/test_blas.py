"""Wide layers by torch's BLAS and without it, each in a process made to choose so."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import native_python

from fused_mlp import backends

TESTS = Path(__file__).resolve().parent
# Layers, chains and networks on both sides of a core's cache and of the rows from which BLAS is
# chosen, forward and backward; the rows of a strided matrix as input.
CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from support import ACTIVATIONS, act_case, check_case, lay_out, mlp_case, research_case
from fused_mlp import on_chip

cpu = torch.device("cpu")
for threads in (1, 2):
    torch.set_num_threads(threads)
    for dtype in (torch.float32, torch.float64):
        for rows in (5, 96, 300):
            for kind in ACTIVATIONS:
                check_case(act_case(kind, (rows, 300), 450, p=0.3, dtype=dtype, device=cpu))
            case = act_case("relu", (rows, 370), 360, bias=False, dtype=dtype, device=cpu)
            for layout in ("contiguous", "gap", "steps", "expanded"):
                case.tensors["input"] = lay_out(case.tensors["input"], layout)
                case.tensors["weight"] = lay_out(case.tensors["weight"], layout)
                check_case(case)
            check_case(act_case("gelu", (rows, 1050), 1000, dtype=dtype, device=cpu))
            check_case(mlp_case((rows, 150), (130, 140, 3), ("relu", "tanh", "none"), dtype=dtype))
            check_case(mlp_case((rows, 40), (370, 360, 3), ("relu", "gelu", "none"), dtype=dtype))
        for rows, *widths in (
            (5, 40, 1030, 1020, 9), (100, 40, 370, 390, 9),
            (1100, 300, 470, 33, 7), (600, 9, 300, 1),
        ):
            for training in (True, False):
                check_case(research_case(rows, widths, training, 0.3, dtype=dtype, device=cpu))
print(on_chip.runs_blas())
"""

pytestmark = pytest.mark.skipif(
    backends.active_backend("cpu") != "native", reason="the CPU library does not run"
)


@pytest.mark.parametrize("blas", ["0", "1"])
def test_numbers(blas: str) -> None:
    # Threads that wait in a loop take the cores from those of another process: 170 s, not 30.
    environment = {"FUSED_MLP_CPU_BLAS": blas, "OMP_WAIT_POLICY": "passive"}
    printed = native_python("-c", CHECK, str(TESTS), **environment)
    assert printed.split() == [str(blas == "1")]


def test_without_it_rows_and_threads_keep_their_bits() -> None:
    tests = [str(TESTS / "test_threads.py"), str(TESTS / "test_determinism.py")]
    chosen = ["-k", "test_threads or test_linear_act", "-p", "no:cacheprovider", "-q", "-n", "0"]
    assert " passed" in native_python("-m", "pytest", *tests, *chosen, FUSED_MLP_CPU_BLAS="0")
