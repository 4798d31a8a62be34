"""One decision for all ranks, taken before anything is written."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI

from fastopt._memory import Array

# Those that programs have handlers for.
_SIGNALS = [
    getattr(signal, f"SIG{name}")
    for name in (
        "INT",
        "TERM",
        "ALRM",
        "HUP",
        "QUIT",
        "USR1",
        "USR2",
        "VTALRM",
        "PROF",
        "CHLD",
        "XCPU",
    )
    if hasattr(signal, f"SIG{name}")
]


class Signals:
    """Signals that came while something went on that they must not interrupt."""

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._came: list[tuple[int, Any]] = []

    def note(self, number: int, frame: Any) -> None:
        self._came.append((number, frame))

    def handle(self) -> None:
        """Call the handlers of those that have come; raise what the first of them raises."""
        first: BaseException | None = None
        while self._came:
            number, frame = self._came.pop(0)
            try:
                self._handlers[number](number, frame)
            except BaseException as error:
                first = first or error
        if first is not None:
            raise first

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold signals that code in Python handles, until they are asked for, or the end."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
        try:
            for number in self._handlers:
                signal.signal(number, self.note)
            yield
        finally:
            self._put_back()

    def _put_back(self) -> None:
        first: BaseException | None = None
        for number, handler in self._handlers.items():
            try:
                if signal.getsignal(number) == self.note:  # unless a handler has set another
                    signal.signal(number, handler)
            except BaseException as error:  # of one that is back, whose signal came
                first = first or error
        try:
            self.handle()
        finally:
            if first is not None:
                raise first


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

    def agree(self, error: BaseException | None, call: str, alike: Mapping[str, bytes]) -> None:
        """Raise, on all ranks, if one has an error, or if they do not do the same.

        Parameters
        ----------
        error : BaseException or None
            What this rank has to say.
        call : str
            What it is about to do.
        alike : dict
            What has to be the same on all ranks, by names.
        """
        own = np.empty(1 + 2 * _DIGEST_BYTES, np.uint8)
        own[0] = error is not None
        what = np.frombuffer(digest(b"".join([call.encode(), *alike.values()])), np.uint8)
        own[1 : 1 + _DIGEST_BYTES], own[1 + _DIGEST_BYTES :] = what, ~what
        every = self.union(own)
        if every[0]:
            self._raise_first(error)
        seen, unseen = np.split(every[1:], 2)
        if (seen & unseen).any():
            self._raise_unlike(call, alike)

    def union(self, bits: Array) -> Array:
        """Return the bits that are set on any rank."""
        every = np.empty_like(bits)
        self.comm.Allreduce(bits, every, MPI.BOR)
        return every

    def _raise_first(self, error: BaseException | None) -> NoReturn:
        """Raise, on all ranks, the error of the first rank that has one."""
        told = self.comm.allgather(None if error is None else _told(error))
        rank, (kind, text) = next((r, one) for r, one in enumerate(told) if one is not None)
        raise _again(kind, f"rank {rank}: {text}") from (error if rank == self.rank else None)

    def _raise_unlike(self, call: str, alike: Mapping[str, bytes]) -> NoReturn:
        every = self.comm.allgather((call, dict(alike)))
        first, values = every[0]
        for rank, (theirs, own) in enumerate(every):
            if theirs != first:
                raise RuntimeError(
                    f"rank {rank} calls {theirs}, and rank 0 calls {first}: all ranks have to call "
                    "the same, in the same order; nothing was changed"
                )
            for name in own:
                if own[name] != values.get(name):
                    raise ValueError(
                        f"rank {rank}: another {name} than on rank 0; nothing was changed"
                    )
        raise RuntimeError("the ranks differ, and do not know in what")

    def differ(self, digests: Sequence[bytes]) -> tuple[int, int] | None:
        """Return the first of some digests that is not the same everywhere, and a rank; or None."""
        every = self.comm.allgather(list(digests))
        for rank, theirs in enumerate(every):
            pairs = enumerate(zip(every[0], theirs, strict=False))
            for number in (k for k, (one, other) in pairs if one != other):
                return number, rank
        return None


_DIGEST_BYTES = 16


def digest(data: Any) -> bytes:
    """Return 16 bytes that differ where data differ."""
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


@functools.cache
def _key() -> int:
    def free(comm: Any, key: int, own: Any) -> None:
        if not MPI.Is_finalized():
            own.Free()

    return MPI.Comm.Create_keyval(delete_fn=free)  # type: ignore[no-any-return]


def _own(comm: Any) -> Any:
    """Return a communicator's copy for messages of ours; the same one each time."""
    own = comm.Get_attr(_key())
    if own is None:
        own = comm.Dup()
        comm.Set_attr(_key(), own)
    return own


def _told(error: BaseException) -> tuple[str, str]:
    # (As a text, a KeyError has quotes around its own.)
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    try:
        return kind, str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    except Exception:
        return kind, "(its text cannot be made)"


def _again(kind: str, text: str) -> BaseException:
    """Return an exception of a class, or a RuntimeError where this rank cannot make one."""
    module, _, name = kind.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if isinstance(found, type) and issubclass(found, BaseException):
        with contextlib.suppress(Exception):  # it takes other arguments
            return found(text)
    return RuntimeError(f"{text} ({kind.removeprefix('builtins.')})")
