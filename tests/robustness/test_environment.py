"""The machine: instruction sets, numbers of threads, other processes' settings, and the import."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fpmode import control_word
from support import TESTS, python

import fastopt
from fastopt import _core
from fastopt.threads import default_threads

FLAGS = 0x3F  # of exceptions, on x86 in the control word
TABLES = ["base", "avx2", "avx512"]


def ask(expression, **env):
    """Evaluate an expression about fastopt in a fresh interpreter."""
    env = {"FASTOPT_NUM_THREADS": None, "OMP_NUM_THREADS": None, "FASTOPT_ISA": None, **env}
    done = python("-c", f"import fastopt; print({expression})", **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- what was built ------------------------------------------------------------------------------


def test_build_info_says_what_was_built_and_what_runs():
    info = fastopt.build_info()
    assert {*info} == {
        "version", "compiler", "isa", "threading", "openmp", "threads", "borrowed_threads"
    }  # fmt: skip
    assert info["version"] == fastopt.__version__
    assert info["compiler"].split()[0] in ("gcc", "clang")
    layers = ["team", "openmp", "serial"] if info["openmp"] else ["team", "serial"]
    assert info["threading"] == {"available": layers, "active": "team"}
    assert info["threads"] == fastopt.get_num_threads()
    assert info["borrowed_threads"] == []
    compiled, supported, active = (info["isa"][k] for k in ("compiled", "supported", "active"))
    assert compiled == [name for name in TABLES if name in compiled]
    assert supported == [name for name in compiled if name in supported]
    assert "base" in supported
    assert active in supported


def test_fastopt_isa_chooses_a_table():
    for name in _core.isa()["supported"]:
        assert ask("fastopt.build_info()['isa']['active']", FASTOPT_ISA=name) == name
    default = ask("fastopt.build_info()['isa']['active']")
    assert default in _core.isa()["supported"]
    assert ask("fastopt.build_info()['isa']['active']", FASTOPT_ISA="") == default


def test_an_instruction_set_that_is_not_supported_is_refused():
    refused = ["sse9", "AVX2", "avx2 ", *({*TABLES} - {*_core.isa()["supported"]})]
    for name in refused:
        with pytest.raises(ValueError, match=f"'{name}' is not supported here; choose .*'base'"):
            _core.select_isa(name)
    done = python("-c", "import fastopt", FASTOPT_ISA="sse9")
    assert done.returncode == 1
    assert "ValueError: FASTOPT_ISA: instruction set 'sse9' is not supported" in done.stderr
    assert "'base'" in done.stderr


# ---- the number of threads -----------------------------------------------------------------------


def test_num_threads_beats_set_num_threads_beats_the_environment():
    assert ask("fastopt.get_num_threads()", FASTOPT_NUM_THREADS="5", OMP_NUM_THREADS="3") == "5"
    assert ask("fastopt.get_num_threads()", OMP_NUM_THREADS="3") == "3"
    then = "[fastopt.set_num_threads(4), fastopt.get_num_threads()]"
    assert ask(then, FASTOPT_NUM_THREADS="5") == "[None, 4]"
    w, g = (np.zeros(10) for _ in range(2))
    bounded, free = fastopt.SGD([w], num_threads=2), fastopt.SGD([w])
    _core.force_threads(-1)
    for limit in (1, 3):
        fastopt.set_num_threads(limit)
        assert (bounded.step([g]).threads, free.step([g]).threads) == (2, limit)


def test_a_bad_number_of_threads_is_refused():
    before = fastopt.get_num_threads()
    for bad, error, text in [
        (0, ValueError, "^n must be between 1 and 1024, got 0"),
        (-3, ValueError, "^n must be between"),
        (1025, ValueError, "^n must be between"),
        (2.0, TypeError, "^n must be an integer, got 2.0"),
        ("2", TypeError, "^n must be an integer, got '2'"),
        (True, TypeError, "^n must be an integer, got True"),
        (None, TypeError, "^n must be an integer, got None"),
    ]:
        with pytest.raises(error, match=text):
            fastopt.set_num_threads(bad)
    assert fastopt.get_num_threads() == before
    fastopt.set_num_threads(np.int32(7))
    assert fastopt.get_num_threads() == 7
    for bad in ("0", "-1", "1025", "two", "2.0"):
        with pytest.raises(ValueError, match=f"FASTOPT_NUM_THREADS must be an integer .*'{bad}'"):
            default_threads({"FASTOPT_NUM_THREADS": bad})
    done = python("-c", "import fastopt", FASTOPT_NUM_THREADS="many")
    assert done.returncode == 1
    assert "FASTOPT_NUM_THREADS must be an integer between 1 and 1024, got 'many'" in done.stderr


CPUS = 16


@pytest.fixture
def sixteen_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(CPUS)), raising=False)


@pytest.mark.usefixtures("sixteen_cpus")
@pytest.mark.parametrize(
    ("environ", "threads"),
    [
        ({}, CPUS),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": " 6 , 2"}, 6),
        ({"OMP_NUM_THREADS": "32"}, 32),
        ({"OMP_NUM_THREADS": "100000"}, 1024),
        ({"OMP_NUM_THREADS": ""}, CPUS),
        ({"OMP_NUM_THREADS": "0"}, CPUS),
        ({"OMP_NUM_THREADS": "-2"}, CPUS),
        ({"OMP_NUM_THREADS": "all"}, CPUS),
        ({"FASTOPT_NUM_THREADS": "", "OMP_NUM_THREADS": "4,4,4"}, 4),
        ({"FASTOPT_NUM_THREADS": "7", "OMP_NUM_THREADS": "4"}, 7),
    ],
)
def test_the_environment_sets_the_number_of_threads(environ, threads, tmp_path):
    assert default_threads(environ, str(tmp_path)) == threads


NO_V1 = {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}
V1, V2 = "sys/fs/cgroup/cpu", "sys/fs/cgroup"
GROUPS = {  # /proc/self/cgroup, files under the root, threads
    "no file": (None, {}, CPUS),
    "nothing in it": ("", {f"{V2}/cpu.max": "100000 100000"}, CPUS),
    "v2, at the top": ("0::/", {f"{V2}/cpu.max": "200000 100000\n"}, 2),
    "v2, no limit": ("0::/", {f"{V2}/cpu.max": "max 100000\n"}, CPUS),
    "v2, nested": ("0::/a/b\n", {f"{V2}/a/b/cpu.max": "300000 100000"}, 3),
    "v2, a fraction": ("0::/a", {f"{V2}/a/cpu.max": "250000 100000"}, 3),
    "v2, less than one": ("0::/a", {f"{V2}/a/cpu.max": "1000 100000"}, 1),
    "v2, more than there are": ("0::/a", {f"{V2}/a/cpu.max": "6400000 100000"}, CPUS),
    "v2, an ancestor's": (
        "0::/a/b/c",
        {f"{V2}/a/cpu.max": "200000 100000", f"{V2}/a/b/c/cpu.max": "max 100000"},
        2,
    ),
    "v2, the least of all": (
        "0::/a/b",
        {f"{V2}/a/cpu.max": "500000 100000", f"{V2}/a/b/cpu.max": "400000 100000"},
        4,
    ),
    "v2, not mine": ("0::/a", {f"{V2}/b/cpu.max": "100000 100000"}, CPUS),
    "v2, the host's path": ("0::/docker/12ab", {f"{V2}/cpu.max": "500000 100000"}, 5),
    "v2, garbage": ("0::/a", {f"{V2}/a/cpu.max": "lots of it"}, CPUS),
    "v2, zero period": ("0::/a", {f"{V2}/a/cpu.max": "100000 0"}, CPUS),
    "v2, half a line": ("0::/a", {f"{V2}/a/cpu.max": "100000"}, CPUS),
    "v1": (
        "5:memory:/m\n4:cpu,cpuacct:/a\n1:name=systemd:/x",
        {f"{V1}/a/cpu.cfs_quota_us": "150000\n", f"{V1}/a/cpu.cfs_period_us": "50000\n"},
        3,
    ),
    "v1, no limit": (
        "4:cpu:/a",
        {f"{V1}/a/cpu.cfs_quota_us": "-1", f"{V1}/a/cpu.cfs_period_us": "100000"},
        CPUS,
    ),
    "v1, an ancestor's": (
        "4:cpuacct,cpu:/a/b",
        {f"{V1}/cpu.cfs_quota_us": "600000", f"{V1}/cpu.cfs_period_us": "100000"},
        6,
    ),
    "v1, cpuset is not cpu": (
        "4:cpuset:/a",
        {f"{V1}/a/cpu.cfs_quota_us": "100000", f"{V1}/a/cpu.cfs_period_us": "100000"},
        CPUS,
    ),
    "v1 and v2": (
        "4:cpu:/a\n0::/b",
        {
            f"{V1}/a/cpu.cfs_quota_us": "300000",
            f"{V1}/a/cpu.cfs_period_us": "100000",
            f"{V2}/b/cpu.max": "700000 100000",
        },
        3,
    ),
    "no such line": ("what is this", {}, CPUS),
}


@pytest.mark.usefixtures("sixteen_cpus")
@pytest.mark.parametrize("case", GROUPS)
def test_the_containers_quota_bounds_the_number_of_threads(case, tmp_path):
    own, files, threads = GROUPS[case]
    files = {**files, **({} if own is None else {"proc/self/cgroup": own})}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert default_threads({}, str(tmp_path)) == threads
    assert default_threads({"OMP_NUM_THREADS": "9"}, str(tmp_path)) == 9


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_the_affinity_bounds_the_number_of_threads():
    one = min(os.sched_getaffinity(0))
    script = f"import os; os.sched_setaffinity(0, [{one}]); import fastopt; "
    done = python(
        "-c",
        script + "print(fastopt.get_num_threads())",
        FASTOPT_NUM_THREADS=None,
        OMP_NUM_THREADS=None,
    )
    assert (done.stdout.strip(), done.returncode) == ("1", 0), done.stderr


# ---- the threading layer -------------------------------------------------------------------------

LAYERS = _core.layers()["available"]
needs_openmp = pytest.mark.skipif("openmp" not in LAYERS, reason="a build without OpenMP")


def test_the_environment_chooses_a_threading_layer():
    for name in LAYERS:
        chosen = ask("fastopt.build_info()['threading']['active']", FASTOPT_THREADING_LAYER=name)
        assert chosen == name
    assert ask("fastopt.build_info()['threading']['active']", FASTOPT_THREADING_LAYER="") == "team"
    assert ask("fastopt.build_info()['threads']", FASTOPT_THREADING_LAYER="serial") == "1"


def test_a_threading_layer_that_is_not_there_is_refused():
    for name in ("tbb", "Team", "", "team "):
        with pytest.raises(ValueError, match=f"no threading layer '{name}' here; .*'serial'"):
            fastopt.set_threading_layer(name)
    for bad in (None, 1, b"team"):
        with pytest.raises(TypeError, match="name must be a string, got"):
            fastopt.set_threading_layer(bad)
    assert fastopt.build_info()["threading"]["active"] == "team"
    done = python("-c", "import fastopt", FASTOPT_THREADING_LAYER="tbb")
    assert done.returncode == 1
    assert "ValueError: FASTOPT_THREADING_LAYER: there is no threading layer 'tbb'" in done.stderr


def test_the_layer_decides_who_takes_part():
    used, opt = {}, fastopt.SGD([np.ones(1 << 20)], num_threads=3)
    small = fastopt.SGD([np.ones(100)], num_threads=3)
    for name in LAYERS:
        fastopt.set_threading_layer(name)
        used[name] = {opt.step([np.ones(1 << 20)]).threads for _ in range(50)}
        assert small.step([np.ones(100)]).threads == 1
    assert used["serial"] == {1}
    assert used["team"] <= {1, 2, 3}
    assert used.get("openmp", {3}) == {3}  # always the same


@pytest.mark.parametrize("layer", LAYERS)
def test_a_step_that_is_refused_writes_nothing_under_any_layer(layer):
    fastopt.set_threading_layer(layer)
    _core.force_threads(3)
    w, g = np.ones(1 << 16), np.ones(1 << 16)
    g[5] = np.nan
    opt = fastopt.SGD([w], nonfinite="raise")
    with pytest.raises(FloatingPointError):
        opt.step([g], zero_grad=True)
    assert (w == 1).all()
    assert np.count_nonzero(g) == g.size


def test_a_number_of_threads_that_was_chosen_outlives_a_change_of_layer():
    fastopt.set_num_threads(7)
    for name in LAYERS:
        fastopt.set_threading_layer(name)
        assert fastopt.get_num_threads() == 7


PLACES = """
import os
import numpy as np
import fastopt
mine = {*os.listdir("/proc/self/task")}
opt, grads = fastopt.Adam([np.ones(1 << 18)], global_clip_norm=1.0), [np.ones(1 << 18)]
used = {opt.step(grads).threads for _ in range(3)}
others = {*os.listdir("/proc/self/task")} - mine
print(fastopt.get_num_threads(), used, os.sched_getaffinity(0),
      *[os.sched_getaffinity(int(other)) for other in others])
"""


@needs_openmp
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_openmps_threads_stay_in_the_places_that_the_environment_gives_them():
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        pytest.skip("needs two processors")
    done = python(
        "-c", PLACES, FASTOPT_THREADING_LAYER="openmp", OMP_PROC_BIND="close",
        OMP_PLACES=f"{{{cpus[0]}}},{{{cpus[1]}}}", FASTOPT_NUM_THREADS=None, OMP_NUM_THREADS=None,
    )  # fmt: skip
    assert done.stdout == f"2 {{2}} {{{cpus[0]}}} {{{cpus[1]}}}\n", done.stderr


REGIONS = """
import ctypes, os, sys
import numpy as np
import fastopt
counter = ctypes.c_int.in_dll(ctypes.CDLL(sys.argv[1]), "regions")
def count(size, steps, **kwargs):
    opt, grads = fastopt.Adam([np.ones(size)], num_threads=3, **kwargs), [np.ones(size)]
    before = counter.value
    for _ in range(steps):
        opt.step(grads)
    return counter.value - before
print(count(1 << 18, 5), count(1 << 18, 5, global_clip_norm=1.0), count(100, 5))
fastopt.set_threading_layer("team")
print(count(1 << 18, 5))
fastopt.set_threading_layer("openmp")
child = os.fork()
if not child:
    os._exit(count(1 << 18, 5))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_openmp
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler here")
@pytest.mark.skipif(
    not fastopt.build_info()["compiler"].startswith("gcc"), reason="counts GCC's regions"
)
def test_a_step_is_one_region_and_a_forked_child_enters_none(tmp_path):
    library = tmp_path / "regions.so"
    source = TESTS / "c/count_regions.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", source, "-o", library, "-ldl"], check=True)
    preload = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(library)]))
    done = python(
        "-W", "ignore::DeprecationWarning", "-c", REGIONS, str(library),
        FASTOPT_THREADING_LAYER="openmp", LD_PRELOAD=preload,
    )  # fmt: skip
    assert done.stdout.split() == ["5", "5", "0", "0", "0"], done.stderr


SEEN_TOO_LATE = """
import os, sys
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
import numpy as np
import fastopt
opt = fastopt.SGD([np.ones(1 << 18)], num_threads=3)
used = {opt.step([np.ones(1 << 18)]).threads for _ in range(20)}
fastopt.set_threading_layer("team")
used_by_team = {opt.step([np.ones(1 << 18)]).threads for _ in range(20)}
os._exit(0 if used == {1} and used_by_team <= {1, 2, 3} else 1)
"""


@needs_openmp
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="nothing tells of a fork here")
def test_a_child_that_imports_after_the_fork_keeps_out_of_openmp_too():
    done = python("-c", SEEN_TOO_LATE, FASTOPT_THREADING_LAYER="openmp")
    assert done.returncode == 0, done.stderr


# ---- what is left alone --------------------------------------------------------------------------


def test_no_openmp_setting_of_the_process_changes():
    maps = Path("/proc/self/maps")  # libraries that are loaded
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split()[-1] for line in lines if re.search(r"/lib(g|i)?omp[^/]*$", line)}
    if not paths:
        pytest.skip("no OpenMP runtime to look at")
    runtimes = [ctypes.CDLL(path) for path in paths]
    getters = ["omp_get_max_threads", "omp_get_dynamic", "omp_get_max_active_levels"]

    def settings():
        return [getattr(runtime, name)() for runtime in runtimes for name in getters]

    before = settings()
    fastopt.set_num_threads(before[0] + 5)
    for layer in _core.layers()["available"]:
        _core.select_layer(layer)
        _core.force_threads(before[0] + 3)
        fastopt.SGD([np.ones(1 << 18)], num_threads=before[0] + 4).step([np.ones(1 << 18)])
        assert settings() == before


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no list of threads here")
def test_signals_are_left_to_the_programs_own_threads():
    script = """
import re, signal
from pathlib import Path
import numpy as np, fastopt
from fastopt import _core
def masks():  # by thread, of the signals that it blocks
    return {t.name: int(re.search(r"SigBlk:\\s*(\\w+)", (t / "status").read_text())[1], 16)
            for t in Path("/proc/self/task").iterdir()}
before = masks()
_core.force_threads(3)
fastopt.SGD([np.ones(9999)]).step([np.ones(9999)])
after = masks()
new = [mask for name, mask in after.items() if name not in before]
assert len(new) == 2, after
assert all(mask >> (s - 1) & 1 for mask in new for s in (signal.SIGINT, signal.SIGTERM)), new
assert not any(mask >> (s - 1) & 1 for mask in new for s in (signal.SIGSEGV, signal.SIGBUS)), new
assert all(after[name] == mask for name, mask in before.items())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_callers_rounding_mode_changes_no_bit_and_is_left_alone():
    libm = ctypes.CDLL(None)
    nearest, upward = libm.fegetround(), {"x86_64": 0x800, "aarch64": 0x400000}[os.uname().machine]
    rng = np.random.default_rng(0)
    start, grad = rng.standard_normal(10_000), rng.standard_normal(10_000)
    for team in (1, 3):
        _core.force_threads(team)
        plain, rounded = start.copy(), start.copy()
        optimizers = [fastopt.Adam([w], clip_norm=1.0, ema_decay=0.9) for w in (plain, rounded)]
        for _ in range(3):
            optimizers[0].step([grad])
            assert libm.fesetround(upward) == 0
            try:
                mode = control_word() & ~FLAGS
                optimizers[1].step([grad])
                assert control_word() & ~FLAGS == mode
            finally:
                libm.fesetround(nearest)
        assert (plain == rounded).all()
        assert (optimizers[0].ema[0] == optimizers[1].ema[0]).all()


MODE = """
import threading
from fpmode import FLUSH, control_word, flush_to_zero
import numpy as np
before = control_word()
with flush_to_zero():
    flushed = control_word()
    import fastopt
    assert control_word() == flushed, "the import, in a thread that flushes"
assert control_word() == before, "the import"
tiny = np.full(4, np.finfo(np.float32).smallest_subnormal)
assert 5e-324 > 0 and (tiny * np.float32(1)).all() and np.finfo(np.float32).smallest_subnormal > 0
from fastopt import _core
FLAGS = 0x3F

def calls():
    opt = fastopt.Adam([np.ones(30_000)], ema_decay=0.5, global_clip_norm=1.0)
    grads = [np.ones(30_000)]
    for call in (
        lambda: opt.step(grads),
        lambda: opt.step([None]),
        opt.state_dict,
        lambda: opt.load_state_dict(opt.state_dict()),
        opt.reset,
        lambda: opt.add_param_group({"params": [np.ones(3)]}),
        fastopt.build_info,
        lambda: _core.Limit([(np.ones(30_000),)], grads, 3).run(),
    ):
        word = control_word()
        call()
        assert (control_word() ^ word) & ~FLAGS == 0, call
        done.append(call)

def calls_while_flushing():
    with flush_to_zero():
        calls()

done = []
for team in (1, 3):
    _core.force_threads(team)
    calls()
    calls_while_flushing()
    threads = [threading.Thread(target=t) for t in (calls, calls_while_flushing) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
assert len(done) == 2 * 6 * 8, len(done)
assert (tiny * np.float32(1)).all()
"""


def test_neither_import_nor_calls_change_the_floating_point_mode_of_any_thread():
    paths = [str(TESTS), str(Path(fastopt.__file__).parents[1])]
    done = python("-c", MODE, PYTHONPATH=os.pathsep.join(paths))
    assert done.returncode == 0, done.stderr


def test_the_module_brings_nothing_that_changes_the_process():
    """No start-up code of fast math, and no clock that somebody may set."""
    code = Path(_core.__file__).read_bytes()
    assert b"set_fast_math" not in code
    assert b"omp_get_wtime" not in code
    assert b"clock_gettime" in code


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists(), reason="the processor is not described here"
)
def test_the_best_instruction_set_of_the_processor_is_used():
    flags = {*re.findall(r"[a-z0-9_]+", Path("/proc/cpuinfo").read_text())}
    needs = {"base": set(), "avx2": {"avx2"}}
    needs["avx512"] = {"avx512f", "avx512vl", "avx512dq", "avx512bw"}
    compiled = fastopt.build_info()["isa"]["compiled"]
    usable = [name for name in TABLES if name in compiled and needs[name] <= flags]
    assert fastopt.build_info()["isa"]["supported"] == usable
    assert ask("fastopt.build_info()['isa']['active']") == usable[-1]


WORKERS = """
import os, time
import numpy as np
import fastopt
from fastopt import _core
cpus = os.sched_getaffinity(0)
opt, grads = fastopt.SGD([np.ones(50_000)]), [np.ones(50_000)]
mine = {*os.listdir("/proc/self/task")}
_core.force_threads(15)
seen = set()
for _ in range(30):
    opt.step(grads)
    workers = {*os.listdir("/proc/self/task")} - mine
    masks = [os.sched_getaffinity(int(worker)) for worker in workers]
    assert len(masks) == 14
    assert all(len(mask) >= len(cpus) - 1 and mask <= cpus for mask in masks), masks
    seen.add(set().union(*masks) == cpus)
    time.sleep(0.005)  # they fall asleep
assert True in seen
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_workers_may_run_wherever_their_caller_may():
    """Each is kept from one processor, its waker's: not from its waker's waker's too."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    done = python("-c", WORKERS)
    assert done.returncode == 0, done.stderr


# ---- the import ----------------------------------------------------------------------------------

HEAVY = {
    "sklearn",
    "rich",
    "matplotlib",
    "torch",
    "tensorflow",
    "keras",
    "scipy",
    "pandas",
    "mpi4py",
    "safetensors",
}


def test_the_import_brings_in_nothing_but_numpy_and_is_quick(tmp_path):
    script = (
        "import sys, time; begin = time.process_time(); import numpy; before = {*sys.modules};"
        "start = time.process_time(); import fastopt; end = time.process_time();"
        "print((end - start) / (start - begin), *({*sys.modules} - before))"
    )
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    compiled["OPENBLAS_NUM_THREADS"] = "1"  # whose start would count as NumPy's
    ratios = []  # to NumPy's import: the machine may be slow, or others use it
    for _ in range(8):
        done = python("-c", script, **compiled)
        assert done.returncode == 0, done.stderr
        ratio, *modules = done.stdout.split()
        ratios.append(float(ratio))
        tops = {name.split(".")[0] for name in modules if "cython" not in name}
        assert "fastopt" in tops
        assert not tops & HEAVY
        assert tops <= {"fastopt", "numpy", *sys.stdlib_module_names}
        assert not {name for name in modules if name.startswith("fastopt.compare")}
        assert not {"fastopt.functional", "fastopt.reference"} & {*modules}
    assert min(ratios) < 0.25


def test_a_source_folder_without_the_compiled_module_says_what_to_do(tmp_path):
    (tmp_path / "fastopt").mkdir()
    source = Path(fastopt.__file__).parent
    for path in source.glob("*.py"):
        (tmp_path / "fastopt" / path.name).write_bytes(path.read_bytes())
    no_editable_install = "sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]"
    code = f"import sys; {no_editable_install}; import fastopt"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "pip install -e ." in done.stderr
