"""scikit-learn's optimizers of neural networks, on fastopt; a pytest plugin that puts them in."""

from pathlib import Path

import numpy as np
from sklearn.neural_network import _multilayer_perceptron, _stochastic_optimizers

from fastopt import functional

calls = 0


def count():
    global calls
    calls += 1


def of_their_types(grads, params):
    """Targets in float64 make gradients in float64 of parameters in float32."""
    return [g.astype(p.dtype, copy=False) for g, p in zip(grads, params, strict=True)]


class SGDOptimizer(_stochastic_optimizers.SGDOptimizer):
    def update_params(self, params, grads):
        count()
        functional.sgd(
            params,
            of_their_types(grads, params),
            self.velocities,
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
            velocity=True,
        )


class AdamOptimizer(_stochastic_optimizers.AdamOptimizer):
    def update_params(self, params, grads):
        count()
        self.t += 1
        self.learning_rate = (
            self.learning_rate_init * np.sqrt(1 - self.beta_2**self.t) / (1 - self.beta_1**self.t)
        )
        functional.adam(
            params,
            of_their_types(grads, params),
            self.ms,
            self.vs,
            lr=self.learning_rate,
            betas=(self.beta_1, self.beta_2),
            eps=self.epsilon,
            bias_correction=False,  # it is in the learning rate
        )


def path():
    """What another interpreter needs to find this plugin, and the same fastopt."""
    return f"{Path(__file__).parent}:{Path(functional.__file__).parents[1]}"


def put_in():
    for module in (_stochastic_optimizers, _multilayer_perceptron):
        module.SGDOptimizer, module.AdamOptimizer = SGDOptimizer, AdamOptimizer


def pytest_configure(config):
    put_in()


def pytest_unconfigure(config):
    print(f"{calls} calls of fastopt")
