"""Recorded trajectories of Keras, replayed through fastopt.keras, eagerly and in traced functions.

Errors are measured and bounded as in test_golden.py, whose array API cannot express all of them;
but Adam's bias correction has Keras's own errors here, so nothing is allowed for it.
"""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from frameworks.keras_support import OURS, only_kernels, values  # noqa: F401
from recorded import ENTRIES, GOLDEN, state_tolerance, tolerance
from tables import BY_NAME, KERAS_CLASSES

KERAS = [entry for entry in ENTRIES if entry["library"] == "keras"]
SCHEDULES = [entry for entry in KERAS if entry["class"].startswith("lr:")]
REPLAYED = [entry for entry in KERAS if entry["class"] in OURS]


def schedule(name, kwargs):
    return getattr(keras.optimizers.schedules, name)(**kwargs)


def optimizer(entry):
    kwargs = dict(entry["kwargs"])
    if "sched" in entry:
        kwargs["learning_rate"] = schedule(*entry["sched"])
    return OURS[entry["class"]](**kwargs)


def scaled(got, expected, largest, slack):
    """Return the largest error in ulps of the largest magnitude so far, beyond some slack."""
    finite = np.isfinite(expected)
    assert np.array_equal(np.isfinite(got), finite)
    with np.errstate(invalid="ignore"):
        gap = np.abs(got.astype(np.longdouble) - expected) - slack
    return float((gap / np.spacing(largest))[finite].max(initial=0))


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("entry", REPLAYED, ids=lambda e: Path(e["file"]).stem)
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.usefixtures("only_kernels")
def test_trajectory(entry, traced):
    file, n = np.load(GOLDEN / entry["file"]), len(entry["shapes"])
    start = [file[f"p0_{i}"] for i in range(n)]
    variables = [keras.Variable(p, dtype=p.dtype.name, name=f"p{i}") for i, p in enumerate(start)]
    opt = optimizer(entry)
    opt.build(variables)
    if "exclude" in entry:
        opt.exclude_from_weight_decay(var_names=entry["exclude"])

    def apply(grads):
        opt.apply(grads, variables)

    if traced:
        apply = tf.function(apply, autograph=False)
    # In a graph TensorFlow rounds Keras's own schedules, which are float32, otherwise than eagerly.
    rate_error = 2.0**-22 if traced and "sched" in entry else 0.0
    if entry["class"] == "Nadam" and entry["dtype"] == "float64":
        rate_error = 2.0**-21  # Keras rounds 0.96 to float32
    largest, travelled = [np.abs(p) for p in start], [np.zeros(p.shape) for p in start]
    largest_state = [np.abs(s) for s in values(opt.variables)]
    before, error = start, 0.0
    with np.errstate(all="ignore"):
        for t in range(entry["steps"]):
            none = file["none"][t]
            apply([None if none[i] else tf.constant(file[f"g_{i}"][t]) for i in range(n)])
            after = [file[f"p_{i}"][t] for i in range(n)]
            for i, got in enumerate(values(variables)):
                travelled[i] += np.abs(after[i].astype(float) - before[i])
                largest[i] = np.fmax(largest[i], np.abs(after[i]))
                slack = rate_error * travelled[i]
                error = max(error, scaled(got, after[i], largest[i], slack))
            before = after
            largest_state = [
                np.fmax(a, np.abs(s))
                for a, s in zip(largest_state, values(opt.variables), strict=True)
            ]
    assert error <= tolerance(entry)
    assert values(opt.variables)[0] == file["o_iteration"]
    by_name = {v.name: (v, m) for v, m in zip(opt.variables, largest_state, strict=True)}
    compared = 0
    for key in file.files:
        if key.startswith("s_"):
            _, i, name = key.split("_", 2)
            slot, most = by_name[f"p{i}_{name}"]
            slack = 0.0
            if name == "average":
                slack = rate_error * travelled[int(i)]
            elif rate_error:
                slack = rate_error * most
            limit = tolerance(entry) if name == "average" else state_tolerance(entry)
            assert scaled(values([slot])[0], file[key], most, slack) <= limit, key
            compared += 1
    for number, _ in opt._advanced():
        assert abs(number.numpy() / file["o_u_product"] - 1) <= 16 * np.finfo(entry["dtype"]).eps
        compared += 1
    assert compared == len(opt.variables) - 1 - isinstance(opt._learning_rate, keras.Variable)


@pytest.mark.parametrize("entry", SCHEDULES, ids=lambda e: Path(e["file"]).stem)
@pytest.mark.usefixtures("only_kernels")
def test_schedule(entry):
    """Keras's own schedules, as a step sees them: plain descent moves by the learning rate."""
    recorded = np.load(GOLDEN / entry["file"])["lr"]
    w = keras.Variable(np.zeros(1, np.float32))
    opt = OURS["SGD"](schedule(entry["class"].removeprefix("lr:"), entry["kwargs"]))
    rates = []
    for _ in range(entry["steps"]):
        w.assign(np.zeros(1, np.float32))
        opt.apply([tf.constant([-1.0])], [w])
        rates.append(values([w])[0][0])
    np.testing.assert_allclose(rates, recorded.ravel()[: len(rates)], rtol=3e-7)


def test_how_many_trajectories_were_replayed():
    left_out = [entry for entry in KERAS if entry not in REPLAYED + SCHEDULES]
    assert {entry["class"] for entry in left_out} <= {*BY_NAME}
    assert len(REPLAYED) == sum(BY_NAME[name].golden[1] for name in KERAS_CLASSES)
    assert (len(KERAS), len(SCHEDULES)) == (87, 7)
