"""The build of the extension modules; everything else is in pyproject.toml.

The loops (src_c/kernels.c) are compiled once per instruction set, each time with its own flags, and
linked into `fastopt._core`. FASTOPT_OPENMP=0 in the environment asks for a serial build.
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
CORE_MODULE = "fastopt._core"
HEADERS = sorted(str(path) for path in Path("src_c").rglob("*.[hid]*"))


class BuildExt(build_ext):
    """Compiles the loops once per instruction set before the extension itself."""

    def build_extension(self, ext):
        self.force = True  # the compiler or the options may have changed since the last build
        if ext.name == CORE_MODULE:
            self.add_loops(ext)
        super().build_extension(ext)

    def add_loops(self, ext):
        """Compile the loops for each instruction set that the compiler knows."""
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


def extension(name, sources, **options):
    return Extension(
        name,
        sources,
        include_dirs=["src_c", numpy.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
        extra_compile_args=[*COMPILE],
        **options,
    )


setup(
    ext_modules=cythonize(
        [
            extension(CORE_MODULE, ["fastopt/_core.pyx", *CORE], depends=[KERNELS, *HEADERS]),
            extension("fastopt._tensors", ["fastopt/_tensors.pyx"]),
        ]
    ),
    cmdclass={"build_ext": BuildExt},
)
