"""Keras's variables on its PyTorch backend, which updates them in place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope

from fastopt import _tensors
from fastopt.keras._step import (
    Correction,
    RefusedError,
    Settings,
    Step,
    Unfit,
    unfit_dtype,
    unfit_shape,
    with_rate,
)

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"fastopt.keras needs PyTorch 2.13 or newer, this is {torch.__version__}")

# Only now: with an older PyTorch its own error would name the other adapter.
from fastopt._pytorch import share_threads

_NARROW = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_NARROW)


def native(variable: Any) -> Any:
    return variable


def by_itself() -> bool:
    """Tell whether variables are what they seem, and not stand-ins of a stateless scope."""
    return not in_stateless_scope()


def unfit_step() -> Unfit | None:
    """Return why no kernel can run where this is called."""
    if not by_itself():
        return Unfit("the step is stateless", "apply() lets fastopt's kernels run.")
    if torch.compiler.is_compiling():
        return Unfit(
            "torch.compile compiles the step, and no outside kernel can run in it",
            "jit_compile=False in compile(), or a step outside of torch.compile, lets fastopt's "
            "kernels run.",
        )
    return None


def unfit(variable: Any, grad: Any) -> Unfit | None:
    """Return why the kernels cannot update a variable; without a gradient, with a dense one."""
    value = variable._value  # which is what `value` returns, in several times as long
    if value.dtype not in _DTYPES:
        return unfit_dtype(_name(value.dtype), [*map(_name, _DTYPES)])
    if (why := _unfit_tensor(value)) is not None:
        return Unfit(f"its {why}", "fastopt's kernels run for plain ones on the CPU.")
    if not value.is_contiguous():
        return Unfit("its memory is not in order", "fastopt's kernels run for contiguous() ones.")
    if grad is None:
        return None
    if not isinstance(grad, torch.Tensor):
        return Unfit(
            f"its gradient is of type {type(grad).__name__}", "fastopt's kernels run with a tensor."
        )
    if (why := _unfit_tensor(grad)) is not None:
        return Unfit(
            f"its gradient's {why}", "fastopt's kernels run with plain tensors on the CPU."
        )
    if grad.shape != value.shape:
        return unfit_shape(value.shape, grad.shape)
    return None


def is_sparse(grad: Any) -> bool:
    """Tell whether a gradient is of some rows; Keras's layers make none on this backend."""
    return isinstance(grad, torch.Tensor) and grad.layout is torch.sparse_coo


def clipped(grads: list[Any], clip: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """Return gradients as Keras clips them; it sums the rows of sparse ones by itself."""
    return clip(grads)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unfit_tensor(tensor: torch.Tensor) -> str | None:
    if tensor.layout is not torch.strided:
        return f"layout is {tensor.layout}"
    if not tensor.is_cpu:
        return f"device is {tensor.device}"
    if tensor.is_neg():
        return "elements are stored as their negatives"
    if tensor.is_complex():
        return "elements are complex"
    return None


def share_memory(some: list[tuple[Any, Any]], others: list[tuple[Any, Any]]) -> bool:
    """Tell whether updates of these variables and of others could change one another's arrays.

    Where it could, or that cannot be told, the order of updates matters.
    """
    try:
        spans = [
            (*_span(tensor), written, ours)
            for pairs, ours in ((some, True), (others, False))
            for grad, variable in pairs
            for tensor, written in ((variable._value, True), (grad, False))
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and tensor.is_cpu
        ]
    except RuntimeError:  # a tensor without memory of its own
        return True
    ends: dict[tuple[bool, bool], int] = {}
    for low, high, written, ours in sorted(spans):
        for (was_written, was_ours), end in ends.items():
            if low < end and (written or was_written) and (ours or was_ours):
                return True
        ends[written, ours] = max(high, ends.get((written, ours), 0))
    return False


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first address of a tensor's memory, and the one after the last."""
    low, each = tensor.data_ptr(), tensor.element_size()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((n - 1) * stride for n, stride in steps)
    return low, low + (last + 1) * each if tensor.numel() > 0 else low


def size(variable: Any) -> int:
    """Return the number of a variable's elements."""
    return int(variable._value.numel())


def rounded(value: Any) -> float:
    """Return a hyperparameter as it is: PyTorch takes it as a number, in double."""
    return float(value)


class Updates:
    """Updates in place, as Keras's own on this backend.

    The latest step is kept for as long as it is the same, and all tensors are where they were.
    """

    _step: Step | None = None
    _key: Any = None
    _memory: _tensors.Tensors

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def find(
        self, settings: Settings, variables: list[Any], grads: list[Any]
    ) -> Callable[..., None]:
        """Return what updates variables: those of the model, then what each has beside it."""
        values = [v._value for v in variables]
        params = values[: len(grads)]
        grads = [
            g if g.dtype == p.dtype else g.to(p.dtype) for g, p in zip(grads, params, strict=True)
        ]
        key = (settings, *map(id, values))
        with self._lock:
            try:
                arrays = [_tensors.as_array(torch.Tensor, g) for g in grads]
                step = self._step
                if step is None or key != self._key or not self._memory.in_place():
                    self._step = None
                    self._memory, self._key = _tensors.Tensors(torch.Tensor, values), key
                    first = _rates_dtype(values[0].dtype)
                    step = self._step = Step(
                        settings,
                        self._memory.arrays,
                        lambda correction, group, _, *now: _rates(correction, group, first, *now),
                    )
            except (TypeError, RuntimeError, BufferError) as error:  # memory that cannot be read
                raise RefusedError(str(error)) from error

        def update(*now: Any, _kept: Any = grads) -> None:
            # The arrays are over the memory of these tensors, and do not keep it.
            with self._lock:
                share_threads(step.plan)
                step(arrays, *map(_number, now))
            torch.autograd.graph.increment_version(values)

        return update


def _number(value: Any) -> Any:
    """Return a tensor for a variable."""
    value = value.value if isinstance(value, keras.Variable) else value
    return value.detach() if isinstance(value, torch.Tensor) else value


def _rates_dtype(first: torch.dtype) -> torch.dtype:
    """Return what rates are computed in: Keras does it in the type of the first variable, for all.

    In 16 bits its correction of a bias can be 0 (``arithmetic_of``), so that is done in float32.
    """
    return torch.float32 if first in _NARROW else first


def _rates(
    correction: Correction | None,
    group: dict[str, float],
    dtype: torch.dtype,
    learning_rate: Any,
    iterations: Any,
) -> dict[str, float]:
    """Return a step's hyperparameters, computed as Keras does, with PyTorch and in its types.

    But not in 16 bits (:func:`_rates_dtype`), where a decay by less than 1/512 would be none.
    """
    if (kept := torch.as_tensor(learning_rate)).dtype in _NARROW:
        learning_rate = kept.float()
    rate = float(learning_rate)
    row = {**group, "lr": rate}
    if group["weight_decay"] != 0 and rate != 0:
        row["weight_decay"] = (1 - float(1 - group["weight_decay"] * learning_rate)) / rate
    if correction is not None:
        step = torch.as_tensor(iterations + 1, dtype=dtype)
        left1, left2 = (
            1 - torch.pow(torch.as_tensor(row[name], dtype=dtype), step)
            for name in ("beta1", "beta2")
        )
        lr = torch.as_tensor(learning_rate, dtype=dtype)
        rate = float(correction(lr, left1, left2, torch.sqrt))
        row = with_rate(row, rate, int(iterations) + 1, correction)
    return row


if TYPE_CHECKING:  # that this module is a backend
    from fastopt.keras import _torch
    from fastopt.keras._backend import Backend

    _backend: Backend = _torch
