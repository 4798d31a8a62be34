"""What several test files share: a small awkward model, optimizers over it, every byte of both."""

import functools
import json
import os
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import numpy as np
from numpy.lib.array_utils import byte_bounds
from tables import CONFIGS

import fastopt
from fastopt import _core

TESTS = Path(__file__).parent
CHECKOUT = TESTS.parent

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)

# Shape, dtype, and the axes from the outermost in memory to the innermost.
TENSORS = [
    ((), F64, ()),
    ((7,), F32, (0,)),  # its gradient is strided
    ((0, 3), F64, (0, 1)),
    ((5, 4), F32, (1, 0)),  # transposed; its gradient is not
    ((_core.BLOCK + 3,), F64, (0,)),
    ((2, 3, 4), F64, (2, 0, 1)),  # its gradient is in C order
]
EVERY = range(len(TENSORS))
NOT_EMPTY = [k for k in EVERY if 0 not in TENSORS[k][0]]
WITH_AXES = [k for k in NOT_EMPTY if TENSORS[k][0]]
MANY_AXES = [k for k in EVERY if len(TENSORS[k][0]) > 1]


def make_params():
    """Parameters that lie, with gaps and unaligned, in one arena of bytes; the arena is last."""
    rng = np.random.default_rng(0)
    arena = np.frombuffer(rng.bytes(100_000), np.uint8).copy()
    params, place = [], 13
    for shape, dtype, axes in TENSORS:
        nbytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
        flat = arena[place : place + nbytes].view(dtype)
        flat[...] = rng.standard_normal(flat.size)
        inner = flat.reshape([shape[axis] for axis in axes])
        params.append(inner.transpose(np.argsort(axes).astype(int)))
        place += nbytes + 101
    return params, arena


def make_owned_params():
    """The same parameters, each owning its memory, so that it can be resized."""
    return [np.array(p, order="F" if p.ndim == 2 else "C") for p in make_params()[0]]


def make_grads(seed):
    rng = np.random.default_rng(seed)
    grads = [np.asarray(rng.standard_normal(shape), dtype) for shape, dtype, _ in TENSORS]
    grads[1] = np.repeat(grads[1], 2)[::2]
    return grads


class Run:
    """An optimizer over the model with one step behind it, and gradients for the next."""

    def __init__(self, config, owned=False, **options):
        cls, kwargs, self.given = CONFIGS[config]
        self.params, self.arena = (make_owned_params(), None) if owned else make_params()
        self.keys = [f"w{k}" if self.given == "dict" else k for k in EVERY]
        given = {
            "list": self.params,
            "dict": dict(zip(self.keys, self.params, strict=True)),
            "groups": [{"params": self.params[:2]}, {"params": self.params[2:]}],
        }[self.given]
        self.opt = cls(given, **kwargs, **options)
        self.step(make_grads(1), zero_grad=True)
        self.grads, self.options = make_grads(2), {}

    def step(self, grads, change=lambda grads: grads, **options):
        """Step with gradients structured as the parameters; `change` may spoil that."""
        if self.given == "dict":
            grads = dict(zip(self.keys, grads, strict=True))
        return self.opt.step(change(grads), **options)

    def group_number(self, k):
        return int(self.given == "groups" and k >= 2)

    def group(self, k):
        return self.opt.param_groups[self.group_number(k)]

    def slot(self, k):
        """One of the parameter's state arrays."""
        return next(array for name, array in self.opt.state[k].items() if name != "step")

    def everything(self):
        grads = [g for g in self.grads if isinstance(g, np.ndarray)]
        return everything(self.opt, grads)


@functools.cache
def clean_finish(config, owned):
    """What a run comes to that has seen no failure."""
    return finish(Run(config, owned))


def finish(run):
    run.step(make_grads(3))
    return everything(run.opt)


def root(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def memory_of(array):
    """Return all the bytes of an array's memory, but for zeros beside one that is only aligned."""
    whole = root(array)
    memory = whole.tobytes("A")
    if whole.nbytes != array.nbytes + 64:
        return memory
    begin = byte_bounds(array)[0] - byte_bounds(whole)[0]
    end = begin + array.nbytes
    return memory[:begin].strip(b"\0"), memory[begin:end], memory[end:].strip(b"\0")


def everything(opt, grads=()):
    """Return, by name, all that a step can touch: bytes, also those between elements; layouts."""
    arrays = {f"param {k}": p for k, p in enumerate(opt.params)}
    for k, state in enumerate(opt.state):
        arrays.update({f"state {k} {name}": array for name, array in state.items()})
    arrays.update({f"ema {k}": array for k, array in enumerate(opt.ema or ())})
    arrays.update({f"sum {k}": array for k, array in enumerate(opt._members.sums or ())})
    arrays.update({f"grad {k}": array for k, array in enumerate(grads)})
    owners, seen = {}, {}
    for name, array in arrays.items():
        owner = owners.setdefault(id(root(array)), name)  # memory of several is looked at once
        memory = memory_of(array) if owner == name else owner
        seen[name] = (array.shape, array.strides, array.dtype.str, array.flags.writeable, memory)
    seen["completed_steps"] = opt.completed_steps
    seen["accumulated"] = opt.accumulated_steps, opt._plan.summed()
    for number, group in enumerate(opt.param_groups):
        seen[f"group {number}"] = [(k, v) for k, v in group.items() if k != "params"]
    return seen


def differences(a, b):
    """Names under which two results of everything() differ."""
    return [name for name in {**a, **b} if name not in a or name not in b or a[name] != b[name]]


def contents(opt):
    """What must be equal in copies of an optimizer, wherever they lie and however laid out."""
    arrays = [*opt.params, *(opt.ema or ()), *(a for s in opt.state for a in s.values())]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    return opt.completed_steps, groups, [(a.dtype, a.shape, a.tobytes()) for a in arrays]


def goes_on_like(opt, run):
    """Whether a copy of a run's optimizer takes the same next steps."""
    for seed in (5, 6):
        grads = make_grads(seed)
        opt.step(dict(zip(run.keys, grads, strict=True)) if run.given == "dict" else grads)
        run.step(grads)
    return contents(opt) == contents(run.opt)


class Table:
    """A table of a data library: NumPy makes an array of it, and it iterates over its columns."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array

    def __iter__(self):
        return iter("ab")


class SparseMatrix:
    """A matrix as SciPy's: of which NumPy makes no array, and which iterates over its rows."""

    def toarray(self):
        raise AssertionError("it may be too large")

    def __iter__(self):
        return iter("ab")


def change_in_place(array, **attributes):
    """Set shape or dtype of an array itself, which NumPy is about to forbid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name, value in attributes.items():
            setattr(array, name, value)


def advance(opt, grads, steps):
    """Step an optimizer some times; return it. For other processes."""
    for _ in range(steps):
        opt.step(grads)
    return opt


def two_processes(*args, timeout, **env):
    """Run Python twice at once, each with its RANK, and demand that both print "equal"."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **env}
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, args)],
            env={**env, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            stdout, stderr = process.communicate(timeout=timeout)
            assert stdout == "equal\n", stderr
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def mpiexec(processes, program, *args, timeout=120):
    """Run a program in several processes, by mpi4py, which ends all when one fails."""
    env = {**os.environ, "PYTHONPATH": str(Path(fastopt.__file__).parents[1])}
    env["OPENBLAS_NUM_THREADS"] = "1"  # the processes are more than the cores already
    # Open MPI would rather not run as root, nor on so few cores.
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    env["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    command = [Path(sysconfig.get_path("scripts"), "mpiexec"), "-n", str(processes)]
    return subprocess.run(
        [*command, sys.executable, "-W", "error", "-m", "mpi4py", program, *map(str, args)],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def python(*args, timeout=60, **env):
    """Run a fresh interpreter on the same fastopt; a value of None unsets a variable."""
    env = {**os.environ, "PYTHONPATH": str(Path(fastopt.__file__).parents[1]), **env}
    env = {name: value for name, value in env.items() if value is not None}
    return subprocess.run(
        [sys.executable, *args], env=env, capture_output=True, text=True, timeout=timeout
    )


def strict_json(path):
    """What a file of JSON holds, which has no NaN."""

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def refused(capsys, argv):
    """Run a command that must fail; return its status and its one line on standard error."""
    from fastopt.__main__ import main

    try:
        status = main(argv)
    except SystemExit as exit_:
        status = exit_.code
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1, stderr
    return status, stderr
