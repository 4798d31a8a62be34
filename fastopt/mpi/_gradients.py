"""A rank's own gradients, and the blocks of all ranks' shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastopt import _core
from fastopt._bfloat16 import bfloat16
from fastopt._memory import Array

# What tells other ranks of a gradient's type: a bit for each number that the core has for one.
# Without any, it is None.
NOT_FINITE = 128  # one bit more
AT_A_TIME = 1 << 14  # elements that are copied where that cannot be helped
_NONE, _SEVERAL = 254, 255
_BY_BITS = np.full(256, _SEVERAL, np.uint8)
_BY_BITS[0] = _NONE
for _storage in _core.STORAGES.values():
    _BY_BITS[1 << _storage] = _storage
_ITEMSIZES = np.zeros(256, np.int64)
for _name, _storage in _core.STORAGES.items():
    _ITEMSIZES[_storage] = 2 if _name == "bfloat16" else np.dtype(_name).itemsize
_NAMES = {number: name for name, number in _core.STORAGES.items()}


class Given:
    """A rank's own gradients.

    Parameters
    ----------
    given, arrays : list
        As they were given, and as arrays; None where there is none.
    places : tuple of numpy.ndarray
        Where they are, and how they are stored, as a plan says it.
    orders : list of tuple of int
        Each parameter's axes in memory.
    loss_scale, zero_grad : float and bool
        As a step takes them.
    """

    def __init__(
        self,
        given: list[Any],
        arrays: list[Any],
        places: tuple[Array, Array],
        orders: list[tuple[int, ...]],
        loss_scale: float,
        zero_grad: bool,
    ) -> None:
        self.given, self.arrays, self.orders = given, arrays, orders
        self.addresses, self.storages = places
        self.loss_scale, self.zero_grad = loss_scale, zero_grad
        self._vectors: dict[int, Any] = {}

    def bits(self) -> Array:
        """Return what tells the other ranks of the types."""
        there = np.array([array is not None for array in self.arrays], bool)
        return np.where(there, bits_of(self.storages), 0).astype(np.uint8)

    def elements(self, i: int, begin: int, end: int) -> Array:
        """Return elements of a gradient, counted in its parameter's memory order.

        They are where they are, if they lie so, or else a copy.
        """
        if i not in self._vectors:
            self._vectors[i] = _vector(self.arrays[i], self.orders[i])
        part: Array = self._vectors[i][begin:end]
        return part

    def is_finite(self, i: int) -> bool:
        array = self.arrays[i]
        starts = range(0, 0 if array is None else array.size, AT_A_TIME)
        return all(
            np.isfinite(self.elements(i, k, k + AT_A_TIME).astype(np.float64)).all() for k in starts
        )


class Wire(NamedTuple):
    """How each parameter's gradient travels."""

    storages: Array  # as the core numbers them
    itemsizes: Array  # 0: it does not

    def dtype(self, i: int) -> Any:
        name = _NAMES[int(self.storages[i])]
        return bfloat16() if name == "bfloat16" else np.dtype(name)


class Own(NamedTuple):
    """Where a rank's own gradients are."""

    addresses: Array  # 0: `fill` has to put them somewhere
    storages: Array
    itemsizes: Array
    elements: Callable[[int, int, int], Array]  # of a vector that has an address
    fill: Callable[[int, int, int, Array], None]


def bits_of(storages: Array) -> Array:
    return np.left_shift(1, storages.astype(np.int64)).astype(np.uint8)


def itemsizes_of(storages: Array) -> Array:
    return _ITEMSIZES[storages]


def wire_of(kinds: Array, arithmetic: Array, *, wide: bool) -> Wire:
    """Return how gradients travel, of which all ranks together have these bits.

    That is as they are stored, if it is the same on all ranks, and else, or if `wide`, in the type
    that the rule computes in.
    """
    storages = _BY_BITS[kinds]
    storages = np.where(wide | (storages == _SEVERAL), arithmetic, storages).astype(np.uint8)
    return Wire(storages, np.where(kinds == 0, 0, _ITEMSIZES[storages]))


class Blocks(NamedTuple):
    """The blocks of all ranks' shares."""

    counts: Array  # of each rank
    order: Array  # from the parameters' order to that of the ranks
    firsts: list[int]  # in the parameters' order: where each one's begin, and their end


def blocks_of(bounds: list[tuple[int, ...]], ranks: int) -> Blocks:
    """Return which blocks are whose."""
    sizes = np.array([np.diff(own) for own in bounds], np.int64).reshape(-1, ranks)
    counts = -(-sizes // _core.BLOCK)
    numbers = np.arange(counts.sum())
    by_rank = np.split(numbers, np.cumsum(counts.T.reshape(-1))[:-1])  # rank by rank
    order = [by_rank[rank * len(bounds) + i] for i in range(len(bounds)) for rank in range(ranks)]
    firsts = [0, *np.cumsum(counts.sum(axis=1)).tolist()]
    return Blocks(counts.sum(axis=0), np.concatenate(order) if order else numbers, firsts)


def added_in_order(values: Array) -> float:
    """Return the sum, each number added to that of those before it, as the core does it."""
    return float(np.add.accumulate(values)[-1]) if len(values) else 0.0


def _vector(grad: Array, order: tuple[int, ...]) -> Any:
    """Return the elements of a gradient in a memory order, to be indexed by slices."""
    turned = np.asarray(grad).transpose(order)
    if turned.dtype.names:  # bfloat16, as tensors are seen
        turned = turned.view(bfloat16())
    return turned.reshape(-1) if turned.flags.c_contiguous else _Flat(turned)


class _Flat:
    """An array whose elements do not lie in one stretch, as if it were a vector."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __getitem__(self, part: slice) -> Array:
        return self.array.flat[part]
