# The binder: tells a C plan where the arrays of a step are, for plans and for functional calls.
# It looks at each array in each step; one that lies where and as it did is bound already.

cdef extern from "Python.h":
    Py_ssize_t length_of "PySequence_Fast_GET_SIZE"(object items)
    PyObject **items_of "PySequence_Fast_ITEMS"(object items)
    void Py_INCREF(PyObject *item)
    void Py_XDECREF(PyObject *item)


cdef struct Gradient:
    char *low
    char *high
    bint known      # laid out as its parameter, and apart from all that a step writes


@cython.internal
cdef class Binder:
    """A C plan, and how the arrays lie that it was told of.

    A step writes the `owned` arrays: each parameter and what goes with it. For messages, a subclass
    has names and arrays; for how it numbers the owned arrays, `spacing`.
    """

    cdef fo_plan *plan
    cdef fo_tensor *tensors          # of the C plan
    cdef Py_ssize_t n, n_owned
    cdef Py_ssize_t spacing          # from one parameter to the next, in the owned arrays
    cdef Layout *layouts             # of the owned arrays
    cdef void ***targets             # where the C plan keeps their addresses
    cdef Table owned_table           # of them and, if kept, of the counters
    cdef bint owned_apart            # the table is sorted, and they are apart
    cdef Gradient *gradients
    cdef Table gradient_table
    cdef bint gradients_apart        # from one another
    cdef bint from_jax               # whether a gradient of this step is
    cdef list indices                # of gradients of some rows, else None; None: there are none
    cdef bint by_rows                # whether the C plan goes over the rows of such, or would
    cdef Py_ssize_t **grad_layout    # shape and strides for the C core, made when first needed
    cdef int n_lists                 # of arrays of one step, n in each
    cdef PyObject **items            # of these lists in turn, each kept alive until the step ends

    cdef int make(
        self, Rule rule, Py_ssize_t n, Py_ssize_t n_owned, int32_t n_groups, int n_lists
    ) except -1:
        self.n, self.n_owned, self.n_lists = n, n_owned, n_lists
        self.plan = fo_plan_create(rule.rule, n_groups, n)
        self.layouts = <Layout *>PyMem_Calloc(n_owned + 1, sizeof(Layout))
        self.targets = <void ***>PyMem_Calloc(n_owned + 1, sizeof(void **))
        self.owned_table.extents = <Extent *>PyMem_Calloc(n_owned + n + 1, sizeof(Extent))
        self.gradients = <Gradient *>PyMem_Calloc(n + 1, sizeof(Gradient))
        self.gradient_table.extents = <Extent *>PyMem_Calloc(n + 1, sizeof(Extent))
        self.grad_layout = <Py_ssize_t **>PyMem_Calloc(n + 1, sizeof(Py_ssize_t *))
        self.items = <PyObject **>PyMem_Calloc(n_lists * n + 1, sizeof(PyObject *))
        if (
            self.plan == NULL or self.layouts == NULL or self.targets == NULL
            or self.owned_table.extents == NULL or self.gradients == NULL
            or self.gradient_table.extents == NULL or self.grad_layout == NULL
            or self.items == NULL
        ):
            raise MemoryError
        self.tensors = fo_plan_tensor(self.plan, 0)
        return 0

    def __dealloc__(self):
        cdef Py_ssize_t k
        if self.items != NULL:
            self.release()  # which still needs the plan, and what follows
        fo_plan_destroy(self.plan)
        if self.layouts != NULL:
            for k in range(self.n_owned):
                PyMem_Free(self.layouts[k].shape)
        if self.grad_layout != NULL:
            for k in range(self.n):
                PyMem_Free(self.grad_layout[k])
        PyMem_Free(self.items)
        PyMem_Free(self.layouts)
        PyMem_Free(self.targets)
        PyMem_Free(self.owned_table.extents)
        PyMem_Free(self.gradients)
        PyMem_Free(self.gradient_table.extents)
        PyMem_Free(self.grad_layout)

    cdef owned_array(self, Py_ssize_t k):
        """Return an owned array or (beyond those) a counter."""
        raise NotImplementedError

    cdef str gradient_name(self, Py_ssize_t i):
        raise NotImplementedError

    # ---- the arrays of one step ------------------------------------------------------------------

    @cython.final
    cdef inline void keep(self, PyObject **item, PyObject *array) noexcept:
        cdef PyObject *before = item[0]
        Py_INCREF(array)
        item[0] = array
        Py_XDECREF(before)

    @cython.final
    cdef inline Py_ssize_t keep_all(self, PyObject **items, given) except -1:
        """Keep the items of a list or tuple, if they are n; return how many they are."""
        cdef Py_ssize_t i, n
        cdef PyObject **from_
        kept = given if type(given) is list or type(given) is tuple else list(given)
        with cython.critical_section(kept):
            n, from_ = length_of(kept), items_of(kept)
            if n == self.n:
                for i in range(n):
                    self.keep(&items[i], from_[i])
        return n

    @cython.final
    cdef inline void release(self) noexcept:
        cdef PyObject **items = self.items
        cdef PyObject *item
        cdef Py_ssize_t i
        cdef int k
        if self.by_rows:
            self.forget_rows()
        for k in range(self.n_lists):
            if self.n > 0 and items[0] != NULL:  # no list is kept in part
                for i in range(self.n):
                    item, items[i] = items[i], NULL
                    Py_XDECREF(item)
            items += self.n

    # ---- what a step writes ----------------------------------------------------------------------

    @cython.final
    cdef inline void place(self, Py_ssize_t k, char *data) noexcept nogil:
        """Tell the C plan where an owned array is."""
        self.layouts[k].data = data
        self.targets[k][0] = data
        self.owned_apart = False

    @cython.final
    cdef int set_size(self, Py_ssize_t i, cnp.ndarray param) except -1:
        """Tell the C plan a parameter's size and type; all else of it is float32 or float64."""
        cdef int storage = storage_of(param)
        self.tensors[i].size = cnp.PyArray_SIZE(param)
        self.tensors[i].width = 1
        if cnp.PyArray_NDIM(param) > 0 and self.tensors[i].size > 0:
            self.tensors[i].width = self.tensors[i].size // cnp.PyArray_DIM(param, 0)
        self.tensors[i].dtype = fo_one_dtype(arithmetic_of(storage))
        self.tensors[i].param_dtype = self.tensors[i].grad_dtype = <uint8_t>storage
        return 0

    @cython.final
    cdef bint owned_overlap(
        self, bint counters, Py_ssize_t *first, Py_ssize_t *second
    ) noexcept nogil:
        """Sort what a step writes; tell whether any two overlap, and which."""
        cdef Layout *layout
        cdef Py_ssize_t k
        cdef char *step
        self.owned_table.count = 0
        for k in range(self.n_owned):
            layout = &self.layouts[k]
            enter(&self.owned_table, layout.data, layout.data + layout.nbytes, k)
        if counters:
            for k in range(self.n):
                step = <char *>self.tensors[k].step
                enter(&self.owned_table, step, step + sizeof(int64_t), self.n_owned + k)
        sort_table(&self.owned_table)
        if neighbours_overlap(&self.owned_table, first, second):
            return True
        for k in range(self.n):
            self.gradients[k].known = False
        self.owned_apart = True
        return False

    # ---- gradients -------------------------------------------------------------------------------

    @cython.final
    cdef inline bint bound_before(
        self, Py_ssize_t i, PyObject *item, bint zero_grad, bint must_not_alias
    ) noexcept nogil:
        """Whether a gradient is where and as the C plan was told at the last step."""
        cdef Layout *layout = &self.layouts[i * self.spacing]
        cdef Gradient *before = &self.gradients[i]
        return (
            lies_as(layout, item, before.low)
            and before.known and self.tensors[i].grad_dtype == layout.storage
            and not (must_not_alias and before.low == layout.data)
            and not (zero_grad and not flags_of(<Borrowed *>item) & cnp.NPY_ARRAY_WRITEABLE)
        )

    @cython.final
    cdef int bind_gradient(
        self, Py_ssize_t i, item, cnp.ndarray param, bint zero_grad, bint must_not_alias
    ) except -1:
        """Check a gradient, but not whom it shares memory with; tell the C plan where it is."""
        cdef fo_tensor *tensor = &self.tensors[i]
        cdef Layout *layout = &self.layouts[i * self.spacing]
        cdef Gradient *gradient = &self.gradients[i]
        cdef Gradient before = gradient[0]
        cdef uint8_t dtype_before = tensor.grad_dtype
        cdef cnp.ndarray grad
        cdef PyObject *lender
        cdef bint alike
        # Nothing is known of it until all is checked: the C plan is told step by step.
        gradient[0] = Gradient(NULL, NULL, False)
        tensor.row_size = 0
        if item is None:
            tensor.grad = NULL
            return 0
        grad = <cnp.ndarray>item
        if not PyArray_CheckExact(item):
            refuse_masked(grad, self.gradient_name(i))
        lender = lender_of(<Borrowed *><PyObject *>grad)
        if lender != NULL:
            refuse_moved(grad, self.gradient_name(i))
            self.from_jax |= is_from_jax(owner_of(<object>lender))
        alike = (
            cnp.PyArray_TYPE(grad) == layout.type_num and cnp.PyArray_ISNOTSWAPPED(grad)
            and laid_out_as(layout, <Borrowed *><PyObject *>grad)
        )
        if alike:
            tensor.grad = gradient.low = cnp.PyArray_BYTES(grad)
            gradient.high = gradient.low + layout.nbytes
            tensor.grad_ndim = 0
            tensor.grad_dtype = <uint8_t>layout.storage
        else:
            tensor.grad_dtype = <uint8_t>check_unlike(grad, param, self.gradient_name(i))
            alike = describe_strided(
                param, grad, tensor, &self.grad_layout[i], &gradient.low, &gradient.high
            )
        if zero_grad and not (alike and cnp.PyArray_ISWRITEABLE(grad)):
            refuse_to_zero(grad, alike, self.gradient_name(i))
        gradient.known = (
            alike and before.known and before.low == gradient.low and before.high == gradient.high
            and tensor.grad_dtype == dtype_before
            and not (must_not_alias and gradient.low == layout.data)
        )
        if not gradient.known:
            self.gradients_apart = False
        return 0

    @cython.final
    cdef bint take_rows(self, Py_ssize_t i, PyObject **item) except -1:
        """Take a gradient of some rows: keep its values, and note the rows; False: it is of none.

        Called before anything is read: it may run code of others.
        """
        import_rows()
        rows = rows_of(<object>item[0])
        if rows is None:
            return False
        name = self.gradient_name(i)
        values = array_over(rows.values, name)
        if not isinstance(values, cnp.ndarray):
            raise TypeError(
                f"{name}: values: expected a numpy.ndarray, got {type(values).__name__}"
            )
        if self.indices is None:
            self.indices = [None] * self.n
        # What C reads is a copy that nothing else changes, and stays until the step has ended.
        self.indices[i] = (np.array(row_numbers(f"{name}: indices", rows.indices), np.int64), rows)
        self.by_rows = True
        self.from_jax |= is_from_jax(rows.values)
        self.gradients[i].known = False  # the same array may have been a gradient of all elements
        self.keep(item, <PyObject *>values)
        return True

    @cython.final
    cdef inline bint is_of_rows(self, Py_ssize_t i) noexcept:
        return self.indices is not None and self.indices[i] is not None

    @cython.final
    cdef int bind_rows(
        self, Py_ssize_t i, PyObject **item, cnp.ndarray param, bint zero_grad
    ) except -1:
        """Check a gradient of some rows, but not whom it shares memory with; tell the C plan."""
        cdef fo_tensor *tensor = &self.tensors[i]
        cdef Gradient *gradient = &self.gradients[i]
        cdef cnp.ndarray values = <cnp.ndarray>item[0], numbers
        cdef str name = self.gradient_name(i)
        cdef char *low
        cdef char *high
        gradient[0] = Gradient(NULL, NULL, False)
        tensor.row_size = 0
        self.gradients_apart = False
        numbers, rows = self.indices[i]
        if not PyArray_CheckExact(values):
            refuse_masked(values, name)
        if lender_of(<Borrowed *><PyObject *>values) != NULL:
            refuse_moved(values, name)
        check_rows(rows, numbers, values, param, name)
        tensor.grad_dtype = <uint8_t>exact_storage(values, param, name)
        if zero_grad and not cnp.PyArray_ISWRITEABLE(values):
            raise ValueError(f"{name}: read-only, and zero_grad=True asks to zero it")
        values = rows_as_param(values, param, name, zero_grad)
        self.keep(item, <PyObject *>values)
        tensor.grad = cnp.PyArray_BYTES(values)
        tensor.grad_ndim = 0
        if tensor.size == 0:
            return 0
        if cnp.PyArray_SIZE(values) > 0:
            bounds(values, &low, &high)
            gradient.low, gradient.high = low, high
        tensor.row_size = tensor.size // cnp.PyArray_DIM(param, 0)
        tensor.n_indices = cnp.PyArray_SIZE(numbers)
        tensor.indices = <const int64_t *>cnp.PyArray_DATA(numbers)
        if fo_has_scales(tensor) and tensor.row_size % FO_SCALED != 0:
            raise ValueError(
                f"{name}: some rows, of {tensor.row_size} elements each, with state in 8 bits, of "
                f"which {FO_SCALED} elements have a scale in common; such rows need a multiple of "
                f"{FO_SCALED} elements"
            )
        return 0

    @cython.final
    cdef int sort_rows(self) except -1:
        """Have the C plan go over the rows that the gradients of this step are of."""
        cdef int64_t i = 0, at = 0, n_rows
        cdef fo_status status = fo_plan_take_rows(self.plan, &i, &at)
        if status == FO_BAD_INDEX:
            which = f"{self.gradient_name(i)}: indices[{at}]"
            refuse_row(which, self.indices[i][1].indices[at], self.owned_array(i * self.spacing))
        if status != FO_OK:
            raise MemoryError
        for i in range(self.n):
            if self.tensors[i].log != NULL and self.tensors[i].row_size != 0:
                n_rows = self.tensors[i].size // self.tensors[i].row_size
                if not fo_row_log_prepare(self.tensors[i].log, n_rows):
                    raise MemoryError
        self.by_rows = self.indices is not None
        return 0

    @cython.final
    cdef void forget_rows(self) noexcept:
        """Have no gradient of some rows; the next step tells the C plan."""
        cdef Py_ssize_t i
        for i in range(self.n):
            if self.is_of_rows(i):  # values are not where a gradient of all elements would be
                self.gradients[i].known = False
            self.tensors[i].row_size = 0
        self.indices = None

    @cython.final
    cdef Py_ssize_t owned_under(
        self, Py_ssize_t i, PyObject *grad, bint must_not_alias
    ) except -2:
        """Return which owned array shares memory with a gradient; -1: none does, now known.

        A gradient may be its own parameter, except where the caller forbids it.
        """
        cdef Gradient *gradient = &self.gradients[i]
        cdef Extent *extent
        cdef Py_ssize_t place
        cdef Layout *layout = &self.layouts[i * self.spacing]
        cdef bint dense = self.tensors[i].grad_ndim == 0, own
        if gradient.low == gradient.high:
            gradient.known = dense and not self.is_of_rows(i)
            return -1
        place = place_above(&self.owned_table, gradient.low)
        extent = next_below(&self.owned_table, gradient.high, &place)
        while extent != NULL:
            own = (
                extent.index == i * self.spacing and dense and gradient.low == extent.low
                and self.tensors[i].grad_dtype == layout.storage
            )
            if not (own and not must_not_alias) and (
                dense or share_memory(<object>grad, self.owned_array(extent.index))
            ):
                return extent.index
            extent = next_below(&self.owned_table, gradient.high, &place)
        # Of others, extents do not say what they share; and values of rows may be of all next time.
        gradient.known = dense and not self.is_of_rows(i)
        return -1

    @cython.final
    cdef bint gradients_overlap(
        self, PyObject **grads, Py_ssize_t *first, Py_ssize_t *second
    ) except -1:
        """Tell whether any two gradients share memory, and which."""
        cdef Py_ssize_t i
        self.gradient_table.count = 0
        for i in range(self.n):
            enter(&self.gradient_table, self.gradients[i].low, self.gradients[i].high, i)
        sort_table(&self.gradient_table)
        if find_shared(&self.gradient_table, grads, first, second):
            return True
        self.gradients_apart = True
        return False

    # ---- the step --------------------------------------------------------------------------------

    @cython.final
    cdef inline void run(
        self, fo_step_args *args, int num_threads, fo_step_result *result
    ) noexcept:
        set_threads_of(args, num_threads)
        if keeps_gil(self.plan):
            fo_plan_step(self.plan, args, result)
        else:
            with nogil:
                fo_plan_step(self.plan, args, result)


cdef inline void set_threads_of(fo_step_args *args, int num_threads) noexcept:
    """Set how many threads a step may use, or has to for a test; 0: as many as the module says."""
    args.max_threads = num_threads or fo_get_num_threads()
    if threads_exact:
        args.exact = True
        if threads_exact > 0:
            args.max_threads = threads_exact


cdef inline bint keeps_gil(const fo_plan *plan) noexcept nogil:
    """Tell whether a step is so short that to drop the GIL would cost more than it gives."""
    return fo_plan_size(plan) < KEEP_GIL_BELOW
