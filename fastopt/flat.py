"""Models that are one flat vector: every array a view into it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastopt import _trees
from fastopt._core import exchange_memory, hint_for
from fastopt._memory import Array, aligned_zeros

__all__ = ["flatten", "unflatten"]

_DTYPES = ("float32", "float64", "bfloat16", "float16")


class FlatVector(np.ndarray[Any, np.dtype[Any]]):
    """A vector of :func:`flatten`: its copies are bound to the copies of its views.

    NumPy copies and pickles a view as an array with memory of its own. When the vector is copied,
    too, the copies of its views exchange that memory for their places in the new vector.
    """

    _views: Sequence[tuple[int, weakref.ref[Array]]] = ()  # and where they start
    _left: Sequence[Array] = ()  # what has the memory that views had: others may be views of that

    def __array_wrap__(
        self, array: Array, context: Any = None, return_scalar: bool = False
    ) -> Any:  # what is computed from a vector is an ordinary array
        return array[()] if return_scalar else array

    def __deepcopy__(self, memo: dict[int, Any] | None) -> Any:
        if not self._views:  # a part, or a copy
            return np.array(self, order="K", subok=False)
        views = [(start, copy.deepcopy(view, memo)) for start, view in self._living_views()]
        return _bound(np.asarray(self), views)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self._views:
            return np.asarray(self).__reduce_ex__(protocol)
        return _bound, (np.asarray(self), self._living_views())

    def _living_views(self) -> list[tuple[int, Array]]:
        views = ((start, view()) for start, view in self._views)
        return [(start, view) for start, view in views if view is not None]


def _bound(values: Array, views: list[tuple[int, Array]]) -> FlatVector:
    """Return a new vector with these values, of which these arrays become views."""
    flat = _new_vector(values.size, values.dtype)
    flat[...] = values
    parts = [
        np.asarray(flat)[start : start + view.size].reshape(view.shape) for start, view in views
    ]
    for (_, view), part in zip(views, parts, strict=True):
        exchange_memory(view, part)
    flat._left = parts
    flat._views = [(start, weakref.ref(view)) for start, view in views]
    return flat


def _new_vector(size: int, dtype: Any) -> FlatVector:
    flat = aligned_zeros(size, dtype, kind=FlatVector)
    assert isinstance(flat, FlatVector)
    return flat


def flatten(arrays: Any) -> tuple[Array, Any]:
    """Copy arrays into one flat vector; return it, and views into it in place of the arrays.

    A model that keeps the views steps as one array: ``fastopt.Adam([flat])``. Its gradients may be
    views into a vector of their own, from :func:`unflatten`.

    Parameters
    ----------
    arrays : list, tuple or dict of numpy.ndarray, also nested
        At least one array; all float32, all float64, all float16, or all bfloat16 (of ml_dtypes),
        in native byte order.

    Returns
    -------
    flat : numpy.ndarray
        One-dimensional, contiguous and new, of the arrays' dtype. Deep copies and pickles keep the
        bond: where the vector and its views are copied together, in whatever objects they are, the
        copied views are views of the copied vector.
    views : list, tuple or dict
        Structured like `arrays`, with views into `flat` of the same shapes, in C order.

    Raises
    ------
    TypeError
        If something is not an array, or dtypes differ or are others.
    ValueError
        If there is no array, or if containers are nested more than 100 deep or hold themselves.

    See Also
    --------
    unflatten : Views into a vector that there is already.

    Notes
    -----
    Where an optimizer stores its state, or the parameters without a master, in fewer bits, a vector
    has other bits than separate arrays: it is one parameter, so an element has other random bits,
    and blocks of 8-bit state go on from one view into the next.

    The vector begins with a cache line. JAX reads such arrays where they lie, and later: a step
    waits for that if a gradient is JAX's own array; otherwise wait (``jax.block_until_ready``).

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> model = {"W": np.ones((2, 3)), "b": np.zeros(2)}
    >>> flat, model = fastopt.flatten(model)
    >>> grad, grads = fastopt.flatten(model)  # a vector as long, for the gradients
    >>> grads["W"][...], grads["b"][...] = 2.0, -1.0  # by the backward pass
    >>> opt = fastopt.SGD([flat], lr=0.5, global_clip_norm=10.0)
    >>> round(opt.step([grad]).grad_norm, 6)
    5.09902
    >>> model["b"]
    array([0.5, 0.5])
    """
    names: list[str] = []
    leaves: list[Any] = []
    if not _trees.is_container(arrays):
        raise TypeError(
            f"arrays must be a list, tuple or dict of arrays, got {type(arrays).__name__}"
        )
    _trees.flatten(arrays, names, leaves)
    if not leaves:
        raise ValueError("no arrays: expected at least one")
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, np.ndarray):
            raise TypeError(
                f"array {name}: expected a numpy.ndarray, got {type(leaf).__name__}{hint_for(leaf)}"
            )
        if leaf.dtype.name not in _DTYPES or not leaf.dtype.isnative:
            raise TypeError(
                f"array {name}: dtype {leaf.dtype} is not supported; use {', '.join(_DTYPES[:-1])} "
                f"or {_DTYPES[-1]} in native byte order"
            )
        if leaf.dtype != leaves[0].dtype:
            raise TypeError(
                f"array {name}: dtype {leaf.dtype} is not that of array {names[0]}, "
                f"{leaves[0].dtype}; a flat vector has one dtype"
            )
    flat = _new_vector(sum(leaf.size for leaf in leaves), leaves[0].dtype)
    views = unflatten(flat, arrays)
    into: list[Any] = []
    _trees.flatten(views, [], into)
    for view, leaf in zip(into, leaves, strict=True):
        view[...] = leaf
    return flat, views


def unflatten(flat: Array, like_these: Any) -> Any:
    """Return views into a flat vector, of the shapes and in the structure of other arrays.

    Parameters
    ----------
    flat : numpy.ndarray
        One-dimensional, with as many elements as the arrays have together.
    like_these : list, tuple or dict of numpy.ndarray, also nested
        The arrays whose shapes count; their values and dtypes do not.

    Returns
    -------
    list, tuple or dict
        Views into `flat`, one after the other.

    Raises
    ------
    TypeError
        If `flat` is not an array.
    ValueError
        If its shape does not fit.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> flat = np.arange(5.0)
    >>> w, b = fastopt.unflatten(flat, [np.zeros((2, 2)), np.zeros(())])
    >>> w
    array([[0., 1.],
           [2., 3.]])
    >>> b[...] = 7.0
    >>> flat
    array([0., 1., 2., 3., 7.])
    """
    leaves: list[Any] = []
    _trees.flatten(like_these, [], leaves)
    if not isinstance(flat, np.ndarray):
        raise TypeError(f"flat must be a numpy.ndarray, got {type(flat).__name__}{hint_for(flat)}")
    size = sum(np.size(leaf) for leaf in leaves)
    if flat.shape != (size,):
        raise ValueError(f"flat must be of shape {(size,)}, got {flat.shape}")
    plain = np.asarray(flat) if isinstance(flat, FlatVector) else flat
    views, starts, start = [], [], 0
    for leaf in leaves:
        views.append(plain[start : start + np.size(leaf)].reshape(np.shape(leaf)))
        starts.append(start)
        start += np.size(leaf)
    if isinstance(flat, FlatVector):
        flat._views = [*flat._views, *zip(starts, map(weakref.ref, views), strict=True)]
    return _trees.unflatten(like_these, iter(views))
