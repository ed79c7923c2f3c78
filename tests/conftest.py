"""Where the common tests run: every device of this machine, every backend it has there.

A test that takes the ``device`` fixture runs once a device and backend: native and reference on
the CPU, native and Triton on a GPU (marked ``gpu``). FUSED_MLP_BACKEND chooses one backend, as in
``FUSED_MLP_BACKEND=triton TRITON_INTERPRET=1 pytest tests/test_linear_relu.py``.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# AOTAutograd caches compiled backward passes on disk, under a key that knows nothing of the
# kernels' sources: yesterday's backward would be tested today. Set before torch is imported.
_caches = tempfile.mkdtemp(prefix="fused_mlp-tests-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _caches
atexit.register(shutil.rmtree, _caches, ignore_errors=True)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch._functorch.config  # noqa: E402
import torch._inductor.config  # noqa: E402
from support.processes import Processes  # noqa: E402

from fused_mlp import backends  # noqa: E402

# The same examples on every run: a red run is red again on the next machine. `make fuzz` asks for
# a number of new ones.
_FUZZ = int(os.environ.get("FUSED_MLP_FUZZ", "0"))
hypothesis.settings.register_profile(
    "fused_mlp",
    derandomize=not _FUZZ,
    database=None,
    deadline=None,
    max_examples=_FUZZ or (8 if os.environ.get("TRITON_INTERPRET") == "1" else 25),
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("fused_mlp")

_THREADS = torch.get_num_threads()
_CHOSEN = os.environ.get("FUSED_MLP_BACKEND", "auto")


def _targets() -> list:
    """Return the (device, backend) pairs to test, as pytest parameters."""
    on_cpu = ("native", "reference") if _CHOSEN == "auto" else (_CHOSEN,)
    on_cuda = ("native", "triton") if _CHOSEN == "auto" else (_CHOSEN,)
    if not torch.cuda.is_available():
        on_cuda = on_cuda[:1]  # one skipped test says enough
    pairs = [pytest.param(("cpu", name), id=f"cpu-{name}") for name in on_cpu]
    pairs += [
        pytest.param(("cuda", name), id=f"cuda-{name}", marks=pytest.mark.gpu) for name in on_cuda
    ]
    return pairs


@pytest.fixture(params=_targets())
def target(request: pytest.FixtureRequest) -> Iterator[tuple[torch.device, str]]:
    """The device and the name of the backend that serves it during the test."""
    kind, backend = request.param
    missing = [s for s in backends.status() if s.device == kind and s.name == backend]
    if missing and not missing[0].available:
        pytest.skip(f"no {backend} backend on {kind}: {missing[0].detail}")
    with backends.use_backend(backend):
        yield torch.device(kind), backend


@pytest.fixture
def device(target: tuple[torch.device, str]) -> torch.device:
    """The device to make tensors on."""
    return target[0]


@pytest.fixture
def backend(target: tuple[torch.device, str]) -> str:
    """The name of the backend under test."""
    return target[1]


@pytest.fixture(autouse=True)
def _same_state() -> Iterator[None]:
    """Seed torch's generators, run on one thread, and give back the number of threads.

    Torch splits even small operations, and where other processes hold the cores each split waits
    for them: these files then take ten times as long. ``all_threads`` is for what needs several;
    FUSED_MLP_TEST_THREADS sets another number than one (``make tsan``).
    """
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("FUSED_MLP_TEST_THREADS", "1")))
    yield
    torch.set_num_threads(_THREADS)


@pytest.fixture
def all_threads(_same_state: None) -> None:
    """Run the test on several threads, two at least."""
    torch.set_num_threads(max(2, _THREADS))


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """A graph compiled over one backend, from torch's caches too, does not fit the other."""
    torch.compiler.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


@pytest.fixture
def native(device: torch.device) -> None:
    """Skip where the CPU library does not run, which alone has ops of its own for graphs."""
    if (device.type, backends.active_backend("cpu")) != ("cpu", "native"):
        pytest.skip("only the CPU library has these ops")


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Two processes in a gloo group, started by the first test that asks for them."""
    processes = Processes(2, tmp_path_factory.mktemp("processes"))
    yield processes
    processes.stop()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, skip the tests that need one: one a file stands for them in the report."""
    if torch.cuda.is_available():
        return
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("gpu"):
            files.setdefault(item.path, []).append(item)
    rest = {item for tests in files.values() for item in tests[1:]}
    for tests in files.values():
        reason = f"torch sees no GPU ({len(tests)} tests of this file need one)"
        tests[0].add_marker(pytest.mark.skip(reason=reason))
    items[:] = [item for item in items if item not in rest]
    config.hook.pytest_deselected(items=list(rest))


def pytest_report_header() -> list[str]:
    """Say in the first lines of a run what it tests."""
    header = [f"torch {torch.__version__}, {torch.get_num_threads()} threads"]
    for state in backends.status():
        word = "active" if state.active else "available" if state.available else "missing"
        header.append(f"fused_mlp {state.name} on {state.device}: {word} ({state.detail})")
    return header
