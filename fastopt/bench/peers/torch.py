"""PyTorch: ``fused=True``, and ``foreach=True`` for what has no fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from fastopt.bench.peers.base import Candidate
from fastopt.bench.workloads import ALPHA, BETAS, DECAY, EPS, MOMENTUM, Array, Rule

_OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"fused": True}),
    "momentum": (torch.optim.SGD, {"momentum": MOMENTUM, "fused": True}),
    "adagrad": (torch.optim.Adagrad, {"eps": EPS, "fused": True}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": ALPHA, "eps": EPS, "foreach": True}),
    "adamax": (torch.optim.Adamax, {"betas": BETAS, "eps": EPS, "foreach": True}),
    "adadelta": (torch.optim.Adadelta, {"rho": ALPHA, "eps": EPS, "foreach": True}),
    "nadam": (torch.optim.NAdam, {"betas": BETAS, "eps": EPS, "foreach": True}),
    "radam": (torch.optim.RAdam, {"betas": BETAS, "eps": EPS, "foreach": True}),
    "rprop": (torch.optim.Rprop, {"foreach": True}),
    "adam": (torch.optim.Adam, {"betas": BETAS, "eps": EPS, "fused": True}),
    "adamw": (
        torch.optim.AdamW,
        {"betas": BETAS, "eps": EPS, "weight_decay": DECAY, "fused": True},
    ),
}
_OPTIMIZERS["clip-adam"] = _OPTIMIZERS["adam"]


def tensor(array: Array) -> Any:
    """Return the tensor that is an array."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class Peer(Candidate):
    """An optimizer of ``torch.optim`` over the memory of the NumPy arrays."""

    rules = tuple(_OPTIMIZERS)
    storages: ClassVar[tuple[str, ...]] = ("float32", "bfloat16, bfloat16 state")
    norm_error = 1e-2  # summed in float32: 4e-4 off for 1e7 elements, 4e-3 for 5e7

    def __init__(
        self, rule: Rule, params: Sequence[Array], grads: Sequence[Array], threads: int
    ) -> None:
        self._threads, self._clip_norm = threads, rule.clip_norm
        self._grads, self._fresh = grads, grads
        if rule.clip_norm is not None:
            self._grads = [grad.copy() for grad in grads]
        self._arrays = list(params)
        self._params = [tensor(p).requires_grad_() for p in params]
        for param, grad in zip(self._params, self._grads, strict=True):
            param.grad = tensor(grad)
        self._opt = self._optimizer(rule)

    def _optimizer(self, rule: Rule) -> Any:
        optimizer, options = _OPTIMIZERS[rule.name]
        return optimizer(self._params, lr=rule.options["lr"], **options)

    def begin(self) -> None:
        """Set the number of threads, and fill clip-adam's gradients."""
        torch.set_num_threads(self._threads)
        if self._clip_norm is not None:
            for grad, fresh in zip(self._grads, self._fresh, strict=True):
                grad[...] = fresh

    def step(self) -> None:
        """Do one step; as clip-adam, clip first and zero the gradients in place afterwards."""
        if self._clip_norm is None:
            self._opt.step()
            return
        torch.nn.utils.clip_grad_norm_(self._params, self._clip_norm)
        self._opt.step()
        self._opt.zero_grad(set_to_none=False)

    def result(self) -> list[Array]:
        """Return the parameters as they are now."""
        return self._arrays

    def bytes_moved(self) -> int:
        """Return what a step reads and writes."""
        state = [t for p in self._params for t in self._state(self._opt.state[p])]
        return 2 * _nbytes([*self._params, *state]) + _nbytes([p.grad for p in self._params])

    def _state(self, state: dict[str, Any]) -> list[Any]:
        """Return the tensors of a parameter's state that a step updates."""
        return [t for name, t in state.items() if torch.is_tensor(t) and name != "step"]


def _nbytes(tensors: Sequence[Any]) -> int:
    return sum(t.nbytes for t in tensors)
