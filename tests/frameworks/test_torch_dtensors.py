"""DTensors, of which fully_shard and tensor parallelism are made, run on fastopt's kernels."""

import inspect
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import two_processes
from tables import TORCH_CLASSES
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import fastopt
import fastopt.torch

every_class = pytest.mark.parametrize("name", TORCH_CLASSES)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's own
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


@pytest.fixture
def mesh(tmp_path):
    """One process, which is all that a choice of who updates needs."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shards(mesh, tensor):
    return distribute_tensor(tensor.detach().clone(), mesh, [Shard(0)])


def parameters(mesh):
    """Return tensors, and DTensors of the same values."""
    rng = torch.Generator().manual_seed(0)
    plain = [torch.randn(shape, generator=rng) for shape in ((4, 3), (7,), (0, 2))]
    return plain, [torch.nn.Parameter(shards(mesh, tensor)) for tensor in plain]


def give_gradients(mesh, plain, sharded, step):
    for tensor, param in zip(plain, sharded, strict=True):
        tensor.grad = torch.sin(tensor * (step + 1)) + 0.1
        param.grad = shards(mesh, tensor.grad)


def assert_same(plain, sharded, ours, theirs):
    for tensor, param in zip(plain, sharded, strict=True):
        assert torch.equal(param.detach().to_local(), tensor)
        assert ours.state[param].keys() == theirs.state[tensor].keys()
        for name, value in theirs.state[tensor].items():
            own = ours.state[param][name]
            assert isinstance(own, DTensor) == (value.dim() > 0), name
            assert torch.equal(own.to_local() if isinstance(own, DTensor) else own, value), name


@every_class
def test_each_element_has_the_bits_that_it_has_in_a_tensor(name, mesh):
    plain, sharded = parameters(mesh)
    ours, theirs = (getattr(fastopt.torch, name)(p, lr=0.1) for p in (sharded, plain))
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastopt.FallbackWarning)
        for step in range(5):
            give_gradients(mesh, plain, sharded, step)
            versions = [param._version for param in sharded]
            ours.step()
            theirs.step()
            assert all(p._version > v for p, v in zip(sharded, versions, strict=True))
    assert_same(plain, sharded, ours, theirs)
    assert {info["runs"] for info in ours.fastopt_info()} == {"fastopt"}
    told = [[info["nbytes"] for info in opt.fastopt_info()] for opt in (ours, theirs)]
    assert told[0] == told[1]


def test_the_part_may_become_another_one_between_steps(mesh):
    plain, sharded = parameters(mesh)
    ours, theirs = (fastopt.torch.Adam(p, lr=0.1) for p in (sharded, plain))
    for step in range(6):
        give_gradients(mesh, plain, sharded, step)
        if step == 2:  # as what moves or casts a sharded module does
            for param in sharded:
                param._local_tensor = param._local_tensor.clone()
        if step == 4:
            ours.load_state_dict(ours.state_dict())
            for param in sharded:
                kept = ours.state[param]["exp_avg"]
                kept._local_tensor = kept._local_tensor.clone()
        ours.step()
        theirs.step()
        assert_same(plain, sharded, ours, theirs)


def placed_otherwise(tensor):
    return tensor.redistribute(placements=[Replicate()])


@pytest.mark.parametrize("what", ["its gradient", "its state's exp_avg"])
def test_what_is_placed_otherwise_is_pytorchs(what, mesh):
    plain, sharded = (params[:2] for params in parameters(mesh))
    ours = fastopt.torch.Adam(sharded, lr=0.1)
    if "state" in what:
        give_gradients(mesh, plain, sharded, 0)
        ours.step()
        kept = ours.state[sharded[0]]
        kept["exp_avg"] = placed_otherwise(kept["exp_avg"])
    give_gradients(mesh, plain, sharded, 1)
    if "gradient" in what:
        for param in sharded:
            param.grad = placed_otherwise(param.grad)
    before = sharded[0].detach().to_local().clone()
    why = f"its type is DTensor, and {what} is not placed as it is"
    assert why in {info["why"] for info in ours.fastopt_info()}
    with pytest.warns(fastopt.FallbackWarning, match=why) as caught:
        ours.step()
    assert "placed as they are" in str(caught[0].message)
    assert not torch.equal(sharded[0].detach().to_local(), before)


@every_class
def test_the_warning_names_what_is_fast_and_accepted(name, mesh):
    plain, sharded = (params[:2] for params in parameters(mesh))
    ours = getattr(fastopt.torch, name)(sharded, lr=0.1)
    give_gradients(mesh, plain, sharded, 0)
    for param in sharded:
        param.grad = placed_otherwise(param.grad)
    before = [param.detach().to_local().clone() for param in sharded]
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastopt.FallbackWarning)
        with pytest.raises(fastopt.FallbackWarning) as raised:
            ours.step()
    for param, value in zip(sharded, before, strict=True):
        assert torch.equal(param.detach().to_local(), value)
    namesake = getattr(torch.optim, name)
    has_fused = "fused" in inspect.signature(namesake).parameters
    fast = "fused" if has_fused and name not in ("SGD", "Adagrad") else "foreach"
    assert f"{fast}=True" in str(raised.value)
    namesake(sharded, **{fast: True})


def test_state_that_pytorch_does_not_store_so_is_refused(mesh):
    plain, sharded = parameters(mesh)
    ours = fastopt.torch.Adam(sharded, lr=0.1, state_dtype="bfloat16")
    give_gradients(mesh, plain, sharded, 0)
    why = "its type is DTensor, and its state is not to be stored as PyTorch does it"
    with pytest.raises(RuntimeError, match=f"PyTorch's own update would have to run.*{why}"):
        ours.step()
    for tensor, param in zip(plain, sharded, strict=True):
        assert torch.equal(param.detach().to_local(), tensor)


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("fully_shard", name) for name in ("SGD", "AdamW", "NAdam", "Adagrad")),
        ("parallelize_module", "AdamW"),
    ],
)
def test_two_processes_train_and_save_as_with_pytorch(way, name, tmp_path):
    script = Path(__file__).with_name("torch_shards.py")
    two_processes(script, tmp_path, way, name, timeout=200)
