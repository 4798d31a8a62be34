"""Parameters as they may be given, and the state that goes with one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class ParameterState(dict[str, Array]):
    """A parameter's state arrays by name: written into in place, not replaced."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "state arrays cannot be replaced; write into them (state[name][...] = value) "
            "or use load_state_dict"
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a copy is a plain dict


def as_groups(params: Any) -> list[dict[str, Any]]:
    """Return what was given as parameters as a list of groups."""
    if isinstance(params, Mapping):
        return [{"params": params}]
    if isinstance(params, (np.ndarray, str, set, frozenset)) or not hasattr(params, "__iter__"):
        raise TypeError(
            "params must be a list, tuple or generator of arrays, a dict name -> array, or a list "
            f"of parameter groups; got {type(params).__name__}"
        )
    items = list(params)
    are_groups = [isinstance(item, dict) for item in items]
    if items and all(are_groups):
        return items
    if any(are_groups):
        raise TypeError("params mixes arrays and parameter groups; give one or the other")
    return [{"params": items}]


def as_params(given: Any) -> tuple[list[Any] | None, list[Any]]:
    """Return names (None if there are none) and arrays of one group."""
    if isinstance(given, Mapping):
        return list(given.keys()), list(given.values())
    if isinstance(given, np.ndarray):
        return None, [given]
    if isinstance(given, (str, set, frozenset)) or not hasattr(given, "__iter__"):
        raise TypeError(
            f"'params' of a group must be a list of arrays or a dict, got {type(given).__name__}"
        )
    return None, list(given)


def label(key: Any) -> str:
    return f"parameter {key!r}"


def copy_like(param: Array) -> Array:
    return np.array(param, order="K", subok=False, copy=True)


def new_state(param: Array, names: Iterable[str], fill: Mapping[str, float]) -> ParameterState:
    param = np.asarray(param)  # a subclass may have ideas of its own
    state: dict[str, Array] = {"step": np.zeros((), np.int64)}
    for name in names:
        state[name] = np.zeros_like(param, order="K", subok=False)
        state[name][...] = typed(fill.get(name, 0.0), param, name)
    return ParameterState(state)


def typed(value: float, like: Array, name: str) -> Array:
    """Return a value as a 0-d array of a parameter's dtype, if it is finite there."""
    if like.dtype.kind == "f" and not abs(value) <= float(np.finfo(like.dtype).max):
        raise ValueError(f"initial value of {name} must be finite in {like.dtype}, got {value!r}")
    return np.asarray(value, like.dtype)
