"""A coverage-guided fuzzer of gradients of rows; it needs ``pip install atheris``.

Arguments are libFuzzer's::

    python tests/fuzz/fuzz_rows.py -max_total_time=30

An input is the numbers of rows, of some integer type: a step takes them all and has the bits of a
dense one, or refuses them by name and changes nothing.
"""

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["fastopt"]):
    import fastopt._rows

import numpy as np
from sparse import as_dense
from support import contents, differences, everything

N_ROWS, TYPES = 5, ["i1", "u1", "i2", ">i2", "u4", "i8", "u8", "f4"]
EXACT, DENSE = (
    fastopt.Adam([np.ones((N_ROWS, 3)), np.ones(2)], rows=rows) for rows in ("exact", "lazy")
)
VALUES = np.random.default_rng(0).standard_normal((4096, 3))


def numbers_in(given):
    """Return the array that an input is, and whether its rows exist."""
    kind = np.dtype(TYPES[given[0] % len(TYPES)])
    rest = given[1 : 1 + (len(given) - 1) // kind.itemsize * kind.itemsize]
    numbers = np.frombuffer(rest, kind)
    if given[0] & 16:  # most that are drawn exist
        numbers = (numbers % kind.type(N_ROWS)).astype(kind)
    are_rows = kind.kind != "f" and all(0 <= number < N_ROWS for number in numbers.tolist())
    return numbers, are_rows


def try_to_step(given):
    if len(given) == 0:
        return
    numbers, are_rows = numbers_in(given)
    before = everything(EXACT)
    try:
        rows = fastopt.Rows(numbers, VALUES[: len(numbers)])
        if given[0] & 32:
            EXACT.refresh(EXACT.params[0], numbers)
        EXACT.step([rows, None])
    except (TypeError, ValueError):
        changed = differences(everything(EXACT), before)
        if are_rows or changed:
            raise RuntimeError(f"rows exist: {are_rows}; changed: {changed}") from None
        return
    assert are_rows, (numbers, numbers.dtype)
    DENSE.step([as_dense(rows, DENSE.params[0]), None])
    if given[0] & 64:
        EXACT.refresh()
        assert contents(EXACT) == contents(DENSE)


if __name__ == "__main__":
    atheris.Setup([*sys.argv, "-max_len=4096", "-timeout=10"], try_to_step)
    atheris.Fuzz()
