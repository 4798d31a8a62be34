"""numba: one fused loop an array, serial for one thread and ``parallel=True`` for more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import prange

from fastopt.bench.peers.base import Candidate
from fastopt.bench.workloads import ALPHA, BETAS, DECAY, EPS, LR, MOMENTUM, Array, Rule


class Peer(Candidate):
    """A compiled function for each rule, called for each array."""

    def __init__(
        self, rule: Rule, params: Sequence[Array], grads: Sequence[Array], threads: int
    ) -> None:
        self._params, self._threads, self._t = list(params), threads, 0
        self._type = params[0].dtype.type
        self._constants: Callable[..., Sequence[float]] = _CONSTANTS[rule.name]
        self._update = _compiled(rule.name, threads > 1)
        self._arrays = [
            tuple(a.reshape(-1) for a in (p, g, *(np.zeros_like(p) for _ in rule.slots)))
            for p, g in zip(params, grads, strict=True)
        ]

    def begin(self) -> None:
        """Set the number of threads."""
        numba.set_num_threads(min(self._threads, numba.config.NUMBA_NUM_THREADS))

    def step(self) -> None:
        """Do one step, an array after the other."""
        self._t += 1
        constants = [self._type(value) for value in self._constants(self._t)]
        for arrays in self._arrays:
            self._update(*arrays, *constants)

    def result(self) -> list[Array]:
        """Return the parameters as they are now."""
        return self._params


@cache
def _compiled(rule: str, parallel: bool) -> Any:
    # Python's division raises for zero, which keeps a loop from being vectorised; NumPy's does not.
    return numba.njit(_LOOPS[rule], parallel=parallel, error_model="numpy")


def _sgd(p: Array, g: Array, lr: float) -> None:
    for i in prange(p.size):
        p[i] -= lr * g[i]


def _momentum(p: Array, g: Array, b: Array, lr: float, mu: float) -> None:
    for i in prange(p.size):
        b[i] = mu * b[i] + g[i]
        p[i] -= lr * b[i]


def _adagrad(p: Array, g: Array, s: Array, lr: float, eps: float) -> None:
    for i in prange(p.size):
        s[i] += g[i] * g[i]
        p[i] -= lr * g[i] / (np.sqrt(s[i]) + eps)


def _rmsprop(p: Array, g: Array, v: Array, lr: float, eps: float, a: float, rest: float) -> None:
    for i in prange(p.size):
        v[i] = a * v[i] + rest * (g[i] * g[i])
        p[i] -= lr * g[i] / (np.sqrt(v[i]) + eps)


def _adam(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    lr: float,
    eps: float,
    b1: float,
    rest1: float,
    b2: float,
    rest2: float,
    keep: float,
) -> None:
    for i in prange(p.size):
        m[i] = b1 * m[i] + rest1 * g[i]
        v[i] = b2 * v[i] + rest2 * (g[i] * g[i])
        p[i] = keep * p[i] - lr * m[i] / (np.sqrt(v[i]) + eps)


def _adam_constants(t: int, decay: float = 0.0) -> Sequence[float]:
    b1, b2 = BETAS
    root = math.sqrt(1 - b2**t)
    return LR * root / (1 - b1**t), EPS * root, b1, 1 - b1, b2, 1 - b2, 1 - LR * decay


_LOOPS: dict[str, Callable[..., None]] = {
    "sgd": _sgd,
    "momentum": _momentum,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "adam": _adam,
    "adamw": _adam,
}
_CONSTANTS: dict[str, Callable[[int], Sequence[float]]] = {
    "sgd": lambda t: (LR,),
    "momentum": lambda t: (LR, MOMENTUM),
    "adagrad": lambda t: (LR, EPS),
    "rmsprop": lambda t: (LR, EPS, ALPHA, 1 - ALPHA),
    "adam": _adam_constants,
    "adamw": lambda t: _adam_constants(t, DECAY),
}
