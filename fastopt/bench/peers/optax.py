"""optax: update and ``apply_updates`` in one ``jax.jit``, whose buffers are donated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from fastopt.bench.peers.base import Candidate, Tolerance
from fastopt.bench.workloads import ALPHA, BETAS, DECAY, EPS, LR, MOMENTUM, Array, Rule


def _transform(rule: Rule) -> Any:
    if rule.clip_norm is not None:
        clip = optax.clip_by_global_norm(rule.clip_norm)
        return optax.chain(clip, optax.adam(LR, *BETAS, eps=EPS))
    return {
        "sgd": lambda: optax.sgd(LR),
        "momentum": lambda: optax.sgd(LR, MOMENTUM),
        "adagrad": lambda: optax.adagrad(LR, initial_accumulator_value=0.0, eps=EPS),
        "rmsprop": lambda: optax.rmsprop(LR, ALPHA, eps=EPS),
        "adam": lambda: optax.adam(LR, *BETAS, eps=EPS),
        "adamw": lambda: optax.adamw(LR, *BETAS, eps=EPS, weight_decay=DECAY),
    }[rule.name]()


class Peer(Candidate):
    """A jitted update; each step waits for its result.

    Clip-adam has no gradients to zero: JAX makes new ones in each step.
    """

    rules = (*Candidate.rules, "clip-adam")
    threading = "own"
    keras_rules = ("adagrad", "rmsprop")
    # In float32, powers of the betas are approximate; AdamW adds the decay to the update first;
    # clip-adam clips by c / norm, not by c / (norm + 1e-6).
    tolerance = {"float32": Tolerance(4, 2e-5), "float64": Tolerance(4, 5e-8)}  # noqa: RUF012

    def __init__(
        self, rule: Rule, params: Sequence[Array], grads: Sequence[Array], threads: int
    ) -> None:
        self._x64 = params[0].dtype == np.float64
        self.begin()
        transform = _transform(rule)
        self._params = [jax.numpy.array(p) for p in params]
        self._given = grads
        self.reread()
        self._state = transform.init(self._params)

        def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = transform.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self._update = jax.jit(update, donate_argnums=(0, 1))

    def begin(self) -> None:
        """Choose the width of JAX's numbers, which is one for the process."""
        jax.config.update("jax_enable_x64", self._x64)

    def reread(self) -> None:
        """Copy the gradients."""
        self._grads = [jax.numpy.array(g) for g in self._given]

    def step(self) -> None:
        """Do one step."""
        self._params, self._state = self._update(self._params, self._state, self._grads)
        jax.block_until_ready(self._params)

    def result(self) -> list[Array]:
        """Return the parameters as they are now."""
        return [np.asarray(param) for param in self._params]
