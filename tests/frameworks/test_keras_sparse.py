"""fastopt.keras on TensorFlow: sparse gradients (``tf.IndexedSlices``)."""

import warnings

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from frameworks.keras_support import (
    LOOPS,
    OURS,
    THEIRS,
    each_loop,
    fallbacks,
    only_kernels,  # noqa: F401
    values,
)
from tables import AROUND_KERAS_UPDATE, KERAS_CLASSES, ROWS

from fastopt.keras import _slices

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy keyword"  # Keras's own, of NumPy
    ),
    pytest.mark.filterwarnings("ignore:Converting sparse IndexedSlices"),  # Keras's own steps do
    pytest.mark.filterwarnings("error::fastopt.FallbackWarning"),
]
kernels_alone = pytest.mark.usefixtures("only_kernels")

COUNT, WIDTH = 9, 3  # rows of the table, and elements of each
OWN = [
    (row.keras_name, {"learning_rate": 0.1, **own})
    for row in ROWS
    if row.keras
    for own in (*row.keras, *([] if row.name == "AdamW" else [{"weight_decay": 0.05}]))
]
AROUND = [around for around in AROUND_KERAS_UPDATE if "loss_scale_factor" not in around]
each_class = pytest.mark.parametrize("name", KERAS_CLASSES)
each_own = pytest.mark.parametrize(("name", "options"), OWN, ids=str)
# A step of these changes the rows of the gradient alone.
LEAVE_ROWS = [("SGD", {}), ("Adagrad", {})]
# And these are like them, but for one thing.
LEAVE_NO_ROWS = [
    ("SGD", {"weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9}),
    ("Adagrad", {"weight_decay": 0.1}),
    ("Adagrad", {"epsilon": 0.0}),
    ("Adagrad", {"state_dtype": "8bit"}),
]


class Dense:
    """Keras's own optimizer, given gradients with all their zeros."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def apply(self, grads, variables):
        self.optimizer.apply([tf.convert_to_tensor(g) for g in grads], variables)


def model_variables(dtype="float32", shape=(COUNT, WIDTH)):
    rng = np.random.default_rng(0)
    return [
        keras.Variable(rng.standard_normal(s), dtype=dtype, name=f"v{i}")
        for i, s in enumerate([shape, (4,)])
    ]


def numbers_of(step, *, repeated):
    """Return rows for a step; their number differs from step to step, and is once 0."""
    rng = np.random.default_rng(step)
    count = (4, 0, 2, 7, 5)[step % 5]
    return rng.integers(0, COUNT, 2 * count) if repeated else rng.permutation(COUNT)[:count]


def gradients(step, variables, *, repeated=False, numbers=None):
    """Return a sparse gradient of the first variable, and a dense one of the second."""
    rng = np.random.default_rng(100 + step)
    table, other = variables
    if numbers is None:
        numbers = numbers_of(step, repeated=repeated)
    rows = rng.standard_normal((len(numbers), *table.shape[1:]))
    return [
        tf.IndexedSlices(
            tf.constant(rows, table.dtype),
            tf.constant(numbers, tf.int32),
            tf.constant(table.shape, tf.int32),
        ),
        tf.constant(rng.standard_normal(other.shape), other.dtype),
    ]


def stepper(optimizer, variables, loop):
    """Return what does a step; traced, it is one function for any number of rows."""

    def step(grads):
        optimizer.apply(grads, variables)

    if loop == "eager":
        return step
    table, other = variables
    signature = [
        tf.IndexedSlicesSpec(table.shape, table.dtype, tf.int32, tf.int32, tf.TensorShape([None])),
        tf.TensorSpec(other.shape, other.dtype),
    ]
    return tf.function(step, input_signature=[signature], autograph=False)


def train(optimizer, variables, loop="eager", steps=range(7), **kwargs):
    step = stepper(optimizer, variables, loop)
    for i in steps:
        step(gradients(i, variables, **kwargs))


def assert_close(ours, theirs, ulps=16):
    """Allow some units in the last place of an array's largest element."""
    for a, b in zip(values(ours), values(theirs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.dtype.kind == "i":
            assert (a == b).all()
        else:
            worst = np.abs(a - b).max(initial=0) / np.spacing(np.abs(b).max(initial=0))
            assert worst <= ulps, f"{worst} units in the last place"


def assert_all_ours(optimizer):
    infos = getattr(optimizer, "inner_optimizer", optimizer).fastopt_info()
    assert [(info["runs"], info["why"]) for info in infos] == [("fastopt", None)] * len(infos)
    assert len(infos) > 0


@pytest.fixture
def written(monkeypatch):
    """Return a list of the variables of which rows are written, and nothing else."""
    names = []

    def write(variable, *args):
        names.append(variable.name)
        original(variable, *args)

    original = _slices.write
    monkeypatch.setattr(_slices, "write", write)
    return names


# ---- numbers: as Keras's dense step --------------------------------------------------------------


@kernels_alone
@each_loop
@each_own
def test_gradients_without_duplicates_are_as_with_keras_own(name, options, loop):
    variables, others = model_variables(), model_variables()
    mine, peer = OURS[name](**options), THEIRS[name](**options)
    train(mine, variables, loop)
    train(peer, others, "eager")
    assert_close(variables + mine.variables, others + peer.variables)
    assert_all_ours(mine)


@kernels_alone
@each_loop
@each_own
def test_duplicates_are_summed_as_in_a_dense_gradient(name, options, loop):
    variables, others = model_variables(), model_variables()
    mine, peer = OURS[name](**options), THEIRS[name](**options)
    train(mine, variables, loop, repeated=True)
    train(Dense(peer), others, "eager", repeated=True)
    assert_close(variables + mine.variables, others + peer.variables)
    assert_all_ours(mine)


@kernels_alone
@each_loop
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam"])
@pytest.mark.parametrize("around", AROUND, ids=str)
@pytest.mark.parametrize("repeated", [False, True])
def test_what_keras_does_around_an_update_is_as_with_dense_gradients(name, around, repeated, loop):
    variables, others = model_variables(), model_variables()
    mine, peer = OURS[name](0.1, **around), THEIRS[name](0.1, **around)
    train(mine, variables, loop, repeated=repeated)
    train(Dense(peer) if repeated else peer, others, "eager", repeated=repeated)
    assert_close(variables + mine.variables, others + peer.variables)
    assert_all_ours(mine)


@pytest.mark.parametrize("around", [{"clipnorm": 0.1}, {"global_clipnorm": 0.1}], ids=str)
def test_a_norm_is_that_of_the_sums(around):
    variables = model_variables()
    before = variables[0].numpy()
    ones = tf.IndexedSlices(tf.ones((4, WIDTH)), [2, 5, 2, 2], (COUNT, WIDTH))
    OURS["SGD"](1.0, **around).apply([ones], variables[:1])
    moved = before - variables[0].numpy()
    sums = np.zeros((COUNT, WIDTH))
    sums[2], sums[5] = 3, 1
    np.testing.assert_allclose(moved, 0.1 * sums / np.linalg.norm(sums), atol=1e-6)


def test_a_loss_scale_factor_is_an_error_as_with_keras_own():
    assert len(AROUND) == len(AROUND_KERAS_UPDATE) - 1
    for classes in OURS, THEIRS:
        variables = model_variables()
        before = values(variables)
        with pytest.raises(TypeError, match="'IndexedSlices' and 'float'"):
            train(classes["Adam"](loss_scale_factor=8.0), variables)
        for a, b in zip(before, values(variables), strict=True):
            np.testing.assert_array_equal(a, b)


@kernels_alone
@each_loop
@pytest.mark.parametrize("rows", [None, "lazy"])
def test_a_scaled_loss(rows, loop):
    variables, others = model_variables(), model_variables()
    mine, peer = (
        keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0)
        for optimizer in (OURS["Adagrad"](0.1, rows=rows), THEIRS["Adagrad"](0.1))
    )
    train(mine, variables, loop)
    train(peer, others, "eager")
    assert_close(variables + mine.variables, others + peer.variables)
    assert_all_ours(mine)


@each_loop
@pytest.mark.parametrize(("name", "options"), LEAVE_ROWS, ids=str)
def test_where_a_dense_step_leaves_rows_they_are_left_alone(name, options, loop, written):
    variables = model_variables()
    optimizer = OURS[name](0.1, **options)
    train(optimizer, variables, loop)
    slots = [v.value.name for v in optimizer.variables if "v0_accumulator" in v.name]
    assert set(written) == {variables[0].value.name, *slots}
    assert len(slots) == (name == "Adagrad")


@each_loop
@pytest.mark.parametrize(("name", "options"), LEAVE_NO_ROWS, ids=str)
def test_where_it_does_not_they_are_as_after_a_dense_step(name, options, loop, written):
    variables, others = model_variables(), model_variables()
    mine, peer = OURS[name](0.1, **options), OURS[name](0.1, **options)
    train(mine, variables, loop)
    train(Dense(peer), others, loop)
    assert written == []
    assert_close(variables + mine.variables, others + peer.variables, ulps=0)


def test_a_sum_of_zero_divides_every_row_as_in_keras():
    options = {"epsilon": 0.0, "initial_accumulator_value": 0.0}
    variables, others = model_variables(), model_variables()
    for optimizer, some in (OURS["Adagrad"], variables), (THEIRS["Adagrad"], others):
        train(optimizer(0.1, **options), some, steps=range(1))
    assert np.isnan(variables[0].numpy()).any()
    np.testing.assert_array_equal(variables[0].numpy(), others[0].numpy())


def test_variables_excluded_from_decay_are_updated_by_rows(written):
    variables = model_variables()
    optimizer = OURS["SGD"](0.1, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["v0"])
    train(optimizer, variables)
    assert set(written) == {variables[0].value.name}


# ---- numbers: lazily -----------------------------------------------------------------------------


def of_variable(optimizer, index):
    """Return the state of one of the model's variables."""
    return [v for v in optimizer.variables if v.name.startswith(f"v{index}_")]


@kernels_alone
@each_loop
@each_own
def test_lazily_rows_are_as_if_they_were_all_of_the_variable(name, options, loop):
    """Beside Keras's own optimizer, for a variable that consists of each step's rows."""
    variables = model_variables()
    mine, peer = OURS[name](**options, rows="lazy"), THEIRS[name](**options)
    mine.build(variables)
    some = [keras.Variable(np.zeros((3, WIDTH)), dtype="float32", name="v0"), model_variables()[1]]
    peer.build(some)
    wholes = [v.numpy() for v in [variables[0], *of_variable(mine, 0)]]
    step = stepper(mine, variables, loop)
    for i in range(7):
        rng = np.random.default_rng(i)
        numbers = rng.permutation(COUNT)[:3]
        order = rng.integers(0, 3, 6)
        order[:3] = range(3)
        grads = gradients(i, variables, numbers=numbers[order])
        step(grads)
        parts = [some[0], *of_variable(peer, 0)]
        for part, whole in zip(parts, wholes, strict=True):
            part.assign(whole[numbers])
        sums = np.zeros((3, WIDTH), np.float32)
        np.add.at(sums, order, grads[0].values.numpy())
        peer.apply([tf.constant(sums), grads[1]], some)
        for part, whole in zip(parts, wholes, strict=True):
            whole[numbers] = part.numpy()
    assert_close([variables[0], *of_variable(mine, 0)], [keras.Variable(whole) for whole in wholes])
    assert_close([variables[1], *of_variable(mine, 1)], [some[1], *of_variable(peer, 1)])
    assert_all_ours(mine)


@each_loop
@each_own
def test_lazily_no_other_row_changes(name, options, loop):
    variables = model_variables()
    optimizer = OURS[name](**options, rows="lazy")
    optimizer.build(variables)
    step = stepper(optimizer, variables, loop)
    for i in range(4):
        before = values([variables[0], *of_variable(optimizer, 0)])
        step(gradients(i, variables, numbers=[1, 4, 4]))
        after = values([variables[0], *of_variable(optimizer, 0)])
        rest = np.setdiff1d(np.arange(COUNT), [1, 4])
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a[rest], b[rest])
            assert (a[[1, 4]] != b[[1, 4]]).any()


@each_class
def test_lazily_a_dense_gradient_is_of_all_rows(name):
    variables, others = model_variables(), model_variables()
    for options, some in ({"rows": "lazy"}, variables), ({}, others):
        train(Dense(OURS[name](0.1, **options)), some)
    assert_close(variables, others, ulps=0)


# ---- numbers: other types and shapes -------------------------------------------------------------


@kernels_alone
@each_loop
@pytest.mark.parametrize(
    ("name", "options"), [*((n, {}) for n in KERAS_CLASSES), ("SGD", {"momentum": 0.9})], ids=str
)
@pytest.mark.parametrize("rows", [None, "lazy"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_a_step_is_that_of_float32_rounded_once(name, options, rows, dtype, loop):
    variables = model_variables(dtype)
    table = variables[0].value.numpy().astype(np.float32)
    mine, peer = OURS[name](1.0, rows=rows, **options), THEIRS[name](1.0, **options)
    grads = gradients(0, variables, numbers=[3, 1, 3, 3, 0, 1, 1, 3, 0, 3])
    stepper(mine, variables, loop)(grads)
    wide = keras.Variable(table)
    sums = np.zeros_like(table)
    np.add.at(sums, grads[0].indices.numpy(), grads[0].values.numpy().astype(np.float32))
    peer.apply([tf.constant(sums)], [wide])
    expected = wide.numpy()
    if rows == "lazy":
        expected[[2, *range(4, COUNT)]] = table[[2, *range(4, COUNT)]]
    rounded = expected.astype({"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype])
    got = variables[0].value.numpy()
    assert got.dtype == rounded.dtype
    apart = np.abs(got.view(np.int16).astype(int) - rounded.view(np.int16).astype(int))
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.1
    assert_all_ours(mine)


@each_loop
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("name", "rows"), [("SGD", None), ("Adagrad", None), ("Adam", "lazy")])
def test_master_weights_are_trained_as_variables_of_float32(name, rows, dtype, loop):
    narrow = model_variables(dtype)
    wide = [keras.Variable(tf.cast(v.value, tf.float32)) for v in narrow]
    mine, peer = (OURS[name](0.1, rows=rows, master_weights=m) for m in (True, None))
    for optimizer, some in (mine, narrow), (peer, wide):
        optimizer.build(some)
        step = stepper(optimizer, some, loop)
        for i in range(6):
            grads = gradients(i, narrow, repeated=True)
            step([tf.cast(g, some[0].dtype) for g in grads])
    master = mine.decoded_state(narrow[0])["master"]
    np.testing.assert_array_equal(master, wide[0].numpy())
    for other, own in peer.decoded_state(wide[0]).items():
        np.testing.assert_array_equal(mine.decoded_state(narrow[0])[other], own)


@each_loop
@pytest.mark.parametrize("rows", [None, "lazy"])
@pytest.mark.parametrize("name", ["Adagrad", "Adam"])
@pytest.mark.parametrize("shape", [(COUNT,), (COUNT, 2, 3), (COUNT, 0), (0, 3), (1, 4)], ids=str)
def test_shapes(name, shape, rows, loop):
    variables, others = (model_variables("float64", shape) for _ in range(2))
    mine, peer = OURS[name](0.1, rows=rows), THEIRS[name](0.1)
    for optimizer, some in (mine, variables), (Dense(peer), others):
        numbers = np.repeat(np.arange(shape[0]), 2)  # all rows: so both meanings are the same
        train(optimizer, some, loop, numbers=numbers)
    assert_close(variables, others)
    assert_all_ours(mine)


@pytest.mark.parametrize("rows", [None, "lazy"])
@pytest.mark.parametrize(
    "slices",
    [
        lambda rows: tf.IndexedSlices(rows, (1, 4), (COUNT, WIDTH)),
        lambda rows: tf.IndexedSlices(rows, tf.constant([1, 4], tf.int64)),
        lambda rows: tf.IndexedSlices(rows.numpy(), np.array([1, 4]), np.array([COUNT, WIDTH])),
        lambda rows: tf.IndexedSlices(tf.cast(rows, tf.float64), tf.constant([1, 4])),
    ],
)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_slices_of_any_kind(name, slices, rows):
    variables, others = model_variables(), model_variables()
    values = tf.constant(np.random.default_rng(0).standard_normal((2, WIDTH)), tf.float32)
    plain = tf.IndexedSlices(values, tf.constant([1, 4]), tf.constant([COUNT, WIDTH]))
    mine, peer = (OURS[name](0.1, rows=rows) for _ in range(2))
    mine.apply([slices(values)], variables[:1])
    peer.apply([plain], others[:1])
    assert_close(variables, others, ulps=0)
    assert_all_ours(mine)


@each_loop
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam"])
@pytest.mark.parametrize("rows", [None, "lazy"])
def test_steps_with_and_without_zeros_take_turns(name, rows, loop):
    count = 5000  # of more than TensorFlow is given a copy of
    results = []
    for optimizer in OURS[name](0.1, rows=rows), THEIRS[name](0.1):
        rng = np.random.default_rng(0)
        table = keras.Variable(rng.standard_normal((count, 4)), dtype="float32")
        whole = stepper(optimizer, [table], "eager")
        if loop == "traced":
            whole = tf.function(whole, autograph=False)
        optimizer.build([table])
        kept = []
        for i in range(8):
            kept.append((table.value.read_value(), table.numpy()))
            rng = np.random.default_rng(i)
            grad = tf.constant(rng.standard_normal((count, 4)), tf.float32)
            if i % 3 == 0:  # of all rows, so that both meanings are the same
                order = tf.constant(rng.permutation(count))
                sparse = tf.IndexedSlices(tf.gather(grad, order), order, tf.constant([count, 4]))
            whole([sparse if i % 3 == 0 else grad])
        for tensor, before in kept:
            np.testing.assert_array_equal(tensor.numpy(), before)
        results.append([table])
    assert_close(*results)


# ---- models --------------------------------------------------------------------------------------

BATCH, USERS, ITEMS = 16, 40, 60


def two_towers(optimizer, **options):
    keras.utils.set_random_seed(0)
    user, item = (keras.Input((), dtype="int32", name=name) for name in ("user", "item"))
    towers = [
        keras.layers.Dense(8, activation="tanh")(keras.layers.Embedding(count, 8, name=name)(ids))
        for ids, count, name in ((user, USERS, "users"), (item, ITEMS, "items"))
    ]
    model = keras.Model([user, item], keras.layers.Dot(1)(towers))
    model.compile(optimizer, "mse", **{"jit_compile": False, **options})
    return model


def fit_towers(model, *, repeated):
    rng = np.random.default_rng(0)
    batches = range(5)
    if repeated:
        ids = [rng.integers(0, count, (len(batches), BATCH)) for count in (USERS // 8, ITEMS)]
    else:
        ids = [np.array([rng.permutation(n)[:BATCH] for _ in batches]) for n in (USERS, ITEMS)]
    users, items = (some.reshape(-1).astype(np.int32) for some in ids)
    y = np.sin(users + 2.0 * items).astype(np.float32)
    history = model.fit(
        [users, items], y, batch_size=BATCH, epochs=4, shuffle=False, verbose=0
    ).history
    return history["loss"]


@kernels_alone
@each_loop
@each_class
@pytest.mark.parametrize("repeated", [False, True])
def test_a_two_tower_model_trains_as_with_keras_own(name, repeated, loop):
    class Summed(THEIRS[name]):
        def apply(self, grads, trainable_variables=None):
            super().apply([tf.convert_to_tensor(g) for g in grads], trainable_variables)

    options = {"run_eagerly": loop == "eager"}
    mine = two_towers(OURS[name](0.05), **options)
    peer = two_towers((Summed if repeated else THEIRS[name])(0.05))
    losses = [fit_towers(model, repeated=repeated) for model in (mine, peer)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][-1] < losses[0][0]
    for a, b in zip(values(mine.weights), values(peer.weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert_all_ours(mine.optimizer)


@each_class
def test_lazily_a_two_tower_model_trains(name):
    options = {} if name == "SGD" else {"learning_rate": 0.05}
    model = two_towers(OURS[name](rows="lazy", **options))
    before = model.get_layer("users").embeddings.numpy()
    losses = fit_towers(model, repeated=True)
    assert losses[-1] < losses[0]
    after = model.get_layer("users").embeddings.numpy()
    assert (after[: USERS // 8] != before[: USERS // 8]).any(axis=1).all()
    np.testing.assert_array_equal(after[USERS // 8 :], before[USERS // 8 :])
    assert_all_ours(model.optimizer)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
@pytest.mark.parametrize("rows", [None, "lazy"])
def test_dtype_policies(policy, rows):
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(policy)
        model = two_towers(OURS["Adam"](0.05, rows=rows))
        losses = fit_towers(model, repeated=True)
    finally:
        keras.config.set_dtype_policy(before)
    assert losses[-1] < losses[0]
    assert_all_ours(model.optimizer)


def test_a_compiled_model_runs_keras_own_update():
    mine, peer = (two_towers(c["SGD"](0.05), jit_compile=True) for c in (OURS, THEIRS))
    with fallbacks() as found:
        losses = [fit_towers(model, repeated=True) for model in (mine, peer)]
    assert len(found) == 1
    np.testing.assert_allclose(*losses, rtol=1e-4)


# ---- the option ----------------------------------------------------------------------------------


@each_class
def test_the_option_is_in_the_configuration(name):
    optimizer = OURS[name](0.1, rows="lazy")
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.get_config() == optimizer.get_config()
    assert again.get_config()["rows"] == "lazy"
    variables, others = model_variables(), model_variables()
    train(optimizer, variables)
    train(again, others)
    assert_close(variables, others, ulps=0)
    assert "rows" not in OURS[name](0.1, rows=None).get_config()


def test_a_saved_model_goes_on_lazily(tmp_path):
    model = two_towers(OURS["Adam"](0.05, rows="lazy"))
    fit_towers(model, repeated=True)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    again.jit_compile = False
    for each in model, again:
        fit_towers(each, repeated=True)
    for a, b in zip(values(model.weights), values(again.weights), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rows": "exact"}, ValueError, r"rows='exact' is not for Keras: .*rows='lazy'"),
        ({"rows": "all"}, ValueError, "rows must be one of 'lazy', got 'all'"),
        ({"rows": True}, TypeError, "rows must be a string, got True"),
        ({"rows": "lazy", "state_dtype": "8bit"}, ValueError, "not go with state_dtype='8bit'"),
        (
            {"rows": "lazy", "gradient_accumulation_steps": 2},
            ValueError,
            "not go with gradient_accumulation_steps",
        ),
    ],
    ids=str,
)
def test_bad_options(options, error, text):
    for cls in OURS.values():
        with pytest.raises(error, match=text):
            cls(0.01, **options)


# ---- errors --------------------------------------------------------------------------------------


@each_loop
@pytest.mark.parametrize("rows", [None, "lazy"])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("number", [-1, COUNT, 2**31 - 1])
def test_a_number_of_no_row_is_refused_and_nothing_changes(name, rows, number, loop):
    variables = model_variables()
    optimizer = OURS[name](0.1, rows=rows)
    step = stepper(optimizer, variables, loop)
    for i in range(4):  # the last ones by a traced function
        before = values(variables + optimizer.variables[2:])
        error = ValueError if loop == "eager" else tf.errors.InvalidArgumentError
        text = rf"gradient of v0.*: indices\[\[?2\]?\] is \[?{number}\]?, .* row: 0 to {COUNT - 1}"
        with pytest.raises(error, match=text):
            step(gradients(9, variables, numbers=[1, 3, number, 1]))
        if i > 0:  # before, there are none
            for a, b in zip(before, values(variables + optimizer.variables[2:]), strict=True):
                np.testing.assert_array_equal(a, b)
        if loop == "eager":  # a graph may have counted the step
            assert optimizer.iterations.numpy() == i
        step(gradients(i, variables))


@each_loop
def test_a_number_of_no_row_is_refused_where_gradients_are_clipped(loop):
    variables = model_variables()
    optimizer = OURS["SGD"](0.1, clipnorm=1.0)
    optimizer.build(variables)
    before = values(variables)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=f"is .?{COUNT}"):
        stepper(optimizer, variables, loop)(gradients(0, variables, numbers=[1, COUNT, 1]))
    for a, b in zip(before, values(variables), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("slices", "options"),
    [
        (tf.IndexedSlices(tf.ones((2, WIDTH)), [1, 2], (COUNT + 1, WIDTH)), {}),
        (tf.IndexedSlices(tf.ones((2, WIDTH + 1)), [1, 2], (COUNT, WIDTH)), {}),
        (tf.IndexedSlices(tf.ones((2, 1)), [1, 2], (COUNT, WIDTH)), {}),
        (tf.IndexedSlices(tf.ones((2, 3, WIDTH)), [1, 2]), {}),
        (tf.IndexedSlices(tf.ones((3, WIDTH)), [1, 2], (COUNT, WIDTH)), {}),
        (tf.IndexedSlices(tf.ones((3, WIDTH)), [1, 2], (COUNT, WIDTH)), {"clipnorm": 1.0}),
    ],
)
def test_lazily_slices_that_do_not_fit_are_refused(slices, options):
    variables = model_variables()
    optimizer = OURS["SGD"](0.1, rows="lazy", **options)
    optimizer.build(variables)
    before = values(variables)
    with pytest.raises((RuntimeError, ValueError, tf.errors.InvalidArgumentError)):
        optimizer.apply([slices, tf.ones(4)], variables)
    for a, b in zip(before, values(variables), strict=True):
        np.testing.assert_array_equal(a, b)
    assert optimizer.iterations.numpy() == 0


@pytest.mark.parametrize("loop", LOOPS)
def test_lazily_keras_own_update_is_no_way_out(loop):
    class Doubled(OURS["Adam"]):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(2 * gradient, variable, learning_rate)

    variables = model_variables()
    optimizer = Doubled(0.1, rows="lazy")
    optimizer.build(variables)
    before = values(variables + optimizer.variables)
    with fallbacks("ignore"):
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=r"v0: .* have rows='lazy', since Doubled has an"
            ):
                stepper(optimizer, variables, loop)(gradients(0, variables))
    for a, b in zip(before, values(variables + optimizer.variables), strict=True):
        np.testing.assert_array_equal(a, b)


def test_lazily_a_compiled_step_is_refused():
    model = two_towers(OURS["Adam"](0.05, rows="lazy"), jit_compile=True)
    with fallbacks("ignore"), pytest.raises(RuntimeError, match="rows='lazy', since the step is c"):
        fit_towers(model, repeated=False)


def test_lazily_dense_gradients_may_run_on_keras_own_update():
    variables = model_variables("complex64")
    optimizer = OURS["SGD"](0.1, rows="lazy")
    with fallbacks() as found, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.apply([tf.ones((COUNT, WIDTH), tf.complex64)], variables[:1])
    assert optimizer.fastopt_info()[0]["why"] == "its dtype is complex64"
    assert len(found) <= 1
