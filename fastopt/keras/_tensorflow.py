"""Keras's variables on its TensorFlow backend.

TensorFlow's tensors are immutable, and a variable's value is one: whoever has read the variable has
the same memory, and relies on it. So a step makes new values, in memory of its own, and TensorFlow
takes that memory over as the variables' new tensors, without a copy.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from fastopt._memory import CACHE_LINE, aligned_zeros
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
    return with_rate(row, rate, step)


class _Memory:
    """Memory for new values of variables, and the step that makes them there.

    TensorFlow is given views, which live for as long as any tensor has their memory.
    """

    def __init__(self, settings: Settings, variables: Sequence[tf.TensorSpec]) -> None:
        dtypes = [v.dtype.as_numpy_dtype for v in variables]
        self.dtypes = list(dict.fromkeys(dtypes))
        self.places: list[tuple[int, int, int]] = []  # which dtype, first element, size
        ends = [0] * len(self.dtypes)
        for variable, dtype in zip(variables, dtypes, strict=True):
            which, size = self.dtypes.index(dtype), variable.shape.num_elements()
            self.places.append((which, ends[which], size))
            ends[which] += size + -size % _ALIGNMENT
        self._wholes = [aligned_zeros(end, d) for d, end in zip(self.dtypes, ends, strict=True)]
        self._arrays = [
            self._wholes[which][start : start + size].reshape(variable.shape)
            for variable, (which, start, size) in zip(variables, self.places, strict=True)
        ]
        self._step = Step(settings, self._arrays, _rates)
        self._lent: list[weakref.ref[Array]] = []

    def is_free(self) -> bool:
        """Tell whether no tensor has the memory any more."""
        return all(view() is None for view in self._lent)

    def update(self, arrays: Sequence[Array], *, whole: bool) -> list[Array]:
        """Return views of new values: of all together, or of each variable, for DLPack.

        The arrays are the learning rate, the number of iterations, gradients, and values.
        """
        n = len(arrays) - len(self._arrays)
        for to, array in zip(self._arrays, arrays[n:], strict=True):
            to[...] = array
        params = self._arrays[: n - 2]
        grads = [
            grad if grad.shape == param.shape else np.broadcast_to(grad, param.shape)
            for grad, param in zip(arrays[2:n], params, strict=True)
        ]
        self._step(grads, arrays[0], arrays[1])
        views = [array[...] for array in self._wholes] if whole else [*map(_lent, self._arrays)]
        self._lent = [weakref.ref(view) for view in views]
        return views


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
        self._specs = [tf.TensorSpec(v.shape, v.dtype) for v in variables]
        self._memories = [_Memory(settings, self._specs)]
        self._lock = threading.Lock()
        self._calls = 0
        self._traced: Any = None
        self._inputs: list[Array] = []  # of the traced function
        self._inputs_lock = threading.Lock()

    def __call__(self, inputs: list[Any]) -> None:
        if not tf.executing_eagerly():
            _keep_with_graph(self)
            self._in_graph(inputs)
        elif self._calls < _CALLS_BEFORE_TRACING:
            self._calls += 1
            self._eagerly(inputs)
        else:
            self._by_traced_function(inputs)

    def _eagerly(self, inputs: list[Any]) -> None:
        arrays = [_array(tensor) for tensor in (*inputs, *_values(self._variables))]
        views = self.updated(arrays, whole=False)
        tensors = [tf.experimental.dlpack.from_dlpack(view.__dlpack__()) for view in views]
        self._assign(
            [
                tensor if tensor.dtype == spec.dtype else tf.bitcast(tensor, spec.dtype)
                for tensor, spec in zip(tensors, self._specs, strict=True)
            ]
        )

    def _by_traced_function(self, inputs: list[Any]) -> None:
        """Do what ``_eagerly`` does, with variables read and assigned several times as fast.

        The function has no arguments, which would cost as much as is gained.
        """
        with self._inputs_lock:
            self._inputs = [_array(tensor) for tensor in inputs]
            if self._traced is None:
                traced = tf.function(lambda: self._in_graph([]), autograph=False)
                self._traced = traced.get_concrete_function()
            self._traced()
            self._inputs = []

    def _in_graph(self, inputs: list[Any]) -> None:
        variables, first = self._variables, self._memories[0]
        wholes = tf.numpy_function(
            _called_from_graphs(weakref.ref(self)), [*inputs, *_values(variables)], first.dtypes
        )
        tensors = [
            tf.reshape(tf.slice(wholes[which], [start], [size]), variable.shape)
            for variable, (which, start, size) in zip(variables, first.places, strict=True)
        ]
        self._assign(tensors)

    def _assign(self, tensors: list[Any]) -> None:
        places = self._memories[0].places
        for variable, tensor, (_, _, size) in zip(self._variables, tensors, places, strict=True):
            if size * tensor.dtype.size < _SHARED_FROM:
                tensor = tf.raw_ops.DeepCopy(x=tensor)
            tf.raw_ops.AssignVariableOp(resource=variable.handle, value=tensor)

    def updated(self, arrays: Sequence[Array], *, whole: bool) -> list[Array]:
        """Return new values, from the arrays that a memory's update takes."""
        if len(arrays) == len(self._specs):
            arrays = [*self._inputs, *arrays]
        with self._lock:
            memory = next((m for m in self._memories if m.is_free()), None)
            if memory is None:
                memory = _Memory(self._settings, self._specs)
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
    ) -> Callable[[Any, Any], None]:
        """Return what updates variables: those of the model, then what each has beside it."""
        key = (settings, *map(id, variables))
        update = self._by_key.get(key)
        if update is None:
            update = self._by_key[key] = _Update(settings, variables)
        self._latest = update
        params = variables[: len(grads)]
        grads = [
            g if g.dtype == p.dtype else tf.cast(g, p.dtype)
            for g, p in zip(grads, params, strict=True)
        ]
        return lambda *now: update([*map(tf.convert_to_tensor, now), *grads])


def _array(tensor: Any) -> Array:
    if isinstance(tensor, tf.Tensor) and tensor.shape.rank == 0:
        return np.asarray(tensor.numpy())  # asarray() fails for a tensor of bfloat16
    return np.asarray(tensor)


def _values(variables: list[Any]) -> list[Any]:
    return [tf.raw_ops.ReadVariableOp(resource=v.handle, dtype=v.dtype) for v in variables]


if TYPE_CHECKING:  # that this module is a backend
    from fastopt.keras import _tensorflow
    from fastopt.keras._backend import Backend

    _backend: Backend = _tensorflow
