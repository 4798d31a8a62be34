"""The benchmark: what it times is right, and its command says what it found."""

import sys

import numpy as np
import pytest
from support import strict_json

import fastopt
from fastopt import _core
from fastopt.__main__ import main
from fastopt.bench import check, measure, peers, run
from fastopt.bench.peers import base
from fastopt.bench.peers import fastopt as fastopt_peer
from fastopt.bench.peers import numpy as numpy_peer
from fastopt.bench.workloads import DTYPES, RULES, WORKLOADS

STEPS = [name for name, rule in RULES.items() if rule.clip_norm is None]
WIDEST = base.Tolerance(4, 2e-5)  # of any candidate in float32


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Little to time, beside NumPy and a PyTorch that is not installed."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(measure, "SETTLE_S", 0.0)
    monkeypatch.setattr(measure, "ROW_S", 1e-4)
    monkeypatch.setattr(run, "SHORT", ("1e3", "1e4", "mlp"))
    monkeypatch.setattr(run, "SHORT_S", 0.0)
    monkeypatch.setattr(peers, "NAMES", ("fastopt", "torch", "numpy"))
    monkeypatch.delitem(sys.modules, "fastopt.bench.peers.torch", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    check.check_formula.cache_clear()
    yield
    check.check_formula.cache_clear()


def case(workload="1e3", rule="adam", dtype="float32", threads=1):
    return run.Case(WORKLOADS[workload], RULES[rule], dtype, threads)


# ---- what is timed -------------------------------------------------------------------------------


def test_workloads_are_the_models_they_are_named_after():
    counts = {name: (len(w.shapes), w.elements) for name, w in WORKLOADS.items()}
    assert counts["1e3"] == (1, 1000)
    assert counts["5e7"] == (1, 5 * 10**7)
    assert counts["mlp"] == (6, 109386)
    assert counts["many"] == (300, 352800)
    assert counts["gpt2"] == (148, 124439808)  # as its authors count


@pytest.mark.parametrize(
    ("rule", "arrays"),
    [("sgd", 3), ("momentum", 5), ("adagrad", 5), ("rmsprop", 5), ("adam", 7), ("clip-adam", 9)],
)
def test_bytes_moved_count_reads_and_writes(rule, arrays):
    assert RULES[rule].bytes_moved(10, "float32") == 40 * arrays
    assert RULES[rule].bytes_moved(10, "float64") == 80 * arrays


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["fastopt", "numpy"])
def test_candidates_equal_the_reference(name, dtype):
    checked = 0
    for rule in RULES.values():
        if peers.find(name).refusal(rule, dtype, 2) is None:
            check.check_formula(name, rule.name, dtype, 2)
            checked += 1
    assert checked == {"fastopt": 13, "numpy": 6}[name]


@pytest.mark.parametrize(
    ("rule", "constant", "value"),
    [
        ("sgd", "LR", 2.0**-10 * (1 + 1e-4)),
        ("momentum", "MOMENTUM", 0.8751),
        ("adagrad", "EPS", 2.0**-26),
        ("rmsprop", "EPS", 2.0**-26),
        ("rmsprop", "ALPHA", 1 - 2.0**-7 * (1 + 1e-3)),
        ("adam", "EPS", 2.0**-26),
        ("adam", "BETAS", (0.876, 1 - 2.0**-10)),
        ("adamw", "DECAY", 2.0**-7 * 1.1),
    ],
)
def test_a_formula_that_is_slightly_off_is_caught_at_the_widest_tolerance(
    monkeypatch, rule, constant, value
):
    monkeypatch.setattr(numpy_peer.Peer, "tolerance", {"float32": WIDEST})
    check.check_formula("numpy", rule, "float32", 1)
    check.check_formula.cache_clear()
    monkeypatch.setattr(numpy_peer, constant, value)
    with pytest.raises(check.WrongResultError, match=f"numpy \\({rule}, float32\\) is wrong"):
        check.check_formula("numpy", rule, "float32", 1)


@pytest.mark.parametrize("rule", ["adagrad", "rmsprop", "adam"])
def test_eps_where_keras_has_it_is_caught_at_the_widest_tolerance(monkeypatch, rule):
    monkeypatch.setattr(numpy_peer.Peer, "tolerance", {"float32": WIDEST})
    monkeypatch.setattr(numpy_peer.Peer, "keras_rules", (rule,))
    with pytest.raises(check.WrongResultError, match="is wrong"):
        check.check_formula("numpy", rule, "float32", 1)


def test_a_nan_is_no_agreement():
    one = [np.ones(3, np.float32)]
    with pytest.raises(check.WrongResultError, match="element 1"):
        check.agree("peer", [np.array([1, np.nan, 1], np.float32)], one, one, WIDEST)


def test_a_candidate_that_is_wrong_on_the_workload_alone_is_caught(monkeypatch):
    def step(self, right=numpy_peer.Peer.step):
        right(self)
        if self._params[0].size == 1000:
            self._params[0][-1] += 1e-3

    monkeypatch.setattr(numpy_peer.Peer, "step", step)
    taking_part, _ = run.entries(case(), ["numpy"], [1])
    with pytest.raises(check.WrongResultError, match=r"numpy \(adam, float32, 1e3\).*element 999"):
        next(run.batches(case(), taking_part))


# ---- how -----------------------------------------------------------------------------------------


class Counter:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def begin(self):
        self.log.append(self.name)

    def step(self):
        pass


def test_each_round_gives_everyone_a_turn_and_begins_with_another():
    log = []
    interleaved = measure.Interleaved({name: Counter(name, log) for name in "abc"})
    log.clear()
    for _ in range(3):
        interleaved.round()
    interleaved.round(without="a")
    assert "".join(log) == "abcbcacabbc"
    assert interleaved.timing("a").turns == 3
    timing = interleaved.timing("b")
    assert timing.turns == 4
    assert 0 < timing.quartiles[0] <= timing.median <= timing.quartiles[1] < 1e-3


def test_fewer_candidates_at_a_time_where_memory_is_short(monkeypatch):
    names = ["numpy", "numpy", "numpy"]
    monkeypatch.setattr(run, "_room", lambda case: 2)
    result = run.time_case(case(), names, [1], 0.0)
    assert [row.name for row in result.rows] == ["fastopt", "limit", *names]
    monkeypatch.setattr(run, "_room", lambda case: 1)
    with pytest.raises(MemoryError, match="1e3 in float32 needs more memory"):
        run.time_case(case(), names, [1], 0.0)


def test_the_limit_is_the_fastest_loop_with_up_to_as_many_threads():
    result = run.time_case(case(threads=3), [], [1, 3], 0.0)
    limits = [row for row in result.rows if row.name == run.LIMIT]
    assert [row.threads for row in limits] == [1, 2, 3]
    fastest = min(row.us for row in limits)
    for row in result.rows:
        assert row.to_limit == pytest.approx(row.us / fastest)
        assert row.to_fastopt == pytest.approx(row.us / result.rows[0].us)
        assert row.GB_per_s == pytest.approx(28_000 / row.us / 1e3)


@pytest.mark.parametrize("rule", RULES)
def test_the_limit_moves_the_bytes_of_a_step_and_leaves_the_arrays_as_they_are(monkeypatch, rule):
    rule, workload, moved = RULES[rule], WORKLOADS["mlp"], []

    class Limit(_core.Limit):
        def __init__(self, updated, read, threads):
            moved.extend([array] * 2 for arrays in updated for array in arrays)
            moved.append(read)

    monkeypatch.setattr(_core, "Limit", Limit)
    params, grads = workload.arrays("float32")
    peer = fastopt_peer.Peer(rule, params, grads, 1)
    run.checked_steps(peer)
    arrays = [*params, *peer._grads, *(a for state in peer.opt.state for a in state.values())]
    before = [array.copy() for array in arrays]
    limit = peer.limit(1)
    assert sum(a.nbytes for row in moved for a in row) == rule.bytes_moved(
        workload.elements, "float32"
    )
    limit.run()
    for array, was in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, was)


def test_candidates_that_cannot_take_part_are_named_with_why(monkeypatch):
    monkeypatch.setattr(numpy_peer.Peer, "threading", "own")
    taking_part, absent = run.entries(case(threads=1000), ["torch", "numpy"], [1000])
    assert {entry.name for entry in taking_part} == {"fastopt", "limit"}
    assert absent == [
        run.Absent("torch", "torch is not installed"),
        run.Absent("numpy", "chooses its threads itself, once a process"),
    ]
    _, (absent,) = run.entries(case(rule="clip-adam"), ["numpy"], [1])
    assert absent.why == "has no clip-adam to time here"


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_prints_tables_and_writes_results_and_a_picture(tmp_path, capsys):
    out = tmp_path / "made" / "here"
    assert main(["bench", "--threads", "2", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    tables = [i for i, row in enumerate(rows) if row == ["1e3", "1e4", "mlp"]]
    assert len(tables) == 2
    for i in tables:
        assert [row[0] for row in rows[i + 2 : i + 5]] == ["limit", "fastopt", "numpy"]
        assert all(float(cell) > 0 for row in rows[i + 2 : i + 5] for cell in row[1:])
    assert rows[tables[1] + 2][1:] == ["1.00"] * 3
    assert "Missing: torch: torch is not installed" in lines

    content = strict_json(out / "results.json")
    assert content["versions"]["fastopt"] == fastopt.__version__
    assert content["build_info"] == fastopt.build_info()
    assert [result["workload"] for result in content["results"]] == ["1e3", "1e4", "mlp"]
    for result in content["results"]:
        assert (result["rule"], result["dtype"], result["threads"]) == ("adam", "float32", 2)
        who = [(row["name"], row["threads"]) for row in result["rows"]]
        assert who == [("fastopt", 2), ("limit", 1), ("limit", 2), ("numpy", 1)]
        assert result["absent"] == [{"name": "torch", "why": "torch is not installed"}]
    assert (out / "performance.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(path.name for path in out.iterdir()) == ["performance.png", "results.json"]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_be_timed(monkeypatch, tmp_path, rule):
    monkeypatch.setattr(run, "SHORT", ("1e3", "mlp"))
    argv = ["bench", "--rule", rule, "--dtype", "float64", "--out", str(tmp_path)]
    assert main(argv) == 0
    for result in strict_json(tmp_path / "results.json")["results"]:
        assert (result["rule"], result["dtype"]) == (rule, "float64")


def test_a_wrong_peer_ends_the_command_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(numpy_peer, "LR", 2.0**-11)
    assert main(["bench", "--out", str(tmp_path)]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("fastopt: error: numpy (adam, float32) is wrong: array 0, element")
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_interrupt_keeps_the_finished_workloads(monkeypatch, tmp_path, capsys):
    def interrupted(case, *args, right=run.time_case):
        if case.workload.name == "mlp":
            raise KeyboardInterrupt
        return right(case, *args)

    monkeypatch.setattr(run, "time_case", interrupted)
    assert main(["bench", "--out", str(tmp_path)]) == 130
    stderr = capsys.readouterr().err
    assert stderr.strip() == "Interrupted: the results are of 2 of 3 workloads."
    results = strict_json(tmp_path / "results.json")["results"]
    assert [result["workload"] for result in results] == ["1e3", "1e4"]
    assert (tmp_path / "performance.png").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--rule", "adagrda"], "adadelta"),
        (["--dtype", "float16"], "float16"),
        (["--threads", "0"], "--threads"),
        (["--threads", "two"], "'two'"),
        (["adam"], "adam"),
    ],
)
def test_bad_options_are_refused(monkeypatch, tmp_path, capsys, argv, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *argv])
    assert exit_.value.code == 2
    stderr = capsys.readouterr().err
    assert named in stderr
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_is_refused(tmp_path, capsys):
    (tmp_path / "occupied").write_text("a file")
    assert main(["bench", "--out", str(tmp_path / "occupied" / "folder")]) == 2
    assert "occupied" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["rich", "matplotlib"])
def test_a_missing_extra_is_named_with_its_remedy(monkeypatch, tmp_path, capsys, module):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "fastopt.bench.report", raising=False)
    monkeypatch.delattr(fastopt.bench, "report", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["bench"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"fastopt: error: {module} is missing")
    assert "pip install 'fastopt[bench]'" in stderr
    assert list(tmp_path.iterdir()) == []
