"""A bound step: an optimizer's parameters, and a plan over the memory of those that are fit.

A run borrows the memory of parameters and state. The next step makes another one as soon as a
parameter, a state tensor, a group or an option that matters has changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from numpy.typing import NDArray
from torch.autograd.graph import increment_version

from fastopt import _core, _tensors
from fastopt._framework import Options, rounds_at_random
from fastopt._pytorch import share_threads
from fastopt._rows import Rows
from fastopt._storage import Storage
from fastopt.torch._fitness import (
    KINDS,
    extents,
    is_by_dtype,
    is_fixed,
    is_plain,
    pieces,
    reasons,
    unfit,
    unfit_group,
)
from fastopt.torch._local import is_dtensor, local, local_gradient
from fastopt.torch._rows import is_sparse, takes_rows
from fastopt.torch._storage import DTYPES


class Owner(Protocol):
    """What a run knows of its optimizer."""

    _rule: ClassVar[_core.Rule]
    _semantics: ClassVar[int]
    _counts: ClassVar[bool]
    _counts_in_ints: ClassVar[bool]
    _takes_rows_alone: ClassVar[bool]
    state: Any
    param_groups: list[dict[str, Any]]

    _options: Options

    _rows: str | None
    _logs: dict[torch.Tensor, _core.RowLog]

    def _row(self, group: Mapping[str, Any]) -> list[float]: ...

    def _namesake_goes_by_rows(self, group: Mapping[str, Any]) -> bool: ...

    def _storage_of(self, param: torch.Tensor) -> Storage: ...

    def _lacking(self, param: torch.Tensor, used: tuple[str, ...]) -> list[str]: ...

    def _complete_state(
        self, param: torch.Tensor, group: dict[str, Any], used: tuple[str, ...]
    ) -> None: ...


class RefusedError(Exception):
    """The kernels cannot do this step, and have changed nothing."""


class Run:
    """An optimizer's parameters, sorted by who updates them, and a plan for those that are fit.

    Making one changes nothing; the plan, and the state that it needs, are made by the first step.
    It does not refer to the optimizer, so that this goes, with its state, as soon as it is dropped.
    """

    plan: _core.Plan | None = None

    def __init__(self, optimizer: Owner, previous: Run | None) -> None:
        self.state, self.groups = optimizer.state, optimizer.param_groups
        self.params: list[torch.Tensor] = []
        self.group_of: list[int] = []
        self.indices: list[int] = []  # of them among all
        self.others: list[torch.Tensor] = []
        self.why: list[str] = []
        self.unfit: list[tuple[torch.Tensor, int]] = []  # the others, but for those that share
        self.lacking: list[tuple[torch.Tensor, dict[str, Any] | None]] = []
        watched = []
        waiting = []  # for their first gradient
        # Those that had a gradient before are not waited for: they may get one in every other step.
        active = set() if previous is None else {*previous.params, *previous.others}
        sparse: set[torch.Tensor] = set() if previous is None else previous.sparse
        self.lists = [group["params"] for group in self.groups]
        self.unfit_groups = [unfit_group(group) for group in self.groups]
        self.by_dtype = [is_by_dtype(group) for group in self.groups]
        self.read_groups(optimizer)
        whys, sharing = reasons(optimizer)
        places = [(p, n) for n, group in enumerate(self.groups) for p in group["params"]]
        for i, ((param, number), why) in enumerate(zip(places, whys, strict=True)):
            lacks = why is None and bool(optimizer._lacking(param, self.used[number]))
            if param.grad is None and (lacks or param not in active):
                waiting.append(param)
                if i in sharing:
                    watched.append(param)
            elif why is not None:
                watched.append(param)
                self.others.append(param)
                self.why.append(why)
                if i not in sharing:
                    self.unfit.append((param, number))
            else:
                self.params.append(param)
                self.group_of.append(number)
                self.indices.append(i)
        # What the others have in memory, and who shares it, has to stay as it is.
        plain = [param for param in watched if is_plain(param)]
        self.watched = _tensors.Tensors(torch.Tensor, plain, False) if plain else None
        self.extents = [(p, extents(p)) for p in watched if not is_plain(p)]
        arrays = [_tensors.as_array(torch.Tensor, local(param)) for param in self.params]
        # Those that have none now are expected to get another one of the kind that they had.
        self.sparse: set[torch.Tensor] = {
            p for p in self.params if (p in sparse if p.grad is None else is_sparse(p.grad))
        }
        by_rows = [param in self.sparse for param in self.params]
        self.gradients = _tensors.Gradients(
            torch.Tensor, KINDS, self.params, arrays, waiting, by_rows, local_gradient
        )
        self.grads: list[Any] | None = None
        self.full_size: int = sum(param.numel() for param in self.params)

    def read_groups(self, optimizer: Owner) -> None:
        """Take over the groups' hyperparameters."""
        self.rows = [
            [0.0] * len(optimizer._rule.hypers) if unfit else optimizer._row(group)
            for group, unfit in zip(self.groups, self.unfit_groups, strict=True)
        ]
        self.used = [optimizer._rule.used_slots(row) for row in self.rows]
        self.by_rows = [
            not unfit and takes_rows(optimizer, group)
            for group, unfit in zip(self.groups, self.unfit_groups, strict=True)
        ]
        # Only when all of it could be read: what raised has to raise again.
        self.seen_groups = _tensors.Snapshot([self.groups, *self.groups])
        self.look_again = not all(
            is_fixed(value)
            for group in self.groups
            for name, value in group.items()
            if name not in ("params", "param_names")
        )

    def read_gradients(self) -> bool:
        """Find the gradients, and hold them; tell whether all are fit, and where expected."""
        self.grads = self.gradients.read()
        return self.grads is not None

    def is_current(self, optimizer: Owner) -> bool:
        """Tell whether this is still what the optimizer needs; take over hyperparameters."""
        if (
            self.plan is None
            or optimizer.state is not self.state
            or optimizer.param_groups is not self.groups
            or not self.seen.unchanged()
            or not self.tensors.in_place()
            or any(local(tensor) is not part for tensor, part in self.parts)
            or (self.watched is not None and not self.watched.in_place())
            or (self.extents and any(extents(param) != seen for param, seen in self.extents))
        ):
            return False
        if self.look_again or not self.seen_groups.unchanged():
            if (
                len(self.groups) != len(self.lists)
                or any(g["params"] is not p for g, p in zip(self.groups, self.lists, strict=True))
                or self.unfit_groups != [unfit_group(group) for group in self.groups]
                or self.by_dtype != [is_by_dtype(group) for group in self.groups]
            ):
                return False
            before = self.used, self.by_rows
            self.read_groups(optimizer)
            if (self.used, self.by_rows) != before:
                self.catch_up()
                self.plan = None  # whoever asks next has to hear the same
                return False
            for number, row in enumerate(self.rows):
                self.plan.set_hypers(number, row)
        return all(
            param.grad is None
            or self.unfit_groups[number]
            or param.dtype not in DTYPES
            or unfit(optimizer, param, self.used[number], self.by_rows[number])
            for param, number in self.unfit
        )

    def updated(self, optimizer: Owner) -> set[int]:
        """Return the ids of what the kernels would update in a step that followed now."""
        try:
            current = self.is_current(optimizer) and self.read_gradients()
        finally:
            self.gradients.release()
        return set(map(id, self.params)) if current else set()

    def left(self) -> list[tuple[torch.Tensor, str]]:
        """Return what PyTorch updates in this step, and why."""
        pairs = zip(self.others, self.why, strict=True)
        return [(param, why) for param, why in pairs if param.grad is not None]

    def size(self) -> int:
        """Return the number of elements that the kernels update in this step."""
        if self.gradients.missing == 0:
            return self.full_size
        return sum(param.numel() for param in self.params if param.grad is not None)

    def make_plan(self, optimizer: Owner) -> _core.Plan:
        """Make the state that is lacking, and a plan that borrows the tensors."""
        rule, state, options = optimizer._rule, self.state, optimizer._options
        starts, slots, steps, numbers, fresh = [], [], [], [], []
        beside: list[list[torch.Tensor | None]] = []
        for param, number in zip(self.params, self.group_of, strict=True):
            used, storage = self.used[number], optimizer._storage_of(param)
            lacking = optimizer._lacking(param, used)
            if lacking:
                self.lacking.append((param, dict(state[param]) if param in state else None))
                optimizer._complete_state(param, self.groups[number], used)
            has = state.get(param) or {}
            numbers += [has[name] for name in rule.numbers]
            kept = [storage.arrays(slot) if slot in used else () for slot in rule.slots]
            slots.append([has[names[0]] if names else None for names in kept])
            scales = [has[names[1]] if len(names) > 1 else None for names in kept]
            beside.append([has.get(storage.master), *scales])
            counted = optimizer._counts or rounds_at_random(storage, options)
            steps.append(has.get("step") if counted and not optimizer._counts_in_ints else None)
            new = not {name for names in kept for name in names}.isdisjoint(lacking)
            fresh.append(rule.begins if new else ())
            starts.append(0 if new else 1)  # which is all that a rule without `step` looks at
        counters = [tensor.data_ptr() for tensor in (*steps, *numbers) if tensor is not None]
        if len(set(counters)) < len(counters):
            raise ValueError(
                f"two parameters share a {' or '.join(['step counter', *rule.numbers])}"
            )
        rows = [steps, *slots, *beside]
        held = [t for row in rows for t in row if t is not None]
        self.parts = [(t, local(t)) for t in [*self.params, *held] if is_dtensor(t)]
        self.tensors = _tensors.Tensors(torch.Tensor, list(map(local, [*self.params, *held])))
        arrays = self.tensors.arrays
        array_of = {id(t): a for t, a in zip([*self.params, *held], arrays, strict=True)}
        states = [state[param] for param in self.params if param in state]
        of_ints = optimizer._counts_in_ints
        self.counters = _tensors.Counters(
            [array_of.get(id(step)) for step in steps],
            starts,
            states if of_ints else None,
            [array_of[id(number)] for number in numbers],
        )
        array_of.update(zip(map(id, numbers), self.counters.numbers, strict=True))
        self.seen = _tensors.Snapshot([state, *states, *self.lists], "step" if of_ints else None)
        plan = _core.Plan(
            rule,
            arrays[: len(self.params)],
            [tuple(array_of.get(id(slot)) for slot in row) for row in slots],
            None,
            self.counters.arrays,
            self.group_of,
            self.rows,
            [f"parameter {i}" for i in range(len(self.params))],
            semantics=optimizer._semantics,
            clip=0,
            clip_limit=0.0,
            nonfinite=0,
            ema_decay=0.0,
            num_threads=0,
            completed_steps=0,
            fresh=fresh,
            beside=[tuple(array_of.get(id(t)) for t in row) for row in beside],
            stochastic=options.stochastic_rounding,
            seed=options.seed,
            indices=self.indices,
            logs=self.logs_of(optimizer),
        )
        plan.unshared = True
        return plan

    def logs_of(self, optimizer: Owner) -> list[_core.RowLog] | None:
        """Return what the rows of each parameter have missed, if they may."""
        if optimizer._rows != "exact":
            return None
        return [optimizer._logs.setdefault(param, _core.RowLog()) for param in self.params]

    def catch_up(self) -> None:
        """Have all rows take the steps that they have missed, where memory is what it was."""
        if self.plan is not None and self.plan.behind and self.tensors.in_place():
            self.refresh()
            increment_version(self.params)

    def refresh(self, which: int | None = None, rows: NDArray[Any] | None = None) -> None:
        """Have rows of one parameter, or of all, take the steps that they have missed."""
        assert self.plan is not None
        share_threads(self.plan)
        self.plan.refresh(which, rows)

    def prepare(
        self, optimizer: Owner, others: list[torch.Tensor] | None = None
    ) -> tuple[_core.Plan, list[Any]]:
        """Return the plan and the gradients, or raise RefusedError and leave all as it was.

        `others`, which have a gradient, are to be updated before it.
        """
        try:
            if self.grads is None:
                raise ValueError("the gradients are not what they were a moment ago")
            if self.plan is None:
                with torch.no_grad():
                    self.plan = self.make_plan(optimizer)
            if not self.counters.read():
                raise ValueError("a step counter is not a whole number")
            if others:
                self.plan.check_gradients(self.grads)
                if self.meets(others):
                    raise ValueError("gradients or state share memory with another parameter's")
        except (TypeError, ValueError) as error:
            self.undo()
            raise RefusedError(f"the kernels refuse: {error}") from error
        return self.plan, self.grads

    def meets(self, others: list[torch.Tensor]) -> bool:
        """Tell whether memory that one of the two updates writes is memory of the other."""
        states = [self.state.get(param) or {} for param in others]
        slots = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
        written = pieces([*others, *slots])
        read = pieces([param.grad for param in others if param.grad is not None])
        owned = self.tensors.arrays
        grads = [g.values if isinstance(g, Rows) else g for g in self.grads or ()]
        return _tensors.meet(torch.Tensor, written, [*owned, *grads]) or (
            _tensors.meet(torch.Tensor, read, owned)
        )

    def undo(self) -> None:
        """Take back the state that was made for a step that did not come to pass."""
        if self.lacking:
            for param, had in self.lacking:
                if had is None:
                    self.state.pop(param, None)
                else:
                    self.state[param].clear()
                    self.state[param].update(had)
            self.lacking, self.plan = [], None

    def step(self, optimizer: Owner, grad_scale: torch.Tensor | None) -> None:
        """Update the parameters that are fit, or raise RefusedError and leave all as it was."""
        scale = 1.0 if grad_scale is None else float(grad_scale)
        plan, grads = self.prepare(optimizer)
        try:
            share_threads(plan)
            plan.step(grads, scale, False)
        except (TypeError, ValueError) as error:
            self.undo()
            raise RefusedError(f"the kernels refuse: {error}") from error
        self.lacking = []
        self.counters.write()
        updated = self.params
        if self.gradients.missing:
            updated = [p for p, grad in zip(updated, grads, strict=True) if grad is not None]
        increment_version(updated)
        if self.parts:
            increment_version([part for _, part in self.parts])
        if grad_scale is not None:  # as fused=True leaves them
            held = [param.grad for param in updated if param.grad is not None]
            with torch.no_grad():
                torch._foreach_div_([g._values() if g.is_sparse else g for g in held], scale)
