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
            return [Part(own[number], own[number + 1], own) for own in BOUNDS]

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
