"""The command line: ``fastopt info``, and ``fastopt compare`` on the digits and from end to end.

Extras are hidden from a fresh interpreter, not from this one: no test sees another's imports.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import fcntl
import html.parser
import io
import json
import os
import pty
import re
import select
import statistics
import struct
import subprocess
import sys
import termios
from pathlib import Path

import matplotlib.image
import numpy as np
import pyte
import pytest
from support import CHECKOUT, refused, strict_json

import fastopt
from fastopt.__main__ import main
from fastopt.compare import data, figure, progress, run, summary
from fastopt.compare.algorithms import ALGORITHMS, DEFAULT, GRID, SCHEDULES
from fastopt.compare.model import MLP, cross_entropy, squared_error

FILES = ["comparison.png", "report.html", "results.json"]
TIMES = {"seconds", "step_us_median", "optimizer_us_median", "optimizer_us", "optimizer_share"}


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture(scope="module")
def digits():
    return data.digits(0, "float32")


@pytest.fixture(scope="module")
def five_epochs(tmp_path_factory):
    """Output folder and standard output of one comparison; tests only read them."""
    out, stdout = tmp_path_factory.mktemp("five") / "made" / "here", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.delenv("FORCE_COLOR", raising=False)
        assert main(["compare", "--epochs", "5", "--seeds", "2", "--out", str(out)]) == 0
    return out, stdout.getvalue()


def environment():
    return {**os.environ, "PYTHONPATH": str(Path(fastopt.__file__).parents[1])}


def python(*args, **options):
    """Run a fresh interpreter on the same fastopt."""
    return subprocess.run(
        [sys.executable, *args],
        env=environment() | options.pop("env", {}),
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def results_of(tmp_path, *argv):
    """Run a comparison that must succeed; return its results."""
    assert main(["compare", *argv, "--out", str(tmp_path)]) == 0
    return strict_json(tmp_path / "results.json")


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def table(stdout):
    """Return the cells of the rows below the headings, by algorithm."""
    lines = stdout[stdout.rindex("algorithm  ") :].splitlines()
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
    return {row[0]: row[1:] for row in rows if len(row) == 7 and row[0] in ALGORITHMS}


def go(digits, **settings):
    comparison = run.Comparison(digits, run.Settings(**settings))
    comparison.go(progress.Progress())
    return comparison


def losses(r):
    return [e["training_loss"] for e in r["epochs"]]


# ---- what it prints and writes -------------------------------------------------------------------


def test_prints_every_rate_tried_and_every_epoch_of_every_run(five_epochs):
    out, stdout = five_epochs
    results = strict_json(out / "results.json")
    expected = []
    for name in DEFAULT:
        expected += [
            f"{name}, learning rate {t['lr']:g}: validation loss "
            + ("diverged" if t["validation_loss"] is None else f"{t['validation_loss']:.4f}")
            for t in results["search"]
            if t["algorithm"] == name
        ]
        for r in results["runs"]:
            if r["algorithm"] == name:
                expected += [
                    f"{name}, learning rate {r['hyperparameters']['lr']:g}, seed {r['seed']}"
                ]
                expected += [f"Epoch [{i}/5], Loss: {losses(r)[i]:.4f}" for i in range(1, 6)]
    lines = [line for line in stdout.splitlines() if re.match(r"Epoch|\w+, learning", line)]
    assert lines == expected
    assert len(lines) == 5 * len(GRID) + 10 * 6


def test_the_table_follows_from_the_runs(five_epochs):
    out, stdout = five_epochs
    results = strict_json(out / "results.json")
    runs = results["runs"]
    common = max(min(losses(r)[1:]) for r in runs)
    rows = table(stdout)
    assert list(rows) == list(DEFAULT)
    assert re.search(rf"(?m)^.*\b{common:.4f}\b", stdout[stdout.rindex("algorithm ") - 300 :])
    for name, cells in rows.items():
        mine = [r for r in runs if r["algorithm"] == name]
        assert [r["seed"] for r in mine] == [0, 1]
        lr, loss, score, reached, us, share = cells
        assert {r["hyperparameters"]["lr"] for r in mine} == {float(lr)}
        assert loss == f"{statistics.fmean(losses(r)[-1] for r in mine):.4f}"
        scores = [100 * r["epochs"][-1]["test_score"] for r in mine]
        assert score == f"{statistics.fmean(scores):.1f} ± {statistics.stdev(scores):.1f} %"
        first = [next(i for i in range(1, 6) if losses(r)[i] <= common) for r in mine]
        assert float(reached) == statistics.fmean(first)
        assert 0 < float(us) < 1000
        assert 0 < float(share.removesuffix(" %")) < 100


def test_the_summary_is_the_table(five_epochs):
    out, stdout = five_epochs
    results = strict_json(out / "results.json")
    rows = table(stdout)
    assert [row["algorithm"] for row in results["summary"]["rows"]] == list(rows)
    for row in results["summary"]["rows"]:
        lr, loss, score, reached, us, share = rows[row["algorithm"]]
        assert f"{row['lr']:g}" == lr
        assert f"{row['training_loss']:.4f}" == loss
        spread = 100 * row["test_score_spread"]
        assert f"{100 * row['test_score']:.1f} ± {spread:.1f} %" == score
        assert row["epochs_to_common_loss"] == float(reached)
        assert f"{row['optimizer_us']:.1f}" == us
        assert f"{100 * row['optimizer_share']:.0f} %" == share
        medians = [
            r["optimizer_us_median"] for r in results["runs"] if r["algorithm"] == row["algorithm"]
        ]
        assert min(medians) <= row["optimizer_us"] <= max(medians)


def test_the_last_line_but_one_names_the_best(five_epochs):
    out, stdout = five_epochs
    rows = strict_json(out / "results.json")["summary"]["rows"]
    best = max(rows, key=lambda row: row["test_score"])
    verdict, written = stdout.splitlines()[-2:]
    assert verdict.startswith(f"Best test accuracy: {best['algorithm']}, ")
    assert written.startswith("Written: ")
    assert all(str(out / name) in written for name in FILES)
    assert sorted(path.name for path in out.iterdir()) == FILES


def row(algorithm, score, spread, lr=0.1):
    return summary.Row(algorithm, lr, 3, 0, 0.5, 0.1, score, spread, 3.0, 2.0, 0.02, 8.0)


@pytest.mark.parametrize(
    ("task", "best", "scores"),
    [
        # 360 rows: 90 and 87 % are within 1.6 and 1.8 % of what others would give.
        ("classification", (0.9, 0.0), {"adam": (0.87, 0.0), "adagrad": (0.8, 0.0)}),
        ("classification", (0.9, None), {"adam": (0.87, None), "adagrad": (0.8, None)}),
        ("classification", (0.9, 0.03), {"adam": (0.8, 0.07), "adagrad": (0.8, 0.01)}),
        ("classification", (1.0, 0.0), {"adam": (1.0, 0.0), "adagrad": (0.98, 0.0)}),
        # R2 of 0.5 and 0.43: within 0.037 and 0.042.
        ("regression", (0.5, 0.0), {"adam": (0.43, 0.0), "adagrad": (0.41, 0.0)}),
        ("regression", (0.5, 0.0), {"adam": (0.2, 0.3), "adagrad": (0.2, 0.1)}),
    ],
)
def test_whom_the_test_rows_cannot_tell_apart_is_said(digits, task, best, scores):
    about = dataclasses.replace(digits, description={**digits.description, "task": task})
    rows = [row("sgd", *best)] + [row(name, *score) for name, score in scores.items()]
    said = summary.verdict(run.Comparison(about, run.Settings()), summary.Summary(0.5, rows))
    assert said.startswith(f"Best test {'R2' if task == 'regression' else 'accuracy'}: sgd, ")
    assert said.endswith("; on 360 test rows too close to tell from it: adam.")


def test_a_rate_at_an_end_of_the_list_is_pointed_out(digits):
    rows = [row("sgd", 0.9, 0.0, lr=3.0), row("adam", 0.5, 0.0, lr=1e-4), row("adagrad", 0.5, 0.0)]
    rows += [row("rmsprop", 0.5, 0.0, lr=3.0)]  # which was given
    comparison = run.Comparison(digits, run.Settings())
    comparison.trials = [
        run.Trial(name, lr, 1.0) for name in ("sgd", "adam", "adagrad") for lr in GRID
    ]
    assert summary.verdict(comparison, summary.Summary(0.5, rows)) == (
        "Best test accuracy: sgd, 90.0 ± 0.0 %. The lowest learning rate tried was the best for "
        "adam: a lower one may be better (--lr). The highest learning rate tried was the best for "
        "sgd: a higher one may be better (--lr)."
    )


def test_results_say_what_was_run(five_epochs):
    results = strict_json(five_epochs[0] / "results.json")
    assert results["format"] == 1
    assert results["complete"] is True
    assert results["settings"] == {
        "optimizers": list(DEFAULT),
        "hidden": [64, 32],
        "epochs": 5,
        "batch_size": 64,
        "lr": {},
        "schedule": "constant",
        "seed": 0,
        "seeds": 2,
        "dtype": "float32",
        "param_dtypes": [],
        "state_dtypes": [],
        "master_weights": True,
        "threads": None,
    }
    assert results["layers"] == [64, 64, 32, 10]
    assert results["data"]["rows"] == {"training": 1077, "validation": 360, "test": 360}
    assert results["data"]["classes"] == [str(i) for i in range(10)]
    assert results["versions"]["fastopt"] == fastopt.__version__
    assert results["versions"]["numpy"] == np.__version__
    assert results["build_info"] == fastopt.build_info()
    assert [(t["algorithm"], t["lr"]) for t in results["search"]] == [
        (name, lr) for name in DEFAULT for lr in GRID
    ]
    for r in results["runs"]:
        assert r["steps"] == 5 * 17  # 1077 samples, 64 a batch
        assert [e["epoch"] for e in r["epochs"]] == [0, 1, 2, 3, 4, 5]
        seconds = [e["seconds"] for e in r["epochs"]]
        assert seconds[0] == 0
        assert seconds == sorted(seconds)
        assert 0 < r["optimizer_us_median"] < r["step_us_median"] < 1e6 * seconds[-1]


def test_results_hold_what_their_documentation_lists(five_epochs):
    text = (CHECKOUT / "docs" / "compare.md").read_text()
    text = text[text.index("## results.json") :]
    listed = set(re.findall(r"(?m)^\| `([\w.\[\]]+)` \|", text))

    def keys(value, path=""):
        if isinstance(value, list):
            return set().union(*(keys(v, f"{path}[]") for v in value), set())
        if not isinstance(value, dict) or path in ("build_info", "versions", "settings.lr"):
            return set()
        found = set()
        for k, v in value.items():
            name = f"{path}.{k}".lstrip(".")
            found |= {name} | keys(v, name)
        return found

    found = keys(strict_json(five_epochs[0] / "results.json"))
    found = {n for n in found if not n.startswith("runs[].hyperparameters.")}
    assert found == listed
    assert len(found) > 40


def test_every_algorithm_learns(five_epochs):
    runs = strict_json(five_epochs[0] / "results.json")["runs"]
    for r in runs:
        assert losses(r)[-1] < 0.3 * losses(r)[0], r["algorithm"]
        assert r["epochs"][-1]["test_score"] > 0.85, r["algorithm"]
        assert r["epochs"][0]["test_score"] < 0.3
    assert len({tuple(losses(r)) for r in runs}) == 10


def test_the_figure_is_a_png_of_the_published_size(five_epochs):
    content = (five_epochs[0] / "comparison.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(content[16:20], "big") == 1500
    assert int.from_bytes(content[20:24], "big") == 690


def test_the_figure_holds_a_busy_machine_against_no_algorithm(digits):
    rates = {"sgd": 0.1, "adam": 0.01}
    comparison = go(digits, optimizers=("sgd", "adam"), lr=rates, epochs=2, seeds=3)
    for r in comparison.runs:
        r.optimizer_us = [2.0 if r.algorithm == "sgd" else 3.0] * 34
        r.step_us = [us + 50.0 for us in r.optimizer_us]
    for r in comparison.runs[:2]:  # of sgd
        r.step_us = [us + 40.0 for us in r.step_us]
    seconds = figure._epoch_seconds(comparison)
    assert seconds == {"sgd": pytest.approx(17 * 52e-6), "adam": pytest.approx(17 * 53e-6)}


@pytest.mark.parametrize("lr", [0.01, 1e30])
def test_nothing_of_a_figure_is_cut_off(digits, lr):
    long = {**digits.description, "name": "a table with a name of its own " * 5}
    rates = dict.fromkeys(ALGORITHMS, lr)
    comparison = go(
        dataclasses.replace(digits, description=long),
        optimizers=tuple(ALGORITHMS),
        lr=rates,
        epochs=2,
    )
    # (Adadelta may go on: it turns back by steps as long as the first, and stays finite. Rprop's
    # steps have a largest size.)
    others = [r for r in comparison.runs if r.algorithm not in ("adadelta", "rprop")]
    assert all(r.diverged == (lr == 1e30) for r in others)
    pixels = matplotlib.image.imread(io.BytesIO(figure.curves(comparison)))
    assert pixels.min() < 0.2
    for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
        assert (edge == 1).all()


class Page(html.parser.HTMLParser):
    """Collects what a page shows, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.loads, self.said = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "img":
            assert len(dict(attrs)["alt"]) > 20

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.cells.append(data)
        self.said.append(data)


def test_the_page_shows_the_table_and_the_plots_and_loads_nothing(five_epochs):
    out, stdout = five_epochs
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.cells[7:] == [
        cell for name, cells in table(stdout).items() for cell in (name, *cells)
    ]
    images = [base64.b64decode(load.removeprefix("data:image/png;base64,")) for load in page.loads]
    assert len(images) == 2
    assert images[0] == (out / "comparison.png").read_bytes()
    assert all(image.startswith(b"\x89PNG") for image in images)
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text
    assert stdout.splitlines()[-2] in page.said


def test_without_a_search_the_page_has_none(tmp_path):
    argv = ["--lr", "0.01", "--epochs", "1", "--seeds", "1", "--optimizers", "sgd"]
    assert results_of(tmp_path, *argv)["search"] == []
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.loads) == 1
    assert "Choice of the learning rate" not in page.said


# ---- the same numbers ----------------------------------------------------------------------------


@pytest.mark.slow
def test_same_seed_same_bits_for_any_threads(five_epochs, tmp_path):
    """In another process, whose BLAS and OpenMP would take other numbers of threads."""
    first = strict_json(five_epochs[0] / "results.json")
    argv = ["-m", "fastopt", "compare", "--epochs", "5", "--seeds", "2", "--threads", "1"]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "3")
    done = python(*argv, cwd=tmp_path, env=threads)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    again = strict_json(tmp_path / "fastopt-comparison" / "results.json")
    assert again["settings"].pop("threads") == 1
    assert first["settings"].pop("threads") is None
    assert again.pop("build_info")["threads"] == 3
    first.pop("build_info")
    assert without_times(again) == without_times(first)


@pytest.mark.slow
def test_another_seed_gives_other_numbers(five_epochs, tmp_path):
    first = strict_json(five_epochs[0] / "results.json")
    other = results_of(tmp_path, "--epochs", "5", "--seed", "1", "--seeds", "1")
    assert len(other["runs"]) == 5
    of_seed_1 = [r for r in first["runs"] if r["seed"] == 1]
    for a, b in zip(of_seed_1, other["runs"], strict=True):  # the same weights, another split
        assert a["epochs"][1]["training_loss"] != b["epochs"][1]["training_loss"]
    for a, b in zip(first["runs"][::2], first["runs"][1::2], strict=True):
        assert a["algorithm"] == b["algorithm"]
        assert a["epochs"][1]["training_loss"] != b["epochs"][1]["training_loss"]


def test_types_differ_by_their_rounding_alone(digits):
    settings = {"optimizers": ("adam",), "lr": {"adam": 0.003}, "epochs": 2, "seeds": 1}
    (single,) = go(digits, **settings).runs
    (double,) = go(data.digits(0, "float64"), dtype="float64", **settings).runs
    for a, b in zip(single.epochs[1:], double.epochs[1:], strict=True):
        assert a.training_loss != b.training_loss
        assert a.training_loss == pytest.approx(b.training_loss, rel=1e-4)


# ---- fairness ------------------------------------------------------------------------------------


def test_all_begin_with_the_same_weights_and_see_the_same_batches(digits, monkeypatch):
    seen, loss_and_grads, per_run = [], MLP.loss_and_grads, 2 * 17

    def spy(model, x, y):
        start = model.params[0].tobytes() if len(seen) % per_run == 0 else b""
        seen.append((x.tobytes(), y.tobytes(), start))
        return loss_and_grads(model, x, y)

    monkeypatch.setattr(MLP, "loss_and_grads", spy)
    rates = dict.fromkeys(ALGORITHMS, 0.01)
    comparison = go(digits, optimizers=tuple(ALGORITHMS), lr=rates, epochs=2, seeds=2)
    streams = [tuple(seen[i : i + per_run]) for i in range(0, len(seen), per_run)]
    assert len(streams) == 2 * len(ALGORITHMS)
    for seed in (0, 1):
        mine = [i for i, r in enumerate(comparison.runs) if r.seed == seed]
        assert len({streams[i] for i in mine}) == 1
    assert len(set(streams)) == 2
    assert streams[0][:17] != streams[0][17:]


def test_the_rate_chosen_is_the_best_on_the_validation_split(five_epochs):
    results = strict_json(five_epochs[0] / "results.json")
    for name in DEFAULT:
        trials = [t for t in results["search"] if t["algorithm"] == name]
        best = min(trials, key=lambda t: t["validation_loss"] or np.inf)
        mine = [r for r in results["runs"] if r["algorithm"] == name]
        assert {r["hyperparameters"]["lr"] for r in mine} == {best["lr"]}
        last = [e["validation_loss"] for r in mine for e in r["epochs"][-2:]]  # a quarter of five
        assert statistics.fmean(last) == best["validation_loss"]
        assert GRID[0] < best["lr"] < GRID[-1]  # else the grid would be too narrow


def test_the_test_split_chooses_nothing_and_trains_nothing(digits):
    settings = {"optimizers": ("sgd", "adam"), "epochs": 2, "seeds": 1}
    other = dataclasses.replace(digits, test=data.Split(digits.test.x[::-1].copy(), digits.test.y))
    a, b = go(digits, **settings), go(other, **settings)
    assert a.trials == b.trials
    for mine, theirs in zip(a.runs, b.runs, strict=True):
        assert [e.training_loss for e in mine.epochs] == [e.training_loss for e in theirs.epochs]
        assert mine.epochs[-1].test_score > 2 * theirs.epochs[-1].test_score


def test_the_three_splits_are_apart_and_have_every_class_in_proportion(digits):
    parts = digits.train, digits.validation, digits.test
    rows = [row.tobytes() for part in parts for row in part.x]
    assert len(rows) == len(set(rows)) == 1797
    for part in parts:
        counts = np.bincount(part.y, minlength=10) / len(part.y)
        assert np.abs(counts - 0.1).max() < 0.01


# ---- options -------------------------------------------------------------------------------------


def test_a_given_rate_is_not_searched(tmp_path):
    argv = ["--optimizers", "adagrad,sgd,adam", "--lr", "sgd=0.2,adam=0.004", "--epochs", "1"]
    results = results_of(tmp_path, *argv, "--seeds", "1")
    assert {t["algorithm"] for t in results["search"]} == {"adagrad"}
    rates = {r["algorithm"]: r["hyperparameters"]["lr"] for r in results["runs"]}
    assert list(rates) == ["adagrad", "sgd", "adam"]
    assert rates["sgd"] == 0.2
    assert rates["adam"] == 0.004
    assert results["settings"]["lr"] == {"sgd": 0.2, "adam": 0.004}


def test_one_rate_for_all(tmp_path):
    results = results_of(tmp_path, "--lr", "0.01", "--epochs", "1", "--seeds", "1")
    assert {r["hyperparameters"]["lr"] for r in results["runs"]} == {0.01}
    assert results["search"] == []


def test_every_algorithm_can_be_asked_for(tmp_path, capsys):
    argv = ["--optimizers", "all", "--lr", "0.003", "--epochs", "2", "--seeds", "1"]
    results = results_of(tmp_path, *argv)
    assert list(table(capsys.readouterr().out)) == list(ALGORITHMS)
    assert len({losses(r)[-1] for r in results["runs"]}) == len(ALGORITHMS) == 14


@pytest.mark.parametrize(("hidden", "layers"), [("", [64, 10]), ("5", [64, 5, 10])])
def test_hidden_layers_are_as_asked_for(tmp_path, capsys, hidden, layers):
    argv = ["--hidden", hidden, "--epochs", "3", "--seeds", "1", "--optimizers", "momentum"]
    results = results_of(tmp_path, *argv)
    assert results["layers"] == layers
    assert results["runs"][0]["epochs"][-1]["test_score"] > 0.4
    assert ("Linear model" in capsys.readouterr().out) == (not hidden)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_trains(digits, name):
    settings = {"optimizers": ("adam",), "lr": {"adam": 0.01}, "epochs": 3, "seeds": 1}
    (constant,) = go(digits, **settings).runs
    (scheduled,) = go(digits, schedule=name, **settings).runs
    assert scheduled.epochs[-1].training_loss < 0.5 * scheduled.epochs[0].training_loss
    same = scheduled.epochs[-1].training_loss == constant.epochs[-1].training_loss
    assert same == (name == "constant")
    for steps in (1, 2, 3, 10, 1000):
        schedule = SCHEDULES[name](0.1, steps)
        if name != "constant":
            rates = [schedule(s) for s in range(steps)]
            assert 0 <= min(rates) <= max(rates) <= 0.1
            assert max(rates) > 0.003


def test_every_schedule_can_be_asked_for_by_its_functions_name():
    names = {name.replace("_", "-") for name in fastopt.schedules.__all__}
    assert names == set(SCHEDULES)


def test_the_documented_schedules_are_those_there_are():
    text = (CHECKOUT / "docs" / "compare.md").read_text()
    listed = text[text.index("| schedule |") :].partition("\n\n")[0]
    assert re.findall(r"(?m)^\| `([\w-]+)` \|", listed) == list(SCHEDULES)
    lr, n = 0.7, 420
    at = {name: SCHEDULES[name](lr, n) for name in SCHEDULES if name != "constant"}
    expected = {
        "step": {0: 1, 139: 1, 142: 0.1, 419: 0.01},
        "multi-step": {209: 1, 210: 0.1, 315: 0.01},
        "exponential": {0: 1, 210: 0.1, 420: 0.01},
        "polynomial": {0: 1, 105: 0.75, 420: 0},
        "cosine": {0: 1, 210: 0.5, 420: 0},
        "cosine-restarts": {0: 1, 61: 1, 61 + 122: 1},
        "linear-warmup": {0: 0.1, 43: 1, 419: 1},
        "one-cycle": {0: 1 / 25, 125: 1, 419: 1 / 250_000},
        "piecewise": {210: 1, 211: 0.1},
        "inverse-time": {0: 1, 140: 1 / 4, 420: 1 / 10},
    }
    assert expected.keys() == at.keys()
    for name, rates in expected.items():
        for s, part in rates.items():
            assert at[name](s) == pytest.approx(lr * part, rel=1e-12), (name, s)


def test_a_batch_larger_than_the_data_is_the_whole_of_it(tmp_path):
    argv = ["--epochs", "1", "--batch-size", "100000", "--seeds", "1", "--lr", "0.1"]
    assert {r["steps"] for r in results_of(tmp_path, *argv)["runs"]} == {1}


# ---- when something goes wrong -------------------------------------------------------------------


@pytest.mark.parametrize("diverging", [["sgd"], list(DEFAULT)])
def test_a_diverging_run_stops_and_says_so(tmp_path, capsys, diverging):
    rates = [f"{name}={'1e30' if name in diverging else '0.01'}" for name in DEFAULT]
    results = results_of(tmp_path, "--epochs", "3", "--seeds", "2", "--lr", ",".join(rates))
    captured = capsys.readouterr()
    assert captured.err == ""
    rows = table(captured.out)
    assert list(rows) == list(DEFAULT)
    assert "Epoch [1/3], Loss: diverged" in captured.out
    assert ("Every algorithm diverged" in captured.out) == (len(diverging) == 5)
    for r in results["runs"]:
        diverged = r["algorithm"] in diverging
        assert r["diverged"] is diverged
        assert (losses(r)[-1] is None) is diverged
        assert len(r["epochs"]) == (2 if diverged else 4)
        assert (rows[r["algorithm"]][1:4] == ["diverged", "2 of 2 runs", "-"]) is diverged
    assert Page((tmp_path / "report.html").read_text()).cells.count("diverged") == len(diverging)


def test_if_every_rate_tried_diverges_the_algorithm_is_a_row_that_says_so(monkeypatch, digits):
    monkeypatch.setattr(run, "GRID", (1e28, 1e29, 1e30))
    comparison = go(digits, optimizers=("sgd",), epochs=1, seeds=1)
    assert [t.validation_loss for t in comparison.trials] == [None] * 3
    assert comparison.runs[0].diverged
    assert comparison.runs[0].hyperparameters["lr"] == 1e28
    assert figure.search(comparison) is None  # nothing to draw


@pytest.mark.slow
def test_interrupt_keeps_the_finished_runs(monkeypatch, tmp_path, capsys):
    train = progress.Lines.train

    def interrupted(self, algorithm, lr, seed):
        if (algorithm, seed) == ("adagrad", 1):
            raise KeyboardInterrupt
        train(self, algorithm, lr, seed)

    monkeypatch.setattr(progress.Lines, "train", interrupted)
    argv = ["compare", "--epochs", "1", "--seeds", "2", "--out", str(tmp_path)]
    assert main(argv) == 130
    captured = capsys.readouterr()
    assert list(table(captured.out)) == ["sgd", "momentum", "adagrad"]
    assert captured.err == "\nInterrupted: the results are of 5 of 10 runs.\n"
    results = strict_json(tmp_path / "results.json")
    assert [r["algorithm"] for r in results["runs"]] == ["sgd"] * 2 + ["momentum"] * 2 + ["adagrad"]
    assert results["complete"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_interrupt_between_a_search_and_its_first_run_keeps_the_others(
    monkeypatch, tmp_path, capsys
):
    train = progress.Lines.train

    def interrupted(self, algorithm, lr, seed):
        if algorithm == "adam":
            raise KeyboardInterrupt
        train(self, algorithm, lr, seed)

    monkeypatch.setattr(progress.Lines, "train", interrupted)
    argv = ["--optimizers", "sgd,adam", "--lr", "sgd=0.1", "--epochs", "1", "--seeds", "1"]
    assert main(["compare", *argv, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nInterrupted: the results are of 1 of 2 runs.\n"
    results = strict_json(tmp_path / "results.json")
    assert [r["algorithm"] for r in results["runs"]] == ["sgd"]
    assert {t["algorithm"] for t in results["search"]} == {"adam"}
    assert len(Page((tmp_path / "report.html").read_text()).loads) == 2


def test_interrupt_while_it_draws_keeps_the_numbers(monkeypatch, tmp_path, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "curves", interrupted)
    argv = ["compare", "--epochs", "1", "--seeds", "1", "--lr", "0.1", "--out", str(tmp_path)]
    assert main(argv) == 130
    assert capsys.readouterr().err == "fastopt: error: interrupted\n"
    assert strict_json(tmp_path / "results.json")["complete"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_interrupt_before_the_first_run_ends_writes_nothing(monkeypatch, tmp_path, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(progress.Lines, "train", interrupted)
    assert main(["compare", "--epochs", "1", "--out", str(tmp_path)]) == 130
    assert "0 of 15" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_too_large_a_network_is_one_line(monkeypatch, tmp_path, capsys):
    def full(*args):
        raise MemoryError("Unable to allocate 7.28 TiB")

    monkeypatch.setattr(run, "MLP", full)
    status, line = refused(capsys, ["compare", "--out", str(tmp_path)])
    assert status == 1
    assert "not enough memory: Unable to allocate" in line


def test_too_little_memory_keeps_the_finished_runs(monkeypatch, tmp_path, capsys):
    def full(*args, **kwargs):
        raise MemoryError("Unable to allocate 1 GiB")

    monkeypatch.setitem(ALGORITHMS, "adam", (full, {}))
    argv = ["--optimizers", "sgd,adam", "--lr", "0.1", "--epochs", "1", "--seeds", "1"]
    status, line = refused(capsys, ["compare", *argv, "--out", str(tmp_path)])
    assert status == 1
    assert "Unable to allocate 1 GiB; the results are of 1 of 2 runs" in line
    results = strict_json(tmp_path / "results.json")
    assert [r["algorithm"] for r in results["runs"]] == ["sgd"]
    assert results["complete"] is False


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "-3"], "--epochs"),
        (["--epochs", "many"], "'many'"),
        (["--epochs", "2.5"], "'2.5'"),
        (["--epochs"], "--epochs"),
        (["--batch-size", "0"], "--batch-size"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**32)], "--seed"),
        (["--seeds", "0"], "--seeds"),
        (["--threads", "0"], "--threads"),
        (["--dtype", "float16"], "float16"),
        (["--schedule", "sometimes"], "sometimes"),
        (["--hidden", "64,"], "--hidden"),
        (["--hidden", "64,-1"], "'-1'"),
        (["--hidden", "wide"], "'wide'"),
        (["--optimizers", "adma"], "'adma'"),
        (["--optimizers", ""], "--optimizers"),
        (["--optimizers", "sgd,sgd"], "each name once"),
        (["--lr", "0"], "'0'"),
        (["--lr", "nan"], "'nan'"),
        (["--lr", "0.1,0.2"], "NAME=RATE"),
        (["--lr", "adma=0.1"], "'adma'"),
        (["--lr", "adam=fast"], "'fast'"),
        (["--lr", "adamw=0.1"], "'adamw'"),
        (["--epoch", "3"], "--epoch"),
        (["--colour"], "--colour"),
        (["adam"], "adam"),
        (["--target", "digit"], "--target"),
        (["--task", "regression"], "--task"),
        (["--impute"], "--impute"),
        (["--ignore", "x"], "--ignore"),
        (["--categorical", "x"], "--categorical"),
        (["--data", "table.csv"], "--target"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    monkeypatch, tmp_path, capsys, argv, named
):
    monkeypatch.chdir(tmp_path)
    status, line = refused(capsys, ["compare", *argv])
    assert status == 2
    assert named in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [[], ["comparison"], ["--json"]])
def test_a_missing_or_unknown_command_is_refused(capsys, argv):
    status, line = refused(capsys, argv)
    assert status == 2
    assert "fastopt --help" in line


@pytest.mark.parametrize("below", ["", "folder"])
def test_an_output_folder_that_cannot_be_is_refused(tmp_path, capsys, below):
    occupied = tmp_path / "occupied"
    occupied.write_text("a file")
    status, line = refused(capsys, ["compare", "--out", str(occupied / below)])
    assert status == 2
    assert "cannot write to" in line
    assert "occupied" in line
    assert list(tmp_path.iterdir()) == [occupied]
    assert occupied.read_text() == "a file"


def test_an_output_folder_without_permission_is_refused(monkeypatch, tmp_path, capsys):
    def denied(*args, **kwargs):  # for the tests may run as root, who may write anywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    status, line = refused(capsys, ["compare", "--out", str(tmp_path)])
    assert status == 2
    assert "Permission denied" in line


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_keeps_the_old_file(monkeypatch, tmp_path, capsys, name):
    old = tmp_path / name
    old.write_text("old")
    write_bytes = Path.write_bytes

    def full(path, content):
        if path.name.startswith(name):
            write_bytes(path, content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    argv = ["compare", "--epochs", "1", "--lr", "0.01", "--out", str(tmp_path)]
    status, line = refused(capsys, argv)
    assert status == 1
    assert os.strerror(errno.ENOSPC) in line
    assert old.read_text() == "old"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("module", ["sklearn", "threadpoolctl", "rich", "matplotlib"])
def test_a_missing_extra_is_named_with_its_remedy(tmp_path, module):
    code = f"""
import sys
sys.modules[{module!r}] = None
from fastopt.__main__ import main
sys.exit(main(["compare"]))
"""
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fastopt: error: {module} is missing")
    assert "pip install 'fastopt[compare]'" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_output_without_unicode_gets_what_it_can_show(tmp_path):
    argv = ["-m", "fastopt", "compare", "--epochs", "1", "--seeds", "2", "--lr", "0.01"]
    done = python(*argv, cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert "Best test accuracy" in done.stdout


@pytest.mark.slow
def test_forced_colours_are_no_terminal(tmp_path):
    argv = ["-m", "fastopt", "compare", "--epochs", "2", "--seeds", "1", "--lr", "0.01"]
    done = python(*argv, cwd=tmp_path, env={"FORCE_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Epoch [2/2], Loss: ") == 5
    assert "\x1b[2K" not in done.stdout


# ---- on a terminal -------------------------------------------------------------------------------


# Makes its standard input the terminal whose Ctrl-C it gets, then becomes the command. A shell in
# the background may have left that signal ignored.
LAUNCHER = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "fastopt", "compare", *sys.argv[1:]])
"""


def has_bar(line):
    return "\u2501" in line


def on_a_terminal(cwd, *argv, ctrl_c_at=None, columns=90):
    """Run the command on a pseudo-terminal.

    Returns
    -------
    The status, the output, the screen that was left, and the last one before with as many bars as
    there ever were: what is read may end amid a drawing.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = environment() | {"TERM": "xterm-256color"}
    env.pop("COLUMNS", None)
    command = [sys.executable, "-c", LAUNCHER, *argv]
    process = subprocess.Popen(command, cwd=cwd, env=env, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    screen = pyte.Screen(columns, 40)
    stream, output, bars = pyte.ByteStream(screen), b"", []
    with process, open(master, "r+b", buffering=0) as terminal:
        while True:
            assert select.select([terminal], [], [], 120)[0], "it hangs"
            try:
                chunk = terminal.read(65536)
            except OSError:  # the other end is closed
                break
            output += chunk
            stream.feed(chunk)
            lines = [line.rstrip() for line in screen.display]
            if sum(map(has_bar, lines)) >= max(1, sum(map(has_bar, bars))):
                bars = lines
            if ctrl_c_at is not None and re.search(ctrl_c_at, "\n".join(lines)):
                terminal.write(b"\x03")
                ctrl_c_at = None
    assert not screen.cursor.hidden
    return process.returncode, output.decode(), lines, bars


@pytest.mark.slow
def test_on_a_terminal_bars_are_drawn_and_leave_no_debris(tmp_path):
    status, output, lines, bars = on_a_terminal(
        tmp_path, "--epochs", "5", "--seeds", "2", columns=110
    )
    assert status == 0
    assert [line.split()[0] for line in bars if has_bar(line)] == list(DEFAULT)
    assert "try lr 0.003, seed 1" in output
    assert re.search(r"Epoch \[\d/5\], Loss: \d\.\d{4}", output)
    # What is left: three lines on what is done, the table, and two lines on what came out.
    assert lines[0].startswith("Handwritten digits: 10 classes of 'digit'")
    assert lines[2].endswith("2 seeds")
    headings = next(i for i, line in enumerate(lines) if "algorithm" in line)
    assert headings <= 7
    assert all(re.fullmatch(r"[\w. ]*", line) for line in lines[3:headings])
    assert set(lines[headings + 1].strip()) == {"\u2500"}
    assert list(table("\n".join(lines))) == list(DEFAULT)
    end = headings + 2 + len(DEFAULT)
    assert lines[end] == ""
    assert lines[end + 1].startswith("Best test accuracy")
    written = next(i for i, line in enumerate(lines) if line.startswith("Written: "))
    assert written <= end + 3
    assert "".join(lines[written + 2 :]) == ""


@pytest.mark.slow
def test_on_a_narrow_terminal_a_bar_is_a_line_and_there_is_no_debris_either(tmp_path):
    argv = ["--epochs", "3", "--seeds", "1", "--lr", "0.01"]
    status, _, lines, bars = on_a_terminal(tmp_path, *argv, columns=44)
    assert status == 0
    first = next(i for i, line in enumerate(bars) if line.startswith("sgd"))
    drawn = bars[first : first + 5]
    assert [line.split()[0] for line in drawn] == list(DEFAULT)
    assert all(map(has_bar, drawn))
    assert not any(has_bar(line) or "seed 0" in line for line in lines)


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_keeps_the_finished_runs(tmp_path):
    argv = ["--optimizers", "sgd,adam", "--lr", "0.01", "--seeds", "1", "--epochs", "300"]
    status, output, lines, bars = on_a_terminal(tmp_path, *argv, ctrl_c_at=r"(?m)^adam .*Epoch")
    assert status == 130
    assert "Interrupted: the results are of 1 of 2 runs." in lines
    assert bars
    assert not any(map(has_bar, lines))
    assert "Traceback" not in output
    assert list(table("\n".join(lines))) == ["sgd"]
    results = strict_json(tmp_path / "fastopt-comparison" / "results.json")
    assert [r["algorithm"] for r in results["runs"]] == ["sgd"]
    assert len(results["runs"][0]["epochs"]) == 301


# ---- the other commands ------------------------------------------------------------------------


def test_info_needs_no_extra():
    code = """
import sys
for extra in ("sklearn", "threadpoolctl", "rich", "matplotlib"):
    sys.modules[extra] = None
from fastopt.__main__ import main
sys.exit(main(["info", "--json"]))
"""
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["version"] == fastopt.__version__


def test_info_json_is_build_info(capsys):
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == fastopt.build_info()


def test_info_has_one_line_an_entry(capsys):
    assert main(["info"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    info = fastopt.build_info()
    isa, threading = info.pop("isa"), info.pop("threading")
    assert list(lines) == [
        "version",
        "compiler",
        "isa compiled",
        "isa supported",
        "isa active",
        "threading available",
        "threading active",
        "openmp",
        "threads",
        "borrowed_threads",
    ]
    assert lines["version"].strip() == info["version"]
    assert lines["isa compiled"].split() == isa["compiled"]
    assert lines["isa supported"].split() == isa["supported"]
    assert lines["isa active"].strip() == isa["active"]
    assert lines["threading available"].split() == threading["available"]
    assert lines["threading active"].strip() == threading["active"]
    assert lines["openmp"].strip() == ("yes" if info["openmp"] else "no")
    assert int(lines["threads"]) == info["threads"]


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"fastopt {fastopt.__version__}\n"


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_traceback(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(fastopt.__file__).parents[1])}
    argv = [sys.executable, "-m", "fastopt", "compare", "--epochs", "1", "--seeds", "1"]
    with subprocess.Popen(
        argv, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        stderr = process.stderr.read()
    assert process.returncode == 1
    assert b"BrokenPipeError" not in stderr


def test_every_algorithm_has_its_own_look():
    assert list(ALGORITHMS) == list(figure.STYLES)
    for key in ("color", "marker", "linestyle"):
        assert len({style[key] for style in figure.STYLES.values()}) == len(ALGORITHMS)


@pytest.mark.parametrize("sizes", [(5, 7, 6, 3), (5, 3)])
@pytest.mark.parametrize("loss", [cross_entropy, squared_error])
def test_model_gradients_are_the_slopes_of_its_loss(sizes, loss):
    rng = np.random.default_rng(0)
    model = MLP(sizes, loss, rng, np.float64)
    for p in model.params:
        p += 0.1 * rng.standard_normal(p.shape)
    x = rng.standard_normal((4, 5))
    y = np.array([0, 2, 1, 2]) if loss is cross_entropy else rng.standard_normal((4, 3))
    _, grads = model.loss_and_grads(x, y)
    assert [g.shape for g in grads] == [p.shape for p in model.params]
    h, checked = 1e-6, 0
    for param, grad in zip(model.params, grads, strict=True):
        for index in np.ndindex(param.shape):
            value = param[index]
            param[index] = value + h
            above = model.loss_and_grads(x, y)[0]
            param[index] = value - h
            below = model.loss_and_grads(x, y)[0]
            param[index] = value
            assert (above - below) / (2 * h) == pytest.approx(grad[index], abs=1e-8)
            checked += 1
    assert checked == sum(p.size for p in model.params) >= 18


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_model_stays_in_its_type(dtype):
    for loss, y in ((cross_entropy, np.array([0, 1])), (squared_error, np.ones((2, 2), dtype))):
        model = MLP((3, 4, 2), loss, np.random.default_rng(0), dtype)
        _, grads = model.loss_and_grads(np.ones((2, 3), dtype), y)
        assert {a.dtype for a in (*grads, *model.params)} == {np.dtype(dtype)}


def test_model_survives_logits_that_overflow_exp():
    model = MLP((2, 3), cross_entropy, np.random.default_rng(0))
    model.params[0][:] = np.float32(1e6) * np.array([[1, 0, -1], [0, 1, -1]], np.float32)
    loss, grads = model.loss_and_grads(np.eye(2, dtype=np.float32), np.array([0, 1]))
    assert loss == 0
    assert all((g == 0).all() for g in grads)
