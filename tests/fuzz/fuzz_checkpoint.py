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
from forged import CODES, assemble, parts, sign, small, small_file
from support import contents, differences, everything

RAW, SIGNED = 1, 2
WORDS = [0, 1, -1, 8, 2.5, float("nan"), float("inf"), None, True, False, "", "w", "b", [], {}]
WORDS += [2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, [0, 0], [0], [2], [1, 2]]
WORDS += [*CODES.values(), "BF16", "F4", "params/b", "state/w/step", "ema/w", "[", "0", "-1", "2"]
WORDS += ["sum/w", "sum/b", "accumulated_steps"]

path = Path(f"/proc/self/fd/{os.memfd_create('checkpoint')}")
path.write_bytes(small_file())
header, data = parts(path)
GOOD = bytes([SIGNED]) + json.dumps(header).encode()
optimizer = small((5.0, 6.0))
before, fresh, state = everything(optimizer), contents(optimizer), optimizer.state_dict()
params = copy.deepcopy(optimizer.params)


def try_to_load(given):
    """Load an input: all of it is taken over, or an error says why and nothing has changed."""
    kind, rest = given[0] if given else 0, given[1:]
    if kind & RAW:
        path.write_bytes(rest)
    else:
        assemble(path, rest, data)
    if kind & SIGNED:
        sign(path)
    try:
        optimizer.load(path)
    except (TypeError, ValueError):
        changed = differences(everything(optimizer), before)
        if changed:
            raise RuntimeError(f"changed by a file that is refused: {changed}") from None
        return
    optimizer.step({"w": np.ones(2, np.float32), "b": np.array(2.0)})
    optimizer.load_state_dict(state)
    for own, param in zip(optimizer.params, params, strict=True):
        own[...] = param
    assert contents(optimizer) == fresh


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
        given = GOOD if chance.random() < 0.5 else bytes([RAW]) + small_file()
    try:
        tree = json.loads(given[1:])
    except ValueError:
        tree = None
    if not isinstance(tree, dict) or chance.random() < 0.2:
        return atheris.Mutate(given, max_size)
    metadata = tree.get("__metadata__")
    try:
        inner = json.loads(metadata["param_groups"]) if chance.random() < 0.5 else None
    except (TypeError, KeyError, ValueError):
        inner = None
    change(inner or tree, chance)
    if inner:
        metadata["param_groups"] = json.dumps(inner)
    return (given[:1] + json.dumps(tree).encode())[:max_size]


if __name__ == "__main__":
    bounds = ["-max_len=4096", "-timeout=10", "-rss_limit_mb=2048"]
    atheris.Setup([*sys.argv, *bounds], try_to_load, custom_mutator=mutate)
    atheris.Fuzz()
