"""Gradients to who steps with them, and parameters to everyone, in buckets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from fastopt import _core
from fastopt._memory import Array
from fastopt.mpi._agreement import Ranks
from fastopt.mpi._shares import ALIGNED, Message, Run, buckets

# From a parameter's number and a range of its elements to them: where they are, or a copy.
Source = Callable[[int, int, int], Array]


class Exchange:
    """What travels between ranks, and the memory that it needs.

    Parameters
    ----------
    ranks : Ranks
        Who takes part.
    bucket_bytes : int
        Bytes of a bucket: what a rank sends at a time, to all others.
    """

    def __init__(self, ranks: Ranks, bucket_bytes: int) -> None:
        self.ranks = ranks
        # Two buckets are under way at a time: what is sent and what is received of each.
        most = bucket_bytes // (2 * max(1, ranks.size - 1))
        self.most = max(ALIGNED, most // ALIGNED * ALIGNED)
        self._memory: list[tuple[Array, Array]] = []  # of a bucket, to send and to get, by rank

    def _buffers(self) -> list[tuple[Array, Array]]:
        if not self._memory:
            shape = self.ranks.size, self.most
            self._memory = [
                (np.empty(shape, np.uint8), np.empty(shape, np.uint8)) for _ in range(2)
            ]
        return self._memory

    def prepare(self) -> None:
        """Take the memory that is needed, so that nothing can fail later."""
        self._buffers()

    def routes(self, bounds: Sequence[tuple[int, ...]], itemsizes: Sequence[int]) -> Any:
        """Return what travels in which bucket; a bucket has elements of one size."""
        return [
            bucket
            for size in sorted({*itemsizes} - {0})
            for bucket in buckets(
                bounds, [size if n == size else 0 for n in itemsizes], self.ranks.size, self.most
            )
        ]

    def reduce(
        self,
        routes: list[list[Message]],
        dtypes: Sequence[Any],
        source: Source,
        to: list[Array],
        *,
        ordered: bool,
    ) -> None:
        """Put the mean over ranks of what each has in the owner's arrays.

        Parameters
        ----------
        routes : list
            From `routes`.
        dtypes : sequence of dtype
            In which each parameter's elements travel.
        source : callable
            This rank's elements.
        to : list of numpy.ndarray
            For each parameter where the mean of this rank's part goes.
        ordered : bool
            Whether to add in the order of the ranks, or as MPI likes.
        """
        comm, me, size = self.ranks.comm, self.ranks.rank, self.ranks.size
        memory = self._buffers()
        firsts: dict[int, int] = {}
        for bucket in routes:
            for run in bucket[me].runs:
                firsts.setdefault(run.param, run.begin)

        def begin(k: int) -> list[Any]:
            to_send, to_get = memory[k % 2]
            if not ordered:
                return [self._begin_sum(routes[k], dtypes, source, to_send, to_get[me])]
            own, requests = routes[k][me], []
            for turn in range(1, size):
                other = (me - turn) % size
                if own.nbytes:
                    requests.append(comm.Irecv(_part(to_get[other], own), other))
            for turn in range(1, size):
                other = (me + turn) % size
                message = routes[k][other]
                if message.nbytes:
                    packed = _packed(message, dtypes, source, to_send[other])
                    requests.append(comm.Isend(packed, other))
            return requests

        def end(k: int, requests: list[Any]) -> None:
            MPI.Request.Waitall(requests)
            for run in routes[k][me].runs:
                _, got = memory[k % 2]
                at = run.begin - firsts[run.param]
                mean = to[run.param][at : at + run.end - run.begin]
                if not ordered:
                    total = _elements(got[me], run, dtypes[run.param])
                    _core.batch_mean(total, None, 1.0, size, mean)
                    continue
                pieces = [
                    source(run.param, run.begin, run.end)
                    if rank == me
                    else _elements(got[rank], run, dtypes[run.param])
                    for rank in range(size)
                ]
                _core.ordered_mean(pieces, mean)

        _in_turn(len(routes), begin, end)

    def _begin_sum(
        self,
        bucket: list[Message],
        dtypes: Sequence[Any],
        source: Source,
        to_send: Array,
        to_get: Array,
    ) -> Any:
        """Begin a sum by MPI of a bucket whose elements are all of one type."""
        dtype = dtypes[next(run.param for message in bucket for run in message.runs)]
        memory, at = to_send.reshape(-1), 0
        for message in bucket:
            _pack(message, dtypes, source, memory[at : at + message.nbytes])
            at += message.nbytes
        kind = MPI.DOUBLE if dtype == np.float64 else MPI.FLOAT
        return self.ranks.comm.Ireduce_scatter(
            [memory[:at].view(dtype), kind],
            [to_get[: bucket[self.ranks.rank].nbytes].view(dtype), kind],
            [message.nbytes // dtype.itemsize for message in bucket],
            MPI.SUM,
        )

    def gather(self, routes: list[list[Message]], vectors: list[Array]) -> None:
        """Give each rank the parts of all, in place.

        Parameters
        ----------
        routes : list
            From `routes`.
        vectors : list of numpy.ndarray
            For each parameter its elements in memory order.
        """
        comm, me, size = self.ranks.comm, self.ranks.rank, self.ranks.size
        memory = self._buffers()
        dtypes = [vector.dtype for vector in vectors]

        def source(i: int, start: int, stop: int) -> Array:
            return vectors[i][start:stop]

        def begin(k: int) -> list[Any]:
            to_send, to_get = memory[k % 2]
            requests = []
            for turn in range(1, size):
                other = (me - turn) % size
                message = routes[k][other]
                if len(message.runs) == 1:  # to where it belongs
                    requests.append(comm.Irecv(_bytes(source(*message.runs[0][:3])), other))
                elif message.runs:
                    requests.append(comm.Irecv(_part(to_get[other], message), other))
            if routes[k][me].nbytes:
                packed = _packed(routes[k][me], dtypes, source, to_send[me])
                for turn in range(1, size):
                    requests.append(comm.Isend(packed, (me + turn) % size))
            return requests

        def end(k: int, requests: list[Any]) -> None:
            MPI.Request.Waitall(requests)
            for other, message in enumerate(routes[k]):
                if other != me and len(message.runs) > 1:
                    for run in message.runs:
                        there = source(*run[:3])
                        there[...] = _elements(memory[k % 2][1][other], run, there.dtype)

        _in_turn(len(routes), begin, end)


def _in_turn(
    n: int, begin: Callable[[int], list[Any]], end: Callable[[int, list[Any]], None]
) -> None:
    """Let each bucket travel while the one before it is worked on."""
    requests: list[Any] = begin(0) if n else []
    for k in range(n):
        following = begin(k + 1) if k + 1 < n else []
        end(k, requests)
        requests = following


def _bytes(array: Array) -> Any:
    return [array.view(np.uint8), MPI.BYTE]


def _part(memory: Array, message: Message) -> Any:
    return [memory[: message.nbytes], MPI.BYTE]


def _elements(memory: Array, run: Run, dtype: Any) -> Array:
    return memory[run.at : run.at + (run.end - run.begin) * dtype.itemsize].view(dtype)


def _packed(message: Message, dtypes: Sequence[Any], source: Source, memory: Array) -> Any:
    """Return what to send: elements where they are, if it is that simple, or else copied."""
    if len(message.runs) == 1:
        (run,) = message.runs
        elements = source(*run[:3])
        if elements.dtype == dtypes[run.param] and elements.flags.c_contiguous:
            return _bytes(elements)
    _pack(message, dtypes, source, memory)
    return _part(memory, message)


def _pack(message: Message, dtypes: Sequence[Any], source: Source, memory: Array) -> None:
    for run in message.runs:
        _elements(memory, run, dtypes[run.param])[...] = source(*run[:3])
