"""``python -m fused_mlp demo``: train one network eagerly and fused, on real data, side by side."""

from .cli import main

__all__ = ["main"]
