"""OpenAI baselines' MpiAdam, ported: Adam on a flat vector of which every process has a copy."""

import numpy as np
from mpi4py import MPI

import fastopt


class MPIAdam:
    """Adam on a flat vector of which every process of a communicator has a copy."""

    def __init__(self, flat, comm, **options):
        self.flat, self.comm = flat, comm
        self.total = np.empty_like(flat)
        # The processes share the machine's cores already.
        self.opt = fastopt.Adam([flat], num_threads=1, **options)
        self.sync()

    def sync(self):
        """Give all processes the parameters of the first."""
        self.comm.Bcast(self.flat)

    def check_synced(self):
        """Raise in all processes if one has parameters with other bits than the first."""
        first = self.flat.copy()
        self.comm.Bcast(first)
        if not self.comm.allreduce(first.tobytes() == self.flat.tobytes(), MPI.LAND):
            raise RuntimeError("the processes have come to different parameters")

    def update(self, grad):
        """Step with the mean of the gradients of all processes."""
        self.comm.Allreduce(grad, self.total)
        self.opt.step([self.total], loss_scale=self.comm.size)
