"""One optimizer in several threads or processes: spawned, forked, stepped at the same time."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from support import advance, contents, python

from fastopt import Adam


def test_an_optimizer_can_be_sent_to_a_spawned_process_and_back():
    opt, grads = Adam({"w": np.arange(5000.0)}, ema_decay=0.5), {"w": np.ones(5000)}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        back = pool.submit(advance, opt, grads, 3).result(timeout=60)
    assert opt.completed_steps == 0
    assert contents(back) == contents(advance(opt, grads, 3))


# ---- threads -------------------------------------------------------------------------------------


def run_together(*targets):
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_threads_that_step_one_optimizer_take_turns():
    size, steps = 1 << 16, 100  # large enough that steps drop the GIL
    rng = np.random.default_rng(0)
    start, grad = rng.standard_normal(size), rng.standard_normal(size)
    shared, serial = (Adam([start.copy()], ema_decay=0.9, clip_norm=1.0) for _ in range(2))
    run_together(*[lambda: advance(shared, [grad], steps)] * 3)
    advance(serial, [grad], 3 * steps)
    assert shared.completed_steps == shared.state[0]["step"] == 3 * steps
    assert contents(shared) == contents(serial)


def test_threads_that_step_their_own_optimizers_do_not_meet():
    size, steps = 1 << 16, 60
    grads = [np.random.default_rng(i).standard_normal(size) for i in range(4)]
    apart, serial = ([Adam([np.ones(size)], lr=i) for i in range(4)] for _ in range(2))
    run_together(*[lambda i=i: advance(apart[i], [grads[i]], steps) for i in range(4)])
    for i in range(4):
        assert contents(apart[i]) == contents(advance(serial[i], [grads[i]], steps))


# ---- fork ----------------------------------------------------------------------------------------

FORK = """
import os, signal, sys, threading
import numpy as np
import fastopt
from fastopt import _core
signal.alarm(40)  # whatever hangs is killed, children too: they are in this process group

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

def succeeded(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
STEP_AFTER_FORK = """
_core.force_threads(3, openmp=OPENMP)
rng = np.random.default_rng(0)
start, grad = rng.standard_normal(1 << 20), rng.standard_normal(1 << 20)

def train(opt, steps):
    for _ in range(steps):
        result = opt.step([grad])
    return result

parent = os.getpid()
whole, forked = (fastopt.Adam([start.copy()], clip_norm=1.0) for _ in range(2))
train(whole, 22)
assert train(forked, 2).threads == (3 if _core.has_openmp() else 1)

def check():
    result = train(forked, 20)
    alone = os.getpid() != parent and OPENMP  # an OpenMP team does not survive a fork
    assert result.threads == (3 if _core.has_openmp() and not alone else 1), result
    assert forked.params[0].tobytes() == whole.params[0].tobytes(), "other bits"

for _ in range(5):
    assert succeeded(child(check)), "child"
pids = [child(check) for _ in range(3)]
check()
assert all([succeeded(pid) for pid in pids]), "children beside their parent"
train(forked, 1)
"""
FORK_AMID_STEPS = """
_core.force_threads(3)
busy = fastopt.SGD([np.zeros(1 << 20)])
stop = threading.Event()

def train():
    while not stop.is_set():
        busy.step([busy.params[0]])

thread = threading.Thread(target=train)
thread.start()

def step():
    opt = fastopt.SGD([np.ones(1 << 15)], lr=0.5)
    for _ in range(3):
        assert opt.step([np.ones(1 << 15)]).threads == (3 if _core.has_openmp() else 1)
    assert (opt.params[0] == -0.5).all()

def step_and_fork():
    step()
    assert succeeded(child(step)), "grandchild"
    step()

try:
    for _ in range(20):
        assert succeeded(child(step_and_fork)), "child"
finally:
    stop.set()
    thread.join(20)
"""
LOCK_AFTER_FORK = """
import copy, pickle
inside, leave = threading.Event(), threading.Event()

def slow(steps):
    if armed:
        inside.set()
        leave.wait(30)
    return 0.5

armed = False
optimizers = [fastopt.SGD([np.ones(3)], lr=slow)]
optimizers.append(copy.deepcopy(optimizers[0]))
for opt in optimizers:
    armed = True
    inside.clear()
    leave.clear()
    thread = threading.Thread(target=opt.step, args=([np.ones(3)],))
    thread.start()
    assert inside.wait(20)

    def work():
        global armed
        armed = False
        opt.step([np.ones(3)])
        opt.state_dict()

    pid = child(work)
    assert succeeded(pid), "child"
    leave.set()
    thread.join(20)
    assert opt.completed_steps == 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    "script",
    [
        f"OPENMP = False\n{STEP_AFTER_FORK}",
        f"OPENMP = True\n{STEP_AFTER_FORK}",
        FORK_AMID_STEPS,
        LOCK_AFTER_FORK,
    ],
    ids=["step", "openmp", "amid", "lock"],
)
def test_after_a_fork_both_processes_go_on(script):
    done = python("-W", "ignore::DeprecationWarning", "-c", FORK + script, timeout=60)
    assert done.returncode == 0, done.stderr
