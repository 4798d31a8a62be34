"""fastopt.torch in 16 bits: PyTorch's own storage, or master weights and state in fewer bits."""

import copy
import pickle
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
import torch
from tables import TORCH_CLASSES
from torch_files import through_a_file

import fastopt
import fastopt.torch

every_class = pytest.mark.parametrize("name", TORCH_CLASSES)
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
VARIANTS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5}),
    ("RMSprop", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    ("Adam", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "maximize": True}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    ("Adamax", {"lr": 0.01}),
    ("Rprop", {"lr": 2.0**-6}),  # which step sizes hold in 16 bits
    ("Adadelta", {"lr": 1.0}),
]
every_variant = pytest.mark.parametrize(("name", "kwargs"), VARIANTS, ids=str)
STORAGES = [
    {},
    {"master_weights": True},
    {"stochastic_rounding": True, "seed": 5},
    {"state_dtype": "float32"},
    {"state_dtype": "bfloat16", "stochastic_rounding": True},
    {"state_dtype": "8bit", "stochastic_rounding": True, "seed": 2**63},
    {"state_dtype": "8bit", "stochastic_rounding": True, "master_weights": True},
]
every_storage = pytest.mark.parametrize("storage", STORAGES, ids=str)
SHAPES = ((8, 3, 4, 4), (77,), (), (0, 3))


def make_params(dtype, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [p.to(memory_format=torch.channels_last) if p.dim() == 4 else p for p in params]


def give_gradients(params, seed, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        values = torch.randn(param.shape, generator=generator).to(torch.bfloat16)
        param.grad = None
        param.grad_dtype = dtype or param.dtype
        param.grad = torch.empty_like(param, dtype=param.grad_dtype).copy_(values)


def train(opt, params, steps, dtype=None):
    for seed in steps:
        give_gradients(params, seed, dtype)
        opt.step()


def contents(opt, params):
    state = [{k: t.clone() for k, t in opt.state.get(p, {}).items()} for p in params]
    return [p.detach().clone() for p in params], state


def same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    for a, b in zip(one[1], other[1], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            assert torch.equal(a[key], b[key]), key


# ---- PyTorch's own storage -----------------------------------------------------------------------


def ulps(one, other):
    """Return the largest number of representable values between two tensors' elements."""
    ints = [t.contiguous().view(torch.int16).int() for t in (one, other)]
    places = [torch.where(i < 0, -(i & 0x7FFF), i) for i in ints]
    return int((places[0] - places[1]).abs().max()) if one.numel() else 0


@narrow
@every_variant
def test_a_step_is_that_of_float32_rounded_once(name, kwargs, dtype):
    """From the same 16-bit state PyTorch steps in float32, and the result is rounded."""
    params = make_params(dtype)
    opt = getattr(fastopt.torch, name)(params, **kwargs)
    for step in range(6):
        wide = [p.float() for p in params]
        peer = getattr(torch.optim, name)(wide, **kwargs)
        for p, w in zip(params, wide, strict=True):
            for key, tensor in opt.state.get(p, {}).items():
                peer.state[w][key] = tensor.float().clone()
        train(opt, params, [step])
        train(peer, wide, [step])
        for p, w in zip(params, wide, strict=True):
            assert ulps(p, w.to(dtype)) <= 1
            assert opt.state.get(p, {}).keys() == peer.state.get(w, {}).keys()
            for key, tensor in opt.state.get(p, {}).items():
                if key == "step":
                    assert tensor.dtype == torch.float32
                    assert tensor == step + 1
                else:
                    assert tensor.dtype == dtype
                    assert ulps(tensor, peer.state[w][key].to(dtype)) <= 1
    assert {info["runs"] for info in opt.fastopt_info()} == {"fastopt"}


@narrow
@pytest.mark.parametrize("name", ["Adagrad", "Adam", "AdamW"])  # SGD's misses most of an array
def test_a_step_is_within_an_ulp_of_pytorchs_fused_step(name, dtype):
    for seed in range(5):
        params, theirs = make_params(dtype, [(1000,)]), make_params(dtype, [(1000,)])
        bound = torch.finfo(dtype).eps * params[0].float().abs() + 1e-4  # 1 % of the step
        opt = getattr(fastopt.torch, name)(params, lr=0.01)
        peer = getattr(torch.optim, name)(theirs, lr=0.01, fused=True)
        train(opt, params, [seed])
        train(peer, theirs, [seed])
        assert bool(((params[0].float() - theirs[0].float()).abs() <= bound).all())
        for key, tensor in peer.state[theirs[0]].items():
            if key != "step":
                assert ulps(opt.state[params[0]][key], tensor) <= 1


@pytest.mark.parametrize("fused", [False, True])
def test_sgd_updates_all_of_an_array(fused):
    (param,) = make_params(torch.bfloat16, [(100,)])
    before = param.clone()
    param.grad = torch.ones_like(param)
    fastopt.torch.SGD([param], lr=1.0, fused=fused).step()
    assert torch.equal(param, before - 1)


@narrow
@every_variant
def test_checkpoints_cross_both_ways_with_pytorchs(name, kwargs, dtype):
    for first, second in ((fastopt.torch, torch.optim), (torch.optim, fastopt.torch)):
        params = make_params(dtype)
        opt = getattr(first, name)(params, **kwargs)
        train(opt, params, range(3))
        before = contents(opt, params)
        other = getattr(second, name)(params, **kwargs)
        other.load_state_dict(through_a_file(opt.state_dict()))
        same(contents(other, params), before)
        assert repr(getattr(torch.optim, name)(params, **kwargs)) == repr(
            getattr(fastopt.torch, name)(params, **kwargs)
        )
        train(other, params, [3])
        if second is fastopt.torch:
            assert {info["runs"] for info in other.fastopt_info()} == {"fastopt"}


@narrow
@every_class
def test_gradients_of_any_type_that_loses_nothing(name, dtype):
    """As `grad_dtype` has them; the values are the same here, so the results are."""
    results = []
    for gradients in (dtype, torch.float32, torch.bfloat16):
        params = make_params(dtype, [(5, 7), (3,)])
        opt = getattr(fastopt.torch, name)(params, lr=0.01)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for param in params:
                param.grad = None
                param.grad_dtype = gradients
                values = torch.randint(-8, 8, param.shape, generator=generator) / 4
                param.grad = values.to(gradients)
            opt.step()
        assert {info["runs"] for info in opt.fastopt_info()} == {"fastopt"}
        results.append(contents(opt, params))
    same(results[0], results[1])
    same(results[0], results[2])


def test_gradients_change_their_type_between_steps():
    results = []
    for types in ([torch.bfloat16, torch.float32] * 3, [torch.float32] * 6):
        params = make_params(torch.bfloat16)
        opt = fastopt.torch.Adam(params, lr=0.01)
        for step, dtype in enumerate(types):
            train(opt, params, [step], dtype)
        results.append(contents(opt, params))
    same(*results)


# ---- what the options give -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "weight", "spread"),
    [
        ({}, 1.0, 0.0),  # as PyTorch's
        ({"master_weights": True}, 0.5, 0.0005),
        (
            {"master_weights": True, "state_dtype": "bfloat16", "stochastic_rounding": True},
            0.5,
            2e-3,
        ),
        ({"stochastic_rounding": True, "state_dtype": "float32"}, 0.5, 2e-3),
    ],
    ids=str,
)
def test_a_constant_gradient_goes_as_far_as_in_float32(options, weight, spread):
    """The mean over 4096 elements, each of which is rounded in a way of its own."""
    (param,) = params = [torch.ones(4096, dtype=torch.bfloat16)]
    opt = fastopt.torch.Adam(params, lr=1e-3, **options)
    param.grad = torch.ones_like(param)
    for _ in range(500):
        opt.step()
    assert abs(float(param.float().mean()) - weight) <= spread


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({}, 0.5, 2.0),  # as PyTorch's: it cannot shrink
        ({"state_dtype": "float32"}, 0.0154, 0.0164),
        ({"state_dtype": "bfloat16"}, 0.0154, 0.0164),
        ({"state_dtype": "bfloat16", "master_weights": True}, 0.0154, 0.0164),
        ({"state_dtype": "8bit"}, 0.0154, 0.0164),
    ],
    ids=str,
)
def test_the_second_moment_shrinks_as_in_float32(options, low, high):
    torch.manual_seed(0)
    (param,) = params = [torch.ones(4096, dtype=torch.bfloat16)]
    opt = fastopt.torch.Adam(params, lr=1e-3, **options)
    for size, steps in ((1.0, 2000), (0.01, 4000)):
        for _ in range(steps):
            param.grad = (size * torch.randn(4096)).bfloat16()
            opt.step()
    assert low <= float(opt.decoded_state(param)["exp_avg_sq"].mean()) <= high


@narrow
@every_variant
def test_master_weights_are_a_float32_training_to_the_bit(name, kwargs, dtype):
    params = make_params(dtype)
    wide = [p.float() for p in params]
    opt = getattr(fastopt.torch, name)(params, **kwargs, master_weights=True)
    peer = getattr(fastopt.torch, name)(wide, **kwargs)
    for opts in ((opt, params), (peer, wide)):
        train(*opts, range(20), torch.float32)
    for p, w in zip(params, wide, strict=True):
        decoded = opt.decoded_state(p)
        assert torch.equal(decoded.pop("master"), w)
        assert decoded.keys() == peer.state.get(w, {}).keys()
        for key, tensor in decoded.items():
            assert torch.equal(tensor, peer.state[w][key])
        assert ulps(p, w.to(dtype)) <= 1  # ties go away from zero
    if name == "Adam":
        assert any(not torch.equal(p.float(), w) for p, w in zip(params, wide, strict=True))


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
@pytest.mark.parametrize("state", ["bfloat16", "8bit"])
def test_random_rounding_has_the_bits_of_fastopts_own_classes(name, state):
    """Also where some parameters have no gradient yet, or are PyTorch's to update."""
    kwargs = {"lr": 0.01} if name == "Adam" else {"lr": 0.01, "momentum": 0.9}
    options = {"state_dtype": state, "stochastic_rounding": True, "seed": 7}
    params = make_params(torch.bfloat16, [(3,), (6, 5), (70,)])
    arrays = [p.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy() for p in params]
    opt = getattr(fastopt.torch, name)(params, **kwargs, **options)
    own = getattr(fastopt, name)(arrays, **kwargs, **options, master_weights=False)
    for step in range(8):
        give_gradients(params, step)
        if step < 4:
            params[0].grad = None
        if step == 2:
            params[1].grad = None
        opt.step()
        own.step([p.grad if p.grad is None else p.grad.float().numpy() for p in params])
    for i, (param, array) in enumerate(zip(params, arrays, strict=True)):
        assert np.array_equal(param.view(torch.int16).numpy(), array.view(np.int16))
        for key, value in own.state[i].items():
            tensor = opt.state[param][key]
            bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
            assert np.array_equal(bits.numpy(), value.view(np.int16) if bits.dim() and
                                  tensor.dtype == torch.bfloat16 else value)  # fmt: skip


@pytest.mark.parametrize("name", ["Adam", "RMSprop"])
def test_what_is_kept_and_its_bytes(name):
    (param,) = params = make_params(torch.bfloat16, [(640,)])
    kwargs = {"amsgrad": True} if name == "Adam" else {"centered": True}
    opt = getattr(fastopt.torch, name)(
        params, **kwargs, state_dtype="8bit", master_weights=True, stochastic_rounding=True
    )
    train(opt, params, [0])
    expected = {
        "Adam": {
            "step": 4, "exp_avg_8bit": 640, "exp_avg_scale": 10, "exp_avg_sq_8bit": 640,
            "exp_avg_sq_scale": 10, "max_exp_avg_sq": 2560, "master_bits": 1280,
        },
        "RMSprop": {
            "step": 4, "square_avg_8bit": 640, "square_avg_scale": 10, "grad_avg": 2560,
            "master_bits": 1280,
        },
    }  # fmt: skip
    (info,) = opt.fastopt_info()
    assert info["nbytes"] == expected[name]
    dtypes = {key: tensor.dtype for key, tensor in opt.state[param].items()}
    for key, dtype in dtypes.items():
        kind = key.rpartition("_")[2]
        assert dtype == {
            "8bit": torch.uint8, "scale": torch.uint8, "bits": torch.int16,
        }.get(kind, torch.float32)  # fmt: skip


def test_a_parameter_that_somebody_else_writes_stays_right():
    (param,) = params = make_params(torch.bfloat16, [(640,)])
    opt = fastopt.torch.SGD(params, lr=1e-3, master_weights=True)
    train(opt, params, range(5))
    new = torch.linspace(-2, 2, 640).bfloat16()
    param.data.copy_(new)
    param.grad = torch.zeros_like(param)
    opt.step()
    master = opt.decoded_state(param)["master"]
    assert torch.equal(param, new)
    assert bool(((master - new.float()).abs() <= new.float().abs() * 2**-8).all())


# ---- state that is saved -------------------------------------------------------------------------


@narrow
@every_storage
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "RMSprop"])
def test_state_comes_back_to_the_bit_and_goes_on(name, storage, dtype):
    kwargs = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}

    def make(params):
        return getattr(fastopt.torch, name)(params, lr=0.01, **kwargs, **storage)

    params = make_params(dtype)
    opt = make(params)
    train(opt, params, range(4))
    saved = contents(opt, params)
    copies = {
        "deepcopy": copy.deepcopy((opt, params)),
        "pickle": pickle.loads(pickle.dumps((opt, params))),
    }
    loaded = {"dict": opt.state_dict, "file": lambda: through_a_file(opt.state_dict())}
    for how, read in loaded.items():
        new = [p.clone(memory_format=torch.preserve_format) for p in params]
        copies[how] = make(new), new
        copies[how][0].load_state_dict(copy.deepcopy(read()))
    for other, others in copies.values():
        same(contents(other, others), saved)
    train(opt, params, range(4, 7))
    for other, others in copies.values():
        train(other, others, range(4, 7))
        same(contents(other, others), contents(opt, params))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_state_goes_through_safetensors_and_distributed_checkpoints(tmp_path):
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file, save_file

    params = make_params(torch.bfloat16, [(5, 30), (64,)])
    opt = fastopt.torch.Adam(
        params, master_weights=True, state_dtype="8bit", stochastic_rounding=True
    )
    train(opt, params, range(3))
    flat = {f"{i}.{k}": t for i, s in opt.state_dict()["state"].items() for k, t in s.items()}
    save_file(flat, tmp_path / "state.safetensors")
    read = load_file(tmp_path / "state.safetensors")
    zeros = {key: torch.zeros_like(tensor) for key, tensor in flat.items()}
    dcp.save(flat, checkpoint_id=tmp_path / "dcp")
    dcp.load(zeros, checkpoint_id=tmp_path / "dcp")
    for key, tensor in flat.items():
        assert read[key].dtype == zeros[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor)
        assert torch.equal(zeros[key], tensor)


@every_storage
def test_state_of_another_storage_is_refused_by_name_or_converted(storage):
    params = make_params(torch.bfloat16)
    opt = fastopt.torch.Adam(params, **storage)
    train(opt, params, range(3))
    saved = through_a_file(opt.state_dict())
    values = [opt.decoded_state(p) for p in params]
    for other in STORAGES:
        peer = fastopt.torch.Adam(params, **{**other, "seed": storage.get("seed", 0)})
        train(peer, [torch.nn.Parameter(p.clone()) for p in params], [])
        before = contents(peer, params)
        fits = {k: t.dtype for k, t in opt.state[params[0]].items()} == {
            k: t.dtype for k, t in state_of_a_step(other).items()
        }
        in_pytorchs = not other or (other.keys() == {"stochastic_rounding", "seed"})
        if fits or (in_pytorchs and "exp_avg" in saved["state"][0] and
                    "master_bits" not in saved["state"][0] and not other):  # fmt: skip
            peer.load_state_dict(saved)
        else:
            with pytest.raises(ValueError, match=r"^state of parameter 0: \w+ .*convert=True"):
                peer.load_state_dict(saved)
            same(contents(peer, params), before)
        peer.load_state_dict(saved, convert=True)
        if fits:
            same(contents(peer, params), contents(opt, params))
        for param, value in zip(params, values, strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                new = peer.decoded_state(param)[key]
                # Relative to its own size 2^-4 in 8 bits, or to the block's largest 2^-17.
                bound = value[key].abs() * 2**-4 + 2**-13
                assert bool(((new - value[key]).abs() <= bound).all())
        train(peer, params, [])


def state_of_a_step(storage):
    params = make_params(torch.bfloat16)
    opt = fastopt.torch.Adam(params, **storage)
    train(opt, params, [0])
    return opt.state[params[0]]


def test_another_seed_is_refused():
    params = make_params(torch.bfloat16)
    opt = fastopt.torch.SGD(params, stochastic_rounding=True, seed=1)
    train(opt, params, [0])
    saved = through_a_file(opt.state_dict())
    other = fastopt.torch.SGD(params, stochastic_rounding=True, seed=2)
    with pytest.raises(ValueError, match=r"^seed: the saved optimizer's is 1, this one's 2; "):
        other.load_state_dict(saved)
    assert not other.state
    other.load_state_dict(saved, convert=True)
    assert all("seed" not in group for group in other.param_groups)
    assert [state["step"] for state in other.state.values()] == [1] * len(params)
    fastopt.torch.SGD(params, seed=2).load_state_dict(saved)  # nothing is rounded at random


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("exp_avg_8bit", torch.zeros(77), "torch.float32 of shape"),
        ("exp_avg_8bit", torch.zeros(76, dtype=torch.uint8), r"torch.uint8 of shape \(76,\)"),
        ("exp_avg_sq_scale", torch.zeros(1, dtype=torch.uint8), r"torch.uint8 of shape \(1,\)"),
        ("exp_avg_sq_scale", None, "nothing"),
        ("master_bits", torch.zeros(77, dtype=torch.bfloat16), "torch.bfloat16 of shape"),
        ("master_bits", "text", "nothing"),
    ],
)
def test_bad_state_is_refused_by_name_and_nothing_changes(key, value, found):
    params = make_params(torch.bfloat16)
    opt = fastopt.torch.Adam(params, master_weights=True, state_dtype="8bit")
    train(opt, params, range(2))
    before = contents(opt, params)
    saved = through_a_file(opt.state_dict())
    if value is None:
        del saved["state"][1][key]
    else:
        saved["state"][1][key] = value
    with pytest.raises(ValueError, match=rf"^state of parameter 1: {key} has to be .*{found}"):
        opt.load_state_dict(saved)
    same(contents(opt, params), before)


def test_codes_of_another_memory_order_are_refused_or_converted():
    params = make_params(torch.bfloat16)
    opt = fastopt.torch.Adam(params, state_dtype="8bit")
    train(opt, params, range(2))
    plain = [p.clone(memory_format=torch.contiguous_format) for p in params]
    other = fastopt.torch.Adam(plain, state_dtype="8bit")
    with pytest.raises(ValueError, match=r"^state of parameter 0: exp_avg_8bit has strides"):
        other.load_state_dict(opt.state_dict())
    other.load_state_dict(opt.state_dict(), convert=True)
    ours, theirs = (o.decoded_state(p[0]) for o, p in ((opt, params), (other, plain)))
    assert bool(((ours["exp_avg"] - theirs["exp_avg"]).abs() <= 2**-4).all())
    train(other, plain, [2])


@pytest.mark.parametrize("name", ["Adagrad", "Adam", "RMSprop", "Adamax"])
def test_pytorchs_classes_do_not_take_codes_for_state(name):
    params = make_params(torch.bfloat16, [(9,)])
    opt = getattr(fastopt.torch, name)(params, state_dtype="8bit", stochastic_rounding=True)
    train(opt, params, [0])
    peer = getattr(torch.optim, name)(params)
    peer.load_state_dict(opt.state_dict())
    with pytest.raises(KeyError):
        train(peer, params, [1])
    plain = getattr(fastopt.torch, name)(params)
    plain.load_state_dict(opt.state_dict(), convert=True)
    peer.load_state_dict(plain.state_dict())
    train(peer, params, [1])


# ---- what comes with 16 bits ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
@pytest.mark.parametrize("options", [{}, {"master_weights": True}], ids=str)
def test_a_grad_scaler_unscales_float16_and_skips_what_is_not_finite(name, options):
    params, plain = make_params(torch.float16, [(40,)]), make_params(torch.float16, [(40,)])
    opt = getattr(fastopt.torch, name)(params, lr=0.01, fused=True, **options)
    peer = getattr(fastopt.torch, name)(plain, lr=0.01, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(6):
        give_gradients(plain, step)
        params[0].grad = plain[0].grad * scaler.get_scale()
        if step == 3:
            params[0].grad[7] = torch.inf
        else:
            peer.step()
        scaler.scale(torch.zeros(()))  # as before a backward pass
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == 512.0
    same(contents(opt, params), contents(peer, plain))


def test_steps_from_within_a_backward_pass():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3).to(torch.bfloat16)
    other = copy.deepcopy(net)
    opts = {p: fastopt.torch.Adam([p], master_weights=True) for p in net.parameters()}

    def step(param):
        opts[param].step()
        opts[param].zero_grad()

    for param in net.parameters():
        param.register_post_accumulate_grad_hook(step)
    opt = fastopt.torch.Adam(other.parameters(), master_weights=True)
    x = torch.randn(5, 4).to(torch.bfloat16)
    for _ in range(4):
        net(x).square().sum().backward()
        opt.zero_grad()
        other(x).square().sum().backward()
        opt.step()
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_all_of_a_bfloat16_module_runs_on_the_kernels():
    net = torch.nn.Transformer(16, 2, 1, 1, 32, batch_first=True).to(torch.bfloat16)
    opt = fastopt.torch.AdamW(net.parameters())
    x = torch.randn(2, 5, 16).to(torch.bfloat16)
    net(x, x).float().square().mean().backward()
    opt.step()  # a warning would be an error
    assert {info["runs"] for info in opt.fastopt_info()} == {"fastopt"}


@pytest.mark.filterwarnings("ignore::fastopt.FallbackWarning")
@pytest.mark.parametrize("options", STORAGES[1:], ids=str)
def test_pytorchs_update_is_refused_where_it_cannot_store_as_the_options_say(options):
    """Before anything is written."""
    whole = torch.ones(6, dtype=torch.bfloat16)
    params = [torch.ones(3, dtype=torch.bfloat16), whole[::2]]
    opt = fastopt.torch.Adam(params, **options)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"^parameter 1: PyTorch's own .* not dense .*; nothing"):
        opt.step()
    assert not opt.state
    assert all(bool((p == 1).all()) for p in params)
    params[1].grad = None
    opt.step()
    assert not bool((opt.decoded_state(params[0])["exp_avg"] == 0).any())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"master_weights": 2}, TypeError, "master_weights"),
        ({"state_dtype": "int8"}, ValueError, "state_dtype"),
        ({"state_dtype": torch.float32}, (TypeError, ValueError), "state_dtype"),
        ({"stochastic_rounding": "yes"}, TypeError, "stochastic_rounding"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"sede": 1}, TypeError, "sede"),
    ],
)
@every_class
def test_bad_options_are_refused_by_name(name, options, error, message):
    with pytest.raises(error, match=message):
        getattr(fastopt.torch, name)([torch.ones(3)], **options)


@every_class
def test_options_of_a_group_are_refused(name):
    make, group = getattr(fastopt.torch, name), {"params": [torch.ones(3)], "state_dtype": "8bit"}
    with pytest.raises(ValueError, match="state_dtype is an option of the whole optimizer"):
        make([group])
    opt = make([torch.ones(3)])
    with pytest.raises(ValueError, match=rf"{name}\(params, state_dtype='8bit'\)"):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1


@every_class
def test_state_in_fewer_bits_is_not_for_float64(name):
    wide, param = torch.ones(3, dtype=torch.float64), torch.ones(3)
    with pytest.raises(TypeError, match=r"state_dtype='8bit' is for .* is torch.float64"):
        getattr(fastopt.torch, name)([param, wide], state_dtype="8bit")
    opt = getattr(fastopt.torch, name)([param], state_dtype="8bit")
    with pytest.raises(TypeError, match="state_dtype='8bit'"):
        opt.add_param_group({"params": [wide]})
    assert len(opt.param_groups) == 1


def test_a_subclass_has_its_own_signature_and_the_options():
    class Mine(fastopt.torch.Adam):
        def __init__(self, params, rate):
            super().__init__(params, lr=rate, master_weights=True)

    params = make_params(torch.bfloat16)
    opt = Mine(params, 0.5)
    train(opt, params, [0])
    assert opt.state[params[0]]["master_bits"].dtype == torch.int16


def test_ml_dtypes_is_not_needed():
    code = """
        import sys
        sys.modules["ml_dtypes"] = None
        import torch, fastopt, fastopt.torch
        w = torch.ones(70, dtype=torch.bfloat16)
        opt = fastopt.torch.Adam([w], lr=1.0, state_dtype="bfloat16", master_weights=True)
        w.grad = torch.ones_like(w)
        opt.step()
        assert w.sum() == 0, w
        opt.load_state_dict(opt.state_dict(), convert=True)
        try:
            fastopt.Adam([w])
        except TypeError as error:
            assert "ml_dtypes" in str(error), error
        else:
            raise AssertionError
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
