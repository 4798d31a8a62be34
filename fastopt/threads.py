"""Which threads run a step, and how many it may use.

The threading layer is that of :func:`set_threading_layer` > ``FASTOPT_THREADING_LAYER`` > ``team``.
Their number: ``num_threads=`` of an optimizer > :func:`set_num_threads` > ``FASTOPT_NUM_THREADS`` >
``OMP_NUM_THREADS`` > the smaller of the CPU affinity and the container's CPU quota.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping
from pathlib import Path

from fastopt import _core

__all__ = ["get_num_threads", "set_num_threads", "set_threading_layer"]

_MOST = 1024
_PF_FORKNOEXEC = 0x40  # Linux's, in the flags of a process


def set_threading_layer(name: str) -> None:
    """Choose whose threads run the steps of the process. The results are the same bits under each.

    Parameters
    ----------
    name : {"team", "openmp", "serial"}
        ``"team"``, the default, is fastopt's own threads: a step uses only as many as make it
        faster, and never waits for a thread that has not begun. ``"openmp"`` is one parallel
        region of the OpenMP runtime's a step, with a fixed number of threads and a static
        schedule, for programs that place their threads by ``OMP_PLACES`` and ``OMP_PROC_BIND``; a
        step too small for two threads, and every step of a forked process, runs in the caller's
        thread. ``"serial"`` is the caller's thread alone. The environment variable
        ``FASTOPT_THREADING_LAYER`` chooses at import.

    Raises
    ------
    TypeError
        If `name` is not a string.
    ValueError
        If there is no such layer here; the message names those that there are, and so does
        ``build_info()["threading"]["available"]``.

    See Also
    --------
    set_num_threads : How many threads a step may use.

    Examples
    --------
    >>> import fastopt
    >>> before = fastopt.build_info()["threading"]["active"]
    >>> fastopt.set_threading_layer("serial")
    >>> fastopt.build_info()["threading"]["active"]
    'serial'
    >>> fastopt.set_threading_layer(before)
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    is_default = get_num_threads() == default_threads()
    _core.select_layer(name)
    if is_default:
        _core.set_threads(default_threads())


def set_num_threads(n: int) -> None:
    """Set the upper bound on the threads of a step, for optimizers without one of their own.

    Results do not depend on it. Nothing outside fastopt is changed.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is out of range.

    Examples
    --------
    >>> import fastopt
    >>> before = fastopt.get_num_threads()
    >>> fastopt.set_num_threads(2)
    >>> fastopt.get_num_threads()
    2
    >>> fastopt.set_num_threads(before)
    """
    _core.set_threads(checked_threads(n, "n"))


def get_num_threads() -> int:
    """Return the upper bound on the threads of a step.

    Examples
    --------
    >>> import fastopt
    >>> fastopt.get_num_threads() >= 1
    True
    """
    return _core.get_threads()


def checked_threads(n: int, name: str) -> int:
    """Return `n` as an int, or raise an error that names the argument."""
    try:
        if isinstance(n, bool):
            raise TypeError
        value = operator.index(n)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {n!r}") from None
    if not 1 <= value <= _MOST:
        raise ValueError(f"{name} must be between 1 and {_MOST}, got {n!r}")
    return value


def default_threads(environ: Mapping[str, str] = os.environ, root: str = "/") -> int:
    """Return the number of threads that the environment, the affinity and the quota allow."""
    own = environ.get("FASTOPT_NUM_THREADS")
    if own:
        try:
            return checked_threads(int(own), "FASTOPT_NUM_THREADS")
        except ValueError:
            raise ValueError(
                f"FASTOPT_NUM_THREADS must be an integer between 1 and {_MOST}, got {own!r}"
            ) from None
    openmp = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is by nesting level
    if openmp.isdecimal() and int(openmp) >= 1:
        return min(int(openmp), _MOST)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _core.layers()["active"] == "openmp":  # whose runtime binds this thread to one of its places
        cpus = max(cpus, _core.openmp_processors())
    quota = _cpu_quota(Path(root))
    return max(1, min(cpus, _MOST, cpus if quota is None else math.ceil(quota)))


def was_forked() -> bool | None:
    """Return whether this process was forked, and runs its parent's program; None: nobody knows."""
    try:
        flags = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6])
    except (OSError, ValueError, IndexError):
        return None
    return bool(flags & _PF_FORKNOEXEC)


def _cpu_quota(root: Path) -> float | None:
    """Return the CPUs that the process's control groups (version 2 or 1) grant, None: no limit."""
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            base, read = root / "sys/fs/cgroup", _quota_v2
        elif "cpu" in controllers.split(","):
            base, read = root / "sys/fs/cgroup/cpu", _quota_v1
        else:
            continue
        # A limit of any ancestor binds. In a container the path may be the host's and not exist
        # here; the mount's own top is then the container's group.
        inside = Path(path.lstrip("/"))
        limits += [read(base / folder) for folder in [inside, *inside.parents]]
    return min((limit for limit in limits if limit is not None), default=None)


def _quota_v2(folder: Path) -> float | None:
    quota, period = [*_read(folder / "cpu.max").split(), "", ""][:2]
    return _ratio(quota, period)


def _quota_v1(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    try:
        ratio = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max", or no such file
        return None
    return ratio if ratio > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
