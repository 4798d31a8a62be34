"""The model of an optimizer: what everything about it should be, after any operation.

It is the reference, over copies of the parameters, with groups, counters, marks and sums of its
own. Beside it stands what compares an optimizer, or what it saves, with it.
"""

import copy

import numpy as np
from oracle import (
    MASTERS,
    Oracle,
    assert_same_bits,
    new_master,
    new_slot,
    same_bits,
    slot_of,
    weights,
    widened,
)
from sequences import relaid
from tables import BY_CLASS

from fastopt import reference


class Rate:
    """A learning rate that falls, and can be copied and compared."""

    def __init__(self, first):
        self.first = first

    def __call__(self, completed_steps):
        return self.first / (1 + completed_steps)


class Failing:
    """A learning rate that raises, or returns what is none."""

    def __init__(self, value):
        self.value = value

    def __call__(self, completed_steps):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def every_third(key, param):
    """Say which parameters are left out of the decay."""
    return len(str(key)) % 2 == 0 or param.size % 3 == 0


def is_left_out(no_decay, key, param):
    if no_decay is None:
        return False
    return no_decay(key, param) if callable(no_decay) else key in no_decay


def plain(value):
    """Return an option as something that can be compared."""
    if callable(value):
        return [value(step) for step in range(5)]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (tuple, list)):
        return tuple(map(float, value))
    numbers = np.asarray(value)
    return tuple(map(float, numbers)) if numbers.ndim else float(numbers)


class Model(Oracle):
    """What an optimizer should be: the reference, over copies of its parameters."""

    def __init__(self, cls, kwargs, defaults):
        self.opt_class, self.kwargs, self.defaults = cls, kwargs, defaults
        self.row = BY_CLASS[cls]
        self.options, self.group_of, self.keys = [], [], []
        self.params, self.state, self.totals, self.fresh, self.left_out = [], [], [], [], []
        self.ema = None if kwargs.get("ema_decay") is None else []
        self.completed = self.summed = 0

    def add(self, options, keys, params):
        self.options.append(copy.deepcopy({**self.defaults, **options}))
        for key, param in zip(keys, params, strict=True):
            self.group_of.append(len(self.options) - 1)
            self.keys.append(key)
            param = np.asarray(param)
            self.params.append(param.copy(order="K"))
            master = new_master(param, self.kwargs.get("master_weights"))
            self.state.append({"step": np.zeros((), np.int64), **master})
            self.totals.append(None)
            self.fresh.append(False)
            self.left_out.append(is_left_out(self.kwargs.get("no_decay"), key, param))
            if self.ema is not None:
                self.ema.append(weights(param, master).copy(order="K"))
        self.take_over(fresh=False)

    def initial(self, i, slot):
        """Return new arrays of a slot."""
        group, start = self.options[self.group_of[i]], self.row.starts.get(slot)
        value = plain(group[start]) if start else 0
        return new_slot(self.params[i], slot, value, self.kwargs.get("state_dtype"))

    def slots(self, i):
        """Return the slots that a parameter has arrays of."""
        return {slot_of(name) for name in self.state[i].keys() - {"step", *MASTERS}}

    def missing(self, i):
        group = {k: plain(v) for k, v in self.options[self.group_of[i]].items() if k != "lr"}
        return {*self.row.used(group)} - self.slots(i)

    def take_over(self, *, fresh=True):
        """Make the slots that have been switched on."""
        for i in range(len(self.params)):
            for slot in self.missing(i):
                self.state[i] |= self.initial(i, slot)
                if slot in self.row.begins:
                    self.fresh[i] = fresh

    def foresee(self, grads, loss_scale):
        """Return the number of the gradient that is not finite, or None, and the norm or None."""
        k = self.kwargs.get("accumulate", 1)
        last = (self.summed + 1) % k == 0
        whole = []
        grads = [widened(grad, param) for grad, param in zip(grads, self.params, strict=True)]
        for total, grad in zip(self.totals, grads, strict=True):
            if grad is None and (total is None or not last):
                whole.append(None)
            elif k > 1:
                whole.append(reference.mean(total, grad, k if last else 1, loss_scale))
            else:
                with np.errstate(all="ignore"):
                    whole.append(np.asarray(grad.dtype.type(1 / loss_scale) * grad))
        bad = [i for i, g in enumerate(whole) if g is not None and not np.isfinite(g).all()]
        skips = bad and self.kwargs.get("nonfinite", "propagate") != "propagate"
        clips = self.kwargs.get("clip_norm") or self.kwargs.get("global_clip_norm")
        norm = reference.grad_norm(whole, self.params) if clips and last else None
        return bad[0] if skips else None, norm

    def step(self, grads, loss_scale=1.0):
        self.take_over()
        self.groups = []
        for i, number in enumerate(self.group_of):
            group = self.options[number]
            lr = group["lr"](self.completed) if callable(group["lr"]) else group["lr"]
            group = {name: plain(value) for name, value in group.items() if name != "lr"}
            group["lr"] = plain(lr)
            if self.left_out[i]:
                group["weight_decay"] = 0.0
            self.groups.append(group)
        super().step(grads, loss_scale)

    def reset(self):
        self.take_over()
        for i, state in enumerate(self.state):
            state["step"][...] = 0
            for slot in self.slots(i):
                state |= self.initial(i, slot)
            self.fresh[i], self.totals[i] = False, None
        if self.ema is not None:
            pairs = zip(self.params, self.state, strict=True)
            self.ema = [weights(param, state).copy(order="K") for param, state in pairs]
        self.completed = self.summed = 0

    def copied(self, opt):
        """Return a copy of the model, for a copy of its optimizer; its arrays may lie otherwise."""
        new = copy.deepcopy(self)
        new.params = [relaid(p, like) for p, like in zip(new.params, opt.params, strict=True)]
        return new

    def load(self, saved, *, with_params=False):
        """Take over another model's state, by the parameters' keys."""
        other = {key: i for i, key in enumerate(saved.keys)}
        for own, options in zip(self.options, saved.options, strict=True):
            for name, value in options.items():
                if not callable(value):
                    own[name] = copy.deepcopy(value)
        for i, key in enumerate(self.keys):
            k = other[key]
            names = {*self.state[i], *saved.state[k]}
            self.state[i] = {
                name: saved.state[k][name].copy()
                if name in saved.state[k]
                else np.zeros_like(self.state[i][name])
                for name in names
            }
            self.fresh[i] = saved.fresh[k] or not {*self.row.begins} <= saved.slots(k)
            self.totals[i] = copy.deepcopy(saved.totals[k])
            if self.ema is not None:
                self.ema[i] = saved.ema[k].copy()
            if with_params:
                self.params[i][...] = saved.params[k]
        self.completed, self.summed = saved.completed, saved.summed
        self.take_over()

    def fits(self, saved):
        """Tell whether another model's state can be taken over."""

        def form(model):
            return sorted(
                (str(key), number, param.shape, param.dtype.name)
                for key, number, param in zip(model.keys, model.group_of, model.params, strict=True)
            )

        return len(self.options) == len(saved.options) and form(self) == form(saved)


def assert_as_modelled(opt, model):
    assert opt.completed_steps == model.completed
    assert opt.accumulated_steps == model.summed
    groups = [{k: plain(v) for k, v in g.items() if k != "params"} for g in opt.param_groups]
    assert groups == [{k: plain(v) for k, v in g.items()} for g in model.options]
    for i, state in enumerate(opt.state):
        late = {slot_of(name) for name in state.keys() - model.state[i].keys()}
        assert late <= model.missing(i)  # what was switched on may be made already
        for slot in late:
            model.state[i] |= model.initial(i, slot)
            if slot in model.row.begins:
                model.fresh[i] = True
    assert_same_bits(opt, model)
    if opt._members.sums is not None:
        for own, there, total in zip(
            opt._members.sums, opt._plan.summed(), model.totals, strict=True
        ):
            assert there == (total is not None)
            assert not there or same_bits(own, total)


def assert_saved(saved, model):
    """Compare a state dict with the model."""
    assert saved["rule"] == model.opt_class._rule.name
    assert saved["semantics"] == model.kwargs.get("semantics", "torch")
    assert saved["completed_steps"] == model.completed
    assert [key for group in saved["param_groups"] for key in group["params"]] == model.keys
    for group, options in zip(saved["param_groups"], model.options, strict=True):
        expected = {k: plain(v) for k, v in options.items() if not callable(v)}
        assert {k: plain(v) for k, v in group.items() if k != "params"} == expected
    assert list(saved["state"]) == model.keys
    for i, state in enumerate(saved["state"].values()):
        waits = model.fresh[i] and model.state[i]["step"] > 0
        marks = {f"{name}_begun" for name in model.row.begins if waits and name in model.slots(i)}
        assert state.keys() == model.state[i].keys() | marks
        assert all(same_bits(state[name], model.state[i][name]) for name in model.state[i])
        assert not any(state[mark] for mark in marks)
    assert (saved["ema"] is None) == (model.ema is None)
    if model.ema is not None:
        assert all(same_bits(a, b) for a, b in zip(saved["ema"].values(), model.ema, strict=True))
    assert (saved["accumulated"] is None) == (model.summed == 0)
    if model.summed:
        assert saved["accumulated"]["steps"] == model.summed
        sums = saved["accumulated"]["sums"]
        there = {key: t for key, t in zip(model.keys, model.totals, strict=True) if t is not None}
        assert sums.keys() == there.keys()
        assert all(same_bits(sums[key], total) for key, total in there.items())
