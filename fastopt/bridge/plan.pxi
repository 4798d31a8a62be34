# Plans: steps over arrays that stay. A plan remembers how each array lies, and checks at every step
# that it still does.

cdef extern from "Python.h":
    PyObject *tuple_item "PyTuple_GET_ITEM"(PyObject *items, Py_ssize_t i) nogil


@cython.final
cdef class Plan(Kept):
    """A C plan over arrays that belong to the caller, which it keeps alive and checks at each step.

    Parameters
    ----------
    rule : Rule
        The update rule.
    params : list of numpy.ndarray
        Arrays to update.
    slots : list of tuple
        For each parameter, its state arrays in the order of ``rule.slots``; None for one that is
        not kept. Each has its parameter's shape and memory order, or those of ``rule.by_row`` one
        value for each row; those of ``rule.numbers`` are 0-d and float64. Its dtype is the
        parameter's; or for parameters that are not float64, float32, bfloat16, float16, or uint8
        with scales.
    ema : list of numpy.ndarray or None
        Averages of the parameters, laid out alike; of float32, if the parameters are of 16 bits.
    steps : list of numpy.ndarray
        Step counters, one a parameter: 0-d, int64.
    groups : list of int
        For each parameter, the index of its row of hyperparameters.
    rows : list of list of float
        Hyperparameters, in the order of ``rule.hypers``.
    names : list of str
        What to call each parameter in a message.
    semantics, clip, nonfinite : int
        As the C core numbers them.
    clip_limit, ema_decay : float
        Parameters of clipping and averaging.
    num_threads : int
        Upper bound on threads; 0 for the module's.
    completed_steps : int
        Steps taken so far.
    sums : list of numpy.ndarray, optional
        Where the gradients of micro-batches are summed, laid out and typed like the averages.
    beside : list of tuple, optional
        For each parameter the arrays beside it and its slots, or None: the trailing bits (uint16)
        of bfloat16 or the master (float32) of float16; then for each slot its scales, if it is
        uint8: a vector of uint8, one for each ``SCALED`` elements and one for the rest.
    stochastic : bool, optional
        Whether what is stored in fewer bits is rounded up or down at random; not a parameter with
        something beside it.
    seed : int, optional
        Random bits depend on it, on the parameter's number and on its step.
    indices, firsts : list of int, optional
        The parameters' numbers, where not all of an optimizer's are here; and the number of each
        one's first element, where it is a part of one.
    accumulate : int, optional
        Every so many steps update the parameters, with the mean gradient.
    accumulated_steps, summed : int and sequence of bool, optional
        How many micro-batches have been summed, and which sums hold anything.
    fresh : sequence of tuple of str, optional
        For each parameter the slots, of ``rule.begins``, that no step has written yet.
    logs : list of RowLog, optional
        For each parameter what its rows have missed, where a gradient of some rows means one that
        is zero in the others; without it, other rows do not take part in a step.
    lent : Lenders, optional
        What looks after parameters whose memory something else lends: ``of`` has the lenders by the
        parameters' numbers, ``in_place()`` tells whether all of it is where it was, and
        ``replaced`` has the numbers of those whose place in a module another has taken.

    Notes
    -----
    A plan is not locked: its owner sees to it that one thread at a time uses it.
    """

    cdef fo_step_args args
    cdef Py_ssize_t n_groups
    cdef readonly tuple names
    cdef readonly tuple owned        # parameters, then slots, then averages, then sums
    cdef readonly tuple owners       # for each owned array, its parameter
    cdef object lent                 # None, or looks after parameters whose memory is lent
    cdef list watched                # which other owned arrays lie in memory that is lent; or None
    cdef tuple steps                 # kept alive: the C plan counts in them
    cdef void *counter_descr         # NumPy's one for their type
    cdef public int num_threads
    cdef public size_t pool          # address of an fo_pool of num_threads, or 0
    cdef public bint unshared        # whether nobody else can reach the arrays
    cdef bint met_jax                # whether a gradient has been, and JAX may read parameters

    def __cinit__(
        self, Rule rule not None, list params not None, list slots not None, list ema,
        list steps not None, list groups not None, list rows not None, list names not None,
        *, int semantics, int clip, double clip_limit, int nonfinite,
        double ema_decay, int num_threads, int64_t completed_steps,
        list sums=None, int64_t accumulate=1, int64_t accumulated_steps=0, summed=None, fresh=None,
        lent=None, list beside=None, bint stochastic=False, uint64_t seed=0, list indices=None,
        list logs=None, list firsts=None,
    ):
        cdef Py_ssize_t i, k = 0
        cdef fo_tensor *tensor
        cdef fo_coding *coding
        cdef int j
        self.rule, self.spacing = rule, 1
        self.n = len(params)
        self.names = tuple(names)
        self.num_threads = num_threads
        self.completed_steps = completed_steps
        self.steps = tuple(steps)
        memset(&self.args, 0, sizeof(self.args))
        self.args.semantics = <fo_semantics>semantics
        self.args.clip = <fo_clip>clip
        self.args.clip_limit = clip_limit
        self.args.nonfinite = <fo_nonfinite>nonfinite
        self.args.ema_decay = ema_decay
        self.args.accumulate = accumulate
        self.lent = lent
        for name, given in (
            ("slots", slots), ("steps", steps), ("groups", groups), ("names", names), ("ema", ema),
            ("sums", sums), ("beside", beside), ("indices", indices), ("logs", logs),
            ("firsts", firsts),
        ):
            if given is not None and len(given) != self.n:
                raise ValueError(f"{name}: expected {self.n}, one for each parameter")
        if accumulate < 1 or (accumulate > 1 and sums is None):
            raise ValueError(f"accumulate={accumulate}: expected 1, or more and sums")
        for i in range(self.n):
            if not isinstance(steps[i], cnp.ndarray):
                raise TypeError(f"step counter of {names[i]}: expected a numpy.ndarray")
            if len(slots[i]) != len(rule.slots):
                raise ValueError(f"state of {names[i]}: expected {len(rule.slots)} slots")
            if not 0 <= groups[i] < len(rows):
                raise ValueError(f"{names[i]}: there is no group {groups[i]}")

        owned, owners, targets = list(params), list(range(self.n)), []
        for j in range(len(rule.slots)):
            for i in range(self.n):
                if slots[i][j] is not None:
                    owned.append(slots[i][j])
                    owners.append(i)
                    targets.append(j)
        for j, arrays in ((EMA, ema), (SUM, sums)):
            if arrays is not None:
                owned.extend(arrays)
                owners.extend(range(self.n))
                targets.extend([j] * self.n)
        for i, arrays in enumerate(beside or ()):
            for j, array in enumerate(arrays):
                if array is not None:
                    owned.append(array)
                    owners.append(i)
                    targets.append(BESIDE + j)
        self.owned, self.owners, self.n_groups = tuple(owned), tuple(owners), len(rows)
        self.make(rule, self.n, len(owned), self.n_groups, 1)
        self.counter_descr = descr_for(cnp.NPY_INT64)
        for k in range(self.n_owned):
            i = owners[k]
            array = self.owned[k]
            tensor = &self.tensors[i]
            if k < self.n:
                check_parameter(array, self._label(k), narrow=True)
                self.set_size(i, array)
                tensor.group = groups[i]
                self.targets[k] = &tensor.param
            else:
                j = targets[k - self.n]
                self.targets[k] = adopt(
                    tensor, fo_plan_coding(self.plan, i), rule.rule, j, array, self.owned[i],
                    self._label(k),
                )
            remember(&self.layouts[k], array)
        for i in range(self.n):
            tensor, coding = &self.tensors[i], fo_plan_coding(self.plan, i)
            coding.seed, coding.index = seed, i if indices is None else indices[i]
            coding.first = 0 if firsts is None else firsts[i]
            coding.stochastic = in_fewer_bits(tensor) if stochastic else 0
            for j in range(len(rule.slots)):
                if is_8bit(tensor.slot_dtype[j]) and (
                    beside is None or beside[i][1 + j] is None
                ):
                    raise ValueError(f"state of {names[i]}: {rule.slots[j]} has no scales")
        if logs is not None:
            self.logs = tuple(logs)
            for i in range(self.n):
                self.tensors[i].log = &(<RowLog?>logs[i]).log
        if fo_plan_prepare(self.plan) != FO_OK:
            raise MemoryError
        self.watched = [
            k for k in range(self.n_owned)
            if lender_of(<Borrowed *>tuple_item(<PyObject *>self.owned, k)) != NULL
            and (lent is None or k >= self.n or k not in lent.of)
        ] or None
        self._read_owned()
        for k in range(self.n_groups):
            self.set_hypers(k, rows[k])
        flags, sets = as_flags(summed, self.n), as_fresh(fresh, rule, self.n)
        self._set_kept(accumulated_steps, flags, sets)

    # ---- the owned arrays ------------------------------------------------------------------------

    cdef str _label(self, Py_ssize_t k):
        """Name the array of an extent: an owned one, or (beyond those) a counter."""
        name = self.names[self.owners[k] if k < self.n_owned else k - self.n_owned]
        return name if k < self.n else f"state of {name}"

    cdef owned_array(self, Py_ssize_t k):
        return self.owned[k] if k < self.n_owned else self.steps[k - self.n_owned]

    cdef str gradient_name(self, Py_ssize_t i):
        return f"gradient of {self.names[i]}"

    cdef int _read_owned(self) except -1:
        """Read every owned array's address again; raise if anything else about it has changed."""
        cdef Py_ssize_t k
        cdef Layout *layout
        cdef Borrowed *array
        cdef char *data
        if self.unshared and self.owned_apart:
            return 0
        for k in range(self.n_owned):
            layout = &self.layouts[k]
            array = <Borrowed *>tuple_item(<PyObject *>self.owned, k)
            if (
                descr_of(array) != layout.descr
                or not laid_out_as(layout, array)
                or not flags_of(array) & cnp.NPY_ARRAY_WRITEABLE
            ):
                check_unchanged(layout, <cnp.ndarray>self.owned[k], self._label(k))
            data = data_of(array)
            if data != layout.data:
                self.place(k, data)
        for k in range(self.n):
            array = <Borrowed *>tuple_item(<PyObject *>self.steps, k)
            if (
                descr_of(array) != self.counter_descr
                or ndim_of(array) != 0
                or flags_of(array) & cnp.NPY_ARRAY_BEHAVED != cnp.NPY_ARRAY_BEHAVED
                or data_of(array) != <char *>self.tensors[k].step
                or not 0 <= self.tensors[k].step[0] < INT64_MAX
            ):
                self._read_counter(k)
        if self.watched is not None:
            for k in self.watched:
                refuse_moved(self.owned[k], self._label(k))
        if not self.owned_apart:
            self._check_owned_apart()
        return 0

    cdef int _read_counter(self, Py_ssize_t i) except -1:
        """Read a step counter's address again; raise unless the core can count on in it."""
        cdef cnp.ndarray counter = <cnp.ndarray>self.steps[i]
        cdef int64_t *address
        check_counter(counter, f"step counter of {self.names[i]}")
        address = <int64_t *>cnp.PyArray_DATA(counter)
        if address != self.tensors[i].step:
            self.tensors[i].step = address
            self.owned_apart = False
        return 0

    cdef int _check_owned_apart(self) except -1:
        cdef Py_ssize_t first = 0, second = 0
        if self.owned_overlap(True, &first, &second):
            raise ValueError(
                f"{self._label(second)} overlaps {self._label(first)} in memory; every "
                "parameter needs memory of its own"
            )
        return 0

    # ---- gradients -------------------------------------------------------------------------------

    cdef list _as_arrays(self, bint zero_grad):
        """Take arrays over gradients that are none; return these if they are to be zeroed, or None.

        Before anything is read: this may run code of others.
        """
        cdef PyObject **grads = self.items
        cdef int64_t writing = self.writing
        cdef list zeroed = None
        cdef Py_ssize_t i
        self.from_jax = False
        for i in range(self.n):
            if is_array(grads[i]):
                continue
            item = <object>grads[i]
            if item is not None and not isinstance(item, cnp.ndarray):
                if self.take_rows(i, &grads[i]):
                    self._check_alone(writing)
                    if zero_grad:
                        zeroed = zeroed or []
                        zeroed.append(self.indices[i][1].values)
                    continue
                array = as_gradient(item, self.owned[i], self.gradient_name(i), zero_grad)
                self._check_alone(writing)
                self.keep(&grads[i], <PyObject *>array)
                self.from_jax |= is_from_jax(item)
                if zero_grad:
                    zeroed = zeroed or []
                    zeroed.append(item)
        return zeroed

    cdef inline int _bind(self, bint zero_grad) except -1:
        """Check the gradients that are not as at the last step; tell the C plan where they are."""
        cdef Py_ssize_t i
        for i in range(self.n):
            # Values of rows may lie where a whole gradient did at the last step, and as it did.
            if self.is_of_rows(i) or not self.bound_before(i, self.items[i], zero_grad, zero_grad):
                self._bind_anew(i, self.items[i], zero_grad)
        return 0

    cdef int _bind_anew(self, Py_ssize_t i, PyObject *grad, bint zero_grad) except -1:
        cdef bint rows = self.is_of_rows(i)
        cdef Py_ssize_t k
        if rows:
            if self.args.accumulate > 1:
                raise ValueError(
                    f"gradient of {self.names[i]}: some rows, with accumulate="
                    f"{self.args.accumulate}; give one step the indices and values of all "
                    "micro-batches instead, concatenated"
                )
            self.bind_rows(i, &self.items[i], self.owned[i], zero_grad)
        else:
            self.bind_gradient(i, <object>grad, self.owned[i], zero_grad, zero_grad)
        if self.gradients[i].known:
            return 0
        k = self.owned_under(i, self.items[i], zero_grad or rows)
        if k >= 0:
            own = " (with zero_grad=True also its own)" if k == i and zero_grad else ""
            raise ValueError(
                f"gradient of {self.names[i]} overlaps {self._label(k)} in memory{own}; a gradient "
                "needs memory of its own"
            )
        return 0

    cdef int _check_gradients_apart(self) except -1:
        """Raise if two gradients share memory (they are about to be zeroed one after the other)."""
        cdef Py_ssize_t first = 0, second = 0
        if self.gradients_overlap(self.items, &first, &second):
            raise ValueError(
                f"gradients of {self.names[first]} and {self.names[second]} share memory, and "
                "zero_grad=True asks to zero them"
            )
        return 0

    # ---- rows that miss steps --------------------------------------------------------------------

    cdef bint _has_to_catch_up(self, Py_ssize_t i) noexcept:
        """Whether rows are behind of a parameter whose gradient is of all elements."""
        cdef fo_tensor *tensor = &self.tensors[i]
        return (
            tensor.grad != NULL and tensor.row_size == 0 and tensor.log.n != tensor.log.current
        )

    cdef _counter_of_behind(self):
        """Return what tells PyTorch of parameters that catch up, even in a step that skips."""
        if self.lent is None:
            return None
        return version_counter(
            [lender for i, lender in self.lent.of.items() if self._has_to_catch_up(i)]
        )

    cdef void _catch_up(self) noexcept:
        """Have all rows catch up of parameters whose gradient is of all elements."""
        cdef int64_t at = 0
        cdef Py_ssize_t i
        set_threads_of(&self.args, self.num_threads)
        for i in range(self.n):
            if self._has_to_catch_up(i):
                with nogil:
                    fo_plan_refresh(self.plan, i, NULL, 0, &self.args, &at)

    @property
    def behind(self):
        """Whether rows of any parameter may have missed a step."""
        cdef Py_ssize_t i
        for i in range(self.n):
            if self.tensors[i].log != NULL and self.tensors[i].log.n != self.tensors[i].log.current:
                return True
        return False

    def refresh(self, which=None, rows=None):
        """Have rows catch up: of one parameter or (None) all; of these numbers or (None) all."""
        cdef cnp.ndarray numbers
        cdef const int64_t *indices = NULL
        cdef int64_t n_indices = 0, at = 0
        cdef fo_status status = FO_OK
        cdef Py_ssize_t i
        if rows is not None:
            numbers = row_indices(rows, self.owned[which], self.names[which])
            indices = <const int64_t *>cnp.PyArray_DATA(numbers)
            n_indices = cnp.PyArray_SIZE(numbers)
        if not self.behind:
            return
        self._begin_writing()
        try:
            self._read_lent()
            self._read_owned()
            if self.met_jax:
                wait_for_jax(self.owned[:self.n])
            set_threads_of(&self.args, self.num_threads)
            written = [
                i for i in ([which] if which is not None else range(self.n))
                if self.tensors[i].log.n != self.tensors[i].log.current
            ]
            after = None
            if self.lent is not None:
                after = version_counter([self.lent.of[i] for i in written if i in self.lent.of])
            for i in written:
                with nogil:
                    status = fo_plan_refresh(self.plan, i, indices, n_indices, &self.args, &at)
                if status != FO_OK:
                    raise MemoryError
            if after is not None:
                after()
        finally:
            self.writing = 0

    # ---- the step --------------------------------------------------------------------------------

    def check(self):
        """Raise if a step would find a parameter, slot, average or counter that it cannot use."""
        self._read_lent()
        self._read_owned()

    def check_gradients(self, list grads not None, *, bint zero_grad=False):
        """Raise if a step with these gradients would; return them as arrays, or None."""
        cdef Py_ssize_t i
        if len(grads) != self.n:
            raise ValueError(
                f"expected {self.n} gradients, one for each parameter; got {len(grads)}"
            )
        self._begin_writing()
        try:
            self.keep_all(self.items, grads)
            self._as_arrays(zero_grad)
            self._read_lent()
            if self.lent is not None:
                self._refuse_replaced()
            self._read_owned()
            self._bind(zero_grad)
            if zero_grad and not self.gradients_apart:
                self._check_gradients_apart()
            if self.by_rows:
                self.sort_rows()
            return [<object>self.items[i] for i in range(self.n)]
        finally:
            self.release()
            self.writing = 0

    def wait_for_readers(self):
        """Wait for JAX, if gradients that were checked are its: it may read parameters yet."""
        if self.from_jax:
            wait_for_jax(self.owned[:self.n])

    def places(self):
        """Return where the gradients are that were checked last, and how they are stored.

        Returns
        -------
        addresses, storages : numpy.ndarray of int64 and uint8
            The address is 0 where there is none, and where it is not laid out as its parameter.
        """
        cdef cnp.ndarray addresses = np.zeros(self.n, np.int64)
        cdef cnp.ndarray storages = np.zeros(self.n, np.uint8)
        cdef int64_t *address = <int64_t *>cnp.PyArray_DATA(addresses)
        cdef uint8_t *storage = <uint8_t *>cnp.PyArray_DATA(storages)
        cdef Py_ssize_t i
        for i in range(self.n):
            storage[i] = self.tensors[i].grad_dtype
            if self.tensors[i].grad_ndim == 0:
                address[i] = <int64_t><size_t>self.tensors[i].grad
        return addresses, storages

    # ---- where the parameters are parts of larger ones -------------------------------------------

    def scan(self, list grads not None, double loss_scale):
        """Return what a step would find out before it decides: two arrays, of a number a block.

        The blocks are those of the parameters in turn. The arrays have the sum of the squares of
        each one's gradient, and whether all of its values are finite.
        """
        cdef int64_t n = fo_plan_blocks(self.plan)
        cdef cnp.ndarray sums = np.empty(n), finite = np.empty(n, np.bool_)
        cdef double *to = <double *>cnp.PyArray_DATA(sums)
        cdef c_bool *flags = <c_bool *>cnp.PyArray_DATA(finite)
        self._begin_writing()
        try:
            self.keep_all(self.items, grads)
            self._read_owned()
            self._bind(False)
            set_threads_of(&self.args, self.num_threads)
            self.args.loss_scale, self.args.add = loss_scale, False
            with nogil:
                fo_plan_scan(self.plan, &self.args, to, flags)
        finally:
            self.release()
            self.writing = 0
        return sums, finite

    def step_part(self, list grads not None, double loss_scale, cnp.ndarray squares):
        """Step, where each parameter is a part of a larger one, and gradients are finite.

        `squares` has for each the sum of the squares of all of its gradient, in float64; None: no
        norm is needed.
        """
        if squares is not None:
            if squares.dtype != np.float64 or cnp.PyArray_SIZE(squares) != self.n:
                raise ValueError(f"squares: expected {self.n} of float64, one for each parameter")
            self.args.squares = <const double *>cnp.PyArray_DATA(squares)
        try:
            return self.step(grads, loss_scale, False)
        finally:
            self.args.squares = NULL

    cdef inline int _read_lent(self) except -1:
        if self.lent is not None and not self.lent.in_place():
            raise MovedError("the memory of a parameter moves while it is looked at")
        return 0

    cdef int _refuse_replaced(self) except -1:
        """Raise if a module has another tensor by now where a gradient is for the old one."""
        for i, where in self.lent.replaced.items():
            if self.items[i] != <PyObject *>None:
                raise ValueError(
                    f"{self.names[i]}: {where} is another tensor by now, which this optimizer "
                    "does not have (as after load_state_dict(assign=True)); make an optimizer "
                    "over the new one, or give None for the gradient of the old"
                )
        return 0

    def set_hypers(self, int32_t group, row):
        """Set a group's hyperparameters, as ``rule.hypers`` has them."""
        cdef double values[FO_MAX_HYPERS]
        cdef fo_tensor *tensor
        cdef Py_ssize_t i
        cdef int j
        if not 0 <= group < self.n_groups:
            raise ValueError(f"there is no group {group}")
        self.rule.read_row(row, values)
        for j in range(len(self.rule.slots)):
            if fo_rule_uses_slot(self.rule.rule, values, j):
                for i in range(self.n):
                    tensor = &self.tensors[i]
                    if tensor.group == group and tensor.slot[j] == NULL:
                        raise ValueError(
                            f"state of {self.names[i]}: {self.rule.slots[j]} is missing"
                        )
        memcpy(fo_plan_hypers(self.plan, group), values, len(self.rule.hypers) * sizeof(double))

    cpdef step(self, grads, double loss_scale, bint zero_grad):
        """Check everything, then update everything.

        Parameters
        ----------
        grads : list or tuple
            A gradient or None for each parameter.
        loss_scale : float
            What the gradients are divided by.
        zero_grad : bool
            Whether to zero the gradients afterwards.

        Returns
        -------
        StepResult
        """
        cdef Py_ssize_t n
        if type(grads) is not list:
            grads = list(grads)
        self._begin_writing()
        try:
            n = self.keep_all(self.items, grads)
            if n != self.n:
                raise ValueError(f"expected {self.n} gradients, one for each parameter; got {n}")
            return self._step(loss_scale, zero_grad)
        finally:
            self.release()
            self.writing = 0

    cdef StepResult _step(self, double loss_scale, bint zero_grad):
        cdef StepResult result = StepResult.__new__(StepResult)
        cdef fo_step_args *args = &self.args
        cdef fo_step_result *out = &result.result
        cdef PyObject **grads = self.items
        cdef Py_ssize_t i
        cdef list zeroed  # gradients that are no arrays
        cdef int64_t writing = self.writing
        zeroed = self._as_arrays(zero_grad)
        self._read_lent()
        self._check_alone(writing)
        if self.lent is not None:
            self._refuse_replaced()
        self._read_owned()
        self._bind(zero_grad)
        if zero_grad and not self.gradients_apart:
            self._check_gradients_apart()
        if self.by_rows:
            self.sort_rows()

        if self.from_jax:
            self.met_jax = True
            wait_for_jax(self.owned[:self.n])
        args.loss_scale = loss_scale
        args.zero_grad = zero_grad
        args.add = self.accumulated_steps + 1 < args.accumulate
        args.ema_starts = self.completed_steps == 0
        args.pool = <const fo_pool *>self.pool
        after_update = after_zeroing = None
        if self.lent is not None and not args.add:
            after_update = version_counter([
                lender for i, lender in self.lent.of.items()
                if self.tensors[i].grad != NULL or self.tensors[i].has_sum
            ])
        if zeroed is not None:
            after_zeroing = version_counter(zeroed)
        self._check_alone(writing)
        after_catching_up = None if self.logs is None else self._counter_of_behind()
        if self.logs is not None or not keeps_gil(self.plan):
            # Held twice: NumPy's resize() lets an array have one other owner.
            _held = [<object>grads[i] for i in range(self.n)]
        if self.logs is not None:
            self._catch_up()
        self.run(args, self.num_threads, out)
        if after_catching_up is not None:
            after_catching_up()
        if after_zeroing is not None and not (out.skipped and args.nonfinite == FO_RAISE):
            after_zeroing()
        if not out.skipped:
            if args.add:
                self.accumulated_steps += 1
            else:
                self.accumulated_steps = 0
                self.completed_steps += 1
            if after_update is not None:
                after_update()
        elif args.nonfinite == FO_RAISE:
            raise FloatingPointError(
                f"gradient of {self.names[out.first_skipped]} holds a NaN or an infinity"
                f"{'' if args.accumulate == 1 else ', or its sum over micro-batches does'}"
                f"{'' if loss_scale == 1 else ' once divided by loss_scale'}; nothing was updated"
            )
        return result
