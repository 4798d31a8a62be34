"""Schedules: against the recorded sequences of PyTorch's and Keras's, and by their definitions."""

import json
import math
import pickle

import mpmath
import numpy as np
import pytest
from support import TESTS

import fastopt
from fastopt import schedules
from fastopt.schedules import (
    constant,
    cosine,
    cosine_restarts,
    exponential,
    inverse_time,
    linear_warmup,
    multi_step,
    one_cycle,
    piecewise,
    polynomial,
    step,
)

GOLDEN = TESTS / "golden"
ENTRIES = {
    entry["id"]: entry
    for entry in json.loads((GOLDEN / "manifest.json").read_text())["entries"]
    if entry["class"].startswith("lr:")
}


def up_and_down(schedule, steps):
    """PyTorch's cosine goes up again after its end, along the mirrored curve."""
    return lambda s: schedule(abs((s + steps) % (2 * steps) - steps))


# Each recorded sequence, and its namesake here; the arguments are those in the manifest.
NAMESAKES = {
    "torch_lrsched_steplr_0": step(0.1, every=7, factor=0.3),
    "torch_lrsched_multisteplr_0": multi_step(0.1, [3, 9, 20], factor=0.5),
    "torch_lrsched_exponentiallr_0": exponential(0.1, factor=0.93),
    "torch_lrsched_cosineannealinglr_0": up_and_down(cosine(0.1, steps=15, end=0.001), 15),
    "torch_lrsched_linearlr_0": linear_warmup(0.1, steps=9, start=0.25 * 0.1),
    "torch_lrsched_polynomiallr_0": polynomial(0.1, steps=20, power=2.0),
    "torch_lrsched_constantlr_0": piecewise([5], [0.3 * 0.1, 0.1]),
    "torch_lrsched_cosineannealingwarmrestarts_0": cosine_restarts(0.1, 5, 2, end=0.001),
    "torch_lrsched_onecyclelr_0": one_cycle(0.5, steps=41),
    "keras_lrsched_exponentialdecay_0": exponential(0.1, factor=0.5, every=7),
    "keras_lrsched_exponentialdecay_1": step(0.1, every=7, factor=0.5),
    "keras_lrsched_polynomialdecay_0": polynomial(0.1, steps=20, end=0.01, power=0.5),
    "keras_lrsched_inversetimedecay_0": inverse_time(0.1, factor=0.5, every=5),
    "keras_lrsched_cosinedecay_0": linear_warmup(cosine(0.1, steps=20), steps=6),
    "keras_lrsched_cosinedecayrestarts_0": cosine_restarts(0.1, 6, period_factor=2),
    "keras_lrsched_piecewiseconstantdecay_0": piecewise([5, 12], [0.1, 0.05, 0.01]),
}


def test_every_recorded_sequence_has_a_namesake():
    assert NAMESAKES.keys() == ENTRIES.keys()
    assert len(ENTRIES) == 16


@pytest.mark.parametrize("name", NAMESAKES)
def test_a_schedule_is_its_namesakes_recorded_sequence(name):
    """PyTorch's are recursive, in double: a few ulps of the largest rate gather over 40 steps.

    Keras's are closed forms in float32: a few of its ulps.
    """
    recorded = np.load(GOLDEN / ENTRIES[name]["file"])["lr"]
    assert len(recorded) == 40
    ours = np.array([NAMESAKES[name](s) for s in range(40)])
    ulp = np.finfo(recorded.dtype).eps * recorded.max()
    assert np.abs(ours - recorded.astype(float)).max() <= 2 * ulp


# One of each, with its exact value at step s.
DEFINITIONS = {
    "constant": (constant(0.3), lambda s: 0.3),
    "step": (step(0.3, 7, 0.9), lambda s: 0.3 * mpmath.mpf(0.9) ** (s // 7)),
    "multi_step": (
        multi_step(0.3, [0, 30], 0.7),
        lambda s: 0.3 * mpmath.mpf(0.7) ** (1 + (s > 29)),
    ),
    "exponential": (
        exponential(0.3, 0.1, 77),
        lambda s: 0.3 * mpmath.mpf(0.1) ** (mpmath.mpf(s) / 77),
    ),
    "inverse_time": (inverse_time(0.3, 0.7, 9), lambda s: 0.3 / (1 + 0.7 * mpmath.mpf(s) / 9)),
    "polynomial": (
        polynomial(0.3, 90, 0.1, 0.9),
        lambda s: 0.1 + (mpmath.mpf(0.3) - 0.1) * (1 - mpmath.mpf(min(s, 90)) / 90) ** 0.9,
    ),
    "cosine": (
        cosine(0.3, 90, 0.1),
        lambda s: (
            0.1 + (mpmath.mpf(0.3) - 0.1) * (1 + mpmath.cospi(mpmath.mpf(min(s, 90)) / 90)) / 2
        ),
    ),
    "cosine_restarts": (
        cosine_restarts(0.3, 20, lr_factor=0.8),
        lambda s: (
            0.3 * mpmath.mpf(0.8) ** (s // 20) * (1 + mpmath.cospi(mpmath.mpf(s % 20) / 20)) / 2
        ),
    ),
    "linear_warmup": (linear_warmup(0.3, 60), lambda s: 0.3 * mpmath.mpf(min(s, 60)) / 60),
    "one_cycle": (
        one_cycle(0.3, 100, 0.31, 10.0, 10.0, "linear"),
        lambda s: (
            mpmath.mpf(0.03) + mpmath.mpf(0.27) * s / 30
            if s <= 30
            else mpmath.mpf(0.3) - mpmath.mpf(0.297) * (min(s, 99) - 30) / 69
        ),
    ),
    "piecewise": (piecewise([50], [0.3, 0.2]), lambda s: 0.3 if s <= 50 else 0.2),
}


@pytest.mark.parametrize("name", schedules.__all__)
def test_a_schedule_is_its_definition(name):
    schedule, exact = DEFINITIONS[name]
    with mpmath.workprec(200):
        for s in range(120):
            assert abs(schedule(s) - exact(s)) <= 2.0**-49 * 0.3, s


@pytest.mark.parametrize("name", schedules.__all__)
def test_a_schedule_sets_an_optimizers_rate_also_after_a_pickle(name):
    schedule = pickle.loads(pickle.dumps(DEFINITIONS[name][0]))
    w = np.zeros(1)
    opt = fastopt.SGD([w], lr=schedule)
    total = 0.0
    for s in range(5):
        opt.step([np.ones(1)])
        total -= DEFINITIONS[name][0](s)
        assert w[0] == total


def test_a_rate_is_called_without_checking_everything_else_again(monkeypatch):
    w = np.zeros(3)
    opt = fastopt.SGD([w], lr=lambda steps: 0.5 * steps, momentum=0.0)
    opt.step([np.ones(3)])

    def refresh(**options):
        raise AssertionError("nothing has changed")

    monkeypatch.setattr(opt, "_refresh", refresh)
    for _ in range(3):
        opt.step([np.ones(3)])
    assert w.tolist() == [-0.5 * (0 + 1 + 2 + 3)] * 3


@pytest.mark.parametrize("name", schedules.__all__)
def test_a_step_is_any_integer_from_0_on(name):
    schedule = DEFINITIONS[name][0]
    for s in (np.int8(3), np.uint8(200), np.uint64(3), np.array(3)):
        rate = schedule(s)
        assert type(rate) is float
        assert rate == schedule(int(s))
    for s in (-1, np.int64(-15)):
        with pytest.raises(ValueError, match=r"^completed_steps must be at least 0, got .*-1"):
            schedule(s)
    for s in (2.5, math.nan, "3", None, True):
        with pytest.raises(TypeError, match=r"^completed_steps must be an integer, got "):
            schedule(s)


@pytest.mark.parametrize(
    ("schedule", "s", "recorded"),
    [
        (exponential(0.1, 0.5, 7), 3, "0x1.3054e5bb1bd84p-4"),
        (polynomial(0.1, 1000, power=0.9), 123, "0x1.6bf7080329e8cp-4"),
        (cosine(0.1, 1000), 123, "0x1.8a7fcd4339b4ep-4"),
        (one_cycle(0.1, 1000), 777, "0x1.7610a8343e14bp-6"),
    ],
)
def test_rates_are_the_same_bits_everywhere(schedule, s, recorded):
    """Recorded once; a library's pow or cos differs in the last bit on some machine."""
    assert schedule(s).hex() == recorded


@pytest.mark.parametrize("shape", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("steps", [2, 3, 100])
def test_a_cycle_rises_to_its_peak_and_falls_to_its_end(steps, warmup, shape):
    rates = [one_cycle(1.0, steps, warmup, shape=shape)(s) for s in range(steps + 5)]
    top = int(np.argmax(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert top == pytest.approx(max(0, warmup * steps - 1), abs=1)
    assert rates[-1] == pytest.approx(1.0 if warmup == 1 else 1 / 25 / 1e4)
    assert min(rates) >= 1 / 25 / 1e4 * 0.999
    assert max(rates) <= 1


@pytest.mark.parametrize(("steps", "warmup"), [(2, 0.0), (2, 0.3), (10, 0.05), (10, 0.0999)])
def test_a_cycle_whose_warm_up_is_less_than_a_step_begins_below_its_peak(steps, warmup):
    middle, last = mpmath.mpf(warmup) * steps - 1, steps - 1
    assert middle < 0
    for s in range(steps):
        x = (s - middle) / (last - middle)
        for shape, gone in (("linear", x), ("cosine", (1 - mpmath.cospi(x)) / 2)):
            rate = one_cycle(0.5, steps, warmup, 5.0, 4.0, shape)(s)
            assert rate == pytest.approx(float(0.5 - (0.5 - 0.025) * gone), rel=1e-13)
            assert rate < 0.5


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_a_cycle_whose_warm_up_is_a_single_step_begins_at_its_peak(shape):
    assert one_cycle(0.5, 4, 0.25, shape=shape)(0) == 0.5


class Zero:
    """A 0-d array of a library, as its schedules return it."""

    shape = ()

    def __init__(self, value, **methods):
        self.value = value
        for name, method in methods.items():
            setattr(self, name, method)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.value)


ZERO_D = {
    "numpy": np.array,
    "numpy scalar": np.float32,
    "with item()": lambda value: Zero(value, item=lambda: value),
    "without": Zero,
}


@pytest.mark.parametrize("wrap", ZERO_D.values(), ids=ZERO_D)
def test_a_schedule_and_an_optimizer_take_the_same_callables(wrap):
    def schedule(s):
        return wrap(0.5**s)

    w, warm = np.zeros(1), linear_warmup(schedule, 2)
    for lr, total in ((schedule, 1.75), (warm, 0 + 0.5 + 1), (linear_warmup(warm, 1), 0 + 0 + 0.5)):
        w[...] = 0
        opt = fastopt.SGD([w], lr=lr)
        for _ in range(3):
            opt.step([np.ones(1)])
        assert w[0] == -total
    assert {type(warm(s)) for s in range(5)} == {float}


@pytest.mark.parametrize("wrap", ZERO_D.values(), ids=ZERO_D)
def test_a_callable_after_a_warm_up_is_checked_when_it_is_called(wrap):
    schedule = linear_warmup(lambda s: wrap(0.5 if s < 3 else -1.0), 2)
    assert schedule(4) == 0.5
    with pytest.raises(ValueError, match=r"^then\(3\) must be >= 0"):
        schedule(5)


def test_restarts_of_growing_periods_begin_where_they_should():
    schedule = cosine_restarts(1.0, 3, period_factor=3, lr_factor=0.5)
    begins = [0, 3, 3 + 9, 3 + 9 + 27]
    assert [schedule(s) for s in begins] == [1.0, 0.5, 0.25, 0.125]
    for s in begins[1:]:
        assert schedule(s - 1) < schedule(s)


def test_a_far_step_is_no_slower_than_the_first():
    for schedule in (step(1.0, 1, 0.999), cosine_restarts(1.0, 1), exponential(1.0, 0.9999)):
        assert 0 <= schedule(10**15) <= 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: constant(-1), ValueError, r"^lr must be >= 0 and < inf, got -1$"),
        (lambda: constant(math.nan), ValueError, "^lr must"),
        (lambda: constant(math.inf), ValueError, "^lr must"),
        (lambda: constant("0.1"), TypeError, "^lr must be a real number, got '0.1'"),
        (lambda: step(0.1, 0), ValueError, "^every must be at least 1, got 0$"),
        (lambda: step(0.1, 2.5), TypeError, "^every must be an integer, got 2.5$"),
        (lambda: step(0.1, True), TypeError, "^every must be an integer, got True$"),
        (lambda: step(0.1, 5, -0.5), ValueError, "^factor must be >= 0"),
        (lambda: multi_step(0.1, [3, 3]), ValueError, r"^milestones must increase, got \[3, 3\]$"),
        (
            lambda: multi_step(0.1, [-1]),
            ValueError,
            r"^milestones\[0\] must be at least 0, got -1$",
        ),
        (lambda: exponential(0.1, 0.5, 0), ValueError, "^every must"),
        (lambda: exponential(0.1, math.nan), ValueError, "^factor must"),
        (lambda: inverse_time(0.1, -1), ValueError, "^factor must"),
        (lambda: polynomial(0.1, 0), ValueError, "^steps must be at least 1, got 0$"),
        (lambda: polynomial(0.1, 5, end=-1), ValueError, "^end must"),
        (lambda: polynomial(0.1, 5, power=0), ValueError, "^power must be > 0"),
        (lambda: cosine(0.1, -5), ValueError, "^steps must"),
        (lambda: cosine_restarts(0.1, 5, 0), ValueError, "^period_factor must be at least 1"),
        (lambda: cosine_restarts(0.1, 0), ValueError, "^period must"),
        (lambda: cosine_restarts(0.1, 5, 1, -1), ValueError, "^lr_factor must"),
        (lambda: linear_warmup(-0.1, 5), ValueError, "^then must"),
        (lambda: linear_warmup(lambda s: "x", 5), TypeError, r"^then\(0\) must be a real number"),
        (lambda: linear_warmup(0.1, 0), ValueError, "^steps must"),
        (lambda: one_cycle(0.1, 1), ValueError, "^steps must be at least 2, got 1$"),
        (lambda: one_cycle(0.1, 9, 1.5), ValueError, "^warmup must be >= 0 and <= 1"),
        (lambda: one_cycle(0.1, 9, start_divisor=0.5), ValueError, "^start_divisor must be >= 1"),
        (lambda: one_cycle(0.1, 9, end_divisor=0), ValueError, "^end_divisor must be >= 1"),
        (lambda: one_cycle(0.1, 9, shape="cos"), ValueError, "^shape must be one of 'cosine', 'l"),
        (lambda: piecewise([1], [0.1]), ValueError, "^values must be one more than boundaries"),
        (lambda: piecewise([2, 1], [1, 1, 1]), ValueError, "^boundaries must increase"),
        (lambda: piecewise([1], [0.1, -1]), ValueError, r"^values\[1\] must be >= 0"),
    ],
)
def test_a_bad_argument_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
