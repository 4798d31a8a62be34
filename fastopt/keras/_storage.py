"""How an optimizer stores what Keras has no storage for.

What Keras has keeps its variables, in another type if it is asked for. The rest are variables of
the optimizer, too, so that files have them:

=====================  ==========  =================================================================
name ends with         dtype       what it is
=====================  ==========  =================================================================
``velocity_8bit``      uint8       codes of ``velocity`` (and so on), in the variable's shape
``velocity_scale``     uint8       their scales, one for 64 elements in memory order
``master_bits``        int16       what a bfloat16 variable lacks of its float32 weight
``master``             float32     the float32 weight of a float16 variable
=====================  ==========  =================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from fastopt import _core, _framework
from fastopt._bfloat16 import bfloat16
from fastopt._framework import LEAN, NARROW, Options, is_frameworks
from fastopt._storage import Storage, stored
from fastopt.keras._step import Array

_CODES = ("uint8", "int16")  # types that values of another type cannot be cast to


class Stored:
    """An optimizer's options, and the variables that belong to others of its variables.

    Keras would track lists and dicts that are attributes of its own objects.
    """

    def __init__(self, options: Options, given: Mapping[str, Any]) -> None:
        self.options = options
        self.given = given  # the options that an optimizer's configuration has
        self.masters: dict[int, Any] = {}  # by the index of the variable
        self.scales: dict[int, Any] = {}  # by the id of the variable with the codes

    @property
    def asked(self) -> bool:
        """Tell whether anything may be stored otherwise than Keras does."""
        return self.options != Options(seed=self.options.seed)

    def of(self, rule: _core.Rule, variable: Any) -> Storage:
        return _framework.storage_for(rule, self.options, dtype_of(variable))

    def is_keras(self, rule: _core.Rule, variable: Any) -> bool:
        """Tell whether Keras's own update stores a variable and its state in the same way."""
        return not self.asked or is_frameworks(self.of(rule, variable), self.options)


def dtype_of(variable: Any) -> str:
    return str(keras.backend.standardize_dtype(variable.dtype))


def refuse_types(options: Options, variables: Sequence[Any]) -> None:
    """Raise for variables whose state the options cannot be about."""
    for variable in variables if options.state_dtype is not None else ():
        if dtype_of(variable) not in LEAN:
            raise TypeError(
                f"state_dtype={options.state_dtype!r} is for variables of float32, bfloat16 and "
                f"float16, {name_of(variable)} is {dtype_of(variable)}"
            )


def name_of(variable: Any) -> str:
    return str(variable.path if isinstance(variable, keras.Variable) else variable.name)


def name_for(variable: Any, name: str) -> str:
    """Return what Keras calls an optimizer's variable that belongs to one of a model."""
    return f"{name_of(variable).replace('/', '_').replace(':', '_')}_{name}"


def codes_of(storage: Storage, slot: str, shape: tuple[int, ...], value: float) -> list[Array]:
    """Return codes, and scales, of a slot that has one value everywhere."""
    values = np.full(shape, value, np.float32)
    as_array = storage._replace(arithmetic=np.dtype(np.float32))
    return [*stored(as_array, values, slot, values).values()]


def count_scales(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // _core.SCALED)


def values_of(unsigned: bool, variable: Any, scales: Any, master: Any = None) -> Array:
    """Return what variables store, in float32, or in float64 where they do; a copy."""
    dtype = dtype_of(variable)
    if dtype in NARROW:  # Keras cannot make an array of a scalar of these on TensorFlow
        variable = keras.ops.cast(variable, "float32")
    array = np.array(keras.ops.convert_to_numpy(variable))
    if scales is not None:
        return _core.decode(array, keras.ops.convert_to_numpy(scales), unsigned=unsigned)
    if master is not None:
        beside = np.array(keras.ops.convert_to_numpy(master))
        if dtype == "bfloat16":
            return _core.decode(array.astype(bfloat16()), beside.view(np.uint16))
        return _core.decode(array.astype(np.float16), beside)
    return array.astype(np.float64 if dtype == "float64" else np.float32)


def refuse_unlike(
    asked: bool, variables: Sequence[Any], counters: Sequence[Any], store: Mapping[str, Any]
) -> None:
    """Raise for saved variables of another storage, some of which Keras would cast or skip.

    `counters` are those of `variables` that are no state: backends differ in their types.
    """
    keys = [str(i) for i in range(len(store.keys()))]
    saved = [(str(store[key].dtype), tuple(store[key].shape)) for key in keys if key in store]
    if not asked and not any(dtype in _CODES for dtype, _ in saved):
        return
    cure = "make the optimizer with the state_dtype and master_weights of the saved one"
    if len(saved) != len(variables):
        raise ValueError(
            f"the saved optimizer has {len(saved)} variables, this one {len(variables)}; {cure}"
        )
    for (dtype, shape), variable in zip(saved, variables, strict=True):
        own = dtype_of(variable), tuple(variable.shape)
        if shape != own[1] or (dtype != own[0] and not any(variable is c for c in counters)):
            raise ValueError(
                f"{name_of(variable)} is {own[0]} of shape {own[1]}, the saved one {dtype} of "
                f"shape {shape}; {cure}"
            )
