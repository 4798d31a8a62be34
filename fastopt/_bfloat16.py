"""The dtype bfloat16, which is not NumPy's own."""

from __future__ import annotations

from typing import Any

import numpy as np


def bfloat16(what: str = "state_dtype='bfloat16'") -> Any:
    """Return the dtype bfloat16, which is not NumPy's own, or raise: for what it is needed."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package ml_dtypes: pip install 'fastopt[bfloat16]'"
        ) from error
    return np.dtype(ml_dtypes.bfloat16)


def named(name: str, what: str) -> Any:
    """Return the dtype of a name, which may be bfloat16's, or raise: for what it is needed."""
    return bfloat16(what) if name == "bfloat16" else np.dtype(name)
