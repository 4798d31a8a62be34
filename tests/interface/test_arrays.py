"""What may be parameters and gradients: nested containers, and anything that lends its memory."""

import array
import copy
import gc
import pickle
import re
import weakref
from collections import defaultdict, namedtuple
from collections.abc import Mapping

import numpy as np
import pytest
from support import differences, everything, python

import fastopt
from fastopt import SGD, Adam, functional

Layer = namedtuple("Layer", ["W", "b"])
Turned = namedtuple("Turned", ["b", "W"])


def nested(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)

    def new(*shape):
        return np.asarray(rng.standard_normal(shape), dtype)

    return {
        "encoder": [Layer(new(4, 3), new(4)), Layer(new(2, 4), new(2))],
        "head": {"W": new(1, 2), "scale": new()},
        3: (new(2), [new(1)]),
    }


NAMES = ["encoder.0.W", "encoder.0.b", "encoder.1.W", "encoder.1.b"]
NAMES += ["head.W", "head.scale", "3.0", "3.1.0"]


def leaves(model):
    first, second = model["encoder"]
    return [*first, *second, *model["head"].values(), model[3][0], model[3][1][0]]


# ---- nested containers ---------------------------------------------------------------------------


def test_a_nested_model_trains_to_the_same_bits_as_its_arrays_in_a_list():
    model, plain = nested(0), leaves(nested(0))
    options = {"lr": 0.1, "weight_decay": 0.1, "global_clip_norm": 1.0, "ema_decay": 0.9}
    opt, twin = Adam(model, **options), Adam(plain, **options)
    assert all(a is b for a, b in zip(opt.params, leaves(model), strict=True))
    for seed in range(1, 6):
        grads = nested(seed)
        grads = {key: grads[key] for key in reversed(grads)}
        grads["encoder"] = tuple(grads["encoder"])
        grads[3] = [*grads[3]]
        opt.step(grads)
        twin.step(leaves(grads))
    for a, b in zip(leaves(model), plain, strict=True):
        assert a.tobytes() == b.tobytes()
    assert list(opt.state_dict()["state"]) == NAMES


def test_none_stands_for_an_array():
    model, grads = nested(0), nested(1)
    grads["encoder"][0] = Layer(None, grads["encoder"][0].b)
    opt = SGD(model)
    opt.step(grads)
    assert [int(state["step"]) for state in opt.state] == [0, *[1] * 7]


def test_a_nested_optimizer_is_saved_copied_and_pickled():
    opt = Adam(nested(0))
    opt.step(nested(1))
    loaded = Adam(nested(0))
    loaded.load_state_dict(opt.state_dict())
    for own, other in zip(loaded.params, opt.params, strict=True):
        own[...] = other
    twins = [loaded, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    opt.step(nested(2))
    for twin in twins:
        twin.step(nested(2))
        for own, other in zip(twin.params, opt.params, strict=True):
            assert own.tobytes() == other.tobytes()


def test_lists_of_layers_need_no_names():
    layers = [{"W": np.ones((2, 2)), "b": np.ones(2)}, {"W": np.ones((1, 2)), "b": np.ones(1)}]
    opt = SGD(layers, lr=0.5, weight_decay=1.0, no_decay="*.b")
    opt.step([{name: np.zeros_like(p) for name, p in layer.items()} for layer in layers])
    assert [float(p.flat[0]) for p in opt.params] == [0.5, 1, 0.5, 1]
    generated = SGD((pair for pair in [(np.ones(2), np.ones(3))]), lr=1.0)
    generated.step([[np.ones(2), np.ones(3)]])
    assert not any(p.any() for p in generated.params)


def test_groups_share_one_dict_of_gradients():
    model = nested(0)
    first, second = model["encoder"]
    opt = SGD(
        [
            {"params": {"encoder": {"0": {"W": first.W}, "1": {"W": second.W}}}},
            {"params": {"encoder": {"0": {"b": first.b}}, "head": model["head"]}, "lr": 0.0},
        ],
        lr=1.0,
    )
    before = [p.copy() for p in opt.params]
    opt.add_param_group({"params": {"encoder": {"1": {"b": second.b}}}})
    before.append(second.b.copy())
    opt.step(
        {
            "encoder": {
                "0": {"W": np.ones((4, 3)), "b": np.ones(4)},
                "1": {"W": np.ones((2, 4)), "b": np.ones(2)},
            },
            "head": {"W": np.ones((1, 2)), "scale": np.ones(())},
        }
    )
    moved = [not np.array_equal(p, q) for p, q in zip(opt.params, before, strict=True)]
    assert moved == [True, True, False, False, False, True]


def test_an_empty_key_is_a_part_of_the_name():
    model = {"": {"": np.ones(2), "x": np.ones(2)}, "x": np.ones(2), "y": {"": np.ones(2)}}
    opt = SGD(model)
    assert list(opt.state_dict()["state"]) == [".", ".x", "x", "y."]
    opt.step(model)


@pytest.mark.parametrize("other", [True, 1.0, np.int64(1)])
@pytest.mark.parametrize("wrap", [lambda x: {"layers": x}, lambda x: {"w": [np.ones(3)], **x}])
def test_parameters_of_two_groups_that_have_the_same_key_are_refused(wrap, other):
    """Such keys are equal and have other names: a dict of gradients would have one for both."""
    groups = [{"params": wrap({1: np.ones(2)})}, {"params": {"layers": {other: np.ones(2)}}}]
    if "w" in groups[0]["params"]:
        groups[1]["params"] = {other: np.ones(2), "v": [np.ones(2)]}
    message = "one and the same key, under which|names occur twice"
    with pytest.raises(ValueError, match=message):
        SGD(groups)
    opt = SGD(groups[:1])
    before = everything(opt)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group(groups[1])
    assert differences(everything(opt), before) == []


def change(grads, path, value):
    *outer, last = path
    for key in outer:
        grads = grads[key]
    grads[last] = value


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        ((3,), [np.ones(2)], ValueError, "grads[3]: expected 2 elements, got 1"),
        ((3,), np.ones(2), TypeError, "grads[3] must be a list or tuple, got ndarray"),
        (("head",), None, TypeError, "grads['head'] must be a dict with the parameters' keys, got"),
        (("head", "bias"), np.ones(1), ValueError, "grads['head']: missing keys [], unexpected"),
        (("encoder", 1), Layer(np.ones((2, 4)), np.ones(3)), ValueError, "'encoder.1.b': shape"),
        (("encoder", 1), {"W": None}, TypeError, "grads['encoder'][1] must be a named tuple with"),
        (("encoder", 1), (None, None), TypeError, "the fields ('W', 'b'), got tuple"),
        (("encoder", 1), [None, None], TypeError, "the fields ('W', 'b'), got list"),
        (
            ("encoder", 1),
            Turned(None, None),
            ValueError,
            "parameters' fields ('W', 'b'), got Turned with",
        ),
        (("encoder",), Layer(None, None), TypeError, "grads['encoder'][0] must be a named tuple"),
        (("head", "W"), [np.ones((1, 2))], TypeError, "'head.W': expected a numpy.ndarray of"),
        ((4,), None, ValueError, "grads: missing keys [], unexpected keys [4]"),
    ],
)
def test_errors_name_the_path_and_change_nothing(path, value, error, message):
    opt, grads = Adam(nested(0)), nested(1)
    opt.step(nested(2))
    change(grads, path, value)
    before = everything(opt)
    with pytest.raises(error, match=re.escape(message)):
        opt.step(grads)
    assert differences(everything(opt), before) == []


def test_a_missing_key_is_named_with_its_path():
    opt, grads = SGD(nested(0)), nested(1)
    del grads["head"]["scale"]
    with pytest.raises(ValueError, match=r"^grads\['head'\]: missing keys \['scale'\], unexpected"):
        opt.step(grads)
    grads["head"]["bias"] = None  # as many as there should be
    message = r"^grads\['head'\]: missing keys \['scale'\], unexpected keys \['bias'\]"
    with pytest.raises(ValueError, match=message):
        opt.step(grads)
    with pytest.raises(TypeError, match=r"^grads must be a dict with .*, got list"):
        opt.step(leaves(nested(1)))


def test_a_named_tuple_needs_gradients_with_the_same_fields():
    """By position, a weight would get the gradient of the bias, where the shapes allow it."""
    same_fields = namedtuple("Grads", ["W", "b"])
    one, other = np.zeros(2), np.zeros(2)
    for given, wrap in [
        (Layer(one, other), lambda g: g),
        ({"a": Layer(one, other)}, lambda g: {"a": g}),
        ([Layer(one, other)], lambda g: [g]),
    ]:
        opt = SGD(given, lr=1.0)
        message = r" must have the parameters' fields \('W', 'b'\), got Turned with \('b', 'W'\)"
        with pytest.raises(ValueError, match=r"^grads.*" + message):
            opt.step(wrap(Turned(np.ones(2), np.full(2, 2.0))))
        for plain in ([np.ones(2)] * 2, (np.ones(2),) * 2, {"W": np.ones(2), "b": np.ones(2)}):
            with pytest.raises(
                TypeError, match=r"must be a named tuple with the fields \('W', 'b'"
            ):
                opt.step(wrap(plain))
        assert not one.any()
        assert not other.any()
        for twin in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            before = [p.copy() for p in twin.params]
            twin.step(wrap(same_fields(np.ones(2), np.full(2, 2.0))))
            assert [(q - p)[0] for p, q in zip(twin.params, before, strict=True)] == [1, 2]
        one[...] = other[...] = 0


def test_where_the_parameters_have_no_fields_gradients_with_fields_are_in_order():
    w, b = np.zeros(2), np.zeros(2)
    SGD([w, b], lr=1.0).step(Layer(np.ones(2), np.full(2, 2.0)))
    SGD([[w, b]], lr=1.0).step([Layer(np.ones(2), np.full(2, 2.0))])
    assert (w[0], b[0]) == (-2, -4)


def test_the_fields_of_a_named_tuple_by_itself_are_names():
    layer = Layer(np.ones(2), np.ones(2))
    for given in (layer, {"params": layer}, [{"params": layer}]):
        opt = SGD(given, lr=0.5, weight_decay=1.0, no_decay="*b")
        named = "" if isinstance(given, (Layer, list)) else "params."
        assert list(opt.state_dict()["state"]) == [f"{named}W", f"{named}b"]
    SGD(layer, lr=0.5, weight_decay=1.0, no_decay="b").step(Layer(np.zeros(2), np.zeros(2)))
    assert (layer.W[0], layer.b[0]) == (0.5, 1)
    with pytest.raises(TypeError, match=r"^parameter 'b': expected a numpy.ndarray, got int"):
        SGD(Layer(np.ones(2), 3))
    with pytest.raises(ValueError, match=r"need dicts \(of a named tuple, its _asdict\(\)\)"):
        SGD([{"params": layer}, {"params": Turned(np.ones(2), np.ones(2))}])
    for one, other in [({"b": layer}, {"b": layer}), ({"b": {"c": layer}}, {"b": np.ones(2)})]:
        with pytest.raises(ValueError, match=r"two groups have something at \['a'\]\['b'\]$"):
            SGD([{"params": {"a": one}}, {"params": {"a": other}}])


def within(x, times, wrap):
    for _ in range(times):
        x = wrap(x)
    return x


WRAPS = {
    "list": lambda x: [x],
    "tuple": lambda x: (x,),
    "dict": lambda x: {"inner": x},
    "named tuple": namedtuple("Only", ["inner"]),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_containers_a_hundred_deep_train_and_deeper_ones_are_refused(wrap):
    w = np.zeros(2)
    opt = SGD(within(w, 100, wrap), lr=1.0)
    for twin in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        twin.step(within(np.ones(2), 100, wrap))
        assert twin.params[0].tolist() == [-1, -1]
        w[...] = 0
    grads = within(np.ones(2), 99, wrap)
    with pytest.raises(TypeError, match=r"expected a numpy\.ndarray of|^grads.* must be a"):
        opt.step(wrap(wrap(grads)))
    for times in (101, 2000):
        for given in (within(w, times, wrap), [{"params": within(w, times, wrap)}]):
            with pytest.raises(ValueError, match=r"nested too deep, more than 100 in one another"):
                SGD(given)
        with pytest.raises((TypeError, ValueError)):
            opt.step(within(np.ones(2), times, wrap))
    assert w.tolist() == [0, 0]


def test_containers_that_hold_themselves_are_refused():
    endless, among = [np.ones(2)], {"w": np.ones(2)}
    endless.append(endless)
    among["a"] = [among]
    for given in (endless, among, [{"params": endless}], [np.ones(2), (among,)]):
        with pytest.raises(ValueError, match=r"nested too deep, .* or one holds itself"):
            SGD(given)
    with pytest.raises(ValueError, match=r"^a\.0\.a\.0\..*\.\.\.: containers are nested too deep"):
        SGD(among)
    for given in ([np.zeros(2)], {"w": np.zeros(2)}, {"w": {"w": np.zeros(2)}}):
        opt = SGD(given)
        for grads in (endless, among, [endless], {"w": endless}, {"w": among}):
            with pytest.raises((TypeError, ValueError)):
                opt.step(grads)
        assert not opt.params[0].any()


class Keys(Mapping):
    """A mapping that is no dict."""

    def __init__(self, content):
        self.content = content

    def __getitem__(self, key):
        return self.content[key]

    def __iter__(self):
        return iter(self.content)

    def __len__(self):
        return len(self.content)


def test_any_mapping_is_a_dict_and_a_default_stands_for_nothing():
    w, b = np.zeros(2), np.zeros(2)
    opt = SGD(Keys({"a": Keys({"w": w, "b": b})}), lr=1.0)
    opt.step(Keys({"a": Keys({"b": np.ones(2), "w": None})}))
    assert (w[0], b[0]) == (0, -1)
    defaults = defaultdict(lambda: np.ones(2), w=np.ones(2))
    for lacking in (defaults, Keys({"w": None})):
        with pytest.raises(ValueError, match=r"^grads\['a'\]: missing keys \['b'\], unexpected"):
            opt.step({"a": lacking})
    assert list(defaults) == ["w"]
    assert w[0] == 0


class Key(str):
    """A key that counts how often it is shown."""

    shown = 0

    def __repr__(self):
        Key.shown += 1
        return super().__repr__()


def test_a_path_is_written_out_for_an_error_only():
    """It took longer than the step itself."""
    for params, grads in [
        ({Key("w"): np.zeros(2)}, {Key("w"): np.ones(2)}),
        ({Key("a"): {Key("w"): np.zeros(2)}}, {Key("a"): {Key("w"): np.ones(2)}}),
        ({Key("a"): [[np.zeros(2)]]}, {Key("a"): [[np.ones(2)]]}),
    ]:
        opt = SGD(params, lr=1.0)
        Key.shown = 0
        opt.step(grads)
        assert Key.shown == 0
        assert opt.params[0][0] == -1


# ---- what lends its memory -----------------------------------------------------------------------


class Sub(np.ndarray):
    """A subclass that would have results, and lets nobody see its elements as they are."""

    def __array_finalize__(self, obj):
        self.note = "kept"

    def __getitem__(self, key):
        raise AssertionError("looked into")


class Exporter:
    """What an array library's array is to others: the two methods of DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def mapped(folder):
    def make(a):
        file = folder / f"{a.size}-{a.dtype}-{len(list(folder.iterdir()))}"
        made = np.memmap(file, a.dtype, "w+", shape=a.shape or (1,))
        made[...] = a
        return made if a.shape else made.reshape(())

    return make


def as_ctypes(a):
    return np.ctypeslib.as_ctypes(np.ascontiguousarray(a))


WAYS = {
    "subclass": lambda a: a.view(Sub),
    "memoryview": memoryview,
    "dlpack": Exporter,
    "array.array": lambda a: array.array(a.dtype.char, a) if a.ndim == 1 else a,
    "ctypes": lambda a: as_ctypes(a) if a.ndim else a,
    "memmap": None,
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("way", WAYS)
def test_memory_of_any_kind_trains_in_place_to_the_same_bits(way, dtype, tmp_path):
    make = WAYS[way] or mapped(tmp_path)
    rng = np.random.default_rng(0)
    shapes = [(5,), (3, 4), (), (fastopt._core.BLOCK + 3,)]
    plain = [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    params = [make(p.copy()) for p in plain]
    options = {"lr": 0.1, "weight_decay": 0.1, "ema_decay": 0.9, "global_clip_norm": 1.0}
    opt, twin = Adam(params, **options), Adam(plain, **options)
    for _ in range(4):
        grads = [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
        lent = [make(g.copy()) for g in grads]
        opt.step(lent, zero_grad=True)
        twin.step(grads)
        for a in lent:
            a = a.array if isinstance(a, Exporter) else a
            assert not any(np.ndarray.tobytes(np.asarray(a)))
    for given, own, expected in zip(params, opt.params, plain, strict=True):
        given = given.array if isinstance(given, Exporter) else given
        assert np.asarray(given).tobytes() == expected.tobytes()
        assert np.shares_memory(np.asarray(given), np.asarray(own))


def test_a_memory_mapped_model_trains_on_disk(tmp_path):
    """As one larger than memory would: without momentum there is nothing else to keep."""
    shape = (4, 1 << 16)
    model = np.memmap(tmp_path / "model", np.float32, "w+", shape=shape)
    plain = np.zeros(shape, np.float32)
    opt, twin = SGD(list(model), lr=0.1), SGD([plain], lr=0.1)
    for seed in range(3):
        grad = np.random.default_rng(seed).standard_normal(shape, np.float32)
        opt.step(list(grad))
        twin.step([grad])
    model.flush()
    assert np.fromfile(tmp_path / "model", np.float32).tobytes() == plain.tobytes()


def test_read_only_memory_can_be_a_gradient_and_nothing_else():
    w, g = np.zeros(1), memoryview(np.ones(1)).toreadonly()
    opt = SGD([w], lr=1.0)
    opt.step([g])
    assert w[0] == -1
    with pytest.raises(ValueError, match="gradient of parameter 0: read-only, and zero_grad=True"):
        opt.step([g], zero_grad=True)
    with pytest.raises(ValueError, match="parameter 0: the array is read-only"):
        SGD([g])
    assert w[0] == -1


@pytest.mark.parametrize("wrap", [memoryview, Exporter])
def test_lent_gradients_are_checked_for_overlap(wrap):
    w = np.zeros(8)
    opt = SGD([w[:4], w[4:]], lr=1.0)
    with pytest.raises(ValueError, match="gradient of parameter 0 overlaps parameter 1"):
        opt.step([wrap(w[4:]), wrap(np.ones(4))])
    assert not w.any()


class Broken(Exporter):
    def __dlpack__(self, **kwargs):
        raise BufferError("on loan elsewhere")


def test_memory_that_cannot_be_had_is_named():
    opt = SGD({"w": np.zeros(2), "b": np.zeros(2)})
    message = "the memory of a Broken cannot be used: on loan elsewhere"
    with pytest.raises(TypeError, match=f"^gradient of parameter 'b': {message}"):
        opt.step({"w": np.ones(2), "b": Broken(np.ones(2))})
    with pytest.raises(TypeError, match=f"^parameter 1: {message}"):
        SGD([np.zeros(2), Broken(np.ones(2))])
    assert not any(p.any() for p in opt.params)


@pytest.mark.parametrize("nested", [lambda a: {"x": [a]}, lambda a: [a], lambda a: {"x": a}])
def test_arrays_live_as_long_as_they_are_used_and_not_until_a_collection(nested):
    gc.collect()
    gc.disable()
    try:
        opt = Adam(nested(np.zeros(3)))
        param, grad = weakref.ref(opt.params[0]), np.ones(3)
        seen = weakref.ref(grad)
        opt.step(nested(grad))
        del grad
        assert seen() is None
        del opt
        assert param() is None
    finally:
        gc.enable()


class Calling(Exporter):
    """Runs something of the program's when it is asked for its memory."""

    def __init__(self, array, act):
        super().__init__(array)
        self.act = act

    def __dlpack__(self, **kwargs):
        self.act()
        return super().__dlpack__(**kwargs)


def resized(a):
    a.resize(1 << 16, refcheck=False)


def test_memory_that_moves_while_another_is_lent_is_not_used():
    """Lending runs code of others, which may do what it likes with arrays seen before."""
    w = [np.zeros(4) for _ in range(3)]
    g = [np.ones(4) for _ in range(3)]
    opt = SGD(w, lr=1.0)
    for moved, message in ((g[0], "gradient of parameter 0: shape"), (w[0], "parameter 0: shape")):
        with pytest.raises(ValueError, match=f"^{message}"):
            opt.step([g[0], Calling(g[1], lambda moved=moved: resized(moved)), g[2]])
        moved.resize(4, refcheck=False)
    assert not any(p.any() for p in w)
    for moved, message in ((w[0], r"grads\[0\]: shape"), (g[0], r"grads\[0\]: shape")):
        moving = Calling(g[1], lambda moved=moved: resized(moved))
        with pytest.raises(ValueError, match=f"^{message}"):
            functional.sgd(w, [g[0], moving, g[2]], lr=1.0)
        moved.resize(4, refcheck=False)
    assert not any(p.any() for p in w)


@pytest.mark.parametrize(
    "act",
    [
        lambda opt: opt.add_param_group({"params": [np.zeros(2)]}),
        lambda opt: opt.load_state_dict(opt.state_dict()),
        lambda opt: opt.reset(),
        lambda opt: opt.step([np.ones(2)]),
    ],
    ids=["add_param_group", "load_state_dict", "reset", "step"],
)
def test_what_lends_memory_cannot_change_the_optimizer_that_asks(act):
    w = np.zeros(2)
    opt = SGD([w], lr=1.0)
    with pytest.raises(TypeError, match=r"cannot be used: .* was called from within a step"):
        opt.step([Calling(np.ones(2), lambda: act(opt))])
    assert (w.tolist(), opt.completed_steps) == ([0, 0], 0)
    opt.step([np.ones(2)])
    assert (w.tolist(), opt.completed_steps) == ([-1, -1], 1)


class Copying(Exporter):
    """Lends a copy, unless it is asked not to."""

    def __dlpack__(self, *, copy=None, **kwargs):
        if copy is False:
            raise BufferError("it would be copied")
        return self.array.copy().__dlpack__(**kwargs)


class Old(Exporter):
    """Knows nothing of later versions of the protocol."""

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__()


def test_what_would_be_copied_is_refused():
    a, message = Copying(np.zeros(2)), "the memory of a Copying cannot be used: it would be copied"
    with pytest.raises(TypeError, match=f"^parameter 0: {message}"):
        SGD([a])
    with pytest.raises(TypeError, match=f"^gradient of parameter 0: {message}"):
        SGD([np.zeros(2)]).step([a])
    with pytest.raises(TypeError, match=f"^params: {message}"):
        functional.sgd(a, np.ones(2), lr=1.0)
    w, old = np.zeros(2), Old(np.ones(2))
    SGD([w], lr=1.0).step([old])
    assert (w == -1).all()
    with pytest.raises(ValueError, match=r"^parameter 0: .* read-only"):  # as NumPy has it
        SGD([old])


@pytest.mark.parametrize("wrap", [memoryview, Exporter, lambda a: array.array("d", a)])
def test_an_array_by_itself_is_no_list_of_its_rows(wrap):
    rows = wrap(np.zeros(2))
    with pytest.raises(TypeError, match=r"^params must be a list"):
        SGD(rows)
    opt = SGD([np.zeros(()), np.zeros(())])
    with pytest.raises(TypeError, match=r"^grads must be a list or tuple"):
        opt.step(rows)
    assert len(SGD([{"params": rows}]).params) == 1


def test_arrays_and_buffers_do_not_bring_what_is_for_tensors():
    # It does not say that it can do without Python's lock.
    script = """
import array, sys
import numpy as np, fastopt
for given in (np.ones(2), array.array("d", [1.0, 1.0])):
    fastopt.SGD([given], lr=0.5).step([given[:]])
    assert given[0] == 0.5
    fastopt.functional.sgd(given, given[:], lr=0.5)
print([name for name in sys.modules if "fastopt._tensors" in name])
"""
    done = python("-c", script)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
