# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""The bridge between NumPy arrays and the C core.

It checks arrays, binds their memory to a C plan and runs the plan's step. It knows arrays, not
algorithms: what a rule's hyperparameters and slots mean is the rule's business.
"""

cimport cython
cimport numpy as cnp
from cpython.buffer cimport (
    PyBUF_FULL_RO,
    PyBuffer_Release,
    PyObject_CheckBuffer,
    PyObject_GetBuffer,
)
from cpython.dict cimport PyDict_Next, PyDict_SetItem
from cpython.exc cimport PyErr_CheckSignals
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_Check
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.pycapsule cimport PyCapsule_CheckExact, PyCapsule_IsValid, PyCapsule_New
from cpython.pythread cimport (
    NOWAIT_LOCK,
    PY_LOCK_ACQUIRED,
    PyLockStatus,
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_get_thread_ident,
    PyThread_release_lock,
    PyThread_type_lock,
)
from cpython.ref cimport PyObject
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint32_t
from libc.stdlib cimport qsort
from libc.string cimport memcmp, memcpy, memset

from fastopt._internals cimport *

import os
import sys
from collections.abc import Mapping

import numpy as np

cnp.import_array()


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


cdef extern from "Python.h":
    PyObject *list_item "PyList_GET_ITEM"(PyObject *items, Py_ssize_t i) nogil
    PyObject *tuple_item "PyTuple_GET_ITEM"(PyObject *items, Py_ssize_t i) nogil
    PyLockStatus PyThread_acquire_lock_timed(
        PyThread_type_lock, long long microseconds, int interruptible
    ) nogil


# The C interface, for fo_import() in fastopt.h.
_C_API = PyCapsule_New(<void *>fo_get_api(), "fastopt._core._C_API", NULL)

BLOCK = FO_BLOCK

# Elements below which a step keeps the GIL: dropping and taking it would cost more than it gives.
cdef int64_t KEEP_GIL_BELOW = 1 << 14


# ---- what was built, and what runs ---------------------------------------------------------------

def isa():
    """Instruction sets: those compiled in, those that can run here, and the one in use."""
    names = [fo_isa_name(i).decode() for i in range(fo_isa_count())]
    return {
        "compiled": names,
        "supported": [names[i] for i in range(fo_isa_count()) if fo_isa_supported(i)],
        "active": names[fo_isa_active()],
    }


def select_isa(str name):
    """Use the loops compiled for another instruction set, from the next step on."""
    if not fo_isa_select(name.encode()):
        raise ValueError(
            f"instruction set {name!r} is not supported here; choose one of {isa()['supported']}"
        )


def compiler():
    """Name and version of the C compiler that built this module."""
    return fo_compiler().decode()


def layers():
    """Threading layers: those there are, and the active one."""
    available = [
        fo_layer_name(<fo_layer>i).decode() for i in range(FO_LAYERS)
        if fo_layer_available(<fo_layer>i)
    ]
    return {"available": available, "active": fo_layer_name(fo_layer_active()).decode()}


def select_layer(str name):
    """Run steps by another threading layer, from the next one on."""
    if not fo_layer_select(name.encode()):
        raise ValueError(
            f"there is no threading layer {name!r} here; choose one of {layers()['available']}"
        )


def openmp_processors():
    """How many processors OpenMP's threads may have; 0 without that layer."""
    return fo_openmp_processors()


def forked_unseen():
    """Keep out of OpenMP's runtime: the process was forked before this module was loaded."""
    fo_note_fork()


cdef int threads_exact = 0


def set_threads(int limit):
    """Set the upper bound on threads for plans that have none of their own."""
    fo_set_num_threads(limit)


def get_threads():
    """Return the upper bound on threads for plans that have none of their own."""
    return fo_get_num_threads()


def force_threads(int team):
    """For tests: run every step with exactly this many threads (-1: all it may use); 0 ends it."""
    global threads_exact
    threads_exact = team


# ---- forks ---------------------------------------------------------------------------------------

# A child is a copy of its parent at one moment, but without its parent's other threads: what one of
# them was writing stays half written. So a plan notes that it is being written, and in which
# process.
cdef int64_t forks = 0  # that lie behind this process


def note_fork():
    """Take note that this process is a child that was forked just now."""
    global forks
    forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=note_fork)

TORN = (
    "this process was forked while another thread was inside a step: parameters and state are half "
    "of one step and half of the next. Put the parameters back, then call load_state_dict() or "
    "reset(), or make a new optimizer"
)


# ---- locks ---------------------------------------------------------------------------------------


cdef class Lock:
    """What ``threading.RLock`` is to a ``with`` statement; and to a step a third of its price."""

    cdef PyThread_type_lock lock
    cdef long owner      # the thread that holds it, or 0
    cdef Py_ssize_t depth

    def __cinit__(self):
        self.lock = PyThread_allocate_lock()
        if self.lock == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.lock != NULL:
            PyThread_free_lock(self.lock)

    cdef int take(self) except -1:
        """Wait for the lock; a signal's handler may raise meanwhile."""
        cdef long me = PyThread_get_thread_ident()
        cdef bint taken
        if self.owner != me:
            taken = PyThread_acquire_lock(self.lock, NOWAIT_LOCK)
            while not taken:
                with nogil:
                    taken = PyThread_acquire_lock_timed(self.lock, -1, True) == PY_LOCK_ACQUIRED
                if not taken:
                    PyErr_CheckSignals()
            self.owner = me
        self.depth += 1
        return 0

    cdef void give(self) noexcept:
        self.depth -= 1
        if self.depth == 0:
            self.owner = 0
            PyThread_release_lock(self.lock)

    def __enter__(self):
        self.take()

    def __exit__(self, *error):
        self.give()


# ---- rules ---------------------------------------------------------------------------------------

cdef tuple strings(const char *const *names):
    result = []
    while names[0] != NULL:
        result.append(names[0].decode())
        names += 1
    return tuple(result)


cdef class Rule:
    """A rule's hyperparameters and slots, as the C core lists them.

    `ranges` has the least and the greatest value of each hyperparameter; a NaN as the greatest says
    that it is a switch. `begins` are the slots of which a rule has to know whether a step has
    written them yet.
    """

    cdef const fo_rule *rule
    cdef readonly str name
    cdef readonly tuple hypers
    cdef readonly tuple slots
    cdef readonly tuple begins
    cdef readonly dict ranges

    def __cinit__(self, str name not None):
        self.rule = fo_find_rule(name.encode())
        if self.rule == NULL:
            raise ValueError(f"no rule named {name!r}")
        self.name = name
        self.hypers = strings(self.rule.hyper_names)
        self.ranges = {
            hyper: (self.rule.lows[j], self.rule.highs[j]) for j, hyper in enumerate(self.hypers)
        }
        self.slots = strings(self.rule.slot_names)
        self.begins = tuple(
            [slot for j, slot in enumerate(self.slots) if fo_rule_slot_begins(self.rule, j)]
        )

    def used_slots(self, row):
        """Names of the slots that a step with these hyperparameters touches."""
        cdef double values[FO_MAX_HYPERS]
        self.read_row(row, values)
        return tuple(
            name for j, name in enumerate(self.slots)
            if fo_rule_uses_slot(self.rule, values, j)
        )

    cdef int read_row(self, row, double *values) except -1:
        """Convert a row of hyperparameters."""
        if len(row) != len(self.hypers):
            raise ValueError(f"expected {len(self.hypers)} hyperparameters, got {len(row)}")
        for j in range(len(self.hypers)):
            values[j] = row[j]
        return 0


def rule_names():
    """Return the names of all rules."""
    return [fo_rules[i].name.decode() for i in range(fo_rule_count)]


# ---- arrays --------------------------------------------------------------------------------------

cdef inline bint is_native_float(cnp.ndarray array) noexcept:
    cdef int kind = cnp.PyArray_TYPE(array)
    return (kind == cnp.NPY_FLOAT32 or kind == cnp.NPY_FLOAT64) and cnp.PyArray_ISNOTSWAPPED(array)


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


cdef int refuse_masked(cnp.ndarray array, str name) except -1:
    """Raise for a masked array, whose mask nothing here would honour."""
    if not PyArray_CheckExact(array) and "numpy.ma" in sys.modules:
        if isinstance(array, sys.modules["numpy.ma"].MaskedArray):
            raise TypeError(f"{name}: a masked array; give its .data, or .filled(...)")
    return 0


def check_parameter(array, str name):
    """Raise unless the core can update the array in place."""
    cdef int axes[64]
    if not isinstance(array, cnp.ndarray):
        hint = hint_for(array)
        keep = ", and keep that: it is what will be updated" if hint else ""
        raise TypeError(f"{name}: expected a numpy.ndarray, got {type(array).__name__}{hint}{keep}")
    refuse_masked(array, name)
    if not is_native_float(array):
        raise TypeError(
            f"{name}: dtype {array.dtype} ({array.dtype.str}) is not supported; "
            "use float32 or float64 in native byte order"
        )
    if not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError(f"{name}: the array is read-only; parameters are updated in place")
    if not is_dense(array, axes, memory_order(array, axes)):
        raise ValueError(
            f"{name}: the array is not dense (shape {array.shape}, strides {array.strides}); its "
            "elements must fill one stretch of memory, in C, Fortran or another order of the axes"
        )


cdef bint describe_strided(
    cnp.ndarray param, cnp.ndarray grad, fo_tensor *tensor, Py_ssize_t **layout, char **low,
    char **high,
) except -1:
    """Describe a gradient in its parameter's memory order; tell whether it turns out dense.

    The description lies in `layout`, which is allocated if it is NULL; `low` and `high` are between
    which addresses the gradient lies.
    """
    cdef int axes[64]
    cdef int count = memory_order(param, axes), place, used
    cdef cnp.npy_intp itemsize = cnp.PyArray_ITEMSIZE(grad), dim, stride
    cdef Py_ssize_t *shape
    cdef Py_ssize_t *strides
    tensor.grad = low[0] = high[0] = cnp.PyArray_BYTES(grad)
    tensor.grad_ndim = 0
    if tensor.size == 0:
        return True
    if layout[0] == NULL:
        layout[0] = <Py_ssize_t *>PyMem_Calloc(2 * 64, sizeof(Py_ssize_t))
        if layout[0] == NULL:
            raise MemoryError
    shape, strides = layout[0], layout[0] + count
    high[0] += itemsize
    used = count  # written from the innermost axis outwards; neighbours that line up merge
    for place in range(count - 1, -1, -1):
        dim, stride = cnp.PyArray_DIM(grad, axes[place]), cnp.PyArray_STRIDE(grad, axes[place])
        if stride < 0:
            low[0] += (dim - 1) * stride
        else:
            high[0] += (dim - 1) * stride
        if used < count and stride == strides[used] * shape[used]:
            shape[used] *= dim
        else:
            used -= 1
            shape[used], strides[used] = dim, stride
    if used == count or (used == count - 1 and strides[used] == itemsize):
        return True
    tensor.grad_ndim = count - used
    tensor.grad_shape, tensor.grad_strides = shape + used, strides + used
    return False


cdef bint may_overlap_itself(cnp.ndarray grad):
    """Sorted by size, each stride must step over all that the smaller ones reach."""
    cdef int j
    reach = cnp.PyArray_ITEMSIZE(grad)
    axes = [
        (abs(cnp.PyArray_STRIDE(grad, j)), cnp.PyArray_DIM(grad, j))
        for j in range(cnp.PyArray_NDIM(grad))
    ]
    for stride, dim in sorted(axis for axis in axes if axis[1] > 1):
        if stride < reach:
            return True
        reach += stride * (dim - 1)
    return False


cdef int refuse_unlike(cnp.ndarray grad, cnp.ndarray param, str name) except -1:
    """Raise for a gradient whose dtype or shape is not its parameter's."""
    if cnp.PyArray_TYPE(grad) != cnp.PyArray_TYPE(param) or not cnp.PyArray_ISNOTSWAPPED(grad):
        raise TypeError(
            f"{name}: dtype {grad.dtype} ({grad.dtype.str}) is not the parameter's {param.dtype} "
            "in native byte order"
        )
    if not same_shape(grad, param):
        raise ValueError(
            f"{name}: shape {(<object>grad).shape} is not the parameter's {(<object>param).shape}"
        )
    return 0


cdef int refuse_to_zero(cnp.ndarray grad, bint dense, str name) except -1:
    """Raise for a gradient that cannot be zeroed in place."""
    if not cnp.PyArray_ISWRITEABLE(grad):
        raise ValueError(f"{name}: read-only, and zero_grad=True asks to zero it")
    if not dense and may_overlap_itself(grad):
        raise ValueError(
            f"{name}: its elements share memory (a broadcast array?), and zero_grad=True asks to "
            "zero it"
        )
    return 0


cdef as_gradient(given, cnp.ndarray param, str name, bint zero_grad):
    """Return an array over a gradient that is none. Runs code of the gradient's type."""
    if issubclass(type(given), np.generic) and cnp.PyArray_NDIM(param) == 0:
        if zero_grad:
            raise TypeError(
                f"{name}: a NumPy scalar cannot be zeroed in place, as zero_grad=True asks"
            )
        return np.asarray(given)
    array = array_over(given, name)
    if not isinstance(array, cnp.ndarray):
        raise TypeError(
            f"{name}: expected a numpy.ndarray of shape {(<object>param).shape} and dtype "
            f"{param.dtype}, or None; got {type(given).__name__}{hint_for(given)}"
        )
    return array


cdef bint share_memory(a, b):
    """Decide exactly, where that is not too much work, whether two arrays share memory."""
    try:
        return np.shares_memory(np.asarray(a), np.asarray(b), max_work=1_000_000)
    except np.exceptions.TooHardError:
        return True


def address(cnp.ndarray array not None):
    """Return where the memory of an array begins."""
    return <size_t>cnp.PyArray_DATA(array)


def lends_memory(given):
    """Tell whether an object is an array, a tensor, or has a buffer.

    Or is a table of which NumPy makes an array: then it is no container of arrays either.
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
    if "float32" not in dtype and "float64" not in dtype:
        return f"dtype {dtype} is not supported; use float32 or float64"
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
            return given.detach().numpy()
        if getattr(kind, "__dlpack_c_exchange_api__", None) is not None:
            from fastopt import _tensors  # which may need Python's lock; arrays do without

            return _tensors.borrow(kind, given)
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


def from_dlpack(given):
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


def check_lent(cnp.ndarray array not None, str name):
    """Raise if what lent an array its memory no longer has it there."""
    refuse_moved(array, name)


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


def set_items(list dicts, list items):
    """Set items of dicts, from a dict for each. Cannot fail where the keys are there."""
    cdef Py_ssize_t i, position
    cdef PyObject *key
    cdef PyObject *value
    for i in range(len(dicts)):
        position = 0
        while PyDict_Next(items[i], &position, &key, &value):
            PyDict_SetItem(dicts[i], <object>key, <object>value)


cdef bint has_items(dict group, tuple seen):
    """Tell whether a dict has these keys and values (two tuples), in this order, and no others."""
    cdef Py_ssize_t n = 0, position = 0
    cdef PyObject *key
    cdef PyObject *value
    cdef tuple keys = seen[0], values = seen[1]
    while PyDict_Next(group, &position, &key, &value):
        if n >= len(values) or <PyObject *>values[n] != value or <PyObject *>keys[n] != key:
            return False
        n += 1
    return n == len(values)


cpdef bint unchanged(groups, list seen):
    """Tell whether the keys and values of these dicts are still the objects that were seen.

    If nothing was seen (None), they are not.
    """
    cdef Py_ssize_t i
    cdef bint same
    if seen is None or type(groups) is not list or len(groups) != len(seen):
        return False
    for i, group in enumerate(groups):
        if type(group) is not dict:
            return False
        with cython.critical_section(group):
            same = has_items(<dict>group, <tuple>seen[i])
        if not same:
            return False
    return True


# Besides the slots, what the arrays that go with a parameter are.
cdef enum:
    EMA = FO_MAX_SLOTS
    SUM


cdef struct Layout:
    Borrowed *array
    void *descr             # NumPy's one for the type
    char *data
    Py_ssize_t nbytes
    int type_num
    int ndim
    Py_ssize_t *shape       # then the strides, in the same allocation
    void **target           # where the C plan keeps the data's address


cdef inline bint laid_out_as(const Layout *layout, Borrowed *array) noexcept nogil:
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


cdef inline void *descr_for(int type_num):
    """Return where NumPy keeps its description of a type, for ever."""
    cdef object descr = cnp.PyArray_DescrFromType(type_num)
    return <void *>descr


cdef struct Extent:
    char *low
    char *high
    Py_ssize_t index


cdef int by_low(const void *a, const void *b) noexcept nogil:
    cdef char *x = (<const Extent *>a).low
    cdef char *y = (<const Extent *>b).low
    return (x > y) - (x < y)


cdef class StepResult:
    """What a step did.

    Attributes
    ----------
    grad_norm : float or None
        Euclidean norm of all unscaled gradients together, before clipping; None where the step
        needed no norm.
    skipped : bool
        Whether nothing was updated because a gradient held a NaN or an infinity.
    threads : int
        Number of threads that took part.
    """

    cdef fo_step_result result

    @property
    def grad_norm(self):
        return self.result.grad_norm if self.result.has_norm else None

    @property
    def skipped(self):
        return bool(self.result.skipped)

    @property
    def threads(self):
        return self.result.threads

    def __reduce__(self):
        out = self.result
        return step_result, (out.grad_norm if out.has_norm else None, self.skipped, out.threads)

    def __repr__(self):
        return (
            f"StepResult(grad_norm={self.grad_norm}, skipped={self.skipped}, "
            f"threads={self.threads})"
        )


def step_result(grad_norm, skipped, threads):
    """Return a StepResult with these attributes (they are copied and pickled so)."""
    cdef StepResult result = StepResult.__new__(StepResult)
    result.result.has_norm = grad_norm is not None
    result.result.grad_norm = grad_norm if grad_norm is not None else 0.0
    result.result.skipped = skipped
    result.result.threads = threads
    return result


@cython.final
cdef class Plan:
    """A C plan over arrays that belong to the caller, which it keeps alive and checks at each step.

    Parameters
    ----------
    rule : Rule
        The update rule.
    params : list of numpy.ndarray
        Arrays to update.
    slots : list of tuple
        For each parameter, its state arrays in the order of ``rule.slots``; None for one that is
        not kept. Each has its parameter's shape, dtype and memory order.
    ema : list of numpy.ndarray or None
        Averages of the parameters, laid out alike.
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
        Where the gradients of micro-batches are summed, laid out like the parameters.
    accumulate : int, optional
        Every so many steps update the parameters, with the mean gradient.
    accumulated_steps, summed : int and sequence of bool, optional
        How many micro-batches have been summed, and which sums hold anything.
    fresh : sequence of tuple of str, optional
        For each parameter the slots, of ``rule.begins``, that no step has written yet.
    lent : Lenders, optional
        What looks after parameters whose memory something else lends: ``of`` has the lenders by the
        parameters' numbers, ``in_place()`` tells whether all of it is where it was, and
        ``replaced`` has the numbers of those whose place in a module another has taken.

    Notes
    -----
    A plan is not locked: its owner sees to it that one thread at a time uses it (and hands its lock
    to ``step_settled``).
    """

    cdef fo_plan *plan
    cdef fo_tensor *tensors          # of the C plan
    cdef fo_step_args args
    cdef Rule rule
    cdef Py_ssize_t n, n_owned, n_groups, n_extents
    cdef readonly tuple names
    cdef readonly tuple owned        # parameters, then slots, then averages, then sums
    cdef readonly tuple owners       # for each owned array, its parameter
    cdef object lent                 # None, or looks after parameters whose memory is lent
    cdef list watched                # which other owned arrays lie in memory that is lent; or None
    cdef tuple steps                 # kept alive: the C plan counts in them
    cdef void *counter_descr         # NumPy's one for their type
    cdef Layout *layouts             # of the owned arrays
    cdef Extent *extents             # of owned arrays (not empty) and counters, by address
    cdef bint extents_sorted
    cdef Extent *grad_extents        # of the gradients last seen; index: whether dense
    cdef Extent *sorting
    cdef bint grads_known_apart
    cdef bint from_jax               # whether a gradient of this step is
    cdef int64_t writing             # 0, or 1 + `forks` when a step or a restoration began
    cdef Py_ssize_t **grad_layout    # shape and strides for the C core, made when first needed
    cdef public int num_threads
    cdef public size_t pool          # address of an fo_pool of num_threads, or 0
    cdef readonly list settled       # what `settle` was told; None: since then all may be different
    cdef bint direct
    cdef public int64_t completed_steps
    cdef readonly int64_t accumulated_steps

    def __cinit__(
        self, Rule rule not None, list params not None, list slots not None, list ema,
        list steps not None, list groups not None, list rows not None, list names not None,
        *, int semantics, int clip, double clip_limit, int nonfinite,
        double ema_decay, int num_threads, int64_t completed_steps,
        list sums=None, int64_t accumulate=1, int64_t accumulated_steps=0, summed=None, fresh=None,
        lent=None,
    ):
        cdef Py_ssize_t i, k = 0
        cdef fo_tensor *tensor
        cdef int j
        self.rule = rule
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
            ("sums", sums),
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
        self.owned, self.owners, self.n_owned = tuple(owned), tuple(owners), len(owned)

        self.n_groups = len(rows)
        self.plan = fo_plan_create(rule.rule, self.n_groups, self.n)
        self.counter_descr = descr_for(cnp.NPY_INT64)
        self.layouts = <Layout *>PyMem_Calloc(self.n_owned + 1, sizeof(Layout))
        self.extents = <Extent *>PyMem_Calloc(self.n_owned + self.n + 1, sizeof(Extent))
        self.grad_extents = <Extent *>PyMem_Calloc(self.n + 1, sizeof(Extent))
        self.sorting = <Extent *>PyMem_Calloc(self.n + 1, sizeof(Extent))
        self.grad_layout = <Py_ssize_t **>PyMem_Calloc(self.n + 1, sizeof(Py_ssize_t *))
        if (
            self.plan == NULL or self.layouts == NULL or self.extents == NULL
            or self.grad_extents == NULL or self.sorting == NULL or self.grad_layout == NULL
        ):
            raise MemoryError
        self.tensors = fo_plan_tensor(self.plan, 0)

        for k in range(self.n_owned):
            i = owners[k]
            array = self.owned[k]
            check_parameter(array, self._label(k))
            tensor = &self.tensors[i]
            if k < self.n:
                tensor.size = cnp.PyArray_SIZE(array)
                is_double = cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64
                tensor.dtype = fo_one_dtype(FO_F64 if is_double else FO_F32)
                tensor.group = groups[i]
                self.layouts[k].target = &tensor.param
            else:
                self._check_like(array, self.owned[i], self._label(k))
                j = targets[k - self.n]
                self.layouts[k].target = (
                    &tensor.ema if j == EMA else &tensor.sum if j == SUM else &tensor.slot[j]
                )
            self._remember(k, array)
        if fo_plan_prepare(self.plan) != FO_OK:
            raise MemoryError
        self.watched = [
            k for k in range(self.n_owned)
            if lender_of(self.layouts[k].array) != NULL
            and (lent is None or k >= self.n or k not in lent.of)
        ] or None
        self._read_owned()
        for k in range(self.n_groups):
            self.set_hypers(k, rows[k])
        self._set_kept(accumulated_steps, self._as_flags(summed), self._as_fresh(fresh))

    def __dealloc__(self):
        cdef Py_ssize_t k
        fo_plan_destroy(self.plan)
        if self.layouts != NULL:
            for k in range(self.n_owned):
                PyMem_Free(self.layouts[k].shape)
        if self.grad_layout != NULL:
            for k in range(self.n):
                PyMem_Free(self.grad_layout[k])
        PyMem_Free(self.layouts)
        PyMem_Free(self.extents)
        PyMem_Free(self.grad_extents)
        PyMem_Free(self.sorting)
        PyMem_Free(self.grad_layout)

    # ---- the owned arrays ------------------------------------------------------------------------

    cdef str _label(self, Py_ssize_t k):
        """Name the array of an extent: an owned one, or (beyond those) a counter."""
        name = self.names[self.owners[k] if k < self.n_owned else k - self.n_owned]
        return name if k < self.n else f"state of {name}"

    cdef _array(self, Py_ssize_t k):
        return self.owned[k] if k < self.n_owned else self.steps[k - self.n_owned]

    cdef _check_like(self, cnp.ndarray array, cnp.ndarray param, str label):
        cdef int axes[64]
        cdef int count = memory_order(param, axes), place
        a, p = <object>array, <object>param
        if a.shape != p.shape or a.dtype != p.dtype:
            raise ValueError(
                f"{label}: shape {a.shape} and dtype {a.dtype} do not match the parameter's "
                f"{p.shape} and {p.dtype}"
            )
        for place in range(count):
            if (
                cnp.PyArray_STRIDE(array, axes[place]) != cnp.PyArray_STRIDE(param, axes[place])
                and cnp.PyArray_SIZE(array) > 0
            ):
                raise ValueError(f"{label}: memory order differs from the parameter's")

    cdef int _remember(self, Py_ssize_t k, cnp.ndarray array) except -1:
        cdef Layout *layout = &self.layouts[k]
        cdef int ndim = cnp.PyArray_NDIM(array)
        layout.array = <Borrowed *><PyObject *>array
        layout.type_num = cnp.PyArray_TYPE(array)
        layout.descr = descr_for(layout.type_num)
        layout.ndim = ndim
        layout.nbytes = cnp.PyArray_NBYTES(array)
        layout.shape = <Py_ssize_t *>PyMem_Calloc(2 * ndim + 1, sizeof(Py_ssize_t))
        if layout.shape == NULL:
            raise MemoryError
        if ndim > 0:  # else NumPy has no shape to point to
            memcpy(layout.shape, cnp.PyArray_DIMS(array), ndim * sizeof(Py_ssize_t))
            memcpy(layout.shape + ndim, cnp.PyArray_STRIDES(array), ndim * sizeof(Py_ssize_t))
        return 0

    cdef int _read_owned(self) except -1:
        """Read every owned array's address anew; raise if anything else about it has changed."""
        cdef Py_ssize_t k
        cdef Layout *layout
        cdef Borrowed *counter
        cdef char *data
        for k in range(self.n_owned):
            layout = &self.layouts[k]
            if (
                descr_of(layout.array) != layout.descr
                or not laid_out_as(layout, layout.array)
                or not flags_of(layout.array) & cnp.NPY_ARRAY_WRITEABLE
            ):
                self._check_owned(k)
            data = data_of(layout.array)
            if data != layout.data:
                layout.data = data
                layout.target[0] = data
                self.extents_sorted = False
        for k in range(self.n):
            counter = <Borrowed *>tuple_item(<PyObject *>self.steps, k)
            if (
                descr_of(counter) != self.counter_descr
                or ndim_of(counter) != 0
                or flags_of(counter) & cnp.NPY_ARRAY_BEHAVED != cnp.NPY_ARRAY_BEHAVED
                or data_of(counter) != <char *>self.tensors[k].step
                or not 0 <= self.tensors[k].step[0] < INT64_MAX
            ):
                self._read_counter(k)
        if self.watched is not None:
            for k in self.watched:
                refuse_moved(self.owned[k], self._label(k))
        if not self.extents_sorted:
            self._sort_extents()
        return 0

    cdef int _check_owned(self, Py_ssize_t k) except -1:
        """Raise unless an owned array is what it was, but for its address."""
        cdef Layout *layout = &self.layouts[k]
        cdef cnp.ndarray array = self.owned[k]
        if (
            not laid_out_as(layout, layout.array)
            or cnp.PyArray_TYPE(array) != layout.type_num
            or not cnp.PyArray_ISNOTSWAPPED(array)
        ):
            shape = tuple([layout.shape[j] for j in range(layout.ndim)])
            raise ValueError(
                f"{self._label(k)}: shape, strides or dtype changed since the optimizer was "
                f"made: shape {shape} then, {self.owned[k].shape} of dtype {array.dtype} now"
            )
        if not cnp.PyArray_ISWRITEABLE(array):
            raise ValueError(f"{self._label(k)}: the array has become read-only")
        return 0

    cdef int _read_counter(self, Py_ssize_t i) except -1:
        """Read a step counter's address anew; raise unless the core can count on in it."""
        cdef fo_tensor *tensor = &self.tensors[i]
        cdef cnp.ndarray counter = <cnp.ndarray>self.steps[i]
        cdef int64_t *address
        if not cnp.PyArray_ISWRITEABLE(counter):
            raise ValueError(f"step counter of {self.names[i]}: the array is read-only")
        if (
            cnp.PyArray_NDIM(counter) != 0
            or not cnp.PyArray_ISSIGNED(counter)
            or cnp.PyArray_ITEMSIZE(counter) != sizeof(int64_t)
            or not cnp.PyArray_ISBEHAVED(counter)
        ):
            raise ValueError(
                f"step counter of {self.names[i]}: expected a 0-d int64 array, got shape "
                f"{self.steps[i].shape} and dtype {counter.dtype}"
            )
        address = <int64_t *>cnp.PyArray_DATA(counter)
        if address != tensor.step:
            tensor.step = address
            self.extents_sorted = False
        if not 0 <= tensor.step[0] < INT64_MAX:
            raise ValueError(
                f"step counter of {self.names[i]} must be >= 0 and < 2**63 - 1, got "
                f"{tensor.step[0]}"
            )
        return 0

    cdef int _sort_extents(self) except -1:
        cdef Py_ssize_t k, count = 0
        for k in range(self.n_owned):
            if self.layouts[k].nbytes == 0:  # it may lie inside another, which it does not overlap
                continue
            self.extents[count].low = self.layouts[k].data
            self.extents[count].high = self.layouts[k].data + self.layouts[k].nbytes
            self.extents[count].index = k
            count += 1
        for k in range(self.n):
            self.extents[count].low = <char *>self.tensors[k].step
            self.extents[count].high = self.extents[count].low + sizeof(int64_t)
            self.extents[count].index = self.n_owned + k
            count += 1
        self.n_extents = count
        qsort(self.extents, count, sizeof(Extent), by_low)
        for k in range(1, count):
            if self.extents[k].low < self.extents[k - 1].high:
                first, second = self.extents[k - 1].index, self.extents[k].index
                first, second = min(first, second), max(first, second)
                raise ValueError(
                    f"{self._label(second)} overlaps {self._label(first)} in memory; every "
                    "parameter needs memory of its own"
                )
        for k in range(self.n):
            self.grad_extents[k].low = self.grad_extents[k].high = NULL
        self.extents_sorted = True
        return 0

    # ---- gradients -------------------------------------------------------------------------------

    cdef inline bint _bound_before(
        self, Py_ssize_t i, PyObject *item, bint zero_grad
    ) noexcept nogil:
        """Whether a gradient is where and as the C plan was told at the last step."""
        cdef Layout *layout = &self.layouts[i]
        cdef Extent *extent = &self.grad_extents[i]
        cdef Borrowed *grad = <Borrowed *>item
        return (
            is_array(item)
            and lender_of(grad) == NULL
            and descr_of(grad) == layout.descr
            and data_of(grad) == extent.low
            and extent.index
            and laid_out_as(layout, grad)
            and (
                not zero_grad
                or (flags_of(grad) & cnp.NPY_ARRAY_WRITEABLE and extent.low != layout.data)
            )
        )

    cdef int _bind(self, Py_ssize_t i, list grads, bint zero_grad) except -1:
        """Check gradient i, and tell the C plan where it is and how it is laid out."""
        cdef fo_tensor *tensor = &self.tensors[i]
        cdef Layout *layout = &self.layouts[i]
        cdef Extent before = self.grad_extents[i]
        cdef cnp.ndarray grad
        cdef char *low
        cdef char *high
        cdef bint alike
        item = grads[i]
        # Until all is checked: what the C plan is told from here on is not what it was told then.
        self.grad_extents[i].low = self.grad_extents[i].high = NULL
        if item is None:
            tensor.grad = NULL
            return 0
        grad = <cnp.ndarray>item
        if not PyArray_CheckExact(item):
            refuse_masked(grad, f"gradient of {self.names[i]}")
        if lender_of(<Borrowed *><PyObject *>grad) != NULL:
            refuse_moved(grad, f"gradient of {self.names[i]}")
            self.from_jax |= is_from_jax(owner_of(<object>lender_of(<Borrowed *><PyObject *>grad)))
        if cnp.PyArray_TYPE(grad) != layout.type_num or not cnp.PyArray_ISNOTSWAPPED(grad):
            refuse_unlike(grad, self.owned[i], f"gradient of {self.names[i]}")
        alike = laid_out_as(layout, <Borrowed *><PyObject *>grad)
        if alike:
            low = cnp.PyArray_BYTES(grad)
            high = low + layout.nbytes
            tensor.grad = low
            tensor.grad_ndim = 0
        else:
            refuse_unlike(grad, self.owned[i], f"gradient of {self.names[i]}")
            alike = describe_strided(
                self.owned[i], grad, tensor, &self.grad_layout[i], &low, &high
            )
        if zero_grad and not (alike and cnp.PyArray_ISWRITEABLE(grad)):
            refuse_to_zero(grad, alike, f"gradient of {self.names[i]}")
        if low != before.low or high != before.high or not (alike and before.index):
            self.grads_known_apart = False
            self._check_apart(i, grad, low, high, alike, zero_grad)
        elif zero_grad and low == layout.data and layout.nbytes > 0:
            self._check_apart(i, grad, low, high, alike, zero_grad)
        self.grad_extents[i].low = low
        self.grad_extents[i].high = high
        self.grad_extents[i].index = alike
        return 0

    cdef int _check_apart(
        self, Py_ssize_t i, cnp.ndarray grad, char *low, char *high, bint alike, bint zero_grad,
    ) except -1:
        """Raise if a gradient shares memory with a parameter or with state; its own is allowed."""
        cdef Py_ssize_t left = 0, right = self.n_extents, middle, k
        if low == high:
            return 0
        while left < right:  # the first extent that ends above `low`
            middle = (left + right) // 2
            if self.extents[middle].high > low:
                right = middle
            else:
                left = middle + 1
        while left < self.n_extents and self.extents[left].low < high:
            k = self.extents[left].index
            left += 1
            if k == i and alike and low == self.layouts[i].data and not zero_grad:
                continue
            if alike or share_memory(grad, self._array(k)):
                own = " (with zero_grad=True also its own)" if k == i and zero_grad else ""
                raise ValueError(
                    f"gradient of {self.names[i]} overlaps {self._label(k)} in memory{own}; a "
                    "gradient needs memory of its own"
                )
        return 0

    cdef int _check_grads_apart(self, list grads) except -1:
        """Raise if two gradients share memory (they are about to be zeroed one after the other)."""
        cdef Py_ssize_t i, j, k, count = 0
        for i in range(self.n):
            if self.grad_extents[i].low != self.grad_extents[i].high:
                self.sorting[count] = self.grad_extents[i]
                self.sorting[count].index = i
                count += 1
        qsort(self.sorting, count, sizeof(Extent), by_low)
        for j in range(count):
            k = j + 1
            while k < count and self.sorting[k].low < self.sorting[j].high:
                first, second = self.sorting[j].index, self.sorting[k].index
                first, second = min(first, second), max(first, second)
                if share_memory(grads[first], grads[second]):
                    raise ValueError(
                        f"gradients of {self.names[first]} and {self.names[second]} share memory, "
                        "and zero_grad=True asks to zero them"
                    )
                k += 1
        self.grads_known_apart = True
        return 0

    # ---- the step --------------------------------------------------------------------------------

    def check(self):
        """Raise if a step would find a parameter, slot, average or counter that it cannot use."""
        self._read_lent()
        self._read_owned()

    def check_gradients(self, list grads not None):
        """Raise if a step with these arrays, one or None for each parameter, would."""
        cdef Py_ssize_t i
        if len(grads) != self.n:
            raise ValueError(f"expected {self.n} gradients, got {len(grads)}")
        self._begin_writing()
        try:
            self._read_lent()
            self._read_owned()
            for i in range(self.n):
                if not self._bound_before(i, list_item(<PyObject *>grads, i), False):
                    self._bind(i, grads, False)
        finally:
            self.writing = 0

    cdef int _read_lent(self) except -1:
        if self.lent is not None and not self.lent.in_place():
            raise MovedError("the memory of a parameter moves while it is looked at")
        return 0

    def set_hypers(self, int32_t group, row):
        """Set a group's hyperparameters, as ``rule.hypers`` has them; nothing is settled then."""
        cdef double values[FO_MAX_HYPERS]
        cdef fo_tensor *tensor
        cdef Py_ssize_t i
        cdef int j
        if not 0 <= group < self.n_groups:
            raise ValueError(f"there is no group {group}")
        self.settled = None
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

    def settle(self, list groups, bint direct=False):
        """Note that the hyperparameters are those of its owner's groups.

        Parameters
        ----------
        groups : list of tuple or None
            The keys and values of each group, as for `unchanged`; None: they are not.
        direct : bool
            Whether that and a list of gradients is all that a step needs.
        """
        self.direct = direct
        self.settled = groups

    @property
    def torn(self):
        """Whether this is a forked child's copy of a plan that was being written at that moment."""
        return self.writing not in (0, 1 + forks)

    @property
    def busy(self):
        """Whether a step is under way: seen from within it, by code of a gradient's type."""
        return self.writing == 1 + forks

    def take_over_tear(self, Plan other not None):
        """Be torn if another plan over the same arrays is."""
        if other.torn:
            self.writing = other.writing

    cdef int _begin_writing(self) except -1:
        """Refuse to write what somebody else is writing, or has left torn."""
        cdef int64_t before
        with cython.critical_section(self):
            before = self.writing
            if before == 0:
                self.writing = 1 + forks
        if before == 1 + forks:
            raise RuntimeError("step() was called from within a step of the same plan")
        if before != 0:
            raise RuntimeError(TORN)
        return 0

    def restore(
        self, list to, list values, int64_t completed_steps, list done,
        int64_t accumulated_steps=0, summed=None, fresh=None,
    ):
        """Copy arrays and set the counts of steps: all of it, or nothing and raise.

        Mends a torn plan.

        Parameters
        ----------
        to : list of numpy.ndarray
            Arrays that the plan owns, and its counters.
        values : list of numpy.ndarray
            For each its values: of its dtype, and of its shape or 0-d.
        completed_steps : int
            The number of completed steps.
        done : list of bool
            Its first entry becomes True: a signal may raise right after this method returns.
        accumulated_steps, summed, fresh : optional
            As for the constructor.
        """
        cdef Py_ssize_t k, n = len(to)
        cdef list ready = list(values), flags = self._as_flags(summed)
        cdef list sets = self._as_fresh(fresh)
        for k in range(n):
            value, array = values[k], to[k]
            if value.dtype != array.dtype or value.shape not in ((), array.shape):
                raise ValueError(f"array {k}: {value.dtype} {value.shape} does not fit")
            if value.shape and value.strides != array.strides:
                ready[k] = np.empty_like(array, subok=False)
                PyArray_CopyInto(ready[k], value)
        self.writing = 1 + forks
        for k in range(n):  # from here on nothing can fail
            put(<cnp.ndarray>to[k], <cnp.ndarray>ready[k])
        self.completed_steps = completed_steps
        self._set_kept(accumulated_steps, flags, sets)
        done[0] = True
        self.writing = 0

    cdef list _as_flags(self, summed):
        """Return which sums hold something, as ``True`` and ``False``; None: none does."""
        cdef list flags = [False] * self.n
        if summed is not None:
            flags = []
            for flag in summed:
                flags.append(bool(flag))
        if len(flags) != self.n:
            raise ValueError(f"summed: expected {self.n}, one for each parameter")
        return flags

    cdef list _as_fresh(self, fresh):
        """Return sets of slots as the C core has them; None: no slot is fresh."""
        cdef list sets = [0] * self.n
        if fresh is not None:
            sets = [
                sum([FO_SLOT(self.rule.slots.index(name)) for name in names]) for names in fresh
            ]
        if len(sets) != self.n:
            raise ValueError(f"fresh: expected {self.n}, one for each parameter")
        return sets

    cdef void _set_kept(self, int64_t accumulated_steps, list flags, list sets) noexcept:
        cdef Py_ssize_t i
        self.accumulated_steps = accumulated_steps
        for i in range(self.n):
            self.tensors[i].has_sum = flags[i] is True
            self.tensors[i].fresh = sets[i]

    def fresh(self):
        """Return for each parameter the slots that no step has written yet, though it has begun."""
        cdef Py_ssize_t i
        return [
            tuple([
                name for j, name in enumerate(self.rule.slots) if self.tensors[i].fresh & FO_SLOT(j)
            ])
            for i in range(self.n)
        ]

    def summed(self):
        """Return for each parameter whether its sum holds the gradient of a micro-batch."""
        cdef Py_ssize_t i
        cdef list flags = [False] * self.n
        for i in range(self.n):
            flags[i] = self.tensors[i].has_sum != 0
        return flags

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
        cdef list bound = list(grads)
        self._begin_writing()
        try:
            return self._step(bound, loss_scale, zero_grad)
        finally:
            self.writing = 0

    def step_settled(self, Lock lock not None, groups, grads, loss_scale, zero_grad):
        """Step if the groups are as they were settled and the arguments as usual, else return None.

        Holds the lock meanwhile.
        """
        if not self.direct:
            return None
        if type(grads) is not list or type(loss_scale) is not float or <double>loss_scale != 1.0:
            return None
        if zero_grad is not False and zero_grad is not True:
            return None
        lock.take()
        try:
            if not unchanged(groups, self.settled):  # looked up only now that it cannot change
                return None
            return self.step(grads, 1.0, zero_grad is True)
        finally:
            lock.give()

    cdef StepResult _step(self, list bound, double loss_scale, bint zero_grad):
        cdef StepResult result = StepResult.__new__(StepResult)
        cdef fo_step_args args = self.args
        cdef fo_step_result *out = &result.result
        cdef Py_ssize_t i
        cdef list zeroed = None  # gradients that are no arrays
        if len(bound) != self.n:
            raise ValueError(
                f"expected {self.n} gradients, one for each parameter; got {len(bound)}"
            )
        self.from_jax = False
        for i in range(self.n):  # before anything is read: this may run code of others
            if is_array(list_item(<PyObject *>bound, i)):
                continue
            item = bound[i]
            if item is not None and not isinstance(item, cnp.ndarray):
                name = f"gradient of {self.names[i]}"
                bound[i] = as_gradient(item, self.owned[i], name, zero_grad)
                self.from_jax |= is_from_jax(item)
                if zero_grad:
                    zeroed = zeroed or []
                    zeroed.append(item)
        self._read_lent()
        if self.lent is not None:
            for k, where in self.lent.replaced.items():
                if bound[k] is not None:
                    raise ValueError(
                        f"{self.names[k]}: {where} is another tensor by now, which this optimizer "
                        "does not have (as after load_state_dict(assign=True)); make an optimizer "
                        "over the new one, or give None for the gradient of the old"
                    )
        self._read_owned()
        for i in range(self.n):
            if not self._bound_before(i, list_item(<PyObject *>bound, i), zero_grad):
                self._bind(i, bound, zero_grad)
        if zero_grad and not self.grads_known_apart:
            self._check_grads_apart(bound)

        if self.from_jax:
            wait_for_jax(self.owned[:self.n])
        args.loss_scale = loss_scale
        args.zero_grad = zero_grad
        args.add = self.accumulated_steps + 1 < args.accumulate
        args.ema_starts = self.completed_steps == 0
        args.max_threads = self.num_threads or fo_get_num_threads()
        if threads_exact:
            args.exact = True
            if threads_exact > 0:
                args.max_threads = threads_exact
        args.pool = <const fo_pool *>self.pool
        after_update = after_zeroing = None
        if self.lent is not None and not args.add:
            after_update = version_counter([
                lender for i, lender in self.lent.of.items()
                if self.tensors[i].grad != NULL or self.tensors[i].has_sum
            ])
        if zeroed is not None:
            after_zeroing = version_counter(zeroed)
        if fo_plan_size(self.plan) < KEEP_GIL_BELOW:
            fo_plan_step(self.plan, &args, out)
        else:
            _held = tuple(bound)  # twice: NumPy's resize() lets an array have one other owner
            with nogil:
                fo_plan_step(self.plan, &args, out)
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


# ---- one call, without a plan of the caller's ----------------------------------------------------

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
    cdef int axis
    if (
        cnp.PyArray_TYPE(one) != cnp.PyArray_TYPE(other) or not cnp.PyArray_ISNOTSWAPPED(one)
        or not same_shape(one, other)
    ):
        return False
    if cnp.PyArray_IS_C_CONTIGUOUS(one) and cnp.PyArray_IS_C_CONTIGUOUS(other):
        return True
    if cnp.PyArray_SIZE(one) == 0:
        return True
    for axis in range(cnp.PyArray_NDIM(one)):
        if (
            cnp.PyArray_STRIDE(one, axis) != cnp.PyArray_STRIDE(other, axis)
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


# ---- the limit -----------------------------------------------------------------------------------

cdef class Limit:
    """A pass that moves the bytes of a step and computes nothing, for benchmarks.

    Parameters
    ----------
    updated : list of tuple of numpy.ndarray
        For each tensor, the arrays that a step reads and writes.
    read : list of numpy.ndarray
        For each tensor, the array that a step reads.
    num_threads : int
        That move the bytes, each an even part.
    taken : int
        Bits of what is read that are added, without carry, to what is updated, in each 4 bytes.
        With 0 all arrays stay as they are.
    """

    cdef fo_limit_tensor *tensors
    cdef Py_ssize_t n
    cdef int num_threads
    cdef uint32_t taken
    cdef tuple kept

    def __cinit__(self, updated, read, int num_threads, uint32_t taken=0):
        cdef fo_limit_tensor *tensor
        cdef Py_ssize_t i
        cdef int j
        self.n, self.num_threads, self.taken = len(read), num_threads, taken
        self.kept = (tuple([tuple(arrays) for arrays in updated]), tuple(read))
        self.tensors = <fo_limit_tensor *>PyMem_Calloc(self.n + 1, sizeof(fo_limit_tensor))
        if self.tensors == NULL:
            raise MemoryError
        for i, (arrays, last) in enumerate(zip(*self.kept, strict=True)):
            tensor = &self.tensors[i]
            if not 1 <= len(arrays) <= 1 + FO_MAX_SLOTS:
                raise ValueError(f"expected 1 to {1 + FO_MAX_SLOTS} arrays, got {len(arrays)}")
            for j, array in enumerate((*arrays, last)):
                check_parameter(array, f"array {j} of tensor {i}")
                if array.nbytes != last.nbytes:
                    raise ValueError(f"arrays of tensor {i} differ in size")
                if j < len(arrays):
                    tensor.updated[j] = cnp.PyArray_DATA(array)
            tensor.n_updated = len(arrays)
            tensor.read = cnp.PyArray_DATA(last)
            tensor.words = last.nbytes // 4

    def __dealloc__(self):
        PyMem_Free(self.tensors)

    def run(self):
        """Make one pass."""
        with nogil:
            fo_limit_run(self.tensors, self.n, self.taken, self.num_threads)
