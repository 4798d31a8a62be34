"""bitsandbytes: Adam with 8-bit state on the CPU; for ``--storage`` alone."""

from __future__ import annotations

from typing import Any

import bitsandbytes

from fastopt.bench.peers import torch
from fastopt.bench.workloads import BETAS, DECAY, EPS, LR, Rule


class Peer(torch.Peer):
    """Its state of arrays below 4096 elements is float32, as always with it."""

    rules = ("adam", "adamw")
    storages = ("float32, 8-bit state",)

    def _optimizer(self, rule: Rule) -> Any:
        decay = DECAY if rule.name == "adamw" else 0.0
        cls = bitsandbytes.optim.AdamW8bit if rule.name == "adamw" else bitsandbytes.optim.Adam8bit
        return cls(self._params, lr=LR, betas=BETAS, eps=EPS, weight_decay=decay)

    def _state(self, state: dict[str, Any]) -> list[Any]:
        return [t for name, t in state.items() if name.startswith(("state", "absmax"))]
