# Calls: one step over arrays of that call alone, for `fastopt.functional`.

cdef enum:
    SPARES = 8


@cython.final
cdef class Scratch:
    """What a call of an Update on so many parameters needs, kept for the next such call."""

    cdef fo_plan *plan
    cdef Py_ssize_t n
    cdef int64_t *counts      # of steps
    cdef bint from_jax        # whether a gradient of this call is
    cdef Py_ssize_t **grad_layout
    cdef Extent *extents      # of each parameter and its slots in turn, then of the gradients
    cdef Extent *known_apart  # the same, of the last call
    cdef Py_ssize_t n_known
    cdef bint known_owning    # then no gradient was its own parameter
    cdef bint known_zeroed    # then no two gradients shared memory
    cdef Extent *sorted       # what of `extents` is not empty and written, by address
    cdef Py_ssize_t n_sorted

    def __cinit__(self, Rule rule not None, Py_ssize_t n):
        cdef Py_ssize_t room = (FO_MAX_SLOTS + 2) * n + 1
        self.n = n
        self.plan = fo_plan_create(rule.rule, 1, n)
        self.counts = <int64_t *>PyMem_Calloc(n + 1, sizeof(int64_t))
        self.grad_layout = <Py_ssize_t **>PyMem_Calloc(n + 1, sizeof(Py_ssize_t *))
        self.extents = <Extent *>PyMem_Calloc(room, sizeof(Extent))
        self.known_apart = <Extent *>PyMem_Calloc(room, sizeof(Extent))
        self.sorted = <Extent *>PyMem_Calloc(room, sizeof(Extent))
        if (
            self.plan == NULL or self.counts == NULL or self.grad_layout == NULL
            or self.extents == NULL or self.known_apart == NULL or self.sorted == NULL
        ):
            raise MemoryError

    def __dealloc__(self):
        cdef Py_ssize_t i
        fo_plan_destroy(self.plan)
        if self.grad_layout != NULL:
            for i in range(self.n):
                PyMem_Free(self.grad_layout[i])
        PyMem_Free(self.counts)
        PyMem_Free(self.grad_layout)
        PyMem_Free(self.extents)
        PyMem_Free(self.known_apart)
        PyMem_Free(self.sorted)

    cdef int sort(self, Py_ssize_t begin, Py_ssize_t end) noexcept:
        """Sort the extents from begin to end; their index becomes their number."""
        cdef Py_ssize_t k
        self.n_sorted = 0
        for k in range(begin, end):
            if self.extents[k].low != self.extents[k].high:
                self.sorted[self.n_sorted] = self.extents[k]
                self.sorted[self.n_sorted].index = k
                self.n_sorted += 1
        qsort(self.sorted, self.n_sorted, sizeof(Extent), by_low)
        return 0

    cdef Py_ssize_t first_above(self, char *low) noexcept:
        """Return the first of the sorted extents that ends above an address."""
        cdef Py_ssize_t left = 0, right = self.n_sorted, middle
        while left < right:
            middle = (left + right) // 2
            if self.sorted[middle].high > low:
                right = middle
            else:
                left = middle + 1
        return left


@cython.final
cdef class Update:
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
    """

    cdef Rule rule
    cdef tuple checks, arguments
    cdef double lows[FO_MAX_HYPERS]
    cdef double belows[FO_MAX_HYPERS]
    cdef list spare  # of past calls; the place of one goes by its number of parameters

    def __cinit__(self, Rule rule not None, dict checks not None, tuple arguments not None):
        cdef int j
        self.rule, self.arguments, self.spare = rule, arguments, [None] * SPARES
        self.checks = tuple([checks[name][0] for name in rule.hypers])
        for j in range(len(rule.hypers)):
            self.lows[j], self.belows[j] = checks[rule.hypers[j]][1:]

    def __call__(
        self, tuple row not None, int semantics, step, params, grads, tuple slots not None,
        bint zero_grad, int num_threads, out,
    ):
        """Check everything, then update everything.

        Parameters
        ----------
        row : tuple
            Hyperparameters, in the order of ``rule.hypers``.
        semantics : int
            As the C core numbers them.
        step : int or list of int
            The number of this step, or of each parameter's; the first is 1.
        params, grads : numpy.ndarray or list
            Arrays, or lists of as many.
        slots : tuple
            For each slot, the array or the list; None for one that is not used.
        zero_grad : bool
            Whether to zero the gradients afterwards.
        num_threads : int
            Upper bound on threads; 0 for the module's.
        out : tuple or None
            Where to write the parameters and the used slots, each an array or a list; None: into
            those that are given.
        """
        cdef double hypers[FO_MAX_HYPERS]
        cdef fo_step_args args
        cdef fo_step_result result
        cdef Scratch scratch = None
        cdef list used = [], names = [self.arguments[0]]
        cdef list given, written, bound, sources
        cdef Py_ssize_t n, k
        cdef int j, place
        cdef bint many = isinstance(params, (list, tuple))
        cdef bint lent = False  # some memory by what is no array
        memset(hypers, 0, sizeof(hypers))
        self.read(row, hypers)
        n = len(params) if many else 1
        if type(step) is list:
            if not many:
                raise ValueError(
                    f"step: one number for each of {self.arguments[0]}, which is no list; give one"
                )
            if len(step) != n:
                raise ValueError(
                    f"step: expected {n}, one for each of {self.arguments[0]}; got {len(step)}"
                )
        given = [self.listed(params, self.arguments[0], n, many, &lent)]
        bound = self.listed(grads, self.arguments[1], n, many, &lent)
        for j in range(len(slots)):
            if fo_rule_uses_slot(self.rule.rule, hypers, j):
                if slots[j] is None:
                    self.refuse_lack(j, hypers)
                used.append(j)
                names.append(self.arguments[2 + j])
                given.append(self.listed(slots[j], self.arguments[2 + j], n, many, &lent))
        written = given
        if out is not None:
            if type(out) is not tuple and type(out) is not list or len(out) != len(given):
                raise ValueError(
                    f"out must be a tuple of {len(given)}: where to write {', '.join(names)}"
                )
            sources, names, written = names, [], []
            for k in range(len(given)):
                names.append(f"out[{k}]")
                written.append(self.listed(out[k], f"out[{k}]", n, many, &lent))
        place = n % SPARES
        with cython.critical_section(self):
            scratch, self.spare[place] = self.spare[place], None
        if scratch is None or scratch.n != n:
            scratch = Scratch.__new__(Scratch, self.rule, n)
        scratch.from_jax = lent and any(map(is_from_jax, without_arrays(grads, many)))
        self.bind(scratch, written, names, used, bound, zero_grad, out is not None, many)
        if fo_plan_prepare(scratch.plan) != FO_OK:
            raise MemoryError
        if scratch.from_jax:
            wait_for_jax(written[0])
        if fo_plan_size(scratch.plan) >= KEEP_GIL_BELOW:  # hold all twice, as a plan's step does
            held = [tuple(bound)]
            for arrays in written:
                held.append(tuple(arrays))
        if out is not None:
            self.copy(scratch, given, written, names, sources, many)
        memcpy(fo_plan_hypers(scratch.plan, 0), hypers, sizeof(hypers))
        for k in range(n):
            scratch.counts[k] = (step[k] if type(step) is list else step) - 1
        after = None
        if lent:
            lenders = without_arrays(grads, many) if zero_grad else []
            for arrays in (params, *[slots[j] for j in used]) if out is None else out:
                lenders += without_arrays(arrays, many, bound if out is None else None)
            after = version_counter(lenders)
        memset(&args, 0, sizeof(args))
        args.semantics = <fo_semantics>semantics
        args.loss_scale = 1
        args.accumulate = 1
        args.zero_grad = zero_grad
        args.max_threads = num_threads or fo_get_num_threads()
        if threads_exact:
            args.exact = True
            if threads_exact > 0:
                args.max_threads = threads_exact
        if fo_plan_size(scratch.plan) < KEEP_GIL_BELOW:
            fo_plan_step(scratch.plan, &args, &result)
        else:
            with nogil:
                fo_plan_step(scratch.plan, &args, &result)
        if after is not None:
            after()
        with cython.critical_section(self):
            self.spare[place] = scratch

    cdef int read(self, tuple row, double *values) except -1:
        """Check the hyperparameters; those at once that are floats within their bounds."""
        cdef int j
        for j in range(len(self.checks)):
            value = row[j]
            if self.belows[j] == 0 and (value is False or value is True):  # a switch
                values[j] = value is True
                continue
            if PyFloat_Check(value):
                values[j] = PyFloat_AS_DOUBLE(value)
                if self.lows[j] <= values[j] < self.belows[j]:
                    continue
            values[j] = self.checks[j](self.rule.hypers[j], value)
        return 0

    cdef list listed(self, given, str name, Py_ssize_t n, bint many, bint *lent):
        """Return an argument as a list of its own, of arrays over what lends its memory.

        Notes in `lent` if anything does. Called before anything is read: it may run code of others.
        """
        cdef list items
        cdef Py_ssize_t i
        if not many:
            items = [given]
        elif not isinstance(given, (list, tuple)):
            raise TypeError(
                f"{name} must be a list or tuple, as {self.arguments[0]} is; got "
                f"{type(given).__name__}"
            )
        elif len(given) != n:
            raise ValueError(f"{name}: expected {n} arrays, got {len(given)}")
        else:
            items = list(given)
        for i in range(n):
            item = items[i]
            if item is not None and not isinstance(item, cnp.ndarray):
                items[i] = array_over(item, label(name, i, many))
                lent[0] = True
                if not many and items[i] is item:
                    self.refuse_collection(given, name)
        return items

    cdef int refuse_collection(self, given, str name) except -1:
        """Raise for several arrays where there is to be one, or a list of them."""
        if not is_collection(given):
            return 0
        kind = type(given).__name__
        if name != self.arguments[0]:
            raise TypeError(f"{name} must be an array, as {self.arguments[0]} is; got {kind}")
        values = ".values()" if isinstance(given, Mapping) else ""
        raise TypeError(
            f"{name} must be an array, or a list or tuple of arrays, such as list({name}{values}); "
            f"got {kind}"
        )

    cdef int bind(
        self, Scratch scratch, list written, list names, list used, list grads, bint zero_grad,
        bint copies, bint many,
    ) except -1:
        """Check all arrays but those that are copied; tell the C plan where they are."""
        cdef Py_ssize_t i, k, count = 0, n_lists = len(written)
        cdef fo_tensor *tensor
        cdef cnp.ndarray param = None, array
        cdef Py_ssize_t nbytes = 0
        cdef int slot_of[1 + FO_MAX_SLOTS]
        cdef bint owns = zero_grad or copies  # no gradient may be its own parameter
        cdef bint gaps = False  # in gradients: their extents do not say what they share
        for k in range(1, n_lists):
            slot_of[k] = used[k - 1]
        for i in range(scratch.n):
            tensor = fo_plan_tensor(scratch.plan, i)
            tensor.step = &scratch.counts[i]
            tensor.fresh = 0
            for k in range(FO_MAX_SLOTS):
                tensor.slot[k] = NULL
            for k in range(n_lists):
                array = updatable((<list>written[k])[i], names[k], i, many)
                if k == 0:
                    param = array
                    tensor.param = cnp.PyArray_DATA(array)
                    tensor.size = cnp.PyArray_SIZE(array)
                    tensor.dtype = fo_one_dtype(
                        FO_F64 if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64 else FO_F32
                    )
                    nbytes = tensor.size * cnp.PyArray_ITEMSIZE(array)
                else:
                    if not laid_out_alike(array, param):
                        self.refuse_slot(
                            array, param, label(names[k], i, many), label(names[0], i, many)
                        )
                    tensor.slot[slot_of[k]] = cnp.PyArray_DATA(array)
                scratch.extents[count].low = cnp.PyArray_BYTES(array)
                scratch.extents[count].high = cnp.PyArray_BYTES(array) + nbytes
                scratch.extents[count].index = 0
                count += 1
            gaps |= not self.bind_grad(scratch, param, grads, i, n_lists, zero_grad, many)
        count += scratch.n
        if (
            gaps
            or scratch.n_known != count
            or memcmp(scratch.extents, scratch.known_apart, count * sizeof(Extent))
            or zero_grad > scratch.known_zeroed
            or owns > scratch.known_owning
        ):
            scratch.n_known = 0
            self.check_apart(scratch, written, names, grads, zero_grad, owns, many)
            memcpy(scratch.known_apart, scratch.extents, count * sizeof(Extent))
            scratch.n_known = count
            scratch.known_zeroed, scratch.known_owning = zero_grad, owns
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
        raise TypeError(
            f"{self.arguments[2 + j]} is required{because}; begin with numpy.zeros_like of each "
            "parameter, and keep them"
        )

    cdef int refuse_slot(self, cnp.ndarray array, cnp.ndarray param, str name, str whose) except -1:
        if cnp.PyArray_TYPE(array) != cnp.PyArray_TYPE(param):
            raise TypeError(f"{name}: dtype {array.dtype} is not that of {whose}: {param.dtype}")
        if not same_shape(array, param):
            raise ValueError(
                f"{name}: shape {(<object>array).shape} is not that of {whose}: "
                f"{(<object>param).shape}"
            )
        raise ValueError(
            f"{name}: its memory order (strides {(<object>array).strides}) is not that of {whose} "
            f"(strides {(<object>param).strides}); numpy.zeros_like({whose}) has the same"
        )

    cdef bint bind_grad(
        self, Scratch scratch, cnp.ndarray param, list grads, Py_ssize_t i, Py_ssize_t n_lists,
        bint zero_grad, bint many,
    ) except -1:
        """Check a gradient, and tell the C plan where it is; tell whether it is dense, or None."""
        cdef fo_tensor *tensor = fo_plan_tensor(scratch.plan, i)
        cdef Extent *extent = &scratch.extents[n_lists * scratch.n + i]
        cdef cnp.ndarray grad
        cdef bint alike
        item = grads[i]
        tensor.grad = extent.low = extent.high = NULL
        tensor.grad_ndim = extent.index = 0
        if item is None:
            return True
        if not isinstance(item, cnp.ndarray):
            name = label(self.arguments[1], i, many)
            item = grads[i] = as_gradient(item, param, name, zero_grad)  # and kept there
        grad = <cnp.ndarray>item
        if not PyArray_CheckExact(item):
            refuse_masked(grad, label(self.arguments[1], i, many))
        if lender_of(<Borrowed *><PyObject *>grad) != NULL:
            refuse_moved(grad, label(self.arguments[1], i, many))
            scratch.from_jax |= is_from_jax(
                owner_of(<object>lender_of(<Borrowed *><PyObject *>grad))
            )
        alike = laid_out_alike(grad, param)
        if alike:
            tensor.grad = extent.low = cnp.PyArray_BYTES(grad)
            extent.high = extent.low + tensor.size * cnp.PyArray_ITEMSIZE(grad)
        else:
            refuse_unlike(grad, param, label(self.arguments[1], i, many))
            alike = describe_strided(
                param, grad, tensor, &scratch.grad_layout[i], &extent.low, &extent.high
            )
        extent.index = alike
        if zero_grad and not (alike and cnp.PyArray_ISWRITEABLE(grad)):
            refuse_to_zero(grad, alike, label(self.arguments[1], i, many))
        return alike

    cdef int check_apart(
        self, Scratch scratch, list written, list names, list grads, bint zero_grad, bint owns,
        bint many,
    ) except -1:
        """Raise if arrays share memory; a gradient may be its own parameter, if nothing is zeroed.

        In the end the sorted extents are those of what is written.
        """
        cdef Py_ssize_t n_lists = len(written), n_owned = n_lists * scratch.n, k, j, i
        cdef Extent *grad
        if zero_grad:
            scratch.sort(n_owned, n_owned + scratch.n)
            for k in range(scratch.n_sorted):
                j = k + 1
                while j < scratch.n_sorted and scratch.sorted[j].low < scratch.sorted[k].high:
                    first = scratch.sorted[k].index - n_owned
                    second = scratch.sorted[j].index - n_owned
                    if share_memory(grads[first], grads[second]):
                        raise ValueError(
                            f"{label(self.arguments[1], min(first, second), many)} and "
                            f"{label(self.arguments[1], max(first, second), many)} share memory, "
                            "and zero_grad=True asks to zero them"
                        )
                    j += 1
        scratch.sort(0, n_owned)
        for k in range(1, scratch.n_sorted):
            if scratch.sorted[k].low < scratch.sorted[k - 1].high:
                first, second = scratch.sorted[k - 1].index, scratch.sorted[k].index
                first, second = min(first, second), max(first, second)
                raise ValueError(
                    f"{label(names[second % n_lists], second // n_lists, many)} overlaps "
                    f"{label(names[first % n_lists], first // n_lists, many)} in memory; each "
                    "needs memory of its own"
                )
        for i in range(scratch.n):
            grad = &scratch.extents[n_owned + i]
            if grad.low == grad.high:
                continue
            k = scratch.first_above(grad.low)
            while k < scratch.n_sorted and scratch.sorted[k].low < grad.high:
                j = scratch.sorted[k].index
                k += 1
                if (
                    j == i * n_lists and grad.index and grad.low == scratch.extents[j].low
                    and not owns
                ):
                    continue
                if grad.index or share_memory(grads[i], written[j % n_lists][j // n_lists]):
                    raise ValueError(
                        f"{label(self.arguments[1], i, many)} overlaps "
                        f"{label(names[j % n_lists], j // n_lists, many)} in memory; a gradient "
                        "needs memory of its own"
                    )
        return 0

    cdef int copy(
        self, Scratch scratch, list given, list written, list names, list sources, bint many,
    ) except -1:
        """Copy what is given to where it is to be written, after checking all of it."""
        cdef Py_ssize_t n_lists = len(written), i, k, j, at
        cdef cnp.ndarray source, target
        cdef char *low
        cdef char *high
        for k in range(n_lists):
            for i in range(scratch.n):
                source = self.source(given[k], i, sources[k], many)
                target = <cnp.ndarray>(<list>written[k])[i]
                if (
                    cnp.PyArray_TYPE(source) != cnp.PyArray_TYPE(target)
                    or not cnp.PyArray_ISNOTSWAPPED(source)
                ):
                    raise TypeError(
                        f"{label(sources[k], i, many)}: dtype {source.dtype} "
                        f"({source.dtype.str}) is not that of {label(names[k], i, many)}: "
                        f"{target.dtype}"
                    )
                if not same_shape(source, target):
                    raise ValueError(
                        f"{label(sources[k], i, many)}: shape {(<object>source).shape} is not that "
                        f"of {label(names[k], i, many)}: {(<object>target).shape}"
                    )
                if is_same(source, target):
                    continue
                bounds(source, &low, &high)
                at = scratch.first_above(low)
                while at < scratch.n_sorted and scratch.sorted[at].low < high:
                    j = scratch.sorted[at].index
                    at += 1
                    if share_memory(source, written[j % n_lists][j // n_lists]):
                        raise ValueError(
                            f"{label(sources[k], i, many)} overlaps "
                            f"{label(names[j % n_lists], j // n_lists, many)} in memory; what is "
                            "written needs memory of its own"
                        )
                if not laid_out_alike(source, target):
                    (<list>given[k])[i] = ready = np.empty_like(target, subok=False)
                    PyArray_CopyInto(ready, source)
        for k in range(n_lists):  # from here on nothing can fail
            for i in range(scratch.n):
                source = <cnp.ndarray>(<list>given[k])[i]
                target = <cnp.ndarray>(<list>written[k])[i]
                if not is_same(source, target):
                    put(target, source)
        return 0

    cdef cnp.ndarray source(self, list arrays, Py_ssize_t i, str name, bint many):
        """Return what is to be copied as an array, which is then in the list, too."""
        item = arrays[i]
        if not PyArray_CheckExact(item):
            if issubclass(type(item), np.generic):
                item = np.asarray(item)
            if not isinstance(item, cnp.ndarray):
                raise TypeError(
                    f"{label(name, i, many)}: expected a numpy.ndarray, got {type(item).__name__}"
                    f"{hint_for(item)}"
                )
            refuse_masked(item, label(name, i, many))
            arrays[i] = item
        if lender_of(<Borrowed *><PyObject *>item) != NULL:
            refuse_moved(<cnp.ndarray>item, label(name, i, many))
        return <cnp.ndarray>item


cdef list without_arrays(given, bint many, list grads=None):
    """Return what of an argument is no array; with `grads`, only where there is a gradient."""
    return [
        x for i, x in enumerate(given if many else [given])
        if not isinstance(x, cnp.ndarray) and (grads is None or grads[i] is not None)
    ]


cdef str label(str name, Py_ssize_t i, bint many):
    return f"{name}[{i}]" if many else name


cdef inline cnp.ndarray updatable(item, str name, Py_ssize_t i, bint many):
    """Return an item that the core can update as an array; raise for any other."""
    if not (
        PyArray_CheckExact(item) and is_native_float(<cnp.ndarray>item)
        and cnp.PyArray_ISWRITEABLE(<cnp.ndarray>item)
        and cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray>item)
    ):
        check_parameter(item, label(name, i, many))
    if lender_of(<Borrowed *><PyObject *>item) != NULL:
        refuse_moved(<cnp.ndarray>item, label(name, i, many))
    return <cnp.ndarray>item
