"""From the shares of state that ranks have to all of it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt import _core, _saved
from fastopt._members import Members, ParameterState, Part
from fastopt._memory import Array, in_memory_order, in_order, memory_order, zeros_like
from fastopt._settings import Settings
from fastopt._storage import Storage
from fastopt.mpi._agreement import Ranks

AT_A_TIME = 1 << 28  # bytes of a message: MPI counts to 2^31


def room_for(members: Members) -> Members:
    """Return members like these, with room for all of each parameter's state."""
    each = list(zip(members.wholes, members.storage, members.state, strict=True))
    return members._replace(
        params=members.wholes,
        parts=None,
        state=[
            ParameterState({name: kind.zeros(whole, name) for name in own})
            for whole, kind, own in each
        ],
        ema=None
        if members.ema is None
        else [zeros_like(whole, kind.arithmetic) for whole, kind, _ in each],
        sums=None,
    )


def gather(ranks: Ranks, members: Members, root: int, room: Members | None) -> None:
    """Put all of each parameter's state into room for it, on one rank; on others it is None."""
    for i, (whole, part, storage) in enumerate(
        zip(members.wholes, members.parts or (), members.storage, strict=True)
    ):
        for name, array in members.state[i].items():
            _, shape = storage.form(whole, name)
            to = None if room is None else room.state[i][name]
            if name == "step" or name in storage.numbers:
                if to is not None:
                    to[...] = array  # the same on all ranks
                continue
            per = _core.SCALED if shape != whole.shape else 1
            _collect(ranks, array, [-(-bound // per) for bound in part.bounds], root, to)
        if members.ema is not None:
            to = None if room is None or room.ema is None else room.ema[i]
            _collect(ranks, members.ema[i], part.bounds, root, to)


def _collect(ranks: Ranks, own: Array, bounds: Any, root: int, to: Array | None) -> None:
    """Put a vector of which every rank has a part into an array on one rank."""
    if to is None:
        for piece in _pieces(own):
            ranks.comm.Send(piece, root)
        return
    vector = in_memory_order(to)
    for rank in range(ranks.size):
        part = vector[bounds[rank] : bounds[rank + 1]]
        if rank == root:
            part[...] = own
            continue
        for piece in _pieces(part):
            ranks.comm.Recv(piece, rank)


def _pieces(vector: Array) -> list[Array]:
    data = vector.view(np.uint8)
    return [data[i : i + AT_A_TIME] for i in range(0, data.size, AT_A_TIME)]


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
            if theirs != own_orders.get(key, []) and _is_whole(members, saved, i):
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


def _is_whole(members: Members, saved: Mapping[str, Any], i: int) -> bool:
    """Tell whether anything that was saved of a parameter is of all of it, and not a share."""
    key, whole, storage = members.keys[i], members.wholes[i], members.storage[i]
    state, params = saved["state"].get(key, {}), saved.get("params", {})
    found = [params.get(key)] if isinstance(params, Mapping) else []
    if isinstance(state, Mapping):
        found += [
            array for name, array in state.items() if storage.form(whole, name)[1] == whole.shape
        ]
    return whole.shape != members.params[i].shape and any(
        isinstance(array, np.ndarray) and array.shape == whole.shape for array in found
    )


def _state_of_share(members: Members, i: int, state: Mapping[str, Any]) -> dict[str, Any]:
    whole, part, storage = members.wholes[i], _of(members, i), members.storage[i]
    return {name: _slot_of_share(storage, whole, part, name, x) for name, x in state.items()}


def _slot_of_share(storage: Storage, whole: Array, part: Part, name: str, array: Any) -> Any:
    marks = {*map(_saved.begun, storage.slots)}
    if not isinstance(name, str) or name == "step" or name in marks or name in storage.numbers:
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
    return in_order(array, memory_order(whole))[part.begin : part.end]
