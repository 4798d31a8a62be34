"""Gradients of some rows as they are given; what is refused of them leaves every byte as it was."""

import copy
import pickle

import numpy as np
import pytest
from oracle import same_bits
from sparse import as_dense, draw_rows
from support import differences, everything
from tables import BY_RULE, as_function

from fastopt import SGD, Adam, Rows, functional

WIDE = np.dtype(np.float64)


# ---- Rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "values", "error", "message"),
    [
        ([0.0, 1.0], np.ones((2, 3)), TypeError, "^indices: expected integers, got dtype float64"),
        ([True], np.ones((1, 3)), TypeError, "^indices: expected integers, got dtype bool"),
        (["a"], np.ones((1, 3)), TypeError, "^indices: expected integers, got dtype <U1"),
        (np.zeros(0), np.ones((0, 3)), TypeError, "^indices: expected integers, got dtype float64"),
        ([[0, 1]], np.ones((1, 3)), ValueError, r"^indices: expected one axis, got shape \(1, 2\)"),
        (3, np.ones((1, 3)), ValueError, r"^indices: expected one axis, got shape \(\)"),
        ([0, 1], [[1.0], [2.0]], TypeError, "^values: expected a numpy.ndarray .*, got list"),
        ([0, 1], None, TypeError, "^values: expected a numpy.ndarray .*, got NoneType"),
        ([0, 1], np.ones((3, 3)), ValueError, r"^values: shape \(3, 3\), but there are 2 indices"),
        ([0], np.ones(()), ValueError, r"^values: shape \(\), but there are 1 indices"),
    ],
)
def test_rows_that_are_none_are_refused(indices, values, error, message):
    with pytest.raises(error, match=message):
        Rows(indices, values)


def test_rows_show_what_they_have_and_are_copied_whole():
    rows = Rows([3, 0, 3], np.ones((3, 2)))
    assert repr(rows) == "Rows(3 indices, values of shape (3, 2))"
    assert rows.indices.tolist() == [3, 0, 3]
    for twin in (copy.copy(rows), copy.deepcopy(rows), pickle.loads(pickle.dumps(rows))):
        assert twin.indices.tolist() == [3, 0, 3]
        assert twin.values.tolist() == rows.values.tolist()
    with pytest.raises(AttributeError):
        rows.shape = (3,)


@pytest.mark.parametrize("indices", [[], (), np.zeros(0, np.uint8)], ids=str)
def test_of_no_rows_an_empty_list_will_do(indices):
    param = np.ones((4, 2))
    opt = SGD([param], lr=1.0)
    opt.step([Rows(indices, np.ones((0, 2)))])
    assert opt.completed_steps == 1
    assert (param == 1).all()


# ---- what a step refuses -------------------------------------------------------------------------


class Model:
    """Two tables and a vector, an optimizer with a step behind it, and gradients for the next."""

    def __init__(self, table=None, **options):
        self.table = np.arange(12.0).reshape(4, 3) if table is None else table
        params = [np.ones((5, 2)), self.table, np.ones(3)]
        self.opt = Adam(params, lr=0.5, **options)
        self.opt.step([np.ones_like(p) for p in params])
        self.values = np.ones((2, *self.table.shape[1:]), self.table.dtype)
        self.grads = [Rows([0, 4], np.ones((2, 2))), Rows([1, 2], self.values), np.ones(3)]

    def arrays(self):
        return [g.values if isinstance(g, Rows) else g for g in self.grads if g is not None]

    def everything(self):
        held = [a for a in self.arrays() if isinstance(a, np.ndarray)]
        return everything(self.opt, held)


def refuses(model, grad, error, message, **options):
    """Give the second table this gradient: the step fails, changes nothing, and the next works."""
    good, model.grads[1] = model.grads[1], grad
    before = model.everything()
    with pytest.raises(error, match=message) as caught:
        model.opt.step(model.grads, **options)
    assert caught.type is error
    assert differences(model.everything(), before) == []
    model.grads[1] = good
    model.opt.step(model.grads)
    assert model.opt.completed_steps == 2


OF = "^gradient of parameter 1: "


@pytest.mark.parametrize("rows", ["lazy", "exact"])
@pytest.mark.parametrize(
    ("indices", "position", "value"),
    [
        ([4, 0], 0, 4),
        ([0, -1], 1, -1),
        ([3, 2**40], 1, 2**40),
        ([1, -(2**63)], 1, -(2**63)),
        (np.array([1, 200], np.uint8), 1, 200),
        (np.array([2**64 - 1, 9], np.uint64), 0, 2**64 - 1),
        (np.array([0, 4], ">i2"), 1, 4),
    ],
    ids=str,
)
def test_a_row_that_does_not_exist_is_named_with_its_place(indices, position, value, rows):
    message = OF + rf"indices\[{position}\] is {value}, not the number of a row: 0 to 3$"
    refuses(Model(rows=rows), Rows(indices, np.ones((2, 3))), ValueError, message)


def reordered(shape, strides):
    """An array of ones whose axes have these bytes from one element to the next."""
    memory = np.ones(1000)
    return np.lib.stride_tricks.as_strided(memory, shape, strides)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (np.ones((2, 2)), ValueError, r"values of shape \(2, 2\), not \(2, 3\): for each of 2 ind"),
        (np.ones(2), ValueError, r"values of shape \(2,\), not \(2, 3\)"),
        (np.ones((2, 3, 1)), ValueError, r"values of shape \(2, 3, 1\), not \(2, 3\)"),
        (np.ones((2, 3), np.longdouble), TypeError, "dtype float128 .*is not the parameter's"),
        (np.ones((2, 3), int), TypeError, "dtype int64 .*is not the parameter's float64"),
        (np.ones((2, 3), ">f8"), TypeError, "dtype >f8 .*is not the parameter's float64"),
        (np.ma.array(np.ones((2, 3)), mask=True), TypeError, "mask"),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused(values, error, message):
    refuses(Model(), Rows([1, 2], values), error, OF + ".*" + message)


def test_values_that_only_look_like_an_array_are_refused():
    class Shaped:
        shape = (2, 3)

    refuses(Model(), Rows([1, 2], Shaped()), TypeError, OF + "values: expected .*, got Shaped$")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda: np.broadcast_to(np.ones(3), (2, 3)), "read-only, and zero_grad=True"),
        (lambda: np.ones((2, 6))[:, ::2], r"values of strides \(48, 16\) do not lie as"),
        (lambda: np.ones((3, 2)).T, r"values of strides \(8, 16\) do not lie as"),
    ],
)
def test_values_that_cannot_be_zeroed_are_refused_where_that_is_asked_for(values, message):
    refuses(Model(), Rows([1, 2], values()), ValueError, OF + message, zero_grad=True)
    model = Model()
    model.grads[1] = Rows([1, 2], values())
    model.opt.step(model.grads)
    assert model.opt.completed_steps == 2  # and taken where it is not


@pytest.mark.parametrize("zero_grad", [False, True])
def test_values_in_memory_that_the_step_writes_are_refused(zero_grad):
    overlaps = "^gradient of parameter 1 overlaps "
    for values, what in [
        (lambda m: m.table[:2], "parameter 1"),
        (lambda m: m.opt.params[0].ravel()[:6].reshape(2, 3), "parameter 0"),
        (lambda m: m.opt.state[1]["exp_avg"][2:], "state of parameter 1"),
    ]:
        model = Model()
        rows = Rows([1, 2], values(model))
        refuses(model, rows, ValueError, overlaps + what, zero_grad=zero_grad)


def test_values_that_two_gradients_share_are_refused_if_they_are_to_be_zeroed():
    shared = np.ones((2, 3))
    params = [np.ones((4, 3)), np.ones((4, 3))]
    opt = SGD(params, lr=0.5)
    grads = [Rows([0, 1], shared), Rows([2, 3], shared)]
    with pytest.raises(ValueError, match=r"gradients of parameter 0 and parameter 1 share memory"):
        opt.step(grads, zero_grad=True)
    assert all((p == 1).all() for p in params)
    opt.step(grads)
    assert [p[:, 0].tolist() for p in params] == [[0.5, 0.5, 1, 1], [1, 1, 0.5, 0.5]]


def test_a_parameter_without_rows_in_one_stretch_is_refused():
    table = np.asfortranarray(np.arange(12.0).reshape(4, 3))
    model = Model(table)
    before = everything(model.opt)
    with pytest.raises(ValueError, match=OF + r".*shape \(4, 3\) and strides \(8, 32\)"):
        model.opt.step(model.grads)
    assert differences(everything(model.opt), before) == []
    one_row = Model(np.asfortranarray(np.ones((1, 3))))
    one_row.opt.step([None, Rows([0, 0], np.ones((2, 3))), None])  # which has no other


def test_a_parameter_of_no_axes_has_no_rows():
    param = np.array(2.0)
    opt = SGD([param])
    with pytest.raises(ValueError, match="parameter 0: a 0-d parameter has no rows"):
        opt.step([Rows([0], np.ones(1))])
    assert param == 2
    assert opt.completed_steps == 0


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0,)])
@pytest.mark.parametrize("rows", ["lazy", "exact"])
def test_a_parameter_may_be_empty(shape, rows):
    opt = Adam([np.ones(shape), np.ones(2)], rows=rows)
    opt.step([Rows([], np.ones((0, *shape[1:]))), np.ones(2)])
    opt.refresh()
    assert opt.state[0]["step"] == 1


def test_rows_that_share_a_scale_of_8_bits_are_refused():
    table = np.ones((4, 32), np.float32)
    opt = Adam([table], state_dtype="8bit")
    before = everything(opt)
    message = "parameter 0: some rows, of 32 elements each, .* need a multiple of 64 elements"
    with pytest.raises(ValueError, match=message):
        opt.step([Rows([1], np.ones((1, 32), np.float32))])
    assert differences(everything(opt), before) == []


def test_accumulation_of_rows_is_refused():
    model = Model(accumulate=2)
    message = OF + "some rows, with accumulate=2; give one step the indices and values of all"
    before = model.everything()
    with pytest.raises(ValueError, match=message):
        model.opt.step([None, model.grads[1], None])
    assert differences(model.everything(), before) == []


def test_an_average_of_rows_that_catch_up_later_is_refused():
    with pytest.raises(ValueError, match=r'^rows="exact" with ema_decay: '):
        Adam([np.ones(3)], rows="exact", ema_decay=0.5)


@pytest.mark.parametrize("bad", ["dense", None, True, 1])
def test_another_meaning_of_rows_is_refused(bad):
    with pytest.raises((TypeError, ValueError), match=r"^rows must be "):
        Adam([np.ones(3)], rows=bad)


# ---- refresh -------------------------------------------------------------------------------------


def behind(**options):
    """An optimizer of which all rows but one have missed a step."""
    model = Model(rows="exact", **options)
    model.opt.step([Rows([0], np.ones((1, 2))), Rows([3], np.ones((1, 3))), None])
    return model


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones((4, 3)),), ValueError, "^param: this optimizer has no such parameter: ndarray"),
        ((3,), ValueError, "^param: this optimizer has no such parameter: 3; give one of those"),
        (("w",), ValueError, "^param: this optimizer has no such parameter: 'w'"),
        ((1, [0, 4]), ValueError, r"^rows\[1\] is 4, not the number of a row of parameter 1: 0 to"),
        ((1, [-1]), ValueError, r"^rows\[0\] is -1, not the number of a row"),
        ((1, [0.5]), TypeError, "^rows: expected integers, got dtype float64"),
        ((1, [[0]]), ValueError, r"^rows: expected one axis, got shape \(1, 1\)"),
        ((None, [0]), TypeError, "^rows: given, but not of which param"),
    ],
    ids=str,
)
def test_a_refresh_of_what_does_not_exist_is_refused(arguments, error, message):
    opt = behind().opt
    before = everything(opt)
    with pytest.raises(error, match=message):
        opt.refresh(*arguments)
    assert differences(everything(opt), before) == []
    opt.refresh()
    assert differences(everything(opt), before) != []


def test_refresh_takes_a_parameter_as_it_is_known():
    named = {"table": np.ones((4, 2)), "other": np.ones((4, 2))}
    for given in ("table", named["table"]):
        opt = SGD(named, lr=0.5, momentum=0.5, rows="exact")
        every, some = np.ones((4, 2)), Rows([0], np.zeros((1, 2)))
        opt.step({"table": every, "other": every})
        opt.step({"table": some, "other": some})
        stale = named["table"][1:].copy()
        other = named["other"].copy()
        opt.refresh(given, [1])
        assert (named["table"][1] == stale[0] - 0.25).all()
        assert (named["table"][2:] == stale[1:]).all()
        opt.refresh(given)
        assert (named["table"][1:] == stale - 0.25).all()
        assert named["other"].tobytes() == other.tobytes()
        opt.refresh()
        assert (named["other"] == named["table"]).all()
        for param in named.values():
            param[...] = 1


def test_without_exact_there_is_nothing_to_refresh():
    model = Model()
    model.opt.step(model.grads)
    before = model.everything()
    model.opt.refresh()
    model.opt.refresh(model.table, [2])
    assert differences(model.everything(), before) == []


# ---- how they are given --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["lazy", "exact"])
def test_zero_grad_zeroes_the_values(rows):
    model = Model(rows=rows)
    model.grads[1] = Rows([3, 0, 3], np.ones((3, 3)))
    model.opt.step(model.grads, zero_grad=True)
    assert not any(array.any() for array in model.arrays())


def test_indices_are_read_once():
    """By who changes them during a step (a schedule is code of the user's) nothing is disturbed."""
    indices = np.array([0, 1])
    table = np.zeros((3, 2))

    class Changing:
        shape = (2, 2)

        def __array__(self, dtype=None, copy=None):
            indices[...] = 10**6
            return np.ones((2, 2))

    class Other:
        """A gradient after the rows that is looked at when they have been."""

        shape, dtype = (1,), WIDE

        def __dlpack__(self, **options):
            indices[...] = 10**6
            return np.ones(1).__dlpack__(**options)

        def __dlpack_device__(self):
            return np.ones(1).__dlpack_device__()

    opt = SGD([table, np.ones(1)], lr=1.0)
    opt.step([Rows(indices, np.ones((2, 2))), Other()])
    assert indices.tolist() == [10**6, 10**6]
    assert table[:, 0].tolist() == [-1, -1, 0]


def test_rows_come_in_containers_beside_other_gradients():
    params = {"a": {"table": np.ones((4, 2)), "bias": np.ones(2)}, "list": [np.ones((3, 1))]}
    opt = SGD(params, lr=1.0)
    rows = Rows([0, 2, 0], np.full((3, 2), 0.5))
    opt.step({"a": {"table": rows, "bias": np.ones(2)}, "list": [Rows([1], np.ones((1, 1)))]})
    assert params["a"]["table"][:, 0].tolist() == [0, 1, 0.5, 1]
    assert params["a"]["bias"].tolist() == [0, 0]
    assert params["list"][0].tolist() == [[1], [0], [1]]
    opt.step({"a": {"table": np.ones((4, 2)), "bias": None}, "list": [None]})
    assert params["a"]["table"][:, 0].tolist() == [-1, 0, -0.5, 0]


def one_step(grad, shape=(6, 3), dtype=np.float32, cls=SGD):
    table = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    cls([table], lr=0.5).step([grad])
    return table


def test_indexed_slices_are_rows():
    class IndexedSlices:
        """As TensorFlow's."""

        def __init__(self, values, indices, dense_shape):
            self.values, self.indices, self.dense_shape = values, indices, dense_shape

        values = indices = dense_shape = property()

    class Slices(IndexedSlices):
        values = indices = dense_shape = None

    values = np.arange(9, dtype=np.float32).reshape(3, 3)
    expected = one_step(Rows([4, 1, 4], values))
    for shape in (None, (6, 3)):
        assert one_step(Slices(values, [4, 1, 4], shape)).tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match=r"shape \(9, 3\) is not the parameter's \(6, 3\)"):
        one_step(Slices(values, [4, 1, 4], (9, 3)))


@pytest.mark.parametrize("rows", ["lazy", "exact"])
def test_the_same_array_may_be_values_of_rows_and_a_gradient_of_all_elements_by_turns(rows):
    """Of as many rows as the parameter has, so that only who gives it says what it is."""
    values = np.arange(12.0).reshape(4, 3)
    table, expected = np.zeros((4, 3)), np.zeros((4, 3))
    opt = SGD([table], lr=1.0, rows=rows)
    backwards, bad = Rows([3, 2, 1, 0], values), Rows([0, 1, 2, 4], values)
    for given in (values, values, backwards, bad, bad, backwards, values, bad, values):
        if given is bad:
            for _ in range(2):
                with pytest.raises(ValueError, match=r"indices\[3\] is 4, not the number of a row"):
                    opt.step([given])
        else:
            opt.step([given])
            expected -= values if given is values else values[::-1]
        assert table.tolist() == expected.tolist()
    for indices in (None, [3, 2, 1, 0], None, [3, 2, 1, 0]):
        functional.sgd(table, values, lr=1.0, indices=indices)
        expected -= values if indices is None else values[::-1]
        assert table.tolist() == expected.tolist()


# ---- functions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", BY_RULE)
@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("many", [False, True])
def test_functions_take_indices(rule, out, many):
    rng = np.random.default_rng(0)
    row = BY_RULE[rule]
    call = as_function(row.cls, {"lr": 0.1, "semantics": "torch"})
    shapes = [(30, 3), (20, 2, 64)] if many else [(30, 3)]
    params = [rng.standard_normal(shape) for shape in shapes]
    opt = row.cls([p.copy() for p in params], lr=0.1)
    state = [{k: a.copy() for k, a in s.items() if k != "step"} for s in opt.state]
    for step in range(1, 4):
        grads = [draw_rows(rng, p, 12) for p in params]
        if many and step == 2:
            grads[1] = as_dense(grads[1], params[1])
        opt.step(grads)
        options = {}
        if out:
            made = [[np.full_like(p, np.nan) for p in params]]
            made += [[np.full_like(s[k], np.nan) for s in state] for k in state[0]]
            options["out"] = tuple(a if many else a[0] for a in made)
        is_rows = [isinstance(g, Rows) for g in grads]
        values = [g.values if r else g for g, r in zip(grads, is_rows, strict=True)]
        indices = [g.indices if r else None for g, r in zip(grads, is_rows, strict=True)]
        slots = {k: [s[k] for s in state] if many else state[0][k] for k in state[0]}
        one = 0 if not many else slice(None)
        call(params[one], values[one], slots, step, indices=indices[one], **options)
        if out:
            params = made[0]
            state = [{k: made[1 + j][i] for j, k in enumerate(s)} for i, s in enumerate(state)]
        for i, p in enumerate(params):
            assert same_bits(p, opt.params[i])
            assert all(same_bits(state[i][k], opt.state[i][k]) for k in state[i])


@pytest.mark.parametrize(
    ("many", "indices", "error", "message"),
    [
        (False, [3], ValueError, r"^grads?: indices\[0\] is 3, not the number of a row: 0 to 2"),
        (False, [-1], ValueError, r"indices\[0\] is -1, not the number of a row"),
        (False, [0.5], TypeError, "^indices: expected integers"),
        (False, [0, 1], ValueError, "^values: shape .*, but there are 2 indices"),
        (True, [0], ValueError, "^indices: expected a list with an array, or None, for each of 2"),
        (True, np.zeros(2, int), ValueError, "^indices: expected a list with an array, or None"),
        (True, [None, [7]], ValueError, r"indices\[0\] is 7"),
    ],
    ids=str,
)
def test_functions_refuse_indices_of_no_rows(many, indices, error, message):
    param, grad = np.ones((3, 2)), np.ones((1, 2))
    other = np.ones((1, 2))
    params, grads = ([other, param], [np.ones((1, 2)), grad]) if many else (param, grad)
    with pytest.raises(error, match=message):
        functional.sgd(params, grads, lr=1.0, indices=indices)
    assert (param == 1).all()
    assert (other == 1).all()
    functional.sgd(param, grad, lr=1.0, indices=[1])
    assert param.tolist() == [[1, 1], [0, 0], [1, 1]]
