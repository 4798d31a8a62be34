"""Sets a thread's floating-point mode, through the C library's environment structure."""

import contextlib
import ctypes
import ctypes.util
import platform

# In fenv_t (glibc): which 32-bit word is the control register, and its bits that flush subnormals.
WORD, FLUSH = {"x86_64": (7, 0x8040), "aarch64": (0, 1 << 24)}[platform.machine()]

_libm = ctypes.CDLL(ctypes.util.find_library("m"))


def _environment():
    words = (ctypes.c_uint32 * 16)()
    assert _libm.fegetenv(words) == 0
    return words


def control_word():
    """The control register: rounding, traps, flushing (on x86 also the exception flags)."""
    return _environment()[WORD]


def is_flushing():
    return control_word() & FLUSH == FLUSH


@contextlib.contextmanager
def flush_to_zero():
    """Flush subnormals in this thread, as TensorFlow does in its callbacks."""
    before, changed = _environment(), _environment()
    changed[WORD] |= FLUSH
    assert _libm.fesetenv(changed) == 0
    try:
        yield is_flushing
    finally:
        assert _libm.fesetenv(before) == 0
