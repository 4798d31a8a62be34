"""Who steps over what, and what travels in which message. It knows no MPI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastopt import _core

ALIGNED = 64  # bytes: where a run begins in a message


def cut(
    sizes: Sequence[int], nbytes: Sequence[int], has: Sequence[tuple[int, int]]
) -> list[tuple[int, ...]]:
    """Return where the parts of each parameter begin, rank by rank, and where the last one ends.

    The ranks then have the same bytes, to within a block of the core's, if none had more before. A
    part begins with a block, so that norms, the scales of 8 bits and random bits are those of a
    step over all of it.

    Parameters
    ----------
    sizes, nbytes : sequence of int
        Of each parameter its elements, and the bytes that go with them. What no bytes go with is
        cut by itself, by its elements.
    has : sequence of tuple of int
        For each rank, what it has already: bytes, and elements that no bytes go with.
    """
    bounds: list[tuple[int, ...]] = [()] * len(sizes)
    for kind in range(2):
        chosen = [i for i, n in enumerate(nbytes) if (n > 0) == (kind == 0)]
        weights = [nbytes[i] if kind == 0 else sizes[i] for i in chosen]
        targets, unit = _targets([own[kind] for own in has], sum(weights))
        before = 0
        for i, weight in zip(chosen, weights, strict=True):
            firsts = (_first_from(t - before * unit, weight * unit, sizes[i]) for t in targets)
            bounds[i] = (*firsts, sizes[i])
            before += weight
    return bounds


def _targets(has: list[int], more: int) -> tuple[list[int], int]:
    """Return where in a weight each rank's share of it begins, and the unit of these numbers.

    Those that have the least get as much as makes them even.
    """
    in_order = sorted(has)
    n, filled = 1, in_order[0] + more  # ranks that get any, and what they have then
    while n < len(in_order) and in_order[n] * n < filled:
        filled += in_order[n]
        n += 1
    targets, before = [], 0
    for own in has:
        targets.append(before)
        before += max(0, filled - own * n)
    return targets, n


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
    table: _core.Runs  # of the runs


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
    nothing = _message([], 0)
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
                messages.append(_message(runs, used))
                runs, used = [], 0
                continue
            end = min(last, begin + (most - start) // itemsize)
            runs.append(Run(i, begin, end, start))
            used = start + (end - begin) * itemsize
            begin = end
    if runs:
        messages.append(_message(runs, used))
    return messages


def _message(runs: list[Run], nbytes: int) -> Message:
    return Message(runs, nbytes, _core.Runs(runs))
