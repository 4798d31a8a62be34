# What a plan keeps from step to step, besides arrays, and who may write it.

@cython.internal
cdef class Kept(Binder):
    """A plan's counts and marks; and whether somebody writes, or has left half of it written."""

    cdef Rule rule
    cdef tuple logs                  # of rows that miss steps; or None
    cdef int64_t writing             # 0, or 1 + `forks` when a step or a restoration began
    cdef public int64_t completed_steps
    cdef readonly int64_t accumulated_steps

    @property
    def torn(self):
        """Whether this is a forked child's copy of a plan that was being written at that moment."""
        return self.writing not in (0, 1 + forks)

    @property
    def busy(self):
        """Whether a step is under way: seen from within it, by code of a gradient's type."""
        return self.writing == 1 + forks

    def inherit_torn(self, Kept other not None):
        """Be torn if another plan over the same arrays is."""
        if other.torn:
            self.writing = other.writing

    @cython.final
    cdef int _begin_writing(self) except -1:
        """Refuse to write what somebody else is writing, or has left torn."""
        cdef int64_t before
        with cython.critical_section(self):
            before = self.writing
            if before == 0:
                self.writing = 1 + forks
        if before == 1 + forks:
            raise RuntimeError("step() was called from within a step of the same plan")
        if before != 0:
            raise RuntimeError(TORN)
        return 0

    @cython.final
    cdef inline int _check_alone(self, int64_t writing) except -1:
        """Raise if code that this step ran has forked, and used the plan in the child."""
        if self.writing != writing:
            raise RuntimeError("a step or load of the same plan came in between, after a fork")
        return 0

    def restore(
        self, list to, list values, int64_t completed_steps, list done,
        int64_t accumulated_steps=0, summed=None, fresh=None,
    ):
        """Copy arrays and set the counts of steps: all of it, or nothing and raise.

        Mends a torn plan.

        Parameters
        ----------
        to : list of numpy.ndarray
            Arrays that the plan owns, and its counters.
        values : list of numpy.ndarray
            For each its values: of its dtype, and of its shape or 0-d.
        completed_steps : int
            The number of completed steps.
        done : list of bool
            Its first entry becomes True: a signal may raise right after this method returns.
        accumulated_steps, summed, fresh : optional
            As for the constructor.
        """
        cdef Py_ssize_t k, n = len(to)
        cdef list ready = list(values), flags = as_flags(summed, self.n)
        cdef list sets = as_fresh(fresh, self.rule, self.n)
        for k in range(n):
            value, array = values[k], to[k]
            if value.dtype != array.dtype or value.shape not in ((), array.shape):
                raise ValueError(f"array {k}: {value.dtype} {value.shape} does not fit")
            if value.shape and value.strides != array.strides:
                ready[k] = np.empty_like(array, subok=False)
                PyArray_CopyInto(ready[k], value)
        self.writing = 1 + forks
        for k in range(n):  # from here on nothing can fail
            put(<cnp.ndarray>to[k], <cnp.ndarray>ready[k])
        for log in self.logs or ():
            log.clear()
        self.completed_steps = completed_steps
        self._set_kept(accumulated_steps, flags, sets)
        done[0] = True
        self.writing = 0

    @cython.final
    cdef void _set_kept(self, int64_t accumulated_steps, list flags, list sets) noexcept:
        cdef Py_ssize_t i
        self.accumulated_steps = accumulated_steps
        for i in range(self.n):
            self.tensors[i].has_sum = flags[i] is True
            self.tensors[i].fresh = sets[i]

    def fresh(self):
        """Return for each parameter the slots that no step has written yet, though it has begun."""
        cdef Py_ssize_t i
        return [
            tuple([
                name for j, name in enumerate(self.rule.slots) if self.tensors[i].fresh & FO_SLOT(j)
            ])
            for i in range(self.n)
        ]

    def summed(self):
        """Return for each parameter whether its sum holds the gradient of a micro-batch."""
        cdef Py_ssize_t i
        cdef list flags = [False] * self.n
        for i in range(self.n):
            flags[i] = self.tensors[i].has_sum != 0
        return flags
