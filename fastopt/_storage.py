"""How a parameter and its state are stored, in float32 or in fewer bits.

Arithmetic is in float32 (in float64 for a float64 parameter). What is stored otherwise has arrays
under names of their own in the parameter's state:

====================  =====================================  ======================================
what                  arrays                                 types, shapes
====================  =====================================  ======================================
a slot                its name                               float32, float64 or bfloat16
a slot in 8 bits      ``<name>_8bit`` and ``<name>_scale``   uint8, the parameter's shape; and
                                                             uint8, one for each 64 elements
a slot by row         its name                               float32 or float64, one for each
                                                             index of the first axis
a number of a rule    its name                               float64, 0-d
what bfloat16 lacks   ``master_bits``                        uint16, the parameter's shape
the float16 weight    ``master``                             float32, the parameter's shape
====================  =====================================  ======================================
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt import _core
from fastopt._bfloat16 import bfloat16
from fastopt._memory import Array, copy_like, laid_out, long_axes, zeros_like
from fastopt._settings import Settings


class Storage(NamedTuple):
    """How one parameter and its state are stored."""

    slots: tuple[str, ...]  # all of the rule's
    unsigned: tuple[str, ...]  # those that are never negative
    exact: tuple[str, ...]  # those that are never stored in fewer bits
    by_row: tuple[str, ...]  # of these, those with one value for each row
    numbers: tuple[str, ...]  # those that are one number each
    param: Any  # the parameter's dtype
    arithmetic: Any  # the dtype that rules compute in
    master: str  # the name of what is beside the parameter, or ""
    state: str  # "8bit", or the name of the dtype of all slots but the exact ones

    def __deepcopy__(self, memo: dict[int, Any] | None) -> Storage:
        return self  # nothing of it changes (and a dtype copied out of memory: no MemoryError)

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
        if name in self.numbers:
            return np.dtype(np.float64), ()
        if name in MASTERS.values():
            return np.dtype(np.uint16 if name == "master_bits" else np.float32), param.shape
        if name in self.by_row:
            return self.arithmetic, param.shape[:1]
        slot = name.removesuffix("_scale")
        if slot != name and self.in_8bit(slot):
            return np.dtype(np.uint8), (-(-param.size // _core.SCALED),)
        if self.in_8bit(name.removesuffix("_8bit")):
            return np.dtype(np.uint8), param.shape
        if self.state == "bfloat16" and name not in self.exact:
            return bfloat16(), param.shape
        return self.arithmetic, param.shape

    def nbytes(self, param: Array, slots: Collection[str], averaged: bool) -> int:
        """Return the bytes of all that goes with a parameter, but its numbers."""
        names = set(self.names(slots)) - {"step", *self.numbers}
        forms = [self.form(param, name) for name in names]
        forms += [(self.arithmetic, param.shape)] if averaged else []
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in forms)

    def zeros(self, param: Array, name: str) -> Array:
        """Return a new array of this name."""
        dtype, shape = self.form(param, name)
        if name == "step" or name in self.by_row or shape != param.shape:
            return np.zeros(shape, dtype)
        return zeros_like(param, dtype)

    @property
    def can_round(self) -> bool:
        """Tell whether a step may round anything, if only slots that are not in use yet."""
        own = self.param != self.arithmetic and not self.master
        return own or self.state not in ("float32", "float64")


MASTERS = {"bfloat16": "master_bits", "float16": "master"}

# The dtypes of parameters of which each is converted into each; slots are not of float16.
CONVERTED = ("float32", "bfloat16", "float16")


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
    master = MASTERS.get(dtype.name, "") if settings.master_weights else ""
    arithmetic = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    if state == "bfloat16":
        bfloat16()
    return Storage(
        rule.slots,
        rule.unsigned,
        rule.exact,
        rule.by_row,
        rule.numbers,
        dtype,
        arithmetic,
        master,
        state,
    )


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
    codes, *scales = arrays.values()
    if codes.dtype == storage.arithmetic:
        np.copyto(codes, values)
    else:
        beside = scales[0] if scales else None
        placed = copy_like(param, np.float32, values)
        _core.encode(placed, codes, beside, unsigned=slot in storage.unsigned)
    return arrays


def values_of(storage: Storage, state: Mapping[str, Array], slot: str) -> Array:
    """Return a slot's values in what rules compute in: a copy."""
    if storage.in_8bit(slot):
        codes, scales = (state[name] for name in storage.arrays(slot))
        return _core.decode(codes, scales, unsigned=slot in storage.unsigned)
    dtype = state[slot].dtype if slot in storage.numbers else storage.arithmetic
    return np.array(state[slot], dtype, order="K", subok=False)


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
    storage: Storage, param: Array, saved: Mapping[str, Any], value: Any, order: Sequence[int]
) -> tuple[dict[str, Any], Any]:
    """Return a parameter's saved state, and its saved value (or None), as they are stored here.

    `order` has the axes of the parameter that was saved, as `long_axes` returns them. What cannot
    be converted, and what need not be, is left as it is: others check it.
    """
    new = dict(saved)
    if storage.arithmetic != np.float32:
        return new, value
    for slot in storage.slots:
        values = _saved_values(storage, param, saved, slot, order)
        if values is not None:
            for name in all_arrays(slot):
                new.pop(name, None)
            new |= stored(storage, param, slot, values)
    masters = {name: new[name] for name in MASTERS.values() if name in new}
    if not all(_is(array, storage.form(param, name)) for name, array in masters.items()):
        return new, value
    rest = {name: array for name, array in new.items() if name not in masters}
    if value is None:  # the parameter is not loaded: a master that was not saved begins with it
        if len(masters) > 1 or storage.master in masters:
            return new, value
        return rest | stored_weights(storage, param, weights(storage, param, {}))[1], value
    if not any(_is(value, (dtype, param.shape)) for dtype in CONVERTED):
        return new, value
    saved_master = MASTERS.get(value.dtype.name, "")
    same = value.dtype == param.dtype and masters.keys() == {storage.master} - {""}
    if same or not masters.keys() <= {saved_master}:
        return new, value
    value = np.array(value, order="C")
    if value.dtype != np.float32:
        master = masters.get(saved_master)
        value = _core.decode(value, None if master is None else np.array(master, order="C"))
    value, beside = stored_weights(storage, param, value)
    return rest | beside, value


def stored_otherwise(storage: Storage) -> set[str]:
    """Return names that arrays have where a parameter is stored in another way than here."""
    if storage.arithmetic != np.float32:
        return set()
    names = {*MASTERS.values()} - {storage.master}
    for slot in storage.slots:
        names |= {*all_arrays(slot)} - {*storage.arrays(slot)}
    return names


def all_arrays(slot: str) -> tuple[str, ...]:
    """Return what a slot's arrays are called, whatever it is stored in."""
    return slot, f"{slot}_8bit", f"{slot}_scale"


def _saved_values(
    storage: Storage, param: Array, saved: Mapping[str, Any], slot: str, order: Sequence[int]
) -> Array | None:
    """Return a saved slot in float32; None if it is stored as here, or is nothing to convert."""
    whole, *pair = all_arrays(slot)
    found = [name for name in (whole, *pair) if name in saved]
    if found == [whole]:
        array, (own_dtype, _) = saved[whole], storage.form(param, whole)
        if not any(_is(array, (dtype, param.shape)) for dtype in ("float32", "bfloat16")):
            return None
        if not storage.in_8bit(slot) and array.dtype == own_dtype:
            return None
        return np.asarray(array).astype(np.float32)
    in_8bit = storage._replace(state="8bit")
    if found != pair or not all(_is(saved[name], in_8bit.form(param, name)) for name in pair):
        return None
    if storage.in_8bit(slot) and tuple(order) == long_axes(param):
        return None
    codes, scales = (np.array(saved[name], order="C", subok=False) for name in pair)
    short = [axis for axis in range(param.ndim) if axis not in order]
    placed = laid_out(np.empty(codes.size, np.uint8), codes.shape, [*short, *order])
    placed[...] = codes
    return _core.decode(placed, scales, unsigned=slot in storage.unsigned)


def _is(array: Any, form: tuple[Any, tuple[int, ...]]) -> bool:
    """Tell whether this is an array of a dtype (or a dtype's name) and a shape."""
    dtype, shape = form
    return (
        isinstance(array, np.ndarray)
        and array.dtype.isnative
        and array.dtype.name == str(dtype)
        and array.shape == shape
    )
