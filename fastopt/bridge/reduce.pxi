# Means of vectors that several processes, or several micro-batches, have.

cdef fo_dtype read_vector(cnp.ndarray vector, Py_ssize_t n, str what) except *:
    """Return how a vector of n elements is stored; raise if C cannot read it."""
    cdef int storage = storage_of(vector)
    if storage < 0 or cnp.PyArray_SIZE(vector) != n or not cnp.PyArray_IS_C_CONTIGUOUS(vector):
        raise ValueError(f"{what}: expected a contiguous vector of {n} numbers")
    return <fo_dtype>storage


cdef fo_dtype written_vector(cnp.ndarray to) except *:
    """Return the type of a vector that rules compute in."""
    cdef fo_dtype dtype = read_vector(to, cnp.PyArray_SIZE(to), "to")
    if dtype != FO_F32 and dtype != FO_F64:
        raise ValueError(f"to: expected float32 or float64, got {to.dtype}")
    return dtype


def ordered_mean(list vectors not None, cnp.ndarray to not None):
    """Put the mean of vectors, added up in the order given, into another one.

    Parameters
    ----------
    vectors : list of numpy.ndarray
        Of one size, of any types whose values the result's type has.
    to : numpy.ndarray
        Of float32 or float64.
    """
    cdef Py_ssize_t k, count = len(vectors), n = cnp.PyArray_SIZE(to)
    cdef fo_dtype dtype = written_vector(to)
    cdef const void **data = <const void **>PyMem_Calloc(count + 1, sizeof(void *))
    cdef fo_dtype *stored = <fo_dtype *>PyMem_Calloc(count + 1, sizeof(fo_dtype))
    try:
        if data == NULL or stored == NULL:
            raise MemoryError
        for k in range(count):
            stored[k] = read_vector(vectors[k], n, f"vector {k}")
            if not is_exact(stored[k], dtype):
                raise ValueError(f"vector {k}: {to.dtype} lacks values of {vectors[k].dtype}")
            data[k] = cnp.PyArray_DATA(<cnp.ndarray>vectors[k])
        if n > 0 and count > 0:
            with nogil:
                fo_ordered_mean(dtype, n, cnp.PyArray_DATA(to), <int>count, data, stored)
    finally:
        PyMem_Free(data)
        PyMem_Free(stored)


def batch_mean(cnp.ndarray total, cnp.ndarray grad, double scale, int64_t divisor, cnp.ndarray to):
    """Put ``(total + scale*grad) / divisor`` into a vector, as a step does that accumulates.

    Parameters
    ----------
    total, grad : numpy.ndarray or None
        Vectors; the total is of the result's type. One of them is there.
    scale : float
        What the gradient is multiplied by.
    divisor : int
        How many micro-batches there are.
    to : numpy.ndarray
        Of float32 or float64.
    """
    cdef Py_ssize_t n = cnp.PyArray_SIZE(to)
    cdef fo_dtype dtype = written_vector(to), stored = dtype
    cdef const void *summed = NULL
    cdef const void *given = NULL
    if total is not None:
        if read_vector(total, n, "total") != dtype:
            raise ValueError(f"total: expected {to.dtype}, got {total.dtype}")
        summed = cnp.PyArray_DATA(total)
    if grad is not None:
        stored = read_vector(grad, n, "grad")
        if not is_exact(stored, dtype):
            raise ValueError(f"grad: {to.dtype} lacks values of {grad.dtype}")
        given = cnp.PyArray_DATA(grad)
    if summed == NULL and given == NULL:
        raise ValueError("total and grad: one of them has to be there")
    if n > 0:
        with nogil:
            fo_batch_mean(dtype, n, cnp.PyArray_DATA(to), summed, given, stored, scale, divisor)
