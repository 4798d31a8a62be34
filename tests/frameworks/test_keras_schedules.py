"""fastopt.schedules beside Keras's that they name: every step, any arguments."""

import random

import keras
import numpy as np
import pytest
from keras.optimizers.schedules import (
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    PiecewiseConstantDecay,
    PolynomialDecay,
)

import fastopt
from fastopt import schedules

STEPS = 64


def few(draw):
    return draw.choice([1, 1, 2, 3, draw.randint(2, 60)])


def part(draw):
    return draw.choice([0.0, 1.0, draw.uniform(0, 1)])


def step(draw, lr):
    every, factor = few(draw), part(draw)
    return schedules.step(lr, every, factor), ExponentialDecay(lr, every, factor, staircase=True)


def exponential(draw, lr):
    every, factor = few(draw), part(draw)
    return schedules.exponential(lr, factor, every), ExponentialDecay(lr, every, factor)


def inverse_time(draw, lr):
    every, factor = few(draw), 2 * part(draw)
    return schedules.inverse_time(lr, factor, every), InverseTimeDecay(lr, every, factor)


def piecewise(draw, lr):
    at = sorted(draw.sample(range(STEPS), draw.randint(1, 4)))
    values = [lr * part(draw) for _ in range(len(at) + 1)]
    return schedules.piecewise(at, values), PiecewiseConstantDecay(at, values)


def polynomial(draw, lr):
    steps, end, power = few(draw), 2 * lr * part(draw), draw.choice([0.5, 1.0, 2.0, 3.3])
    return schedules.polynomial(lr, steps, end, power), PolynomialDecay(lr, steps, end, power)


def cosine(draw, lr):
    steps, end = few(draw), 2 * part(draw)
    return schedules.cosine(lr, steps, end * lr), CosineDecay(lr, steps, end)


def linear_warmup(draw, lr):
    steps, end, warmup, start = few(draw), 2 * part(draw), few(draw), 2 * lr * part(draw)
    ours = schedules.linear_warmup(schedules.cosine(lr, steps, end * lr), warmup, start)
    return ours, CosineDecay(start, steps, end, warmup_target=lr, warmup_steps=warmup)


def cosine_restarts(draw, lr):
    period, factor, peaks = few(draw), draw.randint(1, 3), part(draw)
    ours = schedules.cosine_restarts(lr, period, factor, peaks)
    return ours, CosineDecayRestarts(lr, period, factor, peaks)


PAIRS = [
    step,
    exponential,
    inverse_time,
    piecewise,
    polynomial,
    cosine,
    linear_warmup,
    cosine_restarts,
]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_schedule_is_the_one_of_keras_that_it_names_at_every_step(pair):
    """Keras computes in float32: a few roundings, and more in a power of what was rounded."""
    draw, compared = random.Random(0), 0
    for _ in range(6):
        lr = 10 ** draw.uniform(-4, 1)
        ours, theirs = pair(draw, lr)
        for s in range(STEPS):
            expected = float(keras.ops.convert_to_numpy(theirs(s)))
            assert ours(s) == pytest.approx(expected, rel=2e-5, abs=2e-5 * lr), (s, ours)
            compared += 1
    assert compared == 6 * STEPS


def test_a_schedule_of_keras_is_a_learning_rate_and_may_follow_a_warm_up():
    theirs = PolynomialDecay(0.5, 4, 0.0)  # 0.5, 0.375, 0.25, 0.125, 0
    for lr, total in ((theirs, 1.25), (schedules.linear_warmup(theirs, 2), 0 + 0.25 + 1.125)):
        w = np.zeros(1)
        opt = fastopt.SGD([w], lr=lr)
        for _ in range(5):
            opt.step([np.ones(1)])
        assert w[0] == -total
