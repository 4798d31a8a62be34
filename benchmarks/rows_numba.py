"""Loops of numba over the rows of a table: what one writes by hand, and the limit."""

import math

import numba
import numpy as np
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from rows_contenders import BETAS, EPS, LR, Contender

AHEAD = 12  # rows that the limit asks for in advance
LINE = 16  # float32 elements of a cache line


def compiled(function, threads):
    # Python's division raises for zero, which keeps a loop from being vectorised; NumPy's does not.
    return numba.njit(function, parallel=threads > 1, error_model="numpy")


# ---- what one writes by hand ---------------------------------------------------------------------


def sgd(table, values, order, first, rows, lr):
    for k in prange(rows.size):
        p, g = table[rows[k]], values[order[first[k]]]
        if first[k + 1] - first[k] > 1:
            g = g.copy()
            for i in range(first[k] + 1, first[k + 1]):
                g += values[order[i]]
        for j in range(p.size):
            p[j] -= lr * g[j]


def adagrad(table, sums, values, order, first, rows, lr, eps):
    for k in prange(rows.size):
        p, s, g = table[rows[k]], sums[rows[k]], values[order[first[k]]]
        if first[k + 1] - first[k] > 1:
            g = g.copy()
            for i in range(first[k] + 1, first[k + 1]):
                g += values[order[i]]
        for j in range(p.size):
            s[j] += g[j] * g[j]
            p[j] -= lr * g[j] / (np.sqrt(s[j]) + eps)


def adam(table, exp_avg, exp_avg_sq, values, order, first, rows, lr, eps, b1, rest1, b2, rest2):
    for k in prange(rows.size):
        p, m, v = table[rows[k]], exp_avg[rows[k]], exp_avg_sq[rows[k]]
        g = values[order[first[k]]]
        if first[k + 1] - first[k] > 1:
            g = g.copy()
            for i in range(first[k] + 1, first[k + 1]):
                g += values[order[i]]
        for j in range(p.size):
            m[j] = b1 * m[j] + rest1 * g[j]
            v[j] = b2 * v[j] + rest2 * (g[j] * g[j])
            p[j] -= lr * m[j] / (np.sqrt(v[j]) + eps)


@numba.njit
def groups(keys, bits, order, first, rows):
    """Take sorted keys apart, and return how many rows they have."""
    mask, count, last = (1 << bits) - 1, 0, -1
    for i in range(keys.size):
        row = keys[i] >> bits
        order[i] = keys[i] & mask
        if row != last:
            rows[count] = last = row
            first[count] = i
            count += 1
    first[count] = keys.size
    return count


class Numba(Contender):
    """Sorts, by NumPy's fastest sort; then sums and updates a row at a time, in one loop."""

    def __init__(self, memory, threads):
        super().__init__(memory, threads)
        self.loop = compiled({"SGD": sgd, "Adagrad": adagrad, "Adam": adam}[memory.rule], threads)

    def prepare(self, batch):
        n = len(batch.indices)
        places = (np.empty(n, np.int64), np.empty(n + 1, np.int64), np.empty(n, np.int64))
        return batch, np.arange(n), *places

    def begin(self):
        numba.set_num_threads(min(self.threads, numba.config.NUMBA_NUM_THREADS))

    def step(self):
        (indices, values), places, order, first, rows = self.next()
        bits = len(places).bit_length()
        keys = (indices << bits) | places  # distinct, so that any sort keeps the order given
        keys.sort()
        count = groups(keys, bits, order, first, rows)
        self.t += 1
        constants = [np.float32(c) for c in self.constants()]
        self.loop(*self.arrays, values, order, first, rows[:count], *constants)

    def constants(self):
        if self.memory.rule == "SGD":
            return (LR,)
        if self.memory.rule == "Adagrad":
            return LR, EPS
        b1, b2 = BETAS
        root = math.sqrt(1 - b2**self.t)
        return LR * root / (1 - b1**self.t), EPS * root, b1, 1 - b1, b2, 1 - b2


# ---- the limit -----------------------------------------------------------------------------------


@intrinsic
def prefetch(_, address):
    """Ask for the cache line at an address, which will be written."""

    def code(context, builder, __, args):
        pointer = builder.inttoptr(args[0], cgutils.voidptr_t)
        i32 = cgutils.int32_t
        kind = cgutils.ir.FunctionType(cgutils.ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, i32(1), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(types.uintp), code


@numba.njit(inline="always")
def fetch(array, row):
    for j in range(0, array.shape[1], LINE):
        prefetch(types.uintp(array.ctypes.data + 4 * (row * array.shape[1] + j)))


@numba.njit(inline="always")
def take(values, order, begin, end, taken):
    """Read the gradients of a row that occurs more than once; return none of their bits."""
    bits = np.uint32(0)
    for i in range(begin + 1, end):
        g = values[order[i]]
        for j in range(g.size):
            bits |= g[j]
    return bits & taken


def move_one(table, values, order, first, rows, taken):
    for k in prange(rows.size):
        ahead = rows[min(k + AHEAD, rows.size - 1)]
        fetch(table, ahead)
        p, g = table[rows[k]], values[order[first[k]]]
        more = take(values, order, first[k], first[k + 1], taken)
        for j in range(p.size):
            p[j] ^= (g[j] & taken) | more


def move_two(table, sums, values, order, first, rows, taken):
    for k in prange(rows.size):
        ahead = rows[min(k + AHEAD, rows.size - 1)]
        fetch(table, ahead)
        fetch(sums, ahead)
        p, s, g = table[rows[k]], sums[rows[k]], values[order[first[k]]]
        more = take(values, order, first[k], first[k + 1], taken)
        for j in range(p.size):
            bits = (g[j] & taken) | more
            p[j] ^= bits
            s[j] ^= bits


def move_three(table, exp_avg, exp_avg_sq, values, order, first, rows, taken):
    for k in prange(rows.size):
        ahead = rows[min(k + AHEAD, rows.size - 1)]
        fetch(table, ahead)
        fetch(exp_avg, ahead)
        fetch(exp_avg_sq, ahead)
        p, m, v = table[rows[k]], exp_avg[rows[k]], exp_avg_sq[rows[k]]
        g = values[order[first[k]]]
        more = take(values, order, first[k], first[k + 1], taken)
        for j in range(p.size):
            bits = (g[j] & taken) | more
            p[j] ^= bits
            m[j] ^= bits
            v[j] ^= bits


class Limit(Contender):
    """Reads and writes the rows, and reads their gradients; nothing is computed, or sorted.

    Of each word of a gradient it takes certain bits: none, which the compiler cannot know.
    """

    changes = False

    def __init__(self, memory, threads):
        super().__init__(memory, threads)
        self.loop = compiled({1: move_one, 2: move_two, 3: move_three}[len(self.arrays)], threads)
        self.words = [array.view(np.uint32) for array in self.arrays]

    def prepare(self, batch):
        order = np.argsort(batch.indices, kind="stable")
        rows, first = np.unique(batch.indices[order], return_index=True)
        return batch.values.view(np.uint32), order, np.append(first, len(order)), rows

    def begin(self):
        numba.set_num_threads(min(self.threads, numba.config.NUMBA_NUM_THREADS))

    def step(self):
        self.loop(*self.words, *self.next(), np.uint32(0))
