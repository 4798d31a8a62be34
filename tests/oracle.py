"""The table of configurations that the tests run over, and a whole optimizer made of the reference.

Each case of CASES is (name, class, keyword arguments); together they reach every rule, variant and
option that changes a number.
"""

import math

import numpy as np

import fastopt
from fastopt import reference

RULES = {
    fastopt.SGD: (reference.sgd, ("momentum", "dampening", "nesterov")),
    fastopt.Adagrad: (reference.adagrad, ("lr_decay", "eps")),
    fastopt.RMSprop: (reference.rmsprop, ("alpha", "eps", "momentum", "centered")),
    fastopt.Adam: (reference.adam, ("betas", "eps", "amsgrad", "bias_correction")),
    fastopt.AdamW: (reference.adam, ("betas", "eps", "amsgrad", "bias_correction")),
}
COMMON = ("lr", "weight_decay", "decoupled_weight_decay", "maximize")


def _cases():
    per_class = {
        fastopt.SGD: [
            {},
            {"momentum": 0.9},
            {"momentum": 0.9, "dampening": 0.3},
            {"momentum": 0.9, "nesterov": True},
        ],
        fastopt.Adagrad: [{}, {"lr_decay": 0.1, "initial_accumulator_value": 0.1, "eps": 1e-3}],
        fastopt.RMSprop: [
            {},
            {"momentum": 0.9, "eps": 1e-3},
            {"centered": True, "alpha": 0.9},
            {"centered": True, "momentum": 0.5, "alpha": 0.4},
        ],
        fastopt.Adam: [{}, {"amsgrad": True}, {"betas": (0.0, 0.4), "bias_correction": False}],
        fastopt.AdamW: [{}, {"amsgrad": True, "betas": (0.8, 0.9), "eps": 1e-3}],
    }
    options = [
        {"lr": 0.1},
        {"lr": 0.05, "weight_decay": 0.1},
        {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ]
    for cls, variants in per_class.items():
        for i, variant in enumerate(variants):
            for j, option in enumerate(options):
                for semantics in ("torch", "keras"):
                    kwargs = {**option, **variant, "semantics": semantics}
                    yield f"{cls.__name__}-{i}{j}-{semantics}", cls, kwargs


CASES = list(_cases())
CASE_IDS = [case[0] for case in CASES]


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
        rule, names = RULES[self.opt_class]
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
            hypers = {name: self.groups[i][name] for name in (*COMMON, *names)}
            if rule is reference.sgd:
                hypers["fresh"] = self.fresh[i]
                begins = state["step"] == 1 or self.fresh[i]
                self.fresh[i] = bool(begins and hypers["momentum"] == 0)
            rule(
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
