"""What the classes share: a step, PyTorch's hooks around it, and PyTorch's update as fallback."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch.autograd import profiler
from torch.autograd.graph import increment_version
from torch.optim import optimizer as torch_optimizer

from fastopt import _core
from fastopt._framework import Options, checked_options, is_frameworks, rounds_at_random
from fastopt._hypers import PAIRS
from fastopt._rows import row_numbers
from fastopt._storage import Storage
from fastopt.torch._fitness import COMPILED, DISPATCHED, MIXED, SHARES, pieces, reasons, warn
from fastopt.torch._rows import are_rows, checked_rows, is_sparse, watch_lookups
from fastopt.torch._run import RefusedError, Run
from fastopt.torch._storage import (
    NARROW,
    Kept,
    new_master,
    prepared,
    storage_for,
    stored,
    values_of,
    weights,
)


class KernelOptimizer(torch.optim.Optimizer):
    """What the classes share: a step whose update is fastopt's."""

    _rule: ClassVar[_core.Rule]
    _namesake: ClassVar[type[torch.optim.Optimizer]]
    _state_lists: ClassVar[int]  # that the namesake's _init_group takes
    _semantics: ClassVar[int] = 0  # as the core numbers them: PyTorch's
    _counts: ClassVar[bool] = True  # steps, in state["step"]
    _counts_in_ints: ClassVar[bool] = False  # of Python's, not in tensors
    _takes_rows_alone: ClassVar[bool] = False  # sparse gradients, and refuses dense ones
    _fixed: ClassVar[dict[str, bool]] = {
        "bias_correction": True,
        "decoupled_weight_decay": False,
        "rowwise": False,
    }

    param_groups: list[dict[str, Any]]
    _run: Run | None = None
    _refusal: str | None = None  # why all of the latest step was PyTorch's, if it was
    _refused: tuple[int, int] = (0, 0)  # the parameters and elements of that step
    _has_warned = False
    _options = Options()
    _rows: str | None = None  # what a sparse gradient means, if not what it does to the namesake
    _logs: dict[torch.Tensor, _core.RowLog]  # of the steps that rows have missed

    def __init__(
        self,
        *args: Any,
        master_weights: bool | None = None,
        state_dtype: str | None = None,
        stochastic_rounding: bool | None = None,
        seed: int = 0,
        rows: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._rows, self._logs = checked_rows(rows), {}
        if self._rows == "exact":
            if self._takes_rows_alone:
                raise ValueError(
                    f"{type(self).__name__} updates rows alone; rows='exact' is for Adam"
                )
            watch_lookups(self)
        self._options = checked_options(master_weights, state_dtype, stochastic_rounding, seed)
        super().__init__(*args, **kwargs)
        for group in self.param_groups:
            for param in group["params"]:
                if param in self.state:  # Adagrad's is there from the beginning
                    self._complete_state(param, group, ())

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_namesake" in vars(cls):
            cls.__init__ = _constructor(cls._namesake)  # type: ignore[method-assign]

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
            if run is not None:
                run.catch_up()
            self._run = self._refusal = None
            run = Run(self, run)
            run.read_gradients()
        rest = None  # all of them
        try:
            if run.others:
                others = [p for p in run.others if p.grad is not None]
                self._refuse_namesake(run.left())
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
        except RefusedError as refused:
            run.catch_up()
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
        groups, chosen = self.param_groups, {id(param) for param in params}
        subset = [{**g, "params": [p for p in g["params"] if id(p) in chosen]} for g in groups]
        self.param_groups = [group for group in subset if group["params"]]
        try:
            _own_step(self._namesake)(self)
        finally:
            self.param_groups = groups

    def _refuse_namesake(self, left: list[tuple[torch.Tensor, str]]) -> None:
        """Raise if PyTorch's own update is to run for what it does not do as the options say."""
        groups = [(p, group) for group in self.param_groups for p in group["params"]]
        places = {p: (i, group) for i, (p, group) in enumerate(groups)}
        for param, why in left:
            number, group = places[param]
            lacks: object = ""
            if not is_frameworks(self._storage_of(param), self._options):
                lacks = self._options
            elif self._is_behind(param) or (
                self._rows is not None
                and is_sparse(param.grad)
                and not self._namesake_goes_by_rows(group)
            ):
                lacks = f"rows={self._rows!r}"
            if lacks:
                raise RuntimeError(
                    f"parameter {number}: PyTorch's own update would have to run, which "
                    f"does not have {lacks}, since {why}; nothing was updated"
                )

    def _leave_to_namesake(self, why: str) -> None:
        """Remember that all of this step is PyTorch's, and warn, once, before it begins."""
        if self._run is not None:
            self._run.catch_up()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._refuse_namesake([(param, why) for param in params])
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
            ``"fastopt"`` or ``"torch"``; ``"why"``, the reason for the latter, else None; and
            ``"nbytes"``, the bytes of its state, by name. It is about a step that would follow
            now, with the gradients that are there now.

        Examples
        --------
        >>> import torch, fastopt.torch
        >>> w, c = torch.zeros(3), torch.zeros(3, dtype=torch.complex64)
        >>> for info in fastopt.torch.SGD([w, c]).fastopt_info():
        ...     print(info["runs"], info["why"])
        fastopt None
        torch its dtype is torch.complex64
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
                state = self.state.get(param) or {}
                tensors = {k: pieces([t]) for k, t in state.items() if isinstance(t, torch.Tensor)}
                nbytes = {k: sum(t.nbytes for t in found) for k, found in tensors.items()}
                told = {"group": number, "index": index, "name": name, "runs": runs, "why": why}
                result.append({**told, "nbytes": nbytes})
        return result

    _info_eagerly = torch._disable_dynamo(_info)

    def decoded_state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return copies of a parameter's state in float32 (float64), whatever it is stored in.

        Parameters
        ----------
        param : torch.Tensor
            One of the parameters.

        Returns
        -------
        dict
            Tensors under PyTorch's names; ``step``, if it is counted; and, for a parameter of 16
            bits with master weights, ``master``: its weights in float32.

        Examples
        --------
        >>> import torch, fastopt.torch
        >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
        >>> optimizer = fastopt.torch.SGD([w], momentum=0.9, state_dtype="8bit")
        >>> (w**2).sum().backward()
        >>> optimizer.step()
        >>> optimizer.decoded_state(w)["momentum_buffer"]
        tensor([ 6., -4.])
        """
        self.refresh()
        storage, state = self._storage_of(param), self.state.get(param) or {}
        decoded = {"step": copy.deepcopy(state["step"])} if "step" in state else {}
        if storage.master in state:
            decoded["master"] = weights(storage, param, state)
        for slot in storage.slots:
            if all(name in state for name in storage.arrays(slot)):
                decoded[slot] = values_of(storage, state, slot)
        return decoded

    # ---- rows that miss steps -------------------------------------------------------------------

    def refresh(self, param: torch.Tensor | None = None, rows: Any = None) -> None:
        """Bring rows up to date that have had no gradient, with ``rows="exact"``.

        After it, parameter and state have there the bits that they would have if the gradients had
        been dense, and zero in all other rows. ``torch.nn.Embedding`` and ``EmbeddingBag`` do it
        for the rows that they look up, and what saves or copies an optimizer for all. Call it
        before anything else reads or writes a table or its state. Without ``rows="exact"`` there
        is nothing to do.

        Parameters
        ----------
        param : torch.Tensor, optional
            One of the parameters. None: all.
        rows : array_like of int, optional
            Numbers of rows of `param`, from 0; one axis, in any order. None: all.

        Raises
        ------
        TypeError, ValueError
            If there is no such parameter or row; nothing is changed.

        Examples
        --------
        >>> import torch, fastopt.torch
        >>> table = torch.nn.Embedding.from_pretrained(torch.ones(4, 2), freeze=False, sparse=True)
        >>> optimizer = fastopt.torch.SGD(table.parameters(), 0.5, momentum=0.5, rows="exact")
        >>> for batch in ([0, 1], [1, 2], [2, 3]):
        ...     optimizer.zero_grad()
        ...     table(torch.tensor(batch)).sum().backward()
        ...     optimizer.step()
        >>> optimizer.refresh()
        >>> table.weight.detach()[:, 0]
        tensor([ 0.1250, -0.6250, -0.2500,  0.5000])
        """
        if param is None and rows is not None:
            raise TypeError("rows: given, but not of which param; give both")
        params = [p for group in self.param_groups for p in group["params"]]
        if param is not None:
            params = [p for p in params if p is param][:1]
            if not params:
                raise ValueError("param: expected one of this optimizer's parameters")
            if rows is not None and not are_rows(rows := row_numbers("rows", rows), len(param)):
                raise ValueError(f"rows: expected numbers of rows, from 0 to {len(param) - 1}")
        for one in params:
            if self._is_behind(one):
                self._catch_up(one, rows)
                increment_version(one)

    def _is_behind(self, param: torch.Tensor) -> bool:
        """Tell whether rows of a parameter may have missed steps."""
        return param in self._logs and self._logs[param].pending

    def _catch_up(self, param: torch.Tensor, rows: Any) -> None:
        """Have rows of a parameter take the steps that they have missed; None: all.

        The parameter's version stays: nobody can have looked up rows that were behind.
        """
        run = self._run
        if run is None or not run.is_current(self):
            if run is not None:
                run.catch_up()
            run = Run(self, run)  # over other state, or other memory
        which = next((i for i, one in enumerate(run.params) if one is param), None)
        if which is None:
            raise RuntimeError(
                "rows of a parameter have missed steps, which they cannot take any more: the "
                "kernels do not take the parameter as it is now, or its state"
            )
        try:
            with torch.no_grad():
                run.plan = run.plan or run.make_plan(self)
            run.refresh(which, None if rows is None else row_numbers("rows", rows))
        finally:
            run.undo()
        self._run = None if run.plan is None else run

    # ---- what is saved --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self.refresh()
        state_dict: dict[str, Any] = super().state_dict()
        if self._options.stochastic_rounding:
            for group in state_dict["param_groups"]:
                group["seed"] = self._options.seed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any], *, convert: bool = False) -> None:
        """Load the state of an optimizer of this class, or of its namesake.

        Parameters
        ----------
        state_dict : dict
            What :meth:`state_dict` returned.
        convert : bool, optional
            Whether to take state that is stored otherwise than this optimizer's options say, and
            another ``seed``; values are rounded to nearest.

        Notes
        -----
        Where an option says how state is stored, it keeps its bits. State as PyTorch stores it
        is loaded as by PyTorch, which casts it to the parameter's dtype.
        """

        def prepare(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
            return prepared(self._rule, self._options, self.param_groups, saved, convert)

        self.refresh()  # parameters stay
        last = self.register_load_state_dict_pre_hook(prepare)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()

    def __getstate__(self) -> dict[str, Any]:
        self.refresh()
        return {**super().__getstate__(), "_options": self._options, "_rows": self._rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for own in state.get("state", {}).values():  # before PyTorch looks at it
            if isinstance(own, dict):
                kept = {k: v.tensor for k, v in own.items() if isinstance(v, Kept)}
                own.update(kept)
        super().__setstate__(state)
        self._run = self._refusal = None
        self._logs = {}
        if self._rows == "exact":
            watch_lookups(self)

    # ---- how it is stored -----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if own := sorted({*Options._fields, "rows"} & {*param_group}):
            raise ValueError(
                f"{own[0]} is an option of the whole optimizer, not of a group: "
                f"{type(self).__name__}(params, {own[0]}={param_group[own[0]]!r})"
            )
        before = list(self.param_groups)
        super().add_param_group(param_group)
        if self._options.state_dtype is not None:
            for param in self.param_groups[-1]["params"]:
                if param.dtype not in (torch.float32, *NARROW):
                    self.param_groups[:] = before
                    raise TypeError(
                        f"state_dtype={self._options.state_dtype!r} is for parameters of float32, "
                        f"bfloat16 and float16, one of shape {tuple(param.shape)} is {param.dtype}"
                    )

    def _storage_of(self, param: torch.Tensor) -> Storage:
        return storage_for(self._rule, self._options, param.dtype)

    def _lacking(self, param: torch.Tensor, used: tuple[str, ...]) -> list[str]:
        """Return the names of what a parameter's state lacks for a step that uses these slots."""
        storage, state = self._storage_of(param), self.state.get(param) or {}
        _, *names = storage.names(used)
        if not self._counts and rounds_at_random(storage, self._options):
            names.append("step")
        return [name for name in names if state.get(name) is None]

    def _complete_state(
        self, param: torch.Tensor, group: dict[str, Any], used: tuple[str, ...]
    ) -> None:
        """Make what a parameter's state lacks for a step that uses these slots."""
        storage, lacking = self._storage_of(param), self._lacking(param, used)
        new = any(name in lacking for slot in used for name in storage.arrays(slot))
        if new:
            self._make_state(param, group)
        state = self.state[param]
        if not is_frameworks(storage, self._options):
            for slot in storage.slots:
                if slot in state and (new or not used):
                    state.update(stored(storage, param, slot, state.pop(slot)))
        if storage.master and state.get(storage.master) is None:
            state[storage.master] = new_master(storage, param)
        if "step" in lacking:  # which PyTorch's class does not count
            state["step"] = torch.tensor(0.0 if new or not used else 1.0)

    def _namesake_goes_by_rows(self, group: Mapping[str, Any]) -> bool:
        """Tell whether PyTorch's own update takes a sparse gradient, and updates its rows alone."""
        return False

    # ---- what a rule needs to know --------------------------------------------------------------

    def _row(self, group: Mapping[str, Any]) -> list[float]:
        """Return a group's hyperparameters in the order of the rule."""
        values = {"decoupled_weight_decay": False, **group}
        for option in PAIRS.keys() & group.keys():
            values.update(zip(PAIRS[option], group[option], strict=True))
        values.update(self._fixed)
        return [float(values[name]) for name in self._rule.hypers]

    def _make_state(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        """Make the state of a parameter that has a gradient, as the namesake does."""
        lists: list[list[Any]] = [[] for _ in range(self._state_lists)]
        grad = param.grad
        try:
            if grad is not None and grad.is_sparse:  # which the namesake may refuse
                param.grad = param.detach().to(grad.dtype)
            self._init_group({**group, "params": [param]}, *lists)
        finally:
            param.grad = grad


def _constructor(namesake: type[torch.optim.Optimizer]) -> Callable[..., None]:
    """Return a constructor with the signature of PyTorch's, and options behind."""

    @functools.wraps(KernelOptimizer.__init__)
    def __init__(self: KernelOptimizer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        KernelOptimizer.__init__(self, *args, **kwargs)

    own = inspect.signature(KernelOptimizer.__init__).parameters.values()
    options = [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
    signature = inspect.signature(namesake.__init__)
    parameters = [*signature.parameters.values(), *options]
    vars(__init__)["__signature__"] = signature.replace(parameters=parameters)
    return __init__


def _loss_of(closure: Callable[[], Any]) -> Any:
    with torch.enable_grad():
        return closure()


def _own_step(namesake: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """Return a class's step without PyTorch's hooks around it."""
    step: Any = namesake.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[no-any-return]
