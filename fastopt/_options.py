"""Kinds and ranges of options: each check returns the value in its canonical type or raises."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Real
from typing import Any

import numpy as np


def real(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    below: float = float("inf"),
    above: float | None = None,
) -> float:
    """Check a real number: ``low <= value`` (or ``above < value``), and ``value < below``.

    An infinite `below` excludes nothing; NaN is always refused.
    """
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a real number, got {value!r} ({type(value).__name__})")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large, got {value!r}") from None
    inside = number > above if above is not None else number >= low
    if below != float("inf"):
        inside = inside and number < below
    if not inside:
        bounds = f"> {above:g}" if above is not None else f">= {low:g}" if low > -1e300 else ""
        if below != float("inf"):
            bounds += f" and < {below:g}"
        raise ValueError(f"{name} must be {bounds or 'a number'}, got {value!r}")
    return number


def flag(name: str, value: Any) -> float:
    """Check a switch; the C core takes it as 0.0 or 1.0."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return float(value)


def choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Check one of a few strings."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value
