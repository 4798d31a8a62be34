"""The rules as functions: the bits of the classes, the dialects, and nothing written on error."""

import gc
import threading
import weakref

import numpy as np
import pytest
from oracle import bits, same_bits
from support import SparseMatrix, Table
from tables import CASE_IDS, CASES, as_function

import fastopt
from fastopt import _core, functional, reference

BLOCK = _core.BLOCK


def columns(states):
    """Return lists by name of the state of several parameters, without the step."""
    return {name: [s[name] for s in states] for name in states[0] if name != "step"}


SIZES = [(), (0, 3), (7,), (33,), (BLOCK - 1,), (2 * BLOCK + 5,), (5, 6)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "cls", "kwargs"), CASES, ids=CASE_IDS)
def test_a_call_has_the_bits_of_a_step_of_the_class(name, cls, kwargs, dtype):
    rng = np.random.default_rng(CASE_IDS.index(name))

    def draw():
        return [np.asarray(rng.standard_normal(shape), dtype) for shape in SIZES]

    opt = cls([p.T if p.ndim > 1 else p for p in draw()], **kwargs)
    params = [p.copy(order="K") for p in opt.params]
    states = [{k: a.copy(order="K") for k, a in s.items()} for s in opt.state]
    call = as_function(cls, kwargs)
    for step in range(1, 6):
        _core.force_threads(1 + step % 3)
        grads = [g.T if g.ndim > 1 and step % 2 else g for g in draw()]
        grads = [np.repeat(g, 2, -1)[..., ::2] if g.ndim == 1 and step == 3 else g for g in grads]
        grads = [g.reshape(p.shape) for g, p in zip(grads, params, strict=True)]
        opt.step(grads)
        if step % 2:
            call(params, grads, columns(states), step)
        else:
            for p, g, s in zip(params, grads, states, strict=True):
                call(p, g, s, step)
        for own, other in zip(params, opt.params, strict=True):
            assert same_bits(own, other), step
        for own, other in zip(states, opt.state, strict=True):
            assert all(same_bits(own[k], other[k]) for k in own if k != "step"), step


@pytest.mark.parametrize(("name", "cls", "kwargs"), CASES[::3], ids=CASE_IDS[::3])
@pytest.mark.parametrize("many", [False, True])
def test_read_only_inputs_are_left_as_they_are_and_the_result_goes_to_out(name, cls, kwargs, many):
    rng = np.random.default_rng(0)
    n = 3 if many else 1
    inplace = cls([rng.standard_normal((7, 5)) for _ in range(n)], **kwargs)
    inplace.step([rng.standard_normal((7, 5)) for _ in range(n)])
    state = columns(inplace.state)
    given = [inplace.params, *state.values()]
    given = [[a.copy() for a in arrays] for arrays in given]
    for arrays in given:
        for a in arrays:
            a.flags.writeable = False
    before = [[a.tobytes() for a in arrays] for arrays in given]
    out = tuple([np.full_like(a, np.nan) for a in arrays] for arrays in given)
    grads = [rng.standard_normal((7, 5)) for _ in range(n)]

    def shaped(arrays):
        return arrays if many else arrays[0]

    call = as_function(cls, kwargs)
    by_name = {name: shaped(arrays) for name, arrays in zip(state, given[1:], strict=True)}
    call(shaped(given[0]), shaped(grads), by_name, 2, out=tuple(map(shaped, out)))
    inplace.step(grads)
    wanted = [inplace.params, *columns(inplace.state).values()]
    for result, expected in zip(out, wanted, strict=True):
        for a, b in zip(result, expected, strict=True):
            assert np.array_equal(bits(a), bits(b))
    assert [[a.tobytes() for a in arrays] for arrays in given] == before


def test_out_may_be_what_is_given_and_inputs_laid_out_in_any_way():
    rng = np.random.default_rng(0)
    w, g = rng.standard_normal((4, 6)), rng.standard_normal((4, 6))
    plain, b = w.copy(), np.zeros((4, 6))
    functional.sgd(plain, g, b, lr=0.1, momentum=0.9)
    for given in (w.copy(), np.asfortranarray(w), np.repeat(w, 2, 1)[:, ::2]):
        new, buffer = np.empty((4, 6)), np.zeros((4, 6))
        functional.sgd(given, g, buffer, lr=0.1, momentum=0.9, out=(new, buffer))
        assert new.tobytes() == plain.tobytes()
        assert buffer.tobytes() == b.tobytes()
        assert (given == w).all()


def test_none_leaves_out_and_gradients_are_zeroed_if_asked():
    a, b = np.ones(2), np.ones(3)
    grads = [None, np.full(3, 2.0)]
    assert functional.sgd([a, b], grads, lr=0.5, zero_grad=True) is None
    assert (a.tolist(), b.tolist(), grads[1].tolist()) == ([1, 1], [0] * 3, [0] * 3)
    functional.sgd(a, None, lr=0.5)
    functional.sgd([], [], lr=0.5)
    assert a.tolist() == [1, 1]


def test_a_gradient_may_be_its_own_parameter_until_it_is_to_be_zeroed():
    w = np.full(4, 8.0)
    functional.sgd(w, w, lr=0.5)
    functional.sgd(w, w, lr=0.5)
    with pytest.raises(ValueError, match="grads overlaps params in memory"):
        functional.sgd(w, w, lr=0.5, zero_grad=True)
    assert w.tolist() == [2] * 4


def test_the_number_of_a_step_may_be_numpys():
    seen = set()
    for step in (3, np.int64(3), np.uint8(3)):
        w, g, m, v = np.ones(3), np.full(3, 2.0), np.full(3, 0.5), np.ones(3)
        functional.adam(w, g, m, v, step=step, lr=0.1)
        seen.add(w.tobytes())
    assert len(seen) == 1


def test_calls_from_several_threads_do_not_meet():
    start = np.random.default_rng(0).standard_normal(20 * BLOCK)
    models = [(start.copy(), np.zeros_like(start), np.zeros_like(start)) for _ in range(4)]

    def train(w, m, v):
        for step in range(1, 30):
            functional.adam(w, start, m, v, step=step, lr=0.1)

    train(*models[0])
    threads = [threading.Thread(target=train, args=model) for model in models[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({w.tobytes() for w, _, _ in models}) == 1


# ---- dialects: the expressions that projects write -----------------------------------------------


def draws(seed, n=3):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(100) for _ in range(n)]


def corrected(lr, b1, b2, t):
    return lr * np.sqrt(1 - b2**t) / (1 - b1**t)


@pytest.mark.parametrize("t", [1, 2, 50])
def test_a_rate_corrected_by_the_caller_gives_the_bits_of_the_usual_expression(t):
    w, m, g = draws(t)
    v = m * m
    lr = corrected(0.01, 0.9, 0.999, t)
    m2 = 0.9 * m + (1 - 0.9) * g
    v2 = 0.999 * v + (1 - 0.999) * g**2
    w2 = w + -lr * m2 / (np.sqrt(v2) + 1e-8)
    functional.adam(w, g, m, v, lr=lr, bias_correction=False)
    assert [a.tobytes() for a in (w, m, v)] == [a.tobytes() for a in (w2, m2, v2)]


@pytest.mark.parametrize("t", [1, 2, 50])
def test_where_eps_is_added_to_the_root_and_which_step_corrects(t):
    for hat in (False, True):
        w, m, g = draws(t)
        v = m * m
        m2, v2 = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        c1, c2 = 1 - 0.9 ** (t + 1), 1 - 0.99 ** (t + 1)
        root = (np.sqrt(v2) + 1e-3) / np.sqrt(c2) if hat else np.sqrt(v2 / c2) + 1e-3
        expected = w - 0.1 * m2 / c1 / root
        functional.adam(w, g, m, v, step=t + 1, lr=0.1, betas=(0.9, 0.99), eps=1e-3, eps_hat=hat)
        np.testing.assert_allclose(w, expected, rtol=1e-12)


def test_a_negative_rate_ascends_and_leaves_the_state_its_sign():
    w, m, g = draws(0)
    v = m * m
    up, down = ((w.copy(), s * m, v.copy()) for s in (1, -1))
    functional.adam(up[0], g, *up[1:], step=1, lr=-0.1)
    functional.adam(down[0], g, *down[1:], step=1, lr=0.1, maximize=True)
    assert up[0].tobytes() == down[0].tobytes()
    assert (up[1] == -down[1]).all()
    w2 = w.copy()
    functional.sgd(w2, g, lr=-0.5)
    assert w2.tobytes() == (w + 0.5 * g).tobytes()


def test_ascent_with_decay_turns_the_gradient_before_the_decay_is_added():
    w, m, g = draws(3)
    v = m * m
    turned = -g + 0.1 * w
    m2, v2 = 0.9 * m + (1 - 0.9) * turned, 0.999 * v + (1 - 0.999) * (turned * turned)
    expected = w - corrected(0.01, 0.9, 0.999, 7) * m2 / (np.sqrt(v2) + 1e-8)
    options = {"eps_hat": True, "maximize": True, "weight_decay": 0.1}
    functional.adam(w, g, m, v, step=7, lr=0.01, **options)
    np.testing.assert_allclose(w, expected, rtol=1e-13)
    np.testing.assert_allclose(m, m2, rtol=1e-13)


def test_rows_taken_out_and_put_back_are_updated_and_an_index_by_itself_is_a_copy():
    P, S, g, rows = np.ones((5, 3)), np.zeros((5, 3)), np.full((2, 3), 2.0), [0, 3]
    functional.adagrad(P[rows], g, S[rows], lr=0.5)
    fastopt.Adagrad([P[rows]], lr=0.5).step([g])
    assert (P == 1).all()
    assert not S.any()
    p, s = P[rows], S[rows]
    functional.adagrad(p, g, s, lr=0.5, eps=0.0)
    P[rows], S[rows] = p, s
    functional.adagrad(P[1:3], g, S[1:3], lr=0.5, eps=0.0)
    assert P[:, 0].tolist() == [0.5, 0.5, 0.5, 0.5, 1]
    assert S[:, 0].tolist() == [4, 4, 4, 4, 0]


def test_momentum_in_each_of_its_forms():
    w, b, g = draws(1)
    for kwargs, buffer, move in [
        ({}, 0.9 * b + g, lambda b: -(0.1 * b)),
        ({"dampening": 0.9}, 0.9 * b + (1 - 0.9) * g, lambda b: -(0.1 * b)),
        ({"velocity": True}, 0.9 * b + -0.1 * g, lambda b: b),
        ({"velocity": True, "nesterov": True}, 0.9 * b - 0.1 * g, lambda b: 0.9 * b - 0.1 * g),
        ({"nesterov": True}, 0.9 * b + g, lambda b: -((0.1 * 0.9) * b + 0.1 * g)),
        ({"dampening": 0.5, "step": 1}, g, lambda b: -(0.1 * b)),
        ({"dampening": 0.5, "step": 2}, 0.9 * b + 0.5 * g, lambda b: -(0.1 * b)),
    ]:
        w2, b2 = w.copy(), b.copy()
        functional.sgd(w2, g, b2, lr=0.1, momentum=0.9, **kwargs)
        assert b2.tobytes() == buffer.tobytes(), kwargs
        assert w2.tobytes() == (w + move(buffer)).tobytes(), kwargs


def test_eps_inside_the_root_and_accumulators_that_start_elsewhere():
    w, _, g = draws(2)
    for inside in (False, True):

        def root(s, inside=inside):
            return np.sqrt(s + 1e-3) if inside else np.sqrt(s) + 1e-3

        for start in (0.0, 1.0, 0.1):
            w2, s = w.copy(), np.full(100, start)
            functional.adagrad(w2, g, s, lr=0.1, eps=1e-3, eps_inside=inside)
            assert w2.tobytes() == (w - 0.1 * g / root(start + g * g)).tobytes()
            w2, s = w.copy(), np.full(100, start)
            functional.rmsprop(w2, g, s, lr=0.1, alpha=0.9, eps=1e-3, eps_inside=inside)
            assert s.tobytes() == (0.9 * start + (1 - 0.9) * (g * g)).tobytes()
            assert w2.tobytes() == (w - 0.1 * g / root(s)).tobytes()


# ---- errors --------------------------------------------------------------------------------------


def arguments(n=3):
    rng = np.random.default_rng(0)
    given = {name: [rng.standard_normal(5) ** 2 for _ in range(n)] for name in "pgmv"}
    return given, {"step": 2, "lr": 0.1}


def set_item(name, k, value):
    def change(given, options):
        given[name][k] = value(given) if callable(value) else value

    return change


def set_option(**values):
    return lambda given, options: options.update(values)


def set_list(name, value):
    def change(given, options):
        given[name] = value(given[name])

    return change


def frozen(array):
    array.flags.writeable = False
    return array


class Several(list):
    """A list of one's own."""


COLLECTION = "params must be an array, or a list or tuple of arrays, such as "
BAD = [
    (set_item("p", 1, np.ones(5, "i8")), TypeError, r"params\[1\]: dtype int64 .* not supported"),
    (set_item("p", 1, [1.0]), TypeError, r"params\[1\]: expected .* got list; give numpy\.asarray"),
    (
        set_item("p", 1, Table(np.ones(5))),
        TypeError,
        r"params\[1\]: .* got Table; give numpy\.asar",
    ),
    (set_item("p", 1, SparseMatrix()), TypeError, r"params\[1\]: .* give its \.toarray\(\)"),
    (
        set_item("g", 1, Table(np.ones(5))),
        TypeError,
        r"grads\[1\]: .* got Table; give numpy\.asarr",
    ),
    (set_item("m", 1, [0.0] * 5), TypeError, r"exp_avgs\[1\]: .* got list; give numpy\.asarray"),
    # What is wrong with all of them is wrong with the first of them.
    (
        lambda given, options: given.update(
            {k: [a.astype("i4") for a in given[k]] for k in "pgmv"}
        ),
        TypeError,
        r"params\[0\]: dtype int32",
    ),
    (set_item("p", 1, frozen(np.ones(5))), ValueError, r"params\[1\]: the array is read-only"),
    (set_item("p", 1, np.ones(10)[::2]), ValueError, r"params\[1\]: the array is not dense"),
    (set_item("p", 1, np.ma.ones(5)), TypeError, r"params\[1\]: a masked array"),
    (set_item("p", 2, lambda a: a["p"][0]), ValueError, r"params\[2\] overlaps params\[0\]"),
    (set_item("m", 2, lambda a: a["p"][0]), ValueError, r"exp_avgs\[2\] overlaps params\[0\]"),
    (set_item("m", 2, None), TypeError, r"exp_avgs\[2\]: expected a numpy.ndarray, got NoneType"),
    (
        set_item("m", 2, np.ones(4)),
        ValueError,
        r"exp_avgs\[2\]: shape \(4,\) is not that of params",
    ),
    (set_item("v", 2, np.ones(5, "f4")), TypeError, r"exp_avg_sqs\[2\]: dtype float32 is not that"),
    (set_item("v", 2, frozen(np.ones(5))), ValueError, r"exp_avg_sqs\[2\]: the array is read-only"),
    (set_item("g", 2, np.ones(4)), ValueError, r"grads\[2\]: shape \(4,\) is not the parameter's"),
    (set_item("g", 2, np.ones(5, "i8")), TypeError, r"grads\[2\]: dtype int64 .* is not the par"),
    (set_item("g", 2, np.ones(5, ">f8")), TypeError, r"grads\[2\]: dtype >f8 .* native byte order"),
    (set_item("m", 2, np.ones(5, ">f8")), TypeError, r"exp_avgs\[2\]: dtype >f8 .* native byte"),
    (set_item("g", 2, 1.0), TypeError, r"grads\[2\]: expected a numpy.ndarray of shape"),
    (set_item("g", 2, np.ma.ones(5)), TypeError, r"grads\[2\]: a masked array"),
    (set_item("g", 2, lambda a: a["p"][0]), ValueError, r"grads\[2\] overlaps params\[0\]"),
    (set_item("g", 2, lambda a: a["v"][2]), ValueError, r"grads\[2\] overlaps exp_avg_sqs\[2\]"),
    (set_item("g", 2, lambda a: a["v"][2][::-1]), ValueError, r"grads\[2\] overlaps exp_avg_sqs"),
    (set_list("g", lambda x: x[:2]), ValueError, "grads: expected 3 arrays, got 2"),
    (set_list("m", lambda x: x[0]), TypeError, "exp_avgs must be a list or tuple, as params is"),
    (
        set_list("m", lambda x: None),
        TypeError,
        r"exp_avgs is required; begin with numpy\.zeros_lik",
    ),
    (set_list("g", iter), TypeError, "grads must be a list or tuple, as params is; got list_iter"),
    (set_list("p", iter), TypeError, COLLECTION + r"list\(params\); got list_iterator"),
    (
        set_list("p", lambda x: {"w": x[0]}),
        TypeError,
        COLLECTION + r"list\(params\.values\(\)\); got d",
    ),
    (
        set_list("p", lambda x: {"w": x[0]}.values()),
        TypeError,
        COLLECTION + r"list\(params\); got dict_v",
    ),
    (set_list("p", lambda x: x[0]), TypeError, "grads must be an array, as params is; got list"),
    (set_list("p", tuple), None, ""),
    (set_list("p", Several), None, ""),
    (set_list("g", Several), None, ""),
    (
        set_option(step=None),
        TypeError,
        r"step is required where the bias is corrected: .*\(step=t\)",
    ),
    (set_option(step=None, bias_correction=False), None, ""),
    (set_option(step=None, bias_correction=np.False_), None, ""),
    (set_option(step=0), ValueError, "step must be >= 1 and"),
    (set_option(step=1.0), TypeError, "step must be an integer, got 1.0"),
    (set_option(step=True), TypeError, "step must be an integer"),
    (set_option(lr="1"), TypeError, r"lr must be a real number, got '1' \(str\)"),
    (set_option(lr=np.nan), ValueError, "lr must be a number, got nan"),
    (set_option(lr=True), TypeError, "lr must be a real number, got True"),
    (set_option(eps=-1.0), ValueError, "eps must be >= 0, got -1.0"),
    (set_option(weight_decay=-1), ValueError, "weight_decay must be >= 0, got -1"),
    (set_option(betas=(0.9, 1.0)), ValueError, "betas must be < 1 where the bias is corr"),
    (set_option(betas=(0.9, 1.5)), ValueError, "beta2 must be >= 0 and <= 1, got 1.5"),
    (set_option(betas=(0.9,)), ValueError, "betas must have two elements"),
    (set_option(betas=0.9), TypeError, "betas must be a tuple of two numbers"),
    (set_option(betas=(np.ones(2), 0.9)), TypeError, "beta1 must be a real number"),
    (set_option(num_threads=2000), ValueError, "num_threads must be between 1 and 1024"),
    (set_option(maximize=1), TypeError, "maximize must be True or False, got 1"),
    (set_option(bias_correction=None), TypeError, "bias_correction must be True or False"),
    (set_option(eps_hat="yes"), TypeError, "eps_hat must be True or False, got 'yes'"),
    (set_option(zero_grad=0), TypeError, "zero_grad must be True or False, got 0"),
    (set_option(num_threads=0), ValueError, "num_threads must be between 1 and 1024"),
    (set_option(out=(np.ones(5),)), ValueError, "out must be a tuple of 3: where to write params,"),
]
ZEROED = [
    (set_item("g", 2, frozen(np.ones(5))), ValueError, r"grads\[2\]: read-only, and zero_grad"),
    (
        set_item("g", 2, np.broadcast_to(1.0, 5)),
        ValueError,
        r"grads\[2\]: (read-only|its elements)",
    ),
    (set_item("g", 2, lambda a: a["g"][0]), ValueError, r"grads\[0\] and grads\[2\] share memory"),
    (set_item("g", 2, lambda a: a["p"][2]), ValueError, r"grads\[2\] overlaps params\[2\]"),
]
ZEROED = [
    (lambda given, options, change=change: (change(given, options), options.update(zero_grad=True)),
     error, message)
    for change, error, message in ZEROED
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD + ZEROED)), ids=lambda i: (BAD + ZEROED)[i][2][:40])
@pytest.mark.parametrize("warm", [False, True])
def test_a_call_that_fails_writes_nothing(case, warm):
    change, error, message = (BAD + ZEROED)[case]
    given, options = arguments()
    if warm:
        functional.adam(*given.values(), **options)
    change(given, options)
    every = [a for x in given.values() for a in ([x] if x is None else x) if hasattr(a, "tobytes")]
    before = [a.tobytes() for a in every]
    if error is None:
        functional.adam(*given.values(), **options)
        return
    with pytest.raises(error, match=f"^{message}"):
        functional.adam(*given.values(), **options)
    assert [a.tobytes() for a in every] == before


def test_a_gradient_with_gaps_is_looked_at_each_time():
    """Two that begin and end alike, one around the parameter and one over it."""
    memory = np.zeros(32)
    w = memory[9:13].reshape(2, 2)

    def gradient(*strides):
        return np.lib.stride_tricks.as_strided(memory[8:], (2, 2), [8 * s for s in strides])

    around, over = gradient(6, 0), gradient(1, 5)  # 8, 8, 14, 14 and 8, 13, 9, 14
    for _ in range(2):
        functional.sgd(w, around, lr=1.0)
        with pytest.raises(ValueError, match=r"^grads overlaps params in memory"):
            functional.sgd(w, over, lr=1.0)


def test_an_out_that_does_not_fit_is_refused_and_nothing_is_written():
    w, g, b = (np.arange(5.0) + k for k in range(3))
    memory = np.zeros(20)
    for out, error, message in [
        (np.empty(5), ValueError, "^out must be a tuple of 2: where to write params, momentum_buf"),
        ((np.empty(5), np.empty(4)), ValueError, r"^out\[1\]: shape \(4,\)"),
        ((np.empty(4), np.empty(4)), ValueError, "^grads: shape"),
        ((memory[:5], memory[4:9]), ValueError, r"^out\[1\] overlaps out\[0\]"),
        ((frozen(np.empty(5)), np.empty(5)), ValueError, r"^out\[0\]: the array is read-only"),
        ((g, np.empty(5)), ValueError, r"^grads overlaps out\[0\]"),
        ((b, np.empty(5)), ValueError, r"^momentum_buffers overlaps out\[0\]"),
        ((np.empty(5, "f4"), np.empty(5, "f4")), TypeError, "^grads: dtype float64"),
        ((np.empty(5), np.empty(5, "f4")), TypeError, r"^out\[1\]: dtype float32 is not that of"),
    ]:
        arrays = [w, g, b, memory, *(a for a in out if isinstance(a, np.ndarray))]
        before = [a.tobytes() for a in arrays]
        with pytest.raises(error, match=message):
            functional.sgd(w, g, b, lr=0.1, momentum=0.9, out=out)
        assert [a.tobytes() for a in arrays] == before
    wrong = np.arange(4.0)
    with pytest.raises(ValueError, match=r"^params: shape"):
        functional.sgd(wrong, g, b, lr=0.1, momentum=0.9, out=(np.empty(5), np.empty(5)))


def test_state_that_is_needed_is_asked_for_and_other_state_is_left_alone():
    w, g = np.ones(2), np.ones(2)
    required = "^momentum_buffers is required, since momentum is 0.9; begin with numpy.zeros_like"
    for call in (
        lambda: functional.sgd(w, g, lr=0.1, momentum=0.9),
        lambda: functional.sgd([w], [g], lr=0.1, momentum=0.9),
        lambda: functional.sgd(w, g, lr=0.1, momentum=0.9, out=(w, np.ones(2))),
        lambda: functional.rmsprop(w, g, np.ones(2), None, np.ones(2), lr=0.1, momentum=0.9),
    ):
        with pytest.raises(TypeError, match=required):
            call()
    for momentum, dampening in ((0.0, 0.0), (0.9, 0.5)):
        with pytest.raises(ValueError, match=r"^nesterov=True needs momentum"):
            functional.sgd(w, g, g, lr=1.0, momentum=momentum, dampening=dampening, nesterov=True)
    assert (w == 1).all()
    unused = frozen(np.ones(3))
    functional.sgd(w, g, unused, lr=0.5)
    assert (w == 0.5).all()


@pytest.mark.parametrize(
    "wrap", [memoryview, lambda a: np.ndarray.view(a, type("S", (np.ndarray,), {}))]
)
def test_arrays_of_any_kind_are_updated_in_place(wrap):
    w, g, s = np.ones(3), np.full(3, 2.0), np.zeros(3)
    functional.adagrad(wrap(w), wrap(g), wrap(s), lr=1.0, eps=0.0)
    functional.adagrad([wrap(w)], [wrap(g)], [wrap(s)], lr=1.0, eps=0.0)
    assert (s == 8).all()
    assert (w == 1 - 1 - 2 / np.sqrt(8)).all()


@pytest.mark.parametrize("inplace", [True, False])
def test_a_model_and_its_state_in_files_have_the_bits_of_plain_numpy(inplace, tmp_path):
    """As for a model larger than memory: parameters, gradients and moments are memory maps."""
    size = 25 * BLOCK + 7
    rng = np.random.default_rng(0)
    start = rng.standard_normal(size, np.float32)

    def mapped(name, mode):
        return np.memmap(tmp_path / name, np.float32, mode, shape=size)

    old, new = (["w0", "m0", "v0"], ["w1", "m1", "v1"])
    mapped("w0", "w+")[...] = start
    for name in ["g", *old[1:], *new]:
        mapped(name, "w+")
    state = {name: np.zeros(size, np.float32) for name in ("exp_avg", "exp_avg_sq")}
    for step in range(1, 4):
        grad = rng.standard_normal(size, np.float32)
        mapped("g", "r+")[...] = grad
        w, m, v = (mapped(name, "r+" if inplace else "r") for name in old)
        out = None if inplace else tuple(mapped(name, "r+") for name in new)
        functional.adam(w, mapped("g", "r"), m, v, step=step, lr=0.1, out=out)
        if not inplace:
            old, new = new, old
        reference.adam(start, grad, state, step=step, lr=0.1)
        for name, expected in zip(old, (start, *state.values()), strict=True):
            assert np.fromfile(tmp_path / name, np.float32).tobytes() == expected.tobytes()


def test_a_numpy_scalar_is_a_gradient_for_a_parameter_without_axes():
    w = np.zeros(())
    functional.sgd(w, np.float64(2), lr=0.5)
    assert w == -1


def test_what_was_known_apart_for_one_call_is_asked_anew_for_a_stricter_one():
    a, b, c, d, g = (np.zeros(8) for _ in range(5))
    g += 1
    functional.sgd([a, b], [g, g], lr=1.0, out=([c, d],))
    with pytest.raises(ValueError, match=r"^grads\[0\] and grads\[1\] share memory"):
        functional.sgd([c, d], [g, g], lr=1.0, zero_grad=True)
    functional.sgd([a], [a], lr=1.0)
    with pytest.raises(ValueError, match=r"^grads\[0\] overlaps params\[0\] in memory"):
        functional.sgd([a], [a], lr=1.0, zero_grad=True)
    with pytest.raises(ValueError, match=r"^grads\[0\] overlaps out\[0\]\[0\] in memory"):
        functional.sgd([b], [a], lr=1.0, out=([a],))
    assert (c == -1).all()
    assert (g == 1).all()


@pytest.mark.parametrize("many", [False, True])
def test_arrays_that_a_call_has_seen_are_looked_at_again_by_the_next(many):
    def call(*arrays, **options):
        given = [[array] for array in arrays] if many else arrays
        functional.sgd(*given, lr=1.0, momentum=0.5, step=1, **options)

    w, g, m = np.zeros((2, 3)), np.ones((2, 3)), np.zeros((2, 3))
    call(w, g, m)
    w.flags.writeable = False
    with pytest.raises(ValueError, match="the array is read-only"):
        call(w, g, m)
    w.flags.writeable = True
    g.shape = 3, 2
    with pytest.raises(ValueError, match=r"shape \(3, 2\) is not the parameter's \(2, 3\)"):
        call(w, g, m)
    w.shape = 3, 2
    with pytest.raises(ValueError, match=r"shape \(2, 3\) is not that of params"):
        call(w, g, m)
    m.shape = 3, 2
    call(w, g, m)
    _core.exchange_memory(m, g)  # each is now where the other was
    call(w, g, m)
    g.flags.writeable = False
    call(w, g, m)
    with pytest.raises(ValueError, match="read-only, and zero_grad=True"):
        call(w, g, m, zero_grad=True)
    with pytest.raises(ValueError, match=r"grads(\[0\])? overlaps momentum_buffers"):
        call(w, m, m)
    w.dtype = np.int64
    with pytest.raises(TypeError, match="dtype int64"):
        call(w, g, m)
    w.dtype = np.float64
    other = np.zeros((5, 2))  # and one of another size
    call(other, np.ones((5, 2)), np.zeros((5, 2)))
    call(w, g, m)
    assert (other == -1).all()
    assert (w == -5).all()
    memory = np.zeros(9)
    call(memory[:3], np.ones(3), memory[4:7])
    with pytest.raises(ValueError, match=r"^momentum_buffers.* overlaps params"):
        call(memory[:5], np.ones(5), memory[4:])  # begin where those before began
    assert memory.tolist() == [-1] * 3 + [0] + [1] * 3 + [0] * 2


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("many", [False, True])
def test_no_array_is_kept_alive_after_a_call(many, wrong):
    arrays = [np.zeros(3), np.ones(4 if wrong else 3), np.zeros(3), np.zeros(3)]
    alive = [weakref.ref(array) for array in arrays]
    given = [[array] for array in arrays] if many else arrays
    try:
        functional.adam(*given, step=1, lr=0.1)
    except ValueError:
        assert wrong
    del given, arrays
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


def test_numpy_scalars_are_read_where_something_else_is_written():
    new, m = np.zeros(()), np.zeros(())
    functional.sgd(np.float64(3), np.float64(2), np.float64(1), lr=0.5, momentum=1.0, out=(new, m))
    assert (new, m) == (1.5, 3.0)
    with pytest.raises(TypeError, match=r"^params: expected a numpy\.ndarray, got float64"):
        functional.sgd(np.float64(3), np.float64(2), lr=0.5)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (Table(np.ones(2)), "^params: expected a numpy.ndarray, got Table; give numpy.asarray"),
        (SparseMatrix(), r"^params: expected .* got SparseMatrix; give its \.toarray\(\)"),
        (1.0, "^params: expected a numpy.ndarray, got float; give numpy.asarray"),
        ("ab", "^params: expected a numpy.ndarray, got str$"),
        (None, "^params: expected a numpy.ndarray, got NoneType$"),
        ({1.0}, r"^params must be an array, or a list .* such as list\(params\); got set$"),
    ],
)
def test_what_is_no_array_is_told_how_it_becomes_one(given, error):
    with pytest.raises(TypeError, match=error):
        functional.sgd(given, np.ones(2), lr=1.0)
    w, name = np.ones(2), type(given).__name__
    if given is not None:
        with pytest.raises(TypeError, match=rf"^grads(: expected| must be an array).* got {name}"):
            functional.sgd(w, given, lr=1.0)
    assert (w == 1).all()


def test_state_in_another_memory_order_is_told_from_state_of_another_shape():
    w, g, c, f = np.ones((3, 6)), np.ones((3, 6)), np.zeros((3, 6)), np.zeros((3, 6), order="F")
    order = r"its memory order \(strides \(8, 24\)\) is not that of {0} \(strides \(48, 8\)\); "
    order += r"numpy\.zeros_like\({0}\) has the same$"
    for call, message in [
        (lambda: functional.adagrad(w, g, f, lr=1.0), "^sums: " + order.format("params")),
        (
            lambda: functional.adagrad([c, w], [g, g], [w.copy(), f], lr=1.0),
            r"^sums\[1\]: " + order.format(r"params\[1\]"),
        ),
        (
            lambda: functional.adagrad(w, g, c, lr=1.0, out=(w.copy(), f)),
            r"^out\[1\]: " + order.format(r"out\[0\]"),
        ),
        (
            lambda: functional.adagrad(w, g, c[:, :5].copy(), lr=1.0),
            r"^sums: shape \(3, 5\) is not that of params: \(3, 6\)$",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert (w == 1).all()
    functional.adagrad(w, g, np.zeros_like(w), lr=1.0)


def test_the_number_of_the_step_is_asked_for_where_it_counts():
    w, g, s = np.ones(2), np.ones(2), np.zeros(2)
    for decay in (0.5, np.float32(0.5), 1):
        with pytest.raises(TypeError, match=r"^step is required where lr_decay is not 0: .*step=t"):
            functional.adagrad(w, g, s, lr=1.0, lr_decay=decay)
    with pytest.raises(TypeError, match=r"^lr_decay must be a real number"):
        functional.adagrad(w, g, s, lr=1.0, lr_decay=np.zeros(2))
    assert not s.any()
    for decay, lr in ((0.0, 1.0), (0, 1.0), (np.zeros(()), 1.0), (1.0, 2.0)):
        w[...], s[...] = 1.0, 0.0
        functional.adagrad(w, g, s, lr=lr, lr_decay=decay, step=2 if decay else None, eps=0.0)
        assert not w.any()


def test_sources_of_any_layout_are_copied():
    w = np.arange(12.0).reshape(3, 4)
    for source in (w, w.T.copy().T, w[::-1].copy()[::-1], np.broadcast_to(w[0], (3, 4))):
        new = np.full((3, 4), np.nan)
        functional.sgd(source, np.ones((3, 4)), lr=1.0, out=(new,))
        assert (new == source - 1).all()
    memory = np.arange(20.0)
    with pytest.raises(ValueError, match=r"^params overlaps out\[0\] in memory"):
        functional.sgd(memory[10:0:-1], np.ones(10), lr=1.0, out=(memory[:10],))
    assert (memory == np.arange(20.0)).all()


def test_each_parameter_may_have_a_step_of_its_own():
    opt = fastopt.Adam([np.zeros(3), np.zeros(2)], lr=0.1)
    params, ms, vs = ([np.zeros(3), np.zeros(2)] for _ in range(3))
    for number, second in enumerate([None, np.ones(2), np.full(2, 3.0)]):
        grads = [np.full(3, number + 1.0), second]
        opt.step(grads)
        functional.adam(params, grads, ms, vs, step=(number + 1, max(number, 1)), lr=0.1)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(params, opt.params, strict=True))
    w, b = np.zeros(1), [np.ones(1), np.ones(1)]
    functional.sgd([w, w.copy()], [np.ones(1)] * 2, b, lr=1, momentum=0.5, step=[1, np.int64(2)])
    assert b == [1, 1.5]
    assert w == -1


@pytest.mark.parametrize(
    ("params", "step", "error", "message"),
    [
        ([np.zeros(1)], [1, 2], ValueError, "step: expected 1, one for each of params; got 2"),
        (np.zeros(1), [1], ValueError, "step: one number for each of params, which is no list"),
        ([np.zeros(1)], [0], ValueError, "step must be >= 1"),
        ([np.zeros(1)], [1.0], TypeError, "step must be an integer, got 1.0"),
        ([np.zeros(1)], [[1]], TypeError, r"step must be an integer, got \[1\]"),
    ],
)
def test_steps_that_do_not_fit_are_refused(params, step, error, message):
    state = [np.zeros(1)] if isinstance(params, list) else np.zeros(1)
    with pytest.raises(error, match=f"^{message}"):
        functional.adagrad(params, state, state, lr=1.0, step=step)


def test_the_number_of_the_step_may_be_an_optimizers_counter():
    w = np.zeros(1)
    opt = fastopt.Adam([w])
    for _ in range(3):
        opt.step([np.ones(1)])
    state, mine = opt.state[0], w.copy()
    moments = [state["exp_avg"].copy(), state["exp_avg_sq"].copy()]
    functional.adam(mine, np.ones(1), *moments, step=state["step"] + 1, lr=1e-3)
    opt.step([np.ones(1)])
    assert mine == w


class CallingLender:
    """Lends an array, and runs something first."""

    def __init__(self, lent, first):
        self.lent, self.first = lent, first

    def __dlpack__(self, **options):
        self.first()
        return self.lent.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.lent.__dlpack_device__()


@pytest.mark.parametrize("change", [list.clear, lambda given: given.extend([object()] * 50_000)])
@pytest.mark.parametrize("which", ["params", "grads", "out"])
def test_lists_count_as_they_were_taken_whatever_a_lenders_code_does_to_them(which, change):
    target = np.zeros(4)
    given = {"params": [np.ones(4)], "grads": [np.ones(4)], "out": []}
    lender = CallingLender(target, lambda: change(given[which]))
    given["out"] += [[lender], [np.zeros(4)]]
    params, grads, out = given.values()
    functional.sgd(params, grads, [np.zeros(4)], lr=0.5, momentum=0.5, out=out)
    assert target.tolist() == [0.5] * 4
