"""fastopt.torch with rows="exact": sparse gradients give the bits that dense ones give."""

import copy
import gc
import io
import pickle

import pytest
import torch
from tables import ROWS
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt.torch
from fastopt.torch import _rows

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
CONFIGS = [(row.name, {"lr": 0.01, **kwargs}) for row in ROWS for kwargs in row.torch or ()]
every_config = pytest.mark.parametrize(
    ("name", "kwargs"), CONFIGS, ids=[f"{n}-{'-'.join(k)}" for n, k in CONFIGS]
)
OWING = ("AdamW", {"lr": 0.01, "weight_decay": 0.1})  # what changes every row in every step


class PassingMode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Twins:
    """A table with sparse gradients, and one whose gradients are the same, made dense."""

    def __init__(self, name, kwargs, layer=torch.nn.Embedding, n_rows=60, **options):
        self.random = torch.Generator().manual_seed(0)
        dtype = options.pop("dtype", torch.float32)
        self.sparse = layer(n_rows, 5, sparse=True, dtype=dtype)
        self.dense = copy.deepcopy(self.sparse)
        cls = getattr(fastopt.torch, name)
        self.opt = cls(self.sparse.parameters(), **copy.deepcopy(kwargs), **options, rows="exact")
        self.peer = cls(self.dense.parameters(), **copy.deepcopy(kwargs), **options)
        self.opts = self.opt, self.peer

    def draw(self):
        """Numbers of rows, some of which come often and most seldom; duplicates, too."""
        n_rows = len(self.dense.weight)
        return (torch.rand(3, 2, generator=self.random) ** 4 * n_rows).long()

    def step(self, n=1):
        for _ in range(n):
            batch = self.draw()
            weights = torch.randn(5, generator=self.random).to(self.dense.weight.dtype)
            seen = self.sparse(batch)
            assert torch.equal(seen, self.dense(batch))  # though most rows are behind
            self.sparse.zero_grad()
            (seen * weights).square().sum().backward()
            assert self.sparse.weight.grad.is_sparse
            if weights.dtype.itemsize == 2:  # PyTorch sums duplicates in it, the kernels do not
                self.sparse.weight.grad = self.sparse.weight.grad.coalesce()
            self.dense.weight.grad = self.sparse.weight.grad.to_dense()
            for opt in self.opts:
                opt.step()

    def is_behind(self):
        ours, theirs = self.sparse.weight, self.dense.weight
        a, b = self.opt.state.get(ours, {}), self.peer.state.get(theirs, {})
        assert a.keys() == b.keys()
        return not (torch.equal(ours, theirs) and all(torch.equal(a[k], b[k]) for k in a))

    def check(self):
        self.opt.refresh()
        assert not self.is_behind()
        assert [info["runs"] for info in self.opt.fastopt_info()] == ["fastopt"]


# ---- the bits of a dense run ---------------------------------------------------------------------


@pytest.mark.parametrize("layer", [torch.nn.Embedding, torch.nn.EmbeddingBag])
@every_config
def test_bits_equal_those_of_dense_gradients(name, kwargs, layer):
    twins = Twins(name, kwargs, layer)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.97) for opt in twins.opts]
    for _ in range(50):
        twins.step()
        for scheduler in schedulers:
            scheduler.step()
    owes = name not in ("SGD", "Adagrad") or {"momentum", "weight_decay"} & kwargs.keys()
    assert twins.is_behind() == bool(owes)
    twins.check()
    twins.step(3)
    twins.check()


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_more_steps_than_are_remembered(name):
    kwargs = OWING[1] if name == "AdamW" else {"lr": 0.01, "momentum": 0.9}
    twins = Twins(name, kwargs, n_rows=3000)
    twins.step(1300)
    twins.check()


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "master_weights": True},
        {"dtype": torch.float16, "master_weights": True, "state_dtype": "bfloat16"},
        {"dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 5},
        {"state_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_bits_in_every_storage(options):
    twins = Twins(*OWING, **options)
    twins.step(40)
    assert twins.is_behind()
    twins.check()


def test_rows_that_are_asked_for():
    twins = Twins(*OWING)
    twins.step(20)
    rows = [7, 59, 7, 31]
    weight = twins.sparse.weight
    assert not torch.equal(weight[rows], twins.dense.weight[rows])
    before, version = weight.detach().clone(), weight._version
    twins.opt.refresh(weight, torch.tensor(rows))
    assert torch.equal(weight[rows], twins.dense.weight[rows])
    assert weight._version > version
    others = [row for row in range(60) if row not in rows]
    assert torch.equal(weight[others], before[others])
    twins.check()
    version = weight._version
    twins.opt.refresh()
    assert weight._version == version  # there was nothing to do


# ---- what is saved, loaded and copied ------------------------------------------------------------


def test_a_state_dict_is_up_to_date_and_loading_starts_anew():
    twins = Twins(*OWING)
    for _ in range(2):
        twins.step(20)
        assert twins.is_behind()
        saved, theirs = twins.opt.state_dict(), twins.peer.state_dict()
        assert not twins.is_behind()
        for slot, value in theirs["state"][0].items():
            assert torch.equal(saved["state"][0][slot], value)
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        twins.step(5)
        for opt in twins.opts:  # parameters go on from where they are, also those that are behind
            file.seek(0)
            opt.load_state_dict(torch.load(file))
        assert not twins.is_behind()
        twins.step(5)
    twins.check()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_up_to_date_and_watch_their_own_layers(copied):
    twins = Twins(*OWING)
    twins.step(20)
    _, other = copied((twins.opt, twins))
    other.random = torch.Generator().manual_seed(1)
    assert not twins.is_behind()
    assert not other.is_behind()
    for each in other, twins:
        each.step(20)
        assert each.is_behind()
        each.check()


def test_decoded_state_is_up_to_date():
    twins = Twins(*OWING)
    twins.step(20)
    decoded = twins.opt.decoded_state(twins.sparse.weight)
    for slot, value in twins.peer.decoded_state(twins.dense.weight).items():
        assert torch.equal(decoded[slot], value)


# ---- what changes between steps ------------------------------------------------------------------


def test_options_that_change():
    twins = Twins("SGD", {"lr": 0.01, "momentum": 0.9})
    for changes in (
        {"momentum": 0.0},
        {"weight_decay": 0.1, "lr": 0.1},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.5, "nesterov": False, "dampening": 0.5, "maximize": True},
        {"momentum": 0.0, "weight_decay": 0.0},
    ):
        twins.step(15)
        for opt in twins.opts:
            opt.param_groups[0].update(changes)
        if "nesterov" not in changes:
            assert twins.opt.fastopt_info()[0]["runs"] == "fastopt"
    twins.step(3)
    twins.check()
    twins = Twins("Adam", {"lr": 0.01})
    for amsgrad in (True, False, True):
        twins.step(15)
        twins.opt.refresh()  # before state is touched
        for opt, table in zip(twins.opts, (twins.sparse, twins.dense), strict=True):
            opt.param_groups[0]["amsgrad"] = amsgrad
            state = opt.state[table.weight]
            state.setdefault("max_exp_avg_sq", torch.zeros_like(state["exp_avg_sq"]))
    twins.step(3)
    twins.check()


def test_dense_gradients_come_and_go():
    twins = Twins(*OWING)
    for step in range(12):
        twins.step(2)
        if step % 3 == 1:
            grad = torch.randn(60, 5, generator=twins.random)
            for opt, table in zip(twins.opts, (twins.sparse, twins.dense), strict=True):
                table.weight.grad = grad.clone()
                opt.step()
    twins.check()


def test_a_parameter_that_comes_later():
    twins = Twins(*OWING)
    late = [torch.ones(3), torch.ones(3)]
    for opt, param in zip(twins.opts, late, strict=True):
        opt.add_param_group({"params": [param], "lr": 0.5})
    twins.step(5)
    for param in late:
        param.grad = torch.ones(3)
    twins.step(5)
    for param in late:
        param.grad = None
    twins.step(5)
    assert torch.equal(*late)
    twins.opt.refresh()
    assert not twins.is_behind()


def test_memory_that_moves():
    twins = Twins(*OWING)
    weight, state = twins.sparse.weight, twins.opt.state
    moves = [
        lambda: twins.sparse.share_memory(),
        lambda: setattr(weight, "data", weight.detach().clone()),
        lambda: setattr(state[weight]["exp_avg"], "data", state[weight]["exp_avg"].clone()),
    ]
    for move in moves:
        twins.step(10)
        assert twins.is_behind()
        weight.grad = None  # which PyTorch would have to move, too
        move()
        twins.step(2)
    twins.check()


def test_state_that_is_dropped():
    twins = Twins(*OWING)
    twins.step(10)
    for opt in twins.opts:
        opt.state.clear()
    twins.step(10)
    twins.check()


# ---- layers --------------------------------------------------------------------------------------


def test_what_comes_by_name_is_not_seen_and_all_rows_catch_up():
    twins = Twins(*OWING)
    twins.step(10)
    rows = torch.tensor([1, 3])
    assert torch.equal(twins.sparse(input=rows), twins.dense(rows))
    assert not twins.is_behind()


def test_rows_that_there_are_not_are_torchs_to_refuse():
    twins = Twins(*OWING)
    twins.step(10)
    before = twins.sparse.weight.detach().clone()
    for bad in ([0, 60], [-1]):
        with pytest.raises(IndexError, match="index out of range in self"):
            twins.sparse(torch.tensor(bad))
    assert torch.equal(twins.sparse.weight, before)
    twins.sparse(torch.empty(0, dtype=torch.int64))
    twins.check()


def test_a_table_that_is_looked_up_twice_before_backward():
    """Where backward needs the table: rows that catch up are none that were looked up before."""
    twins = Twins("AdamW", OWING[1], torch.nn.EmbeddingBag)
    twins.step(10)
    weights = torch.ones(1, 2, requires_grad=True)
    results = []
    for table, opt in zip((twins.sparse, twins.dense), twins.opts, strict=True):
        table.mode, weights.grad = "sum", None
        opt.zero_grad()
        batches = torch.tensor([[1, 50]]), torch.tensor([[40, 1]])
        sum(table(b, per_sample_weights=weights).sum() for b in batches).backward()
        results.append(weights.grad)
    assert torch.equal(*results)


def test_other_layers_and_other_tables_are_left_alone():
    twins = Twins(*OWING)
    twins.step(10)
    before = twins.sparse.weight.detach().clone()
    torch.nn.Embedding(60, 5)(torch.arange(60))
    torch.nn.Linear(5, 2)(torch.ones(5))
    assert torch.equal(twins.sparse.weight, before)


def test_nothing_is_watched_any_more_when_optimizers_are_gone():
    twins = Twins(*OWING)
    twins.step(2)
    assert len(_rows._hooks) == 1
    table = twins.sparse
    del twins
    gc.collect()
    table(torch.tensor([0]))
    assert not _rows._hooks
    assert not _rows._exact


# ---- what is refused -----------------------------------------------------------------------------


def test_what_the_kernels_do_not_take_is_refused():
    twins = Twins(*OWING)
    twins.step(10)
    weight = twins.sparse.weight
    weight.grad = torch.eye(60, 5).to_sparse()
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"not have rows='exact', since .* sparse in 2 axes"):
        twins.opt.step()
    weight.grad = None
    twins.check()
    assert not torch.equal(weight, before)  # it has caught up, and no more


@pytest.mark.filterwarnings("ignore::fastopt.FallbackWarning")
def test_a_dense_step_of_torchs_follows_what_rows_have_missed():
    twins = Twins(*OWING)
    twins.step(10)
    grad = torch.randn(60, 5, generator=twins.random)
    twins.sparse.weight.grad = torch.complex(grad, -grad).conj().imag
    twins.dense.weight.grad = grad
    for opt in twins.opts:
        opt.step()
    assert twins.opt.fastopt_info()[0]["runs"] == "torch"
    torch.testing.assert_close(twins.sparse.weight, twins.dense.weight, atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::fastopt.FallbackWarning")
def test_a_step_in_a_dispatch_mode_follows_what_rows_have_missed():
    twins = Twins(*OWING)
    twins.step(10)
    grad = torch.randn(60, 5, generator=twins.random)
    for opt, table in zip(twins.opts, (twins.sparse, twins.dense), strict=True):
        table.weight.grad = grad.clone()
        with PassingMode():
            opt.step()
    torch.testing.assert_close(twins.sparse.weight, twins.dense.weight, atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::fastopt.FallbackWarning")
def test_a_gradient_in_the_memory_of_a_table_has_what_rows_have_missed():
    """The kernels refuse it, with all of the step."""
    twins = Twins(*OWING)
    others = [torch.ones(60, 5), torch.ones(60, 5)]
    for opt, other in zip(twins.opts, others, strict=True):
        opt.add_param_group({"params": [other], "lr": 0.5})
        other.grad = torch.ones(60, 5)
    twins.step(10)
    assert twins.is_behind()
    for opt, other, table in zip(twins.opts, others, (twins.sparse, twins.dense), strict=True):
        table.weight.grad, other.grad = None, table.weight.detach()
        opt.step()
    assert not twins.is_behind()
    assert torch.equal(*others)


def test_bad_calls_of_refresh():
    for rows in (None, "lazy", "exact"):
        table = torch.ones(4, 2)
        opt = fastopt.torch.AdamW([table], rows=rows)
        with pytest.raises(TypeError, match="rows: given, but not of which param"):
            opt.refresh(rows=[1])
        with pytest.raises(ValueError, match="param: expected one of this optimizer's parameters"):
            opt.refresh(torch.ones(4, 2))
        for bad in ([4], [-1], [0, 9, 1]):
            with pytest.raises(ValueError, match="rows: expected numbers of rows, from 0 to 3"):
                opt.refresh(table, bad)
        with pytest.raises(TypeError, match="rows: expected integers"):
            opt.refresh(table, [0.5])
        with pytest.raises(ValueError, match="rows: expected one axis"):
            opt.refresh(table, [[1]])
        opt.refresh(table, [])
        opt.refresh(table)
        assert (table == 1).all()


def test_sparse_adam_is_lazy():
    with pytest.raises(ValueError, match="SparseAdam updates rows alone; rows='exact' is for Adam"):
        fastopt.torch.SparseAdam([torch.ones(4, 2)], rows="exact")
