"""What the demo tells its user in place of a traceback."""

from __future__ import annotations

import importlib.util


class DemoError(Exception):
    """The demo cannot go on; the message says why, in words for the user."""


def require_extras(*modules: str) -> None:
    """Raise DemoError, naming the remedy, unless the modules of the ``demo`` extra are there."""
    packages = {"sklearn": "scikit-learn"}
    missing = [packages.get(m, m) for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise DemoError(
            f"the demo needs {', '.join(missing)}, which {verb} not installed; "
            'run: pip install "fused_mlp[demo]"'
        )
