# The workspace of a functional call: what lies where it did at the last call is bound already.

cdef enum:
    # The lists of a call: parameters and used slots, then the gradients, then where to write.
    GRADS = 1 + FO_MAX_SLOTS
    OUT
    LISTS = OUT + 1 + FO_MAX_SLOTS


@cython.final
@cython.internal
cdef class Workspace(Binder):
    """What a functional call on so many parameters needs, kept for the next such call."""

    cdef unsigned used        # slots
    cdef int n_written        # lists that a step writes: the parameters, and each used slot
    cdef int argument[1 + FO_MAX_SLOTS]     # of each list, in `arguments`
    cdef tuple arguments      # their names: parameters, gradients, slots
    cdef bint many            # whether each argument is a list
    cdef bint has_out         # whether arrays are written that are not those given
    cdef int64_t *counts      # of steps
    cdef list lenders         # what lends memory: its list, its place there, itself; or None
    cdef bint prepared        # the C plan, for parameters of these sizes

    def __cinit__(self, Rule rule not None, tuple arguments not None, Py_ssize_t n, unsigned used):
        cdef Py_ssize_t i
        cdef int j
        self.arguments, self.used, self.n_written = arguments, used, 1
        for j in range(FO_MAX_SLOTS):
            if used & FO_SLOT(j):
                self.argument[self.n_written] = 2 + j
                self.n_written += 1
        self.spacing = self.n_written
        self.make(rule, n, n * self.n_written, 1, LISTS)
        self.counts = <int64_t *>PyMem_Calloc(n + 1, sizeof(int64_t))
        if self.counts == NULL:
            raise MemoryError
        for i in range(n):
            self.tensors[i].step = &self.counts[i]
            self.targets[i * self.n_written] = &self.tensors[i].param
            for j in range(1, self.n_written):
                self.targets[i * self.n_written + j] = &self.tensors[i].slot[self.argument[j] - 2]

    def __dealloc__(self):
        PyMem_Free(self.counts)

    # ---- the arrays of a call --------------------------------------------------------------------

    cdef inline PyObject **list_of(self, int place) noexcept:
        return self.items + place * self.n

    cdef inline PyObject **written(self, int k) noexcept:
        return self.list_of(OUT + k if self.has_out else k)

    cdef list as_list(self, int place):
        cdef PyObject **items = self.list_of(place)
        cdef Py_ssize_t i
        return [<object>items[i] for i in range(self.n) if items[i] != NULL]

    cdef owned_array(self, Py_ssize_t k):
        return <object>self.written(k % self.n_written)[k // self.n_written]

    cdef str gradient_name(self, Py_ssize_t i):
        return label(self.arguments[1], i, self.many)

    cdef str given_name(self, int k, Py_ssize_t i):
        return label(self.arguments[self.argument[k]], i, self.many)

    cdef str written_name(self, int k, Py_ssize_t i):
        return label(f"out[{k}]", i, self.many) if self.has_out else self.given_name(k, i)

    cdef str owned_name(self, Py_ssize_t k):
        return self.written_name(k % self.n_written, k // self.n_written)

    cdef int take(self, int place, given, str name) except -1:
        """Take the arrays of an argument, and note what lends any its memory.

        Called before anything is read: it may run code of others.
        """
        cdef PyObject **items = self.list_of(place)
        cdef Py_ssize_t i, n
        if not self.many:
            self.keep(items, <PyObject *>given)
        elif not isinstance(given, (list, tuple)):
            raise TypeError(
                f"{name} must be a list or tuple, as {self.arguments[0]} is; got "
                f"{type(given).__name__}"
            )
        else:
            n = self.keep_all(items, given)
            if n != self.n:
                raise ValueError(f"{name}: expected {self.n} arrays, got {n}")
        for i in range(self.n):
            if is_array(items[i]):
                continue
            item = <object>items[i]
            if item is not None and not isinstance(item, cnp.ndarray):
                array = array_over(item, label(name, i, self.many))
                self.lenders = self.lenders or []
                self.lenders.append((place, i, item))
                if not self.many and array is item:
                    refuse_collection(given, name, self.arguments[0])
                self.keep(&items[i], <PyObject *>array)
        return 0

    # ---- binding ---------------------------------------------------------------------------------

    cdef int bind(self, bint zero_grad) except -1:
        """Check all arrays but those that are copied; tell the C plan where they are."""
        cdef bint grad_must_not_alias = zero_grad or self.has_out  # its own parameter
        cdef PyObject **grads = self.list_of(GRADS)
        cdef PyObject **params = self.written(0)
        cdef PyObject *item
        cdef Layout *layout = self.layouts
        cdef bint changed, all_known = True
        cdef Py_ssize_t i, first = 0, second = 0
        cdef int k
        for i in range(self.n):
            changed = False
            for k in range(self.n_written):
                item = params[k * self.n + i]
                if (
                    changed or not lies_as(layout, item, layout.data)
                    or not flags_of(<Borrowed *>item) & cnp.NPY_ARRAY_WRITEABLE
                ):
                    self.bind_owned(k, i, <object>item)
                    changed = True
                layout += 1
            if not self.bound_before(i, grads[i], zero_grad, grad_must_not_alias):
                if grads[i] != <PyObject *>None and not PyArray_Check(grads[i]):
                    array = as_gradient(
                        <object>grads[i], <object>params[i], self.gradient_name(i), zero_grad
                    )
                    self.keep(&grads[i], <PyObject *>array)
                self.bind_gradient(
                    i, <object>grads[i], <object>params[i], zero_grad, grad_must_not_alias
                )
                all_known &= self.gradients[i].known
        if zero_grad and not self.gradients_apart and self.gradients_overlap(
            grads, &first, &second
        ):
            raise ValueError(
                f"{self.gradient_name(first)} and {self.gradient_name(second)} share memory, and "
                "zero_grad=True asks to zero them"
            )
        if not self.owned_apart:
            if self.owned_overlap(False, &first, &second):
                raise ValueError(
                    f"{self.owned_name(second)} overlaps {self.owned_name(first)} in memory; each "
                    "needs memory of its own"
                )
            all_known = False
        if not all_known:
            self.check_gradients_apart(grad_must_not_alias)
        if not self.prepared:
            if fo_plan_prepare(self.plan) != FO_OK:
                raise MemoryError
            self.prepared = True
        return 0

    cdef int bind_owned(self, int k, Py_ssize_t i, item) except -1:
        """Check an array that is to be written, and tell the C plan where it is."""
        cdef Layout *layout = &self.layouts[i * self.n_written + k]
        cdef cnp.ndarray array, param
        cdef bint known
        if not (
            PyArray_CheckExact(item) and is_native_float(<cnp.ndarray>item)
            and cnp.PyArray_ISWRITEABLE(<cnp.ndarray>item)
            and cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray>item)
        ):
            check_parameter(item, self.written_name(k, i))
        array = <cnp.ndarray>item
        if lender_of(<Borrowed *><PyObject *>array) != NULL:
            refuse_moved(array, self.written_name(k, i))
        if k > 0:
            param = <cnp.ndarray>self.written(0)[i]
            if not laid_out_alike(array, param):
                refuse_slot(array, param, self.written_name(k, i), self.written_name(0, i))
        known = (
            layout.data != NULL and cnp.PyArray_TYPE(array) == layout.type_num
            and laid_out_as(layout, <Borrowed *>item)
        )
        if not known:
            remember(layout, array)
            if k == 0:
                self.set_size(i, array)
                self.gradients[i].known = self.prepared = False
        if not known or cnp.PyArray_BYTES(array) != layout.data:
            self.place(i * self.n_written + k, cnp.PyArray_BYTES(array))
        return 0

    cdef int check_gradients_apart(self, bint grad_must_not_alias) except -1:
        cdef Py_ssize_t i, k
        for i in range(self.n):
            if self.gradients[i].known:
                continue
            k = self.owned_under(i, self.list_of(GRADS)[i], grad_must_not_alias)
            if k >= 0:
                raise ValueError(
                    f"{self.gradient_name(i)} overlaps {self.owned_name(k)} in memory; a gradient "
                    "needs memory of its own"
                )
        return 0

    # ---- what is copied first, with `out` --------------------------------------------------------

    cdef int copy(self) except -1:
        """Copy what is given to where it is to be written, after checking all of it."""
        cdef Py_ssize_t i
        cdef int k
        cdef cnp.ndarray source, target
        for k in range(self.n_written):
            for i in range(self.n):
                source, target = self.source_array(k, i), <cnp.ndarray>self.written(k)[i]
                if (
                    cnp.PyArray_TYPE(source) != cnp.PyArray_TYPE(target)
                    or not cnp.PyArray_ISNOTSWAPPED(source)
                ):
                    raise TypeError(
                        f"{self.given_name(k, i)}: dtype {source.dtype} ({source.dtype.str}) is "
                        f"not that of {self.written_name(k, i)}: {target.dtype}"
                    )
                if not same_shape(source, target):
                    raise ValueError(
                        f"{self.given_name(k, i)}: shape {(<object>source).shape} is not that of "
                        f"{self.written_name(k, i)}: {(<object>target).shape}"
                    )
                if is_same(source, target):
                    continue
                self.check_source_apart(k, i, source)
                if not laid_out_alike(source, target):
                    ready = np.empty_like(target, subok=False)
                    PyArray_CopyInto(ready, source)
                    self.keep(&self.list_of(k)[i], <PyObject *>ready)
        for k in range(self.n_written):  # from here on nothing can fail
            for i in range(self.n):
                source = <cnp.ndarray>self.list_of(k)[i]
                target = <cnp.ndarray>self.written(k)[i]
                if not is_same(source, target):
                    put(target, source)
        return 0

    cdef cnp.ndarray source_array(self, int k, Py_ssize_t i):
        """Return what is to be copied as an array, which is then in the list, too."""
        item = <object>self.list_of(k)[i]
        if not PyArray_CheckExact(item):
            if issubclass(type(item), np.generic):
                item = np.asarray(item)
            if not isinstance(item, cnp.ndarray):
                raise TypeError(
                    f"{self.given_name(k, i)}: expected a numpy.ndarray, got {type(item).__name__}"
                    f"{hint_for(item)}"
                )
            refuse_masked(item, self.given_name(k, i))
            self.keep(&self.list_of(k)[i], <PyObject *>item)
        if lender_of(<Borrowed *><PyObject *>item) != NULL:
            refuse_moved(<cnp.ndarray>item, self.given_name(k, i))
        return <cnp.ndarray>item

    cdef int check_source_apart(self, int k, Py_ssize_t i, cnp.ndarray source) except -1:
        cdef char *low
        cdef char *high
        cdef Py_ssize_t place
        cdef Extent *extent
        bounds(source, &low, &high)
        place = place_above(&self.owned_table, low)
        extent = next_below(&self.owned_table, high, &place)
        while extent != NULL:
            if share_memory(source, self.owned_array(extent.index)):
                raise ValueError(
                    f"{self.given_name(k, i)} overlaps {self.owned_name(extent.index)} in memory; "
                    "what is written needs memory of its own"
                )
            extent = next_below(&self.owned_table, high, &place)
        return 0


cdef int refuse_collection(given, str name, str first) except -1:
    """Raise for several arrays where there is to be one, or a list of them."""
    if not is_collection(given):
        return 0
    kind = type(given).__name__
    if name != first:
        raise TypeError(f"{name} must be an array, as {first} is; got {kind}")
    values = ".values()" if isinstance(given, Mapping) else ""
    raise TypeError(
        f"{name} must be an array, or a list or tuple of arrays, such as list({name}{values}); "
        f"got {kind}"
    )


cdef int refuse_slot(cnp.ndarray array, cnp.ndarray param, str name, str whose) except -1:
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


cdef str label(str name, Py_ssize_t i, bint many):
    return f"{name}[{i}]" if many else name
