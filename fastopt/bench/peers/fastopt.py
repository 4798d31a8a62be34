"""fastopt, as its users call it."""

from __future__ import annotations

from collections.abc import Sequence

from fastopt import _core
from fastopt.bench.peers.base import Candidate, Tolerance
from fastopt.bench.workloads import RULES, STORAGES, Array, Rule


class Peer(Candidate):
    """One of fastopt's classes; it equals the reference bit for bit."""

    rules = tuple(RULES)
    storages = tuple(STORAGES)
    tolerance = dict.fromkeys(Candidate.dtypes, Tolerance(0, 0))

    def __init__(
        self,
        rule: Rule,
        params: Sequence[Array],
        grads: Sequence[Array],
        threads: int,
        semantics: str = "torch",
    ) -> None:
        self._params, self._grads, self._slots = list(params), list(grads), rule.slots
        self._fresh: Sequence[Array] = ()  # what clip-adam's zeroed gradients are filled from
        if rule.clip_norm is not None:
            self._fresh, self._grads = grads, [grad.copy() for grad in grads]
        options = {"global_clip_norm": rule.clip_norm} if rule.clip_norm is not None else {}
        self.opt = rule.optimizer(
            self._params, semantics=semantics, num_threads=threads, **options, **rule.options
        )

    def begin(self) -> None:
        """Fill clip-adam's gradients."""
        for grad, fresh in zip(self._grads, self._fresh, strict=False):
            grad[...] = fresh

    def step(self) -> None:
        """Do one step."""
        if self._fresh:
            self.opt.step(self._grads, zero_grad=True)
        else:
            self.opt.step(self._grads)

    def limit(self, threads: int) -> _core.Limit:
        """Return the loop that moves the bytes of a step, over the arrays of the step itself.

        It leaves them as they are. A step of clip-adam reads a gradient, and later reads it once
        more and overwrites it: as many bytes as if it read one gradient and updated another.
        """
        updated = [
            [param, *(state[slot] for slot in self._slots)]
            for param, state in zip(self._params, self.opt.state, strict=True)
        ]
        if not self._fresh:
            return _core.Limit(updated, self._grads, threads)
        for arrays, grad in zip(updated, self._grads, strict=True):
            arrays.append(grad)
        return _core.Limit(updated, self._fresh, threads)

    def weights(self) -> list[Array]:
        """Return the masters, or else the parameters."""
        state = self.opt.decoded_state()
        return [s.get("master", p) for s, p in zip(state, self._params, strict=True)]

    def bytes_moved(self) -> int:
        """Return what a step reads and writes."""
        state = [a for own in self.opt.state for name, a in own.items() if name != "step"]
        return 2 * sum(a.nbytes for a in (*self._params, *state)) + sum(
            grad.nbytes for grad in self._grads
        )

    def result(self) -> list[Array]:
        """Return the parameters as they are now."""
        return self._params
