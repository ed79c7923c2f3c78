"""Whether an op leaves memory that it gives back unwritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def assert_equal_bytes(prepare: Callable[[], Callable[[], Any]]) -> None:
    """Assert that equal calls give equal bytes whatever was in memory before.

    Args:
        prepare: makes the arguments and returns the call, which gives one tensor or several.
    """
    first = _bytes_of(prepare()())
    for filling in (0xFF, 0x3F) * 8:
        call = prepare()
        blocks = [torch.full_like(result, filling) for result in first for _ in range(32)]
        del blocks  # memory to be used again
        assert all(map(torch.equal, _bytes_of(call()), first))


def _bytes_of(results: Any) -> list[Tensor]:
    tensors = [results] if isinstance(results, Tensor) else results
    return [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
