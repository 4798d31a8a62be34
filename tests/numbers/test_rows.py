"""Gradients of some rows: only these are updated, to the bits of the reference on them."""

import numpy as np
import pytest
from oracle import NUMBERS, assert_same_bits, run_everywhere, slot_of
from sparse import KINDS, Lazy, all_dense, draw_rows
from stored import STORED
from tables import CASE_IDS, CASES, CLASSES, CONFIGS, ROWS

import fastopt
from fastopt import _core, reference

TEAMS = [("team", 1), ("team", 3), ("openmp", 2), ("serial", 3)]
TEAMS = [(layer, n) for layer, n in TEAMS if layer in _core.layers()["available"]]
DTYPES = [np.float32, np.float64]
# Rows of an element, of parts and of multiples of a cache line, of a block and of more.
TABLES = [(500,), (300, 3), (70, 64), (40, 2, 65), (5, _core.BLOCK), (7, 5000)]


def tables(rng, dtype, shapes=TABLES):
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def gradients(rng, params, steps, dtype=None):
    """Of every kind, for each parameter in turn; in one step of no row at all."""
    return [
        [
            draw_rows(
                rng,
                p,
                0 if (t + i) % 5 == 4 else int(rng.integers(1, 2 * len(p))),
                KINDS[(t + i) % len(KINDS)],
                dtype,
            )
            for i, p in enumerate(params)
        ]
        for t in range(steps)
    ]


def run_all(cls, kwargs, params, steps, **step_options):
    """Step over copies with each instruction set and team; compare with the reference."""

    def make():
        return cls([p.copy(order="K") for p in params], **kwargs)

    run_everywhere(make, Lazy(make(), **kwargs), steps, TEAMS, **step_options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "cls", "kwargs"), CASES, ids=CASE_IDS)
def test_every_rule_equals_the_reference_on_the_rows(name, cls, kwargs, dtype):
    rng = np.random.default_rng(CASE_IDS.index(name))
    params = tables(rng, dtype)
    run_all(cls, kwargs, params, gradients(rng, params, 5))


@pytest.mark.parametrize("n_rows", [64, 65, 1000, 1024, 1025, 40_000, 1 << 20, (1 << 20) + 1])
@pytest.mark.parametrize("n", [63, 64, 500])
def test_rows_of_a_table_of_any_height_are_summed_in_order(n_rows, n):
    """Many more than fit one digit of the sort, some of them given several times."""
    rng = np.random.default_rng(n)
    indices = rng.integers(0, n_rows, n)
    indices[::5] = indices[1]
    indices[:2] = 0, n_rows - 1
    values = rng.standard_normal((n, 1), np.float32)
    sums = np.zeros((n_rows, 1), np.float32)
    np.add.at(sums, indices, values)  # one after the other
    table = np.zeros((n_rows, 1), np.float32)
    fastopt.SGD([table], lr=1.0).step([fastopt.Rows(indices, values)])
    np.testing.assert_array_equal(table, -sums)


CLIPS = [{"clip_value": 0.5}, {"clip_norm": 1.0}, {"global_clip_norm": 2.0}]
OPTIONS = [*CLIPS, {"ema_decay": 0.9}, {"ema_decay": 0.9, "global_clip_norm": 0.5}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("semantics", ["torch", "keras"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_clipping_scaling_and_averaging_equal_the_reference(options, semantics, dtype):
    rng = np.random.default_rng(1)
    params = tables(rng, dtype)
    kwargs = {"lr": 0.1, "semantics": semantics, **options}
    run_all(fastopt.Adam, kwargs, params, gradients(rng, params, 5), loss_scale=3.0)


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_stand_beside_gradients_of_all_elements_and_none(config):
    rng = np.random.default_rng(2)
    params = tables(rng, np.float32)
    cls, kwargs, _ = CONFIGS[config]
    steps = gradients(rng, params, 6)
    for t, grads in enumerate(steps):
        grads[t % 6] = rng.standard_normal(params[t % 6].shape).astype(np.float32)
        grads[(t + 1) % 6] = None
    run_all(cls, kwargs, params, steps)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_stored_in_fewer_bits_equals_the_reference_on_the_rows(cls, stored):
    rng = np.random.default_rng(3)
    dtype, options = STORED[stored]
    in_8_bits = options.get("state_dtype") == "8bit"
    shapes = [(40, 64), (30, 2, 64), (5, 4160)] if in_8_bits else TABLES
    params = tables(rng, dtype, shapes)
    for dtype_of_grad in {dtype, np.dtype(np.float32)}:
        for own in ({}, {"clip_norm": 1.0, "ema_decay": 0.5}):
            kwargs = {"lr": 0.1, "weight_decay": 0.01, "seed": 5, **options, **own}
            run_all(cls, kwargs, params, gradients(rng, params, 4, dtype_of_grad))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_which_rows_come_together(cls, dtype):
    """In any order, split up among all: each row has its own gradient only."""
    rng = np.random.default_rng(4)
    param = rng.standard_normal((200, 70)).astype(dtype)
    grad = rng.standard_normal(param.shape).astype(dtype)
    dense = cls([param.copy()], lr=0.1)
    dense.step([grad])
    for indices in (np.arange(200), np.arange(200)[::-1], rng.permutation(200)):
        for kind in ("u1", "i2", ">i4", "u8"):
            opt = cls([param.copy()], lr=0.1)
            opt.step([fastopt.Rows(indices.astype(kind), grad[indices])])
            assert_same_bits(opt, dense, kind)


def test_values_of_one_row_are_added_in_the_order_given():
    """Which a sum in another order, or of more bits, would not equal."""
    param = np.zeros((3, 2), np.float32)
    values = np.array([[1e8, 1], [1, 1e8], [-1e8, -1e8]], np.float32)
    for order in ([0, 1, 2], [1, 2, 0], [0, 2, 1]):
        opt = fastopt.SGD([param], lr=1.0)
        param[...] = 0
        opt.step([fastopt.Rows([1, 1, 1], values[order])])
        expected = (values[order[0]] + values[order[1]]) + values[order[2]]
        assert param.tolist() == [[0, 0], (-expected).tolist(), [0, 0]]


@pytest.mark.parametrize("options", CLIPS[1:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_the_dense_gradient_to_the_bit(dtype, options):
    rng = np.random.default_rng(5)
    params = tables(rng, dtype)
    opt = fastopt.SGD(params, lr=0.1, nonfinite="skip", **options)
    for grads in gradients(rng, params, 10):
        expected = reference.grad_norm(all_dense(grads, params), params, 8.0)
        assert opt.step(grads, loss_scale=8.0).grad_norm == expected
    values = np.ones((4, 64), dtype)
    values[3, 63] = np.inf
    before = [p.copy() for p in params]
    result = opt.step([None, None, fastopt.Rows([1, 2, 69, 69], values), None, None, None])
    assert result.skipped
    assert all(p.tobytes() == q.tobytes() for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_step_of_no_rows_counts_and_changes_nothing_else(row):
    param = np.ones((4, 3))
    opt = row.cls([param], lr=0.1, weight_decay=0.1)
    opt.step([np.ones((4, 3))])
    before = {name: array.copy() for name, array in opt.state[0].items()}
    after = param.copy()
    opt.step([fastopt.Rows([], np.ones((0, 3)))])
    assert opt.completed_steps == 2
    assert opt.state[0]["step"] == 2
    assert param.tobytes() == after.tobytes()
    for name in before.keys() - {"step", *NUMBERS}:
        assert opt.state[0][name].tobytes() == before[name].tobytes()
        assert slot_of(name) in row.slots


@pytest.mark.parametrize("cls", CLASSES)
def test_a_parameter_may_have_rows_that_are_transposed_within(cls):
    """Values that lie otherwise than the parameter's rows are put in order."""
    rng = np.random.default_rng(6)
    inner = rng.standard_normal((30, 5, 4))
    params = [inner.transpose(0, 2, 1), inner.copy().transpose(0, 2, 1).copy(order="C")]
    opt = cls(params, lr=0.1)
    for _ in range(3):
        grad = draw_rows(rng, params[0], 20, "repeated")
        lies = fastopt.Rows(grad.indices, grad.values.transpose(0, 2, 1).copy().transpose(0, 2, 1))
        for one, other in ((grad, lies), (lies, grad)):
            opt.step([one, other])
    assert params[0].tobytes("C") == params[1].tobytes("C")
