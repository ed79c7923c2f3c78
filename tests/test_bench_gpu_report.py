"""gpu-report's steps: eager's op list, the rule of prediction, what the report says. No GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import INTERPRETED

pytest.importorskip("rich")

from bench import counting, gpu_command, gpu_docs, gpu_steps
from bench import gpu_predictions as predictions
from bench.__main__ import main
from bench.errors import BenchError
from bench.gpu_steps import Launch
from bench.gpu_table import Line

GPU = predictions._gpu("made up", 90, gb=1000, fp32=10, tf32=100, half=200)


def test_eagers_ops_are_listed_as_cuda_has_them() -> None:
    *_, case = gpu_steps.cases(torch.float32, ["research_net"])
    found = gpu_steps.eager(case)
    names = [launch.name for launch in found]
    assert names.count("addmm") == 3
    assert names.count("mm") == 5  # two gradients of two layers, one of the first
    assert names.count("native_dropout") == names.count("native_dropout_backward") == 1
    assert "empty" not in names
    products = sum(x.flops for x in found if x.name in ("mm", "addmm"))
    assert products == case.flops
    relu = found[names.index("relu")]
    assert relu.bytes == 2 * 4 * 4096 * 64


def test_products_in_bfloat16_run_on_tensor_cores() -> None:
    (case,) = gpu_steps.cases(torch.bfloat16, ["linear_relu"])
    products = [x for x in gpu_steps.eager(case) if x.name in ("mm", "addmm")]
    assert [(x.flops, x.tensor_flops) for x in products] == [(0, {"bf16": 2 * 4096 * 64 * 64})] * 3


def test_flops_of_an_op_without_products_are_those_of_its_largest_tensor() -> None:
    (op,) = counting.list_ops(lambda: torch.ones(5, 4).sum(0))[-1:]
    assert (op.name, op.bytes, op.flops) == ("sum", 4 * 24, 20)


@pytest.mark.parametrize(
    ("launch", "work"),
    [
        (Launch("copy", bytes=2_000_000, flops=10), 2e-6),
        (Launch("fma", bytes=10, flops=50_000_000), 5e-6),
        (Launch("mma", bytes=10, flops=10, tensor_flops={"tf32": 300_000_000}), 3e-6),
        (Launch("f64", bytes=10, flops=10, tensor_flops={"f64": 20_000_000}), 2e-6),
    ],
)
def test_a_launch_takes_its_slowest_resource_and_the_launch_itself(
    launch: Launch, work: float
) -> None:
    assert predictions.predict([launch], GPU) == pytest.approx(2.5e-6 + work)
    assert predictions.predict([launch] * 3, GPU) == pytest.approx(3 * (2.5e-6 + work))


def test_the_report_sets_eager_beside_and_calls_predictions_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = [Launch("one", 2**20, 5_000_000, 2**21, 1.0, 0.5, {"tf32": 1_000_000})]
    monkeypatch.setattr(gpu_steps, "triton", lambda case, arch: ours)

    def cannot(case: object, arch: int) -> list[Launch]:
        raise gpu_command.Unsupported("tcgen05")

    monkeypatch.setattr(gpu_steps, "cuda", cannot)
    arguments = ["gpu-report", "--only", "steps", "--op", "normalize", "--chip", "sm_90"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    step = "| normalize 4096×64 | train | float32 | triton |"
    assert f"{step} sm_90 | one | 2 MiB | 1 MiB | 100% | 50% | 6.00 | tf32 |" in out
    assert f"{step} sm_90 | 1 | 23 | 1 MiB | 33 MiB |" in out
    assert f"{step} H100 |" in out
    assert f"{step} H200 |" in out
    assert "A100 |" not in out  # it runs the kernels of sm_80
    assert "Predictions, not measurements" in out
    assert "2.5 µs" in out
    assert "cuda, normalize" in err
    assert "tcgen05" in err


def test_a_chip_without_steps_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-report", "--only", "steps", "--chip", "gfx942"]) == 1
    assert "steps run for sm_80, sm_90 and sm_100" in capsys.readouterr().err


def test_the_docs_show_a_row_a_kernel_and_a_column_a_chip(tmp_path: Path) -> None:
    def line(chip: str, registers: int, spilled: int) -> Line:
        return Line("triton", "net", "net 10", "tf32", chip, 128, registers, spilled, 2048,
                    "mfma" if chip == "gfx942" else "", 20, 4)  # fmt: skip

    page = tmp_path / "triton.md"
    page.write_text(f"before\n{gpu_docs.BEGIN}\nold\n{gpu_docs.END}\nafter\n")
    lines = [line("sm_90", 100, 0), line("sm_90", 255, 8), line("gfx942", 90, 0)]
    gpu_docs.write(lines, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "3 kernels were compiled, of which 1 spill registers." in text
    assert "| net 10 | tf32 | net | 100 / 0 / 2 / – / 20 | 90 / 0 / 2 / mfma / 20 |" in text
    assert "| net 10 | tf32 | net (2) | 255 / 8 / 2 / – / 20 | – |" in text
    page.write_text("no marks")
    with pytest.raises(BenchError, match="has no"):
        gpu_docs.write(lines, page)


def test_triton_steps_run_in_the_simulator() -> None:
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("Triton was imported to interpret, not to compile")
    (case,) = gpu_steps.cases(torch.float32, ["normalize"])
    launches = gpu_steps.triton(case, 90)
    assert [x.name for x in launches] == [
        "moments", "normalize", "normalize_grad_sums", "normalize_grad"
    ]  # fmt: skip
    whole = 4 * 4096 * 64
    assert 8 * whole <= sum(x.bytes for x in launches) <= 1.1 * 8 * whole
