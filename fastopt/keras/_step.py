"""A step over arrays: fastopt's kernels, as Keras's update asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastopt import _core

Array = NDArray[Any]

DTYPES = ("float32", "float64")
_KERAS = 1  # the number of Keras's semantics in the C core


class Settings(NamedTuple):
    """What a step does, but for its arrays and what changes from step to step."""

    rule: _core.Rule
    hypers: tuple[tuple[str, float], ...]
    kept: tuple[bool, ...]  # which of the rule's slots there are
    indices: tuple[int, ...]  # of the variables, by which Keras knows them
    decays: tuple[float, ...]  # their weight decay
    names: tuple[str, ...]


class Step:
    """A step over arrays, which it updates in place: each variable's, followed by its slots."""

    def __init__(self, settings: Settings, arrays: Sequence[Array]) -> None:
        self._rule = settings.rule
        n, each = len(settings.names), 1 + sum(settings.kept)
        slots = [iter(arrays[i * each + 1 : (i + 1) * each]) for i in range(n)]
        decays = sorted(set(settings.decays))
        same = {**dict(settings.hypers), "decoupled_weight_decay": 1.0}
        self._groups = [{**same, "weight_decay": decay} for decay in decays]
        self._counters = np.zeros(n, np.int64)
        self._plan = _core.Plan(
            self._rule,
            list(arrays[::each]),
            [tuple(next(own) if kept else None for kept in settings.kept) for own in slots],
            None,
            [self._counters[i : i + 1].reshape(()) for i in range(n)],
            [decays.index(decay) for decay in settings.decays],
            [self._row(group, 0.0) for group in self._groups],
            list(settings.names),
            semantics=_KERAS,
            clip=0,
            clip_limit=0.0,
            nonfinite=0,
            ema_decay=0.0,
            num_threads=0,
            completed_steps=0,
        )

    def _row(self, group: dict[str, float], learning_rate: float) -> list[float]:
        return [{**group, "lr": learning_rate}.get(name, 0.0) for name in self._rule.hypers]

    def __call__(self, grads: Sequence[Array], learning_rate: Any, iterations: Any) -> None:
        """Update everything, or raise and change nothing."""
        for number, group in enumerate(self._groups):
            self._plan.set_hypers(number, self._row(group, float(learning_rate)))
        self._counters.fill(iterations)
        self._plan.step(grads, 1.0, False)
