"""A coverage-guided fuzzer of what reads checkpoints; it needs ``pip install atheris``.

Arguments are libFuzzer's::

    python tests/fuzz/fuzz_checkpoint.py -max_total_time=30

An input is a byte, which says what is done with the rest, and a file, or the header of a file. Most
headers get a checksum that is right, so that what lies behind the checksum is reached too. Inputs
are made from a good file; no corpus is needed.
"""

import copy
import json
import os
import random
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["fastopt"]):
    import fastopt._saved
    import fastopt.checkpoint  # noqa: F401

import numpy as np
from forged import CODES, assemble, narrow, parts, sign, small, small_file
from support import contents, differences, everything

RAW, SIGNED, NARROW, CONVERTED = 1, 2, 4, 8
WORDS = [0, 1, -1, 8, 2.5, float("nan"), float("inf"), None, True, False, "", "w", "b", [], {}]
WORDS += [2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, [0, 0], [0], [2], [1, 2]]
WORDS += [*CODES.values(), "F4", "params/b", "state/w/step", "ema/w", "[", "0", "-1", "2"]
WORDS += ["sum/w", "sum/b", "accumulated_steps", "seed", "memory_order", '{"w": [0, 1]}', [2, 3]]
WORDS += [f"state/w/momentum_buffer{end}" for end in ("", "_8bit", "_scale")]
WORDS += ["state/w/master_bits", "state/w/master", "state/b/master_bits", "state/b/master"]


class Target:
    """An optimizer that loads inputs, and a good file of it."""

    def __init__(self, made):
        self.file = small_file(made)
        path.write_bytes(self.file)
        self.header, self.data = parts(path)
        self.good = json.dumps(self.header).encode()
        self.optimizer = made((5.0, 6.0))
        self.before = everything(self.optimizer)
        self.fresh = contents(self.optimizer)
        self.state = self.optimizer.state_dict()
        self.params = copy.deepcopy(self.optimizer.params)
        self.grads = {k: np.ones_like(p) for k, p in zip("wb", self.params, strict=True)}


path = Path(f"/proc/self/fd/{os.memfd_create('checkpoint')}")
TARGETS = [Target(small), Target(narrow)]


def try_to_load(given):
    """Load an input: all of it is taken over, or an error says why and nothing has changed."""
    kind, rest = given[0] if given else 0, given[1:]
    target = TARGETS[bool(kind & NARROW)]
    optimizer = target.optimizer
    if kind & RAW:
        path.write_bytes(rest)
    else:
        assemble(path, rest, target.data)
    if kind & SIGNED:
        sign(path)
    try:
        optimizer.load(path, convert=bool(kind & CONVERTED))
    except (TypeError, ValueError):
        changed = differences(everything(optimizer), target.before)
        if changed:
            raise RuntimeError(f"changed by a file that is refused: {changed}") from None
        return
    optimizer.step(target.grads)
    optimizer.load_state_dict(target.state)
    for own, param in zip(optimizer.params, target.params, strict=True):
        own[...] = param
    assert contents(optimizer) == target.fresh


def places(tree):
    """Yield every container and key in a tree."""
    if isinstance(tree, (dict, list)):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from places(tree[key])


def change(tree, chance):
    """Replace, rename or delete something in a tree."""
    found = list(places(tree))
    if not found:
        return
    holder, key = chance.choice(found)
    what = chance.random()
    if what < 0.1:
        del holder[key]
    elif what < 0.3 and isinstance(holder, dict):
        holder[str(chance.choice([*WORDS, *holder]))] = holder.pop(key)
    else:
        other, at = chance.choice(found)
        new = chance.choice([*WORDS, other[at]])
        holder[key] = copy.deepcopy(new) if isinstance(new, (dict, list)) else new


def mutate(given, max_size, seed):
    """Change a header as a tree, sometimes the JSON in its metadata; or do what atheris does."""
    chance = random.Random(seed)
    if chance.random() < 0.02:
        target = chance.choice(TARGETS)
        own = TARGETS.index(target) * NARROW | chance.choice([0, CONVERTED])
        raw = chance.random() < 0.5
        given = bytes([RAW | own]) + target.file if raw else bytes([SIGNED | own]) + target.good
    try:
        tree = json.loads(given[1:])
    except ValueError:
        tree = None
    if not isinstance(tree, dict) or chance.random() < 0.2:
        return atheris.Mutate(given, max_size)
    metadata, text = tree.get("__metadata__"), chance.choice(["param_groups", "memory_order"])
    try:
        inner = json.loads(metadata[text]) if chance.random() < 0.5 else None
    except (TypeError, KeyError, ValueError):
        inner = None
    change(inner or tree, chance)
    if inner:
        metadata[text] = json.dumps(inner)
    return (given[:1] + json.dumps(tree).encode())[:max_size]


if __name__ == "__main__":
    bounds = ["-max_len=4096", "-timeout=10", "-rss_limit_mb=2048"]
    atheris.Setup([*sys.argv, *bounds], try_to_load, custom_mutator=mutate)
    atheris.Fuzz()
