"""Checkpoints: what a file holds, and that training goes on from it.

What is refused is in test_checkpoint_refusals.py, how files come to the disk, whatever happens
meanwhile, in test_checkpoint_writes.py.
"""

import json
import os
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from forged import checksum, read, small
from old_checkpoints import DATA, IN_FEWER_BITS, OLD, STEPS, advanced, made
from oracle import Oracle, assert_same_bits
from support import (
    CHECKOUT,
    Run,
    contents,
    differences,
    finish,
    goes_on_like,
    make_grads,
    make_params,
    python,
)
from tables import CASES, CONFIGS, ROWS

import fastopt
from fastopt import SGD, Adam, checkpoint


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


# ---- training goes on ----------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_training_resumed_from_a_file_equals_uninterrupted_training(config, path):
    run = Run(config)
    finish(run)
    before = run.everything()
    run.opt.save(path)
    assert differences(run.everything(), before) == []
    fresh = Run(config)
    for param in fresh.params:
        param[...] = 9
    fresh.opt.reset()
    fresh.group(0)["lr"] = 77.0
    own = [*fresh.opt.params, *(a for s in fresh.opt.state for a in s.values())]
    fresh.opt.load(path)
    now = [*fresh.opt.params, *(a for s in fresh.opt.state for a in s.values())]
    assert all(a is b for a, b in zip(now, own, strict=True))
    assert contents(fresh.opt) == contents(run.opt)
    assert goes_on_like(fresh.opt, run)


def test_every_rule_with_every_option_goes_on_with_the_same_bits(path):
    ran = 0
    for name, cls, kwargs in CASES:
        params, resumed = make_params()[0], make_params()[0]
        opt = cls(params, **kwargs, ema_decay=0.9)
        for seed in (1, 2):
            opt.step(make_grads(seed))
        opt.save(path)
        other = cls(resumed, **kwargs, ema_decay=0.9)
        other.load(path)
        for seed in (3, 4):
            opt.step(make_grads(seed))
            other.step(make_grads(seed))
        assert contents(other) == contents(opt), name
        ran += 1
    assert ran == len(CASES) > 80


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_training_resumed_amid_micro_batches_equals_uninterrupted_training(config, calls, path):
    run = Run(config, accumulate=3)  # one call
    for seed in range(1, calls):
        run.step([None if k == seed else grad for k, grad in enumerate(make_grads(seed))])
    before = run.everything()
    run.opt.save(path)
    assert differences(run.everything(), before) == []
    fresh = Run(config, accumulate=3)
    finish(fresh)
    for param in fresh.params:
        param[...] = 9
    own = fresh.opt._members.sums
    fresh.opt.load(path)
    assert all(a is b for a, b in zip(fresh.opt._members.sums, own, strict=True))
    assert fresh.opt.accumulated_steps == run.opt.accumulated_steps == calls % 3
    assert fresh.opt._plan.summed() == run.opt._plan.summed()
    assert contents(fresh.opt) == contents(run.opt)
    for _ in range(3):
        assert goes_on_like(fresh.opt, run)


@pytest.mark.parametrize("rule", [*OLD, *IN_FEWER_BITS])
def test_a_file_of_version_0_1_loads_and_goes_on_as_the_reference_does(rule):
    opt, twin = made(rule), Oracle(made(rule), **{**OLD, **IN_FEWER_BITS}[rule][1])
    run_on_reference(rule, twin)
    for group in opt.param_groups:
        group.update(lr=0.75, weight_decay=0.5)
    for param in opt.params:
        param[...] = 7
    opt.load(DATA / f"checkpoint-0.1-{rule}.safetensors")
    assert opt.completed_steps == twin.completed == STEPS
    assert_same_bits(opt, twin, "loaded")
    run_on_reference(rule, twin)
    advanced(rule, opt)
    assert_same_bits(opt, twin, "continued")
    assert repr(opt) == repr(made(rule))


class _Listed:
    """Hands the gradients that `advanced` makes to an oracle, which takes them as a list."""

    def __init__(self, oracle):
        self.oracle, self.completed_steps = oracle, oracle.completed

    def step(self, grads):
        self.oracle.step(list(grads.values()) if isinstance(grads, dict) else grads)


def run_on_reference(rule, oracle):
    advanced(rule, _Listed(oracle))


def test_every_rule_has_an_old_file():
    assert {OLD[rule][0] for rule in OLD} == {row.cls for row in ROWS if row.old_files}
    files = {path.name for path in DATA.glob("checkpoint-*")}
    assert files == {f"checkpoint-0.1-{rule}.safetensors" for rule in (*OLD, *IN_FEWER_BITS)}


# ---- what a file holds ---------------------------------------------------------------------------


def test_any_reader_finds_the_arrays_under_the_parameters_names(path):
    run = Run("sgd-keras")
    run.opt.save(path)
    tensors = safetensors.numpy.load_file(path)
    expected = {}
    for key, param, state, average in zip(
        run.keys, run.params, run.opt.state, run.opt.ema, strict=True
    ):
        expected |= {f"params/{key}": param, f"ema/{key}": average}
        expected |= {f"state/{key}/{slot}": array for slot, array in state.items()}
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert tensors[name].dtype == array.dtype
        assert tensors[name].shape == array.shape
        assert tensors[name].tobytes() == array.tobytes()


def test_a_file_holds_any_arrays_and_texts_without_an_optimizer(path):
    arrays = {"a": np.arange(3.0), "b/c": np.ones((2, 0), np.float32), "n": np.array(3)}
    checkpoint.write(path, {"said": "yes"}, arrays)
    texts, found = checkpoint.read(path)
    assert texts["said"] == "yes"
    assert texts["format"] == "fastopt checkpoint"
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert (found[name] == array).all()


def test_the_metadata_says_what_the_file_is(path):
    opt = Adam([{"params": [np.ones(2)], "lr": 0.1}, {"params": [np.ones(3)]}], betas=[0.5, 0.75])
    opt.step([np.ones(2), None])
    opt.save(path)
    metadata, tensors = read(path)
    assert metadata.pop("sha256") == checksum(metadata, tensors)
    groups = json.loads(metadata.pop("param_groups"))
    assert metadata == {
        "format": "fastopt checkpoint",
        "format_version": "1",
        "fastopt_version": fastopt.__version__,
        "optimizer": "Adam",
        "rule": "adam",
        "semantics": "torch",
        "completed_steps": "1",
    }
    assert [group["params"] for group in groups] == [[0], [1]]
    assert [group["lr"] for group in groups] == [0.1, 1e-3]
    assert groups[0]["betas"] == [0.5, 0.75]
    assert [int(tensors[f"state/{k}/step"]) for k in (0, 1)] == [1, 0]


def test_a_file_has_sums_only_between_two_updates(path):
    opt = SGD({"a": np.ones(2), "b": np.ones(3, np.float32)}, accumulate=3)
    held = []
    for grad in (None, np.array([1.0, 2.0]), np.array([3.0, 6.0])):
        opt.step({"a": grad, "b": None}, loss_scale=2.0)
        opt.save(path)
        metadata, tensors = read(path)
        assert metadata["format_version"] == "1"
        parts = {"params/a", "params/b", "state/a/step", "state/b/step"}
        held.append({name: tensors[name].tolist() for name in tensors.keys() - parts})
    assert held == [{"accumulated_steps": 1}, {"accumulated_steps": 2, "sum/a": [0.5, 1.0]}, {}]


def test_what_was_summed_since_is_dropped_by_a_file_without_sums(path):
    opt = small(accumulate=2)
    opt.reset()
    opt.save(path)
    opt.step({"w": np.ones(2, np.float32), "b": None})
    opt.load(path)
    assert (opt.accumulated_steps, opt._plan.summed()) == (0, [False, False])
    for value in (2.0, 4.0):
        opt.step({"w": None, "b": np.array(value)})
    assert (opt.params[0].tolist(), float(opt.params[1])) == ([1.0, -2.0], 0.5 - 0.5 * 3.0)


def test_hyperparameters_come_back_exactly(path):
    values = [5e-324, 0.1 + 0.2, 1e308, float("inf"), 3, 10**30, Fraction(1, 3), True]
    values += [np.float64(1 / 3), np.float32(0.1), np.int64(7), np.uint8(1)]
    ran = 0
    for value in values:
        if value is True:
            options = {"nesterov": np.bool_(True), "momentum": 0.5}
        else:
            options = {"lr": value, "momentum": value}
        opt = SGD([np.ones(1)], **options)
        opt.save(path)
        other = SGD([np.ones(1)], momentum=0.25)
        other.load(path)
        for name in options:
            own, loaded = (o.param_groups[0][name] for o in (opt, other))
            assert type(loaded) in (bool, int, float)
            assert float(loaded) == float(own)
        ran += 1
    assert ran == len(values)


@pytest.mark.parametrize("step", [1, 2**53 + 1, 2**63 - 2])
def test_counters_come_back_exactly(step, path):
    opt = SGD([np.ones(1)])
    opt.load_state_dict({**opt.state_dict(), "completed_steps": step, "state": {0: {"step": step}}})
    opt.save(path)
    other = SGD([np.ones(1)])
    other.load(path)
    assert other.completed_steps == other.state[0]["step"] == step


def test_values_that_are_no_numbers_come_back_bit_for_bit(path):
    patterns = np.array([0x7FF8000000000123, 0xFFF0000000000001, 1 << 63, 1], np.uint64)
    w, v = patterns.view(np.float64).copy(), np.zeros(4)
    SGD([w]).save(path)
    SGD([v]).load(path)
    assert (v.view(np.uint64) == patterns).all()


ODD_NAMES = ["", "/", "a", "a/b", "a/b/c", "a/step", "step", "params/a", "__metadata__", "sha256"]
ODD_NAMES += [
    "ä",
    "a\u0308",
    "\u202e",
    "名前",
    "\U0001f600",
    '"',
    "\\",
    "\n\x00\x1f\x7f",
    " ",
    "x" * 5000,
]


def test_parameters_may_have_any_names(path):
    named = [*ODD_NAMES, 0, 7, -1]
    params = {name: np.full(2, i + 0.5) for i, name in enumerate(named)}
    opt = Adam(params, ema_decay=0.5)
    opt.step({name: np.full(2, i + 1.0) for i, name in enumerate(named)})
    opt.save(path)
    others = {name: np.zeros(2) for name in reversed(named)}
    other = Adam(others, ema_decay=0.5)
    other.load(path)
    for name in named:
        assert (others[name] == params[name]).all(), name
    assert [e.tolist() for e in reversed(other.ema)] == [e.tolist() for e in opt.ema]
    assert np.shape(safetensors.numpy.load_file(path)["state/a/b/c/exp_avg"]) == (2,)


@pytest.mark.parametrize("name", [("a", 1), b"a", None, True, 1.5, np.int64(3)])
def test_a_name_that_a_file_cannot_hold_is_refused(name, path):
    opt = SGD({"a": np.ones(1), name: np.ones(1)})
    with pytest.raises(TypeError, match=re.escape(f"parameter {name!r}: to be saved, names must")):
        opt.save(path)
    small().save(path)
    with pytest.raises(TypeError, match=re.escape(f"parameter {name!r}: ")):
        opt.load(path)


def test_names_that_would_be_one_in_a_file_are_refused(path):
    opt = SGD({"1": np.ones(1), 1: np.ones(1)})
    with pytest.raises(ValueError, match="parameter 1: another has the same name in a file"):
        opt.save(path)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        SGD({"\ud800": np.ones(1)}).save(path)
    assert not path.parent.exists() or os.listdir(path.parent) == []


def test_named_parameters_load_in_any_order(path):
    opt = small()
    opt.save(path)
    w, b = np.zeros(2, np.float32), np.zeros(())
    other = SGD({"b": b, "w": w})
    other.load(path)
    assert (w == opt.params[0]).all()
    assert b == opt.params[1]
    assert [s["momentum_buffer"].tolist() for s in other.state] == [2.0, [1.0, 1.0]]


def test_a_learning_rate_that_is_called_is_neither_saved_nor_called(path):
    def ended(steps):
        if steps:
            raise RuntimeError("the schedule has ended")
        return 0.5

    opt = SGD([{"params": np.ones(1), "lr": ended}, {"params": np.ones(2), "lr": 0.25}])
    opt.step([np.ones(1), np.ones(2)])
    opt.save(path)
    groups = json.loads(read(path)[0]["param_groups"])
    assert ["lr" in group for group in groups] == [False, True]
    with pytest.raises(RuntimeError, match="has ended"):
        opt.step([np.ones(1), np.ones(2)])
    opt.param_groups[0]["lr"] = own = lambda steps: 2.0
    opt.step([np.ones(1), np.ones(2)])
    assert opt.params[0] == 1 - 0.5 - 2.0
    opt.load(path)
    assert [g["lr"] for g in opt.param_groups] == [own, 0.25]
    assert opt.params[0] == 0.5


def test_what_was_switched_on_since_the_last_step_is_saved_so_that_it_loads(path):
    opt = SGD([np.ones(2)], lr=0.5)
    opt.step([np.ones(2)])
    opt.param_groups[0]["momentum"] = 0.5
    opt.save(path)
    other = SGD([np.zeros(2)])
    other.load(path)
    for o in (opt, other):
        o.step([np.ones(2)])
    assert contents(other) == contents(opt)


def test_what_could_not_be_loaded_is_not_saved(path):
    opt = small()
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"param_groups\[0\]: lr must be >= 0, got -1.0"):
        opt.save(path)
    opt.param_groups[0]["lr"] = 1.0
    opt.state[0]["step"][...] = -1
    with pytest.raises(ValueError, match="step counter of parameter 'w' must be >= 0"):
        opt.save(path)
    assert os.listdir(path.parent) == []


def test_the_documentations_example_resumes_where_it_was_killed(tmp_path, monkeypatch):
    page = CHECKOUT / "docs" / "checkpoints.md"
    train, look = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)

    def run(last):
        def gradients(params, k):
            if k == last:
                raise SystemExit
            return {name: param - k for name, param in params.items()}

        names = {"W": np.ones((3, 2)), "b": np.ones(2), "gradients": gradients}
        names |= {"os": os, "fastopt": fastopt, "safetensors": safetensors}
        exec(train, names)
        return names

    with pytest.raises(SystemExit):
        run(250)
    resumed = run(None)
    exec(look, resumed)
    whole = Path("run.safetensors").read_bytes()
    os.remove("run.safetensors")
    straight = run(None)
    assert contents(straight["opt"]) == contents(resumed["opt"])
    assert (resumed["arrays"]["params/W"] == straight["W"]).all()
    assert len(Path("run.safetensors").read_bytes()) == len(whole)


def test_without_safetensors_the_error_says_what_to_install():
    code = (
        "import sys, numpy, fastopt; sys.modules['safetensors'] = None\n"
        "opt = fastopt.SGD([numpy.ones(1)])\n"
        "for change in (opt.save, opt.load):\n"
        "    try: change('run.safetensors')\n"
        "    except ImportError as error: print(error)\n"
    )
    done = python("-c", code)
    message = "checkpoints need the package safetensors: pip install 'fastopt[checkpoint]'\n"
    assert (done.stdout, done.returncode) == (message * 2, 0), done.stderr
