"""How far two evaluations of one formula may differ."""

import numpy as np

EPS = np.finfo(float).eps


def assert_same_step(ours, theirs, before, *powers):
    """Check one step in float64 that both took from the same point, `before`.

    Each side adds an update to a parameter, rounding once: an ulp of the parameter between them.
    Up to eight roundings are in the update of each. Where theirs divides by ``1 - power`` it has
    rounded the power, which may be near 1, and the difference keeps that error.
    """
    relative = EPS * (8 + sum(1 / (1 - power) for power in powers))
    largest = np.maximum(np.abs(before), np.abs(theirs))
    allowed = np.spacing(largest) + relative * np.abs(theirs - before)
    assert (np.abs(ours - theirs) <= allowed).all(), np.max(np.abs(ours - theirs) / allowed)
