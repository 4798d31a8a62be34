"""PennyLane's optimizers on fastopt, out of place; a pytest plugin that puts them in."""

from pathlib import Path

import numpy as np
from pennylane import numpy as pnp
from pennylane.optimize import adagrad, adam, momentum, rms_prop

from fastopt import functional

calls = 0


def stepped(args, grad, states, function, **hypers):
    """Return new values of the trainable arguments; the state (a list each) is updated in place."""
    global calls
    calls += 1
    trained = [i for i, arg in enumerate(args) if getattr(arg, "requires_grad", False)]
    new = list(args)
    for i, g in zip(trained, grad, strict=False):
        value = np.array(args[i], float)
        for state in states:
            state[i] = np.array(np.broadcast_to(state[i], value.shape), float)
        g = np.array(np.broadcast_to(g, value.shape), float)
        function(value, g, *(state[i] for state in states), **hypers)
        new[i] = pnp.tensor(value, requires_grad=True)
    return new


def adam_apply_grad(self, grad, args):
    if self.accumulation is None:
        self.accumulation = {"fm": [0] * len(args), "sm": [0] * len(args), "t": 0}
    self.accumulation["t"] += 1
    return stepped(
        args,
        grad,
        [self.accumulation["fm"], self.accumulation["sm"]],
        functional.adam,
        step=self.accumulation["t"],
        lr=self.stepsize,
        betas=(self.beta1, self.beta2),
        eps=self.eps,
        eps_hat=True,
    )


def accumulation(self, args):
    if self.accumulation is None:
        self.accumulation = [0.0] * len(args)
    return [self.accumulation]


def adagrad_apply_grad(self, grad, args):
    return stepped(
        args,
        grad,
        accumulation(self, args),
        functional.adagrad,
        lr=self.stepsize,
        eps=self.eps,
        eps_inside=True,
    )


def rmsprop_apply_grad(self, grad, args):
    return stepped(
        args,
        grad,
        accumulation(self, args),
        functional.rmsprop,
        lr=self.stepsize,
        alpha=self.decay,
        eps=self.eps,
        eps_inside=True,
    )


def momentum_apply_grad(self, grad, args):
    """Their accumulation is what is subtracted, the velocity's negative."""
    (states,) = accumulation(self, args)
    velocities = [-np.asarray(state) for state in states]
    new = stepped(
        args,
        grad,
        [velocities],
        functional.sgd,
        lr=self.stepsize,
        momentum=self.momentum,
        velocity=True,
    )
    states[:] = [-velocity for velocity in velocities]
    return new


def path():
    """What another interpreter needs to find this plugin, and the same fastopt."""
    return f"{Path(__file__).parent}:{Path(functional.__file__).parents[1]}"


def put_in():
    adam.AdamOptimizer.apply_grad = adam_apply_grad
    adagrad.AdagradOptimizer.apply_grad = adagrad_apply_grad
    rms_prop.RMSPropOptimizer.apply_grad = rmsprop_apply_grad
    momentum.MomentumOptimizer.apply_grad = momentum_apply_grad


def pytest_configure(config):
    put_in()


def pytest_unconfigure(config):
    print(f"{calls} calls of fastopt")
