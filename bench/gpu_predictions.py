"""Roofline times of steps on GPUs that nobody ran: predictions, from counts and data sheets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .cases import Case
from .gpu_steps import Launch
from .tables import markdown, seconds, size, times

LAUNCH = 2.5e-6  # seconds


@dataclass(frozen=True)
class Gpu:
    """A product by its maker's data sheet, SXM where there are several; dense products.

    Attributes:
        arch: whose kernels it runs.
        bytes: a second, from its memory.
        flops: a second, float32 outside of tensor cores.
        tensor_flops: a second on them, by the type of the factors.
    """

    name: str
    arch: int
    bytes: float
    flops: float
    tensor_flops: dict[str, float]


def _gpu(name: str, arch: int, gb: float, fp32: float, tf32: float, half: float) -> Gpu:
    tensor = {"tf32": tf32 * 1e12, "bf16": half * 1e12, "f16": half * 1e12}
    return Gpu(name, arch, gb * 1e9, fp32 * 1e12, tensor)


GPUS = (
    _gpu("A100", 80, 2039, 19.5, 156, 312),
    _gpu("H100", 90, 3350, 67, 494, 989),
    _gpu("H200", 90, 4800, 67, 494, 989),
    _gpu("B200", 100, 8000, 75, 1125, 2250),
)

ASSUMPTIONS = (
    f"**Predictions, not measurements: no GPU was used.** A launch is taken to cost {LAUNCH * 1e6} "
    "µs and then as long as the slowest of its bytes over the memory's bandwidth and its FLOPs "
    "over the peak of the units they run on, all at the data sheet's rates; launches follow one "
    "another. Ours are the launches of the compiled PTX executed in ptxsim, with every 32-byte "
    "sector crossing the bus once a launch; eager's are the ops of its op list, each one launch "
    "with every tensor crossing the bus once, which is the least it can be. Host time, caches "
    "between launches, occupancy and clocks are left out on both sides, so the ratio is what "
    "launches and traffic alone would give. Data sheets: "
    + "; ".join(
        f"{g.name} {g.bytes / 1e9:.0f} GB/s, {g.flops / 1e12:g} TFLOP/s float32, "
        f"{g.tensor_flops['tf32'] / 1e12:g} tf32, {g.tensor_flops['bf16'] / 1e12:g} bfloat16"
        for g in GPUS
    )
    + "."
)


def predict(launches: Sequence[Launch], gpu: Gpu) -> float:
    """Return the seconds that the assumptions give a step."""
    return sum(LAUNCH + _work(launch, gpu) for launch in launches)


def _work(launch: Launch, gpu: Gpu) -> float:
    products = sum(
        count / gpu.tensor_flops.get(kind, gpu.flops) for kind, count in launch.tensor_flops.items()
    )
    return max(launch.bytes / gpu.bytes, launch.flops / gpu.flops, products)


@dataclass(frozen=True)
class Counted:
    """A step's launches on one architecture by one backend, and eager's of the same step."""

    case: Case
    backend: str
    arch: int
    ours: list[Launch]
    eager: list[Launch]


def sections(found: Sequence[Counted]) -> Iterator[str]:
    """Yield the report: launches one by one, steps beside eager, predicted times."""
    yield "## Launches in ptxsim"
    yield markdown(*_launch_lines(found))
    yield "## Steps beside eager's"
    yield markdown(*_step_lines(found))
    yield "## Predicted times"
    yield ASSUMPTIONS
    yield markdown(*_predicted_lines(found))


def _step(counted: Counted) -> list[str]:
    case = counted.case
    batch = f" × {case.batch}" if case.op == "research_net" else ""
    return [f"{case.op} {case.shape}{batch}", case.mode, case.dtype_name, counted.backend]


def _launch_lines(found: Sequence[Counted]) -> tuple[list[str], list[list[str]]]:
    header = ["step", "mode", "dtype", "backend", "chip", "kernel", "asked for", "over the bus",
              "loads coalesced", "stores coalesced", "MFLOP", "on tensor cores"]  # fmt: skip
    lines = []
    for counted in found:
        for launch in counted.ours:
            matrix = sum(launch.tensor_flops.values())
            lines.append([
                *_step(counted), f"sm_{counted.arch}", launch.name, size(launch.asked_bytes),
                size(launch.bytes), _share(launch.load_efficiency),
                _share(launch.store_efficiency), f"{(launch.flops + matrix) / 1e6:.2f}",
                ", ".join(launch.tensor_flops) or "–",
            ])  # fmt: skip
    return header, lines


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _step_lines(found: Sequence[Counted]) -> tuple[list[str], list[list[str]]]:
    header = ["step", "mode", "dtype", "backend", "chip", "launches", "eager's", "bytes",
              "eager's bytes", "MFLOP", "eager's MFLOP"]  # fmt: skip
    lines = []
    for counted in found:
        ours, theirs = counted.ours, counted.eager
        lines.append([
            *_step(counted), f"sm_{counted.arch}", str(len(ours)), str(len(theirs)),
            size(sum(x.bytes for x in ours)), size(sum(x.bytes for x in theirs)),
            *(f"{_flops(side) / 1e6:.1f}" for side in (ours, theirs)),
        ])  # fmt: skip
    return header, lines


def _flops(launches: Sequence[Launch]) -> int:
    return sum(x.flops + sum(x.tensor_flops.values()) for x in launches)


def _predicted_lines(found: Sequence[Counted]) -> tuple[list[str], list[list[str]]]:
    header = ["step", "mode", "dtype", "backend", "GPU", "predicted", "eager predicted",
              "predicted speed-up"]  # fmt: skip
    lines = []
    for counted in found:
        for gpu in GPUS:
            if gpu.arch == counted.arch:
                ours, theirs = predict(counted.ours, gpu), predict(counted.eager, gpu)
                lines.append(
                    [*_step(counted), gpu.name, seconds(ours), seconds(theirs),
                     times(theirs / ours)]
                )  # fmt: skip
    return header, lines
