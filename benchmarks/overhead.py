"""What a step costs besides its arithmetic: ``python benchmarks/overhead.py``

Adam in float32 on arrays so small that calls and checks are most of it, beside one
``numpy.add(a, b, out=c)`` of 1000 elements: by a class; how much of that is below the Python of
``Optimizer.step``; by ``fastopt.functional``; and below all Python: through the C interface, from a
loop in C, which CC (or cc) compiles.

All take turns, in each of which one is called for some milliseconds, with warm caches. The median
turn is what they got on this machine, which others may share, and the best is what they take. The
exit status is 1 if a bound, of a median, is broken.
"""

import argparse
import ctypes
import os
import shlex
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import fastopt
from fastopt import _core, functional
from fastopt.bench.measure import Interleaved

UNIT = "numpy.add, 1000"
# Name, shapes, and how many times the unit it may take.
STEPS = (
    ("Adam, 1 array of 1000", [1000], 5.0),
    ("Adam, 1 array of 16", [16], None),
    ("Adam, 6 arrays of 16", [16] * 6, 10.0),
    ("Adam, 300 arrays of 16", [16] * 300, None),
)


def subject(step):
    return SimpleNamespace(begin=lambda: None, step=step)


C_STEPS = 100  # a call from Python, whose own time is so divided


def compiled(folder):
    """Compile and load the loop in C; return it, and the table that it calls."""
    path = Path(folder, "c_steps.so")
    flags = ["-std=c11", "-O2", "-shared", "-fPIC", f"-I{fastopt.get_include()}"]
    source = Path(__file__).with_name("c_steps.c")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    subprocess.run([*compiler, *flags, source, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    library.make.restype = ctypes.c_void_p
    library.make.argtypes = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
    library.run.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_int
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return library, get_pointer(_core._C_API, b"fastopt._core._C_API")


def c_subjects(library, table, name, sizes):
    model = library.make(table, len(sizes), sizes[0])
    for title, set_grads in ((f"{name}, C", 0), (f"{name}, C, gradients set", 1)):
        if model is None or library.run(model, 1, set_grads) != 0:
            raise RuntimeError("the steps in C fail")
        yield title, subject(partial(library.run, model, C_STEPS, set_grads))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100, help="(100)")
    parser.add_argument("--no-check", action="store_true", help="exit with 0 in any case")
    args = parser.parse_args()

    a, b, c = np.ones((3, 1000), np.float32)
    subjects = {UNIT: subject(partial(np.add, a, b, out=c))}
    steps = {}  # that a call does, if not one
    with tempfile.TemporaryDirectory() as folder:
        library, table = compiled(folder)
    for name, sizes, _ in STEPS:
        rng = np.random.default_rng(0)
        params = [rng.standard_normal(size, np.float32) for size in sizes]
        grads = [rng.standard_normal(size, np.float32) for size in sizes]
        opt = fastopt.Adam(params)
        subjects[name] = subject(partial(opt.step, grads))
        subjects[f"{name}, below Python"] = subject(partial(opt._plan.step, grads, 1.0, False))
        arrays = [params, grads, *([np.zeros_like(p) for p in params] for _ in range(2))]
        if len(params) == 1:
            arrays = [one for (one,) in arrays]
        call = partial(functional.adam, *arrays, step=10, lr=1e-3)
        subjects[f"{name}, functional"] = subject(call)
        in_c = dict(c_subjects(library, table, name, sizes))
        subjects |= in_c
        steps |= dict.fromkeys(in_c, C_STEPS)
    interleaved = Interleaved(subjects)
    for _ in range(args.rounds):
        interleaved.round()

    bounds = {name: bound for name, _, bound in STEPS}
    broken = 0
    unit = interleaved.timing(UNIT).median
    print(f"{'microseconds':<40} {'best':>7} {'median':>7} {'times numpy.add':>16} {'bound':>6}")
    for name in subjects:
        timing, count, bound = interleaved.timing(name), steps.get(name, 1), bounds.get(name)
        best, seconds = timing.best / count, timing.median / count
        over = bound is not None and seconds > bound * unit
        broken += over
        ratio = f"{seconds / unit:.2f}" + "!" * over
        us = f"{best * 1e6:>7.3f} {seconds * 1e6:>7.3f}"
        print(f"{name:<40} {us} {ratio:>16} {bound or '':>6}")
    return int(broken > 0 and not args.no_check)


if __name__ == "__main__":
    sys.exit(main())
