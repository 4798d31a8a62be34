"""The command line, ``fastopt info`` and ``fastopt compare``, and the network that is compared on.

Extras are hidden from a fresh interpreter, not from this one: no test sees another's imports.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastopt
from fastopt.__main__ import main
from fastopt.compare import report, run
from fastopt.compare.model import MLP

ALGORITHMS = ["sgd", "momentum", "adagrad", "rmsprop", "adam"]
TIMES = {"training_s", "optimizer_us_median", "optimizer_share"}


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture(scope="module")
def five_epochs(tmp_path_factory):
    """Output folder and standard output of one comparison; tests only read them."""
    out, stdout = tmp_path_factory.mktemp("five") / "made" / "here", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setenv("COLUMNS", "80")
        patch.delenv("FORCE_COLOR", raising=False)
        assert main(["compare", "--epochs", "5", "--out", str(out)]) == 0
    return out, stdout.getvalue()


def python(*args, **options):
    """Run a fresh interpreter on the same fastopt."""
    env = {**os.environ, "PYTHONPATH": str(Path(fastopt.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *args], env=env, capture_output=True, text=True, timeout=120, **options
    )


def strict_json(path):
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def without_times(runs):
    return [{key: value for key, value in run.items() if key not in TIMES} for run in runs]


def table(stdout):
    """Return the cells of the rows below the headings, by algorithm."""
    rows = [line.split() for line in stdout.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) == 6 and row[0] in ALGORITHMS}


def refused(capsys, argv):
    """Run a command that must fail; return its status and its one line on standard error."""
    try:
        status = main(argv)
    except SystemExit as exit_:
        status = exit_.code
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1, stderr
    return status, stderr


def test_prints_a_heading_and_every_epoch_of_every_algorithm(five_epochs):
    out, stdout = five_epochs
    expected = []
    for r in strict_json(out / "results.json")["runs"]:
        expected += [f"Epoch [{e['epoch']}/5], Loss: {e['loss']:.4f}" for e in r["epochs"]]
    lines = stdout.splitlines()
    assert [line for line in lines if line.startswith("Epoch")] == expected
    assert len(expected) == 25
    before_first = [lines[i - 1] for i, line in enumerate(lines) if line.startswith("Epoch [1/5]")]
    assert [heading.split()[0] for heading in before_first] == ALGORITHMS


def test_table_has_five_rows_that_agree_with_the_results(five_epochs):
    out, stdout = five_epochs
    rows = table(stdout)
    assert list(rows) == ALGORITHMS
    for r in strict_json(out / "results.json")["runs"]:
        lr, loss, accuracy, us, share = rows[r["algorithm"]]
        assert float(lr) == r["hyperparameters"]["lr"]
        assert loss == f"{r['epochs'][-1]['loss']:.4f}"
        assert accuracy == f"{r['epochs'][-1]['test_accuracy']:.2%}"
        assert us == f"{r['optimizer_us_median']:.1f}"
        assert share == f"{r['optimizer_share']:.1%}"
        assert 0 < r["optimizer_us_median"] < 1e6 * r["training_s"]
        assert 0 < r["optimizer_share"] < 1


def test_results_say_what_was_run(five_epochs):
    results = strict_json(five_epochs[0] / "results.json")
    assert results["settings"] == {
        "epochs": 5,
        "batch_size": 64,
        "seed": 0,
        "threads": None,
        "layers": [64, 128, 64, 10],
        "dtype": "float32",
    }
    assert results["versions"]["fastopt"] == fastopt.__version__
    assert results["versions"]["numpy"] == np.__version__
    assert results["build_info"] == fastopt.build_info()
    for r in results["runs"]:
        assert r["steps"] == 5 * 23  # 1437 samples, 64 a batch
        assert [e["epoch"] for e in r["epochs"]] == [1, 2, 3, 4, 5]


def test_every_algorithm_learns(five_epochs):
    runs = strict_json(five_epochs[0] / "results.json")["runs"]
    for r in runs:
        losses = [e["loss"] for e in r["epochs"]]
        assert losses == sorted(losses, reverse=True), r["algorithm"]
        assert losses[-1] < 0.5, r["algorithm"]
        assert r["epochs"][-1]["test_accuracy"] > 0.85, r["algorithm"]
    assert len({tuple(e["loss"] for e in r["epochs"]) for r in runs}) == 5


def test_figure_is_a_png_of_the_published_size(five_epochs):
    content = (five_epochs[0] / "comparison.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(content[16:20], "big") == 1500
    assert int.from_bytes(content[20:24], "big") == 630
    assert sorted(path.name for path in five_epochs[0].iterdir()) == [
        "comparison.png",
        "results.json",
    ]


def test_same_seed_same_bits_for_any_threads(five_epochs, tmp_path):
    first = strict_json(five_epochs[0] / "results.json")
    argv = ["compare", "--epochs", "5", "--threads", "1", "--out", str(tmp_path)]
    assert main(argv) == 0
    again = strict_json(tmp_path / "results.json")
    assert without_times(again["runs"]) == without_times(first["runs"])
    assert again["settings"] == {**first["settings"], "threads": 1}
    assert again["versions"] == first["versions"]


def test_another_seed_gives_other_numbers(five_epochs, tmp_path):
    first = strict_json(five_epochs[0] / "results.json")
    assert main(["compare", "--epochs", "1", "--seed", "1", "--out", str(tmp_path)]) == 0
    other = strict_json(tmp_path / "results.json")
    for a, b in zip(first["runs"], other["runs"], strict=True):
        assert a["epochs"][0]["loss"] != b["epochs"][0]["loss"]


def test_python_m_fastopt_is_the_same_command(five_epochs, tmp_path):
    done = python("-m", "fastopt", "compare", "--epochs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(table(done.stdout)) == ALGORITHMS
    two = strict_json(tmp_path / "fastopt-comparison" / "results.json")["runs"]
    five = strict_json(five_epochs[0] / "results.json")["runs"]
    assert [r["epochs"] for r in two] == [r["epochs"][:2] for r in five]


def test_a_batch_larger_than_the_data_is_the_whole_of_it(tmp_path):
    argv = ["compare", "--epochs", "1", "--batch-size", "100000", "--out", str(tmp_path)]
    assert main(argv) == 0
    assert {r["steps"] for r in strict_json(tmp_path / "results.json")["runs"]} == {1}


@pytest.mark.parametrize("diverging", [["sgd"], ALGORITHMS])
def test_a_diverging_run_stops_and_says_so(monkeypatch, tmp_path, capsys, diverging):
    for algorithm in diverging:
        optimizer, options = run.ALGORITHMS[algorithm]
        monkeypatch.setitem(run.ALGORITHMS, algorithm, (optimizer, {**options, "lr": 1e30}))
    assert main(["compare", "--epochs", "3", "--out", str(tmp_path)]) == 0
    rows = table(capsys.readouterr().out)
    runs = {r["algorithm"]: r for r in strict_json(tmp_path / "results.json")["runs"]}
    assert list(rows) == list(runs) == ALGORITHMS
    for algorithm, r in runs.items():
        diverged = algorithm in diverging
        assert r["diverged"] is diverged
        assert (r["epochs"][-1]["loss"] is None) is diverged
        assert len(r["epochs"]) == (1 if diverged else 3)
        assert (rows[algorithm][1] == "diverged") is diverged
    assert (tmp_path / "comparison.png").stat().st_size > 0


def test_interrupt_keeps_the_finished_runs(monkeypatch, tmp_path, capsys):
    train = run.train

    def interrupted(algorithm, *args):
        if algorithm == "adagrad":
            raise KeyboardInterrupt
        return train(algorithm, *args)

    monkeypatch.setattr(run, "train", interrupted)
    assert main(["compare", "--epochs", "1", "--out", str(tmp_path)]) == 130
    captured = capsys.readouterr()
    assert list(table(captured.out)) == ["sgd", "momentum"]
    assert captured.err.strip() == "Interrupted: the results are of 2 of 5 runs."
    runs = strict_json(tmp_path / "results.json")["runs"]
    assert [r["algorithm"] for r in runs] == ["sgd", "momentum"]
    assert (tmp_path / "comparison.png").exists()


def test_interrupt_before_the_first_run_ends_writes_nothing(monkeypatch, tmp_path, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupted)
    assert main(["compare", "--out", str(tmp_path)]) == 130
    assert "0 of 5" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


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
        (["--threads", "0"], "--threads"),
        (["--epoch", "3"], "--epoch"),
        (["--colour"], "--colour"),
        (["adam"], "adam"),
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
    assert "occupied" in line
    assert list(tmp_path.iterdir()) == [occupied]
    assert occupied.read_text() == "a file"


@pytest.mark.parametrize("name", ["results.json", "comparison.png"])
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
    status, line = refused(capsys, ["compare", "--epochs", "1", "--out", str(tmp_path)])
    assert status == 1
    assert os.strerror(errno.ENOSPC) in line
    assert old.read_text() == "old"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("module", ["sklearn", "rich", "matplotlib"])
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
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"fastopt: error: {module} is missing")
    assert "pip install 'fastopt[compare]'" in line
    assert list(tmp_path.iterdir()) == []


def test_info_needs_no_extra():
    code = """
import sys
for extra in ("sklearn", "rich", "matplotlib"):
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
    isa = info.pop("isa")
    assert list(lines) == [
        "version",
        "compiler",
        "isa compiled",
        "isa supported",
        "isa active",
        "openmp",
        "threads",
    ]
    assert lines["version"].strip() == info["version"]
    assert lines["isa compiled"].split() == isa["compiled"]
    assert lines["isa supported"].split() == isa["supported"]
    assert lines["isa active"].strip() == isa["active"]
    assert lines["openmp"].strip() == ("yes" if info["openmp"] else "no")
    assert int(lines["threads"]) == info["threads"]


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"fastopt {fastopt.__version__}\n"


def test_a_reader_that_leaves_early_is_no_traceback(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(fastopt.__file__).parents[1])}
    argv = [sys.executable, "-m", "fastopt", "compare", "--epochs", "1"]
    with subprocess.Popen(
        argv, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        stderr = process.stderr.read()
    assert process.returncode == 1
    assert b"BrokenPipeError" not in stderr


def test_every_algorithm_has_its_own_look():
    assert list(run.ALGORITHMS) == list(report.STYLES) == ALGORITHMS
    for key in ("color", "marker", "linestyle"):
        assert len({style[key] for style in report.STYLES.values()}) == 5


def test_model_gradients_are_the_slopes_of_its_loss():
    rng = np.random.default_rng(0)
    model = MLP((5, 7, 6, 3), rng)
    model.params[:] = [p.astype(np.float64) + 0.01 for p in model.params]
    x, labels = rng.standard_normal((4, 5)), np.array([0, 2, 1, 2])
    _, grads = model.loss_and_grads(x, labels)
    assert [g.shape for g in grads] == [p.shape for p in model.params]
    h, checked = 1e-6, 0
    for param, grad in zip(model.params, grads, strict=True):
        for index in np.ndindex(param.shape):
            value = param[index]
            param[index] = value + h
            above = model.loss_and_grads(x, labels)[0]
            param[index] = value - h
            below = model.loss_and_grads(x, labels)[0]
            param[index] = value
            assert (above - below) / (2 * h) == pytest.approx(grad[index], abs=1e-8)
            checked += 1
    assert checked == 35 + 7 + 42 + 6 + 18 + 3


def test_model_survives_logits_that_overflow_exp():
    model = MLP((2, 3), np.random.default_rng(0))
    model.params[0][:] = np.float32(1e6) * np.array([[1, 0, -1], [0, 1, -1]], np.float32)
    loss, grads = model.loss_and_grads(np.eye(2, dtype=np.float32), np.array([0, 1]))
    assert loss == 0
    assert all((g == 0).all() for g in grads)
