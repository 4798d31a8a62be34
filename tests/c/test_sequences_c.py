"""Random sequences of calls of the C interface, beside the reference.

The arrays and the counters are the caller's, so a sequence also moves them, writes into them, takes
them away and makes another optimizer over them. A call that is refused must change nothing.
"""

import ctypes
import math
from collections import Counter

import numpy as np
import pytest
import sequences
from c_interface import (
    BAD_INDEX,
    BAD_NAME,
    BAD_POINTER,
    BAD_VALUE,
    CLIPS,
    DTYPES,
    INCOMPLETE,
    NONFINITE,
    OK,
    OPTIMIZER,
    RAISE,
    SKIP,
    UNSUPPORTED,
    Result,
    address,
    create,
    dense,
    fo,
    options,
    result,
)
from c_types import MASTER, SPLIT, TYPES, state_type
from oracle import NUMBERS, Oracle, same_bits
from sequences import BLOCK, History, chance, pick, values
from tables import BY_RULE, PAIRS

import fastopt
from fastopt import reference
from fastopt.reference import STORAGE, random_bits

OPERATIONS = 40
HERE = np.zeros(1)
NATIVE = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64)}
FEWER = ["float32", "bfloat16", "float16", SPLIT, MASTER]
FLOATS = ["float32", "bfloat16", "float16"]
LOSSY = ["bfloat16", "float16", "8-bit signed", "8-bit unsigned"]
LAYERS = fastopt.build_info()["threading"]["available"]
FLAGS = {"lr": [0.1, 1e-3, 0.0, 0.5], "weight_decay": [0.0, 0.1], "eps": [1e-8, 0.1]}


def some_values(rule, name):
    """Return values that a hyperparameter may be given."""
    low, high = BY_RULE[rule].cls._rule.ranges[name]
    tried = [0.0, 1.0] if math.isnan(high) else [0.0, 0.1, 0.5, 0.9] if low < 1 else [1.1, 2.0]
    return FLAGS.get(name, [value for value in tried if value >= low])


def used_slots(rule, hypers):
    """Return which state arrays a step touches."""
    return {*BY_RULE[rule].used(hypers)}


def unaligned(rng, array):
    """Return the array in new memory, which may begin anywhere."""
    if array is None:
        return None
    memory = np.zeros(array.nbytes + 8, np.uint8)
    start = pick(rng, [0, 0, 1, 4])
    new = memory[start : start + array.nbytes].view(array.dtype)
    new[...] = array
    return new


class Kept:
    """An array as it is stored: codes, and what lies beside them."""

    def __init__(self, rng, storage, given, rounding=0):
        self.storage, self.rounding = storage, rounding
        self.codes, self.extra = (unaligned(rng, a) for a in self.stored(given))

    def stored(self, given, random=None):
        """Return how values are stored."""
        if self.storage in NATIVE:
            return given, None
        return STORAGE[self.storage].store(given, random if self.rounding else None)

    def values(self):
        if self.storage in NATIVE:
            return self.codes.copy()
        return np.array(STORAGE[self.storage].load(self.codes, self.extra), np.float32)

    def put(self, given):
        """Write values, as a caller may."""
        self.codes[...], extra = self.stored(given)
        if extra is not None:
            self.extra[...] = extra

    def move(self, rng):
        self.codes, self.extra = unaligned(rng, self.codes), unaligned(rng, self.extra)

    def described(self, **fields):
        beside = "scales" if self.storage.startswith("8-bit") else "master"
        given = {"dtype": TYPES[self.storage], beside: address(self.extra), **fields}
        return dense(self.codes, rounding=self.rounding, **given)

    def is_stored(self, given, random=None):
        """Tell whether it holds these values."""
        codes, extra = self.stored(given, random)
        return same_bits(self.codes, codes) and (extra is None or same_bits(self.extra, extra))


class Parameter:
    """A parameter with all its arrays, and which of them the optimizer has."""

    def __init__(self, rng, rule, group):
        size = BLOCK + 3 if chance(rng, 0.03) else pick(rng, [0, 1, 3, 7, 17, 64, 65])
        in_fewer_bits = chance(rng, 0.4)
        storage = pick(rng, FEWER if in_fewer_bits else NATIVE)
        self.dtype = NATIVE.get(storage, np.dtype(np.float32))
        self.group, self.fresh, self.seed = group, False, int(rng.integers(2**63))
        self.kept = pick(rng, FLOATS) if in_fewer_bits else storage
        self.counter = np.zeros(1, np.int64)
        state = pick(rng, [*FLOATS, "8-bit"]) if in_fewer_bits else storage
        zeros, given = np.zeros(size, self.dtype), values(rng, size, self.dtype, wild=0)
        self.param = Kept(rng, storage, given, pick(rng, [0, 1]) if storage in LOSSY else 0)
        self.state = {}
        for name in BY_RULE[rule].slots:
            stored = state_type(name, state) if in_fewer_bits else storage
            rounding = pick(rng, [0, 1]) if stored in LOSSY else 0
            if name in NUMBERS:
                self.state[name] = Kept(rng, "float64", np.ones(1), 0)
                continue
            self.state[name] = Kept(rng, stored, zeros, rounding)
        self.average = Kept(rng, self.kept, given)
        self.grad = Kept(rng, self.kept, zeros)
        self.bound = {}

    def all_kept(self):
        own = [self.param, self.average, *self.state.values()]
        return own if self.grad is self.param else [*own, self.grad]

    def arrays(self):
        lying = [a for kept in self.all_kept() for a in (kept.codes, kept.extra)]
        return [self.counter, *(a for a in lying if a is not None)]

    def move(self, rng):
        self.counter = self.counter.copy()
        for kept in self.all_kept():
            kept.move(rng)

    def param_and_state(self):
        kept = [self.param, *self.state.values()]
        return [a.tobytes() for k in kept for a in (k.codes, k.extra) if a is not None]

    def describe_param(self):
        return self.param.described(seed=self.seed)


class Sequence:
    def __init__(self, seed, done):
        rng = self.rng = np.random.default_rng([seed, 4])
        self.history = History(done)
        self.rule = pick(rng, BY_RULE)
        self.row = BY_RULE[self.rule]
        self.n_groups = pick(rng, [1, 2, 3])
        self.params = [
            Parameter(rng, self.rule, int(rng.integers(self.n_groups)))
            for _ in range(pick(rng, [1, 2, 3, 4]))
        ]
        defaults = self.row.cls([np.zeros(1)])
        row = dict(zip(defaults._rule.hypers, defaults._bound.hypers.rows[0], strict=True))
        self.hypers = [dict(row) for _ in range(self.n_groups)]
        self.options = {}
        self.handle = create(self.rule, self.n_groups, len(self.params))
        for i in range(len(self.params)):
            self.bind(i)

    def run(self):
        try:
            for _ in range(OPERATIONS):
                sequences.choose(self.rng, self.CHOICES)(self)
                self.check_numbers()
        finally:
            fo.destroy(self.handle)

    def do(self, name, *arguments):
        status = getattr(fo, name)(self.handle, *arguments)
        assert status == OK, fo.last_error()

    def bind(self, i):
        """Hand over a parameter and all its arrays."""
        p = self.params[i]
        param, counter = p.describe_param(), p.counter.ctypes.data
        self.do("set_param", i, p.group, p.param.codes.size, param, counter)
        p.fresh = False
        for name in p.state:
            self.set_state(i, name)
        p.bound |= {"grad": False, "average": False}
        if self.rng.random() < 0.7:
            self.set_average(i)

    def set_state(self, i, name, there=True):
        array = self.params[i].state[name]
        self.do("set_state", i, name.encode(), array.described() if there else None)
        self.params[i].bound[name] = there

    def set_average(self, i, there=True):
        self.do("set_average", i, self.params[i].average.described() if there else None)
        self.params[i].bound["average"] = there

    def check_numbers(self):
        """Compare hyperparameters, what they need, and which buffers have begun."""
        number, whole = ctypes.c_double(), ctypes.c_int32()
        for group, hypers in enumerate(self.hypers):
            for name, value in hypers.items():
                self.do("get_hyper", group, name.encode(), number)
                assert number.value == value
            used = used_slots(self.rule, hypers)
            for slot in self.row.slots:
                self.do("uses_state", group, slot.encode(), whole)
                assert whole.value == (slot in used)
        for slot in self.row.begins:
            for i, p in enumerate(self.params):
                self.do("get_begun", i, slot.encode(), whole)
                assert whole.value == (p.counter[0] > 0 and not p.fresh)

    # ---- steps

    def lacking(self):
        """Return the parameters that a step would miss something of."""
        return [
            i
            for i, p in enumerate(self.params)
            for name in used_slots(self.rule, self.hypers[p.group])
            if p.bound["grad"] and not p.bound[name] and (p.param.codes.size or name in NUMBERS)
        ]

    def new_grads(self):
        zero = self.options.get("zero_grad")
        for i, p in enumerate(self.params):
            if chance(self.rng, 0.7):
                storage = pick(self.rng, [p.kept, *FLOATS])
                given = values(self.rng, p.param.codes.shape, p.dtype)
                if storage in FLOATS:
                    given = given.astype(np.float32)
                p.grad = Kept(self.rng, storage, given)
                if chance(self.rng, 0.05) and p.param.extra is None:
                    p.grad = p.param
                p.bound["grad"] = chance(self.rng, 0.9)
                bare = dense(p.grad.codes, dtype=TYPES[p.grad.storage])
                self.do("set_grad", i, bare if p.bound["grad"] else None)
            if zero and p.grad is p.param:
                p.bound["grad"] = False
                self.do("set_grad", i, None)

    def spoil_a_gradient(self):
        given = [p for p in self.params if p.bound["grad"] and p.grad is not p.param]
        given = [p for p in given if p.param.codes.size]
        if given and chance(self.rng, 0.3):
            p = pick(self.rng, given)
            spoilt = p.grad.values()
            spoilt[self.rng.integers(spoilt.size)] = pick(self.rng, [np.nan, np.inf, -np.inf])
            p.grad.put(spoilt)

    def model(self):
        """Return the reference over copies of everything."""
        model = Oracle.__new__(Oracle)
        model.opt_class, model.ema, model.completed = self.row.cls, None, 0
        clip = {v: k for k, v in CLIPS.items()}.get(self.options.get("clip", 0))
        model.kwargs = {"semantics": ("torch", "keras")[self.options.get("semantics", 0)]}
        if clip:
            model.kwargs[clip] = self.options["clip_limit"]
        model.params = [p.param.values() for p in self.params]
        model.state = [
            {"step": np.array(p.counter[0]), **{n: a.values() for n, a in p.state.items()}}
            for p in self.params
        ]
        model.fresh = [p.fresh for p in self.params]
        model.groups = []
        for p in self.params:
            hypers = dict(self.hypers[p.group])
            for option, names in PAIRS.items():
                if names.keys() <= hypers.keys():
                    hypers[option] = tuple(hypers.pop(name) for name in names)
            model.groups.append(hypers)
        return model

    def step(self):
        self.new_grads()
        if self.options.get("nonfinite"):
            self.spoil_a_gradient()
        missing = self.lacking()
        if missing:
            return self.incomplete(missing[0])
        scale = self.options.get("loss_scale") or 1.0
        grads = [p.grad.values().astype(p.dtype) if p.bound["grad"] else None for p in self.params]
        given = " ".join("None" if g is None else "g" for g in grads)
        self.history.add("step", f"{given}; {self.options}")
        bad = self.not_finite(grads, scale)
        self.untouched = [p.param_and_state() for p in self.params]
        model, averages = self.model(), [p.average.values() for p in self.params]
        norm = reference.grad_norm(grads, model.params, scale)
        has_norm = self.options.get("clip", 0) >= CLIPS["clip_norm"]
        outcome = result() if chance(self.rng, 0.7) else None
        status = fo.step(self.handle, outcome)
        skipped = bad is not None
        assert status == (NONFINITE if skipped and self.options["nonfinite"] == RAISE else OK)
        if outcome is not None:
            assert (outcome.skipped, outcome.nonfinite_param) == (skipped, bad if skipped else -1)
            assert outcome.has_norm == has_norm
            np.testing.assert_equal(outcome.grad_norm, norm if has_norm else 0.0)
            assert outcome.threads >= 1
        if skipped:
            self.history.note("skipped" if status == OK else "refused")
            self.history.done["step that is not finite"] += 1
        else:
            model.update(grads, scale)
        self.compare(model, averages, grads, status, skipped)
        return None

    def not_finite(self, grads, scale):
        if not self.options.get("nonfinite"):
            return None
        with np.errstate(all="ignore"):
            for i, grad in enumerate(grads):
                if grad is not None and not np.isfinite(grad.dtype.type(1 / scale) * grad).all():
                    return i
        return None

    def compare(self, model, averages, grads, status, skipped):
        decay, starts = self.options.get("ema_decay", 0.0), self.options.get("ema_starts", 0)
        before = self.untouched
        for i, p in enumerate(self.params):
            if skipped or grads[i] is None:
                assert p.param_and_state() == before[i]
            else:
                for j, (name, kept) in enumerate([("param", p.param), *p.state.items()]):
                    given = model.params[i] if name == "param" else model.state[i][name]
                    key = {"seed": p.seed, "step": int(p.counter[0]), "param": i, "array": j}
                    used = name == "param" or name in used_slots(self.rule, self.hypers[p.group])
                    random = random_bits(given.size, **key) if kept.rounding else None
                    assert not used or kept.is_stored(given, random), (i, name)
                    self.history.done["stored in fewer bits"] += used and kept.storage not in NATIVE
                    self.history.done["rounded at random"] += used and kept.rounding
            assert p.counter[0] == model.state[i]["step"]
            p.fresh = model.fresh[i]
            average = averages[i]
            if p.bound["average"] and not skipped:
                reference.average(average, p.param.values(), decay, first=starts)
            assert p.average.is_stored(average), i
            if grads[i] is not None and p.grad is not p.param:
                zeroed = self.options.get("zero_grad") and status == OK
                if zeroed:
                    assert not p.grad.codes.any()
                else:
                    assert same_bits(p.grad.values().astype(p.dtype), grads[i])

    def incomplete(self, i):
        self.history.add("incomplete step")
        before = self.bytes()
        assert fo.step(self.handle, None) == INCOMPLETE
        assert f"parameter {i} lacks its state".encode() in fo.last_error()
        assert self.bytes() == before
        for k, p in enumerate(self.params):
            for name in p.state:
                if not p.bound[name]:
                    self.set_state(k, name)

    def bytes(self):
        return [a.tobytes() for p in self.params for a in p.arrays()]

    # ---- what a caller may change

    def set_hypers(self):
        group = int(self.rng.integers(self.n_groups))
        own = self.hypers[group].keys() - {k for s in self.row.by_row.values() for k in s}
        names = [n for n in self.hypers[group] if n in own and chance(self.rng, 0.3)]
        self.history.add("hyper", f"group {group} {names}")
        for name in names:
            value = float(pick(self.rng, some_values(self.rule, name)))
            self.do("set_hyper", group, name.encode(), value)
            self.hypers[group][name] = value

    def set_options(self):
        rng, new = self.rng, {}
        if chance(rng, 0.5):
            new["semantics"] = pick(rng, [0, 1])
        if chance(rng, 0.5):
            new["clip"] = pick(rng, list(CLIPS.values()))
            new["clip_limit"] = pick(rng, [0.1, 1.0, 1e3, math.inf])
        if chance(rng, 0.5):
            new["nonfinite"] = pick(rng, [SKIP, RAISE])
        if chance(rng, 0.3):
            new["loss_scale"] = pick(rng, [8.0, 0.3, 0.0])
        if chance(rng, 0.5):
            new |= {"ema_decay": pick(rng, [0.5, 0.0, 1.0]), "ema_starts": pick(rng, [0, 0, 1, -3])}
        if chance(rng, 0.3):
            new["zero_grad"] = pick(rng, [1, 7])
        if chance(rng, 0.3):
            new["num_threads"] = pick(rng, [1, 2, 3])
        self.history.add("options", str(new))
        if new:
            self.do("set_options", options(**new))
        else:
            self.do("set_options", None)
        self.options = new

    def rebind(self):
        """Hand over a parameter anew, perhaps from another place or to another group."""
        i = int(self.rng.integers(len(self.params)))
        p = self.params[i]
        begun = ctypes.c_int32(1)
        for slot in self.row.begins:
            self.do("get_begun", i, slot.encode(), begun)
        move = chance(self.rng, 0.5)
        if move:
            p.move(self.rng)
        p.group = int(self.rng.integers(self.n_groups))
        self.history.add("rebind", f"{i} to group {p.group}, moved: {move}, begun: {begun.value}")
        self.bind(i)
        for slot in self.row.begins:
            if chance(self.rng, 0.8):
                self.do("set_begun", i, slot.encode(), begun.value)
                p.fresh = begun.value == 0

    def resume(self):
        """Make another optimizer over the same arrays."""
        begun = []
        for i in range(len(self.params)):
            value = ctypes.c_int32(1)
            for slot in self.row.begins:
                self.do("get_begun", i, slot.encode(), value)
            begun.append(value.value)
        self.history.add("resume", f"begun: {begun}")
        fo.destroy(self.handle)
        self.handle = create(self.rule, self.n_groups, len(self.params))
        for group, hypers in enumerate(self.hypers):
            for name, value in hypers.items():
                self.do("set_hyper", group, name.encode(), value)
        self.do("set_options", options(**self.options))
        for i, p in enumerate(self.params):
            self.bind(i)
            for slot in self.row.begins:
                self.do("set_begun", i, slot.encode(), begun[i])
                p.fresh = begun[i] == 0

    def begin(self):
        """Say of a buffer that it has begun, or that it has not."""
        for slot in self.row.begins:
            i, begun = int(self.rng.integers(len(self.params))), pick(self.rng, [0, 1])
            self.history.add("begun", f"{i}: {begun}")
            self.do("set_begun", i, slot.encode(), begun)
            self.params[i].fresh = not begun

    def take_away(self):
        """Take an array away from the optimizer, or give it back."""
        i = int(self.rng.integers(len(self.params)))
        there = chance(self.rng, 0.5)
        what = pick(self.rng, [*self.row.slots, "average"])
        self.history.add("give" if there else "take away", f"{what} of {i}")
        if what == "average":
            self.set_average(i, there)
        else:
            self.set_state(i, what, there)

    def write(self):
        p = pick(self.rng, self.params)
        what = pick(self.rng, ["counter", "param", "average", *p.state])
        self.history.add("write", what)
        if what == "counter":
            p.counter[0] = pick(self.rng, [0, 1, 5, p.counter[0] + 3])
        else:
            kept = p.state[what] if what in p.state else getattr(p, what)
            kept.put(np.abs(values(self.rng, kept.codes.shape, p.dtype, wild=0)))

    def threads(self):
        n = pick(self.rng, [1, 2, 3])
        self.history.add("threads", str(n))
        assert fo.set_num_threads(n) == OK
        assert fo.get_num_threads() == fastopt.get_num_threads() == n
        layer = pick(self.rng, LAYERS)
        self.history.add("layer", layer)
        assert fo.set_threading_layer(layer.encode()) == OK

    # ---- calls that are refused

    def refused(self):
        rng, n, n_groups = self.rng, len(self.params), self.n_groups
        h, i = self.handle, int(rng.integers(n))
        p, slot = self.params[i], next(iter(self.row.slots)).encode()
        there, counter, size = p.describe_param(), p.counter.ctypes.data, p.param.codes.size
        other = dense(p.param.codes, dtype=1 - DTYPES[p.dtype])
        whole, number = ctypes.c_int32(7), ctypes.c_double(7)
        nan = math.nan
        name, status, *arguments = pick(
            rng,
            [
                ("set_hyper", BAD_VALUE, h, 0, b"lr", nan),
                ("set_hyper", BAD_NAME, h, 0, b"other", 1.0),
                ("set_hyper", BAD_INDEX, h, n_groups, b"lr", 1.0),
                ("set_hyper", BAD_INDEX, h, -1, b"lr", 1.0),
                ("set_hyper", BAD_POINTER, h, 0, None, 1.0),
                ("get_hyper", BAD_NAME, h, 0, b"", number),
                ("get_hyper", BAD_POINTER, h, 0, b"lr", None),
                ("uses_state", BAD_NAME, h, 0, b"lr", whole),
                ("uses_state", BAD_INDEX, h, n_groups, slot, whole),
                ("set_options", BAD_VALUE, h, options(clip=2, clip_limit=0.0, semantics=1)),
                ("set_options", BAD_VALUE, h, options(loss_scale=nan, zero_grad=1)),
                ("set_options", BAD_VALUE, h, options(nonfinite=3, semantics=1)),
                ("set_options", BAD_VALUE, h, options(ema_decay=1.5, semantics=1)),
                ("set_options", BAD_VALUE, h, options(accumulate=-1, semantics=1)),
                ("set_options", BAD_VALUE, h, options(num_threads=-1, semantics=1)),
                ("set_hyper", BAD_VALUE, h, 0, b"weight_decay", -0.5),
                ("set_hyper", BAD_VALUE, h, 0, b"maximize", 0.5),
                ("set_param", BAD_INDEX, h, n, 0, size, there, counter),
                ("set_param", BAD_INDEX, h, i, n_groups, size, there, counter),
                ("set_param", UNSUPPORTED, h, i, 0, size, dense(HERE, dtype=4), counter),
                ("set_param", BAD_VALUE, h, i, 0, -1, there, counter),
                ("set_param", BAD_POINTER, h, i, 0, 3, None, counter),
                ("set_param", BAD_POINTER, h, i, 0, size, there, None),
                ("set_state", UNSUPPORTED, h, i, slot, other),
                ("set_average", UNSUPPORTED, h, i, other),
                ("set_grad", UNSUPPORTED, h, i, dense(p.param.codes, dtype=5)),
                (
                    "set_grad",
                    UNSUPPORTED,
                    h,
                    i,
                    dense(p.param.codes, dtype=DTYPES[p.dtype], seed=1),
                ),
                ("set_threading_layer", BAD_NAME, b"tbb"),
                ("set_state", BAD_NAME, h, i, b"step", there),
                ("set_state", BAD_INDEX, h, n, slot, there),
                ("set_state", BAD_POINTER, h, i, None, there),
                ("set_average", BAD_INDEX, h, -1, there),
                ("set_grad", BAD_INDEX, h, n, there),
                ("set_begun", BAD_NAME, h, i, b"other", 0),
                ("set_begun", BAD_INDEX, h, n, slot, 0),
                ("get_begun", BAD_INDEX, h, n, slot, whole),
                ("step", BAD_POINTER, None, None),
                ("step", BAD_VALUE, h, Result()),
                ("create", BAD_NAME, b"other", 1, 1, OPTIMIZER()),
                ("set_num_threads", BAD_VALUE, 0),
            ],
        )
        self.history.add("refused", name)
        before, threads = self.bytes(), fo.get_num_threads()
        assert getattr(fo, name)(*arguments) == status
        assert fo.last_error()
        assert self.bytes() == before
        assert (whole.value, number.value, fo.get_num_threads()) == (7, 7, threads)

    def refused_step(self):
        """Give a counter that is out of range."""
        if self.lacking():
            return
        p = pick(self.rng, self.params)
        self.history.add("refused step")
        kept, p.counter[0] = p.counter[0], pick(self.rng, [-1, 2**63 - 1])
        before = self.bytes()
        assert fo.step(self.handle, None) == BAD_VALUE
        assert b"the number of steps of parameter" in fo.last_error()
        assert self.bytes() == before
        p.counter[0] = kept

    CHOICES = (
        (step, 20),
        (set_hypers, 8),
        (set_options, 3),
        (rebind, 4),
        (resume, 2),
        (begin, 3),
        (take_away, 3),
        (write, 3),
        (threads, 1),
        (refused, 8),
        (refused_step, 1),
    )


KINDS = [
    "step",
    "stored in fewer bits",
    "rounded at random",
    "step that is not finite",
    "incomplete step",
    "hyper",
    "options",
    "rebind",
    "resume",
    "begun",
    "take away",
    "give",
    "write",
    "threads",
    "refused",
    "refused step",
]


run = sequences.runner(Sequence)


@pytest.mark.parametrize("seed", sequences.seeds(300))
def test_any_calls_have_the_bits_of_the_reference_and_refused_ones_change_nothing(seed):
    run(seed, Counter())


def test_the_sequences_reach_every_kind_of_call():
    done = sequences.reached(run, 12 * len(BY_RULE))
    assert {kind for kind in KINDS if done[kind] < 3} == set(), done
