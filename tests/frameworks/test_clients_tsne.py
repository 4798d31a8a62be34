"""scikit-learn's t-SNE: its gains are NumPy's, its momentum is fastopt's."""

import numpy as np
import pytest
from sklearn.manifold import _t_sne

from fastopt import functional


def descend(objective, p, steps, momentum, learning_rate, min_gain):
    p, update, gains = p.copy(), np.zeros_like(p), np.ones_like(p)
    for _ in range(steps):
        _, grad = objective(p)
        turned = update * grad < 0
        gains = np.maximum(np.where(turned, gains + 0.2, gains * 0.8), min_gain)
        functional.sgd(p, gains * grad, update, lr=learning_rate, momentum=momentum, velocity=True)
    return p


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_descent_takes_the_same_way(dtype):
    rng = np.random.default_rng(0)
    scale = (10 ** rng.uniform(-3, 0, 60)).astype(dtype)
    options = {"momentum": 0.8, "learning_rate": 0.5, "min_gain": 0.01}

    def objective(p, **kwargs):
        return 0.5 * float((scale * p * p).sum()), scale * p

    start = rng.standard_normal(60).astype(dtype)
    for steps in (1, 2, 10, 100):
        theirs, _, last = _t_sne._gradient_descent(
            objective, start.copy(), 0, steps, n_iter_check=1000, **options
        )
        assert last == steps - 1
        ours = descend(objective, start, steps, **options)
        assert ours.dtype == theirs.dtype == dtype
        assert ours.tobytes() == theirs.tobytes()
    assert objective(ours)[0] < 0.1 * objective(start)[0]
