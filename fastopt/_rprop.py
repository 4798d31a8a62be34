"""Rprop."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from fastopt import _core
from fastopt._hypers import check_order, checks
from fastopt._settings import Options, takes_options
from fastopt.optimizer import LearningRate, Optimizer


class Rprop(Optimizer):
    r"""Rprop: a step size for each element, which grows until the sign of its gradient changes.

    Parameters
    ----------
    params : list, tuple or generator of numpy.ndarray, dict, or list of dict
        The arrays to update in place: of float32 or float64, or objects that expose such memory
        (buffer protocol, DLPack). They come in a list, in a dict name -> array, in a pytree of
        nested lists, tuples and dicts, or in parameter groups: dicts with ``"params"`` and
        hyperparameters of their own. An index with a list or an array, ``P[rows]``, makes a copy,
        so P stays as it is.
    lr : float or callable, optional
        The step size that an element begins with, at least 0; or a function of ``completed_steps``
        that returns it. The steps after the first do not depend on it.
    etas : tuple of two floats, optional
        What a step size is multiplied by where the gradient changes its sign, above 0 and below 1;
        and where it keeps it, above 1.
    step_sizes : tuple of two floats, optional
        The smallest step size and the largest; at least 0.
    semantics : {"torch", "keras"}, optional
        Whose formula to follow where norms are clipped; Keras has no Rprop.
    maximize : bool, optional
        Ascend instead of descend.
    weight_decay : float, optional
        At least 0. PyTorch's Rprop has none.
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
        What ``prev`` is stored in (arithmetic is float32): 4, 2 or 1 byte an element; step sizes
        are float32. None is float32; for float64 parameters it has to be None, and all is float64.
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
    For each element, with the gradient :math:`g` (scaled, clipped, decayed), :math:`h`
    (``state["prev"]``) and the step size :math:`s` (``state["step_size"]``):

    .. math:: s_t = \min\left(\max\left(s_{t-1} \begin{cases}
        \eta_+ & g_t h_{t-1} > 0 \\ \eta_- & g_t h_{t-1} < 0 \\ 1 & \text{otherwise}
        \end{cases}, s_{\min}\right), s_{\max}\right), \quad
        h_t = \begin{cases} 0 & g_t h_{t-1} < 0 \\ g_t & \text{otherwise} \end{cases}

    .. math:: \theta_t = \theta_{t-1} - s_t\, \mathrm{sign}(h_t)

    So where the gradient changes its sign the element rests for one step, and its step size is kept
    in the next. :math:`s_0 = \gamma`: a step size of 0 in the state is one that has not begun, as
    in rows of a table that no gradient has been of. As in PyTorch, the sign of a NaN is 0.

    Rprop is for gradients of all data: those of small batches change their signs by chance.

    Keras has no Rprop: ``semantics="keras"`` has the same formula, and Keras's clipping.

    References
    ----------
    .. [1] M. Riedmiller and H. Braun, "A direct adaptive method for faster backpropagation
       learning: the RPROP algorithm", IEEE International Conference on Neural Networks, 1993.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([3.0, -2.0])
    >>> opt = fastopt.Rprop([w], lr=0.5, etas=(0.5, 2.0))
    >>> for _ in range(2):
    ...     result = opt.step([np.array([1e-3, -1e3])])
    >>> w, opt.state[0]["step_size"]
    (array([ 1.5, -0.5]), array([1., 1.]))
    """

    _rule = _core.Rule("rprop")
    _checks: ClassVar = checks(_rule)

    @takes_options
    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        maximize: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "etas": etas,
                "step_sizes": step_sizes,
                "maximize": maximize,
                "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
            },
            options,
        )

    def _check_together(self, values: dict[str, float], where: str) -> None:
        check_order(where, values["step_size_min"], values["step_size_max"])
