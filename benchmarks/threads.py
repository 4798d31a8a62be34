"""Do threads ever hurt? ``python benchmarks/threads.py``

Adam in float32 with one thread and with all, in turns, on models of 1e4 to 1e7 parameters, where a
second thread is hardest to get. Each is the median time of a step (of the whole training step in
the last two), and each has a bound; the exit status is 1 if one is broken.

  alone     step after step: within 1.05 of the best fixed number of threads
  product   after a 300 x 300 matrix product, whose workers still spin: within 1.5 of one thread
  backward  after PyTorch's backward pass: within 1.5
  busy      with a process that spins on every core: within 1.5
  numpy     a training step of a NumPy MLP: not slower (1.03, for the noise)
  torch     a training step of a PyTorch MLP: likewise

With ``--layer openmp`` (or ``team serial openmp``) the steps with all threads run in that threading
layer; the bounds are those of ``team``.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from statistics import fmean, median
from time import perf_counter

import numpy as np

import fastopt
from fastopt import _core
from fastopt.bench.measure import SETTLE_S
from fastopt.compare.model import MLP, cross_entropy

try:
    import torch
except ModuleNotFoundError:
    torch = None

SIZES = {"1e4": 10**4, "3e4": 3 * 10**4, "1e5": 10**5, "3e5": 3 * 10**5}
SIZES |= {"1e6": 10**6, "3e6": 3 * 10**6, "1e7": 10**7}
INPUTS, CLASSES, SAMPLES = 64, 10, 64
TURN_S = 0.06
ALL = fastopt.get_num_threads()


class Array:
    """One parameter; `before` is what goes before each step."""

    def __init__(self, size, threads, before=lambda: None):
        rng = np.random.default_rng(0)
        self.before = before
        self.grads = [rng.standard_normal(size, np.float32)]
        self.opt = fastopt.Adam([rng.standard_normal(size, np.float32)], num_threads=threads)

    def step(self):
        return self.opt.step(self.grads)


def hidden(size):
    """Return the width at which layers INPUTS, h, h, CLASSES have so many parameters."""
    b = INPUTS + CLASSES + 2
    return round((-b + math.sqrt(b * b + 4 * size)) / 2)


class NumpyModel:
    """A network whose `step` is a whole training step."""

    def __init__(self, size, threads):
        rng = np.random.default_rng(0)
        self.model = MLP((INPUTS, hidden(size), hidden(size), CLASSES), cross_entropy, rng)
        self.x = rng.standard_normal((SAMPLES, INPUTS), np.float32)
        self.labels = rng.integers(0, CLASSES, SAMPLES)
        self.opt = fastopt.Adam(self.model.params, num_threads=threads)

    def before(self):
        pass

    def step(self):
        _, grads = self.model.loss_and_grads(self.x, self.labels)
        return self.opt.step(grads)


class TorchModel:
    """A network of which `before` is forward and backward, and `step` that of the optimizer."""

    def __init__(self, size, threads):
        torch.manual_seed(0)
        h = hidden(size)
        linear, relu = torch.nn.Linear, torch.nn.ReLU
        self.model = torch.nn.Sequential(
            linear(INPUTS, h), relu(), linear(h, h), relu(), linear(h, CLASSES)
        )
        self.x = torch.randn(SAMPLES, INPUTS)
        self.labels = torch.randint(CLASSES, (SAMPLES,))
        self.params = list(self.model.parameters())
        self.opt = fastopt.Adam([p.detach().numpy() for p in self.params], num_threads=threads)

    def before(self):
        self.model.zero_grad()
        torch.nn.functional.cross_entropy(self.model(self.x), self.labels).backward()
        self.grads = [p.grad.numpy() for p in self.params]

    def step(self):
        return self.opt.step(self.grads)


class WholeTorchModel(TorchModel):
    """The same, of which `step` is all."""

    def before(self):
        pass

    def step(self):
        super().before()
        return super().step()


def after_product(size, threads):
    a = np.random.default_rng(0).standard_normal((300, 300), np.float32)
    return Array(size, threads, before=lambda: a @ a)


# What is timed, the bound, and whether it is of the best fixed number (else of one thread).
SITUATIONS = {
    "alone": (Array, 1.05, True),
    "product": (after_product, 1.5, False),
    "backward": (TorchModel, 1.5, False),
    "busy": (Array, 1.5, False),
    "numpy": (NumpyModel, 1.03, False),
    "torch": (WholeTorchModel, 1.03, False),
}


@contextmanager
def busy_cores():
    """Keep a process spinning on every core."""
    code = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    spinning = [
        subprocess.Popen([sys.executable, "-c", code, str(cpu)]) for cpu in os.sched_getaffinity(0)
    ]
    try:
        time.sleep(0.3)
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def turn(subject, fixed, repeats, layer="team"):
    """Settle, warm up, and return the seconds of each step."""
    time.sleep(SETTLE_S)
    _core.force_threads(fixed)
    fastopt.set_threading_layer(layer)
    try:
        seconds = []
        for repeat in range(-max(2, repeats // 10), repeats):
            subject.before()
            begin = perf_counter()
            subject.step()
            end = perf_counter()
            if repeat >= 0:
                seconds.append(end - begin)
    finally:
        _core.force_threads(0)
        fastopt.set_threading_layer("team")
    return seconds


def measure(make, size, counts, seconds, layers):
    """Return the seconds of each step with one thread, all in each layer, and fixed numbers."""
    variants = {"one": (make(size, 1), 0, "team")}
    variants |= {layer: (make(size, ALL), 0, layer) for layer in layers}
    variants |= {count: (make(size, ALL), count, "team") for count in counts}
    for subject, fixed, layer in variants.values():
        turn(subject, fixed, 5, layer)
    begin = perf_counter()
    turn(variants["one"][0], 0, 5)
    repeats = max(5, min(500, int(TURN_S / (perf_counter() - begin) * 7)))
    found = {name: [] for name in variants}
    end, first = perf_counter() + seconds, 0
    names = list(variants)
    while perf_counter() < end or first < 5:
        for name in names[first % len(names) :] + names[: first % len(names)]:
            subject, fixed, layer = variants[name]
            found[name] += turn(subject, fixed, repeats, layer)
        first += 1
    used = {}
    for layer in layers:
        fastopt.set_threading_layer(layer)
        used[layer] = variants[layer][0].step().threads
    fastopt.set_threading_layer("team")
    return found, used


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("situations", nargs="*", metavar="SITUATION", help="all of the above")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line (3)")
    parser.add_argument(
        "--layer", nargs="+", default=["team"], choices=_core.layers()["available"],
        help="threading layers to compare (team)",
    )  # fmt: skip
    parser.add_argument("--no-check", action="store_true", help="exit with 0 in any case")
    args = parser.parse_args()
    unknown = set(args.situations) - set(SITUATIONS)
    if unknown:
        parser.error(f"no such situation: {', '.join(sorted(unknown))}")

    print(f"microseconds, medians; all = {ALL} threads; ratio to the best fixed or one thread")
    heading = (
        "situation", "size", "layer", "one", "all", "used", "ratio", "bound", "of means", "fixed"
    )  # fmt: skip
    line = "{:<9} {:>5} {:<6} {:>10} {:>10} {:>4} {:>6} {:>6} {:>8}  {}"
    print(line.format(*heading))
    broken = 0
    for situation in args.situations or SITUATIONS:
        make, bound, to_fixed = SITUATIONS[situation]
        if torch is None and situation in ("backward", "torch"):
            print(f"{situation:<9} left out: torch is not installed")
            continue
        counts = range(1, ALL + 1) if to_fixed else ()
        for size in args.sizes:
            with busy_cores() if situation == "busy" else nullcontext():
                found, used = measure(make, SIZES[size], counts, args.seconds, args.layer)
            us = {name: median(seconds) * 1e6 for name, seconds in found.items()}
            best = min(counts, key=us.__getitem__) if to_fixed else "one"
            for layer in args.layer:
                ratio = us[layer] / us[best]
                broken += ratio > bound
                print(
                    line.format(
                        situation,
                        size,
                        layer,
                        f"{us['one']:.1f}",
                        f"{us[layer]:.1f}",
                        used[layer],
                        f"{ratio:.2f}" + "!" * (ratio > bound),
                        f"{bound:.2f}",
                        f"{fmean(found[layer]) / fmean(found[best]):.2f}",
                        " ".join(f"{count}:{us[count]:.1f}" for count in counts),
                    ),
                    flush=True,
                )
    if broken:
        print(f"{broken} bounds broken (marked !)")
    return int(broken > 0 and not args.no_check)


if __name__ == "__main__":
    sys.exit(main())
