"""Data parallelism: several processes train one model, each on its part of the digits.

    pip install 'fastopt[mpi,checkpoint]' mpich scikit-learn    # or another MPI than mpich
    mpiexec -n 4 python -m mpi4py examples/mpi_training.py

Each process keeps its share of Adam's state alone. With a checkpoint, training goes on after a
crash, in any number of processes; here the last process kills itself:

    mpiexec -n 4 python -m mpi4py examples/mpi_training.py --checkpoint run.safetensors --kill-at 60
    mpiexec -n 2 python -m mpi4py examples/mpi_training.py --checkpoint run.safetensors
"""

import argparse
import os
import signal

import numpy as np
from mpi4py import MPI
from sklearn.datasets import load_digits

import fastopt.mpi as optim

N_TRAIN, STEPS, HIDDEN = 1500, 100, 256


def initial_model():
    """Return the parameters that all processes begin with: the same numbers in each."""
    rng = np.random.default_rng(0)
    w1 = rng.normal(0, 0.1, (64, HIDDEN)).astype(np.float32)
    w2 = rng.normal(0, 0.1, (HIDDEN, 10)).astype(np.float32)
    return {"w1": w1, "b1": np.zeros(HIDDEN, np.float32), "w2": w2, "b2": np.zeros(10, np.float32)}


def forward(model, x):
    """Return the hidden layer and the probabilities of the ten digits."""
    hidden = np.maximum(x @ model["w1"] + model["b1"], 0)
    logits = hidden @ model["w2"] + model["b2"]
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return hidden, exp / exp.sum(axis=1, keepdims=True)


def loss_and_grads(model, x, y):
    """Return the mean cross-entropy, and its gradients."""
    hidden, p = forward(model, x)
    loss = float(-np.log(p[range(len(y)), y]).mean())
    p[range(len(y)), y] -= 1
    p /= len(y)
    back = (p @ model["w2"].T) * (hidden > 0)
    return loss, {"w1": x.T @ back, "b1": back.sum(0), "w2": hidden.T @ p, "b2": p.sum(0)}


def main():
    """Train, and print what the first process knows of all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", help="go on from this file, and save to it")
    parser.add_argument("--kill-at", type=int, help="end the last process in this step")
    args = parser.parse_args()

    comm = MPI.COMM_WORLD
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    # Each process has as many as the others, so that the mean over processes is that over all.
    own = slice(comm.rank, N_TRAIN // comm.size * comm.size, comm.size)
    model = initial_model()
    opt = optim.Adam(model, lr=0.003, num_threads=1)  # the processes share the cores already
    if args.checkpoint and os.path.exists(args.checkpoint):
        opt.load(args.checkpoint)
    shares = comm.gather(sum(opt.nbytes.values()))
    if comm.rank == 0:
        print(f"Begins after step {opt.completed_steps}")
        print("Bytes of state, by rank:", *shares)

    for step in range(opt.completed_steps + 1, STEPS + 1):
        if step == args.kill_at and comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        loss, grads = loss_and_grads(model, x[own], y[own])
        opt.step(grads)
        if step % 25 == 0:
            loss = comm.allreduce(loss) / comm.size
            if args.checkpoint:
                opt.save(args.checkpoint)
            if comm.rank == 0:
                print(f"Step [{step}/{STEPS}], Loss: {loss:.4f}", flush=True)
    if comm.rank == 0:
        right = forward(model, x[N_TRAIN:])[1].argmax(axis=1) == y[N_TRAIN:]
        print(f"Test accuracy: {right.mean():.1%}")


if __name__ == "__main__":
    main()
