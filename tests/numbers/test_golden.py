"""Recorded trajectories of PyTorch and Keras, replayed through the classes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from recorded import (
    ENTRIES,
    NOT_EXPRESSIBLE,
    Replay,
    reason_to_leave_out,
    state_tolerance,
    tolerance,
)
from tables import ROWS

REPLAYED = [entry for entry in ENTRIES if reason_to_leave_out(entry) is None]


@pytest.mark.parametrize("entry", REPLAYED, ids=lambda e: Path(e["file"]).stem)
def test_trajectory(entry):
    replay = Replay(entry).run()
    assert replay.finite_alike
    assert replay.error <= tolerance(entry)
    for name, expected, got, largest, slack in replay.final_state():
        finite = np.isfinite(expected)
        assert np.array_equal(np.isfinite(got), finite), name
        if name.startswith("step"):
            assert got == expected
            continue
        with np.errstate(invalid="ignore"):
            gap = np.abs(got.astype(np.longdouble) - expected) - slack
        assert (gap / np.spacing(largest))[finite].max(initial=0) <= state_tolerance(entry), name


def test_how_many_trajectories_were_replayed():
    unexpressible = [e for e in ENTRIES if reason_to_leave_out(e) in NOT_EXPRESSIBLE.values()]
    assert len(unexpressible) == 2
    counts = Counter((e["library"], e["class"]) for e in REPLAYED + unexpressible)
    for row in ROWS:
        assert (counts["torch", row.name], counts["keras", row.keras_name]) == row.golden
    assert sum(counts.values()) == sum(sum(row.golden) for row in ROWS)
    assert len(ENTRIES) == 192
