"""A storm of signals: whatever it interrupts, the model equals some number of whole steps."""

import dis
import inspect
import itertools
import random
import signal
import sys
import threading

import numpy as np
import pytest
from sparse import as_dense
from support import contents, everything, python

from fastopt import SGD, Adam, Rows, _core, _members, _saved, optimizer

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer here")

STORM = 400  # interrupts of each kind of step


@pytest.fixture(autouse=True)
def _every_alarm_is_an_interrupt():
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def interrupt(act, after):
    """Call `act` until a signal, that many seconds on, interrupts it."""
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        while True:
            act()
    except KeyboardInterrupt:
        pass


def moving(steps):
    return 0.1 / (1 + steps)


KINDS = {  # elements, threads, options, how the gradients are given
    "small": (50, 1, {}, list),
    "large": (60_000, 3, {}, list),
    "rate": (50, 1, {"lr": moving}, list),
    "norm and average": (20_000, 3, {"global_clip_norm": 1.0, "ema_decay": 0.9}, tuple),
    "generator": (3_000, 1, {"nonfinite": "skip"}, iter),
}


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_training_is_some_number_of_whole_steps(kind):
    size, threads, options, given = KINDS[kind]
    rng, delay = np.random.default_rng(0), random.Random(0)
    shapes = [(size,), (), (7, 3)]
    starts = [np.asarray(rng.standard_normal(shape)) for shape in shapes]
    grads = [[np.asarray(rng.standard_normal(shape)) for shape in shapes] for _ in range(5)]
    opt, twin = (Adam([p.copy() for p in starts], **options) for _ in range(2))
    _core.force_threads(threads)

    def step(which):
        which.step(given(grads[which.completed_steps % 5]))

    step(opt)  # with which the threads begin
    for number in range(STORM):
        interrupt(lambda: step(opt), after=delay.uniform(5e-5, 2e-3))
        while twin.completed_steps < opt.completed_steps:
            step(twin)
        assert contents(opt) == contents(twin), f"interrupt {number}"
    assert opt.completed_steps > STORM / 4


def test_interrupted_steps_and_refreshes_of_rows_are_whole():
    """What rows have missed is neither lost nor taken twice."""
    rng, delay = np.random.default_rng(2), random.Random(2)
    start = rng.standard_normal((1000, 8))
    steps = [Rows(rng.integers(0, 1000, 200), rng.standard_normal((200, 8))) for _ in range(5)] + [
        rng.standard_normal(start.shape)
    ]
    opt, twin = (Adam([start.copy()], lr=moving, rows=rows) for rows in ("exact", "lazy"))
    _core.force_threads(3)
    param = opt.params[0]

    def step():
        grad = steps[opt.completed_steps % 6]
        if isinstance(grad, Rows):
            opt.refresh(param, grad.indices)
        opt.step([grad])

    for number in range(STORM):
        interrupt(step, after=delay.uniform(5e-5, 2e-3))
        while twin.completed_steps < opt.completed_steps:
            twin.step([as_dense(steps[twin.completed_steps % 6], start)])
        if number % 4 == 0:
            opt.refresh()
            assert contents(opt) == contents(twin), f"interrupt {number}"
    assert opt.completed_steps > STORM / 4


def test_loading_and_resetting_are_done_or_not_when_interrupted():
    delay = random.Random(1)
    opt = SGD([np.zeros(100_000), np.zeros(3)], lr=0.5, momentum=0.5, ema_decay=0.5, accumulate=2)
    grads, states = [np.ones(100_000), np.ones(3)], []
    for lr, calls in ((0.5, 2), (0.25, 3)):
        opt.param_groups[0]["lr"] = lr
        for _ in range(calls):
            opt.step(grads)
        states.append(opt.state_dict())

    def observe():
        buffer = opt.state[0]["momentum_buffer"]
        assert buffer.min() == buffer.max()
        assert (opt.ema[0].min(), opt.ema[0][0]) == (opt.ema[0].max(), opt.ema[1][0])
        return (
            opt.completed_steps,
            opt.param_groups[0]["lr"],
            [int(state["step"]) for state in opt.state],
            buffer[0],
            (opt.accumulated_steps, opt._plan.summed()),
        )

    wholes = []
    for state in states:
        opt.load_state_dict(state)
        wholes.append(observe())
    assert len({str(whole) for whole in wholes}) == 2
    turn = 0

    def load():
        nonlocal turn
        turn += 1
        opt.load_state_dict(states[turn % 2])

    for _ in range(STORM):
        interrupt(load, after=delay.uniform(5e-5, 3e-3))
        assert observe() in wholes
    assert turn > STORM / 4
    for _ in range(STORM // 4):
        opt.load_state_dict(states[1])
        opt.param_groups[0]["lr"] = 0.5
        interrupt(opt.reset, after=delay.uniform(5e-5, 1e-3))
        steps, _, counters, buffer, amid = observe()
        assert (steps, counters, buffer, amid) in [
            (2, [2, 2], 1.5, (1, [True, True])),
            (0, [0, 0], 0.0, (0, [False, False])),
        ]


def with_momentum(momentum=0.5):
    opt = SGD([np.zeros(3)], lr=1.0, momentum=momentum, ema_decay=0.5, accumulate=2)
    for _ in range(5):
        opt.step([np.ones(3)])
    return opt


def load(opt, saved):
    opt.load_state_dict(saved)


def add(opt, saved):
    opt.add_param_group({"params": np.ones(2), "lr": 0.5})


def switch_on_and_add(opt, saved):
    opt.param_groups[0]["momentum"] = 0.5
    add(opt, saved)


@pytest.mark.parametrize("change", [load, add, switch_on_and_add])
def test_a_change_interrupted_wherever_python_handles_signals_is_done_or_not_begun(change):
    """Python handles them when it has entered a function, and after a call."""
    places = {
        function.__code__: {
            after.offset
            for before, after in itertools.pairwise(dis.get_instructions(function))
            if before.opname.startswith(("RESUME", "CALL"))
        }
        for module in (optimizer, _members, _saved)
        for owner in (module, *(kind for kind in vars(module).values() if inspect.isclass(kind)))
        for function in vars(owner).values()
        if inspect.isfunction(function) and function.__module__ == module.__name__
    }

    def trace(frame, event, arg):
        frame.f_trace_opcodes = frame.f_code in places
        if event == "opcode" and frame.f_lasti in places[frame.f_code] and next(passed) == at:
            raise KeyboardInterrupt
        return trace if frame.f_trace_opcodes else None

    def next_step(opt):
        opt.step([np.ones_like(param) for param in opt.params])
        assert len(opt.state) == len(opt.ema) == len(opt.params)
        return everything(opt)

    not_begun, done, saved = with_momentum(0.0), with_momentum(0.0), with_momentum().state_dict()
    change(done, saved)
    if change is switch_on_and_add:
        not_begun.param_groups[0]["momentum"] = 0.5
    outcomes, seen, traced = [next_step(not_begun), next_step(done)], [], sys.gettrace()
    for at in itertools.count():
        passed, opt = itertools.count(), with_momentum(0.0)
        try:
            sys.settrace(trace)
            change(opt, saved)
            break
        except KeyboardInterrupt:
            sys.settrace(traced)
        finally:
            sys.settrace(traced)
        outcome = next_step(opt)
        assert outcome in outcomes, f"interrupted at place {at}"
        seen.append(outcomes.index(outcome))
    assert next(passed) == at > 50
    assert seen == sorted(seen)
    assert {*seen} == {0, 1}


def test_a_step_that_waits_for_another_thread_can_be_interrupted():
    opt, held, over = SGD([np.zeros(3)], lr=1.0), threading.Event(), threading.Event()

    def hold():
        with opt._lock:
            held.set()
            over.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    for _ in range(3):
        interrupt(lambda: opt.step([np.ones(3)]), after=0.02)
        assert opt.completed_steps == 0
    over.set()
    thread.join()
    opt.step([np.ones(3)])
    assert opt.completed_steps == 1


def test_interrupts_of_another_process_reach_the_program_and_tear_nothing():
    script = """
import os, signal, sys, time
import numpy as np
import fastopt
from fastopt import _core
signal.alarm(40)
_core.force_threads(3)
size = 1 << 17
w = np.zeros(size)
opt, grads = fastopt.SGD([w], lr=1.0), [np.ones(size)]
opt.step(grads)
parent, caught, armed = os.getpid(), 0, False

def interrupt(*args):
    global caught
    caught += 1
    if armed:
        raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupt)
sender = os.fork()
if sender == 0:
    for _ in range(2000):
        time.sleep(0.0003)
        os.kill(parent, signal.SIGINT)
    os._exit(0)
while True:
    try:
        armed = True
        while os.waitpid(sender, os.WNOHANG)[0] == 0:
            opt.step(grads)
        armed = False
        break
    except KeyboardInterrupt:
        armed = False
    except ChildProcessError:  # it was waited for, and interrupted right then
        break
assert (w == -opt.completed_steps).all(), (w.min(), w.max(), opt.completed_steps)
assert opt.state[0]["step"] == opt.completed_steps > 100
print(caught)
"""
    done = python("-W", "ignore::DeprecationWarning", "-c", script, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100
