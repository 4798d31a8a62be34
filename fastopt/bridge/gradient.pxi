# Gradients: from any object to an array, and how that lies beside its parameter.

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


cdef int check_unlike(cnp.ndarray grad, cnp.ndarray param, str name) except -1:
    """Return how a gradient is stored that is not laid out as its parameter.

    Raise if the parameter's arithmetic would not have all its values, or its shape is another.
    """
    cdef int storage = exact_storage(grad, param, name)
    if not same_shape(grad, param):
        raise ValueError(
            f"{name}: shape {(<object>grad).shape} is not the parameter's {(<object>param).shape}"
        )
    return storage


cdef int exact_storage(cnp.ndarray grad, cnp.ndarray param, str name) except -1:
    """Return how a gradient is stored; raise if the parameter's arithmetic lacks any of its values.
    """
    cdef int storage = storage_of(grad)
    cdef fo_dtype arithmetic = arithmetic_of(storage_of(param))
    if not is_exact(storage, arithmetic):
        raise TypeError(
            f"{name}: dtype {grad.dtype} ({grad.dtype.str}) is not the parameter's {param.dtype} "
            "in native byte order, nor another type of which "
            f"{'float64' if arithmetic == FO_F64 else 'float32'} has all values: float32, bfloat16 "
            "or float16"
        )
    return storage


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
