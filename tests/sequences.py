"""What the random sequences share: seeds, arrays laid out in any way, and a history for errors.

A sequence is some tens of operations, each chosen by a seed and each followed by a comparison with
a model of what should be there. The suite runs a few seeds of each file, always the same ones;
``FASTOPT_SEEDS=FIRST:LAST`` runs others, as many as one has time for:

    FASTOPT_SEEDS=0:2000 pytest tests/*/test_sequences*.py
"""

import os
from collections import Counter
from contextlib import contextmanager

import numpy as np

from fastopt import _core

BLOCK = _core.BLOCK
DTYPES = (np.float32, np.float64)
SHAPES = [(), (1,), (3,), (7,), (17,), (2, 3), (3, 1, 2), (2, 3, 4), (0,), (2, 0)]
LARGE = [(BLOCK + 3,), (65, 70)]


def seeds(count):
    """Return the seeds to run: so many, unless FASTOPT_SEEDS asks for others."""
    first, colon, last = os.environ.get("FASTOPT_SEEDS", "").partition(":")
    return range(int(first), int(last)) if colon else range(count)


def chance(rng, probability):
    return rng.random() < probability


def pick(rng, items, weights=None):
    """Return one of some items, as it is."""
    items = list(items)
    p = None if weights is None else np.array(weights) / np.sum(weights)
    return items[rng.choice(len(items), p=p)]


def choose(rng, choices):
    """Return one of some items, each of which comes with its weight."""
    items, weights = zip(*choices, strict=True)
    return pick(rng, items, weights)


class History:
    """The operations of a sequence, and how often each kind was made in all sequences."""

    def __init__(self, done):
        self.done, self.lines = done, []

    def add(self, kind, what=""):
        self.done[kind] += 1
        self.lines.append(f"{kind} {what}".rstrip())

    def note(self, what):
        self.lines[-1] += f"; {what}"

    @contextmanager
    def told(self, seed):
        """Add the seed and the history to an error that is raised."""
        try:
            yield
        except BaseException as error:  # what pytest.raises() misses is no Exception
            lines = "\n".join(f"  {n:3} {line}" for n, line in enumerate(self.lines))
            error.add_note(f"seed {seed}, operations:\n{lines}")
            raise


def runner(kind):
    """Return what runs the sequence of a seed, of a class, with its history told on errors."""

    def run(seed, done, *more):
        sequence = kind(seed, done, *more)
        with sequence.history.told(seed):
            sequence.run()

    return run


def reached(run, count, *more):
    """Run some sequences; return how often each kind of operation was made."""
    done = Counter()
    for seed in range(10**6, 10**6 + count):
        run(seed, done, *more)
    return done


# ---- arrays --------------------------------------------------------------------------------------


def shape_of_a_parameter(rng):
    return pick(rng, LARGE) if chance(rng, 0.03) else pick(rng, SHAPES)


def values(rng, shape, dtype, *, wild=0.1):
    """Return numbers of a usual size; with this chance zeros, or very small or large ones."""
    scale = pick(rng, [0.0, -0.0, 1e-42, 1e-25, 1e12, 1e25]) if chance(rng, wild) else 1.0
    numbers = np.asarray(rng.standard_normal(shape) * scale)
    with np.errstate(all="ignore"):  # float16 has fewer
        return numbers.astype(dtype)


def laid_out(rng, array, *, dense=True):
    """Return a new array of the same values that lies in memory in some way."""
    ways = ["C", "C", "axes", "unaligned"]
    if not dense:
        ways += ["steps", "steps", "C"]
    way = pick(rng, ways)
    if way == "axes":
        axes = rng.permutation(array.ndim).astype(int)
        inner = np.empty([array.shape[axis] for axis in axes], array.dtype)
        new = inner.transpose(np.argsort(axes))
    elif way == "unaligned":
        memory = np.zeros(array.nbytes + 1, np.uint8)
        new = memory[1:].view(array.dtype).reshape(array.shape)
    elif way == "steps":
        steps = [pick(rng, [1, 2, 3, -1, -2]) for _ in array.shape]
        base = np.zeros([n * abs(s) for n, s in zip(array.shape, steps, strict=True)], array.dtype)
        new = base[(*(slice(None, None, s) for s in steps), ...)]
    else:
        new = np.empty(array.shape, array.dtype)
    new[...] = array
    return new


def new_parameter(rng, dtype=None, shape=None):
    dtype = pick(rng, DTYPES) if dtype is None else dtype
    shape = shape_of_a_parameter(rng) if shape is None else shape
    return laid_out(rng, values(rng, shape, dtype, wild=0.03))


def new_gradient(rng, param, wild=0.1, dtype=None):
    new = values(rng, param.shape, param.dtype if dtype is None else dtype, wild=wild)
    return laid_out(rng, new, dense=False)


def relaid(array, like):
    """Return the values in the memory order of another array of that shape."""
    new = np.empty_like(like, array.dtype, order="K", subok=False)
    new[...] = array
    return new
