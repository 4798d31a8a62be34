"""tequila's gradient descents and fastopt's functions, from the same states."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tequila
from tequila.optimizers.optimizer_gd import OptimizerGD

sys.path.append(str(Path(__file__).parent / "clients"))

from rounding import assert_same_step

from fastopt import functional

STEPS, LR, EPS = 30, 0.05, 1e-7


def way(method):
    """Return the points, gradients and pairs of moments that theirs goes through."""
    a, b, c = (tequila.Variable(name) for name in "abc")
    objective = (a - 1.0) ** 2 + (a * b) ** 2 + b**4 + (c + b) ** 2
    theirs = OptimizerGD(method=method, lr=LR, epsilon=EPS, beta=0.8, rho=0.99)
    values = {a: 0.3, b: -2.0, c: 1.5}
    found = theirs(objective, maxiter=STEPS, initial_values=values)
    history = theirs.history

    def row(of):
        return np.array([float(of[v]) for v in (a, b, c)])

    points = [row(p) for p in history.angles]
    grads = [row(g) for g in history.gradients]
    moments = [[np.array(x) for x in pair] for pair in found.moments]
    assert (len(points), len(grads), len(moments)) == (STEPS, STEPS, STEPS + 1)
    return points, grads, moments


@pytest.mark.parametrize(
    ("method", "function", "used", "options"),
    [
        ("sgd", functional.sgd, [], {}),
        ("momentum", functional.sgd, [0], {"momentum": 0.8, "velocity": True}),
        ("adagrad", functional.adagrad, [1], {"eps": EPS, "eps_inside": True}),
        ("rmsprop", functional.rmsprop, [1], {"alpha": 0.99, "eps": EPS, "eps_inside": True}),
    ],
)
def test_the_simpler_rules_have_their_bits(method, function, used, options):
    points, grads, moments = way(method)
    w, state = points[0].copy(), [np.zeros(3) for _ in used]
    for t in range(1, STEPS + 1):
        function(w, grads[t - 1], *state, lr=LR, **options)
        if t < STEPS:  # the last point is in no history
            assert w.tobytes() == points[t].tobytes()
        if method != "adagrad" or t == STEPS:  # theirs adds to one array all the time
            assert [a.tobytes() for a in state] == [moments[t][k].tobytes() for k in used]


def test_adam_rounds_where_theirs_does_not_and_takes_the_same_steps():
    points, grads, moments = way("adam")
    m, v = np.zeros(3), np.zeros(3)
    for t in range(1, STEPS):
        w = points[t - 1].copy()
        functional.adam(w, grads[t - 1], m, v, step=t, lr=LR, betas=(0.8, 0.99), eps=EPS)
        assert [m.tobytes(), v.tobytes()] == [a.tobytes() for a in moments[t]]
        assert_same_step(w, points[t], points[t - 1], 0.8**t, 0.99**t)
