"""What all optimizers share: parameter groups, state, the step, and the state dict.

A subclass says which rule of the C core it is and what its hyperparameters are; the rule knows
their ranges. All mathematics is in ``src_c/rules``; all checks of arrays are in ``_core``.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self

import numpy as np

from fastopt import _core, _saved
from fastopt._given import as_groups, flatten_grads
from fastopt._hypers import (
    Check,
    Hypers,
    LearningRate,
    Seen,
    as_seen,
    check_names,
    checked_pairs,
    own_copies,
    scheduled_groups,
    without_call,
)
from fastopt._members import (
    Bound,
    Counts,
    Cut,
    Members,
    ParameterState,
    bound,
    check_groups,
    extended,
    followed,
    from_kept,
    has_slots,
    to_keep,
    with_slots,
)
from fastopt._memory import Array
from fastopt._options import flag, real
from fastopt._rows import row_numbers
from fastopt._settings import Options, checked_settings, refuse_unknown
from fastopt._storage import initial_arrays, values_of, weights

__all__ = ["LearningRate", "Optimizer"]


class Optimizer:
    """Base class of the optimizers; not for direct use."""

    _rule: ClassVar[_core.Rule]
    # How each hyperparameter of a group is checked. All values are floats to the C core.
    _checks: ClassVar[dict[str, Check]]

    _bound: Bound

    def __init__(self, params: Any, defaults: dict[str, Any], options: Options) -> None:
        refuse_unknown(options, type(self).__name__)
        self._settings = checked_settings(**options)
        self._defaults = own_copies(defaults)
        self._checked(without_call(defaults), "", 0)
        self._lock = _core.Lock()
        self._group_memory = _core.GroupMemory()
        self._evaluating_lr = False
        nothing = Members.none(self._settings)
        self._take_up(self._extended(nothing, [], as_groups(params), Counts()))
        _live.add(self)

    @property
    def _members(self) -> Members:
        return self._bound.members

    @property
    def _plan(self) -> _core.Plan:
        return self._bound.plan

    @property
    def _cut(self) -> Cut | None:
        """What cuts parameters; for subclasses that step over parts of them."""
        return None

    # ---- parameters and groups ------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Dicts, each with ``"params"`` and their hyperparameters.

        A change of a hyperparameter takes effect, checked, at the next step.
        """
        return self._members.groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        with self._lock:
            members = self._members._replace(groups=groups)
            self._commit(self._bound._replace(members=members), None)  # the next step looks at them

    @property
    def params(self) -> list[Array]:
        """The parameters of all groups, in order, as arrays.

        If another object owns a parameter's memory and moves it, the next look makes a new array.
        """
        if self._members.lent is not None:
            with self._lock:  # no step meanwhile
                self._follow()
        return list(self._members.wholes)

    @property
    def state(self) -> list[ParameterState]:
        """Each parameter's state: arrays under PyTorch's names, and ``step``, a 0-d int64 array.

        With ``rows="exact"``, :meth:`refresh` brings rows of them up to date.
        """
        return list(self._members.state)

    @property
    def ema(self) -> list[Array] | None:
        """The moving averages of the parameters, in order; None without ``ema_decay``."""
        return None if self._members.ema is None else list(self._members.ema)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of memory beside the parameters, by kind: state arrays, averages, sums."""
        members, count = self._members, Counter[str]()
        for state in members.state:
            count.update({name: array.nbytes for name, array in state.items()})
        for name, arrays in (("ema", members.ema), ("sums", members.sums)):
            if arrays is not None:
                count[name] = sum(array.nbytes for array in arrays)
        return dict(count)

    def decoded_state(self) -> list[dict[str, Array]]:
        """Return copies of the state in float32 (float64), whatever it is stored in.

        Returns
        -------
        list of dict
            For each parameter its state arrays under PyTorch's names, ``step``, and, for a
            parameter of 16 bits with a master, ``master``: its weights in float32.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> w = np.ones(3, np.float32)
        >>> opt = fastopt.Adam([w], state_dtype="8bit")
        >>> result = opt.step([np.array([0.0, 1.0, 2.0], np.float32)])
        >>> opt.state[0]["exp_avg_8bit"].dtype, opt.decoded_state()[0]["exp_avg"].dtype
        (dtype('uint8'), dtype('float32'))
        """
        with self._lock:
            self._bring_up_to_date("decoded_state()")
            members = self._members
            decoded = []
            for storage, param, state in zip(
                members.storage, members.params, members.state, strict=True
            ):
                new: dict[str, Array] = {"step": state["step"].copy()}
                if storage.master:
                    new["master"] = weights(storage, param, state)
                for slot in self._rule.slots:
                    if storage.arrays(slot)[0] in state:
                        new[slot] = values_of(storage, state, slot)
                decoded.append(new)
            return decoded

    @property
    def completed_steps(self) -> int:
        """How many calls of :meth:`step` updated something (were not skipped)."""
        return self._plan.completed_steps

    @property
    def accumulated_steps(self) -> int:
        """How many micro-batches have been summed since the last update, with ``accumulate``."""
        return self._plan.accumulated_steps

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add parameters, with hyperparameters of their own.

        Parameters
        ----------
        group : dict
            ``"params"``, given as to the constructor, and any of the hyperparameters; the
            constructor's values stand for the others.
        """
        with self._lock:
            self._forbid_reentry("add_param_group()")
            self._check_whole("add_param_group()")
            if not isinstance(group, dict):
                raise TypeError(f"a parameter group must be a dict, got {type(group).__name__}")
            self._refresh()
            self._follow()
            rows, counts = self._bound.hypers.rows, Counts.of(self._plan)
            new = self._extended(self._members, rows, [group], counts)
            self._ready()
            self._take_up(new)

    def _ready(self) -> None:
        """Nothing that was asked for can fail any more; for subclasses that may yet refuse."""

    def _extended(
        self,
        before: Members,
        rows: list[list[float]],
        groups: list[dict[str, Any]],
        counts: Counts,
    ) -> Bound:
        """Return the members with more groups, and a plan over them, having checked all of it."""
        members, new_rows = extended(
            before,
            groups,
            settings=self._settings,
            defaults=self._defaults,
            rule=self._rule,
            check=lambda group, where: self._checked_row(group, where, counts.completed_steps),
            initial=self._initial,
            cut=self._cut,
        )
        n_more = len(members.params) - len(before.params)
        hypers = self._hypers(members, rows + new_rows)
        return bound(self._settings, members, hypers, counts.with_more(n_more))

    def _hypers(self, members: Members, rows: list[list[float]]) -> Hypers:
        excludes = self._settings.no_decay is not None
        return Hypers(self._rule, excludes, rows, scheduled_groups(members.groups))

    def _take_up(self, new: Bound) -> None:
        """Take over members whose plan has the hyperparameters of their groups."""
        self._commit(new, as_seen(new.members.groups))

    def _commit(self, new: Bound, seen: Seen) -> None:
        self._group_memory.forget_groups()  # if a signal raises before they are remembered
        self._bound = new
        self._group_memory.remember_groups(new.plan, new.members.groups, seen, new.direct)

    # ---- hyperparameters ------------------------------------------------------------------------

    def _checked(
        self, group: Mapping[str, Any], where: str, completed_steps: int
    ) -> dict[str, float]:
        """Check a group's hyperparameters; return their values as the rule takes them."""
        check_names(group, self._defaults.keys(), where, type(self).__name__)
        values = {}
        for name, check in self._checks.items():
            if name not in self._defaults:  # it is one of a pair
                continue
            value = group[name]
            if name == "lr" and callable(value):
                values[name] = self._evaluate_lr(value, where, completed_steps)
            else:
                values[name] = check(f"{where}{name}", value)
        values |= checked_pairs(self._checks, group, where)
        self._check_together(values, where)
        return values

    def _evaluate_lr(self, lr: Callable[[int], Any], where: str, completed_steps: int) -> float:
        self._evaluating_lr = True
        try:
            value = lr(completed_steps)
        finally:
            self._evaluating_lr = False
        return self._checks["lr"](f"{where}lr({completed_steps})", value)

    def _check_together(self, values: dict[str, float], where: str) -> None:
        """Check what concerns several hyperparameters; for subclasses."""

    def _checked_row(self, group: dict[str, Any], where: str, completed_steps: int) -> list[float]:
        return self._row(self._checked(group, where, completed_steps))

    def _row(self, values: Mapping[str, float]) -> list[float]:
        return [values[name] for name in self._rule.hypers]

    def _initial(self, group: Mapping[str, Any]) -> Mapping[str, float]:
        """Return the initial values of slots that do not start at zero; for subclasses."""
        return {}

    def _refresh(self, *, call: bool = True) -> None:
        """Take over what has changed in ``param_groups``, after checking all of it.

        Learning rates need not be evaluated where no step follows; the next step does it anyway.
        """
        check_groups(self._members)
        groups = self._members.groups
        seen, scheduled = as_seen(groups), scheduled_groups(groups)  # before one is evaluated
        if not call:
            groups = [without_call(group) for group in groups]
        rows = [
            self._checked_row(group, f"param_groups[{number}]: ", self.completed_steps)
            for number, group in enumerate(groups)
        ]
        self._apply(rows, scheduled, seen)

    def _apply(self, rows: list[list[float]], scheduled: list[int], seen: Seen) -> None:
        """Let the plan have the groups' hyperparameters, and the slots that they use."""
        used = [self._rule.used_slots(row) for row in rows]
        slots = [used[number] for number in self._members.group_of]
        now = self._bound
        if self._rule.by_row and not now.plan.torn:
            # No row has missed steps both with a value for each element and with one a row.
            before = [self._rule.used_slots(row) for row in now.hypers.rows]
            if used != before:
                now.plan.refresh()
        if has_slots(now.members, slots):
            self._group_memory.forget_groups()
            for number, row in enumerate(rows):
                now.hypers.tell(now.plan, number, row)
            now.hypers.rows, now.hypers.scheduled = rows, scheduled
            self._commit(now, seen)
            return
        excludes = now.hypers.excludes
        new = self._with_slots(slots, Hypers(self._rule, excludes, rows, scheduled))
        new.plan.inherit_torn(now.plan)
        self._commit(new, seen)

    def _with_slots(self, slots: Sequence[Collection[str]], hypers: Hypers) -> Bound:
        """Return the members with the slots that they lack, and a plan over them."""
        counts = Counts.of(self._plan)
        members, counts = with_slots(self._members, slots, counts, self._rule, self._initial)
        return bound(self._settings, members, hypers, counts)

    def _follow(self) -> None:
        """Make new arrays, and a new plan, if memory that another object owns has moved."""
        now = self._bound
        if self._evaluating_lr or now.plan.busy:  # a step is about to look itself
            return
        members = followed(now.members)
        if members is not now.members:
            new = bound(self._settings, members, now.hypers, Counts.of(now.plan))
            new.plan.inherit_torn(now.plan)
            self._commit(new, self._group_memory.seen_groups)

    def _forbid_reentry(self, what: str) -> None:
        """Raise where what a step calls would change its optimizer."""
        if self._evaluating_lr:
            raise RuntimeError(f"{what} was called by a learning rate of the same optimizer")
        if self._plan.busy:
            raise RuntimeError(f"{what} was called from within a step of the same optimizer")

    def _check_whole(self, what: str) -> None:
        """Raise in a forked child whose copy of the arrays is torn."""
        if self._plan.torn:
            raise RuntimeError(f"{what}: {_core.TORN}")

    def _evaluate_schedules(self) -> None:
        """Evaluate the learning rates that are callables; nothing else has changed."""
        now, place = self._bound, self._rule.hypers.index("lr")
        rows = list(now.hypers.rows)
        for number in now.hypers.scheduled:
            lr, where = now.members.groups[number]["lr"], f"param_groups[{number}]: "
            rows[number] = rows[number].copy()
            rows[number][place] = self._evaluate_lr(lr, where, now.plan.completed_steps)
        for number in now.hypers.scheduled:
            now.hypers.tell(now.plan, number, rows[number])
        now.hypers.rows = rows

    # ---- the step -------------------------------------------------------------------------------

    def step(
        self,
        grads: Sequence[Array | None] | Mapping[Any, Array | None] | Iterable[Array | None],
        *,
        loss_scale: float = 1.0,
        zero_grad: bool = False,
    ) -> _core.StepResult:
        """Update all parameters in place, or raise and leave everything as it was.

        Parameters
        ----------
        grads : list, tuple, iterable or dict of numpy.ndarray or None
            The gradients, structured as the parameters were given: in the order of ``params``, or
            a dict with the same keys, or the same containers in one another, and for a named
            tuple one with the same fields. Each has its parameter's shape and dtype, or is one of
            :class:`Rows`; None leaves its parameter out of this step.
            With ``accumulate=k`` every k-th call updates, with the sum of k calls divided by k, in
            which None counts as zero, unless all k are None.
        loss_scale : float, optional
            The gradients are divided by it first.
        zero_grad : bool, optional
            Whether to zero the gradients, in place, at the end.

        Returns
        -------
        StepResult
            With attributes ``grad_norm`` (None where no norm was needed), ``skipped`` and
            ``threads``.

        Raises
        ------
        TypeError
            If a gradient is not an array, or not of its parameter's dtype.
        ValueError
            If the structure or a shape differs, memory overlaps, or a hyperparameter is out of
            range.
        FloatingPointError
            If a gradient holds a NaN or an infinity, with ``nonfinite="raise"``.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> w = np.ones(3)
        >>> opt = fastopt.SGD([w], lr=0.5)
        >>> opt.step([np.array([1.0, 2.0, 4.0])])
        StepResult(grad_norm=None, skipped=False, threads=1)
        >>> w
        array([ 0.5,  0. , -1. ])
        """
        result = self._group_memory.step(self._lock, grads, loss_scale, zero_grad)
        if result is not None:
            return result
        with self._lock:
            arguments = self._begun(grads, loss_scale, zero_grad)
            try:
                return self._plan.step(*arguments)
            except _core.MovedError:
                self._follow()
                return self._plan.step(*arguments)

    def _begun(self, grads: Any, loss_scale: Any, zero_grad: Any) -> tuple[list[Any], float, bool]:
        """Take over what has changed in the groups; return a step's arguments, checked."""
        self._forbid_reentry("step()")
        self._check_whole("step()")
        now = self._bound
        if not self._group_memory.is_unchanged():
            self._refresh()
        elif now.hypers.scheduled:
            self._evaluate_schedules()
        if type(grads) is not list or now.members.named:
            grads = flatten_grads(grads, now.members.tree_def, len(now.members.params))
        if type(loss_scale) is not float or loss_scale != 1.0:
            loss_scale = self._checked_scale(loss_scale)
        if zero_grad is not False:
            zero_grad = bool(flag("zero_grad", zero_grad))
        return grads, loss_scale, zero_grad

    def _checked_scale(self, loss_scale: Any) -> float:
        """Return the scale if dividing by it means something in every parameter's type."""
        scale = real("loss_scale", loss_scale, above=0.0)
        for dtype in sorted({kind.arithmetic for kind in self._members.storage}):  # narrower first
            limits = np.finfo(dtype)
            if not float(limits.smallest_normal) <= 1 / scale <= float(limits.max):
                raise ValueError(f"loss_scale is out of the range of {dtype}: got {loss_scale!r}")
        return scale

    def refresh(self, param: Any = None, rows: Any = None) -> None:
        """Bring rows up to date that have had no gradient, with ``rows="exact"``.

        After it, parameter, state and counters have there the bits that a dense run would have:
        one whose gradients are zero in all rows that :class:`Rows` leaves out. A model calls it for
        the rows of a batch before it reads them. Without ``rows="exact"`` there is nothing to do.

        Parameters
        ----------
        param : numpy.ndarray, str or int, optional
            A parameter, as it was given to the optimizer, or its name (number). None: all.
        rows : array_like of int, optional
            Numbers of rows, as for :class:`Rows`. None: all.

        Raises
        ------
        TypeError, ValueError
            If there is no such parameter or row; nothing is changed.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> table = np.ones((4, 2))
        >>> opt = fastopt.SGD([table], lr=0.5, momentum=0.5, rows="exact")
        >>> for batch in ([0, 1], [1, 2], [2, 3]):
        ...     opt.refresh(table, batch)
        ...     result = opt.step([fastopt.Rows(batch, np.ones((2, 2)))])
        >>> table[:, 0]  # row 0 has taken one step of three
        array([ 0.5 , -0.25, -0.25,  0.5 ])
        >>> opt.refresh()
        >>> table[:, 0]
        array([ 0.125, -0.625, -0.25 ,  0.5  ])
        """
        with self._lock:
            self._forbid_reentry("refresh()")
            self._check_whole("refresh()")
            self._follow()
            which = None if param is None else self._members.number_of(param)
            if rows is not None:
                if which is None:
                    raise TypeError("rows: given, but not of which param; give both")
                rows = row_numbers("rows", rows)
            self._plan.refresh(which, rows)

    def reset(self) -> None:
        """Put state, counters and averages back to where they began; parameters stay."""
        with self._lock:
            self._forbid_reentry("reset()")
            self._refresh()
            self._follow()
            if not self._plan.torn:
                self._plan.refresh()
            self._plan.check()
            members = self._members
            to: list[Array] = []
            values: list[Array] = []
            for i, state in enumerate(members.state):
                storage, param = members.storage[i], members.params[i]
                initial = self._initial(members.group(i))
                new = {"step": np.zeros((), np.int64)}
                for slot in self._rule.slots:
                    if storage.arrays(slot)[0] in state:
                        new |= initial_arrays(storage, param, slot, initial.get(slot, 0.0))
                to += [state[name] for name in new]
                values += new.values()
                if members.ema is not None:
                    to.append(members.ema[i])
                    values.append(weights(storage, param, state))
            self._plan.restore(to, values, 0, [False])  # no micro-batch is summed any more

    # ---- state dict, copies ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything but the parameters that a later run needs to go on.

        Returns
        -------
        dict
            ``state`` and ``ema``, dicts by parameter key (its name, or its index);
            ``param_groups``, with the keys of their parameters in place of the arrays;
            ``accumulated``, None between updates, otherwise ``steps``, the number of micro-batches
            so far, and ``sums`` of their gradients by parameter key; ``completed_steps``, ``rule``
            and ``semantics``; ``seed``, None where nothing is rounded at random; and
            ``memory_order``, the axes, outermost first, of each parameter that does not lie in C
            order, if its state goes by that (in 8 bits, or rounded at random). A learning rate that
            is a callable is left out.
        """
        with self._lock:
            self._bring_up_to_date("state_dict()")
            return self._as_dict(lambda array: array.copy(order="K"))

    def _bring_up_to_date(self, what: str) -> None:
        """Take over what is pending in ``param_groups``, so that a copy can be used as it is."""
        self._check_whole(what)
        if not self._evaluating_lr and not self._plan.busy:  # by which a copy may be asked for, too
            self._refresh(call=False)
            self._follow()
        elif self._plan.busy and self._plan.behind:
            raise RuntimeError(f"{what}: rows cannot catch up from within a step")
        self._plan.refresh()

    def _as_dict(self, copy: Callable[[Array], Array]) -> dict[str, Any]:
        """Return a state dict with a copy of each array."""
        return _saved.state_dict(
            self._rule, self._settings, self._members, Counts.of(self._plan), copy
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], *, convert: bool = False) -> None:
        """Take over what :meth:`state_dict` returned, after checking all of it.

        Parameters
        ----------
        state_dict : dict
            From an optimizer of the same rule and semantics, over parameters of the same keys,
            shapes and dtypes. It is copied.
        convert : bool, optional
            Take over state that is stored in another type (``state_dtype``, ``master_weights``) or
            by another memory order, rounded to nearest, and go on with the optimizer's own ``seed``
            and order of parameters.

        Raises
        ------
        TypeError, ValueError
            If anything does not fit; the message says which entry, and nothing is changed.
        """
        self._restore_from(state_dict, "state_dict", convert, checkpoint=False)

    def _restore_from(
        self, saved: Mapping[str, Any], source: str, convert: bool, *, checkpoint: bool
    ) -> None:
        """Take over a state dict, or a checkpoint's content, which has parameters too.

        The next step takes over the hyperparameters, as it does whenever groups have changed.
        """
        convert = bool(flag("convert", convert))
        with self._lock:
            self._forbid_reentry("load()" if checkpoint else "load_state_dict()")
            self._follow()
            check_groups(self._members)
            new = _saved.verified(
                _saved.Expected(self._rule, self._settings, self._members, self._defaults.keys()),
                saved,
                source,
                self._checked_row,
                checkpoint=checkpoint,
                convert=convert,
            )
            if not checkpoint and not self._plan.torn:  # for parameters stay
                self._plan.refresh()
            now = then = self._bound
            slots = [
                [slot for slot in self._rule.slots if storage.arrays(slot)[0] in loaded]
                for storage, loaded in zip(now.members.storage, new.state, strict=True)
            ]
            if not has_slots(now.members, slots):
                then = self._with_slots(slots, now.hypers)
            then.plan.check()
            to, values = _saved.pairs(then.members, new)
            fresh = _saved.fresh_slots(self._rule, then.members, new)
            summed = [i in new.sums for i in range(len(then.members.params))]
            lent = then.members.lent
            written = _core.version_counter(list(lent.of.values()) if checkpoint and lent else [])
            groups, options_of = tuple(now.members.groups), tuple(new.groups)
            self._ready()
            _kept = [dict(group) for group in groups]  # to free a value may run code of its type
            for group, options in zip(groups, new.groups, strict=True):
                for name in options:
                    group.setdefault(name, options[name])  # so that none of them can fail below
            self._group_memory.forget_groups()
            done = [False]
            try:
                then.plan.restore(
                    to, values, new.completed_steps, done, new.accumulated_steps, summed, fresh
                )
            finally:
                if done[0]:  # also where a signal is raised only then
                    self._bound = then
                    _core.set_items(groups, options_of)
            if written is not None:
                written()

    # ---- checkpoints ----------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write parameters, state, averages, hyperparameters and counters to a safetensors file.

        The file appears under its name whole or not at all: it is written and read back under
        another name, reaches the disk, and then takes the place of what had the name. If the
        process is killed, or the disk is full, the old file is still there. A learning rate that is
        a callable is left out, and so are options that :meth:`state_dict` leaves out.

        Parameters
        ----------
        path : str or os.PathLike
            What the file is called. Of a symbolic link, the file that it leads to is replaced.

        Raises
        ------
        OSError
            If the file cannot be written; what had the name is as it was.
        TypeError, ValueError
            If a parameter's name is neither a string nor an integer, if a hyperparameter is out of
            range, or if the name is that of something else than a file.
        ImportError
            If the package safetensors is missing; ``fastopt[checkpoint]`` brings it.

        Notes
        -----
        Steps of other threads wait. Code that changes the parameters in other ways must not run
        meanwhile; if it does, that is found and a RuntimeError raised. A killed process may leave a
        folder called as the file and ending in ``.part``; the next save to the same path removes
        it, if the file system has locks (``flock``) that tell that the process is dead.

        Examples
        --------
        >>> import os, tempfile, numpy as np, fastopt
        >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
        >>> w = np.array([1.0, 2.0])
        >>> opt = fastopt.Adam({"w": w}, lr=0.5)
        >>> result = opt.step({"w": w})
        >>> opt.save(path)
        >>> v = np.zeros(2)
        >>> resumed = fastopt.Adam({"w": v})
        >>> resumed.load(path)
        >>> v, resumed.completed_steps, resumed.param_groups[0]["lr"]
        (array([0.5, 1.5]), 1, 0.5)
        """
        with self._lock:  # no step meanwhile
            self._bring_up_to_date("save()")
            self._plan.check()
            self._write(path, self._as_dict(in_c_order))

    def _write(self, path: str | os.PathLike[str], saved: dict[str, Any]) -> None:
        """Write a state dict of arrays in C order, and the parameters, to a file."""
        from fastopt import checkpoint

        params = list(map(in_c_order, self._members.wholes))
        texts, arrays = _saved.as_file(saved, params)
        checkpoint.write(path, {"optimizer": type(self).__name__, **texts}, arrays)

    def load(self, path: str | os.PathLike[str], *, convert: bool = False) -> None:
        """Take over a file that :meth:`save` wrote, after checking all of it.

        Parameters are overwritten in place. Training goes on with the same bits as if it had not
        been interrupted, if the optimizer was made with the same options (and, where it clips by
        norm, over arrays in the same memory order).

        Parameters
        ----------
        path : str or os.PathLike
            A file of an optimizer of the same rule and semantics, over parameters of the same
            names (or indices), shapes and dtypes.
        convert : bool, optional
            Take over parameters and state that are stored in another type or by another memory
            order, rounded to nearest, and go on with the optimizer's own ``seed`` and order of
            parameters. Without it, such a file is refused.

        Raises
        ------
        OSError
            If the file cannot be read.
        TypeError, ValueError
            If the file is damaged, if a newer fastopt wrote it, or if anything does not fit; the
            message says which entry, and nothing is changed.
        ImportError
            If the package safetensors is missing; ``fastopt[checkpoint]`` brings it.

        Examples
        --------
        See :meth:`save`.
        """
        source, saved, _ = self._read(path)
        self._restore_from(saved, source, convert, checkpoint=True)

    def _read(self, path: str | os.PathLike[str]) -> tuple[str, dict[str, Any], str]:
        """Return what messages call a file, its content as a state dict, and its checksum."""
        from fastopt import checkpoint

        source = checkpoint.source(path)
        texts, arrays = checkpoint.read(path)
        return source, _saved.from_file(self._members.keys, source, texts, arrays), texts["sha256"]

    def __copy__(self) -> NoReturn:
        raise TypeError("a shallow copy would share state but not its counters; use copy.deepcopy")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        with self._lock:  # no step meanwhile
            new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            self._bring_up_to_date("a copy")
            kept = self.__dict__.copy()
            for replaced in ("_bound", "_lock", "_group_memory", "_evaluating_lr"):
                del kept[replaced]
            return {**kept, "kept": (to_keep(self._members), Counts.of(self._plan))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept, counts = state.pop("kept")
        self.__dict__.update(state)
        self._lock = _core.Lock()
        self._group_memory = _core.GroupMemory()
        self._evaluating_lr = False
        members = from_kept(kept)
        # A learning rate may belong to what is only half copied: the step evaluates it.
        hypers = self._hypers(
            members,
            [
                self._checked_row(without_call(g), "", counts.completed_steps)
                for g in members.groups
            ],
        )
        self._take_up(bound(self._settings, members, hypers, counts))
        _live.add(self)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}("]
        usual = checked_settings()._asdict()
        asked = {k: v for k, v in self._settings._asdict().items() if v != usual[k]}
        if asked:
            lines.append("  " + ", ".join(f"{k}={v!r}" for k, v in asked.items()))
        for number, group in enumerate(self.param_groups):
            options = ", ".join(f"{k}={v!r}" for k, v in group.items() if k != "params")
            lines.append(f"  group {number}: {len(group['params'])} parameters, {options}")
        return "\n".join([*lines, ")"])


def in_c_order(array: Array) -> Array:
    """Return an array in C order; a copy only if it is in another."""
    return np.asarray(array, order="C")


# ---- after a fork, no thread is left that could release a lock, or finish a call -----------------

_live: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _forget_threads() -> None:
    for optimizer in _live:
        optimizer._lock = _core.Lock()
        optimizer._evaluating_lr = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
