"""``fastopt compare --param-dtype`` and ``--state-dtype``: training with what is in fewer bits."""

import sys

import ml_dtypes
import numpy as np
import pytest
from support import refused, strict_json

import fastopt
from fastopt.__main__ import main
from fastopt.compare import data, figure, progress, run, summary
from fastopt.compare.model import MLP, cross_entropy

SHORT = ["--lr", "0.01", "--epochs", "2", "--seeds", "1"]
SIZES = [64 * 64, 64, 64 * 32, 32, 32 * 10, 10]  # weights and biases of the network of the digits
BLOCKS = sum(-(-size // 64) for size in SIZES)
PARAMS = ("float32", "bfloat16", "float16")
STATES = ("float32", "bfloat16", "8bit")


@pytest.fixture(scope="module")
def digits():
    return data.digits(0, "float32")


@pytest.fixture
def results_of(tmp_path):
    def results_of(*argv):
        assert main(["compare", *SHORT, *argv, "--out", str(tmp_path)]) == 0
        return strict_json(tmp_path / "results.json")

    return results_of


def without_times(a_run):
    times = ("step_us_median", "optimizer_us_median")
    epochs = [{k: v for k, v in e.items() if k != "seconds"} for e in a_run["epochs"]]
    return {**{k: v for k, v in a_run.items() if k not in times}, "epochs": epochs}


def test_each_storage_has_a_row_and_tells_its_bytes(results_of, capsys):
    argv = ("--optimizers", "sgd,adam", "--param-dtype", ",".join(PARAMS))
    results = results_of(*argv, "--state-dtype", ",".join(STATES))
    rows = {row["algorithm"]: row for row in results["summary"]["rows"]}
    slots = {"f32": 4.0, "bf16": 2.0, "8bit": 1 + BLOCKS / sum(SIZES)}
    beside = {"f32": 0, "bf16": 2, "f16": 4}  # of the master
    steps = 8 * len(SIZES) / sum(SIZES)
    expected = {"sgd": steps, "sgd (bf16/f32)": 2 + steps, "sgd (f16/f32)": 4 + steps}
    expected["adam"] = 8 + steps
    for param, master in beside.items():
        for state, each in slots.items():
            expected[f"adam ({param}/{state})"] = 2 * each + master + steps
    del expected["adam (f32/f32)"]
    assert list(rows) == list(expected)
    for name, row in rows.items():
        assert row["state_bytes"] == pytest.approx(expected[name])
        (mine,) = [r for r in results["runs"] if r["algorithm"] == name]
        assert mine["state_bytes"] == row["state_bytes"]
        assert row["training_loss"] < mine["epochs"][0]["training_loss"]
        assert row["lr"] == 0.01
    assert {r["param_dtype"] for r in results["runs"]} == {*PARAMS}
    assert results["settings"]["param_dtypes"] == list(PARAMS)
    assert results["settings"]["state_dtypes"] == list(STATES)
    options = {r["algorithm"]: r["hyperparameters"] for r in results["runs"]}
    assert options["adam"] == {"lr": 0.01}
    assert options["adam (f32/8bit)"] == {"lr": 0.01, "state_dtype": "8bit"}
    assert options["adam (bf16/8bit)"] == {
        "lr": 0.01,
        "state_dtype": "8bit",
        "master_weights": True,
    }

    out = capsys.readouterr().out
    assert "stored in, with master weights; the learning rate is that" in out
    for name, row in rows.items():
        line = next(line for line in out.splitlines() if line.strip().startswith(f"{name}   "))
        assert line.split()[-1] == f"{row['state_bytes']:.2f}"


@pytest.mark.parametrize("master", [True, False])
def test_the_network_computes_in_float32_with_what_the_parameters_hold(results_of, digits, master):
    flag = "--master-weights" if master else "--no-master-weights"
    argv = ("--optimizers", "adam", "--param-dtype", "bfloat16", "--state-dtype", "8bit", flag)
    run_of_it = results_of(*argv)["runs"][1]
    model = MLP((64, 64, 32, 10), cross_entropy, np.random.default_rng([0, 0]))
    params = [param.astype(ml_dtypes.bfloat16) for param in model.params]
    opt = fastopt.Adam(params, lr=0.01, state_dtype="8bit", master_weights=master)
    rng = np.random.default_rng([0, 1])

    def loss_and_grads(x, y):
        model.params = [param.astype(np.float32) for param in params]
        return model.loss_and_grads(x, y)

    losses = [loss_and_grads(digits.train.x, digits.train.y)[0]]
    for _ in range(2):
        order = rng.permutation(len(digits.train.x))
        for first in range(0, len(order), 64):
            batch = order[first : first + 64]
            opt.step(loss_and_grads(digits.train.x[batch], digits.train.y[batch])[1])
        losses.append(loss_and_grads(digits.train.x, digits.train.y)[0])
    # a product over all rows may be summed in another order than in the command
    assert [e["training_loss"] for e in run_of_it["epochs"]] == pytest.approx(losses, rel=1e-6)
    assert run_of_it["hyperparameters"]["master_weights"] is master
    assert run_of_it["state_bytes"] == pytest.approx(sum(opt.nbytes.values()) / sum(SIZES))


def test_the_run_in_float32_is_what_it_is_without_the_options(results_of):
    plain = results_of("--optimizers", "adam")["runs"]
    stored = results_of("--optimizers", "adam", "--state-dtype", "bfloat16")["runs"]
    assert [r["algorithm"] for r in stored] == ["adam", "adam (f32/bf16)"]
    assert without_times(stored[0]) == without_times(plain[0])
    losses = [[e["training_loss"] for e in r["epochs"]] for r in stored]
    assert losses[0][0] == losses[1][0]
    assert losses[0][-1] != losses[1][-1]


def test_the_learning_rate_is_that_of_float32(digits):
    settings = run.Settings(
        optimizers=("momentum", "adam"), epochs=1, seeds=1, state_dtypes=("8bit",)
    )
    comparison = run.Comparison(digits, settings)
    comparison.go(progress.Progress())
    assert {trial.algorithm for trial in comparison.trials} == {"momentum", "adam"}
    rates = {r.algorithm: r.hyperparameters["lr"] for r in comparison.runs}
    assert rates["momentum"] == rates["momentum (f32/8bit)"]
    assert rates["adam"] == rates["adam (f32/8bit)"]
    assert len(comparison.runs) == comparison.planned
    assert comparison.trainings == {
        "momentum": 11,
        "momentum (f32/8bit)": 1,
        "adam": 11,
        "adam (f32/8bit)": 1,
    }


def test_lines_of_storages_differ_from_all_others(digits):
    settings = run.Settings(optimizers=("nesterov",), param_dtypes=PARAMS[:2], state_dtypes=STATES)
    styles = figure._styles(run.Comparison(digits, settings))
    assert styles["nesterov"] == figure.STYLES["nesterov"]
    assert len(styles) == 6
    assert len({style["color"] for style in styles.values()}) == 6


def test_without_storages_the_table_says_nothing_of_them(digits):
    comparison = run.Comparison(digits, run.Settings(param_dtypes=("float32",)))
    headings = summary.headings(comparison, summary.Summary(0.5, []))
    assert headings[-1] == "share of training time"
    assert len(summary.description(comparison)) == 2


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--param-dtype", "int8"], "no type 'int8'; there are float32, bfloat16, float16"),
        (["--param-dtype", "8bit"], "no type '8bit'"),
        (["--state-dtype", "float16"], "no type 'float16'; there are float32, bfloat16, 8bit"),
        (["--state-dtype", "8bit,8bit"], "each name once, not '8bit,8bit'"),
        (
            ["--state-dtype", "8bit", "--dtype", "float64"],
            "--state-dtype goes with --dtype float32, not float64",
        ),
        (
            ["--param-dtype", "bfloat16", "--dtype", "float64"],
            "--param-dtype goes with --dtype float32, not float64",
        ),
        (["--state-dtype", "8bit", "--optimizers", "sgd"], "--state-dtype: sgd has no state"),
        (
            ["--no-master-weights", "--state-dtype", "8bit"],
            "--no-master-weights goes with --param-dtype bfloat16 or float16",
        ),
        (
            ["--master-weights", "--param-dtype", "float32"],
            "--master-weights goes with --param-dtype bfloat16 or float16",
        ),
    ],
)
def test_what_cannot_be_is_refused(monkeypatch, tmp_path, capsys, argv, named):
    monkeypatch.chdir(tmp_path)
    status, line = refused(capsys, ["compare", *argv])
    assert status == 2
    assert named in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--param-dtype", "--state-dtype"])
def test_missing_ml_dtypes_is_named_with_its_remedy(monkeypatch, tmp_path, capsys, option):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert main(["compare", option, "bfloat16"]) == 2
    needs = "bfloat16 needs the package ml_dtypes: pip install 'fastopt[bfloat16]'"
    assert f"{option} {needs}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
