"""A whole optimizer made of the reference, to compare one of fastopt's with, bit for bit."""

import math

import numpy as np
from tables import BY_CLASS, KEEPS_FLOAT32, in_8_bits

from fastopt import _core, reference
from fastopt.reference import Stored

# ---- what is stored in fewer bits ----------------------------------------------------------------

MASTERS = {"master_bits": "bfloat16 with trailing bits", "master": "float16 with master"}
NUMBERS = {"mu_product": 1.0}  # slots that are one float64 number, and what it begins at


def arithmetic(array):
    """Return the dtype that rules compute in."""
    return np.dtype(np.float64 if array.dtype == np.float64 else np.float32)


def widened(array, like):
    """Return an array, or None, in the dtype that the rules of a parameter compute in."""
    return None if array is None else np.asarray(array).astype(arithmetic(like))


def in_memory(array, like):
    """Return an array with its axes in the order that those of another have in memory."""
    return array.transpose(sorted(range(like.ndim), key=lambda axis: -like.strides[axis]))


def patterns(array):
    return array.view(f"u{array.itemsize}")


def is_stored(param, state):
    """Tell whether anything of a parameter is stored in fewer bits."""
    slots = [array for name, array in state.items() if name not in ("step", *NUMBERS)]
    return any(array.dtype not in (np.float32, np.float64) for array in (param, *slots))


def stored(param, state, name):
    """Return a parameter (as "param") or a slot of it as reference.py takes it."""

    def flat(array):
        return np.array(in_memory(array, param), order="C").reshape(-1)

    if name == "param":
        for master, storage in MASTERS.items():
            if master in state:
                return Stored(storage, patterns(flat(param)), flat(state[master]))
        return Stored(param.dtype.name, patterns(flat(param)))
    if name in NUMBERS:
        return Stored("float64", state[name])
    if name in state:
        return Stored(state[name].dtype.name, patterns(flat(state[name])))
    return Stored(in_8_bits(name), flat(state[f"{name}_8bit"]), state[f"{name}_scale"].copy())


def put(param, state, name, new):
    """Write what `stored` returns into the arrays that it is of."""

    def write(array, codes):
        to = in_memory(array, param)
        to[...] = codes.view(array.dtype).reshape(to.shape)

    if name == "param":
        write(param, new.codes)
        for master in state.keys() & MASTERS:
            write(state[master], new.extra)
    elif name in NUMBERS:
        state[name][...] = new.codes
    elif name in state:
        write(state[name], new.codes)
    else:
        write(state[f"{name}_8bit"], new.codes)
        state[f"{name}_scale"][...] = new.extra


def new_slot(param, slot, value, state_dtype):
    """Return new arrays of a slot that begins at this value."""
    if slot in NUMBERS:
        return {slot: np.array(NUMBERS[slot])}
    kind = (
        arithmetic(param).name if slot in KEEPS_FLOAT32 else state_dtype or arithmetic(param).name
    )
    if kind != "8bit":
        return {slot: np.full_like(param, value, kind, order="K", subok=False)}
    new = Stored.of(in_8_bits(slot), np.full(param.size, value, np.float32))
    codes = np.empty_like(param, np.uint8, order="K", subok=False)
    state = {f"{slot}_8bit": codes, f"{slot}_scale": np.empty_like(new.extra)}
    put(param, state, slot, new)
    return state


def new_master(param, master_weights):
    """Return what is beside a new parameter."""
    if master_weights is False:
        return {}
    if param.dtype.name == "bfloat16":
        return {"master_bits": np.zeros_like(param, np.uint16, order="K", subok=False)}
    return {"master": param.astype(np.float32)} if param.dtype == np.float16 else {}


def slot_of(name):
    """Return the slot that an array in a state is of."""
    return name.removesuffix("_8bit").removesuffix("_scale")


def weights(param, state):
    """Return a parameter's values in what rules compute in: its master's, if it has one."""
    if param.dtype == arithmetic(param):
        return param
    values = np.empty_like(param, np.float32, order="K")
    to = in_memory(values, param)
    to[...] = stored(param, state, "param").values().reshape(to.shape)
    return values


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
                total
                if total is grad is None
                else reference.mean(total, widened(grad, param), 1, loss_scale)
                for total, grad, param in zip(self.totals, grads, self.params, strict=True)
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
        grads = [widened(grad, param) for grad, param in zip(grads, self.params, strict=True)]
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
            options = {
                "step": int(state["step"]),
                "semantics": semantics,
                "grad_scale": scales[i],
                "grad_limit": clip["clip_value"] or math.inf,
                **hypers,
            }
            if is_stored(param, state):
                self.update_stored(i, grad, row.used(hypers), options)
            else:
                row.reference(param, grad, state, **options)
        for average, param, state in zip(self.ema or (), self.params, self.state, strict=False):
            values, decay = weights(param, state), self.kwargs["ema_decay"]
            reference.average(average, values, decay, first=self.completed == 0)
        self.completed += 1

    def update_stored(self, i, grad, slots, options):
        """Update a parameter that is stored in fewer bits, or whose state is."""
        param, state = self.params[i], self.state[i]
        after = reference.stored_step(
            BY_CLASS[self.opt_class].reference,
            {name: stored(param, state, name) for name in ["param", *slots]},
            np.array(in_memory(grad, param), order="C").reshape(-1),
            seed=self.kwargs.get("seed", 0),
            index=i,
            stochastic=self.kwargs.get("stochastic_rounding") is not False,
            **options,
        )
        for name, new in after.items():
            put(param, state, name, new)


# ---- comparisons ---------------------------------------------------------------------------------


def run_everywhere(make, twin, gradients, teams, **step_options):
    """Step what `make` returns by each instruction set and team; each has to equal the twin."""
    for grads in gradients:
        twin.step(grads, **step_options)
    ran = 0
    for isa in _core.isa()["supported"]:
        _core.select_isa(isa)
        for layer, team in teams:
            _core.select_layer(layer)
            _core.force_threads(team)
            opt = make()
            used = {opt.step(grads, **step_options).threads for grads in gradients}
            assert used == {1 if layer == "serial" else team}
            assert_same_bits(opt, twin, f"{isa}, {layer}, {team} threads")
            ran += 1
    assert ran == len(_core.isa()["supported"]) * len(teams)


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
    if array.dtype.name == "bfloat16":  # of which there is one NaN, if steps have made it
        return patterns(np.ascontiguousarray(array))
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
