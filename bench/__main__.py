"""The commands of ``python -m bench``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fused_mlp.command_line import run

from .errors import BenchError

# Module and function; imported when asked for, since some need what others do without.
_COMMANDS = {
    "compare": ("compare", "main"),
    "report": ("report", "main"),
    "overhead": ("overhead", "main"),
    "compile": ("compile_cost", "main"),
    "train-step": ("train_step", "main"),
    "docs": ("docs", "main"),
    "gpu-report": ("gpu_command", "main"),
}
_EXTRAS = ("matplotlib", "numpy", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; without one, the benchmarks.

    Returns:
        0; 1 when something stops it, which is said on stderr; 2 for wrong options.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    module, function = "run", "main"
    if arguments and arguments[0] in _COMMANDS:
        module, function = _COMMANDS[arguments.pop(0)]
    try:
        command = getattr(importlib.import_module(f"bench.{module}"), function)
        return int(command(arguments))
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _EXTRAS:
            raise
        print(
            f'error: {error.name} is not installed: pip install "fused_mlp[bench]"',
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run(main))
