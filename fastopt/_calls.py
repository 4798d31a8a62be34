"""What the functions of :mod:`fastopt.functional` share: a call's arguments, checked."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from functools import partial
from math import inf, isnan
from typing import Any, TypedDict, TypeVar

import numpy as np

from fastopt import _core
from fastopt._hypers import check
from fastopt._options import flag, seed_number
from fastopt.threads import checked_threads

ANY_NUMBER = (-inf, inf)  # as a range


class Storage(TypedDict, total=False):
    """What every function takes, by name, for storage in fewer bits and gradients of rows."""

    master: Any
    stochastic_rounding: bool
    seed: int
    index: int | Sequence[int]
    indices: Any


def _checked_storage(
    *,
    master: Any = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    index: int | Sequence[int] = 0,
    indices: Any = None,
) -> tuple[Any, bool, int, int | list[int], Any]:
    return (
        master,
        bool(flag("stochastic_rounding", stochastic_rounding)),
        seed_number("seed", seed),
        _numbers("index", 0, index),
        indices,
    )


def _storage_of(function: str, given: Storage) -> Any:
    for name in given:
        if name not in Storage.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return _checked_storage(**given)


Function = TypeVar("Function", bound=Callable[..., None])


def takes_storage(function: Function) -> Function:
    """Show in the signature of a function what its ``**storage`` stands for, with defaults."""
    signature = inspect.signature(function)
    *own, _ = signature.parameters.values()
    shared = inspect.signature(_checked_storage).parameters.values()
    vars(function)["__signature__"] = signature.replace(parameters=[*own, *shared])
    return function


def step_of(
    name: str, *slots: str, unnumbered: int = 1, **ranges: tuple[float, float]
) -> Callable[..., None]:
    """Return a rule as a function, with its ranges of hyperparameters but for these.

    `unnumbered` is the number of a step that is given none; 0 if one is required.
    """
    rule = _core.Rule(name)
    checks = {
        hyper: (check(low, high), low, 0.0 if isnan(high) else high)
        for hyper, (low, high) in (rule.ranges | {"lr": ANY_NUMBER} | ranges).items()
    }
    options = (
        partial(_numbers, "step", 1),
        partial(flag, "zero_grad"),
        partial(checked_threads, name="num_threads"),
        partial(_storage_of, name),
    )
    arguments = ("params", "grads", *slots)
    return _core.FunctionalStep(rule, checks, arguments, options, unnumbered).function()


def _numbers(name: str, first: int, given: Any) -> int | list[int]:
    """Check a number, or that of each parameter, counted from `first`."""
    if isinstance(given, (list, tuple)):
        return [_whole(name, first, number) for number in given]
    return _whole(name, first, given)


def _whole(name: str, first: int, given: Any) -> int:
    try:
        if isinstance(given, (bool, np.bool_)):
            raise TypeError
        number = operator.index(given)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer, got {given!r} ({type(given).__name__})"
        ) from None
    if not first <= number < 2**62:
        raise ValueError(f"{name} must be >= {first} and < 2**62, got {given!r}")
    return number
