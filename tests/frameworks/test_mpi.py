"""fastopt.mpi: every rank has the serial optimizer's bits, its share of state, and one decision."""

import ast
import inspect
import re
import time
from pathlib import Path

import mpi4py
import numpy as np
import pytest
from support import mpiexec

import fastopt

mpi4py.rc.initialize = False  # this is no rank

import fastopt.mpi as optim  # noqa: E402
from fastopt.mpi._shares import ALIGNED, buckets, cut  # noqa: E402

PROGRAM = Path(__file__).parent / "mpi_ranks.py"
ROOT = Path(__file__).parents[2]
CHECKS = re.findall(r"^@check\ndef (\w+)\(\)", PROGRAM.read_text(), re.MULTILINE)
ALONE = ["interrupted"]
SIZES = [2, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 7))]


def run(size, name, *arguments):
    done = mpiexec(size, PROGRAM, name, *arguments)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stdout + done.stderr


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in ALONE])
def test_ranks(name, size):
    run(size, name)


def test_training_goes_on_in_any_number_of_processes_and_in_none(tmp_path):
    path = tmp_path / "run.safetensors"
    shapes = [(8203,), (3,), (), (70, 130), (0,), (4097, 2)]
    kwargs = {"state_dtype": "8bit", "ema_decay": 0.9}

    def made():
        rng = np.random.default_rng(1)
        arrays = [np.asarray(rng.standard_normal(shape), np.float32) for shape in shapes]
        arrays[5] = np.asfortranarray(arrays[5])
        return fastopt.AdamW(dict(zip("abcdef", arrays, strict=True)), **kwargs)

    serial = made()

    def step(opt):
        rng = np.random.default_rng(opt.completed_steps)
        grads = [np.asarray(rng.integers(-9, 10, shape), np.float32) for shape in shapes]
        opt.step(dict(zip("abcdef", grads, strict=True)))

    for size in (4, 1, 3, 2):
        run(size, "goes_on", path, "3")
        for _ in range(3):
            step(serial)
    alone = made()
    alone.load(path)
    for opt in (alone, serial):
        step(opt)
    every = [
        [*opt.params, *opt.ema, *(x for s in opt.state for x in s.values())]
        for opt in (alone, serial)
    ]
    assert [x.tobytes() for x in every[0]] == [x.tobytes() for x in every[1]]
    alone.save(path)
    run(3, "goes_on", path, "0")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_loads_end_micro_batches_and_are_of_one_file(size, tmp_path):
    run(size, "loads_that_differ", tmp_path)


@pytest.mark.parametrize("size", [2, 4])
def test_a_signal_amid_a_step_is_raised_on_all_ranks_before_anything_is_written(size):
    run(size, "interrupted")


@pytest.mark.parametrize(
    ("how", "says"),
    [("exception", "a bug of the program's"), ("SIGINT", "KeyboardInterrupt"), ("SIGKILL", "")],
)
def test_ranks_do_not_wait_for_one_that_has_ended(how, says):
    done = mpiexec(3, PROGRAM, "fails", how)
    ended = time.time()
    (began,) = re.findall(r"^now: ([\d.]+)$", done.stdout, re.MULTILINE)
    assert ended - float(began) < 10
    assert done.returncode != 0
    assert says in done.stdout + done.stderr


# ---- without MPI ---------------------------------------------------------------------------------


def test_signatures_are_those_of_the_classes_and_what_mpi_needs():
    for name in optim.__all__:
        own = inspect.signature(getattr(optim, name)).parameters
        theirs = inspect.signature(getattr(fastopt, name)).parameters
        assert list(own) == [*theirs, "comm", "reduction", "bucket_bytes", "check"]
        assert all(own[k].default == theirs[k].default for k in theirs)
    public = [k for k, v in vars(fastopt).items() if isinstance(v, type) and hasattr(v, "step")]
    assert sorted(optim.__all__) == sorted(public)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
def test_parts_are_even_and_every_element_travels_once(ranks, seed):
    rng = np.random.default_rng([ranks, seed])
    block = fastopt._core.BLOCK
    sizes = [int(n) for n in rng.choice([0, 1, 100, block, 10 * block + 5, 200 * block], 30)]
    each = [int(n) for n in rng.choice([0, 2, 8, 12], 30)]
    nbytes = [n * m for n, m in zip(sizes, each, strict=True)]
    before = [(int(rng.integers(0, 1 << 20)) if seed % 2 else 0, 0) for _ in range(ranks)]
    bounds = cut(sizes, nbytes, before)
    owned = [first for first, _ in before]
    for size, m, own in zip(sizes, each, bounds, strict=True):
        assert own[0] == 0
        assert own[-1] == size
        assert list(own) == sorted(own)
        assert all(b % block == 0 or b == size for b in own)
        for rank in range(ranks):
            owned[rank] += (own[rank + 1] - own[rank]) * m
    even = -(-sum(owned) // ranks)
    assert max(owned) <= max(even, *(first for first, _ in before)) + 12 * block

    itemsizes = [int(n) for n in rng.choice([0, 4], 30)]
    most = int(rng.choice([ALIGNED, 1 << 10, 1 << 20]))
    if most == ALIGNED:
        bounds, itemsizes = bounds[:2], itemsizes[:2]
    seen = [np.zeros(own[-1], int) for own in bounds]
    for bucket in buckets(bounds, itemsizes, ranks, most):
        for rank, message in enumerate(bucket):
            assert message.nbytes <= most
            for i, begin, end, at in message.runs:
                assert bounds[i][rank] <= begin < end <= bounds[i][rank + 1]
                assert at % ALIGNED == 0
                assert at + (end - begin) * itemsizes[i] <= message.nbytes
                seen[i][begin:end] += 1
    for counts, itemsize in zip(seen, itemsizes, strict=True):
        assert {*counts} <= {1 if itemsize else 0}


def test_the_page_s_example_runs(tmp_path):
    text = (ROOT / "docs/mpi.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program = tmp_path / "program.py"
    program.write_text(
        f"{code}\nif not MPI.COMM_WORLD.rank:\n    print([float(x) for x in (*w, b)])\n"
    )
    done = mpiexec(2, program)
    assert done.stderr == ""
    numbers = ast.literal_eval(done.stdout)
    np.testing.assert_allclose(numbers, [1, *[0] * 19, 1], atol=0.11)


def test_the_example_goes_on_in_another_number_of_processes(tmp_path):
    example, path = ROOT / "examples/mpi_training.py", tmp_path / "run.safetensors"
    whole = mpiexec(3, example)
    assert (whole.returncode, whole.stderr) == (0, "")
    killed = mpiexec(4, example, "--checkpoint", path, "--kill-at", 60)
    assert killed.returncode != 0
    assert re.findall(r"^Step \[(\d+)/", killed.stdout, re.MULTILINE) == ["25", "50"]
    resumed = mpiexec(2, example, "--checkpoint", path)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert "Begins after step 50\n" in resumed.stdout

    def losses(done):
        return [float(x) for x in re.findall(r"Loss: ([\d.]+)$", done.stdout, re.MULTILINE)]

    assert len(losses(whole)) == 4
    # The same digits, whose gradients are summed, and rounded, in another order.
    np.testing.assert_allclose(losses(killed) + losses(resumed), losses(whole), atol=2e-4)
    (accuracy,) = re.findall(r"Test accuracy: ([\d.]+)%", resumed.stdout)
    assert float(accuracy) > 88
