# Overlap: which arrays share memory. A table of extents answers with numbers, and the caller has
# the names. `share_memory` decides what extents leave open.

cdef bint neighbours_overlap(
    const Table *table, Py_ssize_t *first, Py_ssize_t *second
) noexcept nogil:
    """Tell whether any two extents overlap, and which, the lower number first."""
    cdef Py_ssize_t k
    for k in range(1, table.count):
        if table.extents[k].low < table.extents[k - 1].high:
            first[0] = min(table.extents[k - 1].index, table.extents[k].index)
            second[0] = max(table.extents[k - 1].index, table.extents[k].index)
            return True
    return False


cdef bint find_shared(
    const Table *table, PyObject **arrays, Py_ssize_t *first, Py_ssize_t *second
) except -1:
    """Tell whether any two of the arrays that the extents are of share memory, and which."""
    cdef Py_ssize_t j, k
    for j in range(table.count):
        k = j + 1
        while k < table.count and table.extents[k].low < table.extents[j].high:
            first[0] = min(table.extents[j].index, table.extents[k].index)
            second[0] = max(table.extents[j].index, table.extents[k].index)
            if share_memory(<object>arrays[first[0]], <object>arrays[second[0]]):
                return True
            k += 1
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


cdef bint share_memory(a, b):
    """Decide exactly, where that is not too much work, whether two arrays share memory."""
    try:
        return np.shares_memory(np.asarray(a), np.asarray(b), max_work=1_000_000)
    except np.exceptions.TooHardError:
        return True
