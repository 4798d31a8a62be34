"""The build of the extension modules; everything else is in pyproject.toml.

The C core is compiled first, its loops (src_c/kernels.c) once per instruction set, each time with
their own flags. It is linked into `fastopt._core`, and archived in fastopt/lib for C programs.
FASTOPT_OPENMP=0 in the environment leaves out the threading layer of OpenMP.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# No flag here may change a result: no -ffast-math, no contraction, no -march=native.
COMPILE = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
OPENMP = ["-fopenmp"]
THREADS = ["-pthread"]
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

CORE = [
    f"src_c/{name}.c"
    for name in (
        "api", "bandwidth", "coded", "gradient", "machine", "missed", "plan", "reduce",
        "region", "rows", "rules", "step", "storage", "team", "update",
    )
]  # fmt: skip
KERNELS = "src_c/kernels.c"
CORE_MODULE = "fastopt._core"
INCLUDE = ["src_c", "fastopt/include"]
HEADERS = sorted(str(path) for folder in INCLUDE for path in Path(folder).rglob("*.[hid]*"))
BRIDGE = sorted(map(str, Path("fastopt").rglob("*.px[di]")))  # what both include and cimport


class BuildExt(build_ext):
    """Compiles the C core before the extension itself, and archives it."""

    def run(self):
        super().run()
        package = Path(self.build_lib, "fastopt")
        if self.inplace:
            package = Path(self.get_finalized_command("build_py").get_package_dir("fastopt"))
        core = self.ext_map[CORE_MODULE].extra_objects
        library = Path(self.compiler.library_filename("fastopt", output_dir=str(package / "lib")))
        library.unlink(missing_ok=True)  # it would be added to
        self.compiler.create_static_lib(core, "fastopt", output_dir=str(library.parent))

    def build_extension(self, ext):
        self.force = True  # the compiler or the options may have changed since the last build
        if ext.name == CORE_MODULE:
            self.add_core(ext)
        super().build_extension(ext)

    def add_core(self, ext):
        """Compile the core, and its loops for each instruction set that the compiler knows."""
        if os.environ.get("FASTOPT_OPENMP") != "0" and self.compiles("#include <omp.h>", OPENMP):
            ext.extra_compile_args += OPENMP
            ext.extra_link_args += OPENMP
        if self.compiles("#include <pthread.h>", THREADS):
            ext.extra_compile_args += THREADS
            ext.extra_link_args += THREADS
        tables = {"base": []}
        for isa, flags in ISAS.items():
            if self.compiles(f"#ifndef __{flags[0][2:].upper()}__\n#error\n#endif", flags):
                tables[isa] = flags

        def compile_kernels(isa):
            return self.compiler.compile(
                [KERNELS],
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("FO_ISA", isa)],
                include_dirs=INCLUDE,
                extra_postargs=ext.extra_compile_args + UNROLL + tables[isa],
            )

        with ThreadPoolExecutor() as pool:  # these take longest
            for objects in pool.map(compile_kernels, tables):
                ext.extra_objects += objects
        ext.extra_objects += self.compiler.compile(
            CORE,
            output_dir=self.build_temp,
            macros=[(f"FO_HAVE_{isa.upper()}", "1") for isa in tables if isa != "base"],
            include_dirs=INCLUDE,
            extra_postargs=ext.extra_compile_args,
        )

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
        include_dirs=[*INCLUDE, numpy.get_include()],
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
            ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION"),
        ],
        extra_compile_args=[*COMPILE],
        **options,
    )


setup(
    ext_modules=cythonize(
        [
            extension(
                CORE_MODULE, ["fastopt/_core.pyx"], depends=[KERNELS, *CORE, *HEADERS, *BRIDGE]
            ),
            extension("fastopt._tensors", ["fastopt/_tensors.pyx"], depends=BRIDGE),
        ]
    ),
    cmdclass={"build_ext": BuildExt},
)
