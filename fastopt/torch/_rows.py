"""Sparse gradients, which are those of some rows: who takes them, and which of them are fit.

As ``torch.nn.Embedding(sparse=True)`` and ``EmbeddingBag(sparse=True)`` give them: sparse COO
tensors, coalesced or not, of which the first axis alone is sparse. With ``rows="exact"``, the rows
that these layers look up are brought up to date before.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from fastopt._options import choice
from fastopt._settings import ROWS


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


# ---- rows are brought up to date before they are looked up ---------------------------------------

_exact: weakref.WeakSet[Any] = weakref.WeakSet()  # optimizers whose rows may have missed steps
_hooks: list[Any] = []


def watch_lookups(optimizer: Any) -> None:
    """From now on, have rows of an optimizer's tables catch up before a layer looks them up."""
    _exact.add(optimizer)
    if not _hooks:
        _hooks.append(register_module_forward_pre_hook(_before_forward))


def _before_forward(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
    if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        _before_lookup_eagerly(module.weight, given)


def _before_lookup(weight: torch.Tensor, given: tuple[Any, ...]) -> None:
    if not _exact:
        while _hooks:
            _hooks.pop().remove()
    for optimizer in tuple(_exact):
        log = optimizer._logs.get(weight)
        if log is not None and log.pending:
            rows = given[0].detach().ravel() if given else None  # what came by name is not known
            try:
                optimizer._catch_up(weight, rows)
            except ValueError:
                if rows is None or are_rows(rows, len(weight)):
                    raise  # else PyTorch is about to refuse the look-up


_before_lookup_eagerly = torch._disable_dynamo(_before_lookup)


def are_rows(rows: Any, n_rows: int) -> bool:
    """Tell whether all numbers are those of rows."""
    return len(rows) == 0 or bool(rows.min() >= 0 and rows.max() < n_rows)
