"""The functions over parameters, gradients and state that are stored in fewer bits."""

import inspect
import itertools

import numpy as np
import pytest
from oracle import NUMBERS
from stored import BF16, F16, F32, SHAPES, STORED, advanced, made, numbers
from tables import BY_CLASS, BY_RULE, CASE_IDS, CASES, ROWS, as_function

import fastopt
from fastopt import _core, functional, reference


def frozen(array):
    array.flags.writeable = False
    return array


def pair(codes, scales):
    return None if codes is None else (codes, scales)


def as_arguments(row, states):
    """Return of the state of several parameters the slots, by name, and the masters."""
    slots = {
        name: [s.get(name, pair(s.get(f"{name}_8bit"), s.get(f"{name}_scale"))) for s in states]
        for name in row.slots
    }
    slots = {name: arrays for name, arrays in slots.items() if arrays[0] is not None}
    masters = [state.get("master_bits", state.get("master")) for state in states]
    return slots, None if masters[0] is None else masters


def flat_list(arguments):
    """Return all arrays in lists, tuples and dicts of them."""
    if isinstance(arguments, np.ndarray):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    if not isinstance(arguments, (list, tuple)):
        return []
    return [a for x in arguments for a in flat_list(x)]


def copied(states):
    return [{name: a.copy(order="K") for name, a in state.items()} for state in states]


def assert_same(params, states, opt, where):
    for i, own, other in zip(itertools.count(), params, opt.params, strict=False):
        assert own.tobytes("A") == other.tobytes("A"), where
        for name, array in states[i].items():
            assert name == "step" or array.tobytes("A") == opt.state[i][name].tobytes("A"), where


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize(("name", "cls", "kwargs"), CASES, ids=CASE_IDS)
def test_a_call_has_the_bits_of_a_step_of_the_class(name, cls, kwargs, part):
    for stored in list(STORED)[part::4]:
        opt = made(cls, stored, **kwargs)
        params, states = [p.copy(order="K") for p in opt.params], copied(opt.state)
        state, master = as_arguments(BY_CLASS[cls], states)
        call = as_function(cls, kwargs)
        options = {"seed": 77, "stochastic_rounding": "nearest" not in stored}
        for step in (1, 2, 3):
            grads = numbers(step, F32 if step == 3 else opt.params[0].dtype)
            opt.step(dict(zip(SHAPES, grads, strict=True)))
            if step != 2:
                call(params, grads, state, step, master=master, index=0, **options)
                assert_same(params, states, opt, (stored, step))
                continue
            for i in range(len(params)):
                one = {name: arrays[i] for name, arrays in state.items()}
                beside = None if master is None else master[i]
                call(params[i], grads[i], one, step, master=beside, index=i, **options)
            assert_same(params, states, opt, (stored, step))


def stored_array(stored):
    """Return a stored array as the functions take it: its codes, and what lies beside them."""
    if stored.storage == "float64":  # a number
        return np.array(stored.codes), None
    dtype = {"bfloat16": BF16, "float32": F32, "float16": F16}.get(stored.storage, np.uint8)
    codes = stored.codes.view(dtype).copy()
    return codes, None if stored.extra is None else stored.extra.copy()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("param", [BF16, F16, F32], ids=str)
def test_arrays_say_how_each_is_stored_and_the_bits_are_the_references(row, param):
    """Slots of one parameter in several types, which no class has."""
    rng = np.random.default_rng(0)
    kwargs = {"lr": 0.1, "semantics": "torch", **row.variants[-1]}
    options = {**row.defaults, **kwargs}
    used = [slot for slot in row.slots if slot in row.used(options)]
    rule = _core.Rule(row.rule)
    types = {slot: ["float32", "bfloat16"] for slot in used}
    for slot in used:
        if slot in NUMBERS:
            types[slot] = ["float64"]
        elif slot not in rule.exact:
            types[slot] += [f"8-bit {'un' * (slot in rule.unsigned)}signed"]
    call = as_function(row.cls, kwargs)
    size = 64 * 3 + 5
    for storages in itertools.product(*types.values()):
        values = rng.standard_normal(size).astype(param)
        arrays = {"param": reference.Stored.of(param.name, values.astype(F32))}
        for slot, storage in zip(used, storages, strict=True):
            if slot in NUMBERS:
                arrays[slot] = reference.Stored(storage, rng.random(()))
                continue
            arrays[slot] = reference.Stored.of(storage, rng.standard_normal(size).astype(F32) ** 2)
        w = values.copy()
        state = {}
        for slot in used:
            codes, scales = stored_array(arrays[slot])
            state[slot] = codes if scales is None else (codes, scales)
        random = {"seed": 2**64 - 1, "index": 2**40}
        for step in (2, 3):
            grad = rng.standard_normal(size).astype(F32)
            call(w, grad, state, step, stochastic_rounding=True, **random)
            arrays = reference.stored_step(
                row.reference,
                arrays,
                grad,
                step=step,
                stochastic=True,
                **random,
                **row.formula(options),
                semantics="torch",
            )
            expected = [stored_array(stored) for stored in arrays.values()]
            for own, other in zip(flat_list([w, state]), flat_list(expected), strict=True):
                assert own.tobytes() == other.tobytes(), storages


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("stored", STORED)
def test_read_only_inputs_are_left_as_they_are_and_the_result_goes_to_out(stored, many):
    row, opt = BY_CLASS[fastopt.Adam], advanced(made(fastopt.Adam, stored), 0)
    params, states = [p.copy(order="K") for p in opt.params], copied(opt.state)
    state, master = as_arguments(row, states)
    given = [params, *state.values(), *([] if master is None else [master])]
    out = [[like(x) for x in arrays] for arrays in given]
    for array in flat_list(given):
        frozen(array)
    before = [a.tobytes() for a in flat_list(given)]
    options = {"seed": 77, "stochastic_rounding": "nearest" not in stored, "lr": 0.1, "step": 2}
    grads = numbers(101, opt.params[0].dtype)
    if many:
        arguments = [params, grads, *state.values()]
        functional.adam(*arguments, master=master, out=tuple(out), **options)
    else:
        for i in range(len(params)):
            arguments = [params[i], grads[i], *(arrays[i] for arrays in state.values())]
            beside, to = None if master is None else master[i], [arrays[i] for arrays in out]
            functional.adam(*arguments, master=beside, out=to, index=i, **options)
    advanced(opt, 1)
    state, master = as_arguments(row, opt.state)
    wanted = [opt.params, *state.values(), *([] if master is None else [master])]
    for own, other in zip(flat_list(out), flat_list(wanted), strict=True):
        assert own.tobytes("A") == other.tobytes("A")
    assert [a.tobytes() for a in flat_list(given)] == before


def like(given):
    return tuple(map(like, given)) if isinstance(given, tuple) else np.full_like(given, 3)


def test_an_index_counts_on_or_is_that_of_each():
    def stepped(index, params):
        functional.sgd(
            params, [np.ones_like(p) for p in params], lr=1e-3, step=1, stochastic_rounding=True,
            index=index,
        )  # fmt: skip
        return [p.tobytes() for p in params]

    def ones(n):
        return [np.ones(1000, BF16) for _ in range(n)]

    apart = [stepped(i, ones(1))[0] for i in range(5)]
    assert len(set(apart)) == 5
    assert stepped(2, ones(3)) == apart[2:]
    assert stepped((4, 0), ones(2)) == [apart[4], apart[0]]
    assert stepped([np.int8(3)], ones(1)) == [apart[3]]


def test_what_is_stored_otherwise_lies_beside_what_is_not():
    """One list has parameters of all types; only those of 16 bits may have masters."""
    params = [np.ones(70, dtype) for dtype in (F32, BF16, F16, np.float64, BF16)]
    masters = [None, np.zeros(70, np.uint16), np.ones(70, F32), None, None]
    zeros = [np.zeros(70, dtype) for dtype in (BF16, F32, F16, np.float64)]
    momentum = [*zeros, (np.zeros(70, np.uint8), np.zeros(2, np.uint8))]
    for step in range(1, 4):
        grads = [np.ones(70, F32) for _ in params]
        functional.sgd(params, grads, momentum, lr=2**-12, momentum=0.5, master=masters, step=step)
    moved = 2**-12 * (1 + 1.5 + 1.75)
    weights = [params[0], _core.decode(params[1], masters[1]), masters[2], params[3]]
    assert all((w == 1 - moved).all() for w in weights)
    assert (params[4] == 1).all()  # rounding to nearest has lost it all
    assert (_core.decode(*momentum[4]) == 1.75).all()


def test_calls_with_and_without_options_share_what_they_remember():
    """The same arrays, as codes with scales, then without; a master, then none."""
    w, m = np.ones(64, BF16), np.zeros(64, np.uint16)
    codes, scales, g = np.zeros(64, np.uint8), np.zeros(1, np.uint8), np.ones(64, BF16)
    for _ in range(2):
        functional.sgd(w, g, (codes, scales), lr=2**-11, momentum=0.5, master=m)
        before = [a.tobytes() for a in (w, codes, scales, m)]
        with pytest.raises(TypeError, match=r"^momentum_buffers: dtype uint8 .* need scales: give"):
            functional.sgd(w, g, codes, lr=2**-11, momentum=0.5, master=m)
        with pytest.raises(TypeError, match=r"^momentum_buffers: dtype uint8 .* need scales: give"):
            functional.sgd(w, g, codes, lr=2**-11, momentum=0.5)
        assert [a.tobytes() for a in (w, codes, scales, m)] == before
    assert (_core.decode(w, m) == 1 - 2**-11 * 2.5).all()
    assert (w == 1).all()
    functional.sgd(w, g, np.zeros(64, BF16), lr=2**-11, momentum=0.5)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("grad", [BF16, F16, F32], ids=str)
def test_gradients_of_any_exact_type_are_taken_and_zeroed(dtype, grad):
    w, g = np.ones((8, 9), dtype), np.full((9, 8), 0.5, grad).T
    functional.sgd(w, g, lr=0.5, zero_grad=True)
    assert (w == 0.75).all()
    assert not g.any()


def test_what_lends_its_memory_may_do_so_in_a_pair():
    codes, scales, master = np.zeros(65, np.uint8), np.zeros(2, np.uint8), np.zeros(65, np.uint16)
    w, g = np.ones(65, BF16), np.ones(65, F32)
    lent = memoryview(codes), memoryview(scales)
    functional.sgd(w, g, lent, lr=0.5, momentum=0.9, step=1, master=memoryview(master))
    assert (_core.decode(codes, scales) == 1).all()
    assert (w == 0.5).all()


# ---- errors --------------------------------------------------------------------------------------


def arguments(n=3):
    """Adam on bfloat16, with masters, 8-bit state, and AMSGrad's maxima, which keep float32."""
    rng = np.random.default_rng(0)

    def pairs():
        return [(np.zeros(70, np.uint8), np.zeros(2, np.uint8)) for _ in range(n)]

    return {
        "params": [rng.standard_normal(70).astype(BF16) for _ in range(n)],
        "grads": [rng.standard_normal(70).astype(BF16) for _ in range(n)],
        "exp_avgs": pairs(),
        "exp_avg_sqs": pairs(),
        "max_exp_avg_sqs": [np.zeros(70, F32) for _ in range(n)],
        "master": [np.zeros(70, np.uint16) for _ in range(n)],
        "step": 2,
        "lr": 0.1,
    }


def item(name, value, i=1):
    def change(given):
        given[name][i] = value(given) if callable(value) else value

    return change


def option(**values):
    return lambda given: given.update(values)


def all_float64(given):
    given["params"][1] = np.ones(70)


def float16_without(given):
    given["params"][1], given["master"][1] = np.ones(70, F16), np.zeros(70, np.uint16)


def codes(n=70):
    return np.zeros(n, np.uint8)


BAD = [
    (item("exp_avgs", codes()), TypeError, r"exp_avgs\[1\]: dtype uint8 .* need scales: give"),
    (item("exp_avgs", (codes(), codes(1))), ValueError, r"scales of exp_avgs\[1\]: shape \(1,\) is "
     r"not \(2,\), one for each 64 elements of params\[1\]"),
    (item("exp_avgs", (codes(), np.zeros((2, 1), np.uint8))), ValueError,
     r"scales of exp_avgs\[1\]: shape \(2, 1\) is not \(2,\)"),
    (item("exp_avgs", (codes(), np.zeros(2, np.int8))), TypeError,
     r"scales of exp_avgs\[1\]: dtype int8 is not uint8"),
    (item("exp_avgs", (codes(), None)), TypeError, r"scales of exp_avgs\[1\]: .* got None"),
    (item("exp_avgs", (codes(), [0, 0])), TypeError, r"scales of exp_avgs\[1\]: .* got list"),
    (item("exp_avgs", (None, codes(2))), TypeError, r"exp_avgs\[1\]: .* got NoneType"),
    (item("exp_avgs", (codes(69), codes(2))), ValueError, r"exp_avgs\[1\]: shape \(69,\) is not"),
    (item("exp_avgs", (np.zeros(70, F32), codes(2))), TypeError,
     r"codes of exp_avgs\[1\]: dtype float32 is not uint8"),
    (item("exp_avgs", (codes(),)), TypeError, r"exp_avgs\[1\]: .* got a tuple of 1"),
    (item("exp_avgs", (frozen(codes()), codes(2))), ValueError, r"exp_avgs\[1\]: .* read-only"),
    (item("exp_avgs", (codes(), frozen(codes(2)))), ValueError, r"scales of exp_avgs\[1\]: .*read"),
    (item("exp_avgs", (codes(), codes(4)[::2])), ValueError, r"scales of exp_avgs\[1\]: .* dense"),
    (item("exp_avgs", lambda given: (codes(), given["exp_avgs"][0][1])), ValueError,
     r"scales of exp_avgs\[1\] overlaps scales of exp_avgs\[0\]"),
    (item("exp_avgs", lambda given: (given["exp_avg_sqs"][0][0], codes(2))), ValueError,
     r"exp_avgs\[1\] overlaps exp_avg_sqs\[0\]|exp_avg_sqs\[0\] overlaps exp_avgs\[1\]"),
    (item("grads", lambda given: given["master"][2].view(BF16)), ValueError,
     r"grads\[1\] overlaps master\[2\]"),
    (item("max_exp_avg_sqs", (codes(), codes(2))), TypeError,
     r"max_exp_avg_sqs\[1\]: not in 8 bits, but as float32: 8 bits would break it"),
    (item("exp_avgs", np.zeros(70)), TypeError, r"exp_avgs\[1\]: dtype float64 is not that of par"),
    (item("exp_avgs", np.zeros(70, F16)), TypeError, r"exp_avgs\[1\]: dtype float16 is not that o"),
    (item("exp_avgs", np.zeros(70, int)), TypeError, r"exp_avgs\[1\]: dtype int64 .* supported"),
    (item("exp_avgs", np.zeros(7, F32)), ValueError, r"exp_avgs\[1\]: shape \(7,\) is not that of"),
    (item("grads", np.zeros(70)), TypeError, r"grads\[1\]: dtype float64"),
    (item("grads", np.zeros(70, int)), TypeError, r"grads\[1\]: dtype int64"),
    (all_float64, TypeError, r"exp_avgs\[1\]: not in 8 bits, but as float64: its parameter is"),
    (float16_without, TypeError, r"master\[1\]: dtype uint16 .* is not native float32, as besid"),
    (item("params", np.ones(70, F32)), TypeError, r"master\[1\]: params\[1\] of float32 can have"),
    (item("master", np.zeros(70, F32)), TypeError, r"master\[1\]: dtype float32 .* not native u"),
    (item("master", np.zeros(70, ">u2")), TypeError, r"master\[1\]: dtype >u2 .* not native uint"),
    (item("master", np.zeros(69, np.uint16)), ValueError, r"master\[1\]: shape \(69,\) is not"),
    (item("master", frozen(np.zeros(70, np.uint16))), ValueError, r"master\[1\]: .* read-only"),
    (item("master", np.ma.zeros(70, np.uint16)), TypeError, r"master\[1\]: a masked array"),
    (item("master", 1), TypeError, r"master\[1\]: expected a numpy.ndarray, got int"),
    (item("master", lambda given: given["params"][0].view(np.uint16)), ValueError,
     r"master\[1\] overlaps params\[0\]"),
    (option(master=np.zeros(70, np.uint16)), TypeError, "master must be a list or tuple, as param"),
    (option(master=[None]), ValueError, "master: expected 3 arrays, got 1"),
    (option(stochastic_rounding=1), TypeError, "stochastic_rounding must be True or False, got 1"),
    (option(stochastic_rounding=None), TypeError, "stochastic_rounding must be True or False"),
    (option(stochastic_rounding=True, step=None, bias_correction=False), TypeError,
     r"step is required where stochastic_rounding is True, .*\(step=t\)"),
    (option(seed=-1), ValueError, r"seed must be >= 0 and < 2\*\*64, got -1"),
    (option(seed=2**64), ValueError, r"seed must be >= 0 and < 2\*\*64"),
    (option(seed=1.0), TypeError, "seed must be an integer, got 1.0"),
    (option(index=-1), ValueError, r"index must be >= 0 and < 2\*\*62, got -1"),
    (option(index=0.0), TypeError, r"index must be an integer, got 0.0"),
    (option(index=True), TypeError, r"index must be an integer, got True"),
    (option(index=[0, 1, -2]), ValueError, "index must be >= 0"),
    (option(index=[0, 1]), ValueError, "index: expected 3, one for each of params; got 2"),
    (option(masters=[None] * 3), TypeError,
     r"adam\(\) got an unexpected keyword argument 'masters'"),
    (lambda given: given.update(one(given), index=[0]), ValueError, "index: one number for each"),
    (option(out=(1, 2, 3, 4)), ValueError,
     "out must be a tuple of 5: where to write params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, m"),
]  # fmt: skip


def one(given):
    return {name: arrays[0] for name, arrays in given.items() if isinstance(arrays, list)}


def adam(given):
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
    rest = {name: value for name, value in given.items() if name not in names}
    functional.adam(*(given[name] for name in names), **rest)


@pytest.mark.parametrize("case", range(len(BAD)), ids=lambda i: BAD[i][2][:50])
@pytest.mark.parametrize("warm", [False, True])
def test_a_call_that_fails_writes_nothing(case, warm):
    change, error, message = BAD[case]
    given = arguments()
    if warm:
        adam(given)
    intact = flat_list(given)
    change(given)
    every = intact + flat_list(given)
    before = [a.tobytes() for a in every]
    with pytest.raises(error, match=f"^({message})"):
        adam(given)
    assert [a.tobytes() for a in every] == before


def test_the_arguments_of_the_tests_of_errors_are_good():
    for extra in ({}, {"stochastic_rounding": True, "seed": 3, "index": [5, 6, 1]}):
        given = arguments() | extra
        before = [a.tobytes() for a in given["params"]]
        adam(given)
        assert all(a.tobytes() != b for a, b in zip(given["params"], before, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda out: out[4].__setitem__(1, None),
            TypeError,
            r"master\[1\]: given, but not out\[4\]",
        ),
        (
            lambda out: out[4].__setitem__(1, np.zeros(70, F32)),
            TypeError,
            r"out\[4\]\[1\]: dtype float32",
        ),
        (
            lambda out: out[1].__setitem__(1, out[1][1][0]),
            TypeError,
            r"out\[1\]\[1\]: dtype uint8 is that of codes, which need scales",
        ),
        (
            lambda out: out[1].__setitem__(1, np.zeros(70, F32)),
            TypeError,
            r"exp_avgs\[1\]: dtype uint8 .* is not that of out\[1\]\[1\]: float32",
        ),
        (
            lambda out: out[1].__setitem__(1, (codes(), codes(3))),
            ValueError,
            r"scales of out\[1\]\[1\]: shape \(3,\) is not \(2,\)",
        ),
    ],
    ids=range(5),
)
def test_an_out_that_does_not_fit_is_refused_and_nothing_is_written(change, error, message):
    given = arguments()
    out = [[like(x) for x in given[name]] for name in given if name not in ("grads", "step", "lr")]
    given["out"] = tuple(out)
    change(out)
    every = flat_list(given)
    before = [a.tobytes() for a in every]
    with pytest.raises(error, match=f"^{message}"):
        adam(given)
    assert [a.tobytes() for a in every] == before


@pytest.mark.parametrize("row", [*BY_RULE.values()], ids=lambda row: row.rule)
def test_every_function_has_the_options_and_says_so(row):
    shown = inspect.signature(row.function).parameters
    defaults = {"master": None, "stochastic_rounding": False, "seed": 0, "index": 0}
    defaults["indices"] = None
    assert list(shown)[-5:] == list(defaults)
    assert {name: shown[name].default for name in defaults} == defaults
    assert all(shown[name].kind is inspect.Parameter.KEYWORD_ONLY for name in defaults)
    with pytest.raises(TypeError, match=rf"^{row.rule}\(\) got an unexpected keyword argument 'x'"):
        row.function(np.ones(1), np.ones(1), *[np.ones(1)] * len(row.slots), lr=1.0, step=1, x=1)
