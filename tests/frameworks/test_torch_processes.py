"""Forks and threads beside PyTorch, whose OpenMP is loaded too, before fastopt's or after it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import python

import fastopt

SCRIPT = """
import os, signal, sys, threading
signal.alarm(100)  # whatever hangs is killed, children too: they are in this process group
IMPORTS
import numpy as np

def succeeded(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(30)
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid

torch.set_num_threads(2)
a = torch.ones(400, 400)
assert (a @ a)[0, 0] == 400  # PyTorch's threads are there now

from fastopt import _core
_core.force_threads(3)
rng = np.random.default_rng(0)
start, grads = rng.standard_normal(1 << 16), [rng.standard_normal(1 << 16) for _ in range(51)]
whole = fastopt.Adam([start.copy()], ema_decay=0.9)
bits = []
for grad in grads:
    whole.step([grad])
    bits.append(whole.params[0].tobytes())
forked = fastopt.Adam([start.copy()], ema_decay=0.9)
param = torch.nn.Parameter(torch.from_numpy(start.copy()))
adam = fastopt.torch.Adam([param])

def check(number):
    assert forked.step([grads[number]]).threads == 3
    assert forked.params[0].tobytes() == bits[number], f"step {number}"
    param.grad = torch.from_numpy(grads[number])
    adam.step()
    assert param.detach().numpy().tobytes() == bits[number], f"PyTorch's classes, step {number}"

def go_on(number):
    for later in range(number, min(number + 3, 51)):
        check(later)

check(0)  # PyTorch makes the state, with threads that a child of its own would wait for
for number in range(1, 51):
    a @ a
    pid = child(lambda: go_on(number))
    check(number)
    assert succeeded(pid), f"child {number}"
assert (a @ a)[0, 0] == 400
print("end")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    "imports",
    [
        "import torch, sklearn.svm, fastopt.torch, fastopt",
        "import fastopt, sklearn.svm, torch, fastopt.torch",
    ],
)
def test_forks_beside_pytorchs_openmp(imports):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT.replace("IMPORTS", imports)],
        env={**os.environ, "PYTHONPATH": str(Path(fastopt.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


LENT = "import fastopt, fastopt.torch; print(fastopt.build_info()['borrowed_threads'])"


@pytest.mark.parametrize(("switch", "lent"), [(None, "['torch']"), ("0", "[]")])
def test_build_info_says_whether_steps_may_run_in_pytorchs_threads(switch, lent):
    done = python("-c", LENT, FASTOPT_BORROW_THREADS=switch)
    assert done.stdout.strip() == lent, done.stderr
