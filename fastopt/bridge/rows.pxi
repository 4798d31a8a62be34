# Gradients of some rows of a parameter: from what is given of them to what the C plan is told.

@cython.final
cdef class RowLog:
    """The steps that rows of a parameter have missed; for one plan after the other over it."""

    cdef fo_row_log log

    def __cinit__(self):
        memset(&self.log, 0, sizeof(self.log))

    def __dealloc__(self):
        fo_row_log_free(&self.log)

    @property
    def pending(self):
        """Whether some rows may have missed a step."""
        return self.log.n != self.log.current

    def clear(self):
        """Note that no row has missed anything."""
        fo_row_log_clear(&self.log)

# Of fastopt._rows, once they were needed.
cdef object Rows = None
cdef object rows_of = None
cdef object row_numbers = None


cdef int import_rows() except -1:
    global Rows, rows_of, row_numbers
    if Rows is None:
        from fastopt import _rows

        rows_of, row_numbers, Rows = _rows.rows_of, _rows.row_numbers, _rows.Rows
    return 0


cdef as_rows(indices, grads, str name, bint many, Py_ssize_t n):
    """Return gradients that are of rows of these numbers; of None, as they are."""
    import_rows()
    if not many:
        return grads if grads is None else Rows(indices, grads)
    if not isinstance(indices, (list, tuple)) or len(indices) != n:
        raise ValueError(f"indices: expected a list with an array, or None, for each of {n} {name}")
    if not isinstance(grads, (list, tuple)) or len(grads) != n:
        return grads  # which is refused as it is without indices
    return [
        grad if numbers is None or grad is None else Rows(numbers, grad)
        for numbers, grad in zip(indices, grads, strict=True)
    ]


cdef int check_rows(
    rows, cnp.ndarray numbers, cnp.ndarray values, cnp.ndarray param, str name
) except -1:
    """Raise unless values have the shape of so many of the parameter's rows."""
    shape, values_shape = (<object>param).shape, (<object>values).shape
    if cnp.PyArray_NDIM(param) == 0:
        raise ValueError(f"{name}: a 0-d parameter has no rows")
    if rows._shape is not None and rows._shape != shape:
        raise ValueError(f"{name}: shape {rows._shape} is not the parameter's {shape}")
    if values_shape != (len(numbers), *shape[1:]):
        raise ValueError(
            f"{name}: values of shape {values_shape}, not {(len(numbers), *shape[1:])}: for "
            f"each of {len(numbers)} indices a row of the parameter's shape {shape}"
        )
    if cnp.PyArray_SIZE(param) == 0:  # of which the C plan takes no rows
        row_indices(numbers, param, name)
    return 0


cdef int ordered_rows(cnp.ndarray param, int *axes, str what) except -1:
    """Find the memory order; raise unless each of a parameter's rows is one stretch of memory."""
    cdef int count = memory_order(param, axes)
    if cnp.PyArray_NDIM(param) > 0 and cnp.PyArray_DIM(param, 0) > 1 and axes[0] != 0:
        raise ValueError(
            f"{what} needs a parameter whose rows are each one stretch of memory, as in C order; "
            f"this one has shape {(<object>param).shape} and strides {(<object>param).strides}"
        )
    return count


cdef int check_row_values(cnp.ndarray values, cnp.ndarray param, str name) except -1:
    """Raise unless an array has one value for each of a parameter's rows, as rules compute in."""
    cdef fo_dtype arithmetic = arithmetic_of(storage_of(param))
    cdef int axes[64]
    shape = (<object>param).shape[:1]
    if (<object>values).shape != shape or storage_of(values) != arithmetic:
        raise ValueError(
            f"{name}: shape {(<object>values).shape} and dtype {values.dtype}, not {shape} and "
            f"{'float64' if arithmetic == FO_F64 else 'float32'}: one value for each row"
        )
    if not cnp.PyArray_IS_C_CONTIGUOUS(values):
        raise ValueError(f"{name}: values of rows have to be contiguous")
    ordered_rows(param, axes, f"{name}: one value for each row")
    return 0


cdef cnp.ndarray rows_as_param(cnp.ndarray values, cnp.ndarray param, str name, bint zero_grad):
    """Return values of rows in the memory order of the parameter's; a copy if they are in another.
    """
    cdef int axes[64]
    cdef int count = ordered_rows(param, axes, f"{name}: a gradient of some rows"), place
    order = [0] + [axes[place] for place in range(count) if axes[place] != 0]
    ordered = values.transpose(
        order + [axis for axis in range(cnp.PyArray_NDIM(param)) if axis not in order]
    )
    if cnp.PyArray_IS_C_CONTIGUOUS(ordered) or cnp.PyArray_SIZE(values) == 0:
        return values
    if zero_grad:
        raise ValueError(
            f"{name}: values of strides {(<object>values).strides} do not lie as the parameter's "
            "rows do, and zero_grad=True asks to zero them; give numpy.ascontiguousarray(values)"
        )
    return ordered.copy()


cdef int refuse_row(str which, number, cnp.ndarray param, str whose="") except -1:
    raise ValueError(
        f"{which} is {number}, not the number of a row{whose}: 0 to "
        f"{cnp.PyArray_DIM(param, 0) - 1}"
    )


cdef cnp.ndarray row_indices(rows, cnp.ndarray param, str name):
    """Return a copy of numbers of a parameter's rows, as int64; raise if one is none of them."""
    cdef cnp.ndarray numbers = np.array(rows, np.int64)
    cdef const int64_t *number = <const int64_t *>cnp.PyArray_DATA(numbers)
    cdef Py_ssize_t k
    if cnp.PyArray_NDIM(param) == 0:
        raise ValueError(f"rows: {name} is 0-d and has none")
    for k in range(cnp.PyArray_SIZE(numbers)):
        if not 0 <= number[k] < cnp.PyArray_DIM(param, 0):
            refuse_row(f"rows[{k}]", rows[k], param, f" of {name}")
    return numbers
