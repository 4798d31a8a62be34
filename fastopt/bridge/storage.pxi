# How elements are stored: NumPy's types and the C core's.

cdef int bfloat16_num = -1  # NumPy's number for the type of ml_dtypes, once an array of it was seen

# Elements of a parameter that have a scale in common, where its state is stored in 8 bits.
SCALED = FO_SCALED

# The C core's numbers for what a gradient may be stored as.
STORAGES = {"float32": FO_F32, "float64": FO_F64, "bfloat16": FO_BF16, "float16": FO_F16}


cdef int storage_of(cnp.ndarray array) except -2:
    """Return the C core's number for an array's type; -1 for another type, or byte order."""
    global bfloat16_num
    cdef int kind = cnp.PyArray_TYPE(array)
    if not cnp.PyArray_ISNOTSWAPPED(array):
        return -1
    if kind == cnp.NPY_FLOAT32:
        return FO_F32
    if kind == cnp.NPY_FLOAT64:
        return FO_F64
    if kind == cnp.NPY_FLOAT16:
        return FO_F16
    if kind == cnp.NPY_VOID:  # as tensors are seen, without ml_dtypes
        return FO_BF16 if array.dtype.names == ("bfloat16",) and array.itemsize == 2 else -1
    if cnp.PyTypeNum_ISUSERDEF(kind) and kind != bfloat16_num:
        if array.dtype.name == "bfloat16" and cnp.PyArray_ITEMSIZE(array) == 2:
            bfloat16_num = kind
    return FO_BF16 if kind == bfloat16_num else -1


cdef inline fo_dtype arithmetic_of(int storage) noexcept:
    """Return the type that a rule computes in."""
    return FO_F64 if storage == FO_F64 else FO_F32


cdef inline bint is_8bit(int storage) noexcept:
    return storage == FO_8BIT_UNSIGNED or storage == FO_8BIT_SIGNED


cdef inline bint is_exact(int storage, fo_dtype arithmetic) noexcept:
    """Tell whether a type that arithmetic is done in has all values of another."""
    return storage >= 0 and (storage != FO_F64 or arithmetic == FO_F64)


cdef Py_ssize_t count_scales(cnp.ndarray array) noexcept:
    return (cnp.PyArray_SIZE(array) + FO_SCALED - 1) // FO_SCALED


cdef int stored_as(cnp.ndarray codes, cnp.ndarray beside, bint unsigned) except -1:
    """Return how arrays of a slot, or a parameter and what is beside it, are stored."""
    cdef int storage = storage_of(codes)
    if beside is None:
        return storage
    if storage == FO_BF16:
        return FO_BF16_SPLIT
    if storage == FO_F16:
        return FO_F16_MASTER
    return FO_8BIT_UNSIGNED if unsigned else FO_8BIT_SIGNED


def decode(cnp.ndarray codes not None, cnp.ndarray beside, *, bint unsigned=False):
    """Return in float32 what dense arrays store; a new array of the same memory order.

    Parameters
    ----------
    codes : numpy.ndarray
        Of bfloat16, float16 or float32; of uint8, if `beside` has scales.
    beside : numpy.ndarray or None
        Scales; or of a parameter, its trailing bits or master.
    unsigned : bool, optional
        Whether codes of 8 bits are those of values that are never negative.
    """
    cdef cnp.ndarray to = np.empty_like(codes, np.float32, subok=False)
    cdef void *extra = NULL if beside is None else cnp.PyArray_DATA(beside)
    fo_decode(
        stored_as(codes, beside, unsigned), cnp.PyArray_SIZE(codes),
        <float *>cnp.PyArray_DATA(to), cnp.PyArray_DATA(codes), extra,
    )
    return to


def encode(
    cnp.ndarray values not None, cnp.ndarray codes not None, cnp.ndarray beside,
    *, bint unsigned=False,
):
    """Store float32 values, rounded to nearest, in dense arrays of the same memory order."""
    cdef void *extra = NULL if beside is None else cnp.PyArray_DATA(beside)
    if cnp.PyArray_TYPE(values) != cnp.NPY_FLOAT32 or not ordered_alike(values, codes):
        raise ValueError("expected float32 values in the memory order of the codes")
    fo_encode(
        stored_as(codes, beside, unsigned), cnp.PyArray_SIZE(codes), cnp.PyArray_DATA(codes),
        <const float *>cnp.PyArray_DATA(values), extra,
    )


# ---- what goes with a parameter ------------------------------------------------------------------

# Besides the slots, by their numbers:
cdef enum:
    EMA = FO_MAX_SLOTS
    SUM
    BESIDE  # and how many more as arrays are numbered: 0 is the parameter, 1 + j is slot j


cdef int check_number(cnp.ndarray array, str label) except -1:
    """Raise unless this can be a slot that is a number."""
    if storage_of(array) != FO_F64 or cnp.PyArray_NDIM(array) != 0:
        raise ValueError(
            f"{label}: shape {(<object>array).shape} and dtype {array.dtype}, where one number is "
            "to be: a 0-d array of float64"
        )
    return 0


cdef void **adopt(
    fo_tensor *tensor, fo_coding *coding, const fo_rule *rule, int role, given, cnp.ndarray param,
    str label,
) except NULL:
    """Check an array that goes with a parameter, and note its type; return where its address goes.

    `role` is the number of a slot, or what the enumeration above has.
    """
    cdef int storage = storage_of(param), kind
    cdef fo_dtype arithmetic = arithmetic_of(storage)
    cdef void **target
    cdef cnp.ndarray array
    if not isinstance(given, cnp.ndarray):
        raise TypeError(f"{label}: expected a numpy.ndarray, got {type(given).__name__}")
    array = given
    check_memory(array, label)
    if role > BESIDE:
        shape = (count_scales(param),)
        if given.shape != shape or cnp.PyArray_TYPE(array) != cnp.NPY_UINT8:
            raise ValueError(
                f"{label}: scales of shape {given.shape} and dtype {given.dtype}, not {shape} and "
                "uint8"
            )
        return &coding.beside[role - BESIDE]
    kind = storage_of(array)
    if role < EMA and fo_rule_slot_number(rule, role):
        check_number(array, label)
        return &tensor.slot[role]
    if role < EMA and fo_rule_slot_by_row(rule, role):
        check_row_values(array, param, label)
        tensor.slot_dtype[role] = <uint8_t>arithmetic
        return &tensor.slot[role]
    if role == BESIDE:
        target = &coding.beside[0]
        if storage == FO_BF16 and cnp.PyArray_TYPE(array) == cnp.NPY_UINT16:
            tensor.param_dtype = kind = FO_BF16_SPLIT
        elif storage == FO_F16 and kind == FO_F32:
            tensor.param_dtype = kind = FO_F16_MASTER
        else:
            kind = -1
    elif role == EMA or role == SUM:
        target = &tensor.ema if role == EMA else &tensor.sum
        kind = kind if kind == arithmetic else -1
    else:
        target = &tensor.slot[role]
        if cnp.PyArray_TYPE(array) == cnp.NPY_UINT8:
            kind = FO_8BIT_UNSIGNED if fo_rule_slot_unsigned(rule, role) else FO_8BIT_SIGNED
        kind = kind if (kind == FO_F64) == (arithmetic == FO_F64) else -1
        tensor.slot_dtype[role] = <uint8_t>max(kind, 0)
    if kind < 0 or not same_shape(array, param):
        raise ValueError(
            f"{label}: shape {given.shape} and dtype {given.dtype} do not match the parameter's "
            f"{(<object>param).shape} and {param.dtype}"
        )
    if not ordered_alike(array, param):
        raise ValueError(f"{label}: memory order differs from the parameter's")
    return target


cdef unsigned in_fewer_bits(const fo_tensor *tensor) noexcept:
    """Return the set of a parameter's arrays that can be rounded at random."""
    cdef unsigned numbers = 0
    cdef int j
    if tensor.param_dtype == FO_BF16 or tensor.param_dtype == FO_F16:
        numbers |= FO_SLOT(0)
    for j in range(FO_MAX_SLOTS):
        if tensor.slot_dtype[j] != FO_F32 and tensor.slot_dtype[j] != FO_F64:
            numbers |= FO_SLOT(1 + j)
    return numbers
