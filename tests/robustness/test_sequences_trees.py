"""Random containers in one another, of parameters and gradients, beside a plain walk over them.

The walk says what the parameters' order and names are and which trees of gradients fit; what is
computed is the reference's. A tree that does not fit must be refused by its path, and change
nothing.
"""

import copy
import pickle
import re
from collections import Counter, OrderedDict, UserDict, namedtuple
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pytest
import sequences
from oracle import Oracle, assert_same_bits, same_bits
from sequences import DTYPES, History, chance, new_gradient, new_parameter, pick
from support import differences, everything
from tables import ROWS

import fastopt

OPERATIONS = 12
KEYS = ["w", "b", "layers", "", ".", "a.b", "b.c", "a", "c", "w/x", "é", "0", "1", 0, 1, 2, -1]
RARE = [1.0, True, None, (1, 2), 2.0, False]
Layer, Turned, Three = (
    namedtuple(*x) for x in (("Layer", "W b"), ("Turned", "b W"), ("Three", "x y z"))
)
OPTIONS = [
    {},
    {"ema_decay": 0.5},
    {"global_clip_norm": 1.0},
    {"semantics": "keras"},
    {"accumulate": 2},
]


def is_named(x):
    return isinstance(x, (Layer, Turned, Three))


def is_container(x):
    return isinstance(x, (Mapping, list, tuple))


def children(node):
    """Return pairs of a key and what is under it."""
    if isinstance(node, Mapping):
        return list(node.items())
    return list(zip(node._fields if is_named(node) else range(len(node)), node, strict=True))


def walk(node, path=()):
    """Return pairs of a path and an array."""
    if not is_container(node):
        return [(path, node)]
    return [pair for key, x in children(node) for pair in walk(x, (*path, key))]


def containers(node, path=()):
    """Return pairs of a path and a container, the outermost first."""
    own = [(path, node)]
    for key, x in children(node):
        if is_container(x):
            own += containers(x, (*path, key))
    return own


def name_of(path):
    return ".".join(map(str, path))


def keys_of(tree):
    """Return what the parameters of one group are called; None: they have numbers."""
    nested = any(is_container(x) for _, x in children(tree))
    if nested or is_named(tree):
        return [name_of(path) for path, _ in walk(tree)]
    return list(tree) if isinstance(tree, Mapping) else None


def at(tree, path):
    for key in path:
        tree = getattr(tree, key) if is_named(tree) else tree[key]
    return tree


def written(tree, path):
    """Return a path as errors show it."""
    text = "grads"
    for k, key in enumerate(path):
        outer = at(tree, path[:k])
        text += f"[{outer._fields.index(key) if is_named(outer) else key!r}]"
    return text


def rebuilt(node, leaf, path=(), *, dicts=dict, lists=None, named=None, order=list):
    """Return such a tree with other leaves, and perhaps containers of other types."""
    if not is_container(node):
        return leaf(path, node)
    inner = [
        (key, rebuilt(x, leaf, (*path, key), dicts=dicts, lists=lists, named=named, order=order))
        for key, x in children(node)
    ]
    if isinstance(node, Mapping):
        return dicts(order(inner))
    values = [x for _, x in inner]
    if is_named(node):
        return named(node, values) if named else type(node)(*values)
    return lists(values) if lists else type(node)(values)


def put(tree, at_path, value):
    """Return the tree with something else at a path."""

    def within(node, path):
        if path == at_path:
            return value
        if not is_container(node):
            return node
        inner = [(key, within(x, (*path, key))) for key, x in children(node)]
        if isinstance(node, Mapping):
            return dict(inner)
        values = [x for _, x in inner]
        return type(node)(*values) if is_named(node) else type(node)(values)

    return within(tree, ())


class Sequence:
    def __init__(self, seed, done, folder):
        self.rng, self.folder = np.random.default_rng([seed, 2]), folder
        self.history, self.files = History(done), 0
        row = pick(self.rng, ROWS)
        self.cls, self.kwargs = row.cls, {"lr": 0.1, **pick(self.rng, OPTIONS)}
        if chance(self.rng, 0.5):
            for _, switch in row.switches():
                self.kwargs |= switch

    # ---- trees

    def leaf(self):
        return new_parameter(self.rng)

    def keys(self, n):
        chosen = {}
        while len(chosen) < n:
            chosen[pick(self.rng, RARE if chance(self.rng, 0.12) else KEYS)] = None
        return list(chosen)

    def tree(self, depth=0):
        rng = self.rng
        if depth == 4 or chance(rng, [0, 0.5, 0.6, 0.7][min(depth, 3)]):
            return self.leaf()
        kind = pick(rng, ["dict", "dict", "dict", "list", "tuple", "named"])
        if kind == "named":
            cls = pick(rng, [Layer, Turned, Three])
            return cls(*(self.tree(depth + 1) for _ in cls._fields))
        n = pick(rng, [1, 2, 2, 3, 4]) if depth == 0 or chance(rng, 0.95) else 0
        if kind == "dict":
            pairs = {key: self.tree(depth + 1) for key in self.keys(n)}
            return pick(rng, [dict, dict, OrderedDict, MappingProxyType, UserDict])(pairs)
        return (list if kind == "list" else tuple)(self.tree(depth + 1) for _ in range(n))

    def shuffled(self, items):
        return [items[k] for k in self.rng.permutation(len(items))]

    def as_gradients(self, tree, grads):
        """Return gradients, by path, structured as a tree, in any way that is allowed."""
        rng = self.rng
        return rebuilt(
            tree,
            lambda path, _: grads[path],
            dicts=lambda pairs: pick(rng, [dict, dict, OrderedDict, UserDict, MappingProxyType])(
                dict(pairs)
            ),
            lists=lambda values: pick(rng, [list, tuple])(values),
            named=lambda node, values: namedtuple("Other", node._fields)(*values),
            order=self.shuffled,
        )

    def split(self, tree, n):
        """Return n dicts over which a dict's arrays are distributed, at any depth."""
        parts = [{} for _ in range(n)]
        for key, x in tree.items():
            if isinstance(x, Mapping) and len(x) and chance(self.rng, 0.6):
                for part, inner in zip(parts, self.split(x, n), strict=True):
                    if inner:
                        part[key] = inner
            else:
                parts[self.rng.integers(n)][key] = x
        return parts

    # ---- the sequence

    def run(self):
        rng = self.rng
        tree = self.tree()
        deep = [path for path, _ in walk(tree) if len(path) > 1]
        if isinstance(tree, Mapping) and deep and chance(rng, 0.1):  # perhaps a name twice
            tree = {name_of(pick(rng, deep)): self.leaf(), **tree}
        if isinstance(tree, Mapping) and chance(rng, 0.6):
            self.begin_with_groups(tree)
        else:
            self.begin(tree)
        if self.opt is None:
            return
        for _ in range(OPERATIONS):
            sequences.choose(rng, self.CHOICES)(self)
            self.check()

    def check(self):
        assert_same_bits(self.opt, self.twin)
        assert list(self.opt.state_dict()["state"]) == self.names
        assert len({*self.names}) == len(self.names)

    def begin(self, tree):
        """Make an optimizer over one tree, or see it refused."""
        names = keys_of(tree)
        paths = [path for path, _ in walk(tree)]
        self.history.add("begin", f"{type(tree).__name__} {paths}")
        self.opt = None
        given = tree if isinstance(tree, Mapping) or chance(self.rng, 0.5) else [{"params": tree}]
        if not paths:
            self.refused_at_first(given, "no parameters")
        elif names is not None and len({*names}) < len(names):
            self.refused_at_first(given, "parameter names occur twice")
        else:
            self.opt = self.cls(given, **self.kwargs)
            self.trees, self.tree_of_grads, self.order = [tree], tree, paths
            self.settle(list(range(len(paths))) if names is None else names)

    def refused_at_first(self, given, message):
        self.history.add("refused")
        with pytest.raises(ValueError, match=message):
            self.cls(given, **self.kwargs)

    def settle(self, names):
        self.names = names
        self.twin = Oracle(self.opt, **self.kwargs)
        leaves = [x for tree in self.trees for _, x in walk(tree)]
        assert all(a is b for a, b in zip(self.opt.params, leaves, strict=True))

    def begin_with_groups(self, tree):
        """Make an optimizer over groups that share a tree; sometimes two share a place in it."""
        rng = self.rng
        parts = [part for part in self.split(tree, pick(rng, [2, 3])) if part]
        if len(parts) > 1 and chance(rng, 0.5):
            self.add_a_clash(parts)
        paths = [path for part in parts for path, _ in walk(part)]
        names = [name for part in parts for name in keys_of(part)]
        self.history.add("begin with groups", f"{[[p for p, _ in walk(x)] for x in parts]}")
        self.opt = None
        groups = [{"params": part} for part in parts]
        begun = [groups[0]] if chance(rng, 0.5) else groups
        nodes = {p[:k] for p in paths for k in range(len(p))}
        mixed = any(
            {*range(len(parts))} > {k} and self.is_shared(parts, path)
            for k, part in enumerate(parts)
            for path, node in containers(part)
            if not isinstance(node, Mapping) or not len(node)
        )
        clash = len({*paths}) < len(paths) or nodes & {*paths} or mixed
        if not paths or (begun is not groups and not walk(parts[0])):
            return
        if clash or len({*names}) < len(names):
            self.history.add("refused clash")
            with pytest.raises(ValueError, match=r"occur twice|one and the same|nested need dicts"):
                self.cls(groups, **self.kwargs)
            first = keys_of(parts[0])
            if len({*first}) == len(first):
                opt = self.cls([groups[0]], **self.kwargs)
                messages = []
                for group in groups[1:]:
                    before = everything(opt)
                    try:
                        opt.add_param_group(group)
                    except ValueError as error:
                        messages.append(str(error))
                        assert differences(everything(opt), before) == []
                assert re.search("twice|one and the same|nested need", messages[0])
            return
        self.opt = self.cls(begun, **self.kwargs)
        for group in groups[len(begun) :]:
            self.opt.add_param_group(group)
        self.trees, self.order = parts, paths
        self.tree_of_grads = {}
        for part in parts:
            self.tree_of_grads = self.union(self.tree_of_grads, part)
        self.settle(names)

    def is_shared(self, parts, path):
        """Tell whether two groups have something at a path."""
        there = 0
        for part in parts:
            own = {p[:k] for p, _ in walk(part) for k in range(len(p) + 1)}
            own |= {p for p, _ in containers(part)}
            there += path in own
        return there > 1

    def union(self, one, other):
        both = dict(one)
        for key, x in other.items():
            if key in both and isinstance(x, Mapping) and isinstance(both[key], Mapping):
                both[key] = self.union(both[key], x)
            else:
                assert key not in both
                both[key] = x
        return both

    def add_a_clash(self, parts):
        """Give another group a parameter at the place, or of the name, of one there is."""
        rng = self.rng
        paths = [path for path, _ in walk(parts[0])]
        if not paths:
            return
        path = list(pick(rng, paths))
        k = int(rng.integers(len(path)))
        twins = {0: ["0", 0.0, False], 1: ["1", 1.0, True], "0": [0], "1": [1], 2: ["2", 2.0]}
        if path[k] in twins:
            path[k] = pick(rng, twins[path[k]])
        if chance(rng, 0.3) and len(path) > 1:
            path = [".".join(map(str, path))]
        part = parts[-1]
        for key in path[:-1]:
            part = part.setdefault(key, {}) if isinstance(part, dict) else None
            if not isinstance(part, dict):
                return
        if path[-1] not in part:
            part[path[-1]] = self.leaf()

    # ---- operations

    def grads(self, none=0.1):
        params = dict(zip(self.order, self.opt.params, strict=True))
        return {
            path: None if chance(self.rng, none) else new_gradient(self.rng, param, wild=0.02)
            for path, param in params.items()
        }

    def step(self):
        grads = self.grads()
        self.history.add("step", f"None: {[path for path, g in grads.items() if g is None]}")
        self.opt.step(self.as_gradients(self.tree_of_grads, grads))
        self.twin.step(list(grads.values()))

    def bad_step(self):
        """Spoil a container or an array of a tree of gradients."""
        rng, tree = self.rng, self.tree_of_grads
        grads = self.grads(0)
        good = rebuilt(tree, lambda path, _: grads[path])
        if chance(rng, 0.3):
            path, param = pick(rng, list(zip(self.order, self.opt.params, strict=True)))
            name = self.names[self.order.index(path)]
            bad = pick(rng, [[0.5], {}, "g", np.zeros((1, 1, 1, 1, 1), param.dtype), [None], 1j])
            error, message = (TypeError, ValueError), f"gradient of parameter {name!r}: "
        elif keys_of(tree) is None:
            return
        else:
            path, node = pick(rng, containers(good))
            bad, error, message = self.spoilt(node)
            message = written(good, path) + message
        self.history.add("bad step", f"{message} {type(bad).__name__}")
        before = everything(self.opt)
        with pytest.raises(error, match="^" + re.escape(message)):
            self.opt.step(put(good, path, bad))
        assert differences(everything(self.opt), before) == []

    def spoilt(self, node):
        """Return something that does not fit in a container's place, and what is said of it."""
        rng = self.rng
        strange = [None, np.zeros(3), "text", 1.0, (x for x in ())]
        if isinstance(node, Mapping):
            key = pick(rng, list(node)) if node else None
            fewer = {k: x for k, x in node.items() if k != key}
            ways = [
                (list(node.values()), TypeError, " must be a dict with the parameters' keys, got"),
                (pick(rng, strange), TypeError, " must be a dict with the parameters' keys, got"),
                ({**node, "more": None}, ValueError, ": missing keys [], unexpected keys ['more']"),
            ]
            if node:
                ways += [
                    (fewer, ValueError, f": missing keys [{key!r}], unexpected keys []"),
                    (
                        {"more": None, **fewer},
                        ValueError,
                        f": missing keys [{key!r}], unexpected keys ['more']",
                    ),
                ]
        elif is_named(node):
            other = Turned if isinstance(node, Layer) else Layer
            ways = [
                (tuple(node), TypeError, " must be a named tuple with the fields"),
                (node._asdict(), TypeError, " must be a named tuple with the fields"),
                (pick(rng, strange), TypeError, " must be a named tuple with the fields"),
                (other(*list(node)[:2]), ValueError, " must have the parameters' fields"),
            ]
        else:
            n = len(node)
            ways = [
                ([*node, None], ValueError, f": expected {n} elements, got {n + 1}"),
                (dict(enumerate(node)), TypeError, " must be a list or tuple, got dict"),
                (pick(rng, strange), TypeError, " must be a list or tuple, got"),
            ]
            if n:
                ways.append((node[1:], ValueError, f": expected {n} elements, got {n - 1}"))
        return pick(rng, ways)

    def copied(self):
        how = pick(self.rng, ["deepcopy", "pickle"])
        self.history.add("copy", how)
        bundle = copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
        self.opt = bundle(self.opt)
        self.twin.params = [
            sequences.relaid(own, p)
            for own, p in zip(self.twin.params, self.opt.params, strict=True)
        ]

    def twin_over(self):
        """Return an optimizer over other arrays in such trees, in dicts of another order."""
        trees = [
            rebuilt(
                tree,
                lambda _, x: new_parameter(self.rng, x.dtype, x.shape),
                order=self.shuffled,
            )
            for tree in self.trees
        ]
        return self.cls([{"params": tree} for tree in trees], **self.kwargs), trees

    def load(self):
        """Load a state dict into an optimizer over such trees, and go on with that one."""
        self.history.add("load")
        opt, trees = self.twin_over()
        opt.load_state_dict(self.opt.state_dict())
        self.go_on_with(opt, trees, with_params=False)

    def load_file(self):
        texts = [str(name) for name in self.names]
        path = self.folder / f"{self.files}.safetensors"
        self.files += 1
        if any(not isinstance(name, str) and type(name) is not int for name in self.names):
            self.history.add("save refused", "a name is of another type")
            with pytest.raises(TypeError, match="names must be strings or integers"):
                self.opt.save(path)
        elif len({*texts}) < len(texts):
            self.history.add("save refused", "the same text")
            with pytest.raises(ValueError, match="another has the same name in a file"):
                self.opt.save(path)
        else:
            self.history.add("load file")
            opt, trees = self.twin_over()
            self.opt.save(path)
            opt.load(path)
            self.go_on_with(opt, trees, with_params=True)

    def go_on_with(self, opt, trees, *, with_params):
        paths = [path for tree in trees for path, _ in walk(tree)]
        numbers = [self.order.index(path) for path in paths]
        old = self.twin
        assert not with_params or all(
            same_bits(a, old.params[k]) for a, k in zip(opt.params, numbers, strict=True)
        )
        numbered = keys_of(trees[0]) is None
        twin = Oracle(opt, **self.kwargs)
        twin.state = [old.state[k] for k in numbers]
        twin.ema = old.ema and [old.ema[k] for k in numbers]
        twin.totals, twin.summed = [old.totals[k] for k in numbers], old.summed
        twin.fresh, twin.completed = [old.fresh[k] for k in numbers], old.completed
        self.names = self.names if numbered else [self.names[k] for k in numbers]
        self.opt, self.twin, self.trees, self.order = opt, twin, trees, paths

    def flattened(self):
        """A flat vector's views are structured as the tree, and lie one after the other."""
        self.history.add("flatten")
        dtype, tree = pick(self.rng, DTYPES), self.tree_of_grads
        model = rebuilt(tree, lambda _, x: x.astype(dtype))
        flat, views = fastopt.flatten(model)
        again = fastopt.unflatten(np.zeros_like(flat), model)
        offset = 0
        for (path, x), (other, view), (third, zero) in zip(
            walk(model), walk(views), walk(again), strict=True
        ):
            assert path == other == third
            assert view.shape == zero.shape == x.shape
            assert same_bits(view, x)
            assert same_bits(flat[offset : offset + x.size].reshape(x.shape), x)
            offset += x.size
            assert x.size == 0 or np.shares_memory(view, flat)
        assert offset == flat.size
        assert sum(x.size for _, x in walk(views)) == flat.size
        for (_, one), (_, other) in zip(containers(model), containers(views), strict=True):
            assert type(one) is type(other)
        self.train_a_copy(flat, views)

    def train_a_copy(self, flat, views):
        """Copied together, a flat vector, its views and its optimizer stay together."""
        flat[...] = 1.0  # so that a step changes every element
        rng, before = self.rng, flat.copy()
        bundle = {"views": views, "opt": self.cls([flat], **self.kwargs)}
        copied = pickle.loads(pickle.dumps(bundle)) if chance(rng, 0.5) else copy.deepcopy(bundle)
        for _ in range(2):  # an update, if there are micro-batches
            copied["opt"].step([np.ones_like(flat)])
        (new,) = copied["opt"].params
        assert same_bits(flat, before)
        assert flat.size == 0 or (new != before).all()
        expected = [x.ravel() for _, x in walk(copied["views"])]
        assert same_bits(new, np.concatenate(expected))

    CHOICES = ((step, 8), (bad_step, 6), (copied, 2), (load, 2), (load_file, 2), (flattened, 1))


KINDS = [
    "begin",
    "refused",
    "begin with groups",
    "refused clash",
    "step",
    "bad step",
    "copy",
    "load",
    "load file",
    "save refused",
    "flatten",
]


run = sequences.runner(Sequence)


@pytest.mark.parametrize("seed", sequences.seeds(250))
def test_any_tree_trains_as_its_arrays_in_a_list(seed, tmp_path):
    run(seed, Counter(), tmp_path)


def test_the_sequences_reach_every_kind_of_operation(tmp_path):
    done = sequences.reached(run, 100, tmp_path)
    assert {kind for kind in KINDS if not done[kind]} == set(), done
