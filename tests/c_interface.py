"""fastopt.h for ctypes: the C interface as tests call it, without a compiler.

What is here is version 1 of the ABI, which later versions of fastopt may append to, not change.
"""

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_uint32, c_uint64, c_void_p

import numpy as np

from fastopt import Rows, _core

ABI = 1
VALUES = {
    "FO_OK": 0,
    "FO_NO_MEMORY": 1,
    "FO_BAD_POINTER": 2,
    "FO_BAD_NAME": 3,
    "FO_BAD_INDEX": 4,
    "FO_BAD_VALUE": 5,
    "FO_INCOMPLETE": 6,
    "FO_NONFINITE": 7,
    "FO_UNSUPPORTED": 8,
    "FO_F32": 0,
    "FO_F64": 1,
    "FO_BF16": 2,
    "FO_F16": 3,
    "FO_8BIT_UNSIGNED": 4,
    "FO_8BIT_SIGNED": 5,
    "FO_NEAREST": 0,
    "FO_STOCHASTIC": 1,
    "FO_TORCH": 0,
    "FO_KERAS": 1,
    "FO_NO_CLIP": 0,
    "FO_CLIP_VALUE": 1,
    "FO_CLIP_NORM": 2,
    "FO_GLOBAL_CLIP_NORM": 3,
    "FO_PROPAGATE": 0,
    "FO_SKIP": 1,
    "FO_RAISE": 2,
}
OK, NO_MEMORY, BAD_POINTER, BAD_NAME, BAD_INDEX, BAD_VALUE, INCOMPLETE, NONFINITE = range(8)
UNSUPPORTED = 8
F32, F64, BF16, F16, UNSIGNED, SIGNED = range(6)
NEAREST, STOCHASTIC = range(2)
SKIP, RAISE = 1, 2
CLIPS = {"clip_value": 1, "clip_norm": 2, "global_clip_norm": 3}
DTYPES = {np.dtype(np.float32): F32, np.dtype(np.float64): F64}


class Array(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("dtype", c_int32),
        ("data", c_void_p),
        ("scales", c_void_p),
        ("master", c_void_p),
        ("rows", c_void_p),
        ("n_rows", c_int64),
        ("row_size", c_int64),
        ("seed", c_uint64),
        ("rounding", c_int32),
        ("reserved", c_int32 * 3),
    ]


class Options(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("semantics", c_int32),
        ("clip", c_int32),
        ("nonfinite", c_int32),
        ("clip_limit", c_double),
        ("loss_scale", c_double),
        ("ema_decay", c_double),
        ("ema_starts", c_int32),
        ("zero_grad", c_int32),
        ("num_threads", c_int32),
        ("accumulate", c_int32),
    ]


class Result(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("threads", c_int32),
        ("has_norm", c_int32),
        ("skipped", c_int32),
        ("accumulated", c_int32),
        ("reserved", c_int32),
        ("nonfinite_param", c_int64),
        ("grad_norm", c_double),
    ]


STATUS, OPTIMIZER = c_int32, c_void_p
FUNCTIONS = [
    ("last_error", c_char_p),
    ("rule_name", c_char_p, c_int32),
    ("hyper_name", c_char_p, c_char_p, c_int32),
    ("state_name", c_char_p, c_char_p, c_int32),
    ("create", STATUS, c_char_p, c_int32, c_int64, POINTER(OPTIMIZER)),
    ("destroy", None, OPTIMIZER),
    ("set_hyper", STATUS, OPTIMIZER, c_int32, c_char_p, c_double),
    ("get_hyper", STATUS, OPTIMIZER, c_int32, c_char_p, POINTER(c_double)),
    ("uses_state", STATUS, OPTIMIZER, c_int32, c_char_p, POINTER(c_int32)),
    ("set_options", STATUS, OPTIMIZER, POINTER(Options)),
    ("set_param", STATUS, OPTIMIZER, c_int64, c_int32, c_int64, POINTER(Array), c_void_p),
    ("set_state", STATUS, OPTIMIZER, c_int64, c_char_p, POINTER(Array)),
    ("set_average", STATUS, OPTIMIZER, c_int64, POINTER(Array)),
    ("set_sum", STATUS, OPTIMIZER, c_int64, POINTER(Array), c_int32),
    ("set_grad", STATUS, OPTIMIZER, c_int64, POINTER(Array)),
    ("set_accumulated", STATUS, OPTIMIZER, c_int32),
    ("step", STATUS, OPTIMIZER, POINTER(Result)),
    ("set_num_threads", STATUS, c_int32),
    ("get_num_threads", c_int32),
    ("set_threading_layer", STATUS, c_char_p),
    ("get_threading_layer", c_char_p),
    ("set_begun", STATUS, OPTIMIZER, c_int64, c_char_p, c_int32),
    ("get_begun", STATUS, OPTIMIZER, c_int64, c_char_p, POINTER(c_int32)),
]


class Api(ctypes.Structure):
    _fields_ = [
        ("abi", c_uint32),
        ("size", c_uint32),
        *((name, ctypes.CFUNCTYPE(*signature)) for name, *signature in FUNCTIONS),
    ]


def read_table(capsule):
    """Return the table that a capsule holds."""
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = c_void_p, (ctypes.py_object, c_char_p)
    return Api.from_address(get_pointer(capsule, b"fastopt._core._C_API"))


fo = read_table(_core._C_API)


def address(array):
    return None if array is None else array.ctypes.data


def dense(array, **fields):
    """Return what the interface takes an array as: None, or a descriptor of it."""
    if array is None:
        return None
    given = {"dtype": DTYPES.get(array.dtype), "data": array.ctypes.data, **fields}
    return Array(**{"size": ctypes.sizeof(Array), **given})


def of_rows(rows, numbers, **fields):
    """Return what the interface takes a gradient of some rows as; `numbers` has to stay."""
    size = rows.values.size // len(rows.values) if len(rows.values) else 1
    fields = {"n_rows": len(numbers), "row_size": size, **fields}
    return dense(rows.values, rows=numbers.ctypes.data, **fields)


def options(**given):
    return Options(size=ctypes.sizeof(Options), **given)


def result():
    return Result(size=ctypes.sizeof(Result))


class COptimizer:
    """An optimizer of the C interface over copies of the arrays of one of a Python class."""

    def __init__(self, opt, **given):
        self.options = options(**given)
        self.params = [p.copy(order="K") for p in opt.params]
        self.state = [{k: a.copy(order="K") for k, a in s.items()} for s in opt.state]
        self.ema = None if opt.ema is None else [a.copy(order="K") for a in opt.ema]
        self.steps = 0
        self.handle = create(opt._rule.name, len(opt.param_groups), len(opt.params))
        for group, row in enumerate(opt._bound.hypers.rows):
            for name, value in zip(opt._rule.hypers, row, strict=True):
                self.do("set_hyper", group, name.encode(), value)
        for i, param in enumerate(self.params):
            counter = address(self.state[i]["step"])
            self.do("set_param", i, opt._members.group_of[i], param.size, dense(param), counter)
            for name, array in self.state[i].items():
                if name != "step":
                    by_row = name in opt._rule.by_row
                    fields = {"row_size": param.size // array.size} if by_row else {}
                    self.do("set_state", i, name.encode(), dense(array, **fields))
            if self.ema is not None:
                self.do("set_average", i, dense(self.ema[i]))

    def __del__(self):
        if hasattr(self, "handle"):
            fo.destroy(self.handle)

    def do(self, name, *arguments):
        status = getattr(fo, name)(self.handle, *arguments)
        assert status == OK, fo.last_error()

    def step(self, grads):
        numbers = []
        for i, grad in enumerate(grads):
            if isinstance(grad, Rows):
                numbers.append(np.array(grad.indices, np.int64))
                row_size = self.params[i][:1].size
                self.do("set_grad", i, of_rows(grad, numbers[-1], row_size=row_size))
            else:
                self.do("set_grad", i, dense(grad))
        self.options.ema_starts = self.steps == 0
        self.do("set_options", self.options)
        outcome = result()
        self.do("step", outcome)
        self.steps += not outcome.skipped
        return outcome


def create(rule, n_groups, n_params):
    handle = OPTIMIZER()
    status = fo.create(rule.encode(), n_groups, n_params, handle)
    assert status == OK, fo.last_error()
    return handle
