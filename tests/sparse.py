"""Gradients of some rows, drawn at random, and what they are as gradients of all elements."""

import numpy as np

import fastopt


def draw_indices(rng, n_rows, n, kind):
    """Numbers of rows: any, each given several times, or in order."""
    if kind == "repeated":
        return rng.integers(0, n_rows, n) // 3
    if kind == "in order":
        return np.sort(rng.permutation(n_rows)[:n])
    if kind == "run":  # rows that follow one another, as given too
        start = rng.integers(0, n_rows)
        return np.arange(start, min(start + n, n_rows))
    return rng.integers(0, n_rows, n)


KINDS = ["any", "repeated", "in order", "run"]


def draw_rows(rng, param, n, kind="any", dtype=None):
    """A gradient of about n rows of a parameter."""
    indices = draw_indices(rng, len(param), n, kind)
    values = rng.standard_normal((len(indices), *param.shape[1:]))
    values[rng.random(values.shape) < 0.1] = -0.0
    return fastopt.Rows(indices, values.astype(dtype or param.dtype))


def as_dense(grad, param):
    """Return a gradient of all elements: rows of one number summed in the order given.

    It is of the type that a step computes in, as the sums are.
    """
    if not isinstance(grad, fastopt.Rows):
        return grad
    dense = np.zeros(param.shape, np.float64 if param.dtype == np.float64 else np.float32)
    seen = set()
    for index, row in zip(grad.indices.tolist(), grad.values.astype(dense.dtype), strict=True):
        dense[index] = dense[index] + row if index in seen else row
        seen.add(index)
    return dense


def all_dense(grads, params):
    return [as_dense(grad, param) for grad, param in zip(grads, params, strict=True)]
