"""Kinds and ranges of options: each check returns the value in its canonical type or raises."""

from __future__ import annotations

import operator
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import numpy as np


def real(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> float:
    """Check a real number: ``low <= value`` or ``above < value``; ``value <= high``, ``< below``.

    A 0-d array is the number in it. NaN is always refused.
    """
    plain = value if type(value) is float else scalar(value)
    if type(plain) is not float and (not isinstance(plain, Real) or isinstance(plain, bool)):
        raise TypeError(f"{name} must be a real number, got {value!r} ({type(value).__name__})")
    try:
        number = float(plain)
    except OverflowError:
        raise ValueError(f"{name} is too large, got {value!r}") from None
    bounds = [f">= {low:g}" if above is None else f"> {above:g}"]
    if above is None and low == -float("inf"):
        bounds = ["a number"]
    inside = number >= low if above is None else number > above
    if high is not None:
        bounds.append(f"<= {high:g}")
        inside &= number <= high
    if below is not None:
        bounds.append(f"< {below:g}")
        inside &= number < below
    if not inside:
        raise ValueError(f"{name} must be {' and '.join(bounds)}, got {value!r}")
    return number


def scalar(value: Any) -> Any:
    """Return what a 0-d array of any library holds, and anything else as it is.

    Schedules of array libraries return such arrays.
    """
    if isinstance(value, (Real, np.bool_)) or getattr(value, "shape", None) != ():
        return value
    return value.item() if hasattr(value, "item") else np.asarray(value).item()


def pair(name: str, values: Any) -> tuple[Any, Any]:
    """Return the elements of a tuple, list or vector of two."""
    if not isinstance(values, (tuple, list)) and not _is_vector(values):
        raise TypeError(f"{name} must be a tuple of two numbers, got {values!r}")
    if len(values) != 2:
        raise ValueError(f"{name} must have two elements, got {values!r}")
    first, second = values
    return first, second


def _is_vector(values: Any) -> bool:
    shape = getattr(values, "shape", None)
    return isinstance(shape, tuple) and len(shape) == 1


def frozen(value: Any) -> Any:
    """Return an option's value, or the same as a tuple or number if it could change in place.

    Lists and arrays can, and so can what is in a tuple.
    """
    if isinstance(value, (tuple, list)) or _is_vector(value):
        items = tuple(map(frozen, value))
        alike = isinstance(value, tuple) and all(map(operator.is_, items, value))
        return value if alike else items
    return scalar(value)


def flag(name: str, value: Any) -> float:
    """Check a switch; the C core takes it as 0.0 or 1.0."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return float(value)


def count(name: str, value: Any) -> int:
    """Check a number of things, of which there is one at least."""
    if not isinstance(value, Integral) or isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    number = int(value)
    if not 1 <= number < 2**31:
        raise ValueError(f"{name} must be >= 1 and < 2**31, got {value!r}")
    return number


def seed_number(name: str, value: Any) -> int:
    """Check a seed of random numbers."""
    if not isinstance(value, Integral) or isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    number = int(value)
    if not 0 <= number < 2**64:
        raise ValueError(f"{name} must be >= 0 and < 2**64, got {value!r}")
    return number


def choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Check one of a few strings."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value
