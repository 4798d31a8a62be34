"""Learning rates that change from step to step.

Each function here returns another one, of the number of completed steps, which every optimizer
takes as its ``lr``:

>>> import numpy as np, fastopt
>>> opt = fastopt.SGD([np.ones(3)], lr=fastopt.schedules.cosine(0.1, steps=10_000))

The step counted from 0 is called s below. A schedule holds no state: it gives the same rate for the
same s, whenever it is asked; anything but an integer of at least 0 is an error. It can be pickled,
and it is not saved in a state dict.

Rates are computed in double from additions, multiplications, divisions and square roots alone,
which round alike on every machine; library functions (``pow``, ``cos``) do not.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from fastopt._options import choice, real

__all__ = [
    "constant",
    "cosine",
    "cosine_restarts",
    "exponential",
    "inverse_time",
    "linear_warmup",
    "multi_step",
    "one_cycle",
    "piecewise",
    "polynomial",
    "step",
]

Schedule = Callable[[int], float]


def constant(lr: float) -> Schedule:
    """Return the schedule of a rate that stays.

    .. math:: lr_s = lr

    Parameters
    ----------
    lr : float
        The rate, at least 0.

    Returns
    -------
    callable
        The rate at step s.

    Notes
    -----
    PyTorch's ``ConstantLR``, a factor over the first steps only, is a :func:`piecewise` of two.

    Examples
    --------
    >>> from fastopt.schedules import constant
    >>> schedule = constant(0.1)
    >>> schedule(0), schedule(1000)
    (0.1, 0.1)
    """
    return _schedule(_constant, _rate("lr", lr))


def _constant(lr: float, s: int) -> float:
    return lr


def step(lr: float, every: int, factor: float = 0.1) -> Schedule:
    r"""Return the schedule of a rate that is multiplied at equal distances.

    .. math:: lr_s = lr \cdot factor^{\lfloor s / every \rfloor}

    Parameters
    ----------
    lr : float
        The rate of the first steps.
    every : int
        How many steps a rate lasts.
    factor : float, optional
        What it is multiplied with.

    Returns
    -------
    callable
        The rate at step s.

    Notes
    -----
    ``StepLR(step_size=every, gamma=factor)`` in PyTorch, ``ExponentialDecay(lr, every, factor,
    staircase=True)`` in Keras.

    Examples
    --------
    >>> from fastopt.schedules import step
    >>> schedule = step(1.0, every=100, factor=0.5)
    >>> schedule(99), schedule(100), schedule(200)
    (1.0, 0.5, 0.25)
    """
    return _schedule(_step, _rate("lr", lr), _steps("every", every), _rate("factor", factor))


def _step(lr: float, every: int, factor: float, s: int) -> float:
    return lr * _power(factor, s // every)


def multi_step(lr: float, milestones: Sequence[int], factor: float = 0.1) -> Schedule:
    r"""Return the schedule of a rate that is multiplied at given steps.

    .. math:: lr_s = lr \cdot factor^{|\{m \in milestones : m \le s\}|}

    Parameters
    ----------
    lr : float
        The rate before the first milestone.
    milestones : sequence of int
        Steps, increasing, each the first with the next rate.
    factor : float, optional
        What it is multiplied with.

    Returns
    -------
    callable
        The rate at step s.

    Notes
    -----
    ``MultiStepLR(milestones, gamma=factor)`` in PyTorch.

    Examples
    --------
    >>> from fastopt.schedules import multi_step
    >>> schedule = multi_step(1.0, milestones=[60, 80], factor=0.5)
    >>> schedule(59), schedule(60), schedule(80)
    (1.0, 0.5, 0.25)
    """
    milestones = _increasing("milestones", milestones)
    return _schedule(_multi_step, _rate("lr", lr), milestones, _rate("factor", factor))


def _multi_step(lr: float, milestones: Sequence[int], factor: float, s: int) -> float:
    return lr * _power(factor, bisect_right(milestones, s))


def exponential(lr: float, factor: float, every: int = 1) -> Schedule:
    r"""Return the schedule of a rate that decays exponentially.

    .. math:: lr_s = lr \cdot factor^{s / every}

    Parameters
    ----------
    lr : float
        The first rate.
    factor : float
        What the rate is multiplied with over `every` steps, a little in each.
    every : int, optional
        That number of steps.

    Returns
    -------
    callable
        The rate at step s.

    See Also
    --------
    step : The same in stairs.

    Notes
    -----
    ``ExponentialLR(gamma=factor)`` in PyTorch, ``ExponentialDecay(lr, every, factor)`` in Keras.

    Examples
    --------
    >>> from fastopt.schedules import exponential
    >>> schedule = exponential(1.0, factor=0.25, every=100)
    >>> schedule(0), schedule(50), schedule(100)
    (1.0, 0.5, 0.25)
    """
    return _schedule(_exponential, _rate("lr", lr), _rate("factor", factor), _steps("every", every))


def _exponential(lr: float, factor: float, every: int, s: int) -> float:
    return lr * _power(factor, s / every)


def inverse_time(lr: float, factor: float, every: int = 1) -> Schedule:
    r"""Return the schedule of a rate that decays with the inverse of time.

    .. math:: lr_s = \frac{lr}{1 + factor \cdot s / every}

    Parameters
    ----------
    lr : float
        The first rate.
    factor : float
        How much the denominator grows over `every` steps.
    every : int, optional
        That number of steps.

    Returns
    -------
    callable
        The rate at step s.

    Notes
    -----
    ``InverseTimeDecay(lr, every, factor)`` in Keras; Adagrad's own ``lr_decay`` is the same.

    Examples
    --------
    >>> from fastopt.schedules import inverse_time
    >>> schedule = inverse_time(1.0, factor=1.0, every=100)
    >>> schedule(0), schedule(100), schedule(300)
    (1.0, 0.5, 0.25)
    """
    return _schedule(
        _inverse_time, _rate("lr", lr), _rate("factor", factor), _steps("every", every)
    )


def _inverse_time(lr: float, factor: float, every: int, s: int) -> float:
    return lr / (1 + factor * (s / every))


def polynomial(lr: float, steps: int, end: float = 0.0, power: float = 1.0) -> Schedule:
    r"""Return the schedule of a rate that goes to its end along a power, and stays there.

    .. math:: lr_s = end + (lr - end) \left(1 - \frac{\min(s, steps)}{steps}\right)^{power}

    Parameters
    ----------
    lr : float
        The first rate.
    steps : int
        After how many steps the end is reached.
    end : float, optional
        The last rate.
    power : float, optional
        1 is a straight line.

    Returns
    -------
    callable
        The rate at step s.

    Notes
    -----
    ``PolynomialLR(total_iters=steps, power=power)`` in PyTorch (to zero), ``PolynomialDecay(lr,
    steps, end, power)`` in Keras.

    Examples
    --------
    >>> from fastopt.schedules import polynomial
    >>> schedule = polynomial(1.0, steps=100, power=2.0)
    >>> schedule(0), schedule(50), schedule(100), schedule(101)
    (1.0, 0.25, 0.0, 0.0)
    """
    return _schedule(
        _polynomial,
        _rate("lr", lr),
        _steps("steps", steps),
        _rate("end", end),
        real("power", power, above=0.0, below=math.inf),
    )


def _polynomial(lr: float, steps: int, end: float, power: float, s: int) -> float:
    left = (steps - min(s, steps)) / steps
    return end + (lr - end) * _power(left, power)


def cosine(lr: float, steps: int, end: float = 0.0) -> Schedule:
    r"""Return the schedule of a rate that goes to its end along half a cosine, and stays there.

    .. math:: lr_s = end + \frac{lr - end}{2} \left(1 + \cos\frac{\pi \min(s, steps)}{steps}\right)

    Parameters
    ----------
    lr : float
        The first rate.
    steps : int
        After how many steps the end is reached.
    end : float, optional
        The last rate.

    Returns
    -------
    callable
        The rate at step s.

    See Also
    --------
    linear_warmup : For a warm-up before it.

    Notes
    -----
    ``CosineDecay(lr, steps, alpha=end / lr)`` in Keras, and ``CosineAnnealingLR(T_max=steps,
    eta_min=end)`` in PyTorch, which goes up again after `steps`.

    References
    ----------
    I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017,
    arXiv:1608.03983.

    Examples
    --------
    >>> from fastopt.schedules import cosine
    >>> schedule = cosine(1.0, steps=100, end=0.5)
    >>> schedule(0), schedule(50), schedule(100), schedule(101)
    (1.0, 0.75, 0.5, 0.5)
    """
    return _schedule(_cosine, _rate("lr", lr), _steps("steps", steps), _rate("end", end))


def _cosine(lr: float, steps: int, end: float, s: int) -> float:
    return _between(lr, end, min(s, steps) / steps)


def cosine_restarts(
    lr: float, period: int, period_factor: int = 1, lr_factor: float = 1.0, end: float = 0.0
) -> Schedule:
    r"""Return the schedule of a rate that goes down along half a cosine again and again.

    In the i-th period, counted from 0, which begins at step :math:`b_i`,

    .. math::

        lr_s = end + \frac{lr \cdot lr\_factor^i - end}{2}
            \left(1 + \cos\frac{\pi (s - b_i)}{period \cdot period\_factor^i}\right)

    Parameters
    ----------
    lr : float
        The first rate.
    period : int
        The steps of the first period.
    period_factor : int, optional
        How much longer each period is than the one before.
    lr_factor : float, optional
        What the first rate of a period is multiplied with for the next one.
    end : float, optional
        The rate that each period goes to.

    Returns
    -------
    callable
        The rate at step s.

    Notes
    -----
    ``CosineAnnealingWarmRestarts(T_0=period, T_mult=period_factor, eta_min=end)`` in PyTorch,
    ``CosineDecayRestarts(lr, period, t_mul=period_factor, m_mul=lr_factor)`` in Keras, where
    `period_factor` is 2 by default and `end` a part of each period's first rate.

    References
    ----------
    I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017,
    arXiv:1608.03983.

    Examples
    --------
    >>> from fastopt.schedules import cosine_restarts
    >>> schedule = cosine_restarts(1.0, period=100, period_factor=2)
    >>> schedule(0), schedule(50), schedule(100), schedule(200), schedule(300)
    (1.0, 0.5, 1.0, 0.5, 1.0)
    """
    return _schedule(
        _cosine_restarts,
        _rate("lr", lr),
        _steps("period", period),
        _steps("period_factor", period_factor),
        _rate("lr_factor", lr_factor),
        _rate("end", end),
    )


def _cosine_restarts(
    lr: float, period: int, period_factor: int, lr_factor: float, end: float, s: int
) -> float:
    if period_factor == 1:
        number, s = divmod(s, period)
    else:
        number = 0
        while s >= period:
            s -= period
            period *= period_factor
            number += 1
    return _between(lr * _power(lr_factor, number), end, s / period)


def linear_warmup(then: float | Schedule, steps: int, start: float = 0.0) -> Schedule:
    r"""Return the schedule of a rate that rises in a line, and then follows another schedule.

    .. math::

        lr_s = \begin{cases}
            start + (then_0 - start) \cdot s / steps & s < steps \\
            then_{s - steps} & s \ge steps
        \end{cases}

    Parameters
    ----------
    then : float or callable
        The rate after the warm-up: one that stays, or a schedule, which begins there.
    steps : int
        How long the warm-up is.
    start : float, optional
        The first rate.

    Returns
    -------
    callable
        The rate at step s.

    Notes
    -----
    ``LinearLR(start_factor=start / then, total_iters=steps)`` in PyTorch; the ``warmup_target``,
    ``warmup_steps`` of Keras's ``CosineDecay``.

    Examples
    --------
    >>> from fastopt.schedules import cosine, linear_warmup
    >>> schedule = linear_warmup(cosine(1.0, steps=100), steps=10)
    >>> schedule(0), schedule(5), schedule(10), schedule(60), schedule(110)
    (0.0, 0.5, 1.0, 0.5, 0.0)
    """
    if not callable(then):
        then = constant(_rate("then", then))
    peak = _rate("then(0)", then(0))
    return _schedule(_linear_warmup, then, peak, _steps("steps", steps), _rate("start", start))


def _linear_warmup(then: Schedule, peak: float, steps: int, start: float, s: int) -> float:
    if s < steps:
        return start + (peak - start) * (s / steps)
    return _rate(f"then({s - steps})", then(s - steps))


def one_cycle(
    peak: float,
    steps: int,
    warmup: float = 0.3,
    start_divisor: float = 25.0,
    end_divisor: float = 1e4,
    shape: str = "cosine",
) -> Schedule:
    r"""Return the schedule of a rate that rises to a peak, and falls far below where it began.

    With :math:`start = peak / start\_divisor`, :math:`end = start / end\_divisor`, the peak at
    :math:`p = warmup \cdot steps - 1` and the end at :math:`e = steps - 1`, a cosine (or a line)
    leads from start to peak and another one from peak to end:

    .. math::

        lr_s = \begin{cases}
            peak + \frac{start - peak}{2} \left(1 + \cos\frac{\pi s}{p}\right) & s \le p \\
            end + \frac{peak - end}{2} \left(1 + \cos\frac{\pi (s - p)}{e - p}\right) & p < s \le e
        \end{cases}

    and the rate stays at the end after that. A warm-up of less than a step (:math:`p < 0`) is over
    before the first one, whose rate then is below the peak; of a single step (:math:`p = 0`), the
    first rate is the peak.

    Parameters
    ----------
    peak : float
        The highest rate.
    steps : int
        The length of the cycle, at least 2.
    warmup : float, optional
        The part of it that rises, from 0 to 1.
    start_divisor, end_divisor : float, optional
        How far the start is below the peak, and the end below the start.
    shape : {"cosine", "linear"}, optional
        Along what it goes.

    Returns
    -------
    callable
        The rate at step s.

    Notes
    -----
    ``OneCycleLR(max_lr=peak, total_steps=steps)`` in PyTorch, which raises an error after the
    end, and also moves the momentum (which a schedule of the rate cannot).

    References
    ----------
    L. N. Smith, N. Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large
    Learning Rates", 2018, arXiv:1708.07120.

    Examples
    --------
    >>> from fastopt.schedules import one_cycle
    >>> schedule = one_cycle(1.0, steps=11, warmup=6 / 11, start_divisor=4.0)
    >>> schedule(0), schedule(5), schedule(10), schedule(11)
    (0.25, 1.0, 2.5e-05, 2.5e-05)
    """
    divisors = {"start_divisor": start_divisor, "end_divisor": end_divisor}
    for name, value in divisors.items():
        real(name, value, low=1.0, below=math.inf)
    peak = _rate("peak", peak)
    start = peak / start_divisor
    return _schedule(
        _one_cycle,
        (start, peak, start / end_divisor),
        _steps("steps", steps, low=2),
        real("warmup", warmup, high=1.0),
        choice("shape", shape, ("cosine", "linear")),
    )


def _one_cycle(
    rates: tuple[float, float, float], steps: int, warmup: float, shape: str, s: int
) -> float:
    start, peak, end = rates
    middle, last = warmup * steps - 1, steps - 1
    s = min(s, last)
    if s <= middle:
        first, second, x = start, peak, s / middle if middle else 1.0
    else:
        first, second, x = peak, end, (s - middle) / (last - middle)
    return first + (second - first) * x if shape == "linear" else _between(first, second, x)


def piecewise(boundaries: Sequence[int], values: Sequence[float]) -> Schedule:
    r"""Return the schedule of given rates between given steps.

    .. math:: lr_s = values_i, \quad i = |\{b \in boundaries : b < s\}|

    Parameters
    ----------
    boundaries : sequence of int
        Steps, increasing, each the last with its rate.
    values : sequence of float
        The rates, one more than there are boundaries.

    Returns
    -------
    callable
        The rate at step s.

    Notes
    -----
    ``PiecewiseConstantDecay(boundaries, values)`` in Keras.

    Examples
    --------
    >>> from fastopt.schedules import piecewise
    >>> schedule = piecewise([100, 200], [0.1, 0.05, 0.01])
    >>> schedule(0), schedule(100), schedule(101), schedule(201)
    (0.1, 0.1, 0.05, 0.01)
    """
    boundaries = _increasing("boundaries", boundaries)
    rates = tuple(_rate(f"values[{i}]", value) for i, value in enumerate(values))
    if len(rates) != len(boundaries) + 1:
        raise ValueError(
            f"values must be one more than boundaries, got {len(rates)} and {len(boundaries)}"
        )
    return _schedule(_piecewise, boundaries, rates)


def _piecewise(boundaries: Sequence[int], rates: Sequence[float], s: int) -> float:
    return rates[bisect_left(boundaries, s)]


# ---- arithmetic ---------------------------------------------------------------------------------


def _between(first: float, last: float, x: float) -> float:
    """Go from `first` to `last` along half a cosine while `x` goes from 0 to 1."""
    return last + (first - last) * ((1 + _cos_pi(x)) / 2)


def _cos_pi(x: float) -> float:
    """Return cos(pi x) for x from 0 to 1, to 2**-52, from its Taylor series."""
    if x > 0.5:
        return -_cos_pi(1 - x)
    angle, cos = math.pi * x, 1.0
    for k in range(21, 0, -2):
        cos = 1 - angle * angle / (k * (k + 1)) * cos
    return cos


def _power(base: float, exponent: float) -> float:
    """Return a power of what is not negative: squares for the whole part, roots for the rest."""
    whole = int(exponent)
    rest = exponent - whole
    power, square, root = 1.0, base, base
    while whole:
        if whole & 1:
            power *= square
        square *= square
        whole >>= 1
    while rest and root != 1:
        root = math.sqrt(root)
        rest *= 2
        if rest >= 1:
            power *= root
            rest -= 1
    return power


# ---- checks of arguments ------------------------------------------------------------------------


def _schedule(rate: Callable[..., float], *options: Any) -> Schedule:
    return partial(_rate_at, rate, options)


def _rate_at(rate: Callable[..., float], options: tuple[Any, ...], completed_steps: int) -> float:
    return rate(*options, _steps("completed_steps", completed_steps, low=0))


def _rate(name: str, value: Any) -> float:
    return real(name, value, below=math.inf)


def _steps(name: str, value: Any, low: int = 1) -> int:
    """Check a number of steps."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number: int = value.__index__()
    if number < low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")
    return number


def _increasing(name: str, values: Sequence[int]) -> tuple[int, ...]:
    steps = tuple(_steps(f"{name}[{i}]", value, low=0) for i, value in enumerate(values))
    if any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"{name} must increase, got {list(steps)}")
    return steps
