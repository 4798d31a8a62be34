"""fastopt.keras on TensorFlow: what it tells where Keras's own update runs."""

import contextlib
import pickle
import re
import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from frameworks.keras_support import (
    LOOPS,
    OURS,
    SHAPES,
    THEIRS,
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

from fastopt import FallbackWarning
from fastopt.keras import _tensorflow

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword"  # Keras's own, of NumPy
)


# ---- cases ---------------------------------------------------------------------------------------


class Case:
    """An optimizer whose steps leave some variables to Keras's own update."""

    why: str
    by_keras = (0,)
    warns = True

    def __init__(self, classes):
        self.variables = make_variables(["float32"], [(4, 5), (5,)])
        self.prepare(classes)
        if not self.optimizer.built:
            self.optimizer.build(self.variables)

    def prepare(self, classes):
        self.optimizer = classes["Adam"](0.1)

    def gradients(self, step):
        return make_grads(self.variables, step)

    def state(self):
        return [v.numpy() for v in self.variables + self.optimizer.variables]


class OfAnotherDtype(Case):
    why = "its dtype is complex64"

    def prepare(self, classes):
        self.variables = make_variables(["complex64", "float32"], [(4, 5), (5,)])
        self.optimizer = classes["AdamW"](0.1)


class FewOfAnotherDtype(Case):
    by_keras, why, warns = (1,), "its dtype is complex64", False
    size = 5

    def prepare(self, classes):
        self.variables = make_variables(["float32", "complex64"], [(4, 5), (self.size,)])
        self.optimizer = classes["SGD"](0.1)


class HalfOfAnotherDtype(FewOfAnotherDtype):
    size = 20


class MoreThanHalfOfAnotherDtype(FewOfAnotherDtype):
    size, warns = 21, True


class Broadcast(Case):
    why = "its gradient has another shape"

    def gradients(self, step):
        return [tf.constant(2.0), *super().gradients(step)[1:]]


class OfChangingShape(Case):
    why = "its shape may change"

    def prepare(self, classes):
        some = tf.Variable(np.ones(20, np.float32), shape=tf.TensorShape([None]), name="some")
        self.variables = [some, tf.Variable(np.ones(5, np.float32))]
        self.optimizer = classes["SGD"](0.1)

    def gradients(self, step):
        return make_grads([tf.zeros(20), tf.zeros(5)], step)


class OfTensors(Case):
    by_keras, why = (0, 1), "beta_1 is of type EagerTensor"

    def prepare(self, classes):
        self.optimizer = classes["Adam"](0.1, beta_1=tf.constant(0.9))


class OfItsOwn(Case):
    by_keras, why = (0, 1), "Doubled has an update_step of its own"

    def prepare(self, classes):
        class Doubled(classes["SGD"]):
            def update_step(self, gradient, variable, learning_rate):
                super().update_step(2 * gradient, variable, learning_rate)

        self.optimizer = Doubled(0.1)


class Twice(Case):
    why = "a variable is given twice in the step"

    def prepare(self, classes):
        self.optimizer = classes["RMSprop"](0.1)
        self.optimizer.build(self.variables[:1])
        self.variables = self.variables[:1] * 2


class Refused(Case):
    by_keras, why = (0, 1), "the kernels refuse: "
    others = ()

    def prepare(self, classes):
        self.variables += self.others
        self.optimizer = classes["SGD"](0.1, momentum=0.9)
        self.optimizer.build(self.variables)
        self.optimizer.momentums[1] = keras.Variable(np.zeros(5), dtype="float64", name="wide")


class RefusedBesideAnother(Refused):
    by_keras = (0, 1, 2)

    def prepare(self, classes):
        self.others = make_variables(["complex64"], [(2, 2)])
        super().prepare(classes)


CASES = (
    OfAnotherDtype,
    FewOfAnotherDtype,
    HalfOfAnotherDtype,
    MoreThanHalfOfAnotherDtype,
    Broadcast,
    OfChangingShape,
    OfTensors,
    OfItsOwn,
    Twice,
    Refused,
    RefusedBesideAnother,
)


def equal(some, others):
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def assert_close(some, others):
    for a, b in zip(some, others, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def runs(optimizer):
    return [info["runs"] for info in optimizer.fastopt_info()]


# ---- each case -----------------------------------------------------------------------------------


@each_loop
@pytest.mark.parametrize("case", CASES)
def test_what_keras_updates_is_told_and_warned_of_once(case, loop):
    mine, peer = case(OURS), case(THEIRS)
    with fallbacks() as found:
        for steps in range(3), range(3, 5):  # the second time it is traced anew
            step = stepper(mine.optimizer, mine.variables, loop)
            for i in steps:
                step(mine.gradients(i))
    assert len(found) == case.warns
    for warning in found:
        assert re.match(r"fastopt\.keras\.(SGD|RMSprop|Adam|AdamW): ", str(warning))
        assert case.why in str(warning)
        assert "fastopt's kernels run" in str(warning)
        assert "keras.optimizers." in str(warning)
    infos = mine.optimizer.fastopt_info()
    assert len(infos) == len(set(map(id, mine.variables)))
    for index, info in enumerate(infos):
        variable = mine.variables[index]
        assert (info["index"], info["name"]) == (index, getattr(variable, "path", variable.name))
        assert info["runs"] == ("keras" if index in case.by_keras else "fastopt")
        if index == 2:  # beside those that are refused
            assert info["why"] == "its dtype is complex64"
        elif index in case.by_keras:
            assert case.why in info["why"]
        else:
            assert info["why"] is None
    step = stepper(peer.optimizer, peer.variables, loop)
    for i in range(5):
        step(peer.gradients(i))
    assert_close(mine.state(), peer.state())
    assert equal(
        [mine.variables[i].numpy() for i in case.by_keras],
        [peer.variables[i].numpy() for i in case.by_keras],
    )


@pytest.mark.parametrize("loop", [*LOOPS, "converted"])
@pytest.mark.parametrize("case", [case for case in CASES if case.warns])
def test_as_an_error_the_warning_comes_before_anything_is_written(case, loop):
    mine, peer = case(OURS), case(THEIRS)
    before, told = mine.state(), mine.optimizer.fastopt_info()
    step = stepper(mine.optimizer, mine.variables, loop)
    if loop == "converted":  # by AutoGraph, which has errors of its own
        step = tf.function(stepper(mine.optimizer, mine.variables, "eager"))
    with fallbacks("error"):
        for _ in range(2):  # so it does when the step is tried again
            with pytest.raises(FallbackWarning, match=r"^fastopt\.keras\."):
                step(mine.gradients(0))
            assert equal(before, mine.state())
            assert mine.optimizer.fastopt_info() == told
    with fallbacks("ignore"):
        step(mine.gradients(0))
    stepper(peer.optimizer, peer.variables, "eager")(peer.gradients(0))
    assert_close(mine.state(), peer.state())


@pytest.mark.parametrize("loop", [*LOOPS, "compiled"])
def test_as_an_error_the_warning_stops_fit_before_the_first_update(loop):
    class Own(OURS["SGD"]):
        def update_step(self, *args):
            super().update_step(*args)

    optimizer = OURS["SGD"] if loop == "compiled" else Own
    model = make_model(
        optimizer(0.1, momentum=0.9), jit_compile=loop == "compiled", run_eagerly=loop == "eager"
    )
    before = values(model.trainable_variables)
    with fallbacks("error"), pytest.raises(FallbackWarning, match=r"^fastopt\.keras\.SGD: "):
        fit(model)
    assert equal(before, values(model.trainable_variables))
    assert all((v == 0).all() for v in values(model.optimizer.momentums))
    assert model.optimizer.iterations.value.numpy() == 0


# ---- what is told when ---------------------------------------------------------------------------


@pytest.mark.parametrize("under_strategy", [False, True])
def test_fastopt_info_before_the_first_step_and_after(under_strategy):
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope() if under_strategy else contextlib.nullcontext():
        model = make_model(OURS["Adam"]())
        optimizer = model.optimizer
        assert optimizer.fastopt_info() == []
        optimizer.build(model.trainable_variables)
        before = optimizer.fastopt_info()
        with fallbacks() as found:
            fit(model)
    assert len(found) == under_strategy
    for infos in before, optimizer.fastopt_info():
        assert [info["name"] for info in infos] == [v.path for v in model.trainable_variables]
        assert [info["index"] for info in infos] == list(range(6))
        assert {(info["runs"], info["why"]) for info in infos} == {
            ("keras", "the step runs under OneDeviceStrategy")
            if under_strategy
            else ("fastopt", None)
        }


def test_fastopt_info_of_an_optimizer_that_is_built_anew():
    optimizer = OURS["Adam"]()
    with fallbacks("ignore"):
        optimizer.apply([tf.ones(()), tf.ones(5)], make_variables(["float32"], [(5,), (5,)]))
    assert runs(optimizer) == ["keras", "fastopt"]
    optimizer.build(make_variables(["float32"], [(5,)]))  # which does nothing, as in Keras
    assert runs(optimizer) == ["keras", "fastopt"]
    optimizer.built = False
    optimizer.build(make_variables(["float32", "complex64"], [(5,), (5,)]))
    assert runs(optimizer) == ["fastopt", "keras"]


def test_fastopt_info_is_about_the_latest_step_in_which_a_variable_had_a_gradient():
    variables = make_variables(["float32"], [(4, 5), (5,)])
    optimizer = OURS["Adam"](0.1)
    optimizer.build(variables)
    optimizer.apply([tf.ones(5)], variables[1:])
    assert runs(optimizer) == ["fastopt", "fastopt"]
    with fallbacks() as found:
        for _ in range(2):
            optimizer.apply([tf.constant(2.0)], variables[:1])  # to be broadcast
            assert runs(optimizer) == ["keras", "fastopt"]
            optimizer.apply([tf.ones(5)], variables[1:])
            assert runs(optimizer) == ["keras", "fastopt"]
    assert len(found) == 1
    optimizer.apply([tf.ones((4, 5))], variables[:1])
    assert runs(optimizer) == ["fastopt", "fastopt"]


def test_variables_without_a_gradient_do_not_count():
    variables = make_variables(["complex64", "float32"], [(40, 50), (5,)])
    optimizer = OURS["SGD"](0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gradients do not exist")
        optimizer.apply([None, tf.ones(5)], variables)
    assert runs(optimizer) == ["keras", "fastopt"]


@each_loop
def test_variables_that_are_overwritten_with_their_gradient_are_told_and_do_not_count(loop):
    variables = make_variables(["float32"], [(4, 5), (5,)])
    variables[0].overwrite_with_gradient = True
    optimizer = OURS["Adam"](0.1)
    train(optimizer, variables, loop, range(3))
    assert [info["why"] for info in optimizer.fastopt_info()] == ["it takes its gradient", None]


@each_loop
@pytest.mark.usefixtures("only_kernels")
def test_nothing_is_warned_of_where_the_kernels_run(loop):
    optimizer, variables = OURS["Adam"](), make_variables(["float32", "float64"])
    train(optimizer, variables, loop, range(4))
    told = [(info["runs"], info["why"]) for info in optimizer.fastopt_info()]
    assert told == [("fastopt", None)] * len(SHAPES)


def test_a_variable_on_a_gpu_is_not_for_the_kernels():
    on_gpu = types.SimpleNamespace(
        dtype=tf.float32, shape=tf.TensorShape([2]), device="/device:GPU:0"
    )
    unfit = _tensorflow.unfit(on_gpu, tf.zeros(2))
    assert unfit.why == "its device is /device:GPU:0"
    on_gpu.device = "/device:CPU:0"
    assert _tensorflow.unfit(on_gpu, tf.zeros(2)) is None


# ---- wrappers and copies -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_every_dtype_policy_in_16_bits_runs_on_the_kernels(policy):
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(policy)
        with fallbacks() as found:
            model = make_model(OURS["Adam"](0.01))
            fit(model)
    finally:
        keras.config.set_dtype_policy(before)
    assert found == []
    wrapped = policy == "mixed_float16"
    optimizer = model.optimizer.inner_optimizer if wrapped else model.optimizer
    assert runs(optimizer) == ["fastopt"] * len(model.trainable_variables)


def test_a_compiled_model_with_a_scaled_loss_warns_once():
    with fallbacks() as found:
        model = make_model(
            keras.optimizers.LossScaleOptimizer(OURS["Adam"](0.01)), jit_compile=True
        )
        for _ in range(2):
            fit(model)
            model.make_train_function(force=True)
    assert len(found) == 1
    assert set(runs(model.optimizer.inner_optimizer)) == {"keras"}


def test_what_was_told_and_warned_of_is_neither_saved_nor_copied():
    variables = make_variables(["complex64"])
    optimizer = OURS["Adam"](0.1)
    config = optimizer.get_config()
    for make in (
        lambda: optimizer,
        lambda: OURS["Adam"].from_config(optimizer.get_config()),
        lambda: pickle.loads(pickle.dumps(OURS["Adam"].from_config(optimizer.get_config()))),
    ):
        some = make()
        assert some.fastopt_info() == []
        with fallbacks() as found:
            train(some, variables, "eager", range(2))
        assert len(found) == 1
        assert some.get_config() == config
        assert len(some.variables) == 2 + 2 * len(variables)


def test_how_many_cases():
    assert len(CASES) == 11
