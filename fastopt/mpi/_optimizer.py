"""An optimizer of which every process has a share, over MPI."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, NoReturn

import numpy as np
from mpi4py import MPI

from fastopt import _core, _saved
from fastopt._given import label
from fastopt._hypers import Seen
from fastopt._members import Bound, Counts, Cut, Members, Part
from fastopt._memory import Array, in_memory_order, memory_order
from fastopt._options import choice, count
from fastopt._rows import rows_of
from fastopt.mpi._agreement import Ranks, Signals, digest
from fastopt.mpi._exchange import Exchange, Route
from fastopt.mpi._gradients import (
    AT_A_TIME,
    NOT_FINITE,
    Given,
    Own,
    added_in_order,
    bits_of,
    itemsizes_of,
    wire_of,
)
from fastopt.mpi._shares import cut
from fastopt.mpi._state import gather, room_for, share_of
from fastopt.mpi._watch import Watch, watch_over
from fastopt.optimizer import Optimizer, in_c_order

REDUCTIONS = ("ordered", "mpi")
BUCKET_BYTES = 1 << 23
MOST_ROUTES = 8  # one for each set of parameters with a gradient, and type of these


class Sharded(Optimizer):
    """What the classes over MPI share; each is followed by the class of which it is a share.

    Every rank has all parameters, and its own gradients. Of state and averages each has its share
    alone: contiguous blocks of each parameter.
    """

    __signature__: ClassVar[inspect.Signature]

    _last_watch: Watch | None = None
    _next_watch: Watch | None = None

    def __init__(
        self,
        params: Any,
        *args: Any,
        comm: Any = None,
        reduction: str = "ordered",
        bucket_bytes: int = BUCKET_BYTES,
        check: int | None = None,
        **options: Any,
    ) -> None:
        self._ranks = Ranks(MPI.COMM_WORLD if comm is None else comm)
        self._next: Bound | None = None
        with self._together(f"{type(self).__name__}()"):
            if options.get("rows") == "exact":
                raise ValueError(
                    'rows="exact": gradients of some rows are not supported over MPI; leave it out'
                )
            self._reduction = choice("reduction", reduction, REDUCTIONS)
            self._check_every = None if check is None else count("check", check)
            self._exchange = Exchange(self._ranks, count("bucket_bytes", bucket_bytes))
            super().__init__(params, *args, **options)
            self._ready()
            self._check_alike(self._bound, "make the optimizer over the same parameters everywhere")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the signature of the class that it is a share of."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            _, *own = inspect.signature(cls.__init__).parameters.values()
        elif Sharded in cls.__bases__:
            base: Any = cls.__mro__[2]
            mine = inspect.signature(Sharded.__init__).parameters
            _, *own = inspect.signature(base.__init__).parameters.values()
            own += [mine[name] for name in ("comm", "reduction", "bucket_bytes", "check")]
        else:
            return
        cls.__signature__ = inspect.Signature(own)

    # ---- shares ----------------------------------------------------------------------------------

    @property
    def _cut(self) -> Cut | None:
        rank, size = self._ranks.rank, self._ranks.size
        before = self._members.parts or [] if self._last_watch is not None else []
        has = [
            (
                sum(
                    p.nbytes * (p.bounds[r + 1] - p.bounds[r]) // max(1, p.bounds[-1])
                    for p in before
                ),
                sum(p.bounds[r + 1] - p.bounds[r] for p in before if p.nbytes == 0),
            )
            for r in range(size)
        ]

        def parts(wholes: list[Array], nbytes: list[int]) -> list[Part]:
            bounds = cut([whole.size for whole in wholes], nbytes, has)
            return [
                Part(own[rank], own[rank + 1], own, n)
                for own, n in zip(bounds, nbytes, strict=True)
            ]

        return parts

    def _extended(
        self,
        before: Members,
        rows: list[list[float]],
        groups: list[dict[str, Any]],
        counts: Counts,
    ) -> Bound:
        """Make what looks at all of each parameter too, so that nothing can fail later."""
        new = super()._extended(before, rows, groups, counts)
        self._next, self._next_watch = (
            new,
            watch_over(new.members, self._settings, self._ranks.size, self._last_watch),
        )
        return new

    def _commit(self, new: Bound, seen: Seen) -> None:
        """Take over members, and what looks at all of each parameter."""
        watch = self._last_watch
        if watch is None or watch.wholes is not new.members.wholes:
            watch = self._next_watch
            if watch is None or watch.wholes is not new.members.wholes:
                watch = watch_over(new.members, self._settings, self._ranks.size, self._last_watch)
        super()._commit(new, seen)
        self._last_watch, self._next, self._next_watch = watch, None, None

    @property
    def _watch(self) -> Watch:
        assert self._last_watch is not None
        return self._last_watch

    @property
    def _whole_plan(self) -> _core.Plan:
        return self._watch.plan

    def _checked(
        self, group: Mapping[str, Any], where: str, completed_steps: int
    ) -> dict[str, float]:
        values = super()._checked(group, where, completed_steps)
        if values.get("rowwise"):
            raise ValueError(
                f"{where}rowwise=True: a row's mean is of all of its elements, and over MPI a rank "
                "may have a part of a row; leave rowwise out"
            )
        return values

    @property
    def accumulated_steps(self) -> int:
        """How many micro-batches have been summed since the last update, with ``accumulate``."""
        return self._whole_plan.accumulated_steps

    # ---- one decision ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _together(self, call: str) -> Iterator[None]:
        """Do something on all ranks, or raise on all, as long as nothing was written."""
        signals = self._signals = Signals()
        self._call, self._alike_now = call, dict[str, bytes]()
        with signals.held():
            self._undecided = True
            try:
                yield
                if self._undecided:
                    self._ready()
            except BaseException as error:
                self._next = self._next_watch = None
                if self._undecided:
                    self._undecided = False
                    self._ranks.agree(error, call, {})
                raise

    def _ready(self) -> None:
        """Agree that all ranks can do what each was asked for, or raise on all."""
        self._signals.handle()
        self._undecided = False
        self._ranks.agree(None, self._call, self._alike_now)
        if self._next is not None:
            self._check_alike(self._next, "add the same group on all ranks")

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add parameters on all ranks, as the class without MPI does on one."""
        with self._together("add_param_group()"):
            super().add_param_group(group)

    def reset(self) -> None:
        """Put state, counters and averages back to where they began; parameters stay."""
        super().reset()
        self._whole_plan.restore([], [], 0, [False])

    # ---- state dicts, checkpoints ----------------------------------------------------------------

    def _bring_up_to_date(self, what: str) -> None:
        super()._bring_up_to_date(what)
        if self.accumulated_steps:
            raise RuntimeError(
                f"{what}: {self.accumulated_steps} of {self._settings.accumulate} micro-batches "
                "are summed on each rank, which no other number of ranks could go on with; do this "
                "after an update"
            )

    def gather_state_dict(self, root: int = 0) -> dict[str, Any] | None:
        """Return on one rank the state dict that the class without MPI would have.

        All ranks have to call it. :meth:`load_state_dict` takes it, here on any number of ranks
        (all of which are given it), and in the class without MPI; :meth:`state_dict` returns this
        rank's share alone.

        Parameters
        ----------
        root : int, optional
            The rank that gets it.

        Returns
        -------
        dict or None
            None on all other ranks.
        """
        with self._lock, self._together("gather_state_dict()"):
            if isinstance(root, bool) or not isinstance(root, Integral):
                raise TypeError(f"root: expected the number of a rank, got {root!r}")
            if not 0 <= root < self._ranks.size:
                raise ValueError(f"root: expected a rank below {self._ranks.size}, got {root!r}")
            return self._gathered("gather_state_dict()", int(root), lambda array: array)

    def _gathered(
        self, what: str, root: int, copy: Callable[[Array], Array]
    ) -> dict[str, Any] | None:
        """Agree, and return the whole state dict on one rank."""
        self._bring_up_to_date(what)
        members = self._members
        room = room_for(members) if self._ranks.rank == root else None
        self._alike_now = {
            "root": str(root).encode(),
            "set of state arrays": repr([list(state) for state in members.state]).encode(),
            **self._alike(1.0),
        }
        self._ready()
        gather(self._ranks, members, root, room)
        if room is None:
            return None
        return _saved.state_dict(self._rule, self._settings, room, Counts.of(self._plan), copy)

    def load_state_dict(self, state_dict: Mapping[str, Any], *, convert: bool = False) -> None:
        """Take over this rank's share, on all ranks, or raise on all.

        Parameters
        ----------
        state_dict : dict
            What :meth:`gather_state_dict` returned, or the class without MPI; or this rank's own
            share, from :meth:`state_dict`.
        convert : bool, optional
            As for the class without MPI.
        """
        with self._together("load_state_dict()"):
            super().load_state_dict(state_dict, convert=convert)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file as the class without MPI does; all ranks have to call it.

        The first rank writes it, having gathered what the others have. Training goes on from it in
        any number of ranks, and in the class without MPI.
        """
        with self._lock, self._together("save()"):
            os.fspath(path)
            self._plan.check()
            saved = self._gathered("save()", 0, in_c_order)
            self._alike_now, self._undecided = {}, True  # for the file may not be written
            if saved is not None:
                self._write(path, saved)

    def load(self, path: str | os.PathLike[str], *, convert: bool = False) -> None:
        """Take over a file that :meth:`save` wrote, here or without MPI, on any number of ranks.

        All ranks have to call it, and each reads the file. All raise if one does, and nothing is
        changed.
        """
        with self._together("load()"):
            source, saved, checksum = self._read(path)
            self._alike_now = {"file": checksum.encode()}
            self._restore_from(saved, source, convert, checkpoint=True)
            with self._lock:
                self._share_params()

    def _restore_from(
        self, saved: Mapping[str, Any], source: str, convert: bool, *, checkpoint: bool
    ) -> None:
        share = share_of(self._settings, self._members, saved, source)
        super()._restore_from(share, source, convert, checkpoint=checkpoint)
        self._whole_plan.restore([], [], 0, [False])  # no micro-batch is summed any more

    def __copy__(self) -> NoReturn:
        self.__getstate__()

    def __getstate__(self) -> NoReturn:
        raise TypeError("an optimizer over MPI cannot be copied: use gather_state_dict() or save()")

    # ---- what is the same everywhere -------------------------------------------------------------

    def _check_alike(self, new: Bound, way_out: str) -> None:
        """Raise, on all ranks, if anything differs between them that must not."""
        members = new.members
        what = {
            "keys, shapes and dtypes of the parameters": [
                [
                    repr(key) if isinstance(key, (str, int)) else type(key).__name__,
                    whole.shape,
                    whole.dtype.name,
                    memory_order(whole),
                ]
                for key, whole in zip(members.keys, members.wholes, strict=True)
            ],
            "hyperparameters": new.hypers.plan_rows(),
            "parameters excluded from weight decay": members.excluded,
            "options": [
                *map(repr, self._settings._replace(no_decay=None, num_threads=None)),
                type(self).__name__,
                self._reduction,
                self._exchange.most,
                self._check_every,
            ],
        }
        found = self._ranks.differ([digest(repr(value).encode()) for value in what.values()])
        if found is not None:
            number, rank = found
            raise ValueError(f"rank {rank} has other {[*what][number]} than rank 0; {way_out}")
        self._check_params(members, ValueError, way_out)

    def _check_params(self, members: Members, kind: type[Exception], way_out: str) -> None:
        found = self._ranks.differ(
            [digest(in_memory_order(whole).view(np.uint8)) for whole in members.wholes]
        )
        if found is not None:
            number, rank = found
            raise kind(
                f"{label(members.keys[number])}: rank {rank} has other values than rank 0; "
                f"{way_out}"
            )

    # ---- the step --------------------------------------------------------------------------------

    def step(
        self,
        grads: Sequence[Array | None] | Mapping[Any, Array | None] | Iterable[Array | None],
        *,
        loss_scale: float = 1.0,
        zero_grad: bool = False,
    ) -> _core.StepResult:
        """Update all parameters, on all ranks, with the mean of their gradients; or raise on all.

        Parameters
        ----------
        grads, loss_scale, zero_grad
            As for the class without MPI; a gradient is this rank's own. One that is None counts as
            zero, unless it is None on all ranks: then its parameter is left out of this step. Not
            one of :class:`fastopt.Rows`.

        Returns
        -------
        StepResult
            The same on all ranks, but for ``threads``.

        Raises
        ------
        Exception
            On all ranks what the class without MPI raises on one; the message begins with
            ``rank R:``, the first rank that it is about. Nothing is changed anywhere.

        Notes
        -----
        Signals that come meanwhile are handled before anything is written, or once all is.
        """
        with self._lock, np.errstate(all="ignore"), self._together("step()"):
            given = self._prepared(grads, loss_scale, zero_grad)
            bits = self._bits(given)
            self._exchange.prepare()
            self._alike_now = self._alike(given.loss_scale)
            self._ready()
            return self._agreed(given, self._ranks.union(bits))

    def _prepared(self, grads: Any, loss_scale: Any, zero_grad: Any) -> Given:
        """Return what a step can use, having checked all that is this rank's."""
        given, loss_scale, zero_grad = self._begun(grads, loss_scale, zero_grad)
        self._follow()
        members = self._members
        for key, grad in zip(members.keys, given, strict=False):
            if not isinstance(grad, np.ndarray) and grad is not None and rows_of(grad) is not None:
                raise TypeError(
                    f"gradient of {label(key)}: one of some rows, which is not supported over MPI; "
                    "give one of all rows"
                )
        arrays = self._whole_plan.check_gradients(given, zero_grad=zero_grad)
        self._plan.check()
        now = np.fromiter(map(_core.address, members.wholes), np.int64, len(members.wholes))
        if (now != self._watch.addresses).any():
            key = members.keys[int(np.flatnonzero(now != self._watch.addresses)[0])]
            raise ValueError(f"{label(key)}: its memory has moved; make a new optimizer")
        places, orders = self._whole_plan.places(), self._watch.orders
        return Given(given, arrays, places, orders, loss_scale, zero_grad)

    def _bits(self, given: Given) -> Array:
        """Return what all ranks have to know of this one's gradients."""
        bits, plan = given.bits(), self._whole_plan
        if self._settings.accumulate > 1:
            bits |= np.where(plan.summed(), bits_of(self._watch.arithmetic), 0).astype(np.uint8)
            if self._settings.nonfinite != "propagate":
                _, finite = plan.scan(given.arrays, given.loss_scale)
                firsts = self._watch.blocks.firsts
                for i in range(len(bits)) if not finite.all() else ():
                    if not finite[firsts[i] : firsts[i + 1]].all():
                        bits[i] |= NOT_FINITE
        return bits

    def _alike(self, loss_scale: float) -> dict[str, bytes]:
        """Return what a step has to find the same on all ranks."""
        counts = self.completed_steps, self.accumulated_steps
        return {
            "loss_scale": np.float64(loss_scale).tobytes(),
            "hyperparameters": digest(np.array(self._bound.hypers.plan_rows()).tobytes()),
            "number of completed steps, or of micro-batches": np.array(counts).tobytes(),
        }

    def _agreed(self, given: Given, every: Array) -> _core.StepResult:
        """Step, all ranks having found nothing that this rank may stumble over."""
        settings = self._settings
        kinds = every & ~np.uint8(NOT_FINITE)
        if (every & NOT_FINITE).any():
            return self._skipped(given, None, int(np.flatnonzero(every & NOT_FINITE)[0]))
        if self.accumulated_steps + 1 < settings.accumulate:
            result = self._whole_plan.step(given.arrays, given.loss_scale, False)
            self._zero(given)
            return result
        self._reduce(given, kinds)
        means = [
            mean if kind else None for mean, kind in zip(self._watch.means, kinds, strict=True)
        ]
        scale = given.loss_scale if settings.accumulate == 1 else 1.0
        squares = None
        if settings.nonfinite != "propagate" or settings.clip in ("clip_norm", "global_clip_norm"):
            squares, bad = self._scanned(means, scale)
            if bad is not None and settings.nonfinite != "propagate":
                norm = None
                if settings.clip in ("clip_norm", "global_clip_norm"):
                    norm = math.sqrt(added_in_order(squares))
                return self._skipped(given, norm, bad)
        self._whole_plan.wait_for_readers()
        result = self._plan.step_part(means, scale, squares)
        self._share_params(kinds)
        if settings.accumulate > 1:
            self._whole_plan.restore([], [], 0, [False])
        self._zero(given)
        if self._check_every and self.completed_steps % self._check_every == 0:
            way_out = f"after {self.completed_steps} steps; load the last checkpoint"
            self._check_params(self._members, RuntimeError, way_out)
        return result

    # ---- non-finite gradients --------------------------------------------------------------------

    def _skipped(self, given: Given, norm: float | None, bad: int) -> _core.StepResult:
        """Return from a step that does not take place, or raise on all ranks."""
        if self._settings.nonfinite == "skip":
            self._zero(given)
            return _core.step_result(norm, True, 1)
        own = next((i for i in range(len(given.arrays)) if not given.is_finite(i)), None)
        found = self._ranks.comm.allgather(own)
        rank = next((r for r, number in enumerate(found) if number is not None), None)
        key = self._members.keys[bad if rank is None else found[rank]]
        raise FloatingPointError(
            f"{'the mean over all ranks' if rank is None else f'rank {rank}'}: gradient of "
            f"{label(key)} holds a NaN or an infinity"
            f"{'' if given.loss_scale == 1 else ' once divided by loss_scale'}; nothing was updated"
        )

    def _scanned(self, means: list[Array | None], loss_scale: float) -> tuple[Array, int | None]:
        """Return for each parameter the squares of its mean gradient, and the first bad one."""
        sums, finite = self._plan.scan(means, loss_scale)
        blocks = self._watch.blocks
        own = np.concatenate([sums, finite])
        every = np.empty(2 * len(blocks.order))
        self._ranks.comm.Allgatherv(own, [every, 2 * blocks.counts])
        parts = np.split(every, np.cumsum(2 * blocks.counts)[:-1])
        halves = [np.split(part, 2) for part in parts]
        sums, finite = (
            np.concatenate([half[k] for half in halves])[blocks.order] for k in range(2)
        )
        squares, bad = np.zeros(len(means)), None
        for i, (begin, end) in enumerate(itertools.pairwise(blocks.firsts)):
            if means[i] is not None and begin < end:
                squares[i] = added_in_order(sums[begin:end])
                if bad is None and not finite[begin:end].all():
                    bad = i
        return squares, bad

    # ---- what travels ----------------------------------------------------------------------------

    def _reduce(self, given: Given, kinds: Array) -> None:
        """Put the mean gradient of this rank's share where the step finds it."""
        settings, watch = self._settings, self._watch
        wire = wire_of(
            kinds,
            watch.arithmetic,
            wide=settings.accumulate > 1 or self._reduction == "mpi",
        )
        sums: list[Array | None] = [None] * len(kinds)
        addresses = given.addresses
        if self._members.sums is not None:
            addresses = np.zeros_like(addresses)  # what travels is nowhere yet
            pairs = zip(self._members.sums, self._whole_plan.summed(), strict=True)
            sums = [in_memory_order(x) if any_yet else None for x, any_yet in pairs]

        def fill(i: int, begin: int, end: int, to: Array) -> None:
            there, total = given.arrays[i] is not None, sums[i]
            if not there and total is None:
                to[...] = 0
                return
            for k in range(begin, end, AT_A_TIME):
                m = min(end, k + AT_A_TIME)
                own = given.elements(i, k, m) if there else None
                out = to[k - begin : m - begin]
                if own is not None and settings.accumulate == 1:
                    out[...] = own
                    continue
                own = None if own is None else np.ascontiguousarray(own)
                summed = None if total is None else total[k:m]
                _core.batch_mean(summed, own, 1 / given.loss_scale, settings.accumulate, out)

        own = Own(addresses, given.storages, itemsizes_of(given.storages), given.elements, fill)
        self._exchange.reduce(
            self._route(wire.itemsizes), wire, own, ordered=self._reduction == "ordered"
        )

    def _share_params(self, kinds: Array | None = None) -> None:
        """Give all ranks the parameters, or those alone of a kind that is not 0."""
        watch = self._watch
        sizes = watch.itemsizes if kinds is None else np.where(kinds == 0, 0, watch.itemsizes)
        self._exchange.gather(self._route(sizes), watch.vectors, watch.addresses, watch.itemsizes)

    def _route(self, sizes: Array) -> Route:
        """Return the way of elements of so many bytes; 0: they do not travel."""
        watch = self._watch
        routes, key = watch.routes, sizes.tobytes()
        if key not in routes:
            if len(routes) == MOST_ROUTES:
                del routes[next(iter(routes))]
            routes[key] = self._exchange.route(
                [part.bounds for part in watch.parts], sizes.tolist(), watch.means
            )
        return routes[key]

    def _zero(self, given: Given) -> None:
        """Zero the gradients, if that was asked for."""
        if not given.zero_grad:
            return
        lent = [g for g, array in zip(given.given, given.arrays, strict=True) if g is not array]
        after = _core.version_counter(lent)
        for array in given.arrays:
            if array is not None:
                np.asarray(array).view(f"u{array.itemsize}")[...] = 0
        if after is not None:
            after()
