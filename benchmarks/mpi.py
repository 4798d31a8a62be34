"""How long is a step over MPI? ``mpiexec -n 2 python -m mpi4py benchmarks/mpi.py``

Adam on float32, one thread a rank, on one array and on many. Timed are

- `by hand`: what a program writes for itself over mpi4py. Parameters and gradients are views of one
  flat vector each; a step is ``Reduce_scatter_block``, a division, ``fastopt.Adam`` on this
  rank's slice, ``Allgather``. It has one place where gradients are, and needs no packing;
- fastopt.mpi, with ``reduction="ordered"`` and ``"mpi"``, over separate arrays, and over views;
- where torch is installed, ``ZeroRedundancyOptimizer`` on gloo, after an all-reduce of the
  gradients.

All have to give the numbers of the first, to a few units in the last place. They take turns,
after a pause and a barrier. A figure is the median of the slowest rank's milliseconds, and its
ratio to the first.
"""

import argparse
import statistics
import time

import numpy as np
from mpi4py import MPI

import fastopt
import fastopt.mpi

SETTLE_S = 0.02
COMM = MPI.COMM_WORLD
RANK, RANKS = COMM.rank, COMM.size


def numbers(seed, size):
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def gradient(size):
    """Return this rank's: of one sign, for where a mean cancels Adam makes much of its rounding."""
    return np.random.default_rng([1, RANK]).random(size, np.float32) + np.float32(0.5)


def views(flat, arrays):
    return np.split(flat, arrays)


class ByHand:
    """A flat vector, of which each rank steps over a slice."""

    def __init__(self, size, arrays):
        self.flat, self.grad = numbers(0, size), gradient(size)
        part = size // RANKS
        self.mean = np.empty(part, np.float32)
        own = self.flat[RANK * part : (RANK + 1) * part]
        self.opt = fastopt.Adam([own], num_threads=1)

    def step(self):
        COMM.Reduce_scatter_block(self.grad, self.mean)
        self.mean /= np.float32(RANKS)
        self.opt.step([self.mean])
        COMM.Allgather(MPI.IN_PLACE, self.flat)

    def params(self):
        return self.flat


class OverMPI:
    """fastopt.mpi, over views of one vector or over arrays apart from one another."""

    def __init__(self, size, arrays, reduction, *, apart):
        params, grads = (views(x, arrays) for x in (numbers(0, size), gradient(size)))
        if apart:
            params, grads = ([array.copy() for array in x] for x in (params, grads))
        self.arrays, self.grads = params, grads
        self.opt = fastopt.mpi.Adam(params, num_threads=1, reduction=reduction)

    def step(self):
        self.opt.step(self.grads)

    def params(self):
        return np.concatenate(self.arrays)


class ZeRO:
    """PyTorch's ZeroRedundancyOptimizer over gloo, after an all-reduce."""

    def __init__(self, size, arrays, port):
        import torch
        import torch.distributed as dist
        from torch.distributed.optim import ZeroRedundancyOptimizer

        torch.set_num_threads(1)
        if not dist.is_initialized():
            address = f"tcp://127.0.0.1:{port}"
            dist.init_process_group("gloo", init_method=address, rank=RANK, world_size=RANKS)
        self.dist = dist
        start, self.mine = map(torch.from_numpy, (numbers(0, size), gradient(size)))
        self.grad = self.mine.clone()
        bounds = list(arrays)
        self.tensors = [torch.nn.Parameter(x.clone()) for x in start.tensor_split(bounds)]
        for tensor, grad in zip(self.tensors, self.grad.tensor_split(bounds), strict=True):
            tensor.grad = grad
        self.opt = ZeroRedundancyOptimizer(
            self.tensors, torch.optim.Adam, parameters_as_bucket_view=True, lr=1e-3, fused=True
        )

    def step(self):
        self.grad.copy_(self.mine)  # which the all-reduce overwrites
        self.dist.all_reduce(self.grad)
        self.grad.div_(RANKS)
        self.opt.step()

    def params(self):
        return np.concatenate([x.detach().numpy() for x in self.tensors])


def checked(ways):
    """Step with each, and raise if any has other numbers than the first."""
    expected = None
    for name, way in ways.items():
        way.step()
        found = way.params()
        expected = found if expected is None else expected
        if not np.allclose(found, expected, rtol=1e-5, atol=1e-6):
            raise SystemExit(f"{name}: other numbers than by hand")


def timed(ways, rounds):
    """Return the median of each, in milliseconds, of rounds in which all take turns."""
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            time.sleep(SETTLE_S)
            COMM.Barrier()
            began = time.perf_counter()
            way.step()
            seconds[name].append(COMM.allreduce(time.perf_counter() - began, MPI.MAX))
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e5, 1e6, 1e7])
    parser.add_argument("--arrays", type=int, nargs="+", default=[1, 300])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument(
        "--port", type=int, help="on which PyTorch's ranks meet; without it, none do"
    )
    args = parser.parse_args()
    for size in map(int, args.sizes):
        size = size // RANKS * RANKS
        for count in args.arrays:
            arrays = [size * i // count for i in range(1, count)]
            ways = {
                "by hand": ByHand(size, arrays),
                "ordered": OverMPI(size, arrays, "ordered", apart=True),
                "ordered, views": OverMPI(size, arrays, "ordered", apart=False),
                "mpi": OverMPI(size, arrays, "mpi", apart=True),
            }
            if args.port is not None:
                ways["ZeRO, gloo"] = ZeRO(size, arrays, args.port)
            checked(ways)
            medians = timed(ways, args.rounds)
            if RANK == 0:
                print(f"{RANKS} ranks, {size:,} elements in {count} arrays")
                for name, median in medians.items():
                    print(f"  {name:16}{median:10.2f} ms{median / medians['by hand']:8.2f}")


if __name__ == "__main__":
    main()
