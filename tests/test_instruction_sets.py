"""The CPU kernels of every instruction set this processor has, each in a process made to use it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import native_python

from fused_mlp import _build, backends

TESTS = Path(__file__).resolve().parent
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")
# Every activation and dtype over odd sizes, whole vectors, and beyond a core's cache.
CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from support import ACTIVATIONS, DTYPES, act_case, batch_norm_case, check_case, check_special_values
from support import research_case
from fused_mlp import backends

torch.set_num_threads(1)
cpu = torch.device("cpu")
for dtype in DTYPES:
    for kind in ACTIVATIONS:
        check_case(act_case(kind, (33, 19), 21, p=0.3, dtype=dtype, device=cpu))
        check_case(act_case(kind, (20, 64), 32, bias=False, dtype=dtype, device=cpu))
        check_case(act_case(kind, (30, 300), 37, p=0.3, dtype=dtype, device=cpu))
        check_special_values(kind, dtype, cpu)
    for activation in ("none", "relu", "leaky_relu"):
        for shape in ((33, 21), (4, 3, 25)):
            options = {"activation": activation, "p": 0.3, "dtype": dtype, "device": cpu}
            check_case(batch_norm_case(shape, True, **options))
            check_case(batch_norm_case(shape, False, **options))
for dtype in (torch.float32, torch.bfloat16):
    for widths in ((17, 33, 9, 3), (40, 64, 32, 5), (300, 270, 33, 7)):
        for training in (True, False):
            check_case(research_case(70, widths, training, 0.3, dtype=dtype, device=cpu))
print(backends.isa())
"""

pytestmark = pytest.mark.skipif(
    backends.active_backend("cpu") != "native", reason="the CPU library does not run"
)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    name = request.param
    if name not in _build.describe(_build.library_path("cpu"))["isas"]:
        pytest.skip(f"the library has no kernels for {name}")
    ask = "from fused_mlp import backends; print(backends.isa())"
    used = native_python("-c", ask, FUSED_MLP_CPU_ISA=name).strip()
    if used != name:
        pytest.skip(f"this processor has no {name}: {used} runs in its place")
    return name


def test_activations(level: str) -> None:
    assert native_python("-c", CHECK, str(TESTS), FUSED_MLP_CPU_ISA=level).split() == [level]
