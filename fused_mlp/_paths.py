"""Makes kernels/ import as ``fused_mlp.kernels`` from a checkout.

A wheel has the folder inside the package. In a checkout, and so in an editable install, it stands
beside it; the package's own folder shadows any mapping an installer makes when Python runs from
the top of the checkout. So a finder for this one name is registered on import.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_NAME = f"{__package__}.kernels"
_PACKAGE = Path(__file__).resolve().parent
_BESIDE = _PACKAGE.parent / "kernels"


class _KernelsFinder:
    """Finds ``fused_mlp.kernels`` beside the package; its submodules follow from its path."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _NAME:
            return None
        return importlib.util.spec_from_file_location(
            name, _BESIDE / "__init__.py", submodule_search_locations=[str(_BESIDE)]
        )


def install() -> None:
    """Registers the finder where kernels/ is not inside the package. Harmless when repeated."""
    if (_PACKAGE / "kernels").is_dir() or not (_BESIDE / "__init__.py").is_file():
        return
    if not any(finder is _KernelsFinder for finder in sys.meta_path):
        sys.meta_path.append(_KernelsFinder)


install()
