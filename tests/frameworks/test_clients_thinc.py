"""thinc's models with fastopt in place of its own Adam."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from thinc.api import NumpyOps, Optimizer, Relu, Softmax, chain, fix_random_seed

HERE = Path(__file__).parent
sys.path += [str(HERE / "clients"), str(HERE.parent)]

import with_thinc  # noqa: E402
from support import python  # noqa: E402


def train(monkeypatch, cls, method, adam):
    monkeypatch.setattr(cls, method, adam)
    fix_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 20), np.float32)
    y = np.eye(3, dtype=np.float32)[rng.integers(3, size=64)]
    model = chain(Relu(16), Softmax(3))
    model.initialize(x, y)
    optimizer = Optimizer(0.01, L2=1e-4, grad_clip=1.0, L2_is_weight_decay=True)
    losses = []
    for _ in range(30):
        got, backward = model.begin_update(x)
        losses.append(float(np.square(got - y).sum()))
        backward((got - y) / len(y))
        model.finish_update(optimizer)
    return losses, model


@pytest.mark.parametrize(
    ("cls", "method", "adam"),
    [(NumpyOps, "adam", with_thinc.adam), (Optimizer, "_adam", with_thinc.optimizer_adam)],
)
def test_training_gives_the_same_losses(monkeypatch, cls, method, adam):
    before = with_thinc.calls
    theirs, _ = train(monkeypatch, cls, method, getattr(cls, method))
    ours, model = train(monkeypatch, cls, method, adam)
    assert with_thinc.calls - before == 30 * 4
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)  # theirs fuses, in float32
    assert ours[-1] < 0.8 * ours[0]
    assert {model.layers[0].get_param(name).dtype for name in "Wb"} == {np.dtype(np.float32)}


def test_their_tests_pass():
    done = python(
        *("-m", "pytest", "-q", "-p", "with_thinc", "-p", "no:cacheprovider", "-o", "addopts="),
        *("-k", "optim or adam", "--pyargs"),
        *("thinc.tests.test_optimizers", "thinc.tests.backends.test_ops"),
        timeout=120,
        PYTHONPATH=with_thinc.path(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[1-9]\d* calls of fastopt", done.stdout)
