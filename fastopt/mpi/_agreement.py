"""One decision for all ranks, taken before anything is written."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI

from fastopt._memory import Array

_FAILED = 1


class Signals:
    """Signals that came while something went on that they must not interrupt."""

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._came: list[tuple[int, Any]] = []

    def note(self, number: int, frame: Any) -> None:
        self._came.append((number, frame))

    def handle(self) -> None:
        """Call the handlers of those that have come; each may raise."""
        while self._came:
            number, frame = self._came.pop(0)
            self._handlers[number](number, frame)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold signals that code in Python handles, until they are asked for, or the end."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {
                number: handler
                for number in signal.valid_signals()
                if callable(handler := signal.getsignal(number))
            }
        try:
            for number in self._handlers:
                signal.signal(number, self.note)
            yield
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self.handle()


class Ranks:
    """The processes that step together.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Their communicator. What is sent here uses one of its own, so that it meets no message of
        the program's.
    """

    def __init__(self, comm: Any) -> None:
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(
                f"comm: expected an mpi4py.MPI.Intracomm, such as MPI.COMM_WORLD, got "
                f"{type(comm).__name__}"
            )
        self.comm = _own(comm)
        self.rank, self.size = self.comm.rank, self.comm.size

    def agree(self, error: BaseException | None, bits: Array) -> Array:
        """Return the bits that are set on any rank; or raise, on all ranks, if one has an error.

        Parameters
        ----------
        error : BaseException or None
            What this rank has to say.
        bits : numpy.ndarray of uint8
            As many on all ranks (those of a rank with an error do not matter).
        """
        own = np.append(bits, np.uint8(0 if error is None else _FAILED))
        every = np.empty_like(own)
        self.comm.Allreduce(own, every, MPI.BOR)
        if every[-1] & _FAILED:
            self.raise_first(error)
        return every[:-1]

    def raise_first(self, error: BaseException | None) -> NoReturn:
        """Raise, on all ranks, the error of the first rank that has one."""
        told = self.comm.allgather(None if error is None else _told(error))
        rank, (kind, text) = next((r, one) for r, one in enumerate(told) if one is not None)
        raise _again(kind, f"rank {rank}: {text}") from (error if rank == self.rank else None)

    def same(self, values: bytes) -> tuple[Array, slice]:
        """Return bits for `agree` that tell whether a value is the same on all ranks."""
        own = np.frombuffer(values, np.uint8)
        return np.concatenate([own, ~own]), slice(len(own))

    def differ(self, digests: Sequence[bytes]) -> tuple[int, int] | None:
        """Return the first of some digests that is not the same everywhere, and a rank; or None."""
        every = self.comm.allgather(list(digests))
        for rank, theirs in enumerate(every):
            pairs = enumerate(zip(every[0], theirs, strict=False))
            for number in (k for k, (one, other) in pairs if one != other):
                return number, rank
        return None


def digest(data: Any) -> bytes:
    """Return 16 bytes that differ where data differ."""
    return hashlib.blake2b(data, digest_size=16).digest()


@functools.cache
def _key() -> int:
    return MPI.Comm.Create_keyval()  # type: ignore[no-any-return]


def _own(comm: Any) -> Any:
    """Return a communicator's copy for messages of ours; the same one each time."""
    own = comm.Get_attr(_key())
    if own is None:
        own = comm.Dup()
        comm.Set_attr(_key(), own)
    return own


def _told(error: BaseException) -> tuple[str, str]:
    # (As a text, a KeyError has quotes around its own.)
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return f"{type(error).__module__}.{type(error).__qualname__}", str(text)


def _again(kind: str, text: str) -> BaseException:
    """Return an exception of a class, or a RuntimeError where this rank does not know it."""
    module, _, name = kind.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if isinstance(found, type) and issubclass(found, BaseException):
        with contextlib.suppress(TypeError):  # it takes other arguments
            return found(text)
    return RuntimeError(f"{text} ({kind.removeprefix('builtins.')})")
