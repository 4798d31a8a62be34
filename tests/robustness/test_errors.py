"""A step that fails changes nothing, and every error says what was wrong with what."""

import re

import numpy as np
import pytest
from failures import INF, KINDS, NAN
from support import (
    EVERY,
    NOT_EMPTY,
    Run,
    SparseMatrix,
    Table,
    change_in_place,
    clean_finish,
    differences,
    everything,
    finish,
)
from tables import BAD_HYPERS, CLASSES, CONFIGS

import fastopt

# ---- what is promised of all of them -------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_failed_step_leaves_every_byte_as_it_was(name):
    spoil, error, message, where, configs, options = KINDS[name]
    ran = 0
    for config in configs:
        for k in where:
            run = Run(config, **options)
            names = {"key": repr(run.keys[k]), "group": run.group_number(k)}
            names["label"] = re.escape(f"parameter {run.keys[k]!r}")
            with spoil(run, k):
                before = run.everything()
                with pytest.raises(error, match=message.format(**names)) as caught:
                    run.step(run.grads, **run.options)
                assert caught.type is error
                assert differences(run.everything(), before) == []
            assert differences(finish(run), clean_finish(config, options.get("owned", False))) == []
            ran += 1
    assert ran == len(configs) * len(where) > 0


def test_the_table_reaches_every_tensor_in_every_way():
    for k in EVERY:
        reaching = [kind for kind in KINDS.values() if k in kind.where and len(kind.where) > 2]
        assert len(reaching) >= (20 if k in NOT_EMPTY else 15)
    assert {kind.error for kind in KINDS.values()} == {
        TypeError,
        ValueError,
        FloatingPointError,
        ZeroDivisionError,
    }
    assert len(KINDS) > 190
    assert sum(len(kind.where) * len(kind.configs) for kind in KINDS.values()) > 2500


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda g: setattr(g.flags, "writeable", False), ValueError, "read-only, and zero_grad"),
        (lambda g: change_in_place(g, shape=(4100, 1)), ValueError, r"shape \(4100, 1\) is not"),
        (lambda g: change_in_place(g, dtype=np.int64), TypeError, "dtype int64 .* is not"),
        (lambda g: change_in_place(g, dtype=">f8"), TypeError, "dtype >f8 .* is not"),
        (lambda g: g.resize((9,), refcheck=False), ValueError, r"shape \(9,\) is not"),
    ],
)
def test_a_gradient_that_was_good_before_is_checked_again(spoil, error, message):
    params, grads = [np.ones(4100), np.ones(4100)], [np.ones(4100), np.full(4100, 2.0)]
    opt = fastopt.SGD(params)
    opt.step(grads, zero_grad=True)
    spoil(grads[1])
    before = everything(opt, grads)
    with pytest.raises(error, match="^gradient of parameter 1: " + message):
        opt.step(grads, zero_grad=True)
    assert differences(everything(opt, grads), before) == []


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_gradient_that_was_refused_is_not_used_by_the_next_step(order, first):
    params, grads = [np.zeros((4, 6)) for _ in range(2)], [np.ones((4, 6)) for _ in range(2)]
    opt = fastopt.SGD(params, lr=1.0)
    opt.step(grads)
    refused = [np.full((4, 6), 7.0, order=order) for _ in range(2)]
    refused[first].flags.writeable = False
    with pytest.raises(ValueError, match=f"^gradient of parameter {first}: read-only"):
        opt.step(refused, zero_grad=True)
    opt.step(grads)
    for param in params:
        np.testing.assert_array_equal(param, np.full((4, 6), -2.0))


def test_a_gradient_that_was_allowed_before_is_refused_once_it_is_to_be_zeroed():
    params = [np.ones(5), np.ones(5)]
    shared = np.ones(5)
    for grads, text in [
        ([params[0], shared], "gradient of parameter 0 overlaps parameter 0 .*zero_grad"),
        ([shared, shared], "gradients of parameter 0 and parameter 1 share memory"),
    ]:
        opt = fastopt.SGD(params)
        opt.step(grads)
        opt.step(grads)
        before = everything(opt, grads)
        with pytest.raises(ValueError, match=text):
            opt.step(grads, zero_grad=True)
        assert differences(everything(opt, grads), before) == []


def test_an_error_of_the_gradients_own_iterator_is_passed_on():
    class Broken:
        def __iter__(self):
            raise TypeError("of one's own")

    w = np.ones(2)
    with pytest.raises(TypeError, match=r"^of one's own$"):
        fastopt.SGD([w]).step(Broken())
    assert w.tolist() == [1, 1]


def test_a_gradient_that_overlaps_is_found_beside_empty_parameters():
    memory = np.zeros(40)
    params = [memory[:10], memory[3:3], memory[32:34], memory[34:36]]
    opt = fastopt.SGD(params)
    with pytest.raises(ValueError, match="gradient of parameter 2 overlaps parameter 0"):
        opt.step([np.ones(10), memory[3:3], memory[5:7], np.ones(2)])
    assert not memory.any()


def test_a_gradient_that_runs_backwards_is_found_to_overlap():
    memory = np.zeros(10)
    opt = fastopt.SGD([memory[:2], np.ones((2, 2))])
    for grad in (memory[4::-1][1:].reshape(2, 2), memory[7::-2].reshape(2, 2)[:, ::-1]):
        with pytest.raises(ValueError, match="gradient of parameter 1 overlaps parameter 0"):
            opt.step([np.ones(2), grad])
    assert not memory.any()
    opt.step([np.ones(2), memory[9:1:-2].reshape(2, 2)])
    assert opt.params[1].tolist() == [[1, 1], [1, 1]]


def test_a_change_refused_because_of_another_group_leaves_no_trace():
    a, b = np.zeros(1), np.zeros(1)
    opt = fastopt.SGD([{"params": a}, {"params": b}], lr=1)
    before = [dict(group) for group in opt.param_groups]
    opt.param_groups[0]["lr"], opt.param_groups[1]["lr"] = 8, -8
    with pytest.raises(ValueError, match=r"param_groups\[1\]: lr must be >= 0, got -8"):
        opt.step([np.ones(1)] * 2)
    for group, old in zip(opt.param_groups, before, strict=True):
        group.update(old)
    opt.step([np.ones(1)] * 2)
    assert (a[0], b[0]) == (-1, -1)


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_skipped_step_leaves_everything_but_zeroes_the_gradients_if_asked(config, zero_grad):
    ran = 0
    for k in NOT_EMPTY:
        for index, value in ((0, NAN), (-1, INF), (-1, -INF), (0, NAN)):
            run = Run(config, nonfinite="skip")
            run.grads[k].flat[index] = value
            before = run.everything()
            result = run.step(run.grads, zero_grad=zero_grad)
            assert result.skipped is True
            after = run.everything()
            if zero_grad:
                assert sorted(differences(after, before)) == [f"grad {j}" for j in NOT_EMPTY]
                for grad in run.grads:
                    assert not any(grad.tobytes())  # +0.0 everywhere
            else:
                assert differences(after, before) == []
            assert differences(finish(run), clean_finish(config, False)) == []
            ran += 1
    assert ran == 4 * len(NOT_EMPTY)


# ---- the constructor, and groups added later -----------------------------------------------------


def hyper_cases():
    for cls in CLASSES:
        own = cls([np.ones(1)]).param_groups[0]
        for name in own.keys() & BAD_HYPERS.keys():
            for bad, error, text in BAD_HYPERS[name]:
                yield cls, name, bad, error, text.format(name)


def test_every_bad_hyperparameter_is_refused_wherever_it_is_given():
    ran, names = 0, set()
    for cls, name, bad, error, text in hyper_cases():
        w = np.ones(3)
        with pytest.raises(error, match="^" + text):
            cls([w], **{name: bad})
        with pytest.raises(error, match=r"^param_groups\[1\]: " + text):
            cls([{"params": [w]}, {"params": [np.ones(2)], name: bad}])
        opt = cls([w])
        before = everything(opt)
        with pytest.raises(error, match=r"^param_groups\[1\]: " + text):
            opt.add_param_group({"params": [np.ones(2)], name: bad})
        assert differences(everything(opt), before) == []
        ran += 1
        names.add((cls, name))
    assert ran > 240
    for cls in CLASSES:
        every = cls([w]).param_groups[0].keys() - {"params"}
        assert {name for of, name in names if of is cls} == every


def overlapping():
    memory = np.zeros(12)
    return memory[:8], memory[7:]


def frozen(array):
    array.flags.writeable = False
    return array


SOME = np.ones(3)
EXPECTED = "params must be a list, tuple or generator of arrays"
ARRAY = "^parameter 1: expected a numpy.ndarray, got "
MAKE = r"; give numpy\.asarray\(\.\.\.\), and keep that: it is what will be updated$"
SINGLE = r"; of a single array, \[array\]$"
HINT = r"; for named parameters give dict\(\.\.\.\); a parameter group is a dict with 'params'$"
MODELS = (
    r"; in a list, a dict with 'params' is a parameter group, and a list of models that are such "
    r"dicts is given as \[{'params': models}\]$"
)
DTYPE = (
    "^parameter 1: dtype .* is not supported; "
    r"use float32, float64, bfloat16 \(of ml_dtypes\) or float16 in native byte order"
)
PARAMS = [
    (np.ones(3), TypeError, EXPECTED + ".* got ndarray" + SINGLE),
    (Table(np.ones((2, 2))), TypeError, EXPECTED + ".* got Table" + SINGLE),
    (np.float64(1), TypeError, EXPECTED),
    ("abc", TypeError, EXPECTED + ".* got str"),
    ({1.0, 2.0}, TypeError, EXPECTED + ".* got set"),
    (frozenset(), TypeError, EXPECTED + ".* got frozenset"),
    (None, TypeError, EXPECTED + ".* got NoneType"),
    (3, TypeError, EXPECTED + ".* got int$"),
    ([], ValueError, "^no parameters"),
    ({}, ValueError, "^no parameters"),
    (iter(()), ValueError, "^no parameters"),
    ([{"params": []}, {"params": ()}], ValueError, "^no parameters"),
    ([{"params": [SOME]}, {"lr": 0.1}], ValueError, r"^param_groups\[1\] has no 'params'"),
    ([SOME, {"params": [np.ones(2)]}], TypeError, "mixes arrays and parameter groups"),
    ([{"params": "abc"}], TypeError, "'params' of a group must be a list .* got str"),
    ([{"params": {1.0}}], TypeError, "'params' of a group must be a list .* got set"),
    ([{"params": 3}], TypeError, "'params' of a group must be a list .* got int"),
    ([{"params": [SOME], "beta": 1}], ValueError, r"param_groups\[0\]: unknown options \['beta'\]"),
    ([{"params": [SOME], "beta": 1}], ValueError, r"unknown options .*; \w+ has \[[^]]*\]$"),
    (
        [{"params": {"w": SOME}, "batch": {"n": np.ones(2)}}, {"params": {"w": np.ones(2)}}],
        ValueError,
        r"^param_groups\[0\]: unknown options \['batch'\]; .* has .*\]" + MODELS,
    ),
    (
        [{"params": SOME, "x": np.ones(2)}],
        ValueError,
        r"^param_groups\[0\]: unk.*\['x'\].*" + MODELS,
    ),
    ([("w", SOME), ("b", np.ones(2))], TypeError, "^parameter '0.0': expected .* got str" + HINT),
    ({"w": SOME}.items(), TypeError, "^parameter '0.0': expected .* got str" + HINT),
    ([{"params": [("w", SOME)]}], TypeError, "^parameter '0.0': expected .* got str" + HINT),
    ([{"parms": [SOME], "lr": 0.1}], TypeError, "^parameter '0.lr': .* got float" + HINT),
    ([{"parms": [SOME], "lr": np.float32(1)}], TypeError, "'0.lr': .* got float32" + HINT),
    ([{"parms": [SOME], "lr": abs}], TypeError, "'0.lr': .* got builtin_function.*" + HINT),
    ({"a": (SOME, {"b": 1})}, TypeError, "^parameter 'a.1.b': expected .* got int" + MAKE),
    ([{"params": {"a": SOME}}, {"params": [np.ones(2)]}], ValueError, "all .* groups name their"),
    ([{"params": {"a": SOME}}, {"params": {"a": np.ones(2)}}], ValueError, r"occur twice: \['a'\]"),
    ([SOME, 1.0], TypeError, ARRAY + "float" + MAKE),
    ([SOME, None], TypeError, ARRAY + "NoneType$"),
    ([SOME, "abc"], TypeError, ARRAY + "str$"),
    # A list of numbers was meant to be an array: there is no "parameter '1.0'".
    ([SOME, [1.0, 2.0]], TypeError, ARRAY + "list" + MAKE),
    ([SOME, (1, np.float32(2))], TypeError, ARRAY + "tuple" + MAKE),
    ({"w": [1.0, 2.0]}, TypeError, "^parameter 'w': expected a numpy.ndarray, got list" + MAKE),
    ([[SOME, [1.0, 2.0]]], TypeError, "^parameter '0.1': expected .* got list" + MAKE),
    ([{"params": [[1.0, 2.0]]}], TypeError, "^parameter 0: expected .* got list" + MAKE),
    ([1.0, 2.0], TypeError, "^parameter 0: expected a numpy.ndarray, got float" + MAKE),
    ([SOME, Table(np.ones((2, 2)))], TypeError, ARRAY + "Table" + MAKE),
    ([SOME, Table(np.array(["x"]))], TypeError, ARRAY + "Table$"),
    ([{"params": Table(np.ones(2))}], TypeError, "^parameter 0: .* got Table" + MAKE),
    ([[SOME], Table(np.ones(2))], TypeError, "^parameter '1': .* got Table" + MAKE),
    ([SOME, SparseMatrix()], TypeError, ARRAY + r"SparseMatrix; give its \.toarray\(\), and keep"),
    ({"a": (SOME, {"b": 1})}, TypeError, r"^parameter 'a\.1\.b': expected .* got int"),
    ({"a": {"b": SOME}, "a.b": np.ones(2)}, ValueError, r"occur twice: \['a\.b'\]"),
    ([{"params": [[SOME]]}, {"params": [[np.ones(2)]]}], ValueError, "are nested need dicts"),
    (memoryview(np.ones(2)), TypeError, EXPECTED + ".* got memoryview"),
    ([SOME, b"12345678"], TypeError, "^parameter 1: dtype uint8"),
    ([SOME, memoryview(bytes(8)).cast("d")], ValueError, "^parameter 1: the array is read-only"),
    ([SOME, np.float64(1)], TypeError, ARRAY + "float64"),
    *(
        ([SOME, np.zeros(2, dtype)], TypeError, DTYPE)
        for dtype in (
            "i8",
            "i4",
            "u2",
            ">f2",
            "?",
            "g",
            "c8",
            "c16",
            "O",
            ">f4",
            ">f8",
            "f4,f8",
            "U3",
        )
    ),
    ([SOME, frozen(np.ones(2))], ValueError, "^parameter 1: the array is read-only"),
    ([SOME, np.broadcast_to(1.0, (4,))], ValueError, "^parameter 1: the array is read-only"),
    (
        [SOME, np.ones(6)[::2]],
        ValueError,
        r"^parameter 1: the array is not dense .*strides \(16,\)",
    ),
    ([SOME, np.ones(6)[::-1]], ValueError, "^parameter 1: the array is not dense"),
    ([SOME, np.ones((3, 4))[:, :3]], ValueError, "^parameter 1: the array is not dense"),
    ({"a": SOME, "b": np.ones((3, 4)).T[1:]}, ValueError, "^parameter 'b': the array is not dense"),
    (
        [SOME, np.lib.stride_tricks.as_strided(np.ones(4), (3, 2), (8, 8))],
        ValueError,
        "^parameter 1: the array is not dense",
    ),
    ([SOME, np.ones(2), SOME], ValueError, "^parameter 2 overlaps parameter 0 in memory"),
    ({"a": SOME, "b": SOME}, ValueError, "^parameter 'b' overlaps parameter 'a' in memory"),
    ([{"params": SOME}, {"params": SOME.reshape(3, 1)}], ValueError, "^parameter 1 overlaps"),
    (overlapping(), ValueError, "^parameter 1 overlaps parameter 0 in memory"),
    (overlapping()[::-1], ValueError, "^parameter 1 overlaps parameter 0 in memory"),
    ([SOME[:2], SOME[1:1], SOME[1:]], ValueError, "^parameter 2 overlaps parameter 0 in memory"),
    ([SOME, SOME[1:].view(np.float32)], ValueError, "^parameter 1 overlaps parameter 0"),
]


def test_models_that_look_like_groups_train_when_they_are_given_as_said():
    models = [{"params": np.zeros(2), "batch": [np.zeros(3)]}, {"params": np.zeros(1)}]
    opt = fastopt.SGD([{"params": models}], lr=1.0)
    opt.step([{"params": np.ones(2), "batch": [None]}, {"params": np.ones(1)}])
    assert [p.tolist() for p in opt.params] == [[-1, -1], [0, 0, 0], [-1]]
    assert list(opt.state_dict()["state"]) == ["0.params", "0.batch.0", "1.params"]


@pytest.mark.parametrize("case", range(len(PARAMS)), ids=lambda i: PARAMS[i][2][:50])
def test_bad_parameters_are_refused(case):
    given, error, message = PARAMS[case]
    for cls in CLASSES:
        with pytest.raises(error, match=message):
            cls(given)
    assert SOME.tolist() == [1, 1, 1]


POSITIVE = [(0, ValueError), (-1.0, ValueError), (NAN, ValueError), ("1", TypeError)]
THREADS = [(0, ValueError), (-1, ValueError), (1025, ValueError), (10**30, ValueError)]
THREADS += [(x, TypeError) for x in (2.0, "2", True, np.ones(1))]
OPTIONS = [
    *(
        (name, bad, error, f"^{name} must be (> 0|a real number), got ")
        for name in ("clip_value", "clip_norm", "global_clip_norm")
        for bad, error in [*POSITIVE, (True, TypeError)]
    ),
    *(
        ("ema_decay", bad, error, "^ema_decay must be .*, got ")
        for bad, error in [(-0.1, ValueError), (1.0001, ValueError), *POSITIVE[2:]]
    ),
    *(
        ("num_threads", bad, error, "^num_threads must be (an integer|between 1 and 1024), got ")
        for bad, error in THREADS
    ),
    ("semantics", "tf", ValueError, "^semantics must be one of 'torch', 'keras', got 'tf'"),
    ("semantics", None, TypeError, "^semantics must be a string, got None"),
    ("nonfinite", "ignore", ValueError, "^nonfinite must be one of 'propagate', 'skip', 'raise'"),
    ("nonfinite", True, TypeError, "^nonfinite must be a string, got True"),
    ("foreach", True, TypeError, "unexpected keyword argument 'foreach'"),
]


def test_bad_options_are_refused():
    ran = 0
    for name, bad, error, message in OPTIONS:
        for cls in CLASSES:
            with pytest.raises(error, match=message):
                cls([np.ones(3)], **{name: bad})
            ran += 1
    for names in (["clip_value", "clip_norm"], ["clip_norm", "global_clip_norm"]):
        for cls in CLASSES:
            with pytest.raises(ValueError, match=f"^at most one of .*{names[0]}.*{names[1]}"):
                cls([np.ones(3)], **dict.fromkeys(names, 1.0))
            ran += 1
    assert ran == (len(OPTIONS) + 2) * len(CLASSES)


def test_nesterov_without_momentum_is_an_error_under_torch_semantics_only():
    for kwargs in ({}, {"momentum": 0.9, "dampening": 0.1}, {"dampening": -1.0}):
        with pytest.raises(ValueError, match=r"^nesterov=True needs momentum > 0"):
            fastopt.SGD([np.ones(1)], nesterov=True, **kwargs)
    with pytest.raises(ValueError, match=r"^param_groups\[0\]: nesterov=True needs momentum > 0"):
        fastopt.SGD([{"params": [np.ones(1)], "nesterov": True}])
    opt = fastopt.SGD([np.ones(1)], nesterov=True, semantics="keras")
    assert opt.param_groups[0]["nesterov"] is True


def test_a_group_that_cannot_be_added_changes_nothing():
    for config in CONFIGS:
        run, ran = Run(config), 0
        good = {"new": np.ones(2)} if run.given == "dict" else [np.ones(2)]
        clash = {"w1": np.ones(2)} if run.given == "dict" else [run.params[1]]
        before = run.everything()
        for group, error, message in [
            ([np.ones(2)], TypeError, "a parameter group must be a dict, got list"),
            ({"lr": 0.1}, ValueError, "has no 'params'"),
            ({"params": good, "speed": 1}, ValueError, r"unknown options \['speed'\]"),
            ({"params": clash}, ValueError, "occur twice|overlaps parameter 1"),
            ({"params": [*run.params[4:5]]}, ValueError, "overlaps parameter 4|name their"),
            ({"params": [run.slot(4)]}, ValueError, "overlaps|name their"),
            ({"params": good, "lr": lambda t: fail_late()}, OverflowError, "^late$"),
        ]:
            with pytest.raises(error, match=message):
                run.opt.add_param_group(group)
            assert differences(run.everything(), before) == []
            ran += 1
        assert differences(finish(run), clean_finish(config, False)) == []
        assert ran == 7


def fail_late():
    raise OverflowError("late")


# ---- learning rates that meddle ------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"lr": lambda steps: 0.5}, {"betas": [0.5, 0.75]}])
def test_groups_that_are_looked_at_in_each_step_cannot_be_replaced_by_none(options):
    w = np.ones(3)
    opt = fastopt.Adam([w], **options)
    opt.step([np.ones(3)])
    before = w.copy()
    opt.param_groups = []
    with pytest.raises(ValueError, match=r"^param_groups was replaced"):
        opt.step([np.ones(3)])
    np.testing.assert_array_equal(w, before)


@pytest.mark.parametrize(
    ("what", "meddle"),
    [
        ("add_param_group", lambda opt, saved: opt.add_param_group({"params": [np.ones(2)]})),
        ("step", lambda opt, saved: opt.step([np.ones(3)])),
        ("load_state_dict", lambda opt, saved: opt.load_state_dict(saved)),
        ("reset", lambda opt, saved: opt.reset()),
    ],
)
@pytest.mark.parametrize("changed", [False, True])
def test_a_learning_rate_cannot_change_its_own_optimizer(what, meddle, changed):
    meddling = False

    def rate(steps):
        if meddling:
            opt.state_dict()  # to look is allowed
            meddle(opt, saved)
        return 0.5

    opt = fastopt.SGD([np.ones(3)], lr=rate, momentum=0.9)
    saved = opt.state_dict()
    opt.step([np.ones(3)])
    if changed:
        opt.param_groups[0]["momentum"] = 0.5
    before, meddling = everything(opt), True
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"^{what}\(\) was called by a learning rate of"):
            opt.step([np.ones(3)])
        assert differences(everything(opt), before) == []
    meddling = False
    opt.step([np.ones(3)])
    meddle(opt, saved)
