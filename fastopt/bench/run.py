"""One case: who takes part, what they did, and how that compares to the limit of memory."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastopt import _core
from fastopt.bench import check, peers
from fastopt.bench.measure import Interleaved
from fastopt.bench.peers.base import Candidate
from fastopt.bench.peers.fastopt import Peer as Fastopt
from fastopt.bench.workloads import Array, Rule, Workload

LIMIT = "limit"
ALWAYS = ("fastopt", LIMIT)  # in every batch
# The workloads of `fastopt bench`, and the seconds that the rounds of each may take.
SHORT = ("1e3", "1e4", "1e5", "1e6", "1e7", "mlp", "many")
SHORT_S = 4.0
ROUNDS = (5, 40)  # at least and at most
_MEMORY_SHARE = 0.8  # of what is available


@dataclass(frozen=True)
class Case:
    """A workload, the rule and type of its step, and the most threads that a step may use."""

    workload: Workload
    rule: Rule
    dtype: str
    threads: int

    @property
    def bytes_moved(self) -> int:
        """What a step has to read and write."""
        return self.rule.bytes_moved(self.workload.elements, self.dtype)


class Entry(NamedTuple):
    """Who takes turns, with how many threads."""

    name: str
    threads: int


@dataclass(frozen=True)
class Absent:
    """Who does not take part, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Row:
    """What was measured of a candidate in a case; times are microseconds a step."""

    name: str
    threads: int
    us: float
    us_quartiles: tuple[float, float]
    steps: int  # a turn
    turns: int
    GB_per_s: float
    to_limit: float  # how many times the median of the limit
    to_fastopt: float  # and of fastopt


@dataclass(frozen=True)
class Result:
    """All that is known of a case."""

    case: Case
    rows: tuple[Row, ...]
    absent: tuple[Absent, ...]

    @property
    def workload(self) -> Workload:
        """The case's."""
        return self.case.workload

    def best(self, name: str) -> Row | None:
        """Return a candidate's row with the number of threads that suits it better."""
        return min(
            (row for row in self.rows if row.name == name), key=lambda row: row.us, default=None
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        workload, rule = self.workload, self.case.rule
        return {
            "workload": workload.name,
            "arrays": len(workload.shapes),
            "elements": workload.elements,
            "rule": rule.name,
            "dtype": self.case.dtype,
            "threads": self.case.threads,
            "bytes_moved": self.case.bytes_moved,
            "rows": [asdict(row) for row in self.rows],
            "absent": [asdict(absent) for absent in self.absent],
        }


class Batch:
    """The candidates of a case that are in memory at the same time, fastopt among them."""

    def __init__(
        self, case: Case, interleaved: Interleaved[Entry], entries: Sequence[Entry]
    ) -> None:
        self.case, self.interleaved, self.entries = case, interleaved, entries

    def rows(self, with_own: bool = True) -> list[Row]:
        """Return what was measured, in the order of the entries.

        The limit of a case is the fastest of the limit loops, which use up to `case.threads`.
        Without its own, these are the peers' rows only, as of another batch of the same case.
        """
        timings = {entry: self.interleaved.timing(entry) for entry in self.entries}
        limits = [timing.median for entry, timing in timings.items() if entry.name == LIMIT]
        limit, own = min(limits), timings[self.fastopt].median
        return [
            Row(
                name=entry.name,
                threads=entry.threads,
                us=timing.median * 1e6,
                us_quartiles=(timing.quartiles[0] * 1e6, timing.quartiles[1] * 1e6),
                steps=timing.steps,
                turns=timing.turns,
                GB_per_s=self.case.bytes_moved / timing.median / 1e9,
                to_limit=timing.median / limit,
                to_fastopt=timing.median / own,
            )
            for entry, timing in timings.items()
            if with_own or entry.name not in ALWAYS
        ]

    @property
    def fastopt(self) -> Entry:
        """The entry that is fastopt with the case's threads."""
        return Entry("fastopt", self.case.threads)


def entries(
    case: Case, names: Sequence[str], threads: Sequence[int]
) -> tuple[list[Entry], list[Absent]]:
    """Say who takes part in a case and who does not.

    Parameters
    ----------
    case : Case
        What is to be timed.
    names : sequence of str
        Of `peers.NAMES`, without fastopt, which always takes part, as does the limit loop.
    threads : sequence of int
        With how many threads each peer that can choose takes part.

    Returns
    -------
    entries : list of Entry
        fastopt first, then the limit loops with 1, 2, 4, ... threads, then the peers.
    absent : list of Absent
        Who cannot, and why.
    """
    found = [Entry("fastopt", case.threads)]
    found += [Entry(LIMIT, count) for count in ladder(case.threads)]
    absent = []
    for name in names:
        peer = peers.find(name)
        if isinstance(peer, str):
            absent.append(Absent(name, peer))
            continue
        counts = [1] if peer.threading == "one" else threads
        why = {count: peer.refusal(case.rule, case.dtype, count) for count in counts}
        found += [Entry(name, count) for count in counts if why[count] is None]
        if None not in why.values():
            absent.append(Absent(name, str(why[counts[0]])))
    return found, absent


def batches(case: Case, taking_part: Sequence[Entry]) -> Iterator[Batch]:
    """Build and check the candidates of a case, as many at once as memory holds.

    Parameters
    ----------
    case : Case
        What is to be timed.
    taking_part : sequence of Entry
        From :func:`entries`.

    Yields
    ------
    Batch
        Each has fastopt and the limit loops, and some of the peers. It can take turns until the
        next one.

    Raises
    ------
    WrongResultError
        If a candidate is wrong.
    MemoryError
        If not even one peer fits beside fastopt.
    """
    always = [entry for entry in taking_part if entry.name in ALWAYS]
    others = [entry for entry in taking_part if entry not in always]
    room = _room(case) - 1  # fastopt, whose arrays the limit loops share
    if room < min(1, len(others)):
        raise MemoryError(f"{case.workload.name} in {case.dtype} needs more memory than there is")
    for first in range(0, max(1, len(others)), max(1, room)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # frameworks' own, while they compile
            batch = _batch(case, always + others[first : first + room])
        yield batch
        batch.interleaved.drop()
        gc.collect()  # some candidates are parts of cycles


def _batch(case: Case, taking_part: Sequence[Entry]) -> Batch:
    params, grads = case.workload.arrays(case.dtype)
    wanted: dict[str, list[Array]] = {}
    subjects: dict[Entry, Any] = {}
    for entry in taking_part:
        if entry.name == LIMIT:
            continue
        candidate = peers.find(entry.name)
        assert not isinstance(candidate, str)
        check.check_formula(entry.name, case.rule.name, case.dtype, entry.threads)
        own = [param.copy() for param in params]
        subject = candidate(case.rule, own, grads, entry.threads)
        del own
        checked_steps(subject)
        semantics = candidate.semantics(case.rule)
        if semantics not in wanted:
            wanted[semantics] = [param.copy() for param in params]
            checked_steps(Fastopt(case.rule, wanted[semantics], grads, 1, semantics))
        who = f"{entry.name} ({case.rule.name}, {case.dtype}, {case.workload.name})"
        tolerance = candidate.tolerance[case.dtype]
        if case.rule.clip_norm is not None and case.dtype == "float32":
            tolerance = tolerance._replace(travel=tolerance.travel + candidate.norm_error)
        check.agree(who, subject.result(), wanted[semantics], params, tolerance)
        subjects[entry] = subject
    step = subjects[Entry("fastopt", case.threads)]
    for entry in taking_part:
        if entry.name == LIMIT:
            subjects[entry] = LimitLoop(step.limit(entry.threads))
    return Batch(case, Interleaved(subjects), list(taking_part))


class LimitLoop:
    """Moves the bytes of a step and computes nothing."""

    def __init__(self, limit: _core.Limit) -> None:
        self.step = limit.run

    def begin(self) -> None:
        """Do nothing: the arrays are and stay as the step left them."""


def time_case(case: Case, names: Sequence[str], threads: Sequence[int], seconds: float) -> Result:
    """Time a case.

    Parameters
    ----------
    case, names, threads
        As for :func:`entries`.
    seconds : float
        About how long the rounds of a batch may take; there are 5 at least.

    Returns
    -------
    Result
        Its ratios compare what was timed in the same batch.
    """
    taking_part, absent = entries(case, names, threads)
    rows: list[Row] = []
    for batch in batches(case, taking_part):
        for _ in range(batch.interleaved.rounds(seconds, *ROUNDS)):
            batch.interleaved.round()
        rows += batch.rows(with_own=not rows)
    return Result(case, tuple(rows), tuple(absent))


def checked_steps(subject: Candidate) -> None:
    """Do the steps after which results are compared."""
    for _ in range(check.STEPS):
        subject.begin()
        subject.step()


def ladder(threads: int) -> list[int]:
    """Return 1, 2, 4, ... and the number itself."""
    return sorted({1 << bit for bit in range(threads.bit_length())} | {threads})


def free_memory() -> float:
    """Return how many bytes candidates may take."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return math.inf  # not Linux: hope
    return _MEMORY_SHARE * next(
        int(line.split()[1]) * 1024
        for line in meminfo.splitlines()
        if line.startswith("MemAvailable")
    )


def _room(case: Case) -> int:
    """Return how many candidates of a case fit into memory beside what they share."""
    arrays = case.workload.elements * np.dtype(case.dtype).itemsize
    shared = 4 * arrays  # parameters, gradients, and the right results under either semantics
    each = (3 + len(case.rule.slots)) * arrays  # slots, parameters, and two to work in
    return int(min((free_memory() - shared) / each, 100))
