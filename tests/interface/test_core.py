"""The compiled module by itself trusts no caller: not with memory, not with counts."""

import gc
import threading
import weakref

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from fastopt import SGD, Adam, _core

RULE = _core.Rule("sgd")
ROW = [0.1, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0]  # with momentum
OPTIONS = {
    "semantics": 0,
    "clip": 0,
    "clip_limit": 0.0,
    "nonfinite": 0,
    "ema_decay": 0.0,
    "num_threads": 0,
    "completed_steps": 0,
}


def arguments(**changed):
    given = {
        "rule": RULE,
        "params": [np.ones(3)],
        "slots": [(np.zeros(3),)],
        "ema": None,
        "steps": [np.zeros((), np.int64)],
        "groups": [0],
        "rows": [ROW],
        "names": ["w"],
    }
    return {**given, **changed}


def test_a_plan_steps():
    given = arguments()
    assert len(ROW) == len(RULE.hypers)
    _core.Plan(**given, **OPTIONS).step([np.ones(3)], 1.0, False)
    assert given["params"][0].tolist() == [0.9] * 3
    assert given["steps"][0] == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"slots": []}, "slots: expected 1"),
        ({"slots": [()]}, "expected 1 slots"),
        ({"slots": [(None,)]}, "momentum_buffer is missing"),
        ({"slots": [(np.zeros(4),)]}, "do not match"),
        ({"ema": []}, "ema: expected 1"),
        ({"steps": []}, "steps: expected 1"),
        ({"groups": []}, "groups: expected 1"),
        ({"groups": [1]}, "there is no group 1"),
        ({"rows": []}, "there is no group 0"),
        ({"rows": [[0.1]]}, "expected 7 hyperparameters, got 1"),
        ({"rows": [[0.1] * 1000]}, "expected 7 hyperparameters, got 1000"),
        ({"names": []}, "names: expected 1"),
        ({"sums": []}, "sums: expected 1"),
        ({"sums": [np.zeros(4)]}, "do not match"),
        ({"summed": [True, False]}, "summed: expected 1"),
        ({"accumulate": 2}, "accumulate=2: expected 1, or more and sums"),
        ({"accumulate": 0, "sums": [np.zeros(3)]}, "accumulate=0: expected 1"),
    ],
    ids=str,
)
def test_a_plan_that_does_not_add_up_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        _core.Plan(**arguments(**changed), **OPTIONS)


def test_a_row_of_another_length_or_for_a_missing_slot_is_refused():
    plan = _core.Plan(**arguments(slots=[(None,)], rows=[[0.0] * 7]), **OPTIONS)
    for row in (ROW[:-1], [*ROW, 0.0], ROW):
        with pytest.raises(ValueError, match=r"hyperparameters|missing"):
            plan.set_hypers(0, row)
    with pytest.raises(ValueError, match="hyperparameters"):
        RULE.used_slots([1.0] * 100_000)


def test_a_gradient_that_is_no_array_runs_none_of_its_own_code():
    class Sly:
        __class__ = np.float64

        def __array__(self, *args, **kwargs):
            raise AssertionError

    w = np.array(1.0)
    with pytest.raises(TypeError, match="got Sly"):
        SGD([w]).step([Sly()])
    assert w == 1


def test_a_subclass_that_lies_about_its_shape_is_taken_by_its_memory():
    class Liar(np.ndarray):
        shape = strides = property(lambda self: (_ for _ in ()).throw(AssertionError))

    w = np.ones((2, 3))
    grad = np.ones((3, 4)).view(Liar)
    for g in (grad[:2, :3], grad.T[:2, :3]):
        SGD([w]).step([g], zero_grad=True)
    with pytest.raises((ValueError, AssertionError)):
        SGD([w]).step([grad])


def test_threads_that_step_one_plan_are_refused_or_counted():
    plan = _core.Plan(
        **arguments(params=[np.ones(300_000)], slots=[(np.zeros(300_000),)]), **OPTIONS
    )
    grads, done = [np.ones(300_000)], []

    def run():
        for _ in range(50):
            try:
                plan.step(grads, 1.0, False)
                done.append(1)
            except RuntimeError as error:
                assert "from within a step" in str(error)  # noqa: PT017

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert plan.completed_steps == len(done) >= 50


def test_a_plan_keeps_no_gradient_alive_after_a_step():
    plan = _core.Plan(**arguments(), **OPTIONS)
    for size in (3, 4):
        grad = np.ones(size)
        alive = weakref.ref(grad)
        try:
            plan.step([grad], 1.0, False)
        except ValueError:
            assert size == 4
        del grad
        gc.collect()
        assert alive() is None


def test_hyperparameters_go_into_a_function_by_name():
    checks = {name: (lambda _, value: float(value), 0.0, 1.0) for name in RULE.hypers}
    options = (lambda step: step, bool, int, None)
    function = _core.FunctionalStep(RULE, checks, ("params", "grads", "m"), options, 0).function()
    row = dict(zip(RULE.hypers, ROW, strict=True))
    results = []
    for names in (row, reversed(row)):
        w, m = np.ones(3), np.ones(3)
        function(
            w, np.ones(3), m, 1, False, None, None, 0, {}, **{name: row[name] for name in names}
        )
        results.append([w.tolist(), m.tolist()])
    assert results[0] == results[1]
    w = np.ones(3)
    for wrong in ({}, {**row, "beta1": 0.9}, {**row, "lr": 0.1, "rate": 0.1}):
        with pytest.raises(TypeError, match="expected the hyperparameters"):
            function(w, np.ones(3), np.ones(3), 1, False, None, None, 0, {}, **wrong)
    with pytest.raises(TypeError, match="expected 9 arguments, got 7"):
        function(w, np.ones(3), np.ones(3), 1, False, None, None, **row)
    assert (w == 1).all()


def test_no_gradient_may_lie_in_a_step_counter():
    w = np.array(1.0)
    opt = SGD([w])
    counter = opt.state[0]["step"]
    for zero in (False, True):
        with pytest.raises(ValueError, match="overlaps state of parameter 0"):
            opt.step([counter.view(np.float64)], zero_grad=zero)
    with pytest.raises(ValueError, match="overlaps"):
        opt.add_param_group({"params": [counter.view(np.float64)]})
    assert counter == 0


def test_a_gradient_is_checked_again_when_only_its_layout_changes():
    memory = np.zeros(4)
    opt = Adam([np.ones((2, 2)), memory[1:3]])
    opt.step([as_strided(memory, (2, 2), (24, 0)), None])  # touches elements 0 and 3 only
    with pytest.raises(ValueError, match="gradient of parameter 0 overlaps parameter 1"):
        opt.step([memory.reshape(2, 2), None])


def test_a_gradient_is_checked_again_when_only_its_type_changes():
    params, grad = [np.ones(2), np.ones(2)], np.ones(2)
    opt = Adam(params)
    opt.step([grad, None])
    before = params[0].copy()
    with pytest.raises(TypeError, match="gradient of parameter 0: a masked array"):
        opt.step([np.ma.masked_array(grad, [True, False], copy=False), None])
    opt.step([None, grad])
    assert np.array_equal(params[0], before)


# ---- the limit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", _core.isa()["supported"])
def test_the_limit_touches_all_that_a_step_touches(isa):
    """Whatever is updated takes up what bits it is told to of what is read: by itself, none."""
    active = _core.isa()["active"]
    rng = np.random.default_rng(0)
    try:
        _core.select_isa(isa)
        for count in (1, 2, 3, 4):
            sizes = (0, 1, 5, 97, 4099)
            updated = [[rng.standard_normal(n) for _ in range(count)] for n in sizes]
            read = [rng.standard_normal(n) for n in sizes]
            words = [[a.view(np.uint32) for a in arrays] for arrays in updated]
            before = [g.copy() for g in read]
            for taken, args in ((0, ()), (0xFFFFFFFF, (0xFFFFFFFF,)), (0x80F0000E, (0x80F0000E,))):
                moved = [
                    [a ^ (g.view(np.uint32) & np.uint32(taken)) for a in arrays]
                    for arrays, g in zip(words, read, strict=True)
                ]
                _core.Limit(updated, read, 3 if count % 2 else 1, *args).run()
                for arrays, expected in zip(words, moved, strict=True):
                    for a, b in zip(arrays, expected, strict=True):
                        np.testing.assert_array_equal(a, b)
                for g, b in zip(read, before, strict=True):
                    np.testing.assert_array_equal(g, b)
    finally:
        _core.select_isa(active)


def test_the_limit_refuses_what_it_cannot_move():
    a, b = np.zeros(3), np.zeros(4)
    for updated, read in (([(a, b)], [a]), ([()], [a]), ([(a,) * 5], [a]), ([(a,)], [a, b])):
        with pytest.raises(ValueError):
            _core.Limit(updated, read, 1)
