"""fastopt.keras on Keras's other backends, and on several devices, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def python(backend, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_torch():
    done = python("torch", HERE / "keras_on_torch.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all of it ran\n")


@pytest.mark.parametrize("mode", ["traced", "eager"])
def test_mirrored_strategy_runs_keras_own_update_with_its_numbers_and_one_warning(mode):
    done = python("tensorflow", HERE / "keras_on_replicas.py", mode)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all of it ran\n")


@pytest.mark.parametrize("backend", ["jax", "numpy"])
def test_backends_that_cannot_work_say_why_and_what_to_use(backend):
    # Only the name of the backend counts: it need not be installed.
    code = f"import keras\nkeras.backend.backend = lambda: {backend!r}\nimport fastopt.keras\n"
    done = python("tensorflow", "-c", code)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith(
        f"ImportError: fastopt.keras cannot work on Keras's {backend} backend"
    )
    for word in ("immutable", "keras.optimizers", "KERAS_BACKEND", "fastopt.Adam"):
        assert word in message
