"""Keras's variables on its TensorFlow backend.

TensorFlow's tensors are immutable, and a variable's value is one: whoever has read the variable has
the same memory, and relies on it. So a step makes new values, in memory of its own, and TensorFlow
takes that memory over as the variables' new tensors, without a copy. What is updated by rows
(``_slices``) is the exception: those rows are read, and written by TensorFlow.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from fastopt import Rows
from fastopt._memory import CACHE_LINE, aligned_zeros
from fastopt.keras import _slices
from fastopt.keras._slices import clipped as clipped
from fastopt.keras._slices import is_sparse as is_sparse
from fastopt.keras._step import (
    Array,
    Correction,
    Settings,
    Step,
    Unfit,
    unfit_dtype,
    unfit_shape,
    with_rate,
)

_DTYPES = ("float32", "float64", "bfloat16", "float16")

# Bytes. TensorFlow takes memory over from DLPack however it is aligned, and aborts the process
# where an operation then finds it aligned to less.
_ALIGNMENT = CACHE_LINE
_SHARED_FROM = 1 << 16  # bytes; a smaller value is copied, and whoever keeps it keeps it alone
_CALLS_BEFORE_TRACING = 2


def native(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable


def by_itself() -> bool:
    """Tell whether no distribution strategy spreads the variables over devices."""
    return not tf.distribute.has_strategy()


def unfit_step() -> Unfit | None:
    """Return why no kernel can run where this is called."""
    if not by_itself():
        return Unfit(
            f"the step runs under {type(tf.distribute.get_strategy()).__name__}",
            "fastopt's kernels run where the model is made and trained without a strategy.",
        )
    graph = tf.compat.v1.get_default_graph
    if not tf.executing_eagerly() and GraphOrParentsInXlaContext(graph()):
        return Unfit(
            "the step is compiled (jit_compile=True), and no outside kernel can run in it",
            "On a CPU, jit_compile=False in compile() or tf.function() lets fastopt's kernels run.",
        )
    return None


def unfit(variable: Any, grad: Any) -> Unfit | None:
    """Return why the kernels cannot update a variable; without a gradient, with a dense one."""
    variable = native(variable)
    if variable.dtype.name not in _DTYPES:
        return unfit_dtype(variable.dtype.name, _DTYPES)
    if isinstance(variable, tf.distribute.DistributedValues):
        return Unfit(
            "it is spread over devices", "fastopt's kernels run where no strategy has made it."
        )
    if not variable.shape.is_fully_defined():
        return Unfit("its shape may change", "fastopt's kernels run where it has one shape.")
    if "GPU" in variable.device:
        return Unfit(
            f"its device is {variable.device}", "fastopt's kernels run for variables on the CPU."
        )
    if grad is None:
        return None
    if is_sparse(grad):
        return _slices.unfit(variable, grad)
    if not isinstance(grad, (tf.Tensor, np.ndarray, np.generic)):
        return Unfit(
            f"its gradient is of type {type(grad).__name__}",
            "fastopt's kernels run with the dense gradient that tf.convert_to_tensor makes.",
        )
    if not variable.shape.is_compatible_with(grad.shape):  # a graph may know less of it
        return unfit_shape(tuple(variable.shape), tuple(grad.shape))
    return None


def share_memory(some: list[tuple[Any, Any]], others: list[tuple[Any, Any]]) -> bool:
    """Tell whether an update of some variables could change others: every step has new memory."""
    return False


def size(variable: Any) -> int:
    """Return the number of a variable's elements."""
    variable = native(variable)
    if variable.shape.is_fully_defined():
        return int(variable.shape.num_elements())
    with tf.init_scope():  # out of a graph, which does not know
        return int(tf.size(variable))


def rounded(value: Any) -> float:
    """Round a hyperparameter as TensorFlow does where Keras makes a tensor of it, of any type."""
    return float(np.float32(value))


def _rates(
    correction: Correction | None,
    group: dict[str, float],
    dtype: type[Any],
    learning_rate: Array,
    iterations: Array,
) -> dict[str, float]:
    row, step = {**group, "lr": float(learning_rate)}, int(iterations) + 1
    if correction is None:
        return row
    with np.errstate(all="ignore"):
        left1, left2 = (1 - dtype(rounded(row[name])) ** dtype(step) for name in ("beta1", "beta2"))
        rate = float(correction(dtype(row["lr"]), left1, left2, np.sqrt))
    return with_rate(row, rate, step, correction)


class _Layout:
    """How values of variables lie in memory: all of some, and of others the rows of a step."""

    def __init__(self, settings: Settings, specs: Sequence[tf.TensorSpec]) -> None:
        self.specs = specs
        self.n = len(settings.names)  # the model's variables; then comes what each has beside it
        owners = [*range(self.n)]
        owners += [i for i, row in enumerate(settings.kept) for kept in row if kept]
        self.by_rows = [settings.by_rows[i] for i in owners]
        self.params = [i for i in range(self.n) if settings.by_rows[i]]
        # For each variable, which of those it is whose rows are read: -1 if it is read as a whole.
        self.which = [self.params.index(i) if settings.by_rows[i] else -1 for i in owners]
        self.places: dict[int, tuple[int, int, int]] = {}  # which dtype, first element, size
        self.dtypes: list[Any] = []  # of the memory that variables share
        self.ends: list[int] = []
        for k, spec in enumerate(specs):
            dtype = spec.dtype.as_numpy_dtype
            if self.by_rows[k]:
                continue
            if dtype not in self.dtypes:
                self.dtypes.append(dtype)
                self.ends.append(0)
            which, size = self.dtypes.index(dtype), spec.shape.num_elements()
            self.places[k] = (which, self.ends[which], size)
            self.ends[which] += size + -size % _ALIGNMENT
        self.row_dtypes = [
            spec.dtype.as_numpy_dtype for k, spec in enumerate(specs) if self.by_rows[k]
        ]


class _Memory:
    """Memory for new values of variables, and the step that makes them there.

    TensorFlow is given views, which live for as long as any tensor has their memory.
    """

    def __init__(self, settings: Settings, layout: _Layout, counts: Sequence[int]) -> None:
        self._layout = layout
        self._n_scalars = 2 + len(settings.rule.numbers)
        # Room for some more rows: numbers vary, and few steps are to need other memory.
        self._room = [1 << max(0, count - 1).bit_length() for count in counts]
        self._wholes = [
            aligned_zeros(end, dtype) for end, dtype in zip(layout.ends, layout.dtypes, strict=True)
        ]
        self._arrays = [self._array(k) for k in range(len(layout.specs))]
        self._step = Step(settings, self._arrays, _rates)
        self._lent: list[weakref.ref[Array]] = []

    def _array(self, k: int) -> Array:
        spec = self._layout.specs[k]
        if k in self._layout.places:
            which, start, size = self._layout.places[k]
            return self._wholes[which][start : start + size].reshape(spec.shape)
        rows = (self._room[self._layout.which[k]], *spec.shape[1:])
        return aligned_zeros(math.prod(rows), spec.dtype.as_numpy_dtype).reshape(rows)

    def fits(self, counts: Sequence[int]) -> bool:
        """Tell whether there is room for so many rows."""
        return all(count <= room for count, room in zip(counts, self._room, strict=True))

    def is_free(self) -> bool:
        """Tell whether no tensor has the memory any more."""
        return all(view() is None for view in self._lent)

    def update(self, arrays: Sequence[Array], *, whole: bool) -> list[Array]:
        """Return views of new values: of all together, or of each variable, for DLPack.

        The arrays are the learning rate, the number of iterations, a number that the rule keeps (if
        it does), gradients, for those of rows which of the rows read each is of, and values. Views
        of rows come last.
        """
        layout = self._layout
        now, grads, places, values = _split(arrays, self._n_scalars, layout.n, len(layout.params))
        for to, array, by_rows in zip(self._arrays, values, layout.by_rows, strict=True):
            (to[: len(array)] if by_rows else to)[...] = array
        self._step(
            [
                _fitting(grad, param) if which < 0 else Rows(places[which], grad)
                for grad, param, which in zip(grads, self._arrays, layout.which, strict=False)
            ],
            *now,
        )
        if whole:
            views = [array[...] for array in self._wholes]
        else:
            views = [_lent(self._arrays[k]) for k in layout.places]
        for to, array, by_rows in zip(self._arrays, values, layout.by_rows, strict=True):
            if by_rows:
                views.append(to[: len(array)] if whole else _lent(to[: len(array)]))
        self._lent = [weakref.ref(view) for view in views]
        return views


def _fitting(grad: Array, param: Array) -> Array:
    return grad if grad.shape == param.shape else np.broadcast_to(grad, param.shape)


def _split(arrays: Sequence[Array], *sizes: int) -> list[Sequence[Array]]:
    """Return so many at a time, and the rest."""
    parts = []
    for size in sizes:
        parts.append(arrays[:size])
        arrays = arrays[size:]
    return [*parts, arrays]


def _lent(array: Array) -> Array:
    """Return a view that NumPy can give away through DLPack; of bfloat16, one of the bits.

    It has to be made in one go: a view of a view does not keep the first alive.
    """
    return array.view(np.uint16 if array.dtype.name == "bfloat16" else array.dtype)


class _Update:
    """The step of some variables, each of which is given a new tensor.

    Two memories take turns, as long as nobody keeps old tensors.
    """

    def __init__(self, settings: Settings, variables: list[Any]) -> None:
        self._settings = settings
        self._variables = variables  # alive: nothing else may have their ids
        self._layout = _Layout(settings, [tf.TensorSpec(v.shape, v.dtype) for v in variables])
        self._memories = [_Memory(settings, self._layout, [0] * len(self._layout.params))]
        self._lock = threading.Lock()
        self._calls = 0
        self._traced: Any = None
        self._inputs: list[Array] = []  # of the traced function
        self._inputs_lock = threading.Lock()

    def __call__(self, inputs: list[Any], numbers: list[Any]) -> None:
        """Update from the rate, the iterations, and so on, and gradients; and their rows."""
        if not tf.executing_eagerly():
            _keep_with_graph(self)
            self._in_graph(inputs, numbers)
        elif self._calls < _CALLS_BEFORE_TRACING:
            self._calls += 1
            self._eagerly(inputs, numbers)
        else:
            self._by_traced_function(inputs, numbers)

    def _eagerly(self, inputs: list[Any], numbers: list[Any]) -> None:
        rows, read = self._read(numbers)
        views = self.updated([_array(tensor) for tensor in (*inputs, *read)], whole=False)
        tensors = [tf.experimental.dlpack.from_dlpack(view.__dlpack__()) for view in views]
        order = [*self._layout.places, *(k for k, by in enumerate(self._layout.by_rows) if by)]
        specs = [self._layout.specs[k] for k in order]
        self._assign(
            [
                tensor if tensor.dtype == spec.dtype else tf.bitcast(tensor, spec.dtype)
                for tensor, spec in zip(tensors, specs, strict=True)
            ],
            rows,
        )

    def _by_traced_function(self, inputs: list[Any], numbers: list[Any]) -> None:
        """Do what ``_eagerly`` does, with variables read and assigned several times as fast.

        The function has few arguments, which would cost as much as is gained.
        """
        with self._inputs_lock:
            self._inputs = [_array(tensor) for tensor in inputs]
            if self._traced is None:
                traced = tf.function(
                    lambda *numbers: self._in_graph([], numbers),
                    autograph=False,
                    input_signature=[tf.TensorSpec([None], tf.int64)] * len(numbers),
                )
                self._traced = traced.get_concrete_function()
            self._traced(*numbers)
            self._inputs = []

    def _in_graph(self, inputs: Sequence[Any], numbers: Sequence[Any]) -> None:
        layout = self._layout
        rows, read = self._read(numbers)
        made = tf.numpy_function(
            _called_from_graphs(weakref.ref(self)),
            [*inputs, *read],
            [*layout.dtypes, *layout.row_dtypes],
        )
        wholes, rest = made[: len(layout.dtypes)], made[len(layout.dtypes) :]
        tensors = [
            tf.reshape(tf.slice(wholes[which], [start], [size]), layout.specs[k].shape)
            for k, (which, start, size) in layout.places.items()
        ]
        self._assign([*tensors, *rest], rows)

    def _read(self, numbers: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Return the numbers of rows read; and where among them each gradient's are, and values."""
        rows, places = [], []
        for some in numbers:
            unique = tf.unique(some, out_idx=tf.int64)
            rows.append(unique.y)
            places.append(unique.idx)
        values = [
            tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)
            if which < 0
            else _slices.read(variable, rows[which])
            for variable, which in zip(self._variables, self._layout.which, strict=True)
        ]
        return rows, [*places, *values]

    def _assign(self, tensors: list[Any], rows: list[Any]) -> None:
        """Give variables their new values: first those that have them whole, then the others."""
        rest = iter(tensors)
        for k, (_, _, size) in self._layout.places.items():
            tensor = next(rest)
            if size * tensor.dtype.size < _SHARED_FROM:
                tensor = tf.raw_ops.DeepCopy(x=tensor)
            tf.raw_ops.AssignVariableOp(resource=self._variables[k].handle, value=tensor)
        for variable, which in zip(self._variables, self._layout.which, strict=True):
            if which >= 0:
                _slices.write(variable, rows[which], next(rest))

    def updated(self, arrays: Sequence[Array], *, whole: bool) -> list[Array]:
        """Return new values, from the arrays that a memory's update takes."""
        layout = self._layout
        if len(arrays) == len(layout.params) + len(layout.specs):
            arrays = [*self._inputs, *arrays]
        values = arrays[len(arrays) - len(layout.specs) :]
        counts = [len(values[i]) for i in layout.params]
        with self._lock:
            self._memories = [memory for memory in self._memories if memory.fits(counts)]
            memory = next((m for m in self._memories if m.is_free()), None)
            if memory is None:
                memory = _Memory(self._settings, layout, counts)
                self._memories = [*self._memories[-1:], memory]
            return memory.update(arrays, whole=whole)


def _called_from_graphs(update_ref: weakref.ref[_Update]) -> Callable[..., list[Array]]:
    """Return a function that holds on to nothing: TensorFlow keeps it for ever."""

    def updated(*arrays: Array) -> list[Array]:
        update = update_ref()
        if update is None:
            raise RuntimeError("the graph that this step was traced in is no more")
        tf.constant(0.0)  # TensorFlow lets go of old memory when it next makes a tensor
        return update.updated(arrays, whole=True)

    return updated


def _keep_with_graph(update: _Update) -> None:
    """Let an update live as long as what is being traced: a graph may run without its optimizer."""
    graph = tf.compat.v1.get_default_graph()
    while hasattr(outer := getattr(graph, "outer_graph", None), "outer_graph"):
        graph = outer  # what is left in the end, of loops and branches too
    graph.fastopt_updates = getattr(graph, "fastopt_updates", set()) | {update}


class Updates:
    """An optimizer's updates: the latest, and those that graphs keep.

    A graph has captured its variables. So the same settings with other variables, such as a slot
    that was replaced, are another update.
    """

    def __init__(self) -> None:
        self._latest: _Update | None = None
        self._by_key: weakref.WeakValueDictionary[Any, _Update] = weakref.WeakValueDictionary()

    def find(
        self, settings: Settings, variables: list[Any], grads: list[Any]
    ) -> Callable[..., None]:
        """Return what updates variables: those of the model, then what each has beside it."""
        key = (settings, *map(id, variables))
        update = self._by_key.get(key)
        if update is None:
            update = self._by_key[key] = _Update(settings, variables)
        self._latest = update
        inputs, numbers = [], []
        for by_rows, grad, param in zip(settings.by_rows, grads, variables, strict=False):
            if by_rows:
                some, grad = _slices.numbers_and_values(param, grad)
                numbers.append(some)
            elif is_sparse(grad):
                grad = _slices.dense(param, grad)
            elif grad.dtype != param.dtype:
                grad = tf.cast(grad, param.dtype)
            inputs.append(grad)
        return lambda *now: update([*map(tf.convert_to_tensor, now), *inputs], numbers)


def _array(tensor: Any) -> Array:
    if isinstance(tensor, tf.Tensor) and tensor.shape.rank == 0:
        return np.asarray(tensor.numpy())  # asarray() fails for a tensor of bfloat16
    return np.asarray(tensor)


if TYPE_CHECKING:  # that this module is a backend
    from fastopt.keras import _tensorflow
    from fastopt.keras._backend import Backend

    _backend: Backend = _tensorflow
