"""What every candidate can be asked."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

from fastopt.bench.workloads import DTYPES, Array, Rule


class Tolerance(NamedTuple):
    """How far a result may be from the reference's.

    `ulps` counts units in the last place of the parameter; `travel` is a share of the distance that
    it has travelled.
    """

    ulps: float
    travel: float


class Candidate(ABC):
    """An optimizer over arrays; each case makes a new one.

    Parameters
    ----------
    rule : Rule
        One that `refusal` has nothing against.
    params : list of ndarray
        The candidate's own, to update in place or to copy.
    grads : list of ndarray
        Shared with other candidates: who changes them makes copies, and fills these in `begin`.
    threads : int
        How many to use, where one can choose.
    """

    rules: ClassVar[tuple[str, ...]] = ("sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw")
    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    # "any" number of threads; always "one"; or the framework's "own" choice, fixed at its start.
    threading: ClassVar[Literal["any", "one", "own"]] = "any"
    # Of `workloads.STORAGES`, those it can be timed in beside fastopt's.
    storages: ClassVar[tuple[str, ...]] = ()
    # The rules in which eps stands where Keras has it.
    keras_rules: ClassVar[tuple[str, ...]] = ()
    # Of float32 and float64. Frameworks contract a*b+c, or divide by a reciprocal: a few roundings.
    tolerance: ClassVar[dict[str, Tolerance]] = {
        "float32": Tolerance(4, 2e-6),
        "float64": Tolerance(4, 4e-15),
    }

    # How far the norm of millions of float32 may be off, which clip-adam passes on to small steps.
    norm_error: ClassVar[float] = 0.0

    @abstractmethod
    def __init__(
        self, rule: Rule, params: Sequence[Array], grads: Sequence[Array], threads: int
    ) -> None: ...

    def begin(self) -> None:  # noqa: B027 (most have nothing to do)
        """Put back what others, or its own last steps, have changed; before a row of steps."""

    def reread(self) -> None:  # noqa: B027
        """Take over new values in `grads`; for those who hold copies of them."""

    @abstractmethod
    def step(self) -> None:
        """Do one step; its results are complete on return."""

    @abstractmethod
    def result(self) -> list[Array]:
        """Return the parameters as they are now."""

    def weights(self) -> list[Array]:
        """Return what is trained: the masters, if the parameters are these, rounded."""
        return self.result()

    def bytes_moved(self) -> int:
        """Return what a step has to read and write: the bytes of its arrays.

        Only who has `storages` is asked.
        """
        raise NotImplementedError

    @classmethod
    def refusal(cls, rule: Rule, dtype: str, threads: int) -> str | None:
        """Return why a case cannot be timed, None if it can."""
        if rule.name not in cls.rules:
            return f"has no {rule.name} to time here"
        if dtype not in cls.dtypes:
            return f"has no {dtype}"
        if cls.threading == "own" and threads != _cpus():
            return "chooses its threads itself, once a process"
        return None

    @classmethod
    def semantics(cls, rule: Rule) -> str:
        """Return whose formula a rule follows, as fastopt names it."""
        return "keras" if rule.name in cls.keras_rules else "torch"


def _cpus() -> int:
    """Return how many the process may use: the threads that frameworks choose themselves."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
