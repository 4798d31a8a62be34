"""What test_keras_backends.py runs with KERAS_BACKEND=torch, in a process of its own."""

import contextlib
import functools
import itertools
import os
import sys
import tempfile
import threading
import warnings

import keras
import numpy as np
import pytest
import torch
from tables import AROUND_KERAS_UPDATE, KERAS_CLASSES, ROWS

import fastopt.keras
from fastopt import FallbackWarning

assert "fastopt.torch" not in sys.modules  # none of its classes is needed here

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "__array__ implementation")  # Keras's own, of NumPy
OURS = {name: getattr(fastopt.keras, name) for name in KERAS_CLASSES}
THEIRS = {name: getattr(keras.optimizers, name) for name in KERAS_CLASSES}
# Of each class the simplest and the most that it can do.
OWN = [(row.keras_name, own) for row in ROWS if row.keras for own in (row.keras[0], row.keras[-1])]
COMMON = [
    {},
    {"weight_decay": 0.05},
    {"clipnorm": 0.5},
    {"global_clipnorm": 0.5},
    {"use_ema": True, "ema_overwrite_frequency": 3},
    {"gradient_accumulation_steps": 2},
]
SHAPES = [(4, 5), (5,), (16, 4), ()]
# Adadelta's accumulated delta feeds back into itself. Lion's momentum takes up 1 - beta_2 of a
# gradient, which Keras forms in double on PyTorch, but in the variables' type on TensorFlow, as
# fastopt does: they differ by 16 halves of a unit.
ULPS = {"Adadelta": 8, "Nadam": 16, "Lion": 16}


def values(variables):
    return [v.value.detach().numpy().copy() for v in variables]


def assert_close(ours, theirs, ulps=4):
    """Allow some units in the last place of an array's largest element.

    The formulas are Keras's with its rates, bit for bit; PyTorch fuses some of a step's five or so
    multiplications and additions, which fastopt rounds one by one.
    """
    for a, b in zip(values(ours), values(theirs), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.dtype.kind == "i":
            assert (a == b).all()
        else:
            worst = np.abs(a - b).max(initial=0) / np.spacing(np.abs(b).max(initial=0))
            assert worst <= ulps, f"{worst} units in the last place"


def make_variables(dtypes=("float32",)):
    rng = np.random.default_rng(0)
    kinds = itertools.cycle(dtypes)
    return [keras.Variable(rng.standard_normal(s), dtype=next(kinds)) for s in SHAPES]


def train(opt, variables, steps):
    for i in steps:
        rng = np.random.default_rng(i)
        grads = [torch.tensor(rng.standard_normal(v.shape)).to(v.value.dtype) for v in variables]
        with torch.no_grad():
            opt.apply(grads, variables)


def forbid(*args):
    raise AssertionError("Keras's own update")


def only_kernels():
    """Make the update that Keras has for this backend an error in our classes."""
    for cls in OURS.values():
        assert callable(cls._parallel_update_step)
        cls._parallel_update_step = forbid


@contextlib.contextmanager
def one_fallback(optimizer, why):
    """Expect one warning, if the optimizer is ours, for this reason."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FallbackWarning)
        yield
    assert len(caught) == isinstance(optimizer, tuple(OURS.values()))
    for warning in caught:
        assert warning.category is FallbackWarning
        assert str(warning.message).startswith("fastopt.keras.")
        assert why in str(warning.message)
        assert "fastopt's kernels run" in str(warning.message)


def raises_before_it_writes(optimizer, variables, step):
    """Expect the warning as an error, which has left everything as it was."""
    before, told = values(variables + optimizer.variables), optimizer.fastopt_info()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for _ in range(2):  # so it is when the step is tried again
            with pytest.raises(FallbackWarning, match=r"^fastopt\.keras\."), torch.no_grad():
                step()
    for a, b in zip(before, values(variables + optimizer.variables), strict=True):
        assert np.array_equal(a, b)
    assert optimizer.fastopt_info() == told


def runs(optimizer):
    return [info["runs"] for info in optimizer.fastopt_info()]


def numbers_and_checkpoints():
    for (name, own), common in itertools.product(OWN, COMMON):
        options = {"learning_rate": 0.01} | own | common
        dtypes = ("float32",) if "global_clipnorm" in common else ("float32", "float64")
        if name == "Nadam":  # of which Keras computes the momentum in the first one's type
            dtypes = dtypes[-1:]
        for first, second in (OURS, THEIRS), (THEIRS, OURS):
            variables = make_variables(dtypes)
            opt = first[name](**options)
            train(opt, variables, range(5))
            moved = [keras.Variable(a, dtype=a.dtype.name) for a in values(variables)]
            other = second[name](**options)
            other.build(moved)
            store = {}
            opt.save_own_variables(store)
            other.load_own_variables({key: value.copy() for key, value in store.items()})
            train(opt, variables, range(5, 10))
            train(other, moved, range(5, 10))
            ulps = ULPS.get(name, 4)
            assert_close(moved, variables, ulps)
            assert_close(other.variables, opt.variables, ulps)


NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def places(tensor):
    """Return a tensor's elements by their places among all numbers of its type, in order."""
    bits = tensor.detach().view(torch.int16).long()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def steps_of_16_bits_are_those_of_float32_rounded_once():
    """Beside Keras's own optimizer of float32 variables, which every step begins with the same."""
    for dtype, (name, own), decay in itertools.product(NARROW, OWN, ({}, {"weight_decay": 0.05})):
        options = {"learning_rate": 0.01} | own | decay
        variables = make_variables([dtype])
        mine, peer = OURS[name](**options), THEIRS[name](**options)
        wide = [keras.Variable(v.value.detach().float(), dtype="float32") for v in variables]
        mine.build(variables)
        peer.build(wide)
        assert {v.dtype for v in mine.variables[2:]} <= {dtype}
        compared = off = 0
        for i in range(6):
            for to, of in zip(wide + peer.variables, variables + mine.variables, strict=True):
                to.value.data.copy_(of.value.data)
            rng = np.random.default_rng(i)
            grads = [torch.tensor(rng.standard_normal(v.shape)).to(NARROW[dtype]) for v in wide]
            with torch.no_grad():
                mine.apply(grads, variables)
                peer.apply([g.float() for g in grads], wide)
            for a, b in zip(variables + mine.variables, wide + peer.variables, strict=True):
                if a.value.dtype == NARROW[dtype]:
                    ours, theirs = a.value.detach(), b.value.detach()
                    apart = (places(ours) - places(theirs.to(ours.dtype))).abs()
                    # Where terms cancel, what is left is float32's own last bits (assert_close).
                    ulp = np.spacing(np.float32(theirs.abs().max()))
                    near = (ours.double() - theirs.double()).abs() <= 4 * float(ulp)
                    assert ((apart <= 1) | near).all()
                    compared, off = compared + apart.numel(), off + int(apart.count_nonzero())
        assert compared >= 6 * sum(v.value.numel() for v in variables)
        assert off <= compared / 100  # where float32's own last bits decide
        assert int(mine.iterations.value) == 6
        assert runs(mine) == ["fastopt"] * 4


def adam_trains_in_bfloat16():
    """Keras's own does not: it has 1 for a beta_2 of 0.999, and a corrected learning rate of 0."""
    after = []
    for classes in OURS, THEIRS:
        w = keras.Variable(np.ones(4), dtype="bfloat16")
        opt = classes["Adam"](0.125)
        with torch.no_grad():
            for _ in range(4):
                opt.apply([torch.ones(4, dtype=torch.bfloat16)], [w])
        after.append(w.value.detach().float())
    assert ((after[0] - 0.5).abs() <= 0.01).all()
    assert (after[1] == 1).all()


def variables_of_all_types_in_one_step():
    dtypes = ["bfloat16", "float32", "float16", "float64"]
    variables = make_variables(dtypes)
    opt = OURS["RMSprop"](0.01, momentum=0.5)
    train(opt, variables, range(5))
    assert runs(opt) == ["fastopt"] * 4
    for i, dtype in enumerate(dtypes):
        alone = make_variables(dtypes)[i : i + 1]
        peer = OURS["RMSprop"](0.01, momentum=0.5)
        for k in range(5):
            rng = np.random.default_rng(k)
            grads = [torch.tensor(rng.standard_normal(v.shape)) for v in variables]
            with torch.no_grad():
                peer.apply([grads[i].to(alone[0].value.dtype)], alone)
        assert alone[0].dtype == dtype
        assert torch.equal(variables[i].value, alone[0].value)


def the_rest_of_a_step_in_16_bits_is_keras_own():
    for dtype, option in itertools.product(NARROW, AROUND_KERAS_UPDATE):
        results = []
        for classes in OURS, THEIRS:
            variables = make_variables([dtype])
            opt = classes["SGD"](0.125, momentum=0.5, **option)
            train(opt, variables, range(6))
            results.append(variables + opt.variables)
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            ours, theirs = a.value.detach().double(), b.value.detach().double()
            # Keras rounds several times a step, to units in the last place of the largest so far.
            atol = 2 * max(1.0, float(theirs.abs().max())) * torch.finfo(NARROW[dtype]).eps
            assert ((ours - theirs).abs() <= atol).all()


def scaled_losses_in_float16():
    variables, peers = make_variables(["float16"]), make_variables(["float16"])
    scaled = keras.optimizers.LossScaleOptimizer(
        OURS["Adam"](0.01), initial_scale=4.0, dynamic_growth_steps=100
    )
    plain = OURS["Adam"](0.01)
    for i in range(6):
        rng = np.random.default_rng(i)
        grads = [torch.tensor(rng.standard_normal(v.shape)).half() for v in variables]
        upscaled = [g * float(scaled.scale_loss(1.0)) if i else 4 * g for g in grads]
        with torch.no_grad():
            if i == 3:
                before = [v.value.clone() for v in variables + scaled.inner_optimizer.variables]
                upscaled[1] = upscaled[1] * float("inf")
                scaled.apply(upscaled, variables)
                after = variables + scaled.inner_optimizer.variables
                assert all(torch.equal(a, b.value) for a, b in zip(before, after, strict=True))
            else:
                scaled.apply(upscaled, variables)
                plain.apply(grads, peers)
    for some, others in (
        (variables, peers),
        (scaled.inner_optimizer.variables, plain.variables),
    ):
        assert all(torch.equal(a.value, b.value) for a, b in zip(some, others, strict=True))


def models_of_16_bits():
    x = np.random.default_rng(0).standard_normal((50, 6)).astype("float32")
    before = keras.config.dtype_policy()
    for policy, name in itertools.product(NARROW, OURS):
        keras.config.set_dtype_policy(policy)
        try:
            keras.utils.set_random_seed(0)
            model = keras.Sequential(
                [keras.Input((6,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(3)]
            )
            rate = 10.0 if name == "Adadelta" else 0.01  # whose steps begin at a thousandth of it
            model.compile(OURS[name](rate), "mse")
            losses = model.fit(x, x[:, :3] ** 2, batch_size=16, epochs=20, verbose=0).history
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "model.keras")
                model.save(path)
                loaded = keras.models.load_model(path)
        finally:
            keras.config.set_dtype_policy(before)
        assert losses["loss"][-1] < 0.9 * losses["loss"][0]
        assert set(runs(model.optimizer)) == {"fastopt"}
        assert {v.dtype for v in model.trainable_variables} == {policy}
        assert type(loaded.optimizer) is OURS[name]
        some, others = (m.weights + m.optimizer.variables for m in (model, loaded))
        assert all(torch.equal(a.value, b.value) for a, b in zip(some, others, strict=True))


def gradients_of_another_dtype():
    for name, dtype in itertools.product(OURS, (torch.float64, torch.float16, torch.bfloat16)):
        after = []
        for seen in dtype, torch.float32:
            variables = [keras.Variable(np.ones(100, np.float32)) for _ in range(4)]
            opt = OURS[name](0.1)
            for k in range(3):
                opt.apply(
                    [torch.full((100,), 1.0 + i + k, dtype=seen) for i in range(4)], variables
                )
            after.append(values(variables))
        assert np.array_equal(*after)


def in_place_and_seen_by_autograd():
    w = keras.Variable(np.ones(4, np.float32))
    memory, before = w.value.data_ptr(), w.value._version
    loss = (w.value**2).sum()
    train(OURS["SGD"](), [w], range(1))
    assert w.value.data_ptr() == memory
    assert w.value._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def models():
    x = np.random.default_rng(0).standard_normal((50, 6)).astype("float32")
    results = []
    for classes in OURS, THEIRS:
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(3)]
        )
        model.compile(classes["AdamW"](0.01), "mse")
        model.fit(x, x[:, :3] ** 2, batch_size=16, epochs=2, verbose=0, shuffle=False)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.keras")
            model.save(path)
            loaded = keras.models.load_model(path)
        assert isinstance(loaded.optimizer, classes["AdamW"])
        assert_close(loaded.optimizer.variables, model.optimizer.variables, ulps=0)
        results.append(model.weights)
    assert_close(*results)


def stateless():
    """The tensors that are given stay as they are (Keras's own are not so careful here)."""
    results = []
    for classes in OURS, THEIRS:
        variables = make_variables()
        opt = classes["Adam"](0.1)
        opt.build(variables)
        given = [v.value.detach().clone() for v in variables]
        slots = [v.value.detach().clone() for v in opt.variables]
        before = [t.clone() for t in given + slots]
        with torch.no_grad(), one_fallback(opt, "the step is stateless"):
            new, _ = opt.stateless_apply(slots, [torch.ones_like(t) for t in given], given)
        unchanged = [torch.equal(a, b) for a, b in zip(before, given + slots, strict=True)]
        assert all(unchanged) or classes is THEIRS
        results.append([keras.Variable(t) for t in new])
    assert_close(*results)


def what_keras_does():
    """What the kernels do not take has the bits of Keras's update of it, and there is one warning.

    (Of variables together: Keras computes its rates, and the product of Nadam, in the type of the
    first.)
    """

    def of_type(dtype, n):
        return keras.Variable(np.ones((n, 2)), dtype=dtype)

    def turned(dtype, n):
        variable = of_type(dtype, n)
        variable._value = torch.nn.Parameter(torch.ones(2, n).t())
        return variable

    def steps(opt, variables, numbers, which):
        opt.build([variables[i] for i in which])
        for number in numbers:
            rng = np.random.default_rng(number)
            grads = [torch.tensor(rng.random(v.shape)).to(v.value.dtype) for v in variables]
            with torch.no_grad():
                opt.apply([grads[i] for i in which], [variables[i] for i in which])

    fit, unfit = functools.partial(of_type, "float32"), functools.partial(turned, "float32")
    why = "its memory is not in order"
    for make, by_keras, warns in (
        ((unfit, fit), [0], True),
        ((fit, unfit), [1], False),
        ((functools.partial(turned, "float16"), fit), [0], True),
        ((functools.partial(turned, "float16"), unfit), [0, 1], True),
    ):
        for name, own in OWN:
            options = {"weight_decay": 0.1, **own}
            variables, peers = ([new(n) for new, n in zip(make, (3, 2), strict=True)] for _ in "ab")
            opt = OURS[name](0.1, **options)
            opt.build(variables)
            if warns:
                raises_before_it_writes(
                    opt,
                    variables,
                    lambda: steps(opt, variables, [0], [0, 1]),  # noqa: B023
                )
            with one_fallback(opt if warns else None, why):
                steps(opt, variables, range(3), [0, 1])
            assert runs(opt) == ["keras" if i in by_keras else "fastopt" for i in range(2)]
            by_kernels = [i for i in range(2) if i not in by_keras]
            few = 512 if name == "Nadam" and variables[0].dtype == "float16" else 4
            for which, ulps in (by_keras, 0), (by_kernels, few):
                steps(THEIRS[name](0.1, **options), peers, range(3), which)
                assert_close([variables[i] for i in which], [peers[i] for i in which], ulps)


def sparse_gradients():
    """Keras's layers make none on this backend; those that it is given its own update takes."""
    grad = torch.sparse_coo_tensor([[0, 3, 0]], torch.ones(3, 5), (4, 5), check_invariants=True)
    results = []
    for classes in OURS, THEIRS:
        variables = make_variables()[:1]
        opt = classes["Adam"](0.1, clipnorm=0.5)
        with torch.no_grad(), one_fallback(opt, "its gradient's layout is torch.sparse_coo"):
            opt.apply([grad], variables)
        results.append(variables)
    assert_close(*results, ulps=0)
    lazy = OURS["Adam"](0.1, rows="lazy")
    lazy.build(variables)
    before = values(variables + lazy.variables)
    text = "does not have rows='lazy', since its gradient's layout is torch.sparse_coo; nothing was"
    with torch.no_grad(), pytest.raises(RuntimeError, match=text):
        lazy.apply([grad], variables)
    for a, b in zip(before, values(variables + lazy.variables), strict=True):
        assert np.array_equal(a, b)


def devices_without_memory():
    """Stands for a GPU, which few machines have."""
    with keras.device("meta"):
        variables = [keras.Variable(np.ones((3, 2)), dtype="float32")]
        opt = OURS["Adam"]()
        with torch.no_grad(), one_fallback(opt, "its device is meta"):
            opt.apply([torch.ones(3, 2, device="meta")], variables)
    assert [info["why"] for info in opt.fastopt_info()] == ["its device is meta"]


def a_subclass_with_an_update_of_its_own():
    results = []
    for classes in OURS, THEIRS:

        class Doubled(classes["SGD"]):
            def update_step(self, gradient, variable, learning_rate):
                super().update_step(2 * gradient, variable, learning_rate)

        variables = make_variables()
        opt = Doubled(0.1, weight_decay=0.1)
        with one_fallback(opt, "Doubled has an update_step of its own"):
            train(opt, variables, range(3))
        results.append(variables)
    assert_close(*results, ulps=0)


def compiled_steps():
    """They have Keras's bits, and one warning."""
    results = []
    for classes in OURS, THEIRS:
        variables = make_variables()
        opt = classes["AdamW"](0.1)
        opt.build(variables)
        grads = [torch.ones(v.shape) for v in variables]

        def step(opt=opt, variables=variables, grads=grads):
            with torch.no_grad():
                opt.apply(grads, variables)

        compiled = torch.compile(step, backend="eager")
        if classes is OURS:
            raises_before_it_writes(opt, variables, compiled)
        with one_fallback(opt, "torch.compile"):
            for _ in range(3):
                compiled()
        if classes is OURS:
            for step_once, who in (step, "fastopt"), (compiled, "keras"):
                step_once()
                assert runs(opt) == [who] * len(variables)
        else:
            for _ in range(2):
                compiled()
        results.append(variables)
        assert int(opt.iterations.value) == 5
    assert_close(*results)


def threads_may_share_an_optimizer():
    w = keras.Variable(np.zeros(300_000, np.float32))  # large enough to let other threads run
    opt = OURS["SGD"](1.0)
    opt.build([w])
    errors = []

    def some_steps():
        try:
            for _ in range(50):
                opt.apply([torch.ones(300_000)], [w])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=some_steps) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (values([w])[0] == -150).all()


def negative(tensor):
    """Return a tensor of the same values that stores their negatives."""
    return torch._neg_view(-tensor)


def turned_around(tensor):
    return tensor.t().contiguous().t()


def what_the_kernels_refuse():
    """Then Keras's own update runs, for all or for what is refused, and nothing is left undone."""

    def gradient_stored_as_negatives(opt, variables, grads):
        grads[0] = negative(grads[0])

    def gradient_that_is_another_variable(opt, variables, grads):
        grads[0] = variables[1].value.detach()

    def variables_that_share_memory(opt, variables, grads):
        variables[1].value.data = variables[0].value.data

    def slot_of_another_memory_order(opt, variables, grads):
        opt.momentums[0].value.data = turned_around(opt.momentums[0].value.data)

    def slot_of_another_dtype(opt, variables, grads):
        opt.momentums[0].value.data = opt.momentums[0].value.data.double()

    def variable_that_shares_memory_with_one_that_is_not_taken(opt, variables, grads):
        variables[0].value.data = variables[1].value.data.as_strided((3, 2), (1, 3))

    def gradient_that_is_a_variable_that_is_not_taken(opt, variables, grads):
        gradient_stored_as_negatives(opt, variables, grads)
        grads[1] = variables[0].value.detach()

    cases = [case for case in locals().values() if callable(case)]
    assert len(cases) == 7
    for case, taken in itertools.product(cases, (True, False)):
        some = case is gradient_stored_as_negatives
        told = ["keras", "fastopt", "fastopt"] if some else ["keras"] * 3
        told[2] = told[2] if taken else "keras"
        warns = told.count("keras") > 1
        results = []
        for classes in OURS, THEIRS:
            rng = np.random.default_rng(0)
            variables = [
                keras.Variable(rng.standard_normal((3, 2)), dtype="float32") for _ in range(3)
            ]
            if not taken:
                last = variables[2]
                last._value = torch.nn.Parameter(turned_around(last.value.detach()))
            opt = classes["SGD"](0.25, momentum=0.5, weight_decay=0.125)
            opt.build(variables)
            with one_fallback(opt if warns else None, " of 18 elements"):
                for step in range(3):
                    rng = np.random.default_rng(step)
                    grads = [torch.tensor(rng.standard_normal((3, 2))).float() for _ in variables]
                    case(opt, variables, grads)
                    if classes is OURS and warns and step == 0:
                        raises_before_it_writes(
                            opt, variables, functools.partial(opt.apply, grads, variables)
                        )
                    with torch.no_grad():
                        opt.apply(grads, variables)
            if classes is OURS:
                assert runs(opt) == told
                refused = [
                    (info["why"] or "").startswith("the kernels refuse: ")
                    for info in opt.fastopt_info()
                ]
                assert any(refused) != some
            results.append([v.value.detach().double() for v in variables + opt.momentums])
        exactly = 0 if told == ["keras"] * 3 else 4
        kept = [[keras.Variable(v, dtype="float32") for v in each] for each in results]
        assert_close(*kept, ulps=exactly)


def rates_are_not_rounded_to_float32():
    """A learning rate that is a float is one, and 0.1 in float64 is no float32."""
    for name in KERAS_CLASSES:
        results = []
        for classes in OURS, THEIRS:
            variables = make_variables(["float64"])
            train(classes[name](lambda: 0.1, weight_decay=0.1), variables, range(10))
            results.append(variables)
        assert_close(*results)


def a_step_is_kept_while_tensors_are_in_place():
    def other_memory(opt, variables):
        variables[0].value.data = variables[0].value.data.clone()

    def other_tensor(opt, variables):
        variables[1]._value = torch.nn.Parameter(variables[1].value.detach().clone())

    def other_slot(opt, variables):
        slot = opt._velocities[2]
        opt._velocities[2] = keras.Variable(slot.value.detach().clone(), name=slot.name)

    def other_shape(opt, variables):
        memory = variables[0].value.data
        for v in variables[0], opt._momentums[0], opt._velocities[0]:
            v.value.data = v.value.data.reshape(5, 4)
            v._shape = (5, 4)
        assert memory.data_ptr() == variables[0].value.data_ptr()

    def other_hyperparameter(opt, variables):
        opt.beta_1 = 0.8

    results = []
    for classes in OURS, THEIRS:
        variables = make_variables()
        opt = classes["Adam"](0.01)
        train(opt, variables, range(2))
        steps = [opt._updates._step] if classes is OURS else []
        for change in other_memory, other_tensor, other_slot, other_shape, other_hyperparameter:
            change(opt, variables)
            for i in range(2):
                train(opt, variables, range(i, i + 1))
                opt.learning_rate = 0.01 + i  # which is no reason
                if classes is OURS:
                    steps.append(opt._updates._step)
            opt.learning_rate = 0.01
        results.append(variables)
        assert classes is THEIRS or steps[1::2] == steps[2::2]
        assert classes is THEIRS or len(set(steps)) == 6
    assert_close(*results)


assert keras.backend.backend() == "torch"
stateless()
what_keras_does()
what_the_kernels_refuse()
sparse_gradients()
devices_without_memory()
a_subclass_with_an_update_of_its_own()
compiled_steps()
only_kernels()
numbers_and_checkpoints()
rates_are_not_rounded_to_float32()
a_step_is_kept_while_tensors_are_in_place()
threads_may_share_an_optimizer()
steps_of_16_bits_are_those_of_float32_rounded_once()
adam_trains_in_bfloat16()
variables_of_all_types_in_one_step()
the_rest_of_a_step_in_16_bits_is_keras_own()
scaled_losses_in_float16()
models_of_16_bits()
gradients_of_another_dtype()
in_place_and_seen_by_autograd()
models()
print("all of it ran")
