"""Tensors handed to the class API by DLPack: the memory is the tensor's, and nothing is copied."""

import warnings

import jax
import numpy as np
import pyarrow
import pytest
import torch

import fastopt
from fastopt import functional


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))


def test_a_module_trains_to_the_same_bits_as_plain_arrays():
    module = network()
    params = list(module.parameters())
    plain = [p.detach().numpy().copy() for p in params]
    options = {"lr": 0.1, "weight_decay": 0.1, "global_clip_norm": 1.0}
    opt, twin = fastopt.Adam(params, **options), fastopt.Adam(plain, **options)
    for array, p in zip(opt.params, params, strict=True):
        assert array.ctypes.data == p.data_ptr()
    x, y = torch.randn(20, 5), torch.randn(20, 2)
    for _ in range(5):
        loss = (module(x) - y).square().mean()
        module.zero_grad()
        loss.backward()
        twin.step([p.grad.numpy().copy() for p in params])
        opt.step([p.grad for p in params], zero_grad=True)
        assert not any(p.grad.any() for p in params)
    for p, array in zip(params, plain, strict=True):
        assert p.detach().numpy().tobytes() == array.tobytes()


def test_a_state_dict_is_a_nested_model():
    module = network()
    opt = fastopt.SGD(dict(module.named_parameters()), lr=1.0, no_decay="*.bias")
    opt.step({name: torch.ones_like(p) for name, p in module.named_parameters()})
    assert list(opt.state_dict()["state"]) == [k for k, _ in module.named_parameters()]


def test_strided_tensors_and_gradients_are_read_as_they_lie():
    p, g = torch.zeros(3, 4).t(), torch.arange(24.0).reshape(4, 6)[:, ::2]
    fastopt.SGD([p], lr=1.0).step([g])
    assert torch.equal(p, -g)


def test_the_memory_of_a_parameter_stays_where_it_is():
    p = torch.zeros(1000)
    fastopt.SGD([p], lr=1.0)
    with pytest.raises(RuntimeError, match="resiz"):
        p.untyped_storage().resize_(0)


DTYPE = r"dtype (torch\.)?{} (\(\S+\) )?is not supported; use float32(,| or) float64"


def quietly(make, *args):
    """Make a tensor of a kind that warns of being a prototype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, dtype=torch.float8_e5m2), DTYPE.format("float8_e5m2")),
        (torch.zeros(2, dtype=torch.int64), DTYPE.format("int64")),
        (torch.zeros(2, device="meta"), r"on the meta device, .* no memory; .*\.to_empty\(dev.*$"),
        (  # in both axes; in the first alone, it would be a gradient of rows
            torch.zeros(2, 2).to_sparse(),
            r"is sparse \(torch\.sparse_coo\); give its \.to_dense\(\)$",
        ),
        (
            quietly(torch.zeros(2, 2).to_sparse_csr),
            r"is sparse \(torch\.sparse_csr\); give its \.to_dense",
        ),
        (torch.zeros(2).to_mkldnn(), r"is not dense \(torch\._mkldnn\); give its \.to_dense\(\)$"),
        (
            quietly(torch.nested.nested_tensor, [torch.zeros(2)]),
            r"is nested; give each of its \.unbind\(\)$",
        ),
        (torch.imag(torch.ones(2, dtype=torch.complex64).conj()), r"negative.*\.?resolve_neg\(\)"),
    ],
)
def test_tensors_without_fit_memory_are_refused_in_one_line(tensor, message):
    w = np.zeros(2, np.float32)
    opt, state = fastopt.SGD([w], lr=1.0), np.zeros(2, np.float32)
    for name, call in {
        "gradient of parameter 0": lambda: opt.step([tensor]),
        "parameter 0": lambda: fastopt.SGD([tensor]),
        "params": lambda: functional.sgd(tensor, tensor, tensor, lr=1.0, momentum=0.5),
        "grads": lambda: functional.sgd(w, tensor, state, lr=1.0, momentum=0.5),
        "momentum_buffers": lambda: functional.sgd(w, w, tensor, lr=1.0, momentum=0.5),
        r"out\[0\]": lambda: functional.sgd(w, state, lr=1.0, out=(tensor,)),
    }.items():
        with pytest.raises(TypeError, match=f"^{name}: .*{message}") as caught:
            call()
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is None or "negative" in message
    assert not w.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fastopts_own_classes_train_modules_of_16_bits(dtype, gradient):
    """With the bits of float32 weights: their trailing bits are beside the tensors."""
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 4, 3).to(dtype).to(memory_format=torch.channels_last)
    whole = [p.detach().float().clone() for p in net.parameters()]
    opts = fastopt.Adam(net.parameters(), lr=1e-3), fastopt.Adam(whole, lr=1e-3)
    for _ in range(30):
        grads = [torch.randn(p.shape).to(gradient) for p in whole]
        opts[0].step(grads)
        opts[1].step([g.float() for g in grads])
    for i, (param, weight) in enumerate(zip(net.parameters(), whole, strict=True)):
        master = torch.from_numpy(opts[0].decoded_state()[i]["master"])
        assert torch.equal(master, weight)
        gap = (param.detach().float() - weight).abs().max()
        assert gap <= 2**-8 * weight.abs().max()


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_that_is_switched_on_later_is_pytorchs(dampening, nesterov):
    if nesterov and dampening:
        dampening = 0.0
    ours = [torch.zeros(3, dtype=torch.float64) for _ in range(3)]
    theirs = [torch.nn.Parameter(p.clone()) for p in ours]
    opt = fastopt.SGD(ours, lr=0.1, weight_decay=0.1)
    twin = torch.optim.SGD(theirs, lr=0.1, weight_decay=0.1)
    switch = {"momentum": 0.9, "dampening": dampening, "nesterov": nesterov}
    torch.manual_seed(0)
    for step in range(8):
        grads = [
            torch.randn(3, dtype=torch.float64) if (step, i) != (3, 2) else None for i in range(3)
        ]
        for each in (opt, twin):
            if step == 3:
                each.param_groups[0].update(switch)
            elif step == 5:
                each.param_groups[0].update(momentum=0.0, nesterov=False)
            elif step == 6:
                each.param_groups[0].update(switch)
        opt.step(grads)
        for p, grad in zip(theirs, grads, strict=True):
            p.grad = None if grad is None else grad.clone()
        twin.step()
        for own, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, other.detach(), rtol=1e-14, atol=1e-15)


def test_a_tensor_by_itself_is_no_list_of_its_rows():
    with pytest.raises(TypeError, match="params must be a list"):
        fastopt.SGD(torch.zeros(3, 2))
    with pytest.raises(TypeError, match="grads must be a list"):
        fastopt.SGD([torch.zeros(2)] * 1).step(torch.zeros(1, 2))


def test_buffers_of_pyarrow_are_followed_or_refused():
    w = np.zeros(3)
    fastopt.SGD([w], lr=1.0).step([pyarrow.array([1.0, 2.0, 3.0])])
    assert w.tolist() == [-1, -2, -3]
    buffer = pyarrow.allocate_buffer(8 * 1000, resizable=True)
    array = np.frombuffer(buffer)
    array[...] = 0
    opts = [fastopt.SGD([array], lr=1.0), fastopt.SGD([memoryview(buffer).cast("B").cast("d")])]
    opts[0].step([np.ones(1000)])
    buffer.resize(8 * 1_000_000)
    for opt in opts:
        with pytest.raises(ValueError, match=r"^parameter 0: the memory that a .* lent this array"):
            opt.step([np.ones(1000)])
    with pytest.raises(ValueError, match="read-only"):
        fastopt.SGD([pyarrow.array([1.0])])


@pytest.mark.parametrize("given", [lambda g: g, np.asarray, jax.device_get])
@pytest.mark.parametrize("function", [False, True])
def test_a_step_waits_for_what_jax_computes_from_its_parameters(given, function):
    """JAX reads memory that is so aligned where it lies, long after the call."""
    loss = jax.jit(lambda w: sum(jax.numpy.sum(jax.numpy.sin(w * k)) for k in range(1, 40)))
    grad = jax.jit(lambda w: 2 * w)
    flat, _ = fastopt.flatten([np.ones(400_000, np.float32)])
    opt, seen, expected = fastopt.SGD([flat], lr=0.1), [], []
    for _ in range(5):
        before = flat.copy()
        g, value = grad(flat), loss(flat)
        if function:
            functional.sgd(flat, given(g), lr=0.1)
        else:
            opt.step([given(g)])
        seen.append(float(value))
        expected.append(float(loss(before)))
    assert seen == expected


def test_jax_arrays_are_gradients():
    w, g = np.zeros((3, 4), np.float32), jax.numpy.arange(12.0).reshape(3, 4)
    opt = fastopt.SGD([w], lr=1.0)
    opt.step([g])
    assert np.array_equal(w, -np.asarray(g))
    with pytest.raises(ValueError, match="gradient of parameter 0: read-only"):
        opt.step([g], zero_grad=True)
    with pytest.raises(ValueError, match="parameter 0: the array is read-only"):
        fastopt.SGD([g])


def test_losses_of_jax_are_right_where_the_step_waits_for_them_as_documented():
    """JAX reads the parameters, which begin with a cache line, where they lie, and later."""
    x = jax.numpy.asarray(np.random.default_rng(0).standard_normal((1000, 300)), np.float32)

    def f(w):
        return jax.numpy.square(jax.numpy.tanh(x @ w) @ w.T - x).mean()

    both, grad, loss = jax.jit(jax.value_and_grad(f)), jax.jit(jax.grad(f)), jax.jit(f)

    def at_once(w):
        return both(w)

    def waited_for(w):
        g, l = grad(w), loss(w)  # noqa: E741
        return jax.block_until_ready(l), g

    seen = []
    for step in (at_once, waited_for):
        flat, (w,) = fastopt.flatten([np.eye(300, dtype=np.float32)])
        assert flat.ctypes.data % 64 == 0
        opt, losses = fastopt.SGD([w], lr=10.0), []
        for _ in range(20):
            expected = float(loss(w.copy()))
            value, g = step(w)
            opt.step([g])
            assert float(value) == pytest.approx(expected, rel=1e-5)
            losses.append(expected)
        seen.append(losses)
    assert seen[0][-1] < 0.9 * seen[0][0]
    assert seen[0] == pytest.approx(seen[1], rel=1e-3)
