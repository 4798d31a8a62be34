"""fastopt.keras with master weights, state in fewer bits and stochastic rounding.

test_keras_storage.py runs it on TensorFlow and on PyTorch, each in a process of its own.
"""

import importlib
import itertools
import re

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops
from oracle import NUMBERS
from tables import BY_NAME, KERAS_CLASSES, ROWS

import fastopt
import fastopt.keras
from fastopt import _core

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # Keras's own, of NumPy
    pytest.mark.filterwarnings("error::fastopt.FallbackWarning"),
]

BACKEND = keras.backend.backend()
OURS = {name: getattr(fastopt.keras, name) for name in KERAS_CLASSES}
THEIRS = {name: getattr(keras.optimizers, name) for name in KERAS_CLASSES}
OWN = [(row.keras_name, own) for row in ROWS if row.keras for own in (row.keras[0], row.keras[-1])]
TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SHAPES = [(4, 5), (3, 50), (70,), ()]
STORAGES = [
    {"state_dtype": "8bit"},
    {"state_dtype": "8bit", "stochastic_rounding": False},
    {"state_dtype": "bfloat16", "seed": 2**40},
    {"state_dtype": "bfloat16", "stochastic_rounding": False},
    {"state_dtype": "float32", "stochastic_rounding": True},
    {"master_weights": True},
    {"master_weights": True, "state_dtype": "8bit", "seed": 3},
]


def array_of(value):
    """Return a copy of a variable or tensor, as NumPy has its type."""
    dtype = keras.backend.standardize_dtype(value.dtype)
    if dtype in TYPES:
        return np.array(ops.convert_to_numpy(ops.cast(value, "float32"))).astype(TYPES[dtype])
    return np.array(ops.convert_to_numpy(value))


def arrays(variables):
    return [array_of(v) for v in variables]


def equal(some, others):
    return len(some) == len(others) and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(some, others, strict=True)
    )


def make_variables(dtype, shapes=SHAPES):
    rng = np.random.default_rng(0)
    return [
        keras.Variable(rng.standard_normal(shape), dtype=dtype, name=f"v{i}")
        for i, shape in enumerate(shapes)
    ]


def make_grads(variables, step):
    rng = np.random.default_rng(step)
    return [ops.convert_to_tensor(rng.standard_normal(v.shape), v.dtype) for v in variables]


def train(optimizer, variables, steps):
    for i in steps:
        optimizer.apply(make_grads(variables, i), variables)


def rates(optimizer, iterations):
    """Return the learning rate of a step with its bias corrected, as it is for Keras's storage."""
    module = importlib.import_module(f"fastopt.keras._{BACKEND}")
    dtype = {"tensorflow": np.float32, "torch": getattr(module, "torch", np).float32}[BACKEND]
    group = {**optimizer._hypers(), "weight_decay": 0.0}
    rate = ops.convert_to_tensor(0.01, "float32")
    rate = ops.convert_to_numpy(rate) if BACKEND == "tensorflow" else rate
    return module._rates(optimizer._correction, group, dtype, rate, iterations)["lr"]


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize(("name", "own"), OWN, ids=str)
def test_bits_are_those_of_fastopts_own_classes(name, own, storage, dtype):
    own = {k: v for k, v in own.items() if k != "weight_decay"}
    decay = {"weight_decay": 0.0} if name == "AdamW" else {}
    variables = make_variables(dtype)
    mine = OURS[name](0.01, **own, **decay, **storage)
    mine.build(variables)
    hypers = mine._hypers()
    betas = {k: hypers.pop(k) for k in ("beta1", "beta2") if k in hypers}
    hypers.pop("bias_correction", None)
    if betas:
        hypers["betas"] = tuple(betas.values())
        if name in ("Adam", "AdamW"):
            hypers["bias_correction"] = False
    if name == "AdamW":
        hypers["weight_decay"] = 0.0
    if name == "Adagrad":
        hypers["initial_accumulator_value"] = mine.initial_accumulator_value
    peers = arrays(variables)
    with_master = storage.get("master_weights", False)
    if "state_dtype" not in storage and not (with_master or dtype == "float32"):
        pytest.skip("Keras's own storage of state, which the classes do not have")
    peer = BY_NAME[name].cls(
        peers,
        lr=0.01,
        semantics="keras",
        **hypers,
        master_weights=with_master,
        state_dtype=storage.get("state_dtype"),
        stochastic_rounding=storage.get(
            "stochastic_rounding", storage.get("state_dtype") in ("bfloat16", "8bit")
        ),
        seed=storage.get("seed", 0),
    )
    for i in range(5):
        peer.param_groups[0]["lr"] = rates(mine, i)
        grads = make_grads(variables, i)
        for number, _ in mine._advanced():  # which Keras keeps in the variables' type
            for state in peer.state:
                state["mu_product"][...] = ops.convert_to_numpy(number)
        # The first has no gradient: numbers are those among all of the optimizer's variables.
        mine.apply(grads[1:], variables[1:])
        peer.step([None, *map(array_of, grads[1:])])
    assert equal(arrays(variables), peers)
    assert not np.array_equal(peers[1], array_of(make_variables(dtype)[1]))
    slots = dict(zip(mine._slot_names, mine._rule.slots, strict=False))
    seen = set()
    for variable in mine.variables[2:]:
        owner, _, rest = variable.name.partition("_")
        if owner == "v0" or any(variable is number for number, _ in mine._advanced()):
            continue
        for theirs, ours in slots.items():
            if rest in (theirs, f"{theirs}_8bit", f"{theirs}_scale"):
                rest = rest.replace(theirs, ours, 1)
                break
        saved = peer.state[int(owner[1:])][rest]
        value = array_of(variable)
        value = value.view(np.uint16) if value.dtype == np.int16 else value
        assert equal([value], [saved]), variable.name
        seen.add(rest)
    assert seen == set(peer.state[1]) - {"step", *NUMBERS}


def test_seeds_and_numbers_of_variables_make_other_bits():
    after = []
    for seed, first in (0, 0), (1, 0), (0, 1), (0, 0):
        variables = [keras.Variable(np.ones(1000), dtype="bfloat16") for _ in range(2)]
        optimizer = OURS["SGD"](0.001, stochastic_rounding=True, seed=seed)
        optimizer.build(variables)
        optimizer.apply([ops.ones(1000, "bfloat16")], [variables[first]])
        after.append(array_of(variables[first]))
    assert equal(after[:1], after[3:])
    assert not any(equal([a], [b]) for a, b in itertools.combinations(after[:3], 2))


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"master_weights": True}, {"stochastic_rounding": True}], ids=str
)
def test_a_constant_gradient_moves_bfloat16_weights_as_far_as_it_should(options):
    w = keras.Variable(np.ones(1 << 16), dtype="bfloat16")
    optimizer = OURS["Adam"](0.001, **options)
    gradient = ops.ones(1 << 16, "bfloat16")
    for _ in range(500):
        optimizer.apply([gradient], [w])
    weights = optimizer.decoded_state(w).get("master", array_of(w))
    assert abs(np.float64(weights).mean() / 0.5 - 1) < 1e-3


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {"state_dtype": "8bit"}),
        ("float32", {"state_dtype": "bfloat16"}),
        ("bfloat16", {"stochastic_rounding": True}),
        ("bfloat16", {"master_weights": True, "state_dtype": "8bit"}),
    ],
    ids=str,
)
def test_a_second_moment_shrinks(dtype, options):
    w = keras.Variable(np.zeros(4096), dtype=dtype)
    optimizer = OURS["Adam"](0.001, **options)
    exact = 0.0
    for size, steps in (1.0, 2000), (0.01, 4000):
        gradient = ops.full((4096,), size, dtype)
        for _ in range(steps):
            optimizer.apply([gradient], [w])
            exact += 0.001 * (float(gradient[0]) ** 2 - exact)
    assert abs(exact - 0.0159) < 1e-4
    assert abs(optimizer.decoded_state(w)["velocity"].mean() / exact - 1) < 0.03


@pytest.mark.parametrize("name", OURS)
def test_what_never_has_a_gradient_never_moves(name):
    w = keras.Variable(np.ones((2, 64)), dtype="bfloat16")
    rate = 100.0 if name == "Adadelta" else 0.1  # whose steps begin at a thousandth of it
    decay = {"weight_decay": 0} if "W" in name else {}
    optimizer = OURS[name](rate, state_dtype="8bit", **decay)
    gradient = ops.convert_to_tensor(np.arange(128).reshape(2, 64) % 2, "bfloat16")
    for _ in range(20):
        optimizer.apply([gradient], [w])
    after = np.float32(array_of(w))
    assert (after[:, ::2] == 1).all()
    assert (after[:, 1::2] < 1).all()


# ---- the rest of Keras ---------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_accumulated_gradients_make_the_step_that_their_mean_makes(storage):
    after = []
    for every in 1, 2:
        variables = make_variables("bfloat16")
        accumulated = {} if every == 1 else {"gradient_accumulation_steps": every}
        optimizer = OURS["Adam"](0.01, **storage, **accumulated)
        for i in range(4):
            for _ in range(every):
                optimizer.apply(make_grads(variables, i), variables)
        after.append(arrays(variables))
    assert equal(*after)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_clipped_gradients_make_the_step_that_they_make_elsewhere(storage):
    variables, peers = make_variables("float16"), make_variables("float16")
    mine, peer = OURS["Adam"](0.01, clipvalue=0.25, **storage), OURS["Adam"](0.01, **storage)
    for i in range(4):
        grads = make_grads(variables, i)
        mine.apply(grads, variables)
        peer.apply([ops.clip(g, -0.25, 0.25) for g in grads], peers)
    assert equal(arrays(variables), arrays(peers))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_master_follows_weights_that_an_average_or_a_user_overwrites(dtype):
    variables = make_variables(dtype)
    optimizer = OURS["Adam"](0.01, master_weights=True, use_ema=True, ema_overwrite_frequency=3)
    train(optimizer, variables, range(3))
    average = arrays(optimizer._model_variables_moving_average)
    assert equal(arrays(variables), average)
    variables[0].assign(ops.full(variables[0].shape, 2.0))
    before = np.float64(array_of(variables[0]))
    train(optimizer, variables, range(3, 4))
    moved = np.abs(optimizer.decoded_state(variables[0])["master"] - before)
    assert (moved > 0).all()
    assert (moved < 0.02).all()


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_loss_that_overflows_changes_nothing(storage):
    variables, peers = make_variables("float16"), make_variables("float16")
    scaled = keras.optimizers.LossScaleOptimizer(OURS["Adam"](0.01, **storage), initial_scale=4.0)
    plain = OURS["Adam"](0.01, **storage)
    for i in range(5):
        grads = make_grads(variables, i)
        if i == 3:
            before = arrays(variables + scaled.inner_optimizer.variables)
            scaled.apply([*grads[:-1], grads[-1] * np.float16(np.inf)], variables)
            assert equal(before, arrays(variables + scaled.inner_optimizer.variables))
        else:
            # The scale after an overflow is half as large.
            scaled.apply([g * np.float16(4 if i < 3 else 2) for g in grads], variables)
            plain.apply(grads, peers)
    assert equal(arrays(variables), arrays(peers))
    assert equal(arrays(scaled.inner_optimizer.variables), arrays(plain.variables))


def make_model(optimizer, **compile_options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(70, "tanh"), keras.layers.Dense(3)]
    )
    model.compile(optimizer, "mse", **{"jit_compile": False, **compile_options})
    return model


def fit(model, epochs=2):
    x = np.random.default_rng(1).standard_normal((50, 6)).astype(np.float32)
    return model.fit(x, x[:, :3] ** 2, batch_size=16, epochs=epochs, verbose=0, shuffle=False)


@pytest.fixture
def dtype_policy():
    """Return what sets Keras's dtype policy, which is put back in the end."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16", "bfloat16"])
@pytest.mark.parametrize("eagerly", [False, True] if BACKEND == "tensorflow" else [True])
def test_models_learn(policy, eagerly, dtype_policy):
    dtype_policy(policy)
    for storage in STORAGES[::3]:
        model = make_model(OURS["Adam"](0.01, **storage), run_eagerly=eagerly)
        losses = fit(model, epochs=8).history["loss"]
        assert losses[-1] < 0.9 * losses[0]
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        assert {info["runs"] for info in optimizer.fastopt_info()} == {"fastopt"}


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["float32", "bfloat16", "mixed_float16"])
@pytest.mark.parametrize("storage", STORAGES[::3], ids=str)
def test_training_goes_on_from_files(storage, policy, dtype_policy, tmp_path):
    dtype_policy(policy)
    model = make_model(OURS["Adam"](0.01, **storage))
    fit(model)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    other = make_model(OURS["Adam"](0.01, **storage))
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    for some in model, loaded, other:
        fit(some)
        assert equal(arrays(some.weights), arrays(model.weights))
        assert equal(arrays(some.optimizer.variables), arrays(model.optimizer.variables))


@pytest.mark.parametrize(
    ("saved", "own"), [*itertools.permutations([{}, *STORAGES[::2]], 2)], ids=str
)
def test_state_of_another_storage_is_refused(saved, own):
    variables = make_variables("bfloat16")
    source, target = OURS["Adam"](0.01, **saved), OURS["Adam"](0.01, **own)
    train(source, variables, range(2))
    target.build(variables)
    store = {}
    source.save_own_variables(store)
    store = {k: np.asarray(v) for k, v in store.items()}
    before = arrays(target.variables)
    some, others = ([(v.dtype, tuple(v.shape)) for v in o.variables] for o in (source, target))
    if some == others:
        target.load_own_variables(store)
        assert equal(arrays(source.variables), arrays(target.variables))
    elif own or "uint8" in {dtype for dtype, _ in some}:  # otherwise Keras casts it
        with pytest.raises(ValueError, match="with the state_dtype and master_weights of the"):
            target.load_own_variables(store)
        assert equal(before, arrays(target.variables))


def test_counters_of_another_backend_are_loaded():
    """Which has iterations in another integer type."""
    variables = make_variables("bfloat16")
    source, target = (OURS["Adam"](0.01, state_dtype="8bit") for _ in range(2))
    train(source, variables, range(2))
    target.build(variables)
    store = {}
    source.save_own_variables(store)
    other = np.int32 if BACKEND == "tensorflow" else np.int64
    target.load_own_variables({**store, "0": np.asarray(array_of(source.iterations), other)})
    assert equal(arrays(source.variables), arrays(target.variables))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_small_decay_is_none_of_16_bits(name):
    """Keras computes it in the type of its learning rate: 1 - 0.0001 is 1 in bfloat16."""
    before = keras.config.floatx()
    keras.config.set_floatx("bfloat16")
    try:
        (variable,) = make_variables("bfloat16", [(3,)])
        variable.assign(ops.ones(3, "bfloat16"))
        opt = OURS[name](1e-3, weight_decay=0.1, master_weights=True)
        for _ in range(100):
            opt.apply([ops.zeros(3, "bfloat16")], [variable])
    finally:
        keras.config.set_floatx(before)
    assert opt.decoded_state(variable)["master"] == pytest.approx((1 - 1e-4) ** 100, abs=1e-4)


def test_decoded_state_is_of_a_variable_that_there_is():
    opt = OURS["Adam"](0.01, state_dtype="8bit")
    known, other = make_variables("float32", [(3,), (3,)])
    with pytest.raises(ValueError, match="this optimizer has no state of"):
        opt.decoded_state(known)
    opt.build([known])
    opt.decoded_state(known)
    with pytest.raises(ValueError, match="this optimizer has no state of"):
        opt.decoded_state(other)


def test_keras_own_configuration_and_checkpoints_stay_as_they_are():
    for name in OURS:
        mine, theirs = OURS[name](0.01, name="x"), THEIRS[name](0.01, name="x")
        assert mine.get_config() == theirs.get_config()


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_configurations_have_the_options(storage):
    for name in OURS:
        mine = OURS[name](0.01, **storage)
        again = OURS[name].from_config(mine.get_config())
        assert again.get_config() == mine.get_config()
        assert storage.items() <= mine.get_config().items()
        for optimizer in mine, again:
            optimizer.build(make_variables("bfloat16"))
        made = [
            [(re.sub(r"^variable_\d+$", "variable", v.name), v.dtype) for v in opt.variables]
            for opt in (mine, again)
        ]
        assert made[0] == made[1]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"state_dtype": "int8"}, ValueError, "state_dtype must be one of"),
        ({"state_dtype": 8}, TypeError, "state_dtype must be a string"),
        ({"master_weights": 1}, TypeError, "master_weights must be True or False"),
        ({"stochastic_rounding": "yes"}, TypeError, "stochastic_rounding must be True or False"),
        ({"seed": -1}, ValueError, "seed must be >= 0"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        ({"masters": True}, ValueError, "masters"),
    ],
    ids=str,
)
def test_bad_options(options, error, text):
    for cls in OURS.values():
        with pytest.raises(error, match=text):
            cls(0.01, **options)


def test_variables_of_other_types():
    for dtype in "float64", "complex64":
        optimizer = OURS["SGD"](state_dtype="8bit")
        with pytest.raises(TypeError, match=f"for variables of float32, bfloat16.* is {dtype}"):
            optimizer.build([keras.Variable(np.ones(3), dtype=dtype)])
        assert not optimizer.built
        optimizer.build(make_variables("float32"))
        train(optimizer, optimizer._trainable_variables, range(1))


# (bfloat16 beside bfloat16, rounded to nearest, is Keras's own storage.)
@pytest.mark.parametrize("storage", [*STORAGES[:3], *STORAGES[4:]], ids=str)
def test_keras_own_update_is_no_way_out(storage):
    class Doubled(OURS["SGD"]):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(2 * gradient, variable, learning_rate)

    variables = make_variables("bfloat16")
    optimizer = Doubled(0.1, momentum=0.9, weight_decay=0.1, **storage)
    optimizer.build(variables)
    before = arrays(variables + optimizer.variables)
    with pytest.raises(RuntimeError, match="Doubled has an update_step of its own"):
        train(optimizer, variables, range(1))
    assert equal(before, arrays(variables + optimizer.variables))


@pytest.mark.skipif(BACKEND == "torch", reason="there, jit_compile is torch.compile")
def test_a_compiled_step_is_refused():
    model = make_model(OURS["Adam"](0.01, state_dtype="8bit"), jit_compile=True)
    with pytest.raises(RuntimeError, match="the step is compiled"):
        fit(model)


def test_scales_are_one_for_64_elements():
    optimizer = OURS["Adam"](state_dtype="8bit")
    optimizer.build(make_variables("float32"))
    forms = {v.name: (v.dtype, tuple(v.shape)) for v in optimizer.variables[2:]}
    for i, shape in enumerate(SHAPES):
        for name in "momentum", "velocity":
            assert forms[f"v{i}_{name}_8bit"] == ("uint8", shape)
            count = -(-int(np.prod(shape)) // _core.SCALED)
            assert forms[f"v{i}_{name}_scale"] == ("uint8", (count,))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["Adam", "Nadam"])
def test_weights_with_a_master_train_as_float32_does_to_the_bit(name, dtype):
    lean = keras.Variable(np.ones(5), dtype=dtype)
    wide = keras.Variable(np.ones(5), dtype="float32")
    mine, peer = OURS[name](0.01, master_weights=True), OURS[name](0.01)
    for i in range(30):
        (grad,) = make_grads([lean], i)
        mine.apply([grad], [lean])
        peer.apply([ops.cast(grad, "float32")], [wide])
    assert equal([mine.decoded_state(lean)["master"]], [array_of(wide)])
