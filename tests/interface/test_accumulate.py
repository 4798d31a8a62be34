"""Gradients summed over micro-batches, and parameters that the weight decay leaves out."""

import copy
import itertools
import pickle
import re

import numpy as np
import pytest
from failures import KINDS
from oracle import Oracle, assert_same_bits
from support import EVERY, NOT_EMPTY, Run, contents, differences, everything, make_grads
from tables import CASE_IDS, CASES, CLASSES, CONFIGS

from fastopt import SGD, Adam, AdamW, _core

BLOCK = _core.BLOCK
SOME = CASES[::4]


# ---- the mean over micro-batches -----------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize(("name", "cls", "kwargs"), SOME, ids=CASE_IDS[::4])
def test_the_mean_of_micro_batches_equals_the_reference(name, cls, kwargs, k):
    rng = np.random.default_rng(CASE_IDS.index(name))
    kwargs = {**kwargs, "accumulate": k, "ema_decay": 0.9}
    starts = [rng.standard_normal(n, np.float32) for n in (0, 1, 17, BLOCK - 1, 3 * BLOCK + 5)]
    starts.append(rng.standard_normal((37, 131)).T)
    gradients = [
        [
            None if rng.integers(3) == 0 else rng.standard_normal(p.shape).astype(p.dtype)
            for p in starts
        ]
        for _ in range(4 * k + 1)
    ]
    ran = 0
    for isa, team in itertools.product(_core.isa()["supported"], [1, 3]):
        _core.select_isa(isa)
        _core.force_threads(team)
        opt = cls([p.copy(order="K") for p in starts], **kwargs)
        twin = Oracle(opt, **kwargs)
        for number, grads in enumerate(gradients, 1):
            opt.step(grads, loss_scale=3.0)
            twin.step(grads, loss_scale=3.0)
            assert (opt.completed_steps, opt.accumulated_steps) == divmod(number, k)
            assert_same_bits(opt, twin, f"{isa}, {team} threads, call {number}")
        ran += 1
    assert ran == 2 * len(_core.isa()["supported"])


@pytest.mark.parametrize("clip", ["clip_value", "clip_norm", "global_clip_norm"])
def test_what_is_clipped_and_measured_is_the_mean(clip):
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(n) for n in (7, 2 * BLOCK + 1)]
    for semantics in ("torch", "keras"):
        kwargs = {"lr": 0.1, clip: 0.5, "semantics": semantics, "accumulate": 3}
        opt = SGD([p.copy() for p in params], **kwargs)
        twin = Oracle(opt, **kwargs)
        for call in range(1, 7):
            grads = [rng.standard_normal(p.size) for p in params]
            result = opt.step(grads)
            twin.step(grads)
            assert_same_bits(opt, twin, f"{semantics}, call {call}")
            measured = call % 3 == 0 and "norm" in clip
            assert (result.grad_norm is not None) == measured


def test_none_counts_as_zero_unless_all_are_none():
    a, b, c = np.zeros(2), np.zeros(2), np.ones(2)
    opt = AdamW({"a": a, "b": b, "c": c}, lr=1.0, weight_decay=0.5, accumulate=4)
    sgd = SGD([a, b, c], lr=1.0, accumulate=4)
    for grads in ([4.0, None, None], [None, None, None], [8.0, 2.0, None], [None, -10.0, None]):
        sgd.step([None if g is None else np.full(2, g) for g in grads])
    assert (a.tolist(), b.tolist(), c.tolist()) == ([-3, -3], [2, 2], [1, 1])
    assert [int(s["step"]) for s in sgd.state] == [1, 1, 0]
    for _ in range(4):
        opt.step({"a": np.ones(2), "b": None, "c": None})
    assert a[0] != -3
    assert (b.tolist(), c.tolist()) == ([2, 2], [1, 1])  # not decayed either


def test_a_gradient_may_be_zeroed_and_used_again_at_each_call():
    w, g = np.zeros(3), np.zeros(3)
    opt = SGD([w], lr=1.0, accumulate=2)
    for value in (1.0, 3.0, 5.0, 7.0):
        g[...] = value
        opt.step([g], zero_grad=True)
        assert not g.any()
    assert w.tolist() == [-8, -8, -8]


def test_the_schedule_and_the_average_follow_updates_not_calls():
    w, asked = np.zeros(1), []
    opt = SGD([w], lr=lambda t: asked.append(t) or 1.0, ema_decay=0.5, accumulate=2)
    for value in (2.0, 4.0, 6.0, 8.0):
        opt.step([np.full(1, value)])
    assert w[0] == -10
    assert opt.ema[0][0] == 0.5 * -3 + 0.5 * -10
    assert max(asked) == 1


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_micro_batch_that_is_not_finite_is_left_out_wherever_it_comes(nonfinite):
    for place in range(3):
        w = np.zeros(BLOCK + 5)
        opt = SGD([w, np.zeros(2)], lr=1.0, accumulate=3, nonfinite=nonfinite)
        values = [1.0, 2.0, 6.0]
        values.insert(place, np.inf)
        for value in values:
            before, grads = everything(opt), [np.full(w.size, 1.0), np.full(2, 1.0)]
            grads[0][-1] = value
            if value < np.inf:
                assert opt.step(grads).skipped is False
            elif nonfinite == "skip":
                assert opt.step(grads, zero_grad=True).skipped is True
                assert differences(everything(opt), before) == []
                assert not any(grad.any() for grad in grads)
            else:
                with pytest.raises(FloatingPointError, match="gradient of parameter 0 holds"):
                    opt.step(grads)
                assert differences(everything(opt), before) == []
        assert (w[0], w[-1], opt.completed_steps) == (-1, -3, 1)


# Groups and state are tested without accumulation; what a gradient is checked for is not.
OF_GRADIENTS = [name for name in KINDS if not name.startswith("group")]


@pytest.mark.parametrize("accumulate", [2, 3])  # the call that fails updates; or only sums
def test_a_call_that_fails_leaves_every_byte_and_every_sum_as_it_was(accumulate):
    ran = 0
    for name in OF_GRADIENTS:
        spoil, error, message, where, configs, options = KINDS[name]
        for config in [c for c in ("rmsprop", "adam") if c in configs]:
            for k in {where[0], where[-1]}:
                run = Run(config, **options, accumulate=accumulate)
                names = {"key": repr(run.keys[k]), "group": run.group_number(k)}
                names["label"] = re.escape(f"parameter {run.keys[k]!r}")
                with spoil(run, k):
                    before = everything(run.opt)
                    with pytest.raises(error, match=message.format(**names)):
                        run.step(run.grads, **run.options)
                    assert differences(everything(run.opt), before) == []
                ran += 1
    assert ran > 200


def test_a_gradient_that_lies_in_a_sum_is_refused():
    for k in NOT_EMPTY:
        run = Run("adam", accumulate=2)
        run.grads[k] = run.opt._members.sums[k]
        before = everything(run.opt)
        with pytest.raises(ValueError, match=f"gradient of parameter {k} overlaps state of"):
            run.step(run.grads)
        assert differences(everything(run.opt), before) == []


# ---- copies amid the micro-batches ---------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_copies_amid_micro_batches_go_on_alike(config, calls):
    def start():
        run = Run(config, accumulate=3)  # one call
        for seed in range(calls):
            grads = make_grads(seed)
            run.step([None if j == seed else grads[j] for j in EVERY])
        return run

    run = start()
    saved = copy.deepcopy((run.opt.state_dict(), run.params))
    assert (saved[0]["accumulated"] is None) == (calls == 2)
    loaded = Run(config, accumulate=3)
    for own, kept in zip(loaded.params, saved[1], strict=True):
        own[...] = kept
    loaded.opt.load_state_dict(saved[0])
    others = [loaded.opt, copy.deepcopy(run.opt)]
    if "norm" not in str(CONFIGS[config][1]):  # summed in memory order, which a pickle may change
        others.append(pickle.loads(pickle.dumps(run.opt)))
    for opt in others:
        assert opt.accumulated_steps == run.opt.accumulated_steps == (1 + calls) % 3
    for seed in (5, 6, 7, 8):
        grads = make_grads(seed)
        run.step(grads)
        for opt in others:
            named = run.given == "dict"
            opt.step(dict(zip(run.keys, grads, strict=True)) if named else grads)
            assert contents(opt) == contents(run.opt)


def test_a_state_dict_holds_copies_of_sums_that_there_are():
    opt = SGD({"a": np.zeros(2), "b": np.zeros(3)}, accumulate=3)
    assert opt.state_dict()["accumulated"] is None
    opt.step({"a": np.ones(2), "b": None})
    saved = opt.state_dict()
    opt.step({"a": np.ones(2), "b": np.ones(3)})
    assert saved["accumulated"]["steps"] == 1
    assert {k: v.tolist() for k, v in saved["accumulated"]["sums"].items()} == {"a": [1, 1]}
    opt.load_state_dict(saved)
    assert opt._plan.summed() == [True, False]
    opt.reset()
    assert (opt.accumulated_steps, opt._plan.summed()) == (0, [False, False])


@pytest.mark.parametrize(
    ("path", "bad", "error", "message"),
    [
        ((), 3, TypeError, r" must be a dict, got int"),
        ((), {"steps": 1}, ValueError, r": missing \['sums'\]"),
        (("steps",), 0, ValueError, r"\['steps'\] must be > 0 and below .*accumulate=3, got 0"),
        (("steps",), 3, ValueError, r"\['steps'\] must be > 0 and below .*accumulate=3, got 3"),
        (("steps",), 1.0, TypeError, r"\['steps'\] must be an integer"),
        (("sums",), [np.ones(2)], TypeError, r"\['sums'\] must be a dict, got list"),
        (("sums", "c"), np.ones(2), ValueError, r"\['sums'\]: unexpected \['c'\]"),
        (("sums", "a"), np.ones(3), ValueError, r"\['sums'\]\['a'\]: shape \(3,\) is not"),
        (("sums", "a"), np.ones(2, "f4"), TypeError, r"\['sums'\]\['a'\]: dtype float32 is not"),
        (("sums", "a"), [1.0, 1.0], TypeError, r"\['sums'\]\['a'\] must be a numpy.ndarray"),
    ],
)
def test_sums_that_do_not_fit_change_nothing(path, bad, error, message):
    opt = SGD({"a": np.zeros(2), "b": np.zeros(3)}, accumulate=3)
    opt.step({"a": np.ones(2), "b": np.ones(3)})
    saved = opt.state_dict()
    inner, *keys = "accumulated", *path
    at = saved
    for key in (inner, *keys)[:-1]:
        at = at[key]
    at[(inner, *keys)[-1]] = bad
    before = everything(opt)
    with pytest.raises(error, match=r"^state_dict\['accumulated'\]" + message):
        opt.load_state_dict(saved)
    assert differences(everything(opt), before) == []


def test_a_state_amid_micro_batches_needs_an_optimizer_that_sums_as_many():
    opt = SGD([np.zeros(2)], accumulate=3)
    opt.step([np.ones(2)])
    saved = opt.state_dict()
    with pytest.raises(ValueError, match="below the optimizer's accumulate=1, got 1"):
        SGD([np.zeros(2)]).load_state_dict(saved)
    opt.reset()
    SGD([np.zeros(2)]).load_state_dict(opt.state_dict())
    opt.load_state_dict(SGD([np.zeros(2)]).state_dict())


def test_parameters_added_and_slots_switched_on_keep_the_sums():
    a, b = np.zeros(1), np.zeros(1)
    opt = SGD([a], lr=1.0, accumulate=2)
    opt.step([np.full(1, 2.0)])
    opt.add_param_group({"params": [b], "lr": 2.0})
    opt.param_groups[0]["momentum"] = 0.5
    opt.step([np.full(1, 4.0), np.full(1, 8.0)])
    assert (a[0], b[0], opt.state[0]["momentum_buffer"][0]) == (-3, -8, 3)


@pytest.mark.parametrize(
    ("bad", "error"),
    [(0, ValueError), (-2, ValueError), (2**31, ValueError)]
    + [(bad, TypeError) for bad in (2.0, "2", True, None)],
)
def test_a_bad_number_of_micro_batches_is_refused(bad, error):
    with pytest.raises(error, match=r"^accumulate must be (an integer|>= 1 and < 2\*\*31), got "):
        SGD([np.ones(1)], accumulate=bad)


# ---- what the weight decay leaves out ------------------------------------------------------------

NAMES = ["w", "b", "norm.scale", "norm.bias"]


def model():
    return {name: np.full((2, 2) if name == "w" else (2,), 8.0) for name in NAMES}


@pytest.mark.parametrize(
    ("no_decay", "out"),
    [
        (None, []),
        ([], []),
        ("b", ["b"]),
        (["*b*", "norm.s?ale"], ["b", "norm.scale", "norm.bias"]),
        ({"norm.*"}, ["norm.scale", "norm.bias"]),
        (lambda name, array: array.ndim < 2, NAMES[1:]),
        (lambda name, array: name == "w", ["w"]),
        (lambda name, array: np.bool_(True), NAMES),
    ],
)
@pytest.mark.parametrize("decoupled", [False, True])
def test_parameters_left_out_are_not_decayed(no_decay, out, decoupled):
    options = {"lr": 0.5, "weight_decay": 0.5, "decoupled_weight_decay": decoupled}
    params = model()
    opt = SGD(params, **options, no_decay=no_decay)
    for each in (copy.deepcopy(opt), opt):
        each.step({name: np.zeros_like(p) for name, p in params.items()})
        for name, p in zip(NAMES, each.params, strict=True):
            assert (p == p.flat[0]).all()
            assert (p.flat[0] == 8) == (name in out)
    assert opt.param_groups[0]["weight_decay"] == 0.5


def test_leaving_out_is_the_same_as_a_group_without_decay():
    rng = np.random.default_rng(0)
    for cls in CLASSES:
        start = [rng.standard_normal(size) for size in (5, 3, 5, 3)]
        one, two = ([p.copy() for p in start] for _ in range(2))
        by_keyword = cls(one, lr=0.1, weight_decay=0.1, no_decay=lambda i, p: i % 2 == 1)
        by_group = cls(
            [{"params": two[::2]}, {"params": two[1::2], "weight_decay": 0.0}],
            lr=0.1,
            weight_decay=0.1,
        )
        for lr in (0.1, 0.2, lambda t: 0.3):
            for group in (*by_keyword.param_groups, *by_group.param_groups):
                group["lr"] = lr
            grads = [rng.standard_normal(p.size) for p in start]
            by_keyword.step(grads)
            by_group.step(grads[::2] + grads[1::2])
            for a, b in zip(one, two, strict=True):
                assert a.tobytes() == b.tobytes()
        assert not np.array_equal(one[0], start[0])


def test_decay_changed_later_still_leaves_them_out_and_new_groups_are_looked_at():
    params = model()
    opt = SGD(params, lr=1.0, no_decay="*b*")
    opt.param_groups[0]["weight_decay"] = 0.5
    late = {"late.w": np.full(2, 8.0), "late.b": np.full(2, 8.0)}
    opt.add_param_group({"params": late, "weight_decay": 0.25})
    opt.step({name: np.zeros_like(p) for name, p in (params | late).items()})
    assert [float(p.flat[0]) for p in opt.params] == [4, 8, 4, 8, 6, 8]


@pytest.mark.parametrize(
    ("no_decay", "error", "message"),
    [
        ("bais", ValueError, "no_decay: 'bais' matches none of the names"),
        (["b", "norm"], ValueError, "no_decay: 'norm' matches none"),
        (3, TypeError, "no_decay must be a pattern of names .*; got 3"),
        ([3], TypeError, "no_decay must be a pattern of names"),
        ((name for name in NAMES), TypeError, "no_decay must be a pattern of names"),
        (lambda name, array: None, TypeError, r"no_decay\('w', ...\) must return True or False"),
        (lambda name, array: 1 // 0, ZeroDivisionError, "division"),
    ],
)
def test_a_bad_choice_of_what_is_left_out_is_refused(no_decay, error, message):
    with pytest.raises(error, match=message):
        SGD(model(), no_decay=no_decay)


def test_patterns_need_names():
    with pytest.raises(TypeError, match=r"patterns need named parameters .* function of"):
        Adam([np.ones(1)], no_decay="*bias")


def is_bias(name, array):
    return name == "b"


def test_a_choice_by_a_function_is_pickled_if_the_function_has_a_name():
    arrays = {"w": np.ones(2), "b": np.ones(2)}
    opt = SGD(arrays, lr=0.5, weight_decay=1.0, no_decay=is_bias)
    twin = pickle.loads(pickle.dumps(opt))
    twin.add_param_group({"params": {"c": np.ones(2)}})
    twin.step({name: np.zeros(2) for name in "wbc"})
    assert [float(p[0]) for p in twin.params] == [0.5, 1, 0.5]
    opt = SGD(arrays, no_decay=lambda name, array: name == "b")
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(opt)
    assert copy.deepcopy(opt).params[0][0] == 1
