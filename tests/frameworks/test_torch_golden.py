"""Recorded trajectories of PyTorch, replayed through fastopt.torch."""

from pathlib import Path

import numpy as np
import pytest
import recorded
import torch
from tables import BY_NAME, TORCH_CLASSES

import fastopt.torch

ENTRIES = [entry for entry in recorded.ENTRIES if entry["library"] == "torch"]
SCHEDULES = [entry for entry in ENTRIES if entry["class"].startswith("lr:")]
REPLAYED = [entry for entry in ENTRIES if entry["class"] in TORCH_CLASSES]


class Recording(dict):
    """A recording's arrays by name."""

    def __init__(self, entry):
        with np.load(recorded.GOLDEN / entry["file"]) as file:
            super().__init__(file)

    @property
    def files(self):
        return list(self)


class Replay(recorded.Replay):
    """Runs fastopt.torch over a recorded trajectory and keeps the largest errors."""

    def __init__(self, entry):
        self.entry = entry
        self.file = Recording(entry)
        self.n = len(entry["shapes"])
        self.tensors = [torch.from_numpy(self.file[f"p0_{i}"].copy()) for i in range(self.n)]
        self.params = [tensor.numpy() for tensor in self.tensors]  # views
        kwargs = dict(entry["kwargs"])
        self.torch = getattr(fastopt.torch, entry["class"])(
            recorded.groups(entry, self.tensors), **kwargs
        )
        self.scheduler = None
        if "sched" in entry:
            name, options = entry["sched"]
            self.scheduler = getattr(torch.optim.lr_scheduler, name)(self.torch, **options)
        self.opt = self  # what recorded.Replay steps and looks at
        self.bias_error = recorded.bias_error(entry)
        self.error, self.finite_alike = 0.0, True

    @property
    def param_groups(self):
        return self.torch.param_groups

    @property
    def state(self):
        return [
            {name: np.asarray(value) for name, value in self.torch.state.get(t, {}).items()}
            for t in self.tensors
        ]

    @property
    def largest_state(self):
        """Magnitudes of state so far: none, for state that was not there yet."""
        return self._largest

    @largest_state.setter
    def largest_state(self, start):
        self._largest = [LikeState(seen) for seen in start]

    def step(self, grads, loss_scale):
        assert loss_scale == 1.0
        for tensor, grad in zip(self.tensors, grads, strict=True):
            tensor.grad = None if grad is None else torch.from_numpy(grad.copy())
        self.torch.step()
        assert {info["runs"] for info in self.torch.fastopt_info()} == {"fastopt"}

    def prepare(self, t):
        if self.scheduler is not None and t > 0:
            self.scheduler.step()
        if "lr" in self.file:
            for group, lr in zip(self.torch.param_groups, self.file["lr"][t], strict=False):
                assert group["lr"] == lr
        none = self.file["none"][t]
        if self.entry["class"] == "NAdam":
            for tensor in self.tensors if t == 0 else ():
                zeros = {name: torch.zeros_like(tensor) for name in ("exp_avg", "exp_avg_sq")}
                number = {"mu_product": torch.tensor(1.0, dtype=tensor.dtype)}
                self.torch.state[tensor] = {"step": torch.tensor(0.0), **number, **zeros}
            self.round_products(none)
        return [None if none[i] else np.asarray(self.file[f"g_{i}"][t]) for i in range(self.n)]


class LikeState(dict):
    """Magnitudes that start at zero."""

    def __missing__(self, name):
        return 0.0


@pytest.mark.parametrize("entry", REPLAYED, ids=lambda e: Path(e["file"]).stem)
def test_trajectory(entry):
    replay = Replay(entry).run()
    assert replay.finite_alike
    assert replay.error <= recorded.tolerance(entry)
    names = {key.split("_", 2)[2] for key in replay.file.files if key.startswith("s_")}
    assert {name for state in replay.state for name in state} == names
    for name, expected, got, largest, _ in replay.final_state():
        finite = np.isfinite(expected)
        assert np.array_equal(np.isfinite(got), finite), name
        if name.startswith("step"):
            assert got == expected
            continue
        with np.errstate(invalid="ignore"):
            gap = np.abs(got.astype(np.longdouble) - expected)
        limit = recorded.state_tolerance(entry)
        assert (gap / np.spacing(largest))[finite].max(initial=0) <= limit, name


@pytest.mark.parametrize("entry", SCHEDULES, ids=lambda e: Path(e["file"]).stem)
def test_schedule(entry):
    param = torch.zeros(1)
    param.grad = torch.ones(1)
    opt = fastopt.torch.SGD([param], lr=entry["base_lr"])
    name = entry["class"].removeprefix("lr:")
    options = {"cycle_momentum": False} if name == "OneCycleLR" else {}
    scheduler = getattr(torch.optim.lr_scheduler, name)(opt, **entry["kwargs"], **options)
    travelled = 0.0
    for lr in Recording(entry)["lr"]:
        assert opt.param_groups[0]["lr"] == lr
        opt.step()
        travelled += float(lr)
        scheduler.step()
    assert param.item() == pytest.approx(-travelled, rel=1e-5)


def test_how_many_were_replayed():
    left_out = [entry for entry in ENTRIES if entry not in REPLAYED + SCHEDULES]
    assert {entry["class"] for entry in left_out} <= {*BY_NAME}
    assert len(REPLAYED) == sum(BY_NAME[name].golden[0] for name in TORCH_CLASSES)
    assert (len(ENTRIES), len(SCHEDULES)) == (105, 9)
