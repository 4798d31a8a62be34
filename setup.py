"""The build of the one extension module; everything else is in pyproject.toml.

The loops (src_c/kernels.c) are compiled once per instruction set, each time with its own flags, and
linked into the same module. FASTOPT_OPENMP=0 in the environment asks for a serial build.
"""

import os
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# No flag here may change a result: no -ffast-math, no contraction, no -march=native.
COMPILE = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
OPENMP = ["-fopenmp"]
UNROLL = ["-funroll-loops"]  # for the loops alone

# Instruction sets besides `base`, the compiler's own default, and their flags.
ISAS = {
    "avx2": ["-mavx2"],
    "avx512": [
        "-mavx512f",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512bw",
        "-mprefer-vector-width=512",
    ],
}

CORE = [f"src_c/{name}.c" for name in ("cpu", "driver", "limit", "rules", "team")]
KERNELS = "src_c/kernels.c"
HEADERS = sorted(str(path) for path in Path("src_c").rglob("*.[hid]*"))


class BuildExt(build_ext):
    """Compiles the loops once per instruction set before the extension itself."""

    def build_extension(self, ext):
        self.force = True  # the compiler or the options may have changed since the last build
        if os.environ.get("FASTOPT_OPENMP") != "0" and self.compiles("#include <omp.h>", OPENMP):
            ext.extra_compile_args += OPENMP
            ext.extra_link_args += OPENMP
        tables = {"base": []}
        for isa, flags in ISAS.items():
            if self.compiles(f"#ifndef __{flags[0][2:].upper()}__\n#error\n#endif", flags):
                tables[isa] = flags
        for isa, flags in tables.items():
            ext.extra_objects += self.compiler.compile(
                [KERNELS],
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("FO_ISA", isa)],
                extra_postargs=ext.extra_compile_args + UNROLL + flags,
                depends=ext.depends,
            )
        ext.define_macros += [(f"FO_HAVE_{isa.upper()}", "1") for isa in tables if isa != "base"]
        super().build_extension(ext)

    def compiles(self, text, flags):
        """Whether a program with these lines compiles and links under these flags."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(f"{text}\nint main(void) {{ return 0; }}\n")
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=flags
                )
                self.compiler.link_executable(objects, "probe", folder, extra_postargs=flags)
            except Exception:  # each compiler class has its own
                return False
        return True


extension = Extension(
    "fastopt._core",
    ["fastopt/_core.pyx", *CORE],
    include_dirs=["src_c", numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
    extra_compile_args=COMPILE,
    extra_link_args=[],
    extra_objects=[],
    depends=[KERNELS, *HEADERS],
)

setup(ext_modules=cythonize([extension]), cmdclass={"build_ext": BuildExt})
