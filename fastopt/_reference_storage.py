r"""How arrays are stored in fewer bits, in plain NumPy: the oracle of the C core's storage types.

A step computes in float32: it loads what is stored, updates it, and stores the result. A value
:math:`x` lies between two neighbours that can be stored, of spacing :math:`h`. It is rounded to the
nearest or, with random bits, away from zero with a probability that makes the mean right:

.. math:: |x| = (n + p)\, h \;\rightarrow\;
    \begin{cases} (n + 1)\, h & \text{with probability } p \\ n\, h & \text{else} \end{cases}
    \qquad (n \text{ whole},\ 0 \le p < 1)

So small updates are not lost: they change a stored value in the mean. :math:`p` is cut off to a
multiple of :math:`2^{-16}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["SLOTS", "STORAGE", "Storage", "Stored", "random_bits", "stored_step"]

Array = NDArray[Any]

SCALED = 64  # elements that have a scale of 8 bits in common


class Storage(NamedTuple):
    r"""A row of :data:`STORAGE`: how a type of elements is loaded and stored.

    Arrays have one axis, and are whole: all elements of a parameter, or of a slot, in memory order.

    Attributes
    ----------
    load : callable
        ``load(codes, extra)`` returns the values, as float32.
    store : callable
        ``store(values, random)`` returns codes and `extra`. Codes are bit patterns: uint8, uint16,
        or uint32 for float32. `extra` is what lies beside them: None, uint16 trailing bits, a
        float32 master, or uint8 scales. `random` is an array of :func:`random_bits`, or None,
        which rounds to nearest. Trailing bits and masters lose nothing and need no random bits.

    Examples
    --------
    The mean of what is stored is the value, which lies between two neighbours:

    >>> import numpy as np
    >>> values = np.full(10_000, 1.001, np.float32)
    >>> random = random_bits(10_000, seed=0, step=1, param=0, array=0)
    >>> codes, extra = STORAGE["bfloat16"].store(values, random)
    >>> stored = STORAGE["bfloat16"].load(codes, extra)
    >>> np.unique(stored).tolist()
    [1.0, 1.0078125]
    >>> round(float(stored.mean(dtype=np.float64)), 4)
    1.001
    """

    load: Callable[[Array, Array | None], Array]
    store: Callable[[Array, Array | None], tuple[Array, Array | None]]


# ---- random bits -----------------------------------------------------------------------------


def random_bits(
    n: int, *, seed: int, step: int, param: int, array: int, first: int = 0
) -> NDArray[np.uint32]:
    """Return 16 random bits for each of the elements from `first` to ``first + n - 1``.

    They are a hash of the arguments and of the element's index. So they are the same in whatever
    order and in whatever pieces they are computed. A hash has 32 bits, for an even element and the
    next. The arrays of a parameter share it, rotated: an element's numbers in two arrays have no
    bits in common, or the upper half of one is the lower half of the other. Between neighbours it
    is not so: arrays 0 and 1, and 2 and 3, have the numbers of the two elements exchanged.

    Parameters
    ----------
    n : int
        The number of elements.
    seed : int
        The optimizer's seed; counted modulo 2**64.
    step : int
        The number of this step of the parameter; the first is 1.
    param : int
        The parameter's index in the whole optimizer.
    array : int
        0 for the parameter itself, ``1 + j`` for its slot `j`, in the rule's order.
    first : int
        The index, in memory order, of the first element.

    Returns
    -------
    numpy.ndarray
        uint32, of numbers below 2**16.

    Examples
    --------
    >>> whole = random_bits(100, seed=0, step=1, param=0, array=0)
    >>> part = random_bits(10, seed=0, step=1, param=0, array=0, first=90)
    >>> bool((whole[90:] == part).all())
    True
    """
    random = np.empty(n, np.uint32)
    done = 0
    while done < n:  # each 2**32 elements have a key
        high, low = divmod(first + done, 2**32)
        count = min(n - done, 2**32 - low)
        e = np.arange(low, low + count, dtype=np.uint64).astype(np.uint32)
        h = _rotated(_hash(e >> 1, _key(seed, step, param, high)), (0, 16, 8, 24)[array & 3])
        random[done : done + count] = np.where(e & 1, h >> 16, h & 0xFFFF)
        done += count
    return random


def _key(seed: int, *numbers: int) -> int:
    golden = 0x9E3779B97F4A7C15
    key = _mix(seed + golden)
    for number in numbers:
        key = _mix((key ^ number) + golden)
    return key


def _mix(x: int) -> int:
    """Return 64 bits that all depend on all of the 64 given (the mixer of SplitMix64)."""
    x &= 2**64 - 1
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & 2**64 - 1
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & 2**64 - 1
    return x ^ x >> 31


def _hash(counter: Array, key: int) -> Array:
    h: Array = (key & 0xFFFFFFFF) + counter * 0x9E3779B9
    h = (h ^ h >> 16) * 0x7FEB352D + (key >> 32)
    h = (h ^ h >> 15) * 0x846CA68B
    h ^= h >> 16
    return h


def _rotated(h: Array, left: int) -> Array:
    rotated: Array = h << left | h >> (32 - left) if left else h
    return rotated


# ---- float32, bfloat16: a float32's pattern or its upper half ---------------------------------


def _load_float32(codes: Array, extra: Array | None) -> Array:
    return codes.view(np.float32)


def _store_float32(values: Array, random: Array | None) -> tuple[Array, None]:
    return _bits(values).copy(), None


def _load_bfloat16(codes: Array, extra: Array | None) -> Array:
    return (codes.astype(np.uint32) << 16).view(np.float32)


def _store_bfloat16(values: Array, random: Array | None) -> tuple[Array, None]:
    """Round by adding to the pattern, which carries into the exponent, and up to infinity."""
    bits = _bits(values)
    up = 0x7FFF + (bits >> 16 & 1) if random is None else random  # ties to even
    return (np.where(np.isnan(values), 0x7FC00000, bits + up) >> 16).astype(np.uint16), None


def _load_bfloat16_split(codes: Array, extra: Array | None) -> Array:
    r"""Return the float32 whose pattern is ``65536 * code + trailing``, `trailing` being signed.

    Others may have written the code, so that it has nothing to do with the trailing bits. Whatever
    they are, a value rounds to its code: zero keeps its sign, and NaN is NaN. Trailing bits that
    would change the sign of a zero, or make NaN of an infinity, count as 0; so do a NaN's.
    """
    assert extra is not None
    size = (codes & 0x7FFF).astype(np.int64) << 16
    trailing = extra.view(np.int16).astype(np.int64)
    whole = size + trailing
    stale = (whole < 0) | (whole > 0x7F800000)
    pattern: Array = np.where(stale, size, whole) | (codes.astype(np.int64) & 0x8000) << 16
    return pattern.astype(np.uint32).view(np.float32)


def _store_bfloat16_split(values: Array, random: Array | None) -> tuple[Array, Array]:
    """Round with ties away from zero: then the lower half, as signed, is what is rounded off."""
    bits = _bits(values)
    nan = np.isnan(values)
    codes = np.where(nan, 0x7FC00000, bits + 0x8000) >> 16
    return codes.astype(np.uint16), np.where(nan, 0, bits & 0xFFFF).astype(np.uint16)


# ---- small floats: float16, and 8 bits in blocks ----------------------------------------------


def _load_float16(codes: Array, extra: Array | None) -> Array:
    nan = (codes.astype(np.uint32) << 16 & 0x80000000) | 0x7FC00000
    nan |= (codes.astype(np.uint32) & 0x3FF) << 13
    values = _bits(codes.view(np.float16).astype(np.float32))
    return np.where((codes & 0x7FFF) > 0x7C00, nan, values).view(np.float32)


def _store_float16(values: Array, random: Array | None) -> tuple[Array, None]:
    size = np.ldexp(np.minimum(_finite(values), 2**16), 15)
    codes = _small(size, 10, None if random is None else random / 2**16)
    codes = np.where(np.isinf(values), 0x7C00, codes)
    codes |= _bits(values) >> 16 & 0x8000
    return np.where(np.isnan(values), 0x7E00, codes).astype(np.uint16), None


def _load_float16_master(codes: Array, extra: Array | None) -> Array:
    """Return the master, but where it does not round to the code, which others have written."""
    assert extra is not None
    rounded, _ = _store_float16(extra, None)
    bits = np.where(rounded == codes, _bits(extra), _bits(_load_float16(codes, None)))
    return bits.view(np.float32)


def _store_float16_master(values: Array, random: Array | None) -> tuple[Array, Array]:
    return _store_float16(values, None)[0], values.copy()


def _load_unsigned(codes: Array, extra: Array | None) -> Array:
    r"""Return values of codes that are floats of 5 bits of exponent and 3 of mantissa.

    With the block's scale :math:`s`, the code of exponent :math:`e` and mantissa :math:`m` is

    .. math:: 2^{s - 127} \cdot 2^{e - 31} (1 + m / 8), \quad\text{or}\quad
        2^{s - 127} \cdot 2^{-30}\, m / 8 \quad\text{if } e = 0

    254 is infinity and 255 is NaN.
    """
    values = _scaled(codes, extra, 31)
    return np.where(
        codes == 255, np.float32("nan"), np.where(codes == 254, np.float32("inf"), values)
    )


def _store_unsigned(values: Array, random: Array | None) -> tuple[Array, Array]:
    """Store sizes, without signs. Only 0 becomes 0, so that what is divided by a root stays small.

    A scale is the exponent of the block's largest value, or one more where that would have a code
    above 253, which is 1.625 times a power of two.
    """
    scales = _scales(values, 1.625)
    codes = _blocks(values, scales, 31, random)
    codes = np.where(values != 0, np.maximum(codes, 1), codes)
    codes = np.where(np.isnan(values), 255, np.where(np.isinf(values), 254, codes))
    return codes.astype(np.uint8), scales


def _load_signed(codes: Array, extra: Array | None) -> Array:
    r"""Return values of codes that have a sign, 4 bits of exponent and 3 of mantissa.

    They are as those without sign, with 15 for 31. 127 and 255 are infinities; 128, which would be
    another zero, is NaN.
    """
    size = codes & 127
    values = np.where(size == 127, np.float32("inf"), _scaled(size, extra, 15))
    values = np.where(codes & 128, -values, values)
    return np.where(codes == 128, np.float32("nan"), values)


def _store_signed(values: Array, random: Array | None) -> tuple[Array, Array]:
    """Store with a scale as without sign; the largest finite code is 126, of 1.75."""
    scales = _scales(values, 1.75)
    codes = _blocks(values, scales, 15, random)
    codes = np.where(np.isinf(values), 127, codes)
    codes = np.where(np.signbit(values) & (codes > 0), codes | 128, codes)
    return np.where(np.isnan(values), 128, codes).astype(np.uint8), scales


def _scales(values: Array, most: float) -> Array:
    """Return the biased exponent of each block's largest finite value, one more if above `most`."""
    blocks = -(-values.size // SCALED)
    padded = np.zeros(blocks * SCALED, np.float32)
    padded[: values.size] = _finite(values)
    carry = int((2 - most) * 2**23) - 1  # what lies above `most` carries into the exponent
    return (_bits(padded.reshape(blocks, SCALED).max(axis=1)) + carry >> 23).astype(np.uint8)


def _scaled(codes: Array, scales: Array | None, top: int) -> Array:
    """Return what codes stand for, where `top` is the exponent of a block's largest values."""
    assert scales is not None
    exponent, mantissa = codes.astype(np.int64) >> 3, codes.astype(np.int64) & 7
    eighths = np.where(exponent == 0, mantissa, 8 + mantissa).astype(np.float64)
    scale = np.repeat(scales.astype(np.int64), SCALED)[: codes.size]
    with np.errstate(all="ignore"):
        values = np.ldexp(eighths, np.maximum(exponent, 1) - 3 - top + scale - 127)
        return np.asarray(values, np.float32)


def _blocks(values: Array, scales: Array, top: int, random: Array | None) -> Array:
    """Return the codes of the finite values; to nearest, ties are away from zero."""
    scale = np.repeat(scales.astype(np.int64), SCALED)[: values.size]
    size = np.ldexp(_finite(values), top + 127 - scale)
    return _small(size, 3, np.full(values.size, 0.5) if random is None else random / 2**16)


def _small(size: Array, digits: int, up: Array | None) -> Array:
    r"""Return codes of small floats, an exponent and so many binary digits of mantissa.

    Those of exponent :math:`e \ge 1` are multiples of :math:`2^{e - \text{digits}}`, from
    :math:`2^e` on; those of exponent 0 are the same multiples as of exponent 1, from 0 on. So codes
    are in the order of the sizes, and rounding up carries into the exponent. `up` is added before
    digits are cut off; None rounds to nearest, ties to even. `size` is double, in which all of this
    is exact.
    """
    exponent = np.maximum(np.frexp(size)[1] - 1, 1)
    multiple = np.ldexp(size, digits - exponent)
    rounded = np.rint(multiple) if up is None else np.floor(multiple + up)
    codes: Array = (exponent - 1) * 2**digits + rounded.astype(np.int64)
    return codes


def _finite(values: Array) -> Array:
    """Return sizes in double, 0 for what is not finite."""
    return np.abs(np.where(np.isfinite(values), values, np.float32(0))).astype(np.float64)


def _bits(values: Array) -> NDArray[np.uint32]:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


STORAGE: dict[str, Storage] = {
    "float32": Storage(_load_float32, _store_float32),
    "bfloat16": Storage(_load_bfloat16, _store_bfloat16),
    "bfloat16 with trailing bits": Storage(_load_bfloat16_split, _store_bfloat16_split),
    "float16": Storage(_load_float16, _store_float16),
    "float16 with master": Storage(_load_float16_master, _store_float16_master),
    "8-bit unsigned": Storage(_load_unsigned, _store_unsigned),
    "8-bit signed": Storage(_load_signed, _store_signed),
}


# ---- a step ----------------------------------------------------------------------------------

NUMBERS = ("mu_product",)  # state that is no array like the parameter, but one double

# State of each rule in its order: slot j is array 1 + j, and the parameter is array 0.
SLOTS = {
    "sgd": ("momentum_buffer",),
    "adagrad": ("sum",),
    "rmsprop": ("square_avg", "momentum_buffer", "grad_avg"),
    "adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "adamax": ("exp_avg", "exp_inf"),
    "adadelta": ("square_avg", "acc_delta"),
    "lion": ("exp_avg",),
    "nadam": ("exp_avg", "exp_avg_sq", "mu_product"),
    "radam": ("exp_avg", "exp_avg_sq"),
    "rprop": ("prev", "step_size"),
}


class Stored(NamedTuple):
    """An array as it is stored.

    Attributes
    ----------
    storage : str
        A name in :data:`STORAGE`.
    codes, extra : numpy.ndarray
        What its `store` has returned; `extra` may be None.

    Examples
    --------
    >>> import numpy as np
    >>> stored = Stored.of("bfloat16", np.array([3.14159274], np.float32))
    >>> stored.values()
    array([3.140625], dtype=float32)
    """

    storage: str
    codes: Array
    extra: Array | None = None

    @classmethod
    def of(cls, storage: str, values: Array, random: Array | None = None) -> Stored:
        """Store values, rounded to nearest or by random bits."""
        return cls(storage, *STORAGE[storage].store(values, random))

    def values(self) -> Array:
        """Return what is stored as a new float32 array."""
        return np.array(STORAGE[self.storage].load(self.codes, self.extra), np.float32)


def stored_step(
    rule: Callable[..., None],
    arrays: Mapping[str, Stored],
    grad: Array,
    *,
    step: int,
    seed: int = 0,
    index: int = 0,
    first: int = 0,
    stochastic: bool = True,
    **options: Any,
) -> dict[str, Stored]:
    """Return a parameter and its state after a step: loaded, updated as float32, stored again.

    Parameters
    ----------
    rule : callable
        A rule of :mod:`fastopt.reference`, such as ``adam``.
    arrays : dict
        The parameter as ``"param"``, and the rule's state by its names; a number as
        ``Stored("float64", number)``, a 0-d array. Nothing of it is changed.
    grad : numpy.ndarray
        The gradient, float32.
    step : int
        The number of this step; the first is 1.
    seed, index : int
        The optimizer's seed and the parameter's index in it, on which random bits depend.
    first : int
        If `arrays` are a part of the parameter: the index of its first element. A part that has
        8-bit arrays begins with a block.
    stochastic : bool
        Whether to round at random what is stored in fewer bits. Masters never are.
    **options
        The rule's own arguments.

    Returns
    -------
    dict
        Arrays of the same names, stored as those given.

    Examples
    --------
    An update far smaller than what bfloat16 holds of a 1 moves the mean of the parameters:

    >>> import numpy as np
    >>> from fastopt.reference import sgd
    >>> arrays = {"param": Stored.of("bfloat16", np.ones(10_000, np.float32))}
    >>> grad = np.full(10_000, 0.001, np.float32)
    >>> for step in range(1, 101):
    ...     arrays = stored_step(sgd, arrays, grad, step=step, lr=0.1)
    >>> round(float(arrays["param"].values().mean(dtype=np.float64)), 3)
    0.99
    """
    values = {
        name: np.array(stored.codes) if name in NUMBERS else stored.values()
        for name, stored in arrays.items()
    }
    state = {name: value for name, value in values.items() if name != "param"}
    rule(values["param"], grad, state, step=step, **options)
    after = {}
    for name, value in values.items():
        array = 0 if name == "param" else 1 + SLOTS[rule.__name__].index(name)
        if name in NUMBERS:
            after[name] = Stored("float64", value)
            continue
        random = None
        if stochastic:
            random = random_bits(
                value.size, seed=seed, step=step, param=index, array=array, first=first
            )
        after[name] = Stored.of(arrays[name].storage, value, random)
    return after
