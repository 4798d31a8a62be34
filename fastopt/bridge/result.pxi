# What a step did.

@cython.freelist(8)
cdef class StepResult:
    """What a step did.

    Attributes
    ----------
    grad_norm : float or None
        Euclidean norm of all unscaled gradients together, before clipping; None where the step
        needed no norm.
    skipped : bool
        Whether nothing was updated because a gradient held a NaN or an infinity.
    threads : int
        Number of threads that took part.
    """

    cdef fo_step_result result

    @property
    def grad_norm(self):
        return self.result.grad_norm if self.result.has_norm else None

    @property
    def skipped(self):
        return bool(self.result.skipped)

    @property
    def threads(self):
        return self.result.threads

    def __reduce__(self):
        out = self.result
        return step_result, (out.grad_norm if out.has_norm else None, self.skipped, out.threads)

    def __repr__(self):
        return (
            f"StepResult(grad_norm={self.grad_norm}, skipped={self.skipped}, "
            f"threads={self.threads})"
        )


def step_result(grad_norm, skipped, threads):
    """Return a StepResult with these attributes (they are copied and pickled so)."""
    cdef StepResult result = StepResult.__new__(StepResult)
    result.result.has_norm = grad_norm is not None
    result.result.grad_norm = grad_norm if grad_norm is not None else 0.0
    result.result.skipped = skipped
    result.result.threads = threads
    return result
