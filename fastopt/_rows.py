"""Gradients of some rows: of an embedding table, those that a batch looked up."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Rows:
    r"""A sparse gradient: that of some rows of a parameter, and zero everywhere else.

    Rows are numbered by the parameter's first axis. Of a row that occurs more than once, the
    gradient is the sum of its values, added in the order given. What a step does with the other
    rows says ``rows=`` of the optimizer.

    Parameters
    ----------
    indices : array_like of int
        Numbers of rows, from 0; one axis, in any order.
    values : numpy.ndarray
        A gradient for each, of shape ``(len(indices), *param.shape[1:])`` and a dtype that a
        gradient of the parameter may have. A tensor, or whatever else lends its memory, does too.

    Raises
    ------
    TypeError, ValueError
        If indices are no integers, or not as many as values. A step raises, before it writes
        anything, if there is no such row, or if the values do not fit the parameter.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> table = np.ones((5, 2), np.float32)
    >>> opt = fastopt.SGD([table], lr=0.5)
    >>> batch = np.array([3, 0, 3])
    >>> result = opt.step([fastopt.Rows(batch, np.ones((3, 2), np.float32))])
    >>> table[:, 0]
    array([0.5, 1. , 1. , 0. , 1. ], dtype=float32)
    """

    __slots__ = ("_shape", "indices", "values")

    indices: Array
    values: Any
    _shape: tuple[int, ...] | None  # of the parameter, where what was given says it

    def __init__(self, indices: Any, values: Any) -> None:
        numbers = row_numbers("indices", indices)
        shape = getattr(values, "shape", None)
        if shape is None:
            raise TypeError(
                f"values: expected a numpy.ndarray with a row for each index, got "
                f"{type(values).__name__}"
            )
        if len(shape) == 0 or shape[0] != len(numbers):
            raise ValueError(
                f"values: shape {tuple(shape)}, but there are {len(numbers)} indices; expected one "
                "row of values for each"
            )
        self.indices, self.values, self._shape = numbers, values, None

    def __repr__(self) -> str:
        return f"Rows({len(self.indices)} indices, values of shape {tuple(self.values.shape)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self.indices, self.values)


def row_numbers(name: str, given: Any) -> Array:
    """Return numbers of rows as an array of integers with one axis."""
    if isinstance(given, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a plain array, got a masked one; give .compressed()")
    numbers = np.asarray(given)
    if numbers.size == 0 and not isinstance(given, np.ndarray):
        numbers = numbers.astype(np.int64)  # an empty list is one of float64 to NumPy
    if numbers.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {numbers.dtype}")
    if numbers.ndim != 1:
        raise ValueError(f"{name}: expected one axis, got shape {numbers.shape}")
    return numbers


def rows_of(given: Any) -> Rows | None:
    """Return what frameworks have as a sparse gradient as rows; None for anything else.

    That is a COO tensor of PyTorch, coalesced or not, an ``IndexedSlices`` of TensorFlow, a BCOO
    of JAX, or a sparse matrix of SciPy.
    """
    kind = type(given)
    if isinstance(given, Rows):
        return given
    if getattr(kind, "is_sparse", None) is not None:
        return _of_torch(given) if given.is_sparse else None
    if hasattr(kind, "dense_shape") and hasattr(kind, "indices") and hasattr(kind, "values"):
        return _of_shape(Rows(np.asarray(given.indices), given.values), given.dense_shape)
    if hasattr(kind, "tocsr"):
        return _of_scipy(given.tocsr())
    if kind.__name__ == "BCOO" and kind.__module__.startswith("jax"):
        return _of_jax(given)
    return None


def _of_shape(rows: Rows, shape: Any) -> Rows:
    if shape is not None:
        rows._shape = tuple(int(length) for length in shape)
    return rows


def _of_torch(tensor: Any) -> Rows | None:
    tensor = tensor.detach()
    if tensor.sparse_dim() != 1:
        return None
    return _of_shape(Rows(tensor._indices()[0].numpy(), tensor._values()), tensor.shape)


def _of_jax(array: Any) -> Rows | None:
    if array.n_batch != 0 or array.indices.shape[1] != 1:
        return None
    indices, values = np.asarray(array.indices)[:, 0], array.data
    there = indices < array.shape[0]  # JAX fills up with what is not
    if not there.all():
        indices, values = indices[there], _read_only(np.asarray(values)[there])
    return _of_shape(Rows(indices, values), array.shape)


def _of_scipy(matrix: Any) -> Rows:
    indices = np.flatnonzero(np.diff(matrix.indptr))
    return _of_shape(Rows(indices, _read_only(matrix[indices].toarray())), matrix.shape)


def _read_only(values: Array) -> Array:
    """Return a copy of what was given so that no step zeroes it in place of that."""
    values.flags.writeable = False
    return values
