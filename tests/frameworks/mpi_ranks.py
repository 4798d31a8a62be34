"""What each rank of test_mpi.py does: one of the checks below, by its name."""

import copy
import os
import signal
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

sys.path.append(str(Path(__file__).parents[1]))
from tables import CASES, CLASSES

import fastopt
import fastopt.mpi as optim
from fastopt import _core

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
BLOCK = _core.BLOCK
SHAPES = [(2 * BLOCK + 11,), (3,), (), (70, 130), (0,), (BLOCK + 1, 2)]
IN_FORTRAN_ORDER = 5
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def over_mpi(cls):
    return getattr(optim, cls.__name__)


def starts(dtype=np.float32):
    rng = np.random.default_rng(1)
    arrays = [np.asarray(rng.standard_normal(shape), dtype) for shape in SHAPES]
    arrays[IN_FORTRAN_ORDER] = np.asfortranarray(arrays[IN_FORTRAN_ORDER])
    return arrays


def copies(arrays):
    return [array.copy(order="K") for array in arrays]


def gradients(step, rank, dtype=np.float32):
    """A rank's gradients: some are None on all ranks, some on one, some lie otherwise."""
    rng = np.random.default_rng([step, rank])
    grads = [np.asarray(3 * rng.standard_normal(shape), dtype) for shape in SHAPES]
    if step % 3 == 1:
        grads[1] = None
    if step % 3 == 2 and rank == 0:
        grads[3] = None
    if rank % 2:
        grads[3] = grads[3] if grads[3] is None else np.asfortranarray(grads[3])
    return grads


def mean_of(arrays, dtype):
    """The mean of what ranks have, added up in their order; None is zero, unless all are None."""
    if all(x is None for x in arrays):
        return None
    first = next(x for x in arrays if x is not None)
    wide = np.float64 if dtype == np.float64 else np.float32
    total = None
    for x in arrays:
        term = np.zeros(first.shape, wide) if x is None else x.astype(wide)
        total = term if total is None else total + term
    return np.asarray(total / wide(SIZE))


def means(step, dtype, grad_dtype=None):
    every = [gradients(step, rank, grad_dtype or dtype) for rank in range(SIZE)]
    return [mean_of(grads, dtype) for grads in zip(*every, strict=True)]


def assert_equal(serial, own, where):
    for i, (p, q) in enumerate(zip(serial.params, own.params, strict=True)):
        assert p.tobytes() == q.tobytes(), (where, i)


def steps_of(array):
    return [step for step, n in zip(array.strides, array.shape, strict=True) if n > 1]


def assert_same_state(serial, own, where):
    """Gathered on the last rank, it is the serial one, and lies as that does."""
    theirs, ours = serial.state_dict(), own.gather_state_dict(root=SIZE - 1)
    assert (ours is None) == (RANK != SIZE - 1)
    if ours is None:
        return
    assert ours.keys() == theirs.keys()
    for entry in ours.keys() - {"state", "ema"}:
        assert ours[entry] == theirs[entry], (where, entry)
    for key, state in theirs["state"].items():
        assert ours["state"][key].keys() == state.keys()
        for name, array in state.items():
            own = ours["state"][key][name]
            assert own.dtype == array.dtype, (where, key, name)
            assert steps_of(own) == steps_of(array), (where, key, name)
            assert own.tobytes() == array.tobytes(), (where, key, name)
    for key, array in (theirs["ema"] or {}).items():
        assert ours["ema"][key].tobytes() == array.tobytes(), (where, key)


def step_beside(cls, kwargs, dtype=np.float32, steps=4, grad_dtype=None, **more):
    """Step over MPI and without, and compare after each step."""
    params = starts(dtype)
    serial, own = cls(copies(params), **kwargs), over_mpi(cls)(copies(params), **kwargs, **more)
    for step in range(steps):
        want = serial.step(means(step, dtype, grad_dtype))
        got = own.step(gradients(step, RANK, grad_dtype or dtype))
        assert (got.grad_norm, got.skipped) == (want.grad_norm, want.skipped)
        assert_equal(serial, own, (cls.__name__, kwargs, step))
    assert own.completed_steps == serial.completed_steps
    assert_same_state(serial, own, (cls.__name__, kwargs))
    return serial, own


@check
def every_rule():
    for _, cls, kwargs in CASES:
        if not kwargs.get("rowwise"):
            step_beside(cls, kwargs, bucket_bytes=1 << 16)


@check
def options():
    for kwargs in (
        {"clip_value": 0.5},
        {"clip_norm": 1.0},
        {"global_clip_norm": 1.0, "nonfinite": "skip"},
        {"ema_decay": 0.9},
        {"nonfinite": "raise"},
        {"weight_decay": 0.1, "no_decay": lambda i, array: array.ndim < 2},
        {"num_threads": 1},
    ):
        step_beside(fastopt.Adam, kwargs, np.float64)
        step_beside(fastopt.AdamW, kwargs, ml_dtypes.bfloat16)
        step_beside(fastopt.AdamW, {**kwargs, "master_weights": False, "seed": 3}, np.float16)
        step_beside(fastopt.NAdam, {**kwargs, "state_dtype": "8bit"}, bucket_bytes=1 << 12)
        step_beside(fastopt.RMSprop, {**kwargs, "state_dtype": "bfloat16"}, bucket_bytes=1 << 22)


@check
def types_of_gradients():
    step_beside(fastopt.SGD, {"lr": 0.1}, np.float64, grad_dtype=np.float32)
    step_beside(fastopt.SGD, {"lr": 0.1}, np.float32, grad_dtype=ml_dtypes.bfloat16)
    serial, own = (kind([np.ones(9000, np.float32)], lr=1.0) for kind in (fastopt.SGD, optim.SGD))
    every = [
        np.full(9000, 0.1, (np.float16, np.float32, ml_dtypes.bfloat16)[rank % 3])
        for rank in range(SIZE)
    ]
    serial.step([mean_of(every, np.float32)])
    own.step([every[RANK]])
    assert_equal(serial, own, "mixed")


@check
def gradients_that_are_no_arrays():
    """As a step without MPI takes them, or refuses them."""
    serial, own = (kind([np.ones(()), np.ones(3)], lr=0.5) for kind in (fastopt.SGD, optim.SGD))
    for opt in serial, own:
        opt.step([np.float64(2.0), memoryview(np.arange(3.0))])
    assert_equal(serial, own, "scalar")
    for bad in 2.0, np.float64(2.0), [1.0] * 3, "x", np.ma.ones(3):
        said = []
        for opt in serial, own:
            with pytest.raises(TypeError) as caught:
                opt.step([None, bad])
            said.append(str(caught.value))
        assert said[1] == f"rank 0: {said[0]}"
    with pytest.raises(TypeError, match="a NumPy scalar cannot be zeroed"):
        own.step([np.float64(2.0), None], zero_grad=True)


@check
def groups_names_and_schedules():
    def made(kind):
        params = dict(zip("abcdef", copies(starts()), strict=True))
        first, second = ({k: params[k] for k in keys} for keys in ("abd", "cef"))
        opt = kind(
            [{"params": first, "lr": lambda done: 0.1 / (1 + done)}],
            weight_decay=0.1,
            no_decay=["b"],
        )
        opt.add_param_group({"params": second, "lr": 0.01, "amsgrad": True})
        return opt

    serial, own = made(fastopt.Adam), made(optim.Adam)
    for step in range(4):
        if step == 2:
            for opt in serial, own:
                opt.param_groups[0]["amsgrad"] = True
        serial.step(dict(zip("abcdef", means(step, np.float32), strict=True)), loss_scale=8.0)
        grads = dict(zip("abcdef", gradients(step, RANK), strict=True))
        own.step(grads, loss_scale=8.0, zero_grad=True)
        assert all(grad is None or not grad.any() for grad in grads.values())
        assert_equal(serial, own, step)
    assert_same_state(serial, own, "groups")


@check
def micro_batches():
    for kwargs in {}, {"nonfinite": "skip", "global_clip_norm": 1.0}:
        serial = fastopt.Adam(copies(starts()), **kwargs)
        own = optim.Adam(copies(starts()), accumulate=3, **kwargs)
        for step in range(3):
            every = []
            for rank in range(SIZE):
                zeros = [np.zeros(s, np.float32) for s in SHAPES]
                one = fastopt.SGD(zeros, lr=1, accumulate=3, maximize=True)
                for batch in range(3):
                    one.step(gradients(3 * step + batch, rank), loss_scale=2.0)
                every.append(one.params)
            serial.step([mean_of(x, np.float32) for x in zip(*every, strict=True)])
            for batch in range(3):
                assert own.accumulated_steps == batch
                if batch:
                    with pytest.raises(RuntimeError, match=f"{batch} of 3 micro-batches"):
                        own.gather_state_dict()
                own.step(gradients(3 * step + batch, RANK), loss_scale=2.0)
            assert_equal(serial, own, (kwargs, step))
        assert_same_state(serial, own, kwargs)
        if kwargs:
            bad = gradients(0, RANK)
            if RANK == SIZE - 1:
                bad[0][5] = np.nan
            assert own.step(bad).skipped
            assert own.accumulated_steps == 0
            assert_equal(serial, own, "a NaN")


@check
def sums_by_mpi():
    params = starts(np.float64)
    serial = fastopt.Adam(copies(params), global_clip_norm=1.0)
    own = optim.Adam(copies(params), global_clip_norm=1.0, reduction="mpi", bucket_bytes=1 << 15)
    for step in range(4):
        serial.step(means(step, np.float64))
        own.step(gradients(step, RANK, np.float64))
        for p, q in zip(serial.params, own.params, strict=True):
            np.testing.assert_allclose(p, q, rtol=1e-9, atol=1e-12)
        assert len({*COMM.allgather(b"".join(p.tobytes() for p in own.params))}) == 1


@check
def shares():
    """Each rank has its part of the state, to within a block, and of small parameters, too."""
    n = 100 * BLOCK + 7
    for kwargs, each in ({}, 8), ({"state_dtype": "8bit", "ema_decay": 0.9}, 6 + 2 / 64):
        many = [np.zeros(n, np.float32), *(np.zeros(100, np.float32) for _ in range(300))]
        total = sum(fastopt.Adam(many, **kwargs).nbytes.values()) - 8 * 301
        own = sum(optim.Adam(many, **kwargs).nbytes.values()) - 8 * 301
        assert sum(COMM.allgather(own)) == total
        assert own <= -(-total // SIZE) + each * BLOCK


@check
def state():
    """It goes from any number of ranks to any other by hand, and to the serial class."""
    kwargs = {"state_dtype": "8bit", "ema_decay": 0.5}
    serial, own = step_beside(fastopt.Adam, kwargs, np.float32)
    back = optim.Adam(copies(serial.params), **kwargs)
    back.load_state_dict(serial.state_dict())
    again = optim.Adam(copies(serial.params), **kwargs)
    again.load_state_dict(own.state_dict())
    alone = fastopt.Adam(copies(serial.params), **kwargs)
    alone.load_state_dict(COMM.bcast(own.gather_state_dict(), 0))
    for step in range(4, 6):
        for opt in serial, alone:
            opt.step(means(step, np.float32))
        for opt in own, back, again:
            opt.step(gradients(step, RANK))
            assert_equal(serial, opt, step)
    assert_equal(serial, alone, "alone")
    own.reset()
    assert own.completed_steps == 0
    assert not any(array.any() for array in own.state[0].values())
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(own)


@check
def goes_on(path, steps):
    """Go on from a file for some steps, whatever wrote it; gradients do not depend on the ranks."""
    opt = optim.AdamW(dict(zip("abcdef", starts(), strict=True)), state_dtype="8bit", ema_decay=0.9)
    if os.path.exists(path):
        opt.load(path)
    for _ in range(int(steps)):
        rng = np.random.default_rng(opt.completed_steps)
        grads = [np.asarray(rng.integers(-9, 10, s), np.float32) for s in SHAPES]
        opt.step(dict(zip("abcdef", grads, strict=True)))
    opt.save(path)


# ---- what is wrong on one rank -------------------------------------------------------------------


@check
def refusals():
    """All ranks raise the same, and nothing has changed."""
    last = SIZE - 1
    opt = optim.Adam(copies(starts()), nonfinite="raise", ema_decay=0.5)
    opt.step(gradients(0, RANK))

    def everything():
        arrays = [*opt.params, *opt.ema, *(x for s in opt.state for x in s.values())]
        return [x.tobytes() for x in arrays], opt.completed_steps

    before = everything()

    def refused(kind, match, action):
        began = time.monotonic()
        with pytest.raises(kind, match=match) as caught:
            action()
        assert type(caught.value) is kind
        assert time.monotonic() - began < 10
        assert everything() == before
        texts = COMM.allgather(str(caught.value))
        assert len({*texts}) == 1, texts

    def stepped(change, **options):
        def action():
            grads = gradients(0, RANK)
            if last == RANK:
                change(grads)
            opt.step(grads, **options)

        return action

    def put(i, value):
        return lambda grads: grads.__setitem__(i, value)

    refused(
        ValueError,
        rf"^rank {last}: gradient of parameter 3: shape",
        stepped(put(3, np.ones(2, np.float32))),
    )
    refused(
        TypeError, rf"^rank {last}: .*parameter 0.*float64", stepped(put(0, np.ones(SHAPES[0])))
    )
    refused(ValueError, rf"^rank {last}: expected 6 gradients", stepped(lambda g: g.pop()))
    refused(
        TypeError,
        rf"^rank {last}: gradient of parameter 0: .*some rows",
        stepped(put(0, fastopt.Rows([0], np.ones((1,), np.float32)))),
    )
    refused(ValueError, rf"^rank {last}: .*overlaps", stepped(put(0, opt.params[0][::-1])))
    for bad in np.nan, np.inf:
        refused(
            FloatingPointError,
            rf"^rank {last}: gradient of parameter 0 holds",
            stepped(lambda g, bad=bad: g[0].__setitem__(7, bad)),
        )

    def with_lr(lr):
        opt.param_groups[0]["lr"] = lr if last == RANK else 1e-3
        opt.step(gradients(0, RANK))

    refused(ValueError, rf"^rank {last}: .*lr must be", lambda: with_lr(-1.0))
    if SIZE > 1:
        refused(ValueError, rf"^rank {last}: another hyperparameters", lambda: with_lr(0.5))
        refused(
            ValueError,
            rf"^rank {last}: another loss_scale",
            lambda: opt.step(gradients(0, RANK), loss_scale=1.0 + (last == RANK)),
        )
    with_lr_back = opt.param_groups[0]
    with_lr_back["lr"] = 1e-3
    refused(
        ValueError,
        rf"^rank {last}: param_groups\[1\]",
        lambda: opt.add_param_group({"params": [np.ones(2)], "lr": -float(last == RANK)}),
    )
    state = opt.state_dict()
    if last == RANK:
        del state["state"][0]
    refused(
        ValueError,
        rf"^rank {last}: state_dict\['state'\]: missing",
        lambda: opt.load_state_dict(state),
    )
    refused(FileNotFoundError, r"^rank 0: .*No such file", lambda: opt.load("nowhere/to/be.found"))
    refused(FileNotFoundError, r"^rank 0: .*No such file", lambda: opt.save("nowhere/to/be.found"))

    def lr(done):
        if done and last == RANK:
            raise KeyError("a schedule's own")
        return 1e-3

    scheduled = optim.SGD([np.ones(3)], lr=lr)
    scheduled.step([np.ones(3)])
    with pytest.raises(KeyError, match=f"rank {last}: a schedule's own"):
        scheduled.step([np.ones(3)])
    opt.step(gradients(1, RANK))
    assert opt.completed_steps == 2


@check
def starts_that_differ():
    with pytest.raises(ValueError, match=rf"^rank {SIZE - 1}: lr must be"):
        optim.SGD([np.ones(3)], lr=-1.0 if RANK == SIZE - 1 else 1.0)
    with pytest.raises(ValueError, match="rowwise=True"):
        optim.Adagrad([np.ones((3, 3))], rowwise=True)
    with pytest.raises(ValueError, match=r'^rank 0: rows="exact"'):
        optim.SGD([np.ones((3, 3))], rows="exact")
    with pytest.raises(TypeError, match=r"comm: expected an mpi4py\.MPI\.Intracomm"):
        optim.Adagrad([np.ones((3, 3))], comm=0)
    if SIZE == 1:
        return
    for what, kwargs, params in (
        ("parameter 1: rank 1", {}, [np.ones(3), np.full(3, float(RANK == 1))]),
        ("rank 1 has other keys, shapes", {}, [np.ones(3 + (RANK == 1))]),
        ("rank 1 has other hyperparameters", {"lr": 1.0 + (RANK == 1)}, [np.ones(3)]),
        ("rank 1 has other options", {"seed": int(RANK == 1)}, [np.ones(3)]),
        ("rank 1 has other options", {"bucket_bytes": 9 + (RANK == 1) * 999}, [np.ones(3)]),
        (
            "rank 1 has other parameters excluded",
            {"no_decay": lambda i, p: RANK == 1},
            [np.ones(3)],
        ),
    ):
        with pytest.raises(ValueError, match=what):
            optim.SGD(params, **kwargs)
    opt = optim.SGD([np.ones(3)], lr=0.5, check=2)
    opt.step([np.ones(3)])
    if RANK == 1:
        opt.params[0][:] += 1
    with pytest.raises(RuntimeError, match="rank 1 has other values than rank 0; after 2 steps"):
        opt.step([None])


def drawn_layout(rng, array):
    """The same numbers, or for a broadcast array others, in an array that lies in some way."""
    way = rng.integers(4) if array.ndim > 1 else 0
    if way == 1:
        return np.asfortranarray(array)
    if way == 2:
        return np.broadcast_to(array.reshape(-1)[:1].reshape((1,) * array.ndim), array.shape)
    if way == 3:
        spread = np.empty((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)[..., ::2]
        spread[...] = array
        return spread
    return array


def mean_of_batches(batches, dtype, loss_scale):
    """What a rank means of its micro-batches, as an optimizer without MPI accumulates them."""
    means = []
    for grads in zip(*batches, strict=True):
        shape = next((g.shape for g in grads if g is not None), None)
        if shape is None:
            means.append(None)
            continue
        wide = np.float64 if dtype == np.float64 else np.float32
        opt = fastopt.SGD([np.zeros(shape, wide)], lr=1, accumulate=len(grads), maximize=True)
        for grad in grads:
            opt.step([grad], loss_scale=loss_scale)
        means.append(opt.params[0])
    return means


def draw_options(rng, dtype):
    kwargs = {"nonfinite": str(rng.choice(["propagate", "skip"])), "num_threads": 1}
    clip = rng.choice(["", "clip_value", "clip_norm", "global_clip_norm"])
    if clip:
        kwargs[str(clip)] = float(rng.choice([0.5, 50]))
    if rng.integers(2):
        kwargs["ema_decay"] = 0.9
    if rng.integers(2):
        kwargs["semantics"] = "keras"
    if dtype != np.float64:
        kwargs["master_weights"] = bool(rng.integers(2))
        kwargs["state_dtype"] = rng.choice([None, "8bit", "bfloat16"])
    return kwargs


def run_drawn(seed):
    rng = np.random.default_rng(seed)
    dtype = [np.float32, np.float64, ml_dtypes.bfloat16, np.float16][rng.integers(4)]
    kwargs, cls = draw_options(rng, dtype), CLASSES[rng.integers(len(CLASSES))]
    shapes = [*SHAPES, (3, 1, 2000, 1), (1, 9001), (63,)]
    params = [drawn_layout(rng, np.asarray(rng.standard_normal(s), dtype)) for s in shapes]
    params = [np.array(p, order="K") for p in params]  # dense
    accumulate, first = int(rng.choice([1, 1, 2])), int(rng.integers(1, len(shapes)))
    serial = cls(copies(params[:first]), **kwargs)
    own = over_mpi(cls)(
        copies(params[:first]),
        accumulate=accumulate,
        bucket_bytes=int(rng.choice([128, 1 << 12, 1 << 16, 1 << 23])),
        **kwargs,
    )
    for step in range(4):
        if step == 1:
            for opt in serial, own:
                opt.add_param_group({"params": copies(params[first:])})
        if step == 2:
            for opt in serial, own:
                group = opt.param_groups[0]
                group |= {
                    k: 0.9 if k == "momentum" else True
                    for k in ("amsgrad", "momentum", "centered")
                    if k in group
                }
        loss_scale, spoiled = float(rng.choice([1, 8, 3])), accumulate == 1 and rng.random() < 0.2
        every = []  # of each rank its micro-batches
        for rank in range(SIZE):
            batches = []
            for _ in range(accumulate):
                grads = []
                for param in own.params:
                    kind = [dtype, np.float16, ml_dtypes.bfloat16, dtype][rng.integers(4)]
                    grad = np.asarray(3 * rng.standard_normal(param.shape), kind)
                    if spoiled and rank == SIZE - 1 and grad.size:
                        grad.flat[-1] = np.nan
                    grads.append(None if rng.random() < 0.25 else drawn_layout(rng, grad))
                batches.append(grads)
            every.append(batches)
        if accumulate == 1:
            of_ranks, scale = [batches[0] for batches in every], loss_scale
        else:
            of_ranks = [mean_of_batches(batches, dtype, loss_scale) for batches in every]
            scale = 1.0
        mean = [mean_of(grads, dtype) for grads in zip(*of_ranks, strict=True)]
        want = serial.step(mean, loss_scale=scale)
        for grads in every[RANK]:
            got = own.step(grads, loss_scale=loss_scale)
        assert str((got.grad_norm, got.skipped)) == str((want.grad_norm, want.skipped)), (
            seed,
            step,
        )
        for i, (p, q) in enumerate(zip(serial.params, own.params, strict=True)):
            same = p.tobytes() == q.tobytes()
            assert same or np.array_equal(p.astype(float), q.astype(float), equal_nan=True), (
                seed,
                i,
            )
    if all(np.isfinite(p.astype(float)).all() for p in serial.params):
        assert_same_state(serial, own, seed)


@check
def random_settings():
    with np.errstate(all="ignore"):
        for seed in range(30):
            run_drawn(seed)


@check
def what_ranks_ask_for_differs():
    """They say so, and go on."""
    if SIZE == 1:
        return
    opt = optim.Adam([np.ones(3)])
    step, gather = (lambda: opt.step([np.ones(3)])), (lambda: opt.gather_state_dict(root=RANK))
    with pytest.raises(RuntimeError, match=r"^rank 1 calls step\(\), and rank 0 calls save\(\)"):
        step() if RANK else opt.save("nowhere")
    with pytest.raises(ValueError, match=r"^rank 1: another root than on rank 0"):
        gather()
    opt.param_groups[0]["amsgrad"] = RANK == 0
    for action in (lambda: opt.gather_state_dict(), step):
        with pytest.raises(ValueError, match=r"^rank 1: another (set of state|hyperparameters)"):
            action()
    opt.param_groups[0]["amsgrad"] = False
    if RANK == 1:  # keeps what amsgrad would need, as a class without MPI does
        opt.param_groups[0]["amsgrad"] = True
        with pytest.raises(ValueError):
            opt.step([np.ones(3)])
    else:
        with pytest.raises(ValueError):
            opt.step([np.ones(3)])
    opt.param_groups[0]["amsgrad"] = False
    opt.step([np.ones(3)])
    assert len(opt.param_groups) == 1
    for params in [np.full(2, float(RANK == 1))], [np.ones(2 + (RANK == 1))]:
        with pytest.raises(
            ValueError, match=r"rank 1 has other .* than rank 0; add the same group"
        ):
            opt.add_param_group({"params": params})
    assert len(opt.param_groups) == 1
    opt.step([np.ones(3)])
    assert opt.completed_steps == 2


@check
def loads_that_differ(folder):
    """A state dict ends micro-batches; files have to be the same ones."""
    start = optim.SGD([np.ones(3)], lr=1.0, accumulate=2)
    saved = start.gather_state_dict()
    saved = COMM.bcast(saved)
    start.step([np.full(3, 100.0)])
    start.load_state_dict(saved)
    assert start.accumulated_steps == 0
    start.step([np.ones(3)])
    start.step([np.ones(3)])
    assert (start.params[0] == 0).all()

    path = os.path.join(folder, f"{RANK}.safetensors")
    fastopt.SGD([np.full(2 * BLOCK, float(RANK))]).save(path)
    opt = optim.SGD([np.ones(2 * BLOCK)])
    if SIZE > 1:
        with pytest.raises(ValueError, match=r"^rank 1: another file than on rank 0"):
            opt.load(path)
        assert (opt.params[0] == 1).all()

    # A 0-d parameter, with a mark of what has not begun; and one that has no state, in any order.
    own = optim.SGD(
        [np.zeros(()), np.asfortranarray(np.ones((70, 90), ml_dtypes.bfloat16))],
        master_weights=False,
    )
    own.step([np.ones(()), np.ones((70, 90), ml_dtypes.bfloat16)])
    own.param_groups[0]["momentum"] = 0.9
    own.load_state_dict(own.state_dict())
    own.load_state_dict(COMM.bcast(own.gather_state_dict()))


@check
def groups_added_one_by_one():
    """They are as even as if they had come together."""
    opt = optim.Adam([np.zeros(5000, np.float32)])
    for _ in range(40):
        opt.add_param_group({"params": [np.zeros(BLOCK, np.float32)]})
    every = COMM.allgather(opt.nbytes["exp_avg"])
    assert sum(every) == 4 * (5000 + 40 * BLOCK)
    assert max(every) - min(every) <= 2 * 4 * BLOCK
    opt.step([np.ones(p.shape, np.float32) for p in opt.params])


@check
def communicators_are_freed():
    for _ in range(2500):
        comm = COMM.Dup()
        optim.SGD([np.ones(3)], comm=comm)
        comm.Free()


@check
def memory_that_is_exchanged():
    w, other = np.ones(3), np.zeros(3)
    opt = optim.SGD([w], lr=1.0)
    if RANK == SIZE - 1:
        _core.exchange_memory(w, other)
    with pytest.raises(ValueError, match=f"^rank {SIZE - 1}: parameter 0: its memory has moved"):
        opt.step([np.ones(3)])


@check
def errors_without_a_text():
    class WordlessError(Exception):
        def __str__(self):
            raise ValueError("none")

    class PairError(Exception):
        def __init__(self, one, other):
            super().__init__(f"{one} and {other}")

    for error, match in (
        (WordlessError(), "its text cannot be made"),
        (PairError(1, 2), "rank 0: 1 and 2"),
    ):

        def lr(completed_steps, error=error):
            if completed_steps:
                raise error
            return 1.0

        opt = optim.SGD([np.ones(3)], lr=lr)
        opt.step([np.ones(3)])
        with pytest.raises(RuntimeError, match=match):
            opt.step([np.ones(3)])


@check
def handlers():
    """A handler that sets another keeps it; one that raises leaves the others in place."""
    calls = []

    def once(number, frame):
        calls.append(number)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def other(number, frame):
        calls.append(number)

    def lr(completed_steps):
        if completed_steps == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR2)
        return 1.0

    signal.signal(signal.SIGUSR1, once)
    signal.signal(signal.SIGUSR2, other)
    opt = optim.SGD([np.ones(3)], lr=lr)
    for _ in range(2):
        opt.step([np.ones(3)])
    assert sorted(calls) == [signal.SIGUSR1, signal.SIGUSR2]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGUSR2) is other


@check
def several_communicators():
    half = COMM.Split(RANK % 2, RANK)
    w = np.ones(2 * BLOCK)
    opt = optim.SGD([w], lr=1.0, comm=half)
    opt.step([np.full(2 * BLOCK, float(RANK))])
    assert {*w} == {1.0 - (sum(range(RANK % 2, SIZE, 2)) / half.size)}
    request = COMM.irecv(source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG)  # meets no message of ours
    opt.step([np.zeros(2 * BLOCK)])
    COMM.send("mine", RANK)
    assert request.wait() == "mine"


@check
def interrupted():
    """A signal during a step: its handler raises, before or after all of the step."""

    began, caught, who, after = time.monotonic(), 0, -1, 0.0

    def lr(completed_steps):  # evaluated within the step
        if who == RANK:
            signal.setitimer(signal.ITIMER_REAL, after)
        return 1e-3

    opt = optim.Adam([np.ones(50 * BLOCK, np.float32)], lr=lr, bucket_bytes=1 << 15)
    twin = fastopt.Adam([np.ones(50 * BLOCK, np.float32)])
    grad = np.ones(50 * BLOCK, np.float32)
    rng = np.random.default_rng(0)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    while caught < 30 and time.monotonic() - began < 90:
        who, after = rng.integers(SIZE), rng.uniform(1e-5, 3e-3)
        COMM.Barrier()
        said = None
        try:
            opt.step([grad])
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt as error:
            said = str(error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        told = COMM.allgather((said, opt.completed_steps))
        assert len({steps for _, steps in told}) == 1, told
        texts = {text for text, _ in told}
        assert texts in ({None}, {None, ""}, {""}, {f"rank {who}: "}), texts
        caught += texts != {None}
        while twin.completed_steps < opt.completed_steps:
            twin.step([grad])
        assert_equal(twin, opt, caught)
    assert caught == 30


@check
def fails(how):
    """One rank ends in the middle: the others do not wait for it."""
    opt = optim.SGD([np.ones(3 * BLOCK)], lr=0.1)
    for step in range(10):
        if step == 5 and RANK == SIZE - 1:
            print(f"now: {time.time()}", flush=True)
            if how == "exception":
                raise LookupError("a bug of the program's")
            os.kill(os.getpid(), getattr(signal, how))
        opt.step([np.ones(3 * BLOCK)])


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    assert len(CLASSES) == len(optim.__all__)
    CHECKS[name](*arguments)
    COMM.Barrier()
    if RANK == 0:
        print("done")
