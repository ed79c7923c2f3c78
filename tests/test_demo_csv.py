"""The demo on the user's own table: what it reads and how it says what it cannot read."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from support.demo import SMALL, assert_png

from fused_mlp.demo import main, table


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Keep many small steps from waiting for each other on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def png(tmp_path: Path) -> Path:
    return tmp_path / "picture.png"


QUOTED = '\ufeff"height, cm",weight,"the ""kind"""\r\n' + "".join(
    f'"{150 + i}",{50.5 + i % 7}e0,{"tall, very" if i % 3 else "short"!r}\r\n'.replace("'", '"')
    for i in range(30)
)


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def lines(header: str, row: str, count: int = 30) -> str:
    return header + "\n" + "".join(row.format(i=i, m=i % 4, f=i / 3) + "\n" for i in range(count))


def test_csv_from_start_to_end(
    tmp_path: Path, png: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "own.csv", QUOTED)
    arguments = ["--csv", str(path), "--target", 'the "kind"', *SMALL, "--output", str(png)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "own.csv: 24 training rows, 6 held out, 2 features, 2 classes" in out
    assert_png(png)


def test_csv_quotes_and_byte_order_mark(tmp_path: Path) -> None:
    read = table.load_csv(write(tmp_path / "t.csv", QUOTED), 'the "kind"')
    assert read.columns == ("height, cm", "weight")
    assert read.classes == ("short", "tall, very")
    assert read.target[:4].tolist() == [0, 1, 1, 0]
    assert read.features[1].tolist() == [151.0, 51.5]


@pytest.mark.parametrize(
    ("row", "classes"),
    [
        ("{i},{m}", ("0", "1", "2", "3")),
        ("{i},{m}.0", ("0", "1", "2", "3")),  # whole numbers as pandas writes them beside gaps
        ("{i},k{m}", ("k0", "k1", "k2", "k3")),
        ("{i},{i}", None),  # whole numbers, too many to be classes
        ("{i},{f}", None),
    ],
)
def test_csv_kind_of_target(tmp_path: Path, row: str, classes: tuple[str, ...] | None) -> None:
    read = table.load_csv(write(tmp_path / "t.csv", lines("x,y", row)), "y")
    assert read.classes == classes
    assert read.target.dtype == (torch.float64 if classes is None else torch.int64)
    if classes is None:
        assert read.target[3] == (3.0 if row == "{i},{i}" else 1.0)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_csv_separators_and_blank_lines(tmp_path: Path, separator: str) -> None:
    text = lines("x,y,z", "{i},{m},{f}\n").replace(",", separator)
    read = table.load_csv(write(tmp_path / "t.csv", "\n" + text), "y")
    assert read.columns == ("x", "z")
    assert len(read.target) == 30


def test_csv_constant_columns_are_left_out(
    tmp_path: Path, png: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "t.csv", lines("same,x,y", "3.5,{i},{f}"))
    assert main(["--csv", str(path), "--target", "y", *SMALL, "--output", str(png)]) == 0
    out = capsys.readouterr().out
    assert "1 features, regression" in out
    assert "constant in the training rows: same" in out


GOOD = lines("x,y", "{i},{m}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv: the file is empty"),
        ("\n\n", "t.csv: the file is empty"),
        ("x,y\n", "t.csv: there is a header, but no rows below it"),
        ("a,b\n1,2\n", "t.csv: there is no column 'y'; there are 'a', 'b'"),
        ("x,yy\n1,2\n", "t.csv: there is no column 'y'; did you mean 'yy'?"),
        ("y,y\n1,2\n", "t.csv: 2 columns are called 'y'"),
        ("y\n1\n", "t.csv: there is no column beside the target 'y' to learn from"),
        (GOOD.replace("\n7,", "\nseven,"), "t.csv, row 9, column 'x': 'seven' is not a number"),
        (GOOD.replace("\n7,", "\n,"), "t.csv, row 9, column 'x': is empty"),
        (GOOD.replace("\n7,", "\n1_0,"), "t.csv, row 9, column 'x': '1_0' is not a number"),
        (GOOD.replace("\n7,", "\nnan,"), "t.csv, row 9, column 'x': 'nan' is not a finite number"),
        (GOOD.replace("\n7,", "\n-1e999,"), "row 9, column 'x': '-1e999' is not a finite number"),
        (GOOD.replace("\n7,3", "\n7,"), "t.csv, row 9, column 'y': is empty"),
        (GOOD.replace("\n7,3", "\n7,inf"), "row 9, column 'y': 'inf' is not a finite number"),
        (GOOD.replace("\n7,", "\n\n7,7,"), "t.csv, row 10: 3 cells, but the header has 2"),
        (GOOD.replace("\n7,3", '\n7,"3'), "t.csv, line 31: unexpected end of data"),
        (lines("x,y", "{i},name{i}"), "'y' holds 30 different texts in 30 rows; that is too many"),
        (lines("x,y", "{i},{f}") + "3,oops\n", "t.csv, row 32, column 'y': 'oops' is not a number"),
        (lines("x,y", "{i},{m}", 9), "t.csv: 9 rows are too few; at least 10 needed"),
        (lines("x,y", "1,{m}"), "t.csv: every feature column is constant; nothing to learn from"),
        (lines("x,y", "{i},1"), "t.csv: the target is the same in every row; nothing to predict"),
        ("x\0,y\n1,2\n", "t.csv: there is no column 'y'"),
    ],
)
def test_csv_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = write(tmp_path / "t.csv", text)
    target = "y\0" if "\0" in text else "y"
    output = str(tmp_path / "p.png")
    assert main(["--csv", str(path), "--target", target, "--output", output]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert message.replace("'y'", repr(target)) in error
    assert not Path(output).exists()


def test_csv_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.csv", "größe,y\n1,2\n", "latin-1")
    assert main(["--csv", str(path), "--target", "y"]) == 1
    assert "t.csv: is not UTF-8 text (byte 2)" in capsys.readouterr().err


def test_csv_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--csv", str(tmp_path / "none.csv"), "--target", "y"]) == 1
    assert re.search(r"cannot read .*none\.csv: No such file", capsys.readouterr().err)
    assert main(["--csv", str(tmp_path), "--target", "y"]) == 1
    assert re.search(r"cannot read .*: Is a directory", capsys.readouterr().err)


def test_a_csv_needs_no_scikit_learn(
    tmp_path: Path, png: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    path = write(tmp_path / "t.csv", GOOD)
    assert main(["--csv", str(path), "--target", "y", *SMALL, "--output", str(png)]) == 0
