# Extents: stretches of memory, in a table that is sorted by address and answers with their numbers.

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
