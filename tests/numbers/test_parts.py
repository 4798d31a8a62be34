"""Optimizers that step over parts of parameters: together, they have the bits of one over all."""

import functools

import numpy as np
import pytest
from tables import CASES

import fastopt
from fastopt import _core
from fastopt._members import Part

BLOCK = _core.BLOCK
SHAPES = [(2 * BLOCK + 11,), (), (BLOCK + 1, 2), (0,), (3,)]
BOUNDS = [(0, BLOCK, BLOCK, 2 * BLOCK + 11), (0, 0, 1, 1), (0, 0, 2 * BLOCK, 2 * BLOCK + 2)]
BOUNDS += [(0, 0, 0, 0), (0, 3, 3, 3)]
N_PARTS = 3
BY_ELEMENT = [case for case in CASES if not case[2].get("rowwise")]  # (a part may end in a row)


@functools.cache
def part_of(cls, number):
    """A class that has part number `number` of each parameter."""

    def cut(self):
        def parts(wholes, nbytes):
            assert [whole.shape for whole in wholes] == SHAPES
            assert len(nbytes) == len(wholes)
            return [
                Part(own[number], own[number + 1], own, n)
                for own, n in zip(BOUNDS, nbytes, strict=True)
            ]

        return parts

    return type(cls.__name__, (cls,), {"_cut": property(cut)})


def in_memory_order(array):
    return array.reshape(-1, order="F" if array.flags.f_contiguous else "C")


def starts(dtype):
    rng = np.random.default_rng(0)
    arrays = [np.asarray(rng.standard_normal(shape), dtype) for shape in SHAPES]
    arrays[2] = np.asfortranarray(arrays[2])
    return arrays


def stepped(opts, grads, loss_scale=1.0):
    """Step each over its part, having put together what each has found out of the gradients."""
    split = [
        [
            None if g is None else in_memory_order(g)[own[k] : own[k + 1]]
            for g, own in zip(grads, BOUNDS, strict=True)
        ]
        for k in range(N_PARTS)
    ]
    found = []
    for opt, own in zip(opts, split, strict=True):
        sums, finite = opt._plan.scan(own, loss_scale)
        assert finite.all()
        found.append(iter(sums))
    squares = []
    for own in BOUNDS:
        total = 0.0
        for k in range(N_PARTS):
            for _ in range(own[k], own[k + 1], BLOCK):
                total += next(found[k])
        squares.append(total)
    assert all(next(rest, None) is None for rest in found)
    return [
        opt._plan.step_part(own, loss_scale, np.array(squares))
        for opt, own in zip(opts, split, strict=True)
    ]


def train_beside(cls, kwargs, dtype):
    params = starts(dtype)
    serial = cls([p.copy(order="K") for p in params], **kwargs)
    opts = [part_of(cls, k)([p.copy(order="K") for p in params], **kwargs) for k in range(N_PARTS)]
    rng = np.random.default_rng(1)
    for step in range(4):
        grads = [np.asarray(rng.standard_normal(shape), dtype) for shape in SHAPES]
        grads[2] = np.asfortranarray(grads[2])
        if step in (0, 2):
            grads[0] = None
        want = serial.step(grads, loss_scale=2.0)
        for got in stepped(opts, grads, 2.0):
            assert got.grad_norm == want.grad_norm
    for i, own in enumerate(BOUNDS):
        for k, opt in enumerate(opts):
            part = slice(own[k], own[k + 1])
            arrays = {"param": (serial.params[i], in_memory_order(opt.params[i])[part])}
            if serial.ema is not None:
                arrays["ema"] = serial.ema[i], opt.ema[i]
            for name, array in serial.state[i].items():
                arrays[name] = array, opt.state[i][name]
            for name, (whole, array) in arrays.items():
                if name == "step" or name == "mu_product":
                    assert whole == array
                elif name.endswith("_scale"):
                    scales = slice(-(-own[k] // 64), -(-own[k + 1] // 64))
                    assert whole[scales].tobytes() == array.tobytes(), (i, k, name)
                else:
                    assert in_memory_order(whole)[part].tobytes() == array.tobytes(), (i, k, name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "cls", "kwargs"), BY_ELEMENT, ids=[c[0] for c in BY_ELEMENT])
def test_every_rule_equals_steps_over_all(name, cls, kwargs, dtype):
    train_beside(cls, kwargs, dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 1.0},
        {"global_clip_norm": 1.0, "ema_decay": 0.9},
        {"state_dtype": "8bit", "clip_value": 0.5},
        {"state_dtype": "bfloat16", "seed": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [fastopt.Adam, fastopt.NAdam, fastopt.SGD])
def test_options_and_storage_equal_steps_over_all(cls, options):
    kwargs = {"momentum": 0.9} if cls is fastopt.SGD else {}
    train_beside(cls, {**kwargs, **options}, np.float32)


def test_a_block_that_is_not_finite_is_found():
    opt = part_of(fastopt.SGD, 2)(starts(np.float64))
    grads = [np.zeros(own[3] - own[2]) for own in BOUNDS]
    grads[0][-1] = np.inf
    sums, finite = opt._plan.scan(grads, 1.0)
    assert list(finite) == [True, False, True]
    assert not np.isfinite(sums[1])
    with pytest.raises(ValueError, match="squares: expected 5 of float64"):
        opt._plan.step_part(grads, 1.0, np.zeros(4))


# ---- means ---------------------------------------------------------------------------------------


def test_a_mean_is_added_up_in_order_and_divided():
    rng = np.random.default_rng(0)
    for dtype, others in (np.float32, [np.float16]), (np.float64, [np.float16, np.float32]):
        vectors = [rng.standard_normal(2 * BLOCK + 5).astype(dtype) for _ in range(3)]
        vectors += [rng.standard_normal(2 * BLOCK + 5).astype(other) for other in others]
        total = vectors[0].astype(dtype)
        for vector in vectors[1:]:
            total = total + vector.astype(dtype)
        mean = np.empty_like(total)
        _core.ordered_mean(vectors, mean)
        assert mean.tobytes() == (total / dtype(len(vectors))).tobytes()

        grad, total = vectors[-1].astype(dtype), vectors[1]
        for kept, given, expected in (
            (total, vectors[-1], (total + dtype(0.3) * grad) / dtype(3)),
            (None, vectors[-1], (dtype(0.3) * grad) / dtype(3)),
            (total, None, total / dtype(3)),
        ):
            _core.batch_mean(kept, given, 0.3, 3, mean)
            assert mean.tobytes() == expected.tobytes()


def test_a_mean_of_what_does_not_fit_is_refused():
    narrow, wide = np.zeros(3, np.float32), np.zeros(3)
    for vectors, to, match in (
        ([narrow, wide], narrow.copy(), "vector 1: float32 lacks values of float64"),
        ([narrow[:2]], narrow.copy(), "vector 0: expected a contiguous vector of 3"),
        ([np.zeros(6, np.float32)[::2]], narrow.copy(), "vector 0: expected a contiguous"),
        ([narrow], np.zeros(3, np.float16), "to: expected float32 or float64, got float16"),
        ([np.zeros(3, int)], narrow.copy(), "vector 0: expected a contiguous vector of 3 numbers"),
    ):
        with pytest.raises(ValueError, match=match):
            _core.ordered_mean(vectors, to)
    for total, grad, match in (
        (wide, None, "total: expected float32, got float64"),
        (None, wide, "grad: float32 lacks values of float64"),
        (None, None, "one of them has to be there"),
        (narrow[:2], None, "total: expected a contiguous vector of 3"),
    ):
        with pytest.raises(ValueError, match=match):
            _core.batch_mean(total, grad, 1.0, 1, np.zeros(3, np.float32))


# ---- messages ------------------------------------------------------------------------------------


def numbers(values, dtype=np.int64):
    return np.array(list(values), dtype)


def test_runs_of_vectors_go_into_a_message_and_out_of_it():
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal(n).astype(t) for n, t in ((50, "f4"), (7, "f8"), (0, "f4"))]
    table = [(0, 3, 20, 0), (1, 0, 7, 128), (0, 30, 31, 192)]
    runs = _core.Runs(table)
    addresses = numbers(map(_core.address, vectors))
    sizes = numbers(v.itemsize for v in vectors)
    message = np.full(196, 255, np.uint8)
    assert runs.pack(addresses, sizes, message) == []
    for i, begin, end, at in table:
        data = vectors[i][begin:end].tobytes()
        assert message[at : at + len(data)].tobytes() == data
    assert (message[68:128] == 255).all()

    others = [np.zeros_like(v) for v in vectors]
    runs.unpack(message, numbers(map(_core.address, others)), sizes)
    assert others[1].tobytes() == vectors[1].tobytes()
    assert np.flatnonzero(others[0]).tolist() == [*range(3, 20), 30]
    assert (others[0][3:20] == vectors[0][3:20]).all()

    addresses[0] = 0  # somebody else has to put them there
    message[:] = 0
    assert runs.pack(addresses, sizes, message) == [0, 2]
    assert np.flatnonzero(message).min() >= 128
    for wrong in (
        (addresses[:1], sizes, message),
        (addresses, sizes.astype(np.int32), message),
        (addresses, sizes, message[:-1]),
        (addresses, sizes, np.zeros(400, np.uint8)[::2]),
    ):
        with pytest.raises(ValueError, match=r"expected .* numbers of one type"):
            runs.pack(*wrong)
    assert _core.Runs([]).pack(numbers([]), numbers([]), np.empty(0, np.uint8)) == []


def test_means_of_runs_are_those_of_vectors():
    rng = np.random.default_rng(0)
    table = [(1, 2, 9, 0), (0, 0, 5, 64)]
    runs, storage = _core.Runs(table), _core.STORAGES
    own = [rng.standard_normal(9).astype(np.float16), rng.standard_normal(12).astype(np.float32)]
    rows = np.zeros((3, 128), np.uint8)
    pieces = [[None] * 3, [None] * 3]
    for k, (i, begin, end, at) in enumerate(table):
        for rank in range(3):
            piece = rng.standard_normal(end - begin).astype(np.float32)
            if rank == 1:  # which is `own`
                piece = own[i][begin:end]
            else:
                rows[rank, at : at + piece.nbytes] = piece.view(np.uint8)
            pieces[k][rank] = piece
    means = [np.zeros(end - begin, np.float32) for _, begin, end, _ in table]
    arguments = (
        rows,
        numbers([storage["float32"]] * 2, np.uint8),
        1,
        numbers(map(_core.address, own)),
        numbers([storage["float16"], storage["float32"]], np.uint8),
        numbers(x.itemsize for x in own),
    )
    assert runs.mean(*arguments, means) == []
    for mean, (first, second, third) in zip(means, pieces, strict=True):
        total = first + second.astype(np.float32) + third
        assert mean.tobytes() == (total / np.float32(3)).tobytes()
    absent = (*arguments[:3], arguments[3] * [0, 1], *arguments[4:])
    assert runs.mean(*absent, means) == [1]
    with pytest.raises(ValueError, match="run 1: 4 means of 5 elements"):
        runs.mean(*arguments, [means[0], means[1][:4]])
    with pytest.raises(ValueError, match="to: expected float32 or float64, got float16"):
        runs.mean(*arguments, [means[0], own[0][:5]])


def test_places_of_gradients_are_theirs_where_they_lie_as_parameters_do():
    params = [np.zeros((3, 4)), np.asfortranarray(np.zeros((3, 4))), np.zeros(3), np.zeros(2)]
    opt = fastopt.SGD(params)
    grads = [np.ones((3, 4)), np.ones((3, 4)), np.ones(3, np.float32), None]
    arrays = opt._plan.check_gradients(grads)
    assert [a is g for a, g in zip(arrays, grads, strict=True)] == [True] * 4
    addresses, storages = opt._plan.places()
    assert addresses.tolist() == [_core.address(grads[0]), 0, _core.address(grads[2]), 0]
    assert storages[:2].tolist() == [_core.STORAGES["float64"]] * 2
    assert storages[2] == _core.STORAGES["float32"]
