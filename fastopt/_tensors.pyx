# cython: language_level=3, boundscheck=False, wraparound=False
"""Arrays and tensors of another library, shown to a plan as ndarrays.

Tensors are read through DLPack's C exchange API: a table of functions that a tensor type carries,
of which one fills in address, shape, strides and dtype without allocating anything. So no library
is needed here, neither to build nor to import. PyTorch's tensors can be looked at more quickly,
with functions that its adapter brings (bridge/look.pxi). What a tensor is for is its adapter's
business.
"""

cimport numpy as cnp
from cpython.dict cimport PyDict_Check, PyDict_Next
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport qsort
from libc.string cimport memcmp, memcpy

import numpy as np

from fastopt._rows import Rows

cnp.import_array()

include "bridge/extents.pxi"
include "bridge/dlpack.pxi"
include "bridge/look.pxi"


# ---- tensors that lend their memory --------------------------------------------------------------

cdef class Loan:
    """A tensor's memory, kept for as long as an array uses it."""

    cdef ManagedTensor *managed

    def __dealloc__(self):
        if self.managed != NULL and self.managed.deleter != NULL:
            self.managed.deleter(self.managed)


def borrow(kind, given):
    """Return an ndarray over a tensor's memory, which it keeps alive; None if its type cannot."""
    cdef DLPackExchangeAPI *api = exchange_api(kind)
    cdef Loan loan = Loan.__new__(Loan)
    cdef cnp.ndarray array
    if getattr(given, "is_neg", None) is not None and given.is_neg():
        raise TypeError("it holds the negatives of its elements; give its .resolve_neg()")
    if api.managed_tensor_from_py_object_no_sync == NULL:
        return None
    api.managed_tensor_from_py_object_no_sync(<PyObject *>given, &loan.managed)
    if loan.managed.flags & DL_IS_COPIED:
        raise TypeError("it would be copied")
    bfloat16 = BFLOAT16
    if loan.managed.tensor.code == DL_BFLOAT:
        from fastopt._bfloat16 import bfloat16

        bfloat16 = bfloat16("an array over a tensor of bfloat16")
    array = view(&loan.managed.tensor, bfloat16)
    cnp.set_array_base(array, loan)
    if loan.managed.flags & DL_READ_ONLY:
        array.flags.writeable = False
    return array


# ---- tensors that an adapter watches -------------------------------------------------------------

cdef class Tensors:
    """Tensors whose memory a plan borrows: are they still where and what they were?

    Parameters
    ----------
    kind : type
        The type whose table is used.
    tensors : list
        Instances of it; kept alive.

    borrow : bool
        Whether to make arrays, which not all have.

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
        Views of the parameters: what a gradient has to match in shape. Its dtype may be any whose
        values float32 has, or beside float64 any.
    without : list
        Parameters that are expected to have no gradient.
    by_rows : list of bool, optional
        For each of `params`, whether its gradient is expected to be one of some rows: a sparse
        tensor, by the first axis.
    part : callable, optional
        Takes a parameter and a gradient of a type that is not among `kinds`, and returns the tensor
        to take for it, or None: there is none.

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
    cdef tuple by_rows
    cdef object part
    cdef list own   # an ndarray for each gradient so far, or None
    cdef Seen *seen  # how those lay that PyTorch's functions can look at
    cdef bint direct
    cdef Py_ssize_t count
    cdef list held  # the gradients between read() and release()
    cdef readonly Py_ssize_t missing

    def __cinit__(
        self, kind not None, tuple kinds not None, list params not None,
        list arrays not None, list without not None, list by_rows=None, part=None,
    ):
        self.reader = reader(kind)
        self.part = part
        self.kinds = kinds
        self.by_rows = (False,) * len(params) if by_rows is None else tuple(by_rows)
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
        """Return an ndarray, Rows or None for each gradient; or None, if one is not fit for a plan.

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
                grad = None if self.part is None else self.part(self.params[i], grad)
                if grad is None or not is_one_of(grad, self.kinds):
                    self.release()
                    return None
            if self.by_rows[i]:
                result[i] = self._read_rows(i, grad)
                if result[i] is None:
                    self.release()
                    return None
                continue
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

    cdef _read_rows(self, Py_ssize_t i, grad):
        """Return a sparse gradient as Rows, of which the values are a view; None: it is not fit."""
        cdef DLTensor now
        cdef cnp.ndarray param = self.arrays[i]
        if not grad.is_sparse or grad.sparse_dim() != 1 or grad.shape != (<object>param).shape:
            return None
        values = grad._values()
        try:
            indices = grad._indices()[0].numpy()
            self.reader(<PyObject *>values, &now)
        except Exception:  # the library's own: of another device, say
            return None
        if (
            now.device_type != DL_CPU
            or not is_float(&now)
            or (now.bits == 64 and cnp.PyArray_TYPE(param) != cnp.NPY_FLOAT64)
            or values.is_neg()
        ):
            return None
        self.held[i] = grad, values
        return Rows(indices, view(&now))

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
            or not is_float(&now)
            or (now.bits == 64 and cnp.PyArray_TYPE(param) != cnp.NPY_FLOAT64)
            or now.ndim != ndim
            or (ndim > 0 and memcmp(now.shape, cnp.PyArray_DIMS(param), ndim * sizeof(int64_t)))
            or (now.data == NULL and cnp.PyArray_SIZE(param) > 0)
        ):
            return False
        array = self.own[i]
        alike = array is not None and array.dtype == dtypes[now.code, now.bits]
        for axis in range(ndim):
            stride = now.strides[axis] * (now.bits // 8)
            if alike and cnp.PyArray_STRIDE(array, axis) != stride:
                alike = False
            if cnp.PyArray_STRIDE(param, axis) != now.strides[axis] * cnp.PyArray_ITEMSIZE(param):
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


cdef double value_of(cnp.ndarray array) noexcept:
    """Return the value of a 0-d array of float32 or float64."""
    if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32:
        return (<float *>cnp.PyArray_DATA(array))[0]
    return (<double *>cnp.PyArray_DATA(array))[0]


cdef void set_value(cnp.ndarray array, double value) noexcept:
    """Set a 0-d array of float32 or float64."""
    if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32:
        (<float *>cnp.PyArray_DATA(array))[0] = <float>value
    else:
        (<double *>cnp.PyArray_DATA(array))[0] = value


cdef class Counters:
    """Step counters that are floats in a tensor or integers in a dict, and integers to a plan.

    With them goes the number that a rule may keep of each parameter, a double to a plan.

    Parameters
    ----------
    arrays : list of numpy.ndarray or None
        0-d arrays of float32 or float64. None: the plan's integer is all there is; it starts at
        what `starts` says.
    starts : list of int
        Used where there is None.
    dicts : list of dict or None
        Where integers are, under ``"step"``, and no arrays.
    numbers : list of numpy.ndarray
        0-d arrays of float32 or float64; empty for a rule that keeps none.
    """

    cdef tuple floats, kept
    cdef list dicts
    cdef cnp.ndarray integers
    cdef int64_t *count
    cdef cnp.ndarray doubles
    cdef double *number

    def __cinit__(
        self, list arrays not None, list starts not None, list dicts, list numbers not None
    ):
        self.floats, self.kept, self.dicts = tuple(arrays), tuple(numbers), dicts
        self.doubles = np.ones(len(numbers))
        self.number = <double *>cnp.PyArray_DATA(self.doubles)
        self.integers = np.array(starts, np.int64)
        self.count = <int64_t *>cnp.PyArray_DATA(self.integers)

    @property
    def arrays(self):
        """The integers, each a 0-d int64 array."""
        return [self.integers[i, ...] for i in range(len(self.floats))]

    @property
    def numbers(self):
        """The doubles, each a 0-d array."""
        return [self.doubles[i, ...] for i in range(len(self.kept))]

    def read(self):
        """Take over the counters; tell whether all of them are whole numbers, as expected."""
        cdef Py_ssize_t i
        cdef double value
        for i in range(len(self.kept)):
            self.number[i] = value_of(self.kept[i])
        if self.dicts is not None:
            for i in range(len(self.floats)):
                step = self.dicts[i].get("step")
                if type(step) is not int or not 0 <= step < 2**62:
                    return False
                self.count[i] = step
            return True
        for i in range(len(self.floats)):
            array = self.floats[i]
            if array is None:
                continue
            value = value_of(array)
            if not 0 <= value < 2.0**62 or <double><int64_t>value != value:
                return False
            self.count[i] = <int64_t>value
        return True

    def write(self):
        """Set the counters to the plan's integers, and the numbers to its doubles."""
        cdef Py_ssize_t i
        for i in range(len(self.kept)):
            set_value(self.kept[i], self.number[i])
        if self.dicts is not None:
            for i in range(len(self.floats)):
                self.dicts[i]["step"] = self.count[i]
            return
        for i in range(len(self.floats)):
            array = self.floats[i]
            if array is not None:
                set_value(array, <double>self.count[i])


cdef class Snapshot:
    """What dicts and lists hold: are these still the same objects?

    Parameters
    ----------
    containers : list of dict or list
        They are watched, and kept alive with what they hold.
    except_for : str, optional
        A key of dicts under which there may be another object.
    """

    cdef str except_for
    cdef tuple containers
    cdef tuple held    # what they held, one after the other; of a dict, keys and values by turns
    cdef list lengths  # of their parts of `held`

    def __cinit__(self, list containers not None, str except_for=None):
        cdef list held = [], lengths = []
        self.except_for = except_for
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
                    if <PyObject *>parts[k] != key or (
                        <PyObject *>parts[k + 1] != value
                        and not (type(parts[k]) is str and parts[k] == self.except_for)
                    ):
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
