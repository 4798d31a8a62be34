"""Checkpoints that are refused: those that do not fit, are damaged, or lie about what they hold."""

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from failures import KINDS
from forged import CODES, assemble, forge, parts, read, sign, small, small_file
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from support import (
    Run,
    clean_finish,
    contents,
    differences,
    everything,
    finish,
)

import fastopt
from fastopt import SGD, Adagrad, checkpoint


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


def refusal(opt, path, before):
    """Load a file that must be refused with nothing changed; return the error."""
    with pytest.raises((TypeError, ValueError)) as caught:
        opt.load(path)
    assert caught.type in (TypeError, ValueError)
    assert differences(everything(opt), before) == []
    assert str(path) in str(caught.value)
    return caught.value


# ---- files that do not fit -----------------------------------------------------------------------

MISFITS = {  # an optimizer that small()'s file does not fit: how it is made, the error, the message
    "rule": (lambda w, b: Adagrad({"w": w, "b": b}), ValueError, r"\['rule'\] is 'sgd', .* 'adag"),
    "semantics": (
        lambda w, b: SGD({"w": w, "b": b}, semantics="keras"),
        ValueError,
        r"\['semantics'\] is 'torch', the optimizer's is 'keras'",
    ),
    "indices": (
        lambda w, b: SGD([w, b]),
        ValueError,
        r"\['param_groups'\]\[0\]\['params'\]: missing \[0, 1\], unexpected \['w', 'b'\]",
    ),
    "a parameter fewer": (
        lambda w, b: SGD({"w": w}),
        ValueError,
        r"missing \[\], unexpected \['b'",
    ),
    "a parameter more": (
        lambda w, b: SGD({"w": w, "b": b, "c": np.ones(1)}),
        ValueError,
        r"missing \['c'\], unexpected \[\]",
    ),
    "other groups": (
        lambda w, b: SGD([{"params": {"w": w}}, {"params": {"b": b}}]),
        ValueError,
        r"\['param_groups'\]: expected a list of 2, got 1",
    ),
    "shape": (
        lambda w, b: SGD({"w": w[:1], "b": b}),
        ValueError,
        r"\['w'\]\['momentum_buffer'\]: shape \(2,\) is not the parameter's \(1,\)",
    ),
    "dtype": (
        lambda w, b: SGD({"w": w.astype(np.float64), "b": b}),
        TypeError,
        r"\['w'\]\['momentum_buffer'\]: dtype float32 is not the parameter's float64",
    ),
    "averages": (
        lambda w, b: SGD({"w": w, "b": b}, ema_decay=0.5),
        ValueError,
        r"\['ema'\]: only the optimizer has averages",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_file_that_does_not_fit_is_refused_with_the_entrys_name(case, path):
    make, error, message = MISFITS[case]
    small().save(path)
    opt = make(np.full(2, 3.0, np.float32), np.array(4.0))
    refused = refusal(opt, path, everything(opt))
    assert type(refused) is error
    assert re.search(message, str(refused)), refused


def test_averages_that_nobody_wants_are_refused(path):
    small(ema_decay=0.5).save(path)
    opt = small()
    assert "['ema']: only what was saved has averages" in str(refusal(opt, path, everything(opt)))


def forgeries(metadata, tensors):
    """Yield (metadata, tensors, what the message names): one entry changed, the checksum right."""
    w, buffer = tensors["params/w"], tensors["state/w/momentum_buffer"]
    for name in tensors:
        text = name.split("/")[1]
        yield metadata, {k: v for k, v in tensors.items() if k != name}, f"missing.*{text}|missing"
        for bad in (tensors[name][None], tensors[name].astype(np.float16)):
            yield metadata, {**tensors, name: bad}, re.escape(text)
    for name, array, message in [
        ("params/c", w, r"\['params'\]: missing \[\], unexpected \['c'\]"),
        ("params/", w, r"\['params'\]: missing \[\], unexpected \[''\]"),
        ("ema/w", w, r"\['ema'\]: only what was saved has averages"),
        ("state/w/other", buffer, r"\['state'\]\['w'\]: missing \[\], unexpected \['other'\]"),
        ("state/c/step", buffer, r"\['state'\]: missing \[\], unexpected \['c'\]"),
        ("state/w", buffer, r"\['state'\]: missing \[\], unexpected \[''\]"),
        ("w", w, "unexpected tensor 'w'"),
        ("", w, "unexpected tensor ''"),
        ("rule/w", w, "unexpected tensor 'rule/w'"),
        ("params/w", w.astype(np.float64), r"\['params'\]\['w'\]: dtype float64 is not"),
        ("params/w", w[:1], r"\['params'\]\['w'\]: shape \(1,\) is not"),
        ("state/w/step", np.array(1.0), r"\['w'\]\['step'\] must be an integer"),
        ("state/w/step", np.array([1]), r"\['w'\]\['step'\] must be an integer"),
        ("state/w/step", np.array(-1), r"\['w'\]\['step'\] must be >= 0"),
        ("state/w/step", np.array(2**63 - 1), r"\['w'\]\['step'\] must be >= 0 and <"),
        ("params/b", np.array(1, np.int32), "unexpected dtype, I32"),
    ]:
        yield metadata, {**tensors, name: array}, message
    (group,) = json.loads(metadata["param_groups"])
    for entry, text, message in [
        ("rule", "adam", r"\['rule'\] is 'adam'"),
        ("semantics", "keras", r"\['semantics'\] is 'keras'"),
        ("completed_steps", "-1", "completed_steps"),
        ("completed_steps", "1.0", "completed_steps"),
        ("completed_steps", "true", "completed_steps"),
        ("completed_steps", "9223372036854775807", "completed_steps"),
        ("completed_steps", "9" * 10_000, "'completed_steps' cannot be read"),
        ("completed_steps", "", "'completed_steps' cannot be read"),
        ("param_groups", "{", "'param_groups' cannot be read"),
        ("param_groups", "[" * 1_000_000, "'param_groups' cannot be read"),
        ("param_groups", "[]", "expected a list of 1, got 0"),
        ("param_groups", "{}", "expected a list of 1, got dict"),
        ("param_groups", "[[]]", "must be a dict"),
    ]:
        yield {**metadata, entry: text}, tensors, message
    for entry in ("rule", "semantics", "completed_steps", "param_groups"):
        yield {k: v for k, v in metadata.items() if k != entry}, tensors, entry
    bad_values = [None, "0.5", [], {}, float("nan"), -1, 10**400, True]
    for name in group.keys() - {"params"}:
        for bad in bad_values:
            good = (bad is True) == isinstance(group[name], bool) and bad is True
            if good or (name == "dampening" and bad == -1):  # these are in range
                continue
            changed = json.dumps([{**group, name: bad}])
            yield {**metadata, "param_groups": changed}, tensors, rf"\[0\].*{name}"
    for bad in (None, "wb", 5, ["w"], ["w", "b", "b"], [["w"], "b"], [{}, {}], [1.5, "b"]):
        changed = json.dumps([{**group, "params": bad}])
        yield {**metadata, "param_groups": changed}, tensors, r"\[0\]\['params'\]"


def test_a_file_with_any_bad_entry_changes_nothing_though_its_checksum_is_right(path):
    small().save(path)
    metadata, tensors = read(path)
    opt = small((5.0, 6.0))
    before, ran = everything(opt), 0
    for changed, arrays, message in forgeries(metadata, tensors):
        forge(path, changed, arrays)
        error = refusal(opt, path, before)
        assert re.search(message, str(error)), (message, error)
        assert len(str(error)) < 1000
        ran += 1
    assert ran > 100
    forge(path, metadata, tensors)
    opt.load(path)
    assert contents(opt) == contents(small())


BAD_SUMS = [  # what becomes of a file amid micro-batches, and what the message says
    ({"accumulated_steps": None}, r"\['accumulated'\]: missing \['steps'\], unexpected \[\]"),
    ({"accumulated_steps": np.array(0)}, r"\['steps'\] must be > 0 .* accumulate=3, got 0"),
    ({"accumulated_steps": np.array(3)}, r"\['steps'\] must be > 0 .* accumulate=3, got 3"),
    ({"accumulated_steps": np.array(-1)}, r"\['steps'\] must be >= 0"),
    ({"accumulated_steps": np.array(1.0)}, r"\['steps'\] must be an integer"),
    ({"accumulated_steps": np.array([1])}, r"\['steps'\] must be an integer"),
    ({"accumulated_steps/": np.array(1)}, "unexpected tensor 'accumulated_steps/'"),
    ({"sum/c": np.ones(2)}, r"\['accumulated'\]\['sums'\]: unexpected \['c'\]"),
    ({"sum/": np.ones(2)}, r"\['accumulated'\]\['sums'\]: unexpected \[''\]"),
    ({"sum": np.ones(2)}, r"\['accumulated'\]\['sums'\]: unexpected \[''\]"),
    ({"sum/w": np.ones(2)}, r"\['sums'\]\['w'\]: dtype float64 is not the parameter's float32"),
    ({"sum/w": np.ones(3, np.float32)}, r"\['sums'\]\['w'\]: shape \(3,\) is not"),
    ({"sum/b": np.array(1)}, r"\['sums'\]\['b'\]: dtype int64 is not"),
    ({"sum/b": np.array(1, np.float16)}, r"\['sums'\]\['b'\]: dtype float16 is not"),
    ({"sum/b": np.array(1, np.int32)}, "unexpected dtype, I32"),
]


def test_a_file_with_any_bad_sum_changes_nothing_though_its_checksum_is_right(path):
    small(accumulate=3).save(path)
    metadata, tensors = read(path)
    assert {"accumulated_steps", "sum/w", "sum/b"} < tensors.keys()
    opt = small((5.0, 6.0), accumulate=3)
    opt.step({"w": None, "b": np.array(1.0)})
    before = everything(opt)
    for change, message in BAD_SUMS:
        changed = {**tensors, **change}
        forge(path, metadata, {name: a for name, a in changed.items() if a is not None})
        error = refusal(opt, path, before)
        assert re.search(message, str(error)), (message, error)
    forge(path, metadata, tensors)
    opt.load(path)
    assert differences(everything(opt), everything(small(accumulate=3))) == []


def test_a_file_amid_micro_batches_needs_an_optimizer_that_sums_as_many(path):
    small(accumulate=3).save(path)
    opt = small()
    error = refusal(opt, path, everything(opt))
    assert "below the optimizer's accumulate=1, got 1" in str(error)
    small(accumulate=2).load(path)


UNWRITABLE = [name for name in KINDS if re.match("(parameter|slot|average|counter) r", name)]


@pytest.mark.parametrize("name", UNWRITABLE)
def test_nothing_is_loaded_or_saved_where_some_array_cannot_be_used(name, path):
    spoil, error, message, where, configs, options = KINDS[name]
    for config in configs:
        Run(config).opt.save(path)
        for k in where:
            run = Run(config, **options)
            names = message.format(label=re.escape(f"parameter {run.keys[k]!r}"))
            with spoil(run, k):
                before = everything(run.opt)
                # A shape is compared with the parameter's first.
                with pytest.raises((error, ValueError)):
                    run.opt.load(path)
                with pytest.raises(error, match=names):
                    run.opt.save(path)
                assert differences(everything(run.opt), before) == []
            assert differences(finish(run), clean_finish(config, options["owned"])) == []


# ---- files that are damaged, or no checkpoints ---------------------------------------------------


def test_a_file_of_a_newer_format_is_refused(path):
    small().save(path)
    metadata, tensors = read(path)
    opt = small()
    for version in ("2", "10", "1.5", "", "one"):
        forge(path, {**metadata, "format_version": version}, tensors)
        error = str(refusal(opt, path, everything(opt)))
        assert (
            f"its format has version {version!r}, and fastopt {fastopt.__version__} reads '1'"
            in error
        )
    del metadata["format_version"]
    forge(path, metadata, tensors)
    assert "its format has version None" in str(refusal(opt, path, everything(opt)))


class Malice:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_a_file_of_another_kind_is_refused_and_a_pickle_is_not_run(path, tmp_path):
    opt, trace = small(), tmp_path / "trace"
    pickled = pickle.dumps(Malice(trace))
    np.savez(tmp_path / "arrays.npz", w=np.ones(2))
    np.save(tmp_path / "objects.npy", np.array([Malice(trace)]), allow_pickle=True)
    contents_of = {
        "empty": b"",
        "pickle": pickled,
        "pickle, padded": pickled + bytes(1000),
        "pickle in the place of a header": len(pickled).to_bytes(8, "little") + pickled,
        "npz": (tmp_path / "arrays.npz").read_bytes(),
        "npy of objects": (tmp_path / "objects.npy").read_bytes(),
        "text": b"lr = 0.5\n" * 100,
        "zeros": bytes(10_000),
        "ones": b"\xff" * 10_000,
        "no metadata": safetensors.numpy.save({"params/w": np.ones(2)}),
        "somebody else's": safetensors.numpy.save({"params/w": np.ones(2)}, {"format": "pt"}),
        "json": b'{"format": "fastopt checkpoint"}',
    }
    for content in contents_of.values():
        path.write_bytes(content)
        error = str(refusal(opt, path, everything(opt)))
        assert re.search("no whole safetensors file|was not written by fastopt", error), error
    assert not trace.exists()
    pickle.loads(pickled)
    assert trace.exists()  # what would have happened
    source = Path(checkpoint.__file__).read_text()
    assert not re.search(r"pickle|np\.load|eval\(|exec\(", source)


def test_a_file_cut_off_or_extended_anywhere_is_refused(path):
    small().save(path)
    whole, opt = path.read_bytes(), small((5.0, 6.0))
    before, ran = everything(opt), 0
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refusal(opt, path, before)
        ran += 1
    for more in (b"\0", b" ", bytes(8), whole):
        path.write_bytes(whole + more)
        refusal(opt, path, before)
    assert ran == len(whole) > 800
    path.write_bytes(whole)
    opt.load(path)
    assert contents(opt) == contents(small())


def test_a_file_with_any_bit_flipped_is_refused(path):
    small().save(path)
    whole, opt = bytearray(path.read_bytes()), small((5.0, 6.0))
    before, ran = everything(opt), 0
    with open(path, "r+b", buffering=0) as file:
        for place in range(len(whole)):
            for bit in range(8):
                file.seek(place)
                file.write(bytes([whole[place] ^ 1 << bit]))
                refusal(opt, path, before)
                ran += 1
            file.seek(place)
            file.write(whole[place : place + 1])
    assert ran == 8 * len(whole) > 6400
    opt.load(path)
    assert contents(opt) == contents(small())


# ---- headers that lie ----------------------------------------------------------------------------


LIES = {
    "elements without end": ("params/w", {"shape": [2**32, 2**32]}),
    "elements without end, and none": ("params/w", {"shape": [2**63, 0], "data_offsets": [0, 0]}),
    "an axis of 2**64 - 1": ("params/w", {"shape": [2**64 - 1]}),
    "an axis of 2**64": ("params/w", {"shape": [2**64]}),
    "a negative axis": ("params/w", {"shape": [-2]}),
    "half an axis": ("params/w", {"shape": [2.5]}),
    "many axes": ("params/w", {"shape": [2] + [1] * 100}),
    "no axes": ("params/w", {"shape": []}),
    "no shape": ("params/w", {"shape": None}),
    "begins after its end": ("params/w", {"data_offsets": [8, 0]}),
    "begins at -8": ("params/w", {"data_offsets": [-8, 0]}),
    "ends at 2**64 - 1": ("params/w", {"data_offsets": [0, 2**64 - 1]}),
    "over another": ("params/w", {"data_offsets": [0, 8]}),
    "one offset": ("params/w", {"data_offsets": [0]}),
    "twice the size": ("params/w", {"dtype": "F64"}),
    "half the size": ("params/b", {"dtype": "F32"}),
    "as large, of another kind": ("params/b", {"dtype": "I64"}),
    "complex": ("params/b", {"dtype": "C64"}),
    "no dtype": ("params/b", {"dtype": "O"}),
    "more fields": ("params/b", {"order": "F"}),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("signed", [False, True])
def test_a_header_that_lies_is_refused(lie, signed, path):
    small().save(path)
    header, data = parts(path)
    name, change = LIES[lie]
    header[name] |= change
    assemble(path, header, data)
    opt = small()
    if signed:
        sign(path)
    if lie == "more fields":  # which readers of the format ignore
        opt.load(path)
    else:
        refusal(opt, path, everything(opt))


@pytest.mark.slow
def test_a_header_of_any_length_is_refused_at_once(path):
    small().save(path)
    header, data = parts(path)
    opt = small()
    before = everything(opt)
    for length in (
        0,
        1,
        7,
        100,
        10**6,
        10**8,
        2**31,
        2**32,
        2**63 - 1,
        2**63,
        2**64 - 8,
        2**64 - 1,
    ):
        assemble(path, header, data, length)
        refusal(opt, path, before)
    crowd = {f"params/{i}": header["params/w"] | {"shape": [0]} for i in range(100_000)}
    for entry in crowd.values():  # none of them holds anything
        entry["data_offsets"] = [len(data)] * 2
    assemble(path, {**header, **crowd}, data)
    sign(path)
    assert "and 99990 more" in str(refusal(opt, path, before))
    assemble(path, b'{"a":' * 100_000, data)
    refusal(opt, path, before)
    assemble(path, b'{"__metadata__":' + b'{"a":' * 100_000, data)
    refusal(opt, path, before)


def loaded_whole_or_not_at_all(path):
    """Whether a file is loaded, as any reader sees it; if not, nothing has changed."""
    opt = small((5.0, 6.0))
    before = everything(opt)
    try:
        opt.load(path)
    except (TypeError, ValueError):
        assert differences(everything(opt), before) == []
        return False
    arrays = read(path)[1]
    for k, name in enumerate(("w", "b")):
        for array, own in [
            (arrays[f"params/{name}"], opt.params[k]),
            *(  # a slot that the file's hyperparameters do not use need not be in it, and is zeroed
                (arrays.get(f"state/{name}/{slot}", np.zeros_like(own)), own)
                for slot, own in opt.state[k].items()
            ),
        ]:
            assert (array.dtype, array.shape) == (own.dtype, own.shape)
            assert array.tobytes() == own.tobytes()
    opt.step({"w": np.ones(2, np.float32), "b": np.array(2.0)})
    return True


edges = st.sampled_from([0, 1, 2, 7, 8, 9, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64])
number = st.one_of(edges, edges.map(lambda n: -n), st.integers(-40, 40))
scalar = st.one_of(number, st.none(), st.booleans(), st.floats(), st.text(max_size=5))
values = st.recursive(scalar, lambda inner: st.lists(inner, max_size=4), max_leaves=5)
dtypes = st.sampled_from([*CODES.values(), "F4"])
lies = st.one_of(
    st.tuples(st.just("shape"), st.one_of(st.lists(number, max_size=4), values)),
    st.tuples(st.just("data_offsets"), st.one_of(st.lists(number, min_size=2, max_size=2), values)),
    st.tuples(st.just("dtype"), st.one_of(dtypes, values)),
    st.tuples(st.sampled_from(["drop", "rename", "copy", "swap"]), st.text(max_size=12)),
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 5), lies), min_size=1, max_size=4),
    more=st.one_of(st.just(b""), st.binary(max_size=16)),
    signed=st.booleans(),
)
def test_whatever_a_header_says_a_file_loads_whole_or_not_at_all(
    changes, more, signed, tmp_path_factory
):
    path = tmp_path_factory.getbasetemp() / "lies.safetensors"
    path.write_bytes(small_file())
    header, data = parts(path)
    names = [name for name in header if name != "__metadata__"]
    for which, (what, value) in changes:
        name, other = names[which], names[len(str(value)) % len(names)]
        if name not in header:
            continue
        if what == "drop":
            del header[name]
        elif what == "rename":
            header[value] = header.pop(name)
        elif what == "copy":
            header[value] = dict(header[name])
        elif what == "swap":
            header[name], header[other] = header.get(other), header[name]
        else:
            header[name] = {**header[name], what: value}
    assemble(path, header, data + more)
    if signed:
        sign(path)
    loaded_whole_or_not_at_all(path)


tensors = st.builds(
    lambda dtype, shape, fill: np.full(shape, fill, dtype),
    st.sampled_from([np.float32, np.float64, np.int64]),
    st.sampled_from([(), (0,), (1,), (2,), (2, 1), (1, 2)]),
    st.integers(-2, 2),
)
names = st.one_of(
    st.sampled_from(["w", "b", "step", "momentum_buffer", ""]), st.text(max_size=3, alphabet="wb/é")
)
own_names = [f"{kind}/{p}" for kind in ("params", "state") for p in ("w", "b")]
own_names += [f"state/{p}/{slot}" for p in ("w", "b") for slot in ("step", "momentum_buffer")]
tensor_names = st.one_of(
    st.sampled_from(own_names),
    st.sampled_from(own_names),
    st.builds("{}/{}".format, st.sampled_from(["params", "ema", "state"]), names),
    st.builds("state/{}/{}".format, names, names),
)


said = st.dictionaries(
    st.sampled_from(["format_version", "rule", "semantics", "completed_steps", "optimizer"]),
    st.one_of(values.map(json.dumps), st.sampled_from(["torch", "keras", "adam", "1", "0"])),
    max_size=1,
)
options = st.dictionaries(
    st.one_of(st.sampled_from(["lr", "momentum", "nesterov", "params"]), st.text(max_size=3)),
    values,
    max_size=2,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    said=st.one_of(st.just({}), said),
    options=st.one_of(st.just({}), options),
    replaced=st.dictionaries(tensor_names, st.one_of(st.none(), tensors), max_size=3),
)
@example(said={}, options={"momentum": 0}, replaced={"state/w/momentum_buffer": None})
def test_whatever_a_checkpoint_holds_it_loads_whole_or_not_at_all(
    said, options, replaced, tmp_path_factory
):
    path = tmp_path_factory.getbasetemp() / "content.safetensors"
    path.write_bytes(small_file())
    metadata, arrays = read(path)
    (group,) = json.loads(metadata["param_groups"])
    metadata["param_groups"] = json.dumps([{**group, **options}])
    arrays = {k: v for k, v in {**arrays, **replaced}.items() if v is not None}
    forge(path, {**metadata, **said}, arrays)
    event("loaded" if loaded_whole_or_not_at_all(path) else "refused")


# ---- the file while it is read -------------------------------------------------------------------


def test_what_was_verified_is_what_is_loaded_whatever_happens_to_the_file(path, monkeypatch):
    small().save(path)
    opt, restore_from = small((5.0, 6.0)), SGD._restore_from

    def overwritten_first(self, *args, **kwargs):
        size = path.stat().st_size
        with open(path, "r+b") as file:
            file.write(b"\xff" * size)
        restore_from(self, *args, **kwargs)

    monkeypatch.setattr(SGD, "_restore_from", overwritten_first)
    opt.load(path)
    assert contents(opt) == contents(small())


def test_a_file_that_is_not_there_or_not_a_file(tmp_path):
    opt = small()
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        opt.load(tmp_path / "none.safetensors")
    with pytest.raises(NotADirectoryError):
        opt.load("/dev/null/run.safetensors")
    os.mkfifo(tmp_path / "pipe")
    held = os.open(tmp_path / "pipe", os.O_RDWR)  # nobody waits for it to be opened
    for name in (tmp_path, tmp_path / "pipe"):
        for change in (opt.load, opt.save):
            with pytest.raises(ValueError, match=f"checkpoint '{name}': this is not a regular"):
                change(name)
    os.close(held)
    for bad in (None, 3, ["a"]):
        for change in (opt.load, opt.save):
            with pytest.raises(TypeError):
                change(bad)
