"""Every rule, once: whatever the tests have to be told about a rule stands in its row here.

A row is of a class, in the order of the rules in the C core; AdamW, whose rule is Adam's, has one
of its own. All tests go through ROWS, so a new rule is one more row, and no other file of the tests
changes. Ranges and defaults are spelled out: it is here that the product's are compared with what
they are to be.
"""

import inspect
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from sequences import chance, pick

import fastopt
from fastopt import functional, reference

NAN = float("nan")
L = np.longdouble

# Ranges of hyperparameters, with both ends in them; a NaN as the end says that it is a switch.
NUMBER, AT_LEAST_0, SWITCH = (-math.inf, math.inf), (0.0, math.inf), (0.0, NAN)
BELOW_1, UP_TO_1 = (0.0, math.nextafter(1.0, 0.0)), (0.0, 1.0)
BETAS = "two of them, each from 0 to below 1"
ETAS = "two of them, between 0 and 1, and above 1"
STEP_SIZES = "two of them, at least 0, the larger one last"

# Options that are pairs: the hyperparameters of the rule that each is, with their ranges.
PAIRS = {
    "betas": {"beta1": BELOW_1, "beta2": BELOW_1},
    "etas": {
        "etaminus": (sys.float_info.min, math.nextafter(1.0, 0.0)),
        "etaplus": (math.nextafter(1.0, 2.0), math.inf),
    },
    "step_sizes": {"step_size_min": AT_LEAST_0, "step_size_max": AT_LEAST_0},
}

# State of which no value is negative, and state that keeps float32 where other state is stored in
# fewer bits.
NEVER_NEGATIVE = {"exp_avg_sq", "square_avg", "sum", "acc_delta"}
KEEPS_FLOAT32 = {"max_exp_avg_sq", "exp_inf", "grad_avg", "step_size"}


def in_8_bits(slot):
    """Return how a slot is stored where state is in 8 bits."""
    if slot in KEEPS_FLOAT32:
        return "float32"
    return "8-bit unsigned" if slot in NEVER_NEGATIVE else "8-bit signed"


# What every class takes by keyword alone.
COMMON = {
    "semantics": "torch",
    "maximize": False,
    "decoupled_weight_decay": False,
    "clip_value": None,
    "clip_norm": None,
    "global_clip_norm": None,
    "nonfinite": "propagate",
    "ema_decay": None,
    "accumulate": 1,
    "no_decay": None,
    "master_weights": None,
    "state_dtype": None,
    "stochastic_rounding": None,
    "seed": 0,
    "rows": "lazy",
    "num_threads": None,
}


class Row(NamedTuple):
    """What the tests know of a class."""

    cls: type
    # The class's arguments after `params`, in their order, with default and range; and those of its
    # own by keyword alone, or with a default of its own.
    hypers: dict
    keywords: dict
    # State in the C core's order: each with the hyperparameters that a step uses it for, as a
    # group may be given them, or without any if a step always does.
    slots: dict
    # Options that together reach all of the rule; the bitwise tests cross them with options that
    # all rules have.
    variants: list
    # Configurations for the tests of errors, state and files, by name: options, and how parameters
    # are given.
    configs: dict
    # Arguments of a group, drawn by a random sequence, for the semantics "torch" or "keras".
    draw: Callable
    # The function's argument that chooses Keras's formula, None if that is the same or missing;
    # and whether it needs the step's number for these options.
    dialect: str | None
    needs_step: Callable
    # The update of torch.optim's documentation in 80-bit arithmetic: from options, gradient, step's
    # number and state (zeros at first) to what is subtracted from the parameter; and the options
    # for which errors are compared with torch's. None if torch has no such class.
    exact: Callable | None
    accuracy: list
    # Recorded trajectories of PyTorch and of Keras; how many scaled ulps the former may be away,
    # and for which options an update is ill-conditioned; and Keras's defaults and names of state.
    golden: tuple
    ulps: int
    is_ill: Callable
    keras_defaults: dict
    keras_slots: dict
    # Options for fastopt.torch and fastopt.keras, and for the random sequences of the former; None
    # if there is no such class. And how many tests of its own Keras has.
    torch: list | None
    torch_choices: dict | None
    torch_tests: int  # cases that test_torch_database.py has of it
    keras: list | None
    keras_tests: int
    # State that the first step has to know of: torch's momentum begins as a copy of the gradient.
    begins: tuple = ()
    # State that begins at a hyperparameter.
    starts: dict = {}  # noqa: RUF012
    # Hyperparameters that Keras keeps as float32, besides those of all its classes.
    keras_rounds: tuple = ()
    # Whether PyTorch takes hyperparameters that are tensors with axes.
    torch_takes_axes: bool = True
    # Where a bias is corrected: by the powers of which of the betas, and how wrong Keras's
    # correction in float32 may be, relatively.
    correction: tuple | None = None
    # State with one value a row, which a group with these hyperparameters has instead of all other:
    # it has tests of its own, in test_rowwise.py.
    by_row: dict = {}  # noqa: RUF012
    state_ulps: int = 8  # how many scaled ulps recorded state may be away
    ascends: bool = True  # whether its function takes a negative rate, which ascends
    old_files: bool = True  # whether an early fastopt has written files of it, in tests/data
    other_name: str = ""  # Keras's, if it is another than PyTorch's

    @property
    def name(self):
        return self.cls.__name__

    @property
    def keras_name(self):
        return self.other_name or self.name

    @property
    def rule(self):
        return self.cls._rule.name

    @property
    def function(self):
        return getattr(functional, self.rule)

    @property
    def reference(self):
        return getattr(reference, self.rule)

    @property
    def defaults(self):
        """Defaults of all that a group may have."""
        every = {**self.hypers, **self.keywords}
        own = {name: default for name, (default, _) in every.items()}
        return {"maximize": False, "decoupled_weight_decay": False, **own}

    @property
    def ranges(self):
        """Ranges of all that a group may have."""
        every = {**self.hypers, **self.keywords}
        own = {name: limits for name, (_, limits) in every.items()}
        return {"maximize": SWITCH, "decoupled_weight_decay": SWITCH, **own}

    def formula(self, group):
        """Return those of a group's hyperparameters that the reference takes."""
        return {k: group[k] for k in self.defaults if k not in self.starts.values()}

    def used(self, group):
        """Return the slots that a step with these hyperparameters touches."""
        return [s for s, switch in self.slots.items() if all(bool(group[k]) for k in switch)]

    def switches(self):
        """Return pairs of a slot and what switches it on."""
        return [(slot, switch) for slot, switch in self.slots.items() if switch]


def never(options):
    return False


# ---- SGD -----------------------------------------------------------------------------------------


def draw_sgd(rng, semantics):
    momentum = pick(rng, [0, 0, 0.0, 0.9, 0.5, np.float32(0.3), 1.25])
    nesterov = chance(rng, 0.3) and (momentum != 0 or semantics == "keras")
    dampening = 0 if nesterov else pick(rng, [0, 0.0, 0.3, -1, 1])
    return {"momentum": momentum, "nesterov": nesterov, "dampening": dampening}


def exact_sgd(o, g, t, s):
    mu = o.get("momentum", L(0))
    s.b = g if t == 1 else mu * s.b + (1 - o.get("dampening", L(0))) * g
    return o["lr"] * (g + mu * s.b if o.get("nesterov") else s.b)


SGD = Row(
    fastopt.SGD,
    hypers={
        "lr": (1e-3, AT_LEAST_0),
        "momentum": (0.0, AT_LEAST_0),
        "dampening": (0.0, NUMBER),
        "weight_decay": (0.0, AT_LEAST_0),
        "nesterov": (False, SWITCH),
    },
    keywords={},
    slots={"momentum_buffer": {"momentum": 0.9}},
    begins=("momentum_buffer",),
    variants=[
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
    ],
    configs={
        "sgd": ({"lr": 0.1, "momentum": 0.9, "dampening": 0.1}, "list"),
        "sgd-keras": (
            {"momentum": 0.9, "nesterov": True, "semantics": "keras", "ema_decay": 0.5},
            "dict",
        ),
    },
    draw=draw_sgd,
    dialect="velocity",
    needs_step=never,
    exact=exact_sgd,
    accuracy=[
        *({"lr": lr} for lr in (0.1, 0.03)),
        *({"lr": lr, "momentum": mu} for lr in (0.1, 0.03) for mu in (0.8, 0.85, 0.9, 0.95)),
        {"lr": 0.05, "momentum": 0.8, "dampening": 0.1},
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ],
    golden=(26, 28),
    ulps=8,
    is_ill=never,
    keras_defaults={"lr": 0.01},
    keras_slots={"momentum": "momentum_buffer"},
    keras_rounds=("momentum",),
    torch=[
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    ],
    torch_choices={"momentum": (0.0, 0.9), "dampening": (0.0, 0.5), "nesterov": (False, True)},
    torch_tests=1108,
    keras=[{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
    keras_tests=7,
)

# ---- Adagrad -------------------------------------------------------------------------------------


def draw_adagrad(rng, semantics):
    return {
        "lr_decay": pick(rng, [0, 0.1]),
        "initial_accumulator_value": pick(rng, [0, 0.1, 2]),
    }


def exact_adagrad(o, g, t, s):
    s.v = s.v + g * g
    return o["lr"] / (1 + (t - 1) * o.get("lr_decay", L(0))) * g / (np.sqrt(s.v) + L(1e-10))


ADAGRAD = Row(
    fastopt.Adagrad,
    hypers={
        "lr": (1e-2, AT_LEAST_0),
        "lr_decay": (0.0, AT_LEAST_0),
        "weight_decay": (0.0, AT_LEAST_0),
        "initial_accumulator_value": (0.0, AT_LEAST_0),
        "eps": (1e-10, AT_LEAST_0),
    },
    keywords={"rowwise": (False, SWITCH)},
    slots={"sum": {}},
    by_row={"row_sum": {"rowwise": True}},
    starts={"sum": "initial_accumulator_value"},
    variants=[{}, {"lr_decay": 0.1, "initial_accumulator_value": 0.1, "eps": 1e-3}],
    configs={"adagrad": ({"initial_accumulator_value": 0.1, "clip_value": 0.5}, "groups")},
    draw=draw_adagrad,
    dialect="eps_inside",
    needs_step=lambda options: options.get("lr_decay", 0) != 0,
    exact=exact_adagrad,
    accuracy=[{"lr": 0.1}, {"lr": 0.03}, {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.01}],
    golden=(12, 8),
    ulps=12,
    is_ill=never,
    keras_defaults={"lr": 0.001, "initial_accumulator_value": 0.1, "eps": 1e-7},
    keras_slots={"accumulator": "sum"},
    torch=[{"lr": 0.1}, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5}],
    torch_choices={"lr_decay": (0.0, 0.1), "eps": (1e-10, 1e-3)},
    torch_tests=860,
    keras=[{"initial_accumulator_value": 0.2}],
    keras_tests=6,
)

# ---- RMSprop -------------------------------------------------------------------------------------


def draw_rmsprop(rng, semantics):
    return {
        "momentum": pick(rng, [0, 0.0, 0.9, 0.5]),
        "centered": pick(rng, [False, True]),
        "alpha": pick(rng, [0.9, 0.99, 0, 0.5]),
    }


def exact_rmsprop(o, g, t, s):
    alpha = L(0.99)
    s.v = alpha * s.v + (1 - alpha) * g * g
    s.a = alpha * s.a + (1 - alpha) * g if o.get("centered") else s.a
    root = np.sqrt(np.maximum(s.v - s.a * s.a, 0)) + L(1e-8)
    s.b = o.get("momentum", L(0)) * s.b + g / root
    return o["lr"] * s.b


RMSPROP = Row(
    fastopt.RMSprop,
    hypers={
        "lr": (1e-2, AT_LEAST_0),
        "alpha": (0.99, AT_LEAST_0),
        "eps": (1e-8, AT_LEAST_0),
        "weight_decay": (0.0, AT_LEAST_0),
        "momentum": (0.0, AT_LEAST_0),
        "centered": (False, SWITCH),
    },
    keywords={},
    slots={
        "square_avg": {},
        "momentum_buffer": {"momentum": 0.9},
        "grad_avg": {"centered": True},
    },
    variants=[
        {},
        {"momentum": 0.9, "eps": 1e-3},
        {"centered": True, "alpha": 0.9},
        {"centered": True, "momentum": 0.5, "alpha": 0.4},
    ],
    configs={"rmsprop": ({"momentum": 0.5, "centered": True, "clip_norm": 1.0}, "dict")},
    draw=draw_rmsprop,
    dialect="eps_inside",
    needs_step=never,
    exact=exact_rmsprop,
    accuracy=[
        {"lr": 0.01},
        {"lr": 0.03},
        {"lr": 0.01, "momentum": 0.8},
        {"lr": 0.01, "momentum": 0.9},
        {"lr": 0.01, "centered": True},
        {"lr": 0.01, "centered": True, "momentum": 0.9, "weight_decay": 0.01},
    ],
    golden=(16, 12),
    ulps=16,
    is_ill=lambda options: options.get("centered"),  # the variance is a difference
    keras_defaults={"lr": 0.001, "alpha": 0.9, "eps": 1e-7},
    keras_slots={
        "velocity": "square_avg",
        "momentum": "momentum_buffer",
        "average_gradient": "grad_avg",
    },
    torch=[
        {"lr": 0.01},
        {"lr": 0.01, "centered": True, "momentum": 0.9, "weight_decay": 0.01},
    ],
    torch_choices={
        "alpha": (0.9, 0.5),
        "momentum": (0.0, 0.9),
        "centered": (False, True),
        "eps": (1e-3, 0.1),
    },
    torch_tests=723,
    keras=[{}, {"momentum": 0.5, "centered": True, "epsilon": 1e-4}],
    keras_tests=6,
)

# ---- Adam and AdamW ------------------------------------------------------------------------------


def draw_adam(rng, semantics):
    return {
        "amsgrad": pick(rng, [False, True]),
        "bias_correction": pick(rng, [True, True, False]),
        "betas": pick(
            rng, [(0.9, 0.999), [0.5, 0.75], (0, 0.4), np.array([0.8, 0.9]), [0.9, 0.99]]
        ),
    }


def exact_adam(o, g, t, s):
    beta1, beta2 = (L(beta) for beta in o.get("betas", (0.9, 0.999)))
    s.m = beta1 * s.m + (1 - beta1) * g
    s.v = beta2 * s.v + (1 - beta2) * g * g
    s.largest = np.maximum(s.largest, s.v)
    vhat = (s.largest if o.get("amsgrad") else s.v) / (1 - beta2**t)
    return o["lr"] * (s.m / (1 - beta1**t)) / (np.sqrt(vhat) + L(1e-8))


ADAM = Row(
    fastopt.Adam,
    hypers={
        "lr": (1e-3, AT_LEAST_0),
        "betas": ((0.9, 0.999), BETAS),
        "eps": (1e-8, AT_LEAST_0),
        "weight_decay": (0.0, AT_LEAST_0),
        "amsgrad": (False, SWITCH),
    },
    keywords={"bias_correction": (True, SWITCH)},
    slots={"exp_avg": {}, "exp_avg_sq": {}, "max_exp_avg_sq": {"amsgrad": True}},
    variants=[{}, {"amsgrad": True}, {"betas": (0.0, 0.4), "bias_correction": False}],
    configs={
        "adam": (
            {"amsgrad": True, "weight_decay": 0.1, "global_clip_norm": 2.0, "ema_decay": 0.9},
            "list",
        )
    },
    draw=draw_adam,
    dialect="eps_hat",
    needs_step=lambda options: options.get("bias_correction", True),
    exact=exact_adam,
    accuracy=[
        {"lr": 0.01},
        {"lr": 0.003, "betas": (0.8, 0.99)},
        {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01},
    ],
    golden=(26, 20),
    ulps=12,
    is_ill=lambda options: options.get("weight_decay"),  # coupled, where gradients are near zero
    keras_defaults={"lr": 0.001, "eps": 1e-7},
    keras_slots={
        "momentum": "exp_avg",
        "velocity": "exp_avg_sq",
        "velocity_hat": "max_exp_avg_sq",
    },
    torch=[
        {"lr": 0.01},
        {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1, "betas": (0.8, 0.9)},
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    torch_choices={
        "betas": ((0.9, 0.999), (0.5, 0.9)),
        "amsgrad": (False, True),
        "eps": (1e-8, 1e-3),
        "decoupled_weight_decay": (False, True),
    },
    torch_tests=651,
    keras=[{}, {"amsgrad": True, "beta_1": 0.8}],
    keras_tests=9,
    correction=(1, 5e-4),
)

ADAMW = ADAM._replace(
    cls=fastopt.AdamW,
    hypers={**ADAM.hypers, "weight_decay": (1e-2, AT_LEAST_0)},
    keywords={**ADAM.keywords, "decoupled_weight_decay": (True, SWITCH)},
    variants=[{}, {"amsgrad": True, "betas": (0.8, 0.9), "eps": 1e-3}],
    configs={"adamw": ({"semantics": "keras", "ema_decay": 0.0}, "groups")},
    accuracy=[{"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.003}],
    golden=(8, 6),
    is_ill=never,
    keras_defaults={"lr": 0.001, "eps": 1e-7, "weight_decay": 0.004},
    torch=[{"lr": 0.01}, {"lr": 0.01, "amsgrad": True, "maximize": True}],
    torch_choices={
        "betas": ((0.9, 0.999), (0.5, 0.9)),
        "amsgrad": (False, True),
        "eps": (1e-8, 1e-3),
    },
    keras=[{}, {"amsgrad": True, "weight_decay": 0.1}],
    keras_tests=7,
)

# ---- Adamax --------------------------------------------------------------------------------------


def draw_adamax(rng, semantics):
    return {"betas": pick(rng, [(0.9, 0.999), [0.5, 0.75], (0, 0.4), np.array([0.8, 0.9])])}


def exact_adamax(o, g, t, s):
    beta1, beta2 = (L(beta) for beta in o.get("betas", (0.9, 0.999)))
    s.m = beta1 * s.m + (1 - beta1) * g
    s.v = np.maximum(beta2 * s.v, np.abs(g) + L(1e-8))
    return o["lr"] / (1 - beta1**t) * s.m / s.v


ADAMAX = Row(
    fastopt.Adamax,
    hypers={
        "lr": (2e-3, AT_LEAST_0),
        "betas": ((0.9, 0.999), BETAS),
        "eps": (1e-8, AT_LEAST_0),
        "weight_decay": (0.0, AT_LEAST_0),
    },
    keywords={},
    slots={"exp_avg": {}, "exp_inf": {}},
    variants=[{}, {"betas": (0.0, 0.4), "eps": 1e-3}],
    configs={"adamax": ({"weight_decay": 0.1, "clip_value": 2.0, "ema_decay": 0.5}, "dict")},
    draw=draw_adamax,
    dialect="eps_outside",
    needs_step=lambda options: True,
    exact=exact_adamax,
    accuracy=[
        {"lr": 0.01},
        {"lr": 0.003, "betas": (0.8, 0.99)},
        {"lr": 0.01, "weight_decay": 0.01},
    ],
    golden=(2, 2),
    ulps=12,
    is_ill=never,
    keras_defaults={"lr": 0.001, "eps": 1e-7},
    keras_slots={"momentum": "exp_avg", "norm": "exp_inf"},
    torch=[{"lr": 0.01}, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9), "maximize": True}],
    torch_choices={"betas": ((0.9, 0.999), (0.5, 0.9)), "eps": (1e-8, 1e-3)},
    torch_tests=459,
    keras=[{}, {"beta_1": 0.8, "epsilon": 1e-4}],
    keras_tests=6,
    correction=(0, 1e-6),
    torch_takes_axes=False,
    old_files=False,
)

# ---- Adadelta ------------------------------------------------------------------------------------


def draw_adadelta(rng, semantics):
    return {"rho": pick(rng, [0.9, 0.5, 0, 1, np.float32(0.25)])}


def exact_adadelta(o, g, t, s):
    rho, eps = o.get("rho", L(0.9)), L(1e-6)
    s.v = rho * s.v + (1 - rho) * g * g
    delta = np.sqrt((s.a + eps) / (s.v + eps)) * g
    s.a = rho * s.a + (1 - rho) * delta * delta
    return o["lr"] * delta


ADADELTA = Row(
    fastopt.Adadelta,
    hypers={
        "lr": (1.0, AT_LEAST_0),
        "rho": (0.9, UP_TO_1),
        "eps": (1e-6, AT_LEAST_0),
        "weight_decay": (0.0, AT_LEAST_0),
    },
    keywords={},
    slots={"square_avg": {}, "acc_delta": {}},
    variants=[{}, {"rho": 0.5, "eps": 1e-3}],
    configs={"adadelta": ({"weight_decay": 0.1, "clip_norm": 2.0, "rho": 0.5}, "groups")},
    draw=draw_adadelta,
    dialect=None,
    needs_step=never,
    exact=exact_adadelta,
    accuracy=[{"lr": 1.0}, {"lr": 0.5, "rho": 0.8}, {"lr": 1.0, "weight_decay": 0.01}],
    golden=(2, 2),
    ulps=12,
    is_ill=never,
    keras_defaults={"lr": 0.001, "rho": 0.95, "eps": 1e-7},
    keras_slots={"accumulated_grad": "square_avg", "accumulated_delta_var": "acc_delta"},
    torch=[{}, {"lr": 0.5, "rho": 0.5, "weight_decay": 0.1, "maximize": True}],
    torch_choices={"rho": (0.9, 0.5), "eps": (1e-6, 1e-3)},
    torch_tests=547,
    keras=[{}, {"rho": 0.5, "epsilon": 1e-4}],
    keras_tests=6,
    state_ulps=12,  # acc_delta feeds back into itself, and the errors of two roots with it
    old_files=False,
)

# ---- Lion ----------------------------------------------------------------------------------------


def draw_lion(rng, semantics):
    return {"betas": pick(rng, [(0.9, 0.99), [0.5, 0.75], (0, 0.4), np.array([0.8, 0.9])])}


LION = Row(
    fastopt.Lion,
    hypers={
        "lr": (1e-3, AT_LEAST_0),
        "betas": ((0.9, 0.99), BETAS),
        "weight_decay": (0.0, AT_LEAST_0),
    },
    keywords={},
    slots={"exp_avg": {}},
    variants=[{}, {"betas": (0.5, 0.4)}],
    configs={"lion": ({"betas": (0.5, 0.9), "weight_decay": 0.1, "clip_value": 2.0}, "list")},
    draw=draw_lion,
    dialect=None,
    needs_step=never,
    exact=None,
    accuracy=[],
    golden=(0, 0),
    ulps=0,
    is_ill=never,
    keras_defaults={"lr": 0.001},
    keras_slots={"momentum": "exp_avg"},
    torch=None,
    torch_choices=None,
    torch_tests=0,
    keras=[{}, {"beta_1": 0.5, "beta_2": 0.8}],
    keras_tests=8,
    old_files=False,
)

# ---- NAdam ---------------------------------------------------------------------------------------


def draw_nadam(rng, semantics):
    return {**draw_adamax(rng, semantics), "momentum_decay": pick(rng, [0.004, 0, 0.5])}


def exact_nadam(o, g, t, s):
    beta1, beta2 = (L(beta) for beta in o.get("betas", (0.9, 0.999)))
    psi = L(o.get("momentum_decay", 0.004))
    mus = [beta1 * (1 - L("0.5") * L("0.96") ** (u * psi)) for u in (t, t + 1)]
    s.product = (1 if t == 1 else s.product) * mus[0]
    s.m = beta1 * s.m + (1 - beta1) * g
    s.v = beta2 * s.v + (1 - beta2) * g * g
    ahead = mus[1] / (1 - s.product * mus[1]) * s.m + (1 - mus[0]) / (1 - s.product) * g
    return o["lr"] * ahead / (np.sqrt(s.v / (1 - beta2**t)) + L(1e-8))


NADAM = Row(
    fastopt.NAdam,
    hypers={
        "lr": (2e-3, AT_LEAST_0),
        "betas": ((0.9, 0.999), BETAS),
        "eps": (1e-8, AT_LEAST_0),
        "weight_decay": (0.0, AT_LEAST_0),
        "momentum_decay": (4e-3, AT_LEAST_0),
        "decoupled_weight_decay": (False, SWITCH),
    },
    keywords={},
    slots={"exp_avg": {}, "exp_avg_sq": {}, "mu_product": {}},
    variants=[{}, {"betas": (0.0, 0.9), "eps": 1e-3, "momentum_decay": 0.5}],
    configs={"nadam": ({"weight_decay": 0.1, "clip_norm": 2.0, "ema_decay": 0.5}, "dict")},
    draw=draw_nadam,
    dialect="fast_warmup",
    needs_step=lambda options: True,
    exact=exact_nadam,
    accuracy=[
        {"lr": 0.01},
        {"lr": 0.003, "betas": (0.8, 0.99), "momentum_decay": 0.1},
        {"lr": 0.01, "weight_decay": 0.01},
    ],
    golden=(2, 2),
    ulps=12,
    is_ill=never,
    keras_defaults={"lr": 0.001, "eps": 1e-7},
    keras_slots={"momentum": "exp_avg", "velocity": "exp_avg_sq"},
    keras_rounds=("betas",),
    torch=[
        {},
        {"lr": 0.01, "betas": (0.8, 0.99), "momentum_decay": 0.1, "weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ],
    torch_choices={
        "lr": [1e-3, 0.01],
        "betas": [(0.9, 0.999), (0.5, 0.9)],
        "eps": [1e-8, 1e-3],
        "weight_decay": [0.0, 0.1],
        "momentum_decay": [4e-3, 0.1],
        "decoupled_weight_decay": [False, True],
    },
    torch_tests=636,
    keras=[{}, {"beta_1": 0.7, "epsilon": 1e-4}],
    keras_tests=7,
    correction=(1, 5e-4),
    torch_takes_axes=False,
    old_files=False,
    other_name="Nadam",
)

# ---- RAdam ---------------------------------------------------------------------------------------


def exact_radam(o, g, t, s):
    beta1, beta2 = (L(beta) for beta in o.get("betas", (0.9, 0.999)))
    s.m = beta1 * s.m + (1 - beta1) * g
    s.v = beta2 * s.v + (1 - beta2) * g * g
    ages = np.arange(1, t + 1, dtype=L)
    weights = beta2 ** (ages - 1)
    rho, limit = 2 * (ages @ weights) / weights.sum() - 1, 2 / (1 - beta2) - 1
    step = o["lr"] / (1 - beta1**t) * s.m
    if rho <= 5:
        return step
    r2 = (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)
    return step * np.sqrt(r2 * (1 - beta2**t)) / (np.sqrt(s.v) + L(1e-8))


RADAM = Row(
    fastopt.RAdam,
    hypers={
        "lr": (1e-3, AT_LEAST_0),
        "betas": ((0.9, 0.999), BETAS),
        "eps": (1e-8, AT_LEAST_0),
        "weight_decay": (0.0, AT_LEAST_0),
        "decoupled_weight_decay": (False, SWITCH),
    },
    keywords={},
    slots={"exp_avg": {}, "exp_avg_sq": {}},
    variants=[{}, {"betas": (0.0, 0.9), "eps": 1e-3}],
    configs={"radam": ({"weight_decay": 0.1, "clip_norm": 2.0, "ema_decay": 0.5}, "dict")},
    draw=draw_adamax,
    dialect=None,
    needs_step=lambda options: True,
    exact=exact_radam,
    accuracy=[
        {"lr": 0.01},
        {"lr": 0.003, "betas": (0.8, 0.99)},
        {"lr": 0.01, "weight_decay": 0.01},
    ],
    golden=(2, 0),
    ulps=12,
    is_ill=never,
    keras_defaults={},
    keras_slots={},
    torch=[
        {"lr": 0.01},
        {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9), "maximize": True},
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    torch_choices={
        "betas": ((0.9, 0.999), (0.5, 0.9)),
        "eps": (1e-8, 1e-3),
        "decoupled_weight_decay": (False, True),
    },
    torch_tests=548,
    keras=None,
    keras_tests=0,
    correction=(1, 0.0),
    torch_takes_axes=False,
    old_files=False,
)

# ---- Rprop ---------------------------------------------------------------------------------------


def draw_rprop(rng, semantics):
    return {
        "etas": pick(rng, [(0.5, 1.2), [0.25, 2], np.array([0.5, 1.5])]),
        "step_sizes": pick(rng, [(1e-6, 50), [0, 0.5], (0.01, 0.02), np.array([0.0, 8.0])]),
    }


def exact_rprop(o, g, t, s):
    down, up = map(L, o.get("etas", (0.5, 1.2)))
    least, most = map(L, o.get("step_sizes", (1e-6, 50)))
    turned, kept = g * s.a < 0, g * s.a > 0
    sizes = np.full_like(g, o["lr"]) if t == 1 else s.b
    s.b = np.clip(sizes * np.where(turned, down, np.where(kept, up, 1)), least, most)
    s.a = np.where(turned, 0, g)
    return s.b * np.sign(s.a)


RPROP = Row(
    fastopt.Rprop,
    hypers={
        "lr": (1e-2, AT_LEAST_0),
        "etas": ((0.5, 1.2), ETAS),
        "step_sizes": ((1e-6, 50), STEP_SIZES),
    },
    keywords={"weight_decay": (0.0, AT_LEAST_0)},
    slots={"prev": {}, "step_size": {}},
    variants=[{}, {"etas": (0.3, 2.5), "step_sizes": (0.04, 0.2)}],
    configs={
        "rprop": ({"etas": (0.5, 1.5), "weight_decay": 0.1, "clip_value": 2.0}, "list"),
    },
    draw=draw_rprop,
    dialect=None,
    needs_step=never,
    exact=exact_rprop,
    accuracy=[
        {"lr": 0.01},
        {"lr": 0.03, "etas": (0.3, 1.3)},
        {"lr": 0.01, "step_sizes": (0.003, 0.02)},
    ],
    golden=(0, 0),
    ulps=0,
    is_ill=never,
    keras_defaults={},
    keras_slots={},
    torch=[
        {"lr": 0.1},
        {"lr": 0.1, "etas": (0.3, 1.5), "step_sizes": (0.05, 0.3), "maximize": True},
    ],
    torch_choices={
        "etas": ((0.5, 1.2), (0.25, 2.0)),
        "step_sizes": ((1e-6, 50), (0.0, 0.125)),
    },
    torch_tests=459,
    keras=None,
    keras_tests=0,
    ascends=False,
    old_files=False,
)

# ---- all of them ---------------------------------------------------------------------------------

ROWS = [SGD, ADAGRAD, RMSPROP, ADAM, ADAMW, ADAMAX, ADADELTA, LION, NADAM, RADAM, RPROP]
CLASSES = [row.cls for row in ROWS]
BY_CLASS = {row.cls: row for row in ROWS}
BY_NAME = {name: row for row in ROWS for name in (row.name, row.keras_name)}
BY_RULE = {row.rule: row for row in reversed(ROWS)}  # of AdamW's rule, Adam's row
BY_RULE = {rule: BY_RULE[rule] for rule in dict.fromkeys(row.rule for row in ROWS)}
CONFIGS = {
    name: (row.cls, options, given)
    for row in ROWS
    for name, (options, given) in row.configs.items()
}
TORCH_CLASSES = [row.name for row in ROWS if row.torch]
KERAS_CLASSES = [row.keras_name for row in ROWS if row.keras]


def _cases():
    options = [
        {"lr": 0.1},
        {"lr": 0.05, "weight_decay": 0.1},
        {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ]
    for row in ROWS:
        for i, variant in enumerate(row.variants):
            for j, option in enumerate(options):
                for semantics in ("torch", "keras"):
                    kwargs = {**option, **variant, "semantics": semantics}
                    yield f"{row.name}-{i}{j}-{semantics}", row.cls, kwargs


# (name, class, keyword arguments): together they reach every rule, variant and option that changes
# a number.
CASES = list(_cases())
CASE_IDS = [case[0] for case in CASES]


def as_function(cls, kwargs):
    """Return the function that is the class with these arguments, but for arrays and the step."""
    row, kwargs = BY_CLASS[cls], dict(kwargs)
    known = inspect.signature(row.function).parameters
    semantics = kwargs.pop("semantics", "torch")
    if row.dialect:
        kwargs[row.dialect] = semantics == "keras"
    for name, default in row.defaults.items():  # of AdamW, where they are not Adam's
        if default != BY_RULE[row.rule].defaults[name]:
            kwargs.setdefault(name, default)
    implied = {*row.starts.values(), *(name for _, switch in row.switches() for name in switch)}
    kwargs = {k: v for k, v in kwargs.items() if k in known or k not in implied}

    def call(params, grads, state, step, **options):
        if "step" in known:
            options["step"] = step
        state = [state.get(name) for name in row.slots]
        return row.function(params, grads, *state, **kwargs, **options)

    return call


# ---- bad values of hyperparameters ---------------------------------------------------------------

_NOT_REAL = [
    ("1", TypeError, r"{} must be a real number, got '1' \(str\)"),
    (False, TypeError, r"{} must be a real number, got False \(bool\)"),
    (None, TypeError, "{} must be a real number, got None"),
    (np.ones(1), TypeError, r"{} must be a real number, got array\(\[1\.\]\)"),
    (np.array(True), TypeError, "{} must be a real number, got array"),
    (np.array("1"), TypeError, "{} must be a real number, got array"),
    (1j, TypeError, "{} must be a real number, got 1j"),
]
_BAD = {
    NUMBER: [(NAN, ValueError, "{} must be a number, got nan"), *_NOT_REAL],
    AT_LEAST_0: [
        (-1e-9, ValueError, "{} must be >= 0, got -1e-09"),
        (NAN, ValueError, "{} must be >= 0, got nan"),
        (np.array(-1.0), ValueError, r"{} must be >= 0, got array\(-1\.\)"),
        (10**400, ValueError, "{} is too large"),
        *_NOT_REAL,
    ],
    BELOW_1: [
        (-1e-9, ValueError, "{} must be >= 0 and < 1, got -1e-09"),
        (1.0, ValueError, "{} must be >= 0 and < 1, got 1.0"),
        (NAN, ValueError, "{} must be >= 0 and < 1, got nan"),
        *_NOT_REAL,
    ],
    UP_TO_1: [
        (-1e-9, ValueError, "{} must be >= 0 and <= 1, got -1e-09"),
        (1.001, ValueError, "{} must be >= 0 and <= 1, got 1.001"),
        (NAN, ValueError, "{} must be >= 0 and <= 1, got nan"),
        *_NOT_REAL,
    ],
    SWITCH: [
        (x, TypeError, "{} must be True or False, got " + repr(x)) for x in (1, 0.0, None, "no")
    ],
    BETAS: [
        ((1.0, 0.9), ValueError, r"{}\[0\] must be >= 0 and < 1, got 1.0"),
        ((0.9, 1), ValueError, r"{}\[1\] must be >= 0 and < 1, got 1"),
        ((-0.1, 0.9), ValueError, r"{}\[0\] must be >= 0"),
        ([0.9, NAN], ValueError, r"{}\[1\] must be .*, got nan"),
        ((0.9, "x"), TypeError, r"{}\[1\] must be a real number, got 'x'"),
        ((True, 0.9), TypeError, r"{}\[0\] must be a real number, got True"),
        ((0.9,), ValueError, "{} must have two elements"),
        ([0.9, 0.9, 0.9], ValueError, "{} must have two elements"),
        (0.9, TypeError, "{} must be a tuple of two numbers, got 0.9"),
        ("ab", TypeError, "{} must be a tuple of two numbers, got 'ab'"),
        (np.ones(3), ValueError, "{} must have two elements"),
        (np.ones((2, 2)), TypeError, "{} must be a tuple of two numbers"),
        (np.array(0.9), TypeError, "{} must be a tuple of two numbers"),
        (np.array([0.9, 1.0]), ValueError, r"{}\[1\] must be >= 0 and < 1, got "),
    ],
}

_BAD |= {
    ETAS: [
        ((0.0, 1.2), ValueError, r"{}\[0\] must be > 0 and < 1, got 0.0"),
        ((1, 1.2), ValueError, r"{}\[0\] must be > 0 and < 1, got 1"),
        ((NAN, 1.2), ValueError, r"{}\[0\] must be > 0 and < 1, got nan"),
        ((0.5, 1.0), ValueError, r"{}\[1\] must be > 1, got 1.0"),
        ([0.5, NAN], ValueError, r"{}\[1\] must be > 1, got nan"),
        ((1.2, 0.5), ValueError, r"{}\[0\] must be > 0 and < 1, got 1.2"),
        (("x", 1.2), TypeError, r"{}\[0\] must be a real number, got 'x'"),
        ((0.5,), ValueError, "{} must have two elements"),
        (0.5, TypeError, "{} must be a tuple of two numbers, got 0.5"),
    ],
    STEP_SIZES: [
        ((-1e-9, 50), ValueError, r"{}\[0\] must be >= 0, got -1e-09"),
        ((0, NAN), ValueError, r"{}\[1\] must be >= 0, got nan"),
        ((50, 1), ValueError, r"{} must be the smallest and the largest.* \(50.0, 1.0\)"),
        ((0, True), TypeError, r"{}\[1\] must be a real number, got True"),
        ((0, 1, 2), ValueError, "{} must have two elements"),
        (None, TypeError, "{} must be a tuple of two numbers, got None"),
    ],
}

# By hyperparameter: values, and with which error and message a class refuses them.
BAD_HYPERS = {name: _BAD[limits] for row in ROWS for name, limits in row.ranges.items()}

# Options of all of Keras's optimizers, for what they do around the update of the variables.
AROUND_KERAS_UPDATE = [
    {"clipnorm": 0.5},
    {"clipvalue": 0.1},
    {"global_clipnorm": 0.5},
    {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3},
    {"gradient_accumulation_steps": 2},
    {"loss_scale_factor": 8.0},
]
