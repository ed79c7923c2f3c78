"""``python -m fused_mlp demo``: every bundled data set, what it writes and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from support.demo import SMALL, assert_png

from fused_mlp.demo import data, main, training

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Keep many small steps from waiting for each other on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def png(tmp_path: Path) -> Path:
    return tmp_path / "picture.png"


def rows_of(out: str) -> list[list[str]]:
    """Return the cells of the result table's lines."""
    lines = [line for line in out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


# --------------------------------------------------------------------------- bundled data


@pytest.mark.parametrize("name", data.BUNDLED)
def test_every_bundled_dataset(name: str, png: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dataset", name, *SMALL, "--output", str(png)]) == 0
    out = capsys.readouterr().out
    score = "R²" if name == "diabetes" else "accuracy"
    for heading in ("network", score, "s/epoch", "samples/s", "speed-up"):
        assert heading in out
    eager, fused = rows_of(out)
    assert eager[:2] == ["64", "eager"]
    assert fused[1] == "fused"
    assert re.fullmatch(r"\d+\.\d\d×", fused[5])
    for line in (eager, fused):
        assert float(line[3]) > 0
        assert int(line[4].replace(",", "")) > 0
    assert_png(png)


def test_train_step_is_a_third_line(png: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dataset", "wine", *SMALL, "--train-step", "--output", str(png)]
    assert main(arguments) == 0
    eager, fused, step = rows_of(capsys.readouterr().out)
    assert [eager[1], fused[1], step[1]] == ["eager", "fused", "TrainStep"]
    assert eager[5] == ""
    assert re.fullmatch(r"\d+\.\d\d×", step[5])
    assert_png(png)


def test_several_batch_sizes(png: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dataset", "wine", "--epochs", "1", "--batch-size", "32,9999,5000"]
    assert main([*arguments, "--output", str(png)]) == 0
    # Those above the number of training rows are the whole of them, once.
    assert [r[0] for r in rows_of(capsys.readouterr().out)] == ["32", "", "142", ""]
    assert_png(png)


def test_as_a_command(png: Path) -> None:
    command = [sys.executable, "-m", "fused_mlp", "demo", "--dataset", "wine", *SMALL]
    done = subprocess.run(
        [*command, "--output", str(png)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "speed-up" in done.stdout
    assert_png(png)


# ------------------------------------------------------------------------ the command line


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    options = {"dataset", "csv", "target", "epochs", "batch-size", "hidden", "dropout", "lr"}
    options |= {"device", "seed", "output", "help"}
    assert set(re.findall(r"--([a-z-]+)", out)) >= options
    for name in data.BUNDLED:
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: '0' is not a whole number from 1 up"),
        (["--batch-size", "32,1"], "argument --batch-size: '1' is not a whole number from 2 up"),
        (["--hidden", "64,,32"], "argument --hidden: '' is not a whole number from 1 up"),
        (["--dropout", "1"], "argument --dropout: '1' is not a probability from 0 to below 1"),
        (["--lr", "nan"], "argument --lr: 'nan' is not a number above 0"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number from 0 up"),
        (["--dataset", "iris"], "argument --dataset: invalid choice: 'iris'"),
        (["--csv", "t.csv"], "--csv and --target go together"),
        (["--target", "y"], "--csv and --target go together"),
        (["--dataset", "wine", "--csv", "t.csv"], "argument --csv: not allowed with argument"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "picture.pdf"], "--output must end in .png, but got picture.pdf"),
        (["--output", "no/such/p.png"], "--output: there is no folder"),
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        (["--device", "meta"], "--device meta cannot be used here"),
    ],
)
def test_what_cannot_be_used_here(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "package"),
    [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("rich",) * 2],
)
def test_missing_extra(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main([]) == 1
    error = capsys.readouterr().err
    assert f"needs {package}, which is not installed" in error
    assert 'pip install "fused_mlp[demo]"' in error


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "compare", interrupt)
    assert main([]) == 130
    assert "interrupted" in capsys.readouterr().err
