"""Steps over what is stored in fewer bits, for ``fastopt bench --storage``: bytes, and their time.

Everybody takes turns with fastopt in float32 and with the limit loop over its arrays. ``check``
first finds out whether their numbers are right: fastopt's to the bit; a peer's may be wrong, which
its row then says.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from fastopt.bench import check, peers
from fastopt.bench.measure import Interleaved
from fastopt.bench.run import LIMIT, ROUNDS, Absent, LimitLoop, checked_steps, free_memory, ladder
from fastopt.bench.workloads import STORAGES, Array, Rule, Workload

WORKLOADS = ("1e5", "1e7")  # in cache, and beyond
SECONDS = 15.0  # that the rounds of each may take
SETTLE_S = 0.03
OWN = "fastopt"
_PLAIN = "float32"
_EACH = 24  # bytes an element that a candidate takes at most, and what all share
_SHARED = 16


class Entry(NamedTuple):
    """Who takes turns, in which storage, with up to how many threads."""

    name: str
    storage: str
    threads: int


@dataclass(frozen=True)
class Row:
    """What was measured of a candidate; times are microseconds a step."""

    name: str
    storage: str
    threads: int
    us: float
    us_quartiles: tuple[float, float]
    steps: int  # a turn
    turns: int
    bytes_an_element: float  # read and written, counted from the arrays
    GB_per_s: float
    to_float32: float  # how many times the median of fastopt in float32
    to_limit: float  # and of moving as many bytes at the rate of the limit
    travel: tuple[float, float] | None  # of weights, over what is exact: see check.Travel
    fault: str | None  # what is wrong with the numbers


@dataclass(frozen=True)
class Result:
    """All that is known of a workload; fastopt in float32 and the limit are the first rows."""

    workload: Workload
    rule: Rule
    threads: int
    rows: tuple[Row, ...]
    absent: tuple[Absent, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {
            "workload": self.workload.name,
            "arrays": len(self.workload.shapes),
            "elements": self.workload.elements,
            "rule": self.rule.name,
            "threads": self.threads,
            "rows": [asdict(row) for row in self.rows],
            "absent": [asdict(absent) for absent in self.absent],
        }


def entries(rule: Rule, threads: int) -> tuple[list[Entry], list[Absent]]:
    """Say who takes part, fastopt in float32 first, and who does not."""
    found, absent = [], []
    for name in peers.STORAGE_NAMES:
        peer = peers.find(name)
        why = peer if isinstance(peer, str) else peer.refusal(rule, _PLAIN, threads)
        if isinstance(peer, str) or why is not None:
            absent.append(Absent(name, str(why)))
        else:
            found += [Entry(name, s, threads) for s in _distinct(rule, peer.storages)]
    return found, absent


def _distinct(rule: Rule, names: Iterable[str]) -> list[str]:
    """Leave out storages that differ from an earlier one in state alone, if the rule has none."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(name if rule.slots else STORAGES[name].param, name)
    return list(first.values())


def time_workload(workload: Workload, rule: Rule, threads: int, seconds: float) -> Result:
    """Check everybody, and time them.

    Parameters
    ----------
    workload : Workload
        What a step updates.
    rule : Rule
        Any but one that clips.
    threads : int
        How many each may use.
    seconds : float
        About how long the rounds of a batch may take; there are 5 at least.

    Returns
    -------
    Result
        Its ratios compare what was timed in the same batch: as many candidates as memory holds,
        fastopt in float32 and the limit among them.

    Raises
    ------
    WrongResultError
        If fastopt is wrong.
    MemoryError
        If not even one candidate fits beside fastopt.
    """
    taking_part, absent = entries(rule, threads)
    own, *others = taking_part
    room = int(min(free_memory() / workload.elements - _SHARED, 1e6) / _EACH) - 1
    if room < 1:
        raise MemoryError(f"{workload.name} needs more memory than there is")
    rows: list[Row] = []
    for first in range(0, len(others), room):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # frameworks' own, while they compile
            batch = _batch(workload, rule, [own, *others[first : first + room]], seconds)
        rows += batch[2:] if rows else batch
        gc.collect()  # some candidates are parts of cycles
    return Result(workload, rule, threads, tuple(rows), tuple(absent))


def _batch(workload: Workload, rule: Rule, taking_part: list[Entry], seconds: float) -> list[Row]:
    arrays: dict[Any, tuple[list[Array], list[Array]]] = {}
    found = {entry: _checked(rule, entry) for entry in taking_part}
    subjects: dict[Entry, Any] = {}
    for entry in taking_part:
        storage, candidate = STORAGES[entry.storage], peers.find(entry.name)
        assert not isinstance(candidate, str)
        if storage.dtype not in arrays:
            arrays[storage.dtype] = workload.arrays(storage.dtype)
        params, grads = arrays[storage.dtype]
        own = [param.copy() for param in params]
        subject = candidate(storage.of(rule), own, grads, entry.threads)
        del own
        checked_steps(subject)
        subjects[entry] = subject
    plain = taking_part[0]
    moved = {entry: subject.bytes_moved() for entry, subject in subjects.items()}
    limits = [Entry(LIMIT, _PLAIN, count) for count in ladder(plain.threads)]
    for entry in limits:
        subjects[entry] = LimitLoop(subjects[plain].limit(entry.threads))
        moved[entry] = moved[plain]
    interleaved = Interleaved(subjects, SETTLE_S)
    subjects.clear()
    for _ in range(interleaved.rounds(seconds, *ROUNDS)):
        interleaved.round()
    interleaved.drop()
    timings = {entry: interleaved.timing(entry) for entry in moved}
    limit = min(limits, key=lambda entry: timings[entry].median)
    rows = []
    for entry in (plain, limit, *taking_part[1:]):
        timing, elements = timings[entry], workload.elements
        same_bytes = timings[limit].median * moved[entry] / moved[limit]
        rows.append(
            Row(
                *entry,
                us=timing.median * 1e6,
                us_quartiles=(timing.quartiles[0] * 1e6, timing.quartiles[1] * 1e6),
                steps=timing.steps,
                turns=timing.turns,
                bytes_an_element=moved[entry] / elements,
                GB_per_s=moved[entry] / timing.median / 1e9,
                to_float32=timing.median / timings[plain].median,
                to_limit=timing.median / same_bytes,
                travel=None if entry is limit else (found[entry].first, found[entry].then),
                fault=None if entry is limit else found[entry].fault,
            )
        )
    return rows


def _checked(rule: Rule, entry: Entry) -> check.Travel:
    """Return how far a candidate's weights travel; raise an error if fastopt's bits are wrong."""
    if entry.name == OWN:
        check.check_stored(rule.name, entry.storage, entry.threads)
    return check.travel(entry.name, rule.name, entry.storage, entry.threads)
