"""Parameters excluded from weight decay."""

from __future__ import annotations

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from fastopt._memory import Array

NoDecay = str | Collection[str] | Callable[[Any, Any], bool]


def decay_mask(no_decay: Any, keys: list[Any], params: list[Array], named: bool) -> list[bool]:
    """Return which parameters ``no_decay`` excludes from weight decay."""
    if no_decay is None:
        return [False] * len(keys)
    if callable(no_decay):
        out = []
        for key, param in zip(keys, params, strict=True):
            answer = no_decay(key, param)
            if not isinstance(answer, (bool, np.bool_)):
                raise TypeError(f"no_decay({key!r}, ...) must return True or False, got {answer!r}")
            out.append(bool(answer))
        return out
    patterns = checked_patterns(no_decay)
    if not named:
        raise TypeError(
            "no_decay: patterns need named parameters (a dict); for others give a function of "
            "(index, array)"
        )
    return [any(fnmatchcase(str(key), pattern) for pattern in patterns) for key in keys]


def checked_patterns(no_decay: Any) -> list[str]:
    patterns = [no_decay] if isinstance(no_decay, str) else no_decay
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(
        isinstance(pattern, str) for pattern in patterns
    ):
        raise TypeError(
            "no_decay must be a pattern of names like '*.bias', a list of them, or a function of "
            f"(name, array); got {no_decay!r}"
        )
    return list(patterns)


def check_matched(no_decay: Any, keys: list[Any]) -> None:
    """Raise for a pattern that matches no name: it may be misspelt."""
    if no_decay is None or callable(no_decay):
        return
    for pattern in checked_patterns(no_decay):
        if not any(fnmatchcase(str(key), pattern) for key in keys):
            raise ValueError(f"no_decay: {pattern!r} matches none of the names {keys}")
