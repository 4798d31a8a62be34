"""One optimizer in several threads or processes: spawned, forked, stepped at the same time."""

import copy
import multiprocessing
import os
import sysconfig
import threading
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support import TESTS, advance, contents, python
from tables import ROWS

import fastopt
from fastopt import SGD, Adam, _core, functional

ROOT = Path(fastopt.__file__).parents[1]


def test_an_optimizer_can_be_sent_to_a_spawned_process_and_back():
    opt, grads = Adam({"w": np.arange(5000.0)}, ema_decay=0.5), {"w": np.ones(5000)}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        back = pool.submit(advance, opt, grads, 3).result(timeout=60)
    assert opt.completed_steps == 0
    assert contents(back) == contents(advance(opt, grads, 3))


POOL = """
import multiprocessing, os, signal
import numpy as np
import fastopt
from fastopt import _core
from support import advance, contents

SIZE, BATCHES = 1 << 16, 50

def batch(number):
    return np.random.default_rng(number).standard_normal(SIZE)

def load(todo, done, opt):
    # A worker that makes batches, and has an optimizer of its own: a copy of its parent's.
    _core.force_threads(3)
    while (number := todo.get(timeout=30)) is not None:
        opt.step([batch(number)])
        done.put((number, batch(number)))
    done.put((None, contents(opt)))

if __name__ == "__main__":
    signal.alarm(60)
    _core.force_threads(3)
    start = batch(99)
    opt, alone = (fastopt.Adam([start.copy()]) for _ in range(2))
    opt.step([batch(98)])  # with threads, before there are workers
    alone.step([batch(98)])
    context = multiprocessing.get_context(METHOD)
    with context.Pool(2) as pool:
        jobs = [pool.apply_async(advance, (opt, [batch(i)], 3)) for i in range(8)]
        for i, job in enumerate(jobs):
            expected = advance(pickle.loads(pickle.dumps(opt)), [batch(i)], 3)
            assert contents(job.get(timeout=40)) == contents(expected), f"pool, job {i}"
    todo, done = [context.Queue() for _ in range(2)], context.Queue()
    workers = [context.Process(target=load, args=(queue, done, opt)) for queue in todo]
    mine = [pickle.loads(pickle.dumps(opt)) for _ in workers]
    for worker in workers:
        worker.start()
    for number in range(BATCHES):
        todo[number % 2].put(number)
        mine[number % 2].step([batch(number)])
        alone.step([batch(number)])
    for queue in todo:
        queue.put(None)
    ready, ended = {}, []
    while len(ready) < BATCHES or len(ended) < 2:
        number, made = done.get(timeout=40)
        if number is None:
            ended.append(made)
        else:
            ready[number] = made
        while opt.completed_steps - 1 in ready:  # train while workers are still at it
            opt.step([ready[opt.completed_steps - 1]])
            if opt.completed_steps - 1 == BATCHES:
                break
    assert contents(opt) == contents(alone)
    assert all(made in [contents(other) for other in mine] for made in ended)
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_pool_and_loaders_of_data_step_beside_their_parent(method, tmp_path):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    script = tmp_path / "train.py"
    script.write_text(f"import pickle\nMETHOD = {method!r}\n{POOL}")
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    ignored = ("-W", "ignore::DeprecationWarning")
    done = python(*ignored, str(script), timeout=90, PYTHONPATH=f"{ROOT}{os.pathsep}{paths}")
    assert done.returncode == 0, done.stderr


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


def step_with(opt, **options):
    """Step with other options in the first group, and put the very objects back."""
    group, before = opt.param_groups[0], dict(opt.param_groups[0])
    group.update(options)
    opt.step([np.ones(3)])
    group.update(before)


@pytest.mark.parametrize(
    ("change", "moved", "error"),
    [
        (lambda opt: opt.add_param_group({"params": [np.zeros(2)]}), 0.0, "expected 2 gradients"),
        (lambda opt: step_with(opt, lr=0.25), 0.25 + 1.0, None),
        (lambda opt: step_with(opt, lr=lambda steps: 0.25), 0.25 + 1.0, None),
        (lambda opt: step_with(opt, momentum=0.5), 1.0 + 1.0, None),  # makes state, so a new plan
        (lambda opt: step_with(opt, lr=0.25, momentum=0.5), 0.25 + 1.0, None),
    ],
    ids=["group", "rate", "called rate", "state", "both"],
)
def test_a_step_that_waited_while_the_optimizer_changed_takes_it_as_it_is(change, moved, error):
    w, raised = np.zeros(3), []
    opt = SGD([w], lr=1.0)

    def step():
        try:
            opt.step([np.ones(3)])
        except ValueError as exception:
            raised.append(str(exception))

    opt.step([np.zeros(3)])
    thread = threading.Thread(target=step, daemon=True)
    with opt._lock:
        thread.start()
        time.sleep(0.05)  # let it come to the lock
        change(opt)
        assert thread.is_alive()
    thread.join(20)
    assert w.tolist() == [-moved] * 3
    assert [error in message for message in raised] == ([True] if error else [])


def test_threads_that_do_everything_at_once_lose_nothing():
    """Stepping, changing rates, looking, copying: each sees whole steps, and none is lost."""
    ran = 0
    for size, steps in ((5, 400), (20_000, 60)):
        opt = SGD([np.zeros(size), np.zeros(())], lr=1.0, momentum=0.5, ema_decay=0.5)
        grads, stop = [np.zeros(size), np.ones(())], threading.Event()

        def train(opt=opt, grads=grads, steps=steps):
            for _ in range(steps):
                opt.step(grads)

        def look(opt=opt, stop=stop):
            while not stop.is_set():
                state = opt.state_dict()
                counts = {int(slots["step"]) for slots in state["state"].values()}
                assert counts == {state["completed_steps"]}
                twin = copy.deepcopy(opt)
                assert {int(slots["step"]) for slots in twin.state} == {twin.completed_steps}

        def change(opt=opt, stop=stop):
            number = 0
            while not stop.is_set():
                number += 1
                group = opt.param_groups[0]
                group["lr"] = 1.0 + 0 * number  # another object each time
                group["weight_decay"] = 0.0 * number
                repr(opt)

        failures = []

        def guarded(act, failures=failures):
            try:
                act()
            except BaseException as error:
                failures.append(error)

        others = [threading.Thread(target=guarded, args=(act,)) for act in (look, change, look)]
        for thread in others:
            thread.start()
        run_together(*[lambda train=train: guarded(train)] * 4)
        stop.set()
        for thread in others:
            thread.join(30)
        assert failures == []
        assert opt.completed_steps == 4 * steps == opt.state[0]["step"] == opt.state[1]["step"]
        serial = SGD([np.zeros(size), np.zeros(())], lr=1.0, momentum=0.5, ema_decay=0.5)
        assert contents(advance(serial, grads, 4 * steps))[2] == contents(opt)[2]
        ran += 1
    assert ran == 2


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="Python has its lock")
def test_a_free_threaded_python_stays_so():
    script = "import sys, numpy, fastopt; print(sys._is_gil_enabled())"
    done = python("-c", script, PYTHON_GIL=None)
    assert (done.stdout, done.stderr) == ("False\n", "")


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
FORKED_LAYERS = [name for name in _core.layers()["available"] if name != "serial"]
STEP_AFTER_FORK = """
_core.force_threads(3)
_core.select_layer(LAYER)
rng = np.random.default_rng(0)
start, grad = rng.standard_normal(1 << 20), rng.standard_normal(1 << 20)

def train(opt, steps):
    for _ in range(steps):
        result = opt.step([grad])
    return result

parent = os.getpid()
whole, forked = (fastopt.Adam([start.copy()], clip_norm=1.0) for _ in range(2))
train(whole, 22)
assert train(forked, 2).threads == 3

def check():
    result = train(forked, 20)
    alone = os.getpid() != parent and LAYER == "openmp"  # whose threads do not survive a fork
    assert result.threads == (1 if alone else 3), result
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
        assert opt.step([np.ones(1 << 15)]).threads == 3
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
FIFTY_FORKS = """
_core.force_threads(3)
rng = np.random.default_rng(0)
start, grads = rng.standard_normal(1 << 16), [rng.standard_normal(1 << 16) for _ in range(50)]
whole, forked = (fastopt.Adam([start.copy()], ema_decay=0.9) for _ in range(2))
bits = []
for grad in grads:
    whole.step([grad])
    bits.append(whole.params[0].tobytes() + whole.ema[0].tobytes())

def check(number):
    assert forked.step([grads[number]]).threads == 3
    assert forked.params[0].tobytes() + forked.ema[0].tobytes() == bits[number], f"step {number}"

def go_on(number):
    for later in range(number, min(number + 5, 50)):
        check(later)

for number in range(50):
    pid = child(lambda: go_on(number))
    check(number)
    assert succeeded(pid), f"child {number}"
"""
ROWS_AFTER_FORK = """
_core.force_threads(3)
_core.select_layer(LAYER)
rng = np.random.default_rng(0)
start = rng.standard_normal((3000, 16))
batches = [rng.integers(0, 3000, 500) for _ in range(20)]
grads = [rng.standard_normal((500, 16)) for _ in range(20)]

def train(opt, begin, end):
    for number in range(begin, end):
        opt.refresh(opt.params[0], batches[number])
        opt.step([fastopt.Rows(batches[number], grads[number])])

whole, forked = (fastopt.Adam([start.copy()], rows="exact") for _ in range(2))
train(whole, 0, 20)
whole.refresh()

def check():  # of rows that miss steps before the fork, and take them after it
    train(forked, 10, 20)
    forked.refresh()
    assert forked.params[0].tobytes() == whole.params[0].tobytes(), "other bits"

train(forked, 0, 10)
pids = [child(check) for _ in range(3)]
check()
assert all([succeeded(pid) for pid in pids]), "children beside their parent"
"""
TORN_BY_FORK = """
import copy, pickle, time
SIZE = 1 << 20
grads, small = [np.ones(SIZE)], np.ones(3)

def new():
    return fastopt.RMSprop([np.zeros(SIZE)])

busy, fresh = new(), new()
saved, stop = new().state_dict(), threading.Event()

def train():
    while not stop.is_set():
        busy.step(grads)

def refused(what, *args):
    try:
        what(*args)
    except RuntimeError as error:
        assert "forked while another thread was inside a step" in str(error), error
        assert "load_state_dict() or reset()" in str(error), error
    else:
        raise AssertionError(f"{what} of a torn optimizer")

def mend(how):
    before = busy.params[0].tobytes()
    refused(busy.step, grads)
    refused(lambda: busy.step(grads, loss_scale=2.0))
    refused(busy.state_dict)
    refused(busy.add_param_group, {"params": [small]})
    refused(copy.deepcopy, busy)
    refused(pickle.dumps, busy)
    busy.param_groups[0]["momentum"] = 0.5  # which takes more state
    refused(busy.step, grads)
    fastopt.optimizer.initial_arrays, initial_arrays = None, fastopt.optimizer.initial_arrays
    try:
        busy.reset()
    except TypeError:
        fastopt.optimizer.initial_arrays = initial_arrays
        refused(busy.step, grads)  # the state is there, and nothing was reset
    try:
        busy.load_state_dict({})
    except ValueError:
        refused(busy.step, grads)  # nothing was loaded
    assert busy.params[0].tobytes() == before
    how()
    busy.params[0][...] = 0.0
    for opt in (busy, fresh):
        opt.param_groups[0]["momentum"] = 0.5
        opt.step(grads)
    assert busy.completed_steps == fresh.completed_steps == 1
    assert busy.params[0].tobytes() == fresh.params[0].tobytes()
    for name, array in busy.state[0].items():
        assert array.tobytes() == fresh.state[0][name].tobytes(), name
    busy.state_dict()

thread = threading.Thread(target=train)
thread.start()
torn = 0
try:
    for number in range(15):
        time.sleep(0.0007 * (number % 7))

        def work():
            if not busy._plan.torn:  # between two steps, or in the child of its only thread
                busy.step(grads)
                os._exit(3)
            mend(busy.reset if number % 2 else lambda: busy.load_state_dict(saved))

        pid = child(work)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, 3), status
        torn += status == 0
finally:
    stop.set()
    thread.join(20)
assert torn >= 3, torn
busy.step(grads)  # the parent's is whole
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

FORK_WITHIN_A_STEP = """
pid = None

class Gradient:
    def __dlpack__(self, **options):
        global pid
        pid = os.fork()
        if pid == 0:
            opt.load_state_dict(saved)
            opt.step(ones)
        return np.ones(5).__dlpack__(**options)

    def __dlpack_device__(self):
        return np.ones(5).__dlpack_device__()

ones = [np.ones(5) for _ in range(3)]
opt = fastopt.Adam([np.ones(5) for _ in range(3)])
opt.step(ones)
saved = opt.state_dict()
try:
    opt.step([Gradient(), *ones[1:]])
    refused = False
except RuntimeError as error:
    refused = "came in between, after a fork" in str(error)
if pid == 0:
    good = refused and opt.completed_steps == 2 and opt.step(ones).threads == 1
    os._exit(0 if good else 1)
assert not refused and opt.completed_steps == 2
assert succeeded(pid), "child"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    "script",
    [
        *[f"LAYER = {layer!r}\n{STEP_AFTER_FORK}" for layer in FORKED_LAYERS],
        *[f"LAYER = {layer!r}\n{ROWS_AFTER_FORK}" for layer in FORKED_LAYERS],
        FIFTY_FORKS,
        FORK_AMID_STEPS,
        TORN_BY_FORK,
        LOCK_AFTER_FORK,
        FORK_WITHIN_A_STEP,
    ],
    ids=[
        *FORKED_LAYERS,
        *(f"{layer}, rows" for layer in FORKED_LAYERS),
        "fifty",
        "amid",
        "torn",
        "lock",
        "within",
    ],
)
def test_after_a_fork_both_processes_go_on(script):
    done = python("-W", "ignore::DeprecationWarning", "-c", FORK + script, timeout=60)
    assert done.returncode == 0, done.stderr


# ---- the end of the interpreter, and a second one ------------------------------------------------


def test_the_interpreter_ends_while_a_daemon_thread_steps():
    script = """
import threading, time
import numpy as np
import fastopt
from fastopt import _core
_core.force_threads(3)
for size in (100, 1 << 21):
    opt, grads = fastopt.Adam([np.ones(size)]), [np.ones(size)]
    def train(opt=opt, grads=grads):
        while True:
            opt.step(grads)
    threading.Thread(target=train, daemon=True).start()
del grads
while opt.completed_steps < 3:
    time.sleep(0.001)
while not opt._plan.busy:  # it is between two steps
    time.sleep(0)
print("end")
"""
    for _ in range(5):
        done = python("-c", script, timeout=20)
        assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_what_failed_to_be_made_is_cleared_away_quietly():
    script = """
import gc, weakref
import numpy as np
import fastopt
from fastopt import _core
kept, given = [], []

def array(*args):
    given.append(weakref.ref(new := np.ones(*args)))
    return new

def fails(make, *args, **kwargs):
    try:
        make(*args, **kwargs)
    except (TypeError, ValueError) as error:
        kept.append(error)
    else:
        raise AssertionError(f"{make}(*{args}, **{kwargs})")

for cls in CLASSES:
    twice = array(3)
    for args, kwargs in [
        ((), {}),
        ((None,), {}),
        (([array(3), array(3, int)],), {}),
        (([array(3)],), {"lr": -1.0}),
        (([array(3)],), {"num_threads": 0}),
        (([twice, twice],), {}),  # which the plan finds
    ]:
        fails(cls, *args, **kwargs)
        new = cls.__new__(cls)
        fails(new.__init__, *args, **kwargs)
        kept.append(new)

# What comes after its member of the class Plan is not made yet.
both = [array(3), array(4)]
for changed in [
    {"rule": None},
    {"slots": []},
    {"steps": [1, 2]},
    {"groups": [0, 1]},
    {"params": [array(3), None]},
    {"params": [array(3), array(4, int)]},
    {"slots": [(array(3),), (array(3),)]},
    {"ema": [array(3), array(5)]},
    {"ema": both},
    {"rows": [[0.1]]},
]:
    plan = {
        "rule": _core.Rule("sgd"),
        "params": both,
        "slots": [(array(3),), (array(4),)],
        "ema": [array(3), array(4)],
        "steps": [np.zeros((), np.int64) for _ in range(2)],
        "groups": [0, 0],
        "rows": [[0.1, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0]],
        "names": ["a", "b"],
        "semantics": 0, "clip": 0, "clip_limit": 0.0, "nonfinite": 0,
        "ema_decay": 0.5, "num_threads": 0, "completed_steps": 0,
    }
    _core.Plan(**plan)
    fails(_core.Plan, **{**plan, **changed})
for args in [(), ([], None, 1), ([(array(3),), ()], [array(3)] * 2, 1), ([(both[0],)], both, 1)]:
    fails(_core.Limit, *args)
fails(_core.Rule)
fails(_core.Rule, "none")
fails(_core.Plan)

kept.clear()
del new, args, kwargs, twice, both, changed, plan
gc.collect()
assert [ref() for ref in given if ref() is not None] == []
"""
    script = script.replace("CLASSES", "".join(f"fastopt.{row.name}, " for row in ROWS))
    done = python("-X", "dev", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


IN_ANOTHER = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path[:] = {path}
try:
    import fastopt
except ImportError as error:
    assert "interpreter" in str(error), error  # NumPy, which would refuse later, does not say so
else:
    raise AssertionError("imported")
"""


def test_a_second_interpreter_is_refused_and_the_first_goes_on():
    script = f"""
import sys
import numpy as np
import fastopt
try:
    import _interpreters as interpreters
except ModuleNotFoundError:
    import _xxsubinterpreters as interpreters
w = np.ones(3)
opt = fastopt.SGD([w], lr=1.0)
opt.step([np.ones(3)])
for _ in range(2):
    other = interpreters.create()
    failure = interpreters.run_string(other, {IN_ANOTHER!r}.format(path=sys.path))
    assert failure is None, failure
    interpreters.destroy(other)
opt.step([np.ones(3)])
assert w.tolist() == [-1.0] * 3
assert fastopt.SGD([w], lr=1.0).step([np.ones(3)]).threads == 1
assert w.tolist() == [-2.0] * 3
"""
    done = python("-W", "ignore", "-c", script)
    assert done.returncode == 0, done.stderr


# ---- arrays that change while a step is under way ------------------------------------------------

SIZE = 1 << 21


def in_the_midst(opt, grads, seen, act):
    """Act while a thread steps, one element after the other; tell whether the step was under way.

    `seen` is memory that the step changes, all of it.
    """
    first, last = seen[0], seen[-1]
    thread = threading.Thread(target=opt.step, args=(grads,), daemon=True)
    del opt
    thread.start()
    while seen[0] == first and thread.is_alive():
        time.sleep(0)
    act()
    under_way = seen[-1] == last
    thread.join(60)
    assert not thread.is_alive()
    return under_way


def resized(array_of):
    try:
        array_of().resize(SIZE + 1)
    except ValueError as error:
        return str(error).partition(" or is")[0]
    return "resized"


def test_arrays_cannot_be_resized_during_a_step():
    for _ in range(100):
        opt = SGD([np.zeros(SIZE) for _ in "ab"], momentum=0.5, ema_decay=0.5, num_threads=1)
        grads, mine, outcomes = [np.ones(SIZE) for _ in "ab"], [], []

        def resize(opt=opt, grads=grads, mine=mine, outcomes=outcomes):
            mine.append(grads.pop())
            outcomes += [
                resized(lambda: mine[0]),
                resized(grads.pop),  # nobody but the step holds it any more
                resized(lambda: opt.params[0]),
                resized(lambda: opt.state[0]["step"]),
            ]

        if in_the_midst(opt, grads, opt.params[1], resize):
            break
    else:
        raise AssertionError("every step was over too soon")
    assert outcomes == ["cannot resize an array that references"] * 4
    assert resized(lambda: mine[0]) == "resized"  # now that the step is over
    for state in (opt.state[0]["momentum_buffer"], opt.ema[0]):
        with pytest.raises(ValueError, match="it does not own its data"):
            state.resize(SIZE + 1, refcheck=False)
    for k in range(2):
        assert len({*opt.params[k].tolist()}) == 1


def test_arrays_cannot_be_resized_during_a_call_of_a_function():
    class Call:
        def __init__(self):
            self.params, self.buffers = ([np.zeros(SIZE) for _ in "abc"] for _ in range(2))

        def step(self, grads):
            options = {"lr": 1.0, "momentum": 0.5, "num_threads": 1}
            functional.sgd(self.params, grads, self.buffers, **options)

    for _ in range(100):
        call, grads, outcomes = Call(), [np.ones(SIZE) for _ in "abc"], []

        def resize(call=call, grads=grads, outcomes=outcomes):
            outcomes += [resized(x.pop) for x in (call.params, call.buffers, grads)]

        if in_the_midst(call, grads, call.params[1], resize):
            break
    else:
        raise AssertionError("every step was over too soon")
    assert outcomes == ["cannot resize an array that references"] * 3


def test_arrays_are_not_freed_during_a_step():
    for _ in range(100):
        memory = np.ones((2, SIZE))
        opt = SGD([memory[0][:]], momentum=0.5, ema_decay=0.5, num_threads=1)
        grads, alive = [memory[1][:]], []
        arrays = [opt.params[0], *opt.state[0].values(), opt.ema[0], grads[0]]
        refs = [weakref.ref(array) for array in arrays]
        del arrays

        def let_go(grads=grads, alive=alive, refs=refs):
            grads.clear()
            alive += [ref() is not None for ref in refs]

        owned = [opt]
        del opt
        if in_the_midst(owned.pop(), grads, memory[0], let_go):
            break
    else:
        raise AssertionError("every step was over too soon")
    assert alive == [True] * 5
    assert [ref() for ref in refs] == [None] * 5  # nobody but the step held them
    assert len({*memory[0].tolist()}) == 1
