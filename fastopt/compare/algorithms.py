"""What is compared: the algorithms, the learning rates to choose from, and the schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import fastopt
from fastopt import schedules

# The class, and what is not its default. The learning rate is chosen.
ALGORITHMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (fastopt.SGD, {}),
    "momentum": (fastopt.SGD, {"momentum": 0.9}),
    "nesterov": (fastopt.SGD, {"momentum": 0.9, "nesterov": True}),
    "adagrad": (fastopt.Adagrad, {}),
    "rmsprop": (fastopt.RMSprop, {}),
    "adam": (fastopt.Adam, {}),
    "amsgrad": (fastopt.Adam, {"amsgrad": True}),
    "adamw": (fastopt.AdamW, {}),
    "adamax": (fastopt.Adamax, {}),
    "adadelta": (fastopt.Adadelta, {}),
    "lion": (fastopt.Lion, {}),
    "nadam": (fastopt.NAdam, {}),
    "radam": (fastopt.RAdam, {}),
    "rprop": (fastopt.Rprop, {}),
}
DEFAULT = ("sgd", "momentum", "adagrad", "rmsprop", "adam")
STATELESS = ("sgd",)

PARAM_DTYPES = ("float32", "bfloat16", "float16")
STATE_DTYPES = ("float32", "bfloat16", "8bit")


class Variant(NamedTuple):
    """An algorithm, and how its parameters and its state are stored.

    Without a `param_dtype`, both are of the type of the whole comparison.
    """

    algorithm: str
    param_dtype: str = ""
    state_dtype: str = ""

    @property
    def name(self) -> str:
        """What results call it, as in ``adam (bf16/8bit)``: parameters and state."""
        if not self.param_dtype:
            return self.algorithm
        short = (dtype.replace("float", "f") for dtype in (self.param_dtype, self.state_dtype))
        return f"{self.algorithm} ({'/'.join(short)})"


# The same for all, so that none is favoured by what somebody knew about it.
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)

# From the learning rate and the steps of the whole training.
SCHEDULES: dict[str, Callable[[float, int], float | schedules.Schedule]] = {
    "constant": lambda lr, steps: lr,
    "step": lambda lr, steps: schedules.step(lr, every=1 + steps // 3),
    "multi-step": lambda lr, steps: schedules.multi_step(
        lr, milestones=sorted({steps // 2, 3 * steps // 4})
    ),
    "exponential": lambda lr, steps: schedules.exponential(lr, factor=0.01, every=steps),
    "polynomial": lambda lr, steps: schedules.polynomial(lr, steps),
    "cosine": lambda lr, steps: schedules.cosine(lr, steps),
    "cosine-restarts": lambda lr, steps: schedules.cosine_restarts(
        lr, period=1 + steps // 7, period_factor=2
    ),
    "linear-warmup": lambda lr, steps: schedules.linear_warmup(
        lr, steps=1 + steps // 10, start=lr / 10
    ),
    "one-cycle": lambda lr, steps: schedules.one_cycle(lr, steps=max(2, steps)),
    "piecewise": lambda lr, steps: schedules.piecewise([steps // 2], [lr, lr / 10]),
    "inverse-time": lambda lr, steps: schedules.inverse_time(lr, factor=9.0, every=steps),
}
