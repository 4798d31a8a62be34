"""What was built and what runs here; and the environment's choices, applied at import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastopt import _core
from fastopt._version import __version__
from fastopt.threads import default_threads, get_num_threads

__all__ = ["build_info", "get_include", "get_library"]


def build_info() -> dict[str, Any]:
    """Describe the build and what is in use.

    Returns
    -------
    dict
        ``version``; ``compiler``, that built the C core; ``isa``, a dict of the instruction sets
        ``compiled`` in, those ``supported`` (compiled, and runnable here), and the ``active`` one
        (``base`` is SSE2 on x86-64 and NEON on 64-bit Arm; the environment variable
        ``FASTOPT_ISA`` chooses another); ``openmp``, whether steps can use threads; ``threads``,
        their upper bound.

    Examples
    --------
    >>> import fastopt
    >>> info = fastopt.build_info()
    >>> info["isa"]["active"] in info["isa"]["supported"]
    True
    """
    return {
        "version": __version__,
        "compiler": _core.compiler(),
        "isa": _core.isa(),
        "openmp": _core.has_openmp(),
        "threads": get_num_threads() if _core.has_openmp() else 1,
    }


def get_include() -> str:
    """Return the folder of ``fastopt.h``, for programs and modules in C, C++ and Cython.

    Returns
    -------
    str
        For the compiler's option ``-I``.

    See Also
    --------
    get_library : What a program links.

    Examples
    --------
    >>> import fastopt, os
    >>> os.listdir(fastopt.get_include())
    ['fastopt.h']
    """
    return str(Path(__file__).parent / "include")


def get_library() -> str:
    """Return the path of the static library that a program in C or C++ links.

    It needs the mathematics library, and OpenMP's if ``build_info()["openmp"]`` is true:
    ``-fopenmp -lm``. An extension module does not need it: ``fo_import()`` in ``fastopt.h`` finds
    the functions in the installed package.

    Returns
    -------
    str
        The path of ``libfastopt.a``.

    See Also
    --------
    get_include : Where its header is.

    Examples
    --------
    >>> import fastopt, os
    >>> os.path.basename(fastopt.get_library())
    'libfastopt.a'
    """
    return str(Path(__file__).parent / "lib" / "libfastopt.a")


def apply_environment() -> None:
    """Choose the table of loops and the number of threads that the environment asks for."""
    chosen = os.environ.get("FASTOPT_ISA")
    if chosen:
        try:
            _core.select_isa(chosen)
        except ValueError as error:
            raise ValueError(f"FASTOPT_ISA: {error}") from None
    _core.set_threads(default_threads())
