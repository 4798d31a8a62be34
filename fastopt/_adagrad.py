"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from fastopt import _core
from fastopt._hypers import checks
from fastopt._options import real
from fastopt._settings import Options, takes_options
from fastopt.optimizer import LearningRate, Optimizer


class Adagrad(Optimizer):
    r"""Adagrad: a rate for each element that falls with the squared gradients it has seen.

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
    lr_decay : float, optional
        At least 0; the learning rate is divided by ``1 + (t-1)*lr_decay``.
    weight_decay : float, optional
        At least 0.
    initial_accumulator_value : float, optional
        Where ``state["sum"]`` starts; at least 0.
    eps : float, optional
        At least 0.
    semantics : {"torch", "keras"}, optional
        Whose formula to follow; it changes no default.
    maximize : bool, optional
        Ascend instead of descend.
    decoupled_weight_decay : bool, optional
        Shrink the weights by ``1 - lr*weight_decay`` instead of adding to the gradient.
    rowwise : bool, optional
        Row-wise Adagrad, for embedding tables: keep one sum for each row, ``state["row_sum"]`` of
        shape ``param.shape[:1]``, instead of one for each element. A row is what one index of the
        parameter's first axis has; in memory it has to be one stretch, as in C order.
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
    For each element, with the gradient :math:`g` (scaled, clipped, decayed) and the sum :math:`s`
    (``state["sum"]``):

    .. math:: s_t = s_{t-1} + g_t^2, \quad
        \theta_t = \theta_{t-1} - \frac{\gamma}{1 + (t-1)\,\mathrm{lr\_decay}}
        \frac{g_t}{\sqrt{s_t} + \epsilon}

    Under Keras semantics the denominator is :math:`\sqrt{s_t + \epsilon}`. (Keras itself has no
    ``lr_decay``, and starts its sum at 0.1.)

    Row-wise, a row of :math:`d` elements has one sum, of the means of its squared gradients, and
    one denominator, which are computed in float64 whatever the parameter is:

    .. math:: s_t = s_{t-1} + \frac{1}{d} \sum_{i=1}^{d} g_{t,i}^2, \quad
        \theta_{t,i} = \theta_{t-1,i} - \frac{\gamma}{1 + (t-1)\,\mathrm{lr\_decay}}
        \frac{g_{t,i}}{\sqrt{s_t} + \epsilon}

    This is FBGEMM's exact row-wise Adagrad. The sums are float32 (float64 for a float64 parameter)
    whatever ``state_dtype`` is.

    References
    ----------
    .. [1] J. Duchi, E. Hazan and Y. Singer, "Adaptive subgradient methods for online learning and
       stochastic optimization", JMLR 12, 2011.
    .. [2] M. Naumov et al., "Deep learning recommendation model for personalization and
       recommendation systems", arXiv:1906.00091, 2019.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([3.0, -2.0])
    >>> opt = fastopt.Adagrad([w], lr=1.0)
    >>> opt.step([np.array([10.0, -0.1])]).skipped
    False
    >>> w.round(6)
    array([ 2., -1.])

    An embedding table of 1000 rows, of which a batch has looked up two:

    >>> table = np.ones((1000, 64), np.float32)
    >>> opt = fastopt.Adagrad([table], lr=0.1, rowwise=True)
    >>> opt.state[0]["row_sum"].shape
    (1000,)
    >>> opt.step([fastopt.Rows([3, 999], np.full((2, 64), 0.5, np.float32))]).skipped
    False
    >>> float(opt.state[0]["row_sum"][3]), float(table[3, 0]), float(table[4, 0])
    (0.25, 0.8999999761581421, 1.0)
    """

    _rule = _core.Rule("adagrad")
    _checks: ClassVar = checks(_rule) | {"initial_accumulator_value": real}

    @takes_options
    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        rowwise: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "lr_decay": lr_decay,
                "weight_decay": weight_decay,
                "initial_accumulator_value": initial_accumulator_value,
                "eps": eps,
                "maximize": maximize,
                "decoupled_weight_decay": decoupled_weight_decay,
                "rowwise": rowwise,
            },
            options,
        )

    def _initial(self, group: Mapping[str, Any]) -> Mapping[str, float]:
        start = group["initial_accumulator_value"]
        return {"sum": start, "row_sum": start}
