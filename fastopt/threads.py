"""How many threads a step may use.

``num_threads=`` of an optimizer > :func:`set_num_threads` > ``FASTOPT_NUM_THREADS`` >
``OMP_NUM_THREADS`` > the smaller of the CPU affinity and the container's CPU quota.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping
from pathlib import Path

from fastopt import _core

__all__ = ["get_num_threads", "set_num_threads"]

_MOST = 1024


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
    quota = _cpu_quota(Path(root))
    return max(1, min(cpus, _MOST, cpus if quota is None else math.ceil(quota)))


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
