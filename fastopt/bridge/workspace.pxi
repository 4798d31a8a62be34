# The workspace of a functional call: what lies where it did at the last call is bound already.

@cython.final
@cython.internal
cdef class Workspace(Binder):
    """What a functional call on so many parameters needs, kept for the next such call.

    A step writes lists of arrays: the parameters, and each used slot; in a `wide` workspace also
    the masters, and for each slot its scales, any of which may be None.
    """

    cdef const fo_rule *rule
    cdef unsigned used        # slots
    cdef bint wide            # whether there is room for what is stored in fewer bits
    cdef int n_written        # lists that a step writes
    cdef int masters          # which of them has the masters; slot lists come before, scales after
    cdef int argument[1 + FO_MAX_SLOTS]     # of each list, in `arguments`
    # Where further lists are: gradients, and where to write.
    cdef int grads, out
    cdef tuple arguments      # their names: parameters, gradients, slots
    cdef bint many            # whether each argument is a list
    cdef bint has_out         # whether arrays are written that are not those given
    cdef int64_t *counts      # of steps
    cdef list lenders         # what lends memory: its list, its place there, itself; or None
    cdef bint prepared        # the C plan, for parameters of these sizes

    def __cinit__(
        self, Rule rule not None, tuple arguments not None, Py_ssize_t n, unsigned used, bint wide
    ):
        cdef Py_ssize_t i
        cdef void ***target
        cdef int j, slot
        self.rule, self.arguments, self.used, self.wide = rule.rule, arguments, used, wide
        self.masters = 1
        for j in range(FO_MAX_SLOTS):
            if used & FO_SLOT(j):
                self.argument[self.masters] = 2 + j
                self.masters += 1
        self.n_written = self.grads = (2 if wide else 1) * self.masters
        self.out = self.grads + 1
        self.spacing = self.n_written
        self.make(rule, n, n * self.n_written, 1, self.out + self.n_written)
        self.counts = <int64_t *>PyMem_Calloc(n + 1, sizeof(int64_t))
        if self.counts == NULL:
            raise MemoryError
        for i in range(n):
            self.tensors[i].step = &self.counts[i]
            target = self.targets + i * self.n_written
            target[0] = &self.tensors[i].param
            for j in range(1, self.masters):
                target[j] = &self.tensors[i].slot[self.argument[j] - 2]
            if wide:
                target[self.masters] = &fo_plan_coding(self.plan, i).beside[0]
                for j in range(1, self.masters):
                    slot = self.argument[j] - 2
                    target[self.masters + j] = &fo_plan_coding(self.plan, i).beside[1 + slot]

    def __dealloc__(self):
        PyMem_Free(self.counts)

    # ---- the arrays of a call --------------------------------------------------------------------

    cdef inline PyObject **list_of(self, int place) noexcept:
        return self.items + place * self.n

    cdef inline PyObject **written(self, int k) noexcept:
        return self.list_of(self.out + k if self.has_out else k)

    cdef list as_list(self, int place):
        cdef PyObject **items = self.list_of(place)
        cdef Py_ssize_t i
        return [<object>items[i] for i in range(self.n) if items[i] != NULL]

    cdef owned_array(self, Py_ssize_t k):
        return <object>self.written(k % self.n_written)[k // self.n_written]

    cdef str list_name(self, int place):
        if place == self.grads:
            return self.arguments[1]
        if place > self.grads:
            return f"out[{place - self.out}]"
        return "master" if place == self.masters else self.arguments[self.argument[place]]

    cdef str item_name(self, int place, Py_ssize_t i):
        if (place if place < self.grads else place - self.out) > self.masters:
            return f"scales of {self.item_name(place - self.masters, i)}"
        return label(self.list_name(place), i, self.many)

    cdef str gradient_name(self, Py_ssize_t i):
        return self.item_name(self.grads, i)

    cdef str given_name(self, int k, Py_ssize_t i):
        return self.item_name(k, i)

    cdef str written_name(self, int k, Py_ssize_t i):
        return self.item_name(self.out + k if self.has_out else k, i)

    cdef str owned_name(self, Py_ssize_t k):
        return self.written_name(k % self.n_written, k // self.n_written)

    cdef int take_none(self, int place) except -1:
        """Have no arrays in a list."""
        cdef PyObject **items = self.list_of(place)
        cdef Py_ssize_t i
        for i in range(self.n):
            self.keep(&items[i], <PyObject *>None)
        return 0

    cdef bint take(self, int place, given) except -1:
        """Take the arrays of an argument, and note what lends any its memory.

        Called before anything is read: it may run code of others. Return False if there are scales,
        and no room for them.
        """
        cdef PyObject **items = self.list_of(place)
        cdef int k = place if place < self.grads else place - self.out
        cdef Py_ssize_t i, n
        if not self.many:
            self.keep(items, <PyObject *>given)
        elif not isinstance(given, (list, tuple)):
            raise TypeError(
                f"{self.list_name(place)} must be a list or tuple, as {self.arguments[0]} is; got "
                f"{type(given).__name__}"
            )
        else:
            n = self.keep_all(items, given)
            if n != self.n:
                raise ValueError(f"{self.list_name(place)}: expected {self.n} arrays, got {n}")
        for i in range(self.n):
            if is_array(items[i]):
                continue
            if type(<object>items[i]) is tuple and 0 < k < self.masters:
                if not self.wide:
                    return False
                self.take_pair(place, i, <tuple>items[i])
            elif not self.borrow(place, i) and not self.many:
                refuse_collection(given, self.list_name(place), self.arguments[0])
        return True

    cdef int take_pair(self, int place, Py_ssize_t i, tuple pair) except -1:
        """Take the codes and scales of a slot in 8 bits."""
        cdef int k
        if len(pair) != 2:
            raise TypeError(
                f"{self.item_name(place, i)}: expected an array, or the pair (codes, scales) of a "
                f"slot in 8 bits; got a tuple of {len(pair)}"
            )
        if pair[1] is None:
            scales = self.item_name(place + self.masters, i)
            raise TypeError(f"{scales}: expected a numpy.ndarray, got None")
        for k in range(2):
            self.keep(&self.list_of(place + k * self.masters)[i], <PyObject *>pair[k])
            self.borrow(place + k * self.masters, i)
        return 0

    cdef bint borrow(self, int place, Py_ssize_t i) except -1:
        """Take the memory that an item lends, if it is no array; return whether it is one now."""
        cdef PyObject **items = self.list_of(place)
        item = <object>items[i]
        if item is None or isinstance(item, cnp.ndarray):
            return True
        if place == self.grads and self.take_rows(i, &items[i]):
            return True
        array = array_over(item, self.item_name(place, i))
        self.lenders = self.lenders or []
        self.lenders.append((place, i, item))
        self.keep(&items[i], <PyObject *>array)
        return array is not item

    # ---- binding ---------------------------------------------------------------------------------

    cdef int bind(self, bint zero_grad) except -1:
        """Check all arrays but those that are copied; tell the C plan where they are."""
        cdef bint grad_must_not_alias = zero_grad or self.has_out  # its own parameter
        cdef PyObject **grads = self.list_of(self.grads)
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
                    changed |= k == 0  # then all else has to be like the new one
                layout += 1
            if self.is_of_rows(i):
                self.bind_rows(i, &grads[i], <object>params[i], zero_grad)
                all_known = False
            elif not self.bound_before(i, grads[i], zero_grad, grad_must_not_alias):
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
        if self.by_rows:
            self.prepared = False
            self.sort_rows()
        elif not self.prepared:
            if fo_plan_prepare(self.plan) != FO_OK:
                raise MemoryError
            self.prepared = True
        return 0

    cdef int bind_owned(self, int k, Py_ssize_t i, item) except -1:
        """Check an array that is to be written, and tell the C plan where it is."""
        cdef Layout *layout = &self.layouts[i * self.n_written + k]
        cdef cnp.ndarray array
        cdef bint known
        if item is None and k >= self.masters:
            return self.bind_none(k, i)
        if k >= self.masters or not (
            PyArray_CheckExact(item) and storage_of(<cnp.ndarray>item) >= 0
            and cnp.PyArray_ISWRITEABLE(<cnp.ndarray>item)
            and cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray>item)
        ):
            self.check_written(k, i, item)
        array = <cnp.ndarray>item
        if lender_of(<Borrowed *><PyObject *>array) != NULL:
            refuse_moved(array, self.written_name(k, i))
        known = (
            layout.data != NULL and cnp.PyArray_TYPE(array) == layout.type_num
            and laid_out_as(layout, <Borrowed *>item)
        )
        if k > 0:
            self.bind_storage(k, i, array, <cnp.ndarray>self.written(0)[i])
        if not known:
            remember(layout, array)
            if k == 0:
                self.set_size(i, array)
                self.gradients[i].known = self.prepared = False
        if not known or cnp.PyArray_BYTES(array) != layout.data:
            self.place(i * self.n_written + k, cnp.PyArray_BYTES(array))
        return 0

    cdef int bind_none(self, int k, Py_ssize_t i) except -1:
        """Tell the C plan that a parameter has no master, or a slot no scales."""
        cdef Layout *layout = &self.layouts[i * self.n_written + k]
        if k == self.masters:
            self.tensors[i].param_dtype = <uint8_t>self.layouts[i * self.n_written].storage
        elif is_8bit(self.tensors[i].slot_dtype[self.argument[k - self.masters] - 2]):
            refuse_codes(self.written_name(k - self.masters, i))
        if layout.data != NULL:
            layout.nbytes = 0
            self.place(i * self.n_written + k, NULL)
        return 0

    cdef int check_written(self, int k, Py_ssize_t i, item) except -1:
        """Raise unless a step can write an array, of whatever goes with a parameter."""
        cdef str name = self.written_name(k, i)
        if k > 0 and isinstance(item, cnp.ndarray) and (
            k >= self.masters or cnp.PyArray_TYPE(<cnp.ndarray>item) == cnp.NPY_UINT8
        ):
            refuse_masked(<cnp.ndarray>item, name)
            return check_memory(<cnp.ndarray>item, name)
        check_parameter(item, name, narrow=True)
        return 0

    cdef bint is_number(self, int k) noexcept:
        """Tell whether a list that a step writes is of a slot that is a number."""
        return 0 < k < self.masters and fo_rule_slot_number(self.rule, self.argument[k] - 2)

    cdef int bind_storage(
        self, int k, Py_ssize_t i, cnp.ndarray array, cnp.ndarray param
    ) except -1:
        """Check the type and layout of what goes with a parameter; tell the C plan the type."""
        cdef fo_tensor *tensor = &self.tensors[i]
        cdef int storage = self.layouts[i * self.n_written].storage, kind = storage_of(array), slot
        if self.is_number(k):
            return check_number(array, self.written_name(k, i))
        if k > self.masters:
            return self.check_scales(k, i, array, param)
        if k < self.masters and fo_rule_slot_by_row(self.rule, self.argument[k] - 2):
            tensor.slot_dtype[self.argument[k] - 2] = <uint8_t>arithmetic_of(storage)
            return check_row_values(array, param, self.written_name(k, i))
        if k == self.masters:
            tensor.param_dtype = <uint8_t>master_storage(
                array, param, self.written_name(k, i), self.written_name(0, i)
            )
        elif cnp.PyArray_TYPE(array) == cnp.NPY_UINT8 and not self.wide:
            refuse_codes(self.written_name(k, i))
        else:
            slot = self.argument[k] - 2
            if cnp.PyArray_TYPE(array) == cnp.NPY_UINT8:
                kind = FO_8BIT_SIGNED
                if fo_rule_slot_unsigned(self.rule, slot):
                    kind = FO_8BIT_UNSIGNED
                if storage == FO_F64 or fo_rule_slot_exact(self.rule, slot):
                    raise TypeError(
                        f"{self.written_name(k, i)}: not in 8 bits, but as "
                        f"{'float64' if storage == FO_F64 else 'float32'}: "
                        f"{'its parameter is' if storage == FO_F64 else '8 bits would break it'}"
                    )
            elif kind != storage and (storage == FO_F64 or (kind != FO_F32 and kind != FO_BF16)):
                raise TypeError(
                    f"{self.written_name(k, i)}: dtype {array.dtype} is not that of "
                    f"{self.written_name(0, i)}: {param.dtype}"
                    f"{'' if storage == FO_F64 else '; nor float32, bfloat16, or a pair of uint8'}"
                )
            tensor.slot_dtype[slot] = <uint8_t>kind
        if not ordered_alike(array, param):
            refuse_layout(array, param, self.written_name(k, i), self.written_name(0, i))
        return 0

    cdef int check_scales(
        self, int k, Py_ssize_t i, cnp.ndarray scales, cnp.ndarray param
    ) except -1:
        shape = (count_scales(param),)
        if not is_8bit(self.tensors[i].slot_dtype[self.argument[k - self.masters] - 2]):
            codes = <object>self.written(k - self.masters)[i]
            raise TypeError(
                f"codes of {self.written_name(k - self.masters, i)}: dtype {codes.dtype} is not "
                "uint8"
            )
        if cnp.PyArray_TYPE(scales) != cnp.NPY_UINT8:
            raise TypeError(f"{self.written_name(k, i)}: dtype {scales.dtype} is not uint8")
        if (<object>scales).shape != shape:
            raise ValueError(
                f"{self.written_name(k, i)}: shape {(<object>scales).shape} is not {shape}, one "
                f"for each {FO_SCALED} elements of {self.written_name(0, i)}"
            )
        return 0

    cdef void round_at_random(self, bint stochastic, uint64_t seed, index) except *:
        """Tell the C plan what to round at random, and the numbers that the bits depend on.

        `index` is the number of the first parameter, from which the others count on; or a list.
        """
        cdef fo_coding *coding
        cdef Py_ssize_t i
        for i in range(self.n):
            coding = fo_plan_coding(self.plan, i)
            coding.stochastic = in_fewer_bits(&self.tensors[i]) if stochastic else 0
            coding.seed = seed
            coding.index = index[i] if type(index) is list else index + i

    cdef int check_gradients_apart(self, bint grad_must_not_alias) except -1:
        cdef Py_ssize_t i, k
        for i in range(self.n):
            if self.gradients[i].known:
                continue
            k = self.owned_under(
                i, self.list_of(self.grads)[i], grad_must_not_alias or self.is_of_rows(i)
            )
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
                if k >= self.masters and not self.is_given(k, i):
                    continue
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
                if self.list_of(k)[i] == <PyObject *>None:
                    continue
                source = <cnp.ndarray>self.list_of(k)[i]
                target = <cnp.ndarray>self.written(k)[i]
                if not is_same(source, target):
                    put(target, source)
        return 0

    cdef bint is_given(self, int k, Py_ssize_t i) except -1:
        """Tell whether there is a master, or scales, to copy; raise if only one is given."""
        cdef bint given = self.list_of(k)[i] != <PyObject *>None
        if given != (self.written(k)[i] != <PyObject *>None):
            names = [self.written_name(k, i), self.given_name(k, i)]
            raise TypeError(
                f"{names[given]}: given, but not {names[not given]}; give both, or neither"
            )
        return given

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


cdef int master_storage(cnp.ndarray array, cnp.ndarray param, str name, str whose) except -1:
    """Return how a parameter with this master is stored, or raise."""
    cdef int storage = storage_of(param), kind = cnp.PyArray_TYPE(array), wanted
    if storage != FO_BF16 and storage != FO_F16:
        raise TypeError(
            f"{name}: {whose} of {param.dtype} can have no master, only bfloat16 and float16; give "
            "None"
        )
    wanted = cnp.NPY_UINT16 if storage == FO_BF16 else cnp.NPY_FLOAT32
    if kind != wanted or not cnp.PyArray_ISNOTSWAPPED(array):
        raise TypeError(
            f"{name}: dtype {array.dtype} ({array.dtype.str}) is not native "
            f"{'uint16' if storage == FO_BF16 else 'float32'}, as beside {whose} of {param.dtype}"
        )
    return FO_BF16_SPLIT if storage == FO_BF16 else FO_F16_MASTER


cdef int refuse_codes(str name) except -1:
    raise TypeError(
        f"{name}: dtype uint8 is that of codes, which need scales: give the pair (codes, scales)"
    )


cdef int refuse_layout(cnp.ndarray array, cnp.ndarray param, str name, str whose) except -1:
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
