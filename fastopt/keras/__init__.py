"""Keras 3's optimizers, with fastopt's kernels in place of their updates.

``import fastopt.keras as optimizers`` gives ``SGD``, ``Adagrad``, ``RMSprop``, ``Adam``, ``AdamW``,
``Adamax``, ``Adadelta``, ``Nadam`` and ``Lion``: subclasses of Keras's own, which keep its
arguments, defaults, variables and checkpoints, and take options for what is stored in fewer bits
and for sparse gradients. Of a training step only the update of the variables, with its weight
decay, is done here: all of them in one step. Clipping, averaging, accumulation and loss scaling are
Keras's.

``get`` and ``deserialize`` give the classes of this module where they are asked for one of these.
Whatever else is in ``keras.optimizers`` is here, too, and is Keras's own: its other optimizers
(``Adafactor``, ``Ftrl``, ...), ``schedules``, ``LossScaleOptimizer``.

``docs/keras.md`` says what runs where, and how the memory of variables is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, ClassVar

import keras
import numpy as np
from keras.optimizers import LossScaleOptimizer, Optimizer, schedules, serialize

from fastopt import _core
from fastopt._framework import NARROW
from fastopt.keras._optimizer import KernelOptimizer
from fastopt.keras._optimizer import backend as _backend

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "LossScaleOptimizer",
    "Nadam",
    "Optimizer",
    "RMSprop",
    "deserialize",
    "get",
    "schedules",
    "serialize",
]


def _class_of(cls: Any) -> Any:
    """Return the class that Keras makes: on PyTorch, one that updates all variables at once."""
    return type(cls.__new__(cls))


_SGD: Any = _class_of(keras.optimizers.SGD)
_Adagrad: Any = _class_of(keras.optimizers.Adagrad)
_RMSprop: Any = _class_of(keras.optimizers.RMSprop)
_Adam: Any = _class_of(keras.optimizers.Adam)
_AdamW: Any = _class_of(keras.optimizers.AdamW)
_Adamax: Any = _class_of(keras.optimizers.Adamax)
_Adadelta: Any = _class_of(keras.optimizers.Adadelta)
_Nadam: Any = _class_of(keras.optimizers.Nadam)
_Lion: Any = _class_of(keras.optimizers.Lion)


def _rounded_betas(optimizer: Any) -> dict[str, Any]:
    """Return the betas as they are where Keras makes tensors of them."""
    betas = {"beta1": optimizer.beta_1, "beta2": optimizer.beta_2}
    return {k: _backend.rounded(v) if isinstance(v, Real) else v for k, v in betas.items()}


@keras.saving.register_keras_serializable(package="fastopt")
class SGD(KernelOptimizer, _SGD):
    r"""Gradient descent, with momentum and Nesterov's look-ahead.

    Parameters
    ----------
    learning_rate, momentum, nesterov
        As for ``keras.optimizers.SGD``, whose arguments, defaults and errors it has.
    state_dtype : {None, "float32", "bfloat16", "8bit"}, optional
        What state is stored in; the variable's type by default.
    master_weights : bool, optional
        Whether float32 weights are trained under variables of 16 bits.
    stochastic_rounding : bool, optional
        Whether what is stored in fewer bits is rounded at random; by default where
        `state_dtype` is ``"bfloat16"`` or ``"8bit"``.
    seed : int, optional
        On which the random bits depend.
    rows : {None, "lazy"}, optional
        What a gradient of some rows (``tf.IndexedSlices``) means for the others: that it is zero
        there, as in Keras; or, lazily, that they do not take part in the step.
    **kwargs
        What all of Keras's optimizers take: ``weight_decay``, ``clipnorm``, ``use_ema``, ...

    Notes
    -----
    With gradient :math:`g`, momentum :math:`\mu` and learning rate :math:`\gamma`,

    .. math:: v \leftarrow \mu v - \gamma g, \quad \theta \leftarrow \theta + v

    and with Nesterov :math:`\theta \leftarrow \theta + \mu v - \gamma g`.

    Examples
    --------
    >>> import keras, numpy as np
    >>> import fastopt.keras as optimizers
    >>> w = keras.Variable(np.float32([3, -2]))
    >>> opt = optimizers.SGD(0.5)
    >>> opt.apply([np.float32([1, 4])], [w])
    >>> print(w.value.numpy().round(3))
    [ 2.5 -4. ]
    """

    _rule = _core.Rule("sgd")
    _parent = _SGD
    _slot_names = ("momentum",)

    def _hypers(self) -> dict[str, Any]:
        return {"momentum": _backend.rounded(self.momentum), "nesterov": self.nesterov}

    def _leaves_rows(self, hypers: dict[str, Any]) -> bool:
        return bool(hypers["momentum"] == 0)

    def _slots(self) -> tuple[Sequence[Any] | None, ...]:
        return (self.momentums if self.momentum != 0 else None,)


@keras.saving.register_keras_serializable(package="fastopt")
class Adagrad(KernelOptimizer, _Adagrad):
    r"""Adagrad: the gradient divided by the root of the sum of all its squares.

    Parameters
    ----------
    learning_rate, initial_accumulator_value, epsilon
        As for ``keras.optimizers.Adagrad``, whose arguments, defaults and errors it has.
    state_dtype : {None, "float32", "bfloat16", "8bit"}, optional
        What state is stored in; the variable's type by default.
    master_weights : bool, optional
        Whether float32 weights are trained under variables of 16 bits.
    stochastic_rounding : bool, optional
        Whether what is stored in fewer bits is rounded at random; by default where
        `state_dtype` is ``"bfloat16"`` or ``"8bit"``.
    seed : int, optional
        On which the random bits depend.
    rows : {None, "lazy"}, optional
        What a gradient of some rows (``tf.IndexedSlices``) means for the others: that it is zero
        there, as in Keras; or, lazily, that they do not take part in the step.
    **kwargs
        What all of Keras's optimizers take: ``weight_decay``, ``clipnorm``, ``use_ema``, ...

    Notes
    -----
    With gradient :math:`g` and learning rate :math:`\gamma`,

    .. math:: s \leftarrow s + g^2, \quad
        \theta \leftarrow \theta - \gamma g / \sqrt{s + \epsilon}

    Examples
    --------
    >>> import keras, numpy as np
    >>> import fastopt.keras as optimizers
    >>> w = keras.Variable(np.float32([3, -2]))
    >>> opt = optimizers.Adagrad(0.5)
    >>> opt.apply([np.float32([1, 4])], [w])
    >>> print(w.value.numpy().round(3))
    [ 2.523 -2.498]
    """

    _rule = _core.Rule("adagrad")
    _parent = _Adagrad
    _slot_names = ("accumulator",)

    def _hypers(self) -> dict[str, Any]:
        return {"eps": self.epsilon}

    def _leaves_rows(self, hypers: dict[str, Any]) -> bool:
        return bool(hypers["eps"] > 0)  # else a row with a sum of zero becomes 0/0

    def _slots(self) -> tuple[Sequence[Any] | None, ...]:
        return self._accumulators, None


@keras.saving.register_keras_serializable(package="fastopt")
class RMSprop(KernelOptimizer, _RMSprop):
    r"""RMSprop: the gradient divided by a moving average of its magnitude.

    Parameters
    ----------
    learning_rate, rho, momentum, epsilon, centered
        As for ``keras.optimizers.RMSprop``, whose arguments, defaults and errors it has.
    state_dtype : {None, "float32", "bfloat16", "8bit"}, optional
        What state is stored in; the variable's type by default.
    master_weights : bool, optional
        Whether float32 weights are trained under variables of 16 bits.
    stochastic_rounding : bool, optional
        Whether what is stored in fewer bits is rounded at random; by default where
        `state_dtype` is ``"bfloat16"`` or ``"8bit"``.
    seed : int, optional
        On which the random bits depend.
    rows : {None, "lazy"}, optional
        What a gradient of some rows (``tf.IndexedSlices``) means for the others: that it is zero
        there, as in Keras; or, lazily, that they do not take part in the step.
    **kwargs
        What all of Keras's optimizers take: ``weight_decay``, ``clipnorm``, ``use_ema``, ...

    Notes
    -----
    With gradient :math:`g` and learning rate :math:`\gamma`,

    .. math:: v \leftarrow \rho v + (1 - \rho) g^2, \quad
        \theta \leftarrow \theta - \gamma g / \sqrt{v + \epsilon}

    Centered, :math:`v - a^2` is in the place of :math:`v`, where :math:`a` is the average of the
    gradient; with momentum :math:`\mu`, the step is added to :math:`\mu` times the last one.

    Examples
    --------
    >>> import keras, numpy as np
    >>> import fastopt.keras as optimizers
    >>> w = keras.Variable(np.float32([3, -2]))
    >>> opt = optimizers.RMSprop(0.5)
    >>> opt.apply([np.float32([1, 4])], [w])
    >>> print(w.value.numpy().round(3))
    [ 1.419 -3.581]
    """

    _rule = _core.Rule("rmsprop")
    _parent = _RMSprop
    _slot_names = ("velocity", "momentum", "average_gradient")

    def _hypers(self) -> dict[str, Any]:
        return {
            "alpha": self.rho,
            "eps": self.epsilon,
            "momentum": max(self.momentum, 0.0),  # as Keras treats a negative one
            "centered": self.centered,
        }

    def _slots(self) -> tuple[Sequence[Any] | None, ...]:
        return (
            self._velocities,
            self._momentums if self.momentum > 0 else None,
            self._average_gradients if self.centered else None,
        )


@keras.saving.register_keras_serializable(package="fastopt")
class Adam(KernelOptimizer, _Adam):
    r"""Adam: momentum over a moving average of the gradient's magnitude, both bias-corrected.

    Parameters
    ----------
    learning_rate, beta_1, beta_2, epsilon, amsgrad
        As for ``keras.optimizers.Adam``, whose arguments, defaults and errors it has.
    state_dtype : {None, "float32", "bfloat16", "8bit"}, optional
        What state is stored in; the variable's type by default.
    master_weights : bool, optional
        Whether float32 weights are trained under variables of 16 bits.
    stochastic_rounding : bool, optional
        Whether what is stored in fewer bits is rounded at random; by default where
        `state_dtype` is ``"bfloat16"`` or ``"8bit"``.
    seed : int, optional
        On which the random bits depend.
    rows : {None, "lazy"}, optional
        What a gradient of some rows (``tf.IndexedSlices``) means for the others: that it is zero
        there, as in Keras; or, lazily, that they do not take part in the step.
    **kwargs
        What all of Keras's optimizers take: ``weight_decay``, ``clipnorm``, ``use_ema``, ...

    Notes
    -----
    With gradient :math:`g` and learning rate :math:`\gamma`, in step :math:`t`,

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \theta \leftarrow \theta - \gamma \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
        \frac{m}{\sqrt v + \epsilon}

    AMSGrad divides by the largest :math:`v` so far. The correction is formed as Keras does, in the
    type of the variables: for float32 it is wrong by up to 2e-5 in the first steps, and training
    goes as with Keras's own.

    Examples
    --------
    >>> import keras, numpy as np
    >>> import fastopt.keras as optimizers
    >>> w = keras.Variable(np.float32([3, -2]))
    >>> opt = optimizers.Adam(0.5)
    >>> opt.apply([np.float32([1, 4])], [w])
    >>> print(w.value.numpy().round(3))
    [ 2.5 -2.5]
    """

    _rule = _core.Rule("adam")
    _parent: ClassVar[Any] = _Adam
    _slot_names = ("momentum", "velocity", "velocity_hat")

    @staticmethod
    def _correction(lr: Any, left1: Any, left2: Any, sqrt: Callable[[Any], Any]) -> Any:
        return lr * sqrt(left2) / left1

    def _hypers(self) -> dict[str, Any]:
        return {
            "beta1": self.beta_1,
            "beta2": self.beta_2,
            "eps": self.epsilon,
            "amsgrad": self.amsgrad,
            "bias_correction": True,
        }

    def _slots(self) -> tuple[Sequence[Any] | None, ...]:
        return (
            self._momentums,
            self._velocities,
            self._velocity_hats if self.amsgrad else None,
        )


@keras.saving.register_keras_serializable(package="fastopt")
class AdamW(Adam, _AdamW):
    r"""Adam with a weight decay by default.

    Parameters
    ----------
    learning_rate, weight_decay, beta_1, beta_2, epsilon, amsgrad
        As for ``keras.optimizers.AdamW``, whose arguments, defaults and errors it has.
    state_dtype : {None, "float32", "bfloat16", "8bit"}, optional
        What state is stored in; the variable's type by default.
    master_weights : bool, optional
        Whether float32 weights are trained under variables of 16 bits.
    stochastic_rounding : bool, optional
        Whether what is stored in fewer bits is rounded at random; by default where
        `state_dtype` is ``"bfloat16"`` or ``"8bit"``.
    seed : int, optional
        On which the random bits depend.
    rows : {None, "lazy"}, optional
        What a gradient of some rows (``tf.IndexedSlices``) means for the others: that it is zero
        there, as in Keras; or, lazily, that they do not take part in the step.
    **kwargs
        What all of Keras's optimizers take: ``weight_decay``, ``clipnorm``, ``use_ema``, ...

    Notes
    -----
    :class:`Adam`, after :math:`\theta \leftarrow (1 - \gamma \lambda) \theta`. (In Keras every
    optimizer with a ``weight_decay`` does this.)

    Examples
    --------
    >>> import keras, numpy as np
    >>> import fastopt.keras as optimizers
    >>> w = keras.Variable(np.float32([3, -2]))
    >>> opt = optimizers.AdamW(0.5)
    >>> opt.apply([np.float32([1, 4])], [w])
    >>> print(w.value.numpy().round(3))
    [ 2.494 -2.496]
    """

    _parent = _AdamW


@keras.saving.register_keras_serializable(package="fastopt")
class Adamax(KernelOptimizer, _Adamax):
    r"""Adamax: bias-corrected momentum over an exponentially decayed maximum of the gradients.

    Parameters
    ----------
    learning_rate, beta_1, beta_2, epsilon
        As for ``keras.optimizers.Adamax``, whose arguments, defaults and errors it has.
    state_dtype : {None, "float32", "bfloat16", "8bit"}, optional
        What state is stored in; the variable's type by default.
    master_weights : bool, optional
        Whether float32 weights are trained under variables of 16 bits.
    stochastic_rounding : bool, optional
        Whether what is stored in fewer bits is rounded at random; by default where
        `state_dtype` is ``"bfloat16"`` or ``"8bit"``.
    seed : int, optional
        On which the random bits depend.
    rows : {None, "lazy"}, optional
        What a gradient of some rows (``tf.IndexedSlices``) means for the others: that it is zero
        there, as in Keras; or, lazily, that they do not take part in the step.
    **kwargs
        What all of Keras's optimizers take: ``weight_decay``, ``clipnorm``, ``use_ema``, ...

    Notes
    -----
    With gradient :math:`g` and learning rate :math:`\gamma`, in step :math:`t`,

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        u \leftarrow \max(\beta_2 u, |g|), \quad
        \theta \leftarrow \theta - \frac{\gamma}{1 - \beta_1^t} \frac{m}{u + \epsilon}

    Examples
    --------
    >>> import keras, numpy as np
    >>> import fastopt.keras as optimizers
    >>> w = keras.Variable(np.float32([3, -2]))
    >>> opt = optimizers.Adamax(0.5)
    >>> opt.apply([np.float32([1, 4])], [w])
    >>> print(w.value.numpy().round(3))
    [ 2.5 -2.5]
    """

    _rule = _core.Rule("adamax")
    _parent = _Adamax
    _slot_names = ("momentum", "norm")

    def _hypers(self) -> dict[str, Any]:
        return {"beta1": self.beta_1, "beta2": self.beta_2, "eps": self.epsilon}

    @staticmethod
    def _correction(lr: Any, left1: Any, left2: Any, sqrt: Callable[[Any], Any]) -> Any:
        with np.errstate(all="ignore"):
            return np.float64(lr) / np.float64(left1)  # Keras divides by it in the variable's type

    def _slots(self) -> tuple[Sequence[Any] | None, ...]:
        return self._m, self._u


@keras.saving.register_keras_serializable(package="fastopt")
class Adadelta(KernelOptimizer, _Adadelta):
    r"""Adadelta: steps as large as the recent ones, over the recent gradients' magnitude.

    Parameters
    ----------
    learning_rate, rho, epsilon
        As for ``keras.optimizers.Adadelta``, whose arguments, defaults and errors it has.
    state_dtype : {None, "float32", "bfloat16", "8bit"}, optional
        What state is stored in; the variable's type by default.
    master_weights : bool, optional
        Whether float32 weights are trained under variables of 16 bits.
    stochastic_rounding : bool, optional
        Whether what is stored in fewer bits is rounded at random; by default where
        `state_dtype` is ``"bfloat16"`` or ``"8bit"``.
    seed : int, optional
        On which the random bits depend.
    rows : {None, "lazy"}, optional
        What a gradient of some rows (``tf.IndexedSlices``) means for the others: that it is zero
        there, as in Keras; or, lazily, that they do not take part in the step.
    **kwargs
        What all of Keras's optimizers take: ``weight_decay``, ``clipnorm``, ``use_ema``, ...

    Notes
    -----
    With gradient :math:`g` and learning rate :math:`\gamma`,

    .. math:: v \leftarrow \rho v + (1 - \rho) g^2, \quad
        \Delta = \sqrt{\frac{a + \epsilon}{v + \epsilon}}\; g, \quad
        a \leftarrow \rho a + (1 - \rho) \Delta^2, \quad
        \theta \leftarrow \theta - \gamma \Delta

    Examples
    --------
    >>> import keras, numpy as np
    >>> import fastopt.keras as optimizers
    >>> w = keras.Variable(np.float32([3, -2]))
    >>> opt = optimizers.Adadelta(100.0)
    >>> opt.apply([np.float32([1, 4])], [w])
    >>> print(w.value.numpy().round(3))
    [ 2.859 -2.141]
    """

    _rule = _core.Rule("adadelta")
    _parent = _Adadelta
    _slot_names = ("accumulated_grad", "accumulated_delta_var")

    def _hypers(self) -> dict[str, Any]:
        return {"rho": self.rho, "eps": self.epsilon}

    def _slots(self) -> tuple[Sequence[Any] | None, ...]:
        return self._accumulated_grads, self._accumulated_delta_vars


@keras.saving.register_keras_serializable(package="fastopt")
class Nadam(KernelOptimizer, _Nadam):
    r"""Nadam: Adam whose momentum looks ahead, as Nesterov's does, and warms up.

    Parameters
    ----------
    learning_rate, beta_1, beta_2, epsilon
        As for ``keras.optimizers.Nadam``, whose arguments, defaults and errors it has.
    state_dtype : {None, "float32", "bfloat16", "8bit"}, optional
        What state is stored in; the variable's type by default.
    master_weights : bool, optional
        Whether float32 weights are trained under variables of 16 bits.
    stochastic_rounding : bool, optional
        Whether what is stored in fewer bits is rounded at random; by default where
        `state_dtype` is ``"bfloat16"`` or ``"8bit"``.
    seed : int, optional
        On which the random bits depend.
    rows : {None, "lazy"}, optional
        What a gradient of some rows (``tf.IndexedSlices``) means for the others: that it is zero
        there, as in Keras; or, lazily, that they do not take part in the step.
    **kwargs
        What all of Keras's optimizers take: ``weight_decay``, ``clipnorm``, ``use_ema``, ...

    Notes
    -----
    With gradient :math:`g`, learning rate :math:`\gamma`, and the product :math:`P` of all
    variables, which is 1 before the first step, in step :math:`t`,

    .. math:: \mu_t = \beta_1 \left(1 - \tfrac{1}{2} 0.96^t\right), \quad
        P_t = P_{t-1} \mu_t, \quad
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2

    .. math:: \theta \leftarrow \theta - \gamma \left(\frac{\mu_{t+1} m}{1 - P_t \mu_{t+1}}
        + \frac{(1 - \mu_t) g}{1 - P_t}\right)
        \bigg/ \left(\sqrt{\frac{v}{1 - \beta_2^t}} + \epsilon\right)

    Examples
    --------
    >>> import keras, numpy as np
    >>> import fastopt.keras as optimizers
    >>> w = keras.Variable(np.float32([3, -2]))
    >>> opt = optimizers.Nadam(0.5)
    >>> opt.apply([np.float32([1, 4])], [w])
    >>> print(w.value.numpy().round(3))
    [ 2.469 -2.531]
    """

    _rule = _core.Rule("nadam")
    _parent = _Nadam
    _slot_names = ("momentum", "velocity")
    _u_product: Any

    @staticmethod
    def _correction(lr: Any, left1: Any, left2: Any, sqrt: Callable[[Any], Any]) -> Any:
        return lr * sqrt(left2)

    def _hypers(self) -> dict[str, Any]:
        return {**_rounded_betas(self), "eps": self.epsilon}

    def _slots(self) -> tuple[Sequence[Any] | None, ...]:
        return self._momentums, self._velocities, None

    def build(self, variables: Any) -> None:
        """Make the optimizer's variables, as Keras does."""
        new = not self.built
        super().build(variables)
        if new and self._stored.options.master_weights and self._u_product.dtype in NARROW:
            self._untrack_variable(self._u_product)
            self._u_product = keras.Variable(
                1.0, dtype="float32", trainable=False, name="u_product"
            )

    def _advanced(self) -> list[tuple[Any, Any]]:
        kept = self._u_product.dtype
        dtype = "float64" if kept == "float64" else "float32"
        step, product = (keras.ops.cast(v, dtype) for v in (self.iterations + 1, self._u_product))
        beta = float(self.beta_1) if isinstance(self.beta_1, Real) else self.beta_1
        momentum = beta * (1.0 - 0.5 * 0.96**step)
        return [(self._u_product, keras.ops.cast(product * momentum, kept))]


@keras.saving.register_keras_serializable(package="fastopt")
class Lion(KernelOptimizer, _Lion):
    r"""Lion: steps of one size, in the direction of the sign of momentum and gradient.

    Parameters
    ----------
    learning_rate, beta_1, beta_2
        As for ``keras.optimizers.Lion``, whose arguments, defaults and errors it has.
    state_dtype : {None, "float32", "bfloat16", "8bit"}, optional
        What state is stored in; the variable's type by default.
    master_weights : bool, optional
        Whether float32 weights are trained under variables of 16 bits.
    stochastic_rounding : bool, optional
        Whether what is stored in fewer bits is rounded at random; by default where
        `state_dtype` is ``"bfloat16"`` or ``"8bit"``.
    seed : int, optional
        On which the random bits depend.
    rows : {None, "lazy"}, optional
        What a gradient of some rows (``tf.IndexedSlices``) means for the others: that it is zero
        there, as in Keras; or, lazily, that they do not take part in the step.
    **kwargs
        What all of Keras's optimizers take: ``weight_decay``, ``clipnorm``, ``use_ema``, ...

    Notes
    -----
    With gradient :math:`g` and learning rate :math:`\gamma`,

    .. math:: \theta \leftarrow \theta - \gamma\, \mathrm{sign}(\beta_1 m + (1 - \beta_1) g),
        \quad m \leftarrow \beta_2 m + (1 - \beta_2) g

    Examples
    --------
    >>> import keras, numpy as np
    >>> import fastopt.keras as optimizers
    >>> w = keras.Variable(np.float32([3, -2]))
    >>> opt = optimizers.Lion(0.5)
    >>> opt.apply([np.float32([1, 4])], [w])
    >>> print(w.value.numpy().round(3))
    [ 2.5 -2.5]
    """

    _rule = _core.Rule("lion")
    _parent = _Lion
    _slot_names = ("momentum",)

    def _hypers(self) -> dict[str, Any]:
        return _rounded_betas(self)

    def _slots(self) -> tuple[Sequence[Any] | None, ...]:
        return (self._momentums,)


_BY_NAME = {
    cls.__name__.lower(): cls
    for cls in (SGD, Adagrad, RMSprop, Adam, AdamW, Adamax, Adadelta, Nadam, Lion)
}


def _class_for(config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
    """Return the class here that has the place of one of Keras's, or None for any other."""
    name, registered = config["class_name"], config.get("registered_name")
    if registered not in (None, name):
        return None  # somebody's own, or from here already
    if registered and keras.saving.get_registered_object(registered, custom_objects):
        return None
    return _BY_NAME.get(name.lower())


def deserialize(config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
    """Make an optimizer from its configuration, as ``keras.optimizers.deserialize`` does.

    Parameters
    ----------
    config : dict
        What ``serialize`` returned. Of Keras's classes it makes those of this module, where there
        is one of that name; of all others, what Keras makes.
    custom_objects : dict, optional
        Classes by the names that the configuration has for them.

    Returns
    -------
    keras.optimizers.Optimizer

    Examples
    --------
    >>> import keras
    >>> import fastopt.keras as optimizers
    >>> config = keras.optimizers.serialize(keras.optimizers.Adam(0.25))
    >>> opt = optimizers.deserialize(config)
    >>> print(type(opt).__module__, float(opt.learning_rate))
    fastopt.keras 0.25
    """
    cls = _class_for(config, custom_objects)
    if cls is not None:
        name = keras.saving.get_registered_name(cls)
        config = {**config, "module": cls.__module__, "registered_name": name}
    return keras.optimizers.deserialize(config, custom_objects)


def get(identifier: Any) -> Any:
    """Make an optimizer from a name or a configuration, as ``keras.optimizers.get`` does.

    Parameters
    ----------
    identifier : str, dict, keras.optimizers.Optimizer or None
        A name, of which the case does not matter; or a configuration, as for `deserialize`; or an
        optimizer or None, which are returned as they are.

    Returns
    -------
    keras.optimizers.Optimizer or None
        Of this module, if there is a class of that name here; otherwise Keras's.

    Examples
    --------
    >>> import fastopt.keras as optimizers
    >>> for name in "adam", "ftrl":
    ...     print(type(optimizers.get(name)).__module__)
    fastopt.keras
    keras.src.optimizers.ftrl
    """
    config = {"class_name": identifier, "config": {}} if isinstance(identifier, str) else identifier
    if isinstance(config, dict) and "class_name" in config and _class_for(config) is not None:
        return deserialize(config)
    return keras.optimizers.get(identifier)


# All else that scripts look for in ``keras.optimizers``, whichever version of Keras this is.
_KERAS = [name for name in dir(keras.optimizers) if name[0] != "_" and name not in __all__]
globals().update({name: getattr(keras.optimizers, name) for name in _KERAS})
__all__ += _KERAS
