"""NumPy as one writes it for speed: every operation with ``out=``, two arrays to work in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastopt.bench.peers.base import Candidate, Tolerance
from fastopt.bench.workloads import ALPHA, BETAS, DECAY, EPS, LR, MOMENTUM, Array, Rule


class Peer(Candidate):
    """The rules of ``fastopt.reference`` without temporary arrays, and bit for bit equal."""

    threading = "one"
    tolerance = dict.fromkeys(Candidate.dtypes, Tolerance(0, 0))

    def __init__(
        self, rule: Rule, params: Sequence[Array], grads: Sequence[Array], threads: int
    ) -> None:
        self._params, self._t = list(params), 0
        self._update = getattr(self, f"_{rule.name}")
        largest = max(param.size for param in params)
        upper, lower = np.empty((2, largest), params[0].dtype)
        self._arrays = [
            (
                param,
                grad,
                upper[: param.size].reshape(param.shape),
                lower[: param.size].reshape(param.shape),
                *(np.zeros_like(param) for _ in rule.slots),
            )
            for param, grad in zip(params, grads, strict=True)
        ]

    def step(self) -> None:
        """Do one step, an array after the other."""
        self._t += 1
        for arrays in self._arrays:
            self._update(*arrays)

    def result(self) -> list[Array]:
        """Return the parameters as they are now."""
        return self._params

    def _sgd(self, p: Array, g: Array, upper: Array, lower: Array) -> None:
        np.multiply(g, LR, out=upper)
        np.subtract(p, upper, out=p)

    def _momentum(self, p: Array, g: Array, upper: Array, lower: Array, b: Array) -> None:
        np.multiply(b, MOMENTUM, out=b)
        np.add(b, g, out=b)
        np.multiply(b, LR, out=upper)
        np.subtract(p, upper, out=p)

    def _adagrad(self, p: Array, g: Array, upper: Array, lower: Array, s: Array) -> None:
        np.multiply(g, g, out=upper)
        np.add(s, upper, out=s)
        _subtract(p, LR, g, s, EPS, upper, lower)

    def _rmsprop(self, p: Array, g: Array, upper: Array, lower: Array, v: Array) -> None:
        np.multiply(g, g, out=upper)
        _average(v, upper, ALPHA, upper)
        _subtract(p, LR, g, v, EPS, upper, lower)

    def _adam(self, p: Array, g: Array, upper: Array, lower: Array, m: Array, v: Array) -> None:
        c1, root = 1 - BETAS[0] ** self._t, math.sqrt(1 - BETAS[1] ** self._t)
        _average(m, g, BETAS[0], upper)
        np.multiply(g, g, out=upper)
        _average(v, upper, BETAS[1], upper)
        _subtract(p, LR * root / c1, m, v, EPS * root, upper, lower)

    def _adamw(self, p: Array, g: Array, upper: Array, lower: Array, m: Array, v: Array) -> None:
        np.multiply(p, 1 - LR * DECAY, out=p)
        self._adam(p, g, upper, lower, m, v)


def _average(slot: Array, value: Array, decay: float, upper: Array) -> None:
    """``slot = decay * slot + (1 - decay) * value``, where value may be upper."""
    np.multiply(slot, decay, out=slot)
    np.multiply(value, 1 - decay, out=upper)
    np.add(slot, upper, out=slot)


def _subtract(
    p: Array, rate: float, numerator: Array, root_of: Array, eps: float, upper: Array, lower: Array
) -> None:
    """``p -= rate * numerator / (sqrt(root_of) + eps)``."""
    np.multiply(numerator, rate, out=upper)
    np.sqrt(root_of, out=lower)
    np.add(lower, eps, out=lower)
    np.divide(upper, lower, out=upper)
    np.subtract(p, upper, out=p)
