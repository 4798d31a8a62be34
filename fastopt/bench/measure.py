"""Candidates take turns in one process, so that whatever the machine does meanwhile hits all alike.

A turn is: settle, which is to sleep until no other library's threads still spin; warm up, for the
caches and for the candidate's own threads; and a timed row of steps.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, Protocol, TypeVar

SETTLE_S = 0.01
WARM_S = 0.002
ROW_S = 0.003  # a row of steps lasts at least as long, or is one step

Key = TypeVar("Key", bound=Hashable)


class Subject(Protocol):
    """What can be timed."""

    def begin(self) -> None:
        """Get ready for a row of steps."""

    def step(self) -> object:
        """Do one step."""


@dataclass(frozen=True)
class Timing:
    """Seconds a step, of several turns."""

    steps: int  # a turn
    turns: int
    best: float
    median: float
    quartiles: tuple[float, float]


class Interleaved(Generic[Key]):
    """Subjects that take turns.

    Parameters
    ----------
    subjects : mapping
        They have done some steps already: what is slow only once is over.
    settle_s : float, optional
        How long to sleep before each turn; `SETTLE_S` by default.
    """

    def __init__(self, subjects: Mapping[Key, Subject], settle_s: float | None = None) -> None:
        self._subjects = dict(subjects)
        self._settle_s = SETTLE_S if settle_s is None else settle_s
        self._seconds: dict[Key, list[float]] = {key: [] for key in subjects}
        self._rounds = 0
        self._steps: dict[Key, int] = {}
        self.round_s = 0.0  # about how long a round takes
        with _undisturbed():
            for key, subject in self._subjects.items():
                self._steps[key], row_s = _row_length(subject)
                self.round_s += self._settle_s + max(WARM_S, row_s / self._steps[key]) + row_s

    def steps(self, key: Key) -> int:
        """Return the number of timed steps in a subject's turn."""
        return self._steps[key]

    def ready(self, key: Key) -> None:
        """Settle, and warm a subject up."""
        subject = self._subjects[key]
        time.sleep(self._settle_s)
        subject.begin()
        end = perf_counter() + WARM_S
        subject.step()
        while perf_counter() < end:
            subject.step()

    def row(self, key: Key) -> float:
        """Do a subject's steps, and note and return the seconds they took."""
        seconds = _row(self._subjects[key], self._steps[key])
        self._seconds[key].append(seconds / self._steps[key])
        return seconds

    def round(self, without: Collection[Key] = ()) -> None:
        """Give every subject a turn, each time beginning with another one."""
        keys = list(self._subjects)
        first = self._rounds % len(keys)
        self._rounds += 1
        with _undisturbed():
            for key in keys[first:] + keys[:first]:
                if key not in without:
                    self.ready(key)
                    self.row(key)

    def drop(self) -> None:
        """Let go of the subjects; what was measured stays."""
        self._subjects.clear()

    def rounds(self, seconds: float, least: int, most: int) -> int:
        """Return how many rounds fit into a time, within bounds."""
        return max(least, min(most, int(seconds / self.round_s)))

    def timing(self, key: Key) -> Timing:
        """Return what was measured of a subject."""
        seconds = self._seconds[key]
        low, median, high = (
            statistics.quantiles(seconds, n=4, method="inclusive")
            if len(seconds) > 1
            else seconds * 3
        )
        return Timing(self._steps[key], len(seconds), min(seconds), median, (low, high))


def _row(subject: Subject, steps: int) -> float:
    step = subject.step
    begin = perf_counter()
    for _ in range(steps):
        step()
    return perf_counter() - begin


def _row_length(subject: Subject) -> tuple[int, float]:
    """Return how many steps make a row, and how long it takes."""
    steps = 1
    while True:
        subject.begin()
        seconds = min(_row(subject, steps) for _ in range(2))
        if seconds >= ROW_S:
            return steps, seconds
        steps *= 2


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Collect no garbage meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
