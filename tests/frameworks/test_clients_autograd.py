"""autograd's optimizers and fastopt's functions, on the gradients that autograd computes."""

import sys
from pathlib import Path

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad
from autograd.misc import flatten, optimizers

sys.path.append(str(Path(__file__).parent / "clients"))

from rounding import assert_same_step

from fastopt import functional

ITERATIONS = 40


def way(optimizer, **options):
    """Return the points that theirs goes through, and the gradients there, flat."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 5)), rng.standard_normal((30, 3))
    start = {"W": rng.standard_normal((5, 3)), "b": np.zeros(3)}
    points, grads = [], []

    def loss(model, _):
        return anp.sum((anp.tanh(x @ model["W"] + model["b"]) - y) ** 2)

    def callback(model, _, g):
        points.append(flatten(model)[0])
        grads.append(flatten(g)[0])

    end = optimizer(grad(loss), start, callback, num_iters=ITERATIONS, **options)
    assert len(grads) == ITERATIONS
    return [*points, flatten(end)[0]], grads


@pytest.mark.parametrize("mass", [0.0, 0.5, 0.9])
def test_momentum_has_their_bits(mass):
    points, grads = way(optimizers.sgd, step_size=0.01, mass=mass)
    w, b = points[0].copy(), np.zeros_like(points[0])
    for g, after in zip(grads, points[1:], strict=True):
        functional.sgd(w, g, b, lr=0.01, momentum=mass, dampening=mass)
        assert w.tobytes() == after.tobytes()


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_rmsprop_has_their_bits(eps):
    points, grads = way(optimizers.rmsprop, step_size=0.01, gamma=0.8, eps=eps)
    w, v = points[0].copy(), np.ones_like(points[0])
    for g, after in zip(grads, points[1:], strict=True):
        functional.rmsprop(w, g, v, lr=0.01, alpha=0.8, eps=eps)
        assert w.tobytes() == after.tobytes()


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_adam_rounds_where_theirs_does_not_and_takes_the_same_steps(eps):
    points, grads = way(optimizers.adam, step_size=0.05, b2=0.99, eps=eps)
    m, v = (np.zeros_like(points[0]) for _ in range(2))
    for t, g in enumerate(grads, 1):
        w = points[t - 1].copy()
        functional.adam(w, g, m, v, step=t, lr=0.05, betas=(0.9, 0.99), eps=eps)
        assert_same_step(w, points[t], points[t - 1], 0.9**t, 0.99**t)
