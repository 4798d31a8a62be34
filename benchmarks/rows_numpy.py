"""Steps by rows in NumPy, as who knows it well writes them."""

import numpy as np


def summed(indices, values):
    """Return the distinct rows, and the sum of what is given of each.

    Of each row the first gradient is copied, and only the others are added, which is slow.
    """
    rows, first, inverse = np.unique(indices, return_index=True, return_inverse=True)
    g = values[first]
    if len(rows) < len(indices):
        others = np.ones(len(indices), bool)
        others[first] = False
        np.add.at(g, inverse[others], values[others])
    return rows, g


def adagrad(rows, g, table, sums, lr, eps):
    """Update these rows of a table and of its sums, from their gradient, which is overwritten."""
    s = sums[rows]
    s += g * g
    sums[rows] = s
    np.sqrt(s, out=s)
    s += eps
    g *= lr
    g /= s
    table[rows] -= g
