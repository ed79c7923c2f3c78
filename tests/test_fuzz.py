"""Any shape, layout, dtype and option hypothesis thinks of, against the float64 reference.

The suite takes a few examples of each; ``make fuzz`` takes as many as it is told, new ones on each
run. What it finds becomes a named test beside the op's others.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    Case,
    assert_as_accurate,
    batch_norm_case,
    check_case,
    lay_out,
    linear_case,
    mlp_case,
    normalize_case,
    research_case,
)
from torch import Tensor

from fused_mlp import backends

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(7200)]

dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
sizes = st.integers(0, 20) | st.sampled_from((31, 32, 33, 64, 65, 100, 257))


def laid_out(case: Case, data: st.DataObject, alike: tuple[str, ...] = ()) -> list[Tensor]:
    """The case's tensors, each in a layout of its own.

    Args:
        alike: inputs whose rows must stay different, so none is repeated with stride 0.
    """
    tensors = []
    for name, tensor in case.tensors.items():
        layout = data.draw(layouts, label=f"layout of {name}")
        if layout == "expanded" and (name in alike or tensor.shape[:1] == (0,)):
            layout = "steps"
        tensors.append(lay_out(tensor, layout))
    return tensors


@given(
    # An empty dimension beside wide ones has statistics of any size: of those that are left too.
    shape=st.lists(sizes, max_size=5).filter(lambda s: math.prod(max(n, 1) for n in s) <= 20_000),
    correction=st.sampled_from((0.0, 1.0, 2.5)),
    eps=st.sampled_from((0.0, 1e-6, 0.1)),
    offset=st.sampled_from((0.0, 100.0)),
    dtype=dtypes,
    data=st.data(),
)
def test_normalize(device, shape, correction, eps, offset, dtype, data) -> None:
    dims = st.lists(st.integers(0, max(len(shape) - 1, 0)), min_size=1, unique=True)
    dim = data.draw(st.none() | dims, label="dim") if shape else None
    case = normalize_case(
        shape, dim, correction, eps, dtype=dtype, device=device, offset=offset if eps else 0.0
    )
    tensors = laid_out(case, data, ("input",))
    count = math.prod(shape if dim is None else (shape[d] for d in dim))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*degrees of freedom")
        if count > 4 + correction or math.prod(shape) == 0:
            check_case(case, tensors)
        else:  # the gradient of a few standardized values is a difference of nearly equal terms
            (x,) = tensors
            assert_as_accurate(case.fused(x), case.plain(x), case.exact(x.double()))


LINEAR = {
    "batch": st.lists(sizes, max_size=4).filter(lambda b: math.prod(max(n, 1) for n in b) <= 300),
    "in_features": sizes,
    "out_features": sizes,
    "bias": st.booleans(),
    "p": st.sampled_from((0.0, 0.3, 1.0)),
    "dtype": dtypes,
    "data": st.data(),
}


@given(**LINEAR)
def test_linear_relu(device, batch, in_features, out_features, bias, p, dtype, data) -> None:
    case = linear_case((*batch, in_features), out_features, bias, p, dtype=dtype, device=device)
    check_case(case, laid_out(case, data))


@given(
    **LINEAR,
    activation=st.sampled_from(("none", "leaky_relu", "gelu", "silu", "tanh")),
    approximate=st.sampled_from(("none", "tanh")),
    negative_slope=st.sampled_from((0.01, 0.0, 1.0, -0.5)),
)
def test_linear_act(device, batch, in_features, out_features, bias, p, dtype, data, **options):
    if options["activation"] != "gelu":
        options["approximate"] = "none"
    shape = (*batch, in_features)
    case = linear_case(shape, out_features, bias, p, dtype=dtype, device=device, **options)
    check_case(case, laid_out(case, data))


@given(
    rows=sizes,
    channels=sizes,
    length=st.none() | st.integers(0, 9),
    training=st.booleans(),
    affine=st.sampled_from(("both", "weight", "bias", "none")),
    activation=st.sampled_from((None, "none", "relu", "leaky_relu")),
    p=st.sampled_from((0.0, 0.3, 1.0)),
    negative_slope=st.sampled_from((0.01, 0.0, 1.0, -0.5)),
    dtype=dtypes,
    data=st.data(),
)
def test_batch_norm(device, rows, channels, length, training, affine, dtype, data, **options):
    """batch_norm_act of an activation, batch_norm_leaky_relu without."""
    if options["activation"] is None:
        options["p"] = 0.0
    values = rows * (1 if length is None else length)
    assume(not training or values == 0 or values > 4)  # see test_batch_norm_leaky_relu.py for fewer
    assume(channels)  # torch's own has no answer without channels
    shape = (rows, channels) if length is None else (rows, channels, length)
    case = batch_norm_case(shape, training, affine, dtype=dtype, device=device, **options)
    check_case(case, laid_out(case, data, ("input",)))


@given(
    rows=st.integers(10, 100),
    # Batch norm takes the scale of what comes before it away: after one or two columns nothing of
    # the weight's gradient is left.
    widths=st.lists(st.integers(4, 70), min_size=3, max_size=7),
    training=st.booleans(),
    p=st.sampled_from((0.0, 0.3)),
    affine=st.booleans(),
    data=st.data(),
)
def test_research_net(device, rows, widths, training, p, affine, data) -> None:
    """In float64, where a value at a kink does not change its side."""
    case = research_case(rows, widths, training, p, affine, dtype=torch.float64, device=device)
    check_case(case, laid_out(case, data, ("input", *(f"weights[{i}]" for i in range(6)))))


@pytest.mark.skipif(backends.active_backend("cpu") != "native", reason="the CPU library alone")
@given(
    batch=st.lists(st.integers(0, 30), max_size=2) | st.lists(sizes, min_size=1, max_size=1),
    features=st.integers(1, 40) | st.just(300),
    layers=st.lists(
        st.tuples(st.integers(1, 40) | st.just(270), st.sampled_from([*ACTIVATIONS])),
        min_size=1,
        max_size=5,
    ),
    p=st.sampled_from((0.0, 0.3)),
    biases=st.booleans(),
    data=st.data(),
)
def test_mlp(batch, features, layers, p, biases, data) -> None:
    """In float64, where a value at a kink does not change its side."""
    widths, kinds = zip(*layers, strict=True)
    case = mlp_case((*batch, features), widths, kinds, p, biases, dtype=torch.float64)
    check_case(case, laid_out(case, data))


@pytest.mark.skipif(backends.active_backend("cpu") != "native", reason="the CPU library alone")
@given(
    rows=st.integers(10, 100),
    widths=st.lists(st.integers(4, 70), min_size=3, max_size=6),
    norms=st.sets(st.integers(0, 4), min_size=1),
    kind=st.sampled_from(("none", "relu", "leaky_relu")),
    other=st.sampled_from([*ACTIVATIONS]),
    p=st.sampled_from((0.0, 0.3)),
    data=st.data(),
    options=st.fixed_dictionaries({n: st.booleans() for n in ("training", "affine", "biases")}),
)
def test_mlp_with_batch_norms(rows, widths, norms, kind, other, p, data, options) -> None:
    features, *widths = widths
    norms = tuple(sorted(n for n in norms if n < len(widths)))
    kinds = [kind if layer in norms else other for layer in range(len(widths))]
    case = mlp_case((rows, features), widths, kinds, p, norms=norms, dtype=torch.float64, **options)
    rows_differ = ("input", *(f"weights[{i}]" for i in range(5)))
    check_case(case, laid_out(case, data, rows_differ))


@pytest.mark.slow
def test_no_bytes_end_the_process(tmp_path: Path) -> None:
    """A short run of what `make fuzz-bytes` runs for longer."""
    pytest.importorskip("atheris", reason="needs the extra fuzz")
    root = Path(__file__).parent.parent
    command = [sys.executable, str(root / "scripts" / "fuzz_bytes.py"), "-runs=5000", "-seed=1"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 5000 runs" in done.stderr


def test_no_arguments_end_the_process() -> None:
    """In a process of its own, whose last line of output names the call that ended it."""
    examples = int(os.environ.get("FUSED_MLP_FUZZ", "0"))
    seed = random.randrange(2**31) if examples else 0
    command = [sys.executable, "-m", "support.wrong_arguments"]
    command += ["--cases", str(examples or 1000), "--seed", str(seed)]
    tests = Path(__file__).parent
    paths = os.pathsep.join(map(str, (tests, tests.parent)))
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    last = result.stdout.rstrip().rsplit("\n", 1)[-1]
    assert result.returncode == 0, f"seed {seed}, call {last}\n{result.stderr[-3000:]}"
    assert not last.startswith("0 calls")
