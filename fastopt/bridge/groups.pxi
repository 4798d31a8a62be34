# Parameter groups: a step need not read those that are as they were when a plan was told of them.
# No plan knows of this.

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


cdef bint unchanged(groups, list seen):
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


@cython.final
cdef class GroupMemory:
    """What an optimizer's groups were when its plan was told of their hyperparameters.

    It has a short way to step while they are unchanged, which saves more than half of the time of a
    step over few small arrays. Whoever holds the optimizer's lock may use it.
    """

    cdef Plan plan
    cdef object groups
    cdef readonly list seen_groups  # None: they may be different
    cdef bint direct

    def remember_groups(self, Plan plan not None, groups, list seen, bint direct):
        """Note that the plan has been told of the hyperparameters of these groups.

        Parameters
        ----------
        plan : Plan
            The optimizer's.
        groups : list of dict
            The groups.
        seen : list of tuple or None
            The keys and the values of each; None if they may change without being replaced.
        direct : bool
            Whether that and a list of gradients is all that a step needs.
        """
        self.plan, self.groups, self.seen_groups = plan, groups, seen
        self.direct = direct and seen is not None

    def forget_groups(self):
        """Note that the plan has not been told of all that the groups are now."""
        self.direct, self.seen_groups = False, None

    def is_unchanged(self):
        """Tell whether the keys and values of the groups are still the objects that were seen."""
        return unchanged(self.groups, self.seen_groups)

    def step(self, Lock lock not None, grads, loss_scale, zero_grad):
        """Step if the groups are unchanged and the arguments as usual, else return None.

        Holds the lock meanwhile.
        """
        cdef Plan plan
        if not self.direct:
            return None
        if type(grads) is not list or type(loss_scale) is not float or <double>loss_scale != 1.0:
            return None
        if zero_grad is not False and zero_grad is not True:
            return None
        lock.take()
        try:
            # Looked up only now that they cannot change.
            if not self.direct or not unchanged(self.groups, self.seen_groups):
                return None
            plan = self.plan  # which may be replaced meanwhile
            return plan.step(grads, 1.0, zero_grad is True)
        finally:
            lock.give()


def set_items(tuple dicts, tuple items):
    """Set items of dicts, from a dict for each. Cannot fail where the keys are there.

    The caller keeps the values until now: to free one may run code of its type.
    """
    cdef Py_ssize_t i, position
    cdef PyObject *key
    cdef PyObject *value
    for i in range(len(dicts)):
        position = 0
        while PyDict_Next(items[i], &position, &key, &value):
            PyDict_SetItem(dicts[i], <object>key, <object>value)
