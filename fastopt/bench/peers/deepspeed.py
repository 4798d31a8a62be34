"""DeepSpeed's CPUAdam, which compiles itself the first time (a minute; it needs ninja)."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from typing import Any

# The ninja beside this Python, also where its environment is not activated.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder

from fastopt.bench.peers import torch
from fastopt.bench.workloads import BETAS, DECAY, EPS, LR, Rule

deepspeed.utils.logger.setLevel(logging.ERROR)
CPUAdamBuilder().load(verbose=False)  # here, so that a failure is this peer's absence
_openmp = ctypes.CDLL("libgomp.so.1")  # what the compiler linked it to; torch brings its own


class Peer(torch.Peer):
    """Adam and AdamW in float32, and in bfloat16, over the memory of the NumPy arrays."""

    rules = ("adam", "adamw")
    dtypes = ("float32",)
    storages = ("float32", "bfloat16, float32 state", "bfloat16, bfloat16 state")
    norm_error = 0.0

    def _optimizer(self, rule: Rule) -> Any:
        decay = DECAY if rule.name == "adamw" else 0.0
        return DeepSpeedCPUAdam(
            self._params,
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=decay,
            adamw_mode=True,
            fp32_optimizer_states=rule.options.get("state_dtype") != "bfloat16",
        )

    def begin(self) -> None:
        """Set the number of threads."""
        _openmp.omp_set_num_threads(self._threads)
