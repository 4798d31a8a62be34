"""What the files in ``tests/data`` hold: checkpoints that released versions of fastopt wrote.

A file is written once, by the version that it is named for, and loads for ever::

    python tests/old_checkpoints.py VERSION
"""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np

import fastopt

DATA = Path(__file__).parent / "data"

# By rule: class, options of the optimizer, and whether the parameters have names.
OLD = {
    "sgd": (fastopt.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "maximize": True}, True),
    "adagrad": (fastopt.Adagrad, {"lr_decay": 0.1, "clip_norm": 0.5, "semantics": "keras"}, False),
    "rmsprop": (fastopt.RMSprop, {"momentum": 0.5, "centered": True, "clip_value": 0.25}, True),
    "adam": (fastopt.Adam, {"amsgrad": True, "ema_decay": 0.75, "global_clip_norm": 1.0}, True),
    "adamw": (fastopt.AdamW, {"lr": 1 / 3, "ema_decay": 0.5, "bias_correction": False}, False),
}
# The same of what is stored in fewer bits, with the parameters' dtypes in turn.
IN_FEWER_BITS = {
    "adamw-bfloat16": (
        fastopt.AdamW,
        {"lr": 0.25, "ema_decay": 0.5, "state_dtype": "bfloat16", "seed": 2**64 - 3},
        True,
        (ml_dtypes.bfloat16, np.float32),
    ),
    "adam-8bit": (
        fastopt.Adam,
        {"lr": 0.25, "amsgrad": True, "state_dtype": "8bit"},
        True,
        (np.float32, ml_dtypes.bfloat16),
    ),
    "sgd-float16": (
        fastopt.SGD,
        {"lr": 0.1, "momentum": 0.9, "ema_decay": 0.75},
        False,
        (np.float16, ml_dtypes.bfloat16),
    ),
}
STEPS = 3
SHAPES = {"layer.weight": (4, 3), "layer.bias": (3,), "größe/∅": (0, 2), "scale": ()}
LARGER = {**SHAPES, "layer.weight": (10, 13)}  # several blocks of 64 elements


def numbers(seed, dtypes=(np.float32, np.float64), shapes=SHAPES):
    """Arrays of small binary fractions, of the dtypes in turn, the same in any NumPy."""
    arrays = []
    for i, shape in enumerate(shapes.values()):
        count = int(np.prod(shape))
        values = ((np.arange(count) * 37 + seed * 29 + i * 11) % 101 - 50) / 64
        arrays.append(values.reshape(shape).astype(dtypes[i % 2]))
    return arrays


def numbers_for(rule, seed):
    return numbers(seed) if rule in OLD else numbers(seed, IN_FEWER_BITS[rule][3], LARGER)


def made(rule):
    """Return an optimizer before its first step, in two groups."""
    cls, options, named = {**OLD, **IN_FEWER_BITS}[rule][:3]
    params = numbers_for(rule, 0)
    params[0] = np.asfortranarray(params[0])
    if named:
        params = list(zip(SHAPES, params, strict=True))
    first, rest = params[:1], params[1:]
    if named:
        first, rest = dict(first), dict(rest)
    groups = [{"params": first, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.1}]
    return cls(groups, **options)


def advanced(rule, opt, steps=STEPS):
    """Take some steps with the gradients that are due; the bias has none in the first."""
    named = {**OLD, **IN_FEWER_BITS}[rule][2]
    for k in range(opt.completed_steps, opt.completed_steps + steps):
        grads = numbers_for(rule, k + 1)
        grads[1] = grads[1] if k else None
        opt.step(dict(zip(SHAPES, grads, strict=True)) if named else grads)
    return opt


def main():
    (version,) = sys.argv[1:]
    if not fastopt.__version__.startswith(version + "."):
        raise SystemExit(f"this is fastopt {fastopt.__version__}")
    for rule in (*OLD, *IN_FEWER_BITS):
        path = DATA / f"checkpoint-{version}-{rule}.safetensors"
        if path.exists():
            print(f"{path} exists; it is not written again")
            continue
        advanced(rule, made(rule)).save(path)


if __name__ == "__main__":
    main()
