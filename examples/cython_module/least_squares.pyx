# cython: language_level=3, boundscheck=False, wraparound=False
"""Linear regression by Adam. The loop over the steps runs without Python, and without the GIL."""

cimport fastopt
from libc.stdint cimport int64_t

import numpy as np

cdef const fastopt.fo_api *fo = fastopt.fo_import()


cdef int check(fastopt.fo_status status) except -1:
    if status != fastopt.FO_OK:
        raise RuntimeError(fo.last_error().decode())
    return 0


cdef void gradient(
    const double[:, ::1] X, const double[::1] y, const double[::1] w, double[::1] grad
) noexcept nogil:
    """Write the gradient of half the mean squared error."""
    cdef Py_ssize_t i, j
    cdef double error
    grad[:] = 0
    for i in range(X.shape[0]):
        error = -y[i]
        for j in range(X.shape[1]):
            error += X[i, j] * w[j]
        for j in range(X.shape[1]):
            grad[j] += error * X[i, j] / X.shape[0]


def fit(const double[:, ::1] X, const double[::1] y, double lr=0.05, int steps=1000):
    """Return weights `w` for which ``X @ w`` is close to `y`."""
    cdef Py_ssize_t n = X.shape[1]
    if not 0 < n or y.shape[0] != X.shape[0]:
        raise ValueError(f"X of shape {np.shape(X)} and y of {np.shape(y)} do not fit")
    cdef double[::1] w = np.zeros(n), grad = np.zeros(n)
    cdef double[::1] exp_avg = np.zeros(n), exp_avg_sq = np.zeros(n)
    cdef fastopt.fo_array weights = fastopt.fo_dense(fastopt.FO_F64, &w[0])
    cdef fastopt.fo_array gradients = fastopt.fo_dense(fastopt.FO_F64, &grad[0])
    cdef fastopt.fo_array mean = fastopt.fo_dense(fastopt.FO_F64, &exp_avg[0])
    cdef fastopt.fo_array mean_of_squares = fastopt.fo_dense(fastopt.FO_F64, &exp_avg_sq[0])
    cdef int64_t count = 0
    cdef fastopt.fo_status status = fastopt.FO_OK
    cdef fastopt.fo_optimizer *opt
    check(fo.create(b"adam", 1, 1, &opt))
    try:
        check(fo.set_hyper(opt, 0, b"lr", lr))
        check(fo.set_param(opt, 0, 0, n, &weights, &count))
        check(fo.set_state(opt, 0, b"exp_avg", &mean))
        check(fo.set_state(opt, 0, b"exp_avg_sq", &mean_of_squares))
        check(fo.set_grad(opt, 0, &gradients))
        with nogil:
            while count < steps and status == fastopt.FO_OK:
                gradient(X, y, w, grad)
                status = fo.step(opt, NULL)
        check(status)
    finally:
        fo.destroy(opt)
    return np.asarray(w)
