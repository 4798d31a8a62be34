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


# ---- messages that several vectors are in --------------------------------------------------------

cdef struct Run:
    int64_t param, begin, size      # a parameter's number, and which elements
    int64_t at                      # bytes into the message


cdef void *numbers_of(cnp.ndarray array, int kind, Py_ssize_t n) except NULL:
    """Return where n numbers of one of NumPy's types are, one after the other."""
    if (
        cnp.PyArray_TYPE(array) != kind or cnp.PyArray_SIZE(array) < n
        or not cnp.PyArray_IS_C_CONTIGUOUS(array)
    ):
        raise ValueError(f"expected {n} numbers of one type, got {array.dtype} {array.size}")
    return cnp.PyArray_DATA(array)


@cython.final
cdef class Runs:
    """Which elements of which vectors follow one another in a message.

    Parameters
    ----------
    runs : list of tuple of int
        For each stretch its vector's number, its first element, the one after its last, and where
        it begins in the message, in bytes.

    Notes
    -----
    Vectors are given by their addresses: who calls keeps them alive, and sees to it that they have
    the elements.
    """

    cdef Run *runs
    cdef Py_ssize_t n, n_vectors

    def __cinit__(self, list runs not None):
        cdef Py_ssize_t k
        self.n = len(runs)
        self.runs = <Run *>PyMem_Calloc(self.n + 1, sizeof(Run))
        if self.runs == NULL:
            raise MemoryError
        for k in range(self.n):
            param, begin, end, at = runs[k]
            self.runs[k] = Run(param, begin, end - begin, at)
            self.n_vectors = max(self.n_vectors, <Py_ssize_t>self.runs[k].param + 1)

    def __dealloc__(self):
        PyMem_Free(self.runs)

    def pack(
        self, cnp.ndarray addresses not None, cnp.ndarray itemsizes not None,
        cnp.ndarray message not None,
    ):
        """Copy elements into a message; return which runs are of vectors without an address."""
        cdef const int64_t *start = <const int64_t *>numbers_of(
            addresses, cnp.NPY_INT64, self.n_vectors
        )
        cdef const int64_t *item = <const int64_t *>numbers_of(
            itemsizes, cnp.NPY_INT64, self.n_vectors
        )
        cdef char *to = <char *>numbers_of(message, cnp.NPY_UINT8, self._nbytes(item))
        cdef Run *run
        cdef Py_ssize_t k
        cdef list missing = []
        for k in range(self.n):
            run = &self.runs[k]
            if start[run.param] == 0:
                missing.append(k)
                continue
            memcpy(
                to + run.at, <const char *>start[run.param] + run.begin * item[run.param],
                run.size * item[run.param],
            )
        return missing

    def unpack(
        self, cnp.ndarray message not None, cnp.ndarray addresses not None,
        cnp.ndarray itemsizes not None,
    ):
        """Copy elements from a message to where they belong; each has an address."""
        cdef const int64_t *start = <const int64_t *>numbers_of(
            addresses, cnp.NPY_INT64, self.n_vectors
        )
        cdef const int64_t *item = <const int64_t *>numbers_of(
            itemsizes, cnp.NPY_INT64, self.n_vectors
        )
        cdef const char *begin = <const char *>numbers_of(
            message, cnp.NPY_UINT8, self._nbytes(item)
        )
        cdef Run *run
        cdef Py_ssize_t k
        for k in range(self.n):
            run = &self.runs[k]
            memcpy(
                <char *>start[run.param] + run.begin * item[run.param], begin + run.at,
                run.size * item[run.param],
            )

    cdef int64_t _nbytes(self, const int64_t *itemsizes) noexcept:
        cdef Run *last = &self.runs[self.n - 1]
        return last.at + last.size * itemsizes[last.param] if self.n > 0 else 0

    def mean(
        self, cnp.ndarray messages not None, cnp.ndarray storages not None, Py_ssize_t own,
        cnp.ndarray addresses not None, cnp.ndarray own_storages not None,
        cnp.ndarray own_itemsizes not None, list to not None,
    ):
        """Put the means of elements of several messages, added up in order, where they belong.

        Parameters
        ----------
        messages : numpy.ndarray of uint8
            A message a row; that of number `own` is none, and elements are at the addresses.
        storages, own_storages : numpy.ndarray of uint8
            How each vector's elements are stored, in the messages and at the addresses.
        own : int
            Which row does not count.
        addresses, own_itemsizes : numpy.ndarray of int64
            Of the vectors whose elements that row would have; bytes of an element of theirs.
        to : list of numpy.ndarray
            For each run where its means go.

        Returns
        -------
        list of int
            Which runs are of vectors without an address: nothing was done about them.
        """
        cdef const int64_t *start = <const int64_t *>numbers_of(
            addresses, cnp.NPY_INT64, self.n_vectors
        )
        cdef const uint8_t *stored = <const uint8_t *>numbers_of(
            storages, cnp.NPY_UINT8, self.n_vectors
        )
        cdef const uint8_t *mine = <const uint8_t *>numbers_of(
            own_storages, cnp.NPY_UINT8, self.n_vectors
        )
        cdef const int64_t *item = <const int64_t *>numbers_of(
            own_itemsizes, cnp.NPY_INT64, self.n_vectors
        )
        cdef Py_ssize_t count = messages.shape[0], width = messages.shape[1], k, rank
        cdef const char *got = <const char *>numbers_of(
            messages, cnp.NPY_UINT8, count * width
        )
        cdef const void **data = <const void **>PyMem_Calloc(count + 1, sizeof(void *))
        cdef fo_dtype *types = <fo_dtype *>PyMem_Calloc(count + 1, sizeof(fo_dtype))
        cdef list missing = []
        cdef cnp.ndarray mean
        cdef fo_dtype dtype
        cdef Run *run
        try:
            if data == NULL or types == NULL:
                raise MemoryError
            for k in range(self.n):
                run = &self.runs[k]
                if start[run.param] == 0:
                    missing.append(k)
                    continue
                mean = to[k]
                dtype = written_vector(mean)
                if cnp.PyArray_SIZE(mean) != run.size:
                    raise ValueError(f"run {k}: {mean.size} means of {run.size} elements")
                for rank in range(count):
                    types[rank] = <fo_dtype>stored[run.param]
                    data[rank] = got + rank * width + run.at
                types[own] = <fo_dtype>mine[run.param]
                data[own] = <const char *>start[run.param] + run.begin * item[run.param]
                with nogil:
                    fo_ordered_mean(
                        dtype, run.size, cnp.PyArray_DATA(mean), <int>count, data, types
                    )
        finally:
            PyMem_Free(data)
            PyMem_Free(types)
        return missing
