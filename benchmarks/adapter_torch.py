"""fastopt.torch beside PyTorch's fused=True: the time of a step.

    python benchmarks/adapter_torch.py [--threads 1 2] [--sizes 1e2 ... 5e7] [--classes Adam ...]

One tensor of each size, a small network of 6 arrays, and a model of 300. The two are timed in
turns, in one process, after a few steps that must give the same numbers; what is reported is the
median of the rounds, and the bandwidth that it means. RMSprop has no fused step in PyTorch: there
the peer is foreach=True.
"""

import argparse

import torch
from turns import medians

import fastopt
import fastopt.torch

CLASSES = {  # keyword arguments, and arrays that a step reads or writes, counted once each way
    "SGD": ({"lr": 1e-3, "momentum": 0.9}, 5),
    "Adagrad": ({"lr": 1e-3}, 5),
    "RMSprop": ({"lr": 1e-3}, 5),
    "Adam": ({"lr": 1e-3}, 7),
    "AdamW": ({"lr": 1e-3}, 7),
}
SIZES = [1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 5e7]
MLP = [(64, 128), (128,), (128, 64), (64,), (64, 10), (10,)]
MANY = [(8 + i % 9, 8) for i in range(300)]


def make(module, name, shapes, options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape)
    return getattr(module, name)(params, **options)


def pair(name, shapes):
    """Return the two optimizers, after steps that gave the same numbers."""
    options, _ = CLASSES[name]
    peer = {"foreach": True} if name == "RMSprop" else {"fused": True}
    opts = (
        make(fastopt.torch, name, shapes, options),
        make(torch.optim, name, shapes, {**options, **peer}),
    )
    for opt in opts:
        for _ in range(3):
            opt.step()
    for p, q in zip(*(opt.param_groups[0]["params"] for opt in opts), strict=True):
        torch.testing.assert_close(p, q)
    assert {info["runs"] for info in opts[0].fastopt_info()} == {"fastopt"}
    return opts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES)
    parser.add_argument("--classes", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for each row")
    args = parser.parse_args()

    cases = [(f"{size:.0e}", [(int(size),)]) for size in args.sizes]
    cases += [("6 arrays", MLP), ("300 arrays", MANY)]
    print(f"torch {torch.__version__}, fastopt {fastopt.__version__}, {fastopt.build_info()}")
    print(f"{'class':8} {'threads':>7} {'case':>10} {'fastopt us':>12} {'torch us':>12} "
          f"{'times':>6} {'GB/s':>6}")  # fmt: skip
    slower = 0
    for name in args.classes:
        for threads in args.threads:
            torch.set_num_threads(threads)
            fastopt.set_num_threads(threads)
            for label, shapes in cases:
                ours, theirs = medians([opt.step for opt in pair(name, shapes)], args.budget)
                numel = sum(torch.Size(shape).numel() for shape in shapes)
                rate = CLASSES[name][1] * 4 * numel / ours / 1e9
                slower += ours > theirs
                print(f"{name:8} {threads:7} {label:>10} {ours * 1e6:12.2f} {theirs * 1e6:12.2f} "
                      f"{theirs / ours:6.2f} {rate:6.1f}", flush=True)  # fmt: skip
    print(f"slower than PyTorch in {slower} rows")


if __name__ == "__main__":
    main()
