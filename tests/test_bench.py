"""The command line of the benchmarks. No number is judged here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from support.made_up import made_up

from bench import cases, results, rivals, run
from bench.__main__ import main
from bench.results import Row

ROOT = Path(__file__).resolve().parent.parent


# ----------------------------------------------------------------------------- command line


def test_compile_shows_what_compiling_adds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--smoke"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [row[0].strip() for row in rows] == [
        "network", "---", *["research_net"] * 2, *["MLP, Tanh"] * 2
    ]  # fmt: skip
    assert [row[1].strip() for row in rows[2:]] == ["train", "eval"] * 2
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[2:4])


def test_train_step_prints_a_line_for_every_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-step", "--smoke"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("TrainStep", "SGD, momentum", "Adam", "AdamW"))
    assert out.count("10,64,32,5") == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--net", "10,5"],
        ["--net", "ten,4,4"],
        ["--batch", "0"],
        ["--dtype", "int8"],
        ["--threads", "none"],
        ["--full", "--smoke"],
        ["frobnicate"],
        ["compare", "one.json"],
        ["overhead", "--batch", "1"],
        ["train-step", "--threads", "none"],
    ],
)
def test_wrong_options_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "numpy"], "--against numpy: choose from eager, onednn"),
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        (["compare", "gone.json", "gone.json"], "cannot read gone.json"),
        (["report", "nowhere"], "cannot read nowhere"),
        (["docs", "--no-run", "--folder", "nowhere"], "there are no results in nowhere"),
        (["docs", "--only", "nothing"], "--only nothing: choose from net-10-eval"),
        (["--batch", "1", "--mode", "train"], "batch norm cannot train at batch 1"),
    ],
)
def test_errors_are_said_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_a_backend_that_cannot_run_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    from fused_mlp import backends

    if any(s.name == "triton" and s.available for s in backends.status()):
        pytest.skip("Triton runs here")
    assert main(["--smoke", "--backend", "triton"]) == 1
    assert "error: --backend: backend 'triton' cannot run here" in capsys.readouterr().err


def test_absent_packages_are_skipped() -> None:
    absent = rivals.Rival("absent", "", ("no_such_package_at_all",), lambda work: None)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rivals.RIVALS, "absent", absent)
        patch.setattr(rivals, "AGAINST", (*rivals.AGAINST, "absent"))
        chosen, skipped = rivals.choose(["absent", "eager"])
    assert [rival.name for rival in chosen] == ["eager", "fused", "kernel"]
    assert skipped == {"absent": "not installed: no_such_package_at_all"}


@pytest.mark.slow  # compiles networks with torch.compile
def test_smoke_runs_every_path() -> None:
    command = [sys.executable, "-m", "bench", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for word in ("research_net", "normalize", "linear_relu", "batch_norm_leaky_relu", "engine",
                 "requests/s", "synthetic", "compile-max", "Adam", "mean nothing"):  # fmt: skip
        assert word in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_of_ones_own_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--smoke", "--net", "6,5,4", "--batch", "4", "--backend", "reference"]
    assert main(arguments) == 0
    assert not list(tmp_path.iterdir())  # a smoke run leaves nothing
    assert "mean nothing" in capsys.readouterr().out
    assert main([*arguments, "--mode", "eval", "--output", "kept"]) == 0
    found = results.load(Path("kept"))
    assert {row.mode for row in found.rows} == {"eval"}
    assert {row.shape for row in found.rows} == {"6,5,4"}


def test_what_was_measured_before_an_interruption_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted(case: cases.Case, *rest: object) -> list[Row]:
        calls.append(case)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return made_up()

    monkeypatch.setattr(run, "measure", interrupted)
    arguments = ["--smoke", "--net", "6,5,4", "--batch", "4", "--output", str(tmp_path)]
    assert main(arguments) == 130
    assert len(results.load(tmp_path).rows) == len(made_up())
