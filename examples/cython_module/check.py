"""Trains with the module; the exit status is 0 if it finds the weights that it should."""

import sys

import numpy as np
from least_squares import fit

rng = np.random.default_rng(0)
X = rng.standard_normal((500, 4))
y = X @ [2.0, -3.0, 0.5, 1.0] + 0.01 * rng.standard_normal(500)
best = np.linalg.lstsq(X, y)[0]
worst = np.abs(fit(X, y) - best).max()
print(f"the weights are off by {worst:.1e} at most")
sys.exit(0 if worst < 1e-6 else 1)
