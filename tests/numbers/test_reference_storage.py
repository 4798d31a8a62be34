"""The reference's storage types: rounding to nearest, rounding at random, masters, 8-bit blocks.

``FASTOPT_EVERY_FLOAT=1`` takes all 2**32 patterns of a float32 where the suite takes every 61st.
"""

import itertools
import math
import os

import ml_dtypes
import numpy as np
import pytest

from fastopt import _reference_storage
from fastopt.reference import STORAGE, random_bits

BFLOAT16, FLOAT16 = "bfloat16", "float16"
SPLIT, MASTER = "bfloat16 with trailing bits", "float16 with master"
UNSIGNED, SIGNED = "8-bit unsigned", "8-bit signed"
DTYPES = {BFLOAT16: np.dtype(ml_dtypes.bfloat16), FLOAT16: np.dtype(np.float16)}
BLOCK = 64
ALL_CODES = np.arange(2**16, dtype=np.uint16)
FINITE_CODES = {BFLOAT16: 0x7F80, FLOAT16: 0x7C00, UNSIGNED: 254, SIGNED: 127}  # without sign
NAN_CODES = {BFLOAT16: 0x7FC0, FLOAT16: 0x7E00}  # of any NaN: positive, and it does not signal
SIGMAS = 5  # one sample in two million is farther out


def floats(patterns):
    return np.asarray(patterns, np.uint32).view(np.float32)


def bits(values):
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def rounded_by(dtype, values):
    """The patterns of another library's rounding to nearest, ties to even."""
    with np.errstate(all="ignore"):
        return values.astype(dtype).view(np.uint16)


def interesting():
    """Patterns at, beside and halfway between all that the 16-bit types hold, and random ones."""
    found = [np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)]
    for dtype in DTYPES.values():
        held = np.sort(bits(ALL_CODES.view(dtype).astype(np.float32))).astype(np.int64)
        between = (held[1:] + held[:-1]) // 2  # exact halves wherever both have one exponent
        found += [(at + near) % 2**32 for at in (held, between) for near in (-1, 0, 1)]
    small = np.arange(1, 2**10) * 2.0**-25  # halves of float16's subnormals are not so in patterns
    found += [bits(np.float32(small)) + np.uint32(near % 2**32) for near in (-1, 0, 1)]
    return floats(np.concatenate([part.astype(np.uint32) for part in found]))


def blocks(n, seed, spread=40):
    """Floats in `n` blocks of any exponent, within which exponents are so far apart."""
    rng = np.random.default_rng(seed)
    exponents = np.repeat(rng.integers(0, 255, n), BLOCK) - rng.integers(0, spread, n * BLOCK)
    pattern = np.maximum(exponents, 0).astype(np.uint32) << 23
    return floats(pattern | rng.integers(0, 2**23, n * BLOCK, dtype=np.uint32))


def any_random(n, seed=0):
    return random_bits(n, seed=seed, step=1, param=0, array=0)


# ---- loads, and stores to nearest --------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_every_code_of_16_bits_loads_as_elsewhere(name):
    expected = ALL_CODES.view(DTYPES[name]).astype(np.float32)
    loaded = STORAGE[name].load(ALL_CODES, None)
    assert loaded.dtype == np.float32
    nan = np.isnan(expected)
    assert nan.sum() == {BFLOAT16: 2 * 127, FLOAT16: 2 * 1023}[name]
    assert (np.isnan(loaded) == nan).all()
    assert (bits(loaded) == bits(expected))[~nan].all()
    if name == FLOAT16:  # as processors do it; bfloat16 is half of a float32, whatever that is
        assert (bits(loaded[nan]) & 0x400000).all()


def assert_nearest(name, values):
    codes, extra = STORAGE[name].store(values, None)
    assert codes.dtype == np.uint16
    assert extra is None
    nan = np.isnan(values)
    assert (codes == rounded_by(DTYPES[name], values))[~nan].all()
    assert (codes[nan] == NAN_CODES[name]).all()
    assert ((codes >> 15) == (bits(values) >> 31))[~nan].all()


@pytest.mark.parametrize("name", DTYPES)
def test_stores_round_to_the_nearest_as_elsewhere(name):
    values = interesting()
    size = np.abs(values)
    for what in (np.isnan(values), np.isinf(values), size == 0, (size > 0) & (size < 2**-126)):
        assert what.sum() >= 2
    assert_nearest(name, values)


def test_float32_is_stored_as_it_is():
    values = interesting()
    codes, extra = STORAGE["float32"].store(values, any_random(values.size))
    assert extra is None
    assert (codes == bits(values)).all()
    assert (bits(STORAGE["float32"].load(codes, None)) == codes).all()


CHUNK = 2**22
APART = 1 if os.environ.get("FASTOPT_EVERY_FLOAT") == "1" else 61  # of all exponents and endings


def ascending(within=lambda first, last: True):
    """Yield patterns of the whole range, some millions at a time, where `within` wants them all."""
    at = 0
    for start in range(0, 2**32, CHUNK):
        end = start + CHUNK
        first, last = np.abs(floats([start, end - 1]))
        apart = APART if within(first, last) else 64 * APART
        patterns = np.arange(max(at, start), end, apart, dtype=np.int64)
        at = patterns[-1] + apart
        yield floats(patterns)


@pytest.mark.slow
@pytest.mark.parametrize("name", [BFLOAT16, SPLIT])
def test_floats_of_the_whole_range(name):
    done = 0
    for values in ascending():
        if name == SPLIT:
            assert_split(values)
        else:
            assert_nearest(name, values)
        done += values.size
    assert done == math.ceil(2**32 / APART)


@pytest.mark.slow
def test_floats_that_float16_does_not_make_zero_or_infinite():
    """And every 64th of the others, which are five sixths of all."""
    done = 0
    for values in ascending(lambda first, last: last >= 2.0**-26 and first <= 2.0**17):
        assert_nearest(FLOAT16, values)
        done += values.size
    assert 2**32 / APART / 7 < done < 2**32 / APART / 5


# ---- masters -------------------------------------------------------------------------------------


def assert_split(values):
    codes, trailing = STORAGE[SPLIT].store(values, None)
    assert codes.dtype == trailing.dtype == np.uint16
    loaded = STORAGE[SPLIT].load(codes, trailing)
    nan = np.isnan(values)
    assert (bits(loaded) == bits(values))[~nan].all()
    assert (codes[nan] == NAN_CODES[BFLOAT16]).all()
    assert (trailing[nan] == 0).all()
    tie = (bits(values) & 0xFFFF) == 0x8000
    nearest = rounded_by(DTYPES[BFLOAT16], values)
    away = (bits(values) >> 16) + 1
    assert (codes == np.where(tie, away, nearest))[~nan].all()


def test_trailing_bits_lose_nothing_and_the_parameter_is_the_nearest():
    assert_split(interesting())


@pytest.mark.parametrize("name", [SPLIT, MASTER])
def test_masters_need_no_random_bits(name):
    values = interesting()
    for one, other in zip(
        STORAGE[name].store(values, None),
        STORAGE[name].store(values, any_random(values.size)),
        strict=True,
    ):
        assert one.tobytes() == other.tobytes()


def test_whatever_the_trailing_bits_a_value_rounds_to_its_code():
    """As after others have written the parameter: it loses half of a spacing at most."""
    edges = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    for trailing in edges + list(np.random.default_rng(0).integers(0, 2**16, 30)):
        stale = np.full(2**16, trailing, np.uint16)
        loaded = STORAGE[SPLIT].load(ALL_CODES, stale)
        codes, _ = STORAGE[SPLIT].store(loaded, None)
        written = STORAGE[BFLOAT16].load(ALL_CODES, None)
        nan = np.isnan(written)
        assert (np.isnan(loaded) == nan).all()
        assert (codes == ALL_CODES)[~nan].all()
        assert (np.signbit(loaded) == np.signbit(written))[~nan].all()
        assert np.abs(loaded[written == 0]).max() < 2.0**-126
        if trailing < 0x8000:
            assert (loaded == written)[np.isinf(written)].all()
        else:  # the floats that bfloat16 holds as infinite end with these bits
            assert np.abs(loaded[np.isinf(written)]).min() >= floats([0x7F7F8000])[0]


def test_a_float32_master_is_kept_until_the_parameter_is_written():
    values = interesting()
    codes, master = STORAGE[MASTER].store(values, None)
    assert (codes == STORAGE[FLOAT16].store(values, None)[0]).all()
    assert (bits(master) == bits(values)).all()
    assert (bits(STORAGE[MASTER].load(codes, master)) == bits(values)).all()

    values = np.full(2**16, 1.001, np.float32)
    _, master = STORAGE[MASTER].store(values, None)
    loaded = STORAGE[MASTER].load(ALL_CODES, master)
    expected = STORAGE[FLOAT16].load(ALL_CODES, None)
    expected[int(np.float16(1.001).view(np.uint16))] = 1.001
    assert (bits(loaded) == bits(expected)).all()


# ---- 8 bits --------------------------------------------------------------------------------------


def decoded(name, n=2000):
    """Values of any codes, of any scale but 0; and of the blocks of tiny values that have that."""
    load, store = STORAGE[name]
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, n * BLOCK, dtype=np.uint8)
    scales = np.append(np.arange(1, 256), rng.integers(1, 256, n - 255)).astype(np.uint8)
    tiny = floats(rng.integers(0, 2**23, (n, 1)) >> rng.integers(0, 23, (n, BLOCK))).reshape(-1)
    tiny_codes, tiny_scales = store(tiny, any_random(tiny.size))
    assert (tiny_scales == 0).sum() > n / 2
    return np.append(load(codes, scales), load(tiny_codes, tiny_scales))


def same(one, other):
    return ((one == other) | (np.isnan(one) & np.isnan(other))).all()


@pytest.mark.parametrize("random", [None, 0, 0x8000, 0xFFFF])
@pytest.mark.parametrize("name", [UNSIGNED, SIGNED])
def test_what_was_stored_in_8_bits_is_stored_again_unchanged(name, random):
    values = decoded(name)
    given = None if random is None else np.full(values.size, random, np.uint32)
    assert same(STORAGE[name].load(*STORAGE[name].store(values, given)), values)


@pytest.mark.parametrize(("name", "most"), [(UNSIGNED, 253), (SIGNED, 126)])
def test_the_largest_code_keeps_its_scale(name, most):
    codes = np.append(np.arange(min(most, 63)), most).astype(np.uint8)
    for scale in range(12, 254):
        again, scales = STORAGE[name].store(
            STORAGE[name].load(codes, np.array([scale], np.uint8)), None
        )
        assert scales == [scale]
        assert (again == codes).all()


@pytest.mark.parametrize("name", [UNSIGNED, SIGNED])
def test_codes_are_in_the_order_of_their_values(name):
    codes = np.arange(FINITE_CODES[name]).astype(np.uint8)
    scales = np.full(-(-codes.size // BLOCK), 100, np.uint8)
    values = STORAGE[name].load(codes, scales)
    assert values[0] == 0
    assert (np.diff(values) > 0).all()
    assert (np.diff(values[8:]) / values[8:-1] <= 1 / 8).all()  # three digits after the first


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("name", [UNSIGNED, SIGNED])
def test_8_bits_lose_little_beside_the_largest(name, random):
    """The smallest code is the spacing below the normal ones; derived from the largest's code.

    A largest value is at least 13/16 of the power of two that has the scale as exponent (7/8 with
    sign), since it would have a scale less otherwise.
    """
    values = blocks(2000, seed=2)
    if name == SIGNED:
        values = values * np.float32([1, -1])[np.arange(values.size) % 2]
    largest = np.repeat(np.abs(values).reshape(-1, BLOCK).max(axis=1), BLOCK).astype(np.float64)
    values, largest = values[largest < 1.9 * 2.0**127], largest[largest < 1.9 * 2.0**127]
    codes, scales = STORAGE[name].store(values, any_random(values.size) if random else None)
    assert codes.dtype == scales.dtype == np.uint8
    assert scales.size == codes.size // BLOCK
    smallest = largest * (16 / 13 * 2.0**-33 if name == UNSIGNED else 8 / 7 * 2.0**-17)
    spacing = np.maximum(np.abs(values.astype(np.float64)) / 8, smallest)
    error = np.abs(STORAGE[name].load(codes, scales).astype(np.float64) - values)
    tiny = np.abs(values) < smallest
    whole = random | ((name == UNSIGNED) & tiny)  # without sign, only 0 is stored as 0
    assert tiny.sum() > 1000
    assert (error <= np.where(whole, spacing, spacing / 2)).all()


@pytest.mark.parametrize("random", [None, 0, 0xFFFF])
def test_without_sign_only_zero_is_stored_as_zero(random):
    values = blocks(2000, seed=3, spread=250)
    values[::7] = 0
    given = None if random is None else np.full(values.size, random, np.uint32)
    loaded = STORAGE[UNSIGNED].load(*STORAGE[UNSIGNED].store(values, given))
    assert ((loaded == 0) == (values == 0)).all()
    assert not np.signbit(loaded).any()


def test_with_sign_values_keep_it_and_zero_has_none():
    values = blocks(2000, seed=4) * np.float32([1, -1])[np.arange(2000 * BLOCK) % 2]
    values[::7] *= np.float32(0)
    codes, scales = STORAGE[SIGNED].store(values, any_random(values.size))
    loaded = STORAGE[SIGNED].load(codes, scales)
    assert (np.signbit(loaded) == np.signbit(values))[loaded != 0].all()
    assert (loaded[values == 0] == 0).all()
    assert (codes[loaded == 0] == 0).all()


@pytest.mark.parametrize("name", [UNSIGNED, SIGNED])
def test_what_is_not_finite_stays_so_and_changes_nothing_else(name):
    finite = blocks(500, seed=5)
    rng = np.random.default_rng(5)
    other = np.float32([np.nan, np.inf, -np.inf])[rng.integers(0, 3, finite.size)]
    put = rng.random(finite.size) < 0.1
    put[:BLOCK] = True
    codes, scales = STORAGE[name].store(np.where(put, other, finite), None)
    expected, same_scales = STORAGE[name].store(np.where(put, np.float32(0), finite), None)
    assert (scales == same_scales).all()
    assert (codes == expected)[~put].all()
    kept = other if name == SIGNED else np.abs(other)
    assert same(STORAGE[name].load(codes, scales)[put], kept[put])


@pytest.mark.parametrize("name", [UNSIGNED, SIGNED])
def test_zeros_are_zeros_and_blocks_may_be_cut_short(name):
    load, store = STORAGE[name]
    values = blocks(2, seed=6)
    for n in (0, 1, 63, 64, 65, 128):
        assert not load(np.zeros(n, np.uint8), np.zeros(-(-n // BLOCK), np.uint8)).any()
        codes, scales = store(np.zeros(n, np.float32), any_random(n))
        assert codes.shape == (n,)
        assert scales.shape == (-(-n // BLOCK),)
        assert not codes.any()
        assert not scales.any()
        padded = np.zeros(-(-n // BLOCK) * BLOCK, np.float32)
        padded[:n] = values[:n]
        for one, other in zip(store(values[:n], None), store(padded, None), strict=True):
            assert (one == other[: one.size]).all()


# ---- rounding at random --------------------------------------------------------------------------


def stored(name, values, random):
    """Store and load; in 8 bits, each block begins with a 1, so that all have one scale."""
    load, store = STORAGE[name]
    if name in DTYPES:
        return load(*store(values, random))
    n = values.size
    assert n % (BLOCK - 1) == 0
    shape = (n // (BLOCK - 1), BLOCK)
    padded, bits16 = np.ones(shape, np.float32), np.zeros(shape, np.uint32)
    padded[:, 1:], bits16[:, 1:] = values.reshape(-1, BLOCK - 1), random.reshape(-1, BLOCK - 1)
    loaded = load(*store(padded.reshape(-1), bits16.reshape(-1))).reshape(shape)
    assert (loaded[:, 0] == 1).all()
    return np.ascontiguousarray(loaded[:, 1:]).reshape(-1)


def grid(name):
    """All sizes that can be stored, in double."""
    codes = np.arange(FINITE_CODES[name])
    if name in DTYPES:
        return STORAGE[name].load(codes.astype(np.uint16), None).astype(np.float64)
    _, scales = STORAGE[name].store(np.ones(1, np.float32), None)
    scales = np.repeat(scales, -(-codes.size // BLOCK))
    return STORAGE[name].load(codes.astype(np.uint8), scales).astype(np.float64)


# From where to where the exponents are of the sizes to draw, and by how many bits they are rounded.
RANGES = {
    "bfloat16": (BFLOAT16, -126, 127, 16),
    "bfloat16, subnormal": (BFLOAT16, -149, -126, 16),
    "float16": (FLOAT16, -14, 15, 13),
    "float16, subnormal": (FLOAT16, -26, -14, 16),
    "8-bit unsigned": (UNSIGNED, -30, 0, 16),
    "8-bit unsigned, subnormal": (UNSIGNED, -33, -30, 16),
    "8-bit signed": (SIGNED, -14, 0, 16),
    "8-bit signed, subnormal": (SIGNED, -20, -14, 16),
}


def drawn(case, n):
    """Values of either sign, the sizes below and above, and how far up, from 0 to 1, they lie."""
    name, least, most, digits = RANGES[case]
    rng = np.random.default_rng(7)
    sizes = np.float32(2.0 ** rng.uniform(least, most, n))
    held = grid(name)
    up = np.searchsorted(held, sizes, side="right")
    low, high = held[up - 1], held[up]
    values = sizes if name == UNSIGNED else sizes * np.float32([1, -1])[np.arange(n) % 2]
    return name, digits, values, low, high, (sizes - low) / (high - low)


@pytest.mark.parametrize("case", RANGES)
def test_of_all_random_bits_the_right_part_rounds_up(case):
    """Exactly, but that the part is cut off to so many bits."""
    name, digits, values, low, high, part = drawn(case, 40)
    every = np.arange(63 * 1041, dtype=np.uint32) % 2**16  # whole blocks; some come twice
    for k in range(values.size):
        result = np.abs(stored(name, np.full(every.size, values[k]), every)[: 2**16])
        assert np.isin(result, [low[k], high[k]]).all()
        assert (result == high[k]).sum() == math.floor(part[k] * 2**digits) * 2 ** (16 - digits)


@pytest.mark.parametrize("case", RANGES)
def test_rounding_at_random_keeps_the_mean_and_has_the_variance_of_a_coin(case):
    """Of a coin that shows 1 with probability p, less p: mean 0, variance p(1-p).

    The means of N throws have the standard errors sqrt(p(1-p) / N) and, of the squares, that times
    |1-2p|. Bernstein's inequality adds a little where p is so small that few throws show 1. And p
    is cut off to so many bits.
    """

    def bound(variance, throws):
        rare = SIGMAS**2 / 6 / throws
        return rare + np.sqrt(rare**2 + SIGMAS**2 * variance / throws) + 2.0**-digits

    name, digits, values, low, high, part = drawn(case, 63 * 8)
    steps = 2000
    mean, square = np.zeros(values.size), np.zeros(values.size)
    for step in range(1, steps + 1):
        random = random_bits(values.size, seed=3, step=step, param=1, array=2)
        up = (np.abs(stored(name, values, random)) - low) / (high - low)
        mean += (up - part) / steps
        square += (up - part) ** 2 / steps
    variance = part * (1 - part)
    assert (np.abs(mean) <= bound(variance, steps)).all()
    assert (np.abs(square - variance) <= bound(variance * (1 - 2 * part) ** 2, steps)).all()
    assert abs(mean.mean()) <= bound(variance.mean(), steps * values.size)


@pytest.mark.parametrize("random", [0, 1, 0x8000, 0xFFFF])
@pytest.mark.parametrize("name", DTYPES)
def test_what_16_bits_hold_is_stored_unchanged(name, random):
    values = STORAGE[name].load(ALL_CODES, None)
    codes, _ = STORAGE[name].store(values, np.full(values.size, random, np.uint32))
    nan = np.isnan(values)
    assert (codes == ALL_CODES)[~nan].all()
    assert np.isnan(STORAGE[name].load(codes, None)[nan]).all()


@pytest.mark.parametrize("name", DTYPES)
def test_at_random_a_neighbour_is_stored(name):
    """What lies beyond all codes has infinity as its neighbour, with the code after the last."""
    values = interesting()
    values = values[np.isfinite(values)]
    size = np.abs(values).astype(np.float64)
    held = np.append(grid(name), 2.0 ** {BFLOAT16: 128, FLOAT16: 16}[name])
    below = np.searchsorted(held, size, side="right") - 1
    above = np.minimum(below + (size > held[below]), FINITE_CODES[name])
    codes, _ = STORAGE[name].store(values, any_random(values.size))
    assert (codes >> 15 == bits(values) >> 31).all()
    codes &= 0x7FFF
    assert ((codes == below) | (codes == above)).all()
    assert (codes == below).sum() > 1000
    assert ((codes == above) & (above > below)).sum() > 1000


# ---- random bits ---------------------------------------------------------------------------------

KEY = {"seed": 0, "step": 1, "param": 0, "array": 0}
OTHERS = [
    {"seed": 1},
    {"seed": 2**63},
    {"step": 2},
    {"step": 2**40},
    {"param": 1},
    {"first": 2**32},
    {"first": 2**33},
]
ARRAYS = [{"array": 1}, {"array": 2}, {"array": 3}]


def test_the_mixer_is_splitmix64():
    """Whose first outputs from the state 1234567 are published."""
    golden = 0x9E3779B97F4A7C15
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [_reference_storage._mix(1234567 + k * golden) for k in (1, 2, 3)] == published


def defined(element, *, seed, step, param, array):
    """The definition, of one element."""

    def mix64(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    key = mix64((seed + golden) % 2**64)
    for number in (step, param, element // 2**32):
        key = mix64(((key ^ number) + golden) % 2**64)
    first, second = key % 2**32, key // 2**32
    h = (first + element % 2**32 // 2 * 0x9E3779B9) % 2**32
    h = ((h ^ (h >> 16)) * 0x7FEB352D + second) % 2**32
    h = (h ^ (h >> 15)) * 0x846CA68B % 2**32
    h = h ^ (h >> 16)
    bits = f"{h:032b}"  # as text, the highest first
    rotated = {0: bits, 1: bits[16:] + bits[:16], 2: bits[8:] + bits[:8], 3: bits[24:] + bits[:24]}
    return int(rotated[array][:16] if element % 2 else rotated[array][16:], 2)


@pytest.mark.parametrize("other", [{}, *OTHERS, *ARRAYS], ids=str)
def test_random_bits_are_those_of_the_definition(other):
    key = KEY | other
    first = key.pop("first", 0)
    for start in (first, first + 1000, first + 2**31 - 20, first + 2**32 - 20):
        expected = [defined(start + k, **key) for k in range(100)]
        assert random_bits(100, **key, first=start).tolist() == expected


def test_random_bits_are_uniform():
    """Chi-squared has as its mean the degrees of freedom, and twice that as its variance."""
    n = 2**20
    for key in [{}, *OTHERS, *ARRAYS]:
        random = random_bits(n, **(KEY | key))
        assert random.dtype == np.uint32
        assert random.max() < 2**16
        for cells in (2**16, 2**8, 2):
            counts = np.bincount(random // (2**16 // cells), minlength=cells)
            chi = ((counts - n / cells) ** 2 / (n / cells)).sum()
            assert abs(chi - (cells - 1)) < SIGMAS * math.sqrt(2 * (cells - 1))
        lowest = np.bincount(random & 1)
        assert abs(lowest[0] - n / 2) < SIGMAS * math.sqrt(n / 4)


def assert_uncorrelated(one, other):
    """The mean product of two independent uniform numbers, with mean 0 and variance 1, is 0."""
    product = (one - 32767.5) * (other - 32767.5) / ((2**32 - 1) / 12)
    assert abs(product.mean()) < SIGMAS / math.sqrt(product.size)


def test_neighbours_have_uncorrelated_random_bits():
    n = 2**18
    for seed in range(4):
        random = random_bits(n + 4096, **(KEY | {"seed": seed})).astype(np.float64)
        for apart in [1, 2, 3, 4, 8, 15, 16, 17, 31, 32, 33, 48, 64, 100, 128, 256, 512, 768, 4096]:
            assert_uncorrelated(random[:n], random[apart : apart + n])


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_seeds_steps_and_arrays_have_uncorrelated_random_bits(other):
    n = 2**18
    one, two = (random_bits(n, **key).astype(np.float64) for key in (KEY, KEY | other))
    assert_uncorrelated(one, two)


@pytest.mark.parametrize("apart", [2**20, 2**25, 2**28, 2**29, 2**30, 2**31])
def test_elements_far_apart_have_uncorrelated_random_bits(apart):
    n = 2**18
    for seed in range(4):
        key = KEY | {"seed": seed}
        one, two = (random_bits(n, **key, first=first).astype(np.float64) for first in (0, apart))
        assert_uncorrelated(one, two)


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(range(4), 2)])
def test_an_element_has_other_random_bits_in_each_array(one, other):
    """None in common; or the upper byte of one is the lower of the other, a 256th of its size."""
    n = 2**18
    a, b = (random_bits(n, **(KEY | {"array": array})) for array in (one, other))
    a, b = a.astype(np.float64), b.astype(np.float64)
    if {one, other} in ({0, 1}, {2, 3}):
        assert_uncorrelated(a, b)
    assert abs(np.corrcoef(a, b)[0, 1]) < 1 / 256 + SIGMAS / math.sqrt(n)
    assert_uncorrelated(a[:-2], b[2:])


@pytest.mark.parametrize("first", [0, 5, 2**32 - 70, 2**40 + 3, 2**62])
def test_random_bits_are_the_same_however_a_range_is_cut(first):
    whole = random_bits(200, **KEY, first=first)
    for cuts in ([0, 200], [0, 1, 16, 33, 70, 200], range(201)):
        parts = [random_bits(b - a, **KEY, first=first + a) for a, b in itertools.pairwise(cuts)]
        assert (np.concatenate(parts) == whole).all()
    assert random_bits(0, **KEY, first=first).size == 0
