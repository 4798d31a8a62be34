"""Random sequences of everything that may be done to an optimizer, beside a model of it.

After each operation every bit must be the model's; an operation that is refused must leave all of
it as it was.
"""

import array
import copy
import ctypes
import pickle
import re
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
import sequences
from oracle import MASTERS, NUMBERS, same_bits
from sequences import DTYPES, History, chance, new_gradient, new_parameter, pick, relaid, values
from sequences_model import (
    Failing,
    Model,
    Rate,
    assert_as_modelled,
    assert_saved,
    every_third,
)
from tables import BAD_HYPERS, BY_CLASS, CLASSES

import fastopt
from fastopt import SGD, schedules

OPERATIONS = 30
F32, F64, BF16, F16 = (np.dtype(t) for t in (*DTYPES, ml_dtypes.bfloat16, np.float16))
STORAGE = ("master_weights", "state_dtype", "stochastic_rounding", "seed")


# ---- hyperparameters -----------------------------------------------------------------------------


def learning_rate(rng):
    return pick(
        rng,
        [0.1, 1e-3, 0.5, 0, np.float32(0.25), np.array(0.2), Rate(0.5), schedules.cosine(0.3, 20)],
    )


def good_options(rng, cls, semantics):
    """Return some hyperparameters that a group may be given."""
    options = {}
    if chance(rng, 0.5):
        options["lr"] = learning_rate(rng)
    if chance(rng, 0.4):
        options["weight_decay"] = pick(rng, [0, 0.1, 0.01, np.float64(0.5)])
        options["decoupled_weight_decay"] = pick(rng, [False, True, np.bool_(True)])
    if chance(rng, 0.2):
        options["maximize"] = pick(rng, [False, True])
    row = BY_CLASS[cls]
    if chance(rng, 0.7):
        options |= row.draw(rng, semantics)
    if "eps" in row.hypers and chance(rng, 0.3):
        options["eps"] = pick(rng, [1e-8, 1e-3, 0.1])
    return options


# ---- the sequence --------------------------------------------------------------------------------


class Sequence:
    def __init__(self, seed, done, folder):
        self.rng, self.folder, self.files = np.random.default_rng([seed, 1]), folder, 0
        self.history = History(done)
        rng = self.rng
        self.cls = pick(rng, [SGD, *CLASSES])
        self.named = chance(rng, 0.4)
        self.dtypes = (F32, F64)
        self.kwargs = self.new_kwargs()
        self.pairs = [self.new_pair()]
        self.snapshots = []

    def new_kwargs(self):
        """Return options of the optimizer, not of its groups."""
        rng = self.rng
        kwargs = {"semantics": pick(rng, ["torch", "keras"])}
        if chance(rng, 0.4):
            kwargs["accumulate"] = pick(rng, [2, 3])
        if chance(rng, 0.3):
            kwargs["ema_decay"] = pick(rng, [0.5, 0.9, 0, 1])
        if chance(rng, 0.3):
            kwargs["no_decay"] = ["w0"] if self.named and chance(rng, 0.5) else every_third
        return {**kwargs, **self.other_kwargs(), **self.storage_kwargs()}

    def storage_kwargs(self):
        """Return how parameters and state are stored, which may not differ where it is loaded."""
        rng, kwargs = self.rng, {}
        if chance(rng, 0.5):
            return kwargs
        self.history.done["fewer bits"] += 1
        self.dtypes = (F32, F64, BF16, F16)
        if chance(rng, 0.6):
            kwargs["state_dtype"] = pick(rng, ["float32", "bfloat16", "8bit", "8bit"])
            self.dtypes = (F32, BF16, F16)
        if chance(rng, 0.5):
            kwargs["master_weights"] = pick(rng, [True, False, False])
        if chance(rng, 0.3):
            kwargs["stochastic_rounding"] = pick(rng, [True, False])
        if chance(rng, 0.5):
            kwargs["seed"] = pick(rng, [0, 1, 2**64 - 1])
        return kwargs

    def other_kwargs(self):
        """Return those that may differ where state is loaded."""
        rng, kwargs = self.rng, {}
        if chance(rng, 0.5):
            clip = pick(rng, ["clip_value", "clip_norm", "global_clip_norm"])
            kwargs[clip] = pick(rng, [0.1, 1.0, 1e3])
        if chance(rng, 0.5):
            kwargs["nonfinite"] = pick(rng, ["skip", "raise", "propagate"])
        if chance(rng, 0.2):
            kwargs["num_threads"] = pick(rng, [1, 2, 3])
        return kwargs

    def new_params(self, first, n):
        """Return keys and parameters of a new group."""
        params = [new_parameter(self.rng, pick(self.rng, self.dtypes)) for _ in range(n)]
        params = [self.perhaps_lent(param) for param in params]
        keys = [f"w{first + k}" if self.named else first + k for k in range(n)]
        return keys, params

    def perhaps_lent(self, param):
        """Return a parameter, or something else that lends memory with its values."""
        if param.ndim != 1 or param.size == 0 or chance(self.rng, 0.5):
            return param
        if param.dtype not in DTYPES:
            return param
        code = "f" if param.dtype == np.float32 else "d"
        if chance(self.rng, 0.5):
            return array.array(code, param.tobytes())
        of = ctypes.c_float if code == "f" else ctypes.c_double
        return (of * param.size).from_buffer_copy(param.tobytes())

    def given(self, keys, params):
        if self.named:
            return dict(zip(keys, params, strict=True))
        return pick(self.rng, [list(params), tuple(params), iter(params)])

    def new_pair(self):
        rng = self.rng
        own = good_options(rng, self.cls, self.kwargs["semantics"])
        groups, first = [], 0
        for _ in range(pick(rng, [1, 1, 2, 3])):
            n = pick(rng, [1, 2, 3])
            groups.append((*self.new_params(first, n), self.group_options(own)))
            first += n
        if len(groups) == 1 and chance(rng, 0.5):
            keys, params, _ = groups[0]
            groups = [(keys, params, {})]
            given = self.given(keys, params)
        else:
            given = [
                {"params": self.given(keys, params), **options} for keys, params, options in groups
            ]
        opt = self.cls(given, **own, **self.kwargs)
        return opt, self.new_model(own, groups, self.kwargs)

    def new_model(self, own, groups, kwargs):
        defaults = {**self.cls([np.zeros(1)]).param_groups[0], **copy.deepcopy(own)}
        del defaults["params"]
        model = Model(self.cls, kwargs, defaults)
        for keys, params, options in groups:
            model.add(options, keys, params)
        return model

    def group_options(self, own):
        """Return options of a group that go with the constructor's."""
        options = good_options(self.rng, self.cls, self.kwargs["semantics"])
        if self.cls is SGD and "momentum" in options and "momentum" not in own:
            return options
        return {k: v for k, v in options.items() if k not in ("momentum", "dampening", "nesterov")}

    def run(self):
        rng = self.rng
        for _ in range(OPERATIONS):
            self.number = int(rng.integers(len(self.pairs)))
            self.opt, self.model = self.pairs[self.number]
            sequences.choose(rng, self.CHOICES)(self)
            assert_as_modelled(self.opt, self.model)
        for opt, model in self.pairs:
            assert_as_modelled(opt, model)

    def refused(self, error, message, call):
        with pytest.raises(error, match=message):
            call()
        assert_as_modelled(self.opt, self.model)

    # ---- steps

    def structured(self, grads):
        if not self.named:
            return pick(self.rng, [list, tuple, iter])(grads)
        pairs = list(zip(self.model.keys, grads, strict=True))
        return dict(pairs[k] for k in self.rng.permutation(len(pairs)))

    def new_grads(self, none=0.1):
        return [
            None
            if chance(self.rng, none)
            else new_gradient(self.rng, param, wild=0.03, dtype=self.dtype_of_gradient(param))
            for param in self.model.params
        ]

    def dtype_of_gradient(self, param):
        """Return one whose values the parameter's arithmetic has all."""
        if self.dtypes == (F32, F64) or chance(self.rng, 0.5):
            return param.dtype
        return pick(self.rng, [F32, BF16, F16])

    def step(self):
        rng, model = self.rng, self.model
        grads = self.new_grads()
        zero_grad, loss_scale = chance(rng, 0.2), 1.0
        if chance(rng, 0.2):
            loss_scale = pick(rng, [8.0, 2, 0.3, 1024.0, np.float32(16), np.array(4.0)])
        if chance(rng, 0.1) and (given := [g for g in grads if g is not None and g.size]):
            bad = pick(rng, given)
            place = tuple(int(rng.integers(n)) for n in bad.shape)
            if model.kwargs.get("nonfinite", "propagate") != "propagate" or chance(rng, 0.1):
                bad[place] = pick(rng, [np.nan, np.inf, -np.inf])
        if not zero_grad:
            self.make_strange(grads)
        kept = [None if g is None else np.array(g, order="K") for g in grads]
        self.history.add("step", f"loss_scale={loss_scale!r} zero_grad={zero_grad}")
        model.take_over()
        bad, norm = model.foresee(kept, float(loss_scale))

        def call():
            given = self.structured(grads)
            return self.opt.step(given, loss_scale=loss_scale, zero_grad=zero_grad)

        zeroed = zero_grad
        if bad is not None and model.kwargs["nonfinite"] == "raise":
            self.history.note("raises")
            self.history.done["raising step"] += 1
            what = re.escape(f"gradient of parameter {model.keys[bad]!r} holds a NaN or an inf")
            self.refused(FloatingPointError, what, call)
            zeroed = False
        else:
            result = call()
            assert result.skipped == (bad is not None)
            assert (result.grad_norm is None) == (norm is None)
            np.testing.assert_equal(result.grad_norm, norm)
            if bad is None:
                model.step(kept, float(loss_scale))
            else:
                self.history.done["skipped step"] += 1
        for k, grad in enumerate(grads):
            if grad is not None and grad is not self.opt.params[k]:
                assert not grad.any() if zeroed else same_bits(grad, kept[k])

    def make_strange(self, grads):
        """Put gradients among others that nothing could be written into, or that are shared."""
        rng, params = self.rng, self.opt.params
        for k, param in enumerate(params):
            if grads[k] is None or chance(rng, 0.85):
                continue
            way = pick(rng, ["own", "scalar", "broadcast", "read-only", "shared"])
            if way == "own":
                grads[k] = param
            elif way == "scalar" and param.ndim == 0:
                grads[k] = grads[k][()]
            elif way == "broadcast":
                grads[k] = np.broadcast_to(param.dtype.type(0.5), param.shape)
            elif way == "read-only":
                grads[k] = grads[k].copy()
                grads[k].flags.writeable = False
            elif way == "shared" and grads[0] is not None and grads[0] is not params[0]:
                alike = grads[0].shape == param.shape and grads[0].dtype == param.dtype
                grads[k] = grads[0] if alike else grads[k]

    def bad_step(self):
        """Give gradients or arguments of which something is wrong."""
        rng, model = self.rng, self.model
        grads = [new_gradient(rng, param, wild=0) for param in model.params]
        k = int(rng.integers(len(grads)))
        options, good = {}, grads[k]
        kinds = [
            (good.astype(np.longdouble if good.dtype == np.float64 else np.float64), TypeError),
            (good.astype(np.int64), TypeError),
            (np.zeros((*good.shape, 2), good.dtype), ValueError),
            (np.zeros((3, *good.shape), good.dtype), ValueError),
            (np.ma.masked_array(good), TypeError),
            (object(), TypeError),
            ("gradient", TypeError),
        ]
        if good.dtype != BF16:  # which has one byte order
            kinds.append((good.astype(good.dtype.newbyteorder()), TypeError))
        if good.ndim and len(good) > 1 and good.size:
            kinds.append((self.opt.params[k][::-1], ValueError))
        if slots := self.slots(k):
            kinds.append((slots[0], ValueError))
        bad, error = pick(rng, kinds)
        grads[k] = bad
        message = re.escape(f"gradient of parameter {model.keys[k]!r}")
        if chance(rng, 0.3):
            grads[k] = good
            options, error, message = pick(
                rng,
                [
                    ({"loss_scale": 0.0}, ValueError, "loss_scale"),
                    ({"loss_scale": float("nan")}, ValueError, "loss_scale"),
                    ({"loss_scale": "1"}, TypeError, "loss_scale"),
                    ({"loss_scale": -8}, ValueError, "loss_scale"),
                    ({"zero_grad": 1}, TypeError, "zero_grad"),
                    ({"zero_grad": None}, TypeError, "zero_grad"),
                ],
            )
            given = self.structured(grads)
        elif chance(rng, 0.3):
            grads[k] = good
            given, error, message = self.wrong_structure(grads)
        else:
            given = self.structured(grads)
        self.history.add("bad step", f"{message} {options}")
        self.refused(error, message, lambda: self.opt.step(given, **options))

    def slots(self, k):
        """Return state that a gradient might be by its shape and dtype."""
        param = self.opt.params[k]
        return [
            array
            for array in self.opt.state[k].values()
            if array.size
            and array.shape == param.shape
            and array.dtype in ((F64,) if param.dtype == F64 else (F32, BF16, F16))
        ]

    def wrong_structure(self, grads):
        if not self.named:
            return pick(
                self.rng,
                [
                    (grads[1:], ValueError, "expected .* gradients"),
                    ([*grads, None], ValueError, "expected .* gradients"),
                    (dict(enumerate(grads)), TypeError, "grads must be a list or tuple"),
                    (None, TypeError, "grads must be a list or tuple"),
                ],
            )
        first, *rest = zip(self.model.keys, grads, strict=True)
        lacks = rf"missing keys \['{first[0]}'\], unexpected keys \["
        return pick(
            self.rng,
            [
                (grads, TypeError, "grads must be a dict"),
                (dict(rest), ValueError, lacks + r"\]"),
                (dict([first, *rest, ("other", None)]), ValueError, r"unexpected keys \['other'\]"),
                (dict([*rest, ("other", None)]), ValueError, lacks + r"'other'\]"),
            ],
        )

    # ---- hyperparameters and groups

    def change(self):
        number = int(self.rng.integers(len(self.model.options)))
        options = good_options(self.rng, self.cls, self.kwargs["semantics"])
        self.history.add("change", f"group {number}: {options}")
        self.opt.param_groups[number].update(options)
        self.model.options[number].update(copy.deepcopy(options))

    def change_in_place(self):
        """Write into a list or an array that a group holds."""
        number = int(self.rng.integers(len(self.model.options)))
        betas = self.opt.param_groups[number].get("betas")
        if isinstance(betas, (list, np.ndarray)):
            self.history.add("change in place", f"group {number}")
            betas[0] = 0.25
            self.model.options[number]["betas"] = list(betas)

    def replace_groups(self):
        """Replace the list or the dicts by equal ones."""
        self.history.add("equal groups")
        if chance(self.rng, 0.5):
            self.opt.param_groups = list(self.opt.param_groups)
        number = int(self.rng.integers(len(self.model.options)))
        group = self.opt.param_groups[number]
        self.opt.param_groups[number] = dict(reversed(group.items()))

    def whatever_refreshes(self):
        """Return, by name, calls that all have to look at the groups."""
        opt, rng = self.opt, self.rng
        new = {"params": self.given(*self.new_params(len(self.model.keys), 1))}
        grads = self.structured([new_gradient(rng, p) for p in self.model.params])
        return {
            "step": lambda: opt.step(grads),
            "state_dict": opt.state_dict,
            "deepcopy": lambda: copy.deepcopy(opt),
            "pickle": lambda: pickle.dumps(opt),
            "save": lambda: opt.save(self.new_file()),
            "add_param_group": lambda: opt.add_param_group(new),
            "reset": opt.reset,
        }

    def bad_change(self):
        """Give a group a bad value; all that looks at it is refused until it is mended."""
        rng, opt = self.rng, self.opt
        number = int(rng.integers(len(self.model.options)))
        group, message = opt.param_groups[number], re.escape(f"param_groups[{number}]: ")
        before = dict(group)
        name = pick(rng, [name for name in self.model.options[0] if name in BAD_HYPERS])
        way = pick(rng, ["value", "value", "value", "unknown", "missing"])
        if way == "value":
            group[name] = pick(rng, BAD_HYPERS[name])[0]
            message += name
        elif way == "unknown":
            group["other"] = 1
            message += r"unknown options \['other'\]"
        else:
            del group[name]
            message += rf"missing options \['{name}'\]"
        self.history.add("bad change", f"{message} {group.get(name)!r}")
        calls = self.whatever_refreshes()
        changed = dict(group)
        for what in rng.permutation(list(calls))[:3]:
            self.history.note(what)
            with pytest.raises((TypeError, ValueError), match=message):
                calls[what]()
            assert list(group) == list(changed)
            assert all(group[key] is changed[key] for key in changed)
        group.clear()
        group.update(before)

    def bad_groups(self):
        """Take groups to pieces; a step is refused until they are mended."""
        opt, rng = self.opt, self.rng
        groups, first = opt.param_groups, opt.param_groups[0]
        before, kept = list(groups), dict(first)
        way = pick(rng, ["append", "pop", "params", "type", "list"])
        self.history.add("bad groups", way)
        if way == "append":
            groups.append(dict(first))
        elif way == "pop":
            groups.pop()
        elif way == "params":
            first["params"] = list(first["params"])
        elif way == "type":
            groups[0] = tuple(first.items())
        else:
            opt.param_groups = tuple(groups)
        calls = self.whatever_refreshes()
        for what in rng.permutation(list(calls))[:2]:
            self.history.note(what)
            with pytest.raises(ValueError, match=r"param_groups.*; use add_param_group"):
                calls[what]()
        opt.param_groups = groups
        groups[:] = before
        first.clear()
        first.update(kept)

    def bad_rate(self):
        """Give a learning rate that fails when it is called."""
        rng, opt = self.rng, self.opt
        number = int(rng.integers(len(self.model.options)))
        value = pick(rng, [ZeroDivisionError("mine"), -1.0, float("nan"), None])
        self.history.add("bad rate", f"group {number}: {value!r}")
        own = opt.param_groups[number]["lr"]
        opt.param_groups[number]["lr"] = Failing(value)
        grads = self.structured([new_gradient(rng, p) for p in self.model.params])
        error = ZeroDivisionError if isinstance(value, Exception) else (TypeError, ValueError)
        message = "mine" if isinstance(value, Exception) else r"param_groups\[\d\]: lr\(\d+\) must"
        with pytest.raises(error, match=message):
            opt.step(grads)
        opt.state_dict()  # does not ask for it
        opt.param_groups[number]["lr"] = own

    def add_group(self):
        if len(self.model.keys) > 8:
            return
        n = pick(self.rng, [0, 1, 2])
        keys, params = self.new_params(len(self.model.keys), n)
        options = self.group_options(self.model.defaults)
        self.history.add("add group", f"{n} parameters, {options}")
        self.opt.add_param_group({"params": self.given(keys, params), **options})
        self.model.take_over()
        self.model.add(options, keys, params)

    def bad_group(self):
        """Try to add a group of which something is wrong."""
        rng, first = self.rng, self.model.keys[0]
        keys, (param,) = self.new_params(len(self.model.keys), 1)
        other = self.given([first], [self.opt.params[0]])
        group, error, message = pick(
            rng,
            [
                ({"params": self.given(keys, [param]), "lr": -1}, ValueError, "lr must be >= 0"),
                ({"params": self.given(keys, [param]), "what": 1}, ValueError, "unknown options"),
                ({"params": self.given(keys, [np.zeros(3, int)])}, TypeError, "dtype int64"),
                ({"params": self.given(keys, [np.zeros(9)[::2]])}, ValueError, "not dense"),
                ({"lr": 0.1}, ValueError, "has no 'params'"),
                ([], TypeError, "must be a dict"),
                ({"params": [param] if self.named else {"a": param}}, ValueError, "name their"),
                ({"params": other}, ValueError, "overlaps" if not self.named else "occur twice"),
            ],
        )
        if self.opt.params[0].size == 0 and not self.named and "overlaps" in message:
            return
        self.history.add("bad group", message)
        self.refused(error, message, lambda: self.opt.add_param_group(group))

    # ---- copies, state dicts and files

    def keep(self, opt, model):
        """Go on with a copy as well; forget another if there are many."""
        if len(self.pairs) < 3:
            self.pairs.append((opt, model))
        else:
            k = pick(self.rng, {0, 1, 2} - {self.number})
            assert_as_modelled(*self.pairs[k])
            self.pairs[k] = opt, model

    def make_copy(self):
        rng = self.rng
        how = pick(rng, ["deepcopy", "pickle", "with its parameters", "pickle with parameters"])
        if any(isinstance(lender, ctypes.Array) for lender in self.lenders(self.opt)):
            how = how.replace("pickle with", "with its").replace("pickle", "deepcopy")  # as Python
        self.history.add("copy", how)
        bundle = (self.lenders(self.opt), self.opt) if "with" in how else self.opt
        if "pickle" in how:
            bundle = pickle.loads(pickle.dumps(bundle, protocol=pick(rng, [2, 4, 5])))
        else:
            bundle = copy.deepcopy(bundle)
        new = bundle[1] if "with" in how else bundle
        if "with" in how:
            assert all(a is b for a, b in zip(bundle[0], self.lenders(new), strict=True))
        self.model.take_over()
        model = self.model.copied(new)
        assert_as_modelled(new, model)
        self.keep(new, model)

    def lenders(self, opt):
        """Return the parameters as they were given."""
        return [param for group in opt.param_groups for param in group["params"]]

    def move(self):
        """Let memory that is lent move, and check that the parameters are where it is."""
        movable = [x for x in self.lenders(self.opt) if isinstance(x, ctypes.Array)]
        for lender in movable:
            ctypes.resize(lender, 2 * ctypes.sizeof(lender))
        if movable:
            self.history.add("move", f"{len(movable)} parameters")
            if chance(self.rng, 0.5):
                self.step()
            for lender, param in zip(self.lenders(self.opt), self.opt.params, strict=True):
                if isinstance(lender, ctypes.Array):
                    assert param.ctypes.data == ctypes.addressof(lender)

    def shallow_copy(self):
        self.history.add("shallow copy")
        self.refused(TypeError, "use copy.deepcopy", lambda: copy.copy(self.opt))

    def take_snapshot(self):
        self.history.add("state dict")
        saved = self.opt.state_dict()
        self.model.take_over()
        assert_saved(saved, self.model)
        self.snapshots.append((saved, copy.deepcopy(self.model)))

    def load_snapshot(self):
        if not self.snapshots:
            return
        saved, model = pick(self.rng, self.snapshots)
        if self.model.fits(model):
            self.history.add("load state dict")
            self.opt.load_state_dict(saved)
            self.model.load(model)
            assert_saved(saved, model)
        elif self.cls is not SGD:  # of which there may be nothing that has a shape
            self.history.add("load state dict of other parameters")
            what = "state_dict"
            self.refused((ValueError, TypeError), what, lambda: self.opt.load_state_dict(saved))

    def load_bad_snapshot(self):
        """Spoil an entry of a state dict."""
        rng = self.rng
        saved = self.opt.state_dict()
        self.model.take_over()
        key = pick(rng, self.model.keys)
        state, group = saved["state"][key], pick(rng, saved["param_groups"])
        ways = {
            "rule": lambda: saved.update(rule="other"),
            "semantics": lambda: saved.update(semantics="tf"),
            "completed": lambda: saved.update(completed_steps=-1),
            "missing entry": lambda: saved.pop("state"),
            "unknown entry": lambda: saved.update(other=1),
            "step": lambda: state.update(step=1.5),
            "shape": lambda: state.update(exp_avg=np.zeros((1, 2, 3, 4))),
            "no step": lambda: state.pop("step"),
            "parameter": lambda: saved["state"].pop(key),
            "lr": lambda: group.update(lr=-0.5),
            "decay": lambda: group.update(weight_decay="x"),
            "option": lambda: group.update(other=2),
            "no option": lambda: group.pop("maximize"),
            "keys": lambda: group.update(params=[*group["params"], "other"]),
            "groups": lambda: saved.update(param_groups=saved["param_groups"][1:]),
            "averages": lambda: saved.update(
                ema={} if saved["ema"] is None or saved["ema"] else None
            ),
            "sums": lambda: saved.update(accumulated={"steps": 9, "sums": {}}),
        }
        way = pick(rng, ways)
        ways[way]()
        self.history.add("load bad state dict", way)
        what = "state_dict"
        self.refused((ValueError, TypeError), what, lambda: self.opt.load_state_dict(saved))

    def frozen(self):
        """Make an array read-only: what would write into it is refused, groups and all."""
        rng, opt, model = self.rng, self.opt, self.model
        k = int(rng.integers(len(model.params)))
        arrays = [*opt.state[k].values(), *([opt.ema[k]] if opt.ema else [])]
        masters = [array for name, array in opt.state[k].items() if name in MASTERS]
        if isinstance(self.lenders(opt)[k], np.ndarray):
            arrays.append(opt.params[k])
        target = pick(rng, arrays)
        try:
            target.flags.writeable = True
        except ValueError:  # an unpickled one may lie in bytes, and could not be mended
            return
        saved = [saved for saved, of in self.snapshots if model.fits(of)] or [opt.state_dict()]
        grads = self.structured([new_gradient(rng, p) for p in model.params])
        calls = {
            "step": lambda: opt.step(grads),
            "load": lambda: opt.load_state_dict(pick(rng, saved)),
            "reset": opt.reset,
        }
        if any(target is array for array in masters):
            del calls["reset"]  # which begins with the weights that there are
        what = pick(rng, calls)
        self.history.add("frozen", f"{what}, parameter {model.keys[k]!r}")
        target.flags.writeable = False
        try:
            self.refused(ValueError, rf"parameter {model.keys[k]!r}: .*read-only", calls[what])
        finally:
            target.flags.writeable = True

    def new_file(self):
        self.files += 1
        return self.folder / f"{self.files}.safetensors"

    def fresh_pair(self):
        """Return another optimizer like this, over other parameters, perhaps with steps behind."""
        rng, model = self.rng, self.model
        own = good_options(rng, self.cls, self.kwargs["semantics"])
        fixed = {k: v for k, v in model.kwargs.items() if k in ("semantics", "accumulate")}
        fixed |= {k: v for k, v in model.kwargs.items() if k in ("ema_decay", "no_decay", *STORAGE)}
        by_place = self.dtypes != (F32, F64)  # random bits depend on it, and on how elements lie
        kwargs = {**fixed, **self.other_kwargs()}
        groups = []
        for number in range(len(model.options)):
            those = [i for i, n in enumerate(model.group_of) if n == number]
            if self.named and not by_place:
                those = [those[k] for k in rng.permutation(len(those))]
            keys = [model.keys[i] for i in those]
            params = [
                new_parameter(rng, model.params[i].dtype, model.params[i].shape) for i in those
            ]
            if by_place:
                params = [
                    relaid(p, like=model.params[i]) for p, i in zip(params, those, strict=True)
                ]
            groups.append((keys, params, {}))
        given = [{"params": self.given(keys, params)} for keys, params, _ in groups]
        opt = self.cls(given, **own, **kwargs)
        new = self.new_model(own, groups, kwargs)
        for _ in range(pick(rng, [0, 0, 1, 2])):
            grads = [new_gradient(rng, p, wild=0) for p in new.params]
            opt.step(dict(zip(new.keys, grads, strict=True)) if self.named else grads)
            new.step(grads)
        assert_as_modelled(opt, new)
        return opt, new

    def go_on_elsewhere(self):
        """Load a state dict or a file into another optimizer, and go on with that one too."""
        opt, model = self.fresh_pair()
        how = pick(self.rng, ["state dict", "file"])
        self.history.add(f"go on from a {how}", f"{model.kwargs}")
        if how == "file":
            path = self.new_file()
            self.opt.save(path)
            opt.load(path)
        else:
            opt.load_state_dict(self.opt.state_dict())
        self.model.take_over()
        model.load(self.model, with_params=how == "file")
        assert_as_modelled(opt, model)
        self.keep(opt, model)

    def load_file(self):
        """Write a file and read it again after some steps."""
        path = self.new_file()
        self.history.add("save and load")
        self.opt.save(path)
        self.model.take_over()
        saved = copy.deepcopy(self.model)
        if chance(self.rng, 0.5):
            self.step()
            assert_as_modelled(self.opt, self.model)
        self.opt.load(path)
        self.model.load(saved, with_params=True)

    def reset(self):
        self.history.add("reset")
        self.opt.reset()
        self.model.reset()

    # ---- from outside

    def write(self):
        """Write into a parameter, a state array, a counter or an average."""
        rng, opt, model = self.rng, self.opt, self.model
        k = int(rng.integers(len(model.params)))
        kind = pick(rng, ["param", "state", "step", "ema"])
        self.history.add("write", f"{kind} of {model.keys[k]!r}")
        param = model.params[k]
        new = np.abs(values(rng, param.shape, param.dtype))
        if kind == "param":
            opt.params[k][...] = model.params[k][...] = new
        elif kind == "step":
            opt.state[k]["step"][...] += 3
            model.state[k]["step"] += 3
        elif kind == "ema" and model.ema is not None:
            opt.ema[k][...] = model.ema[k][...] = new
        elif names := sorted(opt.state[k].keys() & model.state[k].keys() - {"step"}):
            name = pick(rng, names)
            array = model.state[k][name]
            if name in NUMBERS:
                new = np.float64(0.25)
            if array.dtype.kind == "u":
                new = rng.integers(0, 2 ** (8 * array.itemsize), array.shape)
            opt.state[k][name][...] = array[...] = new

    def replace_state(self):
        self.history.add("replace state")
        state = pick(self.rng, self.opt.state)
        with pytest.raises(TypeError, match="write into them"):
            state["step"] = np.zeros((), np.int64)
        self.opt.state.clear()
        self.opt.params.clear()

    def threads(self):
        n = pick(self.rng, [1, 2, 3, 4])
        self.history.add("threads", str(n))
        fastopt.set_num_threads(n)

    def show(self):
        self.history.add("repr")
        assert repr(self.opt).startswith(f"{self.cls.__name__}(")

    CHOICES = (
        (step, 30),
        (bad_step, 6),
        (change, 10),
        (change_in_place, 6),
        (replace_groups, 2),
        (bad_change, 4),
        (bad_groups, 2),
        (bad_rate, 2),
        (add_group, 3),
        (bad_group, 2),
        (make_copy, 4),
        (move, 4),
        (shallow_copy, 1),
        (take_snapshot, 4),
        (load_snapshot, 4),
        (load_bad_snapshot, 3),
        (frozen, 2),
        (go_on_elsewhere, 4),
        (load_file, 2),
        (reset, 1),
        (write, 4),
        (replace_state, 1),
        (threads, 2),
        (show, 1),
    )


KINDS = [
    "fewer bits",
    "step",
    "raising step",
    "skipped step",
    "bad step",
    "change",
    "change in place",
    "equal groups",
    "bad change",
    "bad groups",
    "bad rate",
    "add group",
    "bad group",
    "copy",
    "move",
    "shallow copy",
    "state dict",
    "load state dict",
    "load state dict of other parameters",
    "load bad state dict",
    "frozen",
    "go on from a state dict",
    "go on from a file",
    "save and load",
    "reset",
    "write",
    "replace state",
    "threads",
    "repr",
]


run = sequences.runner(Sequence)


@pytest.mark.parametrize("seed", sequences.seeds(200))
def test_any_sequence_leaves_what_the_model_has(seed, tmp_path):
    run(seed, Counter(), tmp_path)


def test_the_sequences_reach_every_kind_of_operation(tmp_path):
    done = sequences.reached(run, 60, tmp_path)
    assert {kind for kind in KINDS if done[kind] < 2} == set(), done
