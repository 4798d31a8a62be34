"""Optimizers whose parameters and state are stored in fewer bits, for tests of copies and files."""

import copy
import math
import pickle

import ml_dtypes
import numpy as np

BF16, F16, F32 = (np.dtype(t) for t in (ml_dtypes.bfloat16, np.float16, np.float32))

# By name: the parameters' dtype and an optimizer's options.
STORED = {
    "f32": (F32, {}),
    "f32, bf16 state": (F32, {"state_dtype": "bfloat16"}),
    "f32, 8-bit state": (F32, {"state_dtype": "8bit"}),
    "f32, 8-bit state, nearest": (F32, {"state_dtype": "8bit", "stochastic_rounding": False}),
    "bf16": (BF16, {}),
    "bf16, nearest": (BF16, {"stochastic_rounding": False}),
    "bf16, bf16 state": (BF16, {"state_dtype": "bfloat16"}),
    "bf16, 8-bit state": (BF16, {"state_dtype": "8bit"}),
    "bf16 alone": (BF16, {"master_weights": False}),
    "bf16 alone, nearest": (BF16, {"master_weights": False, "stochastic_rounding": False}),
    "bf16 alone, bf16 state": (BF16, {"master_weights": False, "state_dtype": "bfloat16"}),
    "bf16 alone, 8-bit state": (BF16, {"master_weights": False, "state_dtype": "8bit"}),
    "f16": (F16, {}),
    "f16, 8-bit state": (F16, {"state_dtype": "8bit"}),
    "f16 alone": (F16, {"master_weights": False}),
    "f16 alone, bf16 state": (F16, {"master_weights": False, "state_dtype": "bfloat16"}),
}

SHAPES = {  # and the axes from the outermost in memory to the innermost
    "scalar": ((), ()),
    "vector": ((130,), (0,)),
    "none": ((0, 3, 4), (0, 2, 1)),
    "transposed": ((9, 15), (1, 0)),
    "permuted": ((3, 11, 5), (2, 0, 1)),
    "flat": ((1, 70, 1), (2, 1, 0)),  # whose elements have one order only
}


def numbers(seed, dtype, c_order=False):
    """Arrays of these shapes that lie so, or in C order; those of one seed have equal elements."""
    rng = np.random.default_rng(seed)
    arrays = []
    for shape, axes in SHAPES.values():
        spread = 10.0 ** rng.integers(-4, 2, shape)
        values = np.asarray(rng.standard_normal(shape) * spread).astype(dtype)
        if not c_order:
            flat = np.empty(math.prod(shape), dtype).reshape([shape[axis] for axis in axes])
            placed = flat.transpose(np.argsort(axes).astype(int))
            placed[...] = values
            values = placed
        arrays.append(values)
    return arrays


def structured(arrays):
    return dict(zip(SHAPES, arrays, strict=True))


def made(cls, stored, *, c_order=False, seed=0, **options):
    dtype, own = STORED[stored]
    options = {"lr": 0.1, "seed": 77, **own, **options}
    return cls(structured(numbers(seed, dtype, c_order)), **options)


def advanced(opt, *seeds):
    for seed in seeds:
        opt.step(structured(numbers(100 + seed, opt.params[0].dtype)))
    return opt


def state_bits(opt):
    """All that training goes on from, wherever it lies."""
    arrays = [*opt.params, *(opt.ema or ()), *(a for s in opt.state for a in s.values())]
    sums = zip(opt._members.sums or (), opt._plan.summed(), strict=False)
    arrays += [array for array, holds in sums if holds]
    names = [list(state) for state in opt.state]
    fresh = [
        [slot for slot in slots if {slot, f"{slot}_8bit"} & state.keys()]
        for slots, state in zip(opt._plan.fresh(), opt.state, strict=True)
    ]
    counts = opt.completed_steps, opt.accumulated_steps, opt._plan.summed(), fresh
    return names, counts, [(a.dtype, a.shape, a.tobytes()) for a in arrays]


def strides(opt):
    """How arrays lie, but those in which that says nothing."""
    arrays = [*opt.params, *(a for s in opt.state for a in s.values())]
    return [
        tuple(s for s, n in zip(a.strides, a.shape, strict=True) if n > 1)
        for a in arrays
        if a.size > 0
    ]


def by_file(opt, twin, path, **options):
    opt.save(path)
    twin.load(path, **options)
    return twin


def by_state_dict(opt, twin, path, **options):
    """Through a pickle, which keeps no order of axes but C's and Fortran's."""
    saved = pickle.loads(pickle.dumps(opt.state_dict()))
    for own, param in zip(twin.params, opt.params, strict=True):
        own[...] = param
    twin.load_state_dict(saved, **options)
    return twin


def by_pickle(opt, twin, path):
    return pickle.loads(pickle.dumps(opt))


def by_deep_copy(opt, twin, path):
    return copy.deepcopy(opt)


COPIES = [by_file, by_state_dict, by_pickle, by_deep_copy]
