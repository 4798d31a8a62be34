"""The examples in NumPy run, learn, and come as close as they can."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import CHECKOUT

import fastopt

EXAMPLES = CHECKOUT / "examples"


def output(name):
    env = {**os.environ, "PYTHONPATH": str(Path(fastopt.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def number(pattern, text):
    (found,) = re.findall(pattern, text)
    return float(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "accuracy"),
    [
        ("numpy_logistic_regression", 95),
        ("numpy_mlp", 96),
        ("numpy_convolution", 94),
    ],
)
def test_a_classifier_learns(name, accuracy):
    text = output(name)
    losses = [float(loss) for loss in re.findall(r"\], Loss: ([\d.]+)$", text, re.MULTILINE)]
    assert len(losses) >= 4
    assert losses == sorted(losses, reverse=True)
    assert number(r"Test accuracy: ([\d.]+)%", text) >= accuracy


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("numpy_mlp", ["W1", "b1", "W2", "b2"]),
        ("numpy_convolution", ["filters", "filter_bias", "dense", "dense_bias"]),
    ],
)
def test_the_gradients_by_hand_are_the_slopes_of_the_loss(name, parameters):
    source = (EXAMPLES / f"{name}.py").read_text()
    model = {}
    exec(source[: source.index("\nepochs, size =")].replace("float32", "float64"), model)
    rng = np.random.default_rng(0)
    params = [model.get("params", model)[p] for p in parameters]
    for p in params:
        p += 0.3 * rng.standard_normal(p.shape)
    x, y = model["x"][:5], model["y"][:5]
    _, grads = model["loss_and_grads"](x, y)
    h, checked = 1e-6, 0
    for param, grad in zip(params, grads.values() if type(grads) is dict else grads, strict=True):
        assert grad.shape == param.shape
        for i in rng.permutation(param.size)[:20]:
            value = param.flat[i]
            param.flat[i] = value + h
            above, _ = model["loss_and_grads"](x, y)
            param.flat[i] = value - h
            below, _ = model["loss_and_grads"](x, y)
            param.flat[i] = value
            assert (above - below) / (2 * h) == pytest.approx(grad.flat[i], abs=1e-7)
            checked += 1
    assert checked >= 58


def test_the_gradients_of_a_factorization_are_the_slopes_of_its_loss():
    source = (EXAMPLES / "numpy_matrix_factorization.py").read_text()
    model = {}
    exec(source[: source.index("\nsize, epochs =")].replace("float32", "float64"), model)
    rng = np.random.default_rng(0)
    params = model["opt"].params
    for p in params:
        p += 0.3 * rng.standard_normal(p.shape)
    u, f = np.array([7, 2, 7, 7, 11]), np.array([3, 3, 5, 3, 2])  # a pair that occurs twice, too
    rating = model["rating"][:5]

    def error():
        return model["predict"](u, f) - rating

    checked = 0
    for param, grad in zip(params, model["gradients"](u, f, error()), strict=True):
        dense = np.zeros_like(param)
        if type(grad) is fastopt.Rows:
            np.add.at(dense, grad.indices, grad.values)
        else:
            dense[...] = grad
        places = np.unique([*np.flatnonzero(dense), 0])
        for i in places:
            value, loss = param.flat[i], []
            for h in (1e-6, -1e-6):
                param.flat[i] = value + h
                loss.append((error() ** 2).sum() / 2)
            param.flat[i] = value
            assert (loss[0] - loss[1]) / 2e-6 == pytest.approx(dense.flat[i], abs=1e-7)
            checked += 1
    assert checked == 13 + 13 + 4 + 4 + 1  # three rows of each table, and the first element


def test_a_factorization_predicts_almost_as_well_as_the_noise_allows():
    text = output("numpy_matrix_factorization")
    noise = number(r"Noise of the ratings: ([\d.]+)", text)
    error = number(r"Test error: ([\d.]+)", text)
    assert noise < error < 1.15 * noise
    assert number(r"Error of the mean rating: ([\d.]+)", text) > 2 * noise


@pytest.mark.slow
def test_an_embedded_fastopt_saves_time_and_memory_and_changes_no_result():
    text = output("before_and_after")
    before = re.search(r"before: ([\d.]+) ms and ([\d.]+) MB", text)
    after = re.search(r"after:  ([\d.]+) ms and ([\d.]+) MB", text)
    assert float(after[1]) < float(before[1])
    assert float(before[2]) > 10
    assert float(after[2]) < 0.1
    assert number(r"the weights differ by ([\d.e-]+) at most", text) < 1e-6
    losses = [float(loss) for loss in re.findall(r"\], Loss: ([\d.]+)$", text, re.MULTILINE)]
    assert losses[-1] < losses[0]
