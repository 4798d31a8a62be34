# The lock of a step, and the settled protocol: groups that are as they were last seen need not be
# read again.

cdef extern from "Python.h":
    PyLockStatus PyThread_acquire_lock_timed(
        PyThread_type_lock, long long microseconds, int interruptible
    ) nogil


cdef class Lock:
    """What ``threading.RLock`` is to a ``with`` statement; and to a step a third of its price."""

    cdef PyThread_type_lock lock
    cdef long owner      # the thread that holds it, or 0
    cdef Py_ssize_t depth

    def __cinit__(self):
        self.lock = PyThread_allocate_lock()
        if self.lock == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.lock != NULL:
            PyThread_free_lock(self.lock)

    cdef int take(self) except -1:
        """Wait for the lock; a signal's handler may raise meanwhile."""
        cdef long me = PyThread_get_thread_ident()
        cdef bint taken
        if self.owner != me:
            taken = PyThread_acquire_lock(self.lock, NOWAIT_LOCK)
            while not taken:
                with nogil:
                    taken = PyThread_acquire_lock_timed(self.lock, -1, True) == PY_LOCK_ACQUIRED
                if not taken:
                    PyErr_CheckSignals()
            self.owner = me
        self.depth += 1
        return 0

    cdef void give(self) noexcept:
        self.depth -= 1
        if self.depth == 0:
            self.owner = 0
            PyThread_release_lock(self.lock)

    def __enter__(self):
        self.take()

    def __exit__(self, *error):
        self.give()


cdef bint has_items(dict group, tuple seen):
    """Tell whether a dict has these keys and values (two tuples), in this order, and no others."""
    cdef Py_ssize_t n = 0, position = 0
    cdef PyObject *key
    cdef PyObject *value
    cdef tuple keys = seen[0], values = seen[1]
    while PyDict_Next(group, &position, &key, &value):
        if n >= len(values) or <PyObject *>values[n] != value or <PyObject *>keys[n] != key:
            return False
        n += 1
    return n == len(values)


cpdef bint unchanged(groups, list seen):
    """Tell whether the keys and values of these dicts are still the objects that were seen.

    If nothing was seen (None), they are not.
    """
    cdef Py_ssize_t i
    cdef bint same
    if seen is None or type(groups) is not list or len(groups) != len(seen):
        return False
    for i, group in enumerate(groups):
        if type(group) is not dict:
            return False
        with cython.critical_section(group):
            same = has_items(<dict>group, <tuple>seen[i])
        if not same:
            return False
    return True


def set_items(list dicts, list items):
    """Set items of dicts, from a dict for each. Cannot fail where the keys are there."""
    cdef Py_ssize_t i, position
    cdef PyObject *key
    cdef PyObject *value
    for i in range(len(dicts)):
        position = 0
        while PyDict_Next(items[i], &position, &key, &value):
            PyDict_SetItem(dicts[i], <object>key, <object>value)
