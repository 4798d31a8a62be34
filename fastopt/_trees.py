"""Pytrees: dicts, lists, tuples and named tuples, in one another, whose leaves are arrays.

A tree definition is what is left of a tree without its leaves: a dict of tree definitions, a list
of them, the fields of a named tuple with such a list, or, in place of a leaf, its number.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any, NamedTuple

# A limit of our own: a container that holds itself has no end, and tree definitions are copied and
# pickled by functions that call themselves at every level.
DEEPEST = 100


class Fields(NamedTuple):
    """The tree definition of a named tuple."""

    names: tuple[str, ...]
    inner: list[TreeDef]


TreeDef = int | dict[Any, Any] | list[Any] | Fields


def is_container(given: Any) -> bool:
    return isinstance(given, (Mapping, list, tuple))


def is_named(given: Any) -> bool:
    """Tell whether something is a named tuple."""
    return isinstance(given, tuple) and hasattr(given, "_fields")


def is_inner(given: Any) -> bool:
    """Tell whether what a container holds is another one.

    A list of numbers is not: it is the place of an array that it was perhaps meant to be.
    """
    if not isinstance(given, (list, tuple)):
        return isinstance(given, Mapping)
    return is_named(given) or not given or not all(isinstance(x, Number) for x in given)


def is_nested(given: Any) -> bool:
    """Tell whether a container holds another."""
    return any(is_inner(x) for x in (given.values() if isinstance(given, Mapping) else given))


def flatten(tree: Any, names: list[str], leaves: list[Any], first: int = 0) -> TreeDef:
    """Append a nested container's leaves and their names ("layers.0.bias"); return its definition.

    The leaves are numbered from `first`.
    """
    return _take(tree, "", 0, names, leaves, first)


# (A function of the module: one that is defined within another and calls itself is a reference
# cycle, which keeps the arrays alive until the garbage collector comes by.)
def _take(
    node: Any, name: str, depth: int, names: list[str], leaves: list[Any], first: int
) -> TreeDef:
    if not (is_inner(node) if depth else is_container(node)):
        names.append(name)
        leaves.append(node)
        return first + len(leaves) - 1
    if depth == DEEPEST:
        raise ValueError(
            f"{name[:40]}...: containers are nested too deep, more than {DEEPEST} in one another, "
            "or one holds itself"
        )

    def within(key: Any, x: Any) -> TreeDef:
        inner = f"{name}.{key}" if depth else str(key)  # an empty key is a part of the name too
        return _take(x, inner, depth + 1, names, leaves, first)

    if isinstance(node, Mapping):
        return {key: within(key, x) for key, x in node.items()}
    if is_named(node):
        return Fields(tuple(node._fields), list(map(within, node._fields, node)))
    return [within(number, x) for number, x in enumerate(node)]


def merged(
    one: TreeDef, other: TreeDef, same: list[tuple[int, int]], path: tuple[Any, ...] = ()
) -> TreeDef:
    """Return the tree definition of two dicts, merged to any depth.

    Appends to `same` the numbers of arrays that have one and the same place in both.
    """
    if isinstance(one, int) and isinstance(other, int):
        same.append((one, other))
        return other
    if not isinstance(one, dict) or not isinstance(other, dict):
        where = f": two groups have something at {_where('', path)}" if path else ""
        raise ValueError(
            "parameter groups whose parameters are nested need dicts (of a named tuple, its "
            f"_asdict()), so that their gradients can be given as one dict{where}"
        )
    both = {**one, **other}
    for key in one.keys() & other.keys():
        both[key] = merged(one[key], other[key], same, (path, key))
    return both


def flatten_like(what: str, tree: Any, tree_def: TreeDef, n: int) -> list[Any]:
    """Return the n leaves of a container by number, having checked that it is so structured."""
    leaves = [None] * n
    _put(leaves, what, tree, tree_def, ())
    return leaves


# A path is (path of the outer container, key), and is written out only for an error. A leaf is
# handed over without a call: there may be hundreds of them, at every step.
def _put(leaves: list[Any], what: str, node: Any, expected: TreeDef, path: tuple[Any, ...]) -> None:
    if isinstance(expected, dict):
        # A dict of as many keys has all of them, or a look-up fails; one of another type may make
        # up what it lacks.
        if type(node) is not dict or len(node) != len(expected):
            _check_dict(what, path, node, expected)
        try:
            for key, inner in expected.items():
                if isinstance(inner, int):
                    leaves[inner] = node[key]
                else:
                    _put(leaves, what, node[key], inner, (path, key))
        except KeyError:
            _check_dict(what, path, node, expected)
            raise
    elif not isinstance(expected, int):
        for number, inner in enumerate(_check_list(what, path, node, expected)):
            if isinstance(inner, int):
                leaves[inner] = node[number]
            else:
                _put(leaves, what, node[number], inner, (path, number))


def _check_dict(what: str, path: tuple[Any, ...], node: Any, expected: dict[Any, Any]) -> None:
    if not isinstance(node, Mapping):
        raise TypeError(
            f"{_where(what, path)} must be a dict with the parameters' keys, "
            f"got {type(node).__name__}"
        )
    missing = [key for key in expected if key not in node]
    unexpected = [key for key in node if key not in expected]
    if missing or unexpected:
        raise ValueError(
            f"{_where(what, path)}: missing keys {missing}, unexpected keys {unexpected}"
        )


def _check_list(
    what: str, path: tuple[Any, ...], node: Any, expected: Fields | list[Any]
) -> list[Any]:
    """Check a list, tuple or named tuple; return the definitions of what it is to hold."""
    if isinstance(expected, list):
        if not isinstance(node, (list, tuple)):
            raise TypeError(
                f"{_where(what, path)} must be a list or tuple, got {type(node).__name__}"
            )
        if len(node) != len(expected):
            raise ValueError(
                f"{_where(what, path)}: expected {len(expected)} elements, got {len(node)}"
            )
        return expected
    if not is_named(node):
        raise TypeError(
            f"{_where(what, path)} must be a named tuple with the fields {expected.names}, "
            f"got {type(node).__name__}"
        )
    if tuple(node._fields) != expected.names:
        raise ValueError(
            f"{_where(what, path)} must have the parameters' fields {expected.names}, "
            f"got {type(node).__name__} with {node._fields}"
        )
    return expected.inner


def _where(what: str, path: tuple[Any, ...]) -> str:
    keys = []
    while path:
        path, key = path
        keys.append(f"[{key!r}]")
    return what + "".join(reversed(keys))


def unflatten(tree: Any, leaves: Any) -> Any:
    """Return a container like this one, of the same types, with other leaves (an iterator)."""

    def within(x: Any) -> Any:
        return unflatten(x, leaves) if is_inner(x) else next(leaves)

    if isinstance(tree, Mapping):
        return {key: within(x) for key, x in tree.items()}
    inner = list(map(within, tree))
    if is_named(tree):
        return type(tree)._make(inner)  # its class may be called with something else
    return inner if isinstance(tree, list) else tuple(inner)
