"""thinc's Adam on fastopt; a pytest plugin that puts it in."""

from pathlib import Path

from thinc.backends.numpy_ops import NumpyOps

from fastopt import functional

theirs = NumpyOps.adam
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


def path():
    """What another interpreter needs to find this plugin, and the same fastopt."""
    return f"{Path(__file__).parent}:{Path(functional.__file__).parents[1]}"


def put_in():
    NumpyOps.adam = adam


def pytest_configure(config):
    put_in()


def pytest_unconfigure(config):
    print(f"{calls} calls of fastopt")
