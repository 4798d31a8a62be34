"""What each process of test_clients_mpi.py does: steps beside the serial ones, and wrong copies."""

import numpy as np
import pytest
from mpi4py import MPI
from mpi_adam import MPIAdam

from fastopt import reference

SIZE, STEPS = 10_007, 20


def gradients(rank):
    """Yield the gradients of a process: of numbers whose sums are exact, in whatever order."""
    rng = np.random.default_rng(rank)
    for _ in range(STEPS):
        yield rng.integers(-999, 1000, SIZE).astype(np.float32) / 64


comm = MPI.COMM_WORLD
serial = np.random.default_rng(0).standard_normal(SIZE, np.float32)
flat = serial.copy() if comm.rank == 0 else np.zeros_like(serial)
opt = MPIAdam(flat, comm, lr=0.01)
state = {name: np.zeros_like(serial) for name in ("exp_avg", "exp_avg_sq")}
everyone = [gradients(rank) for rank in range(comm.size)]
for step, (own, *grads) in enumerate(zip(gradients(comm.rank), *everyone, strict=True), 1):
    opt.update(own)
    mean = sum(grads) / np.float32(comm.size)
    reference.adam(serial, mean, state, step=step, lr=0.01)
    assert flat.tobytes() == serial.tobytes(), step
opt.check_synced()

last = comm.size - 1
if comm.rank == last:
    flat[-1] = np.nextafter(flat[-1], np.float32(9))
with pytest.raises(RuntimeError, match="different parameters"):
    opt.check_synced()
opt.sync()
opt.check_synced()
assert flat.tobytes() == serial.tobytes()
assert step == STEPS
comm.Barrier()
if comm.rank == 0:
    print(f"{comm.size} processes, {STEPS} steps")
