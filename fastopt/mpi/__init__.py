"""The optimizers of :mod:`fastopt` over MPI: each process keeps its share of the state (ZeRO-1).

Every process (rank) has all parameters and gives the gradients of its own batch; a step updates the
parameters, on all ranks, with the mean of these. State, averages and the arithmetic of a step are
divided among the ranks::

    import fastopt.mpi as optim

    opt = optim.Adam(params, lr=1e-3)  # on every rank, with the same parameters
    opt.step(grads)  # on every rank, each with its own

Each class takes what the class of :mod:`fastopt` takes, and by name:

comm : mpi4py.MPI.Intracomm, optional
    Who steps together; None is ``MPI.COMM_WORLD``.
reduction : {"ordered", "mpi"}, optional
    How gradients are added up. "ordered": in the order of the ranks, in the type that the rule
    computes in, so that all bits are those of a step without MPI on that mean, whatever the MPI
    library, the network, ``bucket_bytes`` and the number of threads. "mpi": as the library adds up;
    the bits are the same on all ranks, and may be others on another machine.
bucket_bytes : int, optional
    Gradients and parameters travel in buckets of so many bytes; a rank needs memory for two.
check : int, optional
    After every so many steps, compare a checksum of the parameters between ranks, and raise on all
    if they differ. None: never.

Start programs with ``mpiexec -n 4 python -m mpi4py program.py``: then a rank that ends by an
exception ends all others. Without ``-m mpi4py``, they would wait for it.
"""

from __future__ import annotations

import fastopt
from fastopt.mpi._optimizer import Sharded

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
]


class SGD(Sharded, fastopt.SGD):
    """:class:`fastopt.SGD` over MPI."""


class Adadelta(Sharded, fastopt.Adadelta):
    """:class:`fastopt.Adadelta` over MPI."""


class Adagrad(Sharded, fastopt.Adagrad):
    """:class:`fastopt.Adagrad` over MPI; not with ``rowwise``."""


class Adam(Sharded, fastopt.Adam):
    """:class:`fastopt.Adam` over MPI."""


class AdamW(Sharded, fastopt.AdamW):
    """:class:`fastopt.AdamW` over MPI."""


class Adamax(Sharded, fastopt.Adamax):
    """:class:`fastopt.Adamax` over MPI."""


class Lion(Sharded, fastopt.Lion):
    """:class:`fastopt.Lion` over MPI."""


class NAdam(Sharded, fastopt.NAdam):
    """:class:`fastopt.NAdam` over MPI."""


class RAdam(Sharded, fastopt.RAdam):
    """:class:`fastopt.RAdam` over MPI."""


class RMSprop(Sharded, fastopt.RMSprop):
    """:class:`fastopt.RMSprop` over MPI."""


class Rprop(Sharded, fastopt.Rprop):
    """:class:`fastopt.Rprop` over MPI."""
