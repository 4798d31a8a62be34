"""The candidates, a module each, imported when asked for: most need a framework.

Each module has one class ``Peer``, a :class:`~fastopt.bench.peers.base.Candidate`. It brings its
optimizer as its users run it, in its fastest form.
"""

from __future__ import annotations

import importlib
import logging
import warnings

from fastopt.bench.peers.base import Candidate

# In the order of tables. The first is fastopt itself.
NAMES = ("fastopt", "numba", "torch", "deepspeed", "optax", "numpy", "thinc", "keras")

# Of these, and of others which have fewer bits alone, those that `fastopt bench --storage` times.
STORAGE_NAMES = ("fastopt", "torch", "deepspeed", "bitsandbytes", "torchao")

TITLES = {
    "fastopt": "fastopt",
    "numba": "numba, a loop an array",
    "torch": "PyTorch, fused",
    "deepspeed": "DeepSpeed CPUAdam",
    "optax": "optax, jit",
    "numpy": "NumPy with out=",
    "thinc": "thinc",
    "keras": "Keras on TensorFlow",
    "bitsandbytes": "bitsandbytes 8-bit",
    "torchao": "torchao 8-bit",
}


def find(name: str) -> type[Candidate] | str:
    """Return the class of a candidate, or why it cannot run here.

    Parameters
    ----------
    name : str
        One of `NAMES` or `STORAGE_NAMES`.

    Returns
    -------
    type or str
        The class, or the reason in a few words.
    """
    disabled = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # frameworks' own, about one another
            logging.disable(logging.WARNING)
            module = importlib.import_module(f"fastopt.bench.peers.{name}")
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a framework that does not start here is a peer that is missing
        return f"does not start: {type(error).__name__}: {error}".splitlines()[0]
    finally:
        logging.disable(disabled)
    peer: type[Candidate] = module.Peer
    return peer
