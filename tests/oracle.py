"""A whole optimizer made of the reference, to compare one of fastopt's with, bit for bit."""

import math

import numpy as np
from tables import BY_CLASS

from fastopt import reference


class Oracle:
    """A fastopt optimizer's twin, made of the reference functions, over copies of its parameters.

    It takes options, initial state and hyperparameters from the twin's public attributes, and the
    optimizer-wide options from `kwargs`.
    """

    def __init__(self, opt, **kwargs):
        self.opt_class = type(opt)
        self.kwargs = kwargs
        self.params = [p.copy(order="K") for p in opt.params]
        self.state = [{k: a.copy(order="K") for k, a in s.items()} for s in opt.state]
        self.ema = None if opt.ema is None else [a.copy(order="K") for a in opt.ema]
        self.groups = [g for g in opt.param_groups for _ in g["params"]]
        self.completed = 0
        self.totals, self.summed = [None] * len(self.params), 0
        self.fresh = [False] * len(self.params)  # momentum buffers that no step has used yet

    def step(self, grads, loss_scale=1.0):
        k = self.kwargs.get("accumulate", 1)
        if k > 1:
            self.summed = (self.summed + 1) % k
            self.totals = [
                total if total is grad is None else reference.mean(total, grad, 1, loss_scale)
                for total, grad in zip(self.totals, grads, strict=True)
            ]
            if self.summed:
                return
            grads = [
                total if total is None else reference.mean(total, None, k) for total in self.totals
            ]
            self.totals, loss_scale = [None] * len(self.params), 1.0
        self.update(grads, loss_scale)

    def update(self, grads, loss_scale):
        row = BY_CLASS[self.opt_class]
        semantics = self.kwargs.get("semantics", "torch")
        clip = {k: self.kwargs.get(k) for k in ("clip_value", "clip_norm", "global_clip_norm")}
        scales = [1 / loss_scale] * len(grads)
        if clip["clip_norm"]:
            for i, (grad, param) in enumerate(zip(grads, self.params, strict=True)):
                if grad is not None:
                    norm = math.sqrt(reference.sum_of_squares(grad, param, loss_scale))
                    scales[i] *= reference.clip_factor(norm, clip["clip_norm"], semantics)
        if clip["global_clip_norm"]:
            norm = reference.grad_norm(grads, self.params, loss_scale)
            limit = clip["global_clip_norm"]
            factor = reference.clip_factor(norm, limit, semantics, of_all=True)
            scales = [scale * factor for scale in scales]
        for i, (grad, param, state) in enumerate(zip(grads, self.params, self.state, strict=True)):
            if grad is None:
                continue
            state["step"] += 1
            hypers = row.formula(self.groups[i])
            if row.begins:
                hypers["fresh"] = self.fresh[i]
                begins = state["step"] == 1 or self.fresh[i]
                self.fresh[i] = bool(begins and not {*row.begins} & {*row.used(hypers)})
            row.reference(
                param,
                grad,
                state,
                step=int(state["step"]),
                semantics=semantics,
                grad_scale=scales[i],
                grad_limit=clip["clip_value"] or math.inf,
                **hypers,
            )
        for average, param in zip(self.ema or (), self.params, strict=False):
            reference.average(average, param, self.kwargs["ema_decay"], first=self.completed == 0)
        self.completed += 1


def assert_same_bits(opt, oracle, where=""):
    """Compare parameters, state and averages bit by bit; any NaN equals any other."""
    pairs = [(f"param {i}", a, oracle.params[i]) for i, a in enumerate(opt.params)]
    for i, (own, other) in enumerate(zip(opt.state, oracle.state, strict=True)):
        assert own.keys() == other.keys()
        pairs += [(f"state {i} {name}", own[name], other[name]) for name in own]
    if opt.ema is not None:
        pairs += [(f"ema {i}", a, oracle.ema[i]) for i, a in enumerate(opt.ema)]
    for name, a, b in pairs:
        assert a.dtype == b.dtype, name
        assert same_bits(a, b), f"{where} {name}: {describe(a, b)}"


def bits(array):
    """The array's bits as integers, with one pattern for every NaN."""
    if array.dtype.kind != "f":
        return array
    array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def same_bits(a, b):
    return np.array_equal(bits(a), bits(b))


def describe(a, b):
    """Say where two arrays first differ."""
    places = np.argwhere(bits(a) != bits(b))
    if len(places) == 0:
        return f"shapes {a.shape} and {b.shape}"
    place = tuple(places[0])
    return f"{len(places)} of {a.size} elements differ, first at {place}: {a[place]!r} {b[place]!r}"
