"""A training of DTensors in one of two processes: `RANK=0 python torch_shards.py FOLDER WAY NAME`.

It is PyTorch's training, by fastopt.torch and by torch.optim, and prints "equal" at its end.
"""

import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fastopt
import fastopt.torch

RANK, (FOLDER, WAY, NAME) = int(os.environ["RANK"]), sys.argv[1:]
WORLD, LR = 2, 0.05


class Training:
    def __init__(self, module, mesh):
        torch.manual_seed(0)
        hidden = 7 if WAY == "fully_shard" else 8  # fully_shard's parts differ in size then
        self.net = torch.nn.Sequential(
            torch.nn.Linear(5, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 3)
        )
        if WAY == "fully_shard":
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=mesh)
        else:
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, mesh, plan)
        self.opt = getattr(module, NAME)(self.net.parameters(), lr=LR)
        self.steps = 0

    def train(self, steps):
        for _ in range(steps):
            self.steps += 1
            own = RANK if WAY == "fully_shard" else 0  # of a batch, or of each layer
            rng = torch.Generator().manual_seed(WORLD * self.steps + own)
            self.opt.zero_grad()
            self.net(torch.randn(4, 5, generator=rng)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 2.0)
            self.opt.step()
        return self

    def state(self):
        return get_optimizer_state_dict(self.net, self.opt)

    def go_on_from(self, other, path):
        """Take parameters and state from another training's distributed checkpoint."""
        saved = {"net": other.net.state_dict(), "opt": other.state()}
        dcp.save(saved, checkpoint_id=path)
        # Which PyTorch fills in where it is, so it has to be there.
        mine = {"net": self.net.state_dict(), "opt": self.state()}
        dcp.load(mine, checkpoint_id=path)
        self.net.load_state_dict(mine["net"])
        set_optimizer_state_dict(self.net, self.opt, mine["opt"])
        self.steps = other.steps
        return self


def values(training):
    """Return all of each tensor, by name."""
    found = {}
    for name, param in training.net.named_parameters():
        found[name] = param
        found |= {f"{name}/{key}": t for key, t in training.opt.state[param].items()}
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach()
        for name, t in found.items()
    }


def same(a, b):
    a, b = values(a), values(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=name)


def main():
    warnings.simplefilter("error", fastopt.FallbackWarning)
    mesh = init_device_mesh("cpu", (WORLD,))
    ours, theirs = Training(fastopt.torch, mesh), Training(torch.optim, mesh)
    whole = sum(param.numel() for param in ours.net.parameters())
    parts = sum(p.to_local().numel() for p in ours.net.parameters() if isinstance(p, DTensor))
    assert 0 < parts < whole
    kept = ours.train(6).opt.fastopt_info()
    same(ours, theirs.train(6))
    assert {info["runs"] for info in kept} == {"fastopt"}
    if WAY == "fully_shard":  # a process has its own part of the state alone
        assert sum(info["nbytes"].get("exp_avg", 0) for info in kept) in (0, 4 * parts)
    crossed = Training(fastopt.torch, mesh).train(1).go_on_from(theirs, f"{FOLDER}/theirs")
    back = Training(torch.optim, mesh).train(1).go_on_from(ours, f"{FOLDER}/ours")
    ours.train(3)
    for training in (crossed, back, theirs):
        same(training.train(3), ours)
    assert {info["runs"] for info in crossed.opt.fastopt_info()} == {"fastopt"}


dist.init_process_group(
    "gloo",
    init_method=f"file://{FOLDER}/meet",
    rank=RANK,
    world_size=WORLD,
    timeout=timedelta(seconds=60),
)
main()
print("equal", flush=True)
# Not by way of the end of the interpreter, at which a thread of gloo may call std::terminate.
dist.barrier()
dist.destroy_process_group()
os._exit(0)
