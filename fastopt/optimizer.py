"""What all optimizers share: parameter groups, state, the step, and the state dict.

A subclass says which rule of the C core it is, what its hyperparameters are and what their ranges
are. All mathematics is in ``src_c/rules``; all checks of arrays are in ``_core``.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from fastopt import _core
from fastopt._options import choice, flag, real
from fastopt.threads import checked_threads

Array = NDArray[Any]
LearningRate = float | Callable[[int], float]

_SEMANTICS = ("torch", "keras")
_NONFINITE = ("propagate", "skip", "raise")
_CLIPS = ("clip_value", "clip_norm", "global_clip_norm")


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


class Optimizer:
    """Base class of the optimizers; not for direct use."""

    _rule: ClassVar[_core.Rule]
    # How each hyperparameter of a group is checked. All values are floats to the C core.
    _checks: ClassVar[dict[str, Callable[[str, Any], float]]] = {
        "lr": real,
        "weight_decay": real,
        "maximize": flag,
        "decoupled_weight_decay": flag,
    }

    param_groups: list[dict[str, Any]]

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        semantics: str,
        clip_value: float | None,
        clip_norm: float | None,
        global_clip_norm: float | None,
        nonfinite: str,
        ema_decay: float | None,
        num_threads: int | None,
    ) -> None:
        self._semantics = choice("semantics", semantics, _SEMANTICS)
        self._nonfinite = choice("nonfinite", nonfinite, _NONFINITE)
        limits = dict(zip(_CLIPS, (clip_value, clip_norm, global_clip_norm), strict=True))
        self._clips = {
            name: real(name, limit, above=0.0)
            for name, limit in limits.items()
            if limit is not None
        }
        if len(self._clips) > 1:
            raise ValueError(f"at most one of {', '.join(_CLIPS)} may be set, got {self._clips}")
        self._ema_decay = None if ema_decay is None else real("ema_decay", ema_decay)
        if self._ema_decay is not None and self._ema_decay > 1:
            raise ValueError(f"ema_decay must be between 0 and 1, got {ema_decay!r}")
        self._num_threads = (
            None if num_threads is None else checked_threads(num_threads, "num_threads")
        )
        self._defaults = defaults
        self._checked(defaults, "", evaluate_lr=False)

        self.param_groups = []
        self._params: list[Array] = []
        self._keys: list[Any] = []
        self._named = False
        self._group_of: list[int] = []
        self._state: list[ParameterState] = []
        self._ema: list[Array] | None = None if self._ema_decay is None else []
        self._lock = threading.RLock()
        self._extend(_as_groups(params), completed_steps=0)
        _live.add(self)

    # ---- parameters and groups ------------------------------------------------------------------

    @property
    def params(self) -> list[Array]:
        """The parameters of all groups, in order."""
        return list(self._params)

    @property
    def state(self) -> list[ParameterState]:
        """Each parameter's state: arrays under PyTorch's names, and ``step``, a 0-d int64 array."""
        return list(self._state)

    @property
    def ema(self) -> list[Array] | None:
        """The moving averages of the parameters, in order; None without ``ema_decay``."""
        return None if self._ema is None else list(self._ema)

    @property
    def completed_steps(self) -> int:
        """How many calls of :meth:`step` updated something (were not skipped)."""
        return self._plan.completed_steps

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add parameters, with hyperparameters of their own.

        Parameters
        ----------
        group : dict
            ``"params"``, given as to the constructor, and any of the hyperparameters; the
            constructor's values stand for the others.
        """
        with self._lock:
            if not isinstance(group, dict):
                raise TypeError(f"a parameter group must be a dict, got {type(group).__name__}")
            self._refresh()
            self._extend([group], self.completed_steps)

    def _extend(self, groups: list[dict[str, Any]], completed_steps: int) -> None:
        """Check and add groups; nothing has changed if this raises."""
        n_before = len(self.param_groups)
        new_groups: list[dict[str, Any]] = []
        params: list[Array] = []
        keys: list[Any] = []
        group_of: list[int] = []
        states: list[ParameterState] = []
        named = set()
        for number, given in enumerate(groups, n_before):
            if "params" not in given:
                raise ValueError(f"param_groups[{number}] has no 'params'")
            names, arrays = _as_params(given["params"])
            named.add(names is not None)
            first = len(self._params) + len(params)
            group = {"params": tuple(arrays), **self._defaults}
            group.update({name: value for name, value in given.items() if name != "params"})
            keys += names if names is not None else range(first, first + len(arrays))
            params += arrays
            group_of += [number] * len(arrays)
            new_groups.append(group)
        if len(named | ({self._named} if self._params else set())) > 1:
            raise ValueError("either all parameter groups name their parameters (a dict) or none")
        if not self._params and not params:
            raise ValueError("no parameters: expected at least one array")
        twice = [key for key, count in Counter(self._keys + keys).items() if count > 1]
        if twice:
            raise ValueError(f"parameter names occur twice: {twice}")

        all_params, all_keys = self._params + params, self._keys + keys
        for key, param in zip(all_keys, all_params, strict=True):
            _core.check_parameter(param, _label(key))
        rows = [
            self._row(self._checked(group, f"param_groups[{number}]: "))
            for number, group in enumerate(new_groups, n_before)
        ]
        for param, number in zip(params, group_of, strict=True):
            used = self._rule.used_slots(rows[number - n_before])
            fill = self._initial(new_groups[number - n_before])
            states.append(_new_state(param, used, fill))
        ema = None if self._ema is None else self._ema + [_copy_like(p) for p in params]
        state = self._state + states
        plan = self._make_plan(
            all_params, all_keys, self._group_of + group_of, state, ema, completed_steps
        )
        for number, row in enumerate(rows, n_before):
            plan.set_hypers(number, row)
        if n_before:
            for number, group in enumerate(self.param_groups):
                plan.set_hypers(number, self._row(self._checked(group, "")))

        self._params, self._keys, self._state, self._ema = all_params, all_keys, state, ema
        self._named = True in named or self._named
        self._group_of = self._group_of + group_of
        self._group_params = [
            *(group["params"] for group in self.param_groups),
            *(group["params"] for group in new_groups),
        ]
        self.param_groups = self.param_groups + new_groups
        self._plan = plan
        self._remember_groups()

    def _make_plan(
        self,
        params: list[Array],
        keys: list[Any],
        group_of: list[int],
        state: Sequence[Mapping[str, Array]],
        ema: list[Array] | None,
        completed_steps: int,
    ) -> _core.Plan:
        ((clip, limit),) = self._clips.items() or (("", 0.0),)
        return _core.Plan(
            self._rule,
            params,
            [tuple(s.get(name) for name in self._rule.slots) for s in state],
            ema,
            [s["step"] for s in state],
            group_of,
            [_label(key) for key in keys],
            semantics=_SEMANTICS.index(self._semantics),
            clip=("", *_CLIPS).index(clip),
            clip_limit=limit,
            nonfinite=_NONFINITE.index(self._nonfinite),
            ema_decay=self._ema_decay or 0.0,
            num_threads=self._num_threads or 0,
            completed_steps=completed_steps,
        )

    # ---- hyperparameters ------------------------------------------------------------------------

    def _checked(
        self, group: Mapping[str, Any], where: str, *, evaluate_lr: bool = True
    ) -> dict[str, float]:
        """Check a group's hyperparameters; return their values as the rule takes them."""
        unknown = group.keys() - self._defaults.keys() - {"params"}
        missing = self._defaults.keys() - group.keys()
        if unknown or missing:
            raise ValueError(
                f"{where}unknown options {sorted(map(str, unknown))}, missing {sorted(missing)}; "
                f"{type(self).__name__} has {sorted(self._defaults)}"
            )
        values = {}
        for name, check in self._checks.items():
            value = group[name]
            if name == "lr" and callable(value):
                if not evaluate_lr:
                    continue
                steps = self._plan.completed_steps if hasattr(self, "_plan") else 0
                value = value(steps)
                if getattr(value, "shape", None) == () and hasattr(value, "item"):
                    value = value.item()  # schedules of array libraries return 0-d arrays
                name = f"lr({steps})"
                values["lr"] = check(f"{where}{name}", value)
                continue
            values[name] = check(f"{where}{name}", value)
        self._check_together(values, where)
        return values

    def _check_together(self, values: dict[str, float], where: str) -> None:
        """Check what concerns several hyperparameters; for subclasses."""

    def _row(self, values: Mapping[str, float]) -> list[float]:
        return [values[name] for name in self._rule.hypers]

    def _initial(self, group: Mapping[str, Any]) -> Mapping[str, float]:
        """Return the initial values of slots that do not start at zero; for subclasses."""
        return {}

    def _remember_groups(self) -> None:
        for group in self.param_groups:  # what has been checked must not change unseen
            group.update((k, tuple(v)) for k, v in group.items() if isinstance(v, list))
        self._seen = [(tuple(group), tuple(group.values())) for group in self.param_groups]
        self._lr_is_called = any(callable(group["lr"]) for group in self.param_groups)

    def _refresh(self) -> None:
        """Take over what has changed in ``param_groups``, after checking all of it."""
        groups = self.param_groups
        if not isinstance(groups, list) or len(groups) != len(self._group_params):
            raise ValueError(
                "param_groups was replaced, or its length changed; use add_param_group"
            )
        rows = []
        for number, (group, params) in enumerate(zip(groups, self._group_params, strict=True)):
            where = f"param_groups[{number}]: "
            if not isinstance(group, dict) or group.get("params") is not params:
                raise ValueError(f"{where}its parameters were replaced; use add_param_group")
            rows.append(self._row(self._checked(group, where)))
        used = [self._rule.used_slots(row) for row in rows]
        self._add_missing_slots([used[number] for number in self._group_of])
        for number, row in enumerate(rows):
            self._plan.set_hypers(number, row)
        self._remember_groups()

    def _add_missing_slots(self, used: Sequence[Iterable[str]]) -> None:
        """Make parameters' slots: momentum, centered or amsgrad may have been switched on."""
        state = list(self._state)
        for i, names in enumerate(used):
            if not state[i].keys() >= set(names):
                fill = self._initial(self.param_groups[self._group_of[i]])
                new = _new_state(self._params[i], names, fill)
                state[i] = ParameterState(dict(new) | dict(state[i]))
        if any(new is not old for new, old in zip(state, self._state, strict=True)):
            self._plan = self._make_plan(
                self._params, self._keys, self._group_of, state, self._ema, self.completed_steps
            )
            self._state = state

    # ---- the step -------------------------------------------------------------------------------

    def step(
        self,
        grads: Sequence[Array | None] | Mapping[Any, Array | None] | Iterable[Array | None],
        *,
        loss_scale: float = 1.0,
        zero_grad: bool = False,
    ) -> _core.StepResult:
        """Update all parameters in place, or raise and leave everything as it was.

        Parameters
        ----------
        grads : list, tuple, iterable or dict of numpy.ndarray or None
            The gradients, structured as the parameters were given: in the order of ``params``, or
            a dict with the same keys. Each has its parameter's shape and dtype; None leaves its
            parameter out of this step.
        loss_scale : float, optional
            The gradients are divided by it first.
        zero_grad : bool, optional
            Whether to zero the gradients, in place, at the end.

        Returns
        -------
        StepResult
            With attributes ``grad_norm`` (None where no norm was needed), ``skipped`` and
            ``threads``.

        Raises
        ------
        TypeError
            If a gradient is not an array, or not of its parameter's dtype.
        ValueError
            If the structure or a shape differs, memory overlaps, or a hyperparameter is out of
            range.
        FloatingPointError
            If a gradient holds a NaN or an infinity, with ``nonfinite="raise"``.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> w = np.ones(3)
        >>> opt = fastopt.SGD([w], lr=0.5)
        >>> opt.step([np.array([1.0, 2.0, 4.0])])
        StepResult(grad_norm=None, skipped=False, threads=1)
        >>> w
        array([ 0.5,  0. , -1. ])
        """
        with self._lock:
            if self._lr_is_called or not _core.unchanged(self.param_groups, self._seen):
                self._refresh()
            if type(grads) is not list or self._named:
                grads = self._in_order(grads)
            if type(loss_scale) is not float or loss_scale != 1.0:
                loss_scale = real("loss_scale", loss_scale, above=0.0)
                if loss_scale == float("inf"):
                    raise ValueError("loss_scale must be finite, got inf")
            if zero_grad is not False:
                zero_grad = bool(flag("zero_grad", zero_grad))
            return self._plan.step(grads, loss_scale, zero_grad)

    def _in_order(self, grads: Any) -> Sequence[Array | None]:
        """Return the gradients in the order of the parameters, having checked the structure."""
        if self._named != isinstance(grads, Mapping):
            expected = "a dict with the parameters' keys" if self._named else "a list or tuple"
            raise TypeError(f"grads must be {expected}, got {type(grads).__name__}")
        if self._named:
            missing = [key for key in self._keys if key not in grads]
            known = set(self._keys)
            unexpected = [key for key in grads if key not in known]
            if missing or unexpected:
                raise ValueError(f"grads: missing keys {missing}, unexpected keys {unexpected}")
            return [grads[key] for key in self._keys]
        if isinstance(grads, (np.ndarray, np.generic, str, set, frozenset)):
            raise TypeError(f"grads must be a list or tuple, got {type(grads).__name__}")
        try:
            return list(grads)
        except TypeError:
            if hasattr(grads, "__iter__"):
                raise
            raise TypeError(f"grads must be a list or tuple, got {type(grads).__name__}") from None

    def reset(self) -> None:
        """Put state, counters and averages back to where they began; parameters stay."""
        with self._lock:
            self._refresh()
            self._plan.check()
            for param_state, number in zip(self._state, self._group_of, strict=True):
                fill = self._initial(self.param_groups[number])
                for name, array in param_state.items():
                    array[...] = fill.get(name, 0)
            for average, param in zip(self._ema or (), self._params, strict=False):
                average[...] = param
            self._plan.completed_steps = 0

    # ---- state dict, copies ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything but the parameters that a later run needs to go on.

        Returns
        -------
        dict
            ``state`` and ``ema``, dicts by parameter key (its name, or its index);
            ``param_groups``, with the keys of their parameters in place of the arrays;
            ``completed_steps``, ``rule`` and ``semantics``. A learning rate that is a callable is
            left out.
        """
        with self._lock:
            groups, first = [], 0
            for group in self.param_groups:
                saved = {
                    name: tuple(value) if isinstance(value, list) else value
                    for name, value in group.items()
                    if name != "params"
                }
                if callable(saved["lr"]):
                    del saved["lr"]
                last = first + len(group["params"])
                groups.append({**saved, "params": self._keys[first:last]})
                first = last
            return {
                "rule": self._rule.name,
                "semantics": self._semantics,
                "completed_steps": self.completed_steps,
                "param_groups": groups,
                "state": {
                    key: {name: array.copy(order="K") for name, array in param_state.items()}
                    for key, param_state in zip(self._keys, self._state, strict=True)
                },
                "ema": None
                if self._ema is None
                else {
                    key: array.copy(order="K")
                    for key, array in zip(self._keys, self._ema, strict=True)
                },
            }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, after checking all of it.

        Parameters
        ----------
        state_dict : dict
            From an optimizer of the same rule and semantics, over parameters of the same keys,
            shapes and dtypes. It is copied.

        Raises
        ------
        TypeError, ValueError
            If anything does not fit; the message says which entry, and nothing is changed.
        """
        from fastopt._state_dict import verified

        with self._lock:
            groups, state, ema = verified(self, state_dict)
            before = [dict(group) for group in self.param_groups]
            try:
                for group, options in zip(self.param_groups, groups, strict=True):
                    group.update(options)
                self._refresh()
                self._add_missing_slots([loaded.keys() - {"step"} for loaded in state])
                self._plan.check()
            except BaseException:
                for group, options in zip(self.param_groups, before, strict=True):
                    group.clear()
                    group.update(options)
                raise
            for own, loaded in zip(self._state, state, strict=True):
                for name, array in own.items():
                    array[...] = loaded.get(name, 0)
            for average, values in zip(self._ema or (), ema, strict=False):
                average[...] = values
            self._plan.completed_steps = int(state_dict["completed_steps"])

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            kept = {
                name: value
                for name, value in self.__dict__.items()
                if name not in ("_plan", "_lock", "_seen", "_lr_is_called", "_group_params")
            }
            kept["_state"] = [dict(param_state) for param_state in self._state]
            kept["completed_steps"] = self.completed_steps
            return kept

    def __setstate__(self, kept: dict[str, Any]) -> None:
        completed_steps = kept.pop("completed_steps")
        self.__dict__.update(kept)
        self._lock = threading.RLock()
        self._state = [ParameterState(param_state) for param_state in self._state]
        self._group_params = [group["params"] for group in self.param_groups]
        self._plan = self._make_plan(
            self._params, self._keys, self._group_of, self._state, self._ema, completed_steps
        )
        self._refresh()
        _live.add(self)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}("]
        for number, group in enumerate(self.param_groups):
            options = ", ".join(f"{k}={v!r}" for k, v in group.items() if k != "params")
            lines.append(f"  group {number}: {len(group['params'])} parameters, {options}")
        return "\n".join([*lines, ")"])


# ---- parameters as given ------------------------------------------------------------------------


def _as_groups(params: Any) -> list[dict[str, Any]]:
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


def _as_params(given: Any) -> tuple[list[Any] | None, list[Any]]:
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


def _label(key: Any) -> str:
    return f"parameter {key!r}"


def _copy_like(param: Array) -> Array:
    return np.array(param, order="K", subok=False, copy=True)


def _new_state(param: Array, names: Iterable[str], fill: Mapping[str, float]) -> ParameterState:
    param = np.asarray(param)  # a subclass may have ideas of its own
    state: dict[str, Array] = {"step": np.zeros((), np.int64)}
    for name in names:
        state[name] = np.zeros_like(param, order="K", subok=False)
        if name in fill:
            state[name][...] = fill[name]
    return ParameterState(state)


# ---- after a fork, no thread is left that could release a lock -----------------------------------

_live: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _renew_locks() -> None:
    for optimizer in _live:
        optimizer._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
