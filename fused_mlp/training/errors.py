"""Why a step takes the ordinary way."""

from __future__ import annotations


class Ordinary(Exception):
    """Raised while a plan is made; the message says what the fused step cannot take."""
