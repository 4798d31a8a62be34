"""PyTorch's own threads, for the steps of its adapters."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from fastopt import _core
from fastopt.threads import get_num_threads

_FORKED = 0x40  # PF_FORKNOEXEC, in the flags of a process


def _find_pool() -> int:
    """Return the address of what runs PyTorch's parallel loops, or 0."""
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return 0
    try:  # where the pool's threads may be those of a parent, which this process would wait for
        flags = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6])
    except (OSError, ValueError, IndexError):
        return 0
    if flags & _FORKED:
        return 0
    for scope in None, torch._C.__file__:  # as the linker does for PyTorch's libraries
        try:
            function = ctypes.CDLL(scope).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


POOL = _find_pool()


def share_threads(plan: _core.Plan) -> None:
    """Let a plan's steps use as many threads as PyTorch and fastopt allow, or PyTorch's own.

    After a backward pass PyTorch's threads wait for its next loop and spin, for milliseconds, on
    the processors that other threads need. A large step may be another such loop.
    """
    theirs, ours = torch.get_num_threads(), get_num_threads()
    plan.num_threads = min(theirs, ours)
    plan.pool = POOL if theirs <= ours else 0  # with fewer, the runtime would end the others
