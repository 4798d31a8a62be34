"""A rank's own gradients, and the blocks of all ranks' shares."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastopt import _core
from fastopt._bfloat16 import bfloat16
from fastopt._memory import Array

# What tells other ranks of a gradient's type; 0: it is None.
DTYPE_BITS = {"float16": 1, "bfloat16": 2, "float32": 4, "float64": 8}  # of a gradient; 0: None


class Given(NamedTuple):
    """A rank's own gradients."""

    given: list[Any]
    arrays: list[Any]  # over them; None where there is none
    vectors: list[Any]  # their elements in the parameters' memory order, to be indexed by slices
    loss_scale: float
    zero_grad: bool


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


def dtype_name(dtype: Any) -> str:
    return "bfloat16" if dtype.names == ("bfloat16",) else dtype.name


def vector_of(grad: Array, order: tuple[int, ...]) -> Any:
    """Return the elements of a gradient in a memory order, to be indexed by slices.

    They are where they are, if they lie so; or else what a slice returns is a copy.
    """
    turned = grad if len(order) == 1 else np.asarray(grad).transpose(order)
    if turned.dtype.names:  # bfloat16, as tensors are seen
        turned = turned.view(bfloat16())
    return turned.reshape(-1) if turned.flags.c_contiguous else _Flat(turned)


class _Flat:
    """An array whose elements do not lie in one stretch, as if it were a vector."""

    def __init__(self, array: Array) -> None:
        self.array, self.dtype = array, array.dtype

    def __getitem__(self, part: slice) -> Array:
        return self.array.flat[part]


def on_the_way(kind: int, mean: Array) -> Any:
    """Return the type in which gradients travel: theirs, if it is the same on all ranks."""
    for name, bit in DTYPE_BITS.items():
        if kind == bit:
            return bfloat16() if name == "bfloat16" else np.dtype(name)
    return mean.dtype
