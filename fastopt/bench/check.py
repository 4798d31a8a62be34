"""No candidate is timed before its results are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from fastopt import reference
from fastopt.bench.peers import find
from fastopt.bench.peers.base import Tolerance
from fastopt.bench.workloads import RULES, STORAGES, Array
from fastopt.reference import Stored, stored_step

STEPS = 3
_CHUNK = 1 << 18  # elements that are compared at once
_SHAPES = ((4099,), (33, 7), (16,), (1,))
TRAVEL_TOLERANCE = 0.25  # noise of 8 bits makes steps some percent too large
_WEIGHTS = 4096  # below which some peers store float32
_PHASES = ((1.0, 200), (0.01, 1800))  # the size of the gradients, and steps


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
    states = [rule.state(param) for param in params]
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


# ---- what is stored in fewer bits ----------------------------------------------------------------


@cache
def check_stored(rule_name: str, storage_name: str, threads: int) -> None:
    """Hold fastopt to ``fastopt.reference.stored_step``, bit for bit, for a few steps.

    Parameters
    ----------
    rule_name, storage_name : str
        Of `RULES` and `STORAGES`.
    threads : int
        How many a step may use.

    Raises
    ------
    WrongResultError
        If a bit of a parameter, its master or its state differs.
    """
    rule, storage = RULES[rule_name], STORAGES[storage_name]
    rng = np.random.default_rng(1)
    params = [rng.standard_normal(shape).astype(storage.dtype) for shape in _SHAPES]
    means = [rng.standard_normal(shape) * 10 ** rng.uniform(-4, 1, shape) for shape in _SHAPES]
    grads = [np.empty(shape, storage.dtype) for shape in _SHAPES]
    want = [
        {
            "param": Stored.of(storage.param, _flat(param)),
            **{
                slot: Stored.of(storage.slot(slot), np.zeros(param.size, np.float32))
                for slot in rule.slots
            },
            **{name: Stored("float64", np.array(start)) for name, start in rule.numbers.items()},
        }
        for param in params
    ]
    candidate: Any = find("fastopt")
    subject = candidate(storage.of(rule), params, grads, threads)
    for step in range(1, STEPS + 1):
        for index, (grad, mean) in enumerate(zip(grads, means, strict=True)):
            grad[...] = mean * rng.uniform(0.5, 1.5, mean.shape)
            want[index] = stored_step(
                rule.formula, want[index], _flat(grad), step=step, index=index, **rule.options
            )
        subject.step()
    for index, state in enumerate(subject.opt.decoded_state()):
        flat = params[index].reshape(-1)
        codes = want[index]["param"].codes
        pairs = {"the parameter": (flat.view(codes.dtype), codes)}
        for name, stored in want[index].items():
            got = state.get("master", flat) if name == "param" else state[name]
            pairs[name] = (
                _flat(got),
                _flat(stored.codes if name in rule.numbers else stored.values()),
            )
        for name, (bits, right) in pairs.items():
            if bits.tobytes() != right.tobytes():
                raise WrongResultError(
                    f"fastopt ({rule_name}, {storage_name}) is wrong: {name} of array {index} is "
                    f"{bits!r}, not {right!r}"
                )


def _flat(array: Array) -> Array:
    return np.asarray(array, np.float32).reshape(-1)


@dataclass(frozen=True)
class Travel:
    """How far weights of 1 went under constant gradients, over how far they go in float64.

    Means over many elements: each is right with any rounding that is right on average.
    """

    first: float  # 200 steps of gradients of about 1
    then: float  # 1800 steps of gradients of about 0.01
    still: float  # how far the farthest element went that should not have moved

    @property
    def fault(self) -> str | None:
        """What is wrong, None if nothing is."""
        faults = []
        if not all(abs(share - 1) <= TRAVEL_TOLERANCE for share in (self.first, self.then)):
            faults.append(f"weights went {self.first:.2f} and {self.then:.2f} of their way")
        if self.still > 0:
            faults.append(f"weights without gradient moved by {self.still:.1g}")
        return "; ".join(faults) or None


@cache
def travel(name: str, rule_name: str, storage_name: str, threads: int) -> Travel:
    """Train 4096 weights, and compare how far they go with the same rule in float64.

    Parameters
    ----------
    name, rule_name, storage_name : str
        Of the candidate, of `RULES` and of the candidate's `storages`.
    threads : int
        How many a step may use.
    """
    rule, storage = RULES[rule_name], STORAGES[storage_name]
    candidate: Any = find(name)
    dtype = storage.dtype
    rng = np.random.default_rng(2)
    sizes = rng.uniform(0.5, 1.5, _WEIGHTS) * rng.choice([-1, 1], _WEIGHTS)
    sizes[rng.permutation(_WEIGHTS)[: _WEIGHTS // 4]] = 0
    grad = sizes.astype(dtype)
    subject = candidate(storage.of(rule), [np.ones(_WEIGHTS, dtype)], [grad], threads)
    exact = np.ones(_WEIGHTS)
    state = rule.state(exact)
    shares, step = [], 0
    subject.begin()
    at, exact_at = np.ones(_WEIGHTS), exact.copy()
    for size, steps in _PHASES:
        grad[...] = sizes * size
        subject.reread()
        for _ in range(steps):
            step += 1
            rule.formula(exact, grad.astype(np.float64), state, step=step, **rule.options)
            subject.step()
        now = subject.weights()[0].astype(np.float64)
        way = exact - exact_at
        shares.append(float(((now - at) * np.sign(way)).sum() / abs(way).sum()))
        at, exact_at = now, exact.copy()
    resting = exact == 1
    first, then = shares
    return Travel(first, then, float(abs(at - 1)[resting].max(initial=0)))
