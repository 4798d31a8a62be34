"""DTensors, which several processes have together: what this process has of them.

A rule updates each element by itself, so a step on the parts is a step on the whole, where
parameter, gradient and state are cut alike.
"""

from __future__ import annotations

import sys
from typing import Any

import torch


def is_dtensor(tensor: torch.Tensor) -> bool:
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return type(tensor) is kind


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor that has the elements of a tensor in this process."""
    part: Any = tensor
    # (In each step the same one, and to_local() makes a new one of a parameter's.)
    return part._local_tensor if is_dtensor(tensor) else tensor


def local_gradient(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor | None:
    """Return what this process has of a gradient; None: it is not cut as its parameter is."""
    return local(grad) if is_dtensor(param) and cut_alike(param, grad) else None


def cut_alike(param: Any, other: Any) -> bool:
    """Tell whether a tensor is a DTensor that is cut as a DTensor is, over the same processes."""
    return is_dtensor(other) and (
        other.placements == param.placements and other.device_mesh == param.device_mesh
    )


def is_partial(param: Any) -> bool:
    """Tell whether the value of a DTensor is a sum, say, of what processes have."""
    return any(placement.is_partial() for placement in param.placements)
