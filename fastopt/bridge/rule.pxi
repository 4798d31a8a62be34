# Rules: their hyperparameters and slots, as the C core lists them; and what a resumed run says of
# its parameters.

cdef tuple strings(const char *const *names):
    result = []
    while names[0] != NULL:
        result.append(names[0].decode())
        names += 1
    return tuple(result)


cdef class Rule:
    """A rule's hyperparameters and slots, as the C core lists them.

    `ranges` has the least and the greatest value of each hyperparameter; a NaN as the greatest says
    that it is a switch. `begins` are the slots of which a rule has to know whether a step has
    written them yet; `unsigned` those that are never negative; `exact` those that keep float32
    where others are stored in fewer bits; `by_row` those that have one value for each row; and
    `numbers` those that are one double, in a 0-d array.
    """

    cdef const fo_rule *rule
    cdef readonly str name
    cdef readonly tuple hypers
    cdef readonly tuple slots
    cdef readonly tuple begins
    cdef readonly tuple unsigned
    cdef readonly tuple exact
    cdef readonly tuple by_row
    cdef readonly tuple numbers
    cdef readonly dict ranges

    def __cinit__(self, str name not None):
        self.rule = fo_find_rule(name.encode())
        if self.rule == NULL:
            raise ValueError(f"no rule named {name!r}")
        self.name = name
        self.hypers = strings(self.rule.hyper_names)
        self.ranges = {
            hyper: (self.rule.lows[j], self.rule.highs[j]) for j, hyper in enumerate(self.hypers)
        }
        self.slots = strings(self.rule.slot_names)
        self.begins = tuple(
            [slot for j, slot in enumerate(self.slots) if fo_rule_slot_begins(self.rule, j)]
        )
        self.unsigned = tuple(
            [slot for j, slot in enumerate(self.slots) if fo_rule_slot_unsigned(self.rule, j)]
        )
        self.exact = tuple(
            [slot for j, slot in enumerate(self.slots) if fo_rule_slot_exact(self.rule, j)]
        )
        self.by_row = tuple(
            [slot for j, slot in enumerate(self.slots) if fo_rule_slot_by_row(self.rule, j)]
        )
        self.numbers = tuple(
            [slot for j, slot in enumerate(self.slots) if fo_rule_slot_number(self.rule, j)]
        )

    def used_slots(self, row):
        """Names of the slots that a step with these hyperparameters touches."""
        cdef double values[FO_MAX_HYPERS]
        self.read_row(row, values)
        return tuple(
            name for j, name in enumerate(self.slots)
            if fo_rule_uses_slot(self.rule, values, j)
        )

    cdef int read_row(self, row, double *values) except -1:
        """Convert a row of hyperparameters."""
        if len(row) != len(self.hypers):
            raise ValueError(f"expected {len(self.hypers)} hyperparameters, got {len(row)}")
        for j in range(len(self.hypers)):
            values[j] = row[j]
        return 0


def rule_names():
    """Return the names of all rules."""
    return [fo_rules[i].name.decode() for i in range(fo_rule_count)]


cdef list as_flags(summed, Py_ssize_t n):
    """Return which of n sums hold something, as ``True`` and ``False``; None: none does."""
    cdef list flags = [False] * n
    if summed is not None:
        flags = []
        for flag in summed:
            flags.append(bool(flag))
    if len(flags) != n:
        raise ValueError(f"summed: expected {n}, one for each parameter")
    return flags


cdef list as_fresh(fresh, Rule rule, Py_ssize_t n):
    """Return n sets of slots as the C core has them; None: no slot is fresh."""
    cdef list sets = [0] * n
    if fresh is not None:
        sets = [sum([FO_SLOT(rule.slots.index(name)) for name in names]) for names in fresh]
    if len(sets) != n:
        raise ValueError(f"fresh: expected {n}, one for each parameter")
    return sets
