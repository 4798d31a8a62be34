"""Training in fewer bits: every class, over every way to store a parameter and its state."""

import copy
import itertools

import ml_dtypes
import numpy as np
import pytest
from oracle import NUMBERS
from tables import BY_CLASS, CASE_IDS, CASES, KEEPS_FLOAT32, in_8_bits

import fastopt
from fastopt import _core, reference

BF16, F16, F32 = (np.dtype(t) for t in (ml_dtypes.bfloat16, np.float16, np.float32))
BLOCK = _core.BLOCK

# The parameter's dtype, options, and what reference.py calls the parameter's storage.
WAYS = {
    "bf16 master": (BF16, {}, "bfloat16 with trailing bits"),
    "bf16": (BF16, {"master_weights": False}, "bfloat16"),
    "f16 master": (F16, {}, "float16 with master"),
    "f16": (F16, {"master_weights": False}, "float16"),
    "f32": (F32, {}, "float32"),
}
STATES = {None: "float32", "bfloat16": "bfloat16", "8bit": "8-bit"}
SIZES = [1, 63, 64, 65, 2 * BLOCK + 200]


def numbers(rng, size, dtype):
    return (rng.standard_normal(size) * 10.0 ** rng.integers(-3, 2, size)).astype(dtype)


def storage_of(slot, state_dtype):
    if slot in KEEPS_FLOAT32 or state_dtype == "8bit":
        return in_8_bits(slot)
    return STATES[state_dtype]


def bits(array):
    """Return patterns, one for all NaNs of float32, of which processors choose sign and payload."""
    array = np.asarray(array)
    if array.dtype == F32:
        array = np.where(np.isnan(array), np.float32("nan"), array)
    return array.view(f"u{array.itemsize}")


class Oracle:
    """A parameter and its state as reference.py steps them."""

    def __init__(self, row, options, way, state_dtype, param, index, **random):
        values = param.astype(np.float32)
        self.row, self.options, self.index, self.random = row, options, index, random
        self.arrays = {"param": reference.Stored.of(WAYS[way][2], values)}
        for slot in row.used(options):
            if slot in NUMBERS:
                self.arrays[slot] = reference.Stored("float64", np.array(NUMBERS[slot]))
                continue
            start = np.full(param.size, options.get(row.starts.get(slot), 0), np.float32)
            storage = storage_of(slot, state_dtype)
            self.arrays[slot] = reference.Stored.of(storage, start)

    def step(self, grad, step):
        self.arrays = reference.stored_step(
            self.row.reference,
            self.arrays,
            grad.astype(np.float32),
            step=step,
            index=self.index,
            **self.random,
            **self.row.formula(self.options),
            semantics=self.options["semantics"],
        )

    def differences(self, param, state):
        """Return the names of the arrays that are stored otherwise."""
        found = []
        for name, stored in self.arrays.items():
            beside = None
            if name == "param":
                codes = param
                beside = state.get("master_bits", state.get("master"))
            elif stored.storage.startswith("8-bit"):
                codes, beside = state[f"{name}_8bit"], state[f"{name}_scale"]
            else:
                codes = state[name]
            expected = stored.values() if stored.storage == "float32" else stored.codes
            same = np.array_equal(bits(codes), bits(expected))
            if stored.extra is not None:
                same &= np.array_equal(bits(beside), bits(stored.extra))
            if not same:
                found.append(name)
        return found


def compare(case, way, state_dtype, stochastic, *, steps=3):
    _, cls, kwargs = case[:3]
    row, (dtype, given, _) = BY_CLASS[cls], WAYS[way]
    rng = np.random.default_rng(0)
    params = [numbers(rng, n, dtype) for n in SIZES]
    options = {**row.defaults, **kwargs}
    random = {"seed": 2**63 + 5, "stochastic": stochastic}
    oracles = [Oracle(row, options, way, state_dtype, p, i, **random) for i, p in enumerate(params)]
    opt = cls(
        params,
        state_dtype=state_dtype,
        stochastic_rounding=stochastic,
        seed=random["seed"],
        **given,
        **kwargs,
    )
    for step in range(1, steps + 1):
        grads = [numbers(rng, n, dtype) for n in SIZES]
        opt.step(grads)
        for i, oracle in enumerate(oracles):
            oracle.step(grads[i], step)
            assert oracle.differences(params[i], opt.state[i]) == [], (step, i)


# ---- any float, also what no training should meet ------------------------------------------------


def any_floats(rng, blocks, dtype):
    """Return values of any size, of one order in each block of 64, and some that are not finite.

    Of float32 all patterns may come, NaNs that signal and subnormals among them.
    """
    least, most = (90, 145) if dtype == F16 else (0, 255)
    n = 64 * blocks
    exponent = np.repeat(rng.integers(least, most, blocks), 64) - rng.integers(0, 30, n)
    pattern = np.maximum(exponent, 0).astype(np.uint32) << 23
    pattern |= rng.integers(0, 2**23, n, dtype=np.uint32)
    pattern[rng.random(n) < 0.1] = 0
    odd = rng.random(n) < 0.02
    pattern[odd] = rng.choice(np.uint32([0x7F800000, 0x7F800001, 0x7FC12345]), odd.sum())
    pattern |= rng.integers(0, 2, n, dtype=np.uint32) << 31
    return pattern.view(np.float32).astype(dtype)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_float_is_stored_as_by_the_reference(way, state_dtype, stochastic):
    rng = np.random.default_rng(5)
    dtype, given, _ = WAYS[way]
    random = {"seed": 0, "stochastic": stochastic}
    found = []
    for cls, kwargs in (
        (fastopt.SGD, {"lr": 1.0, "momentum": 0.5}),
        (fastopt.RMSprop, {"lr": 1.0, "alpha": 0.5}),
    ):
        param = any_floats(rng, 70, dtype)
        row, options = BY_CLASS[cls], {**BY_CLASS[cls].defaults, **kwargs, "semantics": "torch"}
        oracle = Oracle(row, options, way, state_dtype, param, 0, **random)
        opt = cls(
            [param], state_dtype=state_dtype, stochastic_rounding=stochastic, **given, **kwargs
        )
        for step in range(1, 4):
            grad = any_floats(rng, 70, dtype if step % 2 else F32)
            opt.step([grad])
            oracle.step(grad, step)
            assert oracle.differences(param, opt.state[0]) == [], (cls, step)
            found += [stored.values() for stored in oracle.arrays.values()]
    found = np.concatenate(found)
    size = np.abs(found[np.isfinite(found)])
    for what in (np.isnan(found), np.isposinf(found), size == 0, (size > 0) & (size < 2.0**-126)):
        assert what.sum() > (0 if dtype == F16 else 10)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_single_value_that_is_not_finite_stays_so(state_dtype, odd):
    for cls, kwargs, slot in (
        (fastopt.SGD, {"momentum": 0.5}, "momentum_buffer"),
        (fastopt.RMSprop, {}, "square_avg"),
    ):
        param, grad = np.ones((2, 100), F32)
        grad[70] = odd
        options = {**BY_CLASS[cls].defaults, **kwargs, "semantics": "torch"}
        oracle = Oracle(BY_CLASS[cls], options, "f32", state_dtype, param, 0)
        opt = cls([param], state_dtype=state_dtype, **kwargs)
        for step in (1, 2):
            opt.step([grad])
            oracle.step(grad, step)
            assert oracle.differences(param, opt.state[0]) == [], (cls, step)
            found = np.isfinite(opt.decoded_state()[0][slot])
            assert (found == (np.arange(100) != 70)).all()
            grad[70] = 1


# ---- a parameter that others write between steps -------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_parameter_that_was_written_is_what_trains_on(dtype):
    rng = np.random.default_rng(3)
    w = rng.standard_normal(500).astype(dtype)
    opt = fastopt.SGD([w], lr=0.01)
    for _ in range(20):
        opt.step([rng.standard_normal(500).astype(dtype)])
    for written in (0.0, -0.0, 1.0, -3.5, 1e-30, np.inf, np.nan, *rng.standard_normal(20)):
        w[...] = written
        master = opt.decoded_state()[0]["master"]
        if np.isfinite(w[0]):
            next_up = np.nextafter(w, dtype.type(np.inf)).astype(np.float64)
            ulp = next_up - w.astype(np.float64)
            assert (np.abs(master - w.astype(np.float64)) <= ulp).all(), written
        elif written > 0 and dtype == BF16:  # or what rounds to infinity
            assert (master >= float.fromhex("0x1.fep127")).all()
        else:
            np.testing.assert_array_equal(master, w.astype(np.float32))
        opt.step([np.zeros(500, dtype)])
        np.testing.assert_array_equal(w.astype(np.float64), float(dtype.type(written)))
        w[...] = rng.standard_normal(500).astype(dtype)
        opt.step([rng.standard_normal(500).astype(dtype)])


# ---- every class ---------------------------------------------------------------------------------

COMBINATIONS = [
    pytest.param(case, way, state, id=f"{name}-{way}-{state}")
    for (name, case), way, state in itertools.product(
        zip(CASE_IDS, CASES, strict=True), WAYS, STATES
    )
    if (way, state) != ("f32", None)
]


@pytest.mark.parametrize("stochastic", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("case", "way", "state_dtype"), COMBINATIONS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_bit_is_the_references(case, way, state_dtype, stochastic):
    compare(case, way, state_dtype, stochastic)


@pytest.mark.slow
@pytest.mark.parametrize("layer", _core.layers()["available"])
@pytest.mark.parametrize("isa", _core.isa()["supported"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_bit_is_the_references_whatever_runs_it(isa, layer):
    _core.select_isa(isa)
    _core.select_layer(layer)
    _core.force_threads(3)
    names = [*_core.isa()["supported"], *_core.layers()["available"]]
    some = COMBINATIONS[(names.index(isa) + names.index(layer)) % 3 :: 3]  # others for each
    assert len(some) > 100
    for combination in some:
        compare(*combination.values, stochastic=True, steps=2)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_with_master_weights_training_is_that_of_float32_to_the_bit(case):
    _, cls, kwargs = case[:3]
    rng = np.random.default_rng(1)
    for dtype in (BF16, F16):
        narrow = numbers(rng, 3 * 64 + 7, dtype)
        wide = narrow.astype(np.float32)
        one, other = cls([narrow], **kwargs), cls([wide], **kwargs)
        for _ in range(1000):
            grad = numbers(rng, wide.size, dtype)
            one.step([grad])
            other.step([grad.astype(np.float32)])
        state = one.decoded_state()[0]
        master = state.pop("master")
        np.testing.assert_array_equal(bits(master), bits(wide))
        for name, array in state.items():
            np.testing.assert_array_equal(array, other.state[0][name])
        if dtype == F16:
            np.testing.assert_array_equal(bits(narrow), bits(wide.astype(dtype)))
        else:  # to nearest, with ties away from zero
            away = (bits(wide) + np.uint32(0x8000)) >> 16
            np.testing.assert_array_equal(bits(narrow)[wide == wide], away[wide == wide])


# ---- what training in bfloat16 gets wrong elsewhere ----------------------------------------------


@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("state_dtype", STATES)
def test_small_updates_are_not_lost(master, state_dtype):
    w = np.ones(4096, BF16)
    opt = fastopt.Adam([w], lr=1e-3, master_weights=master, state_dtype=state_dtype)
    for _ in range(500):
        opt.step([np.ones(4096, BF16)])
    # (State in 8 bits is right on average; so what is divided by its root is a little too large.)
    tolerance = 0.02 if state_dtype == "8bit" else 1e-3 if master else 2e-3
    assert w.astype(np.float64).mean() == pytest.approx(0.5, rel=tolerance)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_the_second_moment_shrinks(state_dtype):
    rng = np.random.default_rng(0)
    opt = fastopt.Adam([np.ones(4096, np.float32)], state_dtype=state_dtype)
    exact = 0.0
    for i in range(6000):
        size = np.float32(1 if i < 2000 else 0.01)
        exact = 0.999 * exact + 0.001 * float(size) ** 2
        opt.step([rng.choice(np.float32([-1, 1]), 4096) * size])
    mean = opt.decoded_state()[0]["exp_avg_sq"].mean(dtype=np.float64)
    assert mean == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state_dtype", STATES)
def test_an_element_whose_gradient_was_always_0_never_moves(way, state_dtype):
    dtype, options, _ = WAYS[way]
    rng = np.random.default_rng(0)
    w = rng.standard_normal(640).astype(dtype)
    before, still = w.copy(), rng.random(640) < 0.5
    opt = fastopt.Adam([w], lr=0.01, state_dtype=state_dtype, **options)
    for _ in range(300):
        opt.step([np.where(still, 0, rng.standard_normal(640)).astype(dtype)])
    np.testing.assert_array_equal(w[still], before[still])
    assert (w != before)[~still].mean() > 0.9  # (some come back)


# ---- what else a step does -----------------------------------------------------------------------

OPTIONS = [
    {"clip_value": 0.5},
    {"global_clip_norm": 1.0},
    {"nonfinite": "skip"},
    {"ema_decay": 0.9},
    {"accumulate": 3},
    {"maximize": True, "weight_decay": 0.1},
    {"decoupled_weight_decay": True, "weight_decay": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o)))
def test_options_do_with_a_master_what_they_do_in_float32(options):
    rng = np.random.default_rng(2)
    narrow = rng.standard_normal((70, 3)).astype(BF16)
    wide = narrow.astype(np.float32)
    one, other = (fastopt.AdamW([w], lr=0.05, **options) for w in (narrow, wide))
    for step in range(12):
        grad = (rng.standard_normal((70, 3)) * 64).astype(BF16)
        if options.get("nonfinite") and step == 5:
            grad[3, 1] = np.inf
        results = [
            opt.step([g.copy()], loss_scale=64.0, zero_grad=True)
            for opt, g in ((one, grad), (other, grad.astype(np.float32)))
        ]
        assert results[0].grad_norm == results[1].grad_norm
        assert results[0].skipped == results[1].skipped
    np.testing.assert_array_equal(one.decoded_state()[0]["master"], wide)
    if one.ema:
        assert one.ema[0].dtype == np.float32
        np.testing.assert_array_equal(one.ema[0], other.ema[0])


@pytest.mark.parametrize("grad", [BF16, F16, F32, np.dtype(np.float64)])
@pytest.mark.parametrize("param", [BF16, F16, F32, np.dtype(np.float64)])
@pytest.mark.parametrize("strided", [False, True])
def test_a_gradient_may_have_any_type_that_loses_nothing(param, grad, strided):
    values = np.linspace(-2, 2, 2 * 130).astype(BF16).astype(np.float64)
    w, same = (np.ones((130, 2), param) for _ in range(2))
    one, other = fastopt.Adam([w], lr=0.1), fastopt.Adam([same], lr=0.1)
    g = values.astype(grad).reshape(130, 2)
    if strided:
        g = np.asfortranarray(g)
    arithmetic = np.float64 if param == np.float64 else np.float32
    if grad == np.float64 and param != np.float64:
        with pytest.raises(TypeError, match=r"dtype float64 .* is not the parameter's"):
            one.step([g])
        assert one.completed_steps == 0
        return
    one.step([g], zero_grad=True)
    other.step([g.copy() * 0 + values.reshape(130, 2).astype(grad).astype(arithmetic)])
    np.testing.assert_array_equal(w, same)
    assert not g.any()


@pytest.mark.parametrize("own", [BF16, F16])
def test_gradients_may_be_of_one_type_and_then_of_another_at_the_same_address(own):
    w, same = (np.ones(130, own) for _ in range(2))
    one, other = fastopt.SGD([w], lr=0.1), fastopt.SGD([same], lr=0.1)
    memory, elsewhere = np.zeros(130, np.uint16), []
    for dtype in (BF16, F16, F16, BF16, BF16, F16):
        g = memory.view(dtype)
        g[...] = np.linspace(-2, 2, 130)
        elsewhere.append(g.copy())
        one.step([g])
        other.step(elsewhere[-1:])
        np.testing.assert_array_equal(w, same)


def test_a_gradient_of_another_type_is_not_taken_for_its_own_parameter():
    w = np.ones(128, BF16)
    opt = fastopt.SGD([w])
    opt.step([w])  # exactly its parameter
    half = w.view(F16)
    with pytest.raises(ValueError, match="gradient of parameter 0 overlaps parameter 0"):
        opt.step([half])


# ---- random bits ---------------------------------------------------------------------------------


def test_random_rounding_goes_on_after_a_copy_as_it_would_have():
    rng = np.random.default_rng(4)
    w = rng.standard_normal(300).astype(BF16)
    opt = fastopt.Adam([w], master_weights=False, state_dtype="bfloat16", seed=9)
    opt.step([w])
    twin = copy.deepcopy(opt)
    other = fastopt.Adam([w.copy()], master_weights=False, state_dtype="bfloat16", seed=10)
    other.load_state_dict(opt.state_dict(), convert=True)
    for each in (opt, twin, other):
        each.step([np.ones(300, BF16)])
    np.testing.assert_array_equal(twin.params[0], w)
    assert (other.params[0] != w).any()


def test_parameters_and_seeds_have_random_bits_of_their_own():
    ws = [np.ones(4096, BF16) for _ in range(2)]
    opt = fastopt.SGD(ws, lr=1e-3, master_weights=False)
    opt.step([np.ones(4096, BF16)] * 2)
    assert (ws[0] != ws[1]).any()
    for w in ws:  # and each is right on average: 0.001 of an ulp of 2**-8 below 1
        assert (w != 1).mean() == pytest.approx(1e-3 * 256, abs=5 * (0.256 * 0.744 / 4096) ** 0.5)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"state_dtype": "float16"}, ValueError, "^state_dtype must be one of 'float32', 'bfl"),
        ({"state_dtype": BF16}, TypeError, "^state_dtype must be a string"),
        ({"master_weights": 1}, TypeError, "^master_weights must be True or False, got 1"),
        ({"stochastic_rounding": "no"}, TypeError, "^stochastic_rounding must be True or False"),
        ({"seed": -1}, ValueError, r"^seed must be >= 0 and < 2\*\*64, got -1"),
        ({"seed": 2**64}, ValueError, r"^seed must be >= 0 and < 2\*\*64"),
        ({"seed": 1.0}, TypeError, r"^seed must be an integer, got 1\.0"),
        ({"seed": True}, TypeError, "^seed must be an integer, got True"),
    ],
)
def test_an_option_out_of_range_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        fastopt.Adam([np.ones(3, np.float32)], **options)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
def test_state_of_float64_stays_float64(state_dtype):
    with pytest.raises(TypeError, match=f"^parameter 'w': state_dtype='{state_dtype}' is for"):
        fastopt.Adam({"w": np.ones(3)}, state_dtype=state_dtype)


def test_bytes_are_told_by_kind():
    opt = fastopt.Adam([np.ones(640, BF16)], state_dtype="8bit", ema_decay=0.9)
    assert opt.nbytes == {
        "step": 8,
        "master_bits": 1280,
        "exp_avg_8bit": 640,
        "exp_avg_scale": 10,
        "exp_avg_sq_8bit": 640,
        "exp_avg_sq_scale": 10,
        "ema": 2560,
    }
