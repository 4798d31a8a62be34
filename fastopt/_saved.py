"""What was saved against what is expected: all of it is checked before any of it is used.

A state dict is nested; a file has arrays and texts by name. The functions here know both, and no
optimizer: who calls them says what is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from fastopt._core import Rule, hint_for
from fastopt._given import label
from fastopt._members import Counts, Members
from fastopt._memory import Array, long_axes
from fastopt._options import frozen, seed_number
from fastopt._settings import Settings
from fastopt._storage import CONVERTED, Storage, all_arrays, converted, stored_otherwise

_ENTRIES = {
    "rule",
    "semantics",
    "completed_steps",
    "seed",
    "memory_order",
    "accumulated",
    "param_groups",
    "state",
    "ema",
}

# What a state dict of an earlier fastopt does not have, and what stands for it.
_LATER: Mapping[str, Any] = {"accumulated": None, "seed": None, "memory_order": {}}
_LATER_OPTIONS: Mapping[str, Any] = {"rowwise": False}  # of a group, if its rule has it

# A tensor, not a text: a reader that knows of no sums refuses it, even where all gradients so far
# were None.
_ACCUMULATED_STEPS = "accumulated_steps"

# Of a group's hyperparameters, what to call them, and the number of completed steps: returns their
# values in the order in which the rule has them, or raises.
CheckGroup = Callable[[dict[str, Any], str, int], list[float]]


class Expected(NamedTuple):
    """What saved state has to fit."""

    rule: Rule
    settings: Settings
    members: Members
    options: Collection[str]  # what each group has


class Verified(NamedTuple):
    """What an optimizer takes over."""

    groups: list[dict[str, Any]]  # their options
    state: list[dict[str, Array]]
    ema: list[Array]
    params: list[Array]  # of a checkpoint
    completed_steps: int
    accumulated_steps: int
    sums: dict[int, Array]  # by the parameters' numbers
    fresh: list[tuple[str, ...]]  # each parameter's slots that no step has written yet


_CONVERT = "; what was saved is stored in another type: load it with convert=True"


def begun(slot: str) -> str:
    """Return the name, in saved state, of the mark of a slot that no step has written yet."""
    return f"{slot}_begun"


def state_dict(
    rule: Rule, settings: Settings, members: Members, counts: Counts, copy: Callable[[Array], Array]
) -> dict[str, Any]:
    """Return all but the parameters, with a copy of each array."""
    groups, first = [], 0
    for group in members.groups:
        options = {name: frozen(value) for name, value in group.items() if name != "params"}
        if callable(options["lr"]):
            del options["lr"]
        last = first + len(group["params"])
        groups.append({**options, "params": members.keys[first:last]})
        first = last
    accumulated = ema = None
    if counts.accumulated_steps > 0:
        sums = zip(members.keys, members.sums or (), counts.summed, strict=True)
        accumulated = {
            "steps": counts.accumulated_steps,
            "sums": {key: copy(array) for key, array, any_yet in sums if any_yet},
        }
    if members.ema is not None:
        ema = {key: copy(array) for key, array in zip(members.keys, members.ema, strict=True)}
    states: dict[Any, dict[str, Array]] = {}
    for i, (key, state) in enumerate(zip(members.keys, members.state, strict=True)):
        states[key] = {name: copy(array) for name, array in state.items()}
        if state["step"] > 0:
            states[key] |= {
                begun(slot): np.array(0)
                for slot in counts.fresh[i]
                if members.storage[i].arrays(slot)[0] in state
            }
    return {
        "rule": rule.name,
        "semantics": settings.semantics,
        "completed_steps": counts.completed_steps,
        "seed": _seed(settings, members.storage),
        "memory_order": orders_of(settings, members),
        "accumulated": accumulated,
        "param_groups": groups,
        "state": states,
        "ema": ema,
    }


def _seed(settings: Settings, storage: Iterable[Storage]) -> int | None:
    """Return the seed, if anything of what is stored so is rounded at random."""
    random = settings.stochastic_rounding and any(one.can_round for one in storage)
    return settings.seed if random else None


def orders_of(settings: Settings, members: Members) -> dict[Any, list[int]]:
    """Return, by key, how parameters lie that are not in C order, where their state goes by that.

    Blocks of 8 bits and random bits go by the elements' places in memory; arrays of a file, by
    their indices.
    """
    return {
        key: list(order)
        for key, param, storage in zip(members.keys, members.params, members.storage, strict=True)
        if storage.state == "8bit" or _seed(settings, [storage]) is not None
        if (order := long_axes(param)) != tuple(sorted(order))
    }


def verified(
    expected: Expected,
    saved: Mapping[str, Any],
    source: str,
    check_group: CheckGroup,
    *,
    checkpoint: bool,
    convert: bool,
) -> Verified:
    """Return what was saved in the expected order, having checked all of it.

    The arrays of a checkpoint are nobody else's; those of a state dict are copied. With `convert`,
    arrays may be stored in another type than is expected.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(f"{source} must be a dict, got {type(saved).__name__}")
    saved = {**_LATER, **saved}
    _same_keys(source, _ENTRIES | {"params"} if checkpoint else _ENTRIES, saved)
    for entry, own in (("rule", expected.rule.name), ("semantics", expected.settings.semantics)):
        if not isinstance(saved[entry], str) or saved[entry] != own:
            raise ValueError(f"{source}[{entry!r}] is {saved[entry]!r}, the optimizer's is {own!r}")
    completed_steps = _count(f"{source}['completed_steps']", saved["completed_steps"])
    members, keys = expected.members, expected.members.keys
    seed = _seed(expected.settings, members.storage)
    saved_seed = saved["seed"]
    if saved_seed is not None:
        saved_seed = seed_number(f"{source}['seed']", saved_seed)
    if None not in (seed, saved_seed) and seed != saved_seed and not convert:
        raise ValueError(
            f"{source}['seed'] is {saved_seed}, the optimizer's is {seed}: random rounding would "
            f"not go on as it began; make the optimizer with seed={saved_seed}, or load with "
            "convert=True"
        )
    orders = _saved_orders(members, saved["memory_order"], f"{source}['memory_order']")

    def fitting(where: str, array: Any, form: Any, param: Array, kinds: Collection[str]) -> Array:
        _check_fits(where, array, form, param, () if convert else kinds)
        return array if checkpoint else np.array(array, order="K", subok=False)

    def averages(entry: str) -> list[Array]:
        where = f"{source}[{entry!r}]"
        _same_keys(where, keys, saved[entry])
        return [
            fitting(
                f"{where}[{key!r}]", saved[entry][key], (storage.arithmetic, param.shape), param, ()
            )
            for key, param, storage in zip(keys, members.params, members.storage, strict=True)
        ]

    groups = _groups(expected, saved["param_groups"], f"{source}['param_groups']")
    used = []
    for number, (group, loaded) in enumerate(zip(members.groups, groups, strict=True)):
        where = f"{source}['param_groups'][{number}]: "
        row = check_group({**group, **loaded}, where, completed_steps)
        used.append(expected.rule.used_slots(row))
    _same_keys(f"{source}['state']", keys, saved["state"])
    if checkpoint:
        _same_keys(f"{source}['params']", keys, saved["params"])
    saved_keys = [key for group in saved["param_groups"] for key in group["params"]]
    places = {key: i for i, key in enumerate(saved_keys)}
    state, fresh, params = [], [], []
    for i, (key, param, number) in enumerate(
        zip(keys, members.params, members.group_of, strict=True)
    ):
        where, storage = f"{source}['state'][{key!r}]", members.storage[i]
        slots = saved["state"][key]
        if not isinstance(slots, Mapping):
            raise TypeError(f"{where} must be a dict, got {type(slots).__name__}")
        slots = dict(slots)
        fresh.append(_fresh(slots, expected.rule.begins, where))
        value = saved["params"][key] if checkpoint else None
        if convert:
            slots, value = converted(storage, param, slots, value, orders[key])
        in_use = [
            slot
            for slot in storage.slots
            if slot in used[number] or not slots.keys().isdisjoint(storage.arrays(slot))
        ]
        missing = {*storage.names(in_use)} - slots.keys()
        unexpected = slots.keys() - {*storage.names(storage.slots)}
        if missing or unexpected:
            hint = ""
            if unexpected & stored_otherwise(storage) or missing & {storage.master}:
                hint = _CONVERT
            raise ValueError(
                f"{where}: missing {sorted(missing)}, "
                f"unexpected {_few(sorted(map(str, unexpected)))}{'' if convert else hint}"
            )
        random = saved_seed is not None and _seed(expected.settings, [storage]) is not None
        if not convert and (random or storage.state == "8bit"):
            own_order = list(long_axes(param))
            _check_place(where, "order of axes in memory", list(orders[key]), own_order)
        if not convert and random:
            _check_place(where, "place among all parameters", places[key], i)
        arrays = {"step": np.array(_count(f"{where}['step']", slots["step"]))}
        for name in slots.keys() - {"step"}:
            entry, form = f"{where}[{name!r}]", storage.form(param, name)
            arrays[name] = fitting(entry, slots[name], form, param, CONVERTED[:2])
        state.append(arrays)
        if checkpoint:
            where, form = f"{source}['params'][{key!r}]", (param.dtype, param.shape)
            params.append(fitting(where, value, form, param, CONVERTED))

    if (saved["ema"] is not None) != (members.ema is not None):
        who = "the optimizer has" if saved["ema"] is None else "what was saved has"
        raise ValueError(f"{source}['ema']: only {who} averages of the weights (ema_decay)")
    ema = [] if saved["ema"] is None else averages("ema")
    accumulated_steps, sums = _accumulated(
        expected, saved["accumulated"], f"{source}['accumulated']"
    )
    return Verified(
        groups,
        state,
        ema,
        params,
        completed_steps,
        accumulated_steps,
        {
            i: fitting(
                f"{source}['accumulated']['sums'][{keys[i]!r}]",
                array,
                (members.storage[i].arithmetic, members.params[i].shape),
                members.params[i],
                (),
            )
            for i, array in sums.items()
        },
        fresh,
    )


def _saved_orders(members: Members, saved: Any, source: str) -> dict[Any, tuple[int, ...]]:
    """Return how each of the parameters lay in memory that were saved."""
    if not isinstance(saved, Mapping):
        raise TypeError(f"{source} must be a dict, got {type(saved).__name__}")
    in_c_order = {
        key: tuple(sorted(long_axes(param)))
        for key, param in zip(members.keys, members.params, strict=True)
    }
    unexpected = [key for key in saved if key not in in_c_order]
    if unexpected:
        raise ValueError(f"{source}: unexpected {_few(unexpected)}")
    for key, order in saved.items():
        axes = in_c_order[key]
        whole = isinstance(order, (list, tuple)) and all(type(axis) is int for axis in order)
        if not whole or tuple(sorted(order)) != axes:
            raise ValueError(
                f"{source}[{key!r}] must be the axes {list(axes)} in some order, got {order!r:.100}"
            )
    return in_c_order | {key: tuple(order) for key, order in saved.items()}


def _check_place(where: str, what: str, saved: Any, own: Any) -> None:
    """Check what 8-bit blocks or random bits go by."""
    if saved != own:
        raise ValueError(
            f"{where}: the parameter's {what} was {saved} when it was saved and is {own} here; "
            "8-bit blocks and random rounding go by that: load it with convert=True"
        )


def pairs(members: Members, new: Verified) -> tuple[list[Array], list[Array]]:
    """Return the arrays to write to, and what to write into each.

    What was not saved of a parameter's state is zeros.
    """
    to = [array for own in members.state for array in own.values()]
    values = [
        loaded[name] if name in loaded else np.zeros((), array.dtype)
        for own, loaded in zip(members.state, new.state, strict=True)
        for name, array in own.items()
    ]
    to += members.ema or ()
    values += new.ema
    to += [members.sums[i] for i in new.sums] if members.sums else []
    values += new.sums.values()
    if new.params:
        to += members.params
        values += new.params
    return to, values


def fresh_slots(rule: Rule, members: Members, new: Verified) -> list[tuple[str, ...]]:
    """Return each parameter's slots that no step has written yet."""
    return [
        tuple(
            slot
            for slot in rule.begins
            if slot in new.fresh[i]
            or (storage.arrays(slot)[0] in own and storage.arrays(slot)[0] not in new.state[i])
        )
        for i, (storage, own) in enumerate(zip(members.storage, members.state, strict=True))
    ]


def _fresh(slots: dict[str, Any], begins: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Take the marks of what has begun out of a parameter's state; return which slots have not."""
    marks = {
        slot: slots.pop(begun(slot))
        for slot in begins
        if begun(slot) in slots and not slots.keys().isdisjoint(all_arrays(slot))
    }
    for name, mark in marks.items():
        if _count(f"{where}[{begun(name)!r}]", mark) > 1:
            raise ValueError(f"{where}[{begun(name)!r}] must be 0 or 1, got {mark!r}")
    return tuple(name for name, mark in marks.items() if mark == 0)


def _accumulated(expected: Expected, saved: Any, source: str) -> tuple[int, dict[int, Any]]:
    """Return how many micro-batches were summed, and the sums by the parameters' numbers."""
    if saved is None:
        return 0, {}
    _same_keys(source, ["steps", "sums"], saved)
    steps = _count(f"{source}['steps']", saved["steps"])
    if not 0 < steps < expected.settings.accumulate:
        raise ValueError(
            f"{source}['steps'] must be > 0 and below the optimizer's "
            f"accumulate={expected.settings.accumulate}, got {steps}"
        )
    sums = saved["sums"]
    if not isinstance(sums, Mapping):
        raise TypeError(f"{source}['sums'] must be a dict, got {type(sums).__name__}")
    numbers = {key: i for i, key in enumerate(expected.members.keys)}
    unexpected = [key for key in sums if key not in numbers]
    if unexpected:
        raise ValueError(f"{source}['sums']: unexpected {_few(unexpected)}")
    return steps, {numbers[key]: array for key, array in sums.items()}


def _groups(expected: Expected, saved: Any, source: str) -> list[dict[str, Any]]:
    own = expected.members.groups
    if not isinstance(saved, list) or len(saved) != len(own):
        count = len(saved) if isinstance(saved, list) else type(saved).__name__
        raise ValueError(f"{source}: expected a list of {len(own)}, got {count}")
    groups, first = [], 0
    for number, (group, loaded) in enumerate(zip(own, saved, strict=True)):
        where = f"{source}[{number}]"
        if not isinstance(loaded, Mapping) or "params" not in loaded:
            raise TypeError(f"{where} must be a dict with 'params'")
        last = first + len(group["params"])
        _same_keys(f"{where}['params']", expected.members.keys[first:last], loaded["params"])
        first = last
        later = {name: _LATER_OPTIONS[name] for name in expected.options if name in _LATER_OPTIONS}
        options = later | {
            name: frozen(value)  # a copy
            for name, value in loaded.items()
            if name != "params"
        }
        if callable(options.get("lr")):
            raise TypeError(f"{where}['lr'] must be a number, got a callable")
        required = set(expected.options) - {"lr"}
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
        raise ValueError(f"{where}: missing {_few(missing)}, unexpected {_few(unexpected)}")


def _few(names: list[Any], most: int = 10) -> str:
    return f"{names[:most]}" + (f" and {len(names) - most} more" if len(names) > most else "")


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


def _check_fits(
    where: str, array: Any, form: Any, param: Array, converted_kinds: Collection[str]
) -> None:
    """Check the dtype and shape of an array that goes with a parameter."""
    dtype, shape = form
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"{where} must be a numpy.ndarray, got {type(array).__name__}{hint_for(array)}"
        )
    if array.dtype != dtype:
        whose = "the parameter's " if dtype == param.dtype else ""
        hint = _CONVERT if {array.dtype.name, str(dtype)} <= {*converted_kinds} else ""
        raise TypeError(f"{where}: dtype {array.dtype} is not {whose}{dtype}{hint}")
    if array.shape != shape:
        whose = "the parameter's " if shape == param.shape else ""
        raise ValueError(f"{where}: shape {array.shape} is not {whose}{shape}")


# ---- as a file's texts and arrays, by name -------------------------------------------------------


def as_file(
    saved: Mapping[str, Any], params: list[Array]
) -> tuple[dict[str, str], dict[str, Array]]:
    """Return a state dict, and the parameters, as texts and arrays by their names in a file."""
    import json  # which takes a millisecond

    names = file_names(saved["state"])
    arrays = {}
    for key, param in zip(saved["state"], params, strict=True):
        arrays[f"params/{names[key]}"] = param
        for slot, array in saved["state"][key].items():
            arrays[f"state/{names[key]}/{slot}"] = array
        if saved["ema"] is not None:
            arrays[f"ema/{names[key]}"] = saved["ema"][key]
    if saved["accumulated"] is not None:
        arrays[_ACCUMULATED_STEPS] = np.array(saved["accumulated"]["steps"], np.int64)
        for key, array in saved["accumulated"]["sums"].items():
            arrays[f"sum/{names[key]}"] = array
    texts = {
        "rule": saved["rule"],
        "semantics": saved["semantics"],
        "completed_steps": json.dumps(saved["completed_steps"]),
        "param_groups": json.dumps(saved["param_groups"], default=_plain),
    }
    if saved["seed"] is not None:
        texts["seed"] = json.dumps(saved["seed"])
    if saved["memory_order"]:
        texts["memory_order"] = json.dumps(
            {names[key]: order for key, order in saved["memory_order"].items()}
        )
    return texts, arrays


def file_names(keys: Iterable[Any]) -> dict[Any, str]:
    """Return what stands for each parameter's key in a file."""
    names: dict[Any, str] = {}
    taken = set()
    for key in keys:
        if not isinstance(key, str) and type(key) is not int:
            raise TypeError(f"{label(key)}: to be saved, names must be strings or integers")
        if str(key) in taken:
            raise ValueError(f"{label(key)}: another has the same name in a file")
        taken.add(str(key))
        names[key] = str(key)
    return names


def _plain(value: Any) -> Any:
    """Return a hyperparameter, which has been checked, as JSON knows it."""
    return float(value) if isinstance(value, Real) else bool(value)  # np.bool_ is no Real


def from_file(
    keys: Iterable[Any], source: str, texts: Mapping[str, str], arrays: Mapping[str, Array]
) -> dict[str, Any]:
    """Return a file's content as a state dict that has parameters too."""
    import json

    key_of = {name: key for key, name in file_names(keys).items()}
    saved: dict[str, Any] = {"params": {}, "state": {}, "ema": {}, "sum": {}}
    accumulated: dict[str, Any] = {}
    for tensor, array in arrays.items():
        if tensor == _ACCUMULATED_STEPS:
            accumulated["steps"] = array
            continue
        kind, _, name = tensor.partition("/")
        if kind not in saved:
            raise ValueError(f"{source}: unexpected tensor {tensor!r}")
        if kind == "state":
            name, _, slot = name.rpartition("/")
            saved[kind].setdefault(key_of.get(name, name), {})[slot] = array
        else:
            saved[kind][key_of.get(name, name)] = array
    saved["ema"] = saved["ema"] or None
    sums = saved.pop("sum")
    saved["accumulated"] = {**accumulated, "sums": sums} if accumulated or sums else None
    for entry in ("rule", "semantics"):
        saved[entry] = texts.get(entry)
    absent = {"seed": "null", "memory_order": "{}"}
    for entry in ("completed_steps", "param_groups", *absent):
        try:
            saved[entry] = json.loads(texts.get(entry, absent.get(entry, "")))
        except (ValueError, RecursionError):
            raise ValueError(f"{source}: its {entry!r} cannot be read") from None
    if isinstance(saved["memory_order"], dict):
        saved["memory_order"] = {
            key_of.get(name, name): order for name, order in saved["memory_order"].items()
        }
    return saved
