"""The C interface stores arrays in fewer bits as the reference does, and refuses other types."""

import ctypes
import itertools
import re

import numpy as np
import pytest
from c_interface import (
    BAD_POINTER,
    BAD_VALUE,
    BF16,
    F16,
    F32,
    F64,
    INCOMPLETE,
    NEAREST,
    NONFINITE,
    OK,
    RAISE,
    SIGNED,
    STOCHASTIC,
    UNSIGNED,
    UNSUPPORTED,
    Array,
    address,
    create,
    dense,
    fo,
    options,
)
from c_types import MASTER, SPLIT, TYPES, state_type
from oracle import NUMBERS, same_bits
from tables import BY_CLASS, BY_RULE, CASE_IDS, CASES, KEEPS_FLOAT32, in_8_bits

from fastopt import _core, reference
from fastopt.reference import Stored, stored_step

NAMES = {F32: "float32", F64: "float64", BF16: "bfloat16", F16: "float16"}
PARAMS = ["float32", "bfloat16", "float16", SPLIT, MASTER]
SIZES = [0, 1, 63, 64, 65, 200, _core.BLOCK + 67, 3 * _core.BLOCK + 1]
SEED = 2**64 - 3


def described(stored, **fields):
    """Return what the interface takes a stored array as."""
    master = stored.storage in (SPLIT, MASTER)
    beside = {"master" if master else "scales": address(stored.extra)}
    return dense(stored.codes, dtype=TYPES[stored.storage], **beside, **fields)


def moved(array):
    """Return the array in new memory, at an odd address."""
    if array is None:
        return None
    memory = np.zeros(array.nbytes + 1, np.uint8)
    new = memory[1:].view(array.dtype)
    new[...] = array
    return new


def copied(stored):
    return stored._replace(codes=moved(stored.codes), extra=moved(stored.extra))


def same(one, other):
    return same_bits(one.codes, other.codes) and (
        one.extra is other.extra is None or same_bits(one.extra, other.extra)
    )


class Model:
    """An optimizer of one rule over stored arrays, and what they are to become."""

    def __init__(self, cls, kwargs, arrays, random=(), **given):
        row = self.row = BY_CLASS[cls]
        self.formula = row.formula({**row.defaults, **kwargs})
        self.formula["semantics"] = kwargs.get("semantics", "torch")
        self.random = random
        self.arrays = [{name: copied(a) for name, a in each.items()} for each in arrays]
        self.expected = self.arrays
        self.counters = np.zeros(len(arrays), np.int64)
        twin = cls([np.ones(1)], **kwargs)
        self.rule = twin._rule.name
        self.hypers = dict(zip(twin._rule.hypers, twin._bound.hypers.rows[0], strict=True))
        self.options = options(
            semantics=("torch", "keras").index(self.formula["semantics"]), **given
        )
        self.open()

    def open(self):
        self.handle = create(self.rule, 1, len(self.arrays))
        for name, value in self.hypers.items():
            self.do("set_hyper", 0, name.encode(), value)
        self.do("set_options", self.options)
        for i, arrays in enumerate(self.arrays):
            self.bind(i, arrays)

    def bind(self, i, arrays):
        for name, stored in arrays.items():
            random = name in self.random and name not in NUMBERS
            array = described(stored, rounding=STOCHASTIC if random else NEAREST)
            if name == "param":
                array.seed = SEED
                counter = self.counters[i:].ctypes.data
                self.do("set_param", i, 0, stored.codes.size, array, counter)
            else:
                self.do("set_state", i, name.encode(), array)

    def __del__(self):
        if hasattr(self, "handle"):
            fo.destroy(self.handle)

    def do(self, name, *arguments):
        status = getattr(fo, name)(self.handle, *arguments)
        assert status == OK, fo.last_error()

    def resume(self):
        """Go on with another optimizer over copies of all that a caller has."""
        fo.destroy(self.handle)
        self.arrays = [{name: copied(a) for name, a in each.items()} for each in self.arrays]
        self.counters = self.counters.copy()
        self.open()

    def step(self, grads):
        """Step with gradients that are stored, too; None is no gradient."""
        self.grads = grads
        for i, grad in enumerate(grads):
            self.do("set_grad", i, None if grad is None else described(grad))
        self.expected = [
            arrays if grad is None else self.after(i, arrays, grad.values())
            for i, (arrays, grad) in enumerate(zip(self.arrays, grads, strict=True))
        ]
        self.do("step", None)

    def after(self, i, arrays, grad):
        number = int(self.counters[i]) + 1
        given = {"step": number, "seed": SEED, "index": i, **self.formula}
        ways = [
            stored_step(self.row.reference, arrays, grad, stochastic=way, **given)
            for way in (False, True)
        ]
        return {name: ways[name in self.random][name] for name in arrays}

    def check(self):
        for i, (arrays, expected) in enumerate(zip(self.arrays, self.expected, strict=True)):
            for name, stored in arrays.items():
                assert same(stored, expected[name]), (i, name)

    def slots(self):
        return self.row.used(self.formula)


def numbers(seed, size):
    rng = np.random.default_rng(seed)
    return np.float32(rng.standard_normal(size) * 10.0 ** rng.integers(-3, 2, size))


def start(cls, kwargs, param, state, sizes=SIZES):
    """Return stored arrays with zeros as state."""
    row = BY_CLASS[cls]
    slots = row.used(row.formula({**row.defaults, **kwargs}))
    return [
        {
            "param": Stored.of(param, numbers(size, size)),
            **{
                slot: Stored("float64", np.array([1.0]))
                if slot in NUMBERS
                else Stored.of(state_type(slot, state), np.zeros(size, np.float32))
                for slot in slots
            },
        }
        for size in sizes
    ]


def gradients(seed, grad, sizes=SIZES):
    return [Stored.of(grad, numbers(seed + i, size)) for i, size in enumerate(sizes)]


def can_be_random(arrays):
    """Return the names of the arrays that steps may round at random."""
    return {n for n, a in arrays.items() if a.storage not in ("float32", SPLIT, MASTER)}


# ---- what is computed ----------------------------------------------------------------------------

STATES = ["float32", "bfloat16", "float16", "8-bit"]
COMBINATIONS = [*itertools.product(PARAMS, STATES, [False, True])]


@pytest.mark.parametrize(("param", "state", "stochastic"), COMBINATIONS)
def test_steps_have_the_bits_of_the_reference(param, state, stochastic):
    for k, rule in enumerate(BY_RULE):
        cases = [case for case in CASES if BY_CLASS[case[1]] is BY_RULE[rule]]
        _, cls, kwargs = cases[(7 * k + len(param) + len(state)) % len(cases)]
        arrays = start(cls, kwargs, param, state)
        random = can_be_random(arrays[-1]) if stochastic else set()
        model = Model(cls, kwargs, arrays, random, num_threads=2)
        for step in range(3):
            grads = gradients(100 * step, (NAMES[TYPES[param]], "float32")[step == 1])
            grads[3] = None if step == 1 else grads[3]
            model.step(grads)
            model.check()
        assert model.counters.tolist() == [3, 3, 3, 2, 3, 3, 3, 3]


@pytest.mark.parametrize(("name", "cls", "kwargs"), CASES[::3], ids=CASE_IDS[::3])
def test_every_rule_stores_its_state_in_8_bits(name, cls, kwargs):
    model = Model(cls, kwargs, start(cls, kwargs, "float32", "8-bit", [200]))
    for step in range(4):
        model.step(gradients(step, "float32", [200]))
        model.check()


def test_each_array_is_rounded_as_it_says():
    cls, kwargs = BY_RULE["adam"].cls, {}
    arrays = start(cls, kwargs, "bfloat16", "8-bit", [200, 200])
    names = can_be_random(arrays[0])
    assert names == {"param", "exp_avg", "exp_avg_sq"}
    seen = set()
    for k in range(len(names) + 1):
        for random in itertools.combinations(sorted(names), k):
            model = Model(cls, kwargs, arrays, random)
            for step in range(3):
                model.step(gradients(step, "bfloat16", [200, 200]))
                model.check()
            seen.add(b"".join(a.codes.tobytes() for a in model.arrays[0].values()))
    assert len(seen) == 8


def test_a_parameters_number_and_seed_make_its_random_bits():
    arrays = start(BY_RULE["sgd"].cls, {}, "bfloat16", "float32", [500])
    model = Model(BY_RULE["sgd"].cls, {}, [arrays[0]] * 3, {"param"})
    other = described(model.arrays[2]["param"], rounding=STOCHASTIC, seed=1)
    model.do("set_param", 2, 0, 500, other, model.counters[2:].ctypes.data)
    grad = Stored.of("float32", np.full(500, 1e-3, np.float32))
    for i in range(3):
        model.do("set_grad", i, described(grad))
    model.do("step", None)
    assert len({arrays["param"].codes.tobytes() for arrays in model.arrays}) == 3


@pytest.mark.parametrize("param", [F32, F64])
@pytest.mark.parametrize("grad", ["float32", "bfloat16", "float16"])
def test_a_gradient_may_be_of_any_type_that_the_parameters_holds(param, grad):
    dtype = {F32: np.float32, F64: np.float64}[param]
    cls = BY_RULE["adam"].cls
    grads = gradients(1, grad)
    opt = cls([numbers(size, size).astype(dtype) for size in SIZES], global_clip_norm=0.5)
    params = [p.copy() for p in opt.params]
    state = [[np.zeros_like(p) for p in params] for _ in range(2)]
    counters = np.zeros(len(SIZES), np.int64)
    handle = create("adam", 1, len(SIZES))
    given = options(clip=3, clip_limit=0.5, zero_grad=1, loss_scale=4.0)
    assert fo.set_options(handle, given) == OK
    for i, p in enumerate(params):
        counter = counters[i:].ctypes.data
        assert fo.set_param(handle, i, 0, p.size, dense(p), counter) == OK
        for name, arrays in zip((b"exp_avg", b"exp_avg_sq"), state, strict=True):
            assert fo.set_state(handle, i, name, dense(arrays[i])) == OK
        assert fo.set_grad(handle, i, described(grads[i])) == OK
    opt.step([g.values().astype(dtype) for g in grads], loss_scale=4.0)
    assert fo.step(handle, None) == OK
    assert all(map(same_bits, params, opt.params))
    assert not any(g.codes.any() for g in grads)  # which zero_grad asks for
    fo.destroy(handle)


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("param", PARAMS)
def test_averages_and_sums_may_be_of_16_bits(param, kept):
    cls, decay, size = BY_RULE["sgd"].cls, 0.75, _core.BLOCK + 9
    arrays = start(cls, {"momentum": 0.5}, param, "float32", [size])
    model = Model(cls, {"momentum": 0.5}, arrays, accumulate=2, ema_decay=decay)
    average, total = (Stored.of(kept, numbers(seed, size)) for seed in (1, 2))
    model.do("set_average", 0, described(average))
    model.do("set_sum", 0, described(total), 0)
    for update in range(3):
        first, second = (Stored.of("bfloat16", numbers(10 * update + k, size)) for k in range(2))
        summed = Stored.of(kept, reference.mean(None, first.values(), 1, 1.0))
        mean = reference.mean(summed.values(), second.values(), 2, 1.0)
        expected = model.after(0, model.arrays[0], mean)
        averaged = average.values()
        reference.average(averaged, expected["param"].values(), decay, first=False)
        averaged = Stored.of(kept, averaged)
        for grad in (first, second):
            model.do("set_grad", 0, described(grad))
            model.do("step", None)
            if grad is first:
                assert same(total, summed)
        model.expected = [expected]
        model.check()
        assert same(average, averaged)


@pytest.mark.parametrize(
    ("param", "state"), [("bfloat16", "8-bit"), (SPLIT, "bfloat16"), (MASTER, "8-bit")]
)
def test_a_run_that_is_resumed_goes_on_with_the_same_bits(param, state):
    cls, kwargs = BY_RULE["rmsprop"].cls, {"momentum": 0.5, "centered": True}
    arrays = start(cls, kwargs, param, state)
    random = can_be_random(arrays[-1])
    whole, resumed = (Model(cls, kwargs, arrays, random) for _ in range(2))
    for step in range(4):
        if step == 2:
            resumed.resume()
        for model in (whole, resumed):
            model.step(gradients(step, "bfloat16"))
        whole.expected = resumed.arrays
        whole.check()


@pytest.mark.parametrize("param", [SPLIT, MASTER])
def test_steps_go_on_from_what_others_write_to_a_parameter_with_a_master(param):
    cls = BY_RULE["sgd"].cls
    model = Model(cls, {"lr": 0.5}, start(cls, {}, param, "float32", [100]))
    grad = gradients(1, "float32", [100])
    model.step(grad)
    model.check()
    written = model.arrays[0]["param"]
    written.codes[::2] = Stored.of(NAMES[TYPES[param]], numbers(9, 50)).codes
    model.step(grad)
    model.check()


@pytest.mark.parametrize("k", range(2))
def test_a_gradient_of_16_bits_that_is_not_finite_changes_no_array(k):
    cls = BY_RULE["adam"].cls
    model = Model(cls, {}, start(cls, {}, SPLIT, "8-bit", [70, 70]), nonfinite=RAISE)
    model.step(gradients(0, "bfloat16", [70, 70]))
    before = [{n: copied(a) for n, a in arrays.items()} for arrays in model.arrays]
    grads = gradients(1, "bfloat16", [70, 70])
    grads[k].codes[-1] = 0x7F80
    for i, grad in enumerate(grads):
        model.do("set_grad", i, described(grad))
    assert fo.step(model.handle, None) == NONFINITE
    assert f"parameter {k} ".encode() in fo.last_error()
    model.expected = before
    model.check()
    assert model.counters.tolist() == [1, 1]


def test_setting_a_parameter_forgets_how_it_and_its_state_were_stored():
    cls = BY_RULE["adam"].cls
    arrays = start(cls, {}, "bfloat16", "8-bit", [100])
    model = Model(cls, {}, arrays, {"param", "exp_avg", "exp_avg_sq"})
    model.step(gradients(0, "bfloat16", [100]))
    plain = {"param": Stored.of(SPLIT, numbers(3, 100))}
    model.random, model.arrays = (), [{"param": copied(plain["param"])}]
    model.bind(0, model.arrays[0])
    model.do("set_grad", 0, described(gradients(0, "bfloat16", [100])[0]))
    assert fo.step(model.handle, None) == INCOMPLETE
    assert b"parameter 0 lacks its state 'exp_avg'" in fo.last_error()
    model.arrays = [start(cls, {}, "float32", "bfloat16", [100])[0]]
    model.bind(0, model.arrays[0])
    model.step(gradients(1, "float32", [100]))
    model.check()
    for name in ("exp_avg", "exp_avg_sq"):  # from one type to another
        model.do("set_state", 0, name.encode(), None)
        model.arrays[0][name] = Stored.of("float32", model.arrays[0][name].values())
    model.bind(0, model.arrays[0])
    model.step(gradients(2, "float32", [100]))
    model.check()


@pytest.mark.parametrize("state", ["bfloat16", "8-bit"])
def test_state_that_is_set_again_is_rounded_as_it_says_now(state):
    cls, slots = BY_RULE["adam"].cls, ("exp_avg", "exp_avg_sq")
    model = Model(cls, {}, start(cls, {}, "float32", state, [100]), slots)
    for number, random in enumerate([slots, slots[:1], (), slots[1:]]):
        model.random = random
        for name in slots:
            rounding = STOCHASTIC if name in random else NEAREST
            given = described(model.arrays[0][name], rounding=rounding)
            model.do("set_state", 0, name.encode(), given)
        model.step(gradients(number, "float32", [100]))
        model.check()


# ---- what is refused -----------------------------------------------------------------------------

HERE = np.zeros(64, np.float64)
SCALES = np.zeros(64, np.uint8)
THERE = HERE.ctypes.data


def array(dtype, **fields):
    scaled = {"scales": SCALES.ctypes.data} if dtype in (UNSIGNED, SIGNED) else {}
    return dense(HERE, **{"dtype": dtype, **scaled, **fields})


def with_param(rule, dtype, **fields):
    handle = create(rule, 1, 1)
    assert fo.set_param(handle, 0, 0, 8, array(dtype, **fields), THERE) == OK
    return handle


def allowed(dtype, role, slots):
    """Return the types that an array may be of beside a parameter of this one."""
    if role == "grad":
        return {F32, F64, BF16, F16} if dtype == F64 else {F32, BF16, F16}
    if dtype == F64 or role in NUMBERS:
        return {F64}
    if role in KEEPS_FLOAT32:
        return {F32}
    if role not in slots:
        return {F32, BF16, F16}
    return {F32, BF16, F16, TYPES[in_8_bits(role)]}


def set_array(handle, role, given, slots):
    if role in slots:
        return fo.set_state(handle, 0, role.encode(), given)
    if role == "sum":
        return fo.set_sum(handle, 0, given, 0)
    return getattr(fo, f"set_{role}")(handle, 0, given)


def test_every_pair_of_types_is_taken_or_refused_by_name():
    taken = refused = 0
    for rule, row in BY_RULE.items():
        for dtype in (F32, F64, BF16, F16):
            handle = with_param(rule, dtype)
            for role in {*row.slots, "average", "grad", "sum"}:  # Adagrad has a state array "sum"
                fits = allowed(dtype, role, row.slots)
                for other in (-1, F32, F64, BF16, F16, UNSIGNED, SIGNED, 6, 7, 99):
                    status = set_array(handle, role, array(other), row.slots)
                    assert status == (OK if other in fits else UNSUPPORTED), (role, dtype, other)
                    taken, refused = taken + (status == OK), refused + (status != OK)
                    if status == OK:
                        continue
                    message = fo.last_error().decode()
                    if other in (-1, 6, 7, 99):
                        assert (
                            message
                            == f"{role}: there is no type {other} of elements in this fastopt"
                        )
                        continue
                    assert re.match(
                        f"{role} of type .* of type {NAMES[dtype]}: it must be ", message
                    )
                    for right in fits & NAMES.keys():
                        assert NAMES[right] in message.split("it must be")[1]
                    assert ("8-bit" in message.split("it must be")[1]) == bool(fits - NAMES.keys())
            fo.destroy(handle)
    slots = [slot for row in BY_RULE.values() for slot in row.slots]
    exact, n = sum(slot in {*KEEPS_FLOAT32, *NUMBERS} for slot in slots), len(BY_RULE)
    assert taken == 13 * (len(slots) - exact) + 4 * exact + 33 * n - 10
    assert taken + refused == 40 * (len(slots) + 3 * n - 1)


def test_a_parameter_may_be_of_four_types():
    handle = create("adam", 1, 1)
    for dtype in (-1, F32, F64, BF16, F16, UNSIGNED, SIGNED, 6, 7, 99):
        status = fo.set_param(handle, 0, 0, 8, array(dtype), THERE)
        assert status == (OK if dtype in NAMES else UNSUPPORTED)
        if dtype in (UNSIGNED, SIGNED):
            right = "it must be float32 or float64 or bfloat16 or float16"
            assert fo.last_error().decode().endswith(right)
    fo.destroy(handle)


def beside(role, dtype, text, *, status=UNSUPPORTED, param=BF16, **fields):
    return role, dtype, fields, status, text, param


ONLY = "only a bfloat16 or float16 parameter has one"
NOT_STATE = "only a parameter and its state are rounded at random"
WRONG = [
    beside("param", F32, f"param: 'master' must be 0: {ONLY}", master=THERE),
    beside("param", F64, f"param: 'master' must be 0: {ONLY}", master=THERE),
    beside("param", BF16, "param: 'scales' must be 0: only 8-bit state has", scales=THERE),
    beside("param", F32, "bits or more lose nothing", rounding=STOCHASTIC),
    beside("param", F64, "bits or more lose nothing", rounding=STOCHASTIC),
    beside("param", BF16, "with a master, a p", master=THERE, rounding=STOCHASTIC),
    beside("param", F16, "with a master, a p", master=THERE, rounding=STOCHASTIC),
    beside("param", BF16, "'rounding' .* got 2", rounding=2, status=BAD_VALUE),
    beside("param", BF16, "'rounding' .* got -1", rounding=-1, status=BAD_VALUE),
    beside(
        "exp_avg", SIGNED, "scales of exp_avg must not be NULL", scales=None, status=BAD_POINTER
    ),
    beside("exp_avg_sq", UNSIGNED, "scales of exp_avg_sq must n", scales=None, status=BAD_POINTER),
    beside("exp_avg", F32, "exp_avg: 'scales' must be 0", scales=THERE),
    beside("exp_avg", BF16, "exp_avg: 'scales' must be 0", scales=THERE),
    beside("exp_avg", BF16, f"exp_avg: 'master' must be 0: {ONLY}", master=THERE),
    beside("exp_avg", BF16, "exp_avg: 'seed' must be 0: the parameter's is used", seed=1),
    beside("exp_avg", BF16, "exp_avg: 'reserved' must be 0", reserved=(1, 0, 0)),
    beside("exp_avg", BF16, "exp_avg: 'rows' must be 0", rows=THERE),
    beside("exp_avg", F32, "exp_avg: 'rounding' must be 0 .FO_NEAREST.", rounding=STOCHASTIC),
    beside("exp_avg", SIGNED, "'rounding' must be 0 .* got 7", rounding=7, status=BAD_VALUE),
    beside("exp_avg", F64, "bits or more lose", rounding=STOCHASTIC, param=F64),
    *[beside(role, BF16, NOT_STATE, rounding=STOCHASTIC) for role in ("average", "sum", "grad")],
    *[beside(role, BF16, ONLY, master=THERE) for role in ("average", "sum", "grad")],
    *[beside(role, BF16, "'scales'", scales=THERE) for role in ("average", "sum", "grad")],
    *[beside(role, BF16, "'seed'", seed=1) for role in ("average", "sum", "grad")],
    *[beside(role, BF16, "'n_rows'", n_rows=1) for role in ("average", "sum", "grad")],
]


@pytest.mark.parametrize(("role", "dtype", "fields", "status", "text", "param"), WRONG)
def test_what_does_not_belong_to_an_array_is_refused_by_name(
    role, dtype, fields, status, text, param
):
    arrays = start(BY_RULE["adam"].cls, {}, "bfloat16", "8-bit", [8])
    clean, spoilt = (Model(BY_RULE["adam"].cls, {}, arrays, {"param"}) for _ in range(2))
    handle = spoilt.handle if param == BF16 else with_param("adam", param)
    given = array(dtype, **fields)
    if role == "param":
        assert fo.set_param(handle, 0, 0, 8, given, THERE) == status
    else:
        assert set_array(handle, role, given, BY_RULE["adam"].slots) == status
    assert re.search(text, fo.last_error().decode()), fo.last_error()
    for model in (clean, spoilt):
        model.step(gradients(0, "bfloat16", [8]))
        model.check()
    assert not HERE.any()
    if handle is not spoilt.handle:
        fo.destroy(handle)


def test_an_empty_parameter_needs_no_scales():
    handle = create("adam", 1, 1)
    assert fo.set_param(handle, 0, 0, 0, dense(HERE, dtype=BF16, data=None), THERE) == OK
    empty = Array(size=ctypes.sizeof(Array), dtype=SIGNED)
    assert fo.set_state(handle, 0, b"exp_avg", empty) == OK
    fo.destroy(handle)
