"""Train the same network once per algorithm, from the same weights on the same batches."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import fastopt
from fastopt.compare.data import Digits
from fastopt.compare.model import MLP

LAYERS = (64, 128, 64, 10)

# The class, and the hyperparameters that are not its defaults. The learning rates are chosen alike
# for all: of 1, 2 and 5 times a power of ten, the largest with which the loss seldom rises from one
# epoch to the next (over ten seeds, on average at most once in 20 epochs).
ALGORITHMS: dict[str, tuple[Any, dict[str, float]]] = {
    "sgd": (fastopt.SGD, {"lr": 0.1}),
    "momentum": (fastopt.SGD, {"lr": 0.02, "momentum": 0.9}),
    "adagrad": (fastopt.Adagrad, {"lr": 0.1}),
    "rmsprop": (fastopt.RMSprop, {"lr": 0.001}),
    "adam": (fastopt.Adam, {"lr": 0.002}),
}


@dataclass(frozen=True)
class Settings:
    """What the user chose; the same for every run."""

    epochs: int = 20
    batch_size: int = 64
    seed: int = 0
    threads: int | None = None


@dataclass(frozen=True)
class Epoch:
    """One pass over the training set.

    The loss is the mean over the samples as they were trained on, None if it was not finite; the
    test accuracy is that of the model after the pass.
    """

    epoch: int
    loss: float | None
    test_accuracy: float


@dataclass
class Run:
    """One training run; the last epoch of a diverged one has no loss."""

    algorithm: str
    hyperparameters: dict[str, float]
    diverged: bool = False
    epochs: list[Epoch] = field(default_factory=list)
    steps: int = 0
    training_s: float = 0.0  # forward, backward and optimizer; not the evaluation of each epoch
    optimizer_us_median: float = 0.0  # a step
    optimizer_share: float = 0.0  # of training_s


def train(algorithm: str, data: Digits, settings: Settings) -> Run:
    """Train one model with one algorithm, printing each epoch's loss.

    Stops early when the loss is no longer finite.

    Parameters
    ----------
    algorithm : str
        A key of `ALGORITHMS`.
    data : Digits
        The training and test sets.
    settings : Settings
        Equal settings give equal losses, to the bit.

    Returns
    -------
    Run
        Every epoch, and where the time went.
    """
    optimizer, hyperparameters = ALGORITHMS[algorithm]
    run = Run(algorithm, dict(hyperparameters))
    model = MLP(LAYERS, np.random.default_rng([settings.seed, 0]))
    opt = optimizer(model.params, **hyperparameters, num_threads=settings.threads)
    order = np.random.default_rng([settings.seed, 1])
    step_s: list[float] = []

    print(f"\n{algorithm} ({', '.join(f'{k}={v:g}' for k, v in hyperparameters.items())})")
    with (
        threadpool_limits(limits=1, user_api="blas"),  # small products: threads would only cost
        np.errstate(over="ignore", invalid="ignore"),  # divergence has its own report
    ):
        for epoch in range(1, settings.epochs + 1):
            shuffled = order.permutation(len(data.x_train))
            loss_sum = 0.0
            for start in range(0, len(shuffled), settings.batch_size):
                batch = shuffled[start : start + settings.batch_size]
                begin = perf_counter()
                loss, grads = model.loss_and_grads(data.x_train[batch], data.y_train[batch])
                before_step = perf_counter()
                opt.step(grads)
                end = perf_counter()
                step_s.append(end - before_step)
                run.training_s += end - begin
                loss_sum += loss * len(batch)
            mean = loss_sum / len(shuffled)
            accuracy = float((model.predict(data.x_test) == data.y_test).mean())
            run.diverged = not math.isfinite(mean)
            run.epochs.append(Epoch(epoch, None if run.diverged else mean, accuracy))
            print(f"Epoch [{epoch}/{settings.epochs}], Loss: {mean:.4f}", flush=True)
            if run.diverged:
                break

    run.steps = len(step_s)
    run.optimizer_us_median = 1e6 * statistics.median(step_s)
    run.optimizer_share = sum(step_s) / run.training_s
    return run
