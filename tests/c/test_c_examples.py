"""The examples in C and Cython build against the fastopt at hand, and learn.

They need the compiler that CC names, or cc. CC=/bin/false says that there is none.
"""

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from c_interface import FUNCTIONS, VALUES, Api, Array, Options, Result
from support import CHECKOUT, TESTS, python

import fastopt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("CC") == "/bin/false", reason="CC=/bin/false: there is no compiler"
    ),
]

EXAMPLES = CHECKOUT / "examples"
CC = shlex.split(os.environ.get("CC", "cc"))


def run(*command, cwd):
    env = {**os.environ, "PYTHONPATH": str(Path(fastopt.__file__).parents[1])}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_the_c_program_builds_with_one_command_and_learns(tmp_path):
    folder = shutil.copytree(EXAMPLES / "c_program", tmp_path / "c_program")
    done = run("make", f"PYTHON={sys.executable}", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr
    losses = [float(loss) for loss in re.findall(r"^step +\d+, loss ([\d.]+)$", done.stdout, re.M)]
    assert len(losses) == 4
    assert losses[-1] < 1e-4 < 1 < losses[0]
    assert float(re.search(r"off by ([\d.]+) at most", done.stdout)[1]) < 0.01


# What the page leaves to its reader, and what each of its programs has reached.
SHOWN = [
    (
        "static void write_gradient(const float *w, float *g) { g[0] = w[0], g[1] = w[1]; }",
        "steps == 100 && w[0] < 0.5f && w[1] < 1.5f",
    ),
    (
        """
static void write_parameter(uint16_t *w) { for (int i = 0; i < 100; i++) w[i] = 0x3f80; }
static void write_gradient(const uint16_t *w, uint16_t *g)
{
    for (int i = 0; i < 100; i++)
        g[i] = w[i];
}
""",
        "steps == 100 && w[0] < 0x3f00 && w[99] < 0x3f00 && w_trailing[0] && m_scales[1]",
    ),
]


@pytest.mark.parametrize("number", range(len(SHOWN)))
def test_what_the_page_shows_compiles_and_learns(number, tmp_path):
    page = (EXAMPLES.parent / "docs" / "c-api.md").read_text()
    shown = re.findall(r"```c\n#include <fastopt.h>\n(.*?)```", page, re.DOTALL)
    assert len(shown) == len(SHOWN)
    given, reached = SHOWN[number]
    (tmp_path / "shown.c").write_text(f"""
#include <fastopt.h>
#include <stdio.h>
{given}
int main(void)
{{
{shown[number]}
    return {reached} ? 0 : 1;
}}
""")
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{fastopt.get_include()}", "shown.c"]
    done = run(*CC, *flags, fastopt.get_library(), "-pthread", "-lm", "-oshown", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run(tmp_path / "shown", cwd=tmp_path).returncode == 0


LAYERS = """
#include <fastopt.h>
#include <stdio.h>
int main(void)
{
    const fo_api *fo = fo_get_api();
    const int status = fo->set_threading_layer("openmp");
    printf("%s|%s", fo->get_threading_layer(), status ? fo->last_error() : "");
    return 0;
}
"""


@pytest.mark.parametrize("wanted", [False, True])
def test_a_program_links_openmp_if_it_asks_for_it(wanted, tmp_path):
    flags = ["-fopenmp", "-Wl,-u,fo_share_in_region"] if wanted else []
    (tmp_path / "layers.c").write_text(LAYERS)
    where = [f"-I{fastopt.get_include()}", "layers.c", fastopt.get_library()]
    done = run(*CC, "-std=c11", *where, *flags, "-pthread", "-lm", "-olayers", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    there = wanted and fastopt.build_info()["openmp"]
    refusal = "there is no threading layer 'openmp' here; choose one of team, serial"
    assert run(tmp_path / "layers", cwd=tmp_path).stdout == (
        "openmp|" if there else f"team|{refusal}"
    )


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The folder of the Cython example, built."""
    folder = tmp_path_factory.mktemp("cython") / "cython_module"
    shutil.copytree(EXAMPLES / "cython_module", folder)
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([*folder.glob("least_squares.*.so")]) == 1
    return folder


def test_the_cython_module_builds_with_one_command_and_learns(module):
    done = run(sys.executable, "-W", "error", "check.py", cwd=module)
    assert (done.returncode, done.stderr) == (0, "")
    assert float(re.search(r"off by ([\d.e-]+) at most", done.stdout)[1]) < 1e-6


def test_the_cython_module_passes_errors_on(module):
    code = "import numpy, least_squares; least_squares.fit(numpy.ones((3, 2)), numpy.ones(3), {})"
    done = run(sys.executable, "-c", code.format("numpy.nan"), cwd=module)
    assert "RuntimeError: lr must be >= 0, got nan" in done.stderr


ANOTHER_TABLE = """
import ctypes, sys
sys.path.insert(0, {tests!r})
import fastopt
from c_interface import fo
from fastopt import _core
new = ctypes.pythonapi.PyCapsule_New
new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
table = ctypes.create_string_buffer(bytes(fo), fo.size + 8)
abi, size = ctypes.c_uint32.from_buffer(table), ctypes.c_uint32.from_buffer(table, 4)
name = b"fastopt._core._C_API"
{change}
if name is None:
    del _core._C_API
else:
    _core._C_API = new(ctypes.addressof(table), name, None)
try:
    import least_squares
except Exception as error:
    print(type(error).__name__, error)
else:
    print("imported")
"""


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ("pass", "imported"),
        ("size.value += 8", "imported"),  # a later fastopt
        (
            "abi.value += 1",
            "ImportError this module was built for version 1 of fastopt's C interface, and the "
            "installed fastopt has version 2; build the module again",
        ),
        ("abi.value = 0", "ImportError this module was built for version 1 .* has version 0"),
        (
            "size.value -= 8",
            "ImportError this module was built against a newer fastopt than the one that is "
            "installed; upgrade fastopt",
        ),
        ("size.value = 0", "ImportError this module was built against a newer fastopt"),
        ("name = b'another'", "ImportError the installed fastopt has no C interface; upgrade"),
        ("name = None", "ImportError the installed fastopt has no C interface; upgrade"),
    ],
)
def test_a_module_is_imported_only_where_the_table_is_what_it_was_built_for(
    module, change, outcome
):
    code = ANOTHER_TABLE.format(tests=str(TESTS), change=change)
    path = f"{Path(fastopt.__file__).parents[1]}{os.pathsep}{module}"
    done = python("-c", code, PYTHONPATH=path)
    assert re.match(outcome, done.stdout), done.stdout + done.stderr


def test_the_compiler_lays_the_structs_out_as_version_1_of_the_abi_does(tmp_path):
    members = [
        (f"fo_{struct.__name__.lower()}", name, getattr(struct, name).offset)
        for struct in (Array, Options, Result, Api)
        for name, *_ in struct._fields_
    ]
    assert len(members) == 11 + 11 + 8 + 2 + len(FUNCTIONS)
    checks = [f"offsetof({struct}, {name}) == {at}" for struct, name, at in members]
    checks += [f"{name} == {value}" for name, value in VALUES.items()]
    checks += [
        f"sizeof(fo_{s.__name__.lower()}) == {ctypes.sizeof(s)}" for s in (Array, Options, Result)
    ]
    text = "".join(f'_Static_assert({check}, "{check}");\n' for check in checks)
    (tmp_path / "layout.c").write_text(f"#include <fastopt.h>\n#include <stddef.h>\n{text}")
    flags = ["-std=c11", "-fsyntax-only", f"-I{fastopt.get_include()}"]
    done = run(*CC, *flags, "layout.c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
