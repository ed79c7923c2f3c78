"""A module that keeps something for its next call and nothing of it in copies and files."""

from __future__ import annotations

from typing import Any

from torch import nn


class CachingModule(nn.Module):
    """Keeps ``_cache`` in its ``__dict__`` and out of ``copy.deepcopy``, pickle and torch.save."""

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_cache", None)
        return state
