# Overlap: who shares memory with whom. A plan and a call keep extents, sorted by address, and look
# there first; `share_memory` decides what extents leave open.

cdef struct Extent:
    char *low
    char *high
    Py_ssize_t index


cdef int by_low(const void *a, const void *b) noexcept nogil:
    cdef char *x = (<const Extent *>a).low
    cdef char *y = (<const Extent *>b).low
    return (x > y) - (x < y)


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


cdef bint share_memory(a, b):
    """Decide exactly, where that is not too much work, whether two arrays share memory."""
    try:
        return np.shares_memory(np.asarray(a), np.asarray(b), max_work=1_000_000)
    except np.exceptions.TooHardError:
        return True
