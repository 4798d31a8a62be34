"""Sparse gradients, which are those of some rows: who takes them, and which of them are fit.

As ``torch.nn.Embedding(sparse=True)`` and ``EmbeddingBag(sparse=True)`` give them: sparse COO
tensors, coalesced or not, of which the first axis alone is sparse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastopt._options import choice

ROWS = ("lazy",)


def checked_rows(rows: str | None) -> str | None:
    """Check the option of this name; None: sparse gradients mean what they do to PyTorch."""
    return None if rows is None else choice("rows", rows, ROWS)


def takes_rows(optimizer: Any, group: Mapping[str, Any]) -> bool:
    """Tell whether a sparse gradient of a group's parameters is to update its rows alone.

    The user says so, or else PyTorch's own update does just that.
    """
    if optimizer._rows is not None:
        return True
    return not group.get("fused") and optimizer._namesake_goes_by_rows(group)


def is_sparse(grad: torch.Tensor | None) -> bool:
    return grad is not None and grad.is_sparse


def unfit_rows(param: torch.Tensor, grad: torch.Tensor) -> str | None:
    """Return why the kernels cannot take a sparse gradient, whatever its values are, if so."""
    if grad.sparse_dim() != 1:
        return f"its gradient is sparse in {grad.sparse_dim()} axes, not in the first alone"
    if param.numel() > 0 and param.shape[0] > 1 and param.stride(0) * len(param) != param.numel():
        return "its gradient is sparse, and its rows are not each one stretch of memory"
    return None
