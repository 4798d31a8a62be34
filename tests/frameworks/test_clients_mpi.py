"""An Adam over MPI that a project has written for itself, with fastopt for the step."""

from pathlib import Path

import pytest
from support import mpiexec


@pytest.mark.parametrize("processes", [2, 4])
def test_every_process_has_the_bits_of_the_serial_optimizer(processes):
    done = mpiexec(processes, Path(__file__).parent / "clients/mpi_program.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{processes} processes, 20 steps\n"
