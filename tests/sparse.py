"""Gradients of some rows, drawn at random, and what they mean: lazily, and exactly."""

import numpy as np
from oracle import NUMBERS, Oracle, same_bits, weights

import fastopt
from fastopt import reference


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


class Lazy(Oracle):
    """A twin of which a step updates the rows that have a gradient; others stay as they are."""

    def update(self, grads, loss_scale):
        averages, self.ema = self.ema, None
        before = [(p.copy(), {k: a.copy() for k, a in s.items()}) for p, s in self.arrays()]
        dense = all_dense(grads, self.params)
        super().update(dense, loss_scale)
        self.ema = averages
        for grad, (p, s), (old, old_state) in zip(grads, self.arrays(), before, strict=True):
            if not isinstance(grad, fastopt.Rows):
                continue
            left_out = np.ones(len(p), bool)
            left_out[grad.indices] = False
            p[left_out] = old[left_out]
            for name in s.keys() - {"step", *NUMBERS}:
                if name.endswith("_scale"):  # some for each row
                    shape = (len(p), -1)
                    s[name].reshape(shape)[left_out] = old_state[name].reshape(shape)[left_out]
                else:
                    s[name][left_out] = old_state[name][left_out]
        for average, (p, s) in zip(averages or (), self.arrays(), strict=False):
            first = self.completed == 1
            reference.average(average, weights(p, s), self.kwargs["ema_decay"], first=first)

    def arrays(self):
        return zip(self.params, self.state, strict=True)


def state_of(opt):
    return [(f"state {i} {k}", a) for i, s in enumerate(opt.state) for k, a in s.items()]


class Pair:
    """An optimizer with rows="exact", and a twin that is given all elements."""

    def __init__(self, cls, params, **options):
        copies = [p.copy(order="K") for p in params]
        self.cls, self.options = cls, options
        self.exact, self.dense = cls(params, rows="exact", **options), cls(copies, **options)
        self.opts = self.exact, self.dense

    def step(self, grads, **options):
        """Step both; rows that have a gradient are then equal, without anybody's asking."""
        dense = all_dense(grads, self.dense.params)
        one = self.exact.step(grads, **options)
        other = self.dense.step(dense, **options)
        assert one.skipped == other.skipped
        np.testing.assert_equal(one.grad_norm, other.grad_norm)  # be it a NaN
        for i, grad in enumerate(grads):
            if not one.skipped and isinstance(grad, fastopt.Rows):
                self.check_rows(i, grad.indices)
        return one

    def check_rows(self, i, indices):
        pairs = [("param", *(opt.params[i] for opt in self.opts))]
        for name in self.dense.state[i].keys() - {"step", *NUMBERS}:
            if not name.endswith("_scale"):  # of 8-bit state, beside its codes
                pairs.append((name, *(opt.state[i][name] for opt in self.opts)))
        for name, own, other in pairs:
            assert same_bits(own[indices], other[indices]), (i, name)

    def refresh_rows(self, i, indices):
        self.exact.refresh(self.exact.params[i], indices)
        self.check_rows(i, indices)

    def check(self):
        """After refresh(), all is equal."""
        self.exact.refresh()
        self.check_equal()

    def check_equal(self):
        own, other = (
            [*((f"param {i}", p) for i, p in enumerate(opt.params)), *state_of(opt)]
            for opt in self.opts
        )
        for (name, one), (same_name, two) in zip(own, other, strict=True):
            assert name == same_name
            assert one.dtype == two.dtype
            assert same_bits(one, two), name
        own, other = ((opt._plan.fresh(), opt.completed_steps) for opt in self.opts)
        assert own == other
