"""One flat vector, and arrays that are views into it."""

import copy
import pickle
from collections import namedtuple

import numpy as np
import pytest
from stored import BF16, F16
from support import Table

import fastopt

MAKE = r"; give numpy\.asarray\(\.\.\.\)$"
Layer = namedtuple("Layer", ["W", "b"])


def model(dtype=np.float64):
    rng = np.random.default_rng(0)

    def array(*shape):
        return np.asarray(rng.standard_normal(shape), dtype)

    return {
        "layers": [Layer(array(3, 4).T, array(3)), Layer(array(2, 3), array())],
        "empty": array(0, 5),
        "pair": (array(2), {"deep": array(1, 1, 2)}),
    }


def leaves(m):
    first, second = m["layers"]
    return [*first, *second, m["empty"], m["pair"][0], m["pair"][1]["deep"]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, F16, BF16], ids=str)
def test_views_have_the_structure_shapes_and_values_and_fill_the_vector(dtype):
    given = model(dtype)
    flat, views = fastopt.flatten(given)
    assert flat.dtype == dtype
    assert flat.flags.c_contiguous
    assert not any(np.shares_memory(flat, leaf) for leaf in leaves(given))
    assert flat.ctypes.data % 64 == 0
    assert type(views["layers"]) is list
    assert type(views["layers"][0]) is Layer
    assert type(views["pair"]) is tuple
    assert list(views) == list(given)
    assert np.array_equal(flat, np.concatenate([a.ravel() for a in leaves(given)]))
    for view, array in zip(leaves(views), leaves(given), strict=True):
        assert view.shape == array.shape
        assert np.array_equal(view, array)
        assert np.shares_memory(view, flat) == (view.size > 0)
        assert not np.shares_memory(view, array)
    flat[...] = 7
    assert all((view == 7).all() for view in leaves(views))


def test_training_on_one_vector_gives_the_same_bits_as_on_its_views():
    flat, views = fastopt.flatten(model())
    apart = [np.array(view) for view in leaves(views)]
    grad = np.empty_like(flat)
    grads = fastopt.unflatten(grad, views)
    together, separate = (
        fastopt.Adam(p, lr=0.1, weight_decay=0.1, clip_value=1.0) for p in ([flat], apart)
    )
    for seed in range(5):
        grad[...] = np.random.default_rng(seed).standard_normal(flat.size)
        together.step([grad])
        separate.step(leaves(grads))
    for view, array in zip(leaves(views), apart, strict=True):
        assert view.tobytes() == array.tobytes()


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_a_vector_of_16_bits_steps_as_its_views_but_for_random_bits(dtype, stochastic):
    flat, views = fastopt.flatten({"w": np.ones((30, 5), dtype), "b": np.ones(40, dtype)})
    apart = [view.copy() for view in views.values()]
    options = {"master_weights": False, "stochastic_rounding": stochastic, "lr": 2**-8}
    together, separate = (fastopt.SGD(p, **options) for p in ([flat], apart))
    grad = np.linspace(0, 1, flat.size).astype(np.float32)
    grads = list(fastopt.unflatten(grad, views).values())
    for _ in range(3):
        together.step([grad])
        separate.step(grads)
    same = [v.tobytes() == a.tobytes() for v, a in zip(views.values(), apart, strict=True)]
    assert same == [True, not stochastic]  # the first view is the beginning of the vector
    assert (views["b"] < 1).any()


def test_copies_of_16_bits_keep_the_bond():
    flat, views = fastopt.flatten([np.ones(3, BF16), np.ones(2, BF16)])
    for other, (a, b) in (copy.deepcopy((flat, views)), pickle.loads(pickle.dumps((flat, views)))):
        other[...] = 2
        assert a.dtype == b.dtype == BF16
        assert (a.tolist(), b.tolist()) == ([2] * 3, [2] * 2)
    assert (flat == 1).all()


def test_a_list_of_numbers_stands_for_an_array_of_its_length():
    a, (b,) = fastopt.unflatten(np.arange(3.0), [[5, 6], (np.zeros(()),)])
    assert (a.tolist(), b.tolist()) == ([0, 1], 2)


def test_unflatten_takes_any_vector_as_it_is():
    base = np.arange(12, dtype=np.int16)
    a, b = fastopt.unflatten(base[::2], [np.zeros((2, 2)), np.zeros(2)])
    assert a.tolist() == [[0, 2], [4, 6]]
    b[0] = -1
    assert base[8] == -1


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ([], ValueError, "^no arrays"),
        ({"a": [], "b": ()}, ValueError, "^no arrays"),
        (np.ones(3), TypeError, "^arrays must be a list, tuple or dict of arrays, got ndarray"),
        ("ab", TypeError, "^arrays must be .* got str"),
        ([np.ones(2), 3.0], TypeError, "^array 1: expected a numpy.ndarray, got float" + MAKE),
        ([np.ones(2), [3.0]], TypeError, "^array 1: expected a numpy.ndarray, got list" + MAKE),
        ({"a": [np.ones(2), Table(np.ones(2))]}, TypeError, r"^array a\.1: .* got Table" + MAKE),
        ({"a": [np.ones(2), None]}, TypeError, r"^array a\.1: expected .* got NoneType"),
        ([np.ones(2, int)], TypeError, "^array 0: dtype int64 is not supported"),
        ([np.ones(2, ">f8")], TypeError, "^array 0: dtype >f8 is not supported"),
        ([np.ones(2, ">f2")], TypeError, "^array 0: dtype >f2 is not supported"),
        ([np.ones(2, F16), np.ones(2, BF16)], TypeError, "^array 1: .*bfloat16 is not .*, float16"),
        (
            {"w": np.ones(2), "x": {"b": np.ones(2, "f4")}},
            TypeError,
            r"^array x\.b: dtype float32 is not that of array w, float64",
        ),
    ],
)
def test_arrays_that_cannot_be_one_vector_are_refused(arrays, error, message):
    with pytest.raises(error, match=message):
        fastopt.flatten(arrays)


def test_containers_that_hold_themselves_are_refused():
    endless = {"w": np.ones(2)}
    endless["a"] = [endless]
    deep = [np.ones(2)]
    for _ in range(2000):
        deep = [deep]
    for given in (endless, deep):
        with pytest.raises(ValueError, match=r"nested too deep, .* or one holds itself"):
            fastopt.flatten(given)
        with pytest.raises(ValueError, match=r"nested too deep, .* or one holds itself"):
            fastopt.unflatten(np.ones(2), given)


class Dense(namedtuple("Dense", ["W", "b"])):
    """A named tuple that is made from something else than its fields."""

    def __new__(cls, n):
        return super().__new__(cls, np.ones((n, n)), np.ones(n))


def test_a_named_tuple_with_a_constructor_of_its_own_keeps_its_type():
    flat, views = fastopt.flatten({"layer": Dense(2)})
    flat[...] = 3
    assert type(views["layer"]) is Dense
    assert (views["layer"].W == 3).all()
    assert views["layer"].b.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("flat", "error", "message"),
    [
        (np.ones(3), ValueError, r"^flat must be of shape \(4,\), got \(3,\)"),
        (np.ones((4, 1)), ValueError, r"^flat must be of shape \(4,\), got \(4, 1\)"),
        ([1.0] * 4, TypeError, "^flat must be a numpy.ndarray, got list" + MAKE),
    ],
)
def test_a_vector_that_does_not_fit_is_refused(flat, error, message):
    with pytest.raises(error, match=message):
        fastopt.unflatten(flat, [np.ones((2, 1)), np.ones(2)])
