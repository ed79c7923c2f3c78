"""Builds the libraries of csrc/ while the package is installed; the rest is in pyproject.toml.

FUSED_MLP_CPU and FUSED_MLP_CUDA say for either library: "auto" (the default: build it if it can be
built and the torch beside it could use it, else install without it), "1" (build it, or fail), "0"
(leave it out).
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_build() -> ModuleType:
    """fused_mlp/_build by its path: importing fused_mlp itself would import torch."""
    folder = ROOT / "fused_mlp" / "_build"
    spec = importlib.util.spec_from_file_location(
        "fused_mlp_build", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_build = load_build()


class BuildLibraries(build_ext):
    """Builds plain shared libraries that torch loads; they are no Python extension modules."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = (ROOT if in_place else Path(self.build_lib).resolve()) / "fused_mlp"
        for kind in ("cpu", "cuda"):
            output = package / f"_C_{kind}.so"
            wanted = os.environ.get(f"FUSED_MLP_{kind.upper()}", "auto")
            reason = self.why_not(kind, wanted) or self.try_to_build(kind, output, wanted == "1")
            if reason:
                for stale in (output, output.with_suffix(".json")):
                    stale.unlink(missing_ok=True)
                print(f"fused_mlp: no {output.name}: {reason}", file=sys.stderr)

    def why_not(self, kind: str, wanted: str) -> str:
        """Returns '' or why the library is not even tried."""
        if wanted == "0":
            return "left out"
        torch = _build.find_torch().path
        if kind == "cuda" and wanted == "auto" and torch and _build.torch_lacks_cuda(torch):
            # seven architectures take ten minutes on two cores, and nothing here could load them
            return f"torch in {torch} is built without CUDA; FUSED_MLP_CUDA=1 builds it anyway"
        return ""

    def try_to_build(self, kind: str, output: Path, required: bool) -> str:
        """Returns '' or why there is no library; raises only where one is required."""
        folder = ROOT / "build" / "fused_mlp" / kind
        if not os.access(ROOT, os.W_OK):
            folder = Path(self.build_temp).resolve() / kind
        try:
            _build.build_library(kind, ROOT / "csrc", folder, output)
        except _build.BuildUnavailable as error:
            print(getattr(error, "output", ""), file=sys.stderr)
            if required:
                raise SystemExit(f"fused_mlp: {error}") from error
            return str(error)
        return ""

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in names them


class PlatformWheel(bdist_wheel):
    """One wheel for every Python and every torch from 2.13: the libraries use neither's own ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["fused_mlp", "fused_mlp.*"]),
        "fused_mlp.kernels",
        *[f"fused_mlp.kernels.{name}" for name in find_packages("kernels")],
        "fused_mlp.csrc",
    ],
    package_dir={"fused_mlp.kernels": "kernels", "fused_mlp.csrc": "csrc"},
    package_data={"fused_mlp": ["py.typed"], "fused_mlp.csrc": ["**/*"]},
    include_package_data=False,
    ext_modules=[Extension(f"fused_mlp._C_{kind}", []) for kind in ("cpu", "cuda")],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
