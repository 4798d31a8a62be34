"""Row-wise Adagrad: one sum a row, of the means of its squared gradients."""

import copy
import pickle
import re

import numpy as np
import pytest
from c_interface import BAD_VALUE, UNSUPPORTED, COptimizer, dense, fo
from oracle import Oracle, assert_same_bits, run_everywhere, same_bits, weights
from sparse import KINDS, Lazy, Pair, draw_rows
from stored import BF16

import fastopt
from fastopt import Adagrad, Rows, _core, functional

L = np.longdouble
DTYPES = [np.float32, np.float64]
# Rows of one element, of some, of a block and of more; parameters of one row and of many.
SHAPES = [(), (1,), (500,), (300, 3), (70, 64), (40, 2, 65), (5, _core.BLOCK), (7, 5000), (1, 9000)]
TEAMS = [("team", 1), ("team", 3), ("openmp", 2), ("serial", 3)]
TEAMS = [(layer, n) for layer, n in TEAMS if layer in _core.layers()["available"]]
VARIANTS = [
    {},
    {"weight_decay": 0.1, "lr_decay": 0.1, "eps": 1e-3},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    {"initial_accumulator_value": 0.1, "clip_value": 0.5},
    {"clip_norm": 1.0},
    {"global_clip_norm": 2.0, "ema_decay": 0.9, "weight_decay": 0.1},
    {"accumulate": 2, "weight_decay": 0.1, "ema_decay": 0.5},
]


def arrays(rng, dtype, shapes=SHAPES):
    return [np.array(rng.standard_normal(shape), dtype) for shape in shapes]


def rowwise(params, **kwargs):
    return Adagrad([p.copy(order="K") for p in params], **{"lr": 0.1, "rowwise": True, **kwargs})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("semantics", ["torch", "keras"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_all_bits_are_the_references(options, semantics, dtype):
    rng = np.random.default_rng(0)
    params = arrays(rng, dtype)
    params.append(np.asfortranarray(params[0].reshape(1, 1)))
    params.append(np.moveaxis(arrays(rng, dtype, [(6, 5, 4)])[0], 1, 2))  # rows laid out otherwise
    kwargs = {**options, "semantics": semantics}
    steps = [
        [np.array(rng.standard_normal(p.shape), dtype) if (t + i) % 5 else None
         for i, p in enumerate(params)]
        for t in range(6)
    ]  # fmt: skip

    def make():
        return rowwise(params, **kwargs)

    run_everywhere(make, Oracle(make(), **kwargs), steps, TEAMS, loss_scale=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [o for o in VARIANTS if "accumulate" not in o], ids=str)
def test_gradients_of_some_rows_change_these_alone(options, dtype):
    rng = np.random.default_rng(1)
    params = arrays(rng, dtype, SHAPES[2:])
    steps = [
        [draw_rows(rng, p, (t + i) % 3 * len(p) // 2, KINDS[(t + i) % len(KINDS)])
         for i, p in enumerate(params)]
        for t in range(5)
    ]  # fmt: skip

    def make():
        return rowwise(params, **options)

    run_everywhere(make, Lazy(make(), **options), steps, TEAMS)


@pytest.mark.parametrize("team", [1, 3])
@pytest.mark.parametrize("options", [o for o in VARIANTS if not {"accumulate", "ema_decay"} & {*o}])
def test_exact_rows_equal_dense_steps(options, team):
    rng = np.random.default_rng(2)
    _core.force_threads(team)
    for dtype in DTYPES:
        params = arrays(rng, dtype, SHAPES[2:])
        pair = Pair(Adagrad, params, lr=0.1, rowwise=True, **options)
        for t in range(12):
            pair.step([draw_rows(rng, p, (t + i) % 3) for i, p in enumerate(params)])
        pair.refresh_rows(0, [3, 499])
        pair.check()


def test_a_switch_of_rowwise_has_no_row_miss_steps_of_both_kinds():
    rng = np.random.default_rng(3)
    params = arrays(rng, np.float32, SHAPES[2:])
    pair = Pair(Adagrad, params, lr=0.1, weight_decay=0.1)
    for t in range(18):
        for opt in pair.opts:
            opt.param_groups[0]["rowwise"] = t // 3 % 2 == 1
        pair.step([draw_rows(rng, p, 2) for p in params])
    assert {*pair.exact.state[0]} == {"step", "sum", "row_sum"}
    pair.check()


def test_the_sum_is_the_mean_of_squares_to_an_ulp():
    rng = np.random.default_rng(4)
    for dtype in DTYPES:
        param, sums = rng.standard_normal((40, 100)).astype(dtype), np.zeros(40, L)
        opt = rowwise([param])
        value = param.astype(L)
        for _ in range(20):
            grad = rng.standard_normal(param.shape).astype(dtype)
            opt.step([grad])
            sums += (grad.astype(L) ** 2).mean(axis=1)
            value -= L(0.1) * grad / (np.sqrt(sums) + L(1e-10))[:, None]
        eps = np.finfo(dtype).eps
        assert (abs(opt.state[0]["row_sum"] - sums) <= 20 * eps / 2 * sums).all()
        assert (abs(opt.params[0] - value) <= 20 * 4 * eps * np.maximum(abs(value), 0.1)).all()


@pytest.mark.parametrize("rows", [False, True])
def test_parameters_of_16_bits_train_as_float32_beside_a_master(rows):
    rng = np.random.default_rng(5)
    narrow = arrays(rng, BF16, SHAPES[2:])
    wide = [p.astype(np.float32) for p in narrow]
    opts = rowwise(narrow, state_dtype="8bit", weight_decay=0.1), rowwise(wide, weight_decay=0.1)
    for _ in range(10):
        grads = [draw_rows(rng, p, 3, dtype=BF16) if rows else
                 rng.standard_normal(p.shape).astype(BF16) for p in narrow]  # fmt: skip
        for opt in opts:
            opt.step(grads)
    for i, (p, own, like) in enumerate(zip(opts[0].params, opts[0].state, wide, strict=True)):
        assert own["row_sum"].dtype == np.float32
        assert own["row_sum"].shape == like.shape[:1]
        assert same_bits(own["row_sum"], opts[1].state[i]["row_sum"])
        assert same_bits(weights(p, own), opts[1].params[i])


def test_without_a_master_each_step_rounds_to_nearest():
    rng = np.random.default_rng(6)
    params = arrays(rng, BF16, SHAPES[2:])
    opt = rowwise(params, master_weights=False, stochastic_rounding=False)
    twin = rowwise([p.astype(np.float32) for p in params])
    grads = arrays(rng, BF16, SHAPES[2:])
    opt.step(grads)
    twin.step([g.astype(np.float32) for g in grads])
    for own, other in zip(opt.params, twin.params, strict=True):
        assert same_bits(own, other.astype(BF16))


@pytest.mark.parametrize("rows", [False, True])
def test_gradients_are_zeroed(rows):
    rng = np.random.default_rng(7)
    params = arrays(rng, np.float32, SHAPES[2:])
    grads = [draw_rows(rng, p, 5) if rows else rng.standard_normal(p.shape).astype(p.dtype)
             for p in params]  # fmt: skip
    opt, twin = rowwise(params), rowwise(params)
    twin.step(grads)
    opt.step(grads, zero_grad=True)
    assert_same_bits(opt, twin)
    for grad in grads:
        assert not (grad.values if rows else grad).any()


# ---- what is kept --------------------------------------------------------------------------------


def test_copies_pickles_and_files_go_on_with_the_same_bits(tmp_path):
    rng = np.random.default_rng(8)
    params = arrays(rng, np.float32)
    opt = rowwise(params, weight_decay=0.1)
    opt.step(arrays(rng, np.float32))
    loaded, resumed = rowwise(params), rowwise(opt.params)
    opt.save(tmp_path / "file")
    loaded.load(tmp_path / "file")
    resumed.load_state_dict(opt.state_dict())
    others = [loaded, resumed, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    grads = arrays(rng, np.float32)
    opt.step(grads)
    for other in others:
        other.step(grads)
        assert_same_bits(other, opt)
    opt.reset()
    assert not any(state["row_sum"].any() for state in opt.state)


def test_what_was_saved_with_a_sum_for_each_element_is_refused_by_name():
    opt, other = Adagrad([np.ones((4, 3))]), rowwise([np.ones((4, 3))])
    saved = opt.state_dict()
    saved["param_groups"][0]["rowwise"] = True
    before = pickle.dumps(other.state_dict())
    with pytest.raises(ValueError, match=r"missing \['row_sum'\]"):
        other.load_state_dict(saved)
    saved["state"][0]["row_sum"] = np.zeros((4, 3))
    with pytest.raises(ValueError, match=r"row_sum.*\(4, 3\).*\(4,\)"):
        other.load_state_dict(saved)
    assert pickle.dumps(other.state_dict()) == before


# ---- functions -----------------------------------------------------------------------------------


def test_the_function_has_the_bits_of_the_class():
    rng = np.random.default_rng(9)
    params = arrays(rng, np.float32, SHAPES[2:])
    for options in ({}, {"weight_decay": 0.1, "lr_decay": 0.1}):
        opt = rowwise(params, **options)
        own = [p.copy() for p in params]
        sums = [np.zeros(len(p), np.float32) for p in params]
        for step in range(1, 5):
            grads = [draw_rows(rng, p, 7) for p in params] if step % 2 else arrays(
                rng, np.float32, SHAPES[2:])  # fmt: skip
            opt.step(grads)
            indices = [g.indices for g in grads] if step % 2 else None
            values = [g.values for g in grads] if step % 2 else grads
            functional.adagrad(
                own, values, sums, rowwise=True, step=step, lr=0.1, indices=indices, **options
            )
        for a, b in zip(
            (*own, *sums), (*opt.params, *(s["row_sum"] for s in opt.state)), strict=True
        ):
            assert same_bits(a, b)


@pytest.mark.parametrize(
    ("sums", "words"),
    [
        (np.zeros((4, 3), np.float32), "sums: shape (4, 3) and dtype float32, not (4,) and float"),
        (np.zeros(4), "sums: shape (4,) and dtype float64, not (4,) and float32"),
        (np.zeros(8, np.float32)[::2], "sums: "),
        (None, "sums is required, since rowwise is 1"),
    ],
    ids=["each element", "dtype", "strided", "none"],
)  # fmt: skip
def test_other_sums_are_refused_and_nothing_is_changed(sums, words):
    param = np.ones((4, 3), np.float32)
    before = None if sums is None else sums.copy()
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        functional.adagrad(param, np.ones_like(param), sums, rowwise=True, lr=0.1)
    assert (param == 1).all()
    np.testing.assert_equal(sums, before)


def test_rows_that_are_not_one_stretch_of_memory_are_refused():
    param = np.asfortranarray(np.ones((4, 3)))
    words = "needs a parameter whose rows are each one stretch of memory, as in C order"
    with pytest.raises(ValueError, match=words):
        rowwise([param])
    with pytest.raises(ValueError, match=words):
        functional.adagrad(param, np.ones((4, 3)), np.zeros(4), rowwise=True, lr=0.1)
    opt = Adagrad([param])
    opt.param_groups[0]["rowwise"] = True
    with pytest.raises(ValueError, match=words):
        opt.step([np.ones((4, 3))])
    assert (param == 1).all()
    opt.param_groups[0]["rowwise"] = False
    assert not opt.step([np.ones((4, 3))]).skipped


# ---- the C interface -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS[:3])
def test_the_c_interface_has_the_bits_of_the_class(options):
    rng = np.random.default_rng(10)
    opt = rowwise(arrays(rng, np.float32, SHAPES[2:]), **options)
    twin = COptimizer(opt)
    for t in range(4):
        grads = arrays(rng, np.float32, SHAPES[2:])
        if t % 2:
            grads = [draw_rows(rng, p, 5) for p in opt.params]
        opt.step(grads)
        twin.step(grads)
        assert_same_bits(opt, twin)


def test_the_c_interface_refuses_rows_of_another_size():
    opt = rowwise([np.ones((4, 3), np.float32)])
    twin = COptimizer(opt)
    sums = np.zeros(12, np.float32)
    for size in (0, -3, 5):
        given = dense(sums, row_size=size)
        assert fo.set_state(twin.handle, 0, b"row_sum", given) == BAD_VALUE
        assert b"'row_size' must divide the parameter's size 12" in fo.last_error()
    assert fo.set_state(twin.handle, 0, b"sum", dense(sums, row_size=3)) == UNSUPPORTED
    twin.do("set_state", 0, b"row_sum", dense(sums, row_size=2))
    with pytest.raises(AssertionError, match=r"of 3 elements.*of 2 elements"):
        twin.step([Rows([0], np.ones((1, 3), np.float32))])
    assert (twin.params[0] == 1).all()


def test_a_large_table_has_a_sixty_fourth_of_the_state():
    table = np.zeros((1000, 64), np.float32)
    state = fastopt.Adagrad([table], rowwise=True).state[0]
    assert state["row_sum"].nbytes * 64 == table.nbytes
    assert {*state} == {"step", "row_sum"}
