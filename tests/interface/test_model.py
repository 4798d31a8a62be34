"""Parameters, groups, state and averages, as one finds them on an optimizer and may change them."""

import copy
import itertools
import pickle

import numpy as np
import pytest
from oracle import NUMBERS
from support import (
    EVERY,
    F32,
    F64,
    NOT_EMPTY,
    Run,
    differences,
    everything,
    finish,
    make_grads,
    make_owned_params,
    make_params,
)
from tables import CONFIGS, ROWS

from fastopt import SGD, Adagrad, Adam, _core

# ---- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_layout_alignment_and_company_change_no_bit(config):
    cls, kwargs, _ = CONFIGS[config]
    kwargs = {name: value for name, value in kwargs.items() if name != "global_clip_norm"}
    params, arena = make_params()
    gaps = np.ones(arena.size, bool)
    for p in params:
        start = p.ctypes.data - arena.ctypes.data
        gaps[start : start + p.nbytes] = False
    kept = arena[gaps].copy()
    opt = cls(params, **kwargs)
    alone = [np.array(p, order="C") for p in params]
    optimizers = [cls([p], **kwargs) for p in alone]
    for seed in (1, 2, 3):
        grads = make_grads(seed)
        opt.step(grads)
        for single, g in zip(optimizers, grads, strict=True):
            single.step([np.array(g, order="C")])
    assert {p.dtype for p in params} == {F32, F64}
    assert {p.flags.aligned for p in params if p.size} == {True, False}
    for k in EVERY:
        assert params[k].tobytes() == alone[k].tobytes()
        assert k not in NOT_EMPTY or (params[k] != make_params()[0][k]).all()
        for name, array in opt.state[k].items():
            assert array.tobytes() == optimizers[k].state[0][name].tobytes(), name
    assert (arena[gaps] == kept).all()


def test_a_numpy_scalar_is_a_gradient_for_a_0d_parameter():
    for dtype in (np.float32, np.float64):
        w = np.array(3.0, dtype)
        opt = SGD([w], lr=0.5)
        opt.step([dtype(4)])
        opt.step([np.array(4.0, dtype)])
        assert w == -1


@pytest.mark.parametrize("config", CONFIGS)
def test_a_gradient_may_be_its_own_parameter(config):
    own, apart = Run(config), Run(config)
    for _ in range(2):
        own.step(own.params)
        apart.step([p.copy() for p in apart.params])
    assert differences(everything(own.opt), everything(apart.opt)) == []


def test_gradients_may_be_shared_read_only_or_broadcast():
    a, b = np.zeros((2, 3)), np.zeros((2, 3))
    row = np.arange(3.0)
    row.flags.writeable = False
    shared = np.broadcast_to(row, (2, 3))
    SGD([a, b], lr=1).step([shared, shared])
    assert a.tolist() == b.tolist() == [[0, -1, -2]] * 2


class Tagged(np.ndarray):
    """A subclass that objects to any operation on it."""

    def __array_ufunc__(self, *args, **kwargs):
        raise AssertionError

    def __array_function__(self, *args, **kwargs):
        raise AssertionError


def test_subclasses_and_memory_maps_are_updated_as_they_are(tmp_path):
    path = tmp_path / "weights"
    np.full(5, 2.0).tofile(path)
    mapped = np.memmap(path, np.float64, "r+")
    tagged = np.full((2, 2), 2.0, np.float32).view(Tagged)
    opt = SGD([mapped, tagged], lr=1, momentum=0.5, ema_decay=0.5)
    for _ in range(2):
        opt.step([np.ones(5), np.ones((2, 2), np.float32).view(Tagged)])
    assert opt.params[0] is mapped
    assert opt.params[1] is tagged
    assert {type(a) for s in opt.state for a in s.values()} == {np.ndarray}
    assert {type(a) for a in opt.ema} == {np.ndarray}
    mapped.flush()
    assert np.fromfile(path).tolist() == [2 - 1 - 1.5] * 5
    assert tagged.tolist() == [[-0.5] * 2] * 2


def test_a_parameter_that_has_moved_is_followed():
    params = [np.ones(4), np.ones(4)]
    opt = SGD(params, lr=1)
    opt.step([np.ones(4)] * 2)
    places = [{w.ctypes.data} for w in params]
    for _ in range(4):
        for size in (1 << 20, 4):  # at most one of them can grow where it is
            for w, seen in zip(params, places, strict=True):
                w.resize(size, refcheck=False)
                seen.add(w.ctypes.data)
        opt.step([np.ones(4)] * 2)
    assert max(len(seen) for seen in places) > 1
    assert [w.tolist() for w in params] == [[-4] * 4] * 2


# ---- groups --------------------------------------------------------------------------------------


def test_hyperparameters_sign_and_decay_may_differ_between_groups():
    a, b, c = np.ones(2), np.ones(2), np.ones(2)
    opt = SGD(
        [
            {"params": [a]},
            {"params": b, "lr": 0.25, "maximize": True},
            {"params": [c], "weight_decay": 2, "decoupled_weight_decay": True},
        ],
        lr=0.5,
    )
    opt.step([np.ones(2)] * 3)
    assert (a[0], b[0], c[0]) == (0.5, 1.25, -0.5)
    assert [g["lr"] for g in opt.param_groups] == [0.5, 0.25, 0.5]
    assert opt.param_groups[1]["params"][0] is b


def test_a_changed_hyperparameter_takes_effect_at_the_next_step():
    w = np.zeros(1)
    opt, g = SGD([w], lr=1), [np.ones(1)]
    opt.step(g)
    opt.param_groups[0]["lr"] = 10
    opt.step(g)
    opt.param_groups[0].update(lr=100, maximize=True)
    opt.step(g)
    assert w == -1 - 10 + 100
    opt = Adam([w], betas=[0.5, 0.5])
    opt.step(g)
    opt.param_groups[0]["betas"][0] = 2.0  # in place, and seen
    with pytest.raises(ValueError, match=r"betas\[0\] must be >= 0 and < 1, got 2.0"):
        opt.step(g)
    opt.param_groups[0]["betas"] = [0.25, 0.5]
    opt.step(g)
    assert opt.state[0]["exp_avg"] == 0.25 * 0.5 + 0.75


def test_a_group_can_be_added_and_takes_defaults_counters_and_averages():
    a, b, c = np.zeros(2), np.ones(3, np.float32), np.ones(())
    opt = SGD([a], lr=0.5, momentum=0.5, ema_decay=0.5)
    opt.step([np.ones(2)])
    kept = opt.state[0]["momentum_buffer"]
    opt.add_param_group({"params": [b], "lr": 1})
    opt.add_param_group({"params": c})
    assert [g["lr"] for g in opt.param_groups] == [0.5, 1, 0.5]
    assert opt.params[1] is b
    assert opt.params[2] is c
    assert opt.state[0]["momentum_buffer"] is kept
    opt.step([np.ones(2), np.ones(3, np.float32), np.ones(())])
    assert (a[0], b[0], c) == (-0.5 - 0.75, 0, 0.5)
    assert [int(s["step"]) for s in opt.state] == [2, 1, 1]
    assert opt.completed_steps == 2
    assert [float(e.flat[0]) for e in opt.ema] == [(-0.5 - 1.25) / 2, 0.5, 0.75]
    assert np.array_equal(SGD({"a": a}).params, [a])


def test_a_named_group_can_be_added_to_named_ones():
    a, b = np.zeros(2), np.zeros(2)
    opt = SGD({"a": a}, lr=1)
    opt.add_param_group({"params": {"b": b}, "lr": 2})
    opt.step({"b": np.ones(2), "a": np.ones(2)})
    assert (a[0], b[0]) == (-1, -2)


@pytest.mark.parametrize(
    ("cls", "switch", "slot"),
    [(row.cls, switch, slot) for row in ROWS for slot, switch in row.switches()],
)
def test_state_switched_on_later_starts_at_zero_then(cls, switch, slot):
    late = cls({"a": np.ones(5), "b": np.ones((2, 2))}, lr=0.5)
    early = cls({"a": np.ones(5), "b": np.ones((2, 2))}, lr=0.5, **switch)
    steps = [{"a": np.full(5, x), "b": np.full((2, 2), -x)} for x in (1.0, 3.0, 0.5, 2.0)]
    for grads in steps[:2]:
        late.step(grads)
    kept = late.state[0]
    late.param_groups[0].update(switch)
    assert slot not in kept
    saved = late.state_dict()
    for name, own in saved["state"].items():
        own[slot] = np.zeros((5,) if name == "a" else (2, 2))
    early.load_state_dict(saved)
    for mine, other in zip(late.params, early.params, strict=True):
        other[...] = mine
    for grads in steps[2:]:
        late.step(grads)
        early.step(grads)
    assert all(late.state[0][name] is kept[name] for name in kept)
    assert late.state[0][slot].any()
    assert differences(everything(late), everything(early)) == []


def test_a_list_or_an_array_for_all_groups_is_each_groups_own():
    betas, lr = [0.5, 0.75], np.array(0.5)
    groups = [{"params": [np.zeros(1)]}, {"params": [np.zeros(1)]}]
    opt = Adam(groups, lr=lr, betas=betas)
    opt.param_groups[0]["betas"][0] = 0.25
    opt.param_groups[0]["lr"][...] = 0.125
    betas[1], lr[...] = 0.0, 0.0
    opt.add_param_group({"params": [np.zeros(1)]})
    assert [group["betas"] for group in opt.param_groups] == [[0.25, 0.75], *[[0.5, 0.75]] * 2]
    assert [float(group["lr"]) for group in opt.param_groups] == [0.125, 0.5, 0.5]


# ---- state ---------------------------------------------------------------------------------------


def slot_cases():
    """Each class with every set of switches for its state."""
    for row in ROWS:
        for n in range(1 + len(row.switches())):
            for on in itertools.combinations(row.switches(), n):
                names = {s for s, switch in row.slots.items() if not switch or (s, switch) in on}
                for semantics in ("torch", "keras"):
                    options = {k: v for _, switch in on for k, v in switch.items()}
                    yield row.cls, {**options, "semantics": semantics}, names


SLOTS = list(slot_cases())


@pytest.mark.parametrize(("cls", "kwargs", "names"), SLOTS)
def test_state_has_torchs_names_from_the_start_and_is_laid_out_as_its_parameter(cls, kwargs, names):
    params, _ = make_params()
    opt = cls(params, **kwargs)
    assert len(opt.state) == len(params)
    for param, state in zip(params, opt.state, strict=True):
        assert {*state} == {"step", *names}
        step = state["step"]
        assert (type(step), step.shape, step.dtype, int(step)) == (np.ndarray, (), np.int64, 0)
        for name in names:
            if name in NUMBERS:
                assert (state[name].shape, state[name].dtype) == ((), np.float64)
                assert state[name] == NUMBERS[name]
                continue
            assert (state[name].shape, state[name].dtype) == (param.shape, param.dtype)
            assert not state[name].any()
            longer = [axis for axis in range(param.ndim) if param.shape[axis] > 1]
            if param.size:
                assert [state[name].strides[i] for i in longer] == [
                    param.strides[i] for i in longer
                ]
    opt.step([g if k % 2 else None for k, g in enumerate(make_grads(1))])
    assert [int(s["step"]) for s in opt.state] == [0, 1, 0, 1, 0, 1]


def test_under_keras_semantics_the_momentum_buffer_is_the_velocity():
    for semantics, first, second in (("torch", 1, 2.5), ("keras", -0.5, -1.25)):
        opt = SGD([np.zeros(2)], lr=0.5, momentum=0.5, semantics=semantics)
        opt.step([np.ones(2)])
        assert opt.state[0]["momentum_buffer"].tolist() == [first] * 2
        opt.step([np.full(2, 2.0)])
        assert opt.state[0]["momentum_buffer"].tolist() == [second] * 2


def test_torchs_first_use_of_the_momentum_buffer_goes_by_the_step_counter():
    opt = SGD([np.zeros(1), np.zeros(1)], lr=1, momentum=0.5, dampening=0.5)
    for grads in ([np.ones(1), None], [np.ones(1), np.ones(1)]):
        opt.step(grads)
    assert [s["momentum_buffer"].item() for s in opt.state] == [0.5 + 0.5, 1]
    opt.state[0]["step"][...] = 0
    opt.step([np.full(1, 8.0), None])
    assert opt.state[0]["momentum_buffer"] == 8


def switched_on():
    """Momentum came two steps late; of three parameters, the last has had no gradient since."""
    opt = SGD({name: np.zeros(1) for name in "abc"}, lr=1, dampening=0.5)
    for _ in range(2):
        opt.step({name: np.ones(1) for name in "abc"})
    opt.param_groups[0]["momentum"] = 0.5
    opt.step({"a": np.full(1, 8.0), "b": np.full(1, 16.0), "c": None})
    return opt


def ways_to_go_on(opt, tmp_path):
    """The optimizer itself, and all that it can become."""
    opt.save(tmp_path / "file")
    yield "deepcopy", copy.deepcopy(opt)
    yield "pickle", pickle.loads(pickle.dumps(opt))
    for how, load in (
        ("state dict", lambda new: new.load_state_dict(opt.state_dict())),
        ("file", lambda new: new.load(tmp_path / "file")),
    ):
        for momentum in (0.0, 0.9):
            new = SGD({name: np.zeros(1) for name in "abc"}, lr=9, momentum=momentum)
            if momentum:
                new.step({name: np.full(1, 99.0) for name in "abc"})
            load(new)
            yield f"{how} {momentum}", new
    yield "itself", opt


def test_momentum_that_is_switched_on_later_starts_as_a_copy_of_the_gradient():
    opt = switched_on()
    assert [s["momentum_buffer"].item() for s in opt.state] == [8, 16, 0]
    assert [int(s["step"]) for s in opt.state] == [3, 3, 2]


def test_of_one_step_count_a_buffer_may_have_begun_and_its_neighbour_not():
    opt = SGD([np.zeros(1), np.zeros(1), np.zeros(1)], lr=1, dampening=0.5)
    opt.step([np.ones(1)] * 3)
    opt.param_groups[0]["momentum"] = 0.5
    opt.step([np.full(1, 8.0), None, np.full(1, 16.0)])
    opt.param_groups[0]["momentum"] = 0.0
    opt.step([None, np.ones(1), None])
    assert [int(s["step"]) for s in opt.state] == [2, 2, 2]
    opt.param_groups[0]["momentum"] = 0.5
    opt.step([np.full(1, 2.0)] * 3)
    assert [s["momentum_buffer"].item() for s in opt.state] == [4 + 1, 2, 8 + 1]


def test_a_buffer_that_has_not_begun_stays_so_in_every_copy(tmp_path):
    ways = 0
    for how, opt in ways_to_go_on(switched_on(), tmp_path):
        opt.add_param_group({**opt.param_groups[0], "params": {"d": np.zeros(1)}})
        opt.step({"a": np.full(1, 2.0), "b": None, "c": np.full(1, 4.0), "d": np.full(1, 6.0)})
        buffers = [s["momentum_buffer"].item() for s in opt.state]
        assert buffers == [8 * 0.5 + 2 * 0.5, 16, 4, 6], how
        for group in opt.param_groups:  # the buffers wait
            group["momentum"] = 0.0
        opt.step({name: np.ones(1) for name in "abcd"})
        for group in opt.param_groups:
            group["momentum"] = 0.5
        opt.step({name: np.full(1, 2.0) for name in "abcd"})
        buffers = [s["momentum_buffer"].item() for s in opt.state]
        assert buffers == [5 * 0.5 + 1, 16 * 0.5 + 1, 4 * 0.5 + 1, 6 * 0.5 + 1], how
        opt.reset()
        opt.step({name: np.full(1, 2.0) for name in "abcd"})
        assert [s["momentum_buffer"].item() for s in opt.state] == [2] * 4, how
        ways += 1
    assert ways == 7


def test_a_buffer_that_waits_from_the_start_has_not_begun():
    opt = SGD([np.zeros(1)], lr=1, momentum=0.5, dampening=0.5)
    opt.param_groups[0]["momentum"] = 0.0
    opt.step([np.ones(1)])
    twin = SGD([np.zeros(1)], lr=1)
    twin.load_state_dict(opt.state_dict())
    opt.param_groups[0]["momentum"] = twin.param_groups[0]["momentum"] = 0.5
    for each in (opt, twin):
        each.step([np.full(1, 8.0)])
        assert each.state[0]["momentum_buffer"] == 8


def test_state_without_a_buffer_that_comes_to_an_optimizer_with_one_begins_it_anew():
    plain = SGD([np.zeros(1)], lr=1)
    plain.step([np.ones(1)])
    opt = SGD([np.zeros(1)], lr=1, momentum=0.5, dampening=0.5)
    opt.step([np.ones(1)])
    opt.load_state_dict(plain.state_dict())
    opt.param_groups[0].update(momentum=0.5, dampening=0.5)
    opt.step([np.full(1, 8.0)])
    assert opt.state[0]["momentum_buffer"] == 8


def test_under_keras_semantics_late_momentum_starts_from_zero():
    opt = SGD([np.zeros(1)], lr=1, semantics="keras")
    opt.step([np.ones(1)])
    opt.param_groups[0]["momentum"] = 0.5
    opt.step([np.full(1, 8.0)])
    assert opt.state[0]["momentum_buffer"] == -8
    opt.param_groups[0]["dampening"] = 0.5
    opt.step([np.full(1, 8.0)])
    assert opt.state[0]["momentum_buffer"] == -8


@pytest.mark.parametrize(
    ("mark", "error", "message"),
    [
        (2, ValueError, r"\['momentum_buffer_begun'\] must be 0 or 1, got 2"),
        (0.0, TypeError, r"\['momentum_buffer_begun'\] must be an integer"),
        (-1, ValueError, r"\['momentum_buffer_begun'\] must be >= 0"),
    ],
)
def test_a_bad_mark_of_a_buffer_is_refused(mark, error, message):
    opt = switched_on()
    saved = opt.state_dict()
    assert saved["state"]["c"]["momentum_buffer_begun"] == 0
    assert "momentum_buffer_begun" not in saved["state"]["a"]
    saved["state"]["c"]["momentum_buffer_begun"] = mark
    before = everything(opt)
    with pytest.raises(error, match=message):
        opt.load_state_dict(saved)
    assert differences(everything(opt), before) == []
    saved["state"]["c"]["momentum_buffer_begun"] = 1
    opt.load_state_dict(saved)
    opt.step({"a": None, "b": None, "c": np.full(1, 4.0)})
    assert opt.state[2]["momentum_buffer"] == 2
    adam = Adam([np.zeros(1)])
    saved = adam.state_dict()
    saved["state"][0]["exp_avg_begun"] = 0
    with pytest.raises(ValueError, match=r"unexpected \['exp_avg_begun'\]"):
        adam.load_state_dict(saved)


def test_state_written_from_outside_takes_effect():
    w = np.zeros(2)
    opt = Adam([w], lr=1, eps=0, betas=(0.5, 0.75))
    state = opt.state[0]
    state["exp_avg"][...] = 4
    state["exp_avg_sq"][...] = 16
    state["step"][...] = 10**6  # no bias correction is left
    opt.step([np.zeros(2)])
    assert w == pytest.approx(np.full(2, -2 / np.sqrt(12)), rel=1e-15)
    assert state["step"] == 10**6 + 1
    opt = SGD([w], ema_decay=0.5)
    opt.step([np.ones(2)])
    opt.ema[0][...] = 100
    opt.step([None])
    assert (opt.ema[0] == 50 + w / 2).all()


def test_state_cannot_be_replaced():
    opt = Adam([np.zeros(2)])
    state = opt.state[0]
    new = np.zeros(2)
    for replace in (
        lambda: state.__setitem__("exp_avg", new),
        lambda: state.__delitem__("exp_avg"),
        lambda: state.__ior__({"exp_avg": new}),
        lambda: state.update(exp_avg=new),
        lambda: state.setdefault("momentum_buffer", new),
        lambda: state.pop("exp_avg"),
        state.popitem,
        state.clear,
    ):
        with pytest.raises(TypeError, match="write into them"):
            replace()
    for name in ("state", "params", "ema", "completed_steps"):
        with pytest.raises(AttributeError):
            setattr(opt, name, None)
    opt.state.clear()
    opt.params.clear()
    assert {*opt.state[0]} == {"step", "exp_avg", "exp_avg_sq"}
    assert len(opt.params) == 1
    for duplicate in (copy.copy(state), copy.deepcopy(opt.state)[0]):
        assert type(duplicate) is dict
        duplicate["exp_avg"] = new


@pytest.mark.parametrize("config", CONFIGS)
def test_reset_goes_back_to_the_beginning_but_keeps_the_parameters(config):
    run = Run(config)
    finish(run)
    assert run.opt.completed_steps == 2
    kept = [p.copy(order="K") for p in run.params]
    run.opt.reset()
    assert run.opt.completed_steps == 0
    cls, kwargs, _ = CONFIGS[config]
    twin = cls(dict(zip(run.keys, kept, strict=True)), **kwargs)
    for seed in range(3):
        for k in EVERY:
            assert run.params[k].tobytes() == twin.params[k].tobytes()
            for name in twin.state[k]:
                assert run.opt.state[k][name].tobytes() == twin.state[k][name].tobytes()
            assert not twin.ema or run.opt.ema[k].tobytes() == twin.ema[k].tobytes()
        grads = make_grads(seed)
        run.step(grads)
        twin.step(dict(zip(run.keys, grads, strict=True)))


def test_reset_checks_where_state_is_to_begin():
    opt = Adagrad([np.zeros(2)], initial_accumulator_value=0.5)
    opt.step([np.ones(2)])
    opt.param_groups[0]["initial_accumulator_value"] = -1
    before = everything(opt)
    with pytest.raises(ValueError, match="initial_accumulator_value must be >= 0"):
        opt.reset()
    assert differences(everything(opt), before) == []
    opt.param_groups[0]["initial_accumulator_value"] = 2
    opt.reset()
    assert opt.state[0]["sum"].tolist() == [2, 2]


# ---- averages ------------------------------------------------------------------------------------


def test_the_average_starts_as_a_copy_and_covers_parameters_without_a_gradient():
    a, b = np.full(3, -0.0), np.array([np.nan, 4.0], np.float32)
    opt = SGD([a, b], lr=1, ema_decay=0.75)
    opt.step([np.zeros(3), None])
    assert opt.ema[0].tobytes() == np.full(3, -0.0).tobytes()
    assert opt.ema[1].tobytes() == b.tobytes()
    b[...] = 8
    opt.step([np.full(3, 4.0), None])
    assert opt.ema[0].tolist() == [-1] * 3
    np.testing.assert_array_equal(opt.ema[1], np.array([np.nan, 5], np.float32))
    assert [e.dtype for e in opt.ema] == [F64, F32]
    assert opt.ema[0] is not opt.params[0]


def test_averages_are_none_unless_asked_for_and_the_decay_may_be_0_or_1():
    assert SGD([np.ones(1)]).ema is None
    for decay, kept in ((0, 3), (1, 2)):
        w = np.full(2, 1.0)
        opt = SGD([w], lr=1, ema_decay=decay)
        assert opt.ema[0].tolist() == [1, 1]
        for _ in range(2):
            opt.step([np.full(2, -1.0)])
        assert opt.ema[0].tolist() == [kept] * 2


def test_averages_follow_transposed_and_large_parameters():
    params, twins = make_params()[0], make_owned_params()
    opt = SGD(params, lr=0.5, ema_decay=0.25)
    for seed in (1, 2):
        opt.step(make_grads(seed))
    first = [p - p.dtype.type(0.5) * g for p, g in zip(twins, make_grads(1), strict=True)]
    for k in EVERY:
        c = params[k].dtype.type
        assert (opt.ema[k] == c(0.25) * first[k] + c(0.75) * params[k]).all()
    assert params[4].size > _core.BLOCK


def test_a_change_made_while_a_learning_rate_is_called_takes_effect_at_the_next_step():
    def warm_up(completed_steps):
        opt.param_groups[0]["lr"] = 1.0
        return 0.25

    w = np.zeros(1)
    opt = SGD([w], lr=0.5)
    opt.param_groups[0]["lr"] = warm_up
    opt.step([np.ones(1)])
    assert w == -0.25
    opt.step([np.ones(1)])
    assert w == -1.25


def test_masked_arrays_are_refused():
    masked = np.ma.masked_array(np.ones(2), [True, False])
    with pytest.raises(TypeError, match="parameter 0: a masked array"):
        SGD([masked])
    w = np.ones(2)
    with pytest.raises(TypeError, match="gradient of parameter 0: a masked array"):
        SGD([w]).step([masked])
    assert (w == 1).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_state_lies_in_memory_as_its_parameter_does(dtype):
    cube = np.zeros((3, 4, 5), dtype)
    orders = [cube.transpose(axes) for axes in itertools.permutations(range(3))]
    params = [np.zeros(n, dtype) for n in (1, 7, 1000)] + [order.copy("K") for order in orders]
    params += [np.zeros((), dtype), np.zeros((2, 1, 3), dtype, order="F")]
    opt = Adam(params, amsgrad=True, ema_decay=0.5, accumulate=2)
    for k, param in enumerate(params):
        _, *slots = opt.state[k].values()
        for array in (*slots, opt.ema[k]):
            assert (_core.address(array) - _core.address(param)) % 64 == 0
            steps = zip(param.shape, array.strides, param.strides, strict=True)
            assert all(n == 1 or own == of for n, own, of in steps)
