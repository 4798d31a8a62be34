"""Choose a learning rate for each algorithm, then train with it, from the same weights for all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import r2_score
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from fastopt._bfloat16 import named
from fastopt.compare.algorithms import (
    ALGORITHMS,
    DEFAULT,
    GRID,
    SCHEDULES,
    STATELESS,
    Variant,
)
from fastopt.compare.data import Data
from fastopt.compare.model import MLP, Array, cross_entropy, squared_error
from fastopt.compare.progress import Progress


@dataclass(frozen=True)
class Settings:
    """What the user chose; the same for every run."""

    optimizers: tuple[str, ...] = DEFAULT
    hidden: tuple[int, ...] = (64, 32)
    epochs: int = 20
    batch_size: int = 64
    lr: dict[str, float] = field(default_factory=dict)  # for these, nothing is searched
    schedule: str = "constant"
    seed: int = 0
    seeds: int = 3
    dtype: str = "float32"
    param_dtypes: tuple[str, ...] = ()  # that are compared with `dtype`, and so are the next
    state_dtypes: tuple[str, ...] = ()
    master_weights: bool = True  # beside parameters of 16 bits
    threads: int | None = None

    @property
    def variants(self) -> list[Variant]:
        """What is compared: each algorithm, and then the same in each storage."""
        params, states = self.param_dtypes or ("float32",), self.state_dtypes or ("float32",)
        found = []
        for name in self.optimizers:
            stored = [
                Variant(name, param, "float32" if name in STATELESS else state)
                for param in params
                for state in states
            ]
            plain = Variant(name, "float32", "float32")
            found += [Variant(name), *(v for v in dict.fromkeys(stored) if v != plain)]
        return found


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried, and the mean validation loss; None if any run diverged."""

    algorithm: str
    lr: float
    validation_loss: float | None


@dataclass(frozen=True)
class Epoch:
    """The model after so many passes over the training split; all None once it has diverged.

    A score is the accuracy, or R2.
    """

    epoch: int
    training_loss: float | None
    validation_loss: float | None
    validation_score: float | None
    test_score: float | None
    seconds: float  # spent on training so far: forward, backward and optimizer


@dataclass
class Run:
    """One training run; it ends with the epoch in which it diverged."""

    algorithm: str
    hyperparameters: dict[str, Any]
    seed: int
    param_dtype: str
    state_bytes: float = 0.0  # a weight
    diverged: bool = False
    epochs: list[Epoch] = field(default_factory=list)
    step_us: list[float] = field(default_factory=list)  # what each took: all of it,
    optimizer_us: list[float] = field(default_factory=list)  # and the optimizer alone

    def as_dict(self) -> dict[str, Any]:
        """Return it as it stands in results.json."""
        return {
            "algorithm": self.algorithm,
            "hyperparameters": self.hyperparameters,
            "seed": self.seed,
            "param_dtype": self.param_dtype,
            "state_bytes": self.state_bytes,
            "diverged": self.diverged,
            "steps": len(self.step_us),
            "step_us_median": statistics.median(self.step_us),
            "optimizer_us_median": statistics.median(self.optimizer_us),
            "epochs": [vars(epoch) for epoch in self.epochs],
        }


@dataclass
class Comparison:
    """What has been done so far."""

    data: Data
    settings: Settings
    trials: list[Trial] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    @property
    def layers(self) -> tuple[int, ...]:
        """The units of each layer, the inputs first."""
        inputs: int = self.data.train.x.shape[1]
        return (inputs, *self.settings.hidden, self.data.outputs)

    @property
    def trainings(self) -> dict[str, int]:
        """How many trainings each algorithm has, those that only try a learning rate included."""
        settings = self.settings
        return {
            v.name: settings.seeds
            * (1 if v.param_dtype or v.algorithm in settings.lr else 1 + len(GRID))
            for v in settings.variants
        }

    @property
    def planned(self) -> int:
        """How many runs it has when it is complete."""
        return len(self.settings.variants) * self.settings.seeds

    def go(self, progress: Progress) -> None:
        """Search and train, an algorithm after the other; whatever has finished is kept.

        Equal settings and data give equal numbers, to the bit, but for the times.
        """
        with (
            threadpool_limits(limits=1, user_api="blas"),  # whose results depend on its threads
            np.errstate(over="ignore", invalid="ignore", divide="ignore"),  # divergence is reported
            progress,
        ):
            lr = 0.0
            for variant in self.settings.variants:
                if not variant.param_dtype:  # the others follow, with the same rate
                    name = variant.algorithm
                    lr = self.settings.lr.get(name) or self._search(variant, progress)
                for seed in self._seeds():
                    progress.train(variant.name, lr, seed)
                    self.runs.append(self._train(variant, lr, seed, progress))

    def _seeds(self) -> range:
        return range(self.settings.seed, self.settings.seed + self.settings.seeds)

    def _search(self, variant: Variant, progress: Progress) -> float:
        """Return the learning rate of the grid with the lowest mean loss on the validation split.

        Over all seeds and the last quarter of the epochs: neither a rate that suits one set of
        initial weights by chance is the best, nor one whose loss jumps and was caught at a low.
        """
        trials, last = [], -(-self.settings.epochs // 4)
        for lr in GRID:
            losses = []
            for seed in self._seeds():
                progress.search(variant.name, lr, seed)
                epochs = self._train(variant, lr, seed, progress).epochs
                losses += [epoch.validation_loss for epoch in epochs[-last:]]
            finite = [loss for loss in losses if loss is not None]
            mean = statistics.fmean(finite) if len(finite) == len(losses) else None
            trials.append(Trial(variant.name, lr, mean))
            progress.searched(mean)
        self.trials += trials
        means = [math.inf if t.validation_loss is None else t.validation_loss for t in trials]
        return trials[means.index(min(means))].lr

    def _train(self, variant: Variant, lr: float, seed: int, progress: Progress) -> Run:
        settings, train = self.settings, self.data.train
        loss_function = cross_entropy if self.data.task == "classification" else squared_error
        model = MLP(self.layers, loss_function, np.random.default_rng([seed, 0]), settings.dtype)
        optimizer, options = ALGORITHMS[variant.algorithm]
        params = model.params
        if variant.param_dtype:
            options = {**options, "state_dtype": variant.state_dtype}
        if variant.param_dtype not in ("", "float32"):
            options["master_weights"] = settings.master_weights
            dtype = named(variant.param_dtype, "--param-dtype bfloat16")
            params = [param.astype(dtype) for param in params]
        _copy(params, model.params)
        steps = settings.epochs * math.ceil(len(train.x) / settings.batch_size)
        opt = optimizer(
            params,
            lr=SCHEDULES[settings.schedule](lr, steps),
            num_threads=settings.threads,
            **options,
        )
        run = Run(variant.name, {"lr": lr, **options}, seed, params[0].dtype.name)
        run.epochs.append(self._evaluate(model, 0, 0.0))
        rng = np.random.default_rng([seed, 1])
        seconds = 0.0
        for epoch in range(1, settings.epochs + 1):
            for batch in _batches(len(train.x), settings.batch_size, rng):
                begin = perf_counter()
                loss, grads = model.loss_and_grads(train.x[batch], train.y[batch])
                before_step = perf_counter()
                opt.step(grads)
                end = perf_counter()
                seconds += end - begin
                _copy(params, model.params)
                run.step_us.append(1e6 * (end - begin))
                run.optimizer_us.append(1e6 * (end - before_step))
                progress.step(loss)
            run.epochs.append(self._evaluate(model, epoch, seconds))
            progress.epoch(epoch, run.epochs[-1].training_loss)
            run.diverged = run.epochs[-1].training_loss is None
            if run.diverged:
                break
        progress.end()
        weights = sum(param.size for param in params)
        run.state_bytes = sum(opt.nbytes.values()) / weights
        return run

    def _evaluate(self, model: MLP, epoch: int, seconds: float) -> Epoch:
        data = self.data
        outputs = [model.outputs(split.x) for split in (data.train, data.validation, data.test)]
        training_loss, _ = model.loss(outputs[0], data.train.y)
        validation_loss, _ = model.loss(outputs[1], data.validation.y)
        finite = all(bool(np.isfinite(values).all()) for values in outputs)
        if not (finite and math.isfinite(training_loss) and math.isfinite(validation_loss)):
            return Epoch(epoch, None, None, None, None, seconds)
        validation_score = self._score(outputs[1], data.validation.y)
        test_score = self._score(outputs[2], data.test.y)
        return Epoch(epoch, training_loss, validation_loss, validation_score, test_score, seconds)

    def _score(self, outputs: Array, y: Any) -> float:
        if self.data.task == "classification":
            return float((outputs.argmax(axis=1) == y).mean())
        return float(r2_score(y, outputs))


def _copy(params: Sequence[npt.NDArray[Any]], model: Sequence[Array]) -> None:
    """Give the model, which computes in float32, what the parameters hold in 16 bits."""
    for param, own in zip(params, model, strict=True):
        if own is not param:
            own[...] = param


def _batches(rows: int, size: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.intp]]:
    """Deal the rows out in a new order."""
    shuffled = rng.permutation(rows)
    for start in range(0, rows, size):
        yield shuffled[start : start + size]
