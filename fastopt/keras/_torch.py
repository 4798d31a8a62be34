"""Keras's variables on its PyTorch backend, which updates them in place."""

from __future__ import annotations

import threading
from typing import Any

import keras
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope

from fastopt import _tensors
from fastopt._torch_threads import share_threads
from fastopt.keras._step import RefusedError, Settings, Step, with_rate

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"fastopt.keras needs PyTorch 2.13 or newer, this is {torch.__version__}")

_DTYPES = (torch.float32, torch.float64)


def native(variable: Any) -> Any:
    return variable


def compiling() -> bool:
    return bool(torch.compiler.is_compiling())


def by_itself() -> bool:
    """Tell whether variables are what they seem, and not stand-ins of a stateless scope."""
    return not in_stateless_scope()


def takes(grad: Any, variable: Any) -> bool:
    value = variable._value  # which is what `value` returns, in several times as long
    return (
        value.dtype in _DTYPES
        and isinstance(grad, torch.Tensor)
        and grad.shape == value.shape
        and _plain(value)
        and _plain(grad)
        and value.is_contiguous()
    )


def _plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.is_cpu
        and not tensor.is_neg()
        and not tensor.is_complex()
    )


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

    def __call__(
        self,
        settings: Settings,
        variables: list[Any],
        grads: list[Any],
        learning_rate: Any,
        iterations: Any,
    ) -> None:
        """Update variables: those of the model, each followed by its slots."""
        values = [v._value for v in variables]
        params = values[:: len(values) // len(grads)]
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
                    first = values[0].dtype  # in which Keras computes the rates for all
                    step = self._step = Step(
                        settings,
                        self._memory.arrays,
                        lambda group, _, *now: _rates(group, first, *now),
                    )
            except (TypeError, RuntimeError, BufferError) as error:  # memory that cannot be read
                raise RefusedError(str(error)) from error
            share_threads(step.plan)
            step(arrays, _number(learning_rate), _number(iterations))
        torch.autograd.graph.increment_version(values)


def _number(value: Any) -> Any:
    """Return a tensor for a variable."""
    return value.value if isinstance(value, keras.Variable) else value


def _rates(
    group: dict[str, float], dtype: torch.dtype, learning_rate: Any, iterations: Any
) -> dict[str, float]:
    """Return a step's hyperparameters, computed as Keras does, with PyTorch and in its types."""
    rate = float(learning_rate)
    row = {**group, "lr": rate}
    if group["weight_decay"] != 0 and rate != 0:
        row["weight_decay"] = (1 - float(1 - group["weight_decay"] * learning_rate)) / rate
    if "bias_correction" in row:
        step = torch.as_tensor(iterations + 1, dtype=dtype)
        power1, power2 = (
            torch.pow(torch.as_tensor(row[name], dtype=dtype), step) for name in ("beta1", "beta2")
        )
        lr = torch.as_tensor(learning_rate, dtype=dtype)
        row = with_rate(row, float(lr * torch.sqrt(1 - power2) / (1 - power1)))
    return row
