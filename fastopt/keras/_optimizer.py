"""What fastopt's optimizers for Keras share: a step, and who updates which variable in it."""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, ClassVar, cast

import keras

from fastopt import FallbackWarning, _core
from fastopt._framework import Options, checked_options, form_of
from fastopt._options import choice
from fastopt.keras._backend import Backend
from fastopt.keras._step import Array, RefusedError, Settings, Unfit
from fastopt.keras._storage import (
    Stored,
    codes_of,
    count_scales,
    name_for,
    name_of,
    refuse_types,
    refuse_unlike,
    values_of,
)

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
    _slot_names: ClassVar[tuple[str, ...]]  # Keras's, in the rule's order; the rule may have more
    _correction: ClassVar[Any] = None  # of a bias, as Keras computes it: a Correction
    _has_warned = False
    _decisions: Any = None
    _updates: Any = None
    _is_lazy = False
    _stored = Stored(Options(), {})

    def __init__(
        self,
        *args: Any,
        state_dtype: str | None = None,
        master_weights: bool | None = None,
        stochastic_rounding: bool | None = None,
        seed: int = 0,
        rows: str | None = None,
        **kwargs: Any,
    ) -> None:
        options = checked_options(master_weights, state_dtype, stochastic_rounding, seed)
        super().__init__(*args, **kwargs)
        given = {
            "state_dtype": options.state_dtype,
            "master_weights": None if master_weights is None else options.master_weights,
            "stochastic_rounding": (
                None if stochastic_rounding is None else options.stochastic_rounding
            ),
            "seed": options.seed or None,
            "rows": _checked_rows(rows, options, self.gradient_accumulation_steps),
        }
        self._stored = Stored(options, {k: v for k, v in given.items() if v is not None})
        self._is_lazy = rows is not None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_parent" in vars(cls):
            cls.__init__ = _constructor(cls._parent)  # type: ignore[method-assign]

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make such an optimizer; Keras's own unless it has others."""
        config: dict[str, Any] = super().get_config()
        return {**config, **self._stored.given}

    def _hypers(self) -> dict[str, Any]:
        """Return the rule's hyperparameters but for the learning rate and the decay."""
        raise NotImplementedError

    def _slots(self) -> tuple[Sequence[Any] | None, ...]:
        """Return Keras's variables for each of the rule's slots; None for one that is not kept."""
        raise NotImplementedError

    def _advanced(self) -> list[tuple[Any, Any]]:
        """Return Keras's variable for the rule's number, if any, and its value after this step."""
        return []

    def _leaves_rows(self, hypers: dict[str, Any]) -> bool:
        """Tell whether a step without decay leaves rows as they are where the gradient is zero."""
        return False

    def build(self, variables: Any) -> None:
        """Make the optimizer's variables, as Keras does."""
        new = not self.built
        if new:
            refuse_types(self._stored.options, variables)
            self._decisions = _Decisions()
        super().build(variables)
        for index, variable in enumerate(variables if new and self._stored.asked else ()):
            storage = self._stored.of(self._rule, variable)
            if storage.master and not self._overwrite_variable_with_gradient(variable):
                # Zeros are right for any value: a master that does not round to it is replaced.
                self._stored.masters[index] = self.add_variable(
                    variable.shape,
                    dtype="int16" if storage.master == "master_bits" else "float32",
                    name=name_for(variable, storage.master),
                )

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> Any:
        """Make one of the optimizer's variables, as Keras does or as the options say."""
        if name not in self._slot_names or not self._stored.asked:
            return super().add_variable_from_reference(reference_variable, name, initializer)
        storage = self._stored.of(self._rule, reference_variable)
        slot = self._rule.slots[self._slot_names.index(name)]
        shape = tuple(reference_variable.shape)
        if not storage.in_8bit(slot):
            return self.add_variable(
                shape, initializer, form_of(storage, slot), name=name_for(reference_variable, name)
            )
        starts: list[Any] = ["zeros", "zeros"]
        if initial := getattr(initializer, "value", 0.0):  # Adagrad's: keras.initializers.Constant
            starts = [partial(_converted, a) for a in codes_of(storage, slot, shape, initial)]
        codes, scales = (
            self.add_variable(form, start, "uint8", name=name_for(reference_variable, own_name))
            for form, start, own_name in (
                (shape, starts[0], f"{name}_8bit"),
                ((count_scales(shape),), starts[1], f"{name}_scale"),
            )
        )
        self._stored.scales[id(codes)] = scales
        return codes

    def load_own_variables(self, store: Any) -> None:
        """Take over saved variables, as Keras does; raise for those of another storage."""
        if self.built:
            counters = (self.iterations, self._learning_rate)
            refuse_unlike(self._stored.asked, self.variables, counters, store)
        super().load_own_variables(store)

    def decoded_state(self, variable: Any) -> dict[str, Array]:
        """Return copies of a variable's state in float32 (float64), whatever it is stored in.

        Parameters
        ----------
        variable : keras.Variable
            One of those that the optimizer was built for.

        Returns
        -------
        dict
            Arrays under Keras's names; and, for a variable of 16 bits with master weights,
            ``master``: its weights in float32.

        Raises
        ------
        ValueError
            If the optimizer was not built for this variable.

        Examples
        --------
        >>> import keras, numpy as np
        >>> import fastopt.keras as optimizers
        >>> w = keras.Variable(np.float32([3, -2]))
        >>> opt = optimizers.Adagrad(0.5, initial_accumulator_value=0, state_dtype="8bit")
        >>> opt.apply([np.float32([2, 4])], [w])
        >>> print(opt.decoded_state(w))
        {'accumulator': array([ 4., 16.], dtype=float32)}
        """
        try:
            index = self._get_variable_index(variable)
        except (AttributeError, KeyError):
            raise ValueError(
                f"this optimizer has no state of {name_of(variable)}: give one of the variables "
                "that it was built for, after build() or the first step"
            ) from None
        decoded = {}
        if (master := self._stored.masters.get(index)) is not None:
            decoded["master"] = values_of(False, variable, None, master)
        for name, slot, own in zip(self._slot_names, self._rule.slots, self._slots(), strict=False):
            if own is not None:
                scales = self._stored.scales.get(id(own[index]))
                decoded[name] = values_of(slot in self._rule.unsigned, own[index], scales)
        return decoded

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
            result.append({"name": name_of(variable), "index": index, "runs": runs, "why": why})
        return result

    def _apply_weight_decay(self, variables: Any) -> None:
        """Leave it to the update, which is always next: the kernels decay in the same pass."""

    def _clip_gradients(self, grads: Any) -> Any:
        clip = super()._clip_gradients
        clips = self.clipnorm or self.global_clipnorm or self.clipvalue
        if not clips or not any(map(backend.is_sparse, grads)) or self._has_own_update():
            return clip(grads)
        return clip(grads) if backend.unfit_step() else backend.clipped(grads, clip)

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
        advanced = self._advanced()
        if update is not None:
            try:
                update(learning_rate, self.iterations, *(v for v, _ in advanced))
            except RefusedError as refused:  # a gradient that is another variable's value
                reasons = [reason or _refusal(refused) for reason in reasons]
                left = pairs
                self._decide(pairs, indices, reasons)
        if left:
            self._run_parents(left, learning_rate, advanced)
        for variable, value in advanced:
            self.assign(variable, value)

    def _updates_by_rows(
        self, grad: Any, hypers: dict[str, Any], decay: float, scales: Sequence[Any]
    ) -> bool:
        """Tell whether the rows of a gradient are all that a step changes."""
        if not backend.is_sparse(grad):
            return False
        if self._is_lazy:
            return True
        in_8bit = any(own is not None for own in scales)  # where rows may have a scale in common
        return decay == 0 and not in_8bit and self._leaves_rows(hypers)

    def _run_parents(
        self, pairs: list[tuple[Any, Any]], learning_rate: Any, advanced: list[tuple[Any, Any]]
    ) -> None:
        grads, variables = _unzipped(pairs)
        super()._apply_weight_decay(variables)
        if self._has_own_update() or not backend.by_itself():
            # Unlike PyTorch's update of all at once, it calls update_step, and assigns values.
            for variable, value in advanced:
                self.assign(variable, value)
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
        for (grad, variable), reason in zip(pairs, reasons, strict=True):
            if reason is not None and self._is_lazy and backend.is_sparse(grad):
                raise self._refused(variable, "rows='lazy'", reason)
        if self._decisions.latest == (indices, reasons):
            return
        for (_, variable), reason in zip(pairs, reasons, strict=True):
            if reason is not None and not self._stored.is_keras(self._rule, variable):
                raise self._refused(variable, str(self._stored.options), reason)
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

    @staticmethod
    def _refused(variable: Any, what: str, reason: Unfit) -> RuntimeError:
        return RuntimeError(
            f"{name_of(variable)}: Keras's own update would have to run, which does not have "
            f"{what}, since {reason.why}; nothing was updated. {reason.cure}".rstrip()
        )

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
            f"{name_of(example)}: {most.why}. {most.cure} Or use keras.optimizers.{name}, which "
            "does the same and does not warn. fastopt_info() tells the reason for each variable."
        )

    def _prepare(
        self, grads: list[Any], variables: list[Any], hypers: dict[str, Any]
    ) -> Callable[..., None]:
        """Return the kernels' update, or raise RefusedError; it takes what each step has."""
        variables = [backend.native(v) for v in variables]
        indices = [self._get_variable_index(v) for v in variables]
        slots = self._slots()
        decay = 0.0 if self.weight_decay is None else backend.rounded(self.weight_decay)
        decays = tuple(decay if self._use_weight_decay(v) else 0.0 for v in variables)
        rows, by_rows = [], []
        for index, grad, own_decay in zip(indices, grads, decays, strict=True):
            own = [None if slot is None else slot[index] for slot in slots]
            scales = [self._stored.scales.get(id(slot)) for slot in own]
            rows.append([*own, self._stored.masters.get(index), *scales])
            by_rows.append(self._updates_by_rows(grad, hypers, own_decay, scales))
        settings = Settings(
            self._rule,
            tuple((name, float(value)) for name, value in hypers.items()),
            tuple(tuple(own is not None for own in row) for row in rows),
            tuple(indices),
            decays,
            tuple(v.name for v in variables),
            tuple(by_rows),
            self._correction,
            self._stored.options.stochastic_rounding,
            self._stored.options.seed,
        )
        beside = [backend.native(own) for row in rows for own in row if own is not None]
        if self._updates is None:
            self._updates = backend.Updates()
        update: Callable[..., None] = self._updates.find(settings, [*variables, *beside], grads)
        return update


class _Decisions:
    """Why Keras's own update runs, or None, by the indices of variables.

    Keras would track lists and dicts that are attributes of its own objects.
    """

    def __init__(self) -> None:
        self.latest: tuple[list[int], list[Unfit | None]] | None = None
        self.reasons: dict[int, Unfit | None] = {}


_KERAS_NAMES = {"alpha": "rho", "beta1": "beta_1", "beta2": "beta_2", "eps": "epsilon"}


def _checked_rows(rows: Any, options: Options, accumulated: int | None) -> Any:
    if rows is None:
        return None
    if rows == "exact":
        raise ValueError(
            "rows='exact' is not for Keras: rows would have to be brought up to date before a "
            "model looks them up, where Keras calls no optimizer. By default (None) a step has "
            "the numbers of a dense one; rows='lazy' leaves rows without a gradient as they are"
        )
    if choice("rows", rows, ("lazy",)) and options.state_dtype == "8bit":
        raise ValueError(
            "rows='lazy' does not go with state_dtype='8bit', in which rows may have a scale in "
            "common; give another state_dtype, or rows=None"
        )
    if accumulated:
        raise ValueError(
            "rows='lazy' does not go with gradient_accumulation_steps: Keras adds gradients up as "
            "dense ones, which are of all rows; give one of the two"
        )
    return rows


def _refusal(refused: RefusedError) -> Unfit:
    return Unfit(
        f"the kernels refuse: {refused}",
        "fastopt's kernels run where variables, slots and gradients have memory of their own.",
    )


def _converted(array: Array, shape: Any, dtype: Any = None) -> Any:
    return keras.ops.convert_to_tensor(array, dtype)


def _constructor(parent: Any) -> Callable[..., None]:
    """Return a constructor with the signature of Keras's, and options behind."""

    @functools.wraps(parent.__init__)
    def __init__(self: KernelOptimizer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        KernelOptimizer.__init__(self, *args, **kwargs)

    own = inspect.signature(KernelOptimizer.__init__).parameters.values()
    options = [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
    signature = inspect.signature(parent.__init__)
    *arguments, rest = signature.parameters.values()
    vars(__init__)["__signature__"] = signature.replace(parameters=[*arguments, *options, rest])
    return __init__


def _unzipped(pairs: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [first for first, _ in pairs], [second for _, second in pairs]
