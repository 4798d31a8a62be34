"""Whether a state dict fits an optimizer: all of it is checked before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fastopt._params import Array
    from fastopt.optimizer import Optimizer

_ENTRIES = {
    "rule",
    "semantics",
    "completed_steps",
    "accumulated",
    "param_groups",
    "state",
    "ema",
}


def verified(
    optimizer: Optimizer, saved: Mapping[str, Any]
) -> tuple[
    list[dict[str, Any]], list[dict[str, Array]], list[Array], dict[int, Array], tuple[int, int]
]:
    """Return copies: groups' options, state, averages, sums by number; both counts of steps."""
    if not isinstance(saved, Mapping):
        raise TypeError(f"state_dict must be a dict, got {type(saved).__name__}")
    _same_keys("state_dict", _ENTRIES, saved)
    for entry, own in (("rule", optimizer._rule.name), ("semantics", optimizer._semantics)):
        if not isinstance(saved[entry], str) or saved[entry] != own:
            raise ValueError(
                f"state_dict[{entry!r}] is {saved[entry]!r}, the optimizer's is {own!r}"
            )
    completed_steps = _count("state_dict['completed_steps']", saved["completed_steps"])

    keys = optimizer._keys
    groups = _groups(optimizer, saved["param_groups"])
    used = [
        optimizer._rule.used_slots(
            optimizer._row(
                optimizer._checked(
                    {**own, **loaded}, f"state_dict['param_groups'][{number}]: ", completed_steps
                )
            )
        )
        for number, (own, loaded) in enumerate(zip(optimizer.param_groups, groups, strict=True))
    ]
    _same_keys("state_dict['state']", keys, saved["state"])
    state = []
    for key, param, number in zip(keys, optimizer._params, optimizer._group_of, strict=True):
        where = f"state_dict['state'][{key!r}]"
        slots = saved["state"][key]
        if not isinstance(slots, Mapping):
            raise TypeError(f"{where} must be a dict, got {type(slots).__name__}")
        slots = dict(slots)
        missing = {"step", *used[number]} - slots.keys()
        unexpected = slots.keys() - {"step", *optimizer._rule.slots}
        if missing or unexpected:
            raise ValueError(
                f"{where}: missing {sorted(missing)}, unexpected {sorted(map(str, unexpected))}"
            )
        copies = {"step": np.array(_count(f"{where}['step']", slots["step"]))}
        for name in slots.keys() - {"step"}:
            copies[name] = _copy(f"{where}[{name!r}]", slots[name], param)
        state.append(copies)

    if (saved["ema"] is None) != (optimizer._ema is None):
        has = "the optimizer" if saved["ema"] is None else "the state_dict"
        raise ValueError(f"only {has} has averages of the weights (ema_decay)")
    ema = []
    if saved["ema"] is not None:
        _same_keys("state_dict['ema']", keys, saved["ema"])
        for key, param in zip(keys, optimizer._params, strict=True):
            ema.append(_copy(f"state_dict['ema'][{key!r}]", saved["ema"][key], param))
    sums, accumulated_steps = _accumulated(optimizer, saved["accumulated"])
    return groups, state, ema, sums, (completed_steps, accumulated_steps)


def _accumulated(optimizer: Optimizer, saved: Any) -> tuple[dict[int, Array], int]:
    where = "state_dict['accumulated']"
    if saved is None:
        return {}, 0
    _same_keys(where, ["steps", "sums"], saved)
    steps = _count(f"{where}['steps']", saved["steps"])
    if not 0 < steps < optimizer._accumulate:
        raise ValueError(
            f"{where}['steps'] must be > 0 and below the optimizer's "
            f"accumulate={optimizer._accumulate}, got {steps}"
        )
    if not isinstance(saved["sums"], Mapping):
        raise TypeError(f"{where}['sums'] must be a dict, got {type(saved['sums']).__name__}")
    unexpected = [key for key in saved["sums"] if key not in set(optimizer._keys)]
    if unexpected:
        raise ValueError(f"{where}['sums']: unexpected {unexpected}")
    return {
        i: _copy(f"{where}['sums'][{key!r}]", saved["sums"][key], param)
        for i, (key, param) in enumerate(zip(optimizer._keys, optimizer._params, strict=True))
        if key in saved["sums"]
    }, steps


def _groups(optimizer: Optimizer, saved: Any) -> list[dict[str, Any]]:
    own = optimizer.param_groups
    if not isinstance(saved, list) or len(saved) != len(own):
        count = len(saved) if isinstance(saved, list) else type(saved).__name__
        raise ValueError(f"state_dict['param_groups']: expected a list of {len(own)}, got {count}")
    groups, first = [], 0
    for number, (group, loaded) in enumerate(zip(own, saved, strict=True)):
        where = f"state_dict['param_groups'][{number}]"
        if not isinstance(loaded, Mapping) or "params" not in loaded:
            raise TypeError(f"{where} must be a dict with 'params'")
        last = first + len(group["params"])
        _same_keys(f"{where}['params']", optimizer._keys[first:last], loaded["params"])
        first = last
        options = {
            name: tuple(value) if isinstance(value, list) else value  # a copy
            for name, value in loaded.items()
            if name != "params"
        }
        if callable(options.get("lr")):
            raise TypeError(f"{where}['lr'] must be a number, got a callable")
        required = optimizer._defaults.keys() - {"lr"}
        if required - options.keys():
            raise ValueError(f"{where}: missing {sorted(required - options.keys())}")
        groups.append(options)
    return groups


def _same_keys(where: str, expected: Any, got: Any) -> None:
    if not isinstance(got, (Mapping, list, tuple)):
        raise TypeError(f"{where} must be a dict, got {type(got).__name__}")
    try:
        wanted, found = set(expected), set(got)
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from None
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in got if key not in wanted]
    if missing or unexpected or len(got) != len(expected):
        raise ValueError(f"{where}: missing {missing}, unexpected {unexpected}")


def _count(where: str, value: Any) -> int:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    whole = whole or (
        isinstance(value, np.ndarray) and value.shape == () and value.dtype == np.int64
    )
    if not whole:
        raise TypeError(f"{where} must be an integer (an int, or a 0-d int64 array), got {value!r}")
    if not 0 <= value < 2**63 - 1:
        raise ValueError(f"{where} must be >= 0 and < 2**63 - 1, got {value!r}")
    return int(value)


def _copy(where: str, array: Any, param: Array) -> Array:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{where} must be a numpy.ndarray, got {type(array).__name__}")
    if array.dtype != param.dtype:
        raise TypeError(f"{where}: dtype {array.dtype} is not the parameter's {param.dtype}")
    if array.shape != param.shape:
        raise ValueError(f"{where}: shape {array.shape} is not the parameter's {param.shape}")
    return np.array(array, order="K", subok=False)
