"""Fixtures.  CUDA sources beside the tests are compiled when first used; without nvcc those tests are skipped."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Options a kernel must give the same results under.
MODES = {"plain": {}, "checked": {"check_races": True, "check_uninit": True}, "shuffled": {"shuffle": 1}}


@pytest.fixture(scope="session")
def ptx(tmp_path_factory):
    """ptx("kernels", arch) -> PTX text of kernels.cu."""
    from ptxsim import nvcc
    cache = tmp_path_factory.mktemp("ptx")

    def compile_(name, arch=80):
        if reason := nvcc.why_not():
            pytest.skip(reason)
        return nvcc.compile_ptx(HERE / f"{name}.cu", arch, ("-std=c++17",), cache)
    return compile_


@pytest.fixture(scope="session")
def modules(ptx):
    """modules("kernels", arch, **options) -> Module, built once for each combination."""
    from ptxsim import Module
    built = {}

    def get(name, arch=80, **options):
        key = name, arch, *sorted(options.items())
        if key not in built:
            built[key] = Module(ptx(name, arch), **options)
        return built[key]
    return get


@pytest.fixture(params=MODES)
def mode(request):
    """Module options to run under."""
    return MODES[request.param]


QUICK = ("test_instructions.py", "test_package.py")


def pytest_collection_modifyitems(items):
    """All but the quick files compile for GPUs or run long: CI runs them, a first `make test` need not."""
    for item in items:
        if HERE in item.path.parents and item.path.name not in QUICK:
            item.add_marker(pytest.mark.slow)
