"""A step over arrays: fastopt's kernels, as Keras's update asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastopt import Rows, _core
from fastopt.reference import one_minus_power

Array = NDArray[Any]

_KERAS = 1  # the number of Keras's semantics in the C core


# From the learning rate, 1 - beta**step of each beta, and a square root, all of a backend's own
# numbers, to the learning rate with the bias corrected.
Correction = Callable[[Any, Any, Any, Callable[[Any], Any]], Any]

# From a correction if there is any, a group's hyperparameters, its type, the learning rate and the
# number of iterations so far to a step's hyperparameters: each of Keras's backends rounds in its
# own way.
Rates = Callable[[Correction | None, dict[str, float], type[Any], Any, Any], dict[str, float]]


class Unfit(NamedTuple):
    """Why the kernels cannot update a variable, and what would let them, if anything."""

    why: str
    cure: str


def unfit_dtype(name: str, fit: Sequence[str]) -> Unfit:
    return Unfit(
        f"its dtype is {name}",
        f"fastopt's kernels run for variables of {', '.join(fit[:-1])} and {fit[-1]}.",
    )


def arithmetic_of(dtype: Any) -> type[Any]:
    """Return the type that the kernels compute in for variables of a type, and rates with them.

    Keras computes Adam's correction in the variables' own. Then bfloat16 has 1 for 0.999, the
    correction is 0, and nothing moves.
    """
    return np.float64 if dtype == np.float64 else np.float32


UNLIKE = Unfit("its gradient has another shape", "")


def unfit_shape(shape: Sequence[int], gradients: Sequence[int | None]) -> Unfit:
    """Return why a gradient of another shape is not for the kernels.

    Nothing helps where it cannot be broadcast: Keras's error says so.
    """
    pairs = zip(reversed(shape), reversed(gradients), strict=False)
    if len(gradients) <= len(shape) and all(n in (1, None, size) for size, n in pairs):
        return UNLIKE._replace(
            cure="fastopt's kernels run with a gradient of the variable's shape."
        )
    return UNLIKE


class RefusedError(Exception):
    """The kernels cannot do a step, and have changed nothing."""


class Settings(NamedTuple):
    """What a step does, but for its arrays and what changes from step to step."""

    rule: _core.Rule
    hypers: tuple[tuple[str, float], ...]
    # Which there are for each variable: the rule's slots, a master, and each slot's scales.
    kept: tuple[tuple[bool, ...], ...]
    indices: tuple[int, ...]  # of the variables, by which Keras knows them
    decays: tuple[float, ...]  # their weight decay
    names: tuple[str, ...]
    by_rows: tuple[bool, ...]  # which of them only the rows of their gradient are updated of
    correction: Correction | None
    stochastic: bool
    seed: int


class Step:
    """A step over arrays, which it updates in place: all variables', then what each has beside."""

    def __init__(self, settings: Settings, arrays: Sequence[Array], rates: Rates) -> None:
        self._rule, self._rates, self._correction = settings.rule, rates, settings.correction
        n, n_slots = len(settings.names), len(self._rule.slots)
        rest = iter(arrays[n:])
        owned = [tuple(_seen(next(rest)) if k else None for k in row) for row in settings.kept]
        self._numbers = np.ones(n)  # Keras has one for all, but the core one for each
        types = (arithmetic_of(array.dtype) for array in arrays[:n])
        kinds = list(zip(settings.decays, types, strict=True))
        groups = list(dict.fromkeys(kinds))
        same = {**dict(settings.hypers), "decoupled_weight_decay": 1.0}
        self._groups = [({**same, "weight_decay": decay}, dtype) for decay, dtype in groups]
        self._counters = np.zeros(n, np.int64)
        try:
            self.plan = _core.Plan(
                self._rule,
                list(arrays[:n]),
                [
                    tuple(
                        self._numbers[i, ...] if slot in self._rule.numbers else own
                        for slot, own in zip(self._rule.slots, row, strict=False)
                    )
                    for i, row in enumerate(owned)
                ],
                None,
                [self._counters[i, ...] for i in range(n)],
                [groups.index(kind) for kind in kinds],
                [[0.0] * len(self._rule.hypers)] * len(groups),
                list(settings.names),
                semantics=_KERAS,
                clip=0,
                clip_limit=0.0,
                nonfinite=0,
                ema_decay=0.0,
                num_threads=0,
                completed_steps=0,
                beside=[row[n_slots:] for row in owned],
                stochastic=settings.stochastic,
                seed=settings.seed,
                indices=list(settings.indices),
            )
        except (TypeError, ValueError) as error:
            raise RefusedError(str(error)) from error

    def __call__(
        self, grads: Sequence[Array | Rows], learning_rate: Any, iterations: Any, number: Any = 1.0
    ) -> None:
        """Update everything, or raise RefusedError and change nothing.

        `number` is what the rule has of this kind, before the step; it is left to the caller.
        """
        for i, (group, dtype) in enumerate(self._groups):
            row = self._rates(self._correction, group, dtype, learning_rate, iterations)
            self.plan.set_hypers(i, [row.get(name, 0.0) for name in self._rule.hypers])
        self._counters.fill(iterations)
        self._numbers.fill(number)
        try:
            self.plan.step(grads, 1.0, False)
        except (TypeError, ValueError) as error:
            raise RefusedError(str(error)) from error


def _seen(array: Array) -> Array:
    """Return an array as plans take it: trailing bits are int16, since PyTorch has no uint16."""
    return array.view(np.uint16) if array.dtype == np.int16 else array


def with_rate(
    row: dict[str, float], rate: float, step: int, correction: Correction
) -> dict[str, float]:
    """Return hyperparameters with a corrected learning rate, for the same weight decay.

    Keras computes the correction in the type of the variables. What cancels in ``1 - beta**step``
    then makes the first steps of float32 wrong by up to 2e-5: more than enough for a training to
    part from one with Keras's own optimizer. So here it is no better.
    """
    if not np.isfinite(rate) or rate == 0:
        return row
    if "bias_correction" in row:
        row = {**row, "bias_correction": 0.0}
    else:  # the rule will correct
        left1, left2 = (one_minus_power(row[name], step) for name in ("beta1", "beta2"))
        rate /= correction(1.0, left1, left2, math.sqrt)
    decay = row["weight_decay"] * row["lr"] / rate  # which the learning rate multiplies again
    return {**row, "lr": rate, "weight_decay": decay}
