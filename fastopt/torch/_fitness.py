"""Which of PyTorch's parameters fastopt's kernels can update, and what to tell of the others."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastopt import _core, _tensors
from fastopt._framework import is_frameworks
from fastopt._storage import Storage
from fastopt._warnings import FallbackWarning
from fastopt.torch._local import cut_alike, is_dtensor, is_partial, local
from fastopt.torch._rows import takes_rows, unfit_rows
from fastopt.torch._storage import DTYPES, NARROW, array_of, form_of, layout, shape_of

KINDS = (torch.Tensor, torch.nn.Parameter)  # subclasses may have an arithmetic of their own
SHARES = "it shares memory with another parameter"
MIXED = "others of its group share memory and differ in dtype: their order depends on all of it"
COMPILED = "the step is inside of torch.compile"
DENSE = "its gradient is dense"
DISPATCHED = "a dispatch mode (FakeTensorMode, say) is to see every operation of the step"


def reasons(optimizer: Any) -> tuple[list[str | None], set[int]]:
    """Return for each parameter why the kernels cannot update it now, or None: they can.

    And which of them it is for what shares memory, by their places in that list.
    """
    params: list[torch.Tensor] = []
    why: list[str | None] = []
    ranges = []
    for group in optimizer.param_groups:
        reason = unfit_group(group)
        used = () if reason else optimizer._rule.used_slots(optimizer._row(group))
        by_rows = reason is None and takes_rows(optimizer, group)
        ranges.append(range(len(params), len(params) + len(group["params"])))
        for param in group["params"]:
            params.append(param)
            why.append(reason or unfit(optimizer, param, used, by_rows))
    sharing, mixed = _sharing(params)
    for i in sharing:
        why[i] = why[i] or SHARES
    for group, indices in zip(optimizer.param_groups, ranges, strict=True):
        if is_by_dtype(group) and not mixed.isdisjoint(indices):
            sharing.update(indices)
            for i in indices:
                why[i] = why[i] or MIXED
    return why, sharing


def is_by_dtype(group: Mapping[str, Any]) -> bool:
    """Tell whether PyTorch updates a group's parameters of one dtype first, then of another."""
    return bool(group.get("foreach") or group.get("fused"))


# ---- memory --------------------------------------------------------------------------------------


def _sharing(params: list[torch.Tensor]) -> tuple[set[int], set[int]]:
    """Return the indices of parameters whose stretches of memory meet those of others.

    The second list has those of them that meet a parameter of another dtype.
    """
    found = [(*stretch, i) for i, param in enumerate(params) for stretch in extents(param)]
    sharing: set[int] = set()
    mixed: set[int] = set()
    together: set[int] = set()
    end = 0
    for low, high, i in sorted(found):
        if low >= end:
            together = set()
        together.add(i)
        if len(together) > 1:
            sharing |= together
            if len({params[k].dtype for k in together}) > 1:
                mixed |= together
        end = max(end, high)
    return sharing, mixed


def extents(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Return the stretches of memory from a tensor's first element to its last, where known."""
    found = []
    for piece in pieces([tensor]):
        try:
            low, high = _tensors.extent(torch.Tensor, piece)
        except (TypeError, RuntimeError, BufferError):  # of another device, say
            continue
        if low < high:
            found.append((low, high))
    return found


def is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's elements are in its own memory, where they can be looked at."""
    try:
        _tensors.extent(torch.Tensor, tensor)
    except (TypeError, RuntimeError, BufferError):
        return False
    return type(tensor) in KINDS and tensor.layout is torch.strided


def pieces(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors whose memory holds the elements of tensors."""
    found = []
    for tensor in tensors:
        if type(tensor) not in KINDS and hasattr(tensor, "__tensor_flatten__"):  # of DTensor, say
            parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
            found += pieces([part for part in parts if isinstance(part, torch.Tensor)])
        elif tensor.layout is torch.strided:
            found.append(tensor.detach().conj() if tensor.is_conj() else tensor)
        elif tensor.layout is torch.sparse_coo:
            found.append(tensor.detach()._values())
        elif tensor.layout in _COMPRESSED:
            found.append(tensor.detach().values())
    return found


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


# ---- fitness -------------------------------------------------------------------------------------


def unfit_group(group: Mapping[str, Any]) -> str | None:
    for option in ("differentiable", "capturable"):
        if group.get(option):
            return f"{option}=True"
    for name, tensor in _tensor_options(group):
        if tensor.requires_grad:
            return f"{name} requires a gradient"
    return None


def is_fixed(value: Any) -> bool:
    """Tell whether an option cannot change where it is, as a tensor, a list or an array may."""
    if isinstance(value, tuple):
        return all(is_fixed(part) for part in value)
    return value is None or isinstance(value, (int, float, str))


def _tensor_options(group: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the hyperparameters that are tensors."""
    for name, value in group.items():
        if name not in ("params", "param_names"):
            for number in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(number, torch.Tensor):
                    yield name, number


def unfit(optimizer: Any, param: torch.Tensor, used: tuple[str, ...], by_rows: bool) -> str | None:
    """Return why this parameter, its gradient or its state is not for the kernels, if so.

    `by_rows` tells whether a sparse gradient is to update its rows alone.
    """
    grad, state = param.grad, optimizer.state.get(param)
    if is_dtensor(param):
        if (why := _unfit_dtensor(optimizer, param)) is not None:
            return why
        grad = None if grad is None else local(grad)
        state = {name: local(value) for name, value in state.items()} if state else state
        param = local(param)
    if (why := _unfit_tensor(param)) is not None:
        return f"its {why}"
    try:
        _core.check_parameter(array_of(param), "it", narrow=True)
    except ValueError as error:
        return str(error)
    if param.is_inference():
        return "it is an inference tensor"
    if grad is not None:
        values = grad
        if by_rows and type(grad) in KINDS and grad.is_sparse:
            if (why := unfit_rows(param, grad)) is not None:
                return why
            values = grad.detach()._values()
        elif optimizer._takes_rows_alone:
            return DENSE
        if (why := _unfit_tensor(values)) is not None:
            return f"its gradient's {why}"
        if grad.shape != param.shape or (
            grad.dtype == torch.float64 != param.dtype  # float32 has all values of the others
        ):
            return "its gradient has another dtype or shape"
    return _unfit_state(optimizer, param, state, used) if state else None


def _unfit_dtensor(optimizer: Any, param: torch.Tensor) -> str | None:
    """Return why what this process has of a DTensor, its gradient and its state is not enough."""
    if not is_frameworks(optimizer._storage_of(param), optimizer._options):
        return "its type is DTensor, and its state is not to be stored as PyTorch does it"
    if is_partial(param):
        return "its type is DTensor, of which each process has a summand"
    if param.grad is not None and not cut_alike(param, param.grad):
        return "its type is DTensor, and its gradient is not placed as it is"
    for name, value in (optimizer.state.get(param) or {}).items():
        if isinstance(value, torch.Tensor) and value.dim() and not cut_alike(param, value):
            return f"its type is DTensor, and its state's {name} is not placed as it is"
    return None


def _unfit_state(
    optimizer: Any, param: torch.Tensor, state: Mapping[str, Any], used: tuple[str, ...]
) -> str | None:
    storage: Storage = optimizer._storage_of(param)
    names = [storage.master] if state.get(storage.master) is not None else []
    for slot in used:
        arrays = storage.arrays(slot)
        if optimizer._counts or any(state.get(name) is not None for name in arrays):
            names += arrays  # else they are made late, as PyTorch's SGD makes its buffer
    for name in names:
        tensor = state.get(name)
        if not isinstance(tensor, torch.Tensor):
            return f"its state has no tensor {name!r}"
        dtype, shape = form_of(storage, name), shape_of(storage, param, name)
        if name in storage.numbers and tensor.dtype in (torch.float32, torch.float64):
            dtype = tensor.dtype  # of which it is, depends on who made it
        if (why := _unfit_tensor(tensor, dtype)) is not None:
            return f"its state: {name}'s {why}"
        lies = layout(tensor) == layout(param) if shape == param.shape else tensor.is_contiguous()
        if tensor.dtype != dtype or tensor.shape != shape or not lies:
            return f"its state: {name} has another dtype, shape or memory order"
    step = state.get("step")
    if optimizer._counts_in_ints:
        if type(step) is not int or step < 0:
            return "its state: step is not a whole number of Python's"
    elif step is not None and not (
        isinstance(step, torch.Tensor)
        and _unfit_tensor(step) is None
        and step.dtype not in NARROW
        and step.dim() == 0
        and step.item() >= 0
        and step.item().is_integer()
    ):
        return "its state: step is not a whole number in a 0-d tensor of float32 or float64"
    return None


def _unfit_tensor(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str | None:
    if type(tensor) not in KINDS:
        return f"type is {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"layout is {tensor.layout}"
    if not tensor.is_cpu:
        return f"device is {tensor.device}"
    if tensor.dtype not in (*DTYPES, dtype):
        return f"dtype is {tensor.dtype}"
    if tensor.is_neg():
        return "elements are stored as their negatives"
    try:
        array_of(tensor)
    except (TypeError, RuntimeError, BufferError) as error:  # a tensor inside of torch.func, say
        return f"memory cannot be read: {str(error).splitlines()[0]}"
    return None


# ---- the warning ---------------------------------------------------------------------------------


def warn(optimizer: Any, left: list[tuple[torch.Tensor, str]], total: int) -> None:
    """Issue the warning that PyTorch's update runs, for these parameters and reasons.

    `total` is the number of elements of all parameters of the step.
    """
    sizes: dict[str, int] = {}
    examples: dict[str, torch.Tensor] = {}
    for param, why in left:
        sizes[why] = sizes.get(why, 0) + param.numel()
        examples.setdefault(why, param)
    why = max(sizes, key=sizes.__getitem__)
    name = optimizer._namesake.__name__
    text = (
        f"fastopt.torch.{name}: PyTorch's own update runs for {sum(sizes.values())} of {total} "
        f"elements in this step. The reason for most of them, such as those of "
        f"{_name_of(optimizer, examples[why])}: {why}. {_way_out(name, examples[why], why)} "
        "fastopt_info() tells the reason for each parameter."
    )
    warnings.warn(FallbackWarning(text), stacklevel=_depth())


def _depth() -> int:
    """Return the stack level, for warnings.warn, of the code that called the optimizer's step."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES:
        frame, level = frame.f_back, level + 1
    return max(level, 1)


_PACKAGES = ("fastopt", "torch", "contextlib")


def _name_of(optimizer: Any, param: torch.Tensor) -> str:
    for number, group in enumerate(optimizer.param_groups):
        for index, other in enumerate(group["params"]):
            if other is param:
                names = group.get("param_names")
                place = f"parameter {index}" + (f" of group {number}" if number else "")
                return f"{place} ({names[index]})" if names else place
    return "a parameter"


def _way_out(name: str, param: torch.Tensor, why: str) -> str:
    """Return the sentences that say how a training becomes fast again."""
    own = f"Or use torch.optim.{name}, which does the same and does not warn"
    fast = _fast(name, param)
    faster = f"; what makes its update fast is {fast}." if fast else "."
    if why == COMPILED:
        return (
            "fastopt's kernels run where step() is called outside of the compiled function. "
            f"{own}{faster}"
        )
    if why == DISPATCHED:
        return f"fastopt's kernels run outside of the mode. {own}{faster}"
    if why.startswith("its dtype"):
        return f"fastopt's kernels take float32, float64, bfloat16 and float16. {own}{faster}"
    if "meta" in why:
        return (
            "Tensors on the meta device have no memory: give them some first (all of a module's "
            "get it from .to_empty(device='cpu'))."
        )
    if "sparse" in why:
        lazily = "; with rows='lazy' or 'exact', sparse gradients too" if "gradient" in why else ""
        if why.startswith("its gradient is"):
            lazily = "; sparse gradients, if their first axis alone is, and its rows are contiguous"
        return f"fastopt's kernels take dense parameters and gradients{lazily}. {own}."
    if why.startswith("its type is DTensor"):
        return (
            "fastopt's kernels take DTensors whose gradient and state are placed as they are. "
            f"{own}{faster}"
        )
    if why.startswith(("its type", "its device", "its gradient's type", "its gradient's device")):
        return f"fastopt's kernels take plain tensors in the CPU's memory. {own}{faster}"
    if why in (SHARES, MIXED):
        return (
            "fastopt's kernels run where each parameter has memory of its own: give a tensor once, "
            f"and not its views. {own}."
        )
    if "not dense" in why:
        return f"fastopt's kernels take parameters without gaps between elements. {own}."
    if why.startswith("its state"):
        return (
            "fastopt's kernels take state of its parameter's dtype, shape and memory order. "
            f"{own}{faster}"
        )
    if why.endswith("=True"):
        return f"fastopt's kernels run without that option. {own}."
    return f"docs/pytorch.md says what fastopt's kernels take. {own}."


def _fast(name: str, param: torch.Tensor) -> str:
    """Return the option that makes PyTorch's own update of a parameter fast."""
    if param.is_complex():  # fused=True refuses it
        return ""
    options = inspect.signature(getattr(torch.optim, name)).parameters
    if "foreach" not in options:
        return ""
    if "fused" not in options:
        return "foreach=True (it has no fused=True)"
    if name == "SGD" and param.dtype in (torch.bfloat16, torch.float16):
        return "foreach=True (not fused=True, which in 16 bits writes only the tail of an array)"
    if type(param) not in KINDS and name in ("SGD", "Adagrad"):  # DTensor's fused=True refuses it
        return "foreach=True"
    return "fused=True"
