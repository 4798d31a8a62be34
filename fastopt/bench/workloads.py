"""What is timed: the arrays of a model, and the rule that updates them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastopt
from fastopt import reference
from fastopt._bfloat16 import named
from fastopt.optimizer import Optimizer

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

    def arrays(self, dtype: Any) -> tuple[list[Array], list[Array]]:
        """Return parameters and gradients, normally distributed, the same each time.

        Those of 16 bits are those of float32, rounded.
        """
        rng = np.random.default_rng(0)
        drawn = np.dtype(dtype if dtype in DTYPES else "float32")
        draw = [
            [rng.standard_normal(shape, drawn).astype(dtype, copy=False) for shape in self.shapes]
            for _ in range(2)
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
    are the state arrays, and `numbers` state that is one number, with what it begins at. A rule
    with `clip_norm` is the whole tail of a training step: clip the gradients to this common norm,
    update, zero the gradients.
    """

    name: str
    optimizer: Callable[..., Optimizer]
    formula: Callable[..., None]
    slots: tuple[str, ...]
    options: Mapping[str, Any] = field(hash=False)
    clip_norm: float | None = None
    numbers: Mapping[str, float] = field(default_factory=dict, hash=False)

    def state(self, param: Array) -> dict[str, Array]:
        """Return a parameter's state before its first step, as `formula` takes it."""
        slots = {slot: np.zeros_like(param) for slot in self.slots}
        return slots | {name: np.array(value) for name, value in self.numbers.items()}

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
        Rule(
            "adamax",
            fastopt.Adamax,
            reference.adamax,
            ("exp_avg", "exp_inf"),
            {"lr": LR, "betas": BETAS, "eps": EPS},
        ),
        Rule(
            "adadelta",
            fastopt.Adadelta,
            reference.adadelta,
            ("square_avg", "acc_delta"),
            {"lr": 1.0, "rho": ALPHA, "eps": EPS},
        ),
        Rule("lion", fastopt.Lion, reference.lion, ("exp_avg",), {"lr": LR, "betas": BETAS}),
        Rule("nadam", fastopt.NAdam, reference.nadam, _MOMENTS, _ADAM, numbers={"mu_product": 1.0}),
        Rule(
            "radam",
            fastopt.RAdam,
            reference.radam,
            _MOMENTS,
            _ADAM,
        ),
        Rule("rprop", fastopt.Rprop, reference.rprop, ("prev", "step_size"), {"lr": LR}),
        Rule("clip-adam", fastopt.Adam, reference.adam, _MOMENTS, _ADAM, clip_norm=1.0),
    )
}


@dataclass(frozen=True)
class Storage:
    """How parameters, gradients and state are stored.

    `type` is the name of the dtype of parameters and gradients, `options` are keyword arguments of
    the fastopt class. `param` and `state` say the same in the words of ``reference.STORAGE``.
    """

    name: str
    type: str
    param: str
    state: str
    options: Mapping[str, Any] = field(hash=False)

    @property
    def dtype(self) -> Any:
        """The dtype of parameters and gradients."""
        return named(self.type, "--storage")

    def of(self, rule: Rule) -> Rule:
        """Return a rule as fastopt applies it to what is stored so."""
        return replace(rule, options={**rule.options, **self.options})

    def slot(self, name: str) -> str:
        """Return how a slot is stored: a name in ``reference.STORAGE``."""
        if name in ("exp_inf", "step_size"):
            return "float32"
        if self.state != "8-bit":
            return self.state
        signed = name in ("momentum_buffer", "exp_avg", "prev")
        return "8-bit signed" if signed else "8-bit unsigned"


_SPLIT = "bfloat16 with trailing bits"
_OWN = {"master_weights": False}  # the parameter itself is rounded

STORAGES = {
    storage.name: storage
    for storage in (
        Storage("float32", "float32", "float32", "float32", {}),
        Storage("bfloat16 with master", "bfloat16", _SPLIT, "float32", {}),
        Storage("bfloat16, float32 state", "bfloat16", "bfloat16", "float32", _OWN),
        Storage(
            "bfloat16, bfloat16 state",
            "bfloat16",
            "bfloat16",
            "bfloat16",
            {**_OWN, "state_dtype": "bfloat16"},
        ),
        Storage("float32, 8-bit state", "float32", "float32", "8-bit", {"state_dtype": "8bit"}),
        Storage(
            "bfloat16, 8-bit state",
            "bfloat16",
            "bfloat16",
            "8-bit",
            {**_OWN, "state_dtype": "8bit"},
        ),
        Storage("float16 with master", "float16", "float16 with master", "float32", {}),
    )
}
