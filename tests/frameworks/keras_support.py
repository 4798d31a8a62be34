"""What the tests of fastopt.keras share."""

import contextlib
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from tables import KERAS_CLASSES

import fastopt.keras
from fastopt import FallbackWarning

OURS = {name: getattr(fastopt.keras, name) for name in KERAS_CLASSES}
THEIRS = {name: getattr(keras.optimizers, name) for name in KERAS_CLASSES}

SHAPES = [(4, 5), (5,), (16, 4), ()]
LOOPS = ["eager", "traced"]
each_loop = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture
def only_kernels(monkeypatch):
    """Make Keras's own update of a float variable an error, so that what passes is ours."""

    def guarded(original):
        def update_step(self, gradient, variable, learning_rate):
            dtype = keras.backend.standardize_dtype(variable.dtype)
            if isinstance(self, tuple(OURS.values())) and "float" in dtype:
                raise AssertionError(f"Keras's own update of {variable.name}")
            return original(self, gradient, variable, learning_rate)

        return update_step

    for cls in THEIRS.values():
        if "update_step" in vars(cls):
            monkeypatch.setattr(cls, "update_step", guarded(cls.update_step))


def values(variables):
    """Return copies of TensorFlow variables' values."""
    return [np.asarray(v.value.numpy()) for v in variables]


def make_variables(dtypes=("float32", "float64"), shapes=SHAPES):
    rng = np.random.default_rng(0)
    return [
        keras.Variable(rng.standard_normal(shape), dtype=dtypes[i % len(dtypes)], name=f"v{i}")
        for i, shape in enumerate(shapes)
    ]


def make_grads(variables, step):
    rng = np.random.default_rng(step)
    return [tf.constant(rng.standard_normal(v.shape), v.dtype) for v in variables]


def stepper(opt, variables, loop):
    """Return what does a step with these gradients."""

    def apply(grads):
        opt.apply_gradients(zip(grads, variables, strict=True))

    return tf.function(apply, autograph=False) if loop == "traced" else apply


def train(opt, variables, loop, steps):
    step = stepper(opt, variables, loop)
    for i in steps:
        step(make_grads(variables, i))


def make_model(optimizer, **compile_options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(16, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3),
        ]
    )
    model.compile(optimizer, "mse", **{"jit_compile": False, **compile_options})
    return model


def data(n=50):  # the last batch is shorter
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n, 6)).astype(np.float32)
    return x, x[:, :3] ** 2


def fit(model, epochs=2, **kwargs):
    x, y = data()
    return model.fit(x, y, batch_size=16, epochs=epochs, verbose=0, shuffle=False, **kwargs)


@contextlib.contextmanager
def fallbacks(action="always"):
    """Give a list that what fastopt warns of is put in; or ignore it, or make it an error."""
    found = []
    with warnings.catch_warnings(record=action == "always") as caught:
        warnings.simplefilter(action, FallbackWarning)
        yield found
    found += [w.message for w in caught or () if issubclass(w.category, FallbackWarning)]
    assert len(found) == len(caught or ())
