"""PyTorch's optimizers on fastopt's kernels: ``import fastopt.torch as optim``.

Each class is a subclass of its namesake in ``torch.optim``, with the same signature, defaults,
errors and state; only the update differs. Dense float32 and float64 tensors in the CPU's memory are
updated in place by fastopt's kernels, all of them in one call; for every other parameter the
namesake's own update runs.

State lives where PyTorch keeps it, in ``optimizer.state``, under PyTorch's names. A run (`_Run`)
borrows that memory and is made anew as soon as a parameter, a state tensor, a group or an option
that matters is no longer what it was.

``Optimizer``, ``lr_scheduler`` and ``swa_utils`` are PyTorch's own, for scripts that look here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch.autograd import profiler
from torch.autograd.graph import increment_version
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim import optimizer as torch_optimizer

from fastopt import _core, _tensors
from fastopt._torch_fit import (
    COMPILED,
    DISPATCHED,
    KINDS,
    MIXED,
    SHARES,
    extents,
    is_by_dtype,
    is_fixed,
    is_plain,
    pieces,
    reasons,
    unfit,
    unfit_group,
    warn,
)
from fastopt._torch_threads import share_threads

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Optimizer", "RMSprop", "lr_scheduler", "swa_utils"]

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"fastopt.torch needs PyTorch 2.13 or newer, this is {torch.__version__}")


class _Kernels(torch.optim.Optimizer):
    """What the classes share: a step whose update is fastopt's."""

    _rule: ClassVar[_core.Rule]
    _namesake: ClassVar[type[torch.optim.Optimizer]]
    _state_lists: ClassVar[int]  # that the namesake's _init_group takes
    _counts: ClassVar[bool] = True  # steps, in state["step"]
    _fixed: ClassVar[dict[str, bool]] = {"bias_correction": True, "decoupled_weight_decay": False}

    param_groups: list[dict[str, Any]]
    _run: _Run | None = None
    _refusal: str | None = None  # why all of the latest step was PyTorch's, if it was
    _refused: tuple[int, int] = (0, 0)  # the parameters and elements of that step
    _has_warned = False

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model again and returns the loss.

        Returns
        -------
        object
            What `closure` returned; None without one.
        """
        if torch.compiler.is_compiling():
            loss = None if closure is None else _loss_of(closure)
            self._leave_to_namesake_eagerly(COMPILED)
            _own_step(self._namesake)(self)
            return loss
        loss = None if closure is None else _loss_of(closure)
        if torch._C._len_torch_dispatch_stack():  # a mode wants to see every operation on a tensor
            self._leave_to_namesake(DISPATCHED)
            _own_step(self._namesake)(self)
            return loss
        # GradScaler leaves both to optimizers with fused=True.
        grad_scale, found_inf = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
        if found_inf is not None and found_inf.item():
            return loss
        run = self._run
        if run is None or not (run.is_current(self) and run.read_gradients()):
            self._run = self._refusal = None
            run = _Run(self, run)
            run.read_gradients()
        rest = None  # all of them
        try:
            if run.others:
                others = [p for p in run.others if p.grad is not None]
                if run.params:
                    run.prepare(self, others)
                if not self._has_warned:
                    size = sum(param.numel() for param in others)
                    if size > run.size():
                        self._warn(run.left(), run.size() + size)
                self._step_of_namesake(others)
                rest = run.params
                # A subclass of a tensor may have run any code there.
                run.read_gradients()
                if run.plan is not None and not run.tensors.in_place():
                    run.grads = None
            if run.params:
                run.step(self, grad_scale)
            self._run = run
        except _RefusedError as refused:
            self._leave_to_namesake(str(refused))
            if rest is None:
                _own_step(self._namesake)(self)
            else:
                self._step_of_namesake(rest)
        except BaseException:
            run.undo()
            raise
        finally:
            run.gradients.release()
        return loss

    @functools.wraps(_step)
    def step(self, *args: Any, **kwargs: Any) -> Any:
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or profiler._is_profiler_enabled
        ):
            # PyTorch puts its hooks around a step that a subclass or somebody else has put in the
            # place of this one, which is called from there.
            outermost = getattr(type(self).step, "__code__", None)
            if outermost is not self._observed_step.__code__:
                return self._observed_step(*args, **kwargs)
        return self._step(*args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]  # so PyTorch does not put its hooks around it
    _observed_step = torch.optim.Optimizer.profile_hook_step(_step)

    def _step_of_namesake(self, params: list[torch.Tensor]) -> None:
        """Run the update of the class in torch.optim, for some parameters alone."""
        groups, chosen = self.param_groups, set(params)
        subset = [{**g, "params": [p for p in g["params"] if p in chosen]} for g in groups]
        self.param_groups = [group for group in subset if group["params"]]
        try:
            _own_step(self._namesake)(self)
        finally:
            self.param_groups = groups

    def _leave_to_namesake(self, why: str) -> None:
        """Remember that all of this step is PyTorch's, and warn, once, before it begins."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        size = sum(p.numel() for p in params)
        self._run, self._refusal, self._refused = None, why, (len(params), size)
        if not self._has_warned and size > 0:
            self._warn([(param, why) for param in params], size)

    _leave_to_namesake_eagerly = torch._disable_dynamo(_leave_to_namesake)

    def _warn(self, left: list[tuple[torch.Tensor, str]], size: int) -> None:
        """Warn that PyTorch updates most of a step's elements."""
        warn(self, left, size)
        self._has_warned = True  # if it was an error, it has to be one again

    def __repr__(self) -> str:
        text: str = super().__repr__()
        if self._refusal is not None:
            few, (many, size) = (0, 0), self._refused
        elif self._run is not None:
            few = len(self._run.params), sum(p.numel() for p in self._run.params)
            others = self._run.others
            many, size = few[0] + len(others), few[1] + sum(p.numel() for p in others)
        else:
            return text
        return (
            f"{text[:-1]}fastopt updates {few[0]} of {many} parameters, "
            f"{few[1]} of {size} elements\n)"
        )

    def fastopt_info(self) -> list[dict[str, Any]]:
        """Tell for each parameter what updates it.

        Returns
        -------
        list of dict
            In the order of the parameters: ``"group"`` and ``"index"``, its place in
            ``param_groups``; ``"name"``, if it was given one, else None; ``"runs"``, which is
            ``"fastopt"`` or ``"torch"``; and ``"why"``, the reason for the latter, else None. It
            is about a step that would follow now, with the gradients that are there now.

        Examples
        --------
        >>> import torch, fastopt.torch
        >>> w, h = torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)
        >>> for info in fastopt.torch.SGD([w, h]).fastopt_info():
        ...     print(info["runs"], info["why"])
        fastopt None
        torch its dtype is torch.bfloat16
        """
        if torch.compiler.is_compiling():
            info: list[dict[str, Any]] = self._info_eagerly(COMPILED)
            return info
        return self._info(DISPATCHED if torch._C._len_torch_dispatch_stack() else self._refusal)

    def _info(self, refusal: str | None) -> list[dict[str, Any]]:
        whys = iter(reasons(self)[0])
        alone = set() if self._run is None else self._run.updated(self)
        result = []
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [None] * len(group["params"])
            for index, (name, param) in enumerate(zip(names, group["params"], strict=True)):
                why = next(whys)
                if why in (SHARES, MIXED) and id(param) in alone:  # with what is not updated
                    why = None
                why = why or refusal
                runs = "fastopt" if why is None else "torch"
                result.append(
                    {"group": number, "index": index, "name": name, "runs": runs, "why": why}
                )
        return result

    _info_eagerly = torch._disable_dynamo(_info)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._run = self._refusal = None

    # ---- what a rule needs to know --------------------------------------------------------------

    def _row(self, group: Mapping[str, Any]) -> list[float]:
        """Return a group's hyperparameters in the order of the rule."""
        values = {**group, **self._fixed}
        return [float(values[name]) for name in self._rule.hypers]

    def _make_state(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        """Make the state of a parameter that has a gradient, as the namesake does."""
        lists: list[list[Any]] = [[] for _ in range(self._state_lists)]
        self._init_group({**group, "params": [param]}, *lists)


def _loss_of(closure: Callable[[], Any]) -> Any:
    with torch.enable_grad():
        return closure()


def _own_step(namesake: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """Return a class's step without PyTorch's hooks around it."""
    step: Any = namesake.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[no-any-return]


# ---- steps on the kernels ------------------------------------------------------------------------


class _RefusedError(Exception):
    """The kernels cannot do this step, and have changed nothing."""


class _Run:
    """An optimizer's parameters, sorted by who updates them, and a plan for those that are fit.

    Making one changes nothing; the plan, and the state that it needs, are made by the first step.
    It does not refer to the optimizer, so that this goes, with its state, as soon as it is dropped.
    """

    plan: _core.Plan | None = None

    def __init__(self, optimizer: _Kernels, previous: _Run | None) -> None:
        self.state, self.groups = optimizer.state, optimizer.param_groups
        self.params: list[torch.Tensor] = []
        self.group_of: list[int] = []
        self.others: list[torch.Tensor] = []
        self.why: list[str] = []
        self.unfit: list[tuple[torch.Tensor, int]] = []  # the others, but for those that share
        self.lacking: list[tuple[torch.Tensor, dict[str, Any] | None]] = []
        watched = []
        waiting = []  # for their first gradient
        # Those that had a gradient before are not waited for: they may get one in every other step.
        active = set() if previous is None else {*previous.params, *previous.others}
        self.lists = [group["params"] for group in self.groups]
        self.unfit_groups = [unfit_group(group) for group in self.groups]
        self.by_dtype = [is_by_dtype(group) for group in self.groups]
        self.read_groups(optimizer)
        whys, sharing = reasons(optimizer)
        places = [(p, n) for n, group in enumerate(self.groups) for p in group["params"]]
        for i, ((param, number), why) in enumerate(zip(places, whys, strict=True)):
            has = self.state.get(param) or {}
            lacks = why is None and any(has.get(name) is None for name in self.used[number])
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
        # What the others have in memory, and who shares it, has to stay as it is.
        plain = [param for param in watched if is_plain(param)]
        self.watched = _tensors.Tensors(torch.Tensor, plain, False) if plain else None
        self.extents = [(p, extents(p)) for p in watched if not is_plain(p)]
        arrays = [_tensors.as_array(torch.Tensor, param) for param in self.params]
        self.gradients = _tensors.Gradients(torch.Tensor, KINDS, self.params, arrays, waiting)
        self.grads: list[Any] | None = None
        self.full_size: int = sum(param.numel() for param in self.params)

    def read_groups(self, optimizer: _Kernels) -> None:
        """Take over the groups' hyperparameters."""
        self.rows = [
            [0.0] * len(optimizer._rule.hypers) if unfit else optimizer._row(group)
            for group, unfit in zip(self.groups, self.unfit_groups, strict=True)
        ]
        self.used = [optimizer._rule.used_slots(row) for row in self.rows]
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

    def is_current(self, optimizer: _Kernels) -> bool:
        """Tell whether this is still what the optimizer needs; take over hyperparameters."""
        if (
            self.plan is None
            or optimizer.state is not self.state
            or optimizer.param_groups is not self.groups
            or not self.seen.unchanged()
            or not self.tensors.in_place()
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
            used = self.used
            self.read_groups(optimizer)
            if self.used != used:
                return False
            for number, row in enumerate(self.rows):
                self.plan.set_hypers(number, row)
        return all(
            param.grad is None
            or self.unfit_groups[number]
            or unfit(param, self.state.get(param) or {}, self.used[number])
            for param, number in self.unfit
        )

    def updated(self, optimizer: _Kernels) -> set[int]:
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

    def make_plan(self, optimizer: _Kernels) -> _core.Plan:
        """Make the state that is lacking, and a plan that borrows the tensors."""
        rule, state = optimizer._rule, self.state
        starts, slots, steps = [], [], []
        for param, number in zip(self.params, self.group_of, strict=True):
            used = self.used[number]
            had = state.get(param) or {}
            lacks = any(had.get(name) is None for name in used)
            if lacks:
                self.lacking.append((param, dict(had) if param in state else None))
                optimizer._make_state(param, self.groups[number])
            has = state.get(param) or {}
            slots.append([has[name] if name in used else None for name in rule.slots])
            steps.append(has.get("step") if optimizer._counts else None)
            starts.append(0 if lacks else 1)  # which is all that a rule without `step` looks at
        counters = [step.data_ptr() for step in steps if step is not None]
        if len(set(counters)) < len(counters):
            raise ValueError("two parameters share a step counter")
        self.held = held = [
            t for t in (*steps, *(slot for row in slots for slot in row)) if t is not None
        ]
        self.tensors = _tensors.Tensors(torch.Tensor, [*self.params, *held])
        # PyTorch takes half the time to look at a tensor that not only Python refers to: so these
        # are each the gradient of a tensor, all of whose elements are one. (Not the parameters,
        # whose hooks may lead back here where Python could not see it, and never free them.)
        self.referrers = [tensor.new_empty(()).expand(tensor.shape) for tensor in held]
        for referrer, tensor in zip(self.referrers, held, strict=True):
            referrer.grad = tensor
        arrays = self.tensors.arrays
        array_of = {id(t): a for t, a in zip([*self.params, *held], arrays, strict=True)}
        self.counters = _tensors.Counters([array_of.get(id(step)) for step in steps], starts)
        states = [state[param] for param in self.params if param in state]
        self.seen = _tensors.Snapshot([state, *states, *self.lists])
        return _core.Plan(
            rule,
            arrays[: len(self.params)],
            [tuple(array_of.get(id(slot)) for slot in row) for row in slots],
            None,
            self.counters.arrays,
            self.group_of,
            self.rows,
            [f"parameter {i}" for i in range(len(self.params))],
            semantics=0,
            clip=0,
            clip_limit=0.0,
            nonfinite=0,
            ema_decay=0.0,
            num_threads=0,
            completed_steps=0,
        )

    def prepare(
        self, optimizer: _Kernels, others: list[torch.Tensor] | None = None
    ) -> tuple[_core.Plan, list[Any]]:
        """Return the plan and the gradients, or raise _RefusedError and leave all as it was.

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
            raise _RefusedError(f"the kernels refuse: {error}") from error
        return self.plan, self.grads

    def meets(self, others: list[torch.Tensor]) -> bool:
        """Tell whether memory that one of the two updates writes is memory of the other."""
        states = [self.state.get(param) or {} for param in others]
        slots = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
        written = pieces([*others, *slots])
        read = pieces([param.grad for param in others if param.grad is not None])
        owned = [*self.params, *self.held]
        return _tensors.meet(torch.Tensor, written, [*owned, *self.gradients.held]) or (
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

    def step(self, optimizer: _Kernels, grad_scale: torch.Tensor | None) -> None:
        """Update the parameters that are fit, or raise _RefusedError and leave all as it was."""
        scale = 1.0 if grad_scale is None else float(grad_scale)
        plan, grads = self.prepare(optimizer)
        try:
            share_threads(plan)
            plan.step(grads, scale, False)
        except (TypeError, ValueError) as error:
            self.undo()
            raise _RefusedError(f"the kernels refuse: {error}") from error
        self.lacking = []
        self.counters.write()
        updated = self.params
        if self.gradients.missing:
            updated = [p for p, grad in zip(updated, grads, strict=True) if grad is not None]
        increment_version(updated)
        if grad_scale is not None:  # as fused=True leaves them
            with torch.no_grad():
                torch._foreach_div_([param.grad for param in updated], scale)


# ---- the classes ---------------------------------------------------------------------------------


class SGD(_Kernels, torch.optim.SGD):
    """:class:`torch.optim.SGD`, updated by fastopt.

    Signature, defaults and errors are the namesake's; :class:`fastopt.SGD` has the mathematics.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
    >>> optimizer = optim.SGD([w], lr=0.1, momentum=0.9)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 2.4000, -1.6000])
    """

    _rule = _core.Rule("sgd")
    _namesake = torch.optim.SGD
    _counts = False

    def _make_state(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        # The namesake's first step makes the buffer, of the gradient: so does the rule's.
        buffer = torch.zeros_like(param, memory_format=torch.preserve_format)
        self.state[param]["momentum_buffer"] = buffer


class Adagrad(_Kernels, torch.optim.Adagrad):
    """:class:`torch.optim.Adagrad`, updated by fastopt.

    Signature, defaults and errors are the namesake's; :class:`fastopt.Adagrad` has the mathematics.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
    >>> optimizer = optim.Adagrad([w], lr=1.0)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 2., -1.])
    """

    _rule = _core.Rule("adagrad")
    _namesake = torch.optim.Adagrad
    _state_lists = 4


class RMSprop(_Kernels, torch.optim.RMSprop):
    """:class:`torch.optim.RMSprop`, updated by fastopt.

    Signature, defaults and errors are the namesake's; :class:`fastopt.RMSprop` has the mathematics.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
    >>> optimizer = optim.RMSprop([w], lr=0.1)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 2.0000, -1.0000])
    """

    _rule = _core.Rule("rmsprop")
    _namesake = torch.optim.RMSprop
    _state_lists = 6

    def _row(self, group: Mapping[str, Any]) -> list[float]:
        # The namesake takes a momentum below 0, which only a group can have, for none.
        return super()._row({**group, "momentum": max(float(group["momentum"]), 0.0)})


class Adam(_Kernels, torch.optim.Adam):
    """:class:`torch.optim.Adam`, updated by fastopt.

    Signature, defaults and errors are the namesake's; :class:`fastopt.Adam` has the mathematics.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
    >>> optimizer = optim.Adam([w], lr=1.0)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 2., -1.])
    """

    _rule = _core.Rule("adam")
    _namesake: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adam
    _state_lists = 6
    _fixed: ClassVar[dict[str, bool]] = {"bias_correction": True}

    def _row(self, group: Mapping[str, Any]) -> list[float]:
        beta1, beta2 = group["betas"]
        values = {"decoupled_weight_decay": False, **group, "beta1": beta1, "beta2": beta2}
        return super()._row(values)


class AdamW(Adam, torch.optim.AdamW):
    """:class:`torch.optim.AdamW`, updated by fastopt.

    Signature, defaults and errors are the namesake's; :class:`fastopt.AdamW` has the mathematics.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
    >>> optimizer = optim.AdamW([w], lr=1.0, weight_decay=0.5)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([0.5000, 0.0000])
    """

    _namesake = torch.optim.AdamW
