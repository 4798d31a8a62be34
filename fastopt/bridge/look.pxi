# A quicker look at PyTorch's tensors, and whether one lies as it was seen.

# To read a tensor through DLPack is to count a reference to it, and to count it back: two atomic
# operations, and twice as many where nothing but Python refers to it. PyTorch's stable C interface
# (torch/csrc/inductor/aoti_torch/c/shim.h) reads one without. It takes a pointer to where C++ has
# the tensor, which is right behind the head of its Python object: `look_directly` tries whether.

ctypedef int (*Getter)(void *handle, void *out) noexcept nogil

cdef Getter get_data = NULL
cdef Getter get_dtype = NULL
cdef Getter get_dim = NULL
cdef Getter get_sizes = NULL
cdef Getter get_strides = NULL
cdef tuple direct_kinds = ()


def look_directly(list examples not None, list getters not None):
    """Look at tensors of some types through PyTorch's C functions, from now on; tell whether.

    Parameters
    ----------
    examples : list of torch.Tensor
        A tensor of each type. If one is not where it is expected, all are read through DLPack.
    getters : list of int
        The addresses of ``aoti_torch_get_data_ptr``, ``..._dtype``, ``..._dim``, ``..._sizes`` and
        ``..._strides``.
    """
    global get_data, get_dtype, get_dim, get_sizes, get_strides, direct_kinds
    direct_kinds = ()
    for tensor in examples:
        if type(tensor).__basicsize__ < <Py_ssize_t>(sizeof(PyObject) + sizeof(void *)):
            return False
        if handle_of(<PyObject *>tensor)[0] != <void *><size_t>tensor._cdata:
            return False
    if examples:
        get_data = <Getter><size_t>getters[0]
        get_dtype = <Getter><size_t>getters[1]
        get_dim = <Getter><size_t>getters[2]
        get_sizes = <Getter><size_t>getters[3]
        get_strides = <Getter><size_t>getters[4]
    direct_kinds = tuple([type(tensor) for tensor in examples])
    return bool(examples)


cdef inline void **handle_of(PyObject *tensor) noexcept:
    """Return where a tensor's Python object has the tensor of C++."""
    return <void **>(<char *>tensor + sizeof(PyObject))


cdef inline bint is_one_of(item, tuple kinds):
    """Tell whether an object's type is exactly one of these."""
    for kind in kinds:
        if type(item) is kind:
            return True
    return False


cdef struct Seen:       # how a tensor lay when it was last looked at
    bint direct         # whether PyTorch's functions tell if it still does
    int32_t dtype       # as these number it
    int32_t device_type
    int32_t ndim
    uint8_t code
    uint8_t bits
    uint16_t lanes
    int64_t *shape      # then the strides, in the same allocation
    char *data


cdef int note(Seen *seen, PyObject *tensor, const DLTensor *now, bint direct) except -1:
    """Note how a tensor lies; `direct`: for looks through PyTorch's functions."""
    cdef size_t nbytes = now.ndim * sizeof(int64_t)
    if seen.shape == NULL or now.ndim != seen.ndim:
        PyMem_Free(seen.shape)
        seen.shape = <int64_t *>PyMem_Calloc(2 * now.ndim + 1, sizeof(int64_t))
        if seen.shape == NULL:
            raise MemoryError
    if now.ndim > 0:
        memcpy(seen.shape, now.shape, nbytes)
        memcpy(seen.shape + now.ndim, now.strides, nbytes)
    seen.ndim, seen.device_type = now.ndim, now.device_type
    seen.code, seen.bits, seen.lanes = now.code, now.bits, now.lanes
    seen.data = address(now)
    # A tensor without memory has no address, so nothing would tell it from one of another device.
    seen.direct = (
        direct and seen.data != NULL and get_dtype(handle_of(tensor), &seen.dtype) == 0
    )
    return 0


cdef inline bint lies_as(
    const Seen *seen, int32_t ndim, const int64_t *shape, const int64_t *strides
) noexcept nogil:
    """Tell whether a tensor's shape and strides are those that were seen."""
    cdef int axis
    cdef int64_t unlike = 0
    if ndim != seen.ndim:
        return False
    for axis in range(ndim):
        unlike |= shape[axis] ^ seen.shape[axis]
        unlike |= strides[axis] ^ seen.shape[ndim + axis]
    return unlike == 0


cdef inline char *find_alike(const Seen *seen, void **handle) noexcept nogil:
    """Return where a tensor's memory is if dtype, shape and strides are those that were seen.

    Else, and where it has none, return NULL.
    """
    cdef void *data = NULL
    cdef int32_t dtype = 0
    cdef int64_t ndim = 0
    cdef int64_t *shape = NULL
    cdef int64_t *strides = NULL
    if (
        get_data(handle, &data) != 0
        or get_dtype(handle, &dtype) != 0
        or dtype != seen.dtype
        or get_dim(handle, &ndim) != 0
        or get_sizes(handle, &shape) != 0
        or get_strides(handle, &strides) != 0
        or not lies_as(seen, <int32_t>ndim, shape, strides)
    ):
        return NULL
    return <char *>data
