"""DTensors, of which fully_shard and tensor parallelism are made, run on fastopt's kernels."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
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


def shards(mesh, tensor, placement=Shard(0)):  # noqa: B008
    return distribute_tensor(tensor.detach().clone(), mesh, [placement])


def parameters(mesh, seed=0):
    """Return tensors, and DTensors of the same values."""
    rng = torch.Generator().manual_seed(seed)
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


@pytest.mark.parametrize(
    ("why", "options"),
    [
        ("its type is DTensor, and its gradient is not placed as it is", {}),
        ("its type is DTensor, and its state's exp_avg is not placed as it is", {}),
        ("its type is DTensor, and its state is not to be stored", {"state_dtype": "bfloat16"}),
    ],
)
def test_what_else_is_cut_otherwise_is_pytorchs_or_refused(why, options, mesh):
    plain, sharded = (params[:2] for params in parameters(mesh))
    ours = fastopt.torch.Adam(sharded, lr=0.1, **options)
    if "state's" in why:
        give_gradients(mesh, plain, sharded, 0)
        ours.step()
        kept = ours.state[sharded[0]]
        kept["exp_avg"] = kept["exp_avg"].redistribute(mesh, [Replicate()])
    give_gradients(mesh, plain, sharded, 1)
    if "gradient" in why:
        for param in sharded:
            param.grad = param.grad.redistribute(mesh, [Replicate()])
    before = [param.detach().to_local().clone() for param in sharded]
    if options:
        with pytest.raises(RuntimeError, match="PyTorch's own update would have to run"):
            ours.step()
        assert all(
            torch.equal(p.detach().to_local(), q) for p, q in zip(sharded, before, strict=True)
        )
        return
    assert why in {info["why"] for info in ours.fastopt_info()}
    with pytest.warns(fastopt.FallbackWarning, match=why) as caught:
        ours.step()
    assert "placed as they are" in str(caught[0].message)
    assert "fused=True" in str(caught[0].message)
    assert not torch.equal(sharded[0].detach().to_local(), before[0])


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("fully_shard", name) for name in ("SGD", "AdamW", "NAdam", "Adagrad")),
        ("parallelize_module", "AdamW"),
    ],
)
def test_two_processes_train_and_save_as_with_pytorch(way, name, tmp_path):
    script = Path(__file__).with_name("torch_shards.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path, way, name],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            stdout, stderr = process.communicate(timeout=200)
            assert stdout == "equal\n", stderr
    finally:
        for process in processes:
            process.kill()
            process.communicate()
