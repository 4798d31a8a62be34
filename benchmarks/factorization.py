"""A whole training by rows, and what the optimizer's part of it is.

    python benchmarks/factorization.py [--widths 4 64] [--epochs 7]

The model, data and gradients of examples/numpy_matrix_factorization.py, of embeddings as wide as
there or wider. Only the optimizer differs: fastopt, Adagrad on the rows in NumPy, and
torch.optim.Adagrad on sparse gradients, which share the arrays' memory, with one thread and with
all. PyTorch's refuses weight decay for those, so there is none. Each trains a model of its own, in
turns, an epoch at a time; what is reported is the median of the epochs, and what an epoch takes in
which nobody steps. The losses must agree.
"""

import argparse
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
from rows_numpy import adagrad, summed

import fastopt
from fastopt.bench.measure import SETTLE_S

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "numpy_matrix_factorization.py"
SIZE, LR, EPS = 1000, 0.3, 1e-10


class Nobody:
    def __init__(self, params):
        pass

    def begin(self):
        pass

    def step(self, grads):
        pass


class Fastopt(Nobody):
    def __init__(self, params):
        self.step = fastopt.Adagrad(params, lr=LR).step


class NumPy(Nobody):
    def __init__(self, params):
        self.params, self.sums = params, [np.zeros_like(p) for p in params]

    def step(self, grads):
        for param, grad, sums in zip(self.params, grads, self.sums, strict=True):
            if param.ndim == 0:
                sums += grad * grad
                param -= LR * grad / (np.sqrt(sums) + EPS)
                continue
            adagrad(*summed(grad.indices, grad.values), param, sums, LR, EPS)


class Torch(Nobody):
    def __init__(self, params, threads=1):
        import torch

        self.threads = threads
        torch.sparse.check_sparse_tensor_invariants.disable()
        self._torch = torch
        self.params = [torch.nn.Parameter(torch.from_numpy(param)) for param in params]
        self.opt = torch.optim.Adagrad(self.params, lr=LR, eps=EPS)

    def begin(self):
        self._torch.set_num_threads(self.threads)

    def step(self, grads):
        torch = self._torch
        for param, grad in zip(self.params, grads, strict=True):
            if param.ndim == 0:
                param.grad = torch.tensor(grad)
                continue
            indices, values = torch.from_numpy(grad.indices), torch.from_numpy(grad.values)
            param.grad = torch.sparse_coo_tensor(
                indices[None], values, param.shape, check_invariants=False
            )
        self.opt.step()


OPTIMIZERS = {
    "fastopt": Fastopt,
    "NumPy": NumPy,
    "torch, 1 thread": Torch,
    "torch, all": lambda params: Torch(params, fastopt.get_num_threads()),
    "nobody": Nobody,
}


def model(width):
    """Return the names of the example, up to its training."""
    source = EXAMPLE.read_text()
    source = source[: source.index("\nsize, epochs = ")]
    as_there = "films, width, noise = 6000, 4000, 4, 0.5"
    assert as_there in source
    names = {}
    exec(source.replace(as_there, f"films, width, noise = 6000, 4000, {width}, 0.5"), names)
    return names


def epoch(names, opt, order):
    """Train for an epoch; return its seconds and the loss."""
    u, f, rating = names["u"], names["f"], names["rating"]
    predict, gradients, total = names["predict"], names["gradients"], 0.0
    begin = time.perf_counter()
    for start in range(0, len(order), SIZE):
        batch = order[start : start + SIZE]
        error = predict(u[batch], f[batch]) - rating[batch]
        opt.step(gradients(u[batch], f[batch], error / SIZE))
        total += (error * error).sum()
    return time.perf_counter() - begin, total / len(order)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--ratings", type=int, default=540_000, help="of an epoch (540000)")
    args = parser.parse_args()
    print(f"up to {fastopt.get_num_threads()} threads; seconds of an epoch, medians")
    for width in args.widths:
        found = {}
        for name, kind in OPTIMIZERS.items():
            if name.startswith("torch") and find_spec("torch") is None:
                print(f"{name}: left out, it is not installed")
                continue
            names = model(width)
            found[name] = names, kind(names["opt"].params), [], []
        for number in range(args.epochs):
            order = np.random.default_rng(number).permutation(540_000)[: args.ratings]
            for names, opt, seconds, losses in found.values():
                opt.begin()
                time.sleep(SETTLE_S)
                for kept, value in zip((seconds, losses), epoch(names, opt, order), strict=True):
                    kept.append(value)
        alone = median(found["nobody"][2])
        for name, (_, _, seconds, losses) in found.items():
            if name != "nobody":
                np.testing.assert_allclose(losses, found["fastopt"][3], rtol=1e-3, err_msg=name)
            s = median(seconds)
            print(f"width {width:3}  {name:16} {s:7.3f}  of which steps {s - alone:7.3f}")


if __name__ == "__main__":
    main()
