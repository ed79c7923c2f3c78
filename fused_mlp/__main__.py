"""``python -m fused_mlp doctor`` and ``python -m fused_mlp demo``."""

from __future__ import annotations

import sys

from .command_line import run

_USAGE = """\
usage: python -m fused_mlp COMMAND [options]

commands:
  doctor   say what runs on this machine and what to install for the rest
  demo     train a network on real data, eager and fused, and compare the two

`python -m fused_mlp COMMAND --help` lists the options of a command.
"""


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status."""
    command, *rest = arguments or ["--help"]
    if command == "doctor":
        from . import doctor

        return doctor.main(rest)
    if command == "demo":
        from . import demo  # needs scikit-learn and matplotlib, the rest of the package does not

        return int(demo.main(rest) or 0)
    if command in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    print(f"unknown command {command!r}\n\n{_USAGE}", end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
