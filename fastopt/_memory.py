"""New arrays that lie in memory as a parameter does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastopt._core import address, exchange_memory

Array = NDArray[Any]

CACHE_LINE = 64  # bytes


def aligned_zeros(size: int, dtype: Any, like: int = 0, kind: type[Array] = np.ndarray) -> Array:
    """Return a new vector that begins with a cache line, or where an address is in one."""
    memory = np.zeros(size + CACHE_LINE // np.dtype(dtype).itemsize, dtype).view(kind)
    start = (like - address(memory)) % CACHE_LINE // memory.itemsize
    return memory[start : start + size]


def zeros_like(param: Array, dtype: Any = None) -> Array:
    """Return zeros of a parameter's shape, dtype, memory order and place in a cache line.

    (With the same place, the loops can align all arrays at once.)
    """
    param = np.asarray(param)  # a subclass may have ideas of its own
    zeros = aligned_zeros(param.size, dtype or param.dtype, address(param))
    if param.flags.c_contiguous:
        return zeros.reshape(param.shape)
    return laid_out(zeros, param.shape, memory_order(param))


def memory_order(array: Array) -> tuple[int, ...]:
    """Return the axes of an array in the order in which they lie in memory, outermost first."""
    strides = np.empty_like(array, order="K").strides
    return tuple(sorted(range(array.ndim), key=lambda axis: -strides[axis]))


def in_memory_order(array: Array) -> Array:
    """Return the elements of a dense array as a vector over the same memory; of others, a copy."""
    return in_order(array, memory_order(array))


def in_order(array: Array, axes: Sequence[int]) -> Array:
    """Return an array's elements as a vector, its axes in this order; no copy if they lie so."""
    return np.asarray(array).transpose(axes).reshape(-1)


def long_axes(array: Array) -> tuple[int, ...]:
    """Return the same, but only the axes that say where elements lie: sorted if in C order."""
    return tuple(axis for axis in memory_order(array) if array.shape[axis] > 1)


def laid_out(memory: Array, shape: tuple[int, ...], axes: Sequence[int]) -> Array:
    """Return a vector as an array of this shape whose axes lie in this order."""
    places = sorted(range(len(axes)), key=axes.__getitem__)
    return memory.reshape([shape[axis] for axis in axes]).transpose(places)


def lay_out(array: Array, axes: Sequence[int]) -> None:
    """Let the axes of an array lie in this order, in other memory if they do not yet."""
    if memory_order(array) != tuple(axes):
        moved = laid_out(aligned_zeros(array.size, array.dtype), array.shape, axes)
        moved[...] = array
        exchange_memory(array, moved)


def copy_like(param: Array, dtype: Any = None, values: Array | None = None) -> Array:
    """Return a copy of a parameter, or of other values, that lies as `zeros_like` says."""
    copy = zeros_like(param, dtype)
    copy[...] = np.asarray(param if values is None else values)
    return copy
