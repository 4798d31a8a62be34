"""NAdam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from fastopt import _core
from fastopt._hypers import checks
from fastopt._settings import Options, takes_options
from fastopt.optimizer import LearningRate, Optimizer


class NAdam(Optimizer):
    r"""NAdam: Adam whose momentum looks ahead, as Nesterov's does, and warms up.

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
    betas : tuple of two floats, optional
        Decay of the averages of the gradient and of its square; each in [0, 1).
    eps : float, optional
        At least 0.
    weight_decay : float, optional
        At least 0.
    momentum_decay : float, optional
        How fast the momentum warms up from the half of its value; at least 0.
    decoupled_weight_decay : bool, optional
        Shrink the weights by ``1 - lr*weight_decay`` instead of adding to the gradient.
    semantics : {"torch", "keras"}, optional
        Whose formula to follow; it changes no default.
    maximize : bool, optional
        Ascend instead of descend.
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
    For each element, with the gradient :math:`g` (scaled, clipped, decayed), :math:`m`
    (``state["exp_avg"]``) and :math:`v` (``state["exp_avg_sq"]``), and for each parameter
    :math:`P` (``state["mu_product"]``, a 0-d float64 array that begins at 1):

    .. math:: \mu_t = \beta_1 \left(1 - \tfrac{1}{2} 0.96^{t \psi}\right), \quad
        P_t = P_{t-1} \mu_t

    .. math:: m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2

    .. math:: \theta_t = \theta_{t-1} - \gamma \left(\frac{\mu_{t+1} m_t}{1 - P_t \mu_{t+1}}
        + \frac{(1 - \mu_t) g_t}{1 - P_t}\right)
        \bigg/ \left(\sqrt{\frac{v_t}{1 - \beta_2^t}} + \epsilon\right)

    with ``momentum_decay`` for :math:`\psi`; under Keras semantics :math:`\psi` is 1. Keras has one
    product for all parameters, which every step with any gradient advances; here each parameter has
    its own, and only its own steps advance it.

    References
    ----------
    .. [1] T. Dozat, "Incorporating Nesterov momentum into Adam", ICLR Workshop, 2016.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([3.0, -2.0])
    >>> opt = fastopt.NAdam([w], lr=0.1)
    >>> opt.step([np.array([1e-3, 1e3])]).skipped
    False
    >>> round(opt.state[0]["mu_product"].item(), 4)
    0.4501
    """

    _rule = _core.Rule("nadam")
    _checks: ClassVar = checks(_rule)

    @takes_options
    def __init__(
        self,
        params: Any,
        lr: LearningRate = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "momentum_decay": momentum_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
                "maximize": maximize,
            },
            options,
        )

    def _initial(self, group: Mapping[str, Any]) -> Mapping[str, float]:
        return {"mu_product": 1.0}
