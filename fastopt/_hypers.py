"""Hyperparameters: each is checked by the range in which its rule takes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from fastopt import _core
from fastopt._options import flag, real

Check = Callable[[str, Any], float]  # of a name and a value: returns that as a float, or raises

BELOW_1 = math.nextafter(1.0, 0.0)


def checks(rule: _core.Rule) -> dict[str, Check]:
    """Return a check for each hyperparameter of a rule."""
    return {name: check(low, high) for name, (low, high) in rule.ranges.items()}


def check(low: float, high: float) -> Check:
    """Return a check for a range with both ends in it; a NaN as `high` says that it is a switch."""
    if math.isnan(high):
        return flag
    if high == BELOW_1:
        return partial(real, low=low, below=1.0)
    return partial(real, low=low, high=None if high == math.inf else high)
