# The lock of a step.

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
