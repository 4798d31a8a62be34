"""The ways in which a step can fail: for each, how to bring it about, and what must be raised.

Gradients, parameters and state are spoilt tensor by tensor, hyperparameters group by group. A kind
is a generator that spoils a Run, yields, and mends what would not mend by itself.
"""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from support import (
    EVERY,
    MANY_AXES,
    NOT_EMPTY,
    WITH_AXES,
    Run,
    SparseMatrix,
    Table,
    change_in_place,
)
from tables import BAD_HYPERS, CONFIGS

from fastopt import _core

NAN, INF = float("nan"), float("inf")


class Kind(NamedTuple):
    """A way to fail: how to bring it about for tensor k, for which k, and what must be raised."""

    spoil: object
    error: type
    message: str  # a pattern, in which {label}, {key} and {group} stand for what concerns k
    where: list
    configs: list
    options: dict  # of the Run


KINDS = {}


def kind(name, error, message, where=EVERY, configs=CONFIGS, **options):
    """Enter a kind into the table."""

    def add(spoil):
        assert name not in KINDS
        spoil = contextmanager(spoil)
        KINDS[name] = Kind(spoil, error, message, sorted(where), list(configs), options)

    return add


def gradient_kinds(error, message, where, makers, *, configs=CONFIGS, zero_grad=False):
    """Enter kinds that make gradient k anew, from (run, k), by name."""
    for name, make in makers.items():

        @kind(f"gradient: {name}", error, message, where, configs)
        def _spoil(run, k, make=make):
            run.grads[k] = make(run, k)
            run.options["zero_grad"] = zero_grad
            yield


# ---- a gradient of the wrong kind, dtype or shape ------------------------------------------------


class ArrayLike:
    def __init__(self, array):
        self.array, self.__array_interface__ = array, array.__array_interface__


def other_float(g):
    return g.astype(np.float64 if g.dtype == np.float32 else np.longdouble)


def of_gradient(**makers):
    """Makers that look at the good gradient only."""
    return {
        name.replace("_", " "): lambda run, k, make=make: make(run.grads[k])
        for name, make in makers.items()
    }


KIND = "gradient of {label}: expected a numpy.ndarray of shape .*; got "
MAKE = r"; give numpy\.asarray\(\.\.\.\)$"
gradient_kinds(TypeError, KIND + "float" + MAKE, EVERY, of_gradient(number=lambda g: 0.5))
gradient_kinds(TypeError, KIND + "str$", EVERY, of_gradient(text=lambda g: "g"))
gradient_kinds(
    TypeError, KIND + "list" + MAKE, EVERY, of_gradient(nested_list=lambda g: [g.tolist()])
)
gradient_kinds(TypeError, KIND + "ArrayLike" + MAKE, EVERY, of_gradient(array_like=ArrayLike))
gradient_kinds(TypeError, KIND + "Table" + MAKE, EVERY, of_gradient(table=Table))
gradient_kinds(
    TypeError,
    KIND + r"SparseMatrix; give its \.toarray\(\)$",
    EVERY,
    of_gradient(sparse_matrix=lambda g: SparseMatrix()),
)
gradient_kinds(TypeError, KIND, EVERY[1:], of_gradient(a_scalar=lambda g: g.dtype.type(1)))
gradient_kinds(
    TypeError,
    "gradient of {label}: dtype .* is not the parameter's float(32|64) in native byte order",
    EVERY,
    of_gradient(
        other_float=other_float,
        int64=lambda g: g.astype(np.int64),
        bool=lambda g: g.astype(bool),
        uint16=lambda g: g.astype(np.float16).view(np.uint16),
        swapped_float16=lambda g: g.astype(np.dtype(np.float16).newbyteorder()),
        longdouble=lambda g: g.astype(np.longdouble),
        complex=lambda g: g.astype(np.complex128),
        object=lambda g: g.astype(object),
        structured=lambda g: np.zeros(g.shape, [("g", g.dtype)]),
        byte_swapped=lambda g: g.astype(g.dtype.newbyteorder()),
        buffer_of_bytes=lambda g: memoryview(g.tobytes()),
    ),
)
gradient_kinds(
    TypeError,
    "gradient of {label}: dtype (float128|int64) .* is not the parameter's float64",
    [0],
    of_gradient(longer_scalar=lambda g: np.longdouble(1), integer_scalar=lambda g: np.int64(1)),
)
SHAPE = r"gradient of {label}: shape \(.*\) is not the parameter's \("
gradient_kinds(ValueError, SHAPE, EVERY, of_gradient(one_more_axis=lambda g: g[None]))
gradient_kinds(ValueError, SHAPE, EVERY, of_gradient(buffer=lambda g: memoryview(g[None])))
gradient_kinds(
    ValueError,
    SHAPE,
    WITH_AXES,
    of_gradient(
        one_fewer_axis=lambda g: g[0, ...],
        one_more_element=lambda g: np.repeat(g, 2, 0)[1:],
        one_element_fewer=lambda g: g[1:],
    ),
)
gradient_kinds(ValueError, SHAPE, MANY_AXES, of_gradient(flat=np.ravel, axes_reversed=np.transpose))


# ---- a gradient in somebody else's memory --------------------------------------------------------


def at(run, k, other, shift=0):
    """An array laid out as parameter k, where another lies in the parameters' arena."""
    p, place = run.params[k], run.params[other].ctypes.data - run.arena.ctypes.data
    return np.ndarray(p.shape, p.dtype, run.arena, place + shift, p.strides)


def not_empty_before(k):
    return NOT_EMPTY[NOT_EMPTY.index(k) - 1]


def stretched(g):
    return np.lib.stride_tricks.as_strided(g[:1], g.shape, (0, *g.strides[1:]))


def read_only(g):
    g.flags.writeable = False
    return g


OVERLAP = "gradient of {label} overlaps "
AVERAGING = [name for name, config in CONFIGS.items() if "ema_decay" in config[1]]
gradient_kinds(
    ValueError,
    OVERLAP + "parameter (?!{key} )",
    NOT_EMPTY,
    {"another parameter": lambda run, k: at(run, k, not_empty_before(k))},
)
gradient_kinds(
    ValueError,
    OVERLAP + "{label}",
    NOT_EMPTY,
    {"its own parameter, shifted": lambda run, k: at(run, k, k, shift=4)},
)
gradient_kinds(
    ValueError,
    OVERLAP + "{label}",
    WITH_AXES,
    {"its own parameter, reversed": lambda run, k: run.params[k][::-1]},
)
STATE = OVERLAP + "state of {label}"
gradient_kinds(ValueError, STATE, NOT_EMPTY, {"state": Run.slot})
gradient_kinds(ValueError, STATE, WITH_AXES, {"state reversed": lambda r, k: r.slot(k)[::-1]})
gradient_kinds(
    ValueError, STATE, NOT_EMPTY, {"average": lambda r, k: r.opt.ema[k]}, configs=AVERAGING
)

gradient_kinds(
    ValueError,
    OVERLAP + "{label} in memory .*zero_grad=True",
    NOT_EMPTY,
    {"zeroed, its own parameter": lambda run, k: run.params[k]},
    zero_grad=True,
)
gradient_kinds(
    ValueError,
    "gradient of {label}: read-only, and zero_grad=True",
    EVERY,
    {"zeroed, read-only": lambda run, k: read_only(run.grads[k])},
    zero_grad=True,
)
gradient_kinds(
    ValueError,
    r"gradient of {label}: its elements share memory \(a broadcast array\?\)",
    WITH_AXES,
    {"zeroed, one element many times": lambda run, k: stretched(run.grads[k])},
    zero_grad=True,
)
gradient_kinds(
    TypeError,
    "gradient of {label}: a NumPy scalar cannot be zeroed in place",
    [0],
    {"zeroed, a scalar": lambda run, k: np.float64(1)},
    zero_grad=True,
)


@kind("gradients: zeroed, shared", ValueError, "parameter {key}.* share memory", NOT_EMPTY)
def _share(run, k):
    both = np.zeros(40_000, np.uint8)
    for i in (k, not_empty_before(k)):
        run.grads[i] = np.ndarray(run.params[i].shape, run.params[i].dtype, both)
    run.options["zero_grad"] = True
    yield


# ---- values that are not finite ------------------------------------------------------------------

PLACES = {"first": (0, NOT_EMPTY), "last": (-1, NOT_EMPTY)}
PLACES |= {"block's last": (_core.BLOCK - 1, [4]), "block's first": (_core.BLOCK, [4])}
NOT_FINITE = "gradient of {label} holds a NaN or an infinity"
for _place, (_index, _where) in PLACES.items():
    for _value in (NAN, INF, -INF):

        @kind(f"{_value} {_place}", FloatingPointError, NOT_FINITE, _where, nonfinite="raise")
        def _spoil(run, k, index=_index, value=_value):
            run.grads[k].flat[index] = value
            run.options["zero_grad"] = value == INF
            yield


# ---- parameters and state that have changed ------------------------------------------------------


def spoil_array(array, how):
    """Make an array unfit, and make it good again."""
    shape, strides, dtype = array.shape, array.strides, array.dtype
    saved = array.copy(order="K")
    if how == "read-only":
        array.flags.writeable = False
        yield
        array.flags.writeable = True
    elif how == "reshaped":
        change_in_place(array, shape=(1, *shape))
        yield
        change_in_place(array, shape=shape, strides=strides)
    elif how == "byte-swapped":
        change_in_place(array, dtype=dtype.newbyteorder())
        yield
        change_in_place(array, dtype=dtype)
    elif how == "resized":
        array.resize((9000,), refcheck=False)
        yield
        array.resize(shape, refcheck=False)
        change_in_place(array, strides=strides)
        array[...] = saved
    else:
        array[...] = how
        yield
        array[...] = saved


CHANGED = "{label}: shape, strides or dtype changed"
READ_ONLY = "{label}: the array has become read-only"
COUNTER = "step counter of {label}"
for _of, _how, _message in [
    ("parameter", "read-only", "^" + READ_ONLY),
    ("parameter", "reshaped", "^" + CHANGED),
    ("parameter", "byte-swapped", "^" + CHANGED),
    ("parameter", "resized", "^" + CHANGED),
    ("slot", "read-only", "^state of " + READ_ONLY),
    ("slot", "reshaped", "^state of " + CHANGED),
    ("slot", "byte-swapped", "^state of " + CHANGED),
    ("average", "read-only", "^state of " + READ_ONLY),
    ("average", "reshaped", "^state of " + CHANGED),
    ("counter", "read-only", COUNTER + ": (expected a 0-d int64 array|the array is read-only)"),
    ("counter", "reshaped", COUNTER + r": expected .* got shape \(1,\)"),
    ("counter", "byte-swapped", COUNTER + ": expected .* dtype >i8"),
    ("counter", "resized", COUNTER + r": expected .* got shape \(9000,\)"),
    ("counter", -1, COUNTER + " must be >= 0 .*, got -1"),
    ("counter", 2**63 - 1, COUNTER + " must be .*, got 9223372036854775807"),
]:
    _configs = AVERAGING if _of == "average" else CONFIGS

    @kind(f"{_of} {_how}", ValueError, _message, EVERY, _configs, owned=_how == "resized")
    def _spoil(run, k, of=_of, how=_how):
        arrays = {"parameter": run.params[k], "slot": run.slot(k)}
        arrays |= {"average": (run.opt.ema or run.params)[k], "counter": run.opt.state[k]["step"]}
        yield from spoil_array(arrays[of], how)


# ---- hyperparameters -----------------------------------------------------------------------------


def fail():
    raise ZeroDivisionError("a schedule of one's own")


IN_GROUP = r"^param_groups\[{group}\]: "
IN_GROUPS = [  # what is put into the group, error, message
    *(
        ({name: bad}, error, IN_GROUP + text.format(name))
        for name, cases in BAD_HYPERS.items()
        for bad, error, text in cases
    ),
    ({"beta": 0.9}, ValueError, IN_GROUP + r"unknown options \['beta'\]"),
    ({"lr": lambda t: fail()}, ZeroDivisionError, "^a schedule of one's own$"),
    ({"lr": lambda t: NAN}, ValueError, IN_GROUP + r"lr\(1\) must be >= 0, got nan"),
    ({"lr": lambda t: "1"}, TypeError, IN_GROUP + r"lr\(1\) must be a real number, got '1'"),
    ({"lr": lambda t: None}, TypeError, IN_GROUP + r"lr\(1\) must be a real number"),
    ({"lr": lambda t: np.ones(1)}, TypeError, IN_GROUP + r"lr\(1\) must be a real number"),
    ({"params": ()}, ValueError, IN_GROUP + "its parameters were replaced"),
]
for _number, (_values, _error, _message) in enumerate(IN_GROUPS):
    _configs = [name for name in CONFIGS if {*_values} <= {*Run(name).group(0)}] or CONFIGS

    @kind(f"group: {[*_values]} {_number}", _error, _message, [0, 5], _configs)
    def _spoil(run, k, values=_values):
        group, before = run.group(k), dict(run.group(k))
        group.update(values)
        yield
        group.clear()
        group.update(before)


@kind("group: renamed", ValueError, IN_GROUP + r"unknown options \['fast'\]", [0, 5])
def _rename(run, k):
    group, before = run.group(k), dict(run.group(k))
    group["fast"] = group.pop("decoupled_weight_decay")  # the last, and the same object
    yield
    group.clear()
    group.update(before)


@kind("group: appended", ValueError, "param_groups was replaced, or its length changed", [0])
def _append(run, k):
    run.opt.param_groups.append({**run.group(0), "params": (np.ones(3),)})
    yield
    run.opt.param_groups.pop()


@kind("group: none", ValueError, "param_groups was replaced, or its length changed", [0])
def _replace(run, k):
    before = run.opt.param_groups
    run.opt.param_groups = []
    yield
    run.opt.param_groups = before


# ---- arguments of the step -----------------------------------------------------------------------


def broken(grads):
    yield from grads[:3]
    fail()


NAMED = [name for name in CONFIGS if CONFIGS[name][2] == "dict"]
UNNAMED = [name for name in CONFIGS if name not in NAMED]
COUNT, LIST, KEYS = (
    "^expected 6 gradients, one .*; got ",
    "^grads must be a list or tuple in the parameters' order, got ",
    "^grads: ",
)
SINGLE = r"; of a single array, \[gradient\]$"
NOT_POSITIVE = "^loss_scale (must be > 0,|is out of the range of float32:) got "
for _name, _error, _message, _configs, _options in [
    *(
        (f"loss_scale={bad}", ValueError, NOT_POSITIVE, CONFIGS, {"loss_scale": bad})
        for bad in (0, 0.0, -1.0, NAN, INF, -INF)
    ),
    *(
        (
            f"loss_scale={bad!r}",
            TypeError,
            "^loss_scale must be a real",
            CONFIGS,
            {"loss_scale": bad},
        )
        for bad in ("2", True, None, 1j, np.ones(2))
    ),
    *(
        (f"zero_grad={bad!r}", TypeError, "^zero_grad must be True", CONFIGS, {"zero_grad": bad})
        for bad in (1, 0, None, "yes", np.ones(2))
    ),
    ("one fewer", ValueError, COUNT + "5", UNNAMED, {"change": lambda g: g[:-1]}),
    ("one more", ValueError, COUNT + "7", UNNAMED, {"change": lambda g: [*g, np.ones(3)]}),
    ("none at all", ValueError, COUNT + "0", UNNAMED, {"change": lambda g: ()}),
    ("None", TypeError, LIST + "NoneType", UNNAMED, {"change": lambda g: None}),
    ("an array", TypeError, LIST + "ndarray" + SINGLE, UNNAMED, {"change": lambda g: g[4]}),
    ("a table", TypeError, LIST + "Table" + SINGLE, UNNAMED, {"change": lambda g: Table(g[4])}),
    ("a set", TypeError, LIST + "set", UNNAMED, {"change": lambda g: {1, 2}}),
    ("a number", TypeError, LIST + "int", UNNAMED, {"change": lambda g: 3}),
    ("text", TypeError, LIST + "str", UNNAMED, {"change": lambda g: "abcdef"}),
    ("a dict", TypeError, LIST + "dict", UNNAMED, {"change": lambda g: dict(enumerate(g))}),
    ("a broken generator", ZeroDivisionError, "^a schedule", UNNAMED, {"change": broken}),
    (
        "a list",
        TypeError,
        "^grads must be a dict.* list",
        NAMED,
        {"change": lambda g: [*g.values()]},
    ),
    ("no dict", TypeError, "^grads must be a dict.* None", NAMED, {"change": lambda g: None}),
    (
        "another key",
        ValueError,
        KEYS + r"missing keys \['w3'\], unexpected keys \['w33'\]",
        NAMED,
        {"change": lambda g: {"w33" if name == "w3" else name: x for name, x in g.items()}},
    ),
    (
        "one key more",
        ValueError,
        KEYS + r"missing keys \[\], unexpected keys \[7\]",
        NAMED,
        {"change": lambda g: {**g, 7: None}},
    ),
]:

    @kind(f"step: {_name}", _error, _message, [0], _configs)
    def _spoil(run, k, options=_options):
        run.options.update(options)
        yield
