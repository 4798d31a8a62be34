"""What test_keras_backends.py runs on two devices, in a process of its own.

TensorFlow lets a process run replicas either in traced functions or eagerly, which its argument
chooses.
"""

import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import fastopt.keras
from fastopt import FallbackWarning

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "__array__ implementation")  # Keras's own, of NumPy
warnings.filterwarnings("ignore", category=ResourceWarning)  # of TensorFlow's threads
OPTIONS = {"run_eagerly": sys.argv[1] == "eager", "jit_compile": False}
DEVICES = ["CPU:0", "CPU:1"]
X = np.random.default_rng(0).standard_normal((20, 6)).astype("float32")  # the last batch is shorter


def make_model(optimizer, *, scaled):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(3)]
    )
    wrapped = keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer
    model.compile(wrapped, "mse", **OPTIONS)
    return model


def train(model):
    for _ in range(2):
        model.fit(X, X[:, :3] ** 2, batch_size=16, verbose=0, shuffle=False)
        model.make_train_function(force=True)


def values(variables):
    """Return each replica's values."""
    return [part.numpy() for v in variables for part in v.value.values]


def equal(some, others):
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def keras_numbers_and_one_warning(scaled):
    results = []
    for optimizers in fastopt.keras, keras.optimizers:
        with tf.distribute.MirroredStrategy(DEVICES).scope():
            optimizer = optimizers.AdamW(0.01, weight_decay=0.1)
            model = make_model(optimizer, scaled=scaled)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FallbackWarning)
            train(model)
        assert len(caught) == (optimizers is fastopt.keras)
        for warning in caught:
            assert warning.category is FallbackWarning
            assert str(warning.message).startswith("fastopt.keras.AdamW: ")
            assert "MirroredStrategy" in str(warning.message)
            told = [tuple(info.values()) for info in optimizer.fastopt_info()]
            assert told == [
                (v.path, i, "keras", "the step runs under MirroredStrategy")
                for i, v in enumerate(model.trainable_variables)
            ]
        results.append(values(model.weights + model.optimizer.variables))
        assert len(results[-1]) == 2 * len(model.weights + model.optimizer.variables)
    assert equal(*results)


def as_an_error_it_comes_before_the_first_update(scaled):
    with tf.distribute.MirroredStrategy(DEVICES).scope():
        optimizer = fastopt.keras.AdamW(0.01)
        model = make_model(optimizer, scaled=scaled)
    before = values(model.weights)
    for _ in range(2):  # so it does when the training is tried again
        with pytest.raises(FallbackWarning, match=r"^fastopt\.keras\.AdamW: "):
            train(model)
        assert equal(before, values(model.weights))
        assert len(optimizer.variables) == 2 + 2 * len(model.trainable_variables)
        assert all((v == 0).all() for v in values(optimizer.variables[2:]))
        assert optimizer.iterations.numpy() == 0


cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
for scaled in (False, True) if sys.argv[1] == "traced" else (True,):
    as_an_error_it_comes_before_the_first_update(scaled)
    keras_numbers_and_one_warning(scaled)
print("all of it ran")
