"""fastopt.keras on TensorFlow: variables and state in bfloat16 and float16."""

import re

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from frameworks.keras_support import (
    OURS,
    THEIRS,
    each_loop,
    fit,
    make_grads,
    make_model,
    make_variables,
    only_kernels,  # noqa: F401
    stepper,
    train,
    values,
)
from tables import AROUND_KERAS_UPDATE, ROWS

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy keyword"  # Keras's own, of NumPy
    ),
    pytest.mark.filterwarnings("error::fastopt.FallbackWarning"),
    pytest.mark.usefixtures("only_kernels"),
]

OWN = [(row.keras_name, options) for row in ROWS for options in row.keras or ()]
OPTIONS = [
    (name, {"learning_rate": 0.01} | own | common)
    for name, own in OWN
    for common in ({}, {"weight_decay": 0.05})
]
each_option = pytest.mark.parametrize(
    ("name", "options"), OPTIONS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(OPTIONS)]
)
TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
each_dtype = pytest.mark.parametrize("dtype", TYPES)
each_policy = pytest.mark.parametrize("policy", TYPES)


@pytest.fixture
def dtype_policy():
    """Return what sets Keras's dtype policy, which is put back in the end."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


def equal(some, others):
    return all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(some, others, strict=True)
    )


def places(array):
    """Return an array's elements by their places among all numbers of its type, in order."""
    bits = np.int64(array.view(np.int16))
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


# ---- numbers -------------------------------------------------------------------------------------


@each_loop
@each_dtype
@each_option
def test_a_step_is_that_of_float32_rounded_once(name, options, dtype, loop):
    """Beside Keras's own optimizer of float32 variables, which every step begins with the same."""
    variables = make_variables([dtype])
    mine, peer = OURS[name](**options), THEIRS[name](**options)
    wide = [keras.Variable(v.value, dtype="float32") for v in variables]
    mine.build(variables)
    peer.build(wide)
    step = stepper(mine, variables, loop)
    compared = off = 0
    for i in range(6):
        for to, of in zip(wide + peer.variables, variables + mine.variables, strict=True):
            to.assign(keras.ops.cast(of, to.dtype))
        grads = make_grads(variables, i)
        step(grads)
        peer.apply([tf.cast(g, "float32") for g in grads], wide)
        after = values(variables + mine.variables), values(wide + peer.variables)
        for a, b in zip(*after, strict=True):
            if a.dtype == TYPES[dtype]:
                apart = np.abs(places(a) - places(b.astype(a.dtype)))
                assert apart.max() <= 1
                compared, off = compared + apart.size, off + np.count_nonzero(apart)
    assert compared >= 6 * sum(np.size(v) for v in values(variables))
    assert off <= compared / 100  # where float32's own last bits decide
    assert int(mine.iterations.value) == 6


@each_loop
def test_adam_trains_in_bfloat16(loop):
    """Keras's own does not: it has 1 for a beta_2 of 0.999, and a corrected learning rate of 0."""
    after = []
    for classes in OURS, THEIRS:
        w = keras.Variable(np.ones(4), dtype="bfloat16")
        step = stepper(classes["Adam"](0.125), [w], loop)
        for _ in range(4):
            step([tf.ones(4, "bfloat16")])
        after.append(np.float32(w.value.numpy()))
    np.testing.assert_allclose(after[0], 0.5, atol=0.01)
    assert (after[1] == 1).all()


@each_loop
def test_variables_of_all_types_in_one_step(loop):
    dtypes = ["bfloat16", "float32", "float16", "float64"]
    variables = make_variables(dtypes)
    optimizer = OURS["AdamW"](0.01)
    train(optimizer, variables, loop, range(5))
    assert {info["runs"] for info in optimizer.fastopt_info()} == {"fastopt"}
    for i, dtype in enumerate(dtypes):
        alone = [keras.Variable(v.value) for v in make_variables(dtypes)[i : i + 1]]
        opt = OURS["AdamW"](0.01)
        for k in range(5):
            opt.apply(make_grads(make_variables(dtypes), k)[i : i + 1], alone)
        assert keras.backend.standardize_dtype(variables[i].dtype) == dtype
        assert equal(values(variables[i : i + 1]), values(alone))


@each_loop
@each_dtype
def test_gradients_of_float32_are_rounded_to_the_variables_type_as_keras_does(dtype, loop):
    after = []
    for cast in "float32", dtype:
        variables = make_variables([dtype])
        step = stepper(OURS["SGD"](0.1, momentum=0.9), variables, loop)
        wide = make_variables(["float32"])
        for i in range(4):
            step([tf.cast(g, cast) for g in make_grads(wide, i)])
        after.append(values(variables))
    assert equal(*after)


@each_loop
@each_dtype
def test_a_scaled_loss_has_the_bits_of_an_unscaled_one_and_overflow_changes_nothing(dtype, loop):
    variables, peers = make_variables([dtype]), make_variables([dtype])
    scaled = keras.optimizers.LossScaleOptimizer(
        OURS["Adam"](0.01), initial_scale=4.0, dynamic_growth_steps=100
    )
    plain = OURS["Adam"](0.01)
    step, peer_step = stepper(scaled, variables, loop), stepper(plain, peers, loop)
    for i in range(8):
        grads = make_grads(variables, i)
        upscaled = [g * tf.cast(scaled.scale_loss(1.0), dtype) for g in grads]
        if i == 3:
            before = values(variables + scaled.inner_optimizer.variables)
            upscaled[1] *= tf.constant(np.inf, dtype)
            step(upscaled)
            assert equal(before, values(variables + scaled.inner_optimizer.variables))
            assert float(scaled.dynamic_scale.value) == 2
        else:
            step(upscaled)
            peer_step(grads)
    assert equal(values(variables), values(peers))
    assert equal(values(scaled.inner_optimizer.variables), values(plain.variables))


@each_loop
@each_dtype
@pytest.mark.parametrize(
    "option",
    AROUND_KERAS_UPDATE,
    ids=lambda option: next(iter(option)),
)
def test_the_rest_of_a_step_is_keras_own(option, dtype, loop):
    results = []
    for classes in OURS, THEIRS:
        variables = make_variables([dtype])
        optimizer = classes["SGD"](0.125, momentum=0.5, **option)
        train(optimizer, variables, loop, range(6))
        results.append(values(variables + optimizer.variables))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        if a.dtype.kind == "i":
            assert (a == b).all()
            continue
        # Keras rounds several times a step, to units in the last place of the largest value so far.
        atol = 2 * max(1.0, np.abs(np.float64(b)).max()) * float(ml_dtypes.finfo(a.dtype).eps)
        np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=0, atol=atol)


# ---- memory --------------------------------------------------------------------------------------


@each_loop
@each_dtype
@pytest.mark.parametrize("size", [100, 100_000])  # copied out of the step's buffer, and not
def test_no_tensor_that_was_read_changes(size, dtype, loop):
    w = keras.Variable(np.ones(size), dtype=dtype)
    optimizer = OURS["SGD"](0.125, momentum=0.5)
    step = stepper(optimizer, [w], loop)
    kept = []
    for i in range(8):
        tensors = [v.value.read_value() for v in (w, *(optimizer.momentums if i else ()))]
        kept += [(tensor, tensor.numpy().copy()) for tensor in tensors]
        step([tf.ones(size, dtype)])
    assert len({float(copy[0]) for _, copy in kept[::2]}) > 4
    for tensor, copy in kept:
        assert equal([tensor.numpy()], [copy])


@each_loop
def test_two_memories_take_turns(loop, monkeypatch):
    w = keras.Variable(np.ones(100_000), dtype="bfloat16")
    optimizer = OURS["Adam"](0.125)
    step = stepper(optimizer, [w], loop)
    places = []
    for _ in range(10):
        step([tf.ones(100_000, "bfloat16")])
        places.append(np.asarray(w.value.read_value()).ctypes.data)
    assert len(set(places[4:])) == 2


# ---- models --------------------------------------------------------------------------------------


@each_policy
@pytest.mark.parametrize("name", OURS)
def test_models_keep_keras_own_storage_and_learn(name, policy, dtype_policy):
    dtype_policy(policy)
    rate = 10.0 if name == "Adadelta" else 0.01  # whose steps begin at a thousandth of it
    models = [make_model(classes[name](rate)) for classes in (OURS, THEIRS)]
    for model in models:
        model.optimizer.build(model.trainable_variables)
    types = [
        [
            (re.sub(r"\d+$", "", v.name.split("_")[-1]), v.dtype, v.shape)
            for v in model.optimizer.variables
        ]
        for model in models
    ]
    assert types[0] == types[1]
    history = fit(models[0], epochs=20).history["loss"]
    assert history[-1] < 0.9 * history[0]
    assert {info["runs"] for info in models[0].optimizer.fastopt_info()} == {"fastopt"}
    assert {v.dtype for v in models[0].trainable_variables} == {policy}


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("eagerly", [False, True])
def test_mixed_policies_are_float32_for_the_kernels(policy, eagerly, dtype_policy):
    dtype_policy(policy)
    results = []
    for classes in OURS, THEIRS:
        model = make_model(classes["SGD"](0.01, momentum=0.9), run_eagerly=eagerly)
        fit(model)
        assert {v.dtype for v in model.trainable_variables} == {"float32"}
        results.append(values(model.trainable_variables))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)  # activations are of 16 bits


# ---- files ---------------------------------------------------------------------------------------


@each_policy
@pytest.mark.parametrize("name", OURS)
def test_training_goes_on_from_a_saved_model(name, policy, dtype_policy, tmp_path):
    dtype_policy(policy)
    model = make_model(OURS[name](0.01))
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is OURS[name]
    for some in model, loaded:
        fit(some)
    assert equal(values(model.weights), values(loaded.weights))
    assert equal(values(model.optimizer.variables), values(loaded.optimizer.variables))


@each_dtype
@pytest.mark.parametrize("name", OURS)
def test_checkpoints_cross(name, dtype):
    for first, second in (OURS, THEIRS), (THEIRS, OURS):
        variables = make_variables([dtype])
        optimizer = first[name](0.01)
        train(optimizer, variables, "eager", range(3))
        store = {}
        optimizer.save_own_variables(store)
        other = second[name](0.01)
        other.build(variables)
        other.load_own_variables(store)
        assert equal(values(optimizer.variables), values(other.variables))
