"""What was built and what runs here; and the environment's choices, applied at import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastopt import _core
from fastopt._version import __version__
from fastopt.threads import default_threads, get_num_threads, was_forked

__all__ = ["build_info", "get_include", "get_library"]

borrowed_threads: list[str] = []  # packages that lend theirs


def build_info() -> dict[str, Any]:
    """Describe the build and what is in use.

    Returns
    -------
    dict
        ``version``; ``compiler``, that built the C core; ``isa``, a dict of the instruction sets
        ``compiled`` in, those ``supported`` (compiled, and runnable here), and the ``active`` one
        (``base`` is SSE2 on x86-64 and NEON on 64-bit Arm; the environment variable
        ``FASTOPT_ISA`` chooses another); ``threading``, a dict of the threading layers
        ``available`` and the ``active`` one (see `set_threading_layer`); ``openmp``, whether that
        layer was built; ``threads``, the upper bound on the threads of a step;
        ``borrowed_threads``, the packages in whose threads large steps may run under ``team``
        (``["torch"]`` once `fastopt.torch` has found PyTorch's; with
        ``FASTOPT_BORROW_THREADS=0`` in the environment it does not look).

    Examples
    --------
    >>> import fastopt
    >>> info = fastopt.build_info()
    >>> info["isa"]["active"] in info["isa"]["supported"]
    True
    """
    threading = _core.layers()
    return {
        "version": __version__,
        "compiler": _core.compiler(),
        "isa": _core.isa(),
        "threading": threading,
        "openmp": "openmp" in threading["available"],
        "threads": 1 if threading["active"] == "serial" else get_num_threads(),
        "borrowed_threads": [*borrowed_threads],
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

    It needs the mathematics library and POSIX threads: ``-pthread -lm``. A program that wants the
    OpenMP layer says so, ``-fopenmp -Wl,-u,fo_share_in_region``. (Where the linker is not ELF's,
    ``-fopenmp`` is needed if ``build_info()["openmp"]`` is true.) An extension module needs no
    library: ``fo_import()`` in ``fastopt.h`` finds the functions in the installed package.

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
    """Choose the loops, the threading layer and the number of threads by the environment."""
    chosen = os.environ.get("FASTOPT_ISA")
    if chosen:
        try:
            _core.select_isa(chosen)
        except ValueError as error:
            raise ValueError(f"FASTOPT_ISA: {error}") from None
    if was_forked():
        _core.forked_unseen()
    layer = os.environ.get("FASTOPT_THREADING_LAYER")
    if layer:
        try:
            _core.select_layer(layer)
        except ValueError as error:
            raise ValueError(f"FASTOPT_THREADING_LAYER: {error}") from None
    _core.set_threads(default_threads())
