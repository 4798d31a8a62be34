"""How parameters and their state are stored: as PyTorch does it, or as the options say.

What PyTorch can read stands under its names. The rest has the names that fastopt's own classes
give it (:mod:`fastopt._storage`); trailing bits are int16 here, since PyTorch cannot copy uint16.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from numpy.typing import NDArray

from fastopt import _core, _framework, _tensors
from fastopt._framework import Options, is_frameworks
from fastopt._storage import MASTERS, Storage, all_arrays

NARROW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *NARROW)


@functools.cache
def storage_for(rule: _core.Rule, options: Options, dtype: torch.dtype) -> Storage:
    """Return how a parameter of a dtype and its state are stored."""
    return _framework.storage_for(rule, options, str(dtype).removeprefix("torch."))


def form_of(storage: Storage, name: str) -> torch.dtype:
    """Return the dtype of the tensor of this name in a parameter's state."""
    if name in MASTERS.values():
        return torch.int16 if name == "master_bits" else torch.float32
    if name in storage.numbers:  # which PyTorch makes of its default dtype
        return torch.float64 if storage.param == "float64" else torch.float32
    if any(storage.in_8bit(name.removesuffix(end)) for end in ("_8bit", "_scale")):
        return torch.uint8
    return dtype_of(_framework.form_of(storage, name))


def dtype_of(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def shape_of(storage: Storage, param: torch.Tensor, name: str) -> torch.Size:
    if name in storage.numbers:
        return torch.Size([])
    if name.endswith("_scale") and storage.in_8bit(name.removesuffix("_scale")):
        return torch.Size([-(-param.numel() // _core.SCALED)])
    return param.shape


def zeros(storage: Storage, param: torch.Tensor, name: str) -> torch.Tensor:
    """Return a new tensor of this name for a parameter's state."""
    dtype, shape = form_of(storage, name), shape_of(storage, param, name)
    if shape != param.shape:
        return torch.zeros(shape, dtype=dtype)
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def array_of(tensor: torch.Tensor) -> NDArray[Any]:
    return _tensors.as_array(torch.Tensor, tensor)


# ---- values --------------------------------------------------------------------------------------


def stored(
    storage: Storage, param: torch.Tensor, slot: str, values: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return new tensors of a slot that store these values, rounded to nearest."""
    tensors = {name: zeros(storage, param, name) for name in storage.arrays(slot)}
    if storage.in_8bit(slot):
        laid_out = torch.zeros_like(param, dtype=torch.float32).copy_(values)
        codes, scales = map(array_of, tensors.values())
        _core.encode(array_of(laid_out), codes, scales, unsigned=slot in storage.unsigned)
    else:
        tensors[slot].copy_(values)
    return tensors


def new_master(storage: Storage, param: torch.Tensor) -> torch.Tensor:
    """Return what is beside a parameter whose value is all that is known."""
    master = zeros(storage, param, storage.master)
    return master.copy_(param) if storage.master == "master" else master


def values_of(storage: Storage, state: Mapping[str, Any], slot: str) -> torch.Tensor:
    """Return a slot's values in what rules compute in: a copy."""
    if not storage.in_8bit(slot):
        return state[slot].to(dtype_of(storage.arithmetic), copy=True)
    codes, scales = (array_of(state[name]) for name in storage.arrays(slot))
    return torch.from_numpy(_core.decode(codes, scales, unsigned=slot in storage.unsigned))


def weights(storage: Storage, param: torch.Tensor, state: Mapping[str, Any]) -> torch.Tensor:
    """Return a parameter's values in what rules compute in, its master's if it has one: a copy."""
    if storage.master not in state:
        return param.detach().to(dtype_of(storage.arithmetic), copy=True)
    array, master = array_of(param), array_of(state[storage.master])
    return torch.from_numpy(_core.decode(array, master))


# ---- loading -------------------------------------------------------------------------------------


class Kept:
    """A tensor that PyTorch's loader is to leave as it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def prepared(
    rule: _core.Rule,
    options: Options,
    groups: list[dict[str, Any]],
    saved: dict[str, Any],
    convert: bool,
) -> dict[str, Any]:
    """Return a saved state for PyTorch's loader, in which Kept is what it would cast; or raise."""
    sizes = [[len(group["params"]) for group in g] for g in (groups, saved["param_groups"])]
    if sizes[0] != sizes[1]:
        return saved  # PyTorch refuses it
    keys = chain.from_iterable(group["params"] for group in saved["param_groups"])
    params = dict(zip(keys, (p for group in groups for p in group["params"]), strict=True))
    if not convert:
        for group in saved["param_groups"]:
            if options.stochastic_rounding and group.get("seed", options.seed) != options.seed:
                raise ValueError(
                    f"seed: the saved optimizer's is {group['seed']}, this one's {options.seed}; "
                    f"make it with seed={group['seed']}, or load with convert=True"
                )
    states = dict(saved["state"])
    for number, (key, param) in enumerate(params.items()):
        state, storage = states.get(key), storage_for(rule, options, param.dtype)
        if isinstance(state, Mapping) and state and param.dtype in DTYPES and param.is_cpu:
            where = f"state of parameter {number}"
            if convert:
                state = _converted(storage, param, state)
            refuse_unlike(storage, state, where)
            numbers = {n: _number(state[n], f"{where}: {n}") for n in storage.numbers if n in state}
            state = {**state, **numbers}
            if not is_frameworks(storage, options):
                state = _kept(storage, param, state, where)
            states[key] = state | {name: Kept(number) for name, number in numbers.items()}
    named = [{k: v for k, v in g.items() if k != "seed"} for g in saved["param_groups"]]
    return {**saved, "state": states, "param_groups": named}


def refuse_unlike(storage: Storage, state: Iterable[str], where: str) -> None:
    """Raise for state under names that it does not have in this storage."""
    own = {name for slot in storage.slots for name in storage.arrays(slot)} | {storage.master}
    every = {name for slot in storage.slots for name in all_arrays(slot)} | {*MASTERS.values()}
    for name in state:
        if name in every - own:
            raise ValueError(
                f"{where}: {name} is not what this optimizer keeps; make it with the "
                "master_weights and state_dtype of the saved one, or load with convert=True"
            )


def _number(value: Any, name: str) -> torch.Tensor:
    """Return a rule's number as a tensor of float32 or float64, neither of which PyTorch casts."""
    try:
        number = torch.as_tensor(value, device="cpu")
        return number.to(torch.promote_types(number.dtype, torch.float32))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} has to be a number, or a 0-d tensor of one, there is {value!r}"
        ) from error


def _kept(
    storage: Storage, param: torch.Tensor, state: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return a state with the tensors that are as this storage has them; or raise."""
    new = dict(state)
    slots = [slot for slot in storage.slots if any(n in state for n in storage.arrays(slot))]
    for name in storage.names(slots)[1:]:
        tensor, dtype = state.get(name), form_of(storage, name)
        shape = shape_of(storage, param, name)
        if name in storage.numbers and isinstance(tensor, torch.Tensor):
            dtype = tensor.dtype
        if not isinstance(tensor, torch.Tensor) or (tensor.dtype, tensor.shape) != (dtype, shape):
            found = "nothing"
            if isinstance(tensor, torch.Tensor):
                found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(
                f"{where}: {name} has to be {dtype} of shape {tuple(shape)}, there is {found}; "
                "make the optimizer with the master_weights and state_dtype of the saved one, or "
                "load with convert=True"
            )
        if shape == param.shape and layout(tensor) != layout(param):
            if name.endswith("_8bit"):
                raise ValueError(
                    f"{where}: {name} has strides {tensor.stride()}, the parameter "
                    f"{param.stride()}; 64 elements in memory order have a scale in common, so "
                    "load into a parameter of the saved memory order, or with convert=True"
                )
            tensor = zeros(storage, param, name).copy_(tensor)
        new[name] = Kept(tensor)
    return new


def _converted(storage: Storage, param: torch.Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state as this storage has it; what cannot be converted is left as it is."""
    new = {name: value for name, value in state.items() if name not in MASTERS.values()}
    if storage.master:
        master = state.get(storage.master)
        fits = isinstance(master, torch.Tensor) and master.dtype == form_of(storage, storage.master)
        new[storage.master] = master if fits else new_master(storage, param)
    for slot in storage.slots:
        if slot in storage.numbers:  # it stays as it is
            continue
        values = _saved_values(storage, param, state, slot)
        if values is None:
            continue
        for name in all_arrays(slot):
            new.pop(name, None)
        new |= stored(storage, param, slot, values)
    return new


def _saved_values(
    storage: Storage, param: torch.Tensor, state: Mapping[str, Any], slot: str
) -> torch.Tensor | None:
    """Return the values of a saved slot; None if there are none, or it lies as it does here."""
    tensors = {
        name: t for name in all_arrays(slot) if isinstance(t := state.get(name), torch.Tensor)
    }
    if (whole := tensors.pop(slot, None)) is not None:
        return whole if whole.shape == param.shape else None
    shapes = [param.shape, (-(-param.numel() // _core.SCALED),)]
    if [(t.dtype, t.shape) for t in tensors.values()] != [(torch.uint8, s) for s in shapes]:
        return None
    codes, scales = tensors.values()
    if storage.in_8bit(slot) and layout(codes) == layout(param):
        return None
    arrays = array_of(codes if is_dense(codes) else codes.contiguous()), array_of(scales)
    return torch.from_numpy(_core.decode(*arrays, unsigned=slot in storage.unsigned))


def layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return the shape, and the strides where they mean something."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.shape, [s for n, s in strides if n != 1 and tensor.numel() > 0]


def is_dense(tensor: torch.Tensor) -> bool:
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return bool(tensor.numel() in (0, reach + 1))
