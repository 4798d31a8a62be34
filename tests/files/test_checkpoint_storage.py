"""Files and copies of parameters and state in fewer bits: they go on, convert, or are refused."""

import contextlib
import json
import re
from functools import partial

import numpy as np
import pytest
from forged import forge, read
from old_checkpoints import DATA, OLD
from old_checkpoints import SHAPES as OLD_SHAPES
from old_checkpoints import numbers as old_numbers
from stored import (
    BF16,
    COPIES,
    F16,
    F32,
    STORED,
    advanced,
    by_file,
    by_state_dict,
    made,
    numbers,
    state_bits,
    strides,
    structured,
)
from support import differences, everything, python
from tables import BY_CLASS, KEEPS_FLOAT32, ROWS, in_8_bits

from fastopt import SGD, Adam, RMSprop
from fastopt.reference import Stored

LOADS = [by_file, by_state_dict]
VARIANTS = [(row.cls, variant) for row in ROWS for variant in row.variants]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


def refused(opt, load, error=(TypeError, ValueError)):
    """Call what must be refused with nothing changed; return the message."""
    before = everything(opt)
    with pytest.raises(error) as caught:
        load()
    assert differences(everything(opt), before) == []
    return str(caught.value)


# ---- training goes on ----------------------------------------------------------------------------


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("stored", STORED)
def test_training_goes_on_with_the_same_bits(stored, copied, path):
    ran = 0
    for i, (cls, variant) in enumerate(VARIANTS):
        options = {**variant, "ema_decay": (None, 0.9)[i % 2], "accumulate": 1 + i % 3}
        opt = advanced(made(cls, stored, **options), 1, 2, 3, 4)
        other = advanced(made(cls, stored, seed=9, **options), 5)
        twin = copied(opt, other, path)
        assert state_bits(twin) == state_bits(opt)
        assert strides(twin) == strides(opt)
        for each in (opt, twin):
            advanced(each, 6, 7, 8)
        assert state_bits(twin) == state_bits(opt)
        ran += 1
    assert ran == len(VARIANTS) > 12


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("options", [{}, {"master_weights": False}, {"accumulate": 2}])
def test_parameters_of_every_type_go_on_together(options, copied, path):
    def begun(seed):
        params = [numbers(seed, dtype)[4] for dtype in (F32, np.float64, BF16, F16)]
        return Adam(params, lr=0.1, ema_decay=0.9, **options)

    def grads(seed):
        return [numbers(seed, dtype)[4] for dtype in (F32, np.float64, BF16, F16)]

    opt, other = begun(1), begun(2)
    for seed in (3, 4, 5):
        opt.step(grads(seed))
    twin = copied(opt, other, path)
    assert state_bits(twin) == state_bits(opt)
    for each in (opt, twin):
        for seed in (6, 7):
            each.step(grads(seed))
    assert state_bits(twin) == state_bits(opt)


SWITCHES = [(row.cls, switch) for row in ROWS for _, switch in row.switches()]
SWITCHES.append((SGD, {"momentum": 0.9, "dampening": 0.5}))  # which a first gradient is without


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("cls", "switch"), SWITCHES)
def test_what_is_switched_on_later_goes_on_with_the_same_bits(cls, switch, stored, copied, path):
    opt = advanced(made(cls, stored), 1, 2)
    opt.param_groups[0].update(switch)
    twin = copied(opt, made(cls, stored, seed=9), path)
    for each in (opt, twin):
        advanced(each, 3)
    assert state_bits(twin) == state_bits(opt)
    assert state_bits(copied(twin, made(cls, stored), path)) == state_bits(opt)
    for name in BY_CLASS[cls].begins:  # its first value is the gradient, not a mean with zero
        found = opt.decoded_state()[1][name]
        gradient = numbers(103, STORED[stored][0])[1].astype(np.float32)
        near = abs(gradient) / 8 + abs(gradient).max() / 2**10
        assert (abs(found - gradient) < near).all()


@pytest.mark.parametrize("stored", STORED)
def test_a_reset_optimizer_goes_on_as_a_new_one(stored):
    for cls, variant in VARIANTS:
        opt = advanced(made(cls, stored, ema_decay=0.5, **variant), 1, 2)
        opt.reset()
        if opt.state[0].keys() & {"master", "master_bits"}:
            kept = [state["master"] for state in opt.decoded_state()]
        else:
            kept = [param.astype(np.float32) for param in opt.params]
        for average, values in zip(opt.ema, kept, strict=True):
            assert average.tobytes() == values.tobytes()
        new = made(cls, stored, ema_decay=0.5, **variant)
        for own, begun in zip(opt.params, new.params, strict=True):
            own[...] = begun
        for state, begun in zip(opt.state, new.state, strict=True):
            for master in state.keys() & {"master", "master_bits"}:
                state[master][...] = begun[master]
        assert state_bits(advanced(opt, 3, 4)) == state_bits(advanced(new, 3, 4))


# ---- where elements lie --------------------------------------------------------------------------

BY_MEMORY = [
    s
    for s in STORED
    if s not in ("f32", "bf16", "f16") and s not in ("bf16, nearest", "bf16 alone, nearest")
]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("to_c", [False, True])
def test_another_memory_order_is_refused_by_name_where_it_matters(stored, to_c, load, path):
    opt = advanced(made(Adam, stored, c_order=not to_c), 1, 2)
    other = advanced(made(Adam, stored, c_order=to_c, seed=9), 3)
    if stored not in BY_MEMORY:
        assert state_bits(load(opt, other, path)) == state_bits(opt)
        return
    message = refused(
        other,
        lambda: (
            load(opt, other, path) if load is by_file else other.load_state_dict(opt.state_dict())
        ),
        ValueError,
    )
    assert "['state']['transposed']: the parameter's order of axes in memory was" in message
    assert "convert=True" in message
    load(opt, other, path, convert=True)
    for k, (own, saved) in enumerate(zip(other.decoded_state(), opt.decoded_state(), strict=True)):
        assert own.keys() == saved.keys()
        for name in own:
            expected = saved[name]
            if name in ("exp_avg", "exp_avg_sq") and "8-bit" in stored:
                expected = rounded(expected, name, other.params[k], "8bit")
            assert own[name].tobytes() == expected.tobytes(), (k, name)


def rounded(values, slot, param, state):
    """Return a slot's values as they are stored beside a parameter."""
    if slot in KEEPS_FLOAT32 or state == "float32":
        return values
    kind = {"bfloat16": "bfloat16", "8bit": in_8_bits(slot)}[state]
    axes = sorted(range(param.ndim), key=lambda axis: -param.strides[axis])
    in_memory = Stored.of(kind, np.ravel(values.transpose(axes))).values()
    places = np.argsort(axes).astype(int)
    return in_memory.reshape([values.shape[axis] for axis in axes]).transpose(places)


def test_a_file_says_how_parameters_lie_only_where_that_matters(path):
    for stored in STORED:
        for c_order in (False, True):
            opt = advanced(made(Adam, stored, c_order=c_order), 1)
            opt.save(path)
            text = read(path)[0].get("memory_order")
            if stored in BY_MEMORY and not c_order:
                assert json.loads(text) == {"transposed": [1, 0], "permuted": [2, 0, 1]}
            else:
                assert text is None
            named = {"transposed": [1, 0], "permuted": [2, 0, 1]} if text else {}
            assert opt.state_dict()["memory_order"] == named


BAD_ORDERS = ["[", "[]", "3", '{"other": [0, 1]}', '{"vector": [1]}', '{"vector": 0}']
BAD_ORDERS += ['{"permuted": [0, 1]}', '{"permuted": [0, 1, 1]}', '{"permuted": [0, 1, 3]}']
BAD_ORDERS += ['{"permuted": [0, true, 2]}', '{"permuted": [0.0, 1, 2]}', '{"permuted": null}']
BAD_ORDERS += ['{"none": [0, 1]}', '{"flat": [0, 1, 2]}', '{"scalar": [0]}', "[" * 100_000]
BAD_ORDERS += ['{"permuted": [[0], 1, 2]}', '{"permuted": {"0": 1}}', '{"permuted": "012"}']


@pytest.mark.parametrize("convert", [False, True])
def test_a_memory_order_that_cannot_be_is_refused(convert, path):
    opt = advanced(made(Adam, "bf16, 8-bit state"), 1)
    opt.save(path)
    metadata, tensors = read(path)
    for text in BAD_ORDERS:
        forge(path, {**metadata, "memory_order": text}, tensors)
        message = refused(opt, partial(opt.load, path, convert=convert))
        assert "memory_order" in message, text


@pytest.mark.parametrize("load", LOADS)
def test_random_rounding_goes_on_only_at_the_same_place_among_the_parameters(load, path):
    for stored in STORED:
        dtype, options = STORED[stored]
        arrays = {name: np.ones(3, dtype) for name in "ab"}
        opt = Adam(arrays, **options)
        opt.step(arrays)
        other = Adam({name: np.ones(3, dtype) for name in "ba"}, **options)
        if stored in BY_MEMORY and "nearest" not in stored:
            message = refused(other, partial(by_file, opt, other, path), ValueError)
            assert "['state']['b']: the parameter's place among all parameters was 1" in message
            assert "convert=True" in message
            by_file(opt, other, path, convert=True)
        else:
            by_file(opt, other, path)
        assert other.state[0]["step"] == 1


# ---- seeds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("stored", STORED)
def test_another_seed_is_refused_where_anything_is_rounded_at_random(stored, load, path):
    opt = advanced(made(Adam, stored, seed=1), 1)
    random = stored in BY_MEMORY and "nearest" not in stored
    opt.save(path)
    assert read(path)[0].get("seed") == ("77" if random else None)
    assert opt.state_dict()["seed"] == (77 if random else None)
    dtype, options = STORED[stored]
    other = Adam(structured(numbers(2, dtype)), **options, seed=78)
    if random:
        message = refused(other, partial(other.load, path), ValueError)
        assert "['seed'] is 77, the optimizer's is 78" in message
        assert "convert=True" in message
        message = refused(other, partial(other.load_state_dict, opt.state_dict()), ValueError)
        assert "['seed'] is 77, the optimizer's is 78" in message
    assert state_bits(load(opt, other, path, convert=True)) == state_bits(opt)


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_any_seed_comes_back(seed, path):
    opts = [SGD([np.ones(3, np.float16)], master_weights=False, seed=seed) for _ in range(2)]
    opts[0].step([np.ones(3, np.float16)])
    opts[0].save(path)
    opts[1].load(path)
    opts[1].load_state_dict(opts[0].state_dict())
    assert opts[1].completed_steps == 1


@pytest.mark.parametrize("seed", ["-1", "18446744073709551616", "1.0", "true", '"77"', "[", "[77]"])
@pytest.mark.parametrize("convert", [False, True])
def test_a_seed_that_cannot_be_is_refused(seed, convert, path):
    opt = advanced(made(SGD, "f16 alone"), 1)
    opt.save(path)
    metadata, tensors = read(path)
    forge(path, {**metadata, "seed": seed}, tensors)
    assert "seed" in refused(opt, partial(opt.load, path, convert=convert))


# ---- what is stored in another type --------------------------------------------------------------


def form(stored):
    """What files of two ways of storing may not differ in."""
    dtype, options = STORED[stored]
    alone = dtype != F32 and not options.get("master_weights", True)
    return dtype, alone, options.get("state_dtype", "float32")


def beside(stored):
    """What state dicts of two ways of storing may not differ in."""
    dtype, alone, state = form(stored)
    return None if alone or dtype == F32 else dtype, state


@pytest.mark.parametrize("saved", STORED)
def test_another_type_is_converted_when_asked_to_and_otherwise_refused_by_name(saved, path):
    ran = 0
    for cls in (Adam, RMSprop):
        options = {"amsgrad": True} if cls is Adam else {"centered": True, "momentum": 0.5}
        opt = advanced(made(cls, saved, **options), 1, 2, 3)
        opt.save(path)
        state_dict = opt.state_dict()
        for own in STORED:
            _, _, state = form(own)
            if form(own) == form(saved):
                continue
            other = advanced(made(cls, own, seed=9, **options), 4)
            message = refused(other, partial(other.load, path))
            assert re.search(r"\['(state|params)'\]\['scalar'\].*convert=True", message), message
            if beside(own) != beside(saved):
                message = refused(other, partial(other.load_state_dict, state_dict))
                assert re.search(r"\['state'\]\['scalar'\].*convert=True", message), message
            other.load(path, convert=True)
            check_converted(opt, other, state)
            weights = values_of_weights(opt)
            for k, param in enumerate(other.params):
                assert values_of_weights(other)[k].tobytes() == stored_as(own, weights[k]).tobytes()
                assert nearest(param, values_of_weights(other)[k])
            kept = [param.copy() for param in other.params]
            other = advanced(made(cls, own, seed=9, **options), 4)
            for param, value in zip(other.params, kept, strict=True):
                param[...] = value
            other.load_state_dict(state_dict, convert=True)
            check_converted(opt, other, state)
            for param, value, weight in zip(
                other.params, kept, values_of_weights(other), strict=True
            ):
                assert param.tobytes() == value.tobytes()
                assert nearest(param, weight)
            advanced(other, 5)
            ran += 1
    assert ran > 20


def values_of_weights(opt):
    decoded = zip(opt.params, opt.decoded_state(), strict=True)
    return [state.get("master", param.astype(np.float32)) for param, state in decoded]


def stored_as(own, values):
    """Return weights as they are after they were stored."""
    dtype, alone, _ = form(own)
    return values.astype(dtype).astype(np.float32) if alone else values


def nearest(param, values):
    """Whether a parameter is the rounding of its weights, to either side where that is even."""
    if param.dtype == BF16:
        return (
            Stored.of("bfloat16 with trailing bits", np.ravel(values)).codes.tobytes()
            == (param.tobytes())
            or (values.astype(BF16) == param).all()
        )
    return (values.astype(param.dtype) == param).all()


def check_converted(opt, other, state):
    assert other.completed_steps == opt.completed_steps == 3
    for k, (new, old) in enumerate(zip(other.decoded_state(), opt.decoded_state(), strict=True)):
        assert new.keys() - {"master"} == old.keys() - {"master"}
        for name in new.keys() - {"master", "step"}:
            expected = rounded(old[name], name, other.params[k], state)
            assert new[name].tobytes() == expected.tobytes(), (k, name)


def test_a_conversion_that_changes_nothing_is_exact(path):
    for stored in STORED:
        opt = advanced(made(Adam, stored), 1, 2)
        for array in (*opt.params, *opt.state[1].values()):
            if array.dtype in (F32, BF16, F16) and array.size > 7:  # a NaN of an odd pattern
                bits = array.view(f"u{array.itemsize}")
                bits[(0,) * array.ndim] = np.iinfo(bits.dtype).max - 2
        for load in LOADS:
            twin = load(opt, made(Adam, stored, seed=9), path, convert=True)
            assert state_bits(twin) == state_bits(opt)


def test_float64_is_never_converted(path):
    for options in ({}, {"state_dtype": "8bit"}):
        for params in ([np.ones(3)], [np.ones(3, np.float32)]):
            opt = Adam(params, **(options if params[0].dtype == F32 else {}))
            opt.step([np.ones(3, params[0].dtype)])
            opt.save(path)
            for dtype, own in [("f8", {}), ("f4", {}), ("f4", {"state_dtype": "8bit"}), ("f2", {})]:
                if (dtype == "f8") == (params[0].dtype == np.float64):
                    continue
                other = Adam([np.ones(3, dtype)], **own)
                assert (
                    "dtype" in (message := refused(other, partial(other.load, path, convert=True)))
                    or "missing" in message
                )
                assert "convert=True" not in message
                refused(other, partial(other.load_state_dict, opt.state_dict(), convert=True))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("rule", OLD)
def test_a_file_of_version_0_1_is_converted(rule, dtype):
    """Its parameters are of float32 and of float64 in turn; the latter stay."""
    old = DATA / f"checkpoint-0.1-{rule}.safetensors"
    cls, options, named = OLD[rule]
    params = [p.astype(dtype) if i % 2 == 0 else p for i, p in enumerate(old_numbers(0))]
    keys = list(OLD_SHAPES) if named else range(4)
    groups = [params[:1], params[1:]]
    if named:
        groups = [
            dict(zip(k, g, strict=True)) for k, g in zip((keys[:1], keys[1:]), groups, strict=True)
        ]
    opt = cls([{"params": group} for group in groups], **options)
    if dtype != F32:
        message = refused(opt, partial(opt.load, old), (TypeError, ValueError))
        assert "convert=True" in message
    opt.load(old, convert=True)
    _, tensors = read(old)
    weights = values_of_weights(opt)
    for k, key in enumerate(keys):
        saved = tensors[f"params/{key}"]
        if k % 2 == 0:
            assert weights[k].tobytes() == saved.tobytes()
            assert nearest(params[k], saved)
        else:
            assert params[k].tobytes() == saved.tobytes()
        for slot in opt.state[k].keys() - {"master", "master_bits"}:
            assert opt.state[k][slot].tobytes() == tensors[f"state/{key}/{slot}"].tobytes()


# ---- forged files --------------------------------------------------------------------------------

KINDS = [np.float32, np.float64, np.float16, BF16, np.uint8, np.uint16, np.int64]


def forgeries(tensors):
    """Yield tensors of which one is missing, of another shape or dtype, or too many; and its name.

    And whether a conversion may know what to do with that.
    """
    for name, array in tensors.items():
        yield (
            {k: a for k, a in tensors.items() if k != name},
            name,
            name.endswith(("_bits", "master")),
        )
        for shape in (array[None], np.append(array, array.dtype.type(1)), np.zeros(0, array.dtype)):
            yield {**tensors, name: shape}, name, False
        for kind in KINDS:
            if kind != array.dtype:
                floats = array.dtype in (F32, F16, BF16) and kind in (F32, F16, BF16)
                yield {**tensors, name: array.astype(kind)}, name, floats
    w = tensors["params/w"]
    for slot in ("exp_avg", "exp_avg_sq"):
        for suffix, kind in [("", np.float32), ("_8bit", np.uint8), ("_scale", np.uint8)]:
            name = f"state/w/{slot}{suffix}"
            if name not in tensors:
                yield {**tensors, name: np.ones(w.shape, kind)}, name, False
    for slot, kind in [
        ("master", np.float32),
        ("master_bits", np.uint16),
        ("param_scale", np.uint8),
    ]:
        if f"state/w/{slot}" not in tensors:
            a_master = (slot, w.dtype) in [("master_bits", BF16), ("master", F16)]
            yield {**tensors, f"state/w/{slot}": np.ones(w.shape, kind)}, "w", a_master


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("stored", STORED)
def test_a_file_with_any_bad_tensor_changes_nothing(stored, convert, path):
    dtype, options = STORED[stored]

    def small():
        return Adam({"w": np.full((5, 30), 0.7, dtype)}, **options)

    opt = small()
    opt.step({"w": np.full((5, 30), 0.3, dtype)})
    opt.save(path)
    metadata, tensors = read(path)
    ran = 0
    for changed, name, convertible in forgeries(tensors):
        forge(path, metadata, changed)
        if convert and convertible:
            with contextlib.suppress(TypeError, ValueError):
                small().load(path, convert=True)
        else:
            message = refused(opt, partial(opt.load, path, convert=convert))
            assert re.search("|".join(name.split("/")), message), (name, message)
            assert not convert or "convert=True" not in message
        ran += 1
    assert ran > 40
    forge(path, metadata, tensors)
    opt.load(path, convert=convert)


@pytest.mark.parametrize("stored", STORED)
def test_a_file_that_is_to_be_converted_with_any_bad_tensor_changes_nothing(stored, path):
    def small(stored, value):
        dtype, options = STORED[stored]
        opt = Adam({"w": np.full((5, 30), value, dtype)}, **options)
        opt.step({"w": np.full((5, 30), 0.3, dtype)})
        return opt

    small(stored, 0.7).save(path)
    metadata, tensors = read(path)
    others = [small(other, 0.5) for other in STORED if form(other) != form(stored)]
    ran = 0
    for name, array in tensors.items():
        one_more = np.append(array, array.dtype.type(1))
        bad = [array[None], array[..., None], one_more, one_more[:1], one_more[:0]]
        bad += [array.astype(kind) for kind in KINDS if kind not in (array.dtype, F32, F16, BF16)]
        for changed in bad:
            if (changed.shape, changed.dtype) == (array.shape, array.dtype):
                continue
            forge(path, metadata, {**tensors, name: changed})
            for other in others:
                message = refused(other, partial(other.load, path, convert=True))
                assert re.search("|".join(name.split("/")), message), (name, message)
                assert "convert=True" not in message
                ran += 1
    assert ran > 300
    forge(path, metadata, tensors)
    for other in others:
        other.load(path, convert=True)


def test_a_state_dict_that_is_to_be_converted_with_a_bad_array_changes_nothing():
    saved = advanced(made(Adam, "bf16"), 1).state_dict()
    state = saved["state"]["vector"]
    swapped = state["exp_avg"].astype(state["exp_avg"].dtype.newbyteorder())
    for name, array in [
        ("master", np.ones(130, np.float32)),  # beside the other one
        ("master_bits", np.ones(130, np.uint8)),
        ("master_bits", np.ones(129, np.uint16)),
        ("exp_avg", swapped),
        ("exp_avg", state["exp_avg"].tolist()),
        ("exp_avg_8bit", np.ones(130, np.uint8)),
    ]:
        changed = {**saved, "state": {**saved["state"], "vector": {**state, name: array}}}
        for stored in ("f32, 8-bit state", "f32, bf16 state", "bf16 alone, bf16 state"):
            other = made(Adam, stored)
            message = refused(other, partial(other.load_state_dict, changed, convert=True))
            assert "['state']['vector']" in message


@pytest.mark.parametrize("convert", [False, True])
def test_half_of_a_pair_is_refused_where_the_step_uses_neither(convert, path):
    opt = Adam([np.ones(70, np.float32)], state_dtype="8bit")
    momentum = RMSprop([np.ones(70, np.float32)], state_dtype="8bit", momentum=0.5)
    momentum.step([np.ones(70, np.float32)])
    momentum.param_groups[0]["momentum"] = 0.0
    momentum.save(path)
    metadata, tensors = read(path)
    for half in ("momentum_buffer_8bit", "momentum_buffer_scale"):
        changed = {name: a for name, a in tensors.items() if not name.endswith(half)}
        forge(path, metadata, changed)
        message = refused(momentum, partial(momentum.load, path, convert=convert))
        assert f"missing ['{half}']" in message
    assert opt.completed_steps == 0


# ---- without ml_dtypes ---------------------------------------------------------------------------

WITHOUT = """
import sys
import numpy as np, fastopt
if sys.argv[2] == "missing":
    sys.modules["ml_dtypes"] = None
w = np.zeros(3, np.float32)
opt = fastopt.Adam([w])
try:
    opt.load(sys.argv[1], convert=True)
except ImportError as error:
    print(error, w, opt.completed_steps)
else:
    print(w, opt.completed_steps)
"""


@pytest.mark.parametrize("stored", ["f32, bf16 state", "bf16"])
def test_a_file_with_bfloat16_says_what_it_needs(stored, path):
    dtype, options = STORED[stored]
    opt = Adam([np.ones(3, dtype)], **options)
    opt.step([np.zeros(3, dtype)])
    opt.save(path)
    name = "params/0" if dtype == BF16 else "state/0/exp_avg"
    done = python("-c", WITHOUT, str(path), "missing")
    assert done.stdout == (
        f"checkpoint '{path}': tensor '{name}', of bfloat16, needs the package ml_dtypes: "
        "pip install 'fastopt[bfloat16]' [0. 0. 0.] 0\n"
    ), done.stderr
    done = python("-c", WITHOUT, str(path), "there, but not imported")
    assert done.stdout == "[1. 1. 1.] 1\n", done.stderr
