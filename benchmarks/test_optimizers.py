"""Each optimizer beside the same rule in plain NumPy: ``pytest benchmarks``.

Every test first asserts that both give the same bits, then times one step. ``extra_info`` of each
result (``--benchmark-json``) holds the number of elements, the threads that ran, the bytes that the
rule has to move (parameter and slots are read and written, the gradient is read), and the rate.
"""

import math

import numpy as np
import pytest

import fastopt

LR, MOMENTUM, ALPHA, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.99, 0.9, 0.999, 1e-8, 1e-2


class Plain:
    """A parameter, its slots, and two arrays to work in, updated by NumPy in place."""

    def __init__(self, param, slots):
        self.param, self.t = param, 0
        self.slots = [np.zeros_like(param) for _ in range(slots)]
        self.upper, self.lower = np.empty_like(param), np.empty_like(param)

    def subtract(self, rate, numerator, root_of, eps):
        """p -= rate * numerator / (sqrt(root_of) + eps)"""
        np.multiply(numerator, rate, out=self.upper)
        np.sqrt(root_of, out=self.lower)
        self.lower += eps
        self.upper /= self.lower
        self.param -= self.upper

    def average(self, slot, value, decay):
        """slot = decay * slot + (1 - decay) * value, which may be self.upper"""
        slot *= decay
        np.multiply(value, 1 - decay, out=self.upper)
        slot += self.upper

    def sgd(self, grad):
        self.param -= np.multiply(grad, LR, out=self.upper)

    def momentum(self, grad):
        (b,) = self.slots
        b *= MOMENTUM
        b += grad
        self.param -= np.multiply(b, LR, out=self.upper)

    def adagrad(self, grad):
        (s,) = self.slots
        s += np.multiply(grad, grad, out=self.upper)
        self.subtract(LR, grad, s, EPS)

    def rmsprop(self, grad):
        (v,) = self.slots
        self.average(v, np.multiply(grad, grad, out=self.upper), ALPHA)
        self.subtract(LR, grad, v, EPS)

    def adam(self, grad):
        m, v = self.slots
        self.t += 1
        c1, root = 1 - BETA1**self.t, math.sqrt(1 - BETA2**self.t)
        self.average(m, grad, BETA1)
        self.average(v, np.multiply(grad, grad, out=self.upper), BETA2)
        self.subtract(LR * root / c1, m, v, EPS * root)

    def adamw(self, grad):
        self.param *= 1 - LR * DECAY
        self.adam(grad)


# name: the same optimizer in fastopt, and how many slots it has.
OPTIMIZERS = {
    "sgd": (fastopt.SGD, {}, 0),
    "momentum": (fastopt.SGD, {"momentum": MOMENTUM}, 1),
    "adagrad": (fastopt.Adagrad, {"eps": EPS}, 1),
    "rmsprop": (fastopt.RMSprop, {"alpha": ALPHA, "eps": EPS}, 1),
    "adam": (fastopt.Adam, {"betas": (BETA1, BETA2), "eps": EPS}, 2),
    "adamw": (fastopt.AdamW, {"betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY}, 2),
}


@pytest.mark.parametrize("contender", ["numpy", "one thread", "all threads"])
@pytest.mark.parametrize("elements", [10**3, 10**5, 10**7])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step(benchmark, name, elements, contender):
    cls, options, slots = OPTIMIZERS[name]
    rng = np.random.default_rng(0)
    param = rng.standard_normal(elements, np.float32)
    grads = [rng.standard_normal(elements, np.float32)]

    plain = Plain(param.copy(), slots)
    plain_step = getattr(plain, name)
    threads = fastopt.get_num_threads() if contender == "all threads" else 1
    opt = cls([param], lr=LR, num_threads=threads, **options)
    for _ in range(2):
        plain_step(grads[0])
        used = opt.step(grads).threads
    np.testing.assert_array_equal(param, plain.param, strict=True)

    moved = param.nbytes * (3 + 2 * slots)
    benchmark.group = f"{name}, {elements:.0e} elements"
    benchmark.extra_info.update(elements=elements, threads=used, bytes_moved=moved)
    if contender == "numpy":
        benchmark(plain_step, grads[0])
    else:
        benchmark(opt.step, grads)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["GB_per_s"] = moved / benchmark.stats.stats.median / 1e9
