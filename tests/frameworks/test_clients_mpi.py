"""Training in several processes over MPI, as examples/mpi_training.py does it."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fastopt

HERE = Path(__file__).parent


def mpiexec(processes, program):
    env = {**os.environ, "PYTHONPATH": str(Path(fastopt.__file__).parents[1])}
    env["OPENBLAS_NUM_THREADS"] = "1"  # the processes are more than the cores already
    command = Path(sysconfig.get_path("scripts"), "mpiexec"), "-n", str(processes)
    done = subprocess.run(
        # By mpi4py, which ends all when one fails.
        [*command, sys.executable, "-W", "error", "-m", "mpi4py", program],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("processes", [2, 4])
def test_every_process_has_the_bits_of_the_serial_optimizer(processes):
    text = mpiexec(processes, HERE / "clients/mpi_program.py")
    assert text == f"{processes} processes, 20 steps\n"


def test_the_example_learns_the_same_in_any_number_of_processes():
    found = []
    for processes in (1, 2, 4):
        text = mpiexec(processes, HERE.parents[1] / "examples/mpi_training.py")
        losses = [float(loss) for loss in re.findall(r"Loss: ([\d.]+)$", text, re.MULTILINE)]
        assert len(losses) == 4
        assert losses == sorted(losses, reverse=True)
        (accuracy,) = re.findall(r"Test accuracy: ([\d.]+)%", text)
        assert float(accuracy) > 85
        found.append(losses)
    # The same digits, whose gradients are summed, and rounded, in another order.
    assert found[1:] == [pytest.approx(found[0], abs=2e-4)] * 2
