"""What is timed: the arrays of a model, and the rule that updates them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastopt
from fastopt import reference

Array = NDArray[Any]
Shape = tuple[int, ...]

DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Workload:
    """The shapes of the arrays that a step updates."""

    name: str
    title: str
    shapes: tuple[Shape, ...]

    @property
    def elements(self) -> int:
        """The number of elements of all arrays together."""
        return sum(math.prod(shape) for shape in self.shapes)

    def arrays(self, dtype: str) -> tuple[list[Array], list[Array]]:
        """Return parameters and gradients, normally distributed, the same each time."""
        rng = np.random.default_rng(0)
        draw = [
            [rng.standard_normal(shape, np.dtype(dtype)) for shape in self.shapes] for _ in range(2)
        ]
        return draw[0], draw[1]


def _layer(inputs: int, outputs: int) -> tuple[Shape, Shape]:
    return (inputs, outputs), (outputs,)


def _gpt2(width: int = 768, depth: int = 12) -> tuple[Shape, ...]:
    norm = ((width,), (width,))
    block = (
        *norm,
        *_layer(width, 3 * width),
        *_layer(width, width),
        *norm,
        *_layer(width, 4 * width),
        *_layer(4 * width, width),
    )
    return ((50257, width), (1024, width), *block * depth, *norm)


SIZES = {"1e3": 10**3, "1e4": 10**4, "1e5": 10**5, "1e6": 10**6, "1e7": 10**7, "5e7": 5 * 10**7}

WORKLOADS = {
    workload.name: workload
    for workload in (
        *(Workload(name, f"1 array, {name}", ((size,),)) for name, size in SIZES.items()),
        Workload(
            "mlp",
            "MLP 784-128-64-10, 6 arrays",
            (*_layer(784, 128), *_layer(128, 64), *_layer(64, 10)),
        ),
        Workload("many", "150 layers of 48, 300 arrays", _layer(48, 48) * 150),
        Workload("gpt2", "GPT-2 small, 148 arrays", _gpt2()),
    )
}


@dataclass(frozen=True)
class Rule:
    """An update rule with its hyperparameters.

    `options` are keyword arguments of the fastopt class and of `formula`, in `reference`; `slots`
    are the state arrays. A rule with `clip_norm` is the whole tail of a training step: clip the
    gradients to this common norm, update, zero the gradients.
    """

    name: str
    optimizer: Callable[..., fastopt.SGD | fastopt.Adagrad | fastopt.RMSprop | fastopt.Adam]
    formula: Callable[..., None]
    slots: tuple[str, ...]
    options: Mapping[str, Any] = field(hash=False)
    clip_norm: float | None = None

    def bytes_moved(self, elements: int, dtype: str) -> int:
        """Return what a step has to read and write at least.

        Parameters and slots are read and written, gradients are read; clip-adam reads the gradients
        twice, for the norm and for the update, and writes zeros.
        """
        passes = 2 * (1 + len(self.slots)) + (1 if self.clip_norm is None else 3)
        return elements * passes * np.dtype(dtype).itemsize


# Hyperparameters that float32 holds exactly, as it does one minus them: then no framework's
# rounding of them shows in the results.
LR = 2.0**-10
MOMENTUM = 0.875
ALPHA = 1 - 2.0**-7
BETAS = (0.875, 1 - 2.0**-10)
EPS = 2.0**-27
DECAY = 2.0**-7

_ADAM = {"lr": LR, "betas": BETAS, "eps": EPS}
_MOMENTS = ("exp_avg", "exp_avg_sq")

RULES = {
    rule.name: rule
    for rule in (
        Rule("sgd", fastopt.SGD, reference.sgd, (), {"lr": LR}),
        Rule(
            "momentum",
            fastopt.SGD,
            reference.sgd,
            ("momentum_buffer",),
            {"lr": LR, "momentum": MOMENTUM},
        ),
        Rule("adagrad", fastopt.Adagrad, reference.adagrad, ("sum",), {"lr": LR, "eps": EPS}),
        Rule(
            "rmsprop",
            fastopt.RMSprop,
            reference.rmsprop,
            ("square_avg",),
            {"lr": LR, "alpha": ALPHA, "eps": EPS},
        ),
        Rule("adam", fastopt.Adam, reference.adam, _MOMENTS, _ADAM),
        Rule(
            "adamw",
            fastopt.AdamW,
            reference.adam,
            _MOMENTS,
            {**_ADAM, "weight_decay": DECAY, "decoupled_weight_decay": True},
        ),
        Rule("clip-adam", fastopt.Adam, reference.adam, _MOMENTS, _ADAM, clip_norm=1.0),
    )
}
