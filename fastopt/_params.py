"""Parameters as they may be given, and the state that goes with one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fastopt._core import address, exchange_memory, lends_memory
from fastopt._trees import Structure, is_container, is_named, is_nested, taken_apart

Array = NDArray[Any]

CACHE_LINE = 64  # bytes


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
    if (
        isinstance(params, (str, set, frozenset))
        or not hasattr(params, "__iter__")
        or lends_memory(params)
    ):
        raise TypeError(
            "params must be a list, tuple or generator of arrays, a dict name -> array, either of "
            f"them nested, or a list of parameter groups; got {type(params).__name__}"
            f"{'; of a single array, [array]' if lends_memory(params) else ''}"
        )
    items = params if isinstance(params, tuple) else list(params)
    if not any(isinstance(item, dict) and "params" in item for item in items):
        return [{"params": items}]
    if not all(isinstance(item, dict) for item in items):
        raise TypeError("params mixes arrays and parameter groups; give one or the other")
    return list(items)


def as_params(given: Any, first: int) -> tuple[list[Any] | None, list[Any], Structure | None]:
    """Return names (None if there are none), arrays and structure of one group.

    Its parameters are numbered from `first`. Without names, it is a list, without a structure.
    """
    if lends_memory(given):
        return None, [given], None
    if isinstance(given, (str, set, frozenset)) or not hasattr(given, "__iter__"):
        raise TypeError(
            f"'params' of a group must be a list of arrays or a dict, got {type(given).__name__}"
        )
    tree = given if is_container(given) else list(given)
    names: list[Any] = []
    arrays: list[Any] = []
    structure = taken_apart(tree, names, arrays, first)
    if is_nested(tree) and not isinstance(tree, Mapping):
        for name, x in zip(names, arrays, strict=True):
            if isinstance(x, np.generic) or not (lends_memory(x) or is_container(x)):
                # A name, or a hyperparameter.
                raise TypeError(
                    f"{label(name)}: expected a numpy.ndarray, got {type(x).__name__}; for named "
                    "parameters give dict(...); a parameter group is a dict with 'params'"
                )
    if is_nested(tree) or is_named(tree):
        return names, arrays, structure
    if isinstance(tree, Mapping):
        return list(tree), arrays, structure
    return None, arrays, None


def left_out(no_decay: Any, keys: list[Any], params: list[Array], named: bool) -> list[bool]:
    """Return which parameters the weight decay leaves out, as ``no_decay`` says."""
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


def label(key: Any) -> str:
    return f"parameter {key!r}"


def begun(slot: str) -> str:
    """Return what tells, in saved state, that a slot was switched on and has not begun yet."""
    return f"{slot}_begun"


def aligned_zeros(size: int, dtype: Any, like: int = 0, kind: type[Array] = np.ndarray) -> Array:
    """Return a new vector that begins with a cache line, or where an address is in one."""
    memory = np.zeros(size + CACHE_LINE // np.dtype(dtype).itemsize, dtype).view(kind)
    start = (like - address(memory)) % CACHE_LINE // memory.itemsize
    return memory[start : start + size]


def zeros_like(param: Array) -> Array:
    """Return zeros of a parameter's shape, dtype, memory order and place in a cache line.

    (With the same place, the loops can align all arrays at once.)
    """
    param = np.asarray(param)  # a subclass may have ideas of its own
    zeros = aligned_zeros(param.size, param.dtype, address(param))
    if param.flags.c_contiguous:
        return zeros.reshape(param.shape)
    return laid_out(zeros, param.shape, memory_order(param))


def memory_order(array: Array) -> tuple[int, ...]:
    """Return the axes of an array in the order in which they lie in memory, outermost first."""
    strides = np.empty_like(array, order="K").strides
    return tuple(sorted(range(array.ndim), key=lambda axis: -strides[axis]))


def laid_out(memory: Array, shape: tuple[int, ...], axes: Sequence[int]) -> Array:
    """Return a vector as an array of this shape whose axes lie in this order."""
    places = sorted(range(len(axes)), key=axes.__getitem__)
    return memory.reshape([shape[axis] for axis in axes]).transpose(places)


def lay_out(array: Array, axes: Sequence[int]) -> None:
    """Let the axes of an array lie in this order, in other memory if they do not yet."""
    if memory_order(array) != tuple(axes):
        moved = laid_out(aligned_zeros(array.size, array.dtype), array.shape, axes)
        moved[...] = array
        exchange_memory(array, moved)


def copy_like(param: Array) -> Array:
    copy = zeros_like(param)
    copy[...] = np.asarray(param)
    return copy


def new_state(param: Array, names: Iterable[str], fill: Mapping[str, float]) -> ParameterState:
    state: dict[str, Array] = {"step": np.zeros((), np.int64)}
    for name in names:
        state[name] = zeros_like(param)
        state[name][...] = typed(fill.get(name, 0.0), param, name)
    return ParameterState(state)


def typed(value: float, like: Array, name: str) -> Array:
    """Return a value as a 0-d array of a parameter's dtype, if it is finite there."""
    if like.dtype.kind == "f" and not abs(value) <= float(np.finfo(like.dtype).max):
        raise ValueError(f"initial value of {name} must be finite in {like.dtype}, got {value!r}")
    return np.asarray(value, like.dtype)
