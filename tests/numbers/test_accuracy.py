"""Constants of a step are right to the last bits at any step, and C computes what NumPy does."""

import mpmath
import numpy as np
import pytest
from oracle import Oracle, assert_same_bits

import fastopt
from fastopt import reference

# The error grows slowly with the number of doublings before 1 - beta**t comes near 1.
ULPS = dict.fromkeys([0.0, 0.4, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9995], 4)
ULPS[0.9999] = 6
LAST = 1_000_000


def by_doubling(beta, steps):
    """The reference's recurrence for many step numbers at once."""
    one_minus_beta = 1 - beta
    u = np.full(steps.shape, one_minus_beta)
    for bit in range(int(steps.max()).bit_length() - 2, -1, -1):
        begun = steps >> (bit + 1) > 0
        doubled = u * (2 - u)
        next_u = np.where(steps >> bit & 1, one_minus_beta + beta * doubled, doubled)
        u = np.where(begun, next_u, u)
    return u


@pytest.mark.parametrize(("beta", "ulps"), ULPS.items())
def test_bias_correction_is_right_to_4_ulp_at_every_step(beta, ulps):
    steps = np.arange(1, LAST + 1)
    got = by_doubling(beta, steps)
    for t in (1, 2, 3, 7, 1000, 12345, LAST):  # the vectorised recurrence is the reference's
        assert got[t - 1] == reference.one_minus_power(beta, t)

    with np.errstate(divide="ignore"):
        right = -np.expm1(steps * np.log(np.longdouble(beta)))
    assert np.finfo(np.longdouble).nmant == 63, "needs the 80-bit long double of x86"
    with mpmath.workdps(50):  # which is itself right far beyond double
        for t in np.random.default_rng(0).integers(1, LAST, 200):
            exact = 1 - mpmath.mpf(beta) ** int(t)
            mantissa, exponent = np.frexp(right[t - 1])
            own = mpmath.ldexp(mpmath.mpf(int(np.ldexp(mantissa, 64))), int(exponent) - 64)
            assert abs(own - exact) <= abs(exact) * mpmath.mpf(2) ** -58

    assert (np.abs(got - right) <= ulps * np.spacing(got)).all()


@pytest.mark.parametrize("beta", [*ULPS, 0.99999, 1 - 2.0**-30, 1 - 2.0**-53])
def test_the_length_of_radams_average_is_right_to_10_ulp(beta):
    rng = np.random.default_rng(0)
    powers = [2**k + i for k in range(7, 20) for i in (-1, 0, 1)]
    steps = [*range(1, 101), *powers, *rng.integers(100, LAST, 300).tolist(), LAST]
    with mpmath.workdps(60):
        for t in steps:
            power, left = mpmath.mpf(beta) ** t, 1 - mpmath.mpf(beta)
            exact = 2 / left - 1 - 2 * t * power / (1 - power)
            error = abs(reference.average_length(beta, t) - exact)
            assert error <= 10 * np.spacing(float(exact)), t


def test_radam_is_not_rectified_before_its_sixth_step_however_close_to_1_beta_is():
    for exponent in range(1, 54):
        beta = 1 - 2.0**-exponent
        assert all(reference.average_length(beta, t) <= 5 for t in range(1, 6))
        assert reference.average_length(beta, 1) == 1
    assert reference.average_length(beta, 6) > 5


@pytest.mark.parametrize("psi", [4e-3, 1.0, 0.5, 0.1, 0.0, 1e-9, 7.3, 1e4])
def test_the_momentum_of_nadam_is_right_to_2_ulp_at_every_step(psi):
    rng = np.random.default_rng(0)
    steps = [*range(1, 51), *(2**k for k in range(6, 20)), *rng.integers(50, LAST, 300).tolist()]
    with mpmath.workdps(60):
        for t in [*steps, LAST]:
            power = mpmath.mpf("0.96") ** (t * mpmath.mpf(psi))
            got = reference.power_of_096(psi, t)
            if power > 2.0**-1000:
                assert abs(got - power) <= 1.5 * np.spacing(float(power)), t
            momentum = mpmath.mpf(0.9) * (1 - power / 2)
            error = abs(reference.nadam_momentum(0.9, psi, t) - momentum)
            assert error <= 2 * np.spacing(float(momentum)), t


def test_radams_first_steps_are_momentum_even_where_a_square_overflows():
    w = np.float32([1.0, 2.0])
    opt = fastopt.RAdam([w], lr=2.0**-100)
    opt.step([np.float32([2.0**100, -3 * 2.0**100])])
    assert np.isinf(opt.state[0]["exp_avg_sq"]).all()
    assert w.tolist() == pytest.approx([0.0, 5.0], abs=1e-6)


@pytest.mark.parametrize("semantics", ["torch", "keras"])
@pytest.mark.parametrize("cls", [fastopt.Adam, fastopt.NAdam, fastopt.RAdam])
def test_the_core_corrects_as_the_reference_at_any_step(cls, semantics):
    rng = np.random.default_rng(0)
    for t in [1, 2, 3, 4, 1000, LAST, 2**31 + 5, 2**53 + 1, *rng.integers(1, LAST, 500).tolist()]:
        opt = cls([rng.standard_normal(5)], betas=(0.95, 0.9999), semantics=semantics)
        opt.state[0]["step"][...] = t - 1
        twin = Oracle(opt, semantics=semantics)
        grads = [rng.standard_normal(5)]
        opt.step(grads)
        twin.step(grads)
        assert_same_bits(opt, twin, f"t = {t}")
