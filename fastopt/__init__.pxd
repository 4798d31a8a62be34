"""The C interface, for ``cimport fastopt``."""

from fastopt._core cimport *
