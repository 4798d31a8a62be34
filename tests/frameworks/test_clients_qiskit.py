"""qiskit-algorithms' ADAM, AMSGrad included, and fastopt's function, from the same states."""

import sys
from pathlib import Path

import numpy as np
import pytest
from qiskit_algorithms.optimizers import ADAM

sys.path.append(str(Path(__file__).parent / "clients"))

from rounding import assert_same_step

from fastopt import functional

STEPS, LR, BETAS = 60, 0.1, (0.9, 0.99)


def cost(x):
    return float((np.sin(x) ** 2).sum() + 0.1 * x @ x)


def slope(x):
    return np.sin(2 * x) + 0.2 * x


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_each_step_is_theirs(amsgrad, eps):
    theirs = ADAM(STEPS, 0.0, LR, *BETAS, noise_factor=eps, amsgrad=amsgrad)
    names = ["_m", "_v", *["_v_eff"] * amsgrad]
    points, states = [], []

    def record(x):
        points.append(x.copy())
        states.append([getattr(theirs, name).copy() for name in names])

    def jac(x):  # called before each step, first of all before the state is there
        record(x)
        return slope(x)

    start = np.random.default_rng(0).standard_normal(20)
    record(theirs.minimize(cost, start, jac=jac).x)
    states[0] = [np.zeros(20) for _ in names]
    assert len(points) == STEPS + 1

    options = {"lr": LR, "betas": BETAS, "eps": eps, "eps_hat": True}
    own, own_state = start.copy(), [np.zeros(20) for _ in names]
    for t in range(1, STEPS + 1):
        w, state = points[t - 1].copy(), [a.copy() for a in states[t - 1]]
        functional.adam(w, slope(w), *state, step=t, **options)
        assert state[0].tobytes() == states[t][0].tobytes()
        # Theirs multiplies (1 - b)*g by g, and not 1 - b by g*g: two products rounded, and a sum.
        for a, b in zip(state[1:], states[t][1:], strict=True):
            np.testing.assert_array_max_ulp(a, b, 3)
        assert_same_step(w, points[t], points[t - 1], BETAS[0] ** t, BETAS[1] ** t)

        functional.adam(own, slope(own), *own_state, step=t, **options)
    np.testing.assert_allclose(own, points[-1], rtol=1e-10, atol=1e-12)
    assert cost(own) < 0.2 * cost(start)
