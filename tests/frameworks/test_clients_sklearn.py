"""scikit-learn's neural networks with fastopt in place of their own optimizers."""

import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, _multilayer_perceptron

HERE = Path(__file__).parent
sys.path += [str(HERE / "clients"), str(HERE.parent)]

import with_sklearn  # noqa: E402
from support import python  # noqa: E402

THEIRS = _multilayer_perceptron.SGDOptimizer, _multilayer_perceptron.AdamOptimizer
OURS = with_sklearn.SGDOptimizer, with_sklearn.AdamOptimizer


def fit(monkeypatch, optimizers, dtype, **options):
    for name, cls in zip(("SGDOptimizer", "AdamOptimizer"), optimizers, strict=True):
        monkeypatch.setattr(_multilayer_perceptron, name, cls)
    x, y = load_digits(return_X_y=True)
    model = MLPClassifier((30, 20), max_iter=12, random_state=0, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit((x / 16).astype(dtype), y)


OPTIONS = [
    {"solver": "adam"},
    {"solver": "adam", "beta_1": 0.5, "epsilon": 1e-3, "alpha": 0.1},
    {"solver": "sgd", "learning_rate_init": 0.1},
    {"solver": "sgd", "momentum": 0.0},
    {"solver": "sgd", "nesterovs_momentum": False, "learning_rate": "invscaling"},
    {"solver": "sgd", "learning_rate": "adaptive", "tol": 0.5, "n_iter_no_change": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_gives_the_same_bits(monkeypatch, options):
    theirs, ours = (fit(monkeypatch, which, np.float64, **options) for which in (THEIRS, OURS))
    assert type(ours._optimizer) in OURS
    assert type(theirs._optimizer) in THEIRS
    assert ours.loss_curve_ == theirs.loss_curve_
    for a, b in zip(
        ours.coefs_ + ours.intercepts_, theirs.coefs_ + theirs.intercepts_, strict=True
    ):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("options", OPTIONS[::2], ids=str)
def test_training_in_float32_stays_in_float32(monkeypatch, options):
    """Theirs computes Adam in float64, as its rate is a NumPy scalar: the last bits differ."""
    theirs, ours = (fit(monkeypatch, which, np.float32, **options) for which in (THEIRS, OURS))
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-3)
    assert {a.dtype for a in ours.coefs_} == {np.dtype(np.float32)}


def test_their_tests_pass():
    """Which compare arrays bit for bit."""
    done = python(
        *("-m", "pytest", "-q", "-p", "with_sklearn", "-p", "no:cacheprovider"),
        *("-o", "addopts=", "--pyargs", "sklearn.neural_network"),
        timeout=300,
        PYTHONPATH=with_sklearn.path(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[1-9]\d* calls of fastopt", done.stdout)
