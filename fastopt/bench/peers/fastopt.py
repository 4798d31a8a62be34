"""fastopt, as its users call it."""

from __future__ import annotations

from collections.abc import Sequence

from fastopt.bench.peers.base import Contender, Tolerance
from fastopt.bench.workloads import Array, Rule


class Peer(Contender):
    """One of fastopt's classes; it equals the reference bit for bit."""

    rules = (*Contender.rules, "tail")
    tolerance = dict.fromkeys(Contender.dtypes, Tolerance(0, 0))

    def __init__(
        self,
        rule: Rule,
        params: Sequence[Array],
        grads: Sequence[Array],
        threads: int,
        semantics: str = "torch",
    ) -> None:
        self._params, self._grads = list(params), list(grads)
        self._fresh: Sequence[Array] = ()  # what the tail's zeroed gradients are filled from
        if rule.clip_norm is not None:
            self._fresh, self._grads = grads, [grad.copy() for grad in grads]
        options = {"global_clip_norm": rule.clip_norm} if rule.clip_norm is not None else {}
        self._opt = rule.optimizer(
            self._params, semantics=semantics, num_threads=threads, **options, **rule.options
        )

    def begin(self) -> None:
        """Fill the tail's gradients."""
        for grad, fresh in zip(self._grads, self._fresh, strict=False):
            grad[...] = fresh

    def step(self) -> None:
        """Do one step."""
        if self._fresh:
            self._opt.step(self._grads, zero_grad=True)
        else:
            self._opt.step(self._grads)

    def result(self) -> list[Array]:
        """Return the parameters as they are now."""
        return self._params
