"""DeepSpeed's CPUAdam, which compiles itself the first time (a minute; it needs ninja)."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Sequence

# The ninja beside this Python, also where its environment is not activated.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder

from fastopt.bench.peers.base import Candidate
from fastopt.bench.workloads import BETAS, DECAY, EPS, LR, Array, Rule

deepspeed.utils.logger.setLevel(logging.ERROR)
CPUAdamBuilder().load(verbose=False)  # here, so that a failure is this peer's absence
_openmp = ctypes.CDLL("libgomp.so.1")  # what the compiler linked it to; torch brings its own


class Peer(Candidate):
    """Adam and AdamW in float32, over the memory of the NumPy arrays."""

    rules = ("adam", "adamw")
    dtypes = ("float32",)

    def __init__(
        self, rule: Rule, params: Sequence[Array], grads: Sequence[Array], threads: int
    ) -> None:
        self._threads = threads
        self._params = [torch.from_numpy(p).requires_grad_() for p in params]
        for param, grad in zip(self._params, grads, strict=True):
            param.grad = torch.from_numpy(grad)
        decay = DECAY if rule.name == "adamw" else 0.0
        self._opt = DeepSpeedCPUAdam(
            self._params, lr=LR, betas=BETAS, eps=EPS, weight_decay=decay, adamw_mode=True
        )

    def begin(self) -> None:
        """Set the number of threads."""
        _openmp.omp_set_num_threads(self._threads)

    def step(self) -> None:
        """Do one step."""
        self._opt.step()

    def result(self) -> list[Array]:
        """Return the parameters as they are now."""
        return [param.detach().numpy() for param in self._params]
