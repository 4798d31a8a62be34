"""No candidate is timed before its results are right."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from fastopt import reference
from fastopt.bench.peers import find
from fastopt.bench.peers.base import Tolerance
from fastopt.bench.workloads import RULES, Array

STEPS = 3
_CHUNK = 1 << 18  # elements that are compared at once
_SHAPES = ((4099,), (33, 7), (16,), (1,))


class WrongResultError(Exception):
    """A candidate's parameters are not the reference's."""


def agree(
    who: str,
    got: Sequence[Array],
    want: Sequence[Array],
    start: Sequence[Array],
    tolerance: Tolerance,
) -> None:
    """Raise an error unless parameters are where they should be.

    Parameters
    ----------
    who : str
        Named in the error.
    got, want, start : sequence of ndarray
        The candidate's parameters, the reference's, and those before the first step.
    tolerance : Tolerance
        How far `got` may be from `want`.

    Raises
    ------
    WrongResultError
        With the worst element of the first array that is wrong.
    """
    for index, arrays in enumerate(zip(got, want, start, strict=True)):
        if arrays[0].dtype != arrays[1].dtype or arrays[0].shape != arrays[1].shape:
            raise WrongResultError(f"{who}: array {index} has another shape or type")
        flat = [array.reshape(-1) for array in arrays]
        for first in range(0, flat[0].size, _CHUNK):
            g, w, s = (array[first : first + _CHUNK] for array in flat)
            ulp = np.spacing(np.maximum(abs(w), abs(s)))
            excess = abs(g - w) - (tolerance.ulps * ulp + tolerance.travel * abs(w - s))
            if not (excess <= 0).all():
                worst = int(np.where(np.isnan(excess), np.inf, excess).argmax())
                raise WrongResultError(
                    f"{who} is wrong: array {index}, element {first + worst} went from "
                    f"{s[worst]!r} to {g[worst]!r}, not to {w[worst]!r}"
                )


@cache
def check_formula(name: str, rule_name: str, dtype: str, threads: int) -> None:
    """Hold a candidate to ``fastopt.reference`` for a few steps on small arrays.

    The gradients span ten orders of magnitude, so that eps in another place shows, and change from
    step to step, so that the averages' decay does.

    Parameters
    ----------
    name, rule_name, dtype, threads
        What the candidate has nothing against.

    Raises
    ------
    WrongResultError
        If it is wrong.
    """
    rule, candidate = RULES[rule_name], find(name)
    assert not isinstance(candidate, str)
    rng = np.random.default_rng(1)
    params = [rng.standard_normal(shape).astype(dtype) for shape in _SHAPES]
    means = [rng.standard_normal(shape) * 10 ** rng.uniform(-9, 1, shape) for shape in _SHAPES]
    grads = [mean.astype(dtype) for mean in means]
    want = [param.copy() for param in params]
    states = [{slot: np.zeros_like(param) for slot in rule.slots} for param in params]
    subject = candidate(rule, [param.copy() for param in params], grads, threads)
    for step in range(1, STEPS + 1):
        for grad, mean in zip(grads, means, strict=True):
            grad[...] = mean * rng.uniform(0.5, 1.5, mean.shape)
        scale = 1.0
        if rule.clip_norm is not None:
            norm = reference.grad_norm(grads, want)
            scale = reference.clip_factor(norm, rule.clip_norm, of_all=True)
        for param, grad, state in zip(want, grads, states, strict=True):
            rule.formula(
                param,
                grad,
                state,
                step=step,
                grad_scale=scale,
                semantics=candidate.semantics(rule),
                **rule.options,
            )
        subject.reread()
        subject.begin()
        subject.step()
    who = f"{name} ({rule.name}, {dtype})"
    agree(who, subject.result(), want, params, candidate.tolerance[dtype])
