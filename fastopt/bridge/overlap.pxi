# Overlap: who shares memory with whom. Extents lie in a table, sorted by address, which answers
# with their numbers; who asks has the names. `share_memory` decides what extents leave open.

cdef struct Extent:
    char *low
    char *high
    Py_ssize_t index


cdef struct Table:
    Extent *extents     # sorted by `low`, once `sort_table` has been called
    Py_ssize_t count


cdef inline void enter(Table *table, char *low, char *high, Py_ssize_t index) noexcept nogil:
    """Add an extent; not an empty one, which may lie inside another and does not overlap it."""
    if low != high:
        table.extents[table.count] = Extent(low, high, index)
        table.count += 1


cdef void sort_table(Table *table) noexcept nogil:
    qsort(table.extents, table.count, sizeof(Extent), by_low)


cdef int by_low(const void *a, const void *b) noexcept nogil:
    cdef char *x = (<const Extent *>a).low
    cdef char *y = (<const Extent *>b).low
    return (x > y) - (x < y)


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


cdef Py_ssize_t place_above(const Table *table, char *low) noexcept nogil:
    """Find the place of the first extent that ends above an address, where no two overlap."""
    cdef Py_ssize_t left = 0, right = table.count, middle
    while left < right:
        middle = (left + right) // 2
        if table.extents[middle].high > low:
            right = middle
        else:
            left = middle + 1
    return left


cdef inline Extent *next_below(const Table *table, char *high, Py_ssize_t *place) noexcept nogil:
    """Return the extent at a place, if it begins below an address, and move on; else NULL."""
    if place[0] == table.count or table.extents[place[0]].low >= high:
        return NULL
    place[0] += 1
    return &table.extents[place[0] - 1]


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
