"""Memory that something else lends, and that moves or goes away: never read or written there.

``frameworks/test_torch_lenders.py`` has what PyTorch does.
"""

import array
import copy
import ctypes
import gc
import mmap
import pickle
import re
from multiprocessing import shared_memory

import numpy as np
import pytest

import fastopt
from fastopt import SGD, functional

N = 1000
BIG = 1_000_000  # what had N elements cannot stay where it is


Doubles = ctypes.c_double * 3
Doubles.__qualname__ = "Doubles"  # so that its arrays can be pickled


class Lender:
    """Lends an array of its own by ``__dlpack__`` alone."""

    def __init__(self, lent):
        self.lent = lent

    def __dlpack__(self, **options):
        return self.lent.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.lent.__dlpack_device__()


# ---- what is given as it is: followed ------------------------------------------------------------


def test_a_ctypes_array_that_was_resized_is_followed():
    lender = (ctypes.c_double * N)()
    opt = SGD([lender], lr=1.0, momentum=0.5)
    opt.step([np.ones(N)])
    before = opt.params[0].ctypes.data
    ctypes.resize(lender, 8 * BIG)
    opt.step([np.ones(N)])
    assert opt.params[0].ctypes.data != before
    assert lender[:] == [-2.5] * N


def test_what_lends_other_memory_by_dlpack_is_followed():
    lender = Lender(np.zeros(N))
    opt = SGD([lender], lr=1.0, ema_decay=0.5)
    opt.step([np.ones(N)])
    lender.lent = np.full(N, 10.0)
    opt.step([np.ones(N)])
    assert (lender.lent == 9).all()
    assert (opt.ema[0] == (-1 + 9) / 2).all()
    lender.lent = np.full(N, 20.0)
    assert (opt.params[0] == 20).all()
    opt.reset()
    assert (opt.ema[0] == 20).all()


@pytest.mark.parametrize(
    ("lent", "message"),
    [
        (np.zeros(N, np.float32), "parameter 'w': its dtype has become float32; the optimizer was"),
        (np.zeros((2, 3)), r"parameter 'w': its shape has become (2, 3); the optimizer was made"),
        (np.zeros((4, 2)).T, "parameter 'w': its shape has become (2, 4)"),
        (np.zeros(2 * N)[::2], "parameter 'w': the array is not dense"),
        (np.broadcast_to(np.zeros(1), (N,)), "parameter 'w': the array is read-only"),
    ],
)
def test_a_lender_whose_array_became_another_is_refused_by_name(lent, message):
    lender = Lender(np.zeros(N))
    opt = SGD({"w": lender}, lr=1.0)
    opt.step({"w": np.ones(N)})
    lender.lent, before = lent, lender.lent
    for act in (
        lambda: opt.step({"w": np.ones(N)}),
        opt.reset,
        lambda: opt.load_state_dict(opt.state_dict()),
        lambda: opt.add_param_group({"params": {"b": np.zeros(1)}}),
        lambda: opt.params,
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
            act()
    assert not lent.any()
    assert (before == -1).all()
    lender.lent = before
    opt.step({"w": np.ones(N)})
    assert (before == -2).all()


def test_a_lender_that_lends_no_more_is_refused_by_name():
    lender = Lender(np.zeros(N))
    opt = SGD([lender], lr=1.0)
    lender.lent = None
    with pytest.raises(TypeError, match=r"^parameter 0: the memory of a Lender cannot be used: "):
        opt.step([np.ones(N)])


def test_memory_that_moves_whenever_it_is_looked_at_is_refused():
    class Restless(Lender):
        def __dlpack__(self, **options):
            self.lent = self.lent.copy()
            return super().__dlpack__(**options)

    opt = SGD([Restless(np.zeros(N))], lr=1.0)
    with pytest.raises(RuntimeError, match="the memory of a parameter moves while it is looked at"):
        opt.step([np.ones(N)])
    assert opt.completed_steps == 0


@pytest.mark.parametrize("keep", ["array", "memoryview"])
def test_what_cannot_move_while_it_is_lent_stays(keep):
    lender = array.array("d", [0.0] * N)
    given = lender if keep == "array" else memoryview(lender)
    opt = SGD([given], lr=1.0)
    with pytest.raises(BufferError):
        lender.append(1.0)
    opt.step([np.ones(N)])
    assert lender.tolist() == [-1.0] * N
    del opt, given
    gc.collect()
    lender.append(1.0)


def test_a_memoryview_of_what_was_resized_is_refused_by_name():
    lender = (ctypes.c_double * N)()
    _behind_it = [(ctypes.c_double * N)() for _ in range(8)]  # so that it cannot grow in place
    opt = SGD([memoryview(lender)], lr=1.0)
    ctypes.resize(lender, 8 * BIG)
    with pytest.raises(ValueError, match=r"^parameter 0: the memory that a .* has moved"):
        opt.step([np.ones(N)])
    assert not any(lender[:])


def test_memory_outlives_what_lent_it_where_it_can():
    opt = SGD([array.array("d", [0.0] * N), (ctypes.c_double * N)()], lr=1.0)
    gc.collect()
    opt.step([np.ones(N)] * 2)
    assert all((p == -1).all() for p in opt.params)


# ---- NumPy's arrays over memory that something else lends: refused, once it has moved ------------


def shared():
    memory = shared_memory.SharedMemory(create=True, size=8 * N)
    memory.unlink()
    return np.ndarray(N, buffer=memory.buf), memory.close, "gone: mmap closed or invalid"


def mapped(tmp_path):
    file = np.memmap(tmp_path / "w", np.float64, "w+", shape=N)
    return file, file._mmap.close, "gone: mmap closed or invalid"


def resized_map(tmp_path):
    with (tmp_path / "w").open("w+b") as file:
        file.truncate(8 * N)
        memory = mmap.mmap(file.fileno(), 8 * N)

    def move():
        memory.resize(1 << 30)

    return np.ndarray(N, buffer=memory), move, "has moved, or was freed"


def grown_bytes():
    memory = bytearray(8 * N)
    return np.ndarray(N, buffer=memory), lambda: memory.extend(bytes(8 * BIG)), "has moved"


def cleared_bytes():
    memory = bytearray(8 * N)
    return np.ndarray(N, buffer=memory), memory.clear, "has moved, or was freed"


def resized_ctypes():
    memory = (ctypes.c_double * N)()
    array = np.ctypeslib.as_array(memory)

    def move():
        """Resize it until it cannot grow where it is."""
        before, size = ctypes.addressof(memory), 8 * BIG
        while ctypes.addressof(memory) == before:
            ctypes.resize(memory, size)
            size *= 2

    return array, move, "has moved"


MOVES = [shared, mapped, resized_map, grown_bytes, cleared_bytes, resized_ctypes]


@pytest.fixture(params=MOVES, ids=lambda make: make.__name__)
def moving(request, tmp_path):
    """An array over lent memory, what moves that, and what the error then says."""
    make = request.param
    return make(tmp_path) if make in (mapped, resized_map) else make()


def test_a_parameter_whose_memory_has_moved_is_refused_by_name(moving):
    array, move, message = moving
    other = np.zeros(3)
    opt = SGD({"b": other, "w": array}, lr=1.0)
    opt.step({"b": np.ones(3), "w": np.ones(N)})
    assert (array == -1).all()
    move()
    for act in (lambda: opt.step({"b": np.ones(3), "w": np.ones(N)}), opt.reset):
        with pytest.raises(ValueError, match=f"^parameter 'w': the memory that .* {message}"):
            act()
    assert (other == -1).all()
    assert opt.completed_steps == 1


def test_a_gradient_whose_memory_has_moved_is_refused_by_name(moving):
    array, move, message = moving
    w = np.zeros(N)
    opt = SGD([w], lr=1.0)
    opt.step([array])
    move()
    with pytest.raises(ValueError, match=f"^gradient of parameter 0: the memory that .* {message}"):
        opt.step([array])
    part = array[N // 2 :]
    with pytest.raises(ValueError, match=f"^gradient of parameter 0: the memory that .* {message}"):
        SGD([w[N // 2 :]]).step([part])
    assert not w.any()


def test_functions_refuse_arrays_whose_memory_has_moved(moving):
    array, move, message = moving
    w, g, b = np.zeros(N), np.ones(N), np.zeros(N)
    functional.sgd(array, g, b, lr=0.0, momentum=0.5)
    b[...] = 0
    move()
    for name, arguments, out in [
        ("params", (array, g, b), None),
        ("grads", (w, array, b), None),
        ("momentum_buffers", (w, g, array), None),
        (r"out\[0\]", (w, g, b), (array, b)),
        ("params", (array, g, b), (w, b)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: the memory that .* {message}"):
            functional.sgd(*arguments, lr=1.0, momentum=0.5, out=out)
    assert not w.any()
    assert not b.any()


def test_an_array_of_from_dlpack_is_no_parameter():
    lent = np.from_dlpack(Lender(np.zeros(N)))
    assert lent.flags.writeable
    for given in (lent, lent[1:]):
        with pytest.raises(TypeError, match=r"^parameter 0: an array of np.from_dlpack\(\) cannot"):
            SGD([given])
    SGD([np.zeros(N)]).step([lent])  # a gradient is used at once


# ---- copies --------------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "old pickle": lambda x: pickle.loads(pickle.dumps(x, 2)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("kind", ["array", "ctypes"])
def test_a_model_that_lends_its_memory_is_copied_together_with_its_optimizer(how, first, kind):
    model = array.array("d", [0.0] * 3) if kind == "array" else Doubles()
    opt = SGD({"w": model}, lr=1.0, momentum=0.5)
    opt.step({"w": np.ones(3)})
    pair = COPIES[how]((model, opt) if first == "model" else (opt, model))
    copied, twin = pair if first == "model" else pair[::-1]
    for _ in range(2):
        twin.step({"w": np.ones(3)})
    assert list(copied) == [-1 - 1.5 - 1.75] * 3
    assert list(model) == [-1.0] * 3


def test_a_memoryview_is_not_copied_apart_from_its_model():
    opt = SGD([memoryview(array.array("d", [0.0] * 3))], lr=1.0)
    for copied in COPIES.values():
        with pytest.raises(TypeError, match=r"^parameter 0: a copy of this memoryview would have"):
            copied(opt)
    opt.step([np.ones(3)])
    assert (opt.params[0] == -1).all()


def make_flat_model():
    flat, model = fastopt.flatten(
        {"W": np.ones((2, 3), np.float32), "layers": [np.zeros(2, np.float32)]}
    )
    return flat, model


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("order", ["model first", "vector first", "optimizer alone"])
def test_a_flat_model_is_copied_together_with_its_optimizer_and_gradients(how, order):
    flat, model = make_flat_model()
    grad, grads = fastopt.flatten(model)
    opt = SGD([flat], lr=1.0, momentum=0.5)
    whole = {
        "model first": {"model": model, "grads": grads, "opt": opt, "flat": flat, "grad": grad},
        "vector first": {"flat": flat, "opt": opt, "grad": grad, "grads": grads, "model": model},
        "optimizer alone": {"model": model, "opt": opt, "grads": grads, "grad": grad},
    }[order]
    copied = COPIES[how](whole)
    for _ in range(2):  # so is the copy of a copy
        copied["grads"]["W"][...] = 1.0
        copied["grads"]["layers"][0][...] = -1.0
        copied["opt"].step([copied["grad"]])
        assert (copied["model"]["W"] == 0.0).all()
        assert (copied["model"]["layers"][0] == 1.0).all()
        copied["model"]["W"][...] = 1.0
        copied["model"]["layers"][0][...] = 0.0
        copied["opt"].reset()
        copied = COPIES[how](copied)
    assert copied["model"]["W"].flags.c_contiguous
    assert (flat == [1] * 6 + [0] * 2).all()


def test_views_of_a_copied_view_stay_valid():
    """They see memory that nothing else does any more, and that lives as long as they do."""

    class Model:
        def __init__(self):
            self.flat, (self.W,) = fastopt.flatten([np.ones((100, 100))])

        def __getstate__(self):
            return {"W": self.W, "flat": self.flat}

        def __setstate__(self, state):
            self.__dict__.update(state)

    class Early:
        """Is copied first, and takes a view of the copied array at once."""

        def __init__(self, W):
            self.W = W

        def __setstate__(self, state):
            self.W = state["W"]
            self.view = self.W[1:]

    model = Model()
    early, copied = copy.deepcopy((Early(model.W), model))
    copied.flat[...] = 7.0
    assert early.W is copied.W
    assert (early.W == 7).all()
    view = early.view
    del early, copied
    gc.collect()
    other = np.full((99, 100), 3.0)
    assert (view == 1).all()
    assert (other == 3).all()


def test_parts_and_results_of_a_flat_vector_are_ordinary_arrays():
    flat, _ = make_flat_model()
    assert type(flat * 2) is type(np.add(flat, 1)) is np.ndarray
    assert isinstance(flat.sum(), np.float32)
    before = flat
    flat -= 1
    assert flat is before
    for part in (flat[1:3], flat.reshape(2, 4), flat.copy()):
        for copied in COPIES.values():
            twin = copied(part)
            assert type(twin) is np.ndarray
            assert np.array_equal(twin, part)
            assert not np.shares_memory(twin, flat)


def test_a_view_that_is_gone_is_not_copied():
    flat, model = make_flat_model()
    del model["W"]
    twin, rest = copy.deepcopy((flat, model))
    twin[...] = 5
    assert rest["layers"][0].tolist() == [5, 5]


def test_only_arrays_alike_exchange_their_memory():
    for other in (np.zeros(3, np.float32), np.zeros(4)):
        with pytest.raises(ValueError, match="differ in dtype or shape"):
            fastopt._core.exchange_memory(np.zeros(3), other)
    one, other = np.zeros(3), np.ones(3)
    fastopt._core.exchange_memory(one, other)
    assert (one.tolist(), other.tolist()) == ([1, 1, 1], [0, 0, 0])
