# The limit: a pass that moves a step's bytes, to measure steps against.

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

    cdef fo_bandwidth_tensor *tensors
    cdef Py_ssize_t n
    cdef int num_threads
    cdef uint32_t taken
    cdef tuple kept

    def __cinit__(self, updated, read, int num_threads, uint32_t taken=0):
        cdef fo_bandwidth_tensor *tensor
        cdef Py_ssize_t i
        cdef int j
        self.n, self.num_threads, self.taken = len(read), num_threads, taken
        self.kept = (tuple([tuple(arrays) for arrays in updated]), tuple(read))
        self.tensors = <fo_bandwidth_tensor *>PyMem_Calloc(self.n + 1, sizeof(fo_bandwidth_tensor))
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
            fo_bandwidth_run(self.tensors, self.n, self.taken, self.num_threads)
