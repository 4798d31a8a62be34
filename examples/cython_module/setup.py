"""``python setup.py build_ext --inplace`` builds the module against the installed fastopt."""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

import fastopt

setup(
    name="least-squares",
    version="0",
    ext_modules=cythonize(
        [Extension("least_squares", ["least_squares.pyx"], include_dirs=[fastopt.get_include()])],
        # Where `cimport fastopt` finds its declarations, however it was installed.
        include_path=[str(Path(fastopt.__file__).parents[1])],
    ),
)
