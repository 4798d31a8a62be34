"""What test_keras_backends.py runs with KERAS_BACKEND=torch, in a process of its own."""

import itertools
import os
import tempfile
import warnings

import keras
import numpy as np
import pytest
import torch

import fastopt.keras

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "__array__ implementation")  # Keras's own, of NumPy
NAMES = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")
OURS = {name: getattr(fastopt.keras, name) for name in NAMES}
THEIRS = {name: getattr(keras.optimizers, name) for name in NAMES}
OWN = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Adagrad", {}),
    ("RMSprop", {"momentum": 0.5, "centered": True, "epsilon": 1e-4}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
]
COMMON = [
    {},
    {"weight_decay": 0.05},
    {"clipnorm": 0.5},
    {"global_clipnorm": 0.5},
    {"use_ema": True, "ema_overwrite_frequency": 3},
    {"gradient_accumulation_steps": 2},
]
SHAPES = [(4, 5), (5,), (16, 4), ()]


def values(variables):
    return [v.value.detach().numpy().copy() for v in variables]


def assert_close(ours, theirs, rtol=2e-5):
    for a, b in zip(values(ours), values(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=2e-6)


def make_variables(dtypes=("float32",)):
    rng = np.random.default_rng(0)
    kinds = itertools.cycle(dtypes)
    return [keras.Variable(rng.standard_normal(s), dtype=next(kinds)) for s in SHAPES]


def train(opt, variables, steps):
    for i in steps:
        rng = np.random.default_rng(i)
        grads = [torch.tensor(rng.standard_normal(v.shape)).to(v.value.dtype) for v in variables]
        with torch.no_grad():
            opt.apply(grads, variables)


def forbid(*args):
    raise AssertionError("Keras's own update")


def only_kernels():
    """Make Keras's own update an error where its optimizer is ours."""
    for cls in THEIRS.values():
        original = vars(cls).get("update_step")
        if original is not None:
            cls.update_step = lambda self, *args, original=original: (
                forbid if isinstance(self, tuple(OURS.values())) else original
            )(self, *args)


def numbers_and_checkpoints():
    for (name, own), common in itertools.product(OWN, COMMON):
        options = {"learning_rate": 0.01} | own | common
        dtypes = ("float32",) if "global_clipnorm" in common else ("float32", "float64")
        for first, second in (OURS, THEIRS), (THEIRS, OURS):
            variables = make_variables(dtypes)
            opt = first[name](**options)
            train(opt, variables, range(5))
            moved = [keras.Variable(a, dtype=a.dtype.name) for a in values(variables)]
            other = second[name](**options)
            other.build(moved)
            store = {}
            opt.save_own_variables(store)
            other.load_own_variables({key: value.copy() for key, value in store.items()})
            train(opt, variables, range(5, 10))
            train(other, moved, range(5, 10))
            assert_close(moved, variables)
            assert_close(other.variables, opt.variables)


def in_place_and_seen_by_autograd():
    w = keras.Variable(np.ones(4, np.float32))
    memory, before = w.value.data_ptr(), w.value._version
    loss = (w.value**2).sum()
    train(OURS["SGD"](), [w], range(1))
    assert w.value.data_ptr() == memory
    assert w.value._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def models():
    x = np.random.default_rng(0).standard_normal((50, 6)).astype("float32")
    results = []
    for classes in OURS, THEIRS:
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(3)]
        )
        model.compile(classes["AdamW"](0.01), "mse")
        model.fit(x, x[:, :3] ** 2, batch_size=16, epochs=2, verbose=0, shuffle=False)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.keras")
            model.save(path)
            loaded = keras.models.load_model(path)
        assert isinstance(loaded.optimizer, classes["AdamW"])
        assert_close(loaded.optimizer.variables, model.optimizer.variables, rtol=0)
        results.append(model.weights)
    assert_close(*results, rtol=1e-4)


def stateless():
    """The tensors that are given stay as they are (Keras's own are not so careful here)."""
    results = []
    for classes in OURS, THEIRS:
        variables = make_variables()
        opt = classes["Adam"](0.1)
        opt.build(variables)
        given = [v.value.detach().clone() for v in variables]
        slots = [v.value.detach().clone() for v in opt.variables]
        before = [t.clone() for t in given + slots]
        with torch.no_grad():
            new, _ = opt.stateless_apply(slots, [torch.ones_like(t) for t in given], given)
        unchanged = [torch.equal(a, b) for a, b in zip(before, given + slots, strict=True)]
        assert all(unchanged) or classes is THEIRS
        results.append([keras.Variable(t) for t in new])
    assert_close(*results)


def what_keras_does():
    """Layouts and types that the kernels do not take."""
    results = []
    for classes in OURS, THEIRS:
        half = keras.Variable(np.ones((3, 2)), dtype="float16")
        turned = keras.Variable(np.ones((3, 2)), dtype="float32")
        turned._value = torch.nn.Parameter(torch.ones(2, 3).t())
        opt = classes["RMSprop"](0.1)
        grads = [torch.ones((3, 2), dtype=torch.float16), torch.arange(6.0).reshape(3, 2)]
        for _ in range(3):
            with torch.no_grad():
                opt.apply(grads, [half, turned])
        results.append([half, turned])
    assert_close(*results, rtol=1e-3)


assert keras.backend.backend() == "torch"
stateless()
what_keras_does()
only_kernels()
numbers_and_checkpoints()
in_place_and_seen_by_autograd()
models()
print("all of it ran")
