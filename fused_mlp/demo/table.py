"""Read the user's own table from a CSV file."""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .data import Table
from .errors import DemoError

# Whole numbers of at most so many different values are classes; so are texts.
FEW_VALUES = 20
MOST_CLASSES = 100

Row = tuple[int, list[str]]


def load_csv(path: Path, target: str) -> Table:
    """Return the table in a CSV file with a header row.

    Fields are separated by commas, semicolons or tabs, whichever the header uses, and may be
    quoted. Every column but the target must hold finite numbers. The target is a class when it is
    text, or whole numbers of few different values; otherwise it is a value to regress.

    Args:
        path: the file, UTF-8 with or without a byte order mark.
        target: the name of the column to predict.

    Raises:
        DemoError: naming the row and the column of what cannot be read. The header is row 1.
    """
    header, rows = _read(path)
    name = path.name
    if header.count(target) != 1:
        raise DemoError(f"{name}: {_wrong_target(target, header)}")
    if not rows:
        raise DemoError(f"{name}: there is a header, but no rows below it")
    if len(header) == 1:
        raise DemoError(f"{name}: there is no column beside the target {target!r} to learn from")
    for number, cells in rows:
        if len(cells) != len(header):
            raise DemoError(
                f"{name}, row {number}: {len(cells)} cells, but the header has {len(header)}"
            )
    position = header.index(target)
    columns = tuple(c or f"column {i}" for i, c in enumerate(header, 1) if i != position + 1)
    texts = [(number, cells[:position] + cells[position + 1 :]) for number, cells in rows]
    features = torch.tensor(
        [_numbers(row, name, number, columns) for number, row in texts], dtype=torch.float64
    )
    values, classes = _target([(n, cells[position]) for n, cells in rows], name, target)
    return Table(name, features, columns, values, classes)


def _read(path: Path) -> tuple[list[str], list[Row]]:
    """Return the header's names and the rows that are not blank, with their numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DemoError(f"{path.name}: is not UTF-8 text (byte {error.start})") from error
    separator = _separator(text.lstrip().partition("\n")[0])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        records = list(enumerate(reader, 1))
    except csv.Error as error:
        raise DemoError(f"{path.name}, line {reader.line_num}: {error}") from error
    filled = [(number, cells) for number, cells in records if any(c.strip() for c in cells)]
    if not filled:
        raise DemoError(f"{path.name}: the file is empty")
    return [c.strip() for c in filled[0][1]], filled[1:]


def _separator(header: str) -> str:
    return max(",;\t", key=header.count)


def _wrong_target(target: str, header: list[str]) -> str:
    if target in header:
        return f"{header.count(target)} columns are called {target!r}"
    close = difflib.get_close_matches(target, header, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {_listed(header)}"
    return f"there is no column {target!r}; {hint}"


def _listed(names: Iterable[str], most: int = 10) -> str:
    names = [repr(n) for n in names]
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _parse(text: str) -> float | None:
    """Return the number, or None for anything else; Python's 1_000 is no number in a table."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def _numbers(texts: list[str], file: str, row: int, columns: tuple[str, ...]) -> list[float]:
    try:
        values = [float(t) for t in texts]
        if all(map(math.isfinite, values)) and not any("_" in t for t in texts):
            return values
    except ValueError:
        pass
    return [_number(t, file, row, c) for t, c in zip(texts, columns, strict=True)]


def _number(text: str, file: str, row: int, column: str) -> float:
    value = _parse(text)
    if value is not None and math.isfinite(value):
        return value
    if not text.strip():
        problem = "is empty"
    elif value is None:
        problem = f"{text!r} is not a number"
    else:
        problem = f"{text!r} is not a finite number"
    raise DemoError(f"{file}, row {row}, column {column!r}: {problem}")


def _target(
    cells: list[tuple[int, str]], file: str, column: str
) -> tuple[Tensor, tuple[str, ...] | None]:
    """Return class indices and the classes' names, or values and None."""
    for row, text in cells:
        if not text.strip():
            raise DemoError(f"{file}, row {row}, column {column!r}: is empty")
    texts = [text.strip() for _, text in cells]
    numbers = [_parse(text) for text in texts]
    few = min(FEW_VALUES, len(texts) // 2)
    if None not in numbers:
        values = [_number(text, file, row, column) for row, text in cells]
        distinct = sorted(set(values))
        if len(distinct) <= few and all(v.is_integer() for v in distinct):
            index = {v: i for i, v in enumerate(distinct)}
            names = tuple(str(int(v)) for v in distinct)
            return torch.tensor([index[v] for v in values]), names
        return torch.tensor(values, dtype=torch.float64), None

    names = tuple(sorted(set(texts)))
    if len(names) > few and any(n is not None for n in numbers):
        # Numbers, but for some cells: those are more likely mistakes than classes.
        first = numbers.index(None)
        _number(texts[first], file, cells[first][0], column)
    if len(names) > min(MOST_CLASSES, len(texts) // 2):
        raise DemoError(
            f"{file}: column {column!r} holds {len(names)} different texts in {len(texts)} rows; "
            f"that is too many for classes"
        )
    position = {n: i for i, n in enumerate(names)}
    return torch.tensor([position[t] for t in texts]), names
