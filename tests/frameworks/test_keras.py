"""fastopt.keras on TensorFlow: everything that works on Keras's optimizers works on these."""

import contextlib
import doctest
import gc
import inspect
import io
import pickle
import re
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from frameworks.keras_support import (
    LOOPS,
    OURS,
    SHAPES,
    THEIRS,
    data,
    each_loop,
    fallbacks,
    fit,
    make_grads,
    make_model,
    make_variables,
    only_kernels,  # noqa: F401
    stepper,
    train,
    values,
)
from tables import AROUND_KERAS_UPDATE, BY_NAME, KERAS_CLASSES, ROWS

import fastopt.keras
from fastopt.keras import _optimizer, _tensorflow

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword"  # Keras's own, of NumPy
)

ROOT = Path(__file__).parent.parent.parent

# Classes with options of their own, and options that all of them have.
OWN = [(row.keras_name, options) for row in ROWS for options in row.keras or ()]
COMMON = [
    {},
    {"weight_decay": 0.05},
    *AROUND_KERAS_UPDATE,
]
OPTIONS = [
    (name, {"learning_rate": 0.01} | own | common)
    for name, own in OWN
    for common in COMMON
    if not (name == "AdamW" and "weight_decay" in common)
]
# Few enough for what is slow: each class's own, and what is common with one of them.
FEWER = [
    (name, options)
    for name, options in OPTIONS
    if (name == "Adam" and "amsgrad" not in options) or len(options) == 1 + len(dict(OWN)[name])
]
each_class = pytest.mark.parametrize("name", KERAS_CLASSES)
each_option = pytest.mark.parametrize(
    ("name", "options"), OPTIONS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(OPTIONS)]
)
each_of_fewer = pytest.mark.parametrize(
    ("name", "options"), FEWER, ids=[f"{name}-{i}" for i, (name, _) in enumerate(FEWER)]
)
falls_back = pytest.mark.filterwarnings("ignore::fastopt.FallbackWarning")


def in_own_words(variable):
    """Return the path without the optimizer, and without the number that Keras counts on."""
    return re.sub(r"^variable_\d+$", "variable", variable.path.split("/", 1)[-1])


def assert_close(ours, theirs, rtol=2e-5):
    for a, b in zip(values(ours), values(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=2e-6)


@pytest.fixture
def parents_updates(monkeypatch):
    """Return a list of the variables that Keras's own update updates."""
    seen = []

    def recorded(original):
        def update_step(self, gradient, variable, learning_rate):
            seen.append(variable.name)
            return original(self, gradient, variable, learning_rate)

        return update_step

    for cls in THEIRS.values():
        if "update_step" in vars(cls):
            monkeypatch.setattr(cls, "update_step", recorded(cls.update_step))
    return seen


# ---- the classes ---------------------------------------------------------------------------------


@each_class
def test_signature_defaults_and_config_are_keras_own(name):
    assert issubclass(OURS[name], THEIRS[name])
    ours, theirs = (inspect.signature(c[name]) for c in (OURS, THEIRS))
    *arguments, rest = ours.parameters.values()
    assert [*arguments[:-5], rest] == [*theirs.parameters.values()]
    options = {parameter.name: parameter.default for parameter in arguments[-5:]}
    assert {parameter.kind for parameter in arguments[-5:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert options == {
        "state_dtype": None,
        "master_weights": None,
        "stochastic_rounding": None,
        "seed": 0,
        "rows": None,
    }
    assert OURS[name](name="x").get_config() == THEIRS[name](name="x").get_config()


def test_adamw_is_an_adam():
    assert issubclass(fastopt.keras.AdamW, fastopt.keras.Adam)


@each_option
def test_config_round_trip(name, options):
    opt = OURS[name](**options)
    again = OURS[name].from_config(opt.get_config())
    assert type(again) is OURS[name]
    assert again.get_config() == opt.get_config()
    again = keras.optimizers.deserialize(keras.optimizers.serialize(opt))
    assert type(again) is OURS[name]
    assert type(pickle.loads(pickle.dumps(opt))) is OURS[name]


def test_what_else_keras_optimizers_has_is_here():
    for name in "schedules", "LossScaleOptimizer", "Optimizer", "serialize":
        assert getattr(fastopt.keras, name) is getattr(keras.optimizers, name)
    for name in vars(keras.optimizers):
        if not name.startswith("_"):  # all else is Keras's
            theirs = getattr(keras.optimizers, name)
            own = name in (*KERAS_CLASSES, "get", "deserialize")
            assert (getattr(fastopt.keras, name) is theirs) == (not own)
            assert name in fastopt.keras.__all__


@each_class
@pytest.mark.parametrize("case", [str, str.lower, str.upper])
def test_get_by_name(name, case):
    opt = fastopt.keras.get(case(name))
    assert type(opt) is OURS[name]
    assert opt.get_config() == OURS[name](name=opt.name).get_config()
    assert fastopt.keras.get(opt) is opt


@each_option
def test_get_and_deserialize_configurations(name, options):
    for classes in OURS, THEIRS:
        opt = classes[name](**options)
        for make in fastopt.keras.get, fastopt.keras.deserialize:
            config = fastopt.keras.serialize(opt)
            again = make(config)
            assert type(again) is OURS[name]
            assert again.get_config() == opt.get_config()
            assert type(make({"class_name": name, "config": opt.get_config()})) is OURS[name]


def test_get_and_deserialize_give_keras_own_where_fastopt_has_none():
    assert fastopt.keras.get(None) is None
    assert type(fastopt.keras.get("ftrl")) is keras.optimizers.Ftrl
    config = keras.optimizers.serialize(keras.optimizers.Ftrl(0.5))
    assert type(fastopt.keras.deserialize(config)) is keras.optimizers.Ftrl
    for wrong in "typo", {"class_name": "typo", "config": {}}, 3:
        with pytest.raises(ValueError, match="Could not interpret") as theirs:
            keras.optimizers.get(wrong)
        with pytest.raises(ValueError, match="Could not interpret") as ours:
            fastopt.keras.get(wrong)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("base", [OURS["Adam"], THEIRS["Adam"]])
def test_get_and_deserialize_give_somebody_elses_class_of_the_same_name(base):
    Own = type("Adam", (base,), {})
    config = keras.optimizers.serialize(Own(0.5))
    with keras.saving.custom_object_scope({keras.saving.get_registered_name(Own): Own}):
        assert type(fastopt.keras.get({**config})) is Own
    again = fastopt.keras.deserialize({**config}, {config["registered_name"]: Own})
    assert type(again) is Own


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 2.0}),
        ("SGD", {"learning_rate": 1}),
        ("Adam", {"learning_rate": None}),
        ("Adam", {"typo": 1}),
        ("AdamW", {"weight_decay": None}),
        ("RMSprop", {"clipnorm": 1.0, "clipvalue": 1.0}),
        ("Adagrad", {"gradient_accumulation_steps": 1}),
        ("Adam", {"use_ema": True, "ema_momentum": 2.0}),
    ],
)
def test_constructors_errors_are_keras_own(name, options):
    with pytest.raises(Exception) as theirs:
        THEIRS[name](**options)
    with pytest.raises(theirs.type) as ours:
        OURS[name](**options)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda opt, v: opt.apply([None, None], v),
        lambda opt, v: opt.apply([tf.zeros((2, 3))] * 2, v),  # of a wrong shape
        lambda opt, v: opt.apply([tf.zeros((2, 2))] * 2),  # not built
        lambda opt, v: (opt.build(v), opt.apply([tf.zeros((2, 2))])),
        lambda opt, v: (opt.build(v[:1]), opt.apply([tf.zeros((2, 2))] * 2, v)),
        lambda opt, v: opt.set_weights([]),
    ],
)
@pytest.mark.parametrize("name", [n for n in KERAS_CLASSES if n != "AdamW"])  # it decays first
def test_errors_are_keras_own_and_change_nothing(name, wrong):
    messages = []
    for classes in THEIRS, OURS:
        variables = [keras.Variable(np.ones((2, 2), np.float32), name="w") for _ in range(2)]
        opt = classes[name]()
        with pytest.raises(Exception) as raised:
            wrong(opt, variables)
        messages.append((raised.type, str(raised.value).split(" on a tensor")[0]))
        assert all((v == 1).all() for v in values(variables))
    assert messages[0] == messages[1]


# ---- numbers -------------------------------------------------------------------------------------


def run_both(name, options, loop):
    # Keras's own norm of all gradients needs them to be of one dtype.
    dtypes = ("float32",) if "global_clipnorm" in options else ("float32", "float64")
    ours, theirs = make_variables(dtypes), make_variables(dtypes)
    mine, peer = OURS[name](**options), THEIRS[name](**options)
    train(mine, ours, loop, range(7))
    train(peer, theirs, "eager", range(7))
    slots, peers_slots = ([in_own_words(v) for v in o.variables] for o in (mine, peer))
    assert slots == peers_slots
    assert_close(ours, theirs)
    assert_close(mine.variables, peer.variables)


@each_option
@pytest.mark.usefixtures("only_kernels")
def test_same_numbers_as_keras_eagerly(name, options):
    run_both(name, options, "eager")


@each_of_fewer
@pytest.mark.usefixtures("only_kernels")
def test_same_numbers_as_keras_in_traced_functions(name, options):
    run_both(name, options, "traced")


@each_loop
@each_class
@pytest.mark.usefixtures("only_kernels")
def test_empty_variables(name, loop):
    variables = make_variables(shapes=[(0, 3), (4,), (0,)])
    before = values(variables)
    train(OURS[name](), variables, loop, range(5))
    assert [v.shape for v in values(variables)] == [(0, 3), (4,), (0,)]
    assert (values(variables)[1] != before[1]).all()


@each_loop
def test_gradients_of_none(loop):
    results = []
    for classes in OURS, THEIRS:
        variables = make_variables(["float32"])
        opt = classes["Adam"](0.01, weight_decay=0.1)
        step = stepper(opt, variables, loop)
        for i in range(12):
            grads = make_grads(variables, i)
            for j in range(len(grads)):
                if (i + j) % 3 == 0:
                    grads[j] = None
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Gradients do not exist")
                step(grads)
        results.append(variables)
    assert_close(*results)


def test_steps_of_ever_other_variables_keep_only_the_latest_memory():
    variables = make_variables()
    opt = OURS["Adam"]()
    for i in range(12):
        grads = make_grads(variables, i)
        grads[i % 4] = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Gradients do not exist")
            opt.apply(grads, variables)
    gc.collect()
    assert len(opt._updates._by_key) == 1


@each_loop
@pytest.mark.parametrize("built", ["anew", "by its next step"])
@pytest.mark.usefixtures("only_kernels")
def test_an_optimizer_that_is_built_for_other_variables_trains_these(loop, built):
    results = []
    for classes in OURS, THEIRS:
        opt, trained = classes["Adam"](0.01), []
        for fold in range(3):
            variables = make_variables(["float32"])  # with the names and shapes of the last ones
            opt.built = False
            if built == "anew":
                opt.build(variables)
            step = stepper(opt, variables, loop)
            for i in range(4):  # past the first steps, which are done another way
                step(make_grads(variables, 10 * fold + i))
            trained += variables
        results.append(trained)
    assert_close(*results)


@each_loop
@pytest.mark.usefixtures("only_kernels")
def test_a_slot_variable_that_was_replaced_is_left_alone(loop):
    results = []
    for classes in OURS, THEIRS:
        variables = make_variables(["float32"])
        opt = classes["SGD"](0.1, momentum=0.9)
        train(opt, variables, loop, range(4))
        old = opt.momentums[1]
        opt.momentums[1] = keras.Variable(np.zeros_like(old), name=old.name)
        train(opt, variables, loop, range(4, 6))
        results.append([*variables, old, *opt.momentums])
    assert_close(*results)


@falls_back
@each_loop
def test_a_slot_of_another_dtype_runs_keras_own_update(loop, parents_updates):
    results = []
    for classes in THEIRS, OURS:
        parents_updates.clear()
        variables = make_variables(["float32"])
        opt = classes["SGD"](0.1, momentum=0.9, weight_decay=0.1)
        opt.build(variables)
        opt.momentums[1] = keras.Variable(np.zeros(5), dtype="float64", name="wide")
        train(opt, variables, loop, range(5))
        results.append([*variables, *opt.momentums])
    assert set(parents_updates) == {v.value.name for v in variables}
    assert_close(*results)


def test_a_traced_function_goes_on_without_its_optimizer():
    variables = make_variables(["float32"])
    grads = make_grads(variables, 0)

    def traced():
        opt = OURS["Adam"]()
        opt.build(variables)
        step = tf.function(lambda: opt.apply(grads, variables), autograph=False)
        return step.get_concrete_function()

    step = traced()
    gc.collect()
    before = values(variables)
    step()
    assert all((a != b).all() for a, b in zip(before, values(variables), strict=True))


def test_memory_lives_as_long_as_the_traced_functions_that_use_it():
    variables = make_variables(["float32"])
    opt = OURS["Adam"]()
    opt.build(variables)
    grads = make_grads(variables, 0)

    @tf.function
    def some_steps(n, first):
        for _ in tf.range(n):  # loops and branches have graphs of their own
            if first:
                opt.apply(grads[:2], variables[:2])
            else:
                opt.apply(grads[1:], variables[1:])

    for i in range(3):
        some_steps(tf.constant(2), tf.constant(i > 0))
    opt.apply(grads, variables)
    gc.collect()
    assert len(opt._updates._by_key) == 3
    assert int(opt.iterations.value) == 7
    del some_steps
    gc.collect()
    assert len(opt._updates._by_key) == 1


def test_gradients_of_another_dtype_are_cast():
    results = []
    for classes in OURS, THEIRS:
        variables = make_variables()
        opt = classes["SGD"](0.1)
        for i in range(4):
            opt.apply([tf.cast(g, "float16") for g in make_grads(variables, i)], variables)
        results.append(variables)
    assert_close(*results)


@pytest.mark.usefixtures("only_kernels")
def test_gradients_may_be_numpy_arrays():
    results = []
    for classes in OURS, THEIRS:
        variables = make_variables()
        opt = classes["SGD"](0.1)
        for i in range(4):
            opt.apply([g.numpy() for g in make_grads(variables, i)], variables)
        results.append(variables)
    assert_close(*results)


@each_loop
@pytest.mark.usefixtures("only_kernels")
def test_exclude_from_weight_decay(loop):
    results = []
    for classes in OURS, THEIRS:
        variables = make_variables(["float32"])
        opt = classes["AdamW"](0.01, weight_decay=0.5)
        opt.exclude_from_weight_decay(var_list=variables[:1], var_names=["v2"])
        train(opt, variables, loop, range(5))
        results.append(variables)
    assert_close(*results)


@each_class
def test_hyperparameters_may_change_between_eager_steps(name):
    results = []
    for classes in OURS, THEIRS:
        variables = make_variables(["float32"])
        opt = classes[name](0.01, weight_decay=0.1)
        train(opt, variables, "eager", range(4))
        opt.learning_rate = 0.1
        opt.weight_decay = 0.2
        if "eps" in BY_NAME[name].hypers:
            opt.epsilon = 0.1
        train(opt, variables, "eager", range(4, 8))
        results.append(variables)
    assert_close(*results)


def test_negative_momentum_of_rmsprop_counts_as_zero():
    results = []
    for classes in OURS, THEIRS:
        variables = make_variables(["float32"])
        train(classes["RMSprop"](0.01, momentum=-0.5), variables, "eager", range(4))
        results.append(variables)
    assert_close(*results)


@pytest.mark.parametrize("rate", ["callable", "schedule"])
@each_loop
def test_learning_rates(loop, rate):
    results = []
    for classes in OURS, THEIRS:
        lr = (lambda: 0.05) if rate == "callable" else None
        lr = lr or keras.optimizers.schedules.PiecewiseConstantDecay([2, 4], [0.1, 0.01, 0.001])
        variables = make_variables(["float32"])
        train(classes["SGD"](lr, momentum=0.9), variables, loop, range(7))
        results.append(variables)
    assert_close(*results)


# ---- tensors that were read earlier --------------------------------------------------------------


@each_loop
@each_class
@pytest.mark.usefixtures("only_kernels")
def test_no_tensor_that_was_read_changes(name, loop):
    options = {"momentum": 0.9} if "momentum" in BY_NAME[name].hypers else {}
    variables = make_variables()
    opt = OURS[name](**options, use_ema=True)
    step = stepper(opt, variables, loop)
    step(make_grads(variables, 0))
    read = []
    for i in range(1, 8):
        for v in variables + opt.variables:
            tensor = v.value.read_value()
            read.append((tensor, np.asarray(tensor), tensor.numpy(), tf.identity(tensor)))
        step(make_grads(variables, i))
    assert all(
        (now == then).all() and (view == then).all() and (same.numpy() == then).all()
        for now, view, then, same in ((t.numpy(), view, then, same) for t, view, then, same in read)
    )
    assert len({then.tobytes() for _, _, then, _ in read}) > 7 * len(variables)


@each_loop
def test_activations_saved_by_a_tape_stay(loop):
    w = keras.Variable(np.arange(16, dtype=np.float32) + 1)
    opt = OURS["SGD"](1.0)
    step = stepper(opt, [w], loop)
    for _ in range(5):  # past the first steps, which do it another way
        step([tf.zeros(16)])
    before = w.value.numpy()
    with tf.GradientTape(persistent=True) as tape:
        loss = tf.reduce_sum(w.value**2)  # its gradient needs w as it is here
        step([tf.ones(16)])  # within the tape, for once
        step([tf.ones(16)])
    np.testing.assert_array_equal(tape.gradient(loss, w.value), 2 * before)
    np.testing.assert_array_equal(w.value.numpy(), before - 2)


@each_loop
def test_what_others_assign_is_where_the_next_step_begins(loop):
    w = keras.Variable(np.zeros(16, np.float32))
    opt = OURS["SGD"](0.5, momentum=0.5)
    opt.build([w])
    step = stepper(opt, [w], loop)
    for i in range(6):
        w.assign(np.full(16, i, np.float32))
        opt.momentums[0].assign(np.full(16, 10.0 * i, np.float32))
        step([tf.ones(16)])
        assert (opt.momentums[0].value.numpy() == 5.0 * i - 0.5).all()
        assert (w.value.numpy() == 6.0 * i - 0.5).all()


@each_loop
@pytest.mark.parametrize("shape", [(256, 64), (10001,)])
def test_two_memories_take_turns_unless_tensors_are_kept(loop, shape, monkeypatch):
    made = []
    init = _tensorflow._Memory.__init__

    def counting(self, *args):
        made.append(self)
        init(self, *args)

    monkeypatch.setattr(_tensorflow._Memory, "__init__", counting)
    variables = make_variables(["float32"], [shape] * 3 + [(64,)])
    opt = OURS["Adam"]()
    step = stepper(opt, variables, loop)
    for i in range(10):
        step(make_grads(variables, i))
    kept = []
    for i in range(10):
        step(make_grads(variables, i))
        kept.append([variables[-1].value.read_value()])  # a small one does not hold the others
    assert len(made) <= 2
    for i in range(10):
        kept.append([v.value.read_value() for v in variables[:-1]])
        step(make_grads(variables, i))
    assert len({view.numpy().tobytes() for reads in kept for view in reads}) == 40
    if shape == (256, 64):  # else TensorFlow makes copies
        assert len(made) >= 10


# ---- what Keras's own update does ----------------------------------------------------------------


@falls_back
@each_loop
def test_other_dtypes_run_keras_own_update(loop, parents_updates):
    results = []
    for classes in THEIRS, OURS:
        parents_updates.clear()
        variables = make_variables(["complex64", "float32"], SHAPES[:4])
        train(classes["AdamW"](0.1), variables, loop, range(4))
        results.append(variables)
    assert set(parents_updates) == {variables[i].value.name for i in (0, 2)}
    assert_close(*results)


@falls_back
def test_a_scalar_gradient_is_broadcast_as_keras_does(parents_updates):
    results = []
    for classes in THEIRS, OURS:
        parents_updates.clear()
        w = keras.Variable(np.ones((2, 3), np.float32))
        opt = classes["Adam"]()
        opt.apply([tf.constant(2.0)], [w])
        results.append([w])
    assert len(parents_updates) == 1
    assert_close(*results)


@falls_back
@each_loop
def test_a_variable_whose_shape_may_change_runs_keras_own_update(loop, parents_updates):
    results = []
    for classes in THEIRS, OURS:
        parents_updates.clear()
        w = tf.Variable([1.0, 2.0], shape=tf.TensorShape([None]))
        step = stepper(classes["SGD"](0.1), [w], loop)
        for size in 2, 2, 2, 3:
            w.assign(np.ones(size))
            step([tf.ones(size)])
        results.append([keras.Variable(w.numpy())])
    assert len(parents_updates) == 4 if loop == "eager" else parents_updates
    assert values(results[0])[0].shape == (3,)
    assert_close(*results)


@pytest.mark.usefixtures("only_kernels")
def test_a_gradient_whose_shape_a_graph_does_not_know_is_broadcast_as_keras_does():
    results = []
    for classes in THEIRS, OURS:
        variables = make_variables(["float32"], [(2, 3), (3,)])
        opt = classes["SGD"](0.1, momentum=0.9)
        apply = stepper(opt, variables, "eager")
        step = tf.function(
            lambda grad, apply=apply: apply([grad, tf.ones(3)]),
            input_signature=[tf.TensorSpec(None)],
            autograph=False,
        )
        opt.build(variables)
        step(tf.ones((2, 3)))
        for grad in tf.constant(2.0), tf.ones(3), tf.ones((2, 1)):
            step(grad)
        results.append(variables)
    assert_close(*results)


@falls_back
def test_a_subclass_with_an_update_of_its_own_keeps_it():
    class Signed(fastopt.keras.SGD):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(tf.sign(gradient), variable, learning_rate)

    w = keras.Variable(np.zeros(3, np.float32))
    Signed(1.0).apply([tf.constant([5.0, -5.0, 0.0])], [w])
    np.testing.assert_array_equal(w.value.numpy(), [-1, 1, 0])


@falls_back
def test_a_variable_given_twice_is_updated_twice():
    results = []
    for classes in THEIRS, OURS:
        w = keras.Variable(np.zeros(3, np.float32))
        classes["SGD"](1.0).apply([tf.ones(3), tf.ones(3)], [w, w])
        results.append([w])
    assert_close(*results)
    assert (values(results[1])[0] == -2).all()


@falls_back
def test_hyperparameters_that_are_tensors_run_keras_own_update(parents_updates):
    w = keras.Variable(np.zeros(3, np.float32))
    OURS["Adam"](beta_1=tf.constant(0.9)).apply([tf.ones(3)], [w])
    assert len(parents_updates) == 1


@falls_back
@pytest.mark.parametrize(
    "strategy", [lambda: tf.distribute.MirroredStrategy(["CPU:0"]), tf.distribute.OneDeviceStrategy]
)
def test_distribution_strategies_run_keras_own_update(strategy, parents_updates):
    strategy = strategy("CPU:0") if isinstance(strategy, type) else strategy()
    results = []
    for classes in THEIRS, OURS:
        parents_updates.clear()
        with strategy.scope():
            model = make_model(classes["Adam"]())
            fit(model)
        results.append([keras.Variable(v.numpy()) for v in model.weights[:2]])
    assert parents_updates
    assert_close(*results)


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [{"run_eagerly": True}, {}, {"steps_per_execution": 3}])
@each_class
@pytest.mark.usefixtures("only_kernels")
def test_fit(name, compiled):
    results, losses = [], []
    for classes in OURS, THEIRS:
        model = make_model(classes[name](0.01), **compiled)
        losses.append(fit(model, epochs=3).history["loss"])
        results.append(model.weights)
    assert_close(*results, rtol=1e-4)
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.usefixtures("only_kernels")
def test_fit_as_keras_compiles_by_default_on_a_cpu():
    model = make_model(OURS["Adam"](), jit_compile="auto")
    assert not model.jit_compile
    fit(model)


def test_xla_runs_keras_own_update_and_warns_once(parents_updates):
    results = []
    for classes in THEIRS, OURS:
        parents_updates.clear()
        with fallbacks() as found:
            model = make_model(classes["AdamW"](0.01), jit_compile=True)
            fit(model)
            x, y = data(16)
            model.train_on_batch(x, y)
            model.make_train_function(force=True)
            fit(model)  # traced anew
        assert len(found) == (classes is OURS)
        results.append(model.weights)
    assert str(found[0]).startswith("fastopt.keras.AdamW: ")
    assert "jit_compile=False" in str(found[0])
    assert set(parents_updates) == {v.value.name for v in model.trainable_variables}
    assert_close(*results, rtol=1e-4)


def test_from_xla_to_kernels_and_back(parents_updates):
    results = []
    for classes in THEIRS, OURS:
        model = make_model(classes["Adam"](0.01), jit_compile=True)
        for jit in True, False, True:
            model.jit_compile = jit
            model.make_train_function(force=True)
            parents_updates.clear()
            with fallbacks("ignore"):
                fit(model)
            assert bool(parents_updates) == (jit or classes is THEIRS)
            if classes is OURS:
                infos = model.optimizer.fastopt_info()
                assert {info["runs"] for info in infos} == {"keras" if jit else "fastopt"}
        results.append(model.weights)
    assert_close(*results, rtol=1e-4)


def test_a_custom_loop_as_in_the_tutorials():
    results = []
    for classes in OURS, THEIRS:
        model = make_model(None)
        opt = classes["RMSprop"](0.01, momentum=0.5)
        x, y = data()
        for _ in range(5):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            grads = tape.gradient(loss, model.trainable_variables)
            opt.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        results.append(model.weights)
    assert_close(*results, rtol=1e-4)


def test_layers_that_are_not_trained():
    results = []
    for classes in OURS, THEIRS:
        model = make_model(classes["Adam"](0.01))
        model.layers[0].trainable = False
        frozen = values(model.layers[0].weights)
        fit(model)
        assert all(
            (a == b).all() for a, b in zip(frozen, values(model.layers[0].weights), strict=True)
        )
        results.append(model.weights)
    assert_close(*results, rtol=1e-4)


def test_callbacks():
    results = []
    for classes in OURS, THEIRS:
        model = make_model(classes["SGD"](0.05, momentum=0.9))
        seen = fit(
            model,
            epochs=5,
            callbacks=[
                keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr * 0.5),
                keras.callbacks.ReduceLROnPlateau("loss", factor=0.1, patience=1, min_delta=10),
                keras.callbacks.TerminateOnNaN(),
            ],
        )
        results.append((model.weights, seen.history["learning_rate"]))
    assert_close(results[0][0], results[1][0], rtol=1e-4)
    assert results[0][1] == results[1][1]
    assert len(set(results[0][1])) == 5


def test_swapped_averages():
    results = []
    for classes in OURS, THEIRS:
        model = make_model(classes["Adam"](0.01, use_ema=True, ema_momentum=0.9))
        fit(model, callbacks=[keras.callbacks.SwapEMAWeights()])
        results.append(model.weights)
    assert_close(*results, rtol=1e-4)


@each_loop
@pytest.mark.usefixtures("only_kernels")
def test_loss_scale_optimizer(loop):
    results = []
    for classes in OURS, THEIRS:
        variables = make_variables(["float32"])
        opt = keras.optimizers.LossScaleOptimizer(
            classes["Adam"](0.01), initial_scale=4.0, dynamic_growth_steps=2
        )
        step = stepper(opt, variables, loop)
        for i in range(9):
            grads = [g * opt.scale_loss(1.0) for g in make_grads(variables, i)]
            if i % 4 == 3:
                grads[0] = grads[0] * np.inf
            step(grads)
        results.append(variables + opt.variables)
    assert_close(*results)


@pytest.mark.usefixtures("only_kernels")
def test_mixed_precision():
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_float16")
        results = []
        for classes in OURS, THEIRS:
            model = make_model(classes["Adam"](0.01))
            assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
            fit(model)
            results.append(model.weights)
    finally:
        keras.config.set_dtype_policy(policy)
    assert_close(*results, rtol=2e-3)


# ---- checkpoints ---------------------------------------------------------------------------------


@each_option
def test_checkpoints_cross_in_mid_training(name, options):
    dtypes = ("float32",) if "global_clipnorm" in options else ("float32", "float64")
    for first, second in (OURS, THEIRS), (THEIRS, OURS):
        variables = make_variables(dtypes)
        opt = first[name](**options)
        train(opt, variables, "eager", range(5))
        store, moved = (
            {},
            [keras.Variable(v.value.numpy(), dtype=v.dtype, name=v.name) for v in variables],
        )
        opt.save_own_variables(store)
        other = second[name](**options)
        other.build(moved)
        other.load_own_variables(store)
        assert all(
            (a == b).all()
            for a, b in zip(values(opt.variables), values(other.variables), strict=True)
        )
        train(opt, variables, "eager", range(5, 10))
        train(other, moved, "eager", range(5, 10))
        assert_close(moved, variables)
        assert_close(other.variables, opt.variables)


@each_class
def test_saved_models(name, tmp_path):
    model = make_model(OURS[name](0.01))
    fit(model)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "some.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is OURS[name]
    assert_close(loaded.optimizer.variables, model.optimizer.variables, rtol=0)
    peer = make_model(THEIRS[name](0.01))
    peer.optimizer.build(peer.trainable_variables)
    peer.load_weights(tmp_path / "some.weights.h5")
    assert_close(peer.optimizer.variables, model.optimizer.variables, rtol=0)
    for each in model, loaded, peer:
        each.jit_compile = False
        fit(each)
    assert_close(loaded.weights, model.weights)
    assert_close(peer.weights, model.weights, rtol=1e-4)


@each_class
def test_tensorflows_checkpoints(name, tmp_path):
    model = make_model(OURS[name](0.01))
    fit(model)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "c")
    saved = values(model.weights + model.optimizer.variables)
    fit(model)
    peer = make_model(THEIRS[name](0.01))
    peer.optimizer.build(peer.trainable_variables)
    for each in model, peer:
        tf.train.Checkpoint(model=each, optimizer=each.optimizer).restore(path).assert_consumed()
        now = values(each.weights + each.optimizer.variables)
        assert all((a == b).all() for a, b in zip(saved, now, strict=True))


# ---- documentation ------------------------------------------------------------------------------


@pytest.mark.usefixtures("only_kernels")
def test_docstring_examples():
    assert doctest.testmod(fastopt.keras) == (0, 6 * len(KERAS_CLASSES) + 5 + 2)
    assert doctest.testmod(_optimizer) == (0, 7 + 6)


def test_the_page_of_the_documentation():
    text = (ROOT / "docs" / "keras.md").read_text()
    namespace = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(code, namespace)
    assert type(namespace["model"].optimizer) is fastopt.keras.Adam
    assert re.fullmatch(
        r"0 (sequential\w*/dense\w*)/kernel fastopt None\n1 \1/bias fastopt None\n",
        printed.getvalue(),
    )


def test_the_example_agrees_with_keras():
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "tensorflow_optimizers.py", "--check", "--epochs=3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Epoch [3/3]") == 5


# ---- odds and ends -------------------------------------------------------------------------------


def test_functions_run_eagerly():
    tf.config.run_functions_eagerly(True)
    try:
        ours, theirs = make_variables(["float32"]), make_variables(["float32"])
        train(OURS["Adam"](), ours, "traced", range(6))
        train(THEIRS["Adam"](), theirs, "traced", range(6))
    finally:
        tf.config.run_functions_eagerly(False)
    assert_close(ours, theirs)


def test_an_optimizer_is_collected_with_its_memory():
    made = []
    for loop in LOOPS:
        opt, variables = OURS["Adam"](), make_variables()
        train(opt, variables, loop, range(5))
        made.append(weakref.ref(opt._updates._latest))
    assert [type(ref()).__name__ for ref in made] == ["NoneType", "_Update"]
    del opt, variables
    gc.collect()
    assert [ref() for ref in made] == [None, None]


def test_how_many_option_sets():
    assert len(OPTIONS) == len(OWN) * len(COMMON) - 2  # AdamW has a decay in any case
    assert len(FEWER) >= 20
