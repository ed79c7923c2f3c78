"""What the command lines of the package share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


def run(main: Callable[[], int]) -> int:
    """Run a command and return its exit status.

    Where whoever reads the output has gone, as ``head`` has after its lines, the command ends
    without a word and with the status that a shell gives to tools that SIGPIPE ended: 141.
    """
    try:
        try:
            return main()
        finally:  # here rather than at the interpreter's end, where nobody catches what it raises
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer is written once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
