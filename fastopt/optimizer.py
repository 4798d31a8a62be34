"""What all optimizers share: parameter groups, state, the step, and the state dict.

A subclass says which rule of the C core it is, what its hyperparameters are and what their ranges
are. All mathematics is in ``src_c/rules``; all checks of arrays are in ``_core``.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn, Self

import numpy as np

from fastopt import _core, _saved
from fastopt._hypers import Check
from fastopt._lenders import Lenders
from fastopt._options import choice, count, flag, frozen, real
from fastopt._params import (
    Array,
    ParameterState,
    as_groups,
    as_params,
    begun,
    check_matched,
    copy_like,
    label,
    lay_out,
    left_out,
    memory_order,
    new_state,
    typed,
    zeros_like,
)
from fastopt._trees import Structure, in_order, is_container, merged
from fastopt.threads import checked_threads

LearningRate = float | Callable[[int], float]
NoDecay = str | Collection[str] | Callable[[Any, Any], bool]

_SEMANTICS = ("torch", "keras")
_NONFINITE = ("propagate", "skip", "raise")
_CLIPS = ("clip_value", "clip_norm", "global_clip_norm")


class Counts(NamedTuple):
    """How far an optimizer is."""

    completed_steps: int = 0
    accumulated_steps: int = 0
    summed: tuple[bool, ...] = ()  # which parameters' sums hold the gradient of a micro-batch
    fresh: tuple[tuple[str, ...], ...] = ()  # each parameter's slots that no step has written yet


class Optimizer:
    """Base class of the optimizers; not for direct use."""

    _rule: ClassVar[_core.Rule]
    # How each hyperparameter of a group is checked. All values are floats to the C core.
    _checks: ClassVar[dict[str, Check]]

    param_groups: list[dict[str, Any]]
    _called: list[int]  # groups whose learning rate is to be called
    _lent: Lenders | None
    _plan: _core.Plan

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
        accumulate: int,
        no_decay: NoDecay | None,
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
        self._ema_decay = None if ema_decay is None else real("ema_decay", ema_decay, high=1.0)
        self._accumulate = count("accumulate", accumulate)
        self._no_decay = no_decay
        self._num_threads = (
            None if num_threads is None else checked_threads(num_threads, "num_threads")
        )
        self._defaults = _of_their_own(defaults)
        self._checked(_without_call(defaults), "", 0)
        self.param_groups = []
        self._rows: list[list[float]] = []
        self._group_params: list[tuple[Any, ...]] = []
        self._lent = None
        self._params: list[Array] = []
        self._keys: list[Any] = []
        self._named = False
        self._structure: Structure | None = None  # of named parameters
        self._group_of: list[int] = []
        self._state: list[ParameterState] = []
        self._left_out: list[bool] = []
        self._ema: list[Array] | None = None if self._ema_decay is None else []
        self._sums: list[Array] | None = None if self._accumulate == 1 else []
        self._lock = _core.Lock()
        self._calling = False
        self._extend(as_groups(params), Counts())
        _live.add(self)

    # ---- parameters and groups ------------------------------------------------------------------

    @property
    def params(self) -> list[Array]:
        """The parameters of all groups, in order, as arrays.

        An array over memory that something else lends is made anew when that memory moves.
        """
        if self._lent is not None:
            with self._lock:  # no step meanwhile
                self._follow()
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

    @property
    def accumulated_steps(self) -> int:
        """How many micro-batches have been summed since the last update, with ``accumulate``."""
        return self._plan.accumulated_steps

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add parameters, with hyperparameters of their own.

        Parameters
        ----------
        group : dict
            ``"params"``, given as to the constructor, and any of the hyperparameters; the
            constructor's values stand for the others.
        """
        with self._lock:
            self._check_not_called("add_param_group()")
            self._check_whole("add_param_group()")
            if not isinstance(group, dict):
                raise TypeError(f"a parameter group must be a dict, got {type(group).__name__}")
            self._refresh()
            self._follow()
            self._extend([group], self._counts())

    def _extend(self, groups: list[dict[str, Any]], counts: Counts) -> None:
        """Check and add groups; nothing has changed if this raises."""
        n_before = len(self.param_groups)
        new_groups: list[dict[str, Any]] = []
        lenders: list[Any] = []
        params: list[Array] = []
        keys: list[Any] = []
        group_of: list[int] = []
        rows: list[list[float]] = []
        states: list[ParameterState] = []
        named = set()
        structure = self._structure
        same: list[tuple[int, int]] = []
        for number, given in enumerate(groups, n_before):
            if "params" not in given:
                raise ValueError(f"param_groups[{number}] has no 'params'")
            options = {**_of_their_own(self._defaults), **given}
            del options["params"]
            # First, since unknown options tell that this was not meant to be a group.
            values = self._checked(options, f"param_groups[{number}]: ", counts.completed_steps)
            rows.append(self._row(values))
            first = len(self._params) + len(params)
            names, own_params, own = as_params(given["params"], first)
            own_keys = names if names is not None else range(first, first + len(own_params))
            named.add(names is not None)
            if own is not None:
                structure = own if structure is None else merged(structure, own, same)
            keys += own_keys
            lenders += own_params
            params += _arrays_over(own_params, own_keys)
            group_of += [number] * len(own_params)
            new_groups.append({"params": tuple(own_params), **options})
        if len(named | ({self._named} if self._params else set())) > 1:
            raise ValueError("either all parameter groups name their parameters (a dict) or none")
        if not self._params and not params:
            raise ValueError("no parameters: expected at least one array")
        twice = [key for key, count in Counter(self._keys + keys).items() if count > 1]
        if twice:
            raise ValueError(f"parameter names occur twice: {twice}")

        all_params, all_keys = self._params + params, self._keys + keys
        if same:  # such as 1 and True, or 1 and 1.0
            one, other = (label(all_keys[i]) for i in same[0])
            raise ValueError(
                f"{one} and {other} of two groups have one and the same key, under which only one "
                "gradient could be given"
            )
        for key, param in zip(all_keys, all_params, strict=True):
            _core.check_parameter(param, label(key))
        for key, lender in zip(keys, lenders, strict=True):
            _core.refuse_unwatched(lender, label(key))
        for param, number in zip(params, group_of, strict=True):
            used = self._rule.used_slots(rows[number - n_before])
            states.append(new_state(param, used, self._initial(new_groups[number - n_before])))

        is_named = True in named or self._named
        without_decay = left_out(self._no_decay, keys, params, is_named)
        if not self._params:
            check_matched(self._no_decay, keys)
        changed: dict[str, Any] = {
            "_params": all_params,
            "_lent": self._lenders(self.param_groups + new_groups, all_params),
            "_keys": all_keys,
            "_named": is_named,
            "_structure": structure,
            "_left_out": self._left_out + without_decay,
            "_group_of": self._group_of + group_of,
            "_group_params": self._group_params + [group["params"] for group in new_groups],
            "_rows": self._rows + rows,
            "_state": self._state + states,
            "_ema": None if self._ema is None else self._ema + [copy_like(p) for p in params],
            "_sums": None if self._sums is None else self._sums + [zeros_like(p) for p in params],
            "param_groups": self.param_groups + new_groups,
        }
        counts = counts._replace(
            summed=counts.summed + (False,) * len(params), fresh=counts.fresh + ((),) * len(params)
        )
        plan = changed["_plan"] = self._make_plan(changed, counts)
        seen, changed["_called"] = _as_seen(changed["param_groups"])
        plan.settle(seen, _is_direct(changed))
        self._commit(changed)

    def _counts(self) -> Counts:
        plan = self._plan
        return Counts(
            plan.completed_steps,
            plan.accumulated_steps,
            tuple(plan.summed()),
            tuple(plan.fresh()),
        )

    def _make_plan(self, of: Mapping[str, Any], counts: Counts) -> _core.Plan:
        """Make a plan over the arrays of an optimizer with these attributes.

        To the plan, each group is followed by another like it but without weight decay, which has
        the group's parameters that are left out of it.
        """
        ((clip, limit),) = self._clips.items() or (("", 0.0),)
        rows = [row for own in of["_rows"] for row in (own, self._without_decay(own))]
        return _core.Plan(
            self._rule,
            of["_params"],
            [tuple(s.get(name) for name in self._rule.slots) for s in of["_state"]],
            of["_ema"],
            [s["step"] for s in of["_state"]],
            [2 * group + out for group, out in zip(of["_group_of"], of["_left_out"], strict=True)],
            rows,
            [label(key) for key in of["_keys"]],
            semantics=_SEMANTICS.index(self._semantics),
            clip=("", *_CLIPS).index(clip),
            clip_limit=limit,
            nonfinite=_NONFINITE.index(self._nonfinite),
            ema_decay=self._ema_decay or 0.0,
            num_threads=self._num_threads or 0,
            completed_steps=counts.completed_steps,
            sums=of["_sums"],
            accumulate=self._accumulate,
            accumulated_steps=counts.accumulated_steps,
            summed=counts.summed,
            fresh=counts.fresh,
            lent=of["_lent"],
        )

    def _without_decay(self, row: list[float]) -> list[float]:
        row = row.copy()
        row[self._rule.hypers.index("weight_decay")] = 0.0
        return row

    def _set_row(self, number: int, row: list[float]) -> None:
        self._plan.set_hypers(2 * number, row)
        if self._no_decay is not None:
            self._plan.set_hypers(2 * number + 1, self._without_decay(row))

    # ---- hyperparameters ------------------------------------------------------------------------

    def _checked(
        self, group: Mapping[str, Any], where: str, completed_steps: int
    ) -> dict[str, float]:
        """Check a group's hyperparameters; return their values as the rule takes them."""
        unknown = group.keys() - self._defaults.keys() - {"params"}
        missing = self._defaults.keys() - group.keys()
        if unknown or missing:
            what = "unknown" if unknown else "missing"
            hint = ""
            if any(is_container(group[x]) or _core.lends_memory(group[x]) for x in unknown):
                hint = (
                    "; in a list, a dict with 'params' is a parameter group, and a list of models "
                    "that are such dicts is given as [{'params': models}]"
                )
            raise ValueError(
                f"{where}{what} options {sorted(map(str, unknown or missing))}; "
                f"{type(self).__name__} has {sorted(self._defaults)}{hint}"
            )
        values = {}
        for name, check in self._checks.items():
            value = group[name]
            if name == "lr" and callable(value):
                values[name] = self._called_lr(value, where, completed_steps)
            else:
                values[name] = check(f"{where}{name}", value)
        self._check_together(values, where)
        return values

    def _called_lr(self, lr: Callable[[int], Any], where: str, completed_steps: int) -> float:
        self._calling = True
        try:
            value = lr(completed_steps)
        finally:
            self._calling = False
        return self._checks["lr"](f"{where}lr({completed_steps})", value)

    def _check_together(self, values: dict[str, float], where: str) -> None:
        """Check what concerns several hyperparameters; for subclasses."""

    def _row(self, values: Mapping[str, float]) -> list[float]:
        return [values[name] for name in self._rule.hypers]

    def _initial(self, group: Mapping[str, Any]) -> Mapping[str, float]:
        """Return the initial values of slots that do not start at zero; for subclasses."""
        return {}

    def _refresh(self, *, call: bool = True) -> None:
        """Take over what has changed in ``param_groups``, after checking all of it.

        Learning rates need not be called where no step follows; the next step does it anyway.
        """
        groups = self.param_groups
        if not isinstance(groups, list) or len(groups) != len(self._group_params):
            raise ValueError(
                "param_groups was replaced, or its length changed; use add_param_group"
            )
        for number, (group, params) in enumerate(zip(groups, self._group_params, strict=True)):
            if type(group) is not dict or group.get("params") is not params:
                raise ValueError(
                    f"param_groups[{number}]: its parameters were replaced; use add_param_group"
                )
        seen, called = _as_seen(groups)  # before a callable runs that may change them again
        if not call:
            groups = [_without_call(group) for group in groups]
        rows = [
            self._row(self._checked(group, f"param_groups[{number}]: ", self.completed_steps))
            for number, group in enumerate(groups)
        ]
        used = [self._rule.used_slots(row) for row in rows]
        self._apply(rows, [used[number] for number in self._group_of])
        self._called = called
        self._plan.settle(seen, _is_direct(self.__dict__))

    def _follow(self) -> None:
        """Make the arrays and the plan anew where memory that something lends has moved."""
        busy = self._calling or self._plan.busy  # a step is about to look itself
        if self._lent is None or busy or self._lent.in_place():
            return
        params = _arrays_over(_given(self.param_groups), self._keys)
        for key, param, before in zip(self._keys, params, self._params, strict=True):
            if param is before:
                continue
            _core.check_parameter(param, label(key))
            _core.check_lent(param, label(key))
            what = ("dtype", "shape") if param.size == 0 else ("dtype", "shape", "strides")
            for name in what:
                then, now = getattr(before, name), getattr(param, name)
                if then != now:
                    raise ValueError(
                        f"{label(key)}: its {name} has become {now}; the optimizer was made for "
                        f"{then}: make one anew"
                    )
        changed: dict[str, Any] = {
            "_params": params,
            "_lent": self._lenders(self.param_groups, params),
        }
        changed["_plan"] = self._make_plan({**self.__dict__, **changed}, self._counts())
        changed["_plan"].take_over_tear(self._plan)
        seen = self._plan.settled
        self._commit(changed)
        self._plan.settle(seen, _is_direct(self.__dict__))

    def _lenders(self, groups: list[dict[str, Any]], params: list[Array]) -> Lenders | None:
        lenders = Lenders(_given(groups), params, self._lent)
        return lenders if lenders.of else None

    def _check_not_called(self, what: str) -> None:
        """Raise where what a step calls would change its optimizer."""
        if self._calling:
            raise RuntimeError(f"{what} was called by a learning rate of the same optimizer")
        if self._plan.busy:
            raise RuntimeError(f"{what} was called from within a step of the same optimizer")

    def _check_whole(self, what: str) -> None:
        """Raise in a forked child whose copy of the arrays is torn."""
        if self._plan.torn:
            raise RuntimeError(f"{what}: {_core.TORN}")

    def _call_learning_rates(self) -> None:
        """Evaluate the learning rates that are callables; nothing else has changed."""
        place, rows, seen = self._rule.hypers.index("lr"), list(self._rows), self._plan.settled
        for number in self._called:
            lr, where = self.param_groups[number]["lr"], f"param_groups[{number}]: "
            rows[number] = rows[number].copy()
            rows[number][place] = self._called_lr(lr, where, self.completed_steps)
        for number in self._called:
            self._set_row(number, rows[number])
        self._rows = rows
        self._plan.settle(seen)

    def _apply(self, rows: list[list[float]], slots: Sequence[Iterable[str]]) -> None:
        """Set the groups' hyperparameters, and make what is lacking of the parameters' slots.

        Momentum, centered or amsgrad may have been switched on.
        """
        state, counts = list(self._state), self._counts()
        fresh = list(counts.fresh)
        for i, names in enumerate(slots):
            lacking = [name for name in names if name not in state[i]]
            if lacking:
                fill = self._initial(self.param_groups[self._group_of[i]])
                new = new_state(self._params[i], lacking, fill)
                state[i] = ParameterState(dict(new) | dict(state[i]))
                fresh[i] += tuple(set(lacking) & set(self._rule.begins) - set(fresh[i]))
        if all(new is old for new, old in zip(state, self._state, strict=True)):
            for number, row in enumerate(rows):
                self._set_row(number, row)
            self._rows = rows
            return
        changed: dict[str, Any] = {"_state": state, "_rows": rows}
        counts = counts._replace(fresh=tuple(fresh))
        changed["_plan"] = self._make_plan({**self.__dict__, **changed}, counts)
        changed["_plan"].take_over_tear(self._plan)
        self._commit(changed)

    def _commit(self, changed: dict[str, Any]) -> None:
        """Set attributes, a new plan among them."""
        if "_plan" in self.__dict__:
            self._plan.settle(None)  # for a step that has it already, and waits for the lock
        self.__dict__.update(changed)

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
            a dict with the same keys, or the same containers in one another, and for a named
            tuple one with the same fields. Each has its parameter's shape and dtype; None leaves
            its parameter out of this step.
            With ``accumulate=k`` every k-th call updates, with the sum of k calls divided by k, in
            which None counts as zero, unless all k are None.
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
        result = self._plan.step_settled(
            self._lock, self.param_groups, grads, loss_scale, zero_grad
        )
        if result is not None:
            return result
        with self._lock:
            self._check_not_called("step()")
            self._check_whole("step()")
            if not _core.unchanged(self.param_groups, self._plan.settled):
                self._refresh()
            elif self._called:
                self._call_learning_rates()
            if type(grads) is not list or self._named:
                grads = self._in_order(grads)
            if type(loss_scale) is not float or loss_scale != 1.0:
                loss_scale = self._checked_scale(loss_scale)
            if zero_grad is not False:
                zero_grad = bool(flag("zero_grad", zero_grad))
            try:
                return self._plan.step(grads, loss_scale, zero_grad)
            except _core.MovedError:
                self._follow()
                return self._plan.step(grads, loss_scale, zero_grad)

    def _checked_scale(self, loss_scale: Any) -> float:
        """Return the scale if dividing by it means something in every parameter's type."""
        scale = real("loss_scale", loss_scale, above=0.0)
        for dtype in sorted({param.dtype for param in self._params}):  # the narrower first
            limits = np.finfo(dtype)
            if not float(limits.smallest_normal) <= 1 / scale <= float(limits.max):
                raise ValueError(f"loss_scale is out of the range of {dtype}: got {loss_scale!r}")
        return scale

    def _in_order(self, grads: Any) -> Sequence[Array | None]:
        """Return the gradients in the order of the parameters, having checked the structure."""
        if self._structure is not None:
            return in_order("grads", grads, self._structure, len(self._params))
        wrong = (
            f"grads must be a list or tuple in the parameters' order, got {type(grads).__name__}"
        )
        if _core.lends_memory(grads):
            raise TypeError(f"{wrong}; of a single array, [gradient]")
        if isinstance(grads, (Mapping, str, set, frozenset)):
            raise TypeError(wrong)
        try:
            return list(grads)
        except TypeError:
            if hasattr(grads, "__iter__"):
                raise
            raise TypeError(wrong) from None

    def reset(self) -> None:
        """Put state, counters and averages back to where they began; parameters stay."""
        with self._lock:
            self._check_not_called("reset()")
            self._refresh()
            self._follow()
            self._plan.check()
            to, values = [], []
            for i, state in enumerate(self._state):
                fill = self._initial(self.param_groups[self._group_of[i]])
                for name, array in state.items():
                    to.append(array)
                    values.append(typed(fill.get(name, 0.0), array, name))
            for average, param in zip(self._ema or (), self._params, strict=False):
                to.append(average)
                values.append(param)
            self._plan.restore(to, values, 0, [False])  # no micro-batch is summed any more

    # ---- state dict, copies ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything but the parameters that a later run needs to go on.

        Returns
        -------
        dict
            ``state`` and ``ema``, dicts by parameter key (its name, or its index);
            ``param_groups``, with the keys of their parameters in place of the arrays;
            ``accumulated``, None between updates, otherwise ``steps``, the number of micro-batches
            so far, and ``sums`` of their gradients by parameter key; ``completed_steps``, ``rule``
            and ``semantics``. A learning rate that is a callable is left out.
        """
        with self._lock:
            self._bring_up_to_date("state_dict()")
            return self._as_dict(lambda array: array.copy(order="K"))

    def _bring_up_to_date(self, what: str) -> None:
        """Take over what is pending in ``param_groups``, so that a copy can be used as it is."""
        self._check_whole(what)
        if not self._calling and not self._plan.busy:  # by which a copy may be asked for, too
            self._refresh(call=False)
            self._follow()

    def _as_dict(self, copy: Callable[[Array], Array]) -> dict[str, Any]:
        """Return a state dict with a copy of each array."""
        groups, first = [], 0
        counts = self._counts()
        for group in self.param_groups:
            saved = {name: frozen(value) for name, value in group.items() if name != "params"}
            if callable(saved["lr"]):
                del saved["lr"]
            last = first + len(group["params"])
            groups.append({**saved, "params": self._keys[first:last]})
            first = last
        return {
            "rule": self._rule.name,
            "semantics": self._semantics,
            "completed_steps": counts.completed_steps,
            "accumulated": None
            if counts.accumulated_steps == 0
            else {
                "steps": counts.accumulated_steps,
                "sums": {
                    key: copy(array)
                    for key, array, any_yet in zip(
                        self._keys, self._sums or (), counts.summed, strict=True
                    )
                    if any_yet
                },
            },
            "param_groups": groups,
            "state": {
                key: {name: copy(array) for name, array in param_state.items()}
                | {
                    begun(name): np.array(0)
                    for name in fresh
                    if name in param_state and param_state["step"] > 0
                }
                for key, param_state, fresh in zip(
                    self._keys, self._state, counts.fresh, strict=True
                )
            },
            "ema": None
            if self._ema is None
            else {key: copy(array) for key, array in zip(self._keys, self._ema, strict=True)},
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
        self._restore_from(state_dict, "state_dict", checkpoint=False)

    def _expected(self) -> _saved.Expected:
        return _saved.Expected(
            self._rule,
            self._semantics,
            self._keys,
            self._params,
            self._group_of,
            self.param_groups,
            self._defaults.keys(),
            self._ema is not None,
            self._accumulate,
        )

    def _checked_row(self, group: dict[str, Any], where: str, completed_steps: int) -> list[float]:
        return self._row(self._checked(group, where, completed_steps))

    def _restore_from(self, saved: Mapping[str, Any], source: str, *, checkpoint: bool) -> None:
        """Take over a state dict, or a checkpoint's content, which has parameters too."""
        with self._lock:
            self._check_not_called("load()" if checkpoint else "load_state_dict()")
            self._follow()
            new = _saved.verified(
                self._expected(), saved, source, self._checked_row, checkpoint=checkpoint
            )
            before = [dict(group) for group in self.param_groups]
            for group, options in zip(self.param_groups, new.groups, strict=True):
                for name in options:
                    group.setdefault(name, options[name])  # so that no key is to be taken back
            done = [False]
            try:
                _core.set_items(self.param_groups, new.groups)
                self._refresh()
                self._apply(self._rows, [loaded.keys() - {"step"} for loaded in new.state])
                self._plan.check()
                to = [*(array for own in self._state for array in own.values()), *(self._ema or ())]
                values = [
                    loaded[name] if name in loaded else typed(0.0, array, name)
                    for own, loaded in zip(self._state, new.state, strict=True)
                    for name, array in own.items()
                ]
                values += new.ema
                to += [self._sums[i] for i in new.sums] if self._sums else []
                values += new.sums.values()
                if checkpoint:
                    to += self._params
                    values += new.params
                summed = [i in new.sums for i in range(len(self._params))]
                fresh = [
                    tuple(
                        slot
                        for slot in self._rule.begins
                        if slot in loaded_fresh or (slot in own and slot not in loaded)
                    )
                    for own, loaded, loaded_fresh in zip(
                        self._state, new.state, new.fresh, strict=True
                    )
                ]
                lenders = self._lent.of.values() if checkpoint and self._lent else ()
                written = _core.version_counter(list(lenders))
                self._plan.restore(
                    to, values, new.completed_steps, done, new.accumulated_steps, summed, fresh
                )
                if written is not None:
                    written()
            except BaseException:
                if done[0]:  # and a signal raised only then
                    raise
                _core.set_items(self.param_groups, before)
                raise

    # ---- checkpoints ----------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write parameters, state, averages, hyperparameters and counters to a safetensors file.

        The file appears under its name whole or not at all: it is written and read back under
        another name, reaches the disk, and then takes the place of what had the name. If the
        process is killed, or the disk is full, the old file is still there. A learning rate that is
        a callable is left out, and so are options that :meth:`state_dict` leaves out.

        Parameters
        ----------
        path : str or os.PathLike
            What the file is called. Of a symbolic link, the file that it leads to is replaced.

        Raises
        ------
        OSError
            If the file cannot be written; what had the name is as it was.
        TypeError, ValueError
            If a parameter's name is neither a string nor an integer, if a hyperparameter is out of
            range, or if the name is that of something else than a file.
        ImportError
            If the package safetensors is missing; ``fastopt[checkpoint]`` brings it.

        Notes
        -----
        Steps of other threads wait. Code that changes the parameters in other ways must not run
        meanwhile; if it does, that is found and a RuntimeError raised. A killed process may leave a
        folder called as the file and ending in ``.part``; the next save to the same path removes
        it, if the file system has locks (``flock``) that tell that the process is dead.

        Examples
        --------
        >>> import os, tempfile, numpy as np, fastopt
        >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
        >>> w = np.array([1.0, 2.0])
        >>> opt = fastopt.Adam({"w": w}, lr=0.5)
        >>> result = opt.step({"w": w})
        >>> opt.save(path)
        >>> v = np.zeros(2)
        >>> resumed = fastopt.Adam({"w": v})
        >>> resumed.load(path)
        >>> v, resumed.completed_steps, resumed.param_groups[0]["lr"]
        (array([0.5, 1.5]), 1, 0.5)
        """
        from fastopt import checkpoint

        with self._lock:  # no step meanwhile
            self._bring_up_to_date("save()")
            self._plan.check()
            saved = self._as_dict(_in_c_order)
            texts, arrays = _saved.as_file(saved, list(map(_in_c_order, self._params)))
            checkpoint.write(path, {"optimizer": type(self).__name__, **texts}, arrays)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over a file that :meth:`save` wrote, after checking all of it.

        Parameters are overwritten in place. Training goes on with the same bits as if it had not
        been interrupted, if the optimizer was made with the same options (and, where it clips by
        norm, over arrays in the same memory order).

        Parameters
        ----------
        path : str or os.PathLike
            A file of an optimizer of the same rule and semantics, over parameters of the same
            names (or indices), shapes and dtypes.

        Raises
        ------
        OSError
            If the file cannot be read.
        TypeError, ValueError
            If the file is damaged, if a newer fastopt wrote it, or if anything does not fit; the
            message says which entry, and nothing is changed.
        ImportError
            If the package safetensors is missing; ``fastopt[checkpoint]`` brings it.

        Examples
        --------
        See :meth:`save`.
        """
        from fastopt import checkpoint

        source = checkpoint.source(path)
        saved = _saved.from_file(self._keys, source, *checkpoint.read(path))
        self._restore_from(saved, source, checkpoint=True)

    def __copy__(self) -> NoReturn:
        raise TypeError("a shallow copy would share state but not its counters; use copy.deepcopy")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        with self._lock:  # no step meanwhile
            new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            self._bring_up_to_date("a copy")
            self._check_bonds()
            made_anew = {
                "_plan",
                "_lock",
                "_calling",
                "_rows",
                "_params",
                "_lent",
                "_group_params",
                "_called",
            }
            kept = {name: v for name, v in self.__dict__.items() if name not in made_anew}
            kept["_state"] = [dict(param_state) for param_state in self._state]
            kept["counts"] = self._counts()
            kept["orders"] = [  # NumPy's pickles keep C order and Fortran order
                None if p.flags.forc else memory_order(p) for p in self._params
            ]
            return kept

    def _check_bonds(self) -> None:
        """Raise where a copy of a parameter would not be a copy of what the model has."""
        for key, given in zip(self._keys, _given(self.param_groups), strict=True):
            kind = type(given).__name__
            if isinstance(given, memoryview):
                way_out = "make the optimizer over what it is a view of"
            elif isinstance(given, np.ndarray) and _core.is_over_tensor(given):
                kind, way_out = "array over a tensor", "make the optimizer over the tensor itself"
            else:
                continue
            raise TypeError(
                f"{label(key)}: a copy of this {kind} would have memory of its own, which is not "
                f"that of the copied model; {way_out}, or copy state_dict()"
            )

    def __setstate__(self, kept: dict[str, Any]) -> None:
        counts, orders = Counts(*kept.pop("counts")), kept.pop("orders")
        self.__dict__.update(kept)
        self._lock = _core.Lock()
        self._calling = False
        self._state = [ParameterState(param_state) for param_state in self._state]
        self._group_params = [group["params"] for group in self.param_groups]
        given = _given(self.param_groups)
        for i, (param, order) in enumerate(zip(given, orders, strict=True)):
            if order is not None and isinstance(param, np.ndarray):
                state = [a for name, a in self._state[i].items() if name != "step"]
                for array in (param, *state, *(of[i] for of in (self._ema, self._sums) if of)):
                    lay_out(array, order)
        self._params = _arrays_over(given, self._keys)
        self._lent = None
        self._lent = self._lenders(self.param_groups, self._params)
        self._rows = [  # a learning rate may belong to what is only half copied: the step calls it
            self._row(self._checked(_without_call(group), "", counts.completed_steps))
            for group in self.param_groups
        ]
        self._plan = self._make_plan(self.__dict__, counts)
        seen, self._called = _as_seen(self.param_groups)
        self._plan.settle(seen, _is_direct(self.__dict__))
        _live.add(self)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}("]
        for number, group in enumerate(self.param_groups):
            options = ", ".join(f"{k}={v!r}" for k, v in group.items() if k != "params")
            lines.append(f"  group {number}: {len(group['params'])} parameters, {options}")
        return "\n".join([*lines, ")"])


def _given(groups: list[dict[str, Any]]) -> list[Any]:
    """Return the parameters of groups as they were given."""
    return [param for group in groups for param in group["params"]]


def _arrays_over(given: Iterable[Any], keys: Iterable[Any]) -> list[Array]:
    return [_core.array_over(x, label(key), keep=True) for x, key in zip(given, keys, strict=True)]


def _in_c_order(array: Array) -> Array:
    """Return an array in C order; a copy only if it is in another."""
    return np.asarray(array, order="C")


def _without_call(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group whose learning rate need not be called where no step follows."""
    return {**group, "lr": 0.0} if callable(group.get("lr")) else group


def _of_their_own(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of which none is a list or an array that another group has too."""
    return {
        name: value if frozen(value) is value else copy.deepcopy(value)
        for name, value in options.items()
    }


def _is_direct(of: Mapping[str, Any]) -> bool:
    """Tell of an optimizer with these attributes whether a step needs nothing but gradients."""
    return not of["_called"] and not of["_named"] and of["_lent"] is None


def _as_seen(
    groups: list[dict[str, Any]],
) -> tuple[list[tuple[tuple[Any, ...], tuple[Any, ...]]] | None, list[int]]:
    """Return what tells whether groups have changed, and in which the learning rate is called."""
    called = [number for number, group in enumerate(groups) if callable(group.get("lr"))]
    options = (value for group in groups for name, value in group.items() if name != "params")
    if any(frozen(value) is not value for value in options):
        return None, called  # a list or an array may change in place
    return [(tuple(group), tuple(group.values())) for group in groups], called


# ---- after a fork, no thread is left that could release a lock, or finish a call -----------------

_live: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _forget_threads() -> None:
    for optimizer in _live:
        optimizer._lock = _core.Lock()
        optimizer._calling = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
