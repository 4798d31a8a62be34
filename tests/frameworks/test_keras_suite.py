"""Keras's own tests of its optimizers, which are in its wheel, with fastopt's classes in place.

Meanwhile Keras's own update raises for dense float variables, so what passes here is fastopt's.
"""

import contextlib
import importlib
import unittest
from collections import Counter
from unittest import mock

import pytest
from frameworks.keras_support import OURS, only_kernels  # noqa: F401
from tables import BY_NAME, KERAS_CLASSES

MODULES = (
    *(f"{name.lower()}_test" for name in KERAS_CLASSES),
    "optimizer_test",
    "optimizer_sparse_test",
    "loss_scale_optimizer_test",
    "multi_optimizer_test",
)
EXCLUDED = {
    ("OptimizerSparseTest", f"test_sparse_gradients_{name}"): (
        "it looks for calls of assign with IndexedSlices, and fastopt's update calls none; "
        "test_sparse_correctness runs on the same configuration"
    )
    for name in ("adadelta", "adagrad", "loss_scale_optimizer_sgd", "rmsprop", "sgd")
}
STATELESS = "Keras itself skips it on its TensorFlow backend, which has no stateless_apply"
EXCLUDED["MultiOptimizerTest", "test_stateless_apply"] = STATELESS
for name in (
    "downscaling",
    "finite_step",
    "finite_step_with_inner_loss_scale",
    "finite_step_with_overwrite",
    "infinite_step",
    "iterations_update",
    "upscaling",
):
    EXCLUDED["LossScaleOptimizerTest", f"test_{name}_stateless"] = STATELESS

pytestmark = [
    pytest.mark.usefixtures("only_kernels"),
    pytest.mark.filterwarnings("default"),  # Keras's own tests warn, of NumPy for one
]

ran = []


@contextlib.contextmanager
def substituted():
    """Put fastopt's classes where Keras's tests look for them."""
    package = importlib.import_module("keras.src.optimizers")
    with contextlib.ExitStack() as stack:
        for name, cls in OURS.items():
            module = importlib.import_module(f"keras.src.optimizers.{name.lower()}")
            for place in (package, module):
                stack.enter_context(mock.patch.object(place, name, cls))
        by_name = {name.lower(): cls for name, cls in OURS.items()}
        stack.enter_context(mock.patch.dict(package.ALL_OBJECTS_DICT, by_name))
        yield


def cases():
    with substituted():
        for name in MODULES:
            module = importlib.import_module(f"keras.src.optimizers.{name}")
            for found in vars(module).values():
                if getattr(found, "__module__", None) == module.__name__ and issubclass(
                    found, unittest.TestCase
                ):
                    yield found


CASES = {case.__name__: case for case in cases()}
for name, test in EXCLUDED:
    delattr(CASES[name], test)
globals().update(CASES)


@pytest.fixture(autouse=True)
def in_place(request):
    if request.cls is not None:
        ran.append((request.cls.__name__, request.node.name))
    with substituted():
        yield


def test_how_many_tests_ran():
    """To be run with all the others."""
    assert len(EXCLUDED) == 13
    assert dict(Counter(name for name, _ in ran)) == {
        **{f"{name}Test": BY_NAME[name].keras_tests for name in KERAS_CLASSES},
        "OptimizerTest": 42,
        "OptimizerSparseTest": 33,
        "LossScaleOptimizerTest": 22,
        "MultiOptimizerTest": 15,
    }
