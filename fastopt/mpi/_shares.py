"""Who steps over what, and what travels in which message. It knows no MPI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastopt import _core

ALIGNED = 64  # bytes: where a run begins in a message


def cut(sizes: Sequence[int], nbytes: Sequence[int], ranks: int) -> list[tuple[int, ...]]:
    """Return where the parts of each parameter begin, rank by rank, and where the last one ends.

    The ranks have the same bytes, to within a block of the core's. A part begins with a block, so
    that norms, the scales of 8 bits and random bits are those of a step over all of it.

    Parameters
    ----------
    sizes, nbytes : sequence of int
        Of each parameter its elements, and the bytes that go with them. What no bytes go with is
        cut by itself, by its elements.
    ranks : int
        How many there are.
    """
    bounds: list[tuple[int, ...]] = [()] * len(sizes)
    for with_bytes in (True, False):
        chosen = [i for i, n in enumerate(nbytes) if (n > 0) == with_bytes]
        weights = [nbytes[i] if with_bytes else sizes[i] for i in chosen]
        total, before = sum(weights), 0
        for i, weight in zip(chosen, weights, strict=True):
            firsts = (
                _first_from(total * rank - before * ranks, weight * ranks, sizes[i])
                for rank in range(ranks)
            )
            bounds[i] = (*firsts, sizes[i])
            before += weight
    return bounds


def _first_from(target: int, weight: int, size: int) -> int:
    """Return the first element of the first block that begins at this share of a weight."""
    if size == 0 or target <= 0:
        return 0
    blocks = -(-target * size // (weight * _core.BLOCK))
    return min(size, blocks * _core.BLOCK)


class Run(NamedTuple):
    """Elements of a parameter, counted in its memory order, in a message."""

    param: int
    begin: int
    end: int
    at: int  # bytes into the message


class Message(NamedTuple):
    """What one rank sends or gets of one bucket."""

    runs: list[Run]
    nbytes: int


def buckets(
    bounds: Sequence[tuple[int, ...]], itemsizes: Sequence[int], ranks: int, most: int
) -> list[list[Message]]:
    """Return, for each bucket, the message about each rank's part.

    Parameters
    ----------
    bounds : sequence of tuple of int
        Where the parts of each parameter begin, as `cut` returns them.
    itemsizes : sequence of int
        Bytes of an element of each parameter; 0: it is left out.
    ranks : int
        How many there are.
    most : int
        Bytes of a message, at most.
    """
    by_rank = [_messages(bounds, itemsizes, rank, most) for rank in range(ranks)]
    nothing = Message([], 0)
    return [
        [own[k] if k < len(own) else nothing for own in by_rank]
        for k in range(max(map(len, by_rank)))
    ]


def _messages(
    bounds: Sequence[tuple[int, ...]], itemsizes: Sequence[int], rank: int, most: int
) -> list[Message]:
    messages: list[Message] = []
    runs: list[Run] = []
    used = 0
    for i, (own, itemsize) in enumerate(zip(bounds, itemsizes, strict=True)):
        begin, last = own[rank], own[rank + 1]
        while itemsize and begin < last:
            start = -(-used // ALIGNED) * ALIGNED
            if start + itemsize > most:
                messages.append(Message(runs, used))
                runs, used = [], 0
                continue
            end = min(last, begin + (most - start) // itemsize)
            runs.append(Run(i, begin, end, start))
            used = start + (end - begin) * itemsize
            begin = end
    if runs:
        messages.append(Message(runs, used))
    return messages
