"""Keras's variables on its PyTorch backend, which updates them in place."""

from __future__ import annotations

from typing import Any

import keras
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope

from fastopt.keras._step import DTYPES, Settings, Step


def native(variable: Any) -> Any:
    return variable


def compiling() -> bool:
    return bool(torch.compiler.is_compiling())


def by_itself() -> bool:
    """Tell whether variables are what they seem, and not stand-ins of a stateless scope."""
    return not in_stateless_scope()


def takes(grad: Any, variable: Any) -> bool:
    value = variable.value
    return (
        variable.dtype in DTYPES
        and isinstance(grad, torch.Tensor)
        and grad.shape == value.shape
        and all(t.layout == torch.strided and t.device.type == "cpu" for t in (grad, value))
        and value.is_contiguous()
    )


class Updates:
    """Updates in place, as Keras's own on this backend."""

    def __call__(
        self,
        settings: Settings,
        variables: list[Any],
        grads: list[Any],
        learning_rate: Any,
        iterations: Any,
    ) -> None:
        """Update variables: those of the model, each followed by its slots."""
        tensors = [v.value.detach() for v in variables]
        params = tensors[:: len(tensors) // len(grads)]
        Step(settings, [t.numpy() for t in tensors])(
            [g.detach().to(p.dtype).numpy() for g, p in zip(grads, params, strict=True)],
            keras.ops.convert_to_tensor(learning_rate).item(),
            keras.ops.convert_to_tensor(iterations).item(),
        )
        torch.autograd.graph.increment_version(tensors)
