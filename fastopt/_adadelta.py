"""Adadelta."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from fastopt import _core
from fastopt._hypers import checks
from fastopt._settings import Options, takes_options
from fastopt.optimizer import LearningRate, Optimizer


class Adadelta(Optimizer):
    r"""Adadelta: steps as large as the recent ones, over the recent gradients' magnitude.

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
    rho : float, optional
        Decay of both averages, from 0 to 1.
    eps : float, optional
        At least 0. The first steps are about ``lr * sqrt(eps / (1 - rho))`` long.
    weight_decay : float, optional
        At least 0.
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
    For each element, with the gradient :math:`g` (scaled, clipped, decayed), :math:`v`
    (``state["square_avg"]``) and :math:`a` (``state["acc_delta"]``):

    .. math:: v_t = \rho v_{t-1} + (1 - \rho) g_t^2, \quad
        \Delta_t = \sqrt{\frac{a_{t-1} + \epsilon}{v_t + \epsilon}}\; g_t, \quad
        a_t = \rho a_{t-1} + (1 - \rho) \Delta_t^2, \quad
        \theta_t = \theta_{t-1} - \gamma \Delta_t

    Keras's formula is the same. (Its defaults are ``lr`` 0.001, ``rho`` 0.95 and ``eps`` 1e-7.)

    References
    ----------
    .. [1] M. D. Zeiler, "ADADELTA: an adaptive learning rate method", arXiv:1212.5701, 2012.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([3.0, -2.0])
    >>> opt = fastopt.Adadelta([w])
    >>> opt.step([np.array([10.0, -0.1])]).skipped
    False
    >>> w.round(6)
    array([ 2.996838, -1.996839])
    """

    _rule = _core.Rule("adadelta")
    _checks: ClassVar = checks(_rule)

    @takes_options
    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "rho": rho,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "decoupled_weight_decay": decoupled_weight_decay,
            },
            options,
        )
