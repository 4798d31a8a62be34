"""Who takes part in rows.py: each steps on the same table and the same state, in turns."""

import itertools
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import rows_numpy

import fastopt
from fastopt import reference
from fastopt.bench.check import agree
from fastopt.bench.peers.base import Tolerance

LR, EPS, BETAS = 1e-3, 1e-8, (0.9, 0.999)
SLOTS = {"SGD": (), "Adagrad": ("sum",), "Adam": ("exp_avg", "exp_avg_sq")}
OPTIONS = {"SGD": {}, "Adagrad": {"eps": EPS}, "Adam": {"eps": EPS, "betas": BETAS}}
FORMULAS = {"SGD": reference.sgd, "Adagrad": reference.adagrad, "Adam": reference.adam}
BYTES_APART = 1 << 28  # that batches touch before the first of them comes again
VALUES = 4


class Batch(NamedTuple):
    indices: np.ndarray
    values: np.ndarray


class Memory:
    """A table and its state, whose pages are there, and the batches that look rows up.

    All contenders step on the same memory: what differs is not where it lies.
    """

    def __init__(self, rule, rows, width):
        self.rule = rule
        self.table = np.empty((rows, width), np.float32)
        self.reset()
        self.opt = getattr(fastopt, rule)([self.table], lr=LR, **OPTIONS[rule])
        self.arrays = [self.table, *(self.opt.state[0][name] for name in SLOTS[rule])]
        for array in self.arrays[1:]:
            array.fill(1e-4)
        self._cumulated = None

    def reset(self):
        """Put weights back to where ulps are small, after many steps in one direction."""
        self.table.fill(0.1)

    @staticmethod
    def bytes(rule, rows, width):
        return 4 * rows * width * (1 + len(SLOTS[rule]))

    def batches(self, lookups, skew, rng, least=4):
        """Return as many batches as touch 256 MB: a row that is rare has left the near caches."""
        width = self.table.shape[1]
        each = 4 * width * lookups * len(self.arrays)
        count = max(least, BYTES_APART // each)
        values = [
            rng.uniform(0.5, 1.5, (lookups, width)).astype(np.float32) for _ in range(VALUES)
        ]  # of one sign: no sum of duplicates cancels, so that their order matters little
        return [Batch(self._draw(lookups, skew, rng), values[i % VALUES]) for i in range(count)]

    def _draw(self, lookups, skew, rng):
        rows = len(self.table)
        if skew == "uniform":
            return rng.integers(0, rows, lookups)
        if self._cumulated is None:  # the k-th most frequent row has 1/k of the first one's chance
            self._cumulated = np.cumsum(1 / np.arange(1.0, rows + 1))
            self._ranks = np.random.default_rng(0).permutation(rows)
        chosen = rng.random(lookups) * self._cumulated[-1]
        return self._ranks[np.searchsorted(self._cumulated, chosen)]


class Contender:
    """What takes turns on a memory."""

    changes = True  # what it steps on
    tolerance = Tolerance(ulps=8, travel=1e-4)
    semantics = "torch"

    def __init__(self, memory, threads):
        self.memory, self.threads, self.t = memory, threads, 0
        self.arrays = memory.arrays

    def take(self, batches, turns):
        """Be ready to step on batches, whose numbers come from `turns`."""
        self.prepared, self.turns = [self.prepare(batch) for batch in batches], turns

    def prepare(self, batch):
        """Return a batch as it comes to this contender: nobody times that."""
        return batch

    def next(self):
        return self.prepared[next(self.turns)]

    def begin(self):
        """Set the number of threads."""


class Fastopt(Contender):
    tolerance = Tolerance(ulps=0, travel=0)

    def __init__(self, memory, threads):
        super().__init__(memory, threads)
        self.t = memory.opt.completed_steps

    def begin(self):
        fastopt.set_num_threads(self.threads)

    def step(self):
        self.t += 1
        self.memory.opt.step([fastopt.Rows(*self.next())])


class NumPy(Contender):
    def step(self):
        rows, g = rows_numpy.summed(*self.next())
        self.t += 1
        getattr(self, self.memory.rule.lower())(rows, g, *self.arrays)

    def sgd(self, rows, g, table):
        g *= LR
        table[rows] -= g

    def adagrad(self, rows, g, table, sums):
        rows_numpy.adagrad(rows, g, table, sums, LR, EPS)

    def adam(self, rows, g, table, exp_avg, exp_avg_sq):
        b1, b2 = BETAS
        root = (1 - b2**self.t) ** 0.5
        m, v = exp_avg[rows], exp_avg_sq[rows]
        m *= b1
        m += (1 - b1) * g
        exp_avg[rows] = m
        v *= b2
        g *= g
        g *= 1 - b2
        v += g
        exp_avg_sq[rows] = v
        np.sqrt(v, out=v)
        v += EPS * root
        m *= LR * root / (1 - b1**self.t)
        m /= v
        table[rows] -= m


class Torch(Contender):
    """SGD and Adagrad of torch.optim, and SparseAdam, which are given the sparse gradient."""

    def __init__(self, memory, threads):
        import torch

        super().__init__(memory, threads)
        torch.sparse.check_sparse_tensor_invariants.disable()
        self._torch = torch
        self.semantics = "keras" if memory.rule == "Adam" else "torch"  # SparseAdam's eps
        # The parameter is empty at first, so that no state is allocated beside the memory's.
        self.param = torch.nn.Parameter(torch.empty(0, memory.table.shape[1]))
        name = {"Adam": "SparseAdam"}.get(memory.rule, memory.rule)
        self.opt = getattr(torch.optim, name)([self.param], lr=LR, **OPTIONS[memory.rule])
        self.param.data = torch.from_numpy(memory.table)
        state = self.opt.state[self.param]
        state |= {
            slot: torch.from_numpy(array)
            for slot, array in zip(SLOTS[memory.rule], memory.arrays[1:], strict=True)
        }
        if memory.rule == "Adam":
            state["step"] = 0

    def prepare(self, batch):
        indices, values = map(self._torch.from_numpy, batch)
        shape = self.memory.table.shape
        return self._torch.sparse_coo_tensor(indices[None], values, shape, check_invariants=False)

    def begin(self):
        self._torch.set_num_threads(self.threads)

    def step(self):
        self.t += 1
        self.param.grad = self.next()
        self.opt.step()


class Exact(Fastopt):
    """With ``rows="exact"``, a step preceded by the refresh of the rows that it looks up."""

    WARM_STEPS = 1100  # more than may be missed

    def __init__(self, memory, threads):
        super().__init__(memory, threads)
        options = OPTIONS[memory.rule]
        self.opt = getattr(fastopt, memory.rule)([memory.table], lr=LR, rows="exact", **options)
        self.arrays = [memory.table, *(self.opt.state[0][name] for name in SLOTS[memory.rule])]
        self.t = 0

    def train(self):
        """Let rows miss as many steps as they do in the long run; others get a dense state."""
        self.begin()
        for _ in range(self.WARM_STEPS):
            self.step()
        self.opt.refresh()
        for ours, own in zip(self.memory.arrays[1:], self.arrays[1:], strict=True):
            ours[...] = own
        for _ in range(self.WARM_STEPS):
            self.step()

    def step(self):
        self.t += 1
        indices, values = self.next()
        self.opt.refresh(self.memory.table, indices)
        self.opt.step([fastopt.Rows(indices, values)])


class Dense(Fastopt):
    """fastopt's step over the whole table, with a gradient that is zero in most rows."""

    def prepare(self, batch):
        return None

    def take(self, batches, turns):
        super().take(batches, turns)
        self.grad = np.zeros_like(self.memory.table)
        rows, inverse = np.unique(batches[0].indices, return_inverse=True)
        total = np.zeros((len(rows), self.grad.shape[1]), np.float32)
        np.add.at(total, inverse, batches[0].values)
        self.grad[rows] = total

    def step(self):
        self.memory.opt.step([self.grad])


def contenders(rule):
    """Return by name who can take part, and by name why others cannot."""
    found, missing = {}, {}
    if find_spec("numba"):
        from rows_numba import Limit, Numba

        found["limit"] = Limit
    else:
        missing |= dict.fromkeys(("limit", "numba"), "numba is not installed")
    found["fastopt"] = Fastopt
    if find_spec("numba"):
        found["numba"] = Numba
    if find_spec("torch"):
        found["torch"] = Torch
    else:
        missing["torch"] = "torch is not installed"
    found["numpy"] = NumPy
    return found, missing


# ---- their numbers -------------------------------------------------------------------------------


def reference_step(memory, batch, **options):
    """Return the rows of a batch, and what they and their state are after a step, and before."""
    rows = np.unique(batch.indices)
    start = [array[rows] for array in memory.arrays]
    total = np.zeros_like(start[0])
    np.add.at(total, np.searchsorted(rows, batch.indices), batch.values)  # as they come
    want = [array.copy() for array in start]
    state = dict(zip(SLOTS[memory.rule], want[1:], strict=True))
    FORMULAS[memory.rule](want[0], total, state, lr=LR, **OPTIONS[memory.rule], **options)
    return rows, want, start


def check(name, contender, batches):
    """Raise an error unless steps on batches are the reference's; it has taken them."""
    for batch in batches:
        rows, want, start = reference_step(
            contender.memory, batch, step=contender.t + 1, semantics=contender.semantics
        )
        if not contender.changes:
            want = start
        contender.begin()
        contender.step()
        got = [array[rows] for array in contender.arrays]
        agree(f"{name} ({contender.memory.rule})", got, want, start, contender.tolerance)


def check_formulas(rule, width, threads):
    """Hold all to the reference for some steps on a small table, whose other rows must stay."""
    found, _ = contenders(rule)
    for name, kind in found.items():
        rng = np.random.default_rng(0)
        memory = Memory(rule, 300, width)
        memory.table[...] = rng.standard_normal(memory.table.shape)
        for array in memory.arrays[1:]:
            array.fill(0)
        sizes = 10 ** rng.uniform(-6, 1, (200, 1))
        batches = [
            Batch(rng.integers(0, 250, 200), (sizes * g).astype(np.float32))
            for g in rng.uniform(0.5, 1.5, (3, 200, width))
        ]
        before = memory.table.copy()
        contender = kind(memory, threads)
        contender.take(batches, itertools.count())
        check(name, contender, batches)
        same = np.setdiff1d(np.arange(300), np.concatenate([b.indices for b in batches]))
        assert len(same) >= 50
        if not (memory.table[same] == before[same]).all():
            raise AssertionError(f"{name} ({rule}): rows that no batch looked up have changed")


def check_exact(rule, width, threads):
    """Hold ``rows="exact"`` to the bits of dense steps, of few rows on a small table."""
    rng = np.random.default_rng(0)
    exact, dense = Memory(rule, 300, width), Memory(rule, 300, width)
    contender = Exact(exact, threads)
    batches = exact.batches(8, "uniform", rng)[:100]
    contender.take(batches, itertools.count())
    contender.begin()
    for array in dense.arrays[1:]:
        array.fill(0)
    for batch in batches:
        grad = np.zeros_like(dense.table)
        np.add.at(grad, batch.indices, batch.values)
        contender.step()
        dense.opt.step([grad])
        for got, want in zip(contender.arrays, dense.arrays, strict=True):
            if not (got[batch.indices] == want[batch.indices]).all():
                raise AssertionError(f'rows="exact" ({rule}) is not the dense run')
