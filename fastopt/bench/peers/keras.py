"""Keras on TensorFlow: ``optimizer.apply`` in a ``tf.function``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastopt.bench.peers.base import Candidate, Tolerance
from fastopt.bench.workloads import ALPHA, BETAS, DECAY, EPS, LR, MOMENTUM, Array, Rule


@contextlib.contextmanager
def _no_greetings() -> Iterator[None]:
    """Discard what TensorFlow's C++ writes to standard error, whatever its log level is."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


os.environ.setdefault("KERAS_BACKEND", "tensorflow")
with _no_greetings():
    import keras
    import tensorflow as tf
tf.get_logger().setLevel("ERROR")  # each case traces its own function, which it warns of

_BETAS = dict(zip(("beta_1", "beta_2"), BETAS, strict=True))
_OPTIMIZERS: dict[str, tuple[str, dict[str, float]]] = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": MOMENTUM}),
    "adagrad": ("Adagrad", {"epsilon": EPS, "initial_accumulator_value": 0.0}),
    "rmsprop": ("RMSprop", {"epsilon": EPS, "rho": ALPHA}),
    "adam": ("Adam", {"epsilon": EPS, **_BETAS}),
    "adamw": ("AdamW", {"epsilon": EPS, **_BETAS, "weight_decay": DECAY}),
}


class Peer(Candidate):
    """An optimizer of ``keras.optimizers`` over variables of its own."""

    threading = "own"
    keras_rules = Candidate.rules
    # The bias correction is formed in float32, and its powers there are approximate.
    tolerance = {"float32": Tolerance(4, 2e-5), "float64": Tolerance(4, 1e-13)}  # noqa: RUF012

    def __init__(
        self, rule: Rule, params: Sequence[Array], grads: Sequence[Array], threads: int
    ) -> None:
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(f"Keras runs on {keras.backend.backend()}, not on TensorFlow")
        dtype = params[0].dtype.name
        self._params = [keras.Variable(p, dtype=dtype) for p in params]
        self._given = grads
        self.reread()
        name, options = _OPTIMIZERS[rule.name]
        opt: Any = getattr(keras.optimizers, name)(learning_rate=LR, **options)
        opt.build(self._params)

        def update(grads: Any) -> None:
            opt.apply(grads, self._params)

        self._update = tf.function(update)

    def reread(self) -> None:
        """Copy the gradients."""
        self._grads = [tf.constant(g) for g in self._given]

    def step(self) -> None:
        """Do one step."""
        self._update(self._grads)

    def result(self) -> list[Array]:
        """Return the parameters as they are now."""
        return [np.asarray(param.value) for param in self._params]
