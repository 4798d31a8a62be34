"""torchao: Adam with 8-bit state, which compiles itself for each shape; for ``--storage`` alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torchao.optim import Adam8bit, AdamW8bit

from fastopt.bench.peers import torch
from fastopt.bench.workloads import BETAS, DECAY, EPS, LR, Array, Rule

_BLOCK = 256  # elements of a scale


class Peer(torch.Peer):
    """Its state of arrays below 4096 elements is float32, as always with it.

    So is that of arrays which are not whole blocks: they have some zeros more here.
    """

    rules = ("adam", "adamw")
    storages = ("float32, 8-bit state",)

    def __init__(
        self, rule: Rule, params: Sequence[Array], grads: Sequence[Array], threads: int
    ) -> None:
        self._given, self._shapes = grads, [param.shape for param in params]
        self._copies = [_padded(grad) for grad in grads]
        super().__init__(rule, [_padded(param) for param in params], self._copies, threads)

    def _optimizer(self, rule: Rule) -> Any:
        if rule.name == "adamw":
            return AdamW8bit(self._params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
        return Adam8bit(self._params, lr=LR, betas=BETAS, eps=EPS)

    def reread(self) -> None:
        """Copy the gradients."""
        for copy, grad in zip(self._copies, self._given, strict=True):
            copy[: grad.size] = grad.reshape(-1)

    def result(self) -> list[Array]:
        """Return the parameters as they are now."""
        return [
            array[: math.prod(shape)].reshape(shape)
            for array, shape in zip(self._arrays, self._shapes, strict=True)
        ]

    def _state(self, state: dict[str, Any]) -> list[Any]:
        moments = state["exp_avg"], state["exp_avg_sq"]
        stored = [(m.codes, m.scale) if hasattr(m, "codes") else (m,) for m in moments]
        return [t for tensors in stored for t in tensors]


def _padded(array: Array) -> Array:
    padded = np.zeros(-(-array.size // _BLOCK) * _BLOCK, array.dtype)
    padded[: array.size] = array.reshape(-1)
    return padded
