"""What is set once for a whole optimizer, and not for each group of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, TypeVar

from fastopt._decay import NoDecay
from fastopt._options import choice, count, flag, real, seed_number
from fastopt.threads import checked_threads

SEMANTICS = ("torch", "keras")
NONFINITE = ("propagate", "skip", "raise")
CLIPS = ("clip_value", "clip_norm", "global_clip_norm")
STATE_DTYPES = ("float32", "bfloat16", "8bit")
ROWS = ("lazy", "exact")


class Options(TypedDict, total=False):
    """What every constructor takes besides the hyperparameters, by name."""

    semantics: str
    clip_value: float | None
    clip_norm: float | None
    global_clip_norm: float | None
    nonfinite: str
    ema_decay: float | None
    accumulate: int
    no_decay: NoDecay | None
    master_weights: bool | None
    state_dtype: str | None
    stochastic_rounding: bool | None
    seed: int
    rows: str
    num_threads: int | None


class Settings(NamedTuple):
    """Options that have been checked."""

    semantics: str
    clip: str  # one of CLIPS, or ""
    clip_limit: float
    nonfinite: str
    ema_decay: float | None
    accumulate: int
    no_decay: NoDecay | None
    master_weights: bool
    state_dtype: str | None
    stochastic_rounding: bool
    seed: int
    rows: str
    num_threads: int | None


def checked_settings(
    *,
    semantics: str = "torch",
    clip_value: float | None = None,
    clip_norm: float | None = None,
    global_clip_norm: float | None = None,
    nonfinite: str = "propagate",
    ema_decay: float | None = None,
    accumulate: int = 1,
    no_decay: NoDecay | None = None,
    master_weights: bool | None = None,
    state_dtype: str | None = None,
    stochastic_rounding: bool | None = None,
    seed: int = 0,
    rows: str = "lazy",
    num_threads: int | None = None,
) -> Settings:
    """Check options, all but ``no_decay``, which is checked against the parameters."""
    choice("semantics", semantics, SEMANTICS)
    choice("nonfinite", nonfinite, NONFINITE)
    given: dict[str, Any] = dict(zip(CLIPS, (clip_value, clip_norm, global_clip_norm), strict=True))
    clips = {
        name: real(name, limit, above=0.0) for name, limit in given.items() if limit is not None
    }
    if len(clips) > 1:
        raise ValueError(f"at most one of {', '.join(CLIPS)} may be set, got {clips}")
    if choice("rows", rows, ROWS) == "exact" and ema_decay is not None:
        raise ValueError(
            'rows="exact" with ema_decay: an average of rows that catch up later is not supported; '
            'use rows="lazy"'
        )
    ((clip, clip_limit),) = clips.items() or (("", 0.0),)
    return Settings(
        semantics,
        clip,
        clip_limit,
        nonfinite,
        None if ema_decay is None else real("ema_decay", ema_decay, high=1.0),
        count("accumulate", accumulate),
        no_decay,
        master_weights is None or bool(flag("master_weights", master_weights)),
        None if state_dtype is None else choice("state_dtype", state_dtype, STATE_DTYPES),
        stochastic_rounding is None or bool(flag("stochastic_rounding", stochastic_rounding)),
        seed_number("seed", seed),
        rows,
        None if num_threads is None else checked_threads(num_threads, "num_threads"),
    )


Constructor = TypeVar("Constructor", bound=Callable[..., None])


def takes_options(constructor: Constructor) -> Constructor:
    """Show in the signature of a constructor what its ``**options`` stand for, with defaults."""
    signature = inspect.signature(constructor)
    *own, _ = signature.parameters.values()
    semantics, *shared = inspect.signature(checked_settings).parameters.values()
    by_name = [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
    parameters = [*own[: len(own) - len(by_name)], semantics, *by_name, *shared]
    vars(constructor)["__signature__"] = signature.replace(parameters=parameters)
    return constructor


def refuse_unknown(options: Options, owner: str) -> None:
    """Raise what Python raises for an argument that a constructor does not have."""
    for name in options:
        if name not in Options.__annotations__:
            raise TypeError(f"{owner}.__init__() got an unexpected keyword argument {name!r}")
