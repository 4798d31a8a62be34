"""How parameters are stored in a framework, which has storage of its own: its way, or as asked for.

A framework keeps no master weights, rounds to nearest, and has state of the parameter's type.
"""

from __future__ import annotations

from typing import NamedTuple

from fastopt import _core
from fastopt._options import choice, flag, seed_number
from fastopt._settings import STATE_DTYPES
from fastopt._storage import MASTERS, Storage

NARROW = ("bfloat16", "float16")
LEAN = ("float32", *NARROW)  # types of parameters whose state may be stored otherwise


class Options(NamedTuple):
    """What frameworks' own optimizers do not have; the defaults are what they do."""

    master_weights: bool = False
    state_dtype: str | None = None
    stochastic_rounding: bool = False
    seed: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self._asdict().items() if v)


def checked_options(
    master_weights: bool | None,
    state_dtype: str | None,
    stochastic_rounding: bool | None,
    seed: int,
) -> Options:
    state = None if state_dtype is None else choice("state_dtype", state_dtype, STATE_DTYPES)
    if stochastic_rounding is None:
        stochastic_rounding = state in ("bfloat16", "8bit")  # whoever asks for these wants it right
    return Options(
        bool(master_weights is not None and flag("master_weights", master_weights)),
        state,
        bool(flag("stochastic_rounding", stochastic_rounding)),
        seed_number("seed", seed),
    )


def storage_for(rule: _core.Rule, options: Options, dtype: str) -> Storage:
    """Return how a parameter of a dtype and its state are stored; dtypes are names."""
    master = MASTERS[dtype] if options.master_weights and dtype in NARROW else ""
    state = options.state_dtype if dtype in LEAN else None
    exact = rule.exact
    if state is None:
        state = "float32" if master else dtype
        exact = rule.exact if options.stochastic_rounding else ()
    arithmetic = "float64" if dtype == "float64" else "float32"
    return Storage(
        rule.slots, rule.unsigned, exact, (), rule.numbers, dtype, arithmetic, master, state
    )


def form_of(storage: Storage, slot: str) -> str:
    """Return the dtype of what has a slot's values, or their codes."""
    if storage.in_8bit(slot):
        return "uint8"
    return str(storage.arithmetic) if slot in storage.exact else storage.state


def rounds_at_random(storage: Storage, options: Options) -> bool:
    return options.stochastic_rounding and (
        storage.state in ("8bit", *NARROW) or (storage.param in NARROW and not storage.master)
    )


def is_frameworks(storage: Storage, options: Options) -> bool:
    """Tell whether a framework's own update stores a parameter and its state in the same way."""
    return (
        not storage.master
        and not rounds_at_random(storage, options)
        and all(
            form_of(storage, slot) == storage.param
            for slot in storage.slots
            if slot not in storage.numbers
        )
    )
