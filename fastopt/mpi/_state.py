"""From the shares of state that ranks have to all of it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt import _core, _saved
from fastopt._members import Members, ParameterState, Part
from fastopt._memory import Array, laid_out, memory_order
from fastopt._settings import Settings
from fastopt._storage import Storage
from fastopt.mpi._agreement import Ranks

AT_A_TIME = 1 << 28  # bytes of a message: MPI counts to 2^31


def gathered(ranks: Ranks, members: Members, root: int) -> Members | None:
    """Return members that have all of each parameter's state; None on all ranks but `root`."""
    states: list[ParameterState] = []
    averages: list[Any] = []
    for i, (whole, part, storage) in enumerate(
        zip(members.wholes, members.parts or (), members.storage, strict=True)
    ):
        state = {}
        for name, array in members.state[i].items():
            _, shape = storage.form(whole, name)
            if shape == array.shape == ():
                state[name] = array.copy()  # a number, the same on all ranks
                continue
            per = _core.SCALED if shape != whole.shape else 1
            vector = _collected(ranks, array, [-(-b // per) for b in part.bounds], root)
            if vector is not None:
                state[name] = vector if per > 1 else _as_whole(vector, whole)
        states.append(ParameterState(state))
        if members.ema is not None:
            vector = _collected(ranks, members.ema[i], part.bounds, root)
            averages.append(vector if vector is None else _as_whole(vector, whole))
    if ranks.rank != root:
        return None
    return members._replace(
        params=members.wholes,
        parts=None,
        state=states,
        ema=None if members.ema is None else averages,
        sums=None,
    )


def _collected(ranks: Ranks, own: Array, bounds: Any, root: int) -> Array | None:
    """Return a vector of which every rank has a part; None on all ranks but `root`."""
    if ranks.rank != root:
        for piece in _pieces(own):
            ranks.comm.Send(piece, root)
        return None
    vector = np.empty(bounds[-1], own.dtype)
    for rank in range(ranks.size):
        part = vector[bounds[rank] : bounds[rank + 1]]
        if rank == root:
            part[...] = own
            continue
        for piece in _pieces(part):
            ranks.comm.Recv(piece, rank)
    return vector


def _pieces(vector: Array) -> list[Array]:
    data = vector.view(np.uint8)
    return [data[i : i + AT_A_TIME] for i in range(0, data.size, AT_A_TIME)]


def _as_whole(vector: Array, whole: Array) -> Array:
    return laid_out(vector, whole.shape, memory_order(whole))


def share_of(settings: Settings, members: Members, saved: Any, source: str) -> Any:
    """Return a state dict, or a checkpoint's content, with this rank's share of what is whole.

    What does not look like one is left as it is: others check it.
    """
    if not isinstance(saved, Mapping):
        return saved
    if saved.get("accumulated") is not None:
        raise ValueError(
            f"{source}['accumulated']: it was saved between the micro-batches of an update, which "
            "cannot be shared out over MPI; save after an update"
        )
    saved = dict(saved)
    places = {key: i for i, key in enumerate(members.keys)}
    orders = saved.get("memory_order") or {}
    own_orders = _saved.orders_of(settings, members._replace(params=members.wholes))
    if isinstance(orders, Mapping) and isinstance(saved.get("state"), Mapping):
        for key, i in places.items():
            theirs = list(orders.get(key, ()))
            if theirs != own_orders.get(key, []) and not _is_share(members, saved, i):
                raise ValueError(
                    f"{source}['memory_order'][{key!r}] is {theirs or 'C order'}, the parameter's "
                    f"here {own_orders.get(key, 'C order')}: 8-bit blocks and random rounding go "
                    "by that, and over MPI such state is not converted"
                )
        saved["memory_order"] = {}
        saved["state"] = {
            key: _state_of_share(members, places[key], state)
            if key in places and isinstance(state, Mapping)
            else state
            for key, state in saved["state"].items()
        }
    for entry in ("ema", "params"):
        if isinstance(saved.get(entry), Mapping):
            saved[entry] = {
                key: _part(array, members.wholes[places[key]], _of(members, places[key]))
                if key in places
                else array
                for key, array in saved[entry].items()
            }
    return saved


def _of(members: Members, i: int) -> Part:
    assert members.parts is not None
    return members.parts[i]


def _is_share(members: Members, saved: Any, i: int) -> bool:
    """Tell whether what was saved of a parameter's state is this rank's share of it already."""
    state = saved["state"].get(members.keys[i], {})
    whole, param, storage = members.wholes[i], members.params[i], members.storage[i]
    return whole.shape != param.shape and any(
        isinstance(array, np.ndarray) and array.shape == param.shape
        for name, array in state.items()
        if storage.form(whole, name)[1] == whole.shape
    )


def _state_of_share(members: Members, i: int, state: Mapping[str, Any]) -> dict[str, Any]:
    whole, part, storage = members.wholes[i], _of(members, i), members.storage[i]
    return {name: _slot_of_share(storage, whole, part, name, x) for name, x in state.items()}


def _slot_of_share(storage: Storage, whole: Array, part: Part, name: str, array: Any) -> Any:
    if name == "step" or name in storage.numbers or not isinstance(name, str):
        return array
    slot = name.removesuffix("_scale")
    if slot == name:
        return _part(array, whole, part)
    n_scales = -(-whole.size // _core.SCALED)
    if not isinstance(array, np.ndarray) or array.shape != (n_scales,):
        return array
    begin, end = (-(-bound // _core.SCALED) for bound in (part.begin, part.end))
    return array[begin:end]


def _part(array: Any, whole: Array, part: Part) -> Any:
    """Return the share of an array that has its parameter's shape; anything else as it is."""
    if not isinstance(array, np.ndarray) or array.shape != whole.shape:
        return array
    return np.asarray(array).transpose(memory_order(whole)).reshape(-1)[part.begin : part.end]
