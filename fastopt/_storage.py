"""How a parameter and its state are stored, in float32 or in fewer bits.

Arithmetic is in float32 (in float64 for a float64 parameter). What is stored otherwise has arrays
under names of their own in the parameter's state:

====================  =====================================  ======================================
what                  arrays                                 types, shapes
====================  =====================================  ======================================
a slot                its name                               float32, float64 or bfloat16
a slot in 8 bits      ``<name>_8bit`` and ``<name>_scale``   uint8, the parameter's shape; and
                                                             uint8, one for each 64 elements
what bfloat16 lacks   ``master_bits``                        uint16, the parameter's shape
the float16 weight    ``master``                             float32, the parameter's shape
====================  =====================================  ======================================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastopt import _core
from fastopt._memory import Array, copy_like, zeros_like
from fastopt._settings import Settings


class Storage(NamedTuple):
    """How one parameter and its state are stored."""

    slots: tuple[str, ...]  # all of the rule's
    unsigned: tuple[str, ...]  # those that are never negative
    exact: tuple[str, ...]  # those that are never stored in fewer bits
    param: Any  # the parameter's dtype
    arithmetic: Any  # the dtype that rules compute in
    master: str  # the name of what is beside the parameter, or ""
    state: str  # "8bit", or the name of the dtype of all slots but the exact ones

    def in_8bit(self, slot: str) -> bool:
        return self.state == "8bit" and slot not in self.exact

    def arrays(self, slot: str) -> tuple[str, ...]:
        """Return what a slot's arrays are called."""
        return (f"{slot}_8bit", f"{slot}_scale") if self.in_8bit(slot) else (slot,)

    def names(self, slots: Collection[str]) -> list[str]:
        """Return what all arrays of a parameter with these slots are called, in order."""
        own = [name for slot in self.slots if slot in slots for name in self.arrays(slot)]
        return ["step", *([self.master] if self.master else []), *own]

    def form(self, param: Array, name: str) -> tuple[Any, tuple[int, ...]]:
        """Return the dtype and shape of the array of this name."""
        if name == "step":
            return np.dtype(np.int64), ()
        if name in _MASTERS.values():
            return np.dtype(np.uint16 if name == "master_bits" else np.float32), param.shape
        slot = name.removesuffix("_scale")
        if slot != name and self.in_8bit(slot):
            return np.dtype(np.uint8), (-(-param.size // _core.SCALED),)
        if self.in_8bit(name.removesuffix("_8bit")):
            return np.dtype(np.uint8), param.shape
        if self.state == "bfloat16" and name not in self.exact:
            return bfloat16(), param.shape
        return self.arithmetic, param.shape

    def zeros(self, param: Array, name: str) -> Array:
        """Return a new array of this name."""
        dtype, shape = self.form(param, name)
        if name == "step" or shape != param.shape:
            return np.zeros(shape, dtype)
        return zeros_like(param, dtype)


_MASTERS = {"bfloat16": "master_bits", "float16": "master"}


def storage_for(rule: _core.Rule, settings: Settings, param: Array, where: str) -> Storage:
    """Return how a parameter and its state are stored under these settings, or raise."""
    dtype = param.dtype
    state = settings.state_dtype or "float32"
    if dtype == np.float64:
        if settings.state_dtype is not None:
            raise TypeError(
                f"{where}: state_dtype={state!r} is for parameters of float32, bfloat16 and "
                "float16; this one is float64"
            )
        state = "float64"
    master = _MASTERS.get(dtype.name, "") if settings.master_weights else ""
    arithmetic = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    if state == "bfloat16":
        bfloat16()
    return Storage(rule.slots, rule.unsigned, rule.exact, dtype, arithmetic, master, state)


def bfloat16() -> Any:
    """Return the dtype bfloat16, which is not NumPy's own."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(
            "state_dtype='bfloat16' needs the package ml_dtypes: pip install 'fastopt[bfloat16]'"
        ) from error
    return np.dtype(ml_dtypes.bfloat16)


# ---- values --------------------------------------------------------------------------------------


def initial_arrays(storage: Storage, param: Array, slot: str, value: float) -> dict[str, Array]:
    """Return, for each array of a slot that has one value everywhere, what to copy into it.

    That is 0-d where all elements of the array are the same.
    """
    if not abs(value) <= float(np.finfo(storage.arithmetic).max):
        raise ValueError(
            f"initial value of {slot} must be finite in {storage.arithmetic}, got {value!r}"
        )
    names = storage.arrays(slot)
    if storage.in_8bit(slot) and value != 0:
        return stored(storage, param, slot, np.full_like(param, value, np.float32, subok=False))
    return {name: np.asarray(value, storage.form(param, name)[0]) for name in names}


def stored(storage: Storage, param: Array, slot: str, values: Array) -> dict[str, Array]:
    """Return new arrays of a slot that store these values, rounded to nearest."""
    arrays = {name: storage.zeros(param, name) for name in storage.arrays(slot)}
    if storage.in_8bit(slot):
        laid_out = copy_like(param, np.float32, values)
        codes, scales = arrays.values()
        _core.encode(laid_out, codes, scales, unsigned=slot in storage.unsigned)
    else:
        np.copyto(arrays[slot], values, casting="same_kind")
    return arrays


def values_of(storage: Storage, state: Mapping[str, Array], slot: str) -> Array:
    """Return a slot's values in what rules compute in: a copy."""
    if storage.in_8bit(slot):
        codes, scales = (state[name] for name in storage.arrays(slot))
        return _core.decode(codes, scales, unsigned=slot in storage.unsigned)
    return np.array(state[slot], storage.arithmetic, order="K", subok=False)


def weights(storage: Storage, param: Array, state: Mapping[str, Array]) -> Array:
    """Return a parameter's values in what rules compute in: its master's, if it has one; a copy."""
    if storage.param == storage.arithmetic:
        return np.array(param, order="K", subok=False)
    return _core.decode(np.asarray(param), state.get(storage.master))


def stored_weights(storage: Storage, param: Array, values: Array) -> tuple[Array, dict[str, Array]]:
    """Return a new parameter that stores these values, and what is beside it."""
    new = zeros_like(param)
    beside = {storage.master: storage.zeros(param, storage.master)} if storage.master else {}
    if storage.param == storage.arithmetic:
        np.copyto(new, values)
    else:
        _core.encode(copy_like(param, np.float32, values), new, beside.get(storage.master))
    return new, beside


# ---- what was stored otherwise -------------------------------------------------------------------


def converted(
    storage: Storage, param: Array, saved: Mapping[str, Any], value: Any
) -> tuple[dict[str, Any], Any]:
    """Return a parameter's saved state, and its saved value (or None), as they are stored here.

    What cannot be converted is left as it is, for others to refuse.
    """
    new = dict(saved)
    for slot in storage.slots:
        names = (f"{slot}_8bit", f"{slot}_scale")
        if storage.arrays(slot)[0] in new and _fits(storage, param, new, slot):
            continue
        if all(_has(new.get(name), np.uint8) for name in names):
            values = _core.decode(
                copy_like(param, np.uint8, new[names[0]]),
                np.array(new[names[1]], order="C"),
                unsigned=slot in storage.unsigned,
            )
        elif isinstance(new.get(slot), np.ndarray):
            values = new[slot]
        else:
            continue
        for name in (slot, *names):
            new.pop(name, None)
        new |= stored(storage, param, slot, values.astype(storage.arithmetic, copy=False))
    masters = {name: new.pop(name) for name in _MASTERS.values() if name in new}
    if value is None:  # the parameter is not loaded: a master that was not saved begins with it
        if storage.master in masters:
            new[storage.master] = masters[storage.master]
        elif storage.master:
            new |= stored_weights(storage, param, weights(storage, param, {}))[1]
        return new, None
    if not isinstance(value, np.ndarray) or value.dtype == np.float64 or value.shape != param.shape:
        return new | masters, value
    if value.dtype != np.float32:
        master = masters.get(_MASTERS.get(value.dtype.name, ""))
        value = _core.decode(np.ascontiguousarray(value), master)
    value, beside = stored_weights(storage, param, value)
    return new | beside, value


def _has(array: Any, dtype: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype == dtype


def _fits(storage: Storage, param: Array, state: Mapping[str, Any], slot: str) -> bool:
    return all(_has(state.get(n), storage.form(param, n)[0]) for n in storage.arrays(slot))
