"""PyTorch's tensors as parameters of fastopt's own classes: moved, replaced, seen by autograd."""

import copy
import gc
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

import fastopt
from fastopt import SGD, Adam, functional

BIG = 16_000_000  # 64 MB: memory that goes back to the system when it is freed


class Model(torch.nn.Module):
    def __init__(self, n):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(n))


# ---- ways to move a tensor's memory --------------------------------------------------------------


def share(model):
    model.w.data.share_memory_()


def share_module(model):
    model.share_memory()


def share_storage(model):
    model.w.untyped_storage()._share_filename_cpu_()


def send(model):
    mp.get_context("spawn").SimpleQueue().put(model.w.data)


def pickle_for_spawn(model):
    ForkingPickler.dumps(model.w.data)


def assign_data(model):
    model.w.data = model.w.data.clone()


def set_other(model):
    with torch.no_grad():
        model.w.set_(model.w.detach().clone())


def set_storage(model):
    with torch.no_grad():
        other = model.w.detach().clone()
        model.w.set_(other.untyped_storage(), 0, other.shape)


def swap(model):
    torch.utils.swap_tensors(model.w, torch.nn.Parameter(model.w.detach().clone()))


def swap_back_and_forth(model):
    model.double()
    model.float()


FOLLOWED = [
    share,
    share_module,
    share_storage,
    send,
    pickle_for_spawn,
    assign_data,
    set_other,
    set_storage,
    swap,
    swap_back_and_forth,
]


@pytest.mark.parametrize("n", [100, BIG])
@pytest.mark.parametrize("move", FOLLOWED, ids=lambda move: move.__name__)
def test_a_tensor_that_has_moved_is_followed(move, n):
    model, other = Model(n), torch.zeros(3)
    opt = SGD([model.w, other], lr=1.0, momentum=0.5, ema_decay=0.5)
    grads = [torch.ones(n), torch.ones(3)]
    opt.step(grads)
    before = opt.params[0].ctypes.data
    move(model)
    # Whoever gets the old memory now keeps what it has there.
    strangers = [torch.zeros(n) for _ in range(1 if n == BIG else 200)]
    hit = [s for s in strangers if s.data_ptr() == before]
    opt.step([torch.ones(n), torch.ones(3)])
    assert (model.w == -2.5).all()
    assert (other == -2.5).all()
    assert not any(s.any() for s in strangers)
    assert opt.params[0].ctypes.data == model.w.data_ptr()
    assert (opt.params[0] == -2.5).all()
    assert (opt.ema[0] == -1.75).all()
    assert opt.completed_steps == 2
    assert move not in (share, assign_data) or hit or model.w.data_ptr() != before


def test_everything_that_looks_at_parameters_follows_them(tmp_path):
    model = Model(1000)
    opt = Adam({"w": model.w}, lr=0.1, ema_decay=0.5)
    opt.step({"w": torch.ones(1000)})
    expected = model.w.detach().clone()
    for look in (
        lambda: opt.save(tmp_path / "file"),
        lambda: opt.load(tmp_path / "file"),
        lambda: opt.load_state_dict(opt.state_dict()),
        lambda: opt.add_param_group({"params": {"b": np.zeros(2)}}),
        lambda: copy.deepcopy(opt).params,
        lambda: opt.reset(),
    ):
        share_storage(model)
        assign_data(model)
        look()
        assert opt.params[0].ctypes.data == model.w.data_ptr()
        assert torch.equal(model.w.detach(), expected)
    assert np.array_equal(opt.ema[0], expected.numpy())


def to_double(model):
    model.double()


def to_nothing(model):
    model.w.data = torch.empty(0)


def to_other_order(model):
    model.w.data = model.w.data.clone().reshape(4, 25).t().contiguous().t()


def to_gaps(model):
    model.w.data = torch.zeros(200)[::2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to_double, "its dtype has become float64; the optimizer was made for float32"),
        (to_nothing, r"its shape has become \(0,\); the optimizer was made for \(100,\)"),
        (to_other_order, r"its shape has become \(4, 25\)"),
        (to_gaps, "the array is not dense"),
    ],
)
def test_a_tensor_that_has_become_another_is_refused_by_name(change, message):
    model, other = Model(100), np.zeros(3)
    opt = SGD({"layer.w": model.w, "b": other}, lr=1.0)
    change(model)
    with pytest.raises((TypeError, ValueError), match=f"^parameter 'layer.w': .*{message}"):
        opt.step({"layer.w": torch.ones(100), "b": np.ones(3)})
    assert not other.any()
    assert opt.completed_steps == 0


def test_memory_outlives_the_tensor_that_lent_it():
    p = torch.zeros(1000)
    opt = SGD([p], lr=1.0)
    del p
    gc.collect()
    opt.step([torch.ones(1000)])
    assert (opt.params[0] == -1).all()


def test_a_parameter_that_its_module_has_replaced_is_refused_by_name():
    model, tied = Model(3), Model(3)
    opt = SGD([model.w, tied.w, torch.nn.Parameter(torch.zeros(3))], lr=1.0)
    opt.step([torch.ones(3)] * 3)
    model.load_state_dict({"w": torch.zeros(3)}, assign=True)
    share(tied)  # the optimizer looks anew, and does not forget
    message = r"^parameter 0: Model\.w is another tensor by now, .*load_state_dict\(assign=True\)"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            opt.step([torch.ones(3)] * 3)
    assert not model.w.any()
    assert (tied.w == -1).all()
    opt.step([None, torch.ones(3), torch.ones(3)])
    assert (tied.w == -2).all()
    twin = SGD([model.w], lr=1.0)
    twin.step([torch.ones(3)])
    assert (model.w == -1).all()


def test_a_parameter_that_goes_on_under_another_name_is_still_trained():
    module = torch.nn.Linear(2, 1, bias=False)
    opt = SGD([module.weight], lr=1.0)
    torch.nn.utils.parametrize.register_parametrization(module, "weight", torch.nn.Identity())
    module.again = module.parametrizations.weight.original
    module.again = module.again
    before = module.again.detach().clone()
    opt.step([torch.ones(1, 2)])
    assert torch.equal(module.again.detach(), before - 1)


# ---- arrays over tensors -------------------------------------------------------------------------


def test_an_array_over_a_tensor_that_has_moved_is_refused_by_name():
    t, w = torch.zeros(1000), np.zeros(1000, np.float32)
    array = t.numpy()
    opts = [SGD([a], lr=1.0) for a in (array, array[10:])]
    opts[0].step([np.ones(1000, np.float32)])
    t.share_memory_()
    message = "the memory that a Tensor lent this array has moved, or was freed; give the Tensor"
    for opt, n in zip(opts, (1000, 990), strict=True):
        with pytest.raises(ValueError, match=f"^parameter 0: {message}"):
            opt.step([np.ones(n, np.float32)])
    with pytest.raises(ValueError, match=f"^gradient of parameter 0: {message}"):
        SGD([w]).step([array])
    with pytest.raises(ValueError, match=f"^params: {message}"):
        functional.sgd(array, w, lr=1.0)
    with pytest.raises(ValueError, match=f"^grads: {message}"):
        functional.sgd(w, array, lr=1.0)
    assert (t == -1).all()
    assert not w.any()
    assert np.array_equal(torch.from_numpy(w).share_memory_().numpy(), w)
    SGD([w], lr=1.0).step([t])  # whose own memory has not moved


def test_an_array_of_from_dlpack_is_no_parameter():
    with pytest.raises(TypeError, match=r"^parameter 'w': an array of np.from_dlpack\(\) cannot"):
        SGD({"w": np.from_dlpack(torch.zeros(3))})


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_a_module_is_copied_together_with_its_optimizer(copied, first):
    model = Model(3)
    opt = SGD(dict(model.named_parameters()), lr=1.0, momentum=0.5)
    opt.step({"w": torch.ones(3)})
    pair = copied((model, opt) if first == "model" else (opt, model))
    twin, twin_opt = pair if first == "model" else pair[::-1]
    twin_opt.step({"w": torch.ones(3)})
    assert twin.w.tolist() == [-2.5] * 3
    assert model.w.tolist() == [-1.0] * 3
    share(twin)
    twin_opt.step({"w": torch.ones(3)})
    assert twin.w.tolist() == [-4.25] * 3


def test_an_array_over_a_tensor_is_not_copied_apart_from_it():
    t = torch.zeros(3)
    opt = SGD([t.numpy()], lr=1.0)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"^parameter 0: a copy of this array over a tensor"):
            copied((t, opt))
    opt.step([np.ones(3, np.float32)])
    assert (t == -1).all()


# ---- what autograd is told -----------------------------------------------------------------------


def square(w):
    return (w * w).sum()


def test_backward_through_what_a_step_has_changed_raises():
    for step in (
        lambda w: SGD([w], lr=1.0).step([torch.ones(3)]),
        lambda w: SGD({"w": w}, lr=1.0).step({"w": torch.ones(3)}),
        lambda w: functional.sgd(w, torch.ones(3), lr=1.0),
        lambda w: functional.sgd([w], [np.ones(3, np.float32)], lr=1.0),
        lambda w: functional.sgd(np.zeros(3, np.float32), torch.ones(3), lr=1.0, out=(w,)),
        lambda w: functional.sgd(
            np.zeros(3, np.float32), torch.ones(3), w.detach(), lr=1.0, momentum=0.5
        ),
        lambda w: functional.sgd(np.zeros(3, np.float32), w.detach(), lr=1.0, zero_grad=True),
        lambda w: SGD([np.zeros(3, np.float32)]).step([w.detach()], zero_grad=True),
        lambda w: SGD([np.zeros(3, np.float32)], nonfinite="skip").step(
            [w.detach().fill_(torch.inf)], zero_grad=True
        ),
    ):
        w = torch.ones(3, requires_grad=True)
        loss = square(w)
        step(w)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_loading_a_checkpoint_is_seen_by_backward(tmp_path):
    w = torch.ones(3, requires_grad=True)
    opt = SGD([w], lr=1.0)
    opt.save(tmp_path / "file")
    loss = square(w)
    opt.load(tmp_path / "file")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_changes_nothing_moves_no_version():
    w, frozen, g = (torch.ones(3) for _ in range(3))
    b = torch.zeros(3)
    opt = SGD([w, frozen], lr=1.0, accumulate=2, nonfinite="skip")
    versions = [t._version for t in (w, frozen, g, b)]
    opt.step([g, None])  # is only added up
    opt.step([torch.full((3,), torch.nan), None])
    for bad in ([torch.ones(4), None], [torch.ones(3, dtype=torch.float64), None]):
        with pytest.raises((TypeError, ValueError)):
            opt.step(bad)
    functional.sgd([w, frozen], [None, None], [b, b.clone()], lr=1.0, momentum=0.5)
    functional.sgd(w, g, lr=1.0, out=(np.empty(3, np.float32),))
    with pytest.raises(FloatingPointError):
        SGD([w], nonfinite="raise").step([g.clone().fill_(torch.nan)], zero_grad=True)
    assert [t._version for t in (w, frozen, g, b)] == versions
    opt.step([g, None])
    assert (w == 0).all()
    assert [t._version for t in (w, frozen, g, b)] == [versions[0] + 1, *versions[1:]]


def test_inference_tensors_are_trained():
    with torch.inference_mode():
        w, g = torch.zeros(3), torch.ones(3)
    SGD([w], lr=1.0).step([g], zero_grad=True)
    functional.sgd(w, g, lr=1.0)
    assert (w == -1).all()


def test_pytorch_is_not_imported_for_arrays():
    code = "import sys, numpy as np, fastopt; w = np.zeros(3); fastopt.SGD([w]).step([w.copy()])"
    done = subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"])
    assert done.returncode == 0
    assert fastopt is not None
