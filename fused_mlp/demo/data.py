"""The data sets the demo trains on: tables that scikit-learn ships, split and standardised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional import normalize
from .errors import DemoError

BUNDLED = ("digits", "breast_cancer", "wine", "diabetes")
HELD_OUT = 0.2
MINIMUM_ROWS = 10


@dataclass(frozen=True)
class Table:
    """What was read, before any split.

    Attributes:
        name: what to call it.
        features: float64 tensor of shape (rows, columns).
        columns: one name a column.
        target: int64 tensor of class indices for classification, float64 values for regression;
            of shape (rows,).
        classes: the names of the classes, or None for regression.
    """

    name: str
    features: Tensor
    columns: tuple[str, ...]
    target: Tensor
    classes: tuple[str, ...] | None


@dataclass(frozen=True)
class Split:
    """Training and held-out rows, standardised, on the device that trains.

    Features have shape (rows, columns). Targets are class indices of shape (rows,) for
    classification and standardised values of shape (rows, 1) for regression.
    """

    name: str
    train_features: Tensor
    train_target: Tensor
    test_features: Tensor
    test_target: Tensor
    classes: tuple[str, ...] | None
    constant_columns: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """The number of outputs the network needs."""
        return 1 if self.classes is None else len(self.classes)

    def describe(self) -> str:
        """Return one line for the user."""
        task = "regression" if self.classes is None else f"{len(self.classes)} classes"
        line = (
            f"{self.name}: {len(self.train_features)} training rows, {len(self.test_features)} "
            f"held out, {self.train_features.shape[1]} features, {task}"
        )
        if not self.constant_columns:
            return line
        shown = ", ".join(self.constant_columns[:5])
        more = ", …" if len(self.constant_columns) > 5 else ""
        return f"{line}\nleft out, because constant in the training rows: {shown}{more}"


def load_bundled(name: str) -> Table:
    """Return a data set that scikit-learn ships; nothing is downloaded.

    Args:
        name: one of ``BUNDLED``.
    """
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    regression = name == "diabetes"
    return Table(
        name,
        torch.as_tensor(bunch.data, dtype=torch.float64),
        tuple(bunch.feature_names),
        torch.as_tensor(bunch.target, dtype=torch.float64 if regression else torch.int64),
        None if regression else tuple(str(c) for c in bunch.target_names),
    )


def split(
    table: Table,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Split:
    """Hold out a fifth of the rows at random and standardise with the training rows' statistics.

    Columns that are constant in the training rows are left out: they carry nothing to learn and
    have no deviation to divide by.

    Raises:
        DemoError: for a table too small, without a varying feature or with nothing to predict.
    """
    rows = len(table.features)
    if rows < MINIMUM_ROWS:
        raise DemoError(f"{table.name}: {rows} rows are too few; at least {MINIMUM_ROWS} needed")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    held_out = round(rows * HELD_OUT)
    test, train = order[:held_out], order[held_out:]

    features = table.features
    varying = (features[train] != features[train[0]]).any(0)
    if not varying.any():
        raise DemoError(f"{table.name}: every feature column is constant; nothing to learn from")
    constant = [c for c, v in zip(table.columns, varying.tolist(), strict=True) if not v]
    train_features, test_features = _standardise(
        features[train][:, varying], features[test][:, varying]
    )
    if not (train_features.isfinite().all() and test_features.isfinite().all()):
        raise DemoError(f"{table.name}: the values of a column are too far apart for float64")

    target = table.target
    if (target[train] == target[train[0]]).all():
        raise DemoError(f"{table.name}: the target is the same in every row; nothing to predict")
    train_target, test_target = target[train], target[test]
    if table.classes is None:
        train_target, test_target = _standardise(train_target[:, None], test_target[:, None])
        train_target, test_target = (t.to(device, dtype) for t in (train_target, test_target))
    return Split(
        table.name,
        train_features.to(device, dtype),
        train_target.to(device),
        test_features.to(device, dtype),
        test_target.to(device),
        table.classes,
        tuple(constant),
    )


def _standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with the mean and deviation of ``train`` taken out, column by column.

    In float64, because a column such as a time stamp varies in digits float32 does not hold.
    """
    return normalize(train, dim=0), (test - train.mean(0)) / train.std(0)
