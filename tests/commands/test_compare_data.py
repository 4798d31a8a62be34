"""``fastopt compare --data``: tables of every shape, and what is wrong with the bad ones."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import time

import numpy as np
import pytest
from sklearn import datasets

from fastopt.__main__ import main
from fastopt.compare import data

QUICK = ["--optimizers", "adam", "--lr", "0.01", "--epochs", "2", "--seeds", "1"]


def compare(tmp_path, *argv):
    """Run a comparison that must succeed; return its results and what it printed."""
    stdout, out = io.StringIO(), tmp_path / "out"
    with contextlib.redirect_stdout(stdout):
        assert main(["compare", *argv, "--out", str(out)]) == 0
    return json.loads((out / "results.json").read_text()), stdout.getvalue()


def write_csv(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return path


def table(tmp_path, rows=60, **changes):
    """A table of flowers, with some of its columns changed: lists of cells by name."""
    rng = np.random.default_rng(0)
    size = rng.normal(5, 1, rows)
    kind = np.where(size > 5, "rose", "daisy")
    columns = {
        "size": [f"{v:.3f}" for v in size],
        "colour": [("red", "blue", "white")[i % 3] for i in range(rows)],
        "kind": list(kind),
        "price": [f"{3 * v + 1:.2f}" for v in size],
    }
    columns |= changes
    columns = {name: cells for name, cells in columns.items() if cells is not None}
    return write_csv(tmp_path / "table.csv", columns, zip(*columns.values(), strict=True))


def read(path, target="kind", **options):
    return data.read_csv(path, target, 0, "float32", **options)


def all_rows(loaded):
    return np.concatenate([loaded.train.x, loaded.validation.x, loaded.test.x])


# ---- real tables ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task", "layers", "good"),
    [
        ("breast_cancer", "classification", [30, 64, 32, 2], 0.92),
        ("wine", "classification", [13, 64, 32, 3], 0.93),
        ("diabetes", "regression", [10, 64, 32, 1], 0.3),
    ],
)
def test_a_real_table_has_sensible_results_in_a_minute(tmp_path, name, task, layers, good):
    loaded = getattr(datasets, f"load_{name}")()
    rows = np.column_stack([loaded.data, loaded.target])
    path = write_csv(tmp_path / f"{name}.csv", [*loaded.feature_names, "target"], rows)
    begin = time.process_time()
    results, stdout = compare(tmp_path, "--data", str(path), "--target", "target")
    assert time.process_time() - begin < 60
    assert results["data"]["task"] == task
    assert results["data"]["name"] == f"{name}.csv"
    assert results["layers"] == layers
    for row in results["summary"]["rows"]:
        assert row["diverged"] == 0
        assert row["test_score"] > good - 0.1, row["algorithm"]
    assert max(row["test_score"] for row in results["summary"]["rows"]) > good
    assert ("test R2" if task == "regression" else "Best test accuracy") in stdout.replace(
        "Best test R2", "test R2"
    )


# ---- what a column is ----------------------------------------------------------------------------


def test_numbers_are_scaled_and_texts_become_one_input_each(tmp_path):
    loaded = read(table(tmp_path))
    about = loaded.description
    assert about["numeric_columns"] == ["size", "price"]
    assert about["categorical_columns"] == ["colour"]
    assert about["classes"] == ["daisy", "rose"]
    assert about["rows"] == {"training": 36, "validation": 12, "test": 12}
    assert about["inputs"] == 5
    assert np.abs(loaded.train.x[:, :2].mean(axis=0)).max() < 1e-6
    assert loaded.train.x[:, :2].std(axis=0) == pytest.approx(1, abs=1e-6)
    assert (all_rows(loaded)[:, 2:].sum(axis=1) == 1).all()
    assert set(np.unique(all_rows(loaded)[:, 2:])) == {0, 1}
    assert all_rows(loaded).dtype == np.float32
    larger = loaded.train.x[:, 0] > (5 - 4.9) / 1
    assert (loaded.train.y[larger] == 1).all()


def test_what_is_learned_of_the_columns_comes_from_the_training_rows_alone(tmp_path):
    whole = read(table(tmp_path))
    content = (tmp_path / "table.csv").read_text().splitlines()
    test_rows = data._split(whole_labels(whole, content), 0, stratify=True)[2]
    for row in test_rows:
        cells = content[row + 1].split(",")
        content[row + 1] = ",".join(["1e3", "green", cells[2], "-1e3"])
    (tmp_path / "table.csv").write_text("\n".join(content))
    other = read(tmp_path / "table.csv")
    assert (other.train.x == whole.train.x).all()
    assert (other.validation.x == whole.validation.x).all()
    assert (other.test.x[:, 2:] == 0).all()  # a text that the training rows do not have


def whole_labels(loaded, content):
    return np.array([line.split(",")[2] == "rose" for line in content[1:]], dtype=int)


def test_a_number_is_predicted_in_standard_deviations(tmp_path):
    loaded = read(table(tmp_path), "price")
    assert loaded.task == "regression"
    assert loaded.description["classes"] is None
    assert loaded.outputs == 1
    assert loaded.train.y.shape == (36, 1)
    assert loaded.train.y.dtype == np.float32
    assert loaded.train.y.mean() == pytest.approx(0, abs=1e-6)
    assert loaded.train.y.std() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("cells", "task"),
    [
        ([i % 3 for i in range(60)], "classification"),
        ([f"{i % 3}.0" for i in range(60)], "classification"),
        ([i % 12 for i in range(60)], "classification"),
        ([i % 13 for i in range(60)], "regression"),  # fewer than five rows each
        ([i % 3 + 0.5 for i in range(60)], "regression"),
        ([("yes", "no")[i % 2] for i in range(60)], "classification"),
    ],
)
def test_the_task_is_told_from_the_target(tmp_path, cells, task):
    assert read(table(tmp_path, kind=cells)).task == task


def test_more_than_twenty_whole_numbers_are_no_classes(tmp_path):
    for different, task in ((20, "classification"), (21, "regression")):
        cells = [i % different for i in range(300)]
        assert read(table(tmp_path, rows=300, kind=cells)).task == task


def test_the_task_can_be_forced(tmp_path):
    path = table(tmp_path, kind=[i % 3 for i in range(60)])
    assert read(path, task="regression").task == "regression"
    loaded = read(table(tmp_path, kind=[i % 3 + 0.5 for i in range(60)]), task="classification")
    assert loaded.description["classes"] == ["0.5", "1.5", "2.5"]


def test_a_rare_class_is_no_obstacle(tmp_path):
    cells = ["tulip"] + [("rose", "daisy")[i % 2] for i in range(59)]
    loaded = read(table(tmp_path, kind=cells))
    assert loaded.outputs == 3
    assert sum(loaded.description["rows"].values()) == 60


def test_numbers_can_be_names(tmp_path):
    path = table(tmp_path, colour=[i % 4 for i in range(60)])
    assert read(path).description["inputs"] == 3
    loaded = read(path, categorical=["colour"])
    assert loaded.description["categorical_columns"] == ["colour"]
    assert loaded.description["inputs"] == 2 + 4


def test_numbers_with_a_comma_can_be_names(tmp_path):
    path = table(tmp_path, size=["1,2", "2,1,3"] * 30, kind=["1,5", "2,5"] * 30)
    loaded = read(path, categorical=["size"], task="classification")
    assert loaded.description["categorical_columns"] == ["size", "colour"]
    assert loaded.description["classes"] == ["1,5", "2,5"]


def test_a_column_can_be_left_out(tmp_path):
    loaded = read(table(tmp_path, price=["?"] * 60), ignore=["price", "colour"])
    assert loaded.description["inputs"] == 1


def test_rare_texts_share_an_input(tmp_path):
    cells = [f"number {i}" for i in range(300)]
    loaded = read(table(tmp_path, rows=300, colour=cells))
    assert loaded.description["inputs"] == 2 + 50


def test_missing_values_are_filled_from_the_training_rows(tmp_path):
    path = table(tmp_path)
    lines = path.read_text().splitlines()
    for row, (size, colour) in {3: ("", "red"), 4: ("NaN", " "), 9: ("n/a", "?")}.items():
        lines[row] = ",".join([size, colour, *lines[row].split(",")[2:]])
    path.write_text("\n".join(lines))
    loaded = read(path, impute=True)
    assert loaded.description["missing_values"] == 5
    assert np.isfinite(all_rows(loaded)).all()
    assert (all_rows(loaded)[:, 2:].sum(axis=1) == 1).all()
    assert loaded.description["inputs"] == 5


def test_a_constant_column_says_nothing_and_does_no_harm(tmp_path):
    loaded = read(table(tmp_path, price=[7] * 60))
    assert (all_rows(loaded)[:, 1] == 0).all()


def test_large_numbers_are_scaled(tmp_path):
    cells = [1e100 * (i % 7) for i in range(60)]
    loaded = read(table(tmp_path, price=cells))
    assert loaded.train.x[:, 1].std() == pytest.approx(1, abs=1e-5)


# ---- what a file is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(",", ";"),
        lambda text: text.replace(",", "\t"),
        lambda text: text.replace(",", "|"),
        lambda text: "\ufeff" + text,  # a byte order mark
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\n\n") + "\n\n,,,\n",
        lambda text: "\n".join(
            ",".join(f'"{cell}"' for cell in line.split(",")) for line in text.splitlines()
        ),
        lambda text: text.replace(",", " , "),
        lambda text: text.rstrip("\n"),
    ],
    ids=["semicolons", "tabs", "bars", "bom", "crlf", "blank", "quotes", "spaces", "no-end"],
)
def test_the_same_table_in_other_words_is_the_same(tmp_path, change):
    path = table(tmp_path)
    plain = read(path)
    text = path.read_bytes().decode()
    path.write_bytes(change(text).encode())
    other = read(path)
    assert (all_rows(plain) == all_rows(other)).all()
    assert {**plain.description, "sha256": 0} == {**other.description, "sha256": 0}
    assert plain.description["sha256"] != other.description["sha256"]


def test_names_may_hold_commas_and_any_script(tmp_path):
    path = write_csv(
        tmp_path / "größe.csv", ["größe, cm", "価格"], [[i, 2 * i + 0.5] for i in range(40)]
    )
    results, stdout = compare(tmp_path, "--data", str(path), "--target", "価格", *QUICK)
    assert results["data"]["numeric_columns"] == ["größe, cm"]
    assert results["data"]["target"] == "価格"
    assert "größe.csv" in stdout


def test_the_page_shows_names_as_they_are(tmp_path):
    path = write_csv(tmp_path / "a&b.csv", ["x", "<i>y"], [[i, i + 0.5] for i in range(40)])
    _, stdout = compare(tmp_path, "--data", str(path), "--target", "<i>y", *QUICK)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<title>fastopt compare: a&amp;b.csv</title>" in page
    assert "&lt;i&gt;y" in page
    assert "<i>" not in page
    assert "a&b.csv: regression of '<i>y' from 1 numeric column;" in stdout


def test_ten_rows_are_enough(tmp_path):
    results, _ = compare(
        tmp_path, "--data", str(table(tmp_path, rows=10)), "--target", "price", *QUICK
    )
    assert results["data"]["rows"] == {"training": 6, "validation": 2, "test": 2}


def test_a_test_split_whose_target_is_constant_has_a_score(tmp_path):
    cells = [0.5] * 59 + [1.5]
    results, _ = compare(
        tmp_path, "--data", str(table(tmp_path, price=cells)), "--target", "price", *QUICK
    )
    assert results["runs"][0]["diverged"] is False


# ---- what is refused, each in one line -----------------------------------------------------------

CELLS = [f"{i}.5" for i in range(60)]
TEXTS = [("red", "blue")[i % 2] for i in range(60)]

BAD = {
    "mixed column": (
        {"size": [*CELLS[:58], "big", "7"]},
        [],
        "'size' holds numbers and text ('big' in line 60)",
    ),
    "mixed target": (
        {"kind": [*CELLS[:58], "big", "7"]},
        [],
        "target 'kind' holds numbers and text ('big' in line 60)",
    ),
    "text for regression": ({}, ["--task", "regression"], "target 'kind' holds text ('"),
    "missing": (
        {"size": [*CELLS[:58], "", "NA"]},
        [],
        "'size' has 2 missing values (the first in line 60); --impute",
    ),
    "missing in two": (
        {"size": [*CELLS[:59], ""], "price": ["?", *CELLS[1:]]},
        [],
        "and so have 'price' (1)",
    ),
    "missing text": (
        {"colour": [*TEXTS[:59], ""]},
        [],
        "'colour' has 1 missing value (the first in line 61)",
    ),
    "NaN": ({"size": [*CELLS[:59], "nan"]}, [], "'size' has 1 missing value "),
    "NaN with a sign": ({"size": [*CELLS[:59], "-NaN"]}, [], "'size' has 1 missing value "),
    "a number of Python's": (
        {"size": [*CELLS[:59], "1_000"]},
        [],
        "'size' holds numbers and text ('1_000' in line 61)",
    ),
    "commas": (
        {"size": [cell.replace(".", ",") for cell in CELLS]},
        [],
        "'size' holds numbers with a comma ('0,5' in line 2): write them with a point alone",
    ),
    "commas and missing": (
        {"size": ["", *["1,234.5"] * 59]},
        ["--impute"],
        "'size' holds numbers with a comma ('1,234.5' in line 3)",
    ),
    "commas in the target": (
        {"kind": ["1,5", "2,5"] * 30},
        [],
        "target 'kind' holds numbers with a comma ('1,5' in line 2)",
    ),
    "infinity": ({"size": [*CELLS[:59], "-inf"]}, [], "'size' has no finite number in line 61"),
    "beyond double": (
        {"size": [*CELLS[:59], "1e999"]},
        ["--impute"],
        "'size' has no finite number",
    ),
    "too large to scale": (
        {"size": [*CELLS[:59], "1e308"]},
        [],
        "column 'size' cannot be scaled: '1e308' in line 61 is more than 1e+06 standard deviations",
    ),
    "too far": (
        {"size": ["1e30" if i == 17 else i % 2 for i in range(60)], "kind": TEXTS},  # in the test
        [],
        "column 'size' cannot be scaled: '1e30' in line 19",
    ),
    "target too far": (
        {"kind": ["1e30" if i == 10 else i % 2 + 0.5 for i in range(60)]},  # in the test
        ["--task", "regression"],
        "column 'kind' cannot be scaled: '1e30' in line 12",
    ),
    "missing target": (
        {"kind": [*TEXTS[:59], "NaN"]},
        ["--impute"],
        "the target 'kind' has 1 missing value (the first in line 61)",
    ),
    "one class": ({"kind": ["rose"] * 60}, [], "'kind' has only one class, 'rose'"),
    "one number": ({"kind": [7] * 60}, [], "'kind' has only one class, '7'"),
    "constant": ({"kind": [7] * 60}, ["--task", "regression"], "'kind' has only one value, '7'"),
    "all classes apart": (
        {"kind": [f"r{i}" for i in range(60)]},
        [],
        "'kind' has 60 classes in 60 rows",
    ),
    "empty column": ({"price": [""] * 60}, ["--impute"], "'price' has no values"),
    "no such target": (
        {"kind": None, "kinds": TEXTS},
        [],
        "no column 'kind'; did you mean 'kinds'?",
    ),
    "no such column": ({}, ["--ignore", "xyz"], "no column 'xyz'; it has 'size', 'colour', "),
    "no such name": ({}, ["--categorical", "xyz"], "no column 'xyz'"),
    "no name": (
        {"": CELLS},
        [],
        "column 5 of 'table.csv' has no name; name it, or leave it out with --ignore ''",
    ),
    "ignored target": ({}, ["--ignore", "kind"], "'kind' cannot be the target and be ignored"),
    "target alone": (
        {"size": None, "colour": None, "price": None},
        [],
        "has no column besides the target",
    ),
}


def refused(capsys, tmp_path, path, *argv, target="kind"):
    out = tmp_path / "out"
    status = main(["compare", "--data", str(path), "--target", target, *argv, "--out", str(out)])
    stdout, stderr = capsys.readouterr()
    assert status == 2
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert stderr.startswith("fastopt: error: ")
    assert not out.exists()
    return stderr


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_refused_in_one_line(tmp_path, capsys, case):
    changes, argv, message = BAD[case]
    assert message in refused(capsys, tmp_path, table(tmp_path, **changes), *argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "'bad.csv' is empty"),
        (b"\n \n,,\n", "'bad.csv' is empty"),
        (b"\xef\xbb\xbf", "'bad.csv' is empty"),
        (b"size,kind\n", "'bad.csv' has 0 rows of data; at least 10 are needed"),
        (b"size,kind\n1,rose\n", "'bad.csv' has 1 row of data; at least 10 are needed"),
        (b"size,kind,size\n" + b"1,rose,2\n" * 20, "'bad.csv' has two columns 'size'"),
        (b"size,kind\n1,rose\n1\n", "'bad.csv', line 3: 1 cell under 2 column names"),
        (b"size,kind\n1,2,rose\n", "'bad.csv', line 2: 3 cells under 2 column names"),
        ("größe,kind\n1,rose\n".encode("latin-1"), "'bad.csv' is not a text file in UTF-8"),
        ("size,kind\n1,rose\n".encode("utf-16"), "'bad.csv' is not a text file in UTF-8"),
        (b"size,kind\n1," + b"x" * 200_000 + b"\n", "'bad.csv', line 2: field larger"),
        (b"1,rose\n2,daisy\n", "'bad.csv' has no column 'kind'; it has '1', 'rose'"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    assert message in refused(capsys, tmp_path, path)


def test_a_file_that_is_not_there_is_refused(tmp_path, capsys):
    line = refused(capsys, tmp_path, tmp_path / "nowhere.csv")
    assert "nowhere.csv" in line
    assert "No such file" in line


def test_a_folder_is_refused(tmp_path, capsys):
    assert "Is a directory" in refused(capsys, tmp_path, tmp_path)
