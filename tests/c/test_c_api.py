"""The C interface does what the classes do, refuses what is wrong, and stays as it was."""

import ctypes
import itertools
import os
import re
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from c_interface import (
    ABI,
    BAD_INDEX,
    BAD_NAME,
    BAD_POINTER,
    BAD_VALUE,
    CLIPS,
    FUNCTIONS,
    INCOMPLETE,
    NONFINITE,
    OK,
    OPTIMIZER,
    RAISE,
    SKIP,
    UNSUPPORTED,
    VALUES,
    Api,
    Array,
    COptimizer,
    Options,
    Result,
    create,
    dense,
    fo,
    options,
    result,
)
from oracle import assert_same_bits
from support import TESTS, python
from tables import BY_RULE, CASE_IDS, CASES

import fastopt
from fastopt import SGD, Adam, _core
from fastopt._options import flag, real

PACKAGE = Path(fastopt.__file__).parent
HEADER = Path(fastopt.get_include(), "fastopt.h").read_text()


# ---- the interface is what it was ----------------------------------------------------------------


def test_the_table_begins_with_what_version_1_of_the_abi_has():
    assert fo.abi == ABI == int(re.search(r"#define FO_ABI (\d+)", HEADER)[1])
    assert fo.size >= ctypes.sizeof(Api)
    table = HEADER[HEADER.index("uint32_t abi;") : HEADER.index("} fo_api;")]
    members = re.findall(r"\(\*(\w+)\)", table)
    assert members[: len(FUNCTIONS)] == [name for name, *_ in FUNCTIONS]
    assert fo.size == 8 + ctypes.sizeof(ctypes.c_void_p) * len(members)


def test_no_number_of_the_interface_has_changed():
    found = {name: int(value) for name, value in re.findall(r"\b(FO_\w+) = (\d+)", HEADER)}
    assert {name: found[name] for name in VALUES} == VALUES
    assert [*map(ctypes.sizeof, (Array, Options, Result))] == [80, 56, 40]


def test_cython_sees_all_that_the_header_has():
    cython = (PACKAGE / "__init__.pxd").read_text()
    comments = re.compile(r"/\*.*?\*/", re.DOTALL)
    header = comments.sub("", HEADER)
    members = re.findall(r"\(\*(\w+)\)\(([^;]*)\);", header)
    assert len(members) >= len(FUNCTIONS)
    for name, arguments in members:
        (declared,) = re.findall(rf"\(\*{name}\)\(([^;]*?)\) noexcept nogil", cython)
        given = "" if arguments == "void" else " ".join(arguments.split())
        assert " ".join(declared.split()) == given
    for name in re.findall(r"\b(FO_\w+) = ", header):
        assert re.search(rf"^        {name}$", cython, re.MULTILINE)
    structs = re.findall(r"typedef struct \{(.*?)\} fo_(array|options|result);", header, re.DOTALL)
    assert [name for _, name in structs] == ["array", "options", "result"]
    for text, _ in structs:
        fields = [line.strip().rstrip(";") for line in text.splitlines() if line.strip()]
        assert fields
        assert "\n".join(f"        {field}" for field in fields) in cython


def test_the_library_that_programs_link_is_there():
    library = Path(fastopt.get_library())
    assert library.read_bytes().startswith(b"!<arch>\n")
    assert library.parents[1] == Path(fastopt.get_include()).parent == PACKAGE


# ---- what is computed ----------------------------------------------------------------------------

SIZES = [0, 1, 7, 64, _core.BLOCK + 3]
STEPS = 4


def model(seed, dtypes=(np.float32, np.float64)):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(size).astype(dtype) for dtype in dtypes for size in SIZES]


def run_both(opt, gradients, steps=None, **given):
    """Step an optimizer and its twin of the C interface, comparing after each step."""
    twin = COptimizer(opt, **given)
    for number, grads in enumerate(gradients):
        done, outcome = opt.step(grads, **(steps or {})), twin.step(grads)
        assert_same_bits(opt, twin, f"step {number + 1}")
        assert outcome.skipped == done.skipped
        assert bool(outcome.has_norm) == (done.grad_norm is not None)
        np.testing.assert_equal(outcome.grad_norm, done.grad_norm or 0.0)  # be it a NaN
        assert outcome.threads >= 1
    return twin


@pytest.mark.parametrize(("name", "cls", "kwargs"), CASES, ids=CASE_IDS)
def test_every_rule_gives_the_bits_of_its_class(name, cls, kwargs):
    opt = cls(model(0), **kwargs)
    gradients = [model(1 + step) for step in range(STEPS)]
    gradients[1][3] = None
    run_both(opt, gradients, semantics=("torch", "keras").index(kwargs["semantics"]))


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("semantics", ["torch", "keras"])
def test_every_option_gives_the_bits_of_its_class(clip, semantics):
    params = model(0)
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.5, "amsgrad": True}]
    opt = fastopt.Adam(
        groups, **{clip: 0.25}, semantics=semantics, ema_decay=0.75, nonfinite="skip"
    )
    gradients = [model(1 + step) for step in range(STEPS)]
    gradients[2][-1][-1] = np.nan
    twin = run_both(
        opt,
        gradients,
        {"loss_scale": 8.0},
        semantics=("torch", "keras").index(semantics),
        clip=CLIPS[clip],
        clip_limit=0.25,
        nonfinite=SKIP,
        ema_decay=0.75,
        loss_scale=8.0,
        num_threads=2,
    )
    assert twin.steps == opt.completed_steps == STEPS - 1


def test_gradients_are_zeroed_where_that_is_asked_for():
    grads = model(1)
    own = [g.copy() for g in grads]
    opt = fastopt.SGD(model(0))
    twin = COptimizer(opt, zero_grad=1)
    twin.step(grads)
    opt.step(own, zero_grad=True)
    assert_same_bits(opt, twin)
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("rule", BY_RULE)
def test_defaults_are_those_of_the_class(rule):
    opt = BY_RULE[rule].cls([np.ones(1)])
    handle = create(opt._rule.name, 2, 1)
    value = ctypes.c_double()
    for group in range(2):
        for name, expected in zip(opt._rule.hypers, opt._bound.hypers.rows[0], strict=True):
            assert fo.get_hyper(handle, group, name.encode(), value) == OK
            assert value.value == expected, name
    fo.destroy(handle)


def listed(names, *arguments):
    every = itertools.takewhile(bool, (names(*arguments, j) for j in itertools.count()))
    return [name.decode() for name in every]


def test_names_are_listed():
    assert listed(fo.rule_name) == _core.rule_names() == list(BY_RULE)
    for row in BY_RULE.values():
        rule, slots = row.cls._rule, [*row.slots, *row.by_row]
        assert slots == list(rule.slots)
        assert listed(fo.hyper_name, rule.name.encode()) == list(rule.hypers)
        assert listed(fo.state_name, rule.name.encode()) == slots
        for names, count in ((fo.hyper_name, len(rule.hypers)), (fo.state_name, len(slots))):
            for j in (-1, count + 1, 2**31 - 1):
                assert names(rule.name.encode(), j) is None
    assert fo.rule_name(-1) is fo.rule_name(99) is None
    for names in (fo.hyper_name, fo.state_name):
        assert names(b"adamw", 0) is names(None, 0) is None


def test_which_state_a_group_needs_follows_its_hyperparameters():
    handle = create("rmsprop", 2, 1)
    uses = ctypes.c_int32()

    def needed(group):
        found = {}
        for name in ("square_avg", "momentum_buffer", "grad_avg"):
            assert fo.uses_state(handle, group, name.encode(), uses) == OK
            found[name] = bool(uses.value)
        return tuple(found.values())

    assert needed(0) == needed(1) == (True, False, False)
    assert fo.set_hyper(handle, 1, b"momentum", 0.5) == OK
    assert (needed(0), needed(1)) == ((True, False, False), (True, True, False))
    assert fo.set_hyper(handle, 1, b"centered", 1.0) == OK
    assert fo.set_hyper(handle, 1, b"momentum", 0.0) == OK
    assert needed(1) == (True, False, True)
    fo.destroy(handle)


# ---- what is refused -----------------------------------------------------------------------------


class Small:
    """Adam over two arrays in two groups, with gradients bound."""

    def __init__(self):
        self.params = [np.arange(5, dtype=np.float32), np.arange(3.0)]
        self.grads = [np.ones_like(p) for p in self.params]
        self.counters = np.zeros(2, np.int64)
        self.state = [[np.zeros_like(p) for p in self.params] for _ in range(2)]
        self.handle = create("adam", 2, 2)
        for i in range(2):
            self.set_param(i)
            self.set_state(i)
            assert fo.set_grad(self.handle, i, dense(self.grads[i])) == OK

    def __del__(self):
        fo.destroy(self.handle)

    def set_param(self, i):
        param, counter = self.params[i], self.counters[i:].ctypes.data
        assert fo.set_param(self.handle, i, i, param.size, dense(param), counter) == OK

    def set_state(self, i):
        for name, arrays in zip((b"exp_avg", b"exp_avg_sq"), self.state, strict=True):
            assert fo.set_state(self.handle, i, name, dense(arrays[i])) == OK

    def arrays(self):
        return [*self.params, *self.grads, self.counters, *self.state[0], *self.state[1]]

    def bytes(self):
        return [a.tobytes() for a in self.arrays()]


INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
HERE = np.zeros(8)  # somewhere to point to
THERE, ARRAY = HERE.ctypes.data, dense(HERE)
NARROW = np.zeros(8, np.float32)


def other(dtype):
    return dense(HERE, dtype=dtype)


REFUSED = [
    ("create", BAD_POINTER, "opt must not be NULL", lambda h: (b"adam", 1, 1, None)),
    ("create", BAD_POINTER, "rule must not be NULL", lambda h: (None, 1, 1, OPTIMIZER())),
    ("create", BAD_NAME, "no rule 'adamw'", lambda h: (b"adamw", 1, 1, OPTIMIZER())),
    ("create", BAD_NAME, "no rule 'xxx+'", lambda h: (b"x" * 10_000, 1, 1, OPTIMIZER())),
    ("create", BAD_VALUE, "n_groups .* got 0", lambda h: (b"adam", 0, 1, OPTIMIZER())),
    ("create", BAD_VALUE, "n_groups .* got -1", lambda h: (b"adam", -1, 1, OPTIMIZER())),
    ("create", BAD_VALUE, "n_params .* got -1", lambda h: (b"adam", 1, -1, OPTIMIZER())),
    ("create", BAD_VALUE, "n_params .* got 92", lambda h: (b"adam", 1, INT64_MAX, OPTIMIZER())),
    ("set_hyper", BAD_POINTER, "opt", lambda h: (None, 0, b"lr", 1.0)),
    ("set_hyper", BAD_POINTER, "name", lambda h: (h, 0, None, 1.0)),
    ("set_hyper", BAD_INDEX, "no group 2: there are 2", lambda h: (h, 2, b"lr", 1.0)),
    ("set_hyper", BAD_INDEX, "no group -1", lambda h: (h, -1, b"lr", 1.0)),
    (
        "set_hyper",
        BAD_NAME,
        "adam has no hyperparameter named 'LR', but: lr weight_decay .*beta1",
        lambda h: (h, 0, b"LR", 1.0),
    ),
    ("set_hyper", BAD_NAME, "'', but", lambda h: (h, 0, b"", 1.0)),
    ("set_hyper", BAD_VALUE, "lr must be >= 0, got nan", lambda h: (h, 0, b"lr", np.nan)),
    ("set_hyper", BAD_VALUE, "lr must be >= 0, got -1", lambda h: (h, 0, b"lr", -1.0)),
    ("set_hyper", BAD_VALUE, "beta1 must be >= 0 and < 1, got 1", lambda h: (h, 0, b"beta1", 1.0)),
    ("set_hyper", BAD_VALUE, "amsgrad must be 0 or 1, got 2", lambda h: (h, 1, b"amsgrad", 2.0)),
    ("get_hyper", BAD_POINTER, "opt", lambda h: (None, 0, b"lr", ctypes.c_double())),
    ("get_hyper", BAD_POINTER, "value", lambda h: (h, 0, b"lr", None)),
    ("get_hyper", BAD_POINTER, "name", lambda h: (h, 0, None, ctypes.c_double())),
    ("get_hyper", BAD_INDEX, "no group 2", lambda h: (h, 2, b"lr", ctypes.c_double())),
    ("get_hyper", BAD_NAME, "'mu'", lambda h: (h, 0, b"mu", ctypes.c_double())),
    ("uses_state", BAD_POINTER, "opt", lambda h: (None, 0, b"exp_avg", ctypes.c_int32())),
    ("uses_state", BAD_POINTER, "uses", lambda h: (h, 0, b"exp_avg", None)),
    ("uses_state", BAD_POINTER, "name", lambda h: (h, 0, None, ctypes.c_int32())),
    ("uses_state", BAD_INDEX, "no group 9", lambda h: (h, 9, b"exp_avg", ctypes.c_int32())),
    ("uses_state", BAD_NAME, "adam has no state .*max_", lambda h: (h, 0, b"m", ctypes.c_int32())),
    ("set_options", BAD_POINTER, "opt", lambda h: (None, options())),
    (
        "set_options",
        BAD_VALUE,
        "sizeof.fo_options., 56 in this fastopt, got 0",
        lambda h: (h, Options()),
    ),
    ("set_options", BAD_VALUE, "got 55", lambda h: (h, Options(size=55))),
    ("set_options", BAD_VALUE, "got 64", lambda h: (h, Options(size=64))),
    ("set_options", BAD_VALUE, "got 4294967295", lambda h: (h, Options(size=2**32 - 1))),
    ("set_options", BAD_VALUE, "semantics .* 0 and 1, got 2", lambda h: (h, options(semantics=2))),
    ("set_options", BAD_VALUE, "semantics", lambda h: (h, options(semantics=-1))),
    ("set_options", BAD_VALUE, "clip .* 0 and 3, got 4", lambda h: (h, options(clip=4))),
    ("set_options", BAD_VALUE, "nonfinite .* 2, got 3", lambda h: (h, options(nonfinite=3))),
    ("set_options", BAD_VALUE, "clip_limit .* above 0, got 0", lambda h: (h, options(clip=2))),
    ("set_options", BAD_VALUE, "got nan", lambda h: (h, options(clip=1, clip_limit=np.nan))),
    ("set_options", BAD_VALUE, "loss_scale .*got -1", lambda h: (h, options(loss_scale=-1.0))),
    ("set_options", BAD_VALUE, "loss_scale", lambda h: (h, options(loss_scale=np.nan))),
    ("set_options", BAD_VALUE, "loss_scale", lambda h: (h, options(loss_scale=np.inf))),
    ("set_options", BAD_VALUE, "loss_scale", lambda h: (h, options(loss_scale=1e39))),
    ("set_options", BAD_VALUE, "ema_decay .*got 1.5", lambda h: (h, options(ema_decay=1.5))),
    ("set_options", BAD_VALUE, "ema_decay", lambda h: (h, options(ema_decay=np.nan))),
    ("set_options", BAD_VALUE, "num_threads", lambda h: (h, options(num_threads=1025))),
    ("set_options", BAD_VALUE, "num_threads", lambda h: (h, options(num_threads=-1))),
    ("set_options", BAD_VALUE, "accumulate .*got -1", lambda h: (h, options(accumulate=-1))),
    ("set_param", BAD_POINTER, "opt", lambda h: (None, 0, 0, 1, ARRAY, THERE)),
    ("set_param", BAD_INDEX, "no parameter 2", lambda h: (h, 2, 0, 1, ARRAY, THERE)),
    ("set_param", BAD_INDEX, "no parameter -1", lambda h: (h, -1, 0, 1, ARRAY, THERE)),
    ("set_param", BAD_INDEX, "no group 2", lambda h: (h, 0, 2, 1, ARRAY, THERE)),
    ("set_param", UNSUPPORTED, "param: .*no type 6", lambda h: (h, 0, 0, 1, other(6), THERE)),
    ("set_param", UNSUPPORTED, "no type -1", lambda h: (h, 0, 0, 1, other(-1), THERE)),
    ("set_param", BAD_VALUE, "size of fo_array", lambda h: (h, 0, 0, 1, Array(), THERE)),
    ("set_param", BAD_VALUE, "size .* -1", lambda h: (h, 0, 0, -1, ARRAY, THERE)),
    ("set_param", BAD_VALUE, "size .* 92", lambda h: (h, 0, 0, INT64_MAX, ARRAY, THERE)),
    ("set_param", BAD_POINTER, "param", lambda h: (h, 0, 0, 1, None, THERE)),
    ("set_param", BAD_POINTER, "data", lambda h: (h, 0, 0, 1, dense(HERE, data=None), THERE)),
    ("set_param", BAD_POINTER, "step", lambda h: (h, 0, 0, 1, ARRAY, None)),
    *[
        (
            "set_param",
            UNSUPPORTED,
            f"param: '{name}' must be 0",
            lambda h, name=name: (
                h,
                0,
                0,
                1,
                dense(HERE, **{name: (0, 0, 1) if name == "reserved" else 1}),
                THERE,
            ),
        )
        for name in ("scales", "master", "rows", "n_rows", "row_size", "rounding", "reserved")
    ],
    (
        "set_state",
        UNSUPPORTED,
        "exp_avg of type float64 beside .* float32",
        lambda h: (h, 0, b"exp_avg", ARRAY),
    ),
    ("set_average", UNSUPPORTED, "average of type float64", lambda h: (h, 0, ARRAY)),
    ("set_sum", UNSUPPORTED, "sum of type float64", lambda h: (h, 0, ARRAY, 0)),
    ("set_grad", UNSUPPORTED, "grad of type float64", lambda h: (h, 0, ARRAY)),
    (
        "set_state",
        UNSUPPORTED,
        "exp_avg of type float32 beside .* float64: it must be float64$",
        lambda h: (h, 1, b"exp_avg", dense(NARROW)),
    ),
    ("set_grad", BAD_VALUE, "size of fo_array", lambda h: (h, 1, dense(HERE, size=79))),
    ("set_sum", BAD_POINTER, "opt", lambda h: (None, 0, ARRAY, 0)),
    ("set_sum", BAD_INDEX, "no parameter 2", lambda h: (h, 2, ARRAY, 0)),
    ("set_sum", BAD_VALUE, "holds .* 0 and 1, got 2", lambda h: (h, 1, ARRAY, 2)),
    ("set_sum", BAD_VALUE, "holds .* 0 and 0, got 1", lambda h: (h, 1, None, 1)),
    ("set_accumulated", BAD_POINTER, "opt", lambda h: (None, 0)),
    ("set_accumulated", BAD_VALUE, "steps", lambda h: (h, -1)),
    ("set_state", BAD_POINTER, "opt", lambda h: (None, 0, b"exp_avg", ARRAY)),
    ("set_state", BAD_POINTER, "name", lambda h: (h, 0, None, ARRAY)),
    ("set_state", BAD_INDEX, "no parameter 2", lambda h: (h, 2, b"exp_avg", ARRAY)),
    ("set_state", BAD_NAME, "'step'", lambda h: (h, 0, b"step", ARRAY)),
    ("set_average", BAD_POINTER, "opt", lambda h: (None, 0, ARRAY)),
    ("set_average", BAD_INDEX, "no parameter 2", lambda h: (h, 2, ARRAY)),
    ("set_grad", BAD_POINTER, "opt", lambda h: (None, 0, ARRAY)),
    ("set_grad", BAD_INDEX, "no parameter -1", lambda h: (h, -1, ARRAY)),
    ("step", BAD_POINTER, "opt", lambda h: (None, result())),
    ("step", BAD_VALUE, "sizeof.fo_result., 40 in this fastopt, got 0", lambda h: (h, Result())),
    ("step", BAD_VALUE, "sizeof.fo_result.", lambda h: (h, Result(size=49))),
    ("set_begun", BAD_POINTER, "opt", lambda h: (None, 0, b"exp_avg", 0)),
    ("set_begun", BAD_POINTER, "name", lambda h: (h, 0, None, 0)),
    ("set_begun", BAD_INDEX, "no parameter 2", lambda h: (h, 2, b"exp_avg", 0)),
    ("set_begun", BAD_NAME, "no state named 'm'", lambda h: (h, 0, b"m", 0)),
    ("set_begun", BAD_NAME, "adam .* whether exp_avg has", lambda h: (h, 0, b"exp_avg", 0)),
    ("get_begun", BAD_POINTER, "opt", lambda h: (None, 0, b"exp_avg", ctypes.c_int32())),
    ("get_begun", BAD_INDEX, "no parameter -1", lambda h: (h, -1, b"exp_avg", ctypes.c_int32())),
    ("get_begun", BAD_NAME, "whether exp_avg has", lambda h: (h, 0, b"exp_avg", ctypes.c_int32())),
    ("set_num_threads", BAD_VALUE, "n must be between 1 and 1024, got 0", lambda h: (0,)),
    ("set_num_threads", BAD_VALUE, "got 1025", lambda h: (1025,)),
    ("set_threading_layer", BAD_POINTER, "name", lambda h: (None,)),
    (
        "set_threading_layer",
        BAD_NAME,
        "'tbb' here; choose one of team,.*serial",
        lambda h: (b"tbb",),
    ),
]


@pytest.mark.parametrize(("name", "status", "message", "arguments"), REFUSED)
def test_a_call_that_is_refused_says_why_and_changes_nothing(name, status, message, arguments):
    clean, spoilt = Small(), Small()
    threads = fastopt.get_num_threads()
    for small in (clean, spoilt):
        given = options(clip=3, clip_limit=0.5, semantics=1)
        assert fo.set_options(small.handle, given) == OK
    before = spoilt.bytes()
    assert getattr(fo, name)(*arguments(spoilt.handle)) == status
    assert re.search(message, fo.last_error().decode()), fo.last_error()
    assert spoilt.bytes() == before
    assert fastopt.get_num_threads() == threads
    assert fo.step(clean.handle, None) == fo.step(spoilt.handle, None) == OK
    assert spoilt.bytes() == clean.bytes() != before
    assert not HERE.any()


def test_a_momentum_buffer_begins_with_its_first_use_and_says_so():
    w, buffer, counter = np.zeros(3), np.zeros(3), np.zeros(1, np.int64)
    begun, name = ctypes.c_int32(), b"momentum_buffer"

    def has_begun(handle):
        assert fo.get_begun(handle, 0, name, begun) == OK
        return begun.value

    def bind(handle):
        assert fo.set_param(handle, 0, 0, 3, dense(w), counter.ctypes.data) == OK
        assert fo.set_state(handle, 0, name, dense(buffer)) == OK

    def step(handle, value):
        grad = np.full(3, value)
        assert fo.set_grad(handle, 0, dense(grad)) == fo.step(handle, None) == OK
        return buffer[0]

    first = create("sgd", 1, 1)
    assert fo.set_hyper(first, 0, b"dampening", 0.5) == OK
    assert fo.set_begun(first, 0, name, 0) == INCOMPLETE
    bind(first)
    assert has_begun(first) == 0
    step(first, 1.0)
    assert has_begun(first) == 0  # momentum has not been used yet
    assert fo.set_hyper(first, 0, b"momentum", 0.5) == OK
    resumed = create("sgd", 1, 1)
    for hyper in (b"dampening", b"momentum"):
        assert fo.set_hyper(resumed, 0, hyper, 0.5) == OK
    bind(resumed)
    assert has_begun(resumed) == 1  # as far as it knows
    assert fo.set_begun(resumed, 0, name, has_begun(first)) == OK
    assert has_begun(resumed) == 0
    assert step(first, 8.0) == 8
    assert (has_begun(first), has_begun(resumed)) == (1, 0)
    counter[0] = 1
    assert step(resumed, 8.0) == 8
    assert step(resumed, 2.0) == 8 * 0.5 + 2 * 0.5
    assert fo.set_begun(resumed, 0, name, 2) == BAD_VALUE
    assert fo.last_error() == b"begun must be between 0 and 1, got 2"
    assert fo.get_begun(resumed, 0, name, None) == BAD_POINTER
    assert fo.set_begun(resumed, 0, name, 0) == fo.set_begun(resumed, 0, name, 1) == OK
    assert step(resumed, 2.0) == 5 * 0.5 + 1
    for handle in (first, resumed):
        fo.destroy(handle)


def test_every_function_that_can_refuse_is_seen_to():
    can = {name for name, restype, *_ in FUNCTIONS if restype is ctypes.c_int32}
    assert {name for name, *_ in REFUSED} == can - {"get_num_threads"}


def test_creating_nothing_leaves_null():
    handle = OPTIMIZER(1)
    assert fo.create(b"none", 1, 1, handle) == BAD_NAME
    assert handle.value is None
    fo.destroy(None)


def refused_step(small, status, message, outcome=None):
    before = small.bytes()
    assert fo.step(small.handle, outcome) == status
    assert re.search(message, fo.last_error().decode()), fo.last_error()
    assert small.bytes() == before


@pytest.mark.parametrize("k", range(2))
def test_a_step_that_lacks_something_says_what_and_changes_nothing(k):
    small = Small()
    small.set_param(k)  # which forgets its arrays
    assert fo.set_grad(small.handle, k, dense(small.grads[k])) == OK
    refused_step(small, INCOMPLETE, f"parameter {k} lacks its state 'exp_avg'")
    small.set_state(k)
    assert fo.set_state(small.handle, k, b"exp_avg_sq", None) == OK
    refused_step(small, INCOMPLETE, f"parameter {k} lacks its state 'exp_avg_sq'")
    small.set_state(k)
    assert fo.set_hyper(small.handle, k, b"amsgrad", 1.0) == OK
    refused_step(small, INCOMPLETE, f"parameter {k} lacks its state 'max_exp_avg_sq'")
    assert fo.set_hyper(small.handle, k, b"amsgrad", 0.0) == OK
    for bad in (-1, INT64_MAX):
        small.counters[k] = bad
        refused_step(small, BAD_VALUE, f"steps of parameter {k} must be .* got {bad}")
    small.counters[k] = 0
    assert fo.step(small.handle, None) == OK


def test_a_parameter_that_was_not_set_is_missed():
    handle = create("sgd", 1, 1)
    for name, *arguments in (
        ("step", None),
        ("set_state", 0, b"momentum_buffer", ARRAY),
        ("set_average", 0, ARRAY),
        ("set_sum", 0, ARRAY, 0),
        ("set_grad", 0, ARRAY),
    ):
        assert getattr(fo, name)(handle, *arguments) == INCOMPLETE
        assert fo.last_error() == b"parameter 0 is not set yet"
    fo.destroy(handle)


@pytest.mark.parametrize("k", range(2))
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_refused_where_that_is_asked_for(k, bad):
    small, outcome = Small(), result()
    small.grads[k][-1] = bad
    assert fo.set_options(small.handle, options(nonfinite=RAISE, zero_grad=1)) == OK
    refused_step(small, NONFINITE, f"gradient of parameter {k} holds a NaN or an inf", outcome)
    assert (outcome.skipped, outcome.nonfinite_param) == (1, k)
    small.grads[k][-1] = 1
    assert fo.step(small.handle, outcome) == OK
    assert (outcome.skipped, outcome.nonfinite_param) == (0, -1)


TRIED = [-np.inf, -1.0, -5e-324, -0.0, 0.5, np.nextafter(1.0, 0), 1.0, 7.0, np.inf, np.nan]


def in_range(check, name, value):
    """Whether a class takes it."""
    if check is flag:
        return value in (0, 1)
    try:
        check(name, float(value))
    except ValueError:
        return False
    return True


def test_ranges_of_hyperparameters_are_those_of_the_class():
    value = ctypes.c_double()
    for rule, row in BY_RULE.items():
        handle, checks = create(rule, 1, 1), {**row.cls._checks}
        for name in ("beta1", "beta2"):
            checks[name] = partial(real, below=1.0)
        for name in _core.Rule(rule).hypers:
            assert fo.get_hyper(handle, 0, name.encode(), value) == OK
            for tried in TRIED:
                takes = fo.set_hyper(handle, 0, name.encode(), tried) == OK
                assert takes == in_range(checks[name], name, tried), (name, tried)
        fo.destroy(handle)


@pytest.mark.parametrize(
    ("rule", "name", "value", "range_"),
    [
        ("adadelta", "rho", 1.5, ">= 0 and <= 1"),
        ("adam", "beta1", 1.0, ">= 0 and < 1"),
        ("rprop", "etaminus", 0.0, "> 0 and < 1"),
        ("rprop", "etaplus", 1.0, "> 1"),
    ],
)
def test_the_message_about_a_range_says_which_of_its_ends_are_in_it(rule, name, value, range_):
    handle = create(rule, 1, 0)
    assert fo.set_hyper(handle, 0, name.encode(), value) == BAD_VALUE
    assert fo.last_error().decode() == f"{name} must be {range_}, got {value:g}"
    fo.destroy(handle)


@pytest.mark.parametrize("k", [2, 3])
def test_gradients_accumulate_as_in_the_class(k):
    rng = np.random.default_rng(k)
    start = rng.standard_normal(1000, np.float32)
    opt = Adam([start.copy(), start[:9].copy()], accumulate=k)
    small, outcome = COptimizer(opt, accumulate=k), result()
    sums = [np.zeros_like(p) for p in opt.params]
    for i, total in enumerate(sums):
        small.do("set_sum", i, dense(total), 0)
    for number in range(7):
        grads = [rng.standard_normal(p.shape, np.float32) for p in opt.params]
        if number % k == 0:
            grads[1] = None
        opt.step(grads)
        outcome = small.step(grads)
        assert outcome.accumulated == (number + 1) % k
        for mine, theirs in zip(opt.params, small.params, strict=True):
            assert mine.tobytes() == theirs.tobytes()


def test_a_run_goes_on_between_two_updates():
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal(9), [rng.standard_normal(9) for _ in range(4)]
    whole, first = (SGD([start.copy()], accumulate=3, momentum=0.9) for _ in range(2))
    for grad in grads:
        whole.step([grad])
    for grad in grads[:2]:
        first.step([grad])
    resumed, outcome = COptimizer(first, accumulate=3), result()
    total = first.state_dict()["accumulated"]["sums"][0]
    resumed.do("set_sum", 0, dense(total), 1)
    resumed.do("set_accumulated", 2)
    for accumulated, grad in zip((0, 1), grads[2:], strict=True):
        outcome = resumed.step([grad])
        assert outcome.accumulated == accumulated
    assert resumed.params[0].tobytes() == whole.params[0].tobytes()


def test_a_step_that_accumulates_needs_sums():
    small = Small()
    assert fo.set_options(small.handle, options(accumulate=2)) == OK
    refused_step(small, INCOMPLETE, "parameter 0 lacks its sum")


def test_a_parameter_without_a_gradient_is_left_out():
    small = Small()
    assert fo.set_grad(small.handle, 1, None) == OK
    assert fo.set_state(small.handle, 1, b"exp_avg", None) == OK  # then it need not be there
    assert fo.step(small.handle, None) == OK
    assert small.counters.tolist() == [1, 0]
    assert small.params[1].tolist() == [0, 1, 2]


def test_no_parameters_at_all_are_a_step():
    handle = create("adam", 1, 0)
    assert fo.step(handle, None) == OK
    fo.destroy(handle)


@pytest.mark.skipif(
    "sanitize" in os.environ.get("CC", ""), reason="sanitizers reserve memory of their own"
)
def test_an_optimizer_with_room_for_more_than_there_is_memory_is_refused():
    done = python(
        "-c",
        f"""
import resource, sys
sys.path.insert(0, {str(TESTS)!r})
from c_interface import *
resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
print(fo.create(b"adam", 1, {INT32_MAX}, OPTIMIZER()), fo.last_error())
""",
    )
    assert done.stdout == f"1 b'out of memory for {INT32_MAX} parameters'\n", done.stderr


# ---- threads and processes -----------------------------------------------------------------------


def test_the_number_of_threads_is_pythons():
    fastopt.set_num_threads(3)
    assert fo.get_num_threads() == 3
    assert fo.set_num_threads(5) == OK
    assert fastopt.get_num_threads() == 5


def test_the_threading_layer_is_pythons():
    assert fo.get_threading_layer() == b"team"
    fastopt.set_threading_layer("serial")
    assert fo.get_threading_layer() == b"serial"
    assert fo.set_threading_layer(b"team") == OK
    assert fastopt.build_info()["threading"]["active"] == "team"


def test_an_error_belongs_to_the_thread_that_made_it():
    assert fo.set_num_threads(0) == BAD_VALUE
    seen = []

    def other():
        seen.append(fo.last_error())
        fo.create(b"other", 1, 1, OPTIMIZER())
        seen.append(fo.last_error())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [b"", b"there is no rule 'other'"]
    assert fo.last_error() == b"n must be between 1 and 1024, got 0"


def test_optimizers_in_different_threads_do_not_meet():
    size, steps = 1 << 15, 60
    starts = [np.random.default_rng(i).standard_normal(size) for i in range(3)]
    grads = [np.random.default_rng(i).standard_normal(size) for i in range(3, 6)]
    twins = [COptimizer(fastopt.Adam([s.copy()], lr=0.1), num_threads=2) for s in starts]

    def run(i):
        for _ in range(steps):
            twins[i].step([grads[i]])

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i in range(3):
        opt = fastopt.Adam([starts[i]], lr=0.1)
        for _ in range(steps):
            opt.step([grads[i]])
        assert_same_bits(opt, twins[i])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_goes_on_with_its_parents_optimizer():
    done = python(
        "-c",
        f"""
import os, sys
import numpy as np, fastopt
sys.path.insert(0, {str(TESTS)!r})
from c_interface import *
from oracle import assert_same_bits
size = 1 << 16
opt, grads = fastopt.Adam([np.ones(size)]), [np.arange(size) - 3e4]
twin = COptimizer(opt, num_threads=2)
opt.step(grads), twin.step(grads)
child = os.fork()
for _ in range(20):
    opt.step(grads), twin.step(grads)
assert_same_bits(opt, twin)
if child == 0:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
""",
    )
    assert done.returncode == 0, done.stderr


def test_rows_of_a_parameter_with_a_sum_are_refused():
    handle, table, sums = create("sgd", 1, 1), np.zeros(8), np.zeros(8)
    step, rows = np.zeros((), np.int64), np.array([1, 0, 1])
    fo.set_param(handle, 0, 0, table.size, dense(table), step.ctypes.data)
    fo.set_sum(handle, 0, dense(sums), 0)
    grad = dense(np.ones((3, 2)), rows=rows.ctypes.data, n_rows=3, row_size=2)
    assert fo.set_grad(handle, 0, grad) == OK
    assert fo.step(handle, result()) == UNSUPPORTED
    assert b"of some rows, which does not go with a sum" in fo.last_error()
    assert not table.any()
    fo.destroy(handle)
