# cython: language_level=3, boundscheck=False, wraparound=False
"""Arrays and tensors of another library, shown to a plan as ndarrays.

Tensors are read through DLPack's C exchange API: a table of functions that a tensor type carries,
of which one fills in address, shape, strides and dtype without allocating anything. So no library
is needed here, neither to build nor to import. What a tensor is for is its adapter's business.
"""

cimport numpy as cnp
from cpython.dict cimport PyDict_Check, PyDict_Next
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport qsort
from libc.string cimport memcmp, memcpy

import numpy as np

from fastopt._core import from_dlpack

cnp.import_array()


cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyArrayObject_fields:
        char *data
    object PyArray_New(
        type subtype, int ndim, const cnp.npy_intp *shape, int type_num,
        const cnp.npy_intp *strides, void *data, int itemsize, int flags, PyObject *like,
    )


# As DLPack 1.x defines them (dlpack.h).
cdef enum:
    DL_MAJOR_VERSION = 1
    DL_CPU = 1
    DL_FLOAT = 2

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


cdef cnp.ndarray view(DLTensor *tensor):
    """Return an ndarray over the tensor's memory, which it does not keep alive."""
    cdef cnp.npy_intp strides[64]
    cdef cnp.npy_intp size = 1
    cdef int axis
    cdef cnp.npy_intp dense = tensor.bits // 8
    if tensor.device_type != DL_CPU:
        raise TypeError("not in the CPU's memory")
    if tensor.code != DL_FLOAT or tensor.bits not in (32, 64) or tensor.lanes != 1:
        raise TypeError("neither float32 nor float64")
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
    return PyArray_New(
        cnp.ndarray, tensor.ndim, <cnp.npy_intp *>tensor.shape,
        cnp.NPY_FLOAT32 if tensor.bits == 32 else cnp.NPY_FLOAT64,
        strides, address(tensor), 0, cnp.NPY_ARRAY_WRITEABLE, NULL,
    )


def as_array(kind, tensor):
    """Return an ndarray over a tensor's memory, which it does not keep alive.

    Raises TypeError, or what the tensor's library raises, if the tensor is not float32 or float64
    in the CPU's memory. `kind` is the type whose table is used: the tensor's own, or a base.
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


cdef struct Extent:
    size_t low
    size_t high


cdef int by_low(const void *a, const void *b) noexcept nogil:
    cdef size_t first = (<const Extent *>a).low, second = (<const Extent *>b).low
    return (first > second) - (first < second)


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


def meet(kind, list tensors not None, arrays not None):
    """Tell whether a tensor lies between the addresses of one of the arrays, or around it.

    Tensors whose memory cannot be read lie nowhere, and neither do arrays that are None.
    """
    cdef Reader read_tensor = reader(kind)
    cdef size_t low, high
    cdef Py_ssize_t count = 0, last = 0, left, right, middle, k
    cdef Extent *extents = <Extent *>PyMem_Calloc(len(tensors) + 1, sizeof(Extent))
    if extents == NULL:
        raise MemoryError
    try:
        for tensor in tensors:
            if has_extent(read_tensor, tensor, &low, &high):
                extents[count].low = low
                extents[count].high = high
                count += 1
        if count == 0:
            return False
        qsort(extents, count, sizeof(Extent), by_low)
        for k in range(1, count):  # those that meet become one
            if extents[k].low < extents[last].high:
                extents[last].high = max(extents[last].high, extents[k].high)
            else:
                last += 1
                extents[last] = extents[k]
        for array in arrays:
            if array is None or not spans(array, &low, &high):
                continue
            if low >= extents[last].high or high <= extents[0].low:
                continue
            left, right = 0, last + 1
            while left < right:  # the first that ends above `low`
                middle = (left + right) // 2
                if extents[middle].high > low:
                    right = middle
                else:
                    left = middle + 1
            if left <= last and extents[left].low < high:
                return True
        return False
    finally:
        PyMem_Free(extents)


# ---- tensors that lend their memory --------------------------------------------------------------

cdef class Loan:
    """A tensor's memory, kept for as long as an array uses it."""

    cdef ManagedTensor *managed

    def __dealloc__(self):
        if self.managed != NULL and self.managed.deleter != NULL:
            self.managed.deleter(self.managed)


def borrow(kind, given):
    """Return an ndarray over a tensor's memory, which it keeps alive."""
    cdef DLPackExchangeAPI *api = exchange_api(kind)
    cdef Loan loan = Loan.__new__(Loan)
    cdef cnp.ndarray array
    if getattr(given, "is_neg", None) is not None and given.is_neg():
        raise TypeError("it holds the negatives of its elements; give its .resolve_neg()")
    if api.managed_tensor_from_py_object_no_sync == NULL:
        return from_dlpack(given)
    api.managed_tensor_from_py_object_no_sync(<PyObject *>given, &loan.managed)
    if loan.managed.flags & DL_IS_COPIED:
        raise TypeError("it would be copied")
    array = view(&loan.managed.tensor)
    cnp.set_array_base(array, loan)
    if loan.managed.flags & DL_READ_ONLY:
        array.flags.writeable = False
    return array


# ---- a quicker look at PyTorch's tensors ---------------------------------------------------------

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


# ---- tensors that an adapter watches -------------------------------------------------------------

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
    # Not a tensor without memory: it has no address by which one of another device would differ.
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


cdef class Tensors:
    """Tensors whose memory a plan borrows: are they still where and what they were?

    Parameters
    ----------
    kind : type
        The type whose table is used.
    tensors : list
        Instances of it; kept alive.

    borrow : bool
        Whether to make arrays, which only those of float32 and float64 have.

    Attributes
    ----------
    arrays : list of numpy.ndarray
        Views of the tensors, valid for as long as `in_place` returns True.
    """

    cdef Reader read
    cdef tuple tensors
    cdef readonly list arrays
    cdef Seen *seen
    cdef Py_ssize_t count  # which __dealloc__ needs, where the tuple may be gone

    def __cinit__(self, kind not None, list tensors not None, bint borrow=True):
        cdef DLTensor now
        cdef Py_ssize_t k
        self.read = reader(kind)
        self.tensors = tuple(tensors)
        self.count = len(self.tensors)
        self.arrays = [as_array(kind, tensor) for tensor in self.tensors] if borrow else []
        self.seen = <Seen *>PyMem_Calloc(self.count + 1, sizeof(Seen))
        if self.seen == NULL:
            raise MemoryError
        for k in range(self.count):
            tensor = self.tensors[k]
            self.read(<PyObject *>tensor, &now)
            note(&self.seen[k], <PyObject *>tensor, &now, is_one_of(tensor, direct_kinds))

    def __dealloc__(self):
        cdef Py_ssize_t k
        if self.seen != NULL:
            for k in range(self.count):
                PyMem_Free(self.seen[k].shape)
        PyMem_Free(self.seen)

    def in_place(self):
        """Tell whether no tensor has moved in memory, or changed its shape, strides or dtype."""
        cdef DLTensor now
        cdef Seen *seen
        cdef Py_ssize_t k
        for k in range(self.count):
            seen = &self.seen[k]
            tensor = self.tensors[k]
            if seen.direct:
                if find_alike(seen, handle_of(<PyObject *>tensor)) != seen.data:
                    return False
                continue
            try:
                self.read(<PyObject *>tensor, &now)
            except Exception:  # the library's own: there is nothing to read any more
                return False
            if (
                address(&now) != seen.data
                or now.device_type != seen.device_type
                or now.code != seen.code
                or now.bits != seen.bits
                or now.lanes != seen.lanes
                or not lies_as(seen, now.ndim, now.shape, now.strides)
            ):
                return False
        return True


cdef class Gradients:
    """The gradients of parameters, as ndarrays whose addresses follow them from step to step.

    Parameters
    ----------
    kind : type
        The type whose table is used.
    kinds : tuple of type
        The types that a gradient may have, exactly.
    params : list
        Parameters; their gradients are their attribute ``grad``.
    arrays : list of numpy.ndarray
        Views of the parameters: what a gradient has to match in shape and dtype.
    without : list
        Parameters that are expected to have no gradient.

    Attributes
    ----------
    missing : int
        How many of `params` had no gradient when they were last read.
    """

    cdef Reader reader
    cdef tuple kinds
    cdef tuple params
    cdef tuple arrays
    cdef tuple without
    cdef list own   # an ndarray for each gradient so far, or None
    cdef Seen *seen  # how those lay that PyTorch's functions can look at
    cdef bint direct
    cdef Py_ssize_t count
    cdef list held  # the gradients between read() and release()
    cdef readonly Py_ssize_t missing

    def __cinit__(
        self, kind not None, tuple kinds not None, list params not None,
        list arrays not None, list without not None,
    ):
        self.reader = reader(kind)
        self.kinds = kinds
        self.params, self.arrays, self.without = tuple(params), tuple(arrays), tuple(without)
        self.count = len(params)
        self.own = [None] * self.count
        self.held = [None] * self.count
        self.direct = all([kind in direct_kinds for kind in kinds])
        self.seen = <Seen *>PyMem_Calloc(self.count + 1, sizeof(Seen))
        if self.seen == NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef Py_ssize_t i
        if self.seen != NULL:
            for i in range(self.count):
                PyMem_Free(self.seen[i].shape)
        PyMem_Free(self.seen)

    def read(self):
        """Return an ndarray or None for each gradient; or None, if one is not fit for a plan.

        The gradients are kept alive until `release`.
        """
        cdef Py_ssize_t i
        cdef Seen *seen
        cdef char *data
        cdef list result = [None] * self.count
        self.missing = 0
        for param in self.without:
            if param.grad is not None:
                return None
        for i in range(self.count):
            grad = (<object>self.params[i]).grad
            if grad is None:
                self.missing += 1
                continue
            if not is_one_of(grad, self.kinds):
                self.release()
                return None
            seen = &self.seen[i]
            data = find_alike(seen, handle_of(<PyObject *>grad)) if seen.direct else NULL
            if data != NULL:
                if data != seen.data:
                    seen.data = data
                    (<PyArrayObject_fields *><PyObject *>self.own[i]).data = data
                self.held[i] = grad
            elif not self._bind(i, grad):
                self.release()
                return None
            result[i] = self.own[i]
        return result

    def release(self):
        """Let go of the gradients."""
        cdef Py_ssize_t i
        for i in range(self.count):
            self.held[i] = None

    cdef bint _bind(self, Py_ssize_t i, grad):
        """Make own[i] a view of this gradient; tell whether it is fit."""
        cdef DLTensor now
        cdef Seen *seen = &self.seen[i]
        cdef cnp.ndarray param = self.arrays[i], array
        cdef int ndim = cnp.PyArray_NDIM(param), axis
        cdef cnp.npy_intp stride
        cdef bint alike
        cdef bint dense = True
        seen.direct = False
        try:
            self.reader(<PyObject *>grad, &now)
        except Exception:  # the library's own: a tensor without memory, of an odd layout or dtype
            return False
        if (
            now.device_type != DL_CPU
            or now.code != DL_FLOAT
            or now.bits != 8 * cnp.PyArray_ITEMSIZE(param)
            or now.lanes != 1
            or now.ndim != ndim
            or (ndim > 0 and memcmp(now.shape, cnp.PyArray_DIMS(param), ndim * sizeof(int64_t)))
            or (now.data == NULL and cnp.PyArray_SIZE(param) > 0)
        ):
            return False
        array = self.own[i]
        alike = array is not None
        for axis in range(ndim):
            stride = now.strides[axis] * (now.bits // 8)
            if alike and cnp.PyArray_STRIDE(array, axis) != stride:
                alike = False
            if cnp.PyArray_STRIDE(param, axis) != stride:
                dense = False
        # A view may hold the negatives of its elements (the imaginary part of a conjugate). Such a
        # view has gaps, unlike a parameter, if it has more than one element.
        if (not alike or not dense or cnp.PyArray_SIZE(param) <= 1) and grad.is_neg():
            return False
        if not alike:
            self.own[i] = view(&now)
        elif cnp.PyArray_SIZE(param) > 0:
            (<PyArrayObject_fields *>array).data = address(&now)
        if self.direct and dense and cnp.PyArray_SIZE(param) > 1:
            note(seen, <PyObject *>grad, &now, True)
        self.held[i] = grad
        return True


cdef class Counters:
    """Step counters that are floats in a tensor, and integers to a plan.

    Parameters
    ----------
    arrays : list of numpy.ndarray or None
        0-d arrays of float32 or float64. None: the plan's integer is all there is; it starts at
        what `starts` says.
    starts : list of int
        Used where there is None.
    """

    cdef tuple floats
    cdef cnp.ndarray integers
    cdef int64_t *count

    def __cinit__(self, list arrays not None, list starts not None):
        self.floats = tuple(arrays)
        self.integers = np.array(starts, np.int64)
        self.count = <int64_t *>cnp.PyArray_DATA(self.integers)

    @property
    def arrays(self):
        """The integers, each a 0-d int64 array."""
        return [self.integers[i, ...] for i in range(len(self.floats))]

    def read(self):
        """Take over the floats; tell whether all of them are whole numbers."""
        cdef Py_ssize_t i
        cdef double value
        for i in range(len(self.floats)):
            array = self.floats[i]
            if array is None:
                continue
            if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32:
                value = (<float *>cnp.PyArray_DATA(array))[0]
            else:
                value = (<double *>cnp.PyArray_DATA(array))[0]
            if not 0 <= value < 2.0**62 or <double><int64_t>value != value:
                return False
            self.count[i] = <int64_t>value
        return True

    def write(self):
        """Set the floats to the integers."""
        cdef Py_ssize_t i
        for i in range(len(self.floats)):
            array = self.floats[i]
            if array is None:
                continue
            if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32:
                (<float *>cnp.PyArray_DATA(array))[0] = <float>self.count[i]
            else:
                (<double *>cnp.PyArray_DATA(array))[0] = <double>self.count[i]


cdef class Snapshot:
    """What dicts and lists hold: are these still the same objects?

    Parameters
    ----------
    containers : list of dict or list
        They are watched, and kept alive with what they hold.
    """

    cdef tuple containers
    cdef tuple held    # what they held, one after the other; of a dict, keys and values by turns
    cdef list lengths  # of their parts of `held`

    def __cinit__(self, list containers not None):
        cdef list held = [], lengths = []
        for container in containers:
            parts = container
            if isinstance(container, dict):
                parts = [part for item in container.items() for part in item]
            held.extend(parts)
            lengths.append(len(parts))
        self.containers, self.held, self.lengths = tuple(containers), tuple(held), lengths

    def unchanged(self):
        """Tell whether every container holds the objects that it held."""
        cdef Py_ssize_t i, k = 0, j, position
        cdef PyObject *key
        cdef PyObject *value
        cdef tuple containers = self.containers, parts = self.held
        cdef list items
        for i in range(len(containers)):
            container = containers[i]
            if PyDict_Check(container):
                if 2 * len(<dict>container) != <Py_ssize_t>self.lengths[i]:
                    return False
                position = 0
                while PyDict_Next(container, &position, &key, &value):
                    if <PyObject *>parts[k] != key or <PyObject *>parts[k + 1] != value:
                        return False
                    k += 2
            else:
                items = container
                if len(items) != <Py_ssize_t>self.lengths[i]:
                    return False
                for j in range(len(items)):
                    if items[j] is not parts[k + j]:
                        return False
                k += len(items)
        return True
