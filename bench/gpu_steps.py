"""What a step asks of a GPU, without one: our kernels' PTX in ptxsim, eager's ops by their list.

ptxsim lies in tests/, so this runs from a checkout alone.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import workload
from .cases import DROPOUT, NETWORK, REFERENCE, Case
from .counting import list_ops, silent
from .cuda_launches import load_library
from .errors import BenchError, Unsupported
from .gpu_table import CHIPS

_TESTS = Path(__file__).resolve().parent.parent / "tests"
_ROWS = 4096
_SEED = (7, -3)


@dataclass(frozen=True)
class Launch:
    """One kernel launch, or one op of eager's.

    Attributes:
        asked_bytes: what loads and stores ask for; None where only the next is known.
        bytes: what must cross the memory bus: every sector, or tensor, once a launch.
        load_efficiency, store_efficiency: bytes asked for over bytes of the sectors they take;
            above 1 where lanes share what they load. None for ops, and without any.
        flops: operations outside of tensor cores.
        tensor_flops: operations on tensor cores, by the type of the factors.
    """

    name: str
    bytes: int
    flops: int
    asked_bytes: int | None = None
    load_efficiency: float | None = None
    store_efficiency: float | None = None
    tensor_flops: dict[str, int] = field(default_factory=dict)


def cases(dtype: torch.dtype, ops: Sequence[str] | None = None) -> list[Case]:
    """Return the steps that are reported: each op forward and backward, the network in eval too."""
    sizes = {
        "normalize": (_ROWS, 64),
        "linear_relu": (_ROWS, 64, 64),
        "batch_norm_leaky_relu": (_ROWS, 32),
    }
    found = [Case(op, size, _ROWS, "train", dtype) for op, size in sizes.items()]
    found += [Case(NETWORK, REFERENCE, _ROWS, mode, dtype) for mode in ("eval", "train")]
    return [case for case in found if not ops or case.op in ops]


def eager(case: Case) -> list[Launch]:
    """Return eager's ops, each taken for one launch, which is the least it can be.

    Dropout is counted as CUDA has it, one op each way, where the CPU takes several.
    """
    work = workload.build(case)
    model = _with_fused_dropout(work.eager)
    step = work.step(model, list(model.parameters()))
    # Not inference_mode, which keeps ops whole that run as several.
    with torch.set_grad_enabled(case.mode == "train"):
        step()  # the first one allocates gradients
        ops = list_ops(step)
    fast = {torch.bfloat16: "bf16", torch.float16: "f16"}.get(case.dtype)
    return [
        Launch(op.name, op.bytes, 0, tensor_flops={fast: op.flops})
        if fast and op.name in ("mm", "addmm")
        else Launch(op.name, op.bytes, op.flops)
        for op in ops
    ]


class _NativeDropout(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        return torch.ops.aten.native_dropout(input, self.p, True)[0]


def _with_fused_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = _NativeDropout
    return model


# ------------------------------------------------------------------------------ our kernels


def triton(case: Case, arch: int) -> list[Launch]:
    """Return the launches of the Triton kernels on an architecture.

    Raises:
        Unsupported: where they use an instruction that ptxsim does not know.
    """
    driver, errors = _from_tests("ptxsim.triton_driver"), _from_tests("ptxsim.errors")
    driver.reset()
    driver.install(cc=arch, stats=True)
    try:
        _run(case, lambda name: getattr(importlib.import_module(_triton_room(name)), name))
        return [_launch(record) for record in driver.records()]
    except errors.Unsupported as error:
        raise Unsupported(str(error).splitlines()[0]) from error
    finally:
        driver.uninstall()


def cuda(case: Case, arch: int) -> list[Launch]:
    """Return the launches of the CUDA C++ kernels on an architecture.

    Raises:
        BuildUnavailable: without nvcc.
    """
    simulator = _from_tests("cuda_simulator")
    library = load_library(simulator.ptx_cache() / f"library-{os.getuid()}")
    chip = CHIPS[arch]
    gpu = simulator.Simulator(
        library, arch=arch, multiprocessors=chip.multiprocessors,
        shared_bytes_per_block=chip.shared_per_block, check=False, stats=True,
    )  # fmt: skip
    with silent(), gpu.running():  # torch warns that kernels of the CPU are overridden
        _run(case, lambda name: getattr(torch.ops.fused_mlp_kernels, name))
    return [_launch(record.stats) for record in gpu.records]


def _triton_room(name: str) -> str:
    return f"fused_mlp.kernels.{name.removesuffix('_backward')}"


def _from_tests(name: str) -> Any:
    if not (_TESTS / "ptxsim").is_dir():
        raise BenchError("steps are simulated by tests/ptxsim, which is in a checkout alone")
    if str(_TESTS) not in sys.path:
        sys.path.insert(0, str(_TESTS))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise BenchError(f"{error.name} is not installed") from error


def _launch(stats: Any) -> Launch:
    matrix = {
        kind.removeprefix("mma."): count
        for kind, count in stats.flops_by_type.items()
        if kind.startswith("mma.")
    }
    return Launch(
        name=stats.kernel.removesuffix("_kernel").removeprefix("fused_mlp_"),
        bytes=stats.dram_read_bytes + stats.dram_write_bytes,
        flops=stats.flops - sum(matrix.values()),
        asked_bytes=stats.load_bytes + stats.store_bytes,
        load_efficiency=stats.load_efficiency if stats.load_sectors else None,
        store_efficiency=stats.store_efficiency if stats.store_sectors else None,
        tensor_flops=matrix,
    )


def _run(case: Case, op: Callable[[str], Callable[..., Any]]) -> None:
    """Call a step's raw ops on random tensors of the CPU, as the modules would."""
    x, grad = workload.build(case).inputs[0]
    x, seed, back = x.detach(), torch.tensor(_SEED), f"{case.op}_backward"
    if case.op == "normalize":
        _, mean, std = op(case.op)(x, None, 1.0, 0.0)
        op(back)(grad, x, mean, std, None, 1.0, 0.0)
    elif case.op == "linear_relu":
        weight, bias = _random(case, case.sizes[2], case.sizes[1]), _random(case, case.sizes[2])
        y = op(case.op)(x, weight, bias, DROPOUT, seed)
        op(back)(grad, x, weight, y, DROPOUT, [True] * 3)
    elif case.op == "batch_norm_leaky_relu":
        mean, var, weight, bias = (_random(case, case.sizes[1]).abs() + 1 for _ in range(4))
        tracked = torch.zeros((), dtype=torch.int64)
        _, mean, rstd = op(case.op)(x, mean, var, tracked, weight, bias, True, 0.1, 1e-5, 0.01)
        op(back)(grad, x, weight, bias, mean, rstd, True, 0.01, [True] * 3)
    else:
        _run_network(case, op, x, grad, seed)


def _run_network(
    case: Case, op: Callable[[str], Callable[..., Any]], x: Tensor, grad: Tensor, seed: Tensor
) -> None:
    pairs = list(zip(case.sizes, case.sizes[1:], strict=False))
    weights, biases = [_random(case, n, k) for k, n in pairs], [_random(case, n) for _, n in pairs]
    mean, var, gamma, beta = (_random(case, case.sizes[-2]).abs() + 1 for _ in range(4))
    tracked, train = torch.zeros((), dtype=torch.int64), case.mode == "train"
    drop = [DROPOUT * train] * (len(pairs) - 2)
    _, saved = op(case.op)(
        x, weights, biases, gamma, beta, mean, var, tracked, train, drop,
        seed if train else None, 0.1, 1e-5, 0.01,
    )  # fmt: skip
    if train:
        mask = [False, *([True] * (2 * len(pairs) + 2))]
        op(f"{case.op}_backward")(
            grad, x, weights, biases, gamma, beta, saved, True, drop, seed, 0.01, mask
        )


def _random(case: Case, *shape: int) -> Tensor:
    return torch.randn(*shape).mul_(shape[-1] ** -0.5).to(case.dtype)
