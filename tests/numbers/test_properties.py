"""Properties that hold for any input, looked for by Hypothesis."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracle import Oracle, assert_same_bits, same_bits
from tables import CASES

import fastopt

DTYPES = st.sampled_from([np.float32, np.float64])
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)


def finite(dtype, shape):
    limit = 1e10
    elements = st.floats(-limit, limit, width=32, allow_subnormal=True)
    return hnp.arrays(dtype, shape, elements=elements)


@st.composite
def permuted(draw, dtype, shape):
    """A dense array whose axes lie in any order in memory."""
    order = draw(st.permutations(range(len(shape))))
    inverse = np.argsort(order)
    return draw(finite(dtype, tuple(shape[axis] for axis in order))).transpose(inverse)


@st.composite
def strided(draw, dtype, shape):
    """An array of this shape with any steps, also negative, between its elements."""
    steps = draw(st.tuples(*[st.sampled_from([1, 2, 3, -1, -2]) for _ in shape]))
    base = draw(finite(dtype, tuple(n * abs(s) for n, s in zip(shape, steps, strict=True))))
    view = base[tuple(slice(None, None, s) for s in steps)]
    return view if view.shape == tuple(shape) else view.reshape(shape)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(CASES), DTYPES, SHAPES)
def test_any_layout_equals_the_reference(data, case, dtype, shape):
    _, cls, kwargs = case
    param = data.draw(permuted(dtype, shape))
    opt = cls([param], **kwargs)
    twin = Oracle(opt, **kwargs)
    for _ in range(2):
        grad = data.draw(st.one_of(strided(dtype, shape), permuted(dtype, shape)))
        opt.step([grad])
        twin.step([grad])
        assert_same_bits(opt, twin)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(CASES), DTYPES, st.integers(0, 300))
def test_an_array_cut_in_pieces_gives_the_same_bits(data, case, dtype, cut):
    _, cls, kwargs = case
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    start, grads = rng.standard_normal(300).astype(dtype), rng.standard_normal((3, 300))
    whole, pieces = start.copy(), start.copy()
    one = cls([whole], **kwargs)
    two = cls([pieces[:cut], pieces[cut:]], **kwargs)
    for grad in grads.astype(dtype):
        one.step([grad])
        two.step([grad[:cut], grad[cut:]])
    assert same_bits(whole, pieces)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(CASES), DTYPES)
def test_maximizing_is_minimizing_the_negative(data, case, dtype):
    _, cls, kwargs = case
    up, down = {**kwargs, "maximize": True}, {**kwargs, "maximize": False}
    start, grad = (data.draw(finite(dtype, 9)) for _ in range(2))
    a, b = start.copy(), start.copy()
    ascent, descent = cls([a], **up), cls([b], **down)
    for _ in range(3):
        ascent.step([grad])
        descent.step([-grad])
    assert same_bits(a, b)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(CASES), st.integers(-20, 20))
def test_a_loss_scale_that_is_a_power_of_two_changes_no_bit(data, case, exponent):
    _, cls, kwargs = case
    start, grad = (data.draw(finite(np.float64, 9)) for _ in range(2))
    grad[np.abs(grad) < 1e-30] = 0  # scaling is exact away from subnormals
    a, b = start.copy(), start.copy()
    plain, scaled = cls([a], **kwargs), cls([b], **kwargs)
    for _ in range(3):
        plain.step([grad])
        scaled.step([grad * 2.0**exponent], loss_scale=2.0**exponent)
    assert same_bits(a, b)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.floats(1e-3, 1e3))
def test_a_clipped_norm_is_at_most_the_limit(elements, limit):
    grad, param = np.array(elements), np.zeros(len(elements))
    result = fastopt.SGD([param], lr=1.0, global_clip_norm=limit).step([grad])
    assert result.grad_norm is not None
    np.testing.assert_allclose(result.grad_norm, np.linalg.norm(grad), rtol=1e-12)
    assert np.linalg.norm(param) <= limit * (1 + 1e-12)
