"""Parameters and gradients as they may be given: in groups, and in containers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._core import lends_memory
from fastopt._trees import TreeDef, flatten, flatten_like, is_container, is_named, is_nested


def label(key: Any) -> str:
    return f"parameter {key!r}"


def as_groups(params: Any) -> list[dict[str, Any]]:
    """Return what was given as parameters as a list of groups."""
    if isinstance(params, Mapping):
        return [{"params": params}]
    if (
        isinstance(params, (str, set, frozenset))
        or not hasattr(params, "__iter__")
        or lends_memory(params)
    ):
        raise TypeError(
            "params must be a list, tuple or generator of arrays, a dict name -> array, either of "
            f"them nested, or a list of parameter groups; got {type(params).__name__}"
            f"{'; of a single array, [array]' if lends_memory(params) else ''}"
        )
    items = params if isinstance(params, tuple) else list(params)
    if not any(isinstance(item, dict) and "params" in item for item in items):
        return [{"params": items}]
    if not all(isinstance(item, dict) for item in items):
        raise TypeError("params mixes arrays and parameter groups; give one or the other")
    return list(items)


def flatten_params(given: Any, first: int) -> tuple[list[Any] | None, list[Any], TreeDef | None]:
    """Return names (None if there are none), arrays and tree definition of one group.

    Its parameters are numbered from `first`. Without names, it is a list, and has no definition.
    """
    if lends_memory(given):
        return None, [given], None
    if isinstance(given, (str, set, frozenset)) or not hasattr(given, "__iter__"):
        raise TypeError(
            f"'params' of a group must be a list of arrays or a dict, got {type(given).__name__}"
        )
    tree = given if is_container(given) else list(given)
    names: list[Any] = []
    arrays: list[Any] = []
    tree_def = flatten(tree, names, arrays, first)
    if is_nested(tree) and not isinstance(tree, Mapping):
        for name, x in zip(names, arrays, strict=True):
            if isinstance(x, np.generic) or not (lends_memory(x) or is_container(x)):
                # A name, or a hyperparameter.
                raise TypeError(
                    f"{label(name)}: expected a numpy.ndarray, got {type(x).__name__}; for named "
                    "parameters give dict(...); a parameter group is a dict with 'params'"
                )
    if is_nested(tree) or is_named(tree):
        return names, arrays, tree_def
    if isinstance(tree, Mapping):
        return list(tree), arrays, tree_def
    return None, arrays, None


def flatten_grads(grads: Any, tree_def: TreeDef | None, n: int) -> list[Any]:
    """Return n gradients in the order of the parameters, having checked how they are structured."""
    if tree_def is not None:
        return flatten_like("grads", grads, tree_def, n)
    wrong = f"grads must be a list or tuple in the parameters' order, got {type(grads).__name__}"
    if lends_memory(grads):
        raise TypeError(f"{wrong}; of a single array, [gradient]")
    if isinstance(grads, (Mapping, str, set, frozenset)):
        raise TypeError(wrong)
    try:
        return list(grads)
    except TypeError:
        if hasattr(grads, "__iter__"):
            raise
        raise TypeError(wrong) from None
