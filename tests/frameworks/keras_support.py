"""What the tests of fastopt.keras share."""

import keras
import pytest

import fastopt.keras

NAMES = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")
OURS = {name: getattr(fastopt.keras, name) for name in NAMES}
THEIRS = {name: getattr(keras.optimizers, name) for name in NAMES}


@pytest.fixture
def only_kernels(monkeypatch):
    """Make Keras's own update of a dense float variable an error, so that what passes is ours."""

    def guarded(original):
        def update_step(self, gradient, variable, learning_rate):
            dtype = keras.backend.standardize_dtype(variable.dtype)
            dense = type(gradient).__name__ != "IndexedSlices"
            if isinstance(self, tuple(OURS.values())) and dense and dtype in ("float32", "float64"):
                raise AssertionError(f"Keras's own update of {variable.name}")
            return original(self, gradient, variable, learning_rate)

        return update_step

    for cls in THEIRS.values():
        if "update_step" in vars(cls):
            monkeypatch.setattr(cls, "update_step", guarded(cls.update_step))


def values(variables):
    """Return copies of TensorFlow variables' values."""
    return [v.value.numpy() for v in variables]
