"""The data of the comparison: the handwritten digits, or a CSV file, made ready to train on.

The CSV file is read with the standard library: every rule about what a cell means is then here, and
an error can name the line. scikit-learn splits, imputes, scales and encodes.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from sklearn.impute import SimpleImputer
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from fastopt.compare.model import Array

TASKS = ("classification", "regression")
MISSING = {"", "na", "n/a", "#n/a", "<na>", "nan", "null", "?"}  # in any case
MIN_ROWS = 10
MOST_CLASSES = 20  # of whole numbers that are taken for classes without --task
MOST_CATEGORIES = 50  # of a column; the rarer ones share one input
FARTHEST = 1e6  # in standard deviations of the training rows


class DataError(ValueError):
    """What is wrong with the user's data, in one line."""


@dataclass(frozen=True)
class Split:
    """Samples ``(rows, inputs)``, and their classes, or standardised targets ``(rows, 1)``."""

    x: Array
    y: Any


@dataclass(frozen=True)
class Data:
    """Three fifths to train on, one to choose the learning rate by, one for the test."""

    description: dict[str, Any]  # as it stands in results.json
    train: Split
    validation: Split
    test: Split

    @property
    def task(self) -> str:
        """``"classification"`` or ``"regression"``."""
        task: str = self.description["task"]
        return task

    @property
    def outputs(self) -> int:
        """How many outputs a model of it has."""
        return len(self.description["classes"] or [0])


def digits(seed: int, dtype: str) -> Data:
    """Load the 1797 handwritten digits that come with scikit-learn.

    Parameters
    ----------
    seed : int
        Chooses the split, 0 to 2**32 - 1.
    dtype : str
        ``"float32"`` or ``"float64"``.

    Returns
    -------
    Data
        Images of 8 x 8 pixels from 0 to 1, and their classes.
    """
    pixels, labels = load_digits(return_X_y=True)
    x, y = (pixels / 16).astype(dtype), labels.astype(np.intp)
    names = [f"pixel_{row}_{column}" for row in range(8) for column in range(8)]
    return _data(
        {
            "name": "Handwritten digits",
            "sha256": None,
            "target": "digit",
            "task": "classification",
            "classes": [str(label) for label in range(10)],
            "numeric_columns": names,
            "categorical_columns": [],
            "missing_values": 0,
        },
        [Split(x[rows], y[rows]) for rows in _split(y, seed, stratify=True)],
    )


def read_csv(
    path: Path,
    target: str,
    seed: int,
    dtype: str,
    *,
    task: str | None = None,
    impute: bool = False,
    categorical: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Data:
    """Read a table with a line of column names, and split, scale and encode it.

    A column whose cells are all numbers is scaled to mean 0 and variance 1; one of texts becomes
    one input for each of its texts. All that is learned from the training split alone.

    Parameters
    ----------
    path : Path
        UTF-8; separated by commas, semicolons, tabs or bars, whichever the first line has most of.
    target : str
        The column to predict.
    seed : int
        Chooses the split, 0 to 2**32 - 1.
    dtype : str
        ``"float32"`` or ``"float64"``.
    task : {None, "classification", "regression"}, optional
        By default texts, and up to 20 different whole numbers with five rows or more each on
        average, are classes.
    impute : bool, optional
        Whether to fill missing values: with the median, or the most frequent text.
    categorical : sequence of str, optional
        Columns whose numbers are names, not quantities.
    ignore : sequence of str, optional
        Columns to leave out.

    Returns
    -------
    Data
        Ready to train on.

    Raises
    ------
    DataError
        If it cannot be used; the message says where and why.
    """
    content = _content(path)
    table = _Table(path, content)
    for name in (target, *categorical, *ignore):
        table.place(name)
    if target in ignore:
        raise DataError(f"column {target!r} cannot be the target and be ignored")
    columns = table.columns(ignore)
    y_column = columns.pop(target)
    if not columns:
        raise DataError(f"{path.name!r} has no column besides the target {target!r}")
    if len(table.rows) < MIN_ROWS:
        raise DataError(
            f"{path.name!r} has {_count(table.rows, 'row')} of data; at least {MIN_ROWS} are needed"
        )
    if y_column.missing:
        raise DataError(
            f"the target {target!r} has {_count(y_column.missing, 'missing value')} "
            f"(the first in line {y_column.line(y_column.missing[0])}); leave such rows out"
        )
    task, y, classes = _target(y_column, task)
    numeric, texts = _kinds(columns, set(categorical))
    incomplete = [column for column in columns.values() if column.missing]
    if incomplete and not impute:
        first = incomplete[0]
        others = ", ".join(f"{c.name!r} ({len(c.missing)})" for c in incomplete[1:])
        raise DataError(
            f"column {first.name!r} has {_count(first.missing, 'missing value')} "
            f"(the first in line {first.line(first.missing[0])})"
            + (f", and so have {others}" if others else "")
            + "; --impute fills them"
        )
    parts = _split(y, seed, stratify=task == "classification")
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        blocks = [(_scale, numeric), (_encode, texts)]
        inputs = np.hstack([f(columns, parts[0]) for f, columns in blocks if columns])
        if task == "regression":
            y = StandardScaler().fit(y[parts[0]]).transform(y)
    _refuse_outliers(numeric, inputs)
    if task == "regression":
        _refuse_outliers([y_column], y)
        y = y.astype(dtype)
    inputs = inputs.astype(dtype)
    return _data(
        {
            "name": path.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "target": target,
            "task": task,
            "classes": classes,
            "numeric_columns": [column.name for column in numeric],
            "categorical_columns": [column.name for column in texts],
            "missing_values": sum(len(column.missing) for column in incomplete),
        },
        [Split(inputs[rows], y[rows]) for rows in parts],
    )


# ---- reading ------------------------------------------------------------------------------------


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from error


class _Table:
    """The cells of a CSV file."""

    def __init__(self, path: Path, content: bytes) -> None:
        self._name = path.name
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path.name!r} is not a text file in UTF-8: {error.reason}") from error
        first_line = text.lstrip("\r\n").partition("\n")[0]
        separator = max(",;\t|", key=first_line.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        self.rows: list[list[str]] = []
        self.lines: list[int] = []
        try:
            for row in reader:
                if any(cell.strip() for cell in row):
                    self.rows.append([cell.strip() for cell in row])
                    self.lines.append(reader.line_num)
        except csv.Error as error:
            raise DataError(f"{path.name!r}, line {reader.line_num}: {error}") from error
        if not self.rows:
            raise DataError(f"{path.name!r} is empty")
        self.header = self.rows.pop(0)
        del self.lines[0]
        for row, line in zip(self.rows, self.lines, strict=True):
            if len(row) != len(self.header):
                raise DataError(
                    f"{path.name!r}, line {line}: {_count(row, 'cell')} under "
                    f"{_count(self.header, 'column name')}"
                )

    def place(self, name: str) -> int:
        """Return where a column is, or say that there is none."""
        if name in self.header:
            return self.header.index(name)
        close = difflib.get_close_matches(name, self.header, 1)
        there = ", ".join(map(repr, self.header[:12])) + ", ..." * (len(self.header) > 12)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {there}"
        raise DataError(f"{self._name!r} has no column {name!r}; {hint}")

    def columns(self, ignore: Sequence[str]) -> dict[str, _Column]:
        """Return the columns by name, but for those to ignore."""
        columns: dict[str, _Column] = {}
        for i, name in enumerate(self.header):
            if name in ignore:
                continue
            if not name:
                raise DataError(
                    f"column {i + 1} of {self._name!r} has no name; name it, or leave it out "
                    "with --ignore ''"
                )
            if name in columns:
                raise DataError(f"{self._name!r} has two columns {name!r}")
            columns[name] = _Column(name, [row[i] for row in self.rows], self.lines)
        return columns


class _Column:
    """The cells of a column, and what they are.

    Attributes
    ----------
    missing, texts : list of int
        The rows without a value, and those with one that is not a number.
    numbers : ndarray of float64
        NaN in those rows.
    """

    def __init__(self, name: str, cells: list[str], lines: Sequence[int]) -> None:
        self.name, self.cells, self._lines = name, cells, lines
        self.numbers = np.full(len(cells), np.nan)
        self.missing: list[int] = []
        self.texts: list[int] = []
        for row, cell in enumerate(cells):
            number = _number(cell)
            if cell.casefold() in MISSING or (number is not None and math.isnan(number)):
                self.missing.append(row)
            elif number is None:
                self.texts.append(row)
            elif math.isinf(number):
                raise DataError(f"column {name!r} has no finite number in line {lines[row]}")
            else:
                self.numbers[row] = number

    def line(self, row: int) -> int:
        """Return where in the file a row is."""
        return self._lines[row]

    @property
    def has_numbers(self) -> bool:
        """Whether there is any number in it."""
        return len(self.missing) + len(self.texts) < len(self.cells)

    @property
    def has_commas(self) -> bool:
        """Whether all of it are numbers with a comma, be it for the point or for thousands."""
        return (
            len(self.texts) > 0
            and not self.has_numbers
            and all(_NUMBER_WITH_COMMA.fullmatch(self.cells[row]) for row in self.texts)
        )

    def quote(self, row: int) -> str:
        """Return a cell and its place, for a message."""
        return f"{self.cells[row]!r} in line {self.line(row)}"


_NUMBER_WITH_COMMA = re.compile(r"[+-]?\d+(,\d+)+(\.\d*)?")


def _number(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _count(things: Sequence[Any], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


# ---- what it means ------------------------------------------------------------------------------


def _target(column: _Column, task: str | None) -> tuple[str, npt.NDArray[Any], list[str] | None]:
    """Return the task, the target as an array, and the names of the classes."""
    name = f"the target {column.name!r}"
    if column.texts and task == "regression":
        raise DataError(
            f"{name} holds text ({column.quote(column.texts[0])}), and regression needs numbers"
        )
    if column.has_commas and task is None:
        raise DataError(
            f"{name} holds numbers with a comma ({column.quote(column.texts[0])}): write them with "
            "a point alone, or give --task classification"
        )
    if column.texts and column.has_numbers and task is None:
        raise DataError(
            f"{name} holds numbers and text ({column.quote(column.texts[0])}): correct it, or "
            "give --task classification"
        )
    values = np.array(column.cells) if column.texts else column.numbers
    distinct, labels, counts = np.unique(values, return_inverse=True, return_counts=True)
    if task is None:
        few = len(distinct) <= min(MOST_CLASSES, len(values) // 5)
        whole = not column.texts and bool((column.numbers % 1 == 0).all())
        task = "classification" if column.texts or (few and whole) else "regression"
    if len(distinct) == 1:
        what = "one class" if task == "classification" else "one value"
        raise DataError(f"{name} has only {what}, {column.cells[0]!r}: there is nothing to learn")
    if task == "regression":
        return task, column.numbers[:, np.newaxis], None
    if counts.max() < 5:
        raise DataError(
            f"{name} has {len(distinct)} classes in {len(values)} rows, none of them in five or "
            "more: too few to learn them"
        )
    classes = [str(value) if column.texts else f"{value:.15g}" for value in distinct]
    return task, labels.astype(np.intp), classes


def _kinds(
    columns: dict[str, _Column], categorical: set[str]
) -> tuple[list[_Column], list[_Column]]:
    """Return the columns of numbers and those of texts."""
    numeric, texts = [], []
    for column in columns.values():
        if len(column.missing) == len(column.cells):
            raise DataError(f"column {column.name!r} has no values; leave it out with --ignore")
        if column.has_commas and column.name not in categorical:
            raise DataError(
                f"column {column.name!r} holds numbers with a comma "
                f"({column.quote(column.texts[0])}): write them with a point alone, or, if these "
                "are names, give --categorical"
            )
        if column.name in categorical or not column.has_numbers:
            texts.append(column)
        elif column.texts:
            raise DataError(
                f"column {column.name!r} holds numbers and text ({column.quote(column.texts[0])}): "
                "correct it, or, if these are names, give --categorical"
            )
        else:
            numeric.append(column)
    return numeric, texts


# ---- making it ready ----------------------------------------------------------------------------


def _split(y: npt.NDArray[Any], seed: int, *, stratify: bool) -> list[npt.NDArray[np.intp]]:
    """Return the rows of training, validation and test: three fifths, one, one."""
    kind = StratifiedKFold if stratify else KFold
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")
        folds = kind(5, shuffle=True, random_state=seed).split(np.zeros(len(y)), y)
        test, validation, *train = [rows for _, rows in folds]
    return [np.sort(np.concatenate(train)), validation, test]


def _scale(columns: Sequence[_Column], train: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    values = np.stack([column.numbers for column in columns], axis=1)
    steps = make_pipeline(
        SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler()
    )
    scaled: npt.NDArray[np.float64] = steps.fit(values[train]).transform(values)
    return scaled


def _encode(columns: Sequence[_Column], train: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    values = np.array([column.cells for column in columns], dtype=object).T
    for i, column in enumerate(columns):
        values[column.missing, i] = None
    steps = make_pipeline(
        SimpleImputer(strategy="most_frequent", missing_values=None, keep_empty_features=True),
        OneHotEncoder(
            handle_unknown="infrequent_if_exist",
            max_categories=MOST_CATEGORIES,
            sparse_output=False,
        ),
    )
    encoded: npt.NDArray[np.float64] = steps.fit(values[train]).transform(values)
    return encoded


def _refuse_outliers(columns: Sequence[_Column], scaled: Array) -> None:
    """Say which of the columns that `scaled` begins with holds what no training could bear."""
    for column, values in zip(columns, scaled.T, strict=False):
        if not bool((np.abs(values) < FARTHEST).all()):  # NaN and infinity too
            largest = int(np.nanargmax(np.abs(column.numbers)))
            raise DataError(
                f"column {column.name!r} cannot be scaled: {column.quote(largest)} is more than "
                f"{FARTHEST:g} standard deviations from the mean"
            )


def _data(description: dict[str, Any], parts: Sequence[Split]) -> Data:
    train, validation, test = parts
    sizes = {
        "inputs": train.x.shape[1],
        "rows": {"training": len(train.x), "validation": len(validation.x), "test": len(test.x)},
    }
    return Data({**description, **sizes}, train, validation, test)
