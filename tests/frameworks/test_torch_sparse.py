"""fastopt.torch takes sparse gradients on its kernels, with PyTorch's numbers, or by rows."""

import copy
import pickle
import warnings

import pytest
import torch
import torch_peers
from tables import ROWS, TORCH_CLASSES
from torch.nn import Parameter
from torch_files import through_a_file

import fastopt
import fastopt.torch

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
MODULES = (torch_peers, fastopt.torch)
BY_ROWS = [  # what PyTorch's own classes take, and update by rows
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "maximize": True, "foreach": True}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("Adagrad", {"lr": 0.1, "eps": 0.1, "maximize": True, "foreach": False}),
    ("SparseAdam", {"lr": 0.1}),
    ("SparseAdam", {"lr": torch.tensor(0.05, dtype=torch.float64), "eps": 0.1, "maximize": True}),
    ("SparseAdam", {"betas": (0.5, 0.75)}),
]
every_case = pytest.mark.parametrize(
    ("name", "kwargs"), BY_ROWS, ids=[f"{n}-{'-'.join(k)}" for n, k in BY_ROWS]
)
LAZILY = [(row.name, kwargs) for row in ROWS for kwargs in row.torch or ()]
SPARSE_CLASSES = ("SGD", "Adagrad", "SparseAdam")


def close(ours, theirs, ulps=16):
    """Equal to a few ulp of the largest element."""
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.dtype == theirs.dtype
    largest = theirs.abs().max().item()
    assert (ours - theirs).abs().max() <= ulps * torch.finfo(theirs.dtype).eps * largest


def same_state(ours, theirs, **options):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert type(value) is type(theirs[name])
        if name == "step":
            assert value == theirs[name]
        else:
            close(value, theirs[name], **options)


def make(module, name, params, kwargs=None, **options):
    return getattr(module, name)(params, **copy.deepcopy(kwargs or {}), **options)


def runs(opt):
    return [info["runs"] for info in opt.fastopt_info()]


def sparse(shape, generator, dtype=torch.float32, count=7):
    """A gradient of some rows, with duplicates, in any order."""
    rows = torch.randint(0, shape[0], (1, count), generator=generator)
    values = torch.randn(count, *shape[1:], generator=generator, dtype=torch.float64)
    return torch.sparse_coo_tensor(rows, values.to(dtype), shape, check_invariants=True)


class Pair:
    """Two equal tables, PyTorch's and fastopt's."""

    def __init__(self, name, kwargs, shape=(20, 6), dtype=torch.float32, **options):
        self.generator = torch.Generator().manual_seed(0)
        start = torch.randn(shape, generator=self.generator, dtype=dtype)
        self.params = [Parameter(start.clone()) for _ in MODULES]
        self.name, self.kwargs = name, kwargs
        self.opts = [make(m, name, [p], kwargs) for m, p in zip(MODULES, self.params, strict=True)]

    def give(self, grad):
        for param in self.params:
            param.grad = None if grad is None else grad.clone()

    def step(self, n=1, count=7):
        for _ in range(n):
            table = self.params[0]
            self.give(sparse(table.shape, self.generator, table.dtype, count))
            for opt in self.opts:
                opt.step()

    def check(self):
        theirs, ours = self.params
        close(ours, theirs)
        same_state(self.opts[1].state.get(ours, {}), self.opts[0].state.get(theirs, {}), ulps=64)
        assert runs(self.opts[1]) == ["fastopt"]


# ---- PyTorch's numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(20, 6), (9,), (30, 2, 3), (1, 5)], ids=str)
@every_case
def test_steps_equal_torchs_to_a_few_ulp(name, kwargs, shape, dtype):
    pair = Pair(name, kwargs, shape, dtype)
    for count in (1, 7, 0, 100, 3):
        pair.step(8, count)
        pair.check()
    pair.give(None)
    for opt in pair.opts:
        opt.step()
    pair.step(2)
    pair.check()


@pytest.mark.parametrize("layer", [torch.nn.Embedding, torch.nn.EmbeddingBag])
@every_case
def test_a_model_trains_as_with_torch(name, kwargs, layer):
    torch.manual_seed(0)
    nets = [layer(200, 8, sparse=True, padding_idx=3)]
    nets.append(copy.deepcopy(nets[0]))
    heads = [torch.nn.Linear(8, 3)]
    heads.append(copy.deepcopy(heads[0]))
    tables = [make(m, name, n.parameters(), kwargs) for m, n in zip(MODULES, nets, strict=True)]
    others = [m.AdamW(h.parameters(), lr=0.01) for m, h in zip(MODULES, heads, strict=True)]
    for _ in range(40):
        batch = torch.randint(0, 200, (16, 4)) ** 2 // 200  # of which some are frequent
        target = torch.randn(3)
        for net, head, opts in zip(nets, heads, zip(tables, others, strict=True), strict=True):
            (head(net(batch)) - target).square().mean().backward()
            assert net.weight.grad.is_sparse
            for opt in opts:
                opt.step()
                opt.zero_grad()
    net = nets[1]
    net(batch).sum().backward()
    assert runs(tables[1]) == ["fastopt"]
    close(net.weight, nets[0].weight, ulps=256)  # one lives on what the other has given
    close(heads[1].weight, heads[0].weight, ulps=256)


def test_both_kinds_of_gradients_in_one_optimizer():
    torch.manual_seed(0)
    nets = [torch.nn.Sequential(torch.nn.Embedding(50, 4, sparse=True), torch.nn.Linear(4, 2))]
    nets.append(copy.deepcopy(nets[0]))
    opts = [m.Adagrad(n.parameters(), lr=0.1) for m, n in zip(MODULES, nets, strict=True)]
    for step in range(30):
        batch = torch.randint(0, 50, (6,))
        for net, opt in zip(nets, opts, strict=True):
            opt.zero_grad(set_to_none=step % 2 == 0)
            net(batch).square().sum().backward()
            if step % 5 == 4:  # a step with another gradient of the table's
                net[0].weight.grad = None
            opt.step()
    assert runs(opts[1]) == ["fastopt"] * 3
    for ours, theirs in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        close(ours, theirs, ulps=256)


@every_case
def test_only_rows_with_a_gradient_are_written(name, kwargs):
    param = torch.randn(10, 3)
    before = param.clone()
    param.grad = torch.sparse_coo_tensor([[7, 2, 7]], torch.ones(3, 3), (10, 3))
    version = param._version
    make(fastopt.torch, name, [param], kwargs).step()
    changed = (param != before).any(1)
    assert changed.nonzero().ravel().tolist() == [2, 7]
    assert param._version == version + 1


def test_values_that_lie_otherwise_or_are_expanded():
    for name, kwargs in BY_ROWS:
        pair = Pair(name, kwargs)
        rows = torch.tensor([[4, 0, 4, 9]])
        for values in (
            torch.randn(6, 4).T,
            torch.randn(6).expand(4, 6),
            torch.randn(4, 12)[:, ::2],
        ):
            pair.give(None)
            for param in pair.params:
                param.grad = torch.sparse_coo_tensor(rows, values, (20, 6))
            for opt in pair.opts:
                opt.step()
            pair.check()


def test_values_where_a_whole_gradient_was():
    """At the same place, of the same shape: all rows, in another order."""
    for name in ("SGD", "Adagrad"):
        tables = [torch.zeros(4, 3) for _ in MODULES]
        opts = [make(m, name, [t], {"lr": 0.5}) for m, t in zip(MODULES, tables, strict=True)]
        memory = torch.arange(12.0).reshape(4, 3)
        for rows in (None, None, [3, 2, 1, 0], None, [1, 1, 1, 1], [0, 1, 2, 3], None):
            for table, opt in zip(tables, opts, strict=True):
                table.grad = memory
                if rows:
                    table.grad = torch.sparse_coo_tensor([rows], memory, (4, 3), is_coalesced=False)
                    assert table.grad._values().data_ptr() == memory.data_ptr()
                opt.step()
            close(tables[1], tables[0])
        assert runs(opts[1]) == ["fastopt"]


def test_an_empty_table():
    for name in SPARSE_CLASSES:
        for shape in ((0, 4), (4, 0)):
            pair = Pair(name, {}, shape)
            pair.give(
                torch.sparse_coo_tensor(
                    torch.empty(1, 0, dtype=torch.int64), torch.empty(0, *shape[1:]), shape
                )
            )
            for _ in range(2):
                for opt in pair.opts:
                    opt.step()
            theirs, ours = (o.state.get(p, {}) for o, p in zip(pair.opts, pair.params, strict=True))
            assert theirs.keys() == ours.keys()
            assert theirs.get("step") == ours.get("step")


# ---- rows="lazy" ---------------------------------------------------------------------------------


def step_rows_of_torchs(name, kwargs, param, state, grad):
    """Let PyTorch's own class update the rows of a gradient, as if there were no others."""
    grad = grad.coalesce()
    rows = grad.indices()[0]
    some = param[rows]
    some.grad = grad.values()
    opt = make(torch_peers, name, [some], kwargs)
    if state:
        opt.state[some] = {k: v[rows] if v.dim() else v.clone() for k, v in state.items()}
    opt.step()
    param[rows] = some
    for slot, value in opt.state[some].items():
        if value.dim() == 0:
            state[slot] = value
        else:
            starts = {
                "sum": kwargs.get("initial_accumulator_value", 0.0),
                "step_size": kwargs["lr"],
            }
            state.setdefault(slot, torch.full_like(param, starts.get(slot, 0.0)))[rows] = value


@pytest.mark.parametrize(("name", "kwargs"), LAZILY, ids=[f"{n}-{'-'.join(k)}" for n, k in LAZILY])
def test_lazy_rows_equal_torchs_dense_step_of_these_rows(name, kwargs):
    generator = torch.Generator().manual_seed(1)
    kwargs = {"lr": 0.01, **kwargs}
    theirs = torch.randn(12, 5, generator=generator)
    ours = theirs.clone()
    opt = make(fastopt.torch, name, [ours], kwargs, rows="lazy")
    state = {}
    for _ in range(40):
        ours.grad = sparse((12, 5), generator)
        step_rows_of_torchs(name, kwargs, theirs, state, ours.grad)
        opt.step()
    assert runs(opt) == ["fastopt"]
    close(ours, theirs, ulps=64)
    same_state(opt.state.get(ours, {}), state, ulps=64)


@pytest.mark.parametrize("name", TORCH_CLASSES)
def test_dense_gradients_are_taken_as_ever(name):
    tables = [torch.ones(5, 2), torch.ones(5, 2)]
    opts = [
        make(fastopt.torch, name, [t], rows=r) for t, r in zip(tables, (None, "lazy"), strict=True)
    ]
    for _ in range(3):
        for table, opt in zip(tables, opts, strict=True):
            table.grad = torch.arange(10.0).reshape(5, 2)
            opt.step()
    assert torch.equal(*tables)


def test_options_that_change_between_steps():
    """Decay is PyTorch's to refuse, and momentum its to do, unless rows= says otherwise."""
    pair = Pair("SGD", {"lr": 0.1})
    pair.step(3)
    assert runs(pair.opts[1]) == ["fastopt"]
    for opt in pair.opts:
        opt.param_groups[0]["momentum"] = 0.9
    with pytest.warns(fastopt.FallbackWarning, match="rows='lazy'"):
        pair.step(1)
    pair.step(3)
    assert runs(pair.opts[1]) == ["torch"]
    close(*pair.params)
    for opt in pair.opts:
        opt.param_groups[0]["momentum"] = 0.0
    pair.step(3)
    assert runs(pair.opts[1]) == ["fastopt"]
    pair.opts[1].param_groups[0]["weight_decay"] = 0.5
    assert pair.opts[1].fastopt_info()[0]["why"] == "its gradient's layout is torch.sparse_coo"
    before = pair.params[1].detach().clone()
    with pytest.raises(RuntimeError, match=r"add\(sparse, dense\) is not supported"):
        pair.opts[1].step()
    assert torch.equal(pair.params[1].detach(), before)


# ---- storage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam", "AdamW", "RMSprop"])
def test_master_weights_train_as_float32(name, dtype):
    generator = torch.Generator().manual_seed(0)
    narrow = torch.randn(12, 5, generator=generator).to(dtype)
    wide = narrow.float()
    opts = [
        make(fastopt.torch, name, [narrow], {"lr": 0.01}, rows="lazy", master_weights=True),
        make(fastopt.torch, name, [wide], {"lr": 0.01}, rows="lazy"),
    ]
    for _ in range(20):
        narrow.grad = sparse((12, 5), generator, dtype)
        wide.grad = narrow.grad.float()
        for opt in opts:
            opt.step()
    assert torch.equal(opts[0].decoded_state(narrow)["master"], wide)
    assert runs(opts[0]) == ["fastopt"]


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
def test_16_bits_equal_torchs_to_a_rounding(name):
    """Of one step: PyTorch rounds each product of it, and each duplicate."""
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(12, 5, generator=generator).bfloat16() for _ in range(1)] * 2
    tables = [t.clone() for t in tables]
    grad = sparse((12, 5), generator, torch.bfloat16).coalesce()
    for module, table in zip(MODULES, tables, strict=True):
        table.grad = grad.clone()
        opt = make(module, name, [table], {"lr": 0.1})
        opt.step()
    assert runs(opt) == ["fastopt"]
    assert ((tables[0] - tables[1]).abs() <= 0.02 * tables[0].abs() + 0.002).all()


def test_state_in_8_bits_needs_rows_that_have_scales_of_their_own():
    for width in (64, 128):
        table = torch.ones(10, width)
        opt = fastopt.torch.AdamW([table], lr=0.1, state_dtype="8bit", rows="lazy")
        table.grad = sparse((10, width), torch.Generator().manual_seed(0))
        opt.step()
        assert runs(opt) == ["fastopt"]
        touched = torch.zeros(10, dtype=torch.bool)
        touched[table.grad._indices()[0]] = True
        assert ((table != 1).any(1) == touched).all()
    table = torch.ones(10, 60)
    opt = fastopt.torch.AdamW([table], lr=0.1, state_dtype="8bit", rows="lazy")
    table.grad = sparse((10, 60), torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match=r"60 elements .* need a multiple of 64"):
        opt.step()
    assert (table == 1).all()
    assert not opt.state


# ---- checkpoints and copies ----------------------------------------------------------------------


@every_case
def test_checkpoints_cross_in_both_directions(name, kwargs):
    pair = Pair(name, kwargs)
    pair.step(5)
    for _ in range(2):
        files = [through_a_file(opt.state_dict()) for opt in pair.opts]
        pair.opts = [make(m, name, [p], kwargs) for m, p in zip(MODULES, pair.params, strict=True)]
        for opt, file in zip(pair.opts, reversed(files), strict=True):  # each other's
            opt.load_state_dict(file)
        pair.step(5)
        pair.check()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("name", ["SGD", "SparseAdam", "AdamW"])
def test_copies_go_on_alike_and_apart(name, copied):
    table = torch.ones(6, 3)
    opt = make(fastopt.torch, name, [table], rows="lazy")
    for _ in range(2):
        table.grad = torch.sparse_coo_tensor([[1, 3, 1]], torch.ones(3, 3), (6, 3))
        opt.step()
    other, twin = copied((opt, table))
    twin.grad = table.grad.clone()
    before = table.clone()
    other.step()
    assert torch.equal(table, before)
    opt.step()
    assert torch.equal(table, twin)
    assert runs(other) == ["fastopt"]


@pytest.mark.parametrize("step", [3, 2**24, 2**40])
def test_steps_of_sparse_adam_are_pythons_integers(step):
    pair = Pair("SparseAdam", {"lr": 0.1})
    pair.step(1)
    for opt, param in zip(pair.opts, pair.params, strict=True):
        opt.state[param]["step"] = step
    pair.step(2)
    pair.check()
    assert pair.opts[1].state[pair.params[1]]["step"] == step + 2
    assert pair.opts[1].decoded_state(pair.params[1])["step"] == step + 2


def test_a_step_of_another_kind_is_left_to_torch():
    pair = Pair("SparseAdam", {"lr": 0.1})
    pair.step(1)
    for opt, param in zip(pair.opts, pair.params, strict=True):
        opt.state[param]["step"] = 1.5
    with pytest.warns(fastopt.FallbackWarning, match="whole number"):
        pair.step(1)
    close(*pair.params)
    assert runs(pair.opts[1]) == ["torch"]


# ---- what PyTorch refuses, and what nobody does --------------------------------------------------


def fresh(name, grad, **options):
    table = torch.ones(grad.shape)
    table.grad = grad
    return table, make(fastopt.torch, name, [table], **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Adam", {}, "Adam does not support sparse gradients"),
        ("AdamW", {}, "does not support sparse gradients"),
        ("RMSprop", {}, "RMSprop does not support sparse gradients"),
        ("Adamax", {}, "Adamax does not support sparse gradients"),
        ("Adadelta", {}, "Adadelta does not support sparse gradients"),
        ("SGD", {"weight_decay": 0.1}, r"add\(sparse, dense\) is not supported"),
        ("SGD", {"fused": True}, "does not support sparse gradients"),
        ("Adagrad", {"weight_decay": 0.1}, "weight_decay option is not compatible with sparse"),
        ("Adagrad", {"fused": True}, "does not support sparse grad"),
    ],
)
@pytest.mark.filterwarnings("ignore::fastopt.FallbackWarning")
def test_what_torch_refuses(name, options, message):
    table, opt = fresh(name, torch.ones(4, 2).to_sparse(1), **options)
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert (table == 1).all()
    table, opt = fresh(name, torch.ones(4, 2).to_sparse(1), rows="lazy", **options)
    opt.step()
    assert runs(opt) == ["fastopt"]
    assert (table != 1).all()


def test_dense_gradients_of_sparse_adam():
    """PyTorch's error, no warning before it; beside it, nothing is updated."""
    tables = [torch.ones(4, 2), torch.ones(4, 2)]
    opt = fastopt.torch.SparseAdam(tables)
    tables[0].grad, tables[1].grad = torch.ones(4, 2).to_sparse(1), torch.ones(4, 2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
            opt.step()
        assert all((table == 1).all() for table in tables)
        assert not opt.state
        assert opt.fastopt_info()[1]["why"] == "its gradient is dense"
    tables[1].grad = None
    opt.step()
    assert opt.state[tables[0]]["step"] == 1
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
        fresh("SparseAdam", torch.ones(4, 2))[1].step()


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
def test_what_is_sparse_in_two_axes_is_torchs(name):
    pair = Pair(name, {"lr": 0.1})
    pair.give(torch.eye(20, 6).to_sparse())
    with pytest.warns(fastopt.FallbackWarning, match="sparse in 2 axes"):
        pair.opts[1].step()
    pair.opts[0].step()
    assert torch.equal(*(p.detach() for p in pair.params))
    assert runs(pair.opts[1]) == ["torch"]


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
def test_a_table_whose_rows_have_gaps_is_torchs(name):
    pair = Pair(name, {"lr": 0.1}, (20, 6))
    for param in pair.params:
        param.data = param.data.T.contiguous().T
    pair.give(sparse((20, 6), pair.generator))
    with pytest.warns(fastopt.FallbackWarning, match="not each one stretch of memory"):
        pair.opts[1].step()
    pair.opts[0].step()
    assert torch.equal(*(p.detach() for p in pair.params))


@pytest.mark.parametrize(
    ("name", "options"),
    [("Adam", {}), ("RMSprop", {}), ("Adamax", {}), ("AdamW", {}), ("SGD", {"momentum": 0.9})],
)
@pytest.mark.filterwarnings("ignore::fastopt.FallbackWarning")
def test_what_torch_would_do_otherwise_is_refused(name, options):
    table, opt = fresh(name, torch.ones(4, 2).to_sparse(), rows="lazy", **options)
    with pytest.raises(RuntimeError, match=r"parameter 0: .* not have rows='lazy', .* 2 axes"):
        opt.step()
    assert (table == 1).all()
    assert not opt.state


def test_a_row_that_there_is_not():
    """PyTorch looks where it makes a sparse tensor, and no more."""
    grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2), (4, 2))
    grad._indices()[0, 1] = 9
    table, opt = fresh("AdamW", grad, rows="lazy")
    with pytest.raises(RuntimeError, match=r"indices\[1\] is 9, not the number of a row: 0 to 3"):
        opt.step()
    assert (table == 1).all()
    assert not opt.state


def test_gradients_of_rows_beside_what_torch_updates():
    """PyTorch updates the complex parameter before the kernels update the table."""
    results = []
    for module in MODULES:
        table, odd = torch.ones(6, 3), torch.ones(2, dtype=torch.complex64)
        opt = module.SGD([table, odd], lr=0.1)
        for _ in range(3):
            table.grad = torch.sparse_coo_tensor([[1, 3, 1]], torch.ones(3, 3), (6, 3))
            odd.grad = torch.ones_like(odd)
            opt.step()
        results.append((table, odd))
    close(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])
    assert runs(opt) == ["fastopt", "torch"]


@pytest.mark.filterwarnings("ignore::fastopt.FallbackWarning")
def test_a_gradient_in_the_memory_of_state():
    """Which the kernels refuse: PyTorch's own update does what it does."""
    results = []
    for module in MODULES:
        tables = [torch.ones(4, 2), torch.full((4, 2), 2.0)]
        opt = module.SGD(tables, lr=0.5)
        tables[0].grad = torch.sparse_coo_tensor([[3, 2, 1, 0]], tables[1], (4, 2))
        tables[1].grad = torch.ones(4, 2)
        opt.step()
        results.append(tables)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bad_options():
    table = torch.ones(4, 2)
    for rows in ("eager", "Lazy", 1, True):
        with pytest.raises((TypeError, ValueError), match="rows"):
            fastopt.torch.Adam([table], rows=rows)
    opt = fastopt.torch.Adam([table], rows="lazy")
    with pytest.raises(ValueError, match=r"rows is an option of the whole optimizer"):
        opt.add_param_group({"params": [torch.ones(2)], "rows": "lazy"})
    assert len(opt.param_groups) == 1


# ---- around a step -------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_unscales_rows(fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    plain, scaled = (
        torch.ones(4, 2),
        torch.nn.Embedding.from_pretrained(torch.ones(4, 2), freeze=False, sparse=True),
    )
    batch = torch.tensor([1, 3, 1])
    opts = [
        fastopt.torch.Adam([plain], lr=0.1, rows="lazy"),
        fastopt.torch.Adam(scaled.parameters(), lr=0.1, rows="lazy", fused=fused),
    ]
    for bad in (False, True, False):
        factor = float("inf") if bad else 2.0
        opts[1].zero_grad()
        scaler.scale((scaled(batch) * factor).sum()).backward()
        scaler.step(opts[1])
        scaler.update()
        if not bad:
            plain.grad = torch.sparse_coo_tensor(batch[None], torch.full((3, 2), 2.0), (4, 2))
            opts[0].step()
            assert torch.equal(scaled.weight.grad.coalesce().values()[0], torch.full((2,), 4.0))
    assert torch.equal(plain, scaled.weight.detach())


def test_hooks_and_closures():
    table = torch.nn.Embedding.from_pretrained(torch.ones(4, 2), freeze=False, sparse=True)
    opt = fastopt.torch.SparseAdam(table.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        opt.zero_grad()
        loss = table(torch.tensor([2])).sum()
        loss.backward()
        return loss

    assert opt.step(closure) == 2
    assert seen == ["pre", "post"]
    assert abs(table.weight[2, 0] - 0.5) < 1e-6
    scheduler.step()
    assert opt.step(closure) < 1.1
    assert abs(table.weight[2, 0] - 0.25) < 1e-6


def test_a_step_says_nothing_and_tells_of_it_in_info():
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastopt.FallbackWarning)
        for name in SPARSE_CLASSES:
            pair = Pair(name, {"lr": 0.1})
            pair.step(2)
            (info,) = pair.opts[1].fastopt_info()
            assert (info["runs"], info["why"]) == ("fastopt", None)
            assert "fastopt updates 1 of 1 parameters" in repr(pair.opts[1])
            run = pair.opts[1]._run
            pair.step(3)
            assert pair.opts[1]._run is run  # which was not made anew
