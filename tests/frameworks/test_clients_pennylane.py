"""PennyLane's optimizers with fastopt in place of their own rules."""

import re
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pennylane
import pytest
from pennylane import numpy as pnp

HERE = Path(__file__).parent
sys.path += [str(HERE / "clients"), str(HERE.parent)]

import with_pennylane  # noqa: E402
from support import python  # noqa: E402

CLASSES = ["AdamOptimizer", "AdagradOptimizer", "RMSPropOptimizer", "MomentumOptimizer"]
OURS = [
    with_pennylane.adam_apply_grad,
    with_pennylane.adagrad_apply_grad,
    with_pennylane.rmsprop_apply_grad,
    with_pennylane.momentum_apply_grad,
]


@pytest.mark.parametrize(("name", "ours"), list(zip(CLASSES, OURS, strict=True)))
def test_minimising_takes_the_same_way(monkeypatch, name, ours):
    cls, ways = getattr(pennylane, name), []
    for function in (cls.apply_grad, ours):
        monkeypatch.setattr(cls, "apply_grad", function)
        optimizer, way = cls(0.1), []
        args = pnp.array([0.5, -2.0], requires_grad=True), pnp.array(1.5, requires_grad=True)
        for _ in range(20):
            args = optimizer.step(lambda w, b: (pnp.sin(w) * b**2).sum(), *args)
            way.append([*np.ravel(args[0]), float(args[1])])
        ways.append(way)
    np.testing.assert_allclose(ways[1], ways[0], rtol=1e-11)


def test_their_tests_pass():
    folder = Path(sysconfig.get_path("purelib"), "tests/optimize")
    names = ("adam", "adagrad", "rmsprop", "momentum", "nesterov_momentum")
    done = python(
        *("-m", "pytest", "-q", "-p", "with_pennylane", "-p", "no:cacheprovider"),
        *(str(folder / f"test_{name}.py") for name in names),
        timeout=120,
        PYTHONPATH=with_pennylane.path(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[1-9]\d* calls of fastopt", done.stdout)
