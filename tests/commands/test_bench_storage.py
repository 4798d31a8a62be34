"""``fastopt bench --storage``: bytes are counted, numbers checked, and what is wrong said."""

import sys
import types

import numpy as np
import pytest
from support import refused, strict_json

import fastopt
from fastopt.__main__ import main
from fastopt.bench import check, measure, peers, run, storage
from fastopt.bench.peers import fastopt as fastopt_peer
from fastopt.bench.workloads import RULES, STORAGES, Storage, Workload

STEPS = [name for name, rule in RULES.items() if rule.clip_norm is None]

# Bytes of a step of Adam, an element: parameter, gradient and two slots, and what is beside them.
BYTES = {
    "float32": 2 * 4 + 4 + 2 * 8,
    "bfloat16 with master": 2 * (2 + 2) + 2 + 2 * 8,
    "bfloat16, float32 state": 2 * 2 + 2 + 2 * 8,
    "bfloat16, bfloat16 state": 2 * 2 + 2 + 2 * 4,
    "float32, 8-bit state": 2 * 4 + 4 + 2 * 2 * (1 + 1 / 64),
    "bfloat16, 8-bit state": 2 * 2 + 2 + 2 * 2 * (1 + 1 / 64),
    "float16 with master": 2 * (2 + 4) + 2 + 2 * 8,
}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Little to time, beside a PyTorch that is not installed."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(measure, "ROW_S", 1e-4)
    monkeypatch.setattr(storage, "SETTLE_S", 0.0)
    monkeypatch.setattr(storage, "SECONDS", 0.0)
    monkeypatch.setattr(storage, "WORKLOADS", ("1e3", "mlp"))
    monkeypatch.setattr(check, "_PHASES", ((1.0, 100), (0.01, 100)))
    monkeypatch.setattr(peers, "STORAGE_NAMES", ("fastopt", "torch"))
    monkeypatch.delitem(sys.modules, "fastopt.bench.peers.torch", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    for function in (check.check_stored, check.travel):
        function.cache_clear()
    yield
    for function in (check.check_stored, check.travel):
        function.cache_clear()


def test_a_rule_without_state_has_no_storages_that_differ_in_it():
    found, _ = storage.entries(RULES["sgd"], 1)
    assert [entry.storage for entry in found] == [
        "float32", "bfloat16 with master", "bfloat16, float32 state", "float16 with master",
    ]  # fmt: skip
    found, _ = storage.entries(RULES["adam"], 1)
    assert [entry.storage for entry in found] == [*STORAGES]


class Nearest(fastopt_peer.Peer):
    """Loses small updates."""

    storages = ("bfloat16, bfloat16 state",)

    def __init__(self, rule, *args):
        super().__init__(types.SimpleNamespace(**vars(rule)), *args)
        self.opt = rule.optimizer(
            self._params, num_threads=1, **{**rule.options, "stochastic_rounding": False}
        )


class Restless(fastopt_peer.Peer):
    """Moves what has no gradient."""

    storages = ("float32",)

    def step(self):
        super().step()
        self._params[0][self._grads[0] == 0] += 1e-5


def join(monkeypatch, **classes):
    for name, cls in classes.items():
        module = types.SimpleNamespace(Peer=cls)
        monkeypatch.setitem(sys.modules, f"fastopt.bench.peers.{name}", module)
        monkeypatch.setitem(peers.TITLES, name, name)
        monkeypatch.setitem(storage_report().STYLES, name, {"color": "#000000", "marker": "s"})
    monkeypatch.setattr(peers, "STORAGE_NAMES", ("fastopt", *classes))
    monkeypatch.setattr(storage_report(), "STORAGE_NAMES", ("fastopt", *classes))


def storage_report():
    from fastopt.bench import storage_report

    return storage_report


# ---- what is timed -------------------------------------------------------------------------------


def test_bytes_are_those_of_the_arrays():
    result = storage.time_workload(Workload("", "", ((640,), (64, 2))), RULES["adam"], 1, 0.0)
    rows = [row for row in result.rows if row.name == "fastopt"]
    assert {row.storage: row.bytes_an_element for row in rows} == pytest.approx(BYTES)


def test_ratios_are_to_float32_and_to_as_many_bytes_at_the_rate_of_the_limit():
    result = storage.time_workload(Workload("", "", ((1000,),)), RULES["adam"], 2, 0.0)
    plain, limit, *others = result.rows
    assert (plain.name, plain.storage, plain.to_float32) == ("fastopt", "float32", 1)
    assert (limit.name, limit.bytes_an_element, limit.to_limit) == ("limit", 28, 1)
    assert len(others) == 6
    for row in result.rows:
        assert row.to_float32 == pytest.approx(row.us / plain.us)
        assert row.GB_per_s == pytest.approx(row.bytes_an_element / row.us)
        at_the_limit = row.bytes_an_element / limit.GB_per_s  # microseconds: 1000 elements
        assert row.to_limit == pytest.approx(row.us / at_the_limit)
    assert max(row.threads for row in result.rows) == 2


def test_what_memory_does_not_hold_at_once_is_timed_beside_float32_all_the_same(monkeypatch):
    workload = Workload("here", "", ((1000,),))
    each = storage._EACH * 1000
    monkeypatch.setattr(storage, "free_memory", lambda: storage._SHARED * 1000 + 3 * each)
    result = storage.time_workload(workload, RULES["adam"], 1, 0.0)
    rows = [(row.name, row.storage) for row in result.rows]
    assert rows == [
        ("fastopt", "float32"),
        ("limit", "float32"),
        *(("fastopt", name) for name in STORAGES if name != "float32"),
    ]
    monkeypatch.setattr(storage, "free_memory", lambda: storage._SHARED * 1000 + each)
    with pytest.raises(MemoryError, match="here needs more memory"):
        storage.time_workload(workload, RULES["adam"], 1, 0.0)


@pytest.mark.parametrize(
    ("name", "stored", "moved"),
    [
        ("torch", "float32", 28),
        ("torch", "bfloat16, bfloat16 state", 14),
        ("deepspeed", "float32", 28),
        ("deepspeed", "bfloat16, float32 state", 22),
        ("deepspeed", "bfloat16, bfloat16 state", 14),
        ("bitsandbytes", "float32, 8-bit state", 2 * 4 + 4 + 2 * 2 * (1 + 4 / 256)),
        ("torchao", "float32, 8-bit state", 2 * 4 + 4 + 2 * 2 * (1 + 4 / 256)),
    ],
)
def test_bytes_of_peers_are_those_of_their_arrays(monkeypatch, name, stored, moved):
    monkeypatch.undo()
    pytest.importorskip("torch")
    pytest.importorskip(name)
    rule, own = RULES["adam"], STORAGES[stored]
    params, grads = Workload("", "", ((8192,),)).arrays(own.dtype)
    before = params[0].copy()
    peer = peers.find(name)(own.of(rule), params, grads, 1)
    peer.begin()
    peer.step()
    assert peer.bytes_moved() / 8192 == moved
    (after,) = peer.result()
    assert after.dtype == before.dtype
    assert after.shape == before.shape
    assert (after != before).any()


# ---- the checks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", STEPS)
def test_fastopt_has_the_bits_of_the_reference_in_every_storage(rule):
    for name in STORAGES:
        check.check_stored(rule, name, 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bfloat16 with master", {"lr": 2.0**-10 * (1 + 1e-6)}),
        ("bfloat16, bfloat16 state", {"seed": 1}),
        ("bfloat16, 8-bit state", {"stochastic_rounding": False}),
        ("float16 with master", {"master_weights": False}),
    ],
)
def test_bits_that_are_not_the_references_are_caught(monkeypatch, name, options):
    other = Storage(**{**vars(STORAGES[name]), "options": {**STORAGES[name].options, **options}})
    monkeypatch.setitem(STORAGES, name, other)
    with pytest.raises(check.WrongResultError, match=f"fastopt \\(adam, {name}\\) is wrong"):
        check.check_stored("adam", name, 1)


@pytest.mark.parametrize("rule", STEPS)
def test_weights_go_their_way_in_every_storage_of_fastopt(rule):
    for name in STORAGES:
        assert check.travel("fastopt", rule, name, 1).fault is None, name


def test_updates_that_are_lost_are_a_fault(monkeypatch):
    join(monkeypatch, nearest=Nearest)
    found = check.travel("nearest", "adam", "bfloat16, bfloat16 state", 1)
    assert found.first == found.then == 0
    assert found.fault == "weights went 0.00 and 0.00 of their way"


def test_weights_that_move_without_gradient_are_a_fault(monkeypatch):
    join(monkeypatch, restless=Restless)
    found = check.travel("restless", "adam", "float32", 1)
    assert found.first == pytest.approx(1, abs=1e-3)
    assert found.fault == "weights without gradient moved by 0.002"


def test_a_nan_is_a_fault():
    assert check.Travel(1.0, float("nan"), 0.0).fault == "weights went 1.00 and nan of their way"


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_prints_tables_and_writes_results_and_a_picture(monkeypatch, tmp_path, capsys):
    assert main(["bench", "--storage", "--threads", "2", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for title in ("1 array, 1e3", "MLP 784-128-64-10, 6 arrays"):
        first = lines.index(f"{title} (adam, up to 2 threads)") + 5
        rows = [line.split() for line in lines[first : first + 8]]
        assert rows[0][:5] == ["fastopt", "float32", "28.0", rows[0][3], rows[0][4]]
        assert rows[1][:3] == ["limit", "float32", "28.0"]
        assert " ".join(rows[2][:5]) == "fastopt bfloat16 with master 26.0"
        assert all(cell == "1.00" for cell in rows[0][5:6])
    assert "Missing: torch: torch is not installed" in lines
    assert not any("wrong" in line.lower() for line in lines)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["storage.json", "storage.png"]
    assert (tmp_path / "storage.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    content = strict_json(tmp_path / "storage.json")
    assert content["versions"]["fastopt"] == fastopt.__version__
    assert content["build_info"] == fastopt.build_info()
    assert [result["workload"] for result in content["results"]] == ["1e3", "mlp"]
    for result in content["results"]:
        assert (result["rule"], result["threads"]) == ("adam", 2)
        assert [row["storage"] for row in result["rows"]] == ["float32", *STORAGES]
        assert result["absent"] == [{"name": "torch", "why": "torch is not installed"}]
        for row in result["rows"]:
            assert row["fault"] is None
            assert row["us"] > 0
            limit = row["name"] == "limit"
            assert row["travel"] is None if limit else len(row["travel"]) == 2


def test_a_peer_whose_numbers_are_wrong_says_so_in_its_row(monkeypatch, tmp_path, capsys):
    join(monkeypatch, nearest=Nearest, restless=Restless)
    argv = ["bench", "--storage", "--workloads", "1e4", "--threads", "1", "--out", str(tmp_path)]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    wrong = [line.split() for line in lines if line.rstrip().endswith(" wrong")]
    assert [row[0] for row in wrong] == ["nearest", "restless"]
    assert wrong[0][-3:] == ["0.00", "0.00", "wrong"]
    said = "Wrong: nearest, bfloat16, bfloat16 state: weights went 0.00 and 0.00 of their way"
    assert said in lines
    (result,) = strict_json(tmp_path / "storage.json")["results"]
    faults = {row["name"]: row["fault"] for row in result["rows"]}
    assert faults["fastopt"] is None
    assert faults["restless"] == "weights without gradient moved by 0.002"


def test_fastopt_with_wrong_bits_ends_the_command_in_one_line(monkeypatch, tmp_path, capsys):
    own = STORAGES["float32, 8-bit state"]
    other = Storage(**{**vars(own), "options": {**own.options, "seed": 1}})
    monkeypatch.setitem(STORAGES, own.name, other)
    assert main(["bench", "--storage", "--out", str(tmp_path)]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("fastopt: error: fastopt (adam, float32, 8-bit state) is wrong: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rule", STEPS)
def test_every_rule_can_be_timed(tmp_path, rule):
    argv = ["bench", "--storage", "--rule", rule, "--workloads", "1e3", "--out", str(tmp_path)]
    assert main(argv) == 0
    (result,) = strict_json(tmp_path / "storage.json")["results"]
    assert result["rule"] == rule


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--storage", "--dtype", "float32"], "--dtype goes without --storage"),
        (["--storage", "--rule", "clip-adam"], "not with clip-adam"),
        (["--workloads", "1e9"], "no workload '1e9'; there are 1e3, 1e4, "),
        (["--workloads", "1e3,1e3"], "each name once, not '1e3,1e3'"),
    ],
)
def test_bad_options_are_refused(monkeypatch, tmp_path, capsys, argv, named):
    monkeypatch.chdir(tmp_path)
    status, line = refused(capsys, ["bench", *argv])
    assert status == 2
    assert named in line
    assert list(tmp_path.iterdir()) == []


def test_missing_ml_dtypes_is_named_with_its_remedy(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert main(["bench", "--storage"]) == 2
    stderr = capsys.readouterr().err
    assert "--storage needs the package ml_dtypes: pip install 'fastopt[bfloat16]'" in stderr
    assert list(tmp_path.iterdir()) == []


def test_workloads_are_chosen_for_the_other_benchmark_too(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "NAMES", ("fastopt", "numpy"))
    monkeypatch.setattr(run, "SHORT_S", 0.0)
    assert main(["bench", "--workloads", "mlp,1e3", "--out", str(tmp_path)]) == 0
    results = strict_json(tmp_path / "results.json")["results"]
    assert [result["workload"] for result in results] == ["mlp", "1e3"]


def test_arrays_of_16_bits_are_those_of_float32_rounded():
    workload = Workload("", "", ((50,), (3, 4)))
    for plain, short in zip(workload.arrays("float32"), workload.arrays("float16"), strict=True):
        for one, other in zip(plain, short, strict=True):
            np.testing.assert_array_equal(one.astype(np.float16), other)
