"""Copies of an optimizer: state dicts, deep copies, pickles, other processes and threads."""

import copy
import gc
import math
import pickle
import re
import threading
from functools import partial

import numpy as np
import pytest
from failures import KINDS
from support import (
    EVERY,
    Run,
    clean_finish,
    contents,
    differences,
    everything,
    finish,
    goes_on_like,
    make_grads,
    python,
)
from tables import CONFIGS, ROWS

from fastopt import SGD, Adagrad, Adam


def slots(opt):
    return [array for state in opt.state for array in state.values()]


# ---- state dicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_training_resumed_from_a_state_dict_equals_uninterrupted_training(config):
    run = Run(config)
    finish(run)
    saved = copy.deepcopy((run.opt.state_dict(), run.params))
    fresh = Run(config)
    for own, kept in zip(fresh.params, saved[1], strict=True):
        own[...] = kept
    fresh.opt.reset()
    fresh.group(0)["lr"] = 77.0
    arrays = slots(fresh.opt)
    fresh.opt.load_state_dict(saved[0])
    assert all(a is b for a, b in zip(arrays, slots(fresh.opt), strict=True))
    assert contents(fresh.opt) == contents(run.opt)
    assert goes_on_like(fresh.opt, run)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_state_dict_is_a_copy_both_ways(config):
    run = Run(config)
    saved = run.opt.state_dict()
    kept = copy.deepcopy(saved)
    finish(run)
    np.testing.assert_equal(saved, kept)
    run.opt.load_state_dict(saved)
    before = everything(run.opt)
    for state in [*saved["state"].values(), saved["ema"] or {}]:
        for array in state.values():
            array[...] = 9
    for group in saved["param_groups"]:
        group["lr"] = -1
        group["params"].clear()
    assert differences(everything(run.opt), before) == []


def test_a_list_of_betas_is_not_shared_with_a_state_dict():
    saved = Adam([np.ones(1)]).state_dict()
    saved["param_groups"][0]["betas"] = betas = [0.5, 0.5]
    opt = Adam([np.ones(1)])
    opt.load_state_dict(saved)
    betas[0] = 2.0
    assert opt.param_groups[0]["betas"] == (0.5, 0.5)
    opt.param_groups[0]["betas"] = betas
    betas[0] = 0.25
    saved = opt.state_dict()
    betas[0] = 3.0
    assert saved["param_groups"][0]["betas"] == (0.25, 0.5)


def test_named_parameters_load_by_name_in_any_order():
    arrays = {"a": np.ones(3), "b": np.full(3, 2.0), "c": np.full((2, 2), 3.0, np.float32)}
    grads = {name: np.full_like(w, i + 1) for i, (name, w) in enumerate(arrays.items())}
    opt = Adam(arrays, ema_decay=0.5)
    opt.step({**grads, "b": None})
    shuffled = {name: arrays[name].copy() for name in ("c", "b", "a")}
    other = Adam(shuffled, lr=3, ema_decay=0.5)
    other.load_state_dict(opt.state_dict())
    assert [int(s["step"]) for s in other.state] == [1, 0, 1]
    for _ in range(3):
        opt.step(grads)
        other.step(grads)
    for name, w in arrays.items():
        assert (shuffled[name] == w).all()
    assert [e.tolist() for e in reversed(other.ema)] == [e.tolist() for e in opt.ema]
    with pytest.raises(ValueError, match=r"missing \['d'\], unexpected \['a'\]"):
        Adam({"d": np.ones(3), "b": np.ones(3), "c": np.ones((2, 2), np.float32)}).load_state_dict(
            opt.state_dict()
        )


@pytest.mark.parametrize("call", ["fastopt.optimizer.has_slots", "fastopt._core.version_counter"])
def test_hyperparameters_of_a_load_that_failed_late_are_not_used(monkeypatch, call):
    """It fails once all of it is checked, before anything is written."""
    w, calls = np.zeros(3), 0
    opt = SGD([w], lr=1.0)
    saved = SGD([w.copy()], lr=0.25).state_dict()
    opt.step([np.zeros(3)])

    def interrupted(*args):
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(call, interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.load_state_dict(saved)
    assert (calls, opt.param_groups[0]["lr"]) == (1, 1.0)
    opt.step([np.ones(3)])
    assert w.tolist() == [-1.0] * 3


def test_a_load_checks_each_group_once(monkeypatch):
    opt, checked = SGD([{"params": np.zeros(3)}, {"params": np.zeros(2)}], lr=1.0), []

    def recorded(self, group, where, completed_steps, check=SGD._checked):
        checked.append(where)
        return check(self, group, where, completed_steps)

    saved = opt.state_dict()
    monkeypatch.setattr(SGD, "_checked", recorded)
    opt.load_state_dict(saved)
    assert checked == [f"state_dict['param_groups'][{number}]: " for number in (0, 1)]


def test_a_learning_rate_that_is_called_is_not_saved():
    opt = SGD([{"params": np.ones(1), "lr": lambda t: 1.0}, {"params": np.ones(2), "lr": 0.5}])
    saved = opt.state_dict()
    assert ["lr" in group for group in saved["param_groups"]] == [False, True]

    def own(steps):
        return 2.0

    other = SGD([{"params": np.ones(1), "lr": own}, {"params": np.ones(2), "lr": own}])
    other.load_state_dict(saved)
    assert [g["lr"] for g in other.param_groups] == [own, 0.5]
    other = SGD([{"params": np.ones(1)}, {"params": np.ones(2)}], lr=0.25)
    other.load_state_dict(saved)
    assert [g["lr"] for g in other.param_groups] == [0.25, 0.5]


def test_state_out_of_use_is_saved_and_used_again():
    runs = []
    for stop in (False, True):
        w = np.ones(4)
        opt, g = SGD([w], lr=0.5, momentum=0.5), [np.full(4, 3.0)]
        opt.step(g)
        opt.param_groups[0]["momentum"] = 0
        opt.step(g)
        if stop:
            saved, opt = opt.state_dict(), SGD([w])
            opt.load_state_dict(saved)
        opt.param_groups[0]["momentum"] = 0.5
        opt.step(g)
        runs.append((w.tolist(), opt.state[0]["momentum_buffer"].tolist()))
    assert runs[0] == runs[1]
    assert runs[0][1] == [4.5] * 4


def test_loaded_arrays_may_be_laid_out_in_any_way():
    run, fresh = Run("adam"), Run("adam")
    finish(run)
    saved = run.opt.state_dict()
    for k in EVERY:
        saved["ema"][k] = np.array(saved["ema"][k], order="F")
        for name, array in saved["state"][k].items():
            if array.ndim:
                saved["state"][k][name] = np.repeat(array, 2, axis=-1)[..., ::2]
        saved["state"][k]["step"] = int(saved["state"][k]["step"])
    for own, other in zip(fresh.params, run.params, strict=True):
        own[...] = other
    fresh.opt.load_state_dict(saved)
    assert contents(fresh.opt) == contents(run.opt)


def test_a_state_dict_from_before_there_was_accumulation_is_loaded():
    ahead, w = Adam({"w": np.ones(2)}), np.ones(2)
    ahead.step({"w": np.ones(2)})
    saved = ahead.state_dict()
    assert saved.pop("accumulated") is None
    opt = Adam({"w": w}, accumulate=2)
    opt.step({"w": np.ones(2)})
    opt.load_state_dict(saved)
    assert (opt.completed_steps, opt.accumulated_steps) == (1, 0)
    assert "accumulated" not in saved
    with pytest.raises(ValueError, match=r"^state_dict: missing \['ema'\], unexpected \[\]"):
        opt.load_state_dict({key: saved[key] for key in saved.keys() - {"ema"}})


# Where the dict is spoilt, with what, the error, and what its message names.
LEAVE = object()
BIG = 2**63 - 1


def corruptions(good, slot):
    """Yield (path, bad value or LEAVE to delete, error): every entry of a state dict in turn."""
    for entry in good:
        if entry not in ("accumulated", "seed", "memory_order"):  # which an early fastopt has not
            yield (entry,), LEAVE, ValueError
        yield (entry,), 3.5, (TypeError, ValueError)
    yield ("extra",), 1, ValueError
    for bad in (-1, 2**64):
        yield ("seed",), bad, ValueError
    for bad in ("1", True, [1], np.ones(1, int)):
        yield ("seed",), bad, TypeError
    key = next(iter(good["state"]))
    for bad in (None, [], 1):
        yield ("memory_order",), bad, TypeError
    for bad in ({"new": []}, {key: [0, 0]}, {key: None}, {key: ["0"]}, {key: [99]}):
        yield ("memory_order",), bad, ValueError
    for other in ("other", None):
        yield ("rule",), other, ValueError
        yield ("semantics",), other, ValueError
    for bad in (-1, BIG):
        yield ("completed_steps",), bad, ValueError
    for bad in (1.0, True, "3", None, np.float64(2), np.ones(1, int)):
        yield ("completed_steps",), bad, TypeError
    groups = good["param_groups"]
    yield ("param_groups",), groups[:-1], ValueError
    yield ("param_groups",), [*groups, groups[0]], ValueError
    yield ("param_groups",), tuple(groups), ValueError
    for n, group in enumerate(groups):
        at = ("param_groups", n)
        yield at, [], TypeError
        yield (*at, "params"), LEAVE, TypeError
        yield (*at, "params"), group["params"][:-1], ValueError
        yield (*at, "params"), [*group["params"], "new"], ValueError
        yield (*at, "params"), group["params"] * 2, ValueError
        yield (*at, "params"), None, TypeError
        yield (*at, "speed"), 1, ValueError
        yield (*at, "lr"), lambda t: 0.1, TypeError
        for name, value in group.items():
            if name not in ("params", "lr", "rowwise"):  # which files of early fastopts do not have
                yield (*at, name), LEAVE, ValueError
            if name != "params":
                yield (*at, name), None, TypeError
                if not isinstance(value, (bool, tuple)):
                    yield (*at, name), math.nan, ValueError
    for k, state in good["state"].items():
        at = ("state", k)
        yield at, LEAVE, ValueError
        yield at, [], TypeError
        yield (*at, "step"), LEAVE, ValueError
        yield (*at, "step"), -1, ValueError
        yield (*at, "step"), 1.0, TypeError
        yield (*at, "step"), np.array(1.0), TypeError
        yield (*at, "step"), np.array(-7), ValueError
        yield (*at, "other"), state[slot], ValueError
        for name in state.keys() - {"step"}:
            yield (*at, name), LEAVE, ValueError
            yield from misfits((*at, name), state[name])
    yield ("state", "new"), {}, ValueError
    yield ("ema",), None if good["ema"] else good["state"], ValueError
    for k in good["ema"] or ():
        yield ("ema", k), LEAVE, ValueError
        yield from misfits(("ema", k), good["ema"][k])


def misfits(path, array):
    yield path, array.tolist(), TypeError
    yield path, array.astype(np.float16), TypeError
    yield path, array.astype(array.dtype.newbyteorder()), TypeError
    yield path, array[None], ValueError
    yield path, np.append(array, array.dtype.type(1)), ValueError


def spoilt(good, path, bad):
    """Return a copy of the dict with one entry replaced or left out."""
    result = inner = copy.deepcopy(good)
    for key in path[:-1]:
        inner = inner[key]
    if bad is LEAVE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = bad
    return result


@pytest.mark.parametrize("config", CONFIGS)
def test_a_state_dict_with_any_bad_entry_changes_nothing(config):
    run, ahead = Run(config), Run(config)
    finish(ahead)
    good = ahead.opt.state_dict()
    good["param_groups"][0]["lr"] = 55.0
    slot = next(name for name in run.opt.state[0] if name != "step")
    before, ran = everything(run.opt), 0
    for path, bad, error in corruptions(good, slot):
        names = ".*".join(re.escape(str(part)) for part in path)
        with pytest.raises(error, match=names) as caught:
            run.opt.load_state_dict(spoilt(good, path, bad))
        assert caught.type in (TypeError, ValueError)
        assert differences(everything(run.opt), before) == [], (path, bad)
        ran += 1
    for bad in (None, [], "state", 3):
        with pytest.raises(TypeError, match=r"^state_dict must be a dict"):
            run.opt.load_state_dict(bad)
    assert differences(everything(run.opt), before) == []
    assert ran > 130
    assert differences(finish(run), clean_finish(config, False)) == []
    run.opt.load_state_dict(good)
    assert run.group(0)["lr"] == 55.0
    assert [s["step"] for s in run.opt.state] == [s["step"] for s in ahead.opt.state]


def test_a_learning_rate_that_fails_while_a_state_dict_is_loaded_changes_nothing():
    left = 100

    def schedule(steps):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyError("no more")
        return 0.5

    opt = SGD([{"params": np.ones(2), "lr": schedule}, {"params": np.ones(2)}], momentum=0.5)
    saved = opt.state_dict()
    saved["param_groups"][1]["lr"] = 7.0
    opt.step([np.ones(2)] * 2)
    before, failed = everything(opt), 0
    for call in range(10):  # the one that fails
        left = call
        try:
            opt.load_state_dict(saved)
        except KeyError:
            assert differences(everything(opt), before) == []
            failed += 1
    assert failed == 1  # it is evaluated once
    assert opt.completed_steps == 0


def test_keys_that_cannot_be_keys_are_named():
    opt = SGD([np.ones(2)])
    saved = opt.state_dict()
    saved["param_groups"][0]["params"] = [[0]]
    with pytest.raises(TypeError, match=r"^state_dict\['param_groups'\]\[0\]\['params'\]: unhash"):
        opt.load_state_dict(saved)


def test_changed_groups_are_refused_before_anything_is_loaded():
    opt = SGD([{"params": np.ones(2)}, {"params": np.ones(2)}])
    saved = opt.state_dict()
    saved["param_groups"][0]["lr"] = 9.0
    opt.param_groups[1]["params"] = (opt.params[1],)
    with pytest.raises(ValueError, match=r"param_groups\[1\]: its parameters were replaced"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("name", ["slot read-only", "average reshaped", "counter reshaped"])
def test_nothing_is_loaded_or_reset_where_some_array_cannot_be_written(name):
    spoil, error, message, where, configs, options = KINDS[name]
    for config in configs:
        saved = Run(config).opt.state_dict()
        saved["completed_steps"] = 5
        for k in where:
            run = Run(config, **options)
            names = message.format(label=re.escape(f"parameter {run.keys[k]!r}"))
            with spoil(run, k):
                before = everything(run.opt)
                for change in (partial(run.opt.load_state_dict, saved), run.opt.reset):
                    with pytest.raises(error, match=names):
                        change()
                    assert differences(everything(run.opt), before) == []
            assert differences(finish(run), clean_finish(config, options["owned"])) == []


# ---- deep copies and pickles ---------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_a_deep_copy_is_independent_and_goes_on_alike(config):
    run = Run(config)
    twin = copy.deepcopy(run.opt)
    assert contents(twin) == contents(run.opt)
    assert [a.strides for a in twin.params if a.size] == [p.strides for p in run.params if p.size]
    for mine, other in zip(twin.params, run.params, strict=True):
        assert not np.may_share_memory(mine, other)
    before = contents(run.opt)
    copy.deepcopy(twin).step(
        dict(zip(run.keys, make_grads(9), strict=True)) if run.given == "dict" else make_grads(9)
    )
    assert contents(twin) == contents(run.opt) == before
    assert goes_on_like(twin, run)


def test_parameters_copied_together_with_their_optimizer_stay_its_parameters():
    for duplicate in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        w = np.ones(3)
        (v,), opt = duplicate(([w], SGD([w], lr=1)))
        opt.step([np.ones(3)])
        assert opt.params[0] is opt.param_groups[0]["params"][0] is v
        assert (v[0], w[0]) == (0, 1)
        opt.add_param_group({"params": [np.ones(1)]})


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_pickle_brings_back_an_optimizer_that_goes_on_alike(config, protocol):
    run = Run(config)
    twin = pickle.loads(pickle.dumps(run.opt, protocol))
    assert contents(twin) == contents(run.opt)
    assert [repr(twin), type(twin)] == [repr(run.opt), type(run.opt)]
    with pytest.raises(TypeError, match="cannot be replaced"):
        twin.state[0].clear()
    assert goes_on_like(twin, run)


@pytest.mark.parametrize("clip", ["clip_norm", "global_clip_norm"])
def test_a_copy_in_the_same_memory_order_has_the_same_norms(clip):
    rng = np.random.default_rng(0)

    def by_pickle(opt):
        return pickle.loads(pickle.dumps(opt))

    for _ in range(40):
        c = rng.standard_normal((5, 7, 11))
        permuted = c.copy().transpose(1, 0, 2)
        for param, duplicate in (
            (c, by_pickle),
            (np.asfortranarray(c), by_pickle),
            (permuted, copy.deepcopy),
            (permuted, by_pickle),
        ):
            opt = Adam([param.copy(order="K")], lr=0.1, **{clip: 0.5})
            twin = duplicate(opt)
            assert twin.params[0].strides == param.strides
            for _ in range(3):
                g = rng.standard_normal(param.shape)
                assert opt.step([g]).grad_norm == twin.step([g]).grad_norm
            assert (twin.params[0] == opt.params[0]).all()


def test_a_model_and_its_optimizer_keep_their_memory_order_and_their_bond_in_a_pickle():
    rng = np.random.default_rng(1)
    w = rng.standard_normal((5, 7, 11)).transpose(1, 0, 2)
    opt = Adam({"w": w}, lr=0.1, amsgrad=True, ema_decay=0.5, accumulate=2, clip_norm=0.5)
    for _ in range(3):
        opt.step({"w": rng.standard_normal(w.shape)})
    model, twin = pickle.loads(pickle.dumps(({"w": w}, opt)))
    assert twin.params[0] is model["w"]
    arrays = [*twin.params, *twin.ema, *twin.state[0].values()]
    assert {a.strides for a in arrays if a.ndim} == {w.strides}
    for _ in range(3):
        g = rng.standard_normal(w.shape)
        opt.step({"w": g})
        twin.step({"w": g})
        assert model["w"].tobytes("K") == w.tobytes("K")


def test_a_slot_that_is_not_used_any_more_is_loaded_and_the_step_goes_on():
    for cls, on, off in [
        (row.cls, switch, {name: row.defaults[name] for name in switch})
        for row in ROWS
        for _, switch in row.switches()
    ]:
        before, g = cls([np.ones(3)], lr=0.1, **on), [np.ones(3)]
        before.step(g)
        before.param_groups[0].update(off)
        after = cls([before.params[0].copy()], lr=0.1)
        after.load_state_dict(before.state_dict())
        before.step(g)
        after.step(g)
        assert after.params[0].tobytes() == before.params[0].tobytes()
        assert after.params[0][0] < 0.9


def test_loading_state_that_is_the_optimizers_own_copies_it_first():
    opt = Adam([np.zeros(2), np.zeros(2)])
    opt.step([np.ones(2), np.full(2, 2.0)])
    saved = opt.state_dict()
    saved["state"] = {0: opt.state[1], 1: opt.state[0]}
    first, second = (opt.state[i]["exp_avg"].copy() for i in (0, 1))
    opt.load_state_dict(saved)
    assert (opt.state[0]["exp_avg"] == second).all()
    assert (opt.state[1]["exp_avg"] == first).all()


def test_a_reset_that_cannot_be_done_does_nothing():
    opt = Adagrad([np.ones(2), np.ones(2, np.float32)])
    opt.step([np.ones(2), np.ones(2, np.float32)])
    opt.param_groups[0]["initial_accumulator_value"] = 1e300
    with pytest.raises(ValueError, match="initial value of sum must be finite in float32"):
        opt.reset()
    assert [state["sum"][0] for state in opt.state] == [1, 1]
    assert opt.completed_steps == 1


def test_a_deep_copy_is_not_torn_by_a_step_in_another_thread():
    opt = SGD([np.zeros(200_000) for _ in range(4)], lr=1.0)
    grads, stop = [np.ones(200_000) for _ in range(4)], threading.Event()

    def run():
        while not stop.is_set():
            opt.step(grads)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(20):
            twin = copy.deepcopy(opt)
            assert {float(p[i]) for p in twin.params for i in (0, -1)} == {-twin.completed_steps}
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("cls", "switch"),
    [
        *((row.cls, {**switch, "lr": 0.5}) for row in ROWS for _, switch in row.switches()),
        (SGD, {"momentum": 0.9, "dampening": 0.5}),
    ],
)
def test_a_copy_takes_over_what_was_changed_since_the_last_step(cls, switch, tmp_path):
    opt = cls([np.ones(3), np.ones(2)], lr=0.1)
    opt.step([np.ones(3), None])
    opt.param_groups[0].update(switch)
    twins = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    loaded = cls([p.copy() for p in opt.params])
    loaded.load_state_dict(opt.state_dict())
    opt.save(tmp_path / "file")
    read = cls([p.copy() for p in opt.params])
    read.load(tmp_path / "file")
    for grads in ([np.full(3, 2.0), np.full(2, 3.0)], [np.full(3, 0.5), np.full(2, 5.0)]):
        for each in (opt, *twins, loaded, read):
            each.step(grads)
            assert contents(each) == contents(opt)


def test_a_copy_with_a_bad_value_pending_is_refused_by_name_and_nothing_changes(tmp_path):
    opt = Adam([np.ones(3)])
    opt.step([np.ones(3)])
    opt.param_groups[0]["lr"] = -1.0
    before = everything(opt)
    for act in (
        opt.state_dict,
        lambda: copy.deepcopy(opt),
        lambda: pickle.dumps(opt),
        lambda: opt.save(tmp_path / "file"),
    ):
        with pytest.raises(ValueError, match=r"^param_groups\[0\]: lr must be >= 0"):
            act()
    assert differences(everything(opt), before) == []
    assert list(tmp_path.iterdir()) == []


class Trainer:
    """Owns an optimizer, whose learning rate is a method of its own."""

    def __init__(self):
        self.w = np.ones(3)
        self.opt = Adam([self.w], lr=self.rate)
        self.rate_now, self.calls = 0.5, 0

    def rate(self, step):
        self.__dict__["calls"] = self.__dict__.get("calls", -1) + 1
        return self.__dict__.get("rate_now", 9.0) / (1 + step)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_what_owns_an_optimizer_and_is_its_rate_goes_on_alike(copied):
    trainer = Trainer()
    trainer.opt.step([np.ones(3)])
    calls = trainer.calls
    twin = copied(trainer)
    trainer.opt.state_dict()
    assert trainer.calls == twin.calls == calls
    for each in (trainer, twin):
        each.opt.step([np.full(3, 2.0)])
        assert each.calls == calls + 1
    assert contents(twin.opt)[2] == contents(trainer.opt)[2]
    assert np.array_equal(twin.w, trainer.w)


def test_a_shallow_copy_is_refused():
    with pytest.raises(TypeError, match=r"use copy\.deepcopy"):
        copy.copy(SGD([np.ones(1)]))


def test_a_result_can_be_copied_and_pickled():
    result = SGD([np.ones(1)], global_clip_norm=1.0).step([np.full(1, 3.0)])
    for twin in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert (twin.grad_norm, twin.skipped, twin.threads) == (3.0, False, 1)


@pytest.mark.parametrize("seed", range(3))
def test_state_that_a_load_brings_is_in_the_order_of_the_rule(seed):
    code = """
import numpy as np, fastopt
opt, other = (fastopt.RMSprop([np.ones(2)], **options) for options in (
    {"momentum": 0.9, "centered": True}, {}))
other.load_state_dict(opt.state_dict())
print(*other.state[0])
"""
    done = python("-c", code, PYTHONHASHSEED=str(seed))
    assert done.stdout.split() == ["step", "square_avg", "momentum_buffer", "grad_avg"], done.stderr


def test_a_load_that_frees_a_rate_whose_code_changes_the_groups_is_done():
    class Rate:
        def __call__(self, step):
            return 0.1

        def __del__(self):
            opt.param_groups.clear()

    opt = SGD([{"params": [np.ones(3)], "lr": 0.5 + i} for i in range(50)])
    saved = opt.state_dict()
    groups = list(opt.param_groups)
    groups[0]["lr"] = Rate()
    opt.load_state_dict(saved)
    gc.collect()
    assert opt.param_groups == []
    assert [group["lr"] for group in groups] == [0.5 + i for i in range(50)]


def test_printed_are_the_options_that_were_asked_for():
    params = [np.zeros(3, np.float32)]
    assert len(str(Adam(params)).splitlines()) == 3
    _, options, *_ = str(Adam(params, state_dtype="8bit", seed=3)).splitlines()
    assert options == "  state_dtype='8bit', seed=3"
