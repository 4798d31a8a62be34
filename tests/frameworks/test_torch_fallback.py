"""fastopt.torch tells, once and beforehand, where PyTorch's own update runs, and changes none."""

import copy
import gc
import inspect
import re
import timeit
import warnings

import pytest
import torch
import torch_peers
from tables import TORCH_CLASSES
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
import fastopt.torch
from fastopt import FallbackWarning, _tensors

MODULES = (torch_peers, fastopt.torch)
OPTIONS = {"SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}}
every_class = pytest.mark.parametrize("name", TORCH_CLASSES)
may_fall_back = pytest.mark.filterwarnings("ignore::fastopt.FallbackWarning")


def has_fused(name):
    return "fused" in inspect.signature(getattr(torch.optim, name)).parameters


def make(module, name, params, **options):
    if "weight_decay" not in inspect.signature(getattr(torch.optim, name)).parameters:
        options.pop("weight_decay", None)  # Rprop has none
    return getattr(module, name)(params, **{**OPTIONS.get(name, {"lr": 0.1}), **options})


# ---- trainings that are PyTorch's ----------------------------------------------------------------


class PassingMode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Training:
    """A small network and an optimizer; `step` trains it once."""

    why = ""
    compiled = False

    def __init__(self, module, name, **options):
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        )
        self.x = torch.randn(5, 4)
        self.prepare()
        self.opt = make(module, name, self.net.parameters(), **options)
        self.update = self.opt.step

    def prepare(self):
        pass

    def step(self):
        self.opt.zero_grad()
        self.net(self.x).square().sum().backward()
        self.update()

    def values(self):
        states = [self.opt.state.get(p, {}) for p in self.net.parameters()]
        tensors = [*self.net.parameters(), *(t for state in states for t in state.values())]
        tensors = [getattr(t, "_local_tensor", t).detach().clone() for t in tensors]
        return [t.as_subclass(torch.Tensor) for t in tensors]


class InBfloat16(Training):
    def prepare(self):
        self.net.to(torch.bfloat16)
        self.x = self.x.to(torch.bfloat16)


class InComplex(Training):
    why = "its dtype is torch.complex64"

    def prepare(self):
        self.net = torch.nn.Linear(4, 3, dtype=torch.complex64)
        self.x = self.x.to(torch.complex64)

    def step(self):
        self.opt.zero_grad()
        self.net(self.x).abs().square().sum().backward()
        self.update()


class OfASubclass(Training):
    why = "its type is Subclass"

    def prepare(self):
        class Subclass(torch.Tensor):
            pass

        for layer in self.net[0], self.net[2]:
            layer.weight = Parameter(layer.weight.detach().as_subclass(Subclass))


class WithGaps(Training):
    why = "it: the array is not dense"

    def prepare(self):
        for layer in self.net[0], self.net[2]:
            doubled = layer.weight.detach().repeat_interleave(2, 1)
            layer.weight = Parameter(doubled[:, ::2])


class InADispatchMode(Training):
    why = "a dispatch mode"

    def step(self):
        self.opt.zero_grad()
        self.net(self.x).square().sum().backward()
        with PassingMode():
            self.update()


class InBfloat16InAMode(InADispatchMode, InBfloat16):
    pass


class Compiled(Training):
    why = "the step is inside of torch.compile"
    compiled = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.update = torch.compile(self.opt.step, backend="eager")


class CompiledAsAWhole(Compiled):
    def __init__(self, *args, **options):
        Training.__init__(self, *args, **options)
        self.step = torch.compile(super().step, backend="eager")


class CompiledWithAClosure(Compiled):
    def step(self):
        def closure():
            self.opt.zero_grad()
            loss = self.net(self.x).square().sum()
            loss.backward()
            return loss

        assert self.update(closure) > 0


TRAININGS = (
    InBfloat16InAMode, InComplex, OfASubclass, WithGaps, InADispatchMode,
    Compiled, CompiledAsAWhole, CompiledWithAClosure,
)  # fmt: skip
every_training = pytest.mark.parametrize("kind", TRAININGS, ids=lambda kind: kind.__name__)


def train(training, steps):
    """Return the FallbackWarnings of some steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            training.step()
    return [w for w in caught if issubclass(w.category, FallbackWarning)]


def check(kind, name):
    theirs, ours = kind(torch_peers, name), kind(fastopt.torch, name)
    before = ours.values()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", FallbackWarning)
        for _ in range(2):
            with pytest.raises(FallbackWarning, match=r"^fastopt\.torch\." + name):
                ours.step()
    after = ours.values()
    assert len(after) == len(before)
    for value, old in zip(after, before, strict=True):
        assert torch.equal(value, old)
    (warning,) = train(ours, 4)
    text = str(warning.message)
    assert warning.filename == __file__
    assert kind.why in text
    assert f"torch.optim.{name}" in text
    assert "\n" not in text
    assert train(theirs, 4) == []
    for value, peer in zip(ours.values(), theirs.values(), strict=True):
        assert torch.equal(value, peer)
    few = sum(info["runs"] == "fastopt" for info in ours.opt.fastopt_info())
    assert few == (2 if kind in (OfASubclass, WithGaps) else 0)
    whys = [info["why"] for info in ours.opt.fastopt_info() if info["runs"] == "torch"]
    assert all(why.startswith(kind.why) for why in whys)
    return text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, while it compiles
@every_class
@every_training
def test_a_training_of_pytorchs_warns_once_and_is_pytorchs(kind, name):
    if kind.compiled:
        torch._dynamo.reset()
    if kind in (OfASubclass, WithGaps):
        theirs, ours = kind(torch_peers, name), kind(fastopt.torch, name)
        (warning,) = train(ours, 3)
        train(theirs, 3)
        assert kind.why in str(warning.message)
        for value, peer in zip(ours.values(), theirs.values(), strict=True):
            assert torch.allclose(value, peer, rtol=1e-5, atol=1e-6)
    else:
        check(kind, name)


@every_class
def test_a_training_in_bfloat16_does_not_warn_and_runs_on_the_kernels(name):
    ours = InBfloat16(fastopt.torch, name)
    assert train(ours, 3) == []
    assert {info["runs"] for info in ours.opt.fastopt_info()} == {"fastopt"}
    assert "67 of 67 elements" in repr(ours.opt)


@every_class
def test_the_warning_names_what_is_fast_in_16_bits(name):
    (warning,) = train(InBfloat16InAMode(fastopt.torch, name), 1)
    text = str(warning.message)
    if name == "SGD":
        assert "foreach=True (not fused=True, which in 16 bits writes only the tail" in text
    elif not has_fused(name):
        assert "foreach=True (it has no fused=True)" in text
    else:
        assert "fused=True" in text
    assert "parameter 0" in text
    assert "67 of 67 elements" in text


def test_the_warning_is_true_of_sgds_fused_step_in_16_bits():
    """What it warns of: most of an array is left as it was."""
    for dtype, changed in ((torch.float32, 100), (torch.bfloat16, 100 % 32)):
        param = torch.zeros(100, dtype=dtype)
        param.grad = torch.ones_like(param)
        torch.optim.SGD([param], lr=1.0, fused=True).step()
        assert int((param != 0).sum()) == changed


def test_what_is_fast_by_the_warning_does_not_warn_and_is_torchs():
    theirs = InBfloat16InAMode(torch.optim, "AdamW", fused=True)
    ours = InBfloat16InAMode(fastopt.torch, "AdamW", fused=True)
    assert len(train(ours, 3)) == 1
    train(theirs, 3)
    for value, peer in zip(ours.values(), theirs.values(), strict=True):
        assert torch.equal(value, peer)


# ---- how much is little --------------------------------------------------------------------------


@pytest.mark.parametrize(("plain", "odd", "warns"), [(5, 4, 0), (5, 5, 0), (5, 6, 1), (0, 1, 1)])
def test_less_than_half_of_the_elements_is_little(plain, odd, warns):
    params = [torch.ones(plain), torch.ones(odd, dtype=torch.complex64)]
    opt = fastopt.torch.Adam(params)
    for param in params:
        param.grad = torch.ones_like(param)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            opt.step()
    assert len(caught) == warns


def test_only_parameters_with_a_gradient_count():
    frozen = torch.ones(100, dtype=torch.complex64)
    params = [torch.ones(4), frozen, torch.ones(3, dtype=torch.complex64)]
    opt = fastopt.torch.Adam(params)
    for param in params[::2]:
        param.grad = torch.ones_like(param)
    assert opt.step() is None  # warnings are errors here
    params[0].grad = None
    with pytest.warns(FallbackWarning, match="3 of 3 elements"):
        opt.step()
    frozen.grad = torch.ones_like(frozen)
    opt.step()


def test_a_step_without_gradients_or_elements_does_not_warn():
    param = torch.ones(3, dtype=torch.complex64)
    empty = torch.ones(0, dtype=torch.complex64)
    empty.grad = empty.clone()
    opt = fastopt.torch.SGD([param, empty])
    opt.step()
    with PassingMode():
        opt.step()


def test_every_optimizer_warns_for_itself():
    trainings = [InComplex(fastopt.torch, "Adam") for _ in range(2)]
    assert [len(train(t, 2)) for t in trainings] == [1, 1]


@pytest.mark.parametrize("cause", ["gradient", "counter"])
def test_what_the_kernels_refuse_is_told_before_anything_is_written(cause):
    """Beside a small parameter that is PyTorch's in any case, and comes first."""
    small = torch.ones(2, dtype=torch.complex64)
    params = [small, torch.ones(4), torch.full((4,), 2.0)]
    opt = fastopt.torch.Adam(params)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    before = [p.clone() for p in params]
    if cause == "gradient":
        params[1].grad = params[2]
    else:
        opt.state[params[1]]["step"] = opt.state[params[2]]["step"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        with pytest.raises(FallbackWarning, match=r"10 of 10 elements.*the kernels refuse"):
            opt.step()
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)


def test_a_warning_that_is_an_error_leaves_no_state():
    params = [torch.ones(2), torch.ones(4, dtype=torch.complex64)]
    opt = fastopt.torch.Adam(params)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(FallbackWarning):
        opt.step()
    assert not opt.state
    with pytest.warns(FallbackWarning):
        opt.step()
    assert all(state["step"] == 1 for state in opt.state.values())


# ---- shared memory -------------------------------------------------------------------------------


def base():
    return torch.arange(1.0, 13.0, dtype=torch.float64)


SHARED = {
    "a view with gaps": lambda b: [b[:6], b[::2]],
    "gaps first": lambda b: [b[::2], b[:6]],
    "views of views": lambda b: [b.view(3, 4)[0], b[2:6], b[5:9], b[8::3]],
    "two views": lambda b: [b[:8], b[4:]],
    "another dtype": lambda b: [b[:4], torch.view_as_complex(b.view(6, 2))],
    "a subclass": lambda b: [b[:4], b[2:].as_subclass(Kind)],
    "negatives": lambda b: [b[:4], torch._neg_view(b[2:])],
    "conjugates": lambda b: [b[:4], torch.view_as_complex(b.view(6, 2)).conj()],
}


class Kind(torch.Tensor):
    pass


@may_fall_back
@pytest.mark.parametrize("groups", [1, 2], ids=["one group", "groups"])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("how", SHARED)
@every_class
def test_all_that_share_memory_run_pytorchs_update_in_its_order(name, how, foreach, groups):
    results, refused = [], []
    for module in MODULES:
        params = [*SHARED[how](base()), torch.ones(3)]
        first, second = params[::groups], params[1::2] if groups == 2 else []
        given = [{"params": g} for g in (first, second) if g]
        opt = make(module, name, given, lr=0.5, weight_decay=0.5, foreach=foreach)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p.detach(), (-3.0) ** i + step)
            try:
                opt.step()
            except RuntimeError:
                refused.append(module)
                break
        results.append([p.detach().clone() for p in params])
    assert refused in ([], list(MODULES))
    if refused:  # as PyTorch does negatives and conjugates in some of its implementations
        assert how in ("negatives", "conjugates")
        return
    for p, q in zip(*(r[:-1] for r in results), strict=True):
        assert torch.equal(p.resolve_neg().resolve_conj(), q.resolve_neg().resolve_conj())
    assert torch.allclose(results[0][-1], results[1][-1], rtol=1e-6)
    runs = {id(p): i["runs"] for p, i in zip(all_params(opt), opt.fastopt_info(), strict=True)}
    odd = foreach and how in ("another dtype", "conjugates")  # with all of their group
    assert [runs[id(p)] for p in params[:-1]] == ["torch"] * (len(params) - 1)
    assert odd or runs[id(params[-1])] == "fastopt"


def all_params(opt):
    return [p for group in opt.param_groups for p in group["params"]]


@may_fall_back
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("odd", ["sparse", "negatives", "a subclass", "none"])
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_a_gradient_that_is_unfit_in_one_step_only(name, odd):
    results = []
    for module in MODULES:
        whole = base()
        params = [whole.view(3, 4), whole.view(3, 4), torch.ones(3)]
        opt = make(module, name, params, weight_decay=0.0)
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, (-3.0) ** i)
            if step % 2:
                full = params[1].grad
                params[1].grad = {
                    "sparse": lambda g: torch.sparse_coo_tensor([[0, 2]], g[:2], g.shape),
                    "negatives": lambda g: torch.complex(g, g).conj().imag,
                    "a subclass": lambda g: g.as_subclass(Kind),
                    "none": lambda g: None,
                }[odd](full)
            opt.step()
        results.append(params)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][2], results[1][2], rtol=1e-6)
    assert [info["runs"] for info in opt.fastopt_info()] == ["torch", "torch", "fastopt"]
    assert len(opt._run.params) == 1


@may_fall_back
@every_class
def test_a_parameter_that_moves_onto_another_or_away(name):
    results = []
    for module in MODULES:
        whole = base()
        params = [whole[:6], torch.ones(12, dtype=torch.float64)[::2], torch.ones(3)]
        opt = make(module, name, params, lr=0.5, weight_decay=0.5)
        for step in range(6):
            if step == 2:
                params[1].data = whole[::2]
            if step == 4:
                params[1].data = whole[::2].repeat_interleave(2)[::2]
            for i, p in enumerate(params):
                p.grad = torch.full_like(p.detach(), (-3.0) ** i + step)
            opt.step()
            if module is fastopt.torch:
                first = "torch" if step in (2, 3) else "fastopt"
                runs = [info["runs"] for info in opt.fastopt_info()]
                assert runs == [first, "torch", "fastopt"]
                assert len(opt._run.params) == runs.count("fastopt")
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert torch.allclose(p, q, rtol=1e-6)


def test_info_agrees_where_a_frozen_parameter_moves_onto_another():
    """Only one of the two is updated, and the step does not look at the other."""
    params = [torch.ones(3), torch.ones(3)]
    opt = fastopt.torch.SGD(params, lr=0.1)
    params[0].grad = torch.ones(3)
    for _ in range(3):
        opt.step()
        assert opt.fastopt_info()[0]["runs"] == "fastopt"
        assert len(opt._run.params) == 1
        params[1].data = params[0].data
    params[1].grad = torch.ones(3)
    assert [info["runs"] for info in opt.fastopt_info()] == ["torch", "torch"]
    with pytest.warns(FallbackWarning, match="shares memory"):
        opt.step()


@may_fall_back
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("which", ["its gradient is the other", "it is the other's gradient"])
@every_class
def test_a_gradient_that_is_a_parameter_of_pytorchs(name, which, order):
    """The order of updates matters, so all of the step is PyTorch's."""
    results = []
    for module in MODULES:
        fit, odd = torch.full((4,), 0.5), torch.full((8,), 0.25)[::2]
        opt = make(module, name, [fit, odd][:: 1 - 2 * order], weight_decay=0.5)
        for step in range(4):
            fit.grad, odd.grad = torch.ones(4), torch.full((4,), -2.0)
            if step % 2:
                if which.startswith("its"):
                    fit.grad = odd
                else:
                    odd.grad = fit
            opt.step()
            if step == 1 and module is fastopt.torch:
                assert [info["runs"] for info in opt.fastopt_info()] == ["torch", "torch"]
        results.append((fit, odd))
    for p, q in zip(*results, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


@may_fall_back
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_parts_of_wrappers_and_sparse_parameters_share_memory_too():
    values = torch.ones(2, 2)
    sparse = torch.sparse_coo_tensor([[0, 2]], values, (3, 2), check_invariants=True)
    rows = torch.sparse_csr_tensor([0, 1, 2], [0, 1], values[0], (2, 2), check_invariants=True)
    for odd in sparse, rows:
        opt = fastopt.torch.SGD([values, odd, torch.ones(2)], lr=0.1)
        assert [info["runs"] for info in opt.fastopt_info()] == ["torch", "torch", "fastopt"]


# ---- what is not trained -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parameters_without_a_gradient_are_not_looked_at(dtype):
    trained = [torch.ones(4) for _ in range(3)]
    frozen = [torch.ones(4, dtype=dtype) for _ in range(300)]
    for param in trained:
        param.grad = torch.ones(4)
    opt = fastopt.torch.AdamW([*frozen, *trained])
    opt.step()
    assert (len(opt._run.params), len(opt._run.others)) == (3, 0)
    peer = torch.optim.AdamW([*frozen, *trained], fused=True)
    peer.step()
    ours, theirs = (min(timeit.repeat(o.step, number=10, repeat=20)) for o in (opt, peer))
    assert ours < theirs
    frozen[7].grad = torch.ones(4, dtype=dtype)
    opt.step()
    assert opt.state[frozen[7]]["step"] == 1


# ---- what tells ----------------------------------------------------------------------------------


def test_repr_tells_what_ran_once_that_is_known():
    params = [torch.ones(4), torch.ones(2, dtype=torch.complex64), torch.ones(9)]
    peer, opt = (module.Adam(params) for module in MODULES)
    assert repr(opt) == repr(peer)
    for param in params[:2]:
        param.grad = torch.ones_like(param)
    opt.step()
    line = "fastopt updates 1 of 2 parameters, 4 of 6 elements\n"
    assert repr(opt) == repr(peer)[:-1] + line + ")"
    params[0].grad = None
    with pytest.warns(FallbackWarning), PassingMode():
        opt.step()
    assert "fastopt updates 0 of 1 parameters, 0 of 2 elements\n" in repr(opt)
    assert repr(copy.deepcopy(opt)) == repr(peer)


@may_fall_back
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, while it compiles
def test_info_is_right_inside_of_compile_and_of_modes():
    torch._dynamo.reset()
    param = torch.ones(3)
    param.grad = torch.ones(3)
    opt = fastopt.torch.SGD([param], lr=0.1)

    @torch.compile(backend="eager")
    def inside():
        return opt.fastopt_info()

    assert inside()[0]["why"] == "the step is inside of torch.compile"
    with PassingMode():
        assert opt.fastopt_info()[0]["why"].startswith("a dispatch mode")
    assert opt.fastopt_info()[0]["runs"] == "fastopt"
    compiled = torch.compile(opt.step, backend="eager")
    for step, runs in ((compiled, "torch"), (opt.step, "fastopt"), (compiled, "torch")):
        step()
        assert opt.fastopt_info()[0]["runs"] == runs
    assert torch.allclose(param, torch.full((3,), 0.7))


@may_fall_back
def test_fake_tensors_are_not_touched():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        params = [torch.ones(3), torch.ones(4)]
        opt = fastopt.torch.AdamW(params)
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
        assert [info["runs"] for info in opt.fastopt_info()] == ["torch", "torch"]


@may_fall_back
@pytest.mark.parametrize("kind", ["sparse", "meta"])
@every_class
def test_sparse_and_meta_tensors_are_named_in_a_line(name, kind):
    odd = torch.ones(3, 2)
    odd = odd.to_sparse() if kind == "sparse" else odd.to("meta")
    if kind == "sparse" and name == "Adagrad":
        with pytest.raises(RuntimeError, match="only supported by strided tensors"):
            make(fastopt.torch, name, [odd])
        return
    opt = make(fastopt.torch, name, [odd, torch.ones(3)])
    why = opt.fastopt_info()[0]["why"]
    assert re.search(kind, why)
    assert "\n" not in why
    if kind == "sparse":
        param = torch.ones(3, 2)
        param.grad = odd
        why = make(fastopt.torch, name, [param]).fastopt_info()[0]["why"]
        assert why == "its gradient's layout is torch.sparse_coo"


def test_a_watcher_in_a_cycle_is_freed_quietly():
    """An error in a destructor would be an error of this test."""
    tensor = torch.ones(3)
    tensor.watcher = _tensors.Tensors(torch.Tensor, [tensor])
    del tensor
    gc.collect()
