"""rows="exact": rows take the steps that they have missed, to the bits of a dense run."""

import itertools

import numpy as np
import pytest
from oracle import same_bits
from sequences import chance, pick, seeds
from sparse import KINDS, Pair, all_dense, draw_rows
from stored import COPIES, STORED
from tables import CASE_IDS, CASES, CLASSES, CONFIGS, ROWS

import fastopt
from fastopt import _core, schedules

WINDOW = 1024  # steps that the log keeps, FO_ROW_LOG


def tables(rng, dtype, in_8_bits=False, n_rows=30):
    """Parameters whose rows are short and long, and one that never has a gradient of rows."""
    sizes = (64, 4160) if in_8_bits else (1, 3, 130, 5000)
    shapes = [(n_rows if size < 1000 else 4, size) for size in sizes]
    params = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    for param in params:
        param[rng.random(param.shape) < 0.1] = -0.0
    return [*params, np.ones(5, np.float32)]


def row_steps(rng, params, steps, dtype=None):
    """Few rows of each parameter in each step, or none."""
    for t in range(steps):
        yield [
            *(
                draw_rows(rng, p, int(rng.integers(0, 4)), KINDS[(t + i) % len(KINDS)], dtype)
                for i, p in enumerate(params[:-1])
            ),
            None if t % 3 == 0 else rng.standard_normal(5).astype(np.float32),
        ]


CLIPS = [{}, {"clip_norm": 0.5}, {"global_clip_norm": 0.5}, {"clip_value": 0.1}]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "cls", "kwargs"), CASES, ids=CASE_IDS)
def test_every_rule_and_variant_equals_dense_steps(name, cls, kwargs, dtype):
    number = CASE_IDS.index(name)
    rng = np.random.default_rng(number)
    params = tables(rng, dtype)
    _core.force_threads(1 + number % 3)
    _core.select_isa(_core.isa()["supported"][number % len(_core.isa()["supported"])])
    pair = Pair(cls, params, **kwargs, **CLIPS[number % len(CLIPS)])
    for grads in row_steps(rng, params, 12):
        pair.step(grads, loss_scale=4.0)
    pair.check()


@pytest.mark.parametrize("isa", _core.isa()["supported"])
@pytest.mark.parametrize("cls", CLASSES)
def test_every_team_and_instruction_set_equals_dense_steps(cls, isa):
    rng = np.random.default_rng(0)
    _core.select_isa(isa)
    for layer, team in itertools.product(_core.layers()["available"], (1, 2, 7)):
        _core.select_layer(layer)
        _core.force_threads(team)
        params = tables(rng, np.float32)
        pair = Pair(cls, params, lr=0.1, weight_decay=0.1)
        for grads in row_steps(rng, params, 6):
            pair.step(grads)
        pair.refresh_rows(2, [29, 0, 3])
        pair.check()


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_stored_in_fewer_bits_equals_dense_steps(cls, stored):
    rng = np.random.default_rng(1)
    dtype, options = STORED[stored]
    for clip in CLIPS:
        params = tables(rng, dtype, options.get("state_dtype") == "8bit")
        pair = Pair(cls, params, lr=0.1, weight_decay=0.01, seed=3, **options, **clip)
        for grads in row_steps(rng, params, 12, np.float32):
            pair.step(grads)
        pair.check()


@pytest.mark.parametrize("config", CONFIGS)
def test_schedules_dense_gradients_none_and_skipped_steps_in_between(config):
    cls, kwargs, _ = CONFIGS[config]
    kwargs = {k: v for k, v in kwargs.items() if k != "ema_decay"}
    rng = np.random.default_rng(2)
    params = tables(rng, np.float32)
    kwargs = {**kwargs, "lr": schedules.exponential(0.1, 0.5, every=3), "nonfinite": "skip"}
    pair = Pair(cls, params, **kwargs)
    for t, grads in enumerate(row_steps(rng, params, 24)):
        given = list(grads)
        if t % 4 == 1:
            given[t % 3] = None
        if t % 5 == 2:
            given[0] = rng.standard_normal(params[0].shape).astype(np.float32)
        if t % 6 == 3:
            given[1] = fastopt.Rows([2], np.full((1, 3), np.nan, np.float32))
        assert pair.step(given).skipped == (t % 6 == 3)
        if given[0] is not None and not isinstance(given[0], fastopt.Rows):
            assert same_bits(*(opt.params[0] for opt in pair.opts))
    pair.check()


def test_a_step_that_raises_for_a_nan_changes_nothing_that_rows_owe():
    rng = np.random.default_rng(3)
    params = tables(rng, np.float32)
    pair = Pair(fastopt.Adam, params, lr=0.1, nonfinite="raise")
    for t, grads in enumerate(row_steps(rng, params, 9)):
        if t % 3 == 2:
            grads[0] = fastopt.Rows([2], np.full((1, 1), np.nan, np.float32))
            for opt, given in zip(pair.opts, (grads, all_dense(grads, params)), strict=True):
                with pytest.raises(FloatingPointError):
                    opt.step(given)
        else:
            pair.step(grads)
    pair.check()


@pytest.mark.parametrize("semantics", ["torch", "keras"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("clip", CLIPS[1:3], ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_factor_that_is_nan_reaches_every_row(cls, clip, value, semantics):
    rng = np.random.default_rng(4)
    params = tables(rng, np.float32)
    pair = Pair(cls, params, lr=0.1, semantics=semantics, **clip)
    for t, grads in enumerate(row_steps(rng, params, 6)):
        if t == 3:
            grads[1] = fastopt.Rows([2], np.full((1, 3), value, np.float32))
        pair.step(grads)
    pair.check()
    assert np.isnan(pair.exact.params[1][0]).all() == np.isnan(pair.dense.params[1][0]).all()


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_hyperparameters_change_in_between(row, number):
    """Also those that switch a slot on or off, of which rows have missed steps before and after."""
    rng = np.random.default_rng(5)
    params = tables(rng, np.float32)
    pair = Pair(row.cls, params, lr=0.1)
    changes = [{"lr": 0.01}, {"weight_decay": 0.1}, {"maximize": True}, {"lr": 0.0}, {"lr": 0.2}]
    for _, switch in row.switches():
        off = {name: row.defaults[name] for name in switch}
        changes[1 + number : 1 + number] = [switch, off, switch]
    steps = row_steps(rng, params, 5 * len(changes) + 5)
    for change in [{}, *changes]:
        for opt in pair.opts:
            opt.param_groups[0].update(change)
        for grads in itertools.islice(steps, 5):
            pair.step(grads)
    pair.check()


@pytest.mark.parametrize("stored", ["f32", "f32, bf16 state", "bf16 alone"])
@pytest.mark.parametrize("cls", CLASSES)
def test_rows_that_fall_behind_further_than_the_log_reaches(cls, stored):
    """Tables of fewer and more rows than that; rows that come never, once and every time."""
    rng = np.random.default_rng(6)
    dtype, options = STORED[stored]
    params = [rng.standard_normal((n, 3)).astype(dtype) for n in (1, 40, WINDOW + 500)]
    pair = Pair(cls, params, lr=lambda t: 0.1 / (1 + t), weight_decay=0.01, **options)
    for t in range(2 * WINDOW + 300):
        given = [[0] if t % 500 == 0 else [], [t % 7, t % 7], [1, 5 + t // 100]]
        if t == 3:
            given = [[], [30], [WINDOW + 400]]
        pair.step(
            [
                fastopt.Rows(rows, rng.standard_normal((len(rows), 3)).astype(np.float32))
                for rows in given
            ]
        )
    pair.refresh_rows(2, [WINDOW + 400, WINDOW + 401, 7])
    pair.check()


def test_more_steps_than_the_counters_of_rows_can_number():
    """Rows count their steps in 16 bits."""
    table = np.ones((3, 2), np.float32)
    pair = Pair(fastopt.SGD, [table], lr=0.1, momentum=0.5)
    grad, dense = fastopt.Rows([1], np.ones((1, 2), np.float32)), np.zeros((3, 2), np.float32)
    dense[1] = 1
    for _ in range(2**16 + 3):
        pair.exact.step([grad])
        pair.dense.step([dense])
    pair.check()


# ---- copies and other calls in between -----------------------------------------------------------


def after_some_steps(cls, rng, steps=7, **options):
    params = tables(rng, np.float32)
    pair = Pair(cls, params, lr=0.1, weight_decay=0.1, **options)
    for grads in row_steps(rng, params, steps):
        pair.step(grads)
    return pair


@pytest.mark.parametrize("copy", COPIES, ids=lambda copy: copy.__name__)
@pytest.mark.parametrize("cls", CLASSES)
def test_copies_and_files_are_those_of_a_dense_run(cls, copy, tmp_path):
    rng = np.random.default_rng(7)
    pair, other = after_some_steps(cls, rng), after_some_steps(cls, rng, 3)
    other.check()  # as before all that reads or writes parameters
    copies = [
        copy(opt, twin, tmp_path / "file") for opt, twin in zip(pair.opts, other.opts, strict=True)
    ]
    pair.check_equal()  # who was copied had all rows catch up
    pair.exact, pair.dense = pair.opts = copies
    pair.check_equal()
    for grads in row_steps(rng, pair.exact.params, 5):
        pair.step(grads)
    pair.check()


@pytest.mark.parametrize("cls", CLASSES)
def test_decoded_state_is_that_of_a_dense_run(cls):
    pair = after_some_steps(cls, np.random.default_rng(8), state_dtype="bfloat16")
    for own, other in zip(*(opt.decoded_state() for opt in pair.opts), strict=True):
        assert own.keys() == other.keys()
        assert all(same_bits(own[name], other[name]) for name in own)


@pytest.mark.parametrize("cls", CLASSES)
def test_reset_and_new_groups_are_those_of_a_dense_run(cls):
    rng = np.random.default_rng(9)
    pair = after_some_steps(cls, rng)
    for opt in pair.opts:
        opt.reset()
    pair.check_equal()
    for grads in row_steps(rng, pair.exact.params, 5):
        pair.step(grads)
    new = rng.standard_normal((9, 3)).astype(np.float32)
    for opt in pair.opts:
        opt.add_param_group({"params": [new.copy()], "lr": 0.5})
    for grads in row_steps(rng, pair.exact.params[:-1], 5):
        pair.step([*grads, draw_rows(rng, new, 3)])
    pair.check()


# ---- all of it, in any order ---------------------------------------------------------------------


def draw_pair(rng):
    row = pick(rng, ROWS)
    semantics = pick(rng, ["torch", "keras"])
    stored = pick(rng, [*STORED, "f64"])
    dtype, own = STORED.get(stored, (np.float64, {}))
    options = {**row.draw(rng, semantics), **own, **pick(rng, CLIPS), "semantics": semantics}
    options["lr"] = pick(rng, [0.1, 0.01, 0.0, lambda t: 0.1 / (1 + t)])
    options["nonfinite"] = pick(rng, ["propagate", "skip"])
    for name, values in {"weight_decay": [0.01], "decoupled_weight_decay": [True]}.items():
        if chance(rng, 0.3):
            options[name] = pick(rng, values)
    params = tables(rng, dtype, own.get("state_dtype") == "8bit", int(rng.integers(1, 100)))
    return Pair(row.cls, params, **options)


@pytest.mark.parametrize("seed", seeds(40))
def test_sequences_of_all_that_can_be_done_equal_dense_runs(seed):
    rng = np.random.default_rng(seed)
    pair = draw_pair(rng)
    params = pair.exact.params
    table = params[0]
    wide = np.float64 if table.dtype == np.float64 else np.float32
    _core.force_threads(int(rng.integers(0, 4)))
    for grads in row_steps(rng, params, int(pick(rng, [5, 60])), wide):
        if chance(rng, 0.1):
            grads[0] = rng.standard_normal(table.shape).astype(wide)
        if chance(rng, 0.1):
            grads[int(rng.integers(len(grads)))] = None
        if chance(rng, 0.02) and pair.options["nonfinite"] == "skip":
            grads[0] = fastopt.Rows([0], np.full((1, *table.shape[1:]), np.inf, wide))
        if chance(rng, 0.2):
            pair.refresh_rows(0, rng.integers(0, len(table), 3))
        if chance(rng, 0.05):
            pair.exact.refresh(table)
            pair.check_rows(0, np.arange(len(table)))
        if chance(rng, 0.05):
            pair.exact, pair.dense = pair.opts = [COPIES[3](opt, None, None) for opt in pair.opts]
            table = pair.exact.params[0]
            pair.check_equal()
        if chance(rng, 0.05):
            change = {"weight_decay": pick(rng, [0.0, 0.1]), "lr": pick(rng, [0.1, 0.0])}
            for opt in pair.opts:
                opt.param_groups[0].update(change)
        if chance(rng, 0.03):
            for opt in pair.opts:
                opt.reset()
            pair.check_equal()
        pair.step(grads, loss_scale=float(pick(rng, [1, 8])))
    pair.check()
