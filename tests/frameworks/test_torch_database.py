"""PyTorch's own optimizer tests, on fastopt's classes.

PyTorch describes its optimizers in a database (``torch.testing._internal.common_optimizers``):
inputs and wrong inputs of each constructor, what it supports, and its schedulers. Its test module
(``test/test_optim.py``) runs generic tests over that; the tests here have its tests' names and do
what those are about, over entries of the same database for fastopt's classes. While they run,
PyTorch's own update functions refuse dense parameters in the CPU's memory, of every dtype that
fastopt takes, whose gradients are dense or of some rows: what passes is fastopt's doing.
"""

import copy
import io
import sys
from contextlib import contextmanager

import pytest
import torch
import torch_peers
from tables import BY_NAME, TORCH_CLASSES
from torch.nn import Parameter
from torch.optim import _functional as functional
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing import assert_close
from torch.testing._internal import common_optimizers as database

import fastopt.torch

pytestmark = pytest.mark.filterwarnings("ignore::fastopt.FallbackWarning")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def entry(name):
    """The database's entry for PyTorch's class, made over to fastopt's."""
    theirs = next(i for i in database.optim_db if i.optim_cls is getattr(torch.optim, name))
    return database.OptimizerInfo(
        getattr(fastopt.torch, name),
        **{
            option: getattr(theirs, option)
            for option in (
                "optim_inputs_func",
                "scheduler_inputs",
                "supported_impls",
                "not_og_supported_flags",
                "supports_sparse",
                "has_capturable_arg",
                "metadata_for_sparse",
                "only_supports_sparse_grads",
                "supports_complex",
                "step_requires_closure",
                "supports_param_groups",
                "optim_error_inputs_func",
                "supports_fused_on",
            )
        },
    )


DENSE = [entry(name) for name in TORCH_CLASSES]
DATABASE = [*DENSE, entry("SparseAdam")]
SPARSE_ADAM_TESTS = 155  # cases of it: the others' are in tables.py


def given(info, grad):
    """Return a gradient as a class takes it."""
    return grad.to_sparse(1) if info.only_supports_sparse_grads else grad


def inputs(info, *skip):
    """Every configuration of a class, with each implementation of it that can be asked for."""
    result = []
    for case in info.optim_inputs_func("cpu"):
        flags = dict.fromkeys(set(info.supported_impls) - set(skip), False)
        result.append((case.desc, {**case.kwargs, **flags}))
        for flag in sorted(flags):
            tensors = any(isinstance(value, torch.Tensor) for value in case.kwargs.values())
            if not (tensors and flag == "foreach"):  # which some classes refuse
                kwargs = {**case.kwargs, **flags, flag: True}
                result.append((f"{case.desc}, {flag}", kwargs))
    return result


@pytest.fixture
def kwargs(request):
    return copy.deepcopy(request.param)


def cases(*skip, only=DATABASE):
    return pytest.mark.parametrize(
        ("info", "kwargs"),
        [
            pytest.param(info, kwargs, id=f"{info.name}: {description}")
            for info in only
            for description, kwargs in inputs(info, *skip)
        ],
        indirect=["kwargs"],
    )


every_class = pytest.mark.parametrize("info", DATABASE, ids=lambda info: info.name)
every_with_foreach = pytest.mark.parametrize(
    "info", [i for i in DATABASE if "foreach" in i.supported_impls], ids=lambda info: info.name
)
in_16_bits_too = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)

# PyTorch's tests that are not here, and why.
LEFT_OUT = {
    "test_optim_infos_do_not_specify_global_cliquey_kwargs": "about the database alone",
    "test_forloop_goes_right_direction_multigpu": "needs several GPUs",
    "test_mixed_device_dtype": "needs several GPUs",
    "test_set_default_dtype_works_with_foreach": "needs a GPU; the CPU's case is tested below",
    "test_foreach_large_tensor": "needs a GPU of 72 GB",
    "test_peak_memory_foreach": "needs a GPU",
    "test_fused_large_tensor": "needs 64 GB",
    "test_cpu_load_state_dict": "moves state to another device",
    "test_state_dict_with_cuda_params": "needs a GPU",
    "test_second_order_optims_return_consistent_types": "LBFGS alone",
    "test_fused_cpu_matches_cuda": "needs a GPU",
    "test_defaults_changed_to_foreach": "needs a GPU, and asks which of PyTorch's updates runs",
}
# Those that are: all others of the version of PyTorch's test module that was at hand.
RUN = {
    "test_errors",
    "test_forloop_goes_right_direction",
    "test_param_group_with_lrscheduler_goes_right_direction",
    "test_tensor_lr",
    "test_rosenbrock_sparse",
    "test_complex",
    "test_complex_2d",
    "test_foreach_matches_forloop",
    "test_fused_matches_forloop",
    "test_fused_error_on_params_on_meta",
    "test_fused_does_not_step_if_foundinf",
    "test_param_groups_weight_decay",
    "test_param_groups_lr",
    "test_step_is_noop_when_params_have_no_grad",
    "test_step_is_noop_for_zero_grads",
    "test_optimizer_can_be_printed",
    "test_state_dict_deterministic",
    "test_can_load_older_state_dict",
    "test_can_load_from_to_named_state_dict",
    "test_save_load_equality_with_weights_only",
    "test_load_nontensor_step",
    "test_state_dict_pre_hook",
    "test_state_dict_post_hook",
    "test_state_dict_pre_post_hook",
    "test_load_state_dict_pre_hook_and_prepend",
    "test_load_state_dict_post_hook",
    "test_load_state_dict_pre_post_hook",
    "test_step_post_hook",
    "test_step_pre_hook",
    "test_step_all_hooks",
    "test_deepcopy_copies_all_public_attrs",
    "test_non_empty_state",
}


# ---- whose update runs ---------------------------------------------------------------------------


class Guard:
    """Stands before PyTorch's update functions."""

    def __init__(self):
        self.allowed = False
        self.calls = 0

    def before(self, update):
        def guarded(params, grads, *args, **kwargs):
            self.calls += 1
            differentiable = torch.is_grad_enabled()
            if not (self.allowed or differentiable or kwargs.get("capturable")):
                dense_only = kwargs.get("weight_decay") or kwargs.get("momentum")
                for param, grad in zip(params, grads, strict=True):
                    rows = not dense_only and grad.is_sparse and grad.sparse_dim() == 1
                    fit = rows or is_dense_float(grad, gaps=True)
                    assert not (is_dense_float(param) and fit)
            return update(params, grads, *args, **kwargs)

        return guarded

    @contextmanager
    def lifted(self):
        """For a peer of PyTorch's own class."""
        self.allowed = True
        yield
        self.allowed = False


def is_dense_float(tensor, gaps=False):
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    spans = [(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    dense = gaps or sum(spans) + 1 == tensor.numel() or tensor.numel() == 0
    return dense and tensor.dtype in DTYPES


@pytest.fixture(autouse=True)
def guard(monkeypatch):
    guard = Guard()
    for name in {BY_NAME[name].rule for name in TORCH_CLASSES}:
        module = sys.modules[f"torch.optim.{name}"]
        for implementation in ("single_tensor", "multi_tensor", "fused"):
            function = f"_{implementation}_{name}"
            if hasattr(module, function):
                monkeypatch.setattr(module, function, guard.before(getattr(module, function)))
    sparse_adam = guard.before(functional.sparse_adam)
    monkeypatch.setattr(functional, "sparse_adam", sparse_adam)
    torch.manual_seed(0)
    return guard


@every_class
def test_pytorchs_own_class_does_not_pass_the_guard(info, guard):
    param = torch.ones(3, requires_grad=True)
    param.grad = given(info, torch.ones(3))
    peer = getattr(torch_peers, info.name)([param])
    with pytest.raises(AssertionError):
        peer.step()
    with guard.lifted():
        peer.step()
    assert guard.calls == 2


def runs(opt):
    return {info["runs"] for info in opt.fastopt_info()}


# ---- a small problem -----------------------------------------------------------------------------


class Linear:
    """The square of a linear map, to be made smaller."""

    def __init__(self, info, weight=None, bias=None, dtype=torch.float32):
        self.info = info
        self.weight = Parameter(torch.randn(10, 5).to(dtype) if weight is None else weight)
        self.bias = Parameter(torch.randn(10).to(dtype) if bias is None else bias)
        self.input = torch.randn(5).to(self.weight.dtype)
        self.params = [self.weight, self.bias]

    def loss(self):
        return (self.weight.mv(self.input) + self.bias).pow(2).sum()

    def backward(self):
        self.weight.grad = self.bias.grad = None
        loss = self.loss()
        loss.backward()
        for param in self.params:
            param.grad = given(self.info, param.grad)
        return loss

    def train(self, opt, steps, schedulers=()):
        """Train, and see whether the loss went where it should."""
        maximize = opt.param_groups[0]["maximize"]
        before = self.loss().item()
        for _ in range(steps):
            loss = opt.step(self.backward)
            for scheduler in schedulers:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*[loss.detach()] * plateau)
        after = self.loss().item()
        assert after > before if maximize else after < before

    def twin(self):
        """Return a copy, with the same input."""
        twin = Linear(self.info, self.weight.detach().clone(), self.bias.detach().clone())
        twin.input = self.input
        return twin


def assert_same_state(a, b):
    """Compare what two optimizers hold for each parameter in turn."""
    flat_a, flat_b = ([p for g in opt.param_groups for p in g["params"]] for opt in (a, b))
    for p, q in zip(flat_a, flat_b, strict=True):
        assert_close(p, q)
        assert a.state[p].keys() == b.state[q].keys()
        for name, value in a.state[p].items():
            assert_close(value, b.state[q][name])


# ---- construction --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "case"),
    [
        pytest.param(info, case, id=f"{info.name}-{case.optimizer_error_input.desc}")
        for info in DATABASE
        for case in info.optim_error_inputs_func("cpu", torch.float32)
    ],
)
def test_errors(info, case):
    params, kwargs = case.optimizer_error_input.params, case.optimizer_error_input.kwargs
    assert case.error_on == database.OptimizerErrorEnum.CONSTRUCTION_ERROR
    check = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
    with check(case.error_type, match=case.error_regex):
        info.optim_cls(params, **kwargs)


@cases()
def test_optimizer_can_be_printed(info, kwargs):
    text = repr(info.optim_cls(Linear(info).params, **kwargs))
    assert text.startswith(f"{info.name} (")
    assert "lr:" in text


# ---- the loss goes where it should ---------------------------------------------------------------


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("contiguous", [True, False])
@every_class
def test_forloop_goes_right_direction(info, contiguous, scheduled):
    for make_schedulers in info.scheduler_inputs if scheduled else [[]]:
        for case in info.optim_inputs_func("cpu"):
            problem = Linear(info)
            if not contiguous:
                problem = Linear(info, torch.randn(10, 5, 2)[..., 0], torch.randn(10, 2)[..., 0])
            opt = info.optim_cls(problem.params, **case.kwargs)
            schedulers = [make(opt) for make in make_schedulers]
            problem.train(opt, 20, schedulers)
            assert runs(opt) == {"fastopt" if contiguous else "torch"}


@every_class
def test_param_group_with_lrscheduler_goes_right_direction(info):
    for make_schedulers in info.scheduler_inputs:
        problem = Linear(info)
        groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}]
        opt = info.optim_cls(groups)
        problem.train(opt, 20, [make(opt) for make in make_schedulers])


@cases("differentiable", only=DENSE)
def test_param_groups_weight_decay(info, kwargs):
    problem = Linear(info)
    plain = {**copy.deepcopy(kwargs), "weight_decay": 0.0}
    opt = info.optim_cls(
        [{"params": [problem.weight], **kwargs}, {"params": [problem.bias], **plain}]
    )
    problem.train(opt, 20)
    assert runs(opt) == {"fastopt"}


@cases("differentiable")
def test_param_groups_lr(info, kwargs):
    problem, still = Linear(info), Parameter(torch.randn(2))
    before = still.detach().clone()
    kwargs.setdefault("lr", 1e-3)
    outer = {"lr": 1e-28}
    if info.name == "Rprop":  # whose steps do not become smaller than the smallest step size
        outer["step_sizes"] = (0, 50)
    opt = info.optim_cls([{"params": problem.params, **kwargs}, {"params": [still]}], **outer)
    still.grad = given(info, torch.rand(2))
    problem.train(opt, 20)
    assert_close(still.detach(), before)


# ---- kinds of hyperparameters, gradients and parameters ------------------------------------------


@cases("differentiable")
def test_tensor_lr(info, kwargs):
    problem = Linear(info)
    twin = problem.twin()
    kwargs["lr"] = 1e-3
    opt = info.optim_cls(problem.params, **kwargs)
    kwargs["lr"] = torch.tensor(1e-3)
    try:
        getattr(torch_peers, info.name)(twin.params, **kwargs)
    except ValueError:  # of Adam and AdamW
        assert kwargs["foreach"]
        with pytest.raises(ValueError, match="lr as a Tensor is not supported"):
            info.optim_cls(twin.params, **kwargs)
        return
    other = info.optim_cls(twin.params, **kwargs)
    for step in range(8):
        if step == 5:  # where it is, and as a scheduler does it
            opt.param_groups[0]["lr"] = 0.5
            kwargs["lr"].fill_(0.5)
        problem.backward()
        twin.backward()
        opt.step()
        other.step()
        assert_same_state(opt, other)
    assert runs(other) == {"fastopt"}


def rosenbrock(tensor):
    x, y = tensor
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize(
    ("info", "flags"),
    [
        pytest.param(info, flags, id=f"{info.name}-{flags}")
        for info in DATABASE
        if info.supports_sparse or info.only_supports_sparse_grads
        for flags in ({"foreach": False}, {"foreach": True}, {})
        if flags.keys() == {"foreach"} & {*info.supported_impls}
    ],
)
def test_rosenbrock_sparse(info, scheduled, flags, guard):
    """Descend along one coordinate after the other, with gradients that are not coalesced.

    Beside it, the same with dense gradients, or else with PyTorch's own class.
    """
    updates, make_schedulers = info.metadata_for_sparse
    peer = getattr(torch_peers, info.name) if info.only_supports_sparse_grads else info.optim_cls
    for maximize in (False, True):
        kwargs = {**updates, **flags, "maximize": maximize}
        start = torch.tensor([1.5, 1.5], dtype=torch.float64)
        params = [Parameter(start.clone()), Parameter(start.clone())]
        opts = [cls([p], **kwargs) for cls, p in zip((info.optim_cls, peer), params, strict=True)]
        schedulers = [make(opt) for opt in opts for make in make_schedulers if scheduled]
        for step in range(4 if maximize else 600):  # the ascent has no end
            for param in params:
                gradient = torch.autograd.grad(rosenbrock(param), param)[0][step % 2]
                parts = torch.stack([gradient / 4, gradient - gradient / 4])
                where = torch.full((1, 2), step % 2)
                gradient = torch.sparse_coo_tensor(where, parts, (2,), check_invariants=True)
                dense = param is params[1] and peer is info.optim_cls
                param.grad = gradient.to_dense() if dense else gradient
            opts[0].step()
            with guard.lifted():
                opts[1].step()
            for scheduler in schedulers:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*[rosenbrock(params[0].detach())] * plateau)
            assert_close(*params, atol=5e-6, rtol=5e-6)
        assert runs(opts[0]) == {"fastopt"}
        assert (rosenbrock(params[0].detach()) > rosenbrock(start)) == maximize


@cases("differentiable", "fused", only=DENSE)
def test_complex(info, kwargs):
    """A complex parameter is a pair of real ones; beside it, one that is real."""
    ours = [torch.randn(10, 5, dtype=torch.complex64), torch.randn(10, 5)]
    pairs = [torch.view_as_real(ours[0]).clone(), ours[1].clone()]
    opt, other = (info.optim_cls(params, **copy.deepcopy(kwargs)) for params in (ours, pairs))
    for _ in range(3):
        ours[0].grad, ours[1].grad = torch.randn_like(ours[0]), torch.randn_like(ours[1])
        pairs[0].grad, pairs[1].grad = torch.view_as_real(ours[0].grad), ours[1].grad
        opt.step()
        other.step()
        assert_close(torch.view_as_real(ours[0]), pairs[0])
        assert_close(ours[1], pairs[1])
    assert [info["runs"] for info in opt.fastopt_info()] == ["torch", "fastopt"]


@cases("differentiable", "fused", only=DENSE)
def test_complex_2d(info, kwargs):
    whole = torch.randn(2, dtype=torch.complex64).requires_grad_()
    real, imag = (part.detach().clone().requires_grad_() for part in (whole.real, whole.imag))
    opt, other = (
        info.optim_cls(params, **copy.deepcopy(kwargs)) for params in ([whole], [real, imag])
    )
    for _ in range(3):
        opt.zero_grad()
        other.zero_grad()
        rosenbrock(whole).abs().backward()
        rosenbrock(torch.complex(real, imag)).abs().backward()
        opt.step()
        other.step()
        assert_close(whole.detach().real, real.detach())
        assert_close(whole.detach().imag, imag.detach())


# ---- the implementations that can be asked for ---------------------------------------------------


def small_net(dtype):
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
    ).to(dtype)
    return net, torch.linspace(0.1, 0.6, 6, dtype=dtype).reshape(3, 2)


def compare(info, dtype, flag, guard=None):
    """Train with a flag and without (or by PyTorch's own class), sometimes without gradients."""
    for case in info.optim_inputs_func("cpu", dtype):
        opts = []
        for value in (False, True):
            net, x = small_net(dtype)
            scalar = torch.zeros((), dtype=dtype, requires_grad=True)
            scalar.grad = torch.ones_like(scalar)
            cls = getattr(torch_peers, info.name) if guard and not value else info.optim_cls
            kwargs = {**copy.deepcopy(case.kwargs), flag: value}
            opt = cls([*net.parameters(), scalar], **kwargs)
            opts.append(opt)
            for step in range(7):
                opt.zero_grad()
                net[2].requires_grad_(step not in (3, 4))
                if step != 2:
                    net(x).sum().backward()
                if guard and not value:
                    with guard.lifted():
                        opt.step()
                else:
                    opt.step()
        assert_same_state(*opts)
    return opts


@every_with_foreach
def test_foreach_matches_forloop(info):
    compare(info, torch.float64, "foreach")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_with_foreach
def test_steps_match_pytorchs_forloop(info, dtype, guard):
    compare(info, dtype, "foreach", guard)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "info", [i for i in DATABASE if "fused" in i.supported_impls], ids=lambda i: i.name
)
def test_fused_matches_forloop(info, dtype):
    opts = compare(info, dtype, "fused")
    assert runs(opts[0]) == runs(opts[1]) == {"fastopt"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@every_with_foreach
def test_set_default_dtype_works(info, dtype):
    """Counters are float32, unless the default is more than that."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for opt in compare(info, torch.float64, "foreach"):
            for state in opt.state.values():
                if "step" in state:
                    wide = dtype == torch.float64
                    assert state["step"].dtype == (torch.float64 if wide else torch.float32)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "info", [i for i in DATABASE if "fused" in i.supported_impls], ids=lambda i: i.name
)
def test_fused_error_on_params_on_meta(info):
    with torch.device("meta"):
        net = torch.nn.Linear(2, 3)
    opt = info.optim_cls(net.parameters(), fused=True)
    for param in net.parameters():
        param.grad = torch.rand_like(param)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating"):
        opt.step()
    net.to_empty(device="cpu")
    opt = info.optim_cls(net.parameters(), fused=True)
    for param in net.parameters():
        param.data.zero_()
        param.grad = torch.ones_like(param)
    opt.step()
    assert runs(opt) == {"fastopt"}
    assert all((param < 0).all() for param in net.parameters())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "info", [i for i in DATABASE if "fused" in i.supported_impls], ids=lambda i: i.name
)
def test_fused_does_not_step_if_foundinf(info, scaled):
    for case in info.optim_inputs_func("cpu"):
        params = [torch.ones(1) for _ in range(5)]
        for param in params:
            param.grad = torch.ones(1)
        opt = info.optim_cls(params, fused=True, **case.kwargs)
        opt.grad_scale = torch.ones(1) if scaled else None
        opt.found_inf = torch.ones(())
        opt.step()
        assert all(param == 1 for param in params)
        assert all(state.get("step", 0) == 0 for state in opt.state.values())
        opt.found_inf = torch.zeros(())
        opt.step()
        assert all(param != 1 for param in params)
        assert all(state.get("step", 1) == 1 for state in opt.state.values())


# ---- no gradients --------------------------------------------------------------------------------


@cases()
def test_step_is_noop_when_params_have_no_grad(info, kwargs):
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [param.clone() for param in params]
    opt = info.optim_cls(params, **kwargs)
    state = {name: dict(value) for name, value in opt.state.items()}
    result = torch.ones(1)
    assert opt.step(lambda: result) is result
    assert_close(params, before, rtol=0, atol=0)
    assert {name: dict(value) for name, value in opt.state.items()} == state


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@cases()
def test_step_is_noop_for_zero_grads(info, kwargs):
    if kwargs.get("weight_decay"):
        return  # a decay is no no-op
    param = torch.randn(5, 1, requires_grad=True)
    before = param.detach().clone()
    if info.name == "AdamW":
        kwargs["lr"] = 1e-6
    if kwargs.get("differentiable"):
        param = param.clone()
    opt = info.optim_cls([param], **kwargs)
    param.grad = given(info, torch.zeros(5, 1))
    opt.step()
    assert_close(param.detach(), before)


# ---- state ---------------------------------------------------------------------------------------


@every_class
def test_non_empty_state(info):
    """Only a state without slots may be empty: that of SGD without momentum."""
    for case in info.optim_inputs_func("cpu"):
        problem = Linear(info)
        opt = info.optim_cls(problem.params, **case.kwargs)
        problem.backward()
        opt.step()
        assert all(len(state) > 0 for state in opt.state.values())
        without = info.name == "SGD" and "momentum" not in case.kwargs
        assert len(opt.state) == (0 if without else 2)


def without_names(state_dict):
    state_dict = copy.deepcopy(state_dict)
    for group in state_dict["param_groups"]:
        group.pop("param_names", None)
    return state_dict


@pytest.mark.parametrize(
    ("named", "dtype"),
    [
        ((False, False), torch.float32),
        ((True, False), torch.float32),
        ((False, True), torch.float32),
        ((True, True), torch.float32),
        ((False, False), torch.bfloat16),
        ((False, False), torch.float16),
    ],
)
@cases("differentiable")
def test_state_dict_deterministic(info, kwargs, named, dtype):
    problem = Linear(info, dtype=dtype)

    def make(of, with_names):
        params = [("w", of.weight), ("b", of.bias)] if with_names else of.params
        return info.optim_cls(params, **copy.deepcopy(kwargs))

    opt = make(problem, named[0])
    for _ in range(5):
        opt.step(problem.backward)
    twin = problem.twin()
    other = make(twin, named[1])
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(5):
        opt.step(problem.backward)
        other.step(twin.backward)
    assert_close(problem.params, twin.params, rtol=0, atol=0)
    a, b = without_names(opt.state_dict()), without_names(other.state_dict())
    assert_close(a["state"], b["state"], rtol=0, atol=0)
    assert a["param_groups"] == b["param_groups"]
    other.param_groups.extend(other.param_groups)
    assert without_names(other.state_dict())["param_groups"][-1] == a["param_groups"][-1]


@cases("differentiable", only=DENSE)
def test_can_load_older_state_dict(info, kwargs):
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2))
    x = torch.rand(1, 4, 16, 16)
    opt = info.optim_cls(net.parameters(), **kwargs)

    def backward():
        opt.zero_grad()
        net(x).square().sum().backward()

    for _ in range(3):
        opt.step(backward)
    old = copy.deepcopy(opt.state_dict())
    for group in old["param_groups"]:
        for flag in info.not_og_supported_flags:
            group.pop(flag, None)
    opt.load_state_dict(old)
    before = [param.detach().clone() for param in net.parameters()]
    for _ in range(2):  # in the first, Rprop rests: without `maximize` all signs have changed
        opt.step(backward)
    assert not torch.equal(before[0], net[0].weight)


@pytest.mark.parametrize("named", [(False, False), (True, False), (False, True), (True, True)])
@cases("differentiable")
def test_can_load_from_to_named_state_dict(info, kwargs, named):
    net = torch.nn.Linear(3, 2)

    def make(with_names):
        params = net.named_parameters() if with_names else net.parameters()
        return info.optim_cls(params, **copy.deepcopy(kwargs))

    opt, other = map(make, named)
    net(torch.ones(3)).sum().backward()
    for param in net.parameters():
        param.grad = given(info, param.grad)
    opt.step()
    other.load_state_dict(opt.state_dict())
    other.step()
    names = other.state_dict()["param_groups"][0].get("param_names")
    assert names == (["weight", "bias"] if any(named) else None)
    assert [i["name"] for i in other.fastopt_info()] == (names or [None, None])


@pytest.mark.parametrize("named", [False, True])
@in_16_bits_too
@cases("differentiable")
def test_save_load_equality_with_weights_only(info, kwargs, named, dtype):
    problem = Linear(info, dtype=dtype)
    params = [("w", problem.weight), ("b", problem.bias)] if named else problem.params
    opt = info.optim_cls(params, **kwargs)
    for _ in range(3):
        opt.step(problem.backward)
    saved = opt.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    for weights_only in (True, False):
        file.seek(0)
        loaded = torch.load(file, weights_only=weights_only)
        assert_close(loaded["state"], saved["state"], rtol=0, atol=0)
        assert loaded["param_groups"] == saved["param_groups"]


@in_16_bits_too
@cases("differentiable")
def test_load_nontensor_step(info, kwargs, dtype):
    problem = Linear(info, dtype=dtype)
    opt = info.optim_cls(problem.params, **kwargs)
    for _ in range(3):
        opt.step(problem.backward)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = int(state["step"])
    opt.load_state_dict(saved)
    opt.step(problem.backward)
    assert all(state.get("step", 4) == 4 for state in opt.state.values())


@cases("differentiable")
def test_deepcopy_copies_all_public_attrs(info, kwargs):
    problem = Linear(info)
    opt = info.optim_cls(problem.params, **kwargs)
    for _ in range(3):
        opt.step(problem.backward)
    copied = copy.deepcopy(opt)
    public = [{name for name in vars(o) if not name.startswith("_")} for o in (opt, copied)]
    assert public[0] == public[1]


# ---- hooks ---------------------------------------------------------------------------------------


def mark_state(opt):
    opt.state["test"] = 1


def take_mark(opt, state_dict):
    state_dict["marked"] = state_dict["state"].pop("test", None) == 1
    return state_dict


@cases()
def test_state_dict_pre_hook(info, kwargs):
    opt = info.optim_cls([torch.rand(2, 3, requires_grad=True)], **kwargs)
    opt.register_state_dict_pre_hook(mark_state)
    assert opt.state_dict()["state"]["test"] == 1
    opt.step()


@cases()
def test_state_dict_post_hook(info, kwargs):
    opt = info.optim_cls([torch.rand(2, 3, requires_grad=True)], **kwargs)
    opt.register_state_dict_post_hook(take_mark)
    assert opt.state_dict()["marked"] is False


@cases()
def test_state_dict_pre_post_hook(info, kwargs):
    opt = info.optim_cls([torch.rand(2, 3, requires_grad=True)], **kwargs)
    opt.register_state_dict_pre_hook(mark_state)
    opt.register_state_dict_post_hook(take_mark)
    saved = opt.state_dict()
    assert saved["marked"] is True
    assert "test" not in saved["state"]


def set_lr(value):
    def hook(opt, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = value
        return state_dict

    return hook


@cases()
def test_load_state_dict_pre_hook_and_prepend(info, kwargs):
    opt = info.optim_cls([torch.rand(2, 3, requires_grad=True)], **kwargs)
    opt.register_load_state_dict_pre_hook(set_lr(0.002))
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["lr"] == 0.002
    opt.register_load_state_dict_pre_hook(set_lr(0.003), prepend=True)
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["lr"] == 0.002


@cases()
def test_load_state_dict_post_hook(info, kwargs):
    opt = info.optim_cls([torch.rand(2, 3, requires_grad=True)], **kwargs)
    opt.register_load_state_dict_post_hook(mark_state)
    opt.load_state_dict(opt.state_dict())
    assert opt.state["test"] == 1


@cases()
def test_load_state_dict_pre_post_hook(info, kwargs):
    opt = info.optim_cls([torch.rand(2, 3, requires_grad=True)], **kwargs)
    seen = []
    opt.register_load_state_dict_pre_hook(set_lr(0.003))
    opt.register_load_state_dict_post_hook(lambda opt: seen.append(opt.param_groups[0]["lr"]))
    opt.load_state_dict(opt.state_dict())
    assert seen == [0.003]


def check_step_hook(info, kwargs, when):
    param = torch.ones(2)
    param.grad = given(info, torch.ones(2))
    opt = info.optim_cls([param], **kwargs)
    seen = []
    handle = getattr(opt, f"register_step_{when}_hook")(lambda *args: seen.append(args))
    opt.step()
    opt.step(None)
    opt.step(closure=None)
    assert seen == [(opt, (opt,), {}), (opt, (opt, None), {}), (opt, (opt,), {"closure": None})]
    handle.remove()
    opt.step()
    assert len(seen) == 3


@cases()
def test_step_pre_hook(info, kwargs):
    check_step_hook(info, kwargs, "pre")


@cases()
def test_step_post_hook(info, kwargs):
    check_step_hook(info, kwargs, "post")


@cases()
def test_step_all_hooks(info, kwargs):
    seen = []
    params = [torch.ones(2)]
    opt, other = info.optim_cls(params, **kwargs), torch.optim.SGD(params)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
        opt.register_step_pre_hook(lambda *_: seen.append("pre")),
        opt.register_step_post_hook(lambda *_: seen.append("post")),
    ]
    opt.step()
    assert seen == ["global pre", "pre", "post", "global post"]
    other.step()
    assert seen[4:] == ["global pre", "global post"]
    for handle in handles:
        handle.remove()
    opt.step()
    assert len(seen) == 6


# ---- nothing is left out silently ----------------------------------------------------------------


def test_every_test_of_pytorchs_module_is_here_or_left_out_for_a_reason(request):
    assert len(RUN) == 32
    assert len(LEFT_OUT) == 12
    assert not RUN & LEFT_OUT.keys()
    assert all(name in globals() for name in RUN)
    if not request.config.option.keyword:
        items = [item for item in request.session.items if item.module is sys.modules[__name__]]
        of_classes = [BY_NAME[name].torch_tests for name in TORCH_CLASSES]
        assert len(items) == 1 + sum(of_classes) + SPARSE_ADAM_TESTS  # this one, too
