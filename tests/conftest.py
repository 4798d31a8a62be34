"""What every test leaves as it found it."""

import pytest

import fastopt
from fastopt import _core


@pytest.fixture(autouse=True)
def _leave_the_process_alone():
    """Restore the number of threads, the instruction set and the threading layer."""
    threads, isa, layer = fastopt.get_num_threads(), _core.isa(), _core.layers()
    yield
    _core.force_threads(0)
    _core.select_isa(isa["active"])
    _core.select_layer(layer["active"])
    fastopt.set_num_threads(threads)
