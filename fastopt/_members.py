"""An optimizer's parameters, and what goes with each of them: keys, groups, state, averages, sums.

A record of all that is never changed, but replaced by another, in one assignment: so whatever
interrupts a change, it is done or not begun. (The groups in it are dicts that users change, and
arrays are written into.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from fastopt import _core
from fastopt._decay import check_matched, decay_mask
from fastopt._given import flatten_params, label
from fastopt._hypers import Hypers, own_copies
from fastopt._lenders import Lenders
from fastopt._memory import (
    Array,
    copy_like,
    in_memory_order,
    lay_out,
    memory_order,
    zeros_like,
)
from fastopt._settings import CLIPS, NONFINITE, SEMANTICS, Settings
from fastopt._storage import Storage, initial_arrays, storage_for
from fastopt._trees import TreeDef, merged


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


def new_state(
    storage: Storage, param: Array, slots: Iterable[str], initial: Mapping[str, float]
) -> ParameterState:
    state = {name: storage.zeros(param, name) for name in storage.names(tuple(slots))}
    if storage.master == "master":
        state["master"][...] = param  # (bfloat16 lacks nothing of itself: its trailing bits are 0)
    for slot in slots:
        for name, value in initial_arrays(storage, param, slot, initial.get(slot, 0.0)).items():
            state[name][...] = value
    return ParameterState(state)


# From a group to the initial values of its slots, where these are not zero.
Initial = Callable[[Mapping[str, Any]], Mapping[str, float]]


class Counts(NamedTuple):
    """How far an optimizer is."""

    completed_steps: int = 0
    accumulated_steps: int = 0
    summed: tuple[bool, ...] = ()  # which parameters' sums hold the gradient of a micro-batch
    fresh: tuple[tuple[str, ...], ...] = ()  # each parameter's slots that no step has written yet

    @classmethod
    def of(cls, plan: _core.Plan) -> Counts:
        return cls(
            plan.completed_steps,
            plan.accumulated_steps,
            tuple(plan.summed()),
            tuple(plan.fresh()),
        )

    def with_more(self, n: int) -> Counts:
        """Return the counts once there are n more parameters."""
        return self._replace(summed=self.summed + (False,) * n, fresh=self.fresh + ((),) * n)


class Part(NamedTuple):
    """The elements of a parameter that are stepped over here: others are elsewhere."""

    begin: int  # counted in its memory order
    end: int
    bounds: tuple[int, ...]  # of all parts, the others, too
    nbytes: int  # that go with all of the parameter


# From whole parameters, and the bytes of state of each, to the part of each that is stepped over.
Cut = Callable[[list[Array], list[int]], list[Part]]


class Members(NamedTuple):
    """Parameters, and what goes with each of them: lists in the parameters' order."""

    groups: list[dict[str, Any]]
    group_params: list[tuple[Any, ...]]  # each group's parameters, as they were given
    keys: list[Any]
    named: bool
    tree_def: TreeDef | None  # of named parameters
    params: list[Array]
    wholes: list[Array]  # of which these are parts; the same arrays, if they are not
    parts: list[Part] | None  # which parts; None: they are no parts
    lent: Lenders | None  # what looks after parameters in memory that something else lends
    group_of: list[int]
    excluded: list[bool]  # from weight decay
    storage: list[Storage]
    state: list[ParameterState]
    ema: list[Array] | None
    sums: list[Array] | None
    logs: list[_core.RowLog] | None  # of steps that rows have missed

    @classmethod
    def none(cls, settings: Settings) -> Members:
        return cls(
            groups=[],
            group_params=[],
            keys=[],
            named=False,
            tree_def=None,
            params=[],
            wholes=[],
            parts=None,
            lent=None,
            group_of=[],
            excluded=[],
            storage=[],
            state=[],
            ema=None if settings.ema_decay is None else [],
            sums=None if settings.accumulate == 1 else [],
            logs=[] if settings.rows == "exact" else None,
        )

    def number_of(self, param: Any) -> int:
        """Return the number of a parameter: of the object that was given, its array, or its key."""
        given = _given(self.groups)
        for i, (one, array) in enumerate(zip(given, self.wholes, strict=True)):
            if param is one or param is array:
                return i
        by_key = isinstance(param, (str, int, np.integer)) and not isinstance(param, bool)
        if by_key and param in self.keys:
            return self.keys.index(param)
        what = repr(param) if by_key else type(param).__name__
        raise ValueError(
            f"param: this optimizer has no such parameter: {what}; give one of those that it was "
            "made for, or its name"
        )

    def group(self, i: int) -> dict[str, Any]:
        """Return the group of a parameter."""
        return self.groups[self.group_of[i]]


class Bound(NamedTuple):
    """Members, and the plan that steps over them."""

    members: Members
    hypers: Hypers
    plan: _core.Plan

    @property
    def direct(self) -> bool:
        """Whether a step needs nothing but a list of gradients."""
        members = self.members
        return not self.hypers.scheduled and not members.named and members.lent is None


def bound(settings: Settings, members: Members, hypers: Hypers, counts: Counts) -> Bound:
    """Make a plan over members; raise if their arrays are not what a plan can be over."""
    plan = _core.Plan(
        hypers.rule,
        members.params,
        [
            tuple(own.get(storage.arrays(slot)[0]) for slot in hypers.rule.slots)
            for storage, own in zip(members.storage, members.state, strict=True)
        ],
        members.ema,
        [s["step"] for s in members.state],
        [2 * group + out for group, out in zip(members.group_of, members.excluded, strict=True)],
        hypers.plan_rows(),
        list(map(label, members.keys)),
        semantics=SEMANTICS.index(settings.semantics),
        clip=("", *CLIPS).index(settings.clip),
        clip_limit=settings.clip_limit,
        nonfinite=NONFINITE.index(settings.nonfinite),
        ema_decay=settings.ema_decay or 0.0,
        num_threads=settings.num_threads or 0,
        completed_steps=counts.completed_steps,
        **(
            {"firsts": [part.begin for part in members.parts]}
            if members.parts is not None
            else {
                "sums": members.sums,
                "accumulate": settings.accumulate,
                "accumulated_steps": counts.accumulated_steps,
                "summed": counts.summed,
            }
        ),
        fresh=counts.fresh,
        lent=members.lent,
        beside=[
            (own.get(storage.master), *(own.get(f"{slot}_scale") for slot in hypers.rule.slots))
            for storage, own in zip(members.storage, members.state, strict=True)
        ],
        stochastic=settings.stochastic_rounding,
        seed=settings.seed,
        logs=members.logs,
    )
    return Bound(members, hypers, plan)


def check_groups(members: Members) -> None:
    """Raise if there are other groups, or other parameters in one, than were added."""
    groups = members.groups
    if not isinstance(groups, list) or len(groups) != len(members.group_params):
        raise ValueError("param_groups was replaced, or its length changed; use add_param_group")
    for number, (group, params) in enumerate(zip(groups, members.group_params, strict=True)):
        if type(group) is not dict or group.get("params") is not params:
            raise ValueError(
                f"param_groups[{number}]: its parameters were replaced; use add_param_group"
            )


# ---- more groups ---------------------------------------------------------------------------------


def extended(
    before: Members,
    groups: list[dict[str, Any]],
    *,
    settings: Settings,
    defaults: Mapping[str, Any],
    rule: _core.Rule,
    check: Callable[[dict[str, Any], str], list[float]],
    initial: Initial,
    cut: Cut | None = None,
) -> tuple[Members, list[list[float]]]:
    """Return members with more groups, and the new groups' rows, having checked all of it.

    `defaults` stand for the hyperparameters that a group does not have; `check` returns its row.
    With `cut`, a part of each parameter is stepped over.
    """
    first_group, n_before = len(before.groups), len(before.wholes)
    new_groups: list[dict[str, Any]] = []
    rows: list[list[float]] = []
    keys, lenders, wholes = list(before.keys), [], list(before.wholes)
    group_of = list(before.group_of)
    named = {before.named} if before.wholes else set()
    tree_def = before.tree_def
    same: list[tuple[int, int]] = []
    for number, given in enumerate(groups, first_group):
        if "params" not in given:
            raise ValueError(f"param_groups[{number}] has no 'params'")
        options = {**own_copies(defaults), **given}
        del options["params"]
        # First, since unknown options tell that this was not meant to be a group.
        rows.append(check(options, f"param_groups[{number}]: "))
        first = len(wholes)
        names, own_params, own_tree = flatten_params(given["params"], first)
        own_keys = names if names is not None else range(first, first + len(own_params))
        named.add(names is not None)
        if own_tree is not None:
            tree_def = own_tree if tree_def is None else merged(tree_def, own_tree, same)
        keys += own_keys
        lenders += own_params
        wholes += _arrays_over(own_params, own_keys)
        group_of += [number] * len(own_params)
        new_groups.append({"params": tuple(own_params), **options})
    if len(named) > 1:
        raise ValueError("either all parameter groups name their parameters (a dict) or none")
    if not wholes:
        raise ValueError("no parameters: expected at least one array")
    _check_keys(keys, same)
    for key, whole in zip(keys, wholes, strict=True):
        _core.check_parameter(whole, label(key), narrow=True)
    new_keys, new_wholes = keys[n_before:], wholes[n_before:]
    for key, lender in zip(new_keys, lenders, strict=True):
        _core.refuse_unwatched(lender, label(key))
    storage = [
        storage_for(rule, settings, param, label(key))
        for key, param in zip(new_keys, new_wholes, strict=True)
    ]
    used = [rule.used_slots(rows[number - first_group]) for number in group_of[n_before:]]
    new_params, new_parts = new_wholes, None
    if cut is not None:
        sizes = [
            kind.nbytes(whole, slots, settings.ema_decay is not None)
            for whole, kind, slots in zip(new_wholes, storage, used, strict=True)
        ]
        new_parts = cut(new_wholes, sizes)
        new_params = list(map(_part_of, new_wholes, new_parts))
    state = []
    for i, (param, kind, slots) in enumerate(zip(new_params, storage, used, strict=True)):
        group = new_groups[group_of[n_before + i] - first_group]
        state.append(new_state(kind, param, slots, initial(group)))
    is_named = True in named
    excluded = decay_mask(settings.no_decay, new_keys, new_wholes, is_named)
    if not before.wholes:
        check_matched(settings.no_decay, keys)
    all_groups = before.groups + new_groups
    members = Members(
        groups=all_groups,
        group_params=before.group_params + [group["params"] for group in new_groups],
        keys=keys,
        named=is_named,
        tree_def=tree_def,
        params=before.params + new_params,
        wholes=wholes,
        parts=None if new_parts is None else [*(before.parts or ()), *new_parts],
        lent=_lenders(all_groups, wholes, before.lent),
        group_of=group_of,
        excluded=before.excluded + excluded,
        storage=before.storage + storage,
        state=before.state + state,
        ema=_more(before.ema, copy_like, new_params, storage),
        sums=_more(before.sums, zeros_like, new_wholes, storage),
        logs=None if before.logs is None else before.logs + [_core.RowLog() for _ in new_params],
    )
    return members, rows


def _more(
    before: list[Array] | None,
    make: Callable[[Array, Any], Array],
    params: list[Array],
    storage: list[Storage],
) -> list[Array] | None:
    """Return a list, if there is one, with one array more for each parameter."""
    if before is None:
        return None
    new = [make(p, kind.arithmetic) for p, kind in zip(params, storage, strict=True)]
    return before + new


def _part_of(whole: Array, part: Part) -> Array:
    return in_memory_order(whole)[part.begin : part.end]


def _check_keys(keys: list[Any], same: list[tuple[int, int]]) -> None:
    """Raise if two parameters have one key; `same` are those with one place in a container."""
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"parameter names occur twice: {twice}")
    if same:  # such as 1 and True, or 1 and 1.0
        one, other = (label(keys[i]) for i in same[0])
        raise ValueError(
            f"{one} and {other} of two groups have one and the same key, under which only one "
            "gradient could be given"
        )


# ---- memory that is lent -------------------------------------------------------------------------


def _given(groups: list[dict[str, Any]]) -> list[Any]:
    """Return the parameters of groups as they were given."""
    return [param for group in groups for param in group["params"]]


def _arrays_over(given: Iterable[Any], keys: Iterable[Any]) -> list[Array]:
    return [_core.array_over(x, label(key), keep=True) for x, key in zip(given, keys, strict=True)]


def _lenders(
    groups: list[dict[str, Any]], params: list[Array], before: Lenders | None
) -> Lenders | None:
    lenders = Lenders(_given(groups), params, before)
    return lenders if lenders.of else None


def followed(members: Members) -> Members:
    """Return members with arrays over memory where it is now, if any has moved."""
    if members.lent is None or members.lent.in_place():
        return members
    wholes = _arrays_over(_given(members.groups), members.keys)
    for key, param, before in zip(members.keys, wholes, members.wholes, strict=True):
        if param is before:
            continue
        _core.check_parameter(param, label(key), narrow=True)
        _core.check_lent(param, label(key))
        what = ("dtype", "shape") if param.size == 0 else ("dtype", "shape", "strides")
        for name in what:
            then, now = getattr(before, name), getattr(param, name)
            if then != now:
                raise ValueError(
                    f"{label(key)}: its {name} has become {now}; the optimizer was made for "
                    f"{then}: make a new one"
                )
    return members._replace(
        params=wholes if members.parts is None else list(map(_part_of, wholes, members.parts)),
        wholes=wholes,
        lent=_lenders(members.groups, wholes, members.lent),
    )


# ---- more state ----------------------------------------------------------------------------------


def has_slots(members: Members, slots: Sequence[Collection[str]]) -> bool:
    """Tell whether no parameter lacks any of its slots."""
    return not any(
        _lacking(storage, own, names)
        for storage, own, names in zip(members.storage, members.state, slots, strict=True)
    )


def _lacking(storage: Storage, own: Mapping[str, Array], slots: Collection[str]) -> list[str]:
    return [slot for slot in slots if storage.arrays(slot)[0] not in own]


def with_slots(
    members: Members,
    slots: Sequence[Collection[str]],
    counts: Counts,
    rule: _core.Rule,
    initial: Initial,
) -> tuple[Members, Counts]:
    """Return members with what each parameter lacks of its slots.

    Momentum, centered or amsgrad may have been switched on.
    """
    state, fresh = list(members.state), list(counts.fresh)
    for i, names in enumerate(slots):
        storage = members.storage[i]
        lacking = _lacking(storage, state[i], names)
        if lacking:
            new = new_state(storage, members.params[i], lacking, initial(members.group(i)))
            every = {**new, **state[i]}
            order = storage.names(rule.slots)
            state[i] = ParameterState({name: every[name] for name in order if name in every})
            fresh[i] += tuple(set(lacking) & set(rule.begins) - set(fresh[i]))
    return members._replace(state=state), counts._replace(fresh=tuple(fresh))


# ---- copies --------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What is copied or pickled of members."""

    members: Members
    orders: list[tuple[int, ...] | None]  # in memory: NumPy's pickles keep C and Fortran order


def to_keep(members: Members) -> Kept:
    """Return what a copy needs; raise if the copied model would not have the copied parameters."""
    for key, given in zip(members.keys, _given(members.groups), strict=True):
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
    orders = [None if p.flags.forc else memory_order(p) for p in members.params]
    logs = members.logs and []  # all rows are up to date in what is copied
    kept = members._replace(group_params=[], params=[], wholes=[], lent=None, logs=logs)
    return Kept(kept, orders)


def from_kept(kept: Kept) -> Members:
    """Return the members of a copy."""
    members, orders = kept
    given = _given(members.groups)
    state = list(map(ParameterState, members.state))
    for i, (param, order) in enumerate(zip(given, orders, strict=True)):
        if order is not None and isinstance(param, np.ndarray):
            own = [array for array in state[i].values() if array.shape == param.shape]
            for array in (param, *own, *(of[i] for of in (members.ema, members.sums) if of)):
                lay_out(array, order)
    params = _arrays_over(given, members.keys)
    return members._replace(
        group_params=[group["params"] for group in members.groups],
        params=params,
        wholes=params,
        lent=_lenders(members.groups, params, None),
        state=state,
        logs=None if members.logs is None else [_core.RowLog() for _ in params],
    )
