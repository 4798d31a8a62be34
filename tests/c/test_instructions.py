"""The module runs on processors without AVX: what it is made of, and on an emulated one."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import TESTS, python

import fastopt
from fastopt import _core, _tensors

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="about x86-64")

# What needs more than the baseline: AVX's encoding (mnemonics begin with a v; `verr` and `verw` are
# old), its registers, and extensions that some compilers use when they are told of a processor.
BEYOND = re.compile(
    r"%[yz]mm|\t(v(?!err|erw)\w+|(andn|bextr|bls\w+|bzhi|[mr]ulx|pdep|pext|rorx|sarx|shlx|shrx|"
    r"tzcnt|lzcnt|popcnt|movbe|adcx|adox|crc32\w?|p(shufb|alignr|testr?|mulld|blend\w+)|"
    r"round[ps][sd]|dpp[sd]))(\s|$)"
)


def functions_by_file(module):
    """Return, for each source file in the symbol table, in order: its name and its functions."""
    listed = subprocess.run(
        ["readelf", "-sW", module.__file__], capture_output=True, text=True, check=True
    ).stdout
    files, everywhere = [], []
    for line in listed[listed.index("'.symtab'") :].splitlines():
        fields = line.split()
        if len(fields) < 8 or not fields[0][:-1].isdigit():
            continue
        address, kind, binding, name = int(fields[1], 16), fields[3], fields[4], fields[7]
        if kind == "FILE":
            files.append((name, {}))
        elif kind == "FUNC" and address:
            (files[-1][1] if files and binding == "LOCAL" else {}).update({address: name})
            everywhere.append(address)
    return files, {*everywhere}


def offenders(module):
    """Return the addresses of functions that hold an instruction beyond the baseline."""
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", module.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found, function, seen = {}, None, 0
    for line in code.splitlines():
        if head := re.match(r"([0-9a-f]+) <", line):
            function = int(head[1], 16)
            seen += 1
        elif BEYOND.search(line):
            found.setdefault(function, line.strip())
    assert seen > 100
    return found


@pytest.mark.skipif(
    not (shutil.which("objdump") and shutil.which("readelf")), reason="needs binutils"
)
@pytest.mark.parametrize("module", [_core, _tensors], ids=lambda m: m.__name__)
def test_nothing_but_the_chosen_loops_goes_beyond_the_baseline(module):
    files, everywhere = functions_by_file(module)
    found = offenders(module)
    loops = [functions for name, functions in files if name == "kernels.c"]
    compiled = _core.isa()["compiled"] if module is _core else []
    assert len(loops) == len(compiled)
    assert all(len(functions) >= 22 for functions in loops)
    # The loops of one instruction set are one object, so one file in the list.
    beyond = [{*found} & {*functions} for functions in loops]
    assert sum(bool(some) for some in beyond) == max(0, len(compiled) - 1), beyond
    outside = {*found} - set().union(*beyond)
    assert not outside, {hex(address): found[address] for address in outside}
    assert {*found} <= everywhere


STEPS = """
import hashlib, sys
import numpy as np
import fastopt
from tables import CASES
from fastopt import _core
rng = np.random.default_rng(0)
digest = hashlib.sha256()
for _, cls, kwargs in CASES:
    for dtype in (np.float32, np.float64):
        sizes = (1, 7, 33, 4099)
        opt = cls([rng.standard_normal(n).astype(dtype) for n in sizes], **kwargs)
        for team in (1, 3):
            _core.force_threads(team)
            opt.step([rng.standard_normal(n).astype(dtype) for n in sizes])
        for array in (*opt.params, *(a for s in opt.state for a in s.values())):
            digest.update(array.tobytes())
print(_core.isa()["supported"], _core.isa()["active"], digest.hexdigest())
"""


@pytest.mark.slow
def test_an_old_processor_gives_the_same_bits(tmp_path):
    """Nehalem (2008) is what NumPy itself needs: SSE 4.2, and no AVX."""
    emulator = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if not emulator:
        pytest.skip("needs qemu-user")
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    here = python(str(script), PYTHONPATH=paths(), OPENBLAS_NUM_THREADS="1")
    assert here.returncode == 0, here.stderr
    there = subprocess.run(
        [emulator, "-cpu", "Nehalem", sys.executable, str(script)],
        env={"PYTHONPATH": paths(), "OPENBLAS_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert there.returncode == 0, there.stderr
    *isa, digest = there.stdout.split()
    assert isa == ["['base']", "base"]
    assert digest == here.stdout.split()[-1]


def paths():
    return f"{TESTS}:{Path(fastopt.__file__).parents[1]}"
