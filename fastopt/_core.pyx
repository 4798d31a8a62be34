# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""The bridge between NumPy arrays and the C core.

It checks arrays, binds their memory to a C plan and runs the plan's step. It knows arrays, not
algorithms: what a rule's hyperparameters and slots mean is the rule's business.

This file is the door: what was built, what runs, and forks. The rooms are in bridge/, one subject
each; all are one C file, so a call from one into another costs nothing. They find here what they
cimport and import.
"""

cimport cython
cimport numpy as cnp
from cpython.buffer cimport (
    PyBUF_FULL_RO,
    PyBuffer_Release,
    PyObject_CheckBuffer,
    PyObject_GetBuffer,
)
from cpython.dict cimport PyDict_Next, PyDict_SetItem
from cpython.exc cimport PyErr_CheckSignals
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_Check
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.pycapsule cimport PyCapsule_CheckExact, PyCapsule_IsValid, PyCapsule_New
from cpython.pythread cimport (
    NOWAIT_LOCK,
    PY_LOCK_ACQUIRED,
    PyLockStatus,
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_get_thread_ident,
    PyThread_release_lock,
    PyThread_type_lock,
)
from cpython.ref cimport PyObject
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport qsort
from libc.string cimport memcpy, memset

import os
import sys
from collections.abc import Mapping

import numpy as np

cnp.import_array()

# The C interface, for fo_import() in fastopt.h.
_C_API = PyCapsule_New(<void *>fo_get_api(), "fastopt._core._C_API", NULL)

BLOCK = FO_BLOCK

# Elements below which a step keeps the GIL: dropping and taking it would cost more than it gives.
cdef int64_t KEEP_GIL_BELOW = 1 << 14


# ---- what was built, and what runs ---------------------------------------------------------------

def isa():
    """Instruction sets: those compiled in, those that can run here, and the one in use."""
    names = [fo_isa_name(i).decode() for i in range(fo_isa_count())]
    return {
        "compiled": names,
        "supported": [names[i] for i in range(fo_isa_count()) if fo_isa_supported(i)],
        "active": names[fo_isa_active()],
    }


def select_isa(str name):
    """Use the loops compiled for another instruction set, from the next step on."""
    if not fo_isa_select(name.encode()):
        raise ValueError(
            f"instruction set {name!r} is not supported here; choose one of {isa()['supported']}"
        )


def compiler():
    """Name and version of the C compiler that built this module."""
    return fo_compiler().decode()


def layers():
    """Threading layers: those there are, and the active one."""
    available = [
        fo_layer_name(<fo_layer>i).decode() for i in range(FO_LAYERS)
        if fo_layer_available(<fo_layer>i)
    ]
    return {"available": available, "active": fo_layer_name(fo_layer_active()).decode()}


def select_layer(str name):
    """Run steps by another threading layer, from the next one on."""
    if not fo_layer_select(name.encode()):
        raise ValueError(
            f"there is no threading layer {name!r} here; choose one of {layers()['available']}"
        )


def openmp_processors():
    """How many processors OpenMP's threads may have; 0 without that layer."""
    return fo_openmp_processors()


def forked_unseen():
    """Keep out of OpenMP's runtime: the process was forked before this module was loaded."""
    fo_note_fork()


cdef int threads_exact = 0


def set_threads(int limit):
    """Set the upper bound on threads for plans that have none of their own."""
    fo_set_num_threads(limit)


def get_threads():
    """Return the upper bound on threads for plans that have none of their own."""
    return fo_get_num_threads()


def force_threads(int team):
    """For tests: run every step with exactly this many threads (-1: all it may use); 0 ends it."""
    global threads_exact
    threads_exact = team


# ---- forks ---------------------------------------------------------------------------------------

# A child is a copy of its parent at one moment, but without its parent's other threads: what one of
# them was writing stays half written. So a plan notes that it is being written, and in which
# process.
cdef int64_t forks = 0  # that lie behind this process


def note_fork():
    """Take note that this process is a child that was forked just now."""
    global forks
    forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=note_fork)

TORN = (
    "this process was forked while another thread was inside a step: parameters and state are half "
    "of one step and half of the next. Put the parameters back, then call load_state_dict() or "
    "reset(), or make a new optimizer"
)


# ---- the bridge ----------------------------------------------------------------------------------

# Each may use the types and constants of those before it, and the functions of all.
include "bridge/array.pxi"
include "bridge/storage.pxi"
include "bridge/extents.pxi"
include "bridge/overlap.pxi"
include "bridge/gradient.pxi"
include "bridge/rows.pxi"
include "bridge/rule.pxi"
include "bridge/binder.pxi"
include "bridge/lock.pxi"
include "bridge/limit.pxi"
include "bridge/reduce.pxi"
include "bridge/result.pxi"
include "bridge/kept.pxi"
include "bridge/plan.pxi"
include "bridge/groups.pxi"
include "bridge/workspace.pxi"
include "bridge/call.pxi"
