"""Steps of the reference over arrays in fewer bits: stored_step."""

import numpy as np
import pytest
from oracle import NUMBERS
from tables import BY_CLASS, BY_RULE, CASE_IDS, CASES, in_8_bits

from fastopt import reference
from fastopt.reference import SLOTS, STORAGE, Stored, random_bits, stored_step

N = 200  # three whole blocks of 8 bits, and a part of one
STEPS = 100
SPLIT, MASTER = "bfloat16 with trailing bits", "float16 with master"


def rule_of(cls, kwargs):
    """The rule's function, its options, and the names of its state."""
    row = BY_CLASS[cls]
    options = row.formula({**row.defaults, **kwargs}) | {"semantics": kwargs["semantics"]}
    return row.reference, options, row.used(options)


def numbers(seed):
    rng = np.random.default_rng(seed)
    return np.float32(rng.standard_normal(N) * 10.0 ** rng.integers(-3, 2, N))


def started(param, slots, storage, state="float32"):
    zeros = np.zeros(N, np.float32)
    types = state if isinstance(state, dict) else dict.fromkeys(slots, state)
    return {
        "param": Stored.of(storage, param),
        **{slot: Stored.of(types[slot], zeros) for slot in slots if slot not in NUMBERS},
        **{slot: Stored("float64", np.array(NUMBERS[slot])) for slot in slots if slot in NUMBERS},
    }


def same_bits(one, other):
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def same_arrays(one, other):
    assert one.keys() == other.keys()
    return all(
        one[name].storage == other[name].storage
        and same_bits(one[name].codes, other[name].codes)
        and (one[name].extra is None) == (other[name].extra is None)
        and (one[name].extra is None or same_bits(one[name].extra, other[name].extra))
        for name in one
    )


@pytest.mark.parametrize("storage", ["float32", SPLIT, MASTER])
@pytest.mark.parametrize(("name", "cls", "kwargs"), CASES, ids=CASE_IDS)
def test_a_master_trains_as_float32_does_to_the_bit(name, cls, kwargs, storage):
    rule, options, slots = rule_of(cls, kwargs)
    param = numbers(0)
    arrays = started(param, slots, storage)
    state = {
        slot: np.array(NUMBERS[slot]) if slot in NUMBERS else np.zeros(N, np.float32)
        for slot in slots
    }
    begun = param.copy()
    for step in range(1, STEPS + 1):
        grad = numbers(step)
        rule(param, grad, state, step=step, **options)
        arrays = stored_step(rule, arrays, grad, step=step, **options)
        assert same_bits(arrays["param"].values(), param)
        for slot in slots:
            got = arrays[slot].codes if slot in NUMBERS else arrays[slot].values()
            assert same_bits(got, state[slot])
    assert np.isfinite(param).all()
    assert np.mean(param != begun) > 0.5  # steps of one size may lead back


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("storage", ["bfloat16", "float16", SPLIT, MASTER])
@pytest.mark.parametrize("bits8", [False, True])
@pytest.mark.parametrize(("name", "cls", "kwargs"), CASES[::6], ids=CASE_IDS[::6])
def test_each_array_is_rounded_by_bits_of_its_own(name, cls, kwargs, bits8, storage, stochastic):
    """Array 0 is the parameter; 1 + j is slot j of all that the rule may have, used or not."""
    rule, options, slots = rule_of(cls, kwargs)
    types = {s: in_8_bits(s) for s in slots} if bits8 else dict.fromkeys(slots, "bfloat16")
    arrays = started(numbers(0), slots, storage, types)
    every = list(BY_CLASS[cls].slots)
    for step in (1, 2, 3):
        values = {
            name: stored.codes.copy() if name in NUMBERS else stored.values()
            for name, stored in arrays.items()
        }
        rule(values["param"], numbers(step), values, step=step, **options)
        given = {name: stored.codes.copy() for name, stored in arrays.items()}
        after = stored_step(
            rule,
            arrays,
            numbers(step),
            step=step,
            seed=5,
            index=7,
            stochastic=stochastic,
            **options,
        )
        for array, part in enumerate(["param", *every]):
            if part not in arrays:
                continue
            if part in NUMBERS:
                assert same_bits(after[part].codes, values[part])
                continue
            key = {"seed": 5, "step": step, "param": 7, "array": array}
            random = random_bits(N, **key) if stochastic else None
            kept = arrays[part].storage
            expected = Stored(kept, *STORAGE[kept].store(values[part], random))
            assert same_arrays({part: after[part]}, {part: expected})
            assert same_bits(arrays[part].codes, given[part])
        arrays = after


@pytest.mark.parametrize("rule", BY_RULE)
def test_slots_are_those_of_the_rule(rule):
    assert tuple(BY_RULE[rule].slots) == SLOTS[rule]
    assert SLOTS.keys() == BY_RULE.keys()


@pytest.mark.parametrize("state", ["bfloat16", "8-bit signed"])
def test_a_part_is_stepped_as_the_whole_is(state):
    types = {"exp_avg": state, "exp_avg_sq": "8-bit unsigned"}
    whole = started(numbers(0), types, "bfloat16", types)

    def cut(arrays):
        return {
            name: stored._replace(
                codes=stored.codes[64:],
                extra=None if stored.extra is None else stored.extra[1:],
            )
            for name, stored in arrays.items()
        }

    part = cut(whole)
    for step in (1, 2, 3):
        grad = numbers(step)
        part = stored_step(reference.adam, part, grad[64:], step=step, first=64, lr=0.01)
        whole = stored_step(reference.adam, whole, grad, step=step, lr=0.01)
        assert same_arrays(cut(whole), part)


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_small_updates_are_lost_to_the_nearest_and_kept_at_random(storage):
    """A hundred steps of 1e-5 each, from 1, below which the spacing is 2^-8 or 2^-11."""
    n, moved = 20_000, {}
    grad = np.full(n, 1e-5, np.float32)
    for stochastic in (False, True):
        arrays = {"param": Stored.of(storage, np.ones(n, np.float32))}
        for step in range(1, STEPS + 1):
            arrays = stored_step(
                reference.sgd, arrays, grad, step=step, lr=1.0, stochastic=stochastic
            )
        moved[stochastic] = 1 - arrays["param"].values().mean(dtype=np.float64)
    assert moved[False] == 0
    spacing = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[storage]
    error = 5 * np.sqrt(STEPS * 1e-5 * spacing / n)  # of a mean: each step is a coin's throw
    assert abs(moved[True] - STEPS * 1e-5) < error + STEPS * spacing * 2.0**-13
