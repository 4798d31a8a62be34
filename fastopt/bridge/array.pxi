# Arrays: what one must be, how it lies in memory, and who lends it that memory. Nothing here knows
# of plans.

cdef extern from "numpy/arrayobject.h":
    bint PyArray_Check(PyObject *item) nogil
    bint PyArray_CheckExact(object array)
    int PyArray_CopyInto(cnp.ndarray to, cnp.ndarray values) except -1

    # An array that something else keeps alive: to count references would be to write to each.
    ctypedef struct Borrowed "PyArrayObject":
        pass
    bint is_array "PyArray_CheckExact"(PyObject *item) nogil
    int ndim_of "PyArray_NDIM"(Borrowed *array) nogil
    int flags_of "PyArray_FLAGS"(Borrowed *array) nogil
    PyObject *base_of "PyArray_BASE"(Borrowed *array) nogil

    ctypedef struct PyArrayObject_fields:
        char *data
        cnp.npy_intp *dimensions
        cnp.npy_intp *strides
        PyObject *base
        int flags
        PyObject *mem_handler
    char *data_of "PyArray_BYTES"(Borrowed *array) nogil
    void *descr_of "PyArray_DESCR"(Borrowed *array) nogil
    cnp.npy_intp *shape_of "PyArray_DIMS"(Borrowed *array) nogil
    cnp.npy_intp *strides_of "PyArray_STRIDES"(Borrowed *array) nogil


# ---- what an array must be -----------------------------------------------------------------------

cdef int refuse_masked(cnp.ndarray array, str name) except -1:
    """Raise for a masked array, whose mask nothing here would honour."""
    if not PyArray_CheckExact(array) and "numpy.ma" in sys.modules:
        if isinstance(array, sys.modules["numpy.ma"].MaskedArray):
            raise TypeError(f"{name}: a masked array; give its .data, or .filled(...)")
    return 0


def check_parameter(array, str name, *, bint narrow=False):
    """Raise unless the core can update the array in place.

    With `narrow`, elements may also be stored in 16 bits.
    """
    cdef int storage
    if not isinstance(array, cnp.ndarray):
        hint = hint_for(array)
        keep = ", and keep that: it is what will be updated" if hint else ""
        raise TypeError(f"{name}: expected a numpy.ndarray, got {type(array).__name__}{hint}{keep}")
    refuse_masked(array, name)
    storage = storage_of(array)
    if storage < 0 or (not narrow and storage != FO_F32 and storage != FO_F64):
        types = "float32 or float64"
        if narrow:
            types = "float32, float64, bfloat16 (of ml_dtypes) or float16"
        raise TypeError(
            f"{name}: dtype {array.dtype} ({array.dtype.str}) is not supported; "
            f"use {types} in native byte order"
        )
    check_memory(array, name)


cdef int check_memory(cnp.ndarray array, str name) except -1:
    """Raise unless an array can be written, as one stretch of memory."""
    cdef int axes[64]
    if not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError(f"{name}: the array is read-only; parameters are updated in place")
    if not is_dense(array, axes, memory_order(array, axes)):
        raise ValueError(
            f"{name}: the array is not dense (shape {(<object>array).shape}, strides "
            f"{(<object>array).strides}); its elements must fill one stretch of memory, in C, "
            "Fortran or another order of the axes"
        )
    return 0


# ---- how it lies ---------------------------------------------------------------------------------

cdef int memory_order(cnp.ndarray array, int *axes) noexcept:
    """Write the axes longer than one, outermost in memory first; return how many they are."""
    cdef int count = 0, axis, place
    for axis in range(cnp.PyArray_NDIM(array)):
        if cnp.PyArray_DIM(array, axis) == 1:
            continue
        place = count
        while place > 0 and cnp.PyArray_STRIDE(array, axes[place - 1]) < cnp.PyArray_STRIDE(
            array, axis
        ):
            axes[place] = axes[place - 1]
            place -= 1
        axes[place] = axis
        count += 1
    return count


cdef bint is_dense(cnp.ndarray array, int *axes, int count) noexcept:
    """Tell whether the elements fill a stretch of memory without gaps, in this axis order."""
    cdef cnp.npy_intp expected = cnp.PyArray_ITEMSIZE(array)
    cdef int place
    if cnp.PyArray_SIZE(array) == 0:
        return True
    for place in range(count - 1, -1, -1):
        if cnp.PyArray_STRIDE(array, axes[place]) != expected:
            return False
        expected *= cnp.PyArray_DIM(array, axes[place])
    return True


cdef inline bint same_shape(cnp.ndarray one, cnp.ndarray other) noexcept:
    cdef int ndim = cnp.PyArray_NDIM(one), axis
    cdef cnp.npy_intp *dims = cnp.PyArray_DIMS(one)
    cdef cnp.npy_intp *others = cnp.PyArray_DIMS(other)
    if cnp.PyArray_NDIM(other) != ndim:
        return False
    for axis in range(ndim):
        if dims[axis] != others[axis]:
            return False
    return True


cdef inline bint laid_out_alike(cnp.ndarray one, cnp.ndarray other) noexcept:
    """Tell whether dtypes, shapes, and the strides that matter are the same; `other` is native."""
    return (
        cnp.PyArray_TYPE(one) == cnp.PyArray_TYPE(other) and cnp.PyArray_ISNOTSWAPPED(one)
        and ordered_alike(one, other)
    )


cdef inline bint ordered_alike(cnp.ndarray one, cnp.ndarray other) noexcept:
    """Tell whether shapes are the same, and, counted in elements, the strides that matter."""
    cdef cnp.npy_intp item = cnp.PyArray_ITEMSIZE(one), other_item = cnp.PyArray_ITEMSIZE(other)
    cdef int axis
    if not same_shape(one, other):
        return False
    if cnp.PyArray_IS_C_CONTIGUOUS(one) and cnp.PyArray_IS_C_CONTIGUOUS(other):
        return True
    if cnp.PyArray_SIZE(one) == 0:
        return True
    for axis in range(cnp.PyArray_NDIM(one)):
        if (
            cnp.PyArray_STRIDE(one, axis) * other_item != cnp.PyArray_STRIDE(other, axis) * item
            and cnp.PyArray_DIM(one, axis) != 1
        ):
            return False
    return True


cdef bint is_same(cnp.ndarray one, cnp.ndarray other) noexcept:
    """Tell whether two arrays of one dtype and shape are the same elements in the same order."""
    return cnp.PyArray_SIZE(one) == 0 or (
        cnp.PyArray_BYTES(one) == cnp.PyArray_BYTES(other) and laid_out_alike(one, other)
    )


cdef void bounds(cnp.ndarray array, char **low, char **high) noexcept:
    """Find the addresses between which an array lies that is not empty."""
    cdef int axis
    cdef cnp.npy_intp reach
    low[0] = cnp.PyArray_BYTES(array)
    high[0] = low[0] + cnp.PyArray_ITEMSIZE(array)
    for axis in range(cnp.PyArray_NDIM(array)):
        reach = (cnp.PyArray_DIM(array, axis) - 1) * cnp.PyArray_STRIDE(array, axis)
        if reach < 0:
            low[0] += reach
        else:
            high[0] += reach


cdef struct Layout:         # of an array, as it was last looked at
    void *descr             # NumPy's one for the type
    char *data
    Py_ssize_t nbytes
    int type_num
    int storage             # the C core's number for it, or -1
    int ndim
    int room                # axes that there is memory for
    Py_ssize_t *shape       # then the strides, in the same allocation


cdef int remember(Layout *layout, cnp.ndarray array) except -1:
    """Note how an array lies, but not where."""
    cdef int ndim = cnp.PyArray_NDIM(array)
    if ndim > layout.room:
        PyMem_Free(layout.shape)
        layout.room = 0
        layout.shape = <Py_ssize_t *>PyMem_Calloc(2 * ndim, sizeof(Py_ssize_t))
        if layout.shape == NULL:
            raise MemoryError
        layout.room = ndim
    layout.type_num = cnp.PyArray_TYPE(array)
    layout.storage = storage_of(array)
    layout.descr = descr_for(layout.type_num)
    layout.ndim = ndim
    layout.nbytes = cnp.PyArray_NBYTES(array)
    if ndim > 0:  # else NumPy has no shape to point to
        memcpy(layout.shape, cnp.PyArray_DIMS(array), ndim * sizeof(Py_ssize_t))
        memcpy(layout.shape + ndim, cnp.PyArray_STRIDES(array), ndim * sizeof(Py_ssize_t))
    return 0


cdef inline bint laid_out_as(const Layout *layout, Borrowed *array) noexcept nogil:
    """Tell whether an array's shape and all its strides are those."""
    cdef int ndim = layout.ndim, axis
    cdef cnp.npy_intp *shape = shape_of(array)
    cdef cnp.npy_intp *strides = strides_of(array)
    cdef cnp.npy_intp unlike = 0
    if ndim_of(array) != ndim:
        return False
    for axis in range(ndim):
        unlike |= shape[axis] ^ layout.shape[axis]
        unlike |= strides[axis] ^ layout.shape[ndim + axis]
    return unlike == 0


cdef inline bint lies_as(const Layout *layout, PyObject *item, char *data) noexcept nogil:
    """Tell whether something is a plain array, in memory of its own, that lies there and so."""
    cdef Borrowed *array = <Borrowed *>item
    return (
        is_array(item)
        and lender_of(array) == NULL
        and descr_of(array) == layout.descr
        and data_of(array) == data
        and laid_out_as(layout, array)
    )


cdef int check_unchanged(const Layout *layout, cnp.ndarray array, str name) except -1:
    """Raise unless an array that steps write is what it was, but for its address."""
    if (
        not laid_out_as(layout, <Borrowed *><PyObject *>array)
        or cnp.PyArray_TYPE(array) != layout.type_num
        or not cnp.PyArray_ISNOTSWAPPED(array)
    ):
        shape = tuple([layout.shape[j] for j in range(layout.ndim)])
        raise ValueError(
            f"{name}: shape, strides or dtype changed since the optimizer was made: shape {shape} "
            f"then, {(<object>array).shape} of dtype {array.dtype} now"
        )
    if not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError(f"{name}: the array has become read-only")
    return 0


cdef int check_counter(cnp.ndarray counter, str name) except -1:
    """Raise unless a step can be counted in an array."""
    cdef int64_t count
    if not cnp.PyArray_ISWRITEABLE(counter):
        raise ValueError(f"{name}: the array is read-only")
    if (
        cnp.PyArray_NDIM(counter) != 0
        or not cnp.PyArray_ISSIGNED(counter)
        or cnp.PyArray_ITEMSIZE(counter) != sizeof(int64_t)
        or not cnp.PyArray_ISBEHAVED(counter)
    ):
        raise ValueError(
            f"{name}: expected a 0-d int64 array, got shape {(<object>counter).shape} and dtype "
            f"{counter.dtype}"
        )
    count = (<int64_t *>cnp.PyArray_DATA(counter))[0]
    if not 0 <= count < INT64_MAX:
        raise ValueError(f"{name} must be >= 0 and < 2**63 - 1, got {count}")
    return 0


cdef inline void *descr_for(int type_num):
    """Return where NumPy keeps its description of a type, for ever."""
    cdef object descr = cnp.PyArray_DescrFromType(type_num)
    return <void *>descr


def address(cnp.ndarray array not None):
    """Return where the memory of an array begins."""
    return <size_t>cnp.PyArray_DATA(array)


def exchange_memory(cnp.ndarray one not None, cnp.ndarray other not None):
    """Let two arrays of the same dtype and shape have each other's memory.

    Views of either are left behind: they keep alive the object, and not the memory that they see.
    """
    cdef PyArrayObject_fields *a = <PyArrayObject_fields *><PyObject *>one
    cdef PyArrayObject_fields *b = <PyArrayObject_fields *><PyObject *>other
    cdef PyArrayObject_fields kept = a[0]
    if cnp.PyArray_TYPE(one) != cnp.PyArray_TYPE(other) or not same_shape(one, other):
        raise ValueError("the arrays differ in dtype or shape")
    a.data, b.data = b.data, kept.data
    a.dimensions, b.dimensions = b.dimensions, kept.dimensions
    a.strides, b.strides = b.strides, kept.strides
    a.base, b.base = b.base, kept.base
    a.flags, b.flags = b.flags, kept.flags
    a.mem_handler, b.mem_handler = b.mem_handler, kept.mem_handler


cdef void put(cnp.ndarray array, cnp.ndarray value) noexcept:
    """Copy into a dense array what is laid out alike, or one element everywhere."""
    cdef char *to = cnp.PyArray_BYTES(array)
    cdef Py_ssize_t nbytes = cnp.PyArray_NBYTES(array), n = min(nbytes, cnp.PyArray_NBYTES(value))
    memcpy(to, cnp.PyArray_BYTES(value), n)
    while 0 < n < nbytes:
        memcpy(to + n, to, min(n, nbytes - n))
        n += min(n, nbytes - n)


# ---- who lends it its memory ---------------------------------------------------------------------

def lends_memory(given):
    """Tell whether an object is an array, a tensor, or has a buffer; or is a table.

    NumPy turns a table into an array, so it is no container of arrays either.
    """
    return (
        isinstance(given, (np.ndarray, np.generic))
        or hasattr(type(given), "__dlpack__")
        or PyObject_CheckBuffer(given)
        or (hasattr(type(given), "__array__") and not isinstance(given, Mapping))
    )


def hint_for(given):
    """Say, for the end of a message, how an object that is no array becomes one; or nothing."""
    if hasattr(type(given), "toarray"):  # SciPy's sparse matrices
        return "; give its .toarray()"
    try:
        numbers = np.asarray(given).dtype.kind in "fiu"
    except Exception:  # of lists of unequal lengths, for one
        numbers = False
    return "; give numpy.asarray(...)" if numbers else ""


cdef bint is_collection(given):
    """Tell whether something that is no array may hold several."""
    if isinstance(given, (list, tuple)):
        return True
    return hasattr(type(given), "__iter__") and type(given) is not str and not (
        lends_memory(given) or hint_for(given)
    )


cdef str why_unusable(given):
    """Say in one line why the memory of a tensor cannot be used; or nothing."""
    kind, layout = type(given).__name__, str(getattr(given, "layout", ""))
    device = getattr(getattr(given, "device", None), "type", "cpu")
    dtype = str(getattr(given, "dtype", "float32"))
    if layout.startswith("torch.") and layout != "torch.strided":
        how = "sparse" if "sparse" in layout else "not dense"
        return f"the {kind} is {how} ({layout}); give its .to_dense()"
    if getattr(given, "is_nested", False) is True:
        return f"the {kind} is nested; give each of its .unbind()"
    if device == "meta":
        return (
            f"the {kind} is on the meta device, which has no memory; give it some first (all of a "
            "module's get it from .to_empty(device='cpu'))"
        )
    if device != "cpu":
        return f"the {kind} is on the device {given.device}; fastopt needs the CPU's memory"
    if not any([name in dtype for name in ("float32", "float64", "bfloat16", "float16")]):
        return f"dtype {dtype} is not supported; use float32, float64, bfloat16 or float16"
    return ""


def array_over(given, str name, *, bint keep=False):
    """Return an ndarray over the memory that an object lends; the object itself, if it lends none.

    An ndarray or NumPy scalar is returned as it is. With `keep`, a tensor of PyTorch will refuse to
    resize its memory; it may still move it, as others may. Raises TypeError for memory of which
    there can be no ndarray here, or only a copy.
    """
    if isinstance(given, (np.ndarray, np.generic)):
        return given
    kind = type(given)
    try:
        if keep and hasattr(kind, "detach") and hasattr(kind, "numpy"):
            tensor = given.detach()
            if str(tensor.dtype) == "torch.bfloat16":  # of which PyTorch makes no arrays
                from fastopt._bfloat16 import bfloat16

                bits = tensor.view(sys.modules["torch"].int16)
                return bits.numpy().view(bfloat16("an array over a tensor of bfloat16"))
            return tensor.numpy()
        if getattr(kind, "__dlpack_c_exchange_api__", None) is not None:
            from fastopt import _tensors  # which may need Python's lock; arrays do without

            array = _tensors.borrow(kind, given)
            if array is not None:
                return array
        if hasattr(kind, "__dlpack__"):
            return from_dlpack(given)
        if PyObject_CheckBuffer(given):
            return np.asarray(memoryview(given))
    except Exception as error:  # the library's own, which may run to many lines
        reason = why_unusable(given)
        if reason:
            raise TypeError(f"{name}: {reason}") from None
        reason = str(error).partition("\n")[0]
        raise TypeError(
            f"{name}: the memory of a {kind.__name__} cannot be used: {reason}"
        ) from error
    return given


cdef from_dlpack(given):
    """Return an ndarray over the memory that an object lends through DLPack, never a copy."""
    try:
        return np.from_dlpack(given, copy=False)
    except TypeError:  # it does not know the question, so it does not copy; NumPy only reads then
        return np.from_dlpack(given)


# An array may lie in memory that something else has lent it, and that may have moved meanwhile.

cdef inline PyObject *lender_of(Borrowed *array) noexcept nogil:
    """Return what an array has its memory from, if that is not NumPy; else NULL."""
    cdef PyObject *base = base_of(array)
    while base != NULL and PyArray_Check(base):
        base = base_of(<Borrowed *>base)
    return base


cdef int refuse_moved(cnp.ndarray array, str name) except -1:
    """Raise if what lent an array its memory no longer has it there."""
    cdef PyObject *base = lender_of(<Borrowed *><PyObject *>array)
    cdef char *low
    cdef char *high
    cdef size_t first = 0, last = 0
    if base == NULL or cnp.PyArray_SIZE(array) == 0:
        return 0
    kind = type(<object>base)
    try:
        owner = owner_of(<object>base)
        if isinstance(owner, cnp.ndarray):
            return refuse_moved(owner, name)
        if getattr(kind, "__dlpack_c_exchange_api__", None) is not None:
            from fastopt import _tensors

            first, last = _tensors.extent(kind, owner)
        elif PyObject_CheckBuffer(owner):
            find_buffer(owner, &first, &last)
        else:
            return 0  # it has no way to tell
    except Exception as error:
        raise ValueError(
            f"{name}: the memory that a {kind.__name__} lent this array is gone: {error}"
        ) from error
    bounds(array, &low, &high)
    if <size_t>low < first or <size_t>high > last:
        raise ValueError(
            f"{name}: the memory that a {kind.__name__} lent this array has moved, or was freed; "
            f"give the {kind.__name__} itself, or a new array over it"
        )
    return 0


cdef owner_of(lender):
    """Return what a memoryview is a view of, and anything else as it is."""
    while isinstance(lender, memoryview):
        lender = lender.obj
    return lender


cdef int find_buffer(owner, size_t *first, size_t *last) except -1:
    """Find the addresses between which an object's buffer is now."""
    cdef Py_buffer view
    cdef int axis
    cdef Py_ssize_t reach
    PyObject_GetBuffer(owner, &view, PyBUF_FULL_RO)
    first[0] = <size_t>view.buf
    last[0] = first[0] + view.len
    if view.strides != NULL and view.len > 0:
        last[0] = first[0] + view.itemsize
        for axis in range(view.ndim):
            reach = (view.shape[axis] - 1) * view.strides[axis]
            if reach < 0:
                first[0] += reach
            else:
                last[0] += reach
    PyBuffer_Release(&view)
    return 0


def check_lent(cnp.ndarray array not None, str name):
    """Raise if what lent an array its memory no longer has it there."""
    refuse_moved(array, name)


def refuse_unwatched(array, str name):
    """Raise for an array of ``np.from_dlpack``: nothing tells where its memory is now."""
    cdef PyObject *base
    if not isinstance(array, cnp.ndarray):
        return
    base = lender_of(<Borrowed *><PyObject *>array)
    if base != NULL and (
        PyCapsule_IsValid(<object>base, "numpy_dltensor")
        or PyCapsule_IsValid(<object>base, "numpy_dltensor_versioned")
    ):
        raise TypeError(
            f"{name}: an array of np.from_dlpack() cannot tell when its memory moves; give what it "
            "was made from (a tensor, say) itself, or a copy"
        )


def is_over_tensor(array):
    """Tell whether an array's memory is that of a tensor, as from ``tensor.numpy()``."""
    cdef PyObject *base = lender_of(<Borrowed *><PyObject *>array)
    return base != NULL and hasattr(type(<object>base), "__dlpack__")


class MovedError(RuntimeError):
    """A parameter's memory is no longer where the plan was told; nothing was changed."""


# ---- what its lender has to know -----------------------------------------------------------------

def is_from_jax(owner):
    """Tell whether something is an array of JAX, or may stand for one, as a capsule may."""
    array_type = getattr(sys.modules.get("jax"), "Array", None)
    return array_type is not None and (
        isinstance(owner, array_type) or PyCapsule_CheckExact(owner)
    )


# Where JAX reads a NumPy array in place, and not a copy of it.
cdef enum:
    JAX_ALIGNMENT = 64


cdef int wait_for_jax(params) except -1:
    """Wait for all that JAX computes, if it may be reading these arrays in place."""
    if not any([<size_t>cnp.PyArray_DATA(param) % JAX_ALIGNMENT == 0 for param in params]):
        return 0
    for array in sys.modules["jax"].live_arrays():
        try:
            array.block_until_ready()
        except Exception:  # is told to who uses the array
            pass
    return 0


def version_counter(list lenders):
    """Return what tells PyTorch, once they are written, that backward must not use these tensors.

    Or None if there is nothing to tell: none of them is a tensor of PyTorch.
    """
    tensor_type = getattr(sys.modules.get("torch"), "Tensor", None)
    if tensor_type is None:
        return None
    tensors = [x for x in lenders if isinstance(x, tensor_type) and not x.is_inference()]
    increment = getattr(sys.modules["torch"].autograd.graph, "increment_version", None)
    if not tensors or increment is None:
        return None
    return lambda: increment(tensors)
