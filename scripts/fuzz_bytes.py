"""Drives every raw op from bytes: atheris (libFuzzer) decides ops, shapes, strides and options.

    make fuzz-bytes                                  # 100,000 runs
    python scripts/fuzz_bytes.py -runs=20000 FOLDER  # libFuzzer's options; FOLDER keeps inputs

A call may return or raise what torch's own ops raise; another exception, a signal or a call that
takes longer than a minute stops the run, and libFuzzer writes the bytes to a file (crash-…), which
the same command with that file as its argument runs again. It is the Python side, what chooses the
arguments, that libFuzzer sees covered: GCC does not instrument C++ for it. Needs
``pip install "fused_mlp[fuzz]"``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import atheris
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import wrong_arguments

MOST = 1 << 16  # elements of a tensor's memory


class Bytes:
    """Decisions out of bytes; zeros where they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = atheris.FuzzedDataProvider(data)

    def random(self) -> float:
        return self._data.ConsumeProbability()

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self._data.ConsumeIntInRange(0, len(options) - 1)]


class StridedArguments(wrong_arguments.Arguments):
    """Tensors of any strides and offsets as well."""

    def _tensor(self) -> Tensor:
        tensor = super()._tensor()
        if self._random.random() > 0.3 or tensor.layout != torch.strided or tensor.is_nested:
            return tensor
        if tensor.device.type != "cpu" or tensor.is_quantized:
            return tensor
        shape = tensor.shape
        strides = [self._random.choice((0, 1, 2, 3, 7, 16, 64)) for _ in shape]
        offset = self._random.choice((0, 1, 3, 16))
        reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n > 0)
        if offset + reach + 1 > MOST:
            return tensor
        memory = torch.zeros(offset + reach + 1, dtype=tensor.dtype)
        return memory.as_strided(shape, strides, offset)


def run_one(data: bytes) -> None:
    """Make the call the bytes stand for."""
    name, arguments, named = StridedArguments(Bytes(data), len(data)).call()
    namespace, op = name.split("::")
    with contextlib.suppress(*wrong_arguments.EXPECTED):
        getattr(getattr(torch.ops, namespace), op).default(*arguments, **named)


def main() -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    atheris.instrument_func(StridedArguments._tensor)
    options = ["-timeout=60", "-rss_limit_mb=0", "-max_len=512", "-len_control=0"]
    atheris.Setup([sys.argv[0], *options, *sys.argv[1:]], run_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
