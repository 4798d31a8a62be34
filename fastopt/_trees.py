"""Containers of arrays, nested to any depth: dicts, lists, tuples and named tuples.

A structure is what is left of a container without its arrays: a dict of structures, a list of them,
or, in place of an array, its number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Structure = int | dict[Any, Any] | list[Any]


def is_container(given: Any) -> bool:
    return isinstance(given, (Mapping, list, tuple))


def is_nested(given: Any) -> bool:
    """Tell whether a container holds another."""
    return any(is_container(x) for x in (given.values() if isinstance(given, Mapping) else given))


def taken_apart(tree: Any, names: list[str], leaves: list[Any], first: int = 0) -> Structure:
    """Append a nested container's leaves and their names ("layers.0.bias"); return its structure.

    The leaves are numbered from `first`.
    """

    def walk(node: Any, name: str) -> Structure:
        if isinstance(node, Mapping):
            return {key: walk(x, f"{name}.{key}" if name else str(key)) for key, x in node.items()}
        if isinstance(node, (list, tuple)):
            keys = getattr(node, "_fields", range(len(node)))
            return [
                walk(x, f"{name}.{key}" if name else str(key))
                for key, x in zip(keys, node, strict=True)
            ]
        names.append(name)
        leaves.append(node)
        return first + len(leaves) - 1

    return walk(tree, "")


def merged(one: Structure, other: Structure) -> Structure:
    """Return the structure of two dicts, merged to any depth."""
    if isinstance(one, int) and isinstance(other, int):
        return other  # the names are equal, which is another error
    if not isinstance(one, dict) or not isinstance(other, dict):
        raise ValueError(
            "parameter groups whose parameters are nested need dicts, so that their gradients can "
            "be given as one dict"
        )
    both = {**one, **other}
    for key in one.keys() & other.keys():
        both[key] = merged(one[key], other[key])
    return both


def in_order(what: str, tree: Any, structure: Structure, n: int) -> list[Any]:
    """Return the n leaves of a container by number, having checked that it is so structured."""
    leaves = [None] * n

    def walk(node: Any, expected: Structure, where: str) -> None:
        if isinstance(expected, dict):
            if not isinstance(node, Mapping):
                raise TypeError(
                    f"{where} must be a dict with the parameters' keys, got {type(node).__name__}"
                )
            missing = [key for key in expected if key not in node]
            unexpected = [key for key in node if key not in expected]
            if missing or unexpected:
                raise ValueError(f"{where}: missing keys {missing}, unexpected keys {unexpected}")
            for key, inner in expected.items():
                walk(node[key], inner, f"{where}[{key!r}]")
        elif isinstance(expected, list):
            if not isinstance(node, (list, tuple)):
                raise TypeError(f"{where} must be a list or tuple, got {type(node).__name__}")
            if len(node) != len(expected):
                raise ValueError(f"{where}: expected {len(expected)} elements, got {len(node)}")
            for number, (x, inner) in enumerate(zip(node, expected, strict=True)):
                walk(x, inner, f"{where}[{number}]")
        else:
            leaves[expected] = node

    walk(tree, structure, what)
    return leaves


def like(tree: Any, leaves: Any) -> Any:
    """Return a container like this one, of the same types, with other leaves (an iterator)."""
    if isinstance(tree, Mapping):
        return {key: like(x, leaves) for key, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        inner = [like(x, leaves) for x in tree]
        if hasattr(tree, "_fields"):
            return type(tree)(*inner)
        return inner if isinstance(tree, list) else tuple(inner)
    return next(leaves)
