"""Training in several processes: each has a part of the data, and all take the same steps.

The model is one flat vector, and so is its gradient: what the processes exchange is one array.

    pip install mpi4py mpich scikit-learn    # or another MPI
    mpiexec -n 4 python examples/mpi_training.py
"""

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


def main():
    """Train softmax regression on handwritten digits."""
    from sklearn.datasets import load_digits

    comm = MPI.COMM_WORLD
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = (x / 16).astype(np.float32)[:1500], x[1500:] / 16, y[:1500], y[1500:]
    own = slice(comm.rank, 1500 // comm.size * comm.size, comm.size)  # as much as the others have
    x, y = x[own], y[own]

    # Each process begins elsewhere, until they are synced. (Not at 0: where gradients cancel there,
    # Adam makes a whole step of what rounding leaves.)
    weights = np.random.default_rng(comm.rank).normal(0, 0.01, (64, 10)).astype(np.float32)
    flat, model = fastopt.flatten({"W": weights, "b": np.zeros(10, np.float32)})
    grad, grads = fastopt.flatten(model)
    opt = MPIAdam(flat, comm, lr=0.05)

    def probabilities(x):
        logits = x @ model["W"] + model["b"]
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exp / exp.sum(axis=1, keepdims=True)

    for step in range(1, 101):
        p = probabilities(x)
        loss = comm.allreduce(float(-np.log(p[range(len(y)), y]).mean())) / comm.size
        p[range(len(y)), y] -= 1
        grads["W"][...] = x.T @ p / len(y)
        grads["b"][...] = p.mean(axis=0)
        opt.update(grad)
        if step % 25 == 0:
            opt.check_synced()
            if comm.rank == 0:
                print(f"Step [{step}/100], Loss: {loss:.4f}")
    if comm.rank == 0:
        accuracy = (probabilities(x_test).argmax(axis=1) == y_test).mean()
        print(f"Test accuracy: {accuracy:.1%}")


if __name__ == "__main__":
    main()
