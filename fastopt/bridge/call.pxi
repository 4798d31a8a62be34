# Functional calls: one step over arrays of that call alone, for `fastopt.functional`.

cdef extern from "Python.h":
    ctypedef struct PyMethodDef:
        const char *ml_name
        void *ml_meth
        int ml_flags
        const char *ml_doc
    int METH_FASTCALL
    int METH_KEYWORDS
    object PyCFunction_New(PyMethodDef *method, object self)
    Py_ssize_t PyDict_GET_SIZE(PyObject *dict)
    long long PyLong_AsLongLongAndOverflow(object number, int *overflow) except? -1


cdef enum:
    CACHE_SLOTS = 8
    # Arguments after the slots.
    STEP = 0
    ZERO_GRAD
    NUM_THREADS
    WHERE_OUT
    SEMANTICS
    STORAGE
    OPTIONS


@cython.final
cdef class FunctionalStep:
    """A rule as a function of arrays that the caller keeps, for `fastopt.functional`.

    Parameters
    ----------
    rule : Rule
        The update rule.
    checks : dict
        For each hyperparameter, a function of (name, value) that returns a float or raises, and
        bounds: a float with ``low <= value < below`` needs no check.
    arguments : tuple of str
        What the caller calls the parameters, the gradients, and each slot of ``rule.slots``.
    options : tuple
        Functions of one value that return the number of a step, or that of each parameter's; a
        switch; a number of threads; and, from a dict of what was given of them, a master or list of
        masters, whether to round at random, the seed, a parameter's number or that of each, and
        what the rows are that gradients are of, or a list of that; or raise.
    unnumbered : int
        The number of a step for which the caller gives None; 0 if there has to be one.
    """

    cdef Rule rule
    cdef tuple checks, arguments, options
    cdef int64_t unnumbered
    cdef double lows[FO_MAX_HYPERS]
    cdef double belows[FO_MAX_HYPERS]
    cdef list workspaces      # of past calls; the place of one goes by its number of parameters
    cdef tuple called_with    # the names of the last call, in its order
    cdef int places[FO_MAX_HYPERS]      # where each hyperparameter is in them

    def __cinit__(
        self, Rule rule not None, dict checks not None, tuple arguments not None,
        tuple options not None, int64_t unnumbered,
    ):
        cdef int j
        self.rule, self.arguments, self.options = rule, arguments, options
        self.unnumbered = unnumbered
        self.workspaces = [None] * CACHE_SLOTS
        self.checks = tuple([checks[name][0] for name in rule.hypers])
        for j in range(len(rule.hypers)):
            self.lows[j], self.belows[j] = checks[rule.hypers[j]][1:]

    def function(self):
        """Return the step as a function.

        It checks everything, then updates everything. It takes the parameters, the gradients and
        each slot, all arrays or all lists of as many, None for a slot that is not used; then

        step : int, list of int, or None
            The number of this step, or of each parameter's; the first is 1.
        zero_grad : bool
            Whether to zero the gradients afterwards.
        num_threads : int or None
            Upper bound on threads; None for the module's.
        out : tuple or None
            Where to write the parameters and the used slots, each an array or a list; None: into
            those that are given.
        semantics : int
            As the C core numbers them.
        storage : dict
            What was given of the options that say how arrays are stored.

        and all hyperparameters, by name. (Python makes a dict of the names, which takes time, if
        twice as many and the other arguments are more than thirty together.)
        """
        return PyCFunction_New(&functional_method, self)

    cdef int find_hypers(self, tuple given) except -1:
        """Find out where a caller has each hyperparameter."""
        cdef int j
        if sorted(given) != sorted(self.rule.hypers):
            raise TypeError(f"expected the hyperparameters {self.rule.hypers}, got {given}")
        for j in range(len(self.rule.hypers)):
            self.places[j] = given.index(self.rule.hypers[j])
        self.called_with = given
        return 0

    cdef int call(self, PyObject **args, Py_ssize_t n_args, PyObject *names) except -1:
        cdef double hypers[FO_MAX_HYPERS]
        cdef PyObject *named[FO_MAX_HYPERS]
        cdef PyObject **options = args + len(self.arguments)
        cdef fo_step_args step_args
        cdef fo_step_result result
        cdef Workspace workspace = None
        cdef bint many, many_steps, zero_grad, wide = False, stochastic = False
        cdef int64_t number = 0
        cdef uint64_t seed = 0
        cdef int num_threads = 0, k
        cdef Py_ssize_t n, i
        cdef unsigned used = 0
        if n_args != len(self.arguments) + OPTIONS:
            raise TypeError(f"expected {len(self.arguments) + OPTIONS} arguments, got {n_args}")
        with cython.critical_section(self):
            if names != <PyObject *>self.called_with:
                self.find_hypers(<tuple>names if names != NULL else ())
            for k in range(len(self.checks)):
                named[k] = args[n_args + self.places[k]]

        step, out = <object>options[STEP], <object>options[WHERE_OUT]
        master = index = indices = None
        if PyDict_GET_SIZE(options[STORAGE]) != 0:
            master, stochastic, seed, index, indices = self.options[3](<object>options[STORAGE])
            wide = True
        if step is None and self.unnumbered != 0:
            number = self.unnumbered
            if stochastic:
                raise TypeError(
                    "step is required where stochastic_rounding is True, since the random bits "
                    "depend on it: this step's number, from 1 (step=t)"
                )
        elif not is_plain_number(step, &number):
            step = self.options[0](step)
            if type(step) is not list:
                number = step
        zero_grad = <object>options[ZERO_GRAD] is True
        if not zero_grad and <object>options[ZERO_GRAD] is not False:
            zero_grad = self.options[1](<object>options[ZERO_GRAD])
        if options[NUM_THREADS] != <PyObject *>None:
            num_threads = self.options[2](<object>options[NUM_THREADS])
        memset(hypers, 0, sizeof(hypers))
        self.read_hypers(named, hypers)

        params, grads = <object>args[0], <object>args[1]
        many = isinstance(params, (list, tuple))
        n = len(params) if many else 1
        if indices is not None:
            grads = as_rows(indices, grads, self.arguments[1], many, n)
        many_steps = type(step) is list
        if many_steps:
            self.check_list(step, "step", many, n)
        if type(index) is list:
            self.check_list(index, "index", many, n)
        for k in range(len(self.rule.slots)):
            if fo_rule_uses_slot(self.rule.rule, hypers, k):
                used |= FO_SLOT(k)
        with cython.critical_section(self):
            workspace = self.workspaces[n % CACHE_SLOTS]
            self.workspaces[n % CACHE_SLOTS] = None
        if (
            workspace is None or workspace.n != n or workspace.used != used
            or (wide and not workspace.wide)
        ):
            workspace = Workspace.__new__(Workspace, self.rule, self.arguments, n, used, wide)
        if not self.take(workspace, args, grads, out, master, many, hypers):
            workspace = Workspace.__new__(Workspace, self.rule, self.arguments, n, used, True)
            self.take(workspace, args, grads, out, master, many, hypers)

        workspace.from_jax |= workspace.lenders is not None and any([
            is_from_jax(item) for place, _, item in workspace.lenders if place == workspace.grads
        ])
        workspace.bind(zero_grad)
        if workspace.wide:
            workspace.round_at_random(stochastic, seed, index or 0)
        if workspace.from_jax:
            wait_for_jax(workspace.as_list(workspace.out if workspace.has_out else 0))
        if not keeps_gil(workspace.plan):  # hold all twice, as a plan's step does
            _held = [workspace.as_list(k) for k in range(workspace.n_lists)]
        if out is not None:
            workspace.copy()
        memcpy(fo_plan_hypers(workspace.plan, 0), hypers, sizeof(hypers))
        for i in range(n):
            if many_steps:
                number = (<list>step)[i]
            workspace.counts[i] = number - 1
            workspace.tensors[i].fresh = 0
        after = None
        if workspace.lenders is not None:
            after = after_writing(workspace, zero_grad)
        memset(&step_args, 0, sizeof(step_args))
        step_args.semantics = <fo_semantics><int><object>options[SEMANTICS]
        step_args.loss_scale = 1
        step_args.accumulate = 1
        step_args.zero_grad = zero_grad
        workspace.run(&step_args, num_threads, &result)
        if after is not None:
            after()
        workspace.release()
        with cython.critical_section(self):
            self.workspaces[n % CACHE_SLOTS] = workspace
        return 0

    cdef bint take(
        self, Workspace workspace, PyObject **args, grads, out, master, bint many, double *hypers
    ) except -1:
        """Take all arrays of a call; return False if the workspace has to be a wide one."""
        cdef int k, n_out = workspace.masters + (master is not None)
        cdef bint fits = True
        workspace.many, workspace.has_out, workspace.lenders = many, out is not None, None
        workspace.from_jax = False
        if workspace.wide:
            for k in range(workspace.masters, workspace.n_written):
                workspace.take_none(k)
                if workspace.has_out:
                    workspace.take_none(workspace.out + k)
        workspace.take(0, <object>args[0])
        workspace.take(workspace.grads, grads)
        for k in range(1, workspace.masters):
            if args[workspace.argument[k]] == <PyObject *>None:
                self.refuse_lack(workspace.argument[k] - 2, hypers)
            fits &= workspace.take(k, <object>args[workspace.argument[k]])
        if master is not None:
            workspace.take(workspace.masters, master)
        if out is not None:
            if type(out) is not tuple and type(out) is not list or len(out) != n_out:
                names = [workspace.list_name(k) for k in range(n_out)]
                raise ValueError(
                    f"out must be a tuple of {len(names)}: where to write {', '.join(names)}"
                )
            out = tuple(out)
            for k in range(n_out):
                fits &= workspace.take(workspace.out + k, out[k])
        return fits

    cdef int check_list(self, list numbers, str name, bint many, Py_ssize_t n) except -1:
        """Raise unless there is one number for each parameter."""
        if not many:
            raise ValueError(
                f"{name}: one number for each of {self.arguments[0]}, which is no list; give one"
            )
        if len(numbers) != n:
            raise ValueError(
                f"{name}: expected {n}, one for each of {self.arguments[0]}; got {len(numbers)}"
            )
        return 0

    cdef int read_hypers(self, PyObject **given, double *values) except -1:
        """Check the hyperparameters; those at once that are floats within their bounds."""
        cdef int j
        for j in range(len(self.checks)):
            value = <object>given[j]
            if self.belows[j] == 0 and (value is False or value is True):  # a switch
                values[j] = value is True
                continue
            if PyFloat_Check(value):
                values[j] = PyFloat_AS_DOUBLE(value)
                if self.lows[j] <= values[j] < self.belows[j]:
                    continue
            values[j] = self.checks[j](self.rule.hypers[j], value)
        return 0

    cdef int refuse_lack(self, int j, double *hypers) except -1:
        """Raise for a slot that was not given, naming the hyperparameter that uses it."""
        cdef double value
        cdef int k
        because = ""
        for k in range(len(self.rule.hypers)):
            value, hypers[k] = hypers[k], 0
            if not fo_rule_uses_slot(self.rule.rule, hypers, j):
                because = f", since {self.rule.hypers[k]} is {value:g}"
            hypers[k] = value
        first = "numpy.zeros_like of each parameter"
        if fo_rule_slot_number(self.rule.rule, j):
            first = "numpy.ones(()) for each parameter"
        raise TypeError(
            f"{self.arguments[2 + j]} is required{because}; begin with {first}, and keep them"
        )


cdef after_writing(Workspace workspace, bint zero_grad):
    """Return what is to be called after the step, as `version_counter` does."""
    cdef PyObject **grads = workspace.list_of(workspace.grads)
    cdef list written = []
    for place, i, item in workspace.lenders:
        if place == workspace.grads:
            is_written = zero_grad
        elif workspace.has_out:
            is_written = place >= workspace.out
        else:
            is_written = grads[<Py_ssize_t>i] != <PyObject *>None
        if is_written:
            written.append(item)
    return version_counter(written)


cdef object functional_call(
    FunctionalStep self, PyObject **args, Py_ssize_t n_args, PyObject *names
):
    self.call(args, n_args, names)


# A function of C, since Python calls no other with names but without making a dict of them.
cdef PyMethodDef functional_method = PyMethodDef(
    "functional_step", <void *>functional_call, METH_FASTCALL | METH_KEYWORDS, NULL
)


cdef inline bint is_plain_number(step, int64_t *number) except -1:
    """Read the number of a step, if it is an int in its range."""
    cdef int overflow = 0
    if type(step) is not int:
        return False
    number[0] = PyLong_AsLongLongAndOverflow(step, &overflow)
    return overflow == 0 and 0 < number[0] < <int64_t>1 << 62
