"""Gradients of some rows on Keras's TensorFlow backend: ``tf.IndexedSlices``.

A step that is about these rows alone reads and writes them alone: a table stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from fastopt.keras._step import UNLIKE, Unfit

_NARROW = (tf.bfloat16, tf.float16)


def is_sparse(grad: Any) -> bool:
    """Tell whether a gradient is of some rows, and zero everywhere else."""
    return isinstance(grad, tf.IndexedSlices)


def unfit(variable: Any, grad: tf.IndexedSlices) -> Unfit | None:
    """Return why rows cannot be those of a variable, as far as that is known."""
    shape, values = variable.shape, tf.convert_to_tensor(grad.values)
    whole = tf.TensorShape(None)
    if grad.dense_shape is not None:
        whole = tf.TensorShape(tf.get_static_value(tf.convert_to_tensor(grad.dense_shape)))
    fit = (
        shape.rank > 0
        and shape.is_compatible_with(whole)
        and tf.TensorShape([None, *shape[1:]]).is_compatible_with(values.shape)
    )
    return None if fit else UNLIKE


def numbers_and_values(variable: Any, grad: tf.IndexedSlices) -> tuple[Any, Any]:
    """Return the numbers of rows, and what each is given in the variable's type.

    Raises ValueError if a number is that of no row; in a graph, it is checked when that runs.
    """
    numbers = tf.cast(tf.convert_to_tensor(grad.indices), tf.int64)
    count = variable.shape[0]
    text = f"gradient of {variable.name}: indices[{{}}] is {{}}, not the number of a row: 0 to {{}}"
    if tf.executing_eagerly():
        bad = np.flatnonzero((numbers.numpy() < 0) | (numbers.numpy() >= count))
        if bad.size > 0:
            raise ValueError(text.format(bad[0], numbers.numpy()[bad[0]], count - 1))
    else:
        bad = tf.where((numbers < 0) | (numbers >= count))[:1, 0]
        told = tf.strings.format(text, (bad, tf.gather(numbers, bad), count - 1))
        with tf.control_dependencies([tf.debugging.Assert(tf.size(bad) == 0, [told])]):
            numbers = tf.identity(numbers)
    return numbers, tf.cast(tf.convert_to_tensor(grad.values), variable.dtype)


def _sums(values: Any, places: Any, count: Any) -> Any:
    """Return sums of values of the same place, in the order given; of 16 bits in float32."""
    if values.dtype in _NARROW:
        values = tf.cast(values, tf.float32)
    return tf.math.unsorted_segment_sum(values, places, count)


def dense(variable: Any, grad: tf.IndexedSlices) -> Any:
    """Return the gradient with all its zeros, for a variable of 16 bits in float32."""
    numbers, values = numbers_and_values(variable, grad)
    return _sums(values, numbers, variable.shape[0])


def clipped(grads: list[Any], clip: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """Return gradients as Keras clips them, if the sparse ones were dense.

    Keras takes the norm of a row's values one by one, where the gradient is their sum. Of what is
    zero it clips nothing.
    """
    kept = [_summed(grad) if is_sparse(grad) else None for grad in grads]
    done = clip([g if k is None else k.values for g, k in zip(grads, kept, strict=True)])
    return [
        g if k is None else tf.IndexedSlices(g, k.indices, k.dense_shape)
        for g, k in zip(done, kept, strict=True)
    ]


def _summed(grad: tf.IndexedSlices) -> tf.IndexedSlices:
    """Return the same gradient, in which no row occurs twice."""
    numbers, places = tf.unique(tf.convert_to_tensor(grad.indices))
    values = tf.convert_to_tensor(grad.values)
    sums = tf.cast(_sums(values, places, tf.size(numbers)), values.dtype)
    return tf.IndexedSlices(sums, numbers, grad.dense_shape)


def read(variable: Any, numbers: Any) -> Any:
    """Return the rows of these numbers; it fails if there is no such row."""
    return tf.raw_ops.ResourceGather(
        resource=variable.handle, indices=numbers, dtype=variable.dtype
    )


def write(variable: Any, numbers: Any, rows: Any) -> None:
    tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=numbers, updates=rows)
