# How a tensor is read through DLPack's C exchange API, and whether tensors and arrays share memory.

cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyArrayObject_fields:
        char *data
    object PyArray_NewFromDescr(
        type subtype, cnp.dtype descr, int ndim, const cnp.npy_intp *shape,
        const cnp.npy_intp *strides, void *data, int flags, PyObject *like,
    )


# As DLPack 1.x defines them (dlpack.h).
cdef enum:
    DL_MAJOR_VERSION = 1
    DL_CPU = 1
    DL_INT = 0
    DL_UINT = 1
    DL_FLOAT = 2
    DL_BFLOAT = 4

cdef struct DLTensor:
    void *data
    int32_t device_type
    int32_t device_id
    int32_t ndim
    uint8_t code
    uint8_t bits
    uint16_t lanes
    int64_t *shape
    int64_t *strides  # in elements
    uint64_t byte_offset

cdef enum:
    DL_READ_ONLY = 1
    DL_IS_COPIED = 2

cdef struct ManagedTensor:  # DLManagedTensorVersioned
    uint32_t major
    uint32_t minor
    void *context
    void (*deleter)(ManagedTensor *self)
    uint64_t flags
    DLTensor tensor

ctypedef int (*Lender)(PyObject *tensor, ManagedTensor **out) except -1
ctypedef int (*Reader)(PyObject *tensor, DLTensor *out) except -1

cdef struct DLPackExchangeAPI:
    uint32_t major
    uint32_t minor
    DLPackExchangeAPI *previous
    void *managed_tensor_allocator
    Lender managed_tensor_from_py_object_no_sync
    void *managed_tensor_to_py_object_no_sync
    Reader dltensor_from_py_object_no_sync
    void *current_work_stream


cdef DLPackExchangeAPI *exchange_api(kind) except NULL:
    """Return version 1 of the table that a tensor type carries."""
    cdef DLPackExchangeAPI *api = <DLPackExchangeAPI *>PyCapsule_GetPointer(
        kind.__dlpack_c_exchange_api__, "dlpack_exchange_api"
    )
    while api != NULL and api.major != DL_MAJOR_VERSION:
        api = api.previous
    if api == NULL or api.dltensor_from_py_object_no_sync == NULL:
        raise TypeError(f"{kind.__name__} cannot be read through version 1 of DLPack's C API")
    return api


cdef Reader reader(kind) except NULL:
    """Return the function that reads tensors of this type."""
    return exchange_api(kind).dltensor_from_py_object_no_sync


cdef inline char *address(const DLTensor *tensor) noexcept:
    return <char *>tensor.data + tensor.byte_offset if tensor.data != NULL else NULL


# What arrays of bfloat16 have here that are for the C core alone (see storage_of).
BFLOAT16 = np.dtype([("bfloat16", np.uint16)])

cdef dict dtypes = {
    (DL_FLOAT, 16): np.dtype(np.float16), (DL_FLOAT, 32): np.dtype(np.float32),
    (DL_FLOAT, 64): np.dtype(np.float64), (DL_BFLOAT, 16): BFLOAT16,
    (DL_UINT, 8): np.dtype(np.uint8), (DL_UINT, 16): np.dtype(np.uint16),
    (DL_INT, 16): np.dtype(np.uint16),  # PyTorch's support of uint16 has gaps: bits lie in int16
}


cdef inline bint is_float(const DLTensor *tensor) noexcept:
    """Tell whether elements are of float16, bfloat16, float32 or float64."""
    if tensor.lanes != 1:
        return False
    if tensor.code == DL_BFLOAT:
        return tensor.bits == 16
    return tensor.code == DL_FLOAT and tensor.bits in (16, 32, 64)


cdef cnp.ndarray view(DLTensor *tensor, bfloat16=BFLOAT16):
    """Return an ndarray over the tensor's memory, which it does not keep alive.

    `bfloat16` is the dtype for one of bfloat16.
    """
    cdef cnp.npy_intp strides[64]
    cdef cnp.npy_intp size = 1
    cdef int axis
    cdef cnp.npy_intp dense = tensor.bits // 8
    if tensor.device_type != DL_CPU:
        raise TypeError("not in the CPU's memory")
    dtype = dtypes.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if dtype is None:
        raise TypeError("neither float32, float64, bfloat16 nor float16")
    if dtype is BFLOAT16:
        dtype = bfloat16
    if tensor.ndim > 64:
        raise TypeError("more than 64 axes")
    for axis in range(tensor.ndim - 1, -1, -1):
        size *= tensor.shape[axis]
        strides[axis] = dense
        if tensor.strides != NULL:  # else in C order
            strides[axis] = tensor.strides[axis] * (tensor.bits // 8)
        dense *= tensor.shape[axis]
    if tensor.data == NULL and size > 0:
        raise TypeError("has no memory")
    Py_INCREF(dtype)  # a reference for the array
    return PyArray_NewFromDescr(
        cnp.ndarray, dtype, tensor.ndim, <cnp.npy_intp *>tensor.shape, strides, address(tensor),
        cnp.NPY_ARRAY_WRITEABLE, NULL,
    )


def as_array(kind, tensor):
    """Return an ndarray over a tensor's memory, which it does not keep alive.

    Raises TypeError, or what the tensor's library raises, if the tensor is not of a type that the
    core can use, in the CPU's memory. An array of bfloat16 is one of BFLOAT16.
    `kind` is the type whose table is used: the tensor's own, or a base.
    """
    cdef DLTensor read
    if not isinstance(tensor, kind):
        raise TypeError(f"expected a {kind.__name__}, got {type(tensor).__name__}")
    reader(kind)(<PyObject *>tensor, &read)
    return view(&read)


def extent(kind, tensor):
    """Return the addresses between which a tensor's memory is now."""
    cdef DLTensor read
    cdef size_t low, high
    reader(kind)(<PyObject *>tensor, &read)
    find_extent(&read, &low, &high)
    return low, high


cdef int find_extent(DLTensor *read, size_t *low, size_t *high) except -1:
    cdef int axis
    cdef int64_t item, reach, size = 1
    if read.device_type != DL_CPU:
        raise TypeError("not in the CPU's memory")
    if read.data == NULL:
        low[0] = high[0] = 0
        return 0
    item = (read.bits * read.lanes + 7) // 8
    low[0] = high[0] = <size_t>address(read)
    for axis in range(read.ndim - 1, -1, -1):
        reach = (read.shape[axis] - 1) * item
        reach *= read.strides[axis] if read.strides != NULL else size
        size *= read.shape[axis]
        if reach < 0:
            low[0] += reach
        else:
            high[0] += reach
    high[0] = high[0] + item if size > 0 else low[0]
    return 0


cdef bint has_extent(Reader read_tensor, tensor, size_t *low, size_t *high):
    """Find the addresses of a tensor's memory; False if it has none, or none that can be read."""
    cdef DLTensor read
    try:
        read_tensor(<PyObject *>tensor, &read)
        find_extent(&read, low, high)
    except Exception:
        return False
    return low[0] < high[0]


cdef bint spans(cnp.ndarray array, size_t *low, size_t *high) noexcept:
    """Find the addresses of an array's memory; False if it is empty."""
    cdef int axis
    cdef cnp.npy_intp reach
    low[0] = <size_t>cnp.PyArray_DATA(array)
    high[0] = low[0] + cnp.PyArray_ITEMSIZE(array)
    for axis in range(cnp.PyArray_NDIM(array)):
        reach = cnp.PyArray_DIM(array, axis) - 1
        if reach < 0:
            return False
        high[0] += reach * cnp.PyArray_STRIDE(array, axis)  # which no tensor has below 0
    return True


cdef void merge_overlapping(Table *table) noexcept nogil:
    """Make one extent of those that overlap, so that no two do."""
    cdef Py_ssize_t k, last = 0
    for k in range(1, table.count):
        if table.extents[k].low < table.extents[last].high:
            table.extents[last].high = max(table.extents[last].high, table.extents[k].high)
        else:
            last += 1
            table.extents[last] = table.extents[k]
    table.count = min(table.count, last + 1)


def meet(kind, list tensors not None, arrays not None):
    """Tell whether a tensor lies between the addresses of one of the arrays, or around it.

    Tensors whose memory cannot be read lie nowhere, and neither do arrays that are None.
    """
    cdef Reader read_tensor = reader(kind)
    cdef size_t low, high
    cdef Table table = Table(NULL, 0)
    cdef Py_ssize_t place
    table.extents = <Extent *>PyMem_Calloc(len(tensors) + 1, sizeof(Extent))
    if table.extents == NULL:
        raise MemoryError
    try:
        for tensor in tensors:
            if has_extent(read_tensor, tensor, &low, &high):
                enter(&table, <char *>low, <char *>high, 0)
        sort_table(&table)
        merge_overlapping(&table)
        for array in arrays:
            if table.count > 0 and array is not None and spans(array, &low, &high):
                place = place_above(&table, <char *>low)
                if next_below(&table, <char *>high, &place) != NULL:
                    return True
        return False
    finally:
        PyMem_Free(table.extents)
