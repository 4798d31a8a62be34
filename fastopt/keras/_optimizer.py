"""What fastopt's optimizers for Keras share: a step, and who updates which variable in it."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, ClassVar, cast

import keras

from fastopt import FallbackWarning, _core
from fastopt.keras._backend import Backend
from fastopt.keras._step import RefusedError, Settings, Unfit

_name = keras.backend.backend()
if _name not in ("tensorflow", "torch"):
    raise ImportError(
        f"fastopt.keras cannot work on Keras's {_name} backend: its arrays are immutable, and its "
        "training step is compiled as a whole, where no outside kernel can run. Use "
        "keras.optimizers there; or set KERAS_BACKEND to tensorflow or torch; or train NumPy "
        "arrays with fastopt.Adam and the others."
    )
backend: Backend = cast(Backend, importlib.import_module(f"fastopt.keras._{_name}"))


class KernelOptimizer(keras.optimizers.Optimizer):
    """What the optimizers share: which variables the kernels take, and what Keras's do."""

    _rule: ClassVar[_core.Rule]
    _parent: ClassVar[Any]  # Keras's own class
    _correction: ClassVar[Any] = None  # of a bias, as Keras computes it: a Correction
    _has_warned = False
    _decisions: Any = None
    _updates: Any = None

    def _hypers(self) -> dict[str, Any]:
        """Return the rule's hyperparameters but for the learning rate and the decay."""
        raise NotImplementedError

    def _slots(self) -> tuple[Sequence[Any] | None, ...]:
        """Return Keras's variables for each of the rule's slots; None for one that is not kept."""
        raise NotImplementedError

    def build(self, variables: Any) -> None:
        """Make the optimizer's variables, as Keras does."""
        if not self.built:
            self._decisions = _Decisions()
        super().build(variables)

    def fastopt_info(self) -> list[dict[str, Any]]:
        """Tell for each trainable variable what updates it.

        Returns
        -------
        list of dict
            In the order of the variables that the optimizer was built for, and empty before it was:
            ``"name"``, the variable's path; ``"index"``; ``"runs"``, which is ``"fastopt"`` or
            ``"keras"``; and ``"why"``, the reason for the latter, else None. It is about the latest
            step in which the variable had a gradient. A traced function repeats what was decided
            when it was traced, which counts as a step. Before the first one it is about a step that
            would follow here and now, with a dense gradient.

        Notes
        -----
        Where Keras has wrapped the optimizer for mixed precision, it is
        ``model.optimizer.inner_optimizer``.

        Examples
        --------
        >>> import keras, numpy as np
        >>> import fastopt.keras as optimizers
        >>> w = keras.Variable(np.zeros(3), name="w")
        >>> z = keras.Variable(np.zeros(3), dtype="complex64", name="z")
        >>> opt = optimizers.SGD()
        >>> opt.build([w, z])
        >>> for info in opt.fastopt_info():
        ...     print(info["name"], info["runs"], info["why"])
        w fastopt None
        z keras its dtype is complex64
        """
        if not self.built:
            return []
        variables = self._trainable_variables
        now = self._unfit_step(list(range(len(variables))), self._hypers())
        result = []
        for index, variable in enumerate(variables):
            if index in self._decisions.reasons:
                unfit = self._decisions.reasons[index]
            elif self._overwrite_variable_with_gradient(variable):
                unfit = Unfit("it takes its gradient", "")
            else:
                unfit = now or backend.unfit(variable, None)
            runs, why = ("fastopt", None) if unfit is None else ("keras", unfit.why)
            result.append({"name": _name_of(variable), "index": index, "runs": runs, "why": why})
        return result

    def _apply_weight_decay(self, variables: Any) -> None:
        """Leave it to the update, which is always next: the kernels decay in the same pass."""

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        pairs = list(zip(grads, trainable_variables, strict=True))
        indices = [self._get_variable_index(v) for _, v in pairs]
        hypers = self._hypers()
        unfit = self._unfit_step(indices, hypers)
        reasons = [unfit or backend.unfit(v, g) for g, v in pairs]
        ours = [pair for pair, reason in zip(pairs, reasons, strict=True) if reason is None]
        left = [pair for pair, reason in zip(pairs, reasons, strict=True) if reason is not None]
        update = None
        if ours:
            try:
                if left and backend.share_memory(ours, left):
                    raise RefusedError("variables or gradients share memory")
                update = self._prepare(*_unzipped(ours), hypers)
            except RefusedError as refused:
                reasons = [reason or _refusal(refused) for reason in reasons]
                left = pairs
        self._decide(pairs, indices, reasons)
        if left:
            self._run_parents(left, learning_rate)
        if update is not None:
            try:
                update(learning_rate, self.iterations)
            except RefusedError as refused:  # a gradient that is another variable's value
                reasons = [reason or _refusal(refused) for reason in reasons]
                self._decide(pairs, indices, reasons)
                self._run_parents(ours, learning_rate)

    def _run_parents(self, pairs: list[tuple[Any, Any]], learning_rate: Any) -> None:
        grads, variables = _unzipped(pairs)
        super()._apply_weight_decay(variables)
        if self._has_own_update() or not backend.by_itself():
            # Unlike PyTorch's update of all at once, it calls update_step, and assigns values.
            keras.optimizers.Optimizer._backend_update_step(self, grads, variables, learning_rate)
        else:
            super()._backend_update_step(grads, variables, learning_rate)

    def _has_own_update(self) -> bool:
        return type(self).update_step is not self._parent.update_step

    def _unfit_step(self, indices: list[int], hypers: dict[str, Any]) -> Unfit | None:
        """Return why the kernels cannot run at all, for variables of these indices."""
        if self._has_own_update():
            return Unfit(
                f"{type(self).__name__} has an update_step of its own",
                "fastopt's kernels run for a class that leaves it as it is.",
            )
        decay = 0.0 if self.weight_decay is None else self.weight_decay
        for name, value in {**hypers, "weight_decay": decay}.items():
            if not isinstance(value, Real):
                return Unfit(
                    f"{_KERAS_NAMES.get(name, name)} is of type {type(value).__name__}",
                    "fastopt's kernels run with a number.",
                )
        if len(set(indices)) < len(indices):
            return Unfit(
                "a variable is given twice in the step",
                "fastopt's kernels run where it is given once, with the sum of its gradients.",
            )
        unfit: Unfit | None = backend.unfit_step()
        return unfit

    def _decide(
        self, pairs: list[tuple[Any, Any]], indices: list[int], reasons: list[Unfit | None]
    ) -> None:
        """Remember what is to be done, and warn, once, where it is little that the kernels do."""
        if self._decisions.latest == (indices, reasons):
            return
        if not self._has_warned:
            text = self._complaint([v for _, v in pairs], reasons)
            if text is not None:
                warning: Any = FallbackWarning(text)
                # As an error it stays what it is: neither AutoGraph nor Keras adds to its text.
                warning.ag_pass_through = warning._keras_call_info_injected = True
                warnings.warn(warning, stacklevel=2)
                self._has_warned = True
        self._decisions.latest = indices, reasons
        self._decisions.reasons.update(zip(indices, reasons, strict=True))

    def _complaint(self, variables: list[Any], reasons: list[Unfit | None]) -> str | None:
        """Return what to warn of, if the kernels update less than half of the elements."""
        sizes = [backend.size(v) for v in variables]
        left: dict[Unfit, int] = {}
        for size, reason in zip(sizes, reasons, strict=True):
            if reason is not None and reason.cure:
                left[reason] = left.get(reason, 0) + size
        if 2 * sum(left.values()) <= sum(sizes):
            return None
        most = max(left, key=left.__getitem__)
        example, name = variables[reasons.index(most)], self._parent.__name__
        return (
            f"fastopt.keras.{name}: Keras's own update runs for {sum(left.values())} of "
            f"{sum(sizes)} elements in this step. The reason for most of them, such as those of "
            f"{_name_of(example)}: {most.why}. {most.cure} Or use keras.optimizers.{name}, which "
            "does the same and does not warn. fastopt_info() tells the reason for each variable."
        )

    def _prepare(
        self, grads: list[Any], variables: list[Any], hypers: dict[str, Any]
    ) -> Callable[[Any, Any], None]:
        """Return the kernels' update, or raise RefusedError; it takes the rate and the count."""
        variables = [backend.native(v) for v in variables]
        indices = [self._get_variable_index(v) for v in variables]
        slots = self._slots()
        decay = 0.0 if self.weight_decay is None else backend.rounded(self.weight_decay)
        settings = Settings(
            self._rule,
            tuple((name, float(value)) for name, value in hypers.items()),
            tuple(slot is not None for slot in slots),
            tuple(indices),
            tuple(decay if self._use_weight_decay(v) else 0.0 for v in variables),
            tuple(v.name for v in variables),
            self._correction,
        )
        owned = []
        for variable, index in zip(variables, indices, strict=True):
            owned.append(variable)
            owned += [backend.native(slot[index]) for slot in slots if slot is not None]
        if self._updates is None:
            self._updates = backend.Updates()
        update: Callable[[Any, Any], None] = self._updates.find(settings, owned, grads)
        return update


class _Decisions:
    """Why Keras's own update runs, or None, by the indices of variables.

    Keras would track lists and dicts that are attributes of its own objects.
    """

    def __init__(self) -> None:
        self.latest: tuple[list[int], list[Unfit | None]] | None = None
        self.reasons: dict[int, Unfit | None] = {}


_KERAS_NAMES = {"alpha": "rho", "beta1": "beta_1", "beta2": "beta_2", "eps": "epsilon"}


def _refusal(refused: RefusedError) -> Unfit:
    return Unfit(
        f"the kernels refuse: {refused}",
        "fastopt's kernels run where variables, slots and gradients have memory of their own.",
    )


def _name_of(variable: Any) -> str:
    return str(variable.path if isinstance(variable, keras.Variable) else variable.name)


def _unzipped(pairs: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [first for first, _ in pairs], [second for _, second in pairs]
