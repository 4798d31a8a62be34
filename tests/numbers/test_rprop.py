"""Rprop's step sizes: where they begin, what they become, and what the sign of a NaN is."""

import numpy as np
import pytest

import fastopt
from fastopt import Rprop, functional

NAN = float("nan")
SMALLEST = 2.0**-149


def walked(opt, gradients):
    """Step an optimizer of one parameter; return what it and its step sizes become."""
    seen = []
    for grad in gradients:
        opt.step([np.full_like(opt.params[0], grad)])
        state = opt.state[0]
        seen.append(tuple(float(a.flat[0]) for a in (opt.params[0], state["step_size"])))
    return seen


def test_a_step_size_grows_shrinks_rests_and_stays_within_its_limits():
    opt = Rprop([np.zeros(3)], lr=1, etas=(0.25, 2.0), step_sizes=(0.5, 3.0))
    assert walked(opt, [1.0, 1e-9, 7.0, -1e9, -1e-9, -2.0, 0.0, -1.0, 1.0, 5.0]) == [
        (-1.0, 1.0),
        (-3.0, 2.0),
        (-6.0, 3.0),
        (-6.0, 0.75),
        (-5.25, 0.75),
        (-3.75, 1.5),
        (-3.75, 1.5),
        (-2.25, 1.5),
        (-2.25, 0.5),
        (-2.75, 0.5),
    ]


def test_step_sizes_begin_at_the_rate_of_the_first_step_whenever_that_is():
    opt = Rprop([np.zeros(2), np.zeros(2)], lr=lambda done: 2.0**-done, etas=(0.5, 2.0))
    for step in range(4):
        opt.step([np.ones(2), None if step < 3 else np.ones(2)])
    assert [state["step_size"][0] for state in opt.state] == [8.0, 0.125]
    opt.reset()
    opt.param_groups[0]["lr"] = 0.5
    opt.step([np.ones(2), np.ones(2)])
    opt.param_groups[0]["lr"] = 9.0  # has nothing to say any more
    opt.step([np.ones(2), -np.ones(2)])
    assert [state["step_size"][0] for state in opt.state] == [1.0, 0.25]


def test_rows_begin_when_a_gradient_is_of_them():
    table = np.zeros((4, 2))
    opt = Rprop([table], lr=lambda done: 2.0**-done)
    for row in (0, 1, 2):
        opt.step([fastopt.Rows([row], np.ones((1, 2)))])
    assert table[:, 0].tolist() == [-1.0, -0.5, -0.25, 0.0]
    assert opt.state[0]["step_size"][:, 0].tolist() == [1.0, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_step_size_that_has_shrunk_to_nothing_does_not_begin_again(dtype):
    w = np.zeros(2, dtype)
    opt = Rprop([w], lr=1.0, step_sizes=(0, 50))
    for step in range(400):  # in every other step the element rests
        opt.step([np.full(2, (-1.0) ** (step // 2), dtype)])
    assert opt.state[0]["step_size"].tolist() == [SMALLEST] * 2
    before = w.copy()
    for sign in (1, 1, -1, -1):
        opt.step([np.full(2, sign, dtype)])
    assert (w == before).all()


def test_without_a_rate_there_are_no_steps_but_for_the_smallest_allowed():
    for smallest in (0.0, 0.25):
        opt = Rprop([np.zeros(2)], lr=0, step_sizes=(smallest, 50))
        assert walked(opt, [1.0]) == [(-smallest, smallest)]
        if not smallest:
            assert walked(opt, [1.0, -1.0, -1.0]) == [(0.0, 0.0)] * 3


def test_an_element_whose_gradient_is_not_a_number_rests():
    opt = Rprop([np.zeros(1)], lr=0.5, etas=(0.5, 2.0))
    assert walked(opt, [1.0, NAN, 1.0, 1.0]) == [
        (-0.5, 0.5),
        (-0.5, 0.5),
        (-1.0, 0.5),  # a NaN has no sign that could be kept
        (-2.0, 1.0),
    ]
    opt.state[0]["step_size"][...] = NAN
    opt.step([np.ones(1)])
    assert np.isnan([opt.params[0], opt.state[0]["step_size"]]).all()


def test_decay_goes_by_the_rate():
    opt = Rprop([np.full(1, 8.0)], lr=0.5, weight_decay=0.5, decoupled_weight_decay=True)
    assert walked(opt, [0.0]) == [(6.0, 0.5)]
    opt = Rprop([np.full(1, 8.0)], lr=0.5, weight_decay=0.5, no_decay=lambda *_: True)
    assert walked(opt, [-1.0]) == [(8.5, 0.5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be >= 0, got -0.1"),
        ({"etas": (0.0, 1.2)}, "etaminus must be > 0 and < 1, got 0.0"),
        ({"etas": (0.5, 1)}, "etaplus must be > 1, got 1"),
        ({"step_sizes": (-1, 50)}, "step_size_min must be >= 0, got -1"),
        ({"step_sizes": (1, NAN)}, "step_size_max must be >= 0, got nan"),
        ({"step_sizes": (2, 1)}, r"step_sizes must be the smallest and the largest.*\(2.0, 1.0\)"),
        ({"step_sizes": (1,)}, "step_sizes must have two elements"),
    ],
)
def test_the_function_refuses_what_the_class_refuses(options, message):
    arrays = w, g, h, s = np.ones(2), np.ones(2), np.ones(2), np.ones(2)
    with pytest.raises(ValueError, match=message):
        functional.rprop(w, g, h, s, **{"lr": 0.1, **options})
    assert all((a == 1).all() for a in arrays)
