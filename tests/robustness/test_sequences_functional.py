"""Random calls of fastopt.functional over a few sets of arrays, beside the reference.

Calls of every rule, dialect and way to give arrays follow one another on the same arrays, so that
what is remembered of one call is met by others. One that is refused must write nothing.
"""

import inspect
from collections import Counter

import numpy as np
import pytest
import sequences
from oracle import NUMBERS, same_bits
from sequences import (
    DTYPES,
    History,
    chance,
    laid_out,
    new_gradient,
    new_parameter,
    pick,
    relaid,
    values,
)
from tables import BY_RULE, PAIRS

import fastopt

OPERATIONS = 30


def implied(row):
    """Return the slots that a function uses if they are given, and with what in the class."""
    known = inspect.signature(row.function).parameters
    return {s: name for s, switch in row.switches() for name in switch if name not in known}


class Model:
    """A list of parameters with every state array that a rule may have, and copies of all."""

    def __init__(self, rng, row):
        self.row, n = row, pick(rng, [1, 1, 2, 3])
        self.params = [new_parameter(rng, pick(rng, DTYPES)) for _ in range(n)]
        self.state = {name: [self.start(rng, name, p) for p in self.params] for name in row.slots}
        self.grads = [new_gradient(rng, p) for p in self.params]

    def start(self, rng, name, param):
        if name in NUMBERS:
            return np.array(pick(rng, [1.0, 0.25]))
        new = np.zeros_like(param)
        if chance(rng, 0.3):
            new[...] = np.abs(values(rng, param.shape, param.dtype, wild=0))
        return new

    def arrays(self):
        return [*self.params, *self.grads, *(a for own in self.state.values() for a in own)]


class Call:
    """A call with random options, and what it comes to."""

    def __init__(self, rng, model):
        self.rng, self.model, self.row = rng, model, model.row
        self.known = inspect.signature(self.row.function).parameters
        self.counts = [2 if self.row.begins else 1] * len(model.params)
        self.keras = chance(rng, 0.4)
        drawn = self.row.draw(rng, "keras" if self.keras else "torch")
        if "eps" in self.row.hypers and chance(rng, 0.3):
            drawn["eps"] = pick(rng, [1e-3, 0.1])
        if drawn.get("bias_correction") is False and chance(rng, 0.3):
            drawn["betas"] = (0.5, 1)  # which only a function takes
        self.used = self.row.used({**self.row.defaults, **drawn})
        self.options = {name: value for name, value in drawn.items() if name in self.known}
        negative = [-0.5] if self.row.ascends else []
        self.options["lr"] = pick(rng, [0.1, 1e-3, 0, *negative, np.float32(0.25), 1])
        if "step" in self.known:
            self.number(self.row.needs_step(self.options))
        if self.keras and self.row.dialect:
            self.options[self.row.dialect] = pick(rng, [True, np.True_])
        if chance(rng, 0.3):
            self.options["weight_decay"] = pick(rng, [0, 0.1])
            self.options["decoupled_weight_decay"] = chance(rng, 0.5)
        if chance(rng, 0.2):
            self.options["maximize"] = pick(rng, [False, True])
        self.zero_grad = chance(rng, 0.15)
        if self.zero_grad:
            self.options["zero_grad"] = True
        if chance(rng, 0.2):
            self.options["num_threads"] = pick(rng, [1, 2, 3])
        self.grads = [None if chance(rng, 0.1) else g for g in model.grads]
        if not self.zero_grad and chance(rng, 0.05):
            k = int(rng.integers(len(self.grads)))
            self.grads[k] = model.params[k]
        self.single = len(model.params) == 1 and chance(rng, 0.6)

    def number(self, required):
        """Give the number of the step, of all parameters or of each."""
        rng, n = self.rng, len(self.counts)
        if not required and chance(rng, 0.5):
            return
        if n > 1 and chance(rng, 0.3):
            self.counts = [int(rng.integers(1, 5)) for _ in range(n)]
            self.options["step"] = pick(rng, [list, tuple])(self.counts)
        else:
            number = int(pick(rng, [1, 1, 2, 3, 100, 2**40]))
            self.counts = [number] * n
            self.options["step"] = pick(rng, [number, np.int64(number)])

    def expected(self):
        """Return parameters and used state as they are to be afterwards."""
        options = {
            name: value
            for name, value in self.options.items()
            if name not in ("step", "zero_grad", "num_threads", self.row.dialect)
        }
        for name in PAIRS.keys() & options.keys():
            options[name] = tuple(map(float, options[name]))
        options |= {name: slot in self.used for slot, name in implied(self.row).items()}
        options = {k: float(v) if isinstance(v, np.floating) else v for k, v in options.items()}
        params = [p.copy(order="K") for p in self.model.params]
        state = {n: [a.copy(order="K") for a in self.model.state[n]] for n in self.used}
        for i, (param, grad) in enumerate(zip(params, self.grads, strict=True)):
            if grad is not None:
                self.row.reference(
                    param,
                    grad.copy(),
                    {name: arrays[i] for name, arrays in state.items()},
                    step=self.counts[i],
                    semantics="keras" if self.keras else "torch",
                    **options,
                )
        return params, state

    def wrap(self, arrays):
        if self.single:
            return arrays[0]
        return pick(self.rng, [list, tuple])(arrays)

    def arguments(self):
        """Return positional arguments; state that is not used may be given all the same."""
        state = []
        for name in self.row.slots:
            optional = name not in implied(self.row) and chance(self.rng, 0.5)
            given = name in self.used or optional
            state.append(self.wrap(self.model.state[name]) if given else None)
        return [self.wrap(self.model.params), self.wrap(self.grads), *state]

    def __call__(self, *arguments, **options):
        assert self.row.function(*arguments, **self.options, **options) is None


class Sequence:
    def __init__(self, seed, done):
        self.rng = np.random.default_rng([seed, 3])
        self.history = History(done)
        self.models = [
            Model(self.rng, pick(self.rng, BY_RULE.values()))
            for _ in range(pick(self.rng, [1, 2, 3]))
        ]

    def run(self):
        for _ in range(OPERATIONS):
            self.model = pick(self.rng, self.models)
            if chance(self.rng, 0.6):
                self.new_grads()
            sequences.choose(self.rng, self.CHOICES)(self)

    def new_grads(self):
        """Write new gradients into the old arrays, or take new arrays."""
        for k, (param, grad) in enumerate(zip(self.model.params, self.model.grads, strict=True)):
            if grad.flags.writeable and chance(self.rng, 0.5):
                grad[...] = values(self.rng, param.shape, param.dtype)
            else:
                self.model.grads[k] = new_gradient(self.rng, param)

    def told(self, kind, call, more=""):
        grads = [
            "None" if g is None else "own" if any(g is p for p in call.model.params) else "g"
            for g in call.grads
        ]
        self.history.add(kind, f"{call.row.rule} {call.used} {call.options} {grads} {more}")

    def in_place(self):
        call = Call(self.rng, self.model)
        self.told("in place", call)
        before = [None if g is None else g.copy() for g in call.grads]
        params, state = call.expected()
        left = {n: [a.copy() for a in own] for n, own in self.model.state.items()}
        call(*call.arguments())
        self.compare(self.model.params, params)
        for name, own in self.model.state.items():
            self.compare(own, state.get(name, left[name]))
        self.compare_grads(call, before)

    def compare(self, found, expected):
        for k, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert same_bits(a, b), k

    def compare_grads(self, call, before):
        for grad, kept, param in zip(call.grads, before, self.model.params, strict=True):
            if call.zero_grad and grad is not None:
                assert not grad.any()
            elif grad is not None and grad is not param:
                assert same_bits(grad, kept)

    def elsewhere(self):
        """Write to other arrays; some of them may be those that are given."""
        rng, model = self.rng, self.model
        call = Call(rng, model)
        call.grads = [
            None if g is None else g.copy() if any(g is p for p in model.params) else g
            for g in call.grads
        ]
        place = chance(rng, 0.2)
        self.told("elsewhere", call, f"in place: {place}")
        before = [None if g is None else g.copy() for g in call.grads]
        params, state = call.expected()
        given = [model.params, *(model.state[name] for name in call.used)]
        left = [[a.copy() for a in arrays] for arrays in given]
        targets = [
            own if place and k == 0 else [np.full_like(a, 7) for a in own]
            for k, own in enumerate(given)
        ]
        arguments = call.arguments()
        readonly = [a for arrays in given for a in arrays if not (place and arrays is given[0])]
        for array in readonly:
            array.flags.writeable = False
        call(*arguments, out=tuple(map(call.wrap, targets)))
        for array in readonly:
            array.flags.writeable = True
        self.compare(targets[0], params)
        for name, arrays in zip(call.used, targets[1:], strict=True):
            self.compare(arrays, state[name])
        for k, (own, kept) in enumerate(zip(given, left, strict=True)):
            if not (place and k == 0):
                self.compare(own, kept)
        self.compare_grads(call, before)
        if chance(rng, 0.5):  # and go on from there
            model.params = targets[0]
            for name, arrays in zip(call.used, targets[1:], strict=True):
                model.state[name] = arrays

    def move(self):
        """Lay all arrays of a model out anew."""
        self.history.add("move")
        model = self.model
        model.params = [laid_out(self.rng, p) for p in model.params]
        model.state = {
            n: [
                a.copy() if n in NUMBERS else relaid(a, p)
                for a, p in zip(own, model.params, strict=True)
            ]
            for n, own in model.state.items()
        }

    def threads(self):
        self.history.add("threads")
        fastopt.set_num_threads(pick(self.rng, [1, 2, 3]))

    # ---- calls that are refused

    def refused(self):
        rng, model = self.rng, self.model
        call = Call(rng, model)
        call.zero_grad = False
        call.options.pop("zero_grad", None)
        call.grads = list(model.grads)
        k, call.single = int(rng.integers(len(model.params))), False
        arguments = [list(model.params), call.grads]
        arguments += [list(model.state[n]) if n in call.used else None for n in call.row.slots]
        used = [i for i, a in enumerate(arguments) if i > 1 and a is not None]
        kind = pick(rng, ["params", "grads", "state", "option", "lists", "shared"])
        if kind == "state" and not used:
            kind = "grads"
        getattr(self, f"spoil_{kind}")(call, arguments, k, used)
        arrays = model.arrays()
        before = [a.tobytes() for a in arrays]
        self.told("refused", call, self.what)
        with pytest.raises((TypeError, ValueError), match=self.message):
            call(*arguments)
        assert [a.tobytes() for a in arrays] == before

    def spoil_params(self, call, arguments, k, used):
        param = self.model.params[k]
        frozen = param.copy(order="K")
        frozen.flags.writeable = False
        self.what, bad, self.message = pick(
            self.rng,
            [
                ("dtype", np.zeros(3, int), "dtype int64"),
                ("gaps", np.zeros(8, param.dtype)[::2], "not dense"),
                ("frozen", frozen, "read-only"),
                ("masked", np.ma.masked_array(param), "masked"),
                ("list", [1.0], "expected a numpy.ndarray"),
                ("None", None, "expected a numpy.ndarray"),
                ("order", param.astype(param.dtype.newbyteorder()), "native byte order"),
            ],
        )
        arguments[0][k] = bad

    def spoil_grads(self, call, arguments, k, used):
        grad = self.model.grads[k]
        other = np.int64 if grad.dtype == np.float64 else np.float64
        self.what, bad, self.message = pick(
            self.rng,
            [
                ("dtype", np.zeros(grad.shape, other), "dtype"),
                ("shape", np.zeros((*grad.shape, 2), grad.dtype), "shape"),
                ("masked", np.ma.masked_array(grad), "masked"),
                ("number", 1j, "expected a numpy.ndarray"),
                ("order", grad.astype(grad.dtype.newbyteorder()), "native byte order"),
            ],
        )
        arguments[1][k] = bad

    def spoil_state(self, call, arguments, k, used):
        at = pick(self.rng, used)
        array = arguments[at][k]
        frozen = array.copy(order="K")
        frozen.flags.writeable = False
        other = np.float32 if array.dtype == np.float64 else np.float64
        ways = [
            ("state dtype", np.zeros_like(array, other), "dtype"),
            ("state shape", np.zeros((*array.shape, 2), array.dtype), "shape"),
            ("state frozen", frozen, "read-only"),
            ("state None", None, "expected a numpy.ndarray"),
            ("state list", None, "is required"),
        ]
        if array.size and not (array.flags.c_contiguous and array.flags.f_contiguous):
            order = "F" if array.flags.c_contiguous else "C"
            ways.append(("state order", np.array(array, order=order), "memory order"))
        self.what, bad, self.message = pick(self.rng, ways)
        arguments[at][k] = bad
        if self.what == "state list":
            is_implied = list(call.row.slots)[at - 2] in implied(call.row)
            arguments[at] = "text" if is_implied else None
            self.message = "must be a list or tuple" if is_implied else self.message

    def spoil_option(self, call, arguments, k, used):
        nan = float("nan")
        ways = [
            ("lr", nan, "lr must be a number" if call.row.ascends else "lr must be >= 0"),
            ("lr", "0.1", "lr must be a real number"),
            ("lr", None, "lr must be a real number"),
            ("weight_decay", -1.0, "weight_decay must be >= 0"),
            ("decoupled_weight_decay", 1, "decoupled_weight_decay must be True or False"),
            ("maximize", None, "maximize must be True or False"),
            ("zero_grad", 1, "zero_grad must be True or False"),
            ("num_threads", 0, "num_threads must be between"),
            ("out", (), "out must be a tuple"),
            ("out", [0] * 5, "out must be a tuple"),
        ]
        if call.row.dialect is not None:
            ways.append((call.row.dialect, "yes", "must be True or False"))
        if "step" in call.known:
            ways += [
                ("step", 0, "step must be >= 1"),
                ("step", 1.0, "step must be an integer"),
                ("step", True, "step must be an integer"),
                ("step", [1] * (len(arguments[0]) + 1), "step"),
            ]
        needs_step = call.row.needs_step(call.options)
        if needs_step:
            ways.append(("step", None, "step"))
        for option in PAIRS.keys() & call.known.keys():
            ways.append((option, (0.9,), "two elements"))
            ways.append((option, (-1, 0.5), f"{next(iter(PAIRS[option]))} must be >=? 0"))
        if "betas" in call.known and needs_step:
            ways.append(("betas", (0.9, 1.0), "beta.* must be .*< 1"))
        if call.row.dialect:
            ways.append((call.row.dialect, "yes", "must be True or False"))
        if "momentum" in call.known:
            ways.append(("momentum", -0.5, "momentum"))
        name, value, self.message = pick(self.rng, ways)
        self.what = f"{name}={value!r}"
        call.options[name] = value

    def spoil_lists(self, call, arguments, k, used):
        at = pick(self.rng, [1, *used])
        bad, self.message = pick(
            self.rng,
            [
                (arguments[at][1:], r"expected \d arrays, got \d"),
                ([*arguments[at], arguments[at][0]], r"expected \d arrays, got \d"),
                (iter(arguments[at]), "must be a list or tuple"),
                (dict(enumerate(arguments[at])), "must be a list or tuple"),
            ],
        )
        self.what = f"list {at}"
        arguments[at] = bad

    def spoil_shared(self, call, arguments, k, used):
        """Put an array in another's place; what is empty shares nothing."""
        param = self.model.params[k]
        self.message = "overlap|share memory"
        twice = [*arguments[0], param]
        if param.size == 0:
            return self.spoil_grads(call, arguments, k, used)
        if used and chance(self.rng, 0.4):
            at = pick(self.rng, used)
            self.what = f"parameter as state {at}"
            arguments[at][k] = param
            if list(call.row.slots)[at - 2] in NUMBERS:
                self.message = "where one number is to be|overlap|share memory"
        elif used and chance(self.rng, 0.5):
            self.what = "state as gradient"
            arguments[1][k] = arguments[used[0]][k]
        elif chance(self.rng, 0.5):
            self.what = "parameter as gradient, to be zeroed or written as another"
            arguments[1][k] = param
            call(*arguments)  # is right, and must not be taken for the next one
            if chance(self.rng, 0.5):
                call.options["zero_grad"] = True
            else:
                call.options["out"] = arguments[0], *(arguments[at] for at in used)
        else:
            self.what = "parameter twice"
            arguments[0] = twice
            arguments[1] = [*arguments[1], None]
            for at in used:
                is_number = list(call.row.slots)[at - 2] in NUMBERS
                arguments[at] = [*arguments[at], np.ones(()) if is_number else np.zeros_like(param)]
            if isinstance(call.options.get("step"), (list, tuple)):
                call.options["step"] = [1] * len(twice)
        return None

    CHOICES = ((in_place, 10), (elsewhere, 4), (refused, 6), (move, 1), (threads, 1))


KINDS = [
    "in place",
    "elsewhere",
    "refused",
    "move",
    "threads",
]


run = sequences.runner(Sequence)


@pytest.mark.parametrize("seed", sequences.seeds(300))
def test_any_calls_have_the_bits_of_the_reference_and_refused_ones_write_nothing(seed):
    run(seed, Counter())


def test_the_sequences_reach_every_kind_of_call():
    done = sequences.reached(run, 20)
    assert {kind for kind in KINDS if done[kind] < 10} == set(), done
