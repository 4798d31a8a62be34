"""The C core equals the NumPy reference bit for bit, however it is run."""

import ctypes
import itertools
import math
import threading
import time

import numpy as np
import pytest
from fpmode import flush_to_zero
from oracle import Oracle, assert_same_bits, run_everywhere
from tables import BY_RULE, CASE_IDS, CASES

import fastopt
from fastopt import _core, reference

BLOCK = _core.BLOCK
SIZES = [*range(10), 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, BLOCK - 1, BLOCK, BLOCK + 1]
TEAMS = [("team", 1), ("team", 2), ("team", 3), ("team", 7), ("openmp", 2), ("serial", 3)]
TEAMS = [(layer, n) for layer, n in TEAMS if layer in _core.layers()["available"]]
STEPS = 10
DTYPES = [np.float32, np.float64]


def values(rng, shape, dtype):
    """Normal numbers of very different sizes, subnormals, and zeros of both signs."""
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 4, shape)
    tiny = np.finfo(dtype).smallest_subnormal * rng.integers(-1000, 1000, shape)
    kind = rng.integers(0, 12, shape)
    x = np.where(kind == 0, 0.0, np.where(kind == 1, -0.0, np.where(kind == 2, tiny, x)))
    return np.asarray(x, dtype)


def unaligned(array):
    raw = np.empty(array.nbytes + 1, np.uint8)
    copy = raw[1:].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run_both(cls, kwargs, params, gradients, **step_options):
    """Step the optimizer and its twin over lists of gradients, comparing after each step."""
    opt = cls(params, **kwargs)
    twin = Oracle(opt, **kwargs)
    for number, grads in enumerate(gradients):
        opt.step(grads, **step_options)
        twin.step(grads, **{k: v for k, v in step_options.items() if k == "loss_scale"})
        assert_same_bits(opt, twin, f"step {number + 1}")
    return opt


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "cls", "kwargs"), CASES, ids=CASE_IDS)
def test_every_rule_equals_the_reference(name, cls, kwargs, dtype):
    rng = np.random.default_rng(CASE_IDS.index(name))
    starts = [values(rng, n, dtype) for n in SIZES]
    gradients = [[values(rng, n, dtype) for n in SIZES] for _ in range(STEPS)]
    twin = Oracle(cls([p.copy() for p in starts], **kwargs), **kwargs)
    run_everywhere(lambda: cls([p.copy() for p in starts], **kwargs), twin, gradients, TEAMS)


def test_the_table_reaches_every_loop():
    reached = set()
    for _, cls, kwargs in CASES:
        opt = cls([np.zeros(1)], **kwargs)
        reached.add((opt._rule.name, tuple(sorted(opt.state[0]))))
    assert len(reached) == sum(2 ** len(row.switches()) for row in BY_RULE.values()) >= 9
    assert {rule for rule, _ in reached} == set(_core.rule_names())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "cls", "kwargs"), CASES[::3], ids=CASE_IDS[::3])
def test_layout_and_alignment_change_no_bit(name, cls, kwargs, dtype):
    rng = np.random.default_rng(CASE_IDS.index(name))
    shape = (3, 41, 43)  # more than one block, and no multiple of anything
    start = values(rng, shape, dtype)
    layouts = [
        np.ascontiguousarray,
        np.asfortranarray,
        unaligned,
        lambda a: np.ascontiguousarray(a.transpose(1, 2, 0)).transpose(2, 0, 1),
    ]
    grad_layouts = [
        *layouts,
        lambda a: np.ascontiguousarray(a[::-1, :, ::-1])[::-1, :, ::-1],
        lambda a: np.repeat(a, 2, axis=2)[:, :, ::2],
        lambda a: unaligned(np.repeat(a, 3, axis=0))[1::3],
    ]
    params = [layout(start.copy()) for layout in layouts for _ in grad_layouts]
    grads = [
        [layout(g) for _ in layouts for layout in grad_layouts]
        for g in (values(rng, shape, dtype) for _ in range(3))
    ]
    opt = run_both(cls, kwargs, params, grads)
    assert len(opt.params) == 28
    for param in opt.params[1:]:
        assert param.tobytes("C") == opt.params[0].tobytes("C")


@pytest.mark.parametrize("clip", ["clip_norm", "global_clip_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_depends_on_no_layout_but_the_parameters(dtype, clip):
    rng = np.random.default_rng(0)
    shape = (3, 41, 43)
    orders = list(itertools.permutations(range(3)))

    def laid_out(a, order):
        return a.transpose(order).copy(order="C").transpose(np.argsort(order))

    start, *steps = (rng.standard_normal(shape).astype(dtype) for _ in range(11))
    grads = [[laid_out(g, order) for g in steps] for order in orders]
    grads.append([unaligned(g) for g in steps])
    grads.append([np.repeat(g, 2, axis=2)[:, :, ::2] for g in steps])
    grads.append([g[::-1, :, ::-1].copy(order="C")[::-1, :, ::-1] for g in steps])
    for order in orders:
        seen = set()
        for given, threads in itertools.product(grads, (1, 2)):
            param = laid_out(start, order)
            opt = fastopt.SGD([param], lr=0.1, num_threads=threads, **{clip: 0.5})
            seen.add((*[opt.step([g]).grad_norm for g in given], param.tobytes()))
        assert len(seen) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_is_as_near_to_the_exact_one_as_the_docs_say(dtype):
    rng = np.random.default_rng(1)
    small = 1e-36 if dtype == np.float32 else 1e-100  # in float32 many are subnormal
    for size in (1, 15, 16, 17, 4095, 4097, 50_000):
        normal = rng.standard_normal(size)
        apart = normal * 10.0 ** rng.uniform(-30, 30, size)
        for elements in (normal, apart, np.full(size, 1 / 3), normal * small):
            grad = elements.astype(dtype)
            squares = grad.astype(np.longdouble) ** 2
            exact = np.sqrt(squares.sum())
            norm = fastopt.SGD([grad.copy()], clip_norm=1.0).step([grad]).grad_norm
            assert abs(norm - exact) <= (size / 8192 + 132) * 2**-53 * exact


def test_a_broadcast_gradient_is_read_as_it_is():
    param = np.arange(12.0).reshape(3, 4)
    grad = np.broadcast_to(np.array([1.0, -2.0, 3.0, 4.0]), (3, 4))
    run_both(fastopt.Adam, {"lr": 0.1}, [param], [[grad]] * 3)


def test_a_gradient_may_be_its_own_parameter():
    rng = np.random.default_rng(0)
    for _, cls, kwargs in CASES:
        param = values(rng, 100, np.float32)
        opt = cls([param], **kwargs)
        twin = Oracle(opt, **kwargs)
        for _ in range(5):
            opt.step([param])
            twin.step([twin.params[0].copy()])
        assert_same_bits(opt, twin)


OPTIONS = [
    {"clip_value": 0.5},
    {"clip_norm": 1.0},
    {"global_clip_norm": 1.0},
    {"ema_decay": 0.9},
    {"global_clip_norm": 2.0, "ema_decay": 0.99, "nonfinite": "skip"},
    {"clip_norm": 1e9},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("semantics", ["torch", "keras"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_clipping_scaling_and_averaging_equal_the_reference(options, semantics, dtype):
    rng = np.random.default_rng(1)
    sizes = [*range(1, 40), BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17]
    starts = [values(rng, n, dtype) for n in sizes] + [values(rng, (37, 131), dtype).T]
    ran = 0
    for isa in _core.isa()["supported"]:
        _core.select_isa(isa)
        for layer, team in TEAMS:
            _core.select_layer(layer)
            _core.force_threads(team)
            grads = [values(rng, p.shape, dtype) for p in starts]
            some = [None if i % 3 == 0 else g for i, g in enumerate(grads)]
            kwargs = {"lr": 0.1, "momentum": 0.9, "semantics": semantics, **options}
            params = [p.copy(order="K") for p in starts]
            run_both(fastopt.SGD, kwargs, params, [grads, some, grads], loss_scale=3.0)
            ran += 1
    assert ran == len(_core.isa()["supported"]) * len(TEAMS)


def test_grad_norm_equals_the_reference_and_is_accurate():
    rng = np.random.default_rng(2)
    params = [np.zeros(n, np.float32) for n in (5, BLOCK + 3, 70000)]
    grads = [rng.standard_normal(p.size).astype(np.float32) for p in params]
    opt = fastopt.SGD(params, global_clip_norm=1.0)
    exact = math.sqrt(math.fsum(float(x) ** 2 for g in grads for x in g))
    norm = opt.step(grads).grad_norm
    assert norm == reference.grad_norm(grads, params)
    assert norm == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("isa", _core.isa()["supported"])
@pytest.mark.parametrize("team", [1, 3])
def test_random_bit_patterns_give_the_same_bits(isa, team):
    """Every kind of float at once: NaNs, infinities, subnormals, in all places."""
    _core.select_isa(isa)
    _core.force_threads(team)
    rng = np.random.default_rng(3)
    for dtype, unsigned in ((np.float32, np.uint32), (np.float64, np.uint64)):
        for _, cls, kwargs in CASES:
            draw = [
                rng.integers(0, np.iinfo(unsigned).max, 300, unsigned, endpoint=True).view(dtype)
                for _ in range(4)
            ]
            run_both(cls, kwargs, [draw[0]], [[g] for g in draw[1:]])


def test_a_number_of_threads_that_is_found_out_changes_no_bit():
    """Many steps as users run them: each number of threads is tried, and workers come late."""
    rng = np.random.default_rng(5)
    starts = [values(rng, n, np.float32) for n in (9 * BLOCK + 5, *[700] * 60, 20 * BLOCK)]
    grads = [values(rng, p.size, np.float32) for p in starts]
    kwargs = {"clip_norm": 1.0, "ema_decay": 0.9}
    alone, together = (
        fastopt.Adam([p.copy() for p in starts], num_threads=n, **kwargs) for n in (1, 5)
    )
    used = set()
    for number in range(600):
        assert alone.step(grads).threads == 1
        used.add(together.step(grads).threads)
        if number % 50 == 0:
            time.sleep(0.001)  # the workers fall asleep
    assert_same_bits(together, alone, f"{used} threads")
    if fastopt.get_num_threads() > 1:  # with one processor, the caller is done before others come
        assert len(used) > 1


def test_a_pool_of_the_programs_own_changes_no_bit():
    """Large steps may run in threads that something else in the process keeps."""
    calls = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def pool(act, context, threads, flags):
        act = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(act)
        come = 1 + len(calls) % threads  # be it the caller alone
        others = [threading.Thread(target=act, args=(context,)) for _ in range(come - 1)]
        for thread in others:
            thread.start()
        act(context)
        for thread in others:
            thread.join()
        calls.append((threads, flags))

    @ctypes.CFUNCTYPE(ctypes.c_int)
    def rank():
        return int(threading.current_thread() is not threading.main_thread())

    functions = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p) for f in (pool, rank)))
    rng = np.random.default_rng(7)
    for size, steps in ((1 << 21, 30), (1 << 18, 30)):
        start, grad = (values(rng, size + 5, np.float32) for _ in range(2))
        kwargs = {"clip_norm": 1.0, "ema_decay": 0.9}
        alone, together = (fastopt.Adam([start.copy()], num_threads=n, **kwargs) for n in (1, 3))
        together.step([grad])
        together._plan.pool = ctypes.addressof(functions)
        for _ in range(steps - 1):
            together.step([grad])
        for _ in range(steps):
            alone.step([grad])
        assert_same_bits(together, alone, f"{size} elements")
        assert {*calls} == ({(3, 0)} if size >= 1 << 21 else set())
        calls.clear()


def test_optimizers_in_several_threads_share_the_team():
    rng = np.random.default_rng(6)
    start = values(rng, 12 * BLOCK + 5, np.float32)
    grads = [values(rng, start.size, np.float32) for _ in range(200)]
    optimizers = [fastopt.Adam([start.copy()], num_threads=3) for _ in range(4)]

    def train(opt):
        for g in grads:
            opt.step([g])

    train(optimizers[0])
    threads = [threading.Thread(target=train, args=(opt,)) for opt in optimizers[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, opt in enumerate(optimizers[1:]):
        assert_same_bits(opt, optimizers[0], f"thread {number}")


def test_the_callers_floating_point_mode_changes_no_bit_and_is_left_alone():
    rng = np.random.default_rng(4)
    n = 2 * BLOCK + 5
    start, grads = values(rng, n, np.float32), [values(rng, n, np.float32) for _ in range(STEPS)]
    starts = [start * np.float32(1e-38)]
    grads = [g * np.float32(1e-36) for g in grads]
    ran = 0
    for _, cls, kwargs in CASES:
        kwargs = {**kwargs, "ema_decay": 0.5, "global_clip_norm": 1e-30}
        for team in (1, 3):
            _core.force_threads(team)
            plain, flushed = (cls([p.copy() for p in starts], **kwargs) for _ in range(2))
            for g in grads:
                plain.step([g])
            with flush_to_zero() as is_on:
                for g in grads:
                    flushed.step([g])
                    assert is_on()
            assert_same_bits(flushed, plain, f"{cls.__name__} {kwargs}, {team} threads")
            ran += 1
    assert ran == 2 * len(CASES)


def test_flushing_threads_are_told_apart():
    """The mode really is on inside the context: NumPy then loses subnormals in that thread."""
    tiny = np.full(4, np.finfo(np.float32).smallest_subnormal)
    seen = []

    def look():
        with flush_to_zero():
            seen.append(float((tiny * np.float32(1.0)).sum()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [0.0]
    assert (tiny * np.float32(1.0)).sum() > 0


@pytest.mark.parametrize("semantics", ["torch", "keras"])
def test_a_centered_variance_that_rounds_below_zero_is_clamped_under_torch_only(semantics):
    """Equal gradients: the variance is 0 but for rounding, on either side of it."""
    rng = np.random.default_rng(5)
    grads = [[rng.standard_normal(1000).astype(np.float32)]] * 60
    kwargs = {"centered": True, "alpha": 0.5, "eps": 0.0, "semantics": semantics}
    opt = run_both(fastopt.RMSprop, kwargs, [np.zeros(1000, np.float32)], grads)
    state = opt.state[0]
    below = state["square_avg"] - state["grad_avg"] * state["grad_avg"] < 0
    assert below.any()
    assert np.isnan(opt.params[0][below]).all() == (semantics == "keras")
    kwargs = {**kwargs, "eps": 1e-8, "semantics": "torch"}
    opt = run_both(fastopt.RMSprop, kwargs, [np.zeros(1000, np.float32)], grads)
    assert np.isfinite(opt.params[0]).all()


def test_parameters_of_one_step_count_keep_products_of_momenta_of_their_own():
    """Betas that change between the first steps of two parameters give them different ones."""
    together = fastopt.NAdam([np.ones(3), np.ones(3)])
    alone = [fastopt.NAdam([np.ones(3)]) for _ in together.params]
    for i, beta in enumerate((0.8, 0.95)):
        for opt in (together, alone[i]):
            opt.param_groups[0]["betas"] = (beta, 0.999)
        together.step([np.ones(3) if k == i else None for k in range(2)])
        alone[i].step([np.ones(3)])
    alone[0].param_groups[0]["betas"] = (0.95, 0.999)
    for opt in (together, *alone):
        opt.step([np.ones(3)] * len(opt.params))
    assert together.state[0]["mu_product"] != together.state[1]["mu_product"]
    for param, state, opt in zip(together.params, together.state, alone, strict=True):
        assert param.tobytes() == opt.params[0].tobytes()
        assert state["mu_product"] == opt.state[0]["mu_product"]
