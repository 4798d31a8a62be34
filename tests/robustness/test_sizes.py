"""More than 2**31 elements in one array step correctly.

The arrays are real, and so is every read and write, but the memory behind them is small: the same
few pages of a file are mapped over and over. Each element of the file is then updated as often as
it occurs, by whole numbers, so that the result tells how often each was visited. (With one thread:
several would update the same memory at once.)
"""

import ctypes
import mmap
import os
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from fastopt import SGD, _core

BLOCK = _core.BLOCK
SIZE = 2**31 + 5 * BLOCK + 3
PERIOD = 1021 * 1024  # elements of the file: no divisor of 2**31 or 2**32
MAP_FIXED = 0x10

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux"),
    pytest.mark.skipif(sys.maxsize < 2**32, reason="needs 64 bits"),
]


@contextmanager
def repeated(start):
    """Map a file with these elements again and again; yield (the large array, the file's own)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    step = start.nbytes
    length = -(-SIZE * start.itemsize // step) * step + 2 * mmap.PAGESIZE
    file = os.memfd_create("repeated")
    os.write(file, start.tobytes())
    nothing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    base = libc.mmap(None, length, 0, nothing, -1, 0)  # an access beyond either end is a fault
    assert base != ctypes.c_void_p(-1).value
    first = base + mmap.PAGESIZE
    access = mmap.PROT_READ | mmap.PROT_WRITE
    for at in range(first, base + length - mmap.PAGESIZE, step):
        assert libc.mmap(at, step, access, mmap.MAP_SHARED | MAP_FIXED, file, 0) == at
    try:
        memory = (ctypes.c_char * (SIZE * start.itemsize)).from_address(first)
        yield np.frombuffer(memory, start.dtype), np.frombuffer(memory, start.dtype, PERIOD)
    finally:
        libc.munmap(base, length)
        os.close(file)


def visits():
    """How often each element of the file occurs in the large array."""
    return SIZE // PERIOD + (np.arange(PERIOD) < SIZE % PERIOD)


def steps_of_one(grad, **options):
    with repeated(np.zeros(PERIOD, np.float32)) as (param, seen):
        opt = SGD([param], lr=1.0, num_threads=1, **options)
        result = opt.step([grad])
        np.testing.assert_array_equal(seen, -visits())
        assert opt.state[0]["step"] == 1
        return result


def test_every_element_of_a_huge_array_is_updated_once():
    with repeated(np.ones(PERIOD, np.float32)) as (grad, _):
        steps_of_one(grad)


def test_a_huge_gradient_of_another_layout_is_gathered_and_measured():
    grad = np.broadcast_to(np.float32(1), SIZE)
    assert steps_of_one(grad, global_clip_norm=1e30).grad_norm == np.sqrt(float(SIZE))


def test_threads_look_at_all_of_a_huge_gradient():
    """It is all zeros, which take no memory until they are written, but for the last element."""
    grad = np.zeros(SIZE, np.float32)
    grad[-1] = np.nan
    try:
        _core.force_threads(3)
        with repeated(np.ones(PERIOD, np.float32)) as (param, seen):
            opt = SGD([param], lr=1.0, nonfinite="skip")
            result = opt.step([grad])
            assert result.skipped
            assert result.threads == 3
            assert (seen == 1).all()
            grad[-1] = 0
            assert not opt.step([grad]).skipped
            assert (seen == 1).all()
    finally:
        _core.force_threads(0)
