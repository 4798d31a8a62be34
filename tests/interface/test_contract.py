"""What the constructor and the step promise, apart from bits and errors.

Most expected values here are small numbers that are exact in binary.
"""

import inspect
import math
import pickle
import pydoc

import numpy as np
import pytest
from support import (
    EVERY,
    Run,
    differences,
    everything,
    finish,
    make_grads,
    make_owned_params,
)
from tables import CLASSES, COMMON, CONFIGS, PAIRS, ROWS

import fastopt
from fastopt import SGD, Adam, RMSprop, _core, functional
from fastopt._settings import Options


def one_step(cls, start, grad, **options):
    """Return a 1-d parameter after one step."""
    w = np.array(start)
    cls([w], **options).step([np.array(grad)])
    return w.tolist()


# ---- the constructor -----------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_names_order_and_defaults_are_as_documented(row):
    cls = row.cls
    positional = {name: default for name, (default, _) in row.hypers.items()}
    keyword_only = COMMON | {name: default for name, (default, _) in row.keywords.items()}
    keyword_only = {k: v for k, v in keyword_only.items() if k not in positional}
    shown = inspect.signature(cls).parameters.values()
    by_position = {p.name: p.default for p in shown if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(by_position) == ["params", *positional]
    assert by_position == {"params": inspect.Parameter.empty, **positional}
    by_name = {p.name: p.default for p in shown if p.kind is p.KEYWORD_ONLY}
    assert by_name == keyword_only
    first, *others = Options.__annotations__
    own = [name for name in by_name if name not in Options.__annotations__]
    assert list(by_name) == [first, *own, *others]
    with pytest.raises(TypeError, match="positional argument"):
        cls([np.ones(1)], *positional.values(), "torch")
    for semantics in ("torch", "keras"):  # which never changes defaults
        (group,) = cls([np.ones(1)], semantics=semantics).param_groups
        assert group.keys() == {"params", *row.defaults}
        assert {**positional, **keyword_only, **group} == {
            **positional,
            **keyword_only,
            "params": group["params"],
        }


@pytest.mark.parametrize("cls", CLASSES)
def test_the_constructor_itself_shows_every_option_too(cls):
    shown = inspect.signature(cls.__init__)
    assert list(shown.parameters) == ["self", *inspect.signature(cls).parameters]
    assert str(shown) in pydoc.plain(pydoc.render_doc(cls.__init__))
    assert (
        Options.__annotations__.keys()
        == COMMON.keys() - {"maximize", "decoupled_weight_decay"}
        < shown.parameters.keys()
    )


@pytest.mark.parametrize("cls", CLASSES)
def test_an_option_that_a_class_does_not_have_is_refused_as_python_refuses_it(cls):
    message = rf"^{cls.__name__}\.__init__\(\) got an unexpected keyword argument 'foreach'$"
    with pytest.raises(TypeError, match=message):
        cls([np.ones(1)], accumulate=2, foreach=True, fused=True)


def test_the_step_takes_two_options_by_name():
    shown = inspect.signature(SGD.step).parameters.values()
    assert [(p.name, p.default) for p in shown if p.kind is p.KEYWORD_ONLY] == [
        ("loss_scale", 1.0),
        ("zero_grad", False),
    ]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_option_is_accepted_by_every_class(cls):
    for name, value in {
        **COMMON,
        "clip_value": 1,
        "clip_norm": np.float32(1),
        "global_clip_norm": math.inf,
        "nonfinite": "skip",
        "ema_decay": 1,
        "accumulate": np.int64(2),
        "no_decay": lambda key, array: array.ndim < 2,
        "rows": "exact",
        "num_threads": np.int64(1),
        "lr": 0,
        "weight_decay": 3,
    }.items():
        w = np.ones(3)
        assert cls([w], **{name: value}).step([np.ones(3)]).skipped is False


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_ranges_are_as_documented(row):
    expected = {k: v for k, v in row.ranges.items() if k not in row.starts.values()}
    for option in PAIRS.keys() & expected.keys():
        del expected[option]
        expected |= PAIRS[option]
    np.testing.assert_equal(row.cls._rule.ranges, expected)


def test_ranges_are_torchs():
    assert one_step(SGD, [1.0], [1.0], lr=2, momentum=7.5) == [-1.0]
    assert one_step(SGD, [1.0], [1.0], lr=math.inf) == [-math.inf]
    RMSprop([np.ones(1)], alpha=3, eps=0, momentum=2)
    Adam([np.ones(1)], betas=(0, 0), eps=0)
    Adam([np.ones(1)], betas=[0.5, np.float32(0.5)])
    SGD([np.ones(1)], dampening=-2.0, momentum=1)


def test_parameters_may_come_as_a_list_a_tuple_a_generator_a_dict_or_groups():
    want = None
    for wrap in (
        list,
        tuple,
        iter,
        lambda p: (a for a in p),
        lambda p: {f"w{i}": a for i, a in enumerate(p)},
        lambda p: [{"params": p[:2]}, {"params": tuple(p[2:])}],
        lambda p: ({"params": a} for a in p),
        lambda p: [{"params": p}, {"params": []}, {"params": []}],
    ):
        params = make_owned_params()
        opt = Adam(wrap(params), lr=0.5)
        named = opt.state_dict()["param_groups"][0]["params"][0] == "w0"
        for seed in (1, 2):
            grads = make_grads(seed)
            opt.step({f"w{k}": grads[k] for k in reversed(EVERY)} if named else grads)
        assert all(a is b for a, b in zip(opt.params, params, strict=True))
        got = [p.tobytes() for p in params]
        want = want or got
        assert got == want != [p.tobytes() for p in make_owned_params()]


def test_gradients_may_come_as_any_sequence_or_iterable():
    want = None
    for wrap in (
        list,
        tuple,
        iter,
        lambda g: (a for a in g),
        lambda g: dict(enumerate(g)).values(),
    ):
        run = Run("adam")
        run.opt.step(wrap(make_grads(2)))
        got = everything(run.opt)
        assert differences(got, want := want or got) == []
    for wrap in (dict, lambda g: dict(reversed(g.items()))):
        run = Run("rmsprop")
        run.step(make_grads(3), wrap)
        assert differences(everything(run.opt), finish(Run("rmsprop"))) == []


# ---- counters, schedules and results -------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_a_gradient_of_none_leaves_out_its_parameter(config):
    for k in EVERY:
        run, full = Run(config), Run(config)
        before = run.everything()
        grads = make_grads(2)
        run.step([grads[j] if j != k else None for j in EVERY])
        full.step(grads)
        own = {f"param {k}", *(f"state {k} {name}" for name in run.opt.state[k])}
        assert own & {*differences(run.everything(), before)} <= {"param 0"}  # holds the arena
        np.testing.assert_array_equal(run.params[k], Run(config).params[k])
        assert [int(s["step"]) for s in run.opt.state] == [2 - (j == k) for j in EVERY]
        assert run.opt.completed_steps == full.opt.completed_steps == 2
        if "norm" not in str(CONFIGS[config][1]):
            others = [j for j in EVERY if j != k]
            assert all((run.params[j] == full.params[j]).all() for j in others)


def test_a_step_without_any_gradient_counts_and_updates_nothing():
    w = np.ones(3)
    opt = Adam([w], weight_decay=0.1)
    assert opt.step([None]).skipped is False
    assert w.tolist() == [1, 1, 1]
    assert (opt.completed_steps, int(opt.state[0]["step"])) == (1, 0)


def test_completed_steps_counts_what_was_not_skipped_and_is_saved():
    opt = SGD([np.ones(2)], nonfinite="skip")
    for value in (1.0, math.nan, 1.0, math.inf):
        opt.step([np.full(2, value)])
    assert opt.completed_steps == opt.state_dict()["completed_steps"] == 2


def test_the_learning_rate_may_be_any_function_of_completed_steps():
    asked = []

    def schedule(steps):
        asked.append(steps)
        return [np.float32(1), 2, np.array(4, np.float32), np.float64(8)][steps]

    a, b = np.zeros(1), np.zeros(1)
    opt = SGD([{"params": [a], "lr": schedule}, {"params": [b]}], lr=0.5, nonfinite="skip")
    seen = []
    for value in (1.0, 1.0, math.nan, 1.0, 1.0):
        del asked[:]
        opt.step([np.array([value])] * 2)
        seen.append((a[0], b[0], {*asked}))
    assert seen == [
        (-1, -0.5, {0}),
        (-3, -1, {1}),
        (-3, -1, {2}),
        (-7, -1.5, {2}),
        (-15, -2, {3}),
    ]
    opt.param_groups[0]["lr"] = lambda steps: 100.0 * steps
    opt.step([np.ones(1), None])
    assert (a[0], b[0]) == (-415, -2)


def trained(opt, steps=3):
    for k in range(steps):
        opt.step([np.full(4, k + 0.5)])
    return opt.params[0].tolist()


@pytest.mark.parametrize(
    "betas", [[0.5, 0.75], np.array([0.5, 0.75]), (np.array(0.5), np.float32(0.75))]
)
def test_hyperparameters_may_be_arrays(betas):
    """An array of no axes is a number, one of two elements a pair."""
    expected = trained(Adam([np.ones(4)], lr=0.25, betas=(0.5, 0.75), eps=0.125))
    options = {"lr": np.array(0.25), "betas": betas, "eps": np.array(0.125, np.float32)}
    assert trained(Adam([np.ones(4)], **options)) == expected
    assert trained(Adam([{"params": [np.ones(4)], **options}])) == expected
    opt = Adam([np.ones(4)])
    opt.param_groups[0].update(options)
    assert trained(opt) == expected
    w, m, v = np.ones(4), np.zeros(4), np.zeros(4)
    for k in range(3):
        functional.adam(w, np.full(4, k + 0.5), m, v, step=np.array(k + 1), **options)
    assert w.tolist() == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda group: group["lr"].__setitem__((), 1.0),
        lambda group: group["betas"].__setitem__(0, 0.5),
        lambda group: group["weight_decay"].__setitem__((), 1.0),
    ],
    ids=["lr", "betas", "weight_decay"],
)
def test_a_hyperparameter_that_changes_in_place_takes_effect_at_the_next_step(change):
    opts = [
        Adam([np.ones(4)], lr=np.array(0.5), betas=betas, weight_decay=np.array(0.0))
        for betas in (np.array([0.25, 0.75]), [0.25, 0.75], np.array([0.25, 0.75]))
    ]
    for opt in opts:
        trained(opt)
    for opt in opts[:2]:
        change(opt.param_groups[0])
    ours, other, unchanged = map(trained, opts)
    assert ours == other != unchanged


def test_what_is_saved_of_a_hyperparameter_that_is_an_array_is_no_array(tmp_path):
    options = {"lr": np.array(0.25), "betas": np.array([0.5, 0.75]), "eps": np.array(0.5)}
    numbers = {"lr": 0.25, "betas": (0.5, 0.75), "eps": 0.5}
    opt = Adam([np.ones(4)], **options)
    trained(opt)
    saved = opt.state_dict()
    opt.save(tmp_path / "run")
    for name, array in options.items():
        assert saved["param_groups"][0][name] == numbers[name]
        array[...] = 0.125
    for load in ("state", "file"):
        other = Adam([np.ones(4)])
        if load == "state":
            other.load_state_dict(saved)
        else:
            other.load(tmp_path / "run")
        assert {name: other.param_groups[0][name] for name in numbers} == numbers


@pytest.mark.parametrize("cls", CLASSES)
def test_a_class_is_known_by_where_users_find_it(cls):
    assert f"{cls.__module__}.{cls.__qualname__}" == f"fastopt.{cls.__name__}"
    assert pickle.loads(pickle.dumps(cls)) is cls is getattr(fastopt, cls.__name__)
    # As a module, it would be "not callable", which does not tell what was meant.
    assert not hasattr(fastopt, cls.__name__.lower())


@pytest.mark.parametrize("semantics", ["torch", "keras"])
def test_the_norm_is_of_all_unscaled_gradients_before_clipping_and_only_where_needed(semantics):
    params = [np.zeros(2), np.zeros((1, 2), np.float32), np.zeros(())]
    grads = [np.array([6.0, 0.0]), np.array([[0.0, 8.0]], np.float32), np.array(math.nan)]
    for clip in ("clip_norm", "global_clip_norm"):
        opt = SGD(params, semantics=semantics, **{clip: 1e-3})
        assert opt.step([*grads[:2], None], loss_scale=2.0).grad_norm == 5.0
        assert math.isnan(opt.step(grads).grad_norm)
        assert opt.step([None] * 3).grad_norm == 0
    for options in ({}, {"clip_value": 1.0}, {"nonfinite": "skip"}, {"ema_decay": 0.5}):
        assert SGD(params, **options).step(grads).grad_norm is None


@pytest.mark.skipif("openmp" not in _core.layers()["available"], reason="a build without OpenMP")
def test_openmps_threads_are_as_many_in_every_step_that_is_not_small():
    _core.select_layer("openmp")
    for size, threads in ((100, 1), (1 << 14, 5), (1 << 18, 5)):
        opt = SGD([np.zeros(size)], num_threads=5)
        assert {opt.step([np.ones(size)]).threads for _ in range(3)} == {threads}


def test_threads_are_bounded_and_reported():
    big, small = np.zeros(1 << 16, np.float32), np.zeros(10)
    grad = big.copy()
    for bound in (1, 2, 3):
        opt = SGD([big], num_threads=bound)
        assert {opt.step([grad]).threads for _ in range(300)} <= {*range(1, bound + 1)}
        try:
            _core.force_threads(-1)
            result = opt.step([grad])
        finally:
            _core.force_threads(0)
        assert result.threads == bound
        assert SGD([small], num_threads=bound).step([np.ones(10)]).threads == 1
    assert repr(result) == f"StepResult(grad_norm=None, skipped=False, threads={result.threads})"


# ---- what is done to a gradient, in which order --------------------------------------------------


@pytest.mark.parametrize("semantics", ["torch", "keras"])
@pytest.mark.parametrize(
    ("options", "after"),
    [
        ({}, 8 - 4),
        ({"clip_value": 1}, 8 - 1),
        ({"clip_value": 1, "maximize": True}, 8 + 1),
        ({"clip_value": 1, "weight_decay": 0.5}, 8 - (1 + 4)),
        ({"clip_value": 1, "weight_decay": 0.5, "maximize": True}, 8 - (-1 + 4)),
        ({"weight_decay": 0.5, "decoupled_weight_decay": True}, 8 * 0.5 - 4),
        ({"weight_decay": 0.5, "decoupled_weight_decay": True, "maximize": True}, 8 * 0.5 + 4),
        ({"clip_norm": 8, "maximize": True}, 8 + 4),
    ],
)
def test_scale_then_clip_then_sign_then_decay_then_update_then_average(options, after, semantics):
    for dtype in (np.float32, np.float64):
        w, g = np.array([8.0], dtype), np.array([64.0], dtype)
        opt = SGD([w], lr=1, semantics=semantics, ema_decay=0.5, **options)
        opt.step([g], loss_scale=16, zero_grad=True)
        assert (w[0], opt.ema[0][0], g[0]) == (after, after, 0)


@pytest.mark.parametrize(
    ("semantics", "clip", "limit", "factors"),
    [
        ("torch", "clip_norm", 1.0, [1 / (5 + 1e-6), 1 / (10 + 1e-6)]),
        ("torch", "clip_norm", 5.0, [5 / (5 + 1e-6), 5 / (10 + 1e-6)]),
        ("torch", "clip_norm", 20.0, [1, 1]),
        ("keras", "clip_norm", 1.0, [1 / 5, 1 / 10]),
        ("keras", "clip_norm", 5.0, [1, 5 / 10]),
        ("torch", "global_clip_norm", 1.0, [1 / (math.sqrt(125) + 1e-6)] * 2),
        ("torch", "global_clip_norm", 12.0, [1, 1]),
        ("keras", "global_clip_norm", 1.0, [1 / math.sqrt(125)] * 2),
        ("keras", "global_clip_norm", 12.0, [1, 1]),
        # Not 1, and not limit / norm: Keras multiplies reciprocals.
        ("keras", "global_clip_norm", 49.0, [49 * (1 / 49)] * 2),
        ("keras", "global_clip_norm", 6.0, [6 * (1 / math.sqrt(125))] * 2),
    ],
)
def test_clipping_by_norm_is_torchs_or_kerass(semantics, clip, limit, factors):
    params = [np.zeros(2), np.zeros((2, 1))]
    grads = [np.array([3.0, -4.0]), np.array([[6.0], [8.0]])]
    SGD(params, lr=1, semantics=semantics, **{clip: limit}).step(grads)
    for w, g, factor in zip(params, grads, factors, strict=True):
        assert (w == -(factor * g)).all()


def test_clipping_by_value_bounds_each_element():
    got = one_step(SGD, [0.0] * 6, [3.0, -3.0, 0.5, -0.0, math.inf, -math.inf], lr=1, clip_value=2)
    assert got == [-2, 2, -0.5, 0, -2, 2]


@pytest.mark.parametrize("semantics", ["torch", "keras"])
def test_a_nan_norm_makes_its_gradients_nan(semantics):
    for clip, spread in (("clip_norm", False), ("global_clip_norm", True)):
        params = [np.zeros(3), np.zeros(2)]
        grads = [np.array([1.0, math.nan, 1.0]), np.ones(2)]
        SGD(params, semantics=semantics, **{clip: 1.0}).step(grads)
        assert np.isnan(params[0]).all()
        assert np.isnan(params[1]).all() == spread == np.isnan(params[1]).any()


@pytest.mark.parametrize("gradient", [math.inf, -math.inf, 1e200])
@pytest.mark.parametrize(
    ("semantics", "clip", "after"),
    [
        ("torch", "clip_norm", [[0, math.nan], [-0.5]]),
        ("keras", "clip_norm", [[0, math.nan], [-0.5]]),
        ("torch", "global_clip_norm", [[0, math.nan], [0]]),
        ("keras", "global_clip_norm", [[math.nan, math.nan], [math.nan]]),
    ],
)
def test_what_an_infinite_norm_makes_of_the_gradients(semantics, clip, after, gradient):
    params = [np.zeros(2), np.zeros(1)]
    grads = [np.array([0.5, gradient]), np.array([0.5])]
    result = SGD(params, lr=1, semantics=semantics, **{clip: 1.0}).step(grads)
    assert result.grad_norm == math.inf
    if math.isfinite(gradient) and after[0][0] == 0:
        after = [[0, 0], after[1]]  # only the sum of squares overflows
    for w, right in zip(params, after, strict=True):
        assert np.array_equal(w, right, equal_nan=True)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_finite_sum_that_overflows_is_not_non_finite_but_a_scaled_gradient_may_be(nonfinite):
    for clip in ({}, {"clip_norm": 1.0}, {"global_clip_norm": 1.0}):
        w, huge = np.ones(5000), np.full(5000, 1e200)
        opt = SGD([w], lr=1, nonfinite=nonfinite, **clip)
        result = opt.step([huge])
        assert result.skipped is False
        assert w[0] == (1 if clip else 1 - 1e200)
        assert result.grad_norm == (math.inf if clip else None)
        before = w.copy()
        if nonfinite == "skip":
            assert opt.step([huge], loss_scale=1e-200).skipped is True
        else:
            with pytest.raises(FloatingPointError):
                opt.step([huge], loss_scale=1e-200)
        assert (w == before).all()


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_are_left_alone_or_zeroed_but_not_what_lies_between_them(config):
    run = Run(config)
    before = [np.asarray(g).copy() for g in run.grads]
    run.step(run.grads)
    assert all(g.tobytes() == b.tobytes() for g, b in zip(run.grads, before, strict=True))
    strided = run.grads[1]
    between = strided.base.reshape(-1)[1::2].copy()
    run.step([None if k == 4 else g for k, g in enumerate(run.grads)], zero_grad=True)
    assert all(not any(g.tobytes()) for k, g in enumerate(run.grads) if k != 4)
    assert (strided.base.reshape(-1)[1::2] == between).all()
    assert run.grads[4].tobytes() == before[4].tobytes()


def test_gradients_that_interleave_without_sharing_can_be_zeroed():
    both = np.arange(1.0, 9.0)
    a, b = np.zeros(4), np.zeros(4)
    SGD([a, b], lr=1).step([both[::2], both[-1::-2]], zero_grad=True)
    assert a.tolist() == [-1, -3, -5, -7]
    assert b.tolist() == [-8, -6, -4, -2]
    assert not any(both.tobytes())


@pytest.mark.parametrize("semantics", ["torch", "keras"])
@pytest.mark.parametrize("name", ["clip_norm", "global_clip_norm"])
def test_an_infinite_limit_clips_nothing_and_still_gives_the_norm(name, semantics):
    w = np.zeros(2)
    result = SGD([w], lr=1, semantics=semantics, **{name: np.inf}).step([np.array([3.0, 4.0])])
    assert (w == [-3, -4]).all()
    assert result.grad_norm == 5


@pytest.mark.parametrize("scale", [1e-320, 1e320, 1e-39, 1e46])
def test_a_loss_scale_by_which_float32_cannot_be_divided_is_refused(scale):
    w = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="loss_scale is out of the range of float32"):
        SGD([w]).step([np.ones(2, np.float32)], loss_scale=scale)
    assert (w == 1).all()
