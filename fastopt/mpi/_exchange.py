"""Gradients to who steps with them, and parameters to everyone, in buckets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from fastopt import _core
from fastopt._memory import Array
from fastopt.mpi._agreement import Ranks
from fastopt.mpi._gradients import Own, Wire
from fastopt.mpi._shares import ALIGNED, Message, Run, buckets


class Route(NamedTuple):
    """What travels."""

    buckets: list[list[Message]]  # each has a message about every rank's part
    means: list[list[Array]]  # for each run of the messages about this rank's, where means go


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
        # Two buckets are under way at a time; of each there is what is sent and what is received.
        most = bucket_bytes // (2 * ranks.size)
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

    def route(
        self, bounds: Sequence[tuple[int, ...]], itemsizes: list[int], means: list[Array]
    ) -> Route:
        """Return what travels in which bucket; a bucket has elements of one size."""
        me = self.ranks.rank
        found = [
            bucket
            for size in sorted({*itemsizes} - {0})
            for bucket in buckets(
                bounds, [size if n == size else 0 for n in itemsizes], self.ranks.size, self.most
            )
        ]
        own = [
            [
                means[i][begin - bounds[i][me] : end - bounds[i][me]]
                for i, begin, end, _ in b[me].runs
            ]
            for b in found
        ]
        return Route(found, own)

    def reduce(self, route: Route, wire: Wire, own: Own, *, ordered: bool) -> None:
        """Put the mean over ranks of what each has where its owner wants it.

        Parameters
        ----------
        route : Route
            What travels, and where the means go.
        wire : Wire
            How it travels.
        own : Own
            What this rank has.
        ordered : bool
            Whether to add in the order of the ranks, or as MPI likes.
        """
        comm, me, size = self.ranks.comm, self.ranks.rank, self.ranks.size
        memory = self._buffers()
        # What travels as it is stored can be sent from where it lies, or be copied.
        alike = own._replace(
            addresses=np.where(own.storages == wire.storages, own.addresses, 0),
            itemsizes=wire.itemsizes,
        )

        def begin(k: int) -> list[Any]:
            to_send, to_get = memory[k % 2]
            bucket, requests = route.buckets[k], []
            if not ordered:
                return [self._begin_sum(bucket, wire, alike, to_send, to_get[me])]
            for turn in range(1, size):
                other = (me - turn) % size
                if bucket[me].nbytes:
                    requests.append(comm.Irecv(_part(to_get[other], bucket[me]), other))
            for turn in range(1, size):
                other = (me + turn) % size
                if bucket[other].nbytes:
                    packed = _packed(bucket[other], wire, alike, to_send[other])
                    requests.append(comm.Isend(packed, other))
            return requests

        def end(k: int, requests: list[Any]) -> None:
            MPI.Request.Waitall(requests)
            message, means, got = route.buckets[k][me], route.means[k], memory[k % 2][1]
            if not ordered:
                for run, mean in zip(message.runs, means, strict=True):
                    total = _elements(got[me], run, wire.dtype(run.param))
                    _core.batch_mean(total, None, 1.0, size, mean)
                return
            missing = message.table.mean(
                got, wire.storages, me, own.addresses, own.storages, own.itemsizes, means
            )
            for number in missing:
                run = message.runs[number]
                pieces = [_elements(row, run, wire.dtype(run.param)) for row in got]
                own.fill(
                    run.param, run.begin, run.end, pieces[me]
                )  # in the row that nobody has sent
                _core.ordered_mean(pieces, means[number])

        _in_turn(len(route.buckets), begin, end)

    def _begin_sum(
        self, bucket: list[Message], wire: Wire, own: Own, to_send: Array, to_get: Array
    ) -> Any:
        """Begin a sum by MPI of a bucket whose elements are all of one type."""
        dtype = wire.dtype(next(run.param for message in bucket for run in message.runs))
        memory, at = to_send.reshape(-1), 0
        for message in bucket:
            _pack(message, wire, own, memory[at : at + message.nbytes])
            at += message.nbytes
        kind = MPI.DOUBLE if dtype == np.float64 else MPI.FLOAT
        return self.ranks.comm.Ireduce_scatter(
            [memory[:at].view(dtype), kind],
            [to_get[: bucket[self.ranks.rank].nbytes].view(dtype), kind],
            [message.nbytes // dtype.itemsize for message in bucket],
            MPI.SUM,
        )

    def gather(
        self, route: Route, vectors: list[Array], addresses: Array, itemsizes: Array
    ) -> None:
        """Give each rank the parts of all, in place.

        Parameters
        ----------
        route : Route
            What travels.
        vectors : list of numpy.ndarray
            Each parameter's elements in memory order.
        addresses, itemsizes : numpy.ndarray of int64
            Where these are, and the bytes of an element.
        """
        comm, me, size = self.ranks.comm, self.ranks.rank, self.ranks.size
        memory = self._buffers()

        def in_place(message: Message) -> Any:
            (run,) = message.runs
            return _bytes(vectors[run.param][run.begin : run.end])

        def begin(k: int) -> list[Any]:
            to_send, to_get = memory[k % 2]
            bucket, requests = route.buckets[k], []
            for turn in range(1, size):
                other = (me - turn) % size
                if len(bucket[other].runs) == 1:  # to where it belongs
                    requests.append(comm.Irecv(in_place(bucket[other]), other))
                elif bucket[other].runs:
                    requests.append(comm.Irecv(_part(to_get[other], bucket[other]), other))
            if len(bucket[me].runs) == 1:
                packed = in_place(bucket[me])
            else:
                bucket[me].table.pack(addresses, itemsizes, to_send[me])
                packed = _part(to_send[me], bucket[me])
            if bucket[me].runs:
                for turn in range(1, size):
                    requests.append(comm.Isend(packed, (me + turn) % size))
            return requests

        def end(k: int, requests: list[Any]) -> None:
            MPI.Request.Waitall(requests)
            got = memory[k % 2][1]
            for other, message in enumerate(route.buckets[k]):
                if other != me and len(message.runs) > 1:
                    message.table.unpack(got[other], addresses, itemsizes)

        _in_turn(len(route.buckets), begin, end)


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


def _packed(message: Message, wire: Wire, own: Own, memory: Array) -> Any:
    """Return what to send: elements where they are, if it is that simple, or else copied."""
    if len(message.runs) == 1 and own.addresses[message.runs[0].param]:
        return _bytes(own.elements(*message.runs[0][:3]))
    _pack(message, wire, own, memory)
    return _part(memory, message)


def _pack(message: Message, wire: Wire, own: Own, memory: Array) -> None:
    for number in message.table.pack(own.addresses, own.itemsizes, memory):
        run = message.runs[number]
        own.fill(run.param, run.begin, run.end, _elements(memory, run, wire.dtype(run.param)))
