"""Recorded trajectories of PyTorch and Keras, and what replays them.

``golden/`` holds what the real frameworks computed on seeded gradients (its manifest describes the
files). Errors are in ulps of the largest magnitude that the element has had so far: where a
parameter crosses zero its own ulp says nothing, for a framework against itself too.
"""

import json

import numpy as np
from support import TESTS
from tables import BY_NAME

from fastopt import reference

GOLDEN = TESTS / "golden"
ENTRIES = json.loads((GOLDEN / "manifest.json").read_text())["entries"]

# What the array API cannot express, and why; the adapters and the schedules are held to these.
NOT_EXPRESSIBLE = {
    "ema_overwrite_frequency": "the average replaces the weights inside Keras's own step",
}

KERAS_NAMES = {
    "learning_rate": "lr",
    "epsilon": "eps",
    "rho": "alpha",
    "clipnorm": "clip_norm",
    "clipvalue": "clip_value",
    "global_clipnorm": "global_clip_norm",
    "ema_momentum": "ema_decay",
    "gradient_accumulation_steps": "accumulate",
}
# Kept as float32 by Keras, whatever the type of the parameters.
KERAS_FLOAT32 = {"lr", "weight_decay", "initial_accumulator_value"}


def reason_to_leave_out(entry):
    if entry["class"].startswith("lr:"):
        return "a schedule alone"
    return next((why for key, why in NOT_EXPRESSIBLE.items() if key in entry["kwargs"]), None)


def as_keras_stores(cls, kwargs):
    rounded = KERAS_FLOAT32 | {*BY_NAME[cls].keras_rounds}
    return {k: in_float32(v) if k in rounded else v for k, v in kwargs.items()}


def in_float32(value):
    return tuple(map(in_float32, value)) if isinstance(value, tuple) else float(np.float32(value))


def arguments(entry):
    """Return fastopt's keyword arguments for a recorded configuration."""
    given = dict(entry["kwargs"])
    if entry["library"] == "torch":
        for implementation in ("foreach", "fused"):
            given.pop(implementation, None)
        if "betas" in given:
            given["betas"] = tuple(given["betas"])
        return given
    if given.pop("use_ema", False):
        given.setdefault("ema_momentum", 0.99)
    kwargs = {"semantics": "keras", "decoupled_weight_decay": True}
    row = BY_NAME[entry["class"]]
    kwargs |= row.keras_defaults
    if "betas" in row.hypers:
        beta1, beta2 = row.defaults["betas"]
        kwargs["betas"] = given.pop("beta_1", beta1), given.pop("beta_2", beta2)
    given.pop("loss_scale_factor", None)
    kwargs |= {
        name if name in row.hypers else KERAS_NAMES.get(name, name): value
        for name, value in given.items()
    }
    return as_keras_stores(entry["class"], kwargs)


def groups(entry, params):
    """Return the parameters as recorded: plain, in groups, or with some left out of the decay."""
    if "param_groups" in entry:
        return [
            {**group, "params": [params[i] for i in group["params"]]}
            for group in entry["param_groups"]
        ]
    if "exclude" in entry:
        out = [f"p{i}" in entry["exclude"] for i in range(len(params))]
        return [
            {"params": [p], "weight_decay": 0.0} if left_out else {"params": [p]}
            for p, left_out in zip(params, out, strict=True)
        ]
    return params


class Replay:
    """Runs fastopt over a recorded trajectory and keeps the largest errors."""

    def __init__(self, entry):
        self.entry = entry
        self.file = np.load(GOLDEN / entry["file"])
        self.n = len(entry["shapes"])
        self.params = [self.file[f"p0_{i}"].copy() for i in range(self.n)]
        self.opt = BY_NAME[entry["class"]].cls(groups(entry, self.params), **arguments(entry))
        self.bias_error = bias_error(entry)
        self.error = 0.0  # of the parameters, in scaled ulps, beyond the bias correction's
        self.finite_alike = True

    def run(self):
        largest = [np.abs(p) for p in self.params]
        self.travelled = travelled = [np.zeros(p.shape) for p in self.params]
        self.largest_state = [
            {name: np.abs(array) for name, array in state.items()} for state in self.opt.state
        ]
        scale = self.entry["kwargs"].get("loss_scale_factor", 1.0)
        with np.errstate(all="ignore"):
            for t in range(self.entry["steps"]):
                self.opt.step(self.prepare(t), loss_scale=scale)
                for i in range(self.n):
                    before = self.file[f"p_{i}"][t - 1] if t else self.file[f"p0_{i}"]
                    after = self.file[f"p_{i}"][t]
                    travelled[i] += np.abs(after.astype(float) - before)
                    largest[i] = np.fmax(largest[i], np.abs(after))
                    self.compare(self.params[i], after, largest[i], travelled[i])
                    for name, array in self.opt.state[i].items():
                        seen = self.largest_state[i]
                        seen[name] = np.fmax(seen[name], np.abs(array))
        return self

    def prepare(self, t):
        """Set what changes from step to step, and return the gradients."""
        if "lr" in self.file:
            for group, lr in zip(self.opt.param_groups, self.file["lr"][t], strict=False):
                group["lr"] = float(lr)
        if self.entry["library"] == "keras":  # one counter, which moves without a gradient too
            for state in self.opt.state:
                state["step"][...] = t // self.entry["kwargs"].get("gradient_accumulation_steps", 1)
        none = self.file["none"][t]
        if self.entry["library"] == "torch" and self.entry["class"] == "NAdam":
            self.round_products(none)
        return [None if none[i] else np.asarray(self.file[f"g_{i}"][t]) for i in range(self.n)]

    def round_products(self, none):
        """Have a step compute with products of momenta as PyTorch rounds them, to float32."""
        of_each = [group for group in self.opt.param_groups for _ in group["params"]]
        for state, group, skipped in zip(self.opt.state, of_each, none, strict=True):
            if not skipped:
                step = int(state["step"]) + 1
                mu = reference.nadam_momentum(group["betas"][0], group["momentum_decay"], step)
                product = np.float32(state["mu_product"]) * np.float32(mu)
                state["mu_product"][...] = float(product) / mu

    def compare(self, got, expected, largest, travelled):
        finite = np.isfinite(expected)
        self.finite_alike &= np.array_equal(np.isfinite(got), finite)
        gap = np.abs(got.astype(np.longdouble) - expected) - self.bias_error * travelled
        self.error = max(self.error, float((gap / np.spacing(largest))[finite].max(initial=0)))

    def final_state(self):
        """Yield (name, recorded array, own array, its largest magnitude so far, slack)."""
        for key in self.file.files:
            if not key.startswith("s_"):
                continue
            _, index, name = key.split("_", 2)
            i = int(index)
            if name == "average":
                own, slack = self.opt.ema[i], self.bias_error * self.travelled[i]
                yield f"ema {i}", self.file[key], own, np.abs(own), slack
                continue
            if name == "gradient_accumulator":
                own = self.opt.state_dict()["accumulated"]["sums"][i]
                flushed = np.finfo(own.dtype).tiny  # TensorFlow has no subnormal numbers
                yield f"sum {i}", self.file[key], own, np.abs(own), flushed
                continue
            if self.entry["library"] == "keras":
                name = BY_NAME[self.entry["class"]].keras_slots[name]
            if name in self.opt.state[i]:
                own = self.opt.state[i][name]
                yield f"{name} {i}", self.file[key], own, self.largest_state[i][name], 0.0
            else:  # Keras makes velocity_hat also where nothing uses it
                assert name == "max_exp_avg_sq"
                assert not self.entry["kwargs"].get("amsgrad")


def bias_error(entry):
    """Return the relative error of the framework's own bias correction.

    PyTorch forms ``1 - beta**t`` in double by subtraction; Keras in the parameter's type, from
    betas rounded to float32.
    """
    correction = BY_NAME[entry["class"]].correction
    if correction is None:
        return 0.0
    beta, of_keras = correction
    if entry["library"] == "keras":
        return of_keras
    return 2.0**-53 / (1 - entry["kwargs"].get("betas", (0.9, 0.999))[beta])


def state_tolerance(entry):
    """Return the scaled ulps allowed for state."""
    return BY_NAME[entry["class"]].state_ulps if tolerance(entry) < 128 else 16


def tolerance(entry):
    """Return the scaled ulps allowed: more where the update is ill-conditioned."""
    row = BY_NAME[entry["class"]]
    if entry["library"] == "keras":
        return 16
    return 128 if row.is_ill(entry["kwargs"]) else row.ulps
