"""What do subnormal numbers cost? ``python benchmarks/subnormals.py``

A parameter whose gradients become and stay zero: its moments decay until they are subnormal (in
float32 below 1.2e-38), and processors may be slow with those. For each optimizer, a few steps with
ordinary gradients, then 5000 with zeros: the median time of a step before, the slowest stretch of
100 steps, and the last one; and the last with ``None`` for the gradient, which leaves the parameter
out.
"""

import argparse
from statistics import median
from time import perf_counter

import numpy as np

import fastopt

SIZE, STRETCH = 100_000, 100
OPTIMIZERS = {
    "SGD, momentum 0.9": (fastopt.SGD, {"momentum": 0.9}),
    "RMSprop, alpha 0.99": (fastopt.RMSprop, {}),
    "RMSprop, alpha 0.9, momentum 0.9": (fastopt.RMSprop, {"alpha": 0.9, "momentum": 0.9}),
    "Adam, betas 0.9, 0.999": (fastopt.Adam, {}),
    "Adam, betas 0.9, 0.9": (fastopt.Adam, {"betas": (0.9, 0.9)}),
    "Adam, amsgrad": (fastopt.Adam, {"amsgrad": True}),
}


def stretch(opt, grads, steps=STRETCH):
    """Return the median microseconds of some steps."""
    seconds = []
    for _ in range(steps):
        begin = perf_counter()
        opt.step(grads)
        seconds.append(perf_counter() - begin)
    return median(seconds) * 1e6


def subnormal(opt):
    """Return the share of the state that is subnormal."""
    arrays = [array for name, array in opt.state[0].items() if name != "step"]
    tiny = np.finfo(arrays[0].dtype).smallest_normal
    return sum(np.mean((array != 0) & (abs(array) < tiny)) for array in arrays) / len(arrays)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5000, help="with gradients of zero (5000)")
    args = parser.parse_args()
    print(f"microseconds a step of {SIZE} elements, one thread; {args.steps} steps of zeros")
    line = "{:<34} {:>8} {:>9} {:>14} {:>8} {:>8} {:>7}"
    print(line.format("", "ordinary", "slowest", "(subnormal)", "growth", "last", "None"))
    for dtype in (np.float32, np.float64):
        rng = np.random.default_rng(0)
        for name, (cls, options) in OPTIMIZERS.items():
            opt = cls([rng.standard_normal(SIZE).astype(dtype)], num_threads=1, **options)
            grads = [rng.standard_normal(SIZE).astype(dtype)]
            before, zeros = stretch(opt, grads), [np.zeros(SIZE, dtype)]
            slowest, share, last = 0.0, 0.0, 0.0
            for _ in range(0, args.steps, STRETCH):
                last = stretch(opt, zeros)
                if last > slowest:
                    slowest, share = last, subnormal(opt)
            print(
                line.format(
                    f"{dtype.__name__}: {name}",
                    f"{before:.1f}",
                    f"{slowest:.1f}",
                    f"({share:.0%})",
                    f"{slowest / before:.2f}",
                    f"{last:.1f}",
                    f"{stretch(opt, [None]):.1f}",
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
