"""fastopt.schedules beside PyTorch's schedulers that they name: every step, any arguments."""

import random
import warnings
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler as of

from fastopt import schedules

STEPS = 64


def rates(scheduler, lr, steps):
    """Return the rates that a scheduler sets for the first steps."""
    opt = torch.optim.SGD([torch.zeros(1)], lr=lr)
    with warnings.catch_warnings():  # it warns of steps that the optimizer does not take
        warnings.simplefilter("ignore", UserWarning)
        theirs = scheduler(opt)
        seen = []
        for _ in range(steps - 1):
            seen.append(opt.param_groups[0]["lr"])
            theirs.step()
    return [*seen, opt.param_groups[0]["lr"]]


def few(draw):
    return draw.choice([1, 1, 2, 3, draw.randint(2, 60)])


def part(draw):
    return draw.choice([0.0, 1.0, draw.uniform(0, 1)])


def step(draw, lr):
    every, factor = few(draw), 1.3 * part(draw)
    return (
        schedules.step(lr, every, factor),
        partial(of.StepLR, step_size=every, gamma=factor),
        STEPS,
    )


def multi_step(draw, lr):
    at, factor = sorted(draw.sample(range(STEPS), draw.randint(0, 4))), 1.3 * part(draw)
    theirs = partial(of.MultiStepLR, milestones=at, gamma=factor)
    return schedules.multi_step(lr, at, factor), theirs, STEPS


def exponential(draw, lr):
    factor = 1.3 * part(draw)
    return schedules.exponential(lr, factor), partial(of.ExponentialLR, gamma=factor), STEPS


def polynomial(draw, lr):
    steps, power = few(draw), draw.choice([0.5, 1.0, 2.0, draw.uniform(0.1, 4)])
    theirs = partial(of.PolynomialLR, total_iters=steps, power=power)
    return schedules.polynomial(lr, steps, power=power), theirs, STEPS


def cosine(draw, lr):
    steps, end = few(draw), 2 * lr * part(draw)
    theirs = partial(of.CosineAnnealingLR, T_max=steps, eta_min=end)
    return schedules.cosine(lr, steps, end), theirs, steps + 1


def cosine_restarts(draw, lr):
    period, factor, end = few(draw), draw.randint(1, 3), 2 * lr * part(draw)
    theirs = partial(of.CosineAnnealingWarmRestarts, T_0=period, T_mult=factor, eta_min=end)
    return schedules.cosine_restarts(lr, period, factor, end=end), theirs, STEPS


def linear_warmup(draw, lr):
    steps, start = few(draw), draw.choice([1e-9, 1.0, draw.uniform(0.01, 1)])
    theirs = partial(of.LinearLR, start_factor=start, total_iters=steps)
    return schedules.linear_warmup(lr, steps, start * lr), theirs, STEPS


def one_cycle(draw, lr):
    steps, warmup = max(2, few(draw)), part(draw)
    divisors = [draw.choice([1.0, draw.uniform(1, 1e4)]) for _ in range(2)]
    shape = draw.choice(["cosine", "linear"])
    theirs = partial(
        of.OneCycleLR,
        max_lr=lr,
        total_steps=steps,
        pct_start=warmup,
        anneal_strategy=shape.replace("cosine", "cos"),
        cycle_momentum=False,
        div_factor=divisors[0],
        final_div_factor=divisors[1],
    )
    return schedules.one_cycle(lr, steps, warmup, *divisors, shape), theirs, steps


PAIRS = [
    step,
    multi_step,
    exponential,
    polynomial,
    cosine,
    cosine_restarts,
    linear_warmup,
    one_cycle,
]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_schedule_is_the_scheduler_that_it_names_at_every_step(pair):
    """PyTorch's are recursive: errors of rounding gather, and count where a rate is small."""
    draw, compared = random.Random(0), 0
    for _ in range(100):
        lr = 10 ** draw.uniform(-4, 1)
        ours, theirs, steps = pair(draw, lr)
        for s, expected in enumerate(rates(theirs, lr, steps)):
            assert ours(s) == pytest.approx(expected, rel=1e-9, abs=1e-9 * lr), (s, ours)
            compared += 1
    assert compared >= 500
