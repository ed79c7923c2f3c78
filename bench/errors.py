"""What stops a benchmark with a message and no traceback."""

from __future__ import annotations


class BenchError(Exception):
    """A wrong argument or file; the message says which and what would do."""


class Unsupported(Exception):
    """A rival cannot run a case; the message says why."""


class Wrong(Exception):
    """A contestant's results are too far from float64's; the message says how far."""
