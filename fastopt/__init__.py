"""First-order optimizers for training on the CPU.

SGD, Adagrad, RMSprop, Adam, AdamW, Adamax, Adadelta, Lion, NAdam, RAdam and Rprop as C loops that
update NumPy arrays in place::

    opt = fastopt.Adam([W1, b1, W2, b2], lr=1e-3)
    opt.step([dW1, db1, dW2, db2])

Each equals PyTorch's or Keras's formula, whichever ``semantics=`` names, and gives the same bits
on every machine and for every number of threads.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

try:
    from fastopt import _core  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fastopt's compiled module cannot be loaded: {error}\nIf this is its source folder, "
        "install it with 'pip install -e .', or run Python from another folder."
    ) from error

from fastopt import schedules
from fastopt._adadelta import Adadelta
from fastopt._adagrad import Adagrad
from fastopt._adam import Adam, AdamW
from fastopt._adamax import Adamax
from fastopt._info import apply_environment, build_info, get_include, get_library
from fastopt._lion import Lion
from fastopt._nadam import NAdam
from fastopt._radam import RAdam
from fastopt._rmsprop import RMSprop
from fastopt._rows import Rows
from fastopt._rprop import Rprop
from fastopt._sgd import SGD
from fastopt._version import __version__
from fastopt._warnings import FallbackWarning
from fastopt.flat import flatten, unflatten
from fastopt.threads import get_num_threads, set_num_threads, set_threading_layer

if _TYPE_CHECKING:
    from fastopt import functional, reference

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FallbackWarning",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rows",
    "Rprop",
    "__version__",
    "build_info",
    "flatten",
    "functional",
    "get_include",
    "get_library",
    "get_num_threads",
    "reference",
    "schedules",
    "set_num_threads",
    "set_threading_layer",
    "unflatten",
]

for _class in (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    Adamax,
    FallbackWarning,
    Lion,
    NAdam,
    RAdam,
    RMSprop,
    Rows,
    Rprop,
):
    _class.__module__ = "fastopt"  # where users find them, and so do pickles
del _class

apply_environment()
del apply_environment


def __getattr__(name: str) -> _Any:
    if name in ("functional", "reference"):  # which take a third of the import, and few need
        return _import_module(f"fastopt.{name}")
    raise AttributeError(f"module 'fastopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
