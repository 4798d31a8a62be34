"""Break the C core in one place at a time, and demand that the tests notice.

    python tests/mutate.py [--list] [--only K]

Each mutation is applied to a temporary copy of the repository, built there with the compiler and
the interpreter at hand, and handed to the tests of the core (of the threads, first to the stress in
C, which does what takes luck elsewhere). They must fail (not: crash, hang or find nothing to run).
A mutation whose text is no longer in its file, or that does not compile, is
an error too: it has to follow the code.
"""

import argparse
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = [  # the quick ones first: most mutations are caught in seconds
    "contract",
    "model",
    "c_api",
    "state",
    "properties",
    "accumulate",
    "golden",
    "errors",
    "accuracy",
    "bitwise",
]
THREAD_TESTS = ["bitwise", "environment", "processes"]
TESTS_OF = {"api.c": ["c_api"], "rules.c": ["c_api"]}  # instead
TESTS_OF |= dict.fromkeys(["team.c", "team.h", "region.c"], THREAD_TESTS)
WORKERS = min(2, os.cpu_count() or 1)
HANGS_AFTER = 300  # seconds


class Mutation(NamedTuple):
    """In `file`, `old`, which occurs there once, becomes `new`."""

    breaks: str
    file: str
    old: str
    new: str


MUTATIONS = [
    Mutation(
        "SGD: the momentum's constant is another's",
        "rules/sgd.h",
        "k[SGD_MU] * slot[0]",
        "k[SGD_IN] * slot[0]",
    ),
    Mutation(
        "SGD: the first step is not told apart",
        "rules/sgd.h",
        "semantics == FO_TORCH && (t == 1 || (fresh & FO_SLOT(0)))",
        "semantics == FO_TORCH && t == 0",
    ),
    Mutation(
        "SGD: Nesterov does not look ahead",
        "rules/sgd.h",
        "h->nesterov != 0 || h->momentum == 0 ? h->lr : 0",
        "h->momentum == 0 ? h->lr : 0",
    ),
    Mutation(
        "SGD: Keras's velocity has the wrong sign",
        "rules/sgd.h",
        "-(h->lr * damped)",
        "(h->lr * damped)",
    ),
    Mutation(
        "Adagrad: the learning rate decays a step early",
        "rules/adagrad.h",
        "(double)(t - 1)",
        "(double)t",
    ),
    Mutation(
        "Adagrad: Keras's eps is outside the root",
        "rules/adagrad.h",
        "(slot[0] + k[ADAGRAD_EPS_IN]) +",
        "(slot[0]) + k[ADAGRAD_EPS_IN] +",
    ),
    Mutation(
        "Adagrad: squares are not accumulated",
        "rules/adagrad.h",
        "slot[0] = slot[0] + g * g;",
        "slot[0] = g * g;",
    ),
    Mutation(
        "RMSprop: the floor of the centered variance is gone",
        "rules/rmsprop.h",
        "keras ? -INFINITY : 0",
        "-INFINITY",
    ),
    Mutation(
        "RMSprop: the mean is added, not subtracted",
        "rules/rmsprop.h",
        "w - slot[2] * slot[2]",
        "w + slot[2] * slot[2]",
    ),
    Mutation(
        "RMSprop: the learning rate goes into torch's buffer",
        "rules/rmsprop.h",
        "lr_goes_in = keras || h->momentum == 0",
        "lr_goes_in = true",
    ),
    Mutation(
        "Adam: ascends",
        "rules/adam.h",
        "return p - (k[ADAM_STEP]",
        "return p + (k[ADAM_STEP]",
    ),
    Mutation(
        "Adam: the root is missing",
        "rules/adam.h",
        "FO_T(fo_sqrt)(v)",
        "(v)",
    ),
    Mutation(
        "Adam: the second moment's step counter is frozen",
        "rules/adam.h",
        "fo_one_minus_power(h->beta2, t)",
        "fo_one_minus_power(h->beta2, 1)",
    ),
    Mutation(
        "Adam: the betas' constants are swapped",
        "rules/adam.h",
        "k[ADAM_ONE_MINUS_BETA1] = 1 - h->beta1;",
        "k[ADAM_ONE_MINUS_BETA1] = 1 - h->beta2;",
    ),
    Mutation(
        "Adam: torch's eps is added before the bias correction",
        "rules/adam.h",
        "semantics == FO_KERAS ? h->eps : h->eps * sqrt(c2)",
        "h->eps",
    ),
    Mutation(
        "Adam: no bias correction",
        "rules/adam.h",
        "h->lr * sqrt(c2) / c1",
        "h->lr",
    ),
    Mutation(
        "Adam: AMSGrad forgets the maximum",
        "rules/adam.h",
        "v = slot[2] = FO_T(fo_max)(slot[2], v)",
        "slot[2] = v",
    ),
    Mutation(
        "Adam: another order of the multiplications, so another rounding",
        "rules/adam.h",
        "k[ADAM_ONE_MINUS_BETA2] * (g * g)",
        "(k[ADAM_ONE_MINUS_BETA2] * g) * g",
    ),
    Mutation(
        "1 - beta^t: even powers only",
        "rule.h",
        "if (t >> bit & 1)",
        "if (0)",
    ),
    Mutation(
        "decoupled decay: the learning rate is left out",
        "rules.c",
        "1 - h->lr * h->weight_decay",
        "1 - h->weight_decay",
    ),
    Mutation(
        "decoupled decay comes after the update",
        "loop.inc",
        "p = k[KEEP] * p;\n        param[i] = FO_T(RULE)(p, g, slot, k, variant);",
        "param[i] = k[KEEP] * FO_T(RULE)(p, g, slot, k, variant);",
    ),
    Mutation(
        "clipping by value has no lower limit",
        "loop.inc",
        "FO_T(fo_at_least)(-gmax, g)",
        "g",
    ),
    Mutation(
        "coupled decay comes before clipping",
        "loop.inc",
        "g = gscale * grad[i]",
        "g = gscale * grad[i] + k[L2] * (T)(gmax < 1 ? param[i] : 0)",
    ),
    Mutation(
        "norm: the last element is skipped",
        "passes.inc",
        "i + j < n;",
        "i + j < n - 1;",
    ),
    Mutation(
        "norm: the lanes are added in another order",
        "passes.inc",
        "sum[j] += sum[j + half];",
        "sum[j] += sum[2 * half - 1 - j];",
    ),
    Mutation(
        "an infinity counts as finite",
        "passes.inc",
        "if (x - x != 0)",
        "if (x != x)",
    ),
    Mutation(
        "average: its two weights are swapped",
        "passes.inc",
        "decay * ema[i] + rest * param[i]",
        "rest * ema[i] + decay * param[i]",
    ),
    Mutation(
        "the last, incomplete block is skipped",
        "plan.c",
        "size / FO_BLOCK + (size % FO_BLOCK != 0)",
        "size / FO_BLOCK",
    ),
    Mutation(
        "a block ends one element early",
        "step.c",
        "left < most ? left : most",
        "left < most ? left : most - 1",
    ),
    Mutation(
        "blocks that do not divide among the threads are skipped",
        "team.h",
        "(n % members < rank ? n % members : rank)",
        "0",
    ),
    Mutation(
        "a thread leaves its range when it has taken from it once",
        "team.c",
        "if (begin >= m->end)",
        "if (begin >= m->end || worked)",
    ),
    Mutation(
        "a forked child waits for its parent's OpenMP threads",
        "team.c",
        "(crew->layer == FO_OPENMP && forked)",
        "false",
    ),
    Mutation(
        "a forked child waits for the program's pool of its parent",
        "team.c",
        "forked ? NULL : crew->pool",
        "crew->pool",
    ),
    Mutation(
        "an OpenMP region updates what its first pass has refused",
        "region.c",
        "if (second_follows)",
        "if (second_follows || rank > 0)",
    ),
    Mutation(
        "threads of an OpenMP region update before all have read",
        "region.c",
        "#pragma omp barrier\n            if (rank == 0)",
        "            if (rank == 0)",
    ),
    Mutation(
        "OpenMP gets as many threads as pay",
        "step.c",
        "crew.layer == FO_OPENMP && useful > 1 ? crew.members : (int)useful",
        "(int)useful",
    ),
    Mutation(
        "a forked child waits for its parent's team",
        "team.c",
        "    team.workers = 0;\n",
        "",
    ),
    Mutation(
        "workers take the program's signals",
        "team.c",
        "sigfillset",
        "sigemptyset",
    ),
    Mutation(
        "a fault in a worker is not reported",
        "team.c",
        "sigdelset(&all, faults[i]);",
        "(void)faults[i];",
    ),
    Mutation(
        "a forked child comes to a gate that its parent left open",
        "team.c",
        "    atomic_store(&team.gate, 0);\n",
        "",
    ),
    Mutation(
        "a forked child finds its parent's team in use",
        "team.c",
        "    pthread_mutex_init(&team.used, NULL);\n",
        "",
    ),
    Mutation(
        "a strided gradient's outermost axis stands still",
        "gradient.c",
        "for (int axis = last - 1; axis >= 0; axis--)",
        "for (int axis = last - 1; axis > 0; axis--)",
    ),
    Mutation(
        "a strided gradient is read from the wrong place in later blocks",
        "gradient.c",
        "first /= t->grad_shape[axis];",
        "first /= 1;",
    ),
    Mutation(
        "torch's clip factor lacks its 1e-6",
        "step.c",
        "limit / (norm + 1e-6)",
        "limit / norm",
    ),
    Mutation(
        "Keras's common norm may be infinite",
        "step.c",
        "(inverse < most ? inverse : most) + (norm - norm)",
        "(inverse < most ? inverse : most)",
    ),
    Mutation(
        "Keras's common clip factor is its array's",
        "step.c",
        "args->semantics == FO_KERAS && args->clip == FO_GLOBAL_CLIP_NORM",
        "args->semantics == FO_KERAS && args->clip == FO_NO_CLIP",
    ),
    Mutation(
        "Keras's clip factor amplifies",
        "step.c",
        "(norm > limit || norm != norm ? norm : limit)",
        "norm",
    ),
    Mutation(
        "maximize is ignored",
        "step.c",
        "c->maximize ? -scale : scale",
        "c->maximize ? scale : scale",
    ),
    Mutation(
        "constants are shared by parameters of different step counts",
        "step.c",
        "if (!c->consts || c->step != *t->step || c->fresh != t->fresh) {",
        "if (!c->consts || c->fresh != t->fresh) {",
    ),
    Mutation(
        "constants are shared by buffers that have begun and that have not",
        "step.c",
        "if (!c->consts || c->step != *t->step || c->fresh != t->fresh) {",
        "if (!c->consts || c->step != *t->step) {",
    ),
    Mutation(
        "a buffer that starts late takes the gradient dampened",
        "rules/sgd.h",
        "(t == 1 || (fresh & FO_SLOT(0)))",
        "t == 1",
    ),
    Mutation(
        "constants are shared by different groups",
        "step.c",
        "group_work *c = &plan->group_works[t->group];",
        "group_work *c = &plan->group_works[0];",
    ),
    Mutation(
        "the first average is no copy",
        "step.c",
        "if (s->args->ema_starts)",
        "if (s->args->ema_starts && n == 0)",
    ),
    Mutation(
        "a skipped step that zeroes gradients updates",
        "step.c",
        "} else if (part) {",
        "} else if (has_gradient(s, t)) {",
    ),
    Mutation(
        "a refused step zeroes gradients",
        "step.c",
        "(s->args->nonfinite == FO_SKIP && s->args->zero_grad)",
        "s->args->zero_grad",
    ),
    Mutation(
        "step counters do not advance",
        "step.c",
        "++*t->step;",
        "(void)t->step;",
    ),
    Mutation(
        "counters of parameters without a gradient advance",
        "step.c",
        "if (!has_gradient(s, t))\n            continue;\n        if (!add && begins)\n",
        "if (!add && begins)\n",
    ),
    Mutation(
        "state stands still where the first elements are done apart",
        "step.c",
        "(char *)slot[j] + (size_t)head * item",
        "(char *)slot[j]",
    ),
    Mutation(
        "the program's own pool is never tried",
        "step.c",
        "if (choice == TUNER_POOL)",
        "if (0)",
    ),
    Mutation(
        "the mean over micro-batches is their sum",
        "passes.inc",
        "to[i] = (sum[i] + scale * grad[i]) / divisor;",
        "to[i] = sum[i] + scale * grad[i];",
    ),
    Mutation(
        "the mean of what came before a None is their sum",
        "passes.inc",
        "to[i] = sum[i] / divisor;",
        "to[i] = sum[i];",
    ),
    Mutation(
        "sums keep what has been used",
        "step.c",
        "t->has_sum = add;",
        "t->has_sum = true;",
    ),
    Mutation(
        "a micro-batch that is skipped enters the sums",
        "step.c",
        "if (part && s->args->add) {",
        "if (has_gradient(s, t) && s->args->add) {",
    ),
    Mutation(
        "a parameter without a gradient in the last micro-batch is left out",
        "plan.h",
        "return t->grad || (t->has_sum && !s->args->add);",
        "return t->grad != NULL;",
    ),
    Mutation(
        "averages follow micro-batches",
        "step.c",
        "if (t->ema && !s->result->skipped && !s->args->add)\n",
        "if (t->ema && !s->result->skipped)\n",
    ),
    Mutation(
        "sums are scaled twice",
        "plan.h",
        "return t->sum ? 1 : s->scale;",
        "return s->scale;",
    ),
    Mutation(
        "subnormals are flushed if the caller flushes them",
        "platform.h",
        "_mm_setcsr(0x1F80);",
        "_mm_setcsr(saved);",
    ),
    Mutation(
        "Adam: a default is not the class's",
        "rules/adam.h",
        "X(beta2, 0.999,",
        "X(beta2, 0.99,",
    ),
    Mutation(
        "C interface: a NaN is taken for a hyperparameter",
        "rules.c",
        "return value >= rule->lows[j] && value <= rule->highs[j];",
        "return !(value < rule->lows[j] || value > rule->highs[j]);",
    ),
    Mutation(
        "C interface: Adam's beta may be 1",
        "rules/adam.h",
        "X(beta1, 0.9, 0, FO_BELOW_1)",
        "X(beta1, 0.9, 0, 1)",
    ),
    Mutation(
        "C interface: an array of another type than its parameter's is taken",
        "api.c",
        "if (fo_storages[a->dtype].arithmetic != fo_storages[dtype].arithmetic)",
        "if (fo_storages[a->dtype].arithmetic > fo_storages[dtype].arithmetic)",
    ),
    Mutation(
        "C interface: the sums of a resumed run are forgotten",
        "api.c",
        "tensor->has_sum = holds != 0;",
        "tensor->has_sum = false;",
    ),
    Mutation(
        "C interface: what a new hyperparameter needs is not noticed",
        "api.c",
        "[j] = value;\n    note_needs(opt, group);\n",
        "[j] = value;\n",
    ),
    Mutation(
        "C interface: a struct of another size is taken",
        "api.c",
        "if (size != right)",
        "if (size > right)",
    ),
    Mutation(
        "C interface: a loss scale of 0 is not 1",
        "api.c",
        "o->loss_scale != 0 ? o->loss_scale : 1",
        "o->loss_scale",
    ),
    Mutation(
        "C interface: averages never start",
        "api.c",
        "o->ema_starts != 0",
        "false",
    ),
    Mutation(
        "C interface: a counter may be negative",
        "api.c",
        "*t->step < 0 || *t->step == INT64_MAX",
        "*t->step == INT64_MAX",
    ),
    Mutation(
        "C interface: a gradient that is not finite is no error",
        "api.c",
        "args.nonfinite == FO_RAISE)",
        "args.nonfinite == FO_SKIP)",
    ),
    Mutation(
        "C interface: an error is every thread's",
        "api.c",
        "static _Thread_local char error",
        "static char error",
    ),
    Mutation(
        "C interface: a parameter keeps the state of the one before it",
        "api.c",
        "(fo_tensor){.param = param->data,",
        "(fo_tensor){.slot = {fo_plan_tensor(opt->plan, i)->slot[0]}, .param = param->data,",
    ),
]


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a copy."""
    # Teams are larger than the machine here, and two copies run at once: waiting must not cost.
    env = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(folder)}
    return subprocess.run(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANGS_AFTER,
    )


def checked_run(folder: Path, *command: str) -> str:
    """Run a command in a copy and return what it printed; raise with that if it fails."""
    done = run(folder, *command)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stdout}")
    return done.stdout


def build(folder: Path) -> list[list[str]]:
    """Build the extension of a copy; return the commands that build the C core and link it."""
    output = checked_run(folder, sys.executable, "setup.py", "build_ext", "--inplace")
    commands = [shlex.split(line) for line in output.splitlines() if " -o build" in line]
    core = [command for command in commands if "fastopt/_core.c" not in command]
    return [command for command in core if not any("_tensors" in part for part in command)]


def rebuild(folder: Path, commands: list[list[str]]) -> None:
    """Build again what a mutation may have changed, which the bridge to Python is not."""
    for command in commands:
        checked_run(folder, *command)
    linked = commands[-1][commands[-1].index("-o") + 1]
    if not Path(linked).name.startswith("_core."):
        raise RuntimeError(f"the last command of the build makes {linked}, not the core")
    shutil.copy2(folder / linked, folder / "fastopt")


def test(folder: Path, names: Sequence[str]) -> tuple[int, str]:
    """Run some of the tests in a copy: pytest's exit code, and what it printed."""
    files = [f"tests/test_{name}.py" for name in names]
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    done = run(folder, *pytest, *files)
    return done.returncode, done.stdout


def stress_of_threads(folder: Path) -> str:
    """Run tests/c/team_check.c in a copy: '' if it passes, or what it found."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    flags = ["-std=c11", "-O2", "-fopenmp", "-Isrc_c", "-Ifastopt/include"]
    sources = ["src_c/team.c", "tests/c/team_check.c"]
    linked = ["-Wl,--wrap=pthread_create", "-lm", "-o", "team_check"]
    checked_run(folder, *compiler, *flags, *sources, *linked)
    done = run(folder, "./team_check", "1", "3")
    if done.returncode and "team_check: " not in done.stdout:
        raise RuntimeError(f"team_check died (exit code {done.returncode}):\n{done.stdout}")
    return done.stdout if done.returncode else ""


def copy_repository(to: Path) -> None:
    """Copy what a build and the tests need, without anything built."""
    ignored = shutil.ignore_patterns("*.so", "_core.c", "_tensors.c", "__pycache__")
    for name in ("fastopt", "src_c", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, to / name)


def check_unmutated(folder: Path) -> None:
    """Make sure that a copy's tests pass and are about it."""
    import_it = "import fastopt; print(fastopt.__file__)"
    found = checked_run(folder, sys.executable, "-c", import_it).strip()
    if not Path(found).is_relative_to(folder):
        raise RuntimeError(f"the tests would import {found}")
    code, output = test(folder, [*TESTS, *THREAD_TESTS[1:]])
    if problem := stress_of_threads(folder):
        raise RuntimeError(f"the threads fail without a mutation:\n{problem}")
    if code:
        raise RuntimeError(f"the tests fail without a mutation (exit code {code}):\n{output}")


def outcome(mutation: Mutation, folder: Path, commands: list[list[str]]) -> str:
    """Apply a mutation to a copy, test, undo it; return '' if it was caught, or what happened."""
    path = folder / "src_c" / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        return f"the text occurs {text.count(mutation.old)} times in {mutation.file}"
    try:
        path.write_text(text.replace(mutation.old, mutation.new))
        if mutation.file in ("team.c", "team.h") and stress_of_threads(folder):
            return ""
        rebuild(folder, commands)
        code, output = test(folder, TESTS_OF.get(mutation.file, TESTS))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        path.write_text(text)
    failed = re.search(r"^FAILED (\S+)", output, re.MULTILINE)
    if code == 1 and failed:
        return ""
    return f"NOT CAUGHT: pytest's exit code is {code}\n{output[-2000:] if code else ''}"


def main() -> int:
    """Apply the mutations; return 0 if all were caught."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="list the mutations, and do nothing")
    parser.add_argument("--only", type=int, metavar="K", help="apply number K of the list alone")
    args = parser.parse_args()
    chosen = list(enumerate(MUTATIONS, 1))
    if args.only is not None:
        chosen = [entry for entry in chosen if entry[0] == args.only]
    if args.list:
        for number, mutation in chosen:
            print(f"{number:3} {mutation.file:16} {mutation.breaks}")
        return 0

    with tempfile.TemporaryDirectory() as temporary:
        # Real paths: the tests' own are compared with them.
        folders = [Path(temporary).resolve() / str(i) for i in range(WORKERS)]
        copy_repository(folders[0])
        commands = build(folders[0])
        rebuild(folders[0], commands)
        check_unmutated(folders[0])
        print("unmutated: the tests pass", flush=True)
        free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        free.put(folders[0])
        for folder in folders[1:]:
            shutil.copytree(folders[0], folder)
            free.put(folder)

        def apply(entry: tuple[int, Mutation]) -> bool:
            number, mutation = entry
            folder = free.get()
            began = time.monotonic()
            try:
                problem = outcome(mutation, folder, commands)
            finally:
                free.put(folder)
            seconds = time.monotonic() - began
            line = f"{number:3} {mutation.file:16} {mutation.breaks} ({seconds:.0f} s)"
            print(f"{line}: {problem or 'caught'}", flush=True)
            return not problem

        with ThreadPoolExecutor(WORKERS) as workers:
            caught = list(workers.map(apply, chosen))
    print(f"{len(chosen)} mutations, {sum(caught)} caught")
    for number, mutation in (entry for entry, was in zip(chosen, caught, strict=True) if not was):
        print(f"not caught: {number} {mutation.file} {mutation.breaks}")
    return 0 if all(caught) and caught else 1


if __name__ == "__main__":
    sys.exit(main())
