"""thinc: ``NumpyOps.adam``, which is what its optimizer calls for each array."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from thinc.api import NumpyOps

from fastopt.bench.peers.base import Candidate
from fastopt.bench.workloads import BETAS, EPS, LR, Array, Rule


class Peer(Candidate):
    """Adam in float32; it consumes its gradient, so each step begins with a copy of it."""

    rules = ("adam",)
    dtypes = ("float32",)
    threading = "one"
    keras_rules = ("adam",)

    def __init__(
        self, rule: Rule, params: Sequence[Array], grads: Sequence[Array], threads: int
    ) -> None:
        self._ops, self._params, self._t = NumpyOps(), list(params), 0
        self._arrays = [
            tuple(a.reshape(-1) for a in (p, g, *np.zeros((3, p.size), p.dtype)))
            for p, g in zip(params, grads, strict=True)
        ]

    def step(self) -> None:
        """Do one step, an array after the other."""
        self._t += 1
        b1, b2 = BETAS
        rate = LR * math.sqrt(1 - b2**self._t) / (1 - b1**self._t)
        for param, grad, consumed, m, v in self._arrays:
            consumed[:] = grad
            self._ops.adam(param, consumed, m, v, b1, b2, EPS, rate)

    def result(self) -> list[Array]:
        """Return the parameters as they are now."""
        return self._params
