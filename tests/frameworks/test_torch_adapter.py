"""fastopt.torch does what users of PyTorch's optimizers do with those: the same, to a few ulp."""

import copy
import doctest
import gc
import importlib
import inspect
import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import weakref
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_peers
from support import two_processes
from tables import BY_NAME, ROWS, TORCH_CLASSES
from torch.nn import Parameter
from torch.testing import assert_close
from torch_files import through_a_file

import fastopt
import fastopt.torch
from fastopt import _pytorch
from fastopt.torch import _optimizer

CONFIGS = [(row.name, kwargs) for row in ROWS for kwargs in row.torch or ()]
every_config = pytest.mark.parametrize(
    ("name", "kwargs"), CONFIGS, ids=[f"{n}-{'-'.join(k)}" for n, k in CONFIGS]
)
MODULES = (torch_peers, fastopt.torch)
every_class = pytest.mark.parametrize("name", TORCH_CLASSES)
may_fall_back = pytest.mark.filterwarnings("ignore::fastopt.FallbackWarning")


def takes(name, option):
    """Tell whether PyTorch's class has an argument."""
    return option in inspect.signature(getattr(torch.optim, name)).parameters


def with_state(name):
    """Return options with which a class keeps state."""
    row = BY_NAME[name]
    return {} if row.used(row.defaults) else row.switches()[0][1]


class Pair:
    """Two equal sets of parameters: one for PyTorch's class, one for fastopt's."""

    def __init__(self, name, kwargs=None, shapes=((4, 3), (5,), (), (0, 2), (1, 7)), dtypes=None):
        torch.manual_seed(0)
        self.name, self.kwargs = name, {"lr": 0.01, **(kwargs or {})}
        dtypes = dtypes or [torch.float32, torch.float64] * len(shapes)
        start = [torch.randn(s, dtype=d) for s, d in zip(shapes, dtypes, strict=False)]
        self.theirs = [Parameter(p.clone()) for p in start]
        self.ours = [Parameter(p.clone()) for p in start]
        self.peer = self.make(torch_peers, self.theirs)
        self.opt = self.make(fastopt.torch, self.ours)

    def make(self, module, params):
        return getattr(module, self.name)(params, **copy.deepcopy(self.kwargs))

    def set_gradients(self, without=()):
        for i, (p, q) in enumerate(zip(self.theirs, self.ours, strict=True)):
            p.grad = None if i in without else torch.randn_like(p)
            q.grad = None if i in without else p.grad.clone()

    def step(self, n=1, without=()):
        for _ in range(n):
            self.set_gradients(without)
            self.peer.step()
            self.opt.step()

    def check(self):
        for p, q in zip(self.theirs, self.ours, strict=True):
            close(q, p)
            a, b = self.opt.state.get(q, {}), self.peer.state.get(p, {})
            assert a.keys() == b.keys()
            for name in a:
                assert type(a[name]) is type(b[name])
                assert a[name].dtype == b[name].dtype
                close(a[name], b[name])

    def runs(self):
        return [info["runs"] for info in self.opt.fastopt_info()]


def close(ours, theirs, ulps=64):
    """Equal to a few ulp of the largest element."""
    assert ours.dtype == theirs.dtype
    ours, theirs = ours.detach(), theirs.detach()
    largest = float(theirs.abs().max()) if theirs.numel() else 0.0
    atol = ulps * torch.finfo(theirs.dtype).eps * max(largest, 1e-3)
    assert_close(ours, theirs, atol=atol, rtol=0)


@every_config
def test_steps_equal_torchs_to_a_few_ulp(name, kwargs):
    pair = Pair(name, kwargs)
    pair.step(30)
    pair.check()
    assert pair.runs() == ["fastopt"] * 5


@every_class
def test_the_interface_is_torchs(name):
    ours, theirs = getattr(fastopt.torch, name), getattr(torch.optim, name)
    assert issubclass(ours, theirs)
    *same, a, b, c, d, e = inspect.signature(ours).parameters.values()
    assert same == [*inspect.signature(theirs).parameters.values()]
    assert str(inspect.Signature([a, b, c, d, e])) == (
        "(*, master_weights: 'bool | None' = None, state_dtype: 'str | None' = None, "
        "stochastic_rounding: 'bool | None' = None, seed: 'int' = 0, rows: 'str | None' = None)"
    )
    assert str(inspect.signature(ours.step)).startswith("(self, closure:")
    a, b = Pair(name).opt, Pair(name).peer
    assert a.defaults == b.defaults
    assert a.state_dict().keys() == b.state_dict().keys()
    assert [g.keys() for g in a.param_groups] == [g.keys() for g in b.param_groups]
    assert repr(a) == repr(b)
    assert issubclass(fastopt.torch.AdamW, fastopt.torch.Adam)


# ---- checkpoints ---------------------------------------------------------------------------------


@every_config
def test_checkpoints_cross_in_both_directions(name, kwargs):
    pair = Pair(name, kwargs)
    pair.step(5)
    for _ in range(2):
        files = [through_a_file(opt.state_dict()) for opt in (pair.peer, pair.opt)]
        pair.opt = pair.make(fastopt.torch, pair.ours)
        pair.peer = pair.make(torch_peers, pair.theirs)
        pair.opt.load_state_dict(files[0])  # each other's
        pair.peer.load_state_dict(files[1])
        pair.step(5)
        pair.check()
        assert pair.runs() == ["fastopt"] * 5


@every_config
def test_copies_go_on_alike_and_apart(name, kwargs):
    pair = Pair(name, kwargs)
    pair.step(3)
    for copied in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        opt, params = copied((pair.opt, pair.ours))
        pair.set_gradients()
        for p, q in zip(pair.ours, params, strict=True):
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in pair.ours]
        opt.step()
        assert_close([p.detach() for p in pair.ours], before, atol=0, rtol=0)
        pair.peer.step()
        pair.opt.step()
        assert_close(params, pair.ours, atol=0, rtol=0)
    pair.check()


@every_config
def test_a_loaded_replaced_or_deleted_state_is_used(name, kwargs):
    pair = Pair(name, kwargs)
    pair.step(3)
    if pair.opt.state:
        for opt, params in ((pair.peer, pair.theirs), (pair.opt, pair.ours)):
            for key, value in opt.state[params[0]].items():
                opt.state[params[0]][key] = value.clone() * 2  # another tensor
            for value in opt.state[params[1]].values():
                value.mul_(2)  # the same
            for key, value in opt.state[params[2]].items():
                opt.state[params[2]][key].data = value * 2  # the same, with other memory
        pair.step()
        pair.check()
        for opt, params in ((pair.peer, pair.theirs), (pair.opt, pair.ours)):
            del opt.state[params[0]]
            opt.state[params[1]] = {k: v.clone() for k, v in opt.state[params[1]].items()}
        pair.step()
        pair.check()
    for opt in (pair.peer, pair.opt):
        opt.state.clear()
    pair.step(2)
    pair.check()
    for opt in (pair.peer, pair.opt):
        opt.state = defaultdict(dict)
    pair.step(2)
    pair.check()
    for opt in (pair.peer, pair.opt):
        opt.load_state_dict(copy.deepcopy(pair.peer.state_dict()))
    pair.step(2)
    pair.check()


def test_momentum_of_a_parameter_begins_with_its_first_gradient():
    pair = Pair("SGD", {"momentum": 0.9, "dampening": 0.5})
    pair.step(2, without=(1, 2))
    assert set(pair.opt.state) == {pair.ours[i] for i in (0, 3, 4)}
    pair.step(2, without=(0,))
    pair.step(2)
    for opt in (pair.peer, pair.opt):
        opt.param_groups[0]["momentum"] = 0
    pair.step(2)
    for opt, params in ((pair.peer, pair.theirs), (pair.opt, pair.ours)):
        opt.param_groups[0]["momentum"] = 0.8
        opt.state[params[0]]["momentum_buffer"] = None
    pair.step(2)
    pair.check()


def test_momentum_switched_on_and_off():
    pair = Pair("SGD", {"dampening": 0.5})
    for momentum in (0, 0.9, 0, 0.5):
        for opt in (pair.peer, pair.opt):
            opt.param_groups[0]["momentum"] = momentum
        assert pair.runs() == ["fastopt"] * 5  # which looks whether the last step will do
        pair.step(2)
        pair.check()


@pytest.mark.parametrize("value", [2.0**24 - 1, 2.0**24, 1e9])
def test_a_large_counter_counts_as_torchs(value):
    pair = Pair("Adam")
    pair.step()
    for opt in (pair.peer, pair.opt):
        for state in opt.state.values():
            state["step"].fill_(value)
    pair.step(3)
    pair.check()


# ---- parameters and gradients that change --------------------------------------------------------


@every_config
def test_gradients_that_are_missing_replaced_or_kept(name, kwargs):
    pair = Pair(name, kwargs)
    for without in ((), (0, 1), (2,), (0, 1, 2, 3, 4), (), (4,)):
        pair.step(2, without)
        pair.check()
        for set_to_none in (True, False):
            pair.peer.zero_grad(set_to_none=set_to_none)
            pair.opt.zero_grad(set_to_none=set_to_none)
        pair.peer.step()
        pair.opt.step()
        pair.check()


@every_class
def test_swapped_memory_is_followed(name):
    pair = Pair(name)
    pair.step(2)
    kept = [p.data for p in pair.ours]
    before = [p.clone() for p in kept]
    for params in (pair.theirs, pair.ours):
        for p in params:
            p.data = p.data.clone()
    pair.step(2)
    pair.check()
    assert_close(kept, before, atol=0, rtol=0)
    assert pair.runs() == ["fastopt"] * 5


@may_fall_back
@every_class
def test_another_layout_of_the_same_memory_is_noticed(name):
    pair = Pair(name, with_state(name), shapes=((4, 4), (3, 2)))

    def change(parameter, state):
        pair.step(2)
        for opt, params in ((pair.peer, pair.theirs), (pair.opt, pair.ours)):
            for p in params:
                p.data = parameter(p.data)
                for slot in opt.state[p].values():
                    if slot.dim():
                        slot.data = state(slot.data)
        pair.step(2)
        pair.check()

    def same(tensor):
        return tensor

    def turned(tensor):
        return tensor.t() if tensor.shape == (4, 4) else tensor

    def flat(tensor):
        return tensor.view(-1) if tensor.is_contiguous() else tensor

    change(turned, same)
    change(same, turned)
    change(turned, turned)
    change(flat, flat)


@may_fall_back
@every_class
def test_modules_change_dtype_and_memory_format(name):
    torch.manual_seed(0)
    nets = [torch.nn.Conv2d(3, 4, 2)]
    nets.append(copy.deepcopy(nets[0]))
    opts = [getattr(m, name)(n.parameters()) for m, n in zip(MODULES, nets, strict=True)]
    x = torch.randn(2, 3, 5, 5)

    def train():
        for net, opt in zip(nets, opts, strict=True):
            opt.zero_grad()
            net(x.to(net.weight.dtype)).square().sum().backward()
            opt.step()
        for p, q in zip(*(net.parameters() for net in nets), strict=True):
            close(q, p)

    train()
    for net in nets:
        net.to(memory_format=torch.channels_last)
    train()
    for net in nets:
        net.double()  # the state stays in float32, which some of PyTorch's updates take
    errors = []
    for net, opt in zip(nets, opts, strict=True):
        opt.zero_grad()
        net(x.double()).square().sum().backward()
        try:
            opt.step()
            errors.append(None)
        except RuntimeError as error:
            errors.append(str(error))
    assert errors[0] == errors[1]
    for opt in opts:
        opt.state.clear()
    nets[1].load_state_dict(nets[0].state_dict())
    train()
    train()


def strided(kind):
    base = torch.arange(1.0, 49).reshape(6, 8)
    return {
        "transposed": base.clone().t(),
        "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(1, 2, 0),
        "channels_last": torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded gradient": base.clone(),
        "size-1 axes": torch.ones(6, 8)[:, :1],
        "gaps": base[:, ::2],
        "negative": torch.complex(base, base).conj().imag,
    }[kind]


STRIDED = {
    "transposed": "fastopt",
    "permuted": "fastopt",
    "channels_last": "fastopt",
    "expanded gradient": "fastopt",
    "size-1 axes": "torch",
    "gaps": "torch",
    "negative": "torch",
}


@may_fall_back
@pytest.mark.parametrize("kind", STRIDED)
@every_config
def test_any_layout_of_parameter_and_gradient(name, kwargs, kind):
    params = [strided(kind), strided(kind)]
    opts = [getattr(m, name)([p], **kwargs) for m, p in zip(MODULES, params, strict=True)]
    torch.manual_seed(0)
    for step in range(6):
        grad = torch.randn(params[0].shape)
        if kind.startswith("expanded"):
            grad = torch.randn(1, 8).expand(6, 8)
        elif step % 2:
            grad = torch.randn(params[0].shape[::-1]).permute(*reversed(range(grad.dim())))
        for opt, param in zip(opts, params, strict=True):
            param.grad = grad if step < 4 else torch.randn_like(param).copy_(grad)
            opt.step()
        close(params[1], params[0])
    assert [info["runs"] for info in opts[1].fastopt_info()] == [STRIDED[kind]]


@may_fall_back
@every_class
def test_a_gradient_that_holds_negatives(name):
    for shape in ((), (1,), (3,)):
        params = [torch.zeros(shape), torch.zeros(shape)]
        opts = [getattr(m, name)([p]) for m, p in zip(MODULES, params, strict=True)]
        for negative in (False, True, False, True):
            for opt, param in zip(opts, params, strict=True):
                parts = torch.full(shape, 2.0), torch.full(shape, -3.0)
                param.grad = torch.complex(*parts).conj().imag if negative else parts[1]
                assert param.grad.is_neg() == negative
                opt.step()
            close(params[1], params[0])
            assert opts[1].fastopt_info()[0]["runs"] == ("torch" if negative else "fastopt")


@may_fall_back
@every_class
def test_a_gradient_of_a_subclass(name):
    class Subclass(torch.Tensor):
        pass

    params = [torch.zeros(3), torch.zeros(3)]
    opts = [getattr(m, name)([p]) for m, p in zip(MODULES, params, strict=True)]
    for kind in (torch.Tensor, Subclass, torch.Tensor):
        for opt, param in zip(opts, params, strict=True):
            param.grad = torch.ones(3).as_subclass(kind)
            opt.step()
        assert_close(params[1], params[0], atol=1e-6, rtol=0)
        assert len(opts[1]._run.others) == (kind is Subclass)


@every_class
def test_frozen_parameters_and_gradients_set_by_hand(name):
    pair = Pair(name)
    for params in (pair.theirs, pair.ours):
        params[0].requires_grad_(False)
    pair.step(2, without=(0,))
    pair.step(2)
    pair.check()


# ---- what falls back -----------------------------------------------------------------------------


def odd_parameters():
    class Subclass(torch.Tensor):
        pass

    shared = torch.ones(8)
    with torch.inference_mode():
        inference = torch.ones(3)
    return {
        "its dtype is torch.complex64": [torch.ones(3, dtype=torch.complex64)],
        "its device is meta": [torch.ones(3, device="meta")],
        "its type is Subclass": [torch.ones(3).as_subclass(Subclass)],
        "its elements are stored as their negatives": [torch._neg_view(torch.ones(3))],
        "it: the array is not dense": [torch.ones(6)[::2]],
        "it shares memory with another parameter": [shared[:5], shared[4:]],
        "it is an inference tensor": [inference],
    }


@may_fall_back
@pytest.mark.parametrize("why", odd_parameters())
@every_class
def test_what_falls_back_says_why_and_is_torchs(name, why):
    odds = odd_parameters()[why], odd_parameters()[why]
    plain = torch.ones(3), torch.ones(3)
    opts = [
        getattr(module, name)([*odd, p])
        for module, odd, p in zip(MODULES, odds, plain, strict=True)
    ]
    for _ in range(3):
        for odd, p in zip(odds, plain, strict=True):
            for tensor in (*odd, p):
                tensor.grad = torch.full_like(tensor, 0.5)
        if "inference" in why:
            for opt in opts:
                with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
                    opt.step()
            return
        for opt in opts:
            opt.step()
    close(plain[1], plain[0])
    for p, q in zip(*odds, strict=True):
        if p.device.type != "meta":
            plain_types = [t.as_subclass(torch.Tensor) for t in (q, p)]
            assert_close(*plain_types, atol=0, rtol=0)
    info = opts[1].fastopt_info()
    assert [i["runs"] for i in info] == ["torch"] * len(odds[0]) + ["fastopt"]
    assert all(i["why"].startswith(why) for i in info[:-1])
    nbytes = {key: tensor.nbytes for key, tensor in opts[1].state[plain[1]].items()}
    assert info[-1] == {
        "group": 0, "index": len(odds[0]), "name": None, "runs": "fastopt", "why": None,
        "nbytes": nbytes,
    }  # fmt: skip


@may_fall_back
@pytest.mark.parametrize("option", ["differentiable", "capturable"])
@every_class
def test_options_that_fall_back(name, option):
    if not takes(name, option):
        with pytest.raises(TypeError):
            getattr(fastopt.torch, name)([torch.ones(3)], **{option: True})
        return
    params = [torch.ones(3), torch.ones(3)]
    opts = [getattr(m, name)([p], **{option: True}) for m, p in zip(MODULES, params, strict=True)]
    for opt, param in zip(opts, params, strict=True):
        param.grad = torch.ones(3)
        if option == "capturable":
            with pytest.raises(AssertionError, match="If capturable=True"):
                opt.step()
        else:
            opt.step()
    assert_close(params[1], params[0], atol=0, rtol=0)
    assert opts[1].fastopt_info()[0]["why"] == f"{option}=True"
    opts[1].param_groups[0][option] = opts[0].param_groups[0][option] = False
    opts[1].defaults[option] = opts[0].defaults[option] = False
    for opt in opts:
        opt.state.clear()
        opt.step()
    close(params[1], params[0])
    assert opts[1].fastopt_info()[0]["runs"] == "fastopt"


@may_fall_back
def test_a_learning_rate_that_is_being_learned_falls_back():
    lr = torch.tensor(0.1, requires_grad=True)
    param = torch.ones(3)
    param.grad = torch.ones(3)
    opt = fastopt.torch.SGD([param], lr=lr, differentiable=True)
    opt.step()
    param.sum().backward()
    assert lr.grad == -3
    opt.param_groups[0]["differentiable"] = False
    assert opt.fastopt_info()[0]["why"] == "lr requires a gradient"


@may_fall_back
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_sparse_gradients_come_and_go():
    for name in ("SGD", "Adagrad"):
        nets = [torch.nn.Embedding(6, 2, sparse=True), torch.nn.Embedding(6, 2, sparse=True)]
        nets[1].load_state_dict(nets[0].state_dict())
        extra = [Parameter(torch.ones(2)), Parameter(torch.ones(2))]
        opts = [
            getattr(m, name)([net.weight, e], lr=0.1)
            for m, net, e in zip(MODULES, nets, extra, strict=True)
        ]
        for step in range(8):
            for net, e, opt in zip(nets, extra, opts, strict=True):
                net.sparse = step % 4 < 2
                opt.zero_grad()
                (net(torch.tensor([1, 3, 3])) * e).square().sum().backward()
                opt.step()
            close(nets[1].weight, nets[0].weight)
            close(extra[1], extra[0])
            assert [info["runs"] for info in opts[1].fastopt_info()] == ["fastopt"] * 2
            assert opts[1]._run.others == []  # what did run


@may_fall_back
@every_class
def test_an_error_of_torchs_own_changes_nothing(name):
    """The plain parameter is updated by fastopt, the other by PyTorch, which refuses."""
    plain, odd = torch.ones(3), torch.ones(3)
    decay = {"weight_decay": 0.1} if takes(name, "weight_decay") else {}
    opt = getattr(fastopt.torch, name)([plain, odd], **decay)
    plain.grad, odd.grad = torch.ones(3), torch.ones(3).to_sparse()
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(RuntimeError, match=r"sparse"):
        opt.step()
    assert torch.equal(plain, torch.ones(3))
    assert torch.equal(odd, torch.ones(3))
    assert (plain in opt.state) == (name == "Adagrad")
    if name == "Adagrad":
        assert opt.state[plain]["step"] == 0
        assert before["state"][0]["sum"].equal(opt.state[plain]["sum"])
    odd.grad = torch.ones(3)
    opt.step()
    close(plain, odd)


@may_fall_back
@every_config
def test_what_the_kernels_refuse_is_done_by_torch(name, kwargs):
    """A gradient that overlaps another parameter: PyTorch goes through the list in order."""
    params = [[torch.ones(4), torch.full((4,), 0.25)] for _ in range(2)]
    opts = [getattr(m, name)(p, **kwargs) for m, p in zip(MODULES, params, strict=True)]
    for step in range(5):
        for p, q in params:
            p.grad = q if step in (0, 3) else torch.full((4,), 0.5)
            q.grad = torch.full((4,), -0.5)
        for opt in opts:
            opt.step()
        close(params[1][0], params[0][0])
        close(params[1][1], params[0][1])
        info = opts[1].fastopt_info()[0]
        if step in (0, 3):
            assert info["runs"] == "torch"
            assert "overlaps parameter 1 in memory" in info["why"]
        else:
            assert info["runs"] == "fastopt"
    for p, q in zip(*params, strict=True):
        assert opts[0].state.get(p, {}).keys() == opts[1].state.get(q, {}).keys()


@may_fall_back
def test_a_parameter_given_twice_is_torchs():
    for name in TORCH_CLASSES:
        param = torch.ones(3)
        with pytest.warns(UserWarning, match="duplicate parameters"):
            opt = getattr(fastopt.torch, name)([param, param])
        param.grad = torch.ones(3)
        opt.step()
        assert [info["runs"] for info in opt.fastopt_info()] == ["torch", "torch"]
        assert all(state.get("step", 2) == 2 for state in opt.state.values())


@may_fall_back
def test_state_that_does_not_fit_is_torchs():
    pair = Pair("Adam", shapes=((3, 4),))
    pair.step()
    for opt, (param,) in ((pair.peer, pair.theirs), (pair.opt, pair.ours)):
        state = opt.state[param]
        state["exp_avg"] = state["exp_avg"].t().contiguous().t()
    pair.step()
    pair.check()
    assert pair.opt.fastopt_info()[0]["why"].endswith("another dtype, shape or memory order")
    for opt, (param,) in ((pair.peer, pair.theirs), (pair.opt, pair.ours)):
        opt.state[param]["exp_avg"] = opt.state[param]["exp_avg"].contiguous()
    pair.step()
    assert pair.runs() == ["fastopt"]
    for opt, (param,) in ((pair.peer, pair.theirs), (pair.opt, pair.ours)):
        opt.state[param]["step"].fill_(2.5)
    assert "whole number" in pair.opt.fastopt_info()[0]["why"]
    pair.step(2)
    pair.check()
    pair.opt.param_groups[0]["amsgrad"] = True
    assert pair.opt.fastopt_info()[0]["why"] == "its state has no tensor 'max_exp_avg_sq'"
    with pytest.raises(KeyError, match="max_exp_avg_sq"):
        pair.opt.step()


# ---- hyperparameters and groups ------------------------------------------------------------------


@every_config
def test_groups_added_changed_and_replaced(name, kwargs):
    pair = Pair(name, kwargs)
    pair.step(2)
    more = [Parameter(torch.ones(3)), Parameter(torch.ones(3))]
    for opt, param in ((pair.peer, more[0]), (pair.opt, more[1])):
        opt.add_param_group({"params": [param], "lr": 0.5})
    pair.theirs.append(more[0])
    pair.ours.append(more[1])
    pair.step(2)
    pair.check()
    for opt in (pair.peer, pair.opt):
        opt.param_groups[0]["lr"] = 0.002
        opt.param_groups[1]["weight_decay"] = 0.3
    pair.step(2)
    pair.check()
    for opt in (pair.peer, pair.opt):
        opt.param_groups[0]["params"].pop()  # in place
    pair.step(2)
    pair.check()
    for opt, params in ((pair.peer, pair.theirs), (pair.opt, pair.ours)):
        opt.param_groups[0]["params"][1] = params[4]  # the one popped, for another
    pair.step(2)
    pair.check()
    for opt in (pair.peer, pair.opt):
        opt.param_groups[0]["params"] = opt.param_groups[0]["params"][:-1]  # a new list
    pair.step(2)
    pair.check()
    for opt in (pair.peer, pair.opt):
        opt.param_groups = [dict(group) for group in opt.param_groups]
        del opt.param_groups[1]
    pair.step(2)
    pair.check()
    assert len(pair.opt.fastopt_info()) == 3


def test_a_group_that_lacks_an_option_raises_as_torchs():
    pair = Pair("SGD")
    for opt, param in ((pair.peer, pair.theirs[0]), (pair.opt, pair.ours[0])):
        param.grad = torch.ones_like(param)
        opt.step()
        del opt.param_groups[0]["weight_decay"]
        with pytest.raises(KeyError, match="weight_decay"):
            opt.step()
    pair.check()


def test_a_tensor_that_leaves_the_memory_is_noticed():
    pair = Pair("Adam", shapes=((3,), (4,)), dtypes=[torch.float32] * 2)
    pair.step()
    for opt, params in ((pair.peer, pair.theirs), (pair.opt, pair.ours)):
        params[0].grad = None
        torch.utils.swap_tensors(params[0], Parameter(torch.ones(3, device="meta")))
        params[1].grad = torch.ones(4)
        opt.step()
    close(pair.ours[1], pair.theirs[1])
    assert [i["why"] for i in pair.opt.fastopt_info()] == ["its device is meta", None]


def test_hyperparameters_that_only_a_group_can_have():
    for name, changes in (
        ("SGD", {"lr": -0.1, "momentum": -0.5}),
        ("SGD", {"nesterov": True, "momentum": 0}),
        ("RMSprop", {"momentum": -0.5}),
        ("Adam", {"weight_decay": -0.1}),
        ("Adagrad", {"lr": 1, "lr_decay": True}),
    ):
        pair = Pair(name)
        for opt in (pair.peer, pair.opt):
            opt.param_groups[0].update(changes)
        pair.step(3)
        pair.check()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
@every_class
def test_hyperparameters_that_are_tensors(name, shape):
    pair = Pair(name, {"lr": torch.full(shape, 0.01)}, dtypes=[torch.float32] * 5)
    if takes(name, "betas"):
        betas = torch.full(shape, 0.75), torch.full(shape, 0.875)
        pair = Pair(name, {"lr": torch.full(shape, 0.01), "betas": betas}, shapes=((3,),))
    if shape and not BY_NAME[name].torch_takes_axes:
        pair.set_gradients()
        with pytest.raises((TypeError, RuntimeError)):
            pair.peer.step()
        return
    for _ in range(3):
        pair.step()
        for opt in (pair.peer, pair.opt):
            opt.param_groups[0]["lr"].mul_(2)
    pair.check()
    assert set(pair.runs()) == {"fastopt"}


def test_a_step_size_of_rprops_that_has_become_zero_stays_so():
    """As the core class has it, it would begin again at the rate."""
    pair = Pair("Rprop", {"lr": 0.0, "step_sizes": (0.0, 50)}, shapes=((3,),))
    pair.step()
    pair.check()
    for opt in (pair.peer, pair.opt):
        opt.param_groups[0]["lr"] = 1.0
    pair.step(3)
    pair.check()
    assert pair.opt.state[pair.ours[0]]["step_size"].tolist() == [0.0] * 3
    assert set(pair.runs()) == {"fastopt"}


def test_step_sizes_of_rprops_are_as_the_parameter_whatever_the_gradient_is():
    w = torch.zeros(2, 3, dtype=torch.bfloat16)
    opt = fastopt.torch.Rprop([w], lr=0.01, state_dtype="float32")
    w.grad = torch.ones(3, 2, dtype=torch.bfloat16).T
    opt.step()
    sizes = opt.state[w]["step_size"]
    assert sizes.dtype == torch.float32
    assert sizes.stride() == w.stride()
    assert (sizes == 0.01).all()  # and not its rounding to bfloat16
    assert opt.fastopt_info()[0]["runs"] == "fastopt"


SCHEDULERS = torch.optim.lr_scheduler
SCHEDULES = {
    "LambdaLR": lambda opt: SCHEDULERS.LambdaLR(opt, lambda t: 0.95**t),
    "MultiplicativeLR": lambda opt: SCHEDULERS.MultiplicativeLR(opt, lambda t: 0.95),
    "StepLR": lambda opt: SCHEDULERS.StepLR(opt, 3),
    "MultiStepLR": lambda opt: SCHEDULERS.MultiStepLR(opt, [2, 5]),
    "ConstantLR": lambda opt: SCHEDULERS.ConstantLR(opt),
    "LinearLR": lambda opt: SCHEDULERS.LinearLR(opt),
    "ExponentialLR": lambda opt: SCHEDULERS.ExponentialLR(opt, 0.9),
    "SequentialLR": lambda opt: SCHEDULERS.SequentialLR(
        opt, [SCHEDULERS.ConstantLR(opt), SCHEDULERS.ExponentialLR(opt, 0.9)], [4]
    ),
    "CosineAnnealingLR": lambda opt: SCHEDULERS.CosineAnnealingLR(opt, 6),
    "ChainedScheduler": lambda opt: SCHEDULERS.ChainedScheduler(
        [SCHEDULERS.ConstantLR(opt), SCHEDULERS.ExponentialLR(opt, 0.9)]
    ),
    "ReduceLROnPlateau": lambda opt: SCHEDULERS.ReduceLROnPlateau(opt, patience=1),
    "CyclicLR": lambda opt: SCHEDULERS.CyclicLR(opt, 0.001, 0.1, 4, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda opt: SCHEDULERS.CosineAnnealingWarmRestarts(opt, 4),
    "OneCycleLR": lambda opt: SCHEDULERS.OneCycleLR(opt, 0.1, 20),  # momentum, or betas, too
    "PolynomialLR": lambda opt: SCHEDULERS.PolynomialLR(opt, 8),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, 0.05, 4),
}


def test_every_scheduler_of_torch_is_tested():
    classes = {
        name
        for name in SCHEDULERS.__all__
        if isinstance(getattr(SCHEDULERS, name), type) and name != "LRScheduler"
    }
    assert classes == SCHEDULES.keys() - {"SWALR"}
    assert len(SCHEDULES) == 16


@pytest.mark.parametrize("scheduler", SCHEDULES)
@every_class
def test_schedules(name, scheduler):
    momentum = {"momentum": 0.9} if scheduler == "OneCycleLR" and takes(name, "momentum") else {}
    if scheduler == "OneCycleLR" and not momentum and not takes(name, "betas"):  # nothing to cycle
        with pytest.raises(ValueError, match="momentum"):
            SCHEDULES[scheduler](Pair(name).opt)
        return
    pair = Pair(name, momentum)
    opts = (pair.peer, pair.opt)
    schedulers = [SCHEDULES[scheduler](opt) for opt in opts]
    lrs = set()
    for _ in range(12):
        pair.step()
        for one in schedulers:
            one.step(*[1.0] * (scheduler == "ReduceLROnPlateau"))
        assert opts[0].param_groups[0]["lr"] == opts[1].param_groups[0]["lr"]
        lrs.add(opts[0].param_groups[0]["lr"])
    assert len(lrs) > 1
    pair.check()
    assert pair.runs() == ["fastopt"] * 5


# ---- autograd ------------------------------------------------------------------------------------


@every_class
def test_backward_through_a_tensor_that_was_updated_raises(name):
    for module in MODULES:
        param, other = Parameter(torch.ones(3)), Parameter(torch.ones(3))
        opt = getattr(module, name)([param, other])
        saved, also_saved = param.square().sum(), other.square().sum()
        param.grad = torch.ones(3)
        version = param._version, other._version
        opt.step()
        assert param._version > version[0]
        assert other._version == version[1]  # it has no gradient
        also_saved.backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.backward()


@every_class
def test_closures(name):
    pair = Pair(name)
    losses = []
    for opt, params in ((pair.peer, pair.theirs), (pair.opt, pair.ours)):

        def closure(opt=opt, params=params):
            assert torch.is_grad_enabled()
            opt.zero_grad()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss

        with torch.no_grad():
            losses.append([opt.step(closure).item() for _ in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    pair.check()


@every_class
def test_optimizers_in_backward(name):
    """One optimizer for each parameter, stepped as soon as its gradient is there."""
    nets = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
    nets[1].load_state_dict(nets[0].state_dict())
    for module, net in zip(MODULES, nets, strict=True):
        opts = {p: getattr(module, name)([p]) for p in net.parameters()}

        def hook(p, opts=opts):
            opts[p].step()
            opts[p].zero_grad()

        for p in net.parameters():
            p.register_post_accumulate_grad_hook(hook)
    for _ in range(4):
        for net in nets:
            net(torch.ones(4)).square().sum().backward()
            assert all(p.grad is None for p in net.parameters())
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        close(q, p)


@every_class
def test_parameters_that_refer_to_their_optimizer_are_freed(name):
    params = [torch.ones(3), torch.ones(2)]
    for param in params:
        param.optimizer = getattr(fastopt.torch, name)([param])
        param.grad = torch.ones_like(param)
        param.optimizer.step()
    gone = [weakref.ref(param) for param in params]
    del params, param
    gc.collect()
    assert [param() for param in gone] == [None, None]


@every_class
def test_an_optimizer_goes_as_soon_as_it_is_dropped(name):
    pair = Pair(name)
    pair.step(2)
    state = [weakref.ref(v) for s in pair.opt.state.values() for v in s.values()]
    grads = [weakref.ref(p.grad) for p in pair.ours]
    pair.opt.zero_grad()
    assert all(grad() is None for grad in grads)  # nor does it keep gradients
    gc.disable()
    try:
        gone = weakref.ref(pair.opt)
        pair.opt = None
        assert gone() is None
        assert all(tensor() is None for tensor in state)
    finally:
        gc.enable()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [name for name in TORCH_CLASSES if takes(name, "fused")])
def test_grad_scaler(name, fused):
    pair = Pair(name, {"fused": fused, "lr": 0.1}, shapes=((4,), (2, 3)))
    scales, results = [], []
    for opt, params in ((pair.peer, pair.theirs), (pair.opt, pair.ours)):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        for step in range(6):
            opt.zero_grad()
            loss = sum((p**2).sum() for p in params)
            if step == 3:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            scaler.step(opt)
            if step != 3:
                results.append([p.grad.clone() for p in params])
            scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1] != 256.0
    for a, b in zip(results[: len(results) // 2], results[len(results) // 2 :], strict=True):
        for p, q in zip(a, b, strict=True):
            close(q, p)
    pair.check()


@every_class
def test_clipped_gradients(name):
    pair = Pair(name)
    for _ in range(3):
        pair.set_gradients()
        for opt, params in ((pair.peer, pair.theirs), (pair.opt, pair.ours)):
            torch.nn.utils.clip_grad_norm_(params, 0.1)
            torch.nn.utils.clip_grad_value_(params, 0.05)
            opt.step()
    pair.check()


@may_fall_back
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, while it compiles
def test_compiled_steps_run_torchs_update():
    param = torch.ones(3)
    opt = fastopt.torch.SGD([param], lr=0.5)
    param.grad = torch.ones(3)
    torch.compile(opt.step, backend="eager")()
    assert torch.equal(param, torch.full((3,), 0.5))
    assert opt._run is None  # the kernels did not


# ---- hooks ---------------------------------------------------------------------------------------


def test_hooks_around_overridden_and_wrapped_steps_run_once():
    class Overridden(fastopt.torch.Adam):
        def step(self, closure=None):
            return super().step(closure)

    class Inherited(fastopt.torch.Adam):
        pass

    seen = []
    for cls in (fastopt.torch.Adam, Overridden, Inherited):
        opt = cls([torch.ones(1)])
        opt.register_step_pre_hook(lambda *_: seen.append("pre"))
        opt.register_step_post_hook(lambda *_: seen.append("post"))
        SCHEDULERS.StepLR(opt, 1)  # wraps the instance's step
        opt.step()
        assert seen == ["pre", "post"]
        seen.clear()


def test_a_hook_may_change_the_arguments():
    opt = fastopt.torch.Adam([torch.ones(1)])
    opt.register_step_pre_hook(lambda opt, args, kwargs: ((args[0], lambda: 7), {}))
    assert opt.step() == 7
    opt.register_step_pre_hook(lambda *_: 3)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        opt.step()


def test_the_profiler_sees_steps():
    pair = Pair("Adam")
    pair.set_gradients()
    with torch.profiler.profile() as profile:
        pair.opt.step()
    assert "Optimizer.step#Adam.step" in {event.name for event in profile.events()}


# ---- threads and processes -----------------------------------------------------------------------


def test_threads_are_torchs_and_fastopts_bound():
    param = torch.zeros(1 << 20)
    param.grad = torch.ones(1 << 20)
    opt = fastopt.torch.SGD([param])
    before = torch.get_num_threads(), fastopt.get_num_threads()
    try:
        for theirs, ours, bound in ((1, 4, 1), (4, 1, 1), (3, 2, 2)):
            torch.set_num_threads(theirs)
            fastopt.set_num_threads(ours)
            opt.step()
            assert opt._run.plan.num_threads == bound
            assert opt._run.plan.pool == (_pytorch.POOL if theirs <= ours else 0)
    finally:
        torch.set_num_threads(before[0])
        fastopt.set_num_threads(before[1])


def in_process(*arguments, seconds=120):
    """Run Python; it must end well, and in time."""
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, timeout=seconds, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


POOL = """
    import ctypes, os, threading, torch, fastopt.torch
    from fastopt import _pytorch
    from fastopt.torch import _run
    torch.set_num_threads(3)
    fastopt.set_num_threads(3)
    seen = []  # by call of the pool, the threads that act

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def pool(act, context, threads, flags):
        acting = set()

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def watched(context):
            acting.add(threading.get_native_id())
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(act)(context)

        theirs = type(pool)(_pytorch._POOL[0])
        theirs(ctypes.cast(watched, ctypes.c_void_p), context, threads, flags)
        seen.append(acting)

    def train(optim, threads, steps=40):
        param = torch.zeros(1 << 21)
        opt = optim.Adam([param])
        fastopt.set_num_threads(threads)
        for number in range(steps):
            param.grad = grads[number % len(grads)]
            opt.step()
        return param

    grads = [torch.randn(1 << 21) for _ in range(4)]
    torch.randn(1 << 21).sqrt_()  # PyTorch's threads are there now
    there = {int(name) for name in os.listdir("/proc/self/task")}
    found = _pytorch.POOL
    assert found != 0
    functions = type(_pytorch._POOL)(
        ctypes.cast(pool, ctypes.c_void_p).value, _pytorch._POOL[1]
    )

    def share_threads(plan):
        really(plan)
        if plan.pool == found:
            plan.pool = ctypes.addressof(functions)

    really, _run.share_threads = _run.share_threads, share_threads
    together = train(fastopt.torch, 3)
    assert torch.equal(together, train(fastopt.torch, 1))
    assert len(seen) >= 4, seen
    assert all(len(acting) == 3 and acting <= there for acting in seen), (seen, there)
    assert {os.getpid()} < set.intersection(*seen) == set.union(*seen)
"""
LATE = """
    import os, signal, torch
    torch.set_num_threads(2)
    torch.randn(1 << 22).sqrt_()  # PyTorch's threads are there now, and not in the child
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        import numpy as np, fastopt.torch
        param = torch.from_numpy(np.ones(1 << 22, np.float32))
        param.grad = torch.from_numpy(np.ones(1 << 22, np.float32))
        opt = fastopt.torch.SGD([param], lr=0.25)
        for _ in range(40):
            opt.step()
        array = param.numpy()
        os._exit(0 if array.min() == array.max() == -9 else 1)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no list of threads here")
def test_large_steps_may_run_in_pytorchs_own_threads():
    in_process("-c", textwrap.dedent(POOL))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_comes_late_to_fastopt_waits_for_no_thread_of_its_parents():
    in_process("-c", textwrap.dedent(LATE))


def test_docstring_examples():
    runner = doctest.DocTestRunner()
    for module in fastopt.torch, _optimizer:
        for test in doctest.DocTestFinder().find(module):
            if "__resume_at_" not in test.name:  # what torch.compile makes of a part of a method
                runner.run(test)
    result = runner.summarize()
    assert result.failed == 0
    assert result.attempted > 6 * len(TORCH_CLASSES)


def test_the_example_agrees_with_torch():
    script = Path(__file__).parents[2] / "examples" / "pytorch_optimizers.py"
    lines = in_process(script, "--check", "--epochs", "2").splitlines()
    assert [line for line in lines if " " not in line] == ["SGD", "Adam", "Adagrad", "RMSprop"]
    assert sum(line.startswith("Epoch [2/2], Loss: ") for line in lines) == 4


FORK = """
    import os, torch, fastopt.torch
    param = torch.zeros(1 << 20)
    param.grad = torch.ones(1 << 20)
    opt = fastopt.torch.Adam([param])
    for _ in range(5):
        opt.step()
        child = os.fork()
        if child == 0:
            opt.step()
            array = param.numpy()  # PyTorch's own threads would not survive the fork
            os._exit(0 if array.min() == array.max() < 0 else 1)
        assert os.waitpid(child, 0)[1] == 0
    before = param.clone()
    opt.step()
    assert (param < before).all()
"""


def test_a_forked_child_steps_alike():
    in_process("-c", textwrap.dedent(FORK))


ZERO = """
    import os, torch, torch.distributed as dist, fastopt.torch
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from datetime import timedelta
    rank, folder = int(os.environ["RANK"]), os.environ["FOLDER"]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    results = []
    for module in (torch.optim, fastopt.torch):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5, 3)) for _ in range(4)]
        opt = ZeroRedundancyOptimizer(params, getattr(module, "NAME"), lr=0.1, BUCKETS)
        for step in range(6):
            for param in params:
                param.grad = torch.sin(param.detach() * (step + 1))
            opt.step()
            if step == 3:
                opt.consolidate_state_dict(to=0)
                if rank == 0:
                    state = opt.state_dict()["state"]
        results.append((params, state if rank == 0 else {}))
        if module is fastopt.torch:
            assert {i["runs"] for i in opt.optim.fastopt_info()} == {"fastopt"}
    for p, q in zip(results[0][0], results[1][0]):
        torch.testing.assert_close(p, q)
    torch.testing.assert_close(results[0][1], results[1][1])
    print("equal", flush=True)
    # Not by way of the end of the interpreter, at which a thread of gloo may call std::terminate.
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("name", "buckets"), [*((name, False) for name in TORCH_CLASSES), ("AdamW", True)]
)
def test_zero_redundancy_optimizer(name, buckets, tmp_path):
    code = textwrap.dedent(ZERO).replace("NAME", name)
    code = code.replace("BUCKETS", f"parameters_as_bucket_view={buckets}")
    two_processes("-c", code, timeout=120, FOLDER=str(tmp_path))


def test_modules_of_torch_optim_can_be_imported_from():
    for name in ("lr_scheduler", "optimizer", "swa_utils"):
        theirs = importlib.import_module(f"torch.optim.{name}")
        assert importlib.import_module(f"fastopt.torch.{name}") is theirs
    from fastopt.torch.lr_scheduler import StepLR

    assert StepLR is torch.optim.lr_scheduler.StepLR


def test_a_product_of_momenta_is_loaded_as_it_is():
    for shape, dtype, convert in itertools.product(
        ((), (1,), (3,)), (torch.float32, torch.bfloat16, torch.float64), (False, True)
    ):
        opt = fastopt.torch.NAdam([torch.ones(shape, dtype=dtype)])
        [param] = opt.param_groups[0]["params"]
        param.grad = torch.ones_like(param)
        opt.step()
        saved = opt.state_dict()
        for product in torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.1), 0.1:
            saved["state"][0]["mu_product"] = product
            opt.load_state_dict(copy.deepcopy(saved), convert=convert)
            loaded = opt.state[param]["mu_product"]
            assert loaded.dtype == torch.as_tensor(product).dtype
            assert loaded == product
            opt.step()
            assert opt.fastopt_info()[0]["runs"] == "fastopt"
        before = opt.state[param]["mu_product"].item()
        for bad in None, "x", torch.tensor(1.0, device="meta"):
            saved["state"][0]["mu_product"] = bad
            with pytest.raises(ValueError, match="state of parameter 0: mu_product has to be"):
                opt.load_state_dict(saved, convert=convert)
        assert opt.state[param]["mu_product"].item() == before


def step_in_shared_memory(opt, param):
    param.grad = torch.ones_like(param)
    opt.step()


def test_state_in_shared_memory():
    """As in Hogwild: Adagrad's own share_memory() moves its state under the optimizer's feet."""
    params = [torch.ones(4).share_memory_(), torch.ones(4)]
    opts = [fastopt.torch.Adagrad([params[0]]), torch.optim.Adagrad([params[1]])]
    for opt, param in zip(opts, params, strict=True):
        step_in_shared_memory(opt, param)
    opts[0].share_memory()
    for opt, param in zip(opts, params, strict=True):
        step_in_shared_memory(opt, param)
    close(*params)
    process = multiprocessing.get_context("fork").Process(
        target=step_in_shared_memory, args=(opts[0], params[0])
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    step_in_shared_memory(opts[1], params[1])
    close(*params)
    close(opts[0].state[params[0]]["sum"], opts[1].state[params[1]]["sum"])


def both(name, shape=(3,), **kwargs):
    """Return a pair of equal parameters, and the optimizers of PyTorch and of fastopt of them."""
    params = [torch.linspace(-1, 2, 3).expand(shape).clone() for _ in MODULES]
    return params, [getattr(m, name)([p], **kwargs) for m, p in zip(MODULES, params, strict=True)]


def test_every_name_of_torchs_is_there_and_is_a_class_of_ours_or_torchs():
    names = {}
    exec("from fastopt.torch import *", names)
    ours = {*TORCH_CLASSES, "SparseAdam"}
    assert names.keys() - {"__builtins__"} == {*torch.optim.__all__} == {*fastopt.torch.__all__}
    for name in torch.optim.__all__:
        theirs = getattr(torch.optim, name)
        assert names[name] is getattr(fastopt.torch, name)
        assert (names[name] is theirs) == (name not in ours)
        assert name not in ours or issubclass(names[name], theirs)


def test_an_option_that_changes_where_it_is_is_seen():
    params, opts = both("SGD")
    for opt in opts:
        opt.param_groups[0]["lr"] = np.array(0.1)
    for _ in range(4):
        for opt, param in zip(opts, params, strict=True):
            param.grad = torch.ones(3)
            opt.step()
            opt.param_groups[0]["lr"] *= 0.5  # a 0-d array, in place
    close(params[1], params[0])

    params, opts = both("Adam", lr=0.1)
    for step in range(4):
        for opt, param in zip(opts, params, strict=True):
            if step == 0:
                opt.param_groups[0]["betas"] = [0.9, 0.99]
            opt.param_groups[0]["betas"][0] = 0.1 if step > 1 else 0.9
            param.grad = torch.full((3,), (-1.0) ** step * (step + 1))
            opt.step()
    close(params[1], params[0])


@pytest.mark.parametrize("bad", [None, "x"])
def test_an_option_that_is_none_raises_every_time(bad):
    params, (_, opt) = both("SGD", lr=0.1)
    params[1].grad = torch.ones(3)
    opt.step()
    opt.param_groups[0]["lr"] = bad
    before = params[1].clone()
    for _ in range(3):
        with pytest.raises((TypeError, ValueError)):
            opt.step()
        assert torch.equal(params[1], before)


@may_fall_back
def test_gradients_with_equal_gaps_of_which_one_holds_negatives():
    params, opts = both("SGD", lr=1.0)
    z = torch.complex(torch.ones(3), torch.ones(3))
    for opt, param in zip(opts, params, strict=True):
        for grad in (z.imag, z.conj().imag, z.imag):
            param.grad = grad
            opt.step()
    close(params[1], params[0])


@may_fall_back
def test_memory_that_goes_while_the_other_parameters_are_updated():
    fit = torch.zeros(1 << 22)

    class Meddling(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.add_:
                fit.data = torch.zeros(4)
            return super().__torch_function__(function, types, args, kwargs or {})

    other = torch.zeros(3).as_subclass(Meddling)
    opt = fastopt.torch.SGD([fit, other], lr=1.0)
    fit.grad = torch.ones(1 << 22)
    opt.step()
    other.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="must match the size"):  # PyTorch's own
        opt.step()
    assert torch.equal(fit, torch.zeros(4))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("Adam", "bias_correction", False), ("RMSprop", "decoupled_weight_decay", True)],
)
def test_a_key_of_a_group_that_is_not_torchs_does_nothing(name, key, value):
    params, opts = both(name, lr=0.1, weight_decay=0.5)
    for opt, param in zip(opts, params, strict=True):
        opt.param_groups[0][key] = value
        for _ in range(3):
            param.grad = torch.ones(3)
            opt.step()
    close(params[1], params[0])


@may_fall_back
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 2.5])
def test_a_counter_that_is_no_number_of_steps_is_torchs(value):
    params, opts = both("Adam", lr=0.1)
    for opt, param in zip(opts, params, strict=True):
        param.grad = torch.ones(3)
        opt.step()
        opt.state[param]["step"] = torch.tensor(value)
        if opt is opts[1]:
            assert "step is not a whole number" in opt.fastopt_info()[0]["why"]
        opt.step()
    assert_close(params[1], params[0], equal_nan=True)


@may_fall_back
def test_a_counter_that_two_parameters_share_is_torchs():
    results = []
    for module in MODULES:
        params = [torch.ones(3), torch.ones(3)]
        opt = module.Adam(params, lr=0.1)
        for step in range(6):
            for param in params:
                param.grad = torch.full((3,), step - 2.0)
            opt.step()
            if step == 1:
                opt.state[params[1]]["step"] = opt.state[params[0]]["step"]
        assert opt.state[params[0]]["step"] == 10
        results.append(params)
    for p, q in zip(*results, strict=True):
        close(q, p)


def test_a_counter_in_the_state_of_sgd_is_the_users():
    params, opts = both("SGD", lr=1.0, momentum=0.9, dampening=0.5)
    for opt, param in zip(opts, params, strict=True):
        for step in range(3):
            param.grad = torch.ones(3)
            opt.step()
            if step == 0:
                opt.state[param]["step"] = torch.tensor(0.0)
        assert opt.state[param]["step"] == 0
    close(params[1], params[0])


def test_a_buffer_that_is_none_waits_for_a_gradient():
    params, opts = both("SGD", lr=1.0, momentum=0.9, dampening=0.5)
    for opt, param in zip(opts, params, strict=True):
        other = torch.zeros(3)
        opt.add_param_group({"params": [other]})
        opt.state[param]["momentum_buffer"] = None
        other.grad = torch.ones(3)
        opt.step()
        assert opt.state[param]["momentum_buffer"] is None
        param.grad = torch.ones(3)
        opt.step()
    close(params[1], params[0])


@may_fall_back
def test_gradients_in_turns_and_shared_memory_do_not_make_a_new_run_each_time():
    params = [torch.zeros(3) for _ in range(4)]
    opt = fastopt.torch.SGD(params, lr=0.1)
    whole = torch.zeros(4)
    overlapping = fastopt.torch.SGD([torch.zeros(3), whole[:3], whole[1:]], lr=0.1)
    runs = [], []
    for step in range(6):
        for i, param in enumerate(params):
            param.grad = torch.ones(3) if i % 2 == step % 2 else None
        for param in overlapping.param_groups[0]["params"]:
            param.grad = torch.ones(3)
        for o, seen in zip((opt, overlapping), runs, strict=True):
            o.step()
            seen.append(o._run)
    for seen in runs:
        assert seen[1] is seen[-1]
    assert [i["runs"] for i in overlapping.fastopt_info()] == ["fastopt", "torch", "torch"]


@may_fall_back
def test_a_dispatch_mode_sees_the_update():
    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    _, (_, opt) = both("SGD", lr=0.1)
    opt.param_groups[0]["params"][0].grad = torch.ones(3)
    opt.step()
    with Mode():
        opt.step()
    assert any("add" in name for name in seen)
