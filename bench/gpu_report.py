"""What the Triton kernels compile to on every chip: registers, spills, memory, instructions.

Needs no GPU. One half of what ``python -m bench gpu-report`` prints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fused_mlp import activations

from .compiled import CHIPS, Kernel, collect
from .gpu_table import Line

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """An op at a representative shape."""

    op: str
    shape: str
    dtype: torch.dtype
    precision: str  # of float32 products: "highest" (multiply-adds) or "high" (tf32)
    run: Callable[[], object]
    matrix: bool = False  # whether its products belong on tensor cores
    streaming: bool = False  # whether it lives on memory bandwidth, so on 128-bit accesses

    @property
    def dtype_name(self) -> str:
        if self.matrix and self.dtype == FP32:
            return "tf32"
        return str(self.dtype).removeprefix("torch.")


def cases() -> list[Case]:
    """Return every op, forward and backward, at the shapes the report covers."""
    found: list[Case] = []
    for dtype in (FP32, BF16):
        found += [
            _case("normalize", "65536x64, whole", dtype, _normalize(65536, 64, None)),
            _case("normalize", "65536x64, columns", dtype, _normalize(65536, 64, [0])),
            _case("normalize", "65536x64, rows", dtype, _normalize(65536, 64, [1])),
            _case("batch_norm_leaky_relu", "65536x32, training", dtype, _batch_norm(True)),
            _case("batch_norm_leaky_relu", "65536x32, eval", dtype, _batch_norm(False)),
            _case("batch_norm_act", "65536x32, ReLU, dropout", dtype, _batch_norm_act()),
        ]
    for dtype, precision in ((FP32, "highest"), (FP32, "high"), (BF16, "highest")):
        products = dtype != FP32 or precision == "high"
        for sizes in ((65536, 64, 64), (8192, 1024, 1024)):
            shape = "x".join(map(str, sizes))
            run = _linear_relu(*sizes, dtype)
            found.append(Case("linear_relu", shape, dtype, precision, run, products))
            run = _linear_act(*sizes, dtype)
            found.append(Case("linear_act", f"{shape}, GELU", dtype, precision, run, products))
        found += [
            network(widths, dtype, precision, products)
            for widths in ((10, 64, 32, 5), (128, 128, 128, 10), (1024, 128, 64, 1024))
        ]
    return found


def network(widths: tuple[int, ...], dtype: torch.dtype, precision: str, matrix: bool) -> Case:
    """Return the network of these widths, forward and backward."""
    shape = f"{widths[0]}, {list(widths[1:-1])}, {widths[-1]}"
    return Case("research_net", shape, dtype, precision, _research_net(widths, dtype), matrix)


def report(
    chips: Sequence[str] = CHIPS, chosen: Sequence[Case] | None = None
) -> list[tuple[Case, Kernel]]:
    """Compile cases for chips and return one entry for each kernel they launch."""
    rows = []
    for case in cases() if chosen is None else chosen:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(case.precision)
        try:
            for chip in chips:
                rows += [(case, kernel) for kernel in collect(chip, case.run)]
        finally:
            torch.set_float32_matmul_precision(before)
    return rows


def lines(rows: Sequence[tuple[Case, Kernel]]) -> list[Line]:
    """Return the report's table: a line for every kernel that a case launches on a chip."""
    return [
        Line(
            backend="triton",
            kernel=k.name.removesuffix("_kernel"),
            problem=f"{case.op} {case.shape}",
            dtype=case.dtype_name,
            chip=k.chip,
            threads=k.num_warps * (32 if k.chip.startswith("sm_") else 64),
            registers=k.registers,
            spilled=k.spilled,
            shared=k.shared,
            products=k.matrix,
            wide_loads=k.wide_loads,
            wide_stores=k.wide_stores,
        )
        for case, k in rows
    ]


# ------------------------------------------------------------------------------- the cases
# Contents do not matter and nothing runs: tensors are allocated, never written.


def _case(op: str, shape: str, dtype: torch.dtype, run: Callable[[torch.dtype], object]) -> Case:
    return Case(op, shape, dtype, "highest", functools.partial(run, dtype), streaming=True)


def _normalize(rows: int, columns: int, dim: list[int] | None) -> Callable[[torch.dtype], object]:
    def run(dtype: torch.dtype) -> None:
        from fused_mlp.kernels import normalize as kernels

        x = torch.empty(rows, columns, dtype=dtype)
        y, mean, std = kernels.normalize(x, dim, 1.0, 0.0)
        kernels.normalize_backward(y, x, mean, std, dim, 1.0, 0.0)

    return run


def _batch_norm(training: bool) -> Callable[[torch.dtype], object]:
    def run(dtype: torch.dtype) -> None:
        from fused_mlp.kernels import batch_norm_leaky_relu as kernels

        x, tracked = torch.empty(65536, 32, dtype=dtype), torch.zeros((), dtype=torch.int64)
        mean, var, weight, bias = torch.empty(4, 32, dtype=dtype).unbind()
        y, saved_mean, rstd = kernels.batch_norm_leaky_relu(
            x, mean, var, tracked, weight, bias, training, 0.1, 1e-5, 0.01
        )
        kernels.batch_norm_leaky_relu_backward(
            y, x, weight, bias, saved_mean, rstd, training, 0.01, [True] * 3
        )

    return run


def _batch_norm_act() -> Callable[[torch.dtype], object]:
    def run(dtype: torch.dtype) -> None:
        from fused_mlp.kernels import batch_norm_act as kernels

        x, seed = torch.empty(65536, 32, dtype=dtype), torch.zeros(2, dtype=torch.int64)
        weight, bias = torch.empty(2, 32, dtype=dtype).unbind()
        behind = activations.RELU, 0.0, 0.3, seed
        y, mean, rstd = kernels.batch_norm_act(
            x, None, None, None, weight, bias, True, 0.1, 1e-5, *behind
        )
        kernels.batch_norm_act_backward(
            y, x, weight, bias, mean, rstd, True, *behind, [True] * 3
        )  # fmt: skip

    return run


def _linear_act(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Callable[[], object]:
    def run() -> None:
        from fused_mlp.kernels import linear_act as kernels

        x, seed = torch.empty(rows, inputs, dtype=dtype), torch.zeros(2, dtype=torch.int64)
        weight, bias = torch.empty(outputs, inputs, dtype=dtype), torch.empty(outputs, dtype=dtype)
        behind = activations.GELU, 0.0, 0.3, seed
        y, kept = kernels.linear_act(x, weight, bias, *behind, True)
        kernels.linear_act_backward(y, x, weight, kept, *behind, [True] * 3)

    return run


def _linear_relu(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Callable[[], object]:
    def run() -> None:
        from fused_mlp.kernels import linear_relu as kernels

        x, seed = torch.empty(rows, inputs, dtype=dtype), torch.zeros(2, dtype=torch.int64)
        weight = torch.empty(outputs, inputs, dtype=dtype)
        bias = torch.empty(outputs, dtype=dtype)
        y = kernels.linear_relu(x, weight, bias, 0.3, seed)
        kernels.linear_relu_backward(y, x, weight, y, 0.3, [True] * 3)

    return run


def _research_net(widths: tuple[int, ...], dtype: torch.dtype) -> Callable[[], object]:
    def run() -> None:
        from fused_mlp.kernels import research_net as kernels

        layers, channels = len(widths) - 1, widths[-2]
        x, seed = torch.empty(65536, widths[0], dtype=dtype), torch.zeros(2, dtype=torch.int64)
        weights = [torch.empty(n, k, dtype=dtype) for k, n in zip(widths, widths[1:], strict=False)]
        biases = [torch.empty(n, dtype=dtype) for n in widths[1:]]
        mean, var, gamma, beta = torch.empty(4, channels, dtype=dtype).unbind()
        tracked, dropout = torch.zeros((), dtype=torch.int64), [0.3] * (layers - 2)
        for training in (True, False):
            y, saved = kernels.research_net(
                x, weights, biases, gamma, beta, mean, var, tracked, training, dropout,
                seed if training else None, 0.1, 1e-5, 0.01,
            )  # fmt: skip
        kernels.research_net_backward(
            y, x, weights, biases, gamma, beta, saved, True, dropout, seed, 0.01,
            [True] * (2 * layers + 3),
        )  # fmt: skip

    return run
