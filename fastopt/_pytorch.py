"""PyTorch's own threads, and its C functions that look at tensors, for the steps of two adapters.

They are PyTorch's adapter and Keras's.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np
import torch

from fastopt import _core, _tensors
from fastopt._info import borrowed_threads
from fastopt.threads import get_num_threads, was_forked


def _find_pool() -> Any:
    """Return what runs PyTorch's parallel loops, an fo_pool of the C core, or None."""
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    if os.environ.get("FASTOPT_BORROW_THREADS") == "0":
        return None
    if (
        was_forked() is not False
    ):  # the pool's threads may be those of a parent, which this process would wait for
        return None
    for scope in None, torch._C.__file__:  # as the linker does for PyTorch's libraries
        try:
            library = ctypes.CDLL(scope)
            functions = library.GOMP_parallel, library.omp_get_thread_num
        except (OSError, AttributeError):
            continue
        return (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p) for f in functions))
    return None


_POOL = _find_pool()  # kept: the plans point to it
POOL = 0 if _POOL is None else ctypes.addressof(_POOL)
if POOL:
    borrowed_threads.append("torch")


def share_threads(plan: _core.Plan) -> None:
    """Let a plan's steps use as many threads as PyTorch and fastopt allow, or PyTorch's own.

    After a backward pass PyTorch's threads wait for its next loop and spin, for milliseconds, on
    the processors that other threads need. A large step may be another such loop.
    """
    theirs, ours = torch.get_num_threads(), get_num_threads()
    plan.num_threads = min(theirs, ours)
    plan.pool = POOL if theirs <= ours else 0  # with fewer, the runtime would end the others


def _look_directly() -> bool:
    """Let tensors be looked at through PyTorch's stable C interface; tell whether it was found."""
    names = [f"aoti_torch_get_{what}" for what in ("data_ptr", "dtype", "dim", "sizes", "strides")]
    for scope in None, torch._C.__file__:
        try:
            library = ctypes.CDLL(scope)
            getters = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names]
        except (OSError, AttributeError, TypeError):  # on Windows, of None
            continue
        tensor = torch.from_numpy(np.zeros(2, np.float32))  # on the CPU, whatever the default is
        examples = [tensor, torch.nn.Parameter(tensor)]
        if [*map(type, examples)] != [torch.Tensor, torch.nn.Parameter]:  # in a dispatch mode
            return False
        return _tensors.look_directly(examples, getters)
    return False


LOOKS_DIRECTLY = _look_directly()
