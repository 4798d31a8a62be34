"""quri-parts' Adam, whose arrays are frozen, and fastopt's function writing to others."""

import sys
from pathlib import Path

import numpy as np
import pytest
from quri_parts.algo.optimizer import Adam, OptimizerStatus
from quri_parts.core.utils.array import readonly_array

sys.path.append(str(Path(__file__).parent / "clients"))

from rounding import assert_same_step

from fastopt import functional

BETAS = 0.9, 0.999


def cost(x):
    return float((np.sin(x) ** 2).sum() + 0.1 * x @ x)


def slope(x):
    return readonly_array(np.sin(2 * x) + 0.2 * x)


@pytest.mark.parametrize("eps", [1e-9, 1e-2])
def test_each_step_is_theirs_and_leaves_the_state_before(eps):
    optimizer = Adam(lr=0.05, betas=BETAS, eps=eps, ftol=1e-8)
    state = optimizer.get_init_state(np.random.default_rng(0).standard_normal(20))
    start = cost(state.params)
    while state.status != OptimizerStatus.CONVERGED:
        given = [state.params, slope(state.params), state.m, state.v]
        assert not any(a.flags.writeable for a in given)
        before = [a.tobytes() for a in given]
        after = optimizer.step(state, cost, slope)
        new = tuple(np.empty(20) for _ in range(3))
        t = after.niter
        functional.adam(*given, step=t, lr=0.05, betas=BETAS, eps=eps, out=new)
        assert [a.tobytes() for a in given] == before
        assert new[1].tobytes() == after.m.tobytes()
        assert new[2].tobytes() == after.v.tobytes()
        assert_same_step(new[0], after.params, state.params, BETAS[0] ** t, BETAS[1] ** t)
        state = after
    assert t > 50
    assert state.cost < 0.2 * start
