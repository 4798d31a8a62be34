"""Gradients of some rows through the C interface: the bits of the classes, and what is refused."""

import re

import numpy as np
import pytest
from c_interface import (
    BAD_INDEX,
    BAD_POINTER,
    BAD_VALUE,
    BF16,
    CLIPS,
    INCOMPLETE,
    OK,
    SIGNED,
    SKIP,
    UNSIGNED,
    UNSUPPORTED,
    COptimizer,
    create,
    dense,
    fo,
    of_rows,
    options,
    result,
)
from oracle import assert_same_bits
from sparse import KINDS, draw_rows
from stored import BF16 as BFLOAT16
from tables import CASE_IDS, CASES

import fastopt
from fastopt import Rows

SHAPES = [(200,), (50, 3), (40, 64), (3, 5000)]


def tables(rng, dtypes=(np.float32, np.float64)):
    return [rng.standard_normal(shape).astype(dtype) for dtype in dtypes for shape in SHAPES]


def gradients(rng, params, steps=4):
    """Of rows, of all elements and none, which come by turns."""
    for t in range(steps):
        grads = [
            draw_rows(rng, p, 0 if (t + i) % 5 == 1 else 9, KINDS[(t + i) % len(KINDS)])
            for i, p in enumerate(params)
        ]
        grads[t] = rng.standard_normal(params[t].shape).astype(params[t].dtype)
        grads[t + 1] = None
        yield grads if t != 2 else [np.ones_like(p) for p in params]  # of all, once


@pytest.mark.parametrize(("name", "cls", "kwargs"), CASES, ids=CASE_IDS)
def test_every_rule_gives_the_bits_of_its_class(name, cls, kwargs):
    rng = np.random.default_rng(0)
    opt = cls(tables(rng), **kwargs)
    twin = COptimizer(opt, semantics=("torch", "keras").index(kwargs["semantics"]))
    for number, grads in enumerate(gradients(rng, opt.params)):
        opt.step(grads)
        twin.step(grads)
        assert_same_bits(opt, twin, f"step {number + 1}")


@pytest.mark.parametrize("clip", CLIPS)
def test_every_option_gives_the_bits_of_its_class(clip):
    rng = np.random.default_rng(1)
    opt = fastopt.Adam(tables(rng), **{clip: 0.25}, ema_decay=0.75, nonfinite="skip")
    common = {"clip": CLIPS[clip], "clip_limit": 0.25, "nonfinite": SKIP, "ema_decay": 0.75}
    twin = COptimizer(opt, loss_scale=8.0, num_threads=2, zero_grad=1, **common)
    for number, grads in enumerate(gradients(rng, opt.params)):
        if number == 1:
            grads[3].values[0, 0] = np.inf
        own = [Rows(g.indices, g.values.copy()) if isinstance(g, Rows) else g for g in grads]
        own = [g.copy() if isinstance(g, np.ndarray) else g for g in own]
        done, outcome = opt.step(grads, loss_scale=8.0, zero_grad=True), twin.step(own)
        assert outcome.skipped == done.skipped == (number == 1)
        np.testing.assert_equal(outcome.grad_norm, done.grad_norm or 0.0)
        assert_same_bits(opt, twin, f"step {number + 1}")
        held = [g.values if isinstance(g, Rows) else g for g in own if g is not None]
        assert not any(array.any() for array in held)


@pytest.mark.parametrize("stochastic", [False, True])
def test_what_is_stored_in_fewer_bits_gives_the_bits_of_the_class(stochastic):
    """A bfloat16 table without a master, and 8-bit state."""
    rng = np.random.default_rng(2)
    start = rng.standard_normal((30, 128)).astype(BFLOAT16)
    opt = fastopt.Adam(
        [start], master_weights=False, state_dtype="8bit", stochastic_rounding=stochastic, seed=9
    )
    param, counter = start.copy(), np.zeros(1, np.int64)
    state = {name: array.copy() for name, array in opt.state[0].items()}
    rounding = {"rounding": int(stochastic)}
    handle = create("adam", 1, 1)
    given = dense(param.view(np.uint16), dtype=BF16, seed=9, **rounding)
    assert fo.set_param(handle, 0, 0, param.size, given, counter.ctypes.data) == OK
    for name, dtype in (("exp_avg", SIGNED), ("exp_avg_sq", UNSIGNED)):
        scales = {"scales": state[f"{name}_scale"].ctypes.data, **rounding}
        given = dense(state[f"{name}_8bit"], dtype=dtype, **scales)
        assert fo.set_state(handle, 0, name.encode(), given) == OK
    for kind in KINDS:
        grad = draw_rows(rng, start, 20, kind, np.float32)
        numbers = np.array(grad.indices, np.int64)
        assert fo.set_grad(handle, 0, of_rows(grad, numbers, row_size=128)) == OK
        assert fo.step(handle, None) == OK
        opt.step([grad])
        assert param.tobytes() == start.tobytes()
        assert all(
            state[k].tobytes() == a.tobytes() for k, a in opt.state[0].items() if k != "step"
        )
    fo.destroy(handle)


# ---- what is refused -----------------------------------------------------------------------------


class Table:
    """RMSprop over a table of four rows of three, with a gradient of two of them."""

    def __init__(self, param=None, state=None):
        self.param = np.arange(12.0) if param is None else param
        self.square, self.counter = np.zeros_like(self.param), np.zeros(1, np.int64)
        self.scales = np.zeros(4, np.uint8)
        self.rows, self.numbers = Rows([0, 2], np.ones((2, 3), self.param.dtype)), np.array([0, 2])
        self.handle = create("rmsprop", 1, 1)
        address = self.counter.ctypes.data
        assert fo.set_param(self.handle, 0, 0, self.param.size, dense(self.param), address) == OK
        assert fo.set_state(self.handle, 0, b"square_avg", state or dense(self.square)) == OK
        self.set_grad()

    def __del__(self):
        fo.destroy(self.handle)

    def set_grad(self, **fields):
        return fo.set_grad(self.handle, 0, of_rows(self.rows, self.numbers, **fields))

    def bytes(self):
        return [a.tobytes() for a in (self.param, self.square, self.counter, self.rows.values)]


def assert_refused(got, status, message):
    assert got == status
    assert re.search(message, fo.last_error().decode()), fo.last_error()


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"row_size": -3}, BAD_VALUE, "^grad: 'row_size' must be 0, or divide .* 12, got -3$"),
        ({"row_size": 5}, BAD_VALUE, "^grad: 'row_size' must be 0, or divide .* 12, got 5$"),
        ({"row_size": 24}, BAD_VALUE, "^grad: 'row_size' must be 0, or divide .* 12, got 24$"),
        ({"n_rows": -1}, BAD_VALUE, "^grad: 'n_rows' must be 0 or more, got -1$"),
        ({"rows": None}, BAD_POINTER, "^rows of grad must not be NULL: there are 2 rows$"),
        ({"data": None}, BAD_POINTER, "^data of grad must not be NULL: there are 2 rows$"),
        ({"row_size": 0}, UNSUPPORTED, "^grad: 'rows' must be 0: only a gradient of some rows"),
        (
            {"row_size": 0, "rows": None},
            UNSUPPORTED,
            "^grad: 'n_rows' must be 0: only a gradient of some rows has it, with 'row_size'",
        ),
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_refused_and_those_before_stay(fields, status, message):
    table, twin = Table(), Table()
    fields = {"rows": table.numbers.ctypes.data, "data": table.rows.values.ctypes.data, **fields}
    given = dense(table.rows.values, **{"n_rows": 2, "row_size": 3, **fields})
    assert_refused(fo.set_grad(table.handle, 0, given), status, message)
    assert fo.step(table.handle, None) == fo.step(twin.handle, None) == OK
    assert table.bytes() == twin.bytes()


@pytest.mark.parametrize(
    ("numbers", "position", "value"),
    [([4, 0], 0, 4), ([0, -1], 1, -1), ([3, 2**62], 1, 2**62), ([3, -(2**63)], 1, -(2**63))],
)
def test_a_row_that_does_not_exist_is_named_and_nothing_is_written(numbers, position, value):
    table = Table()
    before = table.bytes()
    table.numbers[...] = numbers  # which a step reads
    message = (
        rf"^rows\[{position}\] of the gradient of parameter 0 must be between 0 and 3, got {value}$"
    )
    outcome = result()
    assert_refused(fo.step(table.handle, outcome), BAD_INDEX, message)
    assert table.bytes() == before
    table.numbers[...] = [0, 3]
    assert fo.step(table.handle, outcome) == OK
    rows = table.param.reshape(4, 3)
    assert rows[1:3].tolist() == np.arange(12.0).reshape(4, 3)[1:3].tolist()
    assert (rows[[0, 3]] < np.arange(12.0).reshape(4, 3)[[0, 3]]).all()


def test_gradients_of_rows_do_not_accumulate():
    table = Table()
    assert fo.set_options(table.handle, options(accumulate=2)) == OK
    before = table.bytes()
    message = "^the gradient of parameter 0 is of some rows, which does not go with 'accumulate'$"
    assert_refused(fo.step(table.handle, None), UNSUPPORTED, message)
    assert table.bytes() == before
    assert fo.set_options(table.handle, None) == OK
    assert fo.step(table.handle, None) == OK


def test_rows_that_share_a_scale_are_refused():
    codes, scales = np.zeros(192, np.uint8), np.zeros(3, np.uint8)
    state = dense(codes, dtype=UNSIGNED, scales=scales.ctypes.data)
    table = Table(np.ones(192, np.float32), state)
    table.rows = Rows([0, 2], np.ones((2, 32), np.float32))
    assert table.set_grad(row_size=32) == OK
    before = table.bytes()
    message = "^the gradient of parameter 0 is of some rows, of 32 elements: beside 8-bit .* of 64$"
    assert_refused(fo.step(table.handle, None), UNSUPPORTED, message)
    assert table.bytes() == before
    assert not codes.any()
    table.rows = Rows([0, 2], np.ones((2, 64), np.float32))
    assert table.set_grad(row_size=64) == fo.step(table.handle, None) == OK
    assert codes[:64].all()
    assert not codes[64:128].any()


def test_a_gradient_of_no_rows_needs_no_memory_and_counts():
    table = Table()
    given = dense(table.rows.values, data=None, row_size=3)
    assert fo.set_grad(table.handle, 0, given) == fo.step(table.handle, None) == OK
    assert table.counter[0] == 1
    assert table.param.tolist() == np.arange(12.0).tolist()
    assert fo.set_grad(table.handle, 0, None) == fo.step(table.handle, None) == OK
    assert table.counter[0] == 1


def test_a_gradient_of_rows_lacks_state_like_any_other():
    table = Table()
    assert fo.set_hyper(table.handle, 0, b"momentum", 0.5) == OK
    before = table.bytes()
    message = "^parameter 0 lacks its state 'momentum_buffer'$"
    assert_refused(fo.step(table.handle, None), INCOMPLETE, message)
    assert table.bytes() == before
