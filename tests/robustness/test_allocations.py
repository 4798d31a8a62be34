"""Every allocation fails in turn: a MemoryError, and every byte as it was.

A small malloc (tests/c/failing_malloc.c) is loaded ahead of the C library's into a fresh
interpreter whose objects all come from malloc, so that Python's, NumPy's and fastopt's allocations
are met alike.
"""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from support import TESTS, python

import fastopt

SOURCE = TESTS / "c/failing_malloc.c"
ROOT = Path(fastopt.__file__).parents[1]
SCRIPT = """
import copy, ctypes, gc, sys
import numpy as np
from fastopt import Rows
from support import Run, differences, everything, make_grads
gc.disable()
allocator = ctypes.CDLL(sys.argv[1])
allocator.arm.argtypes, allocator.arm.restype = [ctypes.c_long] * 2, None
allocator.disarm.restype = ctypes.c_long
config = sys.argv[2]

def quarter(steps):
    return 0.25

def step(run):
    run.step(run.grads)

def scaled_step(run):
    run.step(run.grads, loss_scale=2.0, zero_grad=True)

def step_of_a_generator(run):
    run.step(run.grads, change=lambda g: g if isinstance(g, dict) else (x for x in g))

def step_with_new_hyperparameters(run):
    run.step(run.grads)

def step_that_needs_more_state(run):
    run.step(run.grads)

def step_of_new_layouts(run):
    run.step([np.array(g, order="F") for g in run.grads])

def add_param_group(run):
    new = [np.ones(5)]
    run.opt.add_param_group({"params": dict(v=new[0]) if run.given == "dict" else new})

def state_dict(run):
    run.opt.state_dict()

def load_state_dict(run):
    run.opt.load_state_dict(run.saved)

def reset(run):
    run.opt.reset()

def deepcopy(run):
    copy.deepcopy(run.opt)

def step_of_rows(run):
    run.step(run.of_rows, zero_grad=True)

def refresh_of_rows(run):
    run.opt.refresh(run.params[4], list(range(0, 4000, 7)))

def refresh(run):
    run.opt.refresh()

def construct(run):
    arrays = dict(zip(run.keys, run.params)) if run.given == "dict" else run.params
    type(run.opt)(arrays, ema_decay=0.5)

def prepare(act):
    if by_rows:
        return prepare_rows()
    run = Run(config, accumulate=int(sys.argv[3]))
    group = run.opt.param_groups[-1]
    if act is step_with_new_hyperparameters:
        group["lr"] = quarter
    if act is step_that_needs_more_state:
        group.update(dict.fromkeys({"momentum"} & group.keys(), 0.5))
        group.update(dict.fromkeys({"amsgrad", "centered"} & group.keys(), True))
    if act is load_state_dict:
        run.saved = run.opt.state_dict()
        run.opt.step(dict(zip(run.keys, run.grads)) if run.given == "dict" else run.grads)
    run.opt.param_groups[0]["lr"] = 0.5  # so that what _refresh does is among it
    return run

def some_rows(k, n):
    return Rows(np.arange(n)[::-1] % 5, np.ones(n, np.float32 if k == 1 else np.float64))

def prepare_rows():
    # All rows are behind; the next step has more rows than the last, and all of another array.
    run = Run(config, rows="exact")
    few = list(run.grads)
    few[1], few[4] = some_rows(1, 1), some_rows(4, 1)
    run.step(few)
    run.of_rows = list(run.grads)
    run.of_rows[4] = some_rows(4, 100)
    run.grads = [g.values if isinstance(g, Rows) else g for g in run.of_rows]
    return run

by_rows = sys.argv[3] == "rows"
acts = (
    step, scaled_step, step_of_a_generator, step_with_new_hyperparameters,
    step_that_needs_more_state, step_of_new_layouts, add_param_group, state_dict, load_state_dict,
    reset, deepcopy, construct,
)
failures = 0
for act in (step_of_rows, refresh_of_rows, refresh) if by_rows else acts:
    clean = prepare(act)
    act(clean)
    for count in (1, 40):
        for first in range(1, 10000, 1 if count == 1 else 20):
            run = prepare(act)
            before = run.everything()
            done = False
            allocator.arm(first, count)
            try:
                act(run)
                done = True
            except MemoryError:
                pass
            failed = allocator.disarm()
            if not done:
                assert failed, act
                changed = differences(run.everything(), before)
                if act is step_that_needs_more_state:  # it may have been made, and not used yet
                    changed = [name for name in changed if name in before]
                assert changed == [], (act, first, count)
                act(run)
                failures += 1
            assert differences(run.everything(), clean.everything()) == [], (act, first, count)
            if not failed:
                break
        assert done, "no end"
print(failures)
"""

FUNCTIONS = """
import ctypes, gc, importlib, sys
import numpy as np
from fastopt import functional
gc.disable()
allocator = ctypes.CDLL(sys.argv[1])
allocator.arm.argtypes, allocator.arm.restype = [ctypes.c_long] * 2, None
allocator.disarm.restype = ctypes.c_long

def arrays():
    made = [[np.full(n, 0.5 + k) for n in (3, 5)] for k in range(4)]
    return [made[0], [g.repeat(2)[::2] for g in made[1]], *made[2:], [np.zeros(n) for n in (3, 5)]]

def one(w, g, m, v, new):
    functional.adam(w[0], g[0], m[0], v[0], step=2, lr=0.1)

def several(w, g, m, v, new):
    functional.adam(w, g, m, v, step=2, lr=0.1, zero_grad=True)

def elsewhere(w, g, m, v, new):
    functional.adam([a[::-1] for a in w], g, m, v, step=2, lr=0.1, out=(new, m, v))

def of_rows(w, g, m, v, new):
    functional.adam(w, g, m, v, step=2, lr=0.1, indices=[[2, 0, 2], [4, 1, 0, 3, 1]])

def scalar(w, g, m, v, new):
    functional.sgd(w[0][:1].reshape(()), np.float64(2), lr=0.1)

failures = 0
for act in (one, several, elsewhere, of_rows, scalar):
    for warm in (False, True):
        clean = arrays()
        act(*clean)
        for count in (1, 40):
            for first in range(1, 10000):
                given = arrays()
                before = [a.tobytes() for x in given for a in x]
                importlib.reload(functional)
                if warm:
                    act(*arrays())
                done = False
                allocator.arm(first, count)
                try:
                    act(*given)
                    done = True
                except MemoryError:
                    pass
                failed = allocator.disarm()
                if not done:
                    assert failed, act
                    assert [a.tobytes() for x in given for a in x] == before, (act, first, count)
                    act(*given)
                    failures += 1
                for mine, expected in zip(given, clean):
                    assert all(map(np.array_equal, mine, expected)), (act, first, count)
                if not failed:
                    break
            assert done, "no end"
print(failures)
"""


@pytest.fixture(scope="module")
def allocator(tmp_path_factory):
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if platform.libc_ver()[0] != "glibc" or not shutil.which(compiler[0]):
        pytest.skip("needs glibc and a C compiler")
    built = tmp_path_factory.mktemp("allocator") / "failing_malloc.so"
    options = ["-shared", "-fPIC", "-O1", "-fno-builtin"]
    subprocess.run([*compiler, *options, str(SOURCE), "-o", str(built)], check=True)
    return built


def run(script, allocator, *arguments):
    """Run a script in an interpreter whose allocations can be made to fail; return its answer."""
    done = python(
        *("-W", "ignore", "-c", script, str(allocator), *arguments),
        timeout=300,
        LD_PRELOAD=str(allocator),
        PYTHONMALLOC="malloc",
        PYTHONPATH=os.pathsep.join([str(TESTS), str(ROOT)]),
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "accumulate"), [("adagrad", 1), ("rmsprop", 2)])
def test_an_allocation_that_fails_changes_nothing(config, accumulate, allocator):
    # (The first configuration is of groups, the second of a dict.)
    assert run(SCRIPT, allocator, config, str(accumulate)) > 2000


@pytest.mark.slow
def test_an_allocation_that_fails_amid_rows_changes_nothing(allocator):
    assert run(SCRIPT, allocator, "rmsprop", "rows") > 50


@pytest.mark.slow
def test_an_allocation_that_fails_in_a_function_changes_nothing(allocator):
    assert run(FUNCTIONS, allocator) > 100
