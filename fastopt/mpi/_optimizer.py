"""An optimizer of which every process has a share, over MPI."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
from mpi4py import MPI

from fastopt import _core, _saved
from fastopt._given import flatten_grads, label
from fastopt._hypers import Seen
from fastopt._members import Bound, Counts, Cut, Members, Part
from fastopt._memory import Array, in_memory_order, memory_order
from fastopt._options import choice, count, flag
from fastopt._rows import rows_of
from fastopt.mpi._agreement import Ranks, Signals, digest
from fastopt.mpi._exchange import Exchange
from fastopt.mpi._gradients import (
    DTYPE_BITS,
    Blocks,
    Given,
    added_in_order,
    blocks_of,
    dtype_name,
    on_the_way,
    vector_of,
)
from fastopt.mpi._shares import cut
from fastopt.mpi._state import gathered, share_of
from fastopt.optimizer import Optimizer

REDUCTIONS = ("ordered", "mpi")
BUCKET_BYTES = 1 << 23
MOST_ROUTES = 8  # one for each set of parameters with a gradient, and type of these

_NOTHING = np.zeros(0, np.uint8)


class Watch(NamedTuple):
    """What looks at all of each parameter, as long as it is the same memory."""

    wholes: list[Array]
    plan: _core.Plan  # checks gradients, sums micro-batches
    means: list[Array]  # of all ranks' gradients: this rank's share
    bounds: list[tuple[int, ...]]  # of all ranks' parts of each parameter
    blocks: Blocks
    orders: list[tuple[int, ...]]  # of axes in memory
    vectors: list[Array]  # the parameters' elements in that order
    routes: dict[Any, Any]  # what was asked for last


class Sharded(Optimizer):
    """What the classes over MPI share; each is followed by the class of which it is a share.

    Every rank has all parameters, and its own gradients. Of state and averages each has its share
    alone: contiguous blocks of each parameter.
    """

    __signature__: ClassVar[inspect.Signature]

    _watch: Watch | None = None
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
        error: BaseException | None = None
        with Signals().held():
            try:
                if options.get("rows") == "exact":
                    raise ValueError(
                        'rows="exact": gradients of some rows are not supported over MPI; leave it '
                        "out"
                    )
                self._reduction = choice("reduction", reduction, REDUCTIONS)
                self._check_every = None if check is None else count("check", check)
                self._exchange = Exchange(self._ranks, count("bucket_bytes", bucket_bytes))
                super().__init__(params, *args, **options)
            except BaseException as raised:
                error = raised
            self._ranks.agree(error, np.zeros(0, np.uint8))
            self._check_alike("make the optimizer over the same parameters, on all ranks")

    def __init_subclass__(cls) -> None:
        """Show the signature of the class that it is a share of."""
        super().__init_subclass__()
        if Sharded not in cls.__bases__:
            return
        base: Any = cls.__mro__[2]
        own = inspect.signature(Sharded.__init__).parameters
        _, *theirs = inspect.signature(base.__init__).parameters.values()
        more = [own[name] for name in ("comm", "reduction", "bucket_bytes", "check")]
        cls.__signature__ = inspect.Signature([*theirs, *more])

    # ---- shares ----------------------------------------------------------------------------------

    @property
    def _cut(self) -> Cut | None:
        rank, size = self._ranks.rank, self._ranks.size

        def parts(wholes: list[Array], nbytes: list[int]) -> list[Part]:
            bounds = cut([whole.size for whole in wholes], nbytes, size)
            return [Part(own[rank], own[rank + 1], own) for own in bounds]

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
        self._next_watch = self._watch_over(new.members)
        return new

    def _commit(self, new: Bound, seen: Seen) -> None:
        """Take over members, and what looks at all of each parameter."""
        watch = self._watch
        if watch is None or watch.wholes is not new.members.wholes:
            watch = self._next_watch
            if watch is None or watch.wholes is not new.members.wholes:
                watch = self._watch_over(new.members)
        super()._commit(new, seen)
        self._watch, self._next_watch = watch, None

    def _watch_over(self, members: Members) -> Watch:
        before = self._watch
        n = len(members.wholes)
        summed = [] if before is None else before.plan.summed()
        rule = _core.Rule("sgd")
        plan = _core.Plan(
            rule,
            members.wholes,
            [(None,) * len(rule.slots)] * n,
            None,
            [np.zeros((), np.int64) for _ in range(n)],
            [0] * n,
            [[0.0] * len(rule.hypers)],
            list(map(label, members.keys)),
            semantics=0,
            clip=0,
            clip_limit=0.0,
            nonfinite=0,
            ema_decay=0.0,
            num_threads=self._settings.num_threads or 0,
            completed_steps=0,
            sums=members.sums,
            # One micro-batch more than there are, so that it never updates.
            accumulate=1 if members.sums is None else self._settings.accumulate + 1,
            accumulated_steps=0 if before is None else before.plan.accumulated_steps,
            summed=summed + [False] * (n - len(summed)),
            lent=members.lent,
        )
        means = [
            np.zeros(param.size, storage.arithmetic)
            for param, storage in zip(members.params, members.storage, strict=True)
        ]
        bounds = [part.bounds for part in members.parts or ()]
        blocks = blocks_of(bounds, self._ranks.size)
        orders = list(map(memory_order, members.wholes))
        vectors = list(map(in_memory_order, members.wholes))
        return Watch(members.wholes, plan, means, bounds, blocks, orders, vectors, {})

    @property
    def _whole_plan(self) -> _core.Plan:
        assert self._watch is not None
        return self._watch.plan

    @property
    def _means(self) -> list[Array]:
        assert self._watch is not None
        return self._watch.means

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
    def _together(self) -> Iterator[None]:
        """Do something on all ranks, or raise on all, as long as nothing was written."""
        signals = self._signals = Signals()
        with signals.held():
            self._undecided = True
            try:
                yield
                if self._undecided:
                    self._ready()
            except BaseException as error:
                if self._undecided:
                    self._undecided = False
                    self._ranks.agree(error, _NOTHING)
                raise

    def _ready(self) -> None:
        self._signals.handle()
        self._undecided = False
        self._ranks.agree(None, _NOTHING)

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add parameters on all ranks, as the class without MPI does on one."""
        with self._together():
            super().add_param_group(group)
        self._check_alike("add the same group on all ranks")

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
        with self._lock:
            with self._together():
                self._bring_up_to_date("gather_state_dict()")
                if not (isinstance(root, int) and 0 <= root < self._ranks.size):
                    raise ValueError(
                        f"root: expected a rank below {self._ranks.size}, got {root!r}"
                    )
            return self._gathered(root)

    def _gathered(self, root: int) -> dict[str, Any] | None:
        whole = gathered(self._ranks, self._members, root)
        if whole is None:
            return None
        return _saved.state_dict(
            self._rule, self._settings, whole, Counts.of(self._plan), lambda array: array
        )

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
        with self._together():
            super().load_state_dict(state_dict, convert=convert)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file as the class without MPI does; all ranks have to call it.

        The first rank writes it, having gathered what the others have. Training goes on from it in
        any number of ranks, and in the class without MPI.
        """
        from fastopt import checkpoint

        with self._lock:
            with self._together():
                self._bring_up_to_date("save()")
                self._plan.check()
                os.fspath(path)
            saved = self._gathered(0)
            with self._together():
                if saved is not None:
                    params = [np.asarray(x, order="C") for x in self._members.wholes]
                    texts, arrays = _saved.as_file(saved, params)
                    arrays = {name: np.asarray(x, order="C") for name, x in arrays.items()}
                    kind = type(self).__name__
                    checkpoint.write(path, {"optimizer": kind, **texts}, arrays)

    def load(self, path: str | os.PathLike[str], *, convert: bool = False) -> None:
        """Take over a file that :meth:`save` wrote, here or without MPI, on any number of ranks.

        All ranks have to call it, and each reads the file. All raise if one does, and nothing is
        changed.
        """
        with self._together():
            super().load(path, convert=convert)
        with self._lock:
            self._share_params([whole.itemsize for whole in self._members.wholes])

    def _restore_from(
        self, saved: Mapping[str, Any], source: str, convert: bool, *, checkpoint: bool
    ) -> None:
        share = share_of(self._settings, self._members, saved, source)
        super()._restore_from(share, source, convert, checkpoint=checkpoint)

    def __getstate__(self) -> NoReturn:
        raise TypeError("an optimizer over MPI cannot be copied: use gather_state_dict() or save()")

    # ---- what is the same everywhere -------------------------------------------------------------

    def _check_alike(self, way_out: str) -> None:
        """Raise, on all ranks, if anything differs between them that must not."""
        members = self._members
        what = {
            "keys, shapes and dtypes of the parameters": [
                [repr(key), whole.shape, whole.dtype.name, memory_order(whole)]
                for key, whole in zip(members.keys, members.wholes, strict=True)
            ],
            "hyperparameters": self._bound.hypers.plan_rows(),
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
        self._check_params(ValueError, way_out)

    def _check_params(self, kind: type[Exception], way_out: str) -> None:
        members = self._members
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
        signals = Signals()
        with self._lock, signals.held(), np.errstate(all="ignore"):
            error: BaseException | None = None
            try:
                given = self._prepared(grads, loss_scale, zero_grad)
                bits = self._bits(given)
                self._exchange.prepare()
                signals.handle()
            except BaseException as raised:
                error, bits = raised, np.zeros(self._n_bits(), np.uint8)
            every = self._ranks.agree(error, bits)
            return self._agreed(given, every)

    def _prepared(self, grads: Any, loss_scale: Any, zero_grad: Any) -> Given:
        """Return what a step can use, having checked all that is this rank's."""
        self._forbid_reentry("step()")
        self._check_whole("step()")
        if not self._group_memory.is_unchanged():
            self._refresh()
        elif self._bound.hypers.scheduled:
            self._evaluate_schedules()
        self._follow()
        members = self._members
        given = flatten_grads(grads, members.tree_def, len(members.wholes))
        loss_scale = self._checked_scale(loss_scale)
        zero_grad = bool(flag("zero_grad", zero_grad))
        for key, grad in zip(members.keys, given, strict=False):
            if not isinstance(grad, np.ndarray) and grad is not None and rows_of(grad) is not None:
                raise TypeError(
                    f"gradient of {label(key)}: one of some rows, which is not supported over MPI; "
                    "give one of all rows"
                )
        arrays = self._whole_plan.check_gradients(given, zero_grad=zero_grad)
        self._plan.check()
        assert self._watch is not None
        vectors = [
            None if array is None else vector_of(array, order)
            for array, order in zip(arrays, self._watch.orders, strict=True)
        ]
        return Given(given, arrays, vectors, loss_scale, zero_grad)

    def _bits(self, given: Given) -> Array:
        """Return what all ranks have to know of this one's gradients, and what has to be alike."""
        own = np.zeros(self._n_bits(), np.uint8)
        n = len(given.arrays)
        summed = self._whole_plan.summed()
        for i, vector in enumerate(given.vectors):
            if vector is not None:
                own[i] = DTYPE_BITS[dtype_name(vector.dtype)]
            if summed[i]:
                own[i] |= DTYPE_BITS[self._means[i].dtype.name]
        if self._settings.accumulate > 1 and self._settings.nonfinite != "propagate":
            own[n] = not self._whole_plan.scan(given.arrays, given.loss_scale)[1].all()
        alike = np.frombuffer(b"".join(self._alike(given.loss_scale).values()), np.uint8)
        own[n + 1 :] = np.concatenate([alike, ~alike])
        return own

    def _n_bits(self) -> int:
        return len(self._means) + 1 + 2 * sum(map(len, self._alike(1.0).values()))

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
        n = len(self._means)
        settings = self._settings
        seen, unseen = np.split(every[n + 1 :], 2)
        if (seen & unseen).any():
            self._raise_unlike(given.loss_scale)
        if every[n]:
            return self._skipped(given, None, 0)
        if self.accumulated_steps + 1 < settings.accumulate:
            result = self._whole_plan.step(given.arrays, given.loss_scale, False)
            self._zero(given)
            return result
        kinds = every[:n]
        self._reduce(given, kinds)
        means = [mean if kind else None for mean, kind in zip(self._means, kinds, strict=True)]
        scale = given.loss_scale if settings.accumulate == 1 else 1.0
        squares = None
        if settings.nonfinite != "propagate" or settings.clip in ("clip_norm", "global_clip_norm"):
            squares, bad = self._scanned(means, scale)
            if bad is not None and settings.nonfinite != "propagate":
                norm = None
                if settings.clip in ("clip_norm", "global_clip_norm"):
                    norm = math.sqrt(added_in_order(squares))
                return self._skipped(given, norm, bad)
        result = self._plan.step_part(means, scale, squares)
        wholes = self._members.wholes
        sizes = [whole.itemsize if kind else 0 for whole, kind in zip(wholes, kinds, strict=True)]
        self._share_params(sizes)
        if settings.accumulate > 1:
            self._whole_plan.restore([], [], 0, [False])
        self._zero(given)
        if self._check_every and self.completed_steps % self._check_every == 0:
            way_out = f"after {self.completed_steps} steps; load the last checkpoint"
            self._check_params(RuntimeError, way_out)
        return result

    def _raise_unlike(self, loss_scale: float) -> NoReturn:
        alike = self._alike(loss_scale)
        found = self._ranks.differ(list(alike.values()))
        number, rank = found if found is not None else (0, 0)
        raise ValueError(
            f"rank {rank}: another {[*alike][number]} than on rank 0; nothing was updated"
        )

    # ---- non-finite gradients --------------------------------------------------------------------

    def _bad_here(self, given: Given) -> int | None:
        """Return the first parameter whose gradient on this rank is not finite."""
        for i, vector in enumerate(given.vectors):
            if vector is not None and not np.isfinite(np.asarray(vector[:], np.float64)).all():
                return i
        return None

    def _skipped(self, given: Given, norm: float | None, bad: int) -> _core.StepResult:
        """Return from a step that does not take place, or raise on all ranks."""
        if self._settings.nonfinite == "skip":
            self._zero(given)
            return _core.step_result(norm, True, 1)
        found = self._ranks.comm.allgather(self._bad_here(given))
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
        assert self._watch is not None
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
        settings, members = self._settings, self._members
        summed = self._whole_plan.summed()
        sums = None
        if members.sums is not None:
            sums = [
                in_memory_order(x) if any_yet else None
                for x, any_yet in zip(members.sums, summed, strict=True)
            ]

        def source(i: int, begin: int, end: int) -> Array:
            vector, total = given.vectors[i], None if sums is None else sums[i]
            part: Array | None = None if vector is None else vector[begin:end]
            if part is None and total is None:
                return np.zeros(end - begin, dtypes[i])
            if part is not None and sums is None:
                return part
            mean = np.empty(end - begin, self._means[i].dtype)
            _core.batch_mean(
                None if total is None else total[begin:end],
                None if part is None else np.ascontiguousarray(part),
                1 / given.loss_scale,
                settings.accumulate,
                mean,
            )
            return mean

        dtypes = [
            mean.dtype if sums is not None or self._reduction == "mpi" else on_the_way(kind, mean)
            for kind, mean in zip(kinds, self._means, strict=True)
        ]
        sizes = [dtype.itemsize if kind else 0 for dtype, kind in zip(dtypes, kinds, strict=True)]
        self._exchange.reduce(
            self._route(sizes), dtypes, source, self._means, ordered=self._reduction == "ordered"
        )

    def _share_params(self, sizes: list[int]) -> None:
        """Give all ranks the parameters whose elements have so many bytes; 0: they have them."""
        assert self._watch is not None
        self._exchange.gather(self._route(sizes), self._watch.vectors)

    def _route(self, sizes: list[int]) -> Any:
        assert self._watch is not None
        routes, key = self._watch.routes, tuple(sizes)
        if key not in routes:
            if len(routes) == MOST_ROUTES:
                del routes[next(iter(routes))]
            routes[key] = self._exchange.routes(self._watch.bounds, sizes)
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
