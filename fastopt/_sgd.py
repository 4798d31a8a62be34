"""Gradient descent with momentum."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from fastopt import _core
from fastopt._hypers import checks
from fastopt._settings import Options, takes_options
from fastopt.optimizer import LearningRate, Optimizer


class SGD(Optimizer):
    r"""Gradient descent, with momentum, dampening and Nesterov's look-ahead.

    Parameters
    ----------
    params : list, tuple or generator of numpy.ndarray, dict, or list of dict
        The arrays to update in place: of float32 or float64, or objects that expose such memory
        (buffer protocol, DLPack). They come in a list, in a dict name -> array, in a pytree of
        nested lists, tuples and dicts, or in parameter groups: dicts with ``"params"`` and
        hyperparameters of their own. An index with a list or an array, ``P[rows]``, makes a copy,
        so P stays as it is.
    lr : float or callable, optional
        Learning rate, at least 0; or a function of ``completed_steps`` that returns it.
    momentum : float, optional
        At least 0.
    dampening : float, optional
        Any number; the gradient enters the buffer times ``1 - dampening``.
    weight_decay : float, optional
        At least 0.
    nesterov : bool, optional
        Use the gradient at the point that the momentum leads to. Under torch semantics this needs
        a momentum above 0 and no dampening; under Keras's, without momentum it changes nothing.
    semantics : {"torch", "keras"}, optional
        Whose formula to follow; it changes no default.
    maximize : bool, optional
        Ascend instead of descend.
    decoupled_weight_decay : bool, optional
        Shrink the weights by ``1 - lr*weight_decay`` instead of adding to the gradient.
    clip_value, clip_norm, global_clip_norm : float, optional
        Clip each element; each gradient by its norm; all gradients by their common norm. At most
        one of them.
    nonfinite : {"propagate", "skip", "raise"}, optional
        What a step does if any gradient has a NaN or an infinity. With "skip" and "raise" it
        leaves every parameter, state array and counter as it was.
    ema_decay : float, optional
        Keep an exponential moving average of the weights, in ``ema``.
    accumulate : int, optional
        Gradient accumulation over this many micro-batches: the last of so many calls of ``step``
        updates, with the mean of their gradients.
    no_decay : str, list of str, or callable, optional
        Parameters excluded from weight decay: patterns of their names, such as ``"*.bias"``, or a
        function of (name, array), or of (index, array) if they have no names. If the optimizer is
        to be pickled, a module has to define the function under a name: a lambda will not do.
    master_weights : bool, optional
        For parameters of 16 bits: train float32 weights, of which the parameter always holds the
        rounding to nearest. It costs 2 bytes an element beside bfloat16 and 4 beside float16. None
        is True; False rounds the parameter itself.
    state_dtype : {"float32", "bfloat16", "8bit"}, optional
        What state is stored in (arithmetic is float32): 4, 2 or 1 byte an element and slot. None is
        float32; for float64 parameters it has to be None, and all is float64.
    stochastic_rounding : bool, optional
        Round what is stored in fewer bits up or down at random, so that it is right on average:
        rounding to nearest loses updates that are smaller than half a unit in the last place. None
        is True. It does not concern weights that have a master.
    seed : int, optional
        Random bits are a function of it, of the step, the parameter's number and the element's.
    rows : {"lazy", "exact"}, optional
        What a gradient of some rows (:class:`fastopt.Rows`) means for the other rows. "lazy": they
        do not take part in the step. "exact": their gradient is zero, to the bit as in a dense run;
        they take the steps that they have missed when they are next needed, and a model calls
        :meth:`refresh` before it reads them. Not with ``ema_decay``.
    num_threads : int, optional
        Upper bound on the threads of a step. Results do not depend on it.

    Raises
    ------
    TypeError
        For the wrong kind of argument or dtype.
    ValueError
        For a value out of range, and for parameters that are read-only, not dense, or overlap.

    Notes
    -----
    For each element, with the gradient :math:`g` (scaled, clipped, decayed), momentum :math:`\mu`,
    dampening :math:`d`, buffer :math:`b` (``state["momentum_buffer"]``):

    .. math:: b_1 = g_1, \quad b_t = \mu b_{t-1} + (1 - d) g_t, \quad
        \theta_t = \theta_{t-1} - \gamma b_t

    and with Nesterov :math:`\theta_t = \theta_{t-1} - \gamma (g_t + \mu b_t)`. Without momentum
    :math:`\theta_t = \theta_{t-1} - \gamma g_t`, and no state but ``step``. Where momentum is
    switched on later, in ``param_groups``, each buffer starts as :math:`b_1` with its parameter's
    next gradient.

    Under Keras semantics the buffer is Keras's velocity, which holds the learning rate, so a change
    of the rate acts on new gradients only:

    .. math:: v_0 = 0, \quad v_t = \mu v_{t-1} - \gamma (1 - d) g_t, \quad
        \theta_t = \theta_{t-1} + v_t

    and with Nesterov :math:`\theta_t = \theta_{t-1} + \mu v_t - \gamma g_t`. (Keras itself has no
    dampening.)

    References
    ----------
    .. [1] B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.
    .. [2] I. Sutskever, J. Martens, G. Dahl and G. Hinton, "On the importance of initialization
       and momentum in deep learning", ICML 2013.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([3.0, -2.0])
    >>> opt = fastopt.SGD([w], lr=0.1, momentum=0.5)
    >>> for _ in range(100):
    ...     result = opt.step([w.copy()])  # the gradient of |w|^2 / 2
    >>> bool(np.abs(w).max() < 1e-9)
    True
    """

    _rule = _core.Rule("sgd")
    _checks: ClassVar = checks(_rule)

    @takes_options
    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
                "decoupled_weight_decay": decoupled_weight_decay,
            },
            options,
        )

    def _check_together(self, values: dict[str, float], where: str) -> None:
        if not values["nesterov"]:
            return
        needs_momentum = self._settings.semantics == "torch" and values["momentum"] == 0
        if needs_momentum or values["dampening"] != 0:
            raise ValueError(
                f"{where}nesterov=True needs momentum > 0 and dampening = 0, got "
                f"momentum={values['momentum']!r} and dampening={values['dampening']!r}"
            )
